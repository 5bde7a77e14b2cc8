"""Whether the nodes of a job are fit: GPUs, memory errors, links, free disk; all-reduce speed."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path

EPILOG = """\
`node` looks at one node in a second and is started once on each; `network` is started like
training, one process per GPU, and compares the nodes. Both name the node of a problem.

examples:
  srun --ntasks-per-node=1 python tools/preflight.py node --gpus 8 --folder /runs/x --free-gib 100
  srun python tools/preflight.py network
Exit codes: 0 fit; 1 not fit; 2 wrong arguments.
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    node = commands.add_parser("node", help="this node's GPUs and disk")
    node.add_argument("--gpus", type=_count, default=0, metavar="N", help="GPUs it must have (0)")
    node.add_argument("--folder", type=Path, required=True, help="where the run will write")
    node.add_argument("--free-gib", type=float, default=100, metavar="N", help="to be free (100)")
    network = commands.add_parser("network", help="all-reduce speed inside and across nodes")
    network.add_argument(
        "--slow-share",
        type=float,
        default=0.5,
        metavar="S",
        help="on GPUs a node slower than S x the median is unfit (0.5); 0 only reports",
    )
    network.add_argument(
        "--timeout", type=float, default=180, metavar="S", help="seconds to meet all ranks (180)"
    )
    return parser.parse_args()


def main() -> int:
    given = parse()
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    return check_node(given, node) if given.command == "node" else check_network(given, node)


def check_node(given: argparse.Namespace, node: str) -> int:
    from megatron_kosmosg.monitoring.node_health import disk_problems, gpu_problems

    problems = [*gpu_problems(given.gpus), *disk_problems(given.folder, given.free_gib)]
    for problem in problems:
        print(f"error: node {node}: {problem}", file=sys.stderr)
    return int(bool(problems))


def check_network(given: argparse.Namespace, node: str) -> int:
    import torch.distributed as dist

    from megatron_kosmosg.config.errors import ConfigError
    from megatron_kosmosg.monitoring.bandwidth import measure_bandwidth, slow_nodes
    from megatron_kosmosg.parallel.devices import choose_device, collective_backend
    from megatron_kosmosg.parallel.rendezvous import find_place, meet

    place = find_place(os.environ)
    device = choose_device(place)
    try:
        timeout = timedelta(seconds=given.timeout)
        dist.init_process_group(
            collective_backend(device),
            store=meet(place, timeout),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
        )
        measured = measure_bandwidth(node, device)
        dist.destroy_process_group()
    except (ConfigError, RuntimeError) as error:
        print(f"error: node {node}, rank {place.rank}: {error}", file=sys.stderr)
        return 1
    slow = slow_nodes(measured.inside, given.slow_share)
    if place.rank == 0:
        if measured.inside:
            least = min(measured.inside, key=lambda name: measured.inside[name])
            print(
                f"all-reduce inside a node: {measured.inside[least]:.3g} GB/s on the slowest of "
                f"{len(measured.inside)} ({least}), {max(measured.inside.values()):.3g} on the best"
            )
        if measured.across is not None:
            print(f"all-reduce over all {place.world_size} ranks: {measured.across:.3g} GB/s")
        for name, share in slow.items():
            print(f"node {name} is slow: {share:.0%} of the median", file=sys.stderr)
    return int(bool(slow) and device.type != "cpu")  # ranks of a CPU disturb each other


def _count(text: str) -> int:
    """8, or Slurm's form h100:8."""
    return int(text.rsplit(":", 1)[-1])


if __name__ == "__main__":
    sys.exit(main())
