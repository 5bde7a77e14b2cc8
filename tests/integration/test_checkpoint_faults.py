"""Saves that the disk prevents, and checkpoints that it has damaged.

A save that fails says why, leaves what was saved before, and the next start goes on from there. A
damaged checkpoint is named and passed over.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_kosmosg.checkpoint.folder import is_valid
from megatron_kosmosg.config.schema import RunConfig
from tests.support.fake_stage import fake_config
from tests.support.ranks import run_ranks, run_ranks_until_they_end
from tests.support.run_metrics import curve
from tests.support.training_runs import LimitFiles, run_program, train

SAVED = {"save_interval": 2, "keep_last": 0}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> list[float]:
    """Losses of six iterations that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    run_ranks(2, train, fake_config(str(folder)))
    return curve(folder)


def start(config: RunConfig, settings: dict | None = None) -> tuple[list[int], str, str]:
    """(exit codes, the one error shown, what rank 0 said of its checkpoints)."""
    ends = run_ranks_until_they_end(2, run_program, config, settings)
    assert all(end.answer is not None for end in ends), ends
    output = [end.answer[1] for end in ends]
    errors = [line for text in output for line in text.splitlines() if line.startswith("error: ")]
    assert not any("Traceback" in text for text in output), output
    assert len(errors) <= 1, errors
    return [end.answer[0] for end in ends], "".join(errors), ends[0].answer[2]


def fill(disk: Path, leave: int) -> None:
    """Takes all room on the disk but `leave` bytes."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    subprocess.run(["fallocate", "-l", str(room(disk) - leave), str(filler)], check=True)


def room(disk: Path) -> int:
    known = subprocess.run(
        ["df", "--block-size=1", "--output=avail", str(disk)], capture_output=True, check=True
    )
    return int(known.stdout.split()[1])


def test_a_full_or_read_only_disk_is_named_and_costs_no_checkpoint(small_disk, tmp_path, straight):
    save = small_disk / "checkpoints"

    def config(iterations: int = 6, is_async: bool = False) -> RunConfig:
        return fake_config(
            str(tmp_path / "run"),
            training={"train_iters": iterations},
            optimizer={"lr_decay_iters": 6},
            checkpoint={**SAVED, "save": str(save), "async_save": is_async},
        )

    assert start(config(2))[0] == [0, 0]
    for leave, is_async in ((0, False), (16384, False), (16384, True)):
        fill(small_disk, leave)
        codes, error, _ = start(config(is_async=is_async))
        assert codes == [2, 2] and "No space left on device" in error, (leave, is_async, error)
        assert "iteration 4" in error and str(save) in error and "checkpoint.save" in error
        assert is_valid(save / "iter_0000002") and not (save / "iter_0000004").exists()
        for left in save.glob("*.tmp/*"):
            left.unlink()
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    codes, error, _ = start(config())
    assert codes == [2, 2] and "Read-only file system" in error and "checkpoint.save" in error
    assert is_valid(save / "iter_0000002")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert start(config())[0] == [0, 0]
    assert curve(tmp_path / "run") == straight


def test_files_that_may_not_grow_are_named(tmp_path, straight):
    """The same through a limit on the size of files, which any user can set."""
    config = fake_config(str(tmp_path / "run"), checkpoint=SAVED)
    limit = LimitFiles(call=2 * 3, most_bytes=16384)  # in the fourth iteration
    codes, error, _ = start(config, {"hook": limit})
    assert codes == [2, 2] and "File too large" in error and "iteration 4" in error
    assert is_valid(tmp_path / "run" / "checkpoints" / "iter_0000002")
    assert start(config)[0] == [0, 0]
    assert curve(tmp_path / "run") == straight


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, straight):
    config = fake_config(str(tmp_path), checkpoint=SAVED)
    assert start(config)[0] == [0, 0]
    newest = tmp_path / "checkpoints" / "iter_0000006"
    shard, common = newest / "__1_0.distcp", newest / "common.pt"

    def goes_on(*words: str) -> None:
        codes, error, output = start(config)
        assert codes == [0, 0], error
        for word in (*words, "iter_0000006", "resumed from", "iter_0000004 at iteration 4"):
            assert word in output, output
        assert curve(tmp_path) == straight and is_valid(newest)

    shard.write_bytes(shard.read_bytes()[:100])
    goes_on("__1_0.distcp has 100 bytes of")
    flip(common, common.stat().st_size // 2)
    goes_on("common.pt has other content than was written")
    flip(shard, shard.stat().st_size // 2)
    goes_on("__1_0.distcp has other content than was written", "iter_0000006.damaged")
    assert (newest.parent / "iter_0000006.damaged").is_dir()
    for folder in newest.parent.glob("iter_*[0-9]"):
        (folder / ".metadata").unlink()
    codes, error, _ = start(config)
    assert codes == [2, 2] and "no checkpoint in" in error and ".metadata is missing" in error


def flip(path: Path, place: int) -> None:
    """Turns the bits of one byte over."""
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
