"""Plans that lead on: another batch, more GPUs, a config that runs, room for the plan's error."""

from __future__ import annotations

import json
import re

from megatron_kosmosg.cli import plan as command
from megatron_kosmosg.config.load import config_differences, load_config
from megatron_kosmosg.config.validate import validate_layout
from megatron_kosmosg.planning.dry_run import dry_run_report
from megatron_kosmosg.stages import stage_facts


def plan(config: str, num_gpus: int, *arguments: str, gpu: str = "h100-80") -> int:
    return command.main(
        ["--config", config, "--num-gpus", str(num_gpus), "--gpu", gpu, *arguments]
    )  # fmt: skip


ARITHMETIC_ALONE = ["--assume", "iteration_ms=0", "--assume", "collective_us=0"]
ARITHMETIC_ALONE += ["--assume", "launch_us=0"]
"""Else the toy models' updates take what every update takes."""


def test_a_batch_that_no_layout_divides_ends_with_the_nearest_and_their_speed(capsys):
    """31 is a prime number, and 17 GPUs make 17, 8, 4 or 2 replicas."""
    assert plan("toy_instruct", 17, "--search", "training.global_batch_size=31") == 2
    output = capsys.readouterr().err
    assert "divides training.global_batch_size=31" in output
    speeds = dict(re.findall(r"global_batch_size=(\d+): ([\d,]+) samples/s", output))
    assert set(speeds) == {"17", "34"}
    assert all(int(speed.replace(",", "")) > 0 for speed in speeds.values())


def test_a_batch_that_divides_badly_names_a_faster_one(tmp_path, capsys):
    """On 12 GPUs, 124 = 4 x 31 leaves at most four replicas; 120 and 132 give twelve."""
    found = tmp_path / "plan.json"
    settings = ["--json", str(found), "--search", "training.global_batch_size=124"]
    assert plan("toy_instruct", 12, *settings, *ARITHMETIC_ALONE) == 0
    output, faster = capsys.readouterr().out, json.loads(found.read_text())["faster"]
    assert faster[0]["times"] > 1.1
    assert any(setting.startswith("training.global_batch") for setting in faster[0]["settings"])
    assert re.search(r"x this speed .* is planned for 1(20|32) samples an update", output)


def test_an_impossible_layout_points_to_the_search(capsys):
    assert plan("toy_instruct", 3, "parallel.tensor_model_parallel_size=2") == 2
    assert "add --search, which tries every layout of 3 GPUs" in capsys.readouterr().err


def test_what_is_recommended_leaves_what_the_plan_may_be_wrong_by(tmp_path, capsys):
    found = tmp_path / "plan.json"
    assert plan("instruct_256gpu", 256, "--search", "--json", str(found), gpu="v100-32") == 0
    listed = json.loads(found.read_text())["search"]["candidates"]
    assert listed and all(entry["largest_memory_gib"] * 1.05 <= 31.7 for entry in listed)
    capsys.readouterr()


def test_a_written_config_is_the_plan_and_reads_what_the_config_reads(tmp_path, capsys):
    written = tmp_path / "mine.yaml"
    assert plan("toy_instruct", 4, "--search", "--write-config", str(written)) == 0
    capsys.readouterr()
    before, after = load_config("toy_instruct", []), load_config(written, [])
    validate_layout(after, 4, stage_facts("instruct"))
    assert "Files" in dry_run_report(after)
    changed = config_differences(before, after)
    assert changed["parallel.world_size"] == (None, 4)
    assert after.logging.planned_gpu == "h100-80"
    assert {key.split(".")[0] for key in changed} <= {"parallel", "score", "training", "logging"}
    assert after.data == before.data  # no latents that nobody has written
    assert plan(str(written), 4) == 0


def test_nothing_is_written_for_a_layout_that_does_not_fit(tmp_path, capsys):
    small = tmp_path / "small.yaml"
    small.write_text(
        "memory_gib: 2\nbf16_tflops: 10\nfp16_tflops: 10\nfp32_tflops: 5\nmemory_gb_s: 100\n"
        "link_gb_s: 10\nnetwork_gb_s: 1\ncapability: [8, 6]\n"
    )
    written = tmp_path / "mine.yaml"
    assert plan("toy_instruct", 2, "--write-config", str(written), gpu=str(small)) == 1
    output = capsys.readouterr()
    assert "is not written" in output.err and not written.exists()
    assert "no layout of stage=instruct on 2 x small fits" in output.out
    assert plan("toy_instruct", 2, "--search", gpu=str(small)) == 2
    assert "not even 16 are enough" in capsys.readouterr().err
