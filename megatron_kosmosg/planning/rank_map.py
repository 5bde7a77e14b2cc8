"""Images of who does what: a table for the terminal, an SVG of the nodes for pages."""

from __future__ import annotations

from megatron_kosmosg.config.rank_grid import RankCoordinates, RankGrid

MANY_RANKS = 16
"""Above this, the rank table shows the first replicas and the last."""
_COLOURS = ("#4c78a8", "#72b7b2", "#54a24b", "#9ecae9")
_SCORE_COLOUR = "#e45756"
_CELL, _GAP, _LABEL = 78, 6, 92


def rank_table(world: RankGrid) -> str:
    """Replicas, their ranks pipeline stage by pipeline stage and the score ranks that serve them.

    Ranks that share tensors are listed together, pipeline stages follow each other.
    """
    first_line = f"tensor {world.tp_size} x pipeline {world.pp_size} x data {world.num_replicas}"
    if world.score_ranks_per_unit:
        shared = world.replicas_per_unit
        whose = f"of each {shared} replicas" if shared > 1 else "of each replica"
        first_line += f" + {world.score_ranks_per_unit} score {whose}"
    last = world.num_replicas - 1
    shown = list(range(world.num_replicas))
    if world.world_size > MANY_RANKS:
        shown = sorted({0, 1, last} & set(shown))
    lines = [first_line]
    for previous, replica in zip([-1, *shown], shown, strict=False):
        if replica > previous + 1:
            lines.append("  ...")
        lines.append(f"  replica {replica}: {_pipeline_stages(world, replica)}")
    return "\n".join(lines)


def svg(world: RankGrid, per_node: int) -> str:
    """Nodes as rows of GPUs, coloured by role: the first two and the last."""
    num_nodes = -(-world.world_size // per_node)
    shown = sorted({0, 1, num_nodes - 1} & set(range(num_nodes)))
    width = _LABEL + min(per_node, world.world_size) * (_CELL + _GAP)
    height = 34 + len(shown) * (_CELL + 2 * _GAP) + 24
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="4" y="18">{rank_table(world).splitlines()[0]}, {world.world_size} ranks</text>',
    ]
    for row, node in enumerate(shown):
        top = 34 + row * (_CELL + 2 * _GAP)
        lines.append(f'<text x="4" y="{top + _CELL / 2}">node {node}</text>')
        for index in range(per_node):
            rank = node * per_node + index
            if rank < world.world_size:
                lines += _gpu(world, rank, _LABEL + index * (_CELL + _GAP), top)
        if row + 1 < len(shown) and shown[row + 1] > node + 1:
            lines.append(f'<text x="4" y="{top + _CELL}">...</text>')
    legend = "d: decoder replica, s: pipeline stage, t: tensor rank; red: U-Net"
    lines.append(f'<text x="4" y="{height - 8}">{legend}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _gpu(world: RankGrid, rank: int, left: int, top: int) -> list[str]:
    coordinates = world.coordinates(rank)
    score = coordinates.role == "score"
    colour = _SCORE_COLOUR if score else _COLOURS[coordinates.pp_rank % len(_COLOURS)]
    lines = [
        f'<rect x="{left}" y="{top}" width="{_CELL}" height="{_CELL}" rx="5" fill="{colour}"/>'
    ]
    for number, text in enumerate((f"rank {rank}", *_words(world, coordinates))):
        lines.append(
            f'<text x="{left + 6}" y="{top + 20 + 22 * number}" fill="white">{text}</text>'
        )
    return lines


def _words(world: RankGrid, coordinates: RankCoordinates) -> tuple[str, str]:
    if coordinates.role == "score":
        last = coordinates.replica + world.replicas_per_unit - 1
        served = (
            f"d{coordinates.replica}"
            if last == coordinates.replica
            else f"d{coordinates.replica}-{last}"
        )
        return f"U-Net {coordinates.score_index}", f"for {served}"
    return f"d{coordinates.replica}", f"s{coordinates.pp_rank} t{coordinates.tp_rank}"


def _pipeline_stages(world: RankGrid, replica: int) -> str:
    pipeline_stages = []
    for pipeline_stage in range(world.pp_size):
        ranks = ", ".join(map(str, world.tensor_group(replica, pipeline_stage)))
        pipeline_stages.append(
            f"pipeline stage {pipeline_stage}: ranks {ranks}"
            if world.pp_size > 1
            else f"ranks {ranks}"
        )
    if world.score_ranks_per_unit:
        pipeline_stages.append(f"score ranks {', '.join(map(str, world.score_ranks(replica)))}")
    return " -> ".join(pipeline_stages)
