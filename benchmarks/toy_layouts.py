"""Toy stages on two CPU ranks: tensor parallel (TP2) against data parallel (DP2), in one run.

Reads the data that `bash examples/quickstart.sh` leaves; trains each stage a few iterations per
layout, in turn, so that a change of the machine's speed meets both. Prints samples/s and ratios.

    python benchmarks/toy_layouts.py --quickstart runs/quickstart --iterations 20 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_kosmosg.config.load import load_config

REPOSITORY = Path(__file__).parents[1]
LAYOUTS = {
    "TP2": ("parallel.tensor_model_parallel_size=2",),
    "DP2": ("parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"),
}
PREVIOUS = {"pretrain": None, "align": "pretrain", "instruct": "align"}
WARM_UP = 3


def samples_per_second(stage: str, layout: str, quickstart: Path, iterations: int) -> list[float]:
    """One figure per iteration after the first few."""
    file = REPOSITORY / "examples" / "configs" / f"toy_{stage}.yaml"
    config = load_config(file, [])
    output = Path(tempfile.mkdtemp(prefix="toy_layouts_"))
    micro_batch = config.training.global_batch_size // (2 if layout == "DP2" else 1)
    overrides = [
        *LAYOUTS[layout],
        f"logging.output_dir={output}",
        f"training.train_iters={iterations}",
        f"training.micro_batch_size={micro_batch}",
        "optimizer.lr_warmup_iters=1",
        "training.eval_interval=0",
        "training.eval_iters=1",
        "logging.image_interval=0",
        "logging.num_images=1",
        "logging.tensorboard=false",
    ]
    for split, blend in (("train", config.data.blend), ("heldout", config.data.heldout)):
        section = "blend" if split == "train" else "heldout"
        overrides += [f"data.{section}.{n}.path={quickstart / 'data' / split / n}" for n in blend]
    if PREVIOUS[stage] is not None:
        overrides.append(f"checkpoint.load={quickstart / PREVIOUS[stage]}")
    command = [sys.executable, "-m", "megatron_kosmosg", "launch", "--ranks", "2", "train"]
    try:
        subprocess.run(
            [*command, "--config", str(file), *overrides],
            check=True,
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        lines = (output / "metrics.jsonl").read_text().splitlines()
    finally:
        shutil.rmtree(output)
    records = [json.loads(line) for line in lines]
    return [r["samples_per_sec"] for r in records if "samples_per_sec" in r][WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quickstart", type=Path, default=REPOSITORY / "runs" / "quickstart")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", nargs="+", default=list(PREVIOUS), choices=list(PREVIOUS))
    arguments = parser.parse_args()
    for stage in arguments.stages:
        found: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
        ratios = []
        for _ in range(arguments.rounds):
            medians = {}
            for layout in LAYOUTS:
                figures = samples_per_second(
                    stage, layout, arguments.quickstart.resolve(), arguments.iterations
                )
                found[layout] += figures
                medians[layout] = statistics.median(figures)
            ratios.append(medians["DP2"] / medians["TP2"])
        for layout, figures in found.items():
            print(f"{stage:9} {layout}: median {statistics.median(figures):7.1f} samples/s")
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{stage:9} DP2 / TP2: {statistics.median(ratios):.2f} ({spread})", flush=True)


if __name__ == "__main__":
    main()
