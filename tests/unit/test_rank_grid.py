"""Which rank does what: against Megatron-Core's own numbering, and by counting."""

from __future__ import annotations

import pytest

from megatron_kosmosg.config.batching import data_parallel_size
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.rank_grid import rank_grid


def config(*overrides: str):
    return load_config(None, ["stage=instruct", "logging.output_dir=x", *overrides])


def dedicated(tp: int = 1, pp: int = 1, k: int = 1, r: int = 1):
    return config(
        "score.placement=dedicated",
        f"parallel.tensor_model_parallel_size={tp}",
        f"parallel.pipeline_model_parallel_size={pp}",
        f"score.ranks_per_replica={k}",
        f"score.replicas_per_rank={r}",
    )


@pytest.mark.parametrize(("tp", "pp", "size"), [(1, 1, 3), (2, 1, 8), (2, 2, 8), (4, 2, 24)])
def test_colocated_groups_are_megatrons(tp, pp, size):
    from megatron.core.parallel_state import RankGenerator

    generator = RankGenerator(tp=tp, ep=1, dp=size // tp // pp, pp=pp, cp=1, order="tp-cp-ep-dp-pp")
    world = rank_grid(
        config(
            f"parallel.tensor_model_parallel_size={tp}",
            f"parallel.pipeline_model_parallel_size={pp}",
        ),
        size,
    )
    replicas, stages, tensors = range(world.num_replicas), range(pp), range(tp)
    tensor = [world.tensor_group(r, s) for s in stages for r in replicas]
    assert sorted(tensor) == sorted(generator.get_ranks("tp"))
    pipeline = [world.pipeline_group(r, t) for t in tensors for r in replicas]
    assert sorted(pipeline) == sorted(generator.get_ranks("pp"))
    data = [world.data_group(s, t) for s in stages for t in tensors]
    assert sorted(data) == sorted(generator.get_ranks("dp"))


@pytest.mark.parametrize(
    ("tp", "pp", "k", "r", "size", "replicas"),
    [
        (2, 1, 2, 1, 256, 64),
        (1, 1, 1, 4, 10, 8),
        (2, 2, 3, 1, 14, 2),
        (1, 2, 1, 2, 15, 6),
    ],
)
def test_every_rank_of_a_dedicated_world_has_one_place(tp, pp, k, r, size, replicas):
    world = rank_grid(dedicated(tp, pp, k, r), size)
    assert world.num_replicas == replicas == data_parallel_size(dedicated(tp, pp, k, r), size)
    seen = []
    for replica in range(replicas):
        for stage in range(pp):
            for rank in world.tensor_group(replica, stage):
                coordinates = world.coordinates(rank)
                assert (coordinates.role, coordinates.replica, coordinates.pp_rank) == (
                    "decoder",
                    replica,
                    stage,
                )
                assert rank == world.decoder_rank(replica, stage, coordinates.tp_rank)
                seen.append(rank)
    served = {}
    for replica in range(replicas):
        for rank in world.score_ranks(replica):
            served.setdefault(rank, []).append(replica)
            assert world.coordinates(rank).role == "score"
    assert sorted(seen + list(served)) == list(range(size))
    assert len(served) == world.num_score_ranks
    assert {len(found) for found in served.values()} == {r}
    assert all(world.coordinates(rank).replica == found[0] for rank, found in served.items())


def test_units_of_four_stay_on_their_node():
    world = rank_grid(dedicated(tp=2, k=2), 256)
    for replica in range(world.num_replicas):
        ranks = world.tensor_group(replica, 0) + world.score_ranks(replica)
        assert len({rank // 8 for rank in ranks}) == 1


@pytest.mark.parametrize(
    ("settings", "size", "words"),
    [
        (dedicated(tp=2, k=2), 255, ["252 or 256", "ranks_per_replica to 1 or 3", "colocated"]),
        (dedicated(tp=2, k=2), 3, ["start 4 ranks"]),
        (dedicated(k=2, r=2), 8, ["contradict"]),
        (dedicated(tp=2, r=2), 9, ["= 5 ranks", "5 or 10", "replicas_per_rank to 1 or 4"]),
        (dedicated(tp=2, r=3), 8, ["start 7 or 14", "score.placement=colocated"]),
        (dedicated(tp=2, pp=2), 4, ["= 5 ranks; start 5 ranks"]),
        (config("parallel.pipeline_model_parallel_size=4"), 3, ["= 4 ranks; start 4 ranks"]),
        (dedicated(k=0), 8, ["ranks_per_replica=0", "at least 1"]),
        (config("score.placement=dedicated", "score.window=0"), 8, ["score.window=0"]),
        (config("parallel.tensor_model_parallel_size=2"), 5, ["4 or 6"]),
    ],
)
def test_worlds_that_do_not_divide_are_refused_with_choices(settings, size, words):
    with pytest.raises(ConfigError) as error:
        rank_grid(settings, size)
    for word in words:
        assert word in str(error.value)


def test_other_stages_have_no_score_ranks():
    pretrain = load_config(
        None, ["stage=pretrain", "logging.output_dir=x", "score.placement=dedicated"]
    )
    assert rank_grid(pretrain, 8).num_score_ranks == 0
