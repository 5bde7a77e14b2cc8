"""Ten iterations of every stage on one rank, through the commands, as losses and one digest each.

usage, in the repository:
    python -m tests.support.stage_hashes [--checkout FOLDER] [--python FILE] [--work FOLDER]
        [--output JSON] [--compare JSON]

Makes a small toy world, preprocesses it and trains pretrain, align and instruct from the debug
configs of c9c3073, each stage from the one before it. The digest is over all parameters of the last
checkpoint. Another machine, or another version of torch, may round otherwise: two checkouts are
compared on one machine (`--output` with the older, `--compare` with the newer); the exit code is 1
where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.digests import iterations, newest_checkpoint, parameters_digest

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "tests" / "fixtures" / "c9c3073" / "configs"
ITERATIONS = 10
SCENES = 48
BLENDS = {
    "pretrain": (("text", "caption", "interleaved"), "interleaved"),
    "align": (("caption",), "caption"),
    "instruct": (("compositional", "edit", "caption"), "compositional"),
}
"""Names that each stage's config has under data.blend, and the one under data.heldout."""


def hashes(checkout: Path, python: str, work: Path) -> dict[str, Any]:
    """{stage: {"losses", "parameters"}} of the program in `checkout`; `work` keeps the runs."""
    start = Program(checkout, python, work)
    _write_data(start, work)
    found, previous = {}, None
    for stage in BLENDS:
        start("-m", "megatron_kosmosg.train", *arguments_of(stage, checkout, work, previous))
        previous = work / stage
        found[stage] = {
            "losses": [line["loss"] for line in iterations(previous)],
            "parameters": parameters_digest(newest_checkpoint(previous)),
        }
        assert len(found[stage]["losses"]) == ITERATIONS
    return found


class Program:
    """Starts programs of one checkout, each in a process of its own."""

    def __init__(self, checkout: Path, python: str, cwd: Path) -> None:
        self._python, self._cwd = python, cwd
        self.checkout = checkout
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(checkout),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }

    def __call__(self, *arguments: str | Path) -> None:
        """Raises RuntimeError, with what the program wrote, unless it ends with 0."""
        command = [self._python, *map(str, arguments)]
        done = subprocess.run(
            command, env=self.environment, cwd=self._cwd, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{command} ended with {done.returncode}\n{done.stderr}")


def _write_data(start: Program, work: Path) -> None:
    tools, assets = start.checkout / "tools", assets_of(start.checkout)
    start(tools / "make_toy_world.py", "--output", work / "world", "--size", str(SCENES))
    for split in ("train", "heldout"):
        for kind in ("text", "caption", "interleaved", "edit", "compositional"):
            arguments = ["--kind", kind, "--input", work / "world" / split / f"{kind}.jsonl"]
            arguments += ["--tokenizer-model", assets / "sentencepiece.model"]
            arguments += ["--output-prefix", work / "data" / split / kind]
            start(tools / "preprocess_data.py", *arguments)


def arguments_of(stage: str, checkout: Path, work: Path, previous: Path | None) -> list[str]:
    """The command line of one stage's ten iterations; all paths are absolute."""
    assets = assets_of(checkout)
    names, heldout = BLENDS[stage]
    settings = {
        "data.tokenizer_model": assets / "sentencepiece.model",
        "model.vision.path": assets / "clip-vision",
        "model.diffusion.path": assets / "stable-diffusion",
        "model.clip_text.path": assets / "stable-diffusion",
        "checkpoint.load": previous or "null",
        "checkpoint.save_interval": ITERATIONS,
        "training.train_iters": ITERATIONS,
        "logging.output_dir": work / stage,
        "logging.tensorboard": "false",
        f"data.heldout.{heldout}.path": work / "data" / "heldout" / heldout,
    }
    settings |= {f"data.blend.{name}.path": work / "data" / "train" / name for name in names}
    config = CONFIGS / f"debug_{stage}.yaml"
    return ["--config", str(config), *(f"{key}={value}" for key, value in settings.items())]


def assets_of(checkout: Path) -> Path:
    """The toy world's tokenizer and frozen models."""
    return checkout / "megatron_kosmosg" / "toy" / "assets"


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """One line for each stage, saying where it first differs, if it does."""
    lines = []
    for stage, numbers in expected.items():
        pairs = zip(found[stage]["losses"], numbers["losses"], strict=True)
        first = next((i for i, (loss, other) in enumerate(pairs, 1) if loss != other), None)
        if first is not None:
            lines.append(f"{stage}: the loss of iteration {first} differs")
        elif found[stage]["parameters"] != numbers["parameters"]:
            lines.append(f"{stage}: equal losses, other parameters")
    return lines


def main() -> int:
    """0; 1 where a compared stage differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", type=Path, default=REPOSITORY, help="this one")
    parser.add_argument("--python", default=sys.executable, help="interpreter to start (this one)")
    parser.add_argument("--work", type=Path, help="new folder that keeps the runs (temporary)")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write what was found there")
    parser.add_argument("--compare", type=Path, metavar="JSON", help="what `--output` wrote")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        found = hashes(args.checkout.resolve(), args.python, work)
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if args.output is not None:
        args.output.write_text(text)
    if args.compare is None:
        return 0
    lines = differences(found, json.loads(args.compare.read_text()))
    print("\n".join(lines or [f"equal to {args.compare}"]))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
