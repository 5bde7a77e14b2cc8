"""`kosmosg rehearse`: every kind of rank of a layout, what is said of it, and how it ends."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from megatron_kosmosg.cli import rehearse as command
from megatron_kosmosg.rehearsal.rehearsal_page import to_page
from megatron_kosmosg.rehearsal.rehearsal_report import failure, has_errors, peak, to_text, waits

LAYOUT = ("parallel.pipeline_model_parallel_size=2", "score.placement=dedicated")


@pytest.fixture(scope="module")
def report(rehearse) -> dict:
    """Two pipeline stages and a score rank, at tiny size."""
    return rehearse.run("instruct", *LAYOUT, "training.global_batch_size=6", num_gpus=3)


def test_every_kind_of_rank_is_rehearsed(report):
    assert [kind["name"] for kind in report["kinds"]] == [
        "decoder_stage_0",
        "decoder_stage_1",
        "score",
    ]
    assert report["num_micro_batches"] == 3
    for kind in report["kinds"]:
        assert failure(kind) is None
        assert kind["rehearsed"]["num_micro_batches"] == report["rehearsed"]
    score = report["kinds"][-1]["rehearsed"]
    assert sum(score["phases"]["backward of the U-Net"]["kernels"].values()) > 0
    assert not has_errors(report)


def test_what_a_rank_uploads_once_belongs_to_no_micro_batch(report):
    """The tables of the images' levels are among it, on every rank that has images."""
    waited = {
        kind["name"]: {
            wait.where.partition(":")[0]: wait.calls
            for wait in waits(kind["rehearsed"])
            if wait.of == "micro-batch" and wait.what.startswith("host wait")
        }
        for kind in report["kinds"]
    }
    package = "megatron_kosmosg"
    of_a_request = {f"{package}/monitoring/stopwatch.py": 1, f"{package}/score/service.py": 1}
    assert waited == {"decoder_stage_0": {}, "decoder_stage_1": {}, "score": of_a_request}
    score = report["kinds"][-1]["rehearsed"]["phases"]
    answered = score["serve"]["collectives"]["send to decoder ranks"]["calls"]
    assert answered == report["rehearsed"]


def test_the_curve_of_the_memory_reaches_the_peak_of_the_update(report):
    for kind in report["kinds"]:
        answer = kind["rehearsed"]
        phases = {name: each for name, each in answer["phases"].items() if name != "setup"}
        assert max(answer["timeline"]["bytes"]) == peak({"phases": phases})
        launched = sum(sum(phase["kernels"].values()) for phase in phases.values())
        assert answer["timeline"]["kernels"] == launched


def test_the_text_names_lines_and_says_what_it_cannot_see(report):
    text = to_text(report)
    assert "rehearsed on fake GPUs, not measured" in text and "cannot be seen: numbers" in text
    for kind in report["kinds"]:
        host = [wait for wait in waits(kind["rehearsed"]) if wait.what.startswith("host wait")]
        assert all(re.match(r"megatron_kosmosg/\S+\.py:\d+", wait.where) for wait in host), host


def test_the_page_stands_alone_and_draws_the_memory(report):
    page = to_page(report, "rehearse <x>")
    assert "What the GPU would wait for" in page and "rehearse &lt;x&gt;" in page
    assert not re.search(r"(src|href)=", page)
    images = re.findall("<svg.*?</svg>", page, re.DOTALL)
    assert len(images) == len(report["kinds"])
    for image in images:
        shapes = ElementTree.fromstring(image)
        (curve,) = shapes.findall("polygon")
        points = [tuple(map(float, point.split(","))) for point in curve.get("points").split()]
        assert all(0 <= x <= 1000 and 0 <= y <= 240 for x, y in points) and len(points) > 50


def test_an_error_of_the_program_is_named_by_its_line(rehearse):
    """Rows of 13 positions in an AlignerNet that has room for fewer."""
    report = rehearse.run("align", "model.aligner.max_positions=10", num_gpus=1)
    assert has_errors(report)
    wrong = failure(report["kinds"][0])
    assert re.match(r"decoder: in phase forward at megatron_kosmosg/models/\S+\.py:\d+: ", wrong)
    assert f"ERROR {wrong}" in to_text(report) and wrong in to_page(report, "")


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "instruct_256gpu", "--num-gpus", "255"], "255 ranks"),
        (
            ["--config", "toy_align", "training.micro_batch_size=x", "--num-gpus", "1"],
            "micro_batch",
        ),
        (["--config", "instruct_256gpu", "--gpu", "v100-32"], "training.precision=fp16"),
    ],
)
def test_what_cannot_be_rehearsed_is_one_line(capsys, arguments, output):
    assert command.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and output in line


def test_without_a_compiler_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert command.main(["--config", "instruct_256gpu"]) == 2
    assert "install" in capsys.readouterr().err


def test_the_files_are_written(tmp_path: Path, monkeypatch, report):
    monkeypatch.setattr("megatron_kosmosg.rehearsal.rehearse.rehearse", lambda *_: report)
    counts, page = tmp_path / "a.json", tmp_path / "a.html"
    code = command.main(["--config", "instruct_256gpu", "--json", str(counts), "--page", str(page)])
    assert code == 0
    written = json.loads(counts.read_text())
    assert written["figures"] == "rehearsed" and len(written["kinds"]) == 3
    assert "--config instruct_256gpu" in page.read_text()
