"""Score ranks that come, answer wrongly, late or not at all, and go: the link between one decoder
rank and them, over loopback, without a model."""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
import zmq

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.score import member as member_module
from megatron_kosmosg.score.fleet import Fleet, Patience, ScoreRankFailed
from megatron_kosmosg.score.member import DecoderAddress, DecoderLost, Membership, NotAdmitted
from megatron_kosmosg.score.messages import Answer, Kind, Rows, ScoreRequest
from megatron_kosmosg.score.roster import Standing
from megatron_kosmosg.score.wire import Limits, RunEnd

LIMITS = Limits(most_rows=4, condition=(3, 8), dtype=torch.bfloat16, image_size=8)
PRINTS = {"U-Net": "a", "VAE": "b"}
PATIENCE = Patience(answer=2.0, alone=60.0, load=60.0)
"""As long as a busy machine may take to start a thread that joins."""
SHORT_ALONE = Patience(answer=2.0, alone=1.0, load=60.0)
SHORT_LOAD = Patience(answer=2.0, alone=60.0, load=2.0)
SILENCE = 60.0
TROUBLE = ArithmeticError("own trouble")


@dataclass
class Link:
    """A decoder rank's end and the keys to it."""

    fleet: Fleet
    address: DecoderAddress
    key: tuple[bytes, bytes]
    workers: list[threading.Thread] = field(default_factory=list)


def opened(patience: Patience = PATIENCE, audit_rate: float = 0.0, limits: Limits = LIMITS) -> Link:
    secret, key = zmq.curve_keypair(), zmq.curve_keypair()
    fleet = Fleet("127.0.0.1", secret, limits, patience, audit_rate)
    fleet.admit(key[0])
    address = DecoderAddress(0, f"tcp://127.0.0.1:{fleet.port}", secret[0].decode())
    return Link(fleet, address, key)


@pytest.fixture
def link(request) -> Iterator[Link]:
    """With PATIENCE, or what a test gives by `waits`."""
    made = opened(getattr(request, "param", PATIENCE))
    yield made
    made.fleet.close(RunEnd.DONE)
    for worker in made.workers:
        worker.join(20)


def waits(patience: Patience) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("link", [patience], indirect=True, ids=[""])


Work = Callable[[ScoreRequest], Answer]


def compute(request: ScoreRequest) -> Answer:
    """Numbers that depend on all that a rank is told."""
    payload = request.condition.float().flatten() * float(request.scale)
    loss = float(sum(request.rows.positions)) + request.rows.is_heldout
    payload = payload if request.kind is Kind.GRADIENT else payload[:0]
    return Answer(loss, len(request.rows.replacements), 0, 0.0, 0.1, payload)


def member(
    link: Link, name: str, standing: Standing = Standing.OWN, key: tuple[bytes, bytes] | None = None
) -> Membership:
    about = [link.address], key or link.key, LIMITS, name, "CPU"
    return Membership(*about, lambda _: standing, silence_seconds=SILENCE)


def serving(
    link: Link,
    name: str,
    work: Work = compute,
    standing: Standing = Standing.OWN,
    prints: dict[str, str] | None = None,
) -> list:
    """A score rank in a thread of its own; the requests that it got, and what ended it."""
    seen: list = []

    def run() -> None:
        with (
            contextlib.suppress(ArithmeticError, ConfigError, OSError, DecoderLost),
            member(link, name, standing) as made,
        ):
            made.is_loaded(prints or PRINTS)
            try:
                while made.end is None:
                    asked = made.take(0.1)
                    if asked is not None:
                        seen.append(asked.request)
                        made.reply(asked, work(asked.request))
            except NotAdmitted as error:
                seen.append(error)

    link.workers.append(threading.Thread(target=run, daemon=True))
    link.workers[-1].start()
    return seen


def request(first: int, kind: Kind = Kind.GRADIENT) -> ScoreRequest:
    rows = Rows((first, first + 1), (0, 1))
    condition = torch.full((2, 3, 8), float(first), dtype=torch.bfloat16)
    return ScoreRequest(kind, rows, condition, torch.tensor(4.0))


def ask(link: Link, first: int, kind: Kind = Kind.GRADIENT) -> int:
    return link.fleet.submit(request(first, kind), lambda: True)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def equal(found: Answer | None, first: int, kind: Kind = Kind.GRADIENT) -> bool:
    expected = compute(request(first, kind))
    assert found is not None
    return found.loss == expected.loss and torch.equal(found.payload, expected.payload)


def test_answers_come_back_for_their_requests_in_any_order(link):
    for name in "ab":
        serving(link, name)
    numbers = {first: ask(link, first) for first in range(8)}
    for first in reversed(range(8)):
        assert equal(link.fleet.take(numbers[first]), first)
    number = ask(link, 3, Kind.LOSS)
    assert equal(link.fleet.take(number), 3, Kind.LOSS)
    assert link.fleet.pop_bytes() > 8 * 2 * 2 * 3 * 8
    assert link.fleet.state()[:2] == (2, 0)


def test_requests_and_answers_of_real_size_arrive():
    """In pieces as large as a frame may be, encrypted."""
    limits = Limits(most_rows=8, condition=(77, 768), dtype=torch.bfloat16, image_size=8)
    link = opened(limits=limits)
    rows, condition = Rows(tuple(range(8)), (0,) * 8), torch.randn(8, 77, 768).to(torch.bfloat16)
    expected = ScoreRequest(Kind.GRADIENT, rows, condition, torch.tensor(2.0))
    key, standing = link.key, Standing.OWN
    about = [link.address], key, limits, "own", "CPU"
    made = Membership(*about, lambda _: standing, silence_seconds=SILENCE)
    try:
        made.is_loaded(PRINTS)
        number = link.fleet.submit(expected, lambda: True)
        asked = made.take(10)
        assert asked is not None and torch.equal(asked.request.condition, condition)
        made.reply(asked, compute(asked.request))
        found = link.fleet.take(number)
        assert found is not None and torch.equal(found.payload, compute(expected).payload)
    finally:
        link.fleet.close(RunEnd.DONE)
        made.close()


def test_requests_of_a_rank_that_leaves_go_to_another(link):
    guest = member(link, "guest", Standing.JOINED)
    serving(link, "own", lambda asked: (time.sleep(0.3), compute(asked))[1])
    until(lambda: link.fleet.state()[0] == 1)
    guest.is_loaded(PRINTS)
    until(lambda: link.fleet.state()[0] == 2)
    numbers = {first: ask(link, first) for first in range(4)}
    assert guest.take(10) is not None  # it has one, and never answers
    guest.leave()
    guest.close()
    for first, number in numbers.items():
        assert equal(link.fleet.take(number), first)


def test_requests_of_a_rank_that_is_late_go_to_another_and_its_answer_is_dropped(link):
    woken = threading.Event()

    def sleep(asked: ScoreRequest) -> Answer:
        woken.wait(20)
        return compute(asked)

    slow = serving(link, "slow", sleep)
    until(lambda: link.fleet.state()[0] == 1)
    number = ask(link, 1)
    until(lambda: bool(slow))
    fast = serving(link, "fast")
    assert equal(link.fleet.take(number), 1)
    assert len(fast) == 1
    woken.set()
    number = ask(link, 2)
    assert equal(link.fleet.take(number), 2)


@waits(SHORT_LOAD)
def test_with_no_rank_coming_the_wait_ends_and_was_said(link, capfd):
    started = time.monotonic()
    assert link.fleet.take(ask(link, 1)) is None
    assert SHORT_LOAD.load <= time.monotonic() - started < SHORT_LOAD.load + 5
    output = capfd.readouterr().err
    assert "no score rank has come yet: training waits up to 2 s for one" in output
    assert "no score rank works: the run is saved and stops" in output


@waits(SHORT_LOAD)
def test_a_rank_that_loads_for_ever_is_not_waited_for_longer_than_said(link, capfd):
    loading = member(link, "own")
    until(lambda: bool(link.fleet._roster.members))
    started = time.monotonic()
    assert link.fleet.take(ask(link, 1)) is None
    assert SHORT_LOAD.load <= time.monotonic() - started < SHORT_LOAD.load + 5
    output = capfd.readouterr().err
    assert "no score rank has loaded the U-Net yet: training waits up to 2 s for one" in output
    loading.close()


@waits(SHORT_ALONE)
def test_with_no_rank_left_the_wait_ends(link, capfd):
    made = member(link, "own")
    made.is_loaded(PRINTS)
    number = ask(link, 1)
    assert made.take(10) is not None, "it is asked, and never answers"
    made.leave()
    made.close()
    until(lambda: link.fleet.state()[0] == 0)
    started = time.monotonic()
    assert link.fleet.take(number) is None
    assert SHORT_ALONE.alone <= time.monotonic() - started < SHORT_ALONE.alone + 5
    assert "no score rank is left: training waits up to 1 s for one" in capfd.readouterr().err


@waits(SHORT_LOAD)
def test_ranks_that_come_and_die_while_they_load_do_not_prolong_the_wait(link):
    number, started = ask(link, 1), time.monotonic()
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            member(link, "short-lived").close()
            ended.wait(0.7)

    link.workers.append(threading.Thread(target=come_and_go))
    link.workers[-1].start()
    assert link.fleet.take(number) is None
    assert SHORT_LOAD.load <= time.monotonic() - started < SHORT_LOAD.load + 5
    ended.set()


def test_a_rank_that_comes_in_time_ends_the_wait(link):
    number = ask(link, 1)
    time.sleep(SHORT_LOAD.load / 2)
    serving(link, "late")
    assert equal(link.fleet.take(number), 1)


def test_a_rank_that_still_loads_long_after_the_run_has_ended_ends(link):
    code = """
import sys, threading, torch
from megatron_kosmosg.score import member as m
m.LOADING_SECONDS = 0.5
limits = m.Limits(most_rows=4, condition=(3, 8), dtype=torch.bfloat16, image_size=8)
to, key = m.DecoderAddress(0, *sys.argv[1:3]), tuple(part.encode() for part in sys.argv[3:])
about = [to], key, limits, "own", "CPU"
m.Membership(*about, lambda _: m.Standing.OWN, silence_seconds=60)
threading.Event().wait(60)
"""
    address = link.address
    told = [address.address, address.key, *(part.decode() for part in link.key)]
    command = [sys.executable, "-c", code, *told]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until(lambda: bool(link.fleet._roster.members))
    link.fleet.close(RunEnd.STOPPED)
    _, output = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "the run has ended, and this rank has not loaded the U-Net" in output


def failing(error: Exception = TROUBLE, after: int = 0) -> Work:
    """Answers requests whose first position is less than `after`, and raises at others."""

    def work(asked: ScoreRequest) -> Answer:
        if asked.rows.positions[0] >= after:
            raise error
        return compute(asked)

    return work


@pytest.mark.parametrize(
    ("error", "after"),
    [(TROUBLE, 0), (ConfigError("a dataset is cut off"), 1), (OSError(errno.ENOSPC, "full"), 1)],
    ids=["at its first request", "input", "disk"],
)
def test_an_error_of_a_rank_of_the_job_that_comes_again_is_the_runs(link, error, after):
    serving(link, "score rank 1", failing(error, after))
    for first in range(after):
        assert equal(link.fleet.take(ask(link, first)), first)
    told = f"score rank 1 failed: {type(error).__name__}: .*{error.args[-1]}"
    with pytest.raises(ScoreRankFailed, match=told):
        link.fleet.take(ask(link, after))


def test_what_a_rank_of_the_job_fails_at_later_goes_to_another(link, capfd):
    serving(link, "score rank 1", failing(after=2))
    for first in range(2):
        assert equal(link.fleet.take(ask(link, first)), first)
    number = ask(link, 2)
    until(lambda: link.fleet.state()[0] == 0)
    serving(link, "score rank 2")
    assert equal(link.fleet.take(number), 2)
    output = capfd.readouterr().err
    assert "score rank 1 failed: ArithmeticError: own trouble; 0 left" in output


@waits(SHORT_ALONE)
def test_with_its_last_rank_failed_the_run_gives_up_waiting(link):
    serving(link, "score rank 1", failing(after=1))
    assert equal(link.fleet.take(ask(link, 0)), 0)
    started = time.monotonic()
    assert link.fleet.take(ask(link, 1)) is None
    assert SHORT_ALONE.alone <= time.monotonic() - started < SHORT_ALONE.alone + 5


def test_a_request_at_which_two_ranks_fail_ends_the_run(link):
    for name in ("score rank 1", "score rank 2"):
        serving(link, name, failing(after=4))
    until(lambda: link.fleet.state()[0] == 2)
    numbers = {first: ask(link, first) for first in range(4)}  # two for each
    for first, number in numbers.items():
        assert equal(link.fleet.take(number), first)
    told = "failed: ArithmeticError: own trouble; at the same request, before it, score rank"
    with pytest.raises(ScoreRankFailed, match=told):
        link.fleet.take(ask(link, 4))


def test_what_a_guest_fails_at_goes_to_another(link):
    serving(link, "own", lambda asked: (time.sleep(0.2), compute(asked))[1])
    until(lambda: link.fleet.state()[0] == 1)
    failed = serving(link, "guest", failing(), Standing.JOINED)
    until(lambda: link.fleet.state()[0] == 2)
    for first in range(4):
        assert equal(link.fleet.take(ask(link, first)), first)
        ask(link, first)
    until(lambda: bool(failed))
    until(lambda: link.fleet.state()[0] == 1)


def test_another_key_is_refused(link):
    before = member(link, "old", key=zmq.curve_keypair())
    with pytest.raises(NotAdmitted, match="started anew"):
        before.take(10)
    before.close()
    assert link.fleet.state()[0] == 0


def test_other_weights_are_refused_with_what_differs(link):
    serving(link, "own")
    until(lambda: link.fleet.state()[0] == 1)
    told = serving(link, "guest", compute, Standing.JOINED, PRINTS | {"U-Net": "other"})
    until(lambda: bool(told))
    assert "its U-Net differ" in str(told[0])
    assert link.fleet.state()[0] == 1


def test_a_guest_waits_until_a_rank_of_the_job_says_what_it_is_held_against(link):
    serving(link, "guest", compute, Standing.JOINED)
    number = ask(link, 1)
    time.sleep(0.5)
    assert link.fleet.state()[0] == 0
    serving(link, "own")
    until(lambda: link.fleet.state()[0] == 2)
    assert equal(link.fleet.take(number), 1)


@pytest.mark.parametrize("standing", [Standing.OWN, Standing.JOINED])
def test_a_stop_signal_comes_from_ranks_of_the_job_alone(link, standing):
    free = threading.Event()

    def stopped(asked: ScoreRequest) -> Answer:
        return replace(compute(asked), signal=int(signal.SIGTERM))

    serving(link, "own", lambda asked: (free.wait(20), compute(asked))[1])
    until(lambda: link.fleet.state()[0] == 1)
    busy = ask(link, 1)
    until(lambda: link.fleet.state()[1] == 0)
    serving(link, "other", stopped, standing)
    answer = link.fleet.take(ask(link, 2))
    assert answer is not None
    assert answer.signal == (signal.SIGTERM if standing is Standing.OWN else 0)
    free.set()
    assert equal(link.fleet.take(busy), 1)


@pytest.mark.parametrize("lie", ["other", "nan"])
def test_a_guest_that_lies_is_evicted_and_its_numbers_never_used(lie):
    link = opened(audit_rate=1.0 if lie == "other" else 0.0)

    def wrong(asked: ScoreRequest) -> Answer:
        true = compute(asked)
        factor = 1.5 if lie == "other" else float("nan")
        return Answer(true.loss, true.bad_samples, 0, 0.0, 0.1, true.payload * factor)

    serving(link, "own", lambda asked: (time.sleep(0.1), compute(asked))[1])
    until(lambda: link.fleet.state()[0] == 1)
    told = serving(link, "liar", wrong, Standing.JOINED)
    until(lambda: link.fleet.state()[0] == 2)
    for first in range(1, 9, 2):
        numbers = [ask(link, first), ask(link, first + 1)]
        for number, expected in zip(numbers, (first, first + 1), strict=True):
            assert equal(link.fleet.take(number), expected)
    assert "its numbers for a request are not those of own" in str(told[-1])
    link.fleet.close(RunEnd.DONE)


def test_a_guest_whose_numbers_are_rightly_not_finite_stays():
    link = opened()

    def overflow(asked: ScoreRequest) -> Answer:
        true = compute(asked)
        return Answer(true.loss, true.bad_samples, 0, 0.0, 0.1, true.payload / 0)

    serving(link, "own", overflow)
    until(lambda: link.fleet.state()[0] == 1)
    serving(link, "guest", overflow, Standing.JOINED)
    until(lambda: link.fleet.state()[0] == 2)
    for first in range(1, 7):
        numbers = [ask(link, first), ask(link, first)]
        answers = [link.fleet.take(number) for number in numbers]
        assert all(answer.payload.isinf().all() for answer in answers)
    assert link.fleet.state()[0] == 2
    link.fleet.close(RunEnd.DONE)


def test_a_wrong_shape_evicts(link):
    def short(asked: ScoreRequest) -> Answer:
        true = compute(asked)
        return Answer(true.loss, true.bad_samples, 0, 0.0, 0.1, true.payload[:-1])

    serving(link, "own", lambda asked: (time.sleep(0.1), compute(asked))[1])
    until(lambda: link.fleet.state()[0] == 1)
    told = serving(link, "guest", short, Standing.JOINED)
    until(lambda: link.fleet.state()[0] == 2)
    for first in range(1, 9, 2):
        numbers = [ask(link, first), ask(link, first + 1)]
        for number, expected in zip(numbers, (first, first + 1), strict=True):
            assert equal(link.fleet.take(number), expected)
    until(lambda: isinstance(told[-1], NotAdmitted))
    assert "sent 47 numbers where 48 were asked for" in str(told[-1])
    assert link.fleet.state()[0] == 1


def test_bytes_that_are_no_message_disturb_nobody(link):
    context = zmq.Context()
    for frames in ([b"x"], [b"KGSR" + b"\0" * 12], [b"a"] * 9, [b""]):
        stranger = context.socket(zmq.DEALER)
        stranger.curve_publickey, stranger.curve_secretkey = link.key
        stranger.curve_serverkey = link.address.key.encode()
        stranger.connect(link.address.address)
        stranger.send_multipart(frames)
        stranger.close(1000)
    serving(link, "own")
    assert equal(link.fleet.take(ask(link, 1)), 1)
    context.term()


def test_peers_that_say_nothing_or_half_of_it_hold_up_nobody(link):
    """The greeting of ZeroMQ's protocol has 64 bytes."""
    port = int(link.address.address.rpartition(":")[2])
    with contextlib.ExitStack() as held:
        for said in [b"", b"\xff" + bytes(8), b"\xff" + bytes(8) + b"\x7f\x03"] * 8:
            peer = socket.create_connection(("127.0.0.1", port))
            held.enter_context(peer).sendall(said)
        serving(link, "own")
        started = time.monotonic()
        for first in range(8):
            assert equal(link.fleet.take(ask(link, first)), first)
        assert time.monotonic() - started < 10
        assert link.fleet.state()[0] == 1


def test_a_score_rank_notices_that_its_decoder_rank_is_gone(monkeypatch):
    monkeypatch.setattr(member_module, "LOST_SECONDS", 1.0)
    context, (public, secret) = zmq.Context(), zmq.curve_keypair()
    router = context.socket(zmq.ROUTER)
    router.curve_publickey, router.curve_secretkey, router.curve_server = public, secret, True
    port = router.bind_to_random_port("tcp://127.0.0.1")
    address = DecoderAddress(0, f"tcp://127.0.0.1:{port}", public.decode())
    key = zmq.curve_keypair()
    about = [address], key, LIMITS, "own", "CPU"
    made = Membership(*about, lambda _: Standing.OWN, silence_seconds=SILENCE)
    assert router.poll(10_000), "it says hello"
    router.close(0)
    context.term()
    with pytest.raises(DecoderLost, match="replica 0"):
        made.take(20)
    made.close()


def test_a_score_rank_notices_that_its_decoder_rank_is_stopped():
    """Its connection holds: the kernel keeps it."""
    code = """
import sys, time, torch
from megatron_kosmosg.score.fleet import Fleet, Limits, Patience
limits = Limits(most_rows=4, condition=(3, 8), dtype=torch.bfloat16, image_size=8)
public, secret, guests = (part.encode() for part in sys.argv[1:])
fleet = Fleet("127.0.0.1", (public, secret), limits, Patience(2.0, 1.0, 2.0))
fleet.admit(guests)
print(fleet.port, flush=True)
time.sleep(60)
"""
    (public, secret), key = zmq.curve_keypair(), zmq.curve_keypair()
    command = [sys.executable, "-c", code, *(part.decode() for part in (public, secret, key[0]))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = f"tcp://127.0.0.1:{int(process.stdout.readline())}"
        about = [DecoderAddress(0, address, public.decode())], key, LIMITS, "own", "CPU"
        made = Membership(*about, lambda _: Standing.OWN, silence_seconds=2.5)
        made.is_loaded(PRINTS)
        assert made.take(4) is None, "it says that it is there every second"
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(DecoderLost, match="replica 0 at .* has said nothing for 2 s"):
            made.take(20)
            made.take(0)
        made.close()
        process.kill()


def test_announced_rows_reach_the_rank_that_then_gets_their_request(link):
    announced: list[Rows] = []
    made = member(link, "own")
    made.prepare = announced.append
    made.is_loaded(PRINTS)
    until(lambda: link.fleet.state()[0] == 1)
    link.fleet.prepare(request(5).rows)
    until(lambda: announced == [request(5).rows])
    number = ask(link, 5)
    asked = made.take(10)
    made.reply(asked, compute(asked.request))
    assert equal(link.fleet.take(number), 5)
    made.close()
