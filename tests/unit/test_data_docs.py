"""docs/data.md: its records and its commands work, on small files of the layouts it names."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_kosmosg.data.kinds import KINDS
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob, preprocess
from tests.support.data_helpers import (
    encode_image,
    main_of,
    noise_image,
    write_jsonl,
    write_parquet,
    write_tar,
    write_tokenizer,
)

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")


def commands(script: str) -> list[list[str]]:
    """The arguments of every complete command of the page that runs `script`."""
    joined = PAGE.replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line.startswith("    ")]
    found = [line.split(script, 1)[1] for line in lines if f"python {script} " in line]
    return [shlex.split(line) for line in found if "..." not in line]


@pytest.mark.parametrize("kind", KINDS)
def test_the_record_of_each_kind_becomes_a_sample(kind, tmp_path):
    section = PAGE.split(f"### {kind}\n", 1)[1].split("\n## ", 1)[0]
    (line,) = re.findall(r"^    (\{.*\})$", section.split("\n### ", 1)[0], re.MULTILINE)
    mask = np.zeros((12, 12), np.uint8)
    mask[3:6] = 255
    for role, name in re.findall(r'"(image|target|mask)": "([^"]+)"', line):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encode_image(mask) if role == "mask" else noise_image(1))
    path = write_jsonl(tmp_path / "a.jsonl", [json.loads(line)])
    model, prefix = str(write_tokenizer(tmp_path)), str(tmp_path / "out")
    preprocess(PreprocessJob(kind, (str(path),), model, prefix, max_rejects=0), lambda *_: None)
    assert len(SampleStore(prefix)) == 1


def write_public_layouts(folder: Path) -> None:
    """A record of each dataset that the page names, where its commands look for it."""
    for name in ("fineweb", "laion", "mmc4/images", "obelics", "openimages/json"):
        (folder / name).mkdir(parents=True)
    (folder / "openimages/data").mkdir()
    (folder / "instructpix2pix/data").mkdir(parents=True)
    big, small = (noise_image(i, side, side, "JPEG") for i, side in ((1, 400), (2, 12)))
    write_parquet(folder / "fineweb/0.parquet", [{"text": "red dog .", "id": "x"}])
    members = [
        (f"00000000{i}.{end}", data)
        for i, image in enumerate((big, small))
        for end, data in (("jpg", image), ("txt", b"red dog"), ("json", b'{"url": "u"}'))
    ]
    write_tar(folder / "laion/00000.tar", members)
    (folder / "mmc4/images/a.png").write_bytes(small)
    images = [{"image_name": f"{name}.png", "matched_text_index": 0} for name in "ab"]
    document = {"text_list": ["red dog ."], "image_info": images}
    write_jsonl(folder / "mmc4/docs_shard_0_v2.jsonl", [document])
    obelics = {"texts": [None, "red dog ."], "images": [{"bytes": small, "path": None}, None]}
    write_parquet(folder / "obelics/0.parquet", [obelics])
    prompt = folder / "clip-filtered-dataset/shard-00/0000001"
    prompt.mkdir(parents=True)
    texts = {"input": "red dog", "edit": "make it blue", "output": "blue dog"}
    (prompt / "prompt.json").write_text(json.dumps(texts))
    for end in "01":
        (prompt / f"77_{end}.jpg").write_bytes(small)
    # As published: the list names folders that the release does not hold.
    seeds = [["shard-00/0000001", ["77"]]] + [[f"shard-01/{i}", ["1"]] for i in range(10_434)]
    (folder / "clip-filtered-dataset/seeds.json").write_text(json.dumps(seeds))
    row = {"original_prompt": "red dog", "original_image": {"bytes": small, "path": None}}
    row |= {"edit_prompt": "make it blue", "edited_image": {"bytes": small, "path": None}}
    write_parquet(folder / "instructpix2pix/data/0.parquet", [row])
    crops = [base64.b64encode(small).decode()] * 3
    (folder / "openimages/data/0.tsv").write_text("\t".join(["red dog", "dog", *crops]) + "\n")
    (folder / "openimages/json/train.json").write_text(json.dumps([{"source": ["0.tsv"]}]))


def test_the_commands_for_public_datasets_give_datasets_that_pass_the_check(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("pyarrow")
    write_public_layouts(tmp_path)
    shutil.copy(write_tokenizer(tmp_path), tmp_path / "sentencepiece.bpe.model")
    monkeypatch.chdir(tmp_path)
    kinds = set()
    given = commands("tools/preprocess_data.py")
    assert len(given) >= 8
    for arguments in given:
        here = [argument.removeprefix("/") for argument in arguments]
        kind, prefix = (here[here.index(name) + 1] for name in ("--kind", "--output-prefix"))
        assert main_of("tools/preprocess_data.py", here, monkeypatch) == 0, here
        store = SampleStore(prefix)
        is_filtered = "--min-image-side" in here
        assert len(store) == (2 if kind == "caption" and not is_filtered else 1), here
        kinds.add(kind)
    assert kinds == set(KINDS)
    # MMC4 named an image that is not there.
    assert re.search(r"images left out +1\n", capsys.readouterr().out)
    (arguments,) = commands("tools/inspect_data.py")
    here = [argument.removeprefix("/") for argument in arguments]
    assert main_of("tools/inspect_data.py", here, monkeypatch) == 0
    assert "1 samples, 0 problems" in capsys.readouterr().out


def test_reasons_of_the_page_are_reasons_of_the_tool():
    """Each is a text of the source, its field's name aside."""
    package = REPOSITORY / "megatron_kosmosg"
    source = io.StringIO()
    for folder in (package / "preprocess", package / "data" / "kinds"):
        for path in sorted(folder.glob("*.py")):
            source.write(path.read_text(encoding="utf-8"))
    said = re.sub(r"\{\w+\}", "FIELD", source.getvalue())
    # What is wrong with a file is said without its field's name.
    of_images = "".join(path.read_text() for path in package.glob("data/image_*.py"))
    table = PAGE.split("## Bad records", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "`" in line]
    reasons = [reason for row in rows for reason in re.findall(r"`([^`]+)`", row.split(" | ")[1])]
    fields = ("image", "mask", "caption", "target", "text")
    assert len(reasons) > 45
    for reason in reasons:
        if reason.startswith("--"):
            continue
        forms = {re.sub(rf"\b{field}\b", "FIELD", reason) for field in fields} | {reason}
        is_of_an_image = f'"{reason.partition(" ")[2]}"' in of_images
        assert is_of_an_image or any(form in said for form in forms), reason
