"""What a run on many GPUs will hold, compute, send and take; planned in one process without any."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_kosmosg.files import write_text

EPILOG = """\
One model shard of every kind of rank is built for real, on torch's meta device. Times are a model:
the assumptions it rests on are printed and can be replaced with --assume.

exit codes: 0 planned and fits; 1 planned, but too large for the GPU; 2 bad input or layout.

examples:
  tools/plan.py --config examples/configs/instruct_256gpu.yaml --num-gpus 256 --gpu h100-80
  tools/plan.py --config examples/configs/instruct_256gpu.yaml --num-gpus 64 --gpu a100-80 \\
      --json plan.json score.placement=dedicated score.ranks_per_replica=2
  tools/plan.py --config examples/configs/pretrain_256gpu.yaml --num-gpus 256 --gpu v100-32 --search
"""


def parse() -> argparse.Namespace:
    from megatron_kosmosg.planning.gpus import GPUS

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="see examples/configs")
    parser.add_argument("--num-gpus", type=int, metavar="N", help="default: parallel.world_size")
    parser.add_argument("--gpu", required=True, choices=tuple(GPUS))
    parser.add_argument(
        "--search",
        action="store_true",
        help="try all layouts, micro-batches, recomputation, and score placements; plan the best",
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="layouts listed (10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the plan there")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the rank map there")
    parser.add_argument(
        "--assume", action="append", default=[], metavar="NAME=NUMBER",
        help="replace an assumption, e.g. unet=0.3",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def main() -> int:
    """The exit code."""
    given = parse()
    from megatron_kosmosg.config.errors import ConfigError

    try:
        return run(given)
    except (ConfigError, OSError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2


def run(given: argparse.Namespace) -> int:
    from megatron_kosmosg.config.errors import ConfigError
    from megatron_kosmosg.config.load import load_config
    from megatron_kosmosg.planning.gpus import GPUS, efficiency_with
    from megatron_kosmosg.planning.plan import (
        make_plan,
        planned_config,
        search_plan,
        to_json,
        to_text,
    )

    gpu, efficiency = GPUS[given.gpu], efficiency_with(given.assume)
    config = load_config(given.config, given.overrides)
    world_size = given.num_gpus or config.parallel.world_size
    if world_size is None or world_size < 1:
        raise ConfigError("how many GPUs? give --num-gpus or parallel.world_size")
    config, notes = planned_config(config, world_size, gpu)
    facts = {}
    if given.search:
        plan, found, facts["search"] = search_plan(
            config, world_size, gpu, efficiency, notes, given.top
        )
        print(found + "\n")
    else:
        plan = make_plan(config, world_size, gpu, efficiency, notes)
    print(to_text(plan))
    if given.json is not None:
        write_text(given.json, json.dumps(to_json(plan) | facts, indent=2) + "\n")
    if given.svg is not None:
        from megatron_kosmosg.planning.rank_map import svg

        write_text(given.svg, svg(plan.estimate.world, gpu.per_node))
    return 0 if plan.estimate.fits else 1


if __name__ == "__main__":
    sys.exit(main())
