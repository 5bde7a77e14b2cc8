"""The schedule of a plan: against charts made by hand, a simulation, and training's own."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from megatron_kosmosg.planning.timeline import pass_order, play
from megatron_kosmosg.score import schedule as score_schedule


@pytest.mark.parametrize(("stages", "count"), [(1, 5), (2, 9), (4, 8)])
def test_equal_stages_have_the_known_bubble(stages, count):
    forward, backward = [[1.0] * count] * stages, [[2.0] * count] * stages
    played = play(forward, backward)
    assert played.seconds == pytest.approx(3.0 * (count + stages - 1))
    assert played.decoder_busy == pytest.approx(3.0 * count)


def test_score_ranks_overlap_with_the_decoder():
    alone = play([[1.0]], [[2.0]], [4.0])
    assert alone.seconds == 7.0  # nothing to overlap with
    forward, backward, score = [[1.0] * 40], [[2.0] * 40], [3.0] * 40
    waits = play(forward, backward, score, ahead=0)
    assert waits.seconds == pytest.approx(6.0 * 40)
    overlaps = play(forward, backward, score, ahead=1)
    assert overlaps.seconds == pytest.approx(3.0 * 40, rel=0.1)
    slow = play(forward, backward, [6.0] * 40, ahead=1)
    two = play(forward, backward, [6.0] * 40, ahead=2, score_ranks=2)
    assert slow.seconds == pytest.approx(6.0 * 40, rel=0.1)
    assert two.seconds < 0.6 * slow.seconds
    assert two.score_busy == pytest.approx(6.0 * 20)
    shared = play(forward, backward, score, ahead=1, replicas=2)
    assert shared.seconds == pytest.approx(2 * 3.0 * 40, rel=0.1)


def test_one_stage_and_one_score_rank_by_hand():
    """F 1, B 2, U-Net 3, one pass ahead.

    decoder  F0 F1 . . B0 B0 F2 B1 B1 . B2 B2
    score    .  S0 S0 S0 S1 S1 S1 S2 S2 S2
    """
    played = play([[1.0] * 3], [[2.0] * 3], [3.0] * 3, ahead=1)
    assert (played.seconds, played.decoder_busy, played.score_busy) == (12.0, 9.0, 9.0)
    # Half a second each way: S0 1.5-4.5, B0 5-7, F2 7-8, S1 4.5-7.5, B1 8-10, S2 8.5-11.5, B2 12-14
    assert play([[1.0] * 3], [[2.0] * 3], [3.0] * 3, ahead=1, link=0.5).seconds == 14.0


def test_two_stages_and_two_score_ranks_by_hand():
    """F 1, B 2, U-Net 5; micro-batches 0 and 2 to the first score rank, 1 to the second; one pass
    ahead, so two on the first.

    pipeline stage 0: F0 0-1, F1 1-2, F2 2-3, B0 9-11, B1 12-14, B2 17-19
    pipeline stage 1: F0 1-2, F1 2-3, B0 7-9, F2 9-10, B1 10-12, B2 15-17
    U-Nets:  S0 2-7, S2 10-15; S1 3-8
    """
    played = play([[1.0] * 3] * 2, [[2.0] * 3] * 2, [5.0] * 3, score_ranks=2, ahead=1)
    assert (played.seconds, played.decoder_busy, played.score_busy) == (19.0, 9.0, 7.5)


def test_two_replicas_share_a_score_rank_by_hand():
    """F 1, B 2, U-Net 2, none ahead: S(a0) 1-3, S(b0) 3-5; a: B0 3-5, F1 5-6; b: B0 5-7, F1 7-8;
    S(a1) 6-8, S(b1) 8-10; a ends at 10, b at 12."""
    played = play([[1.0] * 2], [[2.0] * 2], [2.0] * 2, replicas=2)
    assert (played.seconds, played.decoder_busy, played.score_busy) == (12.0, 6.0, 8.0)


def simulate(forward, backward, score, score_ranks, replicas, ahead, link):
    """Whole seconds, one tick at a time: what can start now starts now."""
    stages, count = len(forward), len(forward[0])
    todo = {
        (r, s): [x for i in range(count) for x in (("F", i), ("B", i))]
        for r in range(replicas) for s in range(stages)
    }  # fmt: skip
    for (_, s), passes in todo.items():  # the warm-up's forwards move to the front
        warm_up = min(stages - s - 1 + ahead, count)
        ahead_of_time = [("F", i) for i in range(warm_up)]
        rest = [("F", i) for i in range(warm_up, count)]
        backwards = [("B", i) for i in range(count)]
        pairs = [p for pair in zip(rest, backwards, strict=False) for p in pair]
        passes[:] = ahead_of_time + pairs + backwards[len(rest) :]
    queues = [
        [(r, i) for i in range(count) for r in range(replicas) if i % score_ranks == k]
        for k in range(score_ranks)
    ]
    ends, busy_until = {}, dict.fromkeys(todo, 0)
    servers = [0] * score_ranks

    def over(key, now, delay=0):
        return key in ends and ends[key] + delay <= now

    now = 0
    while any(todo.values()) or any(queues):
        for k, queue in enumerate(queues):
            if queue and servers[k] <= now:
                r, i = queue[0]
                if over(("F", r, stages - 1, i), now, link):
                    servers[k] = ends["S", r, stages - 1, i] = now + score[i]
                    queue.pop(0)
        for (r, s), passes in todo.items():
            if not passes or busy_until[r, s] > now:
                continue
            name, i = passes[0]
            if name == "F":
                ready = s == 0 or over(("F", r, s - 1, i), now)
            elif s < stages - 1:
                ready = over(("B", r, s + 1, i), now)
            else:
                ready = over(("S", r, s, i), now, link)
            if ready:
                took = (forward if name == "F" else backward)[s][i]
                busy_until[r, s] = ends[name, r, s, i] = now + took
                passes.pop(0)
        now += 1
    return max(ends.values())


def test_random_schedules_take_as_long_as_a_simulation_in_ticks():
    dice = random.Random(5)
    for _ in range(60):
        stages, count = dice.randint(1, 4), dice.randint(1, 6)
        forward = [[dice.randint(1, 4) for _ in range(count)] for _ in range(stages)]
        backward = [[dice.randint(1, 6) for _ in range(count)] for _ in range(stages)]
        score = [dice.randint(1, 9) for _ in range(count)]
        ranks, replicas = dice.choice([(1, 1), (2, 1), (3, 1), (1, 2), (1, 3)])
        ahead, link = dice.randint(0, 3), dice.randint(0, 2)
        played = play(
            forward, backward, score, score_ranks=ranks, replicas=replicas, ahead=ahead, link=link
        )
        assert played.seconds == simulate(forward, backward, score, ranks, replicas, ahead, link), (
            forward,
            backward,
            score,
            ranks,
            replicas,
            ahead,
            link,
        )


@pytest.mark.parametrize(
    ("num_pipeline_stages", "count", "window"), [(1, 4, 1), (1, 5, 3), (3, 4, 2), (2, 2, 4)]
)
def test_the_order_of_passes_is_the_one_that_training_runs(
    monkeypatch, num_pipeline_stages, count, window
):
    ran: list[tuple[str, int]] = []

    class Link:
        """Every exchange of the schedule; nothing is sent."""

        def __init__(self, *arguments) -> None:
            both = ("send_forward_recv_backward", "send_backward_recv_forward")
            for name in ("recv_forward", "send_forward", "send_backward", "recv_backward", *both):
                setattr(self, name, lambda *arguments: None)

    def forward_step(*arguments, current_microbatch: int, **named):
        ran.append(("F", current_microbatch))
        return [None], 1

    def backward_step(*arguments) -> None:
        ran.append(("B", sum(name == "B" for name, _ in ran)))

    options = SimpleNamespace(
        no_sync_func=None,
        deallocate_pipeline_outputs=False,
        finalize_model_grads_func=lambda *arguments, **named: None,
    )
    monkeypatch.setattr(score_schedule, "PipelineLink", Link)
    monkeypatch.setattr(score_schedule, "forward_step", forward_step)
    monkeypatch.setattr(score_schedule, "backward_step", backward_step)
    monkeypatch.setattr(score_schedule, "deallocate_output_tensor", lambda *arguments: None)
    monkeypatch.setattr(score_schedule, "get_model_config", lambda model: options)
    monkeypatch.setattr(score_schedule, "get_tensor_shapes", lambda **named: [])
    for pipeline_stage in range(num_pipeline_stages):
        ran.clear()
        context = SimpleNamespace(
            pp_group=None,
            process_groups=SimpleNamespace(tp=None, cp=None),
            is_first_pipeline_stage=pipeline_stage == 0,
            is_last_pipeline_stage=pipeline_stage == num_pipeline_stages - 1,
            pp_size=num_pipeline_stages,
            pp_rank=pipeline_stage,
            device=torch.device("cpu"),
        )
        score_schedule._one_forward_one_backward(
            context,
            window - 1,
            lambda: None,
            forward_step_func=None,
            data_iterator=None,
            model=None,
            num_microbatches=count,
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
        )
        assert ran == pass_order(num_pipeline_stages, pipeline_stage, count, window - 1)
