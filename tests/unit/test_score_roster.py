"""Which score rank gets a request, and what of a message fits into frames: no sockets, no model."""

from __future__ import annotations

import pytest
import torch

from benchmarks import score_fleet
from megatron_kosmosg.score import wire
from megatron_kosmosg.score.messages import Answer, Kind, Rows, ScoreRequest
from megatron_kosmosg.score.roster import Member, Roster, Standing
from megatron_kosmosg.score.wire import BadMessage, Limits


def request(position: int) -> ScoreRequest:
    return ScoreRequest(Kind.GRADIENT, Rows((position,), (0,)), torch.zeros(0), torch.ones(()))


def answer(waiting: int = 0, seconds: float = 1.0) -> Answer:
    return Answer(0.0, 0, 0, 0.0, seconds, torch.zeros(0), waiting)


def roster_of(*names: bytes, standing: Standing = Standing.JOINED) -> Roster:
    made = Roster(60.0)
    for name in names:
        made.members[name] = Member(name.decode(), standing, is_ready=True)
    return made


def test_work_goes_to_the_fastest_rank():
    roster = roster_of(b"slow", b"fast")
    for name, seconds in ((b"slow", 4.0), (b"fast", 1.0)):
        roster.members[name].seconds = seconds
    assert [roster.assign(roster.submit(request(n)), now=0.0) for n in range(2)] == [b"fast"] * 2
    # Two before it on the fast one are as long as one alone on the slow one: that has to be free.
    assert roster.assign(roster.submit(request(2)), now=0.0) == b"slow"


def test_a_rank_that_was_slow_once_is_tried_again():
    roster = roster_of(b"a", b"was slow")
    for name, seconds in ((b"a", 1.0), (b"was slow", 3.0)):
        roster.members[name].seconds = seconds
    names = []
    for number in range(400):
        name = roster.assign(roster.submit(request(number)), now=float(number))
        assert name is not None
        names.append(name)
        sent = number + 1
        roster.answer(name, sent, answer(), now=number + 0.9, is_doubted=False)
    assert names[0] == b"a" and names.count(b"was slow") > 1


def test_a_rank_for_which_other_replicas_wait_is_left_alone_until_it_has_done_their_work():
    roster = roster_of(b"a", b"b")
    numbers = [roster.submit(request(n)) for n in range(2)]
    given = {roster.assign(number, now=0.0): number for number in numbers}
    assert given.keys() == {b"a", b"b"}
    roster.answer(b"a", given[b"a"], answer(waiting=5), now=1.0, is_doubted=False)
    roster.answer(b"b", given[b"b"], answer(waiting=2), now=1.0, is_doubted=False)
    third = roster.submit(request(2))
    assert roster.assign(third, now=1.0) == b"b"
    roster.answer(b"b", third, answer(waiting=4), now=8.0, is_doubted=False)
    # Seven seconds later the five that waited for the other are done.
    assert roster.assign(roster.submit(request(3)), now=8.0) == b"a"


def test_the_jobs_own_rank_for_the_replica_comes_before_those_for_others():
    roster = roster_of(b"own", standing=Standing.OWN)
    roster.members[b"other"] = Member("other", Standing.RESERVE, is_ready=True)
    given = [roster.assign(roster.submit(request(n)), now=0.0) for n in range(3)]
    assert given == [b"own", b"own", None], "it is asked again when it is free"
    roster.remove(b"own")
    assert [roster.assign(number, now=0.0) for number in roster.waiting()][:2] == [b"other"] * 2


def test_an_answer_counts_for_the_hardware_whose_numbers_are_used():
    roster = roster_of(b"guest")
    roster.members[b"guest"].hardware = "another"
    roster.members[b"own"] = Member("own", Standing.OWN, "like", is_ready=True)
    for number, doubted in ((roster.submit(request(n)), n > 0) for n in range(2)):
        roster.members[b"own"].held[0] = 0.0  # the guest is the first to be asked
        roster.members[b"own"].held[-1] = 0.0
        assert roster.assign(number, now=0.0) == b"guest"
        roster.members[b"own"].held.clear()
        roster.answer(b"guest", number, answer(), now=1.0, is_doubted=doubted)
    assert roster.answered == {"another": 1}
    assert roster.assign(number, now=1.0) == b"own", "it has to confirm the second"
    assert roster.answer(b"own", number, answer(), now=2.0, is_doubted=False) is None
    assert roster.answered == {"another": 1, "like": 1}


@pytest.mark.parametrize("what", ["the referee went", "a guest came"])
def test_a_guest_confirms_no_answer_while_the_job_has_ranks_of_its_own(what):
    """A lie would otherwise get an honest rank evicted."""
    roster = roster_of(b"honest")
    number = roster.submit(request(0))
    assert roster.assign(number, now=0.0) == b"honest"
    for name in (b"own", b"second"):
        roster.members[name] = Member(name.decode(), Standing.OWN, is_ready=True)
    if what == "the referee went":
        roster.members[b"liar"] = Member("liar", Standing.JOINED, is_ready=True)
    roster.answer(b"honest", number, answer(), now=1.0, is_doubted=True)
    if what == "the referee went":
        assert roster.assign(number, now=1.0) == b"own"
        roster.remove(b"own")
        busy = b"second"
    else:
        roster.members[b"liar"] = Member("liar", Standing.JOINED, is_ready=True)
        busy = b"own"
    roster.members[busy].held |= {-1: 1.0, -2: 1.0}  # nothing more is given to it
    assert roster.assign(number, now=1.0) is None, "it waits for the rank of the job"
    roster.members[busy].held.clear()
    assert roster.assign(number, now=1.0) == busy


def test_replicas_do_not_all_choose_the_same_ranks():
    """Half of the speed that a fleet without queues would have is lost where they do."""
    times = score_fleet.Times([0.1] * 8, [0.2] * 8, spread=0.1)
    fleet = score_fleet.Fleet(replicas=32, window=2, times=times)
    for _ in range(32):
        fleet.join(unet=0.121, link=0.025)
    found = score_fleet.measured(fleet, updates=2, replicas=32, ranks=32, images=32 * 8 * 16)
    without_queues = 32 * 16 / (0.1 + 0.2)
    assert found.images_per_second > 0.7 * without_queues
    assert found.decoder_idle < 0.15


def test_slower_ranks_that_join_do_not_slow_down_replicas_whose_own_suffice():
    """A third of the speed is lost where those that nobody asks are tried too often."""
    times, speeds = score_fleet.Times([0.15] * 8, [0.28] * 8, spread=0.1), []
    for guests in (0, 16):
        fleet = score_fleet.Fleet(replicas=16, window=2, times=times)
        for replica in range(16):
            fleet.join(unet=0.22, link=0.025, own_of=(replica,))
        for _ in range(guests):
            fleet.join(unet=0.55, link=0.05)
        found = score_fleet.measured(fleet, updates=4, replicas=16, ranks=16, images=16 * 8 * 16)
        speeds.append(found.images_per_second)
    assert speeds[1] > 0.9 * speeds[0]


def test_an_answer_of_real_size_travels_in_pieces():
    """Of more than one frame in both directions, the last one shorter."""
    large = Limits(most_rows=8, condition=(77, 768), dtype=torch.bfloat16, image_size=8)
    assert 8 * 77 * 768 * 2 % wire.PIECE_BYTES and 8 * 77 * 768 * 2 > wire.PIECE_BYTES
    rows = Rows(tuple(range(8)), (0,) * 8)
    condition = torch.randn(8, 77, 768).to(torch.bfloat16)
    frames = wire.pack_request(5, ScoreRequest(Kind.GRADIENT, rows, condition, torch.tensor(2.0)))
    message, number, parts = wire.unpack(frames, large)
    found = wire.unpack_request(parts, large)
    assert (message, number, found.rows) == (wire.Message.ASK, 5, rows)
    assert torch.equal(found.condition, condition)
    answer = Answer(1.0, 0, 0, 0.0, 0.1, torch.randn(8 * 77 * 768))
    frames = wire.pack_answer(5, answer)
    assert len(frames) <= large.most_frames
    assert max(len(frame) for frame in frames) <= large.most_bytes
    parts = wire.unpack(frames, large)[2]
    assert torch.equal(wire.unpack_answer(parts, 8 * 77 * 768).payload, answer.payload)
    with pytest.raises(BadMessage, match="bytes where"):
        wire.unpack_answer(parts[:-1], 8 * 77 * 768)
    with pytest.raises(BadMessage, match="frames"):
        wire.unpack(frames * 2, large)
