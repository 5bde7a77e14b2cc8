"""Where training asks Megatron-Core's modules for CUDA: recorded under trace, kept in a list.

usage, in the repository, on a machine without a GPU:
    python -m tests.support.shim_sites [--write]

Trains two updates of each stage on layouts that pass everything the CPU shim is for, with a save
and a resume, and notes each place in megatron.core that asks torch for CUDA, with what it asks.
Prints what is new and what is gone against shim_sites.json, which has a list for each release of
megatron-core (`--write` puts this one's there); exit code 1 where anything differs or fails. With a
new release this names the places that the shim and its self-test must know.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from megatron_kosmosg.config.schema import CheckpointConfig, RunConfig
from megatron_kosmosg.parallel import cpu_shim
from tests.support.ranks import run_ranks
from tests.support.run_case import run_stage
from tests.support.tiny_models import replace_section, tiny_config, write_stable_diffusion

_PATIENCE = 900
"""Seconds; a trace makes ranks slow, and the machine may be busy."""
SITES = Path(__file__).with_suffix(".json")
CORE = "megatron.core."
_SHIM = cpu_shim.__file__
_SELFTEST = "<string>"
_CUDA = str(Path(torch.cuda.__file__).parent)
_ANSWERS = {"cuda": "Tensor.cuda", "tensor_type": "Tensor.type"}
_ANSWERS |= {function.__name__: function.__name__ for function in cpu_shim.CUDA_FUNCTIONS}
"""{function of the shim: what it answers}"""

ROWS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "pipeline": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
        },
        {"precision": "fp16", "recompute": "selective"},
    ),
    "data": (
        2,
        {"overlap_grad_reduce": True, "overlap_param_gather": True},
        {"precision": "bf16", "recompute": "full", "micro_batch_size": 1},
    ),
}
"""Name: ranks, fields of ParallelConfig, fields of TrainingConfig."""
STAGES = {"pretrain": "", "align": ",M,N", "instruct": ",M"}


def rows() -> list[tuple[str, str]]:
    """(stage, name in ROWS) of every recording."""
    return [(stage, name) for stage in STAGES for name in ROWS]


def record_row(stage: str, name: str, folder: Path) -> set[str]:
    """Sites of all ranks: two updates with a save, then a resume and a third."""
    ranks, parallel, training = ROWS[name]
    stable_diffusion = folder / "stable-diffusion"
    if not stable_diffusion.is_dir():
        write_stable_diffusion(stable_diffusion)
    if "pipeline_model_parallel_size" in parallel:
        parallel = parallel | {"pipeline_layout": f"decoder*2|decoder*1{STAGES[stage]}"}
    config = tiny_config(stage, stable_diffusion, folder / f"{stage}-{name}", **parallel)
    config = replace_section(config, "training", **training)
    decoder = dataclasses.replace(config.model.decoder, hidden_dropout=0.1, attention_dropout=0.1)
    config = replace_section(config, "model", decoder=decoder)
    config = replace_section(config, "parallel", timeout_seconds=_PATIENCE)
    config = replace_section(config, "optimizer", lr_warmup_iters=1, lr_decay_iters=8)
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(save_interval=2))
    found: set[str] = set()
    for iters in (2, 3):
        run = replace_section(config, "training", train_iters=iters)
        found.update(*run_ranks(ranks, recorded_run, run, timeout=_PATIENCE))
    return found


def recorded_run(config: RunConfig) -> set[str]:
    """Sites that one rank of a run passes."""
    with recording() as found:
        run_stage(config)
    return found


@contextmanager
def recording() -> Iterator[set[str]]:
    """Inside, `module:function asks what` of every place in megatron.core that asks for CUDA."""
    found: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith((_SHIM, _CUDA)):
            return
        caller = frame.f_back
        module = caller.f_globals.get("__name__", "") if caller is not None else ""
        asked = _asked(frame)
        # The self-test asks in expressions of its own, which it evaluates inside these modules.
        is_own = caller is not None and caller.f_code.co_filename == _SELFTEST
        if module.startswith(CORE) and asked is not None and not is_own:
            place = module.removeprefix(CORE)
            found.add(f"{place}:{caller.f_code.co_qualname} asks {asked}")

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def _asked(frame: FrameType) -> str | None:
    name, local = frame.f_code.co_name, frame.f_locals
    if frame.f_code.co_filename != _SHIM:
        return f"the real {name}"
    if name == "create_on_cpu":
        device = local["kwargs"].get("device")
        is_cuda = device is not None and torch.device(device).type == "cuda"
        return local["create"].__name__ if is_cuda else None
    return _ANSWERS.get(name)


def _lists() -> dict[str, list[str]]:
    return json.loads(SITES.read_text()) if SITES.is_file() else {}


def main() -> int:
    """0; 1 where a stage fails or the sites are not those of the list."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put what is found in the list")
    args = parser.parse_args()
    version, failed = importlib.metadata.version("megatron-core"), False
    found: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for stage, name in rows():
            try:
                found |= record_row(stage, name, Path(folder))
            except (RuntimeError, TimeoutError) as error:
                failed = True
                print(f"{stage}, {name}: {error}", flush=True)
    listed = set(_lists().get(version, ()))
    for word, sites in (("new", found - listed), ("gone", listed - found)):
        for site in sorted(sites):
            print(f"{word}: {site}")
    if args.write and not failed:
        SITES.write_text(json.dumps(_lists() | {version: sorted(found)}, indent=1) + "\n")
    print(f"megatron-core {version}: {len(found)} sites, {len(listed)} in the list")
    return int(failed or (found != listed and not args.write))


if __name__ == "__main__":
    sys.exit(main())
