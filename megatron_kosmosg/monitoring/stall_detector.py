"""Who holds the others up: from the signs of life of ranks to a report when nothing moves."""

from __future__ import annotations

from dataclasses import dataclass

MAX_NAMED = 8
"""Ranks that one report names."""


@dataclass(frozen=True)
class Heartbeat:
    """One rank's latest sign of life."""

    rank: int
    node: str
    number: int
    """Counts up, so that a rank that has stopped speaking is noticed."""
    iteration: int
    phase: str
    seconds: float
    """Since the main thread entered this phase of this iteration."""
    place: str
    """Innermost line of this package that the main thread is in."""
    waits: bool
    """Whether the main thread is inside a collective or a receive."""
    may_go: bool = False
    """Whether the others go on when it is gone, so that its silence is no stall."""


class StallDetector:
    """Reads the heartbeats of `ranks` again and again; a report for each time that they stall."""

    def __init__(self, ranks: range, stall_seconds: float) -> None:
        self.ranks = ranks
        self._stall_seconds = stall_seconds
        self._heard: dict[int, tuple[Heartbeat | None, float]] = {}
        """{rank: (its latest heartbeat, when that was new)}"""
        self._reported: object = None
        self.stall: str | None = None
        """What was last reported, for as long as it lasts."""

    def report(self, heartbeats: dict[int, Heartbeat | None], now: float) -> str | None:
        """What to say at time `now` (seconds), None while all is well or nothing is new."""
        new = self._new_report(heartbeats, now)
        if new is not None or self._reported is None:
            self.stall = new
        return new

    def _new_report(self, heartbeats: dict[int, Heartbeat | None], now: float) -> str | None:
        for rank, heartbeat in heartbeats.items():
            known = self._heard.get(rank)
            if known is None or (heartbeat is not None and heartbeat != known[0]):
                self._heard[rank] = (heartbeat, now)
        late = {
            rank: now - since
            for rank, (_, since) in self._heard.items()
            if now - since > self._stall_seconds
        }
        gone = {rank for rank in late if (heartbeat := self._heard[rank][0]) and heartbeat.may_go}
        late = {rank: seconds for rank, seconds in late.items() if rank not in gone}
        # A rank that has never spoken is no stall by itself: it may still load its weights.
        silent = {rank: seconds for rank, seconds in late.items() if self._heard[rank][0]}
        heard = [heartbeat for heartbeat, _ in self._heard.values() if heartbeat]
        speaking = [heartbeat for heartbeat in heard if heartbeat.rank not in silent.keys() | gone]
        stuck = [heartbeat for heartbeat in speaking if heartbeat.seconds > self._stall_seconds]
        if not silent and (not speaking or len(stuck) < len(speaking)):
            self._reported = None
            return None
        silent = late
        situation = (
            sorted(silent),
            [(heartbeat.iteration, heartbeat.phase) for heartbeat in stuck],
        )
        if situation == self._reported:
            return None
        self._reported = situation
        if silent:
            named = [self._silent(rank, silent[rank]) for rank in sorted(silent)]
            return f"stall: no sign of life from {_some(named)}"
        behind = min((heartbeat.iteration for heartbeat in stuck), default=0)
        culprits = [heartbeat for heartbeat in stuck if not heartbeat.waits]
        culprits = culprits or [heartbeat for heartbeat in stuck if heartbeat.iteration == behind]
        named = [
            f"rank {last.rank} on {last.node} ({last.phase} of iteration {last.iteration}, "
            f"{last.place}{', waiting for others' if last.waits else ''})"
            for last in culprits
        ]
        seconds = min(heartbeat.seconds for heartbeat in stuck)
        return f"stall: nothing moved for {seconds:.0f} s; held up by {_some(named)}"

    def _silent(self, rank: int, seconds: float) -> str:
        heartbeat = self._heard[rank][0]
        last = (
            ""
            if heartbeat is None
            else f" on {heartbeat.node}, last in {heartbeat.phase} at {heartbeat.place}"
        )
        return f"rank {rank}{last} ({seconds:.0f} s)"


def _some(names: list[str]) -> str:
    more = len(names) - MAX_NAMED
    return "; ".join(names[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")
