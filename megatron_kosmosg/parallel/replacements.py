"""The replacement indices of a micro-batch, told to the pipeline stages that decode no images.

Only the first stage has the image tower. A bad image replaces a sample or silences labels, which
every stage must know (samples.ImageStream). The indices go through the store of the rendezvous,
so that the exchange of tensors between the stages stays as Megatron-Core has it. The first stage
tells before its forward pass, so that the others, which read after they have received its output,
do not wait.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta

from megatron_kosmosg.launcher import find_rank_info
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.parallel.rendezvous import connect


class ReplacementExchange:
    """One rank's end of the exchange; on every pipeline stage only the tensor rank that loads data
    has one."""

    def __init__(self, context: ParallelContext, stream: str, timeout_seconds: float) -> None:
        """Connects to the job's store, through which the stages exchange indices.

        Args:
            stream: a name for what is read, the same on all stages.
        """
        timeout = timedelta(seconds=timeout_seconds)
        self._context, self._stream = context, stream
        self._store = connect(find_rank_info(), timeout)

    def share(self, position: int, own: Sequence[int]) -> list[int]:
        """The first stage's indices of the micro-batch that begins at stream position `position`.

        Args:
            own: what this rank found; counts on the first stage.
        """
        context = self._context
        if context.is_first_stage:
            text = json.dumps(list(own))
            for stage in range(1, context.pp_size):
                self._store.set(self._key(position, stage), text)
            return list(own)
        key = self._key(position, context.pp_rank)
        told = json.loads(self._store.get(key))
        self._store.delete_key(key)
        return told

    def _key(self, position: int, stage: int) -> str:
        return f"replacements of {self._stream} {position} for stage {stage}"
