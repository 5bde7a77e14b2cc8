"""Peak memory and time of `tools/convert_checkpoint.py import-fairseq` at the released sizes.

Writes a file of random weights in the authors' container, imports it in a process of its own and
prints that process's peak resident memory beside the size of the model in its stored dtype. Needs
twice the model's size of disk, and its size of memory to make the file:

    python benchmarks/conversion_memory.py --stage instruct --dtype fp16 --folder /tmp/conversion
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
IMPORTS = "import megatron_kosmosg.conversion.import_fairseq"


@dataclass(frozen=True)
class Measured:
    """What one process used."""

    seconds: float
    peak_bytes: int


def measure(command: list[str]) -> Measured:
    """Runs the command; raises CalledProcessError when it fails."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Measured(time.monotonic() - started, usage.ru_maxrss * 1024)


def make_file(path: Path, stage: str, dtype: str) -> None:
    """A checkpoint of the released sizes in the authors' container, with random weights."""
    import torch

    from megatron_kosmosg.config.schema import RunConfig
    from megatron_kosmosg.conversion.authors import authors_table
    from megatron_kosmosg.conversion.checkpoint_writer import model_tensors
    from megatron_kosmosg.conversion.tensors import InMemory, as_external
    from megatron_kosmosg.parallel.platform import torch_dtype

    config = RunConfig(stage=stage)
    shapes = model_tensors(config)
    native = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    external = as_external(authors_table(config.model), InMemory(native)).names()
    numbers = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(
        torch_dtype(dtype)
    )

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        size = math.prod(shape)
        return numbers.repeat(-(-size // len(numbers)))[:size].reshape(shape).clone()

    weights = {name: draw(info.shape) for name, info in external.items()}
    tied = "gpt_model.decoder.embed_tokens.weight"
    weights["gpt_model.decoder.output_projection.weight"] = weights[tied]
    options = {"decoder_attention_heads": config.model.decoder.num_attention_heads}
    torch.save({"args": None, "cfg": {"model": options}, "model": weights}, path)
    print(sum(math.prod(shape) for shape in shapes.values()) * numbers.itemsize)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=("pretrain", "align", "instruct"), default="instruct")
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16")
    parser.add_argument("--folder", type=Path, required=True, help="new folder for both files")
    parser.add_argument("--make", action="store_true", help="only make the authors' file")
    args = parser.parse_args()
    file, output = args.folder / "checkpoint.pt", args.folder / "imported"
    if args.make:
        make_file(file, args.stage, args.dtype)
        return
    args.folder.mkdir(parents=True)
    # A process of its own: a child's peak starts at its parent's size.
    maker = [sys.executable, __file__, "--make", "--folder", str(args.folder)]
    maker += ["--stage", args.stage, "--dtype", args.dtype]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    made = subprocess.run(maker, env=environment, check=True, capture_output=True, text=True)
    model_bytes = int(made.stdout.split()[-1])
    idle = measure([sys.executable, "-c", IMPORTS])
    tool = [sys.executable, str(REPOSITORY / "tools" / "convert_checkpoint.py"), "import-fairseq"]
    used = measure([*tool, "--input", str(file), "--output", str(output)])
    print(
        f"import-fairseq, {args.stage}, {args.dtype}: model {model_bytes / 1e9:.2f} GB, peak "
        f"{used.peak_bytes / 1e9:.2f} GB ({used.peak_bytes / model_bytes:.2f} x), of which "
        f"{idle.peak_bytes / 1e9:.2f} GB after the imports; {used.seconds:.0f} s, imports "
        f"{idle.seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
