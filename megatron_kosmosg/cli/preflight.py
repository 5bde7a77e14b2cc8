"""Whether the nodes of a job are fit: GPUs, memory errors, links, free disk; all-reduce speed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import (
    CommandParser,
    command_parser,
    file_path,
    natural_int,
    number_from_zero,
    positive_number,
    report_error,
    run_command,
)
from megatron_kosmosg.launcher import find_rank_info, node_name

EPILOG = """\
`node` looks at one node in a second and is started once on each; `network` is started like
training, one process per GPU, and compares the nodes. Both name the node of a problem.

examples:
  srun --ntasks-per-node=1 kosmosg preflight node --gpus 8 --folder /runs/x --free-gib 100
  srun kosmosg preflight network
Exit codes: 0 fit; 1 not fit; 2 wrong arguments; 130 interrupted.
"""


def build_parser() -> CommandParser:
    """The parser of the command, with the options of `node` and of `network`."""
    parser = command_parser("preflight", __doc__, EPILOG)
    commands = parser.add_subparsers(dest="command", required=True)
    node = commands.add_parser("node", help="this node's GPUs and disk")
    node.add_argument("--gpus", type=_count, default=0, metavar="N", help="GPUs it must have (0)")
    node.add_argument(
        "--folder", type=file_path, required=True, metavar="FOLDER", help="where the run will write"
    )
    node.add_argument(
        "--free-gib", type=number_from_zero, default=100, metavar="N", help="to be free (100)"
    )
    node.add_argument(
        "--memory-gib",
        type=number_from_zero,
        default=0,
        metavar="N",
        help="of the machine's memory that the run may take; less gives a warning (0)",
    )
    network = commands.add_parser("network", help="all-reduce speed inside and across nodes")
    network.add_argument(
        "--slow-share",
        type=number_from_zero,
        default=0.5,
        metavar="S",
        help="on GPUs a node slower than S x the median is unfit (0.5); 0 only reports",
    )
    network.add_argument(
        "--timeout",
        type=positive_number,
        default=180,
        metavar="S",
        help="seconds to meet all ranks (180)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when the node, or all of them, are fit; else 1, with what is wrong on stderr."""
    args = build_parser().parse_args(arguments)
    node = node_name()
    check = check_node if args.command == "node" else check_network
    return run_command(lambda: check(args, node))


def check_node(args: argparse.Namespace, node: str) -> int:
    from megatron_kosmosg.monitoring.node_health import (
        disk_problems,
        gpu_problems,
        memory_warnings,
    )

    for warning in memory_warnings(args.memory_gib):
        print(f"warning: node {node}: {warning}", file=sys.stderr)
    problems = [*gpu_problems(args.gpus), *disk_problems(args.folder, args.free_gib)]
    for problem in problems:
        report_error(f"node {node}: {problem}")
    return exit_codes.FAILURE if problems else exit_codes.DONE


def check_network(args: argparse.Namespace, node: str) -> int:
    import torch.distributed as dist

    from megatron_kosmosg.config.errors import ConfigError
    from megatron_kosmosg.monitoring.bandwidth import measure_bandwidth, slow_nodes
    from megatron_kosmosg.parallel.devices import choose_device, collective_backend
    from megatron_kosmosg.parallel.rendezvous import meet

    rank_info = find_rank_info()
    device = choose_device(rank_info)
    try:
        timeout = timedelta(seconds=args.timeout)
        dist.init_process_group(
            collective_backend(device),
            store=meet(rank_info, timeout),
            rank=rank_info.rank,
            world_size=rank_info.world_size,
            timeout=timeout,
        )
        measured = measure_bandwidth(node, device)
        dist.destroy_process_group()
    except (ConfigError, RuntimeError) as error:
        return report_error(f"node {node}, rank {rank_info.rank}: {error}", exit_codes.FAILURE)
    slow = slow_nodes(measured.inside, args.slow_share)
    if rank_info.rank == 0:
        if measured.inside:
            least = min(measured.inside, key=lambda name: measured.inside[name])
            print(
                f"all-reduce inside a node: {measured.inside[least]:.3g} GB/s on the slowest of "
                f"{len(measured.inside)} ({least}), {max(measured.inside.values()):.3g} on the best"
            )
        if measured.across is not None:
            print(f"all-reduce over all {rank_info.world_size} ranks: {measured.across:.3g} GB/s")
        for name, share in slow.items():
            print(f"node {name} is slow: {share:.0%} of the median", file=sys.stderr)
    # Ranks of a CPU disturb each other.
    return exit_codes.FAILURE if slow and device.type != "cpu" else exit_codes.DONE


def _count(text: str) -> int:
    """The number of GPUs that a text states: "8", or Slurm's form "h100:8"."""
    return natural_int(text.rsplit(":", 1)[-1])


if __name__ == "__main__":
    sys.exit(main())
