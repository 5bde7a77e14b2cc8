"""Commands that write, killed at moments of chance: repeated, they end as undisturbed ones do.

Each is killed several times with all of its processes, by SIGKILL, anywhere in the time it takes.
`KOSMOSG_FAULT_SEED` repeats a printed seed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.data_helpers import image_records, write_jsonl, write_tokenizer
from tests.support.digests import parameters_digest
from tests.support.moment_seeds import moment_seed

REPOSITORY = Path(__file__).parents[2]
MPIRUN = Path(sys.executable).with_name("mpirun")
KOSMOSG = [sys.executable, "-m", "megatron_kosmosg"]
KILLS = 4


def finish(command: list[str], seconds: float | None = None) -> float | None:
    """Seconds that the command took; None where it was killed after `seconds`."""
    # The tests may themselves run under a launcher.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "SLURM", "OMPI"))}
    environment = inherited | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    try:
        _, output = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        # Ranks have process groups of their own; they end when whoever started them is gone.
        while _lives(process.pid):
            time.sleep(0.05)
        return None
    assert process.returncode == 0, output
    return time.monotonic() - started


def _lives(session: int) -> bool:
    listed = subprocess.run(
        ["ps", "-o", "stat=", "-s", str(session)], capture_output=True, text=True
    )
    return any(not line.startswith("Z") for line in listed.stdout.split())


def torment(command: list[str], undo: Callable[[], None]) -> None:
    """Kills `command` KILLS times, then lets it end. `undo`: removes what it leaves when it has
    ended, so that there is something to be killed; does nothing before."""
    rng, killed, ended, longest = random.Random(moment_seed()), 0, 0, 20.0
    while killed < KILLS and ended < 2 * KILLS:
        took = finish(command, rng.uniform(0.2, 1) * longest)
        killed, ended = killed + (took is None), ended + (took is not None)
        longest = longest if took is None else min(longest, took)
        undo()
    finish(command)
    print(f"{killed} kills, {ended} times it was quicker")
    assert killed >= KILLS // 2


def remove(*files: Path) -> None:
    for file in files:
        shutil.rmtree(file) if file.is_dir() else file.unlink()


def contents(files: Iterator[Path]) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in files if file.is_file()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not MPIRUN.exists(), reason="needs the mpich wheel (extra `mpi`)")
@pytest.mark.parametrize("shards", [[], ["--shard-gib", "2e-5"]], ids=["joined", "in shards"])
def test_preprocessing_under_mpi(tmp_path, shards):
    model = str(write_tokenizer(tmp_path))
    for number in range(12):
        records = image_records(tmp_path / "in", "caption", 200, number)
        write_jsonl(tmp_path / "in" / f"{number:02d}.jsonl", records)

    def command(name: str) -> list[str]:
        tool = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py"), "--resume"]
        inputs = ["--kind", "caption", "--input", str(tmp_path / "in" / "*.jsonl")]
        output = ["--tokenizer-model", model, "--output-prefix", str(tmp_path / name / "x")]
        (tmp_path / name).mkdir(exist_ok=True)
        return [str(MPIRUN), "-n", "3", *tool, *inputs, *output, *shards]

    finish(command("whole"))
    made = tmp_path / "tormented"
    unfinished = made / ".x.partial"
    torment(
        command("tormented"), lambda: None if unfinished.exists() else remove(*made.glob("x.*"))
    )
    whole, other = (contents((tmp_path / n).rglob("*")) for n in ("whole", "tormented"))
    assert whole == other and len(whole) > 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_caching_latents_on_two_ranks(past, tmp_path):
    sd = past / "models" / "stable-diffusion"

    def command(name: str) -> list[str]:
        shutil.copytree(past / "stores", tmp_path / name, dirs_exist_ok=True)
        cache = ["cache-latents", str(tmp_path / name / "caption"), "--stable-diffusion", str(sd)]
        sizes = ["--image-size", "16", "--shard-size", "2", "--batch-size", "1"]
        return [*KOSMOSG, "launch", "--ranks", "2", *cache, *sizes, "--name", "made"]

    finish(command("whole"))
    made = tmp_path / "tormented"
    torment(
        command("tormented"),
        lambda: (
            remove(*made.glob("caption.made.*")) if (made / "caption.made.json").exists() else None
        ),
    )
    whole, other = (
        contents((tmp_path / name).glob("caption.made.*")) for name in ("whole", "tormented")
    )
    assert whole == other and len(whole) > 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_import_and_export(past, tmp_path):
    sd = past / "models" / "stable-diffusion"

    def importing(name: str) -> list[str]:
        return [*KOSMOSG, "convert", "import-hf", "--input", str(past / "export"), "--output", name]

    def exporting(run: str, name: str) -> list[str]:
        inputs = ["--input", run, "--output", name, "--stable-diffusion", str(sd)]
        return [*KOSMOSG, "convert", "export-hf", *inputs]

    runs = [str(tmp_path / name) for name in ("run-whole", "run-tormented")]
    exports = [str(tmp_path / name) for name in ("export-whole", "export-tormented")]
    finish(importing(runs[0]))
    done = Path(runs[1]) / "iter_0000000"
    torment(importing(runs[1]), lambda: remove(done) if done.exists() else None)
    digests = [parameters_digest(Path(run) / done.name) for run in runs]
    assert digests[0] == digests[1]
    finish(exporting(runs[0], exports[0]))
    made = Path(exports[1])
    torment(exporting(runs[0], exports[1]), lambda: remove(made) if made.exists() else None)
    whole, other = (contents(Path(folder).rglob("*.safetensors")) for folder in exports)
    assert whole == other and whole
