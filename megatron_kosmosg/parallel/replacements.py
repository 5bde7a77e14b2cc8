"""The replacement indices of a micro-batch, told to the pipeline stages that decode no images.

Only the first pipeline stage has the image tower. A bad image replaces a sample or silences labels,
which every pipeline stage must know (samples.ImageStream). The indices go through the store of the
rendezvous, so that the exchange of tensors between the pipeline stages stays as Megatron-Core has
it. The first tells before its forward pass, so that the others, which read after they have received
its output, do not wait.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta

from megatron_kosmosg.launcher import find_rank_info
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.parallel.rendezvous import connect_to_store


class ReplacementExchange:
    """One rank's end of the exchange; on every pipeline stage only the tensor rank that loads data
    has one."""

    def __init__(self, context: ParallelContext, stream: str, timeout_seconds: float) -> None:
        """Connects to the job's store, through which the pipeline stages exchange indices.

        Args:
            stream: a name for what is read, the same on all pipeline stages.
        """
        timeout = timedelta(seconds=timeout_seconds)
        self._context, self._stream = context, stream
        self._store = connect_to_store(find_rank_info(), timeout)

    def share(self, position: int, local: Sequence[int]) -> list[int]:
        """The first pipeline stage's indices of the micro-batch that begins at stream position
        `position`.

        Args:
            local: what this rank found; counts on the first pipeline stage.
        """
        context = self._context
        if context.is_first_pipeline_stage:
            text = json.dumps(list(local))
            for pipeline_stage in range(1, context.pp_size):
                self._store.set(self._key(position, pipeline_stage), text)
            return list(local)
        key = self._key(position, context.pp_rank)
        received = json.loads(self._store.get(key))
        self._store.delete_key(key)
        return received

    def _key(self, position: int, pipeline_stage: int) -> str:
        return f"replacements of {self._stream} {position} for pipeline stage {pipeline_stage}"
