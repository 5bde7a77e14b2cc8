"""Files that evaluations read, changed at random: a value, or our error (as test_fuzz.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.evaluation.coco import read_captions
from megatron_kosmosg.evaluation.pairs import items_of_file
from tests.support.data_helpers import noise_image, write_jsonl
from tests.support.fuzzing import fuzz


def list_of_pairs(folder: Path) -> Path:
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(noise_image(1))
    record = {"generated": "a.png", "reference": ["b.png"], "text": "red"}
    return write_jsonl(folder / "pairs.jsonl", [record] * 2)


def captions_of_coco(folder: Path) -> Path:
    path = folder / "captions.json"
    annotations = {"annotations": [{"caption": "a cat"}], "images": [{"file_name": "1.jpg"}]}
    path.write_text(json.dumps(annotations))
    return path


@pytest.mark.parametrize(
    ("write", "read"),
    [(list_of_pairs, items_of_file), (captions_of_coco, lambda path: read_captions(path).drawn(1))],
)
def test_changed_files_end_in_an_error_of_ours(tmp_path, write, read):
    path = write(tmp_path)
    read(path)  # unchanged
    found = fuzz(path, lambda: read(path), (InputError,), tmp_path, seed=1, count=200, seconds=600)
    assert found == []
