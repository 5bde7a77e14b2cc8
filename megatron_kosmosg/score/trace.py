"""A score rank's side of the trace of an iteration (monitoring/iteration_trace.py).

A score rank does not know beforehand which request begins the iteration, so it records all and
forgets those that came before. It knows that the iteration is over by the first request after it.
"""

from __future__ import annotations

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.launcher import find_rank_info
from megatron_kosmosg.monitoring.iteration_trace import open_exchange
from megatron_kosmosg.monitoring.spans import RecordSpan, Spans, no_record
from megatron_kosmosg.score.connect import ScoreRank
from megatron_kosmosg.score.messages import Kind, ScoreRequest


class ScoreTrace:
    """Records what this rank does and hands it over once."""

    record: RecordSpan
    """Names stretches of time for as long as the trace needs them."""

    def __init__(self, config: RunConfig, rank: ScoreRank) -> None:
        """Collective with the other score ranks of the job and the decoder ranks' `DecoderTrace`;
        a rank outside the job is in no trace."""
        self._config, self._rank = config, rank
        self._exchange = None if rank.coordinates is None else open_exchange(config)
        self._spans = Spans(rank.device)
        self.record = no_record if self._exchange is None else self._spans

    def received(self, request: ScoreRequest) -> None:
        """Notes a request; call it for every one, before it is answered."""
        traced = self._config.logging.trace_iteration
        if traced is None or self.record is no_record or request.kind is not Kind.GRADIENT:
            return
        size = self._config.training.global_batch_size
        iteration = min(request.rows.positions) // size + 1
        if iteration < traced:
            self._spans.clear()
        if iteration > traced:
            self.ended()

    def ended(self) -> None:
        """Completes the trace; call it when no request comes any more."""
        if self.record is no_record:
            return
        coordinates, world = self._rank.coordinates, self._rank.world
        assert coordinates is not None and world is not None and self._exchange is not None
        name = f"rank {find_rank_info().rank}: score rank {coordinates.score_index} of replica "
        replicas = range(coordinates.replica, coordinates.replica + world.replicas_per_unit)
        name += " and ".join(map(str, replicas))
        self._exchange.publish(name, self._spans.finished())
        self.record = no_record
        self._spans.clear()
