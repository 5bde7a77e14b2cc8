"""What is rehearsed: one rank of a run, and the size of its micro-batches. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RehearsalCase:
    config: str | None
    """YAML file of the run, or the name of a shipped one; None for defaults."""
    overrides: tuple[str, ...]
    """`section.key=value`, which win over the file."""
    length: int
    """Decoder positions of every row."""
    images: int
    """Prompt images of a micro-batch, over all its rows."""
    rank: int = 0
    world_size: int = 1
    received: tuple[int, ...] | None = None
    """Shape of what the pipeline stage before this one sends; its own rehearsal says it."""
    store_values: tuple[tuple[str, str], ...] = ()
    """{key: value} that the pipeline stage before put into the store; its own rehearsal says it,
    too."""
    upstream_trains: bool = True
    """Whether anything trains on the pipeline stages before."""
    gpu: str = "h100-80"
    """Kind of the cards: a name for `planning.gpus.gpu_named`."""
    num_updates: int = 1
    """The last one is recorded; the first also does what is done once."""
    do: str = "megatron_kosmosg.rehearsal.rank_update:run_update"
    """What runs: module:function, called with the case and the stand-ins; returns what JSON can
    hold."""
