"""Plans a run on many GPUs, in one process without any: what each rank will hold, compute, send and
take."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import (
    CommandParser,
    add_config,
    add_overrides,
    command_parser,
    file_path,
    note,
    positive_int,
    run_command,
)
from megatron_kosmosg.files import write_text
from megatron_kosmosg.planning.gpus import GPUS
from megatron_kosmosg.terminal_text import printable_lines

EPILOG = """\
One model shard of every kind of rank is built for real, on torch's meta device. Times are a model:
the assumptions it rests on are printed and can be replaced with --assume.

A layout fits when its memory, planned, leaves what the plan may be wrong by (memory_error).

exit codes: 0 planned and fits; 1 planned, but too large for the GPU; 2 bad input or layout.

examples:
  kosmosg plan --config instruct_256gpu --num-gpus 256 --gpu h100-80
  kosmosg plan --config instruct_256gpu --num-gpus 64 --gpu a100-80 \\
      --json plan.json score.placement=dedicated score.ranks_per_replica=2
  kosmosg plan --config pretrain_256gpu --num-gpus 256 --gpu v100-32 --search
  kosmosg plan --config instruct_256gpu --num-gpus 64 --gpu h100-80 --score-ranks 64xl40s \\
      --search
  kosmosg plan --config instruct_256gpu --num-gpus 24 --gpu my_card.yaml --search \\
      --write-config mine.yaml
"""


def build_parser() -> CommandParser:
    """The parser of the command and its options."""
    parser = command_parser("plan", __doc__, EPILOG)
    add_config(parser, required=True)
    parser.add_argument(
        "--num-gpus", type=positive_int, metavar="N", help="of the run (parallel.world_size)"
    )
    parser.add_argument(
        "--gpu",
        required=True,
        metavar="GPU",
        help=f"what they are: {', '.join(GPUS)}, or a YAML file with the figures of another one",
    )
    parser.add_argument(
        "--score-ranks",
        metavar="COUNTxGPU",
        help="score ranks of other jobs that join the run (kosmosg score-rank), as 64xl40s-48; "
        "several with commas between them; GPU as for --gpu",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try all layouts, micro-batches, recomputation, and score placements; plan the best",
    )
    parser.add_argument(
        "--keep-targets",
        action="store_true",
        help="with --search: data.latent_cache stays as it is, cached or not",
    )
    parser.add_argument(
        "--top", type=positive_int, default=10, metavar="N", help="layouts listed (10)"
    )
    parser.add_argument("--json", type=file_path, metavar="FILE", help="also write the plan there")
    parser.add_argument(
        "--write-config", type=file_path, metavar="FILE",
        help="write the config of what is planned there, for training; with --search, of the "
        "fastest layout that reads what the config reads",
    )  # fmt: skip
    parser.add_argument("--svg", type=file_path, metavar="FILE", help="draw the rank map there")
    parser.add_argument(
        "--assume", action="append", default=[], metavar="NAME=NUMBER",
        help="replace an assumption, e.g. unet=0.3",
    )  # fmt: skip
    add_overrides(parser, "settings that win over the file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when the plan fits the GPU, 1 when it does not, 2 for what cannot be planned."""
    args = build_parser().parse_intermixed_args(arguments)
    return run_command(lambda: _plan(args))


def _plan(args: argparse.Namespace) -> int:
    from megatron_kosmosg.config.errors import ConfigError
    from megatron_kosmosg.config.load import config_files, load_config, to_yaml
    from megatron_kosmosg.config.overwrites import refuse_to_overwrite, refuse_to_write_into
    from megatron_kosmosg.data.dataset_files import files_read, folders_read
    from megatron_kosmosg.planning.gpus import efficiency_with, gpu_named, name_from_anywhere
    from megatron_kosmosg.planning.joined import joined_ranks
    from megatron_kosmosg.planning.plan import (
        make_plan,
        planned_config,
        search_plan,
        to_json,
        to_text,
        written_config,
    )

    gpu, efficiency = gpu_named(args.gpu), efficiency_with(args.assume)
    joined = () if args.score_ranks is None else joined_ranks(args.score_ranks)
    loaded = config = load_config(args.config, args.overrides)
    world_size = args.num_gpus or config.parallel.world_size
    if world_size is None or world_size < 1:
        raise ConfigError("how many GPUs? give --num-gpus or parallel.world_size")
    cards = [args.gpu]
    cards += [part.partition("x")[2] for part in (args.score_ranks or "").split(",")]
    reads = [*config_files(args.config), *files_read(config)]
    reads += [Path(name) for name in cards if Path(name).suffix in (".yaml", ".yml")]
    outputs = {"--json": args.json, "--svg": args.svg, "--write-config": args.write_config}
    for option, output in outputs.items():
        if output is not None:
            refuse_to_overwrite([output], reads, option)
            refuse_to_write_into(output, folders_read(config), option)
    config, notes = planned_config(config, world_size, gpu)
    facts = {}
    if args.search:
        plan, found, facts["search"] = search_plan(
            config,
            world_size,
            gpu,
            efficiency,
            notes,
            args.top,
            joined,
            may_cache_latents=args.write_config is None and not args.keep_targets,
        )
        print(printable_lines(found) + "\n")
    else:
        plan = make_plan(config, world_size, gpu, efficiency, notes, joined)
    print(printable_lines(to_text(plan)))
    if args.json is not None:
        write_text(args.json, json.dumps(to_json(plan) | facts, indent=2) + "\n")
    if args.svg is not None:
        from megatron_kosmosg.planning.rank_map import svg

        write_text(args.svg, svg(plan.estimate.world, gpu.per_node))
    if not plan.estimate.fits:
        if args.write_config is not None:
            note(f"{args.write_config} is not written: the layout does not fit; --search finds one")
        return exit_codes.FAILURE
    if args.write_config is not None:
        written = written_config(loaded, plan, name_from_anywhere(args.gpu))
        write_text(args.write_config, to_yaml(written))
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
