"""Measures the parts that it is told, in one process, and writes each row as a line.

python -m benchmarks.gpu.worker --sizes smoke --folder DIR --rows FILE PART...
"""

from __future__ import annotations

import argparse
import importlib
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.rows import Row, failed, not_run

PARTS = {
    "unet": ("unet", "unet_rows"),
    "instruct": ("steps", "instruct_rows"),
    "plain-loop": ("plain_loop", "plain_rows"),
    "steps": ("steps", "step_rows"),
    "data": ("data", "data_rows"),
}
"""{part: (module, function)}, the most important first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", choices=("full", "smoke"), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    args = parser.parse_args()
    with args.rows.open("a") as out:

        def write(row: Row, part: str) -> None:
            out.write(replace(row, part=part).line() + "\n")
            out.flush()

        try:
            sizes, device = _prepare(args.sizes, args.folder)
        except ImportError as error:
            for part in args.parts:
                write(not_run(part, "all of it", f"{error} (see `kosmosg doctor`)"), part)
            return
        for part in args.parts:
            module, function = PARTS[part]
            try:
                rows = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
                for row in rows(sizes, args.folder, device):
                    write(row, part)
            except ImportError as error:
                is_in_checkout = (error.name or "").partition(".")[0] in (
                    "megatron_kosmosg",
                    "benchmarks",
                )
                state = failed if is_in_checkout else not_run
                write(state(part, "all of it", str(error)), part)
            except Exception as error:  # noqa: BLE001 - the other parts have rows of their own
                write(failed(part, "the rest of it", error), part)


def _prepare(name: str, folder: Path):
    import torch

    import megatron_kosmosg  # noqa: F401 - hides what does not work before Megatron-Core looks
    from benchmarks.gpu.sizes import SIZES, write_frozen_models
    from megatron_kosmosg.launcher import ALONE
    from megatron_kosmosg.parallel.devices import choose_device
    from megatron_kosmosg.parallel.platform import prepare_megatron

    device = torch.device("cpu") if name == "smoke" else choose_device(ALONE)
    prepare_megatron(device)
    write_frozen_models(SIZES[name], folder / "models", device)
    return SIZES[name], device


if __name__ == "__main__":
    main()
