"""Memory of scoring does not grow with the images: a thousand, and ten thousand of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from megatron_kosmosg.toy.stand_in_networks import write_clip
from tests.support.peak_memory import peak_memory

TOOL = Path(__file__).parents[2] / "tools" / "evaluate_pairs.py"
RESULT_MB = 60
"""What 9,000 more items may take in Python until the result is written, with one list of scores
each; the features that they had would be twice as much."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_images_take_the_memory_of_a_thousand(tmp_path):
    """CLIP-I and CLIP-T of pairs, whose references and texts are all different."""
    clip = write_clip(tmp_path / "clip")
    for name in ("generated", "reference"):
        (tmp_path / name).mkdir()
    for i in range(10_000):
        for name, blue in (("generated", 0), ("reference", 200)):
            colour = (i % 256, i // 256, blue)
            Image.new("RGB", (32, 32), colour).save(tmp_path / name / f"{i:05d}.png")
    peaks = {}
    for count in (1_000, 10_000):
        records = [
            {
                "generated": f"generated/{i:05d}.png",
                "reference": f"reference/{i:05d}.png",
                "text": f"a red circle {i}",
            }
            for i in range(count)
        ]
        pairs = tmp_path / f"{count}.jsonl"
        pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
        options = ("--pairs", pairs, "--clip", clip, "--output", tmp_path / f"out{count}")
        peaks[count], output = peak_memory(TOOL, *options, "--device", "cpu", "--threads", "2")
        assert re.search(f"CLIP-I.*n = {count:,}", output)
    print(f"peak of 1,000 images {peaks[1_000]:.0f} MB, of 10,000 {peaks[10_000]:.0f} MB")
    assert peaks[10_000] - peaks[1_000] < RESULT_MB, peaks
