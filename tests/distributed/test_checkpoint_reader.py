"""Checkpoints of any layout are read, and weights alone written, by one process without groups."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_kosmosg.checkpoint import folder as checkpoint_folder
from megatron_kosmosg.checkpoint.save_and_resume import Checkpointer, checkpoint_metadata
from megatron_kosmosg.checkpoint.weights import load_weights
from megatron_kosmosg.config.errors import ConfigError, ConversionError
from megatron_kosmosg.config.load import to_yaml
from megatron_kosmosg.config.schema import LoggingConfig, RunConfig
from megatron_kosmosg.conversion.checkpoint_reader import CheckpointTensors
from megatron_kosmosg.conversion.checkpoint_writer import model_tensors, write_checkpoint
from megatron_kosmosg.conversion.stored_names import EMBEDDING
from megatron_kosmosg.conversion.tensors import InMemory, TensorSource
from megatron_kosmosg.inference.trained_model import single_process
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.parallel.context import single_process_context
from tests.support.layout_case import Case, build
from tests.support.ranks import run_ranks
from tests.support.shares import Share, parameters, whole

PARTS = {"output_head": False, "aligner_parts": ("M", "N")}


def save(case: Case, folder: str) -> None:
    """The freshly built model, and something that is none of its weights."""
    context = platform.initialize(case.config())
    state = build(case, context).sharded_state_dict()
    extra = ShardedTensor.from_rank_offsets(
        "optimizer.state.exp_avg", torch.ones(3), replica_id=context.rank
    )
    dist_checkpointing.save({"model": state, "optimizer": extra}, folder)
    platform.teardown()


def align_config(case: Case, folder: Path) -> RunConfig:
    logging = LoggingConfig(output_dir=str(folder))
    return dataclasses.replace(case.config(), stage="align", logging=logging)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of four ranks, TP2 x PP2."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("run")
    case = Case(tp=2, pp=2, **PARTS)
    temporary = checkpoint_folder.begin(run, 3)
    run_ranks(4, save, case, str(temporary))
    return checkpoint_folder.finish(temporary, to_yaml(align_config(case, run)))


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The same model on one rank: initial weights do not depend on the layout."""
    case = Case(**PARTS)
    with single_process(case.config()) as context:
        state = build(case, context).state_dict()
    state[EMBEDDING] = state[EMBEDDING][: case.config().model.vocab_size]
    return {name: t.clone() for name, t in state.items() if not name.endswith("_extra_state")}


def test_every_weight_is_whole_and_nothing_else_is_read(checkpoint: Path, expected) -> None:
    source = CheckpointTensors(checkpoint.parent)
    assert source.path == checkpoint and source.stage == "align"
    names = source.names()
    assert names.keys() == expected.keys() == model_tensors(source.config).keys()
    for name, value in expected.items():
        found = source.read(name)
        assert names[name] == (tuple(found.shape), found.dtype)
        assert torch.equal(found, value), name
    with pytest.raises(ConversionError, match=r"holds no decoder\.layers\.9"):
        source.read("decoder.layers.9.mlp.linear_fc1.weight")
    assert not torch.distributed.is_initialized()


def test_what_is_written_loads_like_any_checkpoint(tmp_path: Path, expected) -> None:
    case = Case(**PARTS)
    config = align_config(case, tmp_path)
    told = []
    path = write_checkpoint(
        tmp_path / "new", config, InMemory(expected), lambda done, total: told.append((done, total))
    )
    assert path.name == "iter_0000000" and checkpoint_folder.is_valid(path)
    total = sum(value.nbytes for value in expected.values())
    assert told[0] == (0, total) and told[-1] == (total, total)
    assert len(told) == 1 + len(expected)
    changed = dataclasses.replace(
        config, training=dataclasses.replace(config.training, seed=99)
    )  # other initial weights
    with single_process(changed) as context:
        model = build(case, context)
        load_weights(path, [model], checkpoint_metadata(context), stage="align")
        for name, value in model.state_dict().items():
            if name in expected:
                assert torch.equal(value[: len(expected[name])], expected[name]), name


def load(case: Case, folder: str) -> Share:
    """This rank's parameters after loading the checkpoint."""
    context = platform.initialize(case.config())
    model = build(case, context)
    load_weights(Path(folder), [model], checkpoint_metadata(context))
    share = parameters(model, context)
    platform.teardown()
    return share


def test_what_is_written_loads_on_several_ranks(tmp_path: Path, expected) -> None:
    changed = {name: value * 1.5 + 0.25 for name, value in expected.items()}
    path = write_checkpoint(
        tmp_path / "new", align_config(Case(**PARTS), tmp_path), InMemory(changed)
    )
    loaded = whole(run_ranks(2, load, Case(tp=2, **PARTS), str(path)), tolerance=0)
    assert loaded.keys() == changed.keys()
    for name, value in changed.items():
        assert torch.equal(torch.from_numpy(loaded[name])[: len(value)], value), name


def test_weights_alone_are_no_run_to_continue(tmp_path: Path, expected) -> None:
    config = align_config(Case(**PARTS), tmp_path)
    path = write_checkpoint(tmp_path / "new", config, InMemory(expected))
    checkpointer = Checkpointer(config, single_process_context("cpu"), [], None, None, {})
    with pytest.raises(ConfigError, match=f"set checkpoint.load={tmp_path / 'new'}"):
        checkpointer.resume(path)


def test_a_damaged_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    largest = max(files, key=lambda name: len(files[name]))

    def copy(**changed: bytes) -> Path:
        folder = tmp_path / f"iter_{len(list(tmp_path.iterdir())):07d}"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(changed.get(name, content))
        return folder

    with pytest.raises(ConversionError, match="is damaged"):
        CheckpointTensors(copy(**{largest: files[largest][:-100]}))
    same_size = copy(**{largest: bytes(len(files[largest]))})
    name = next(iter(CheckpointTensors(same_size).names()))
    source = CheckpointTensors(same_size)
    with pytest.raises(ConversionError, match="cannot be read"):
        for name in source.names():
            source.read(name)
    with pytest.raises(ConversionError, match="no finished checkpoint"):
        CheckpointTensors(tmp_path / "nothing")


class Failing:
    """A source that is interrupted on the way."""

    def __init__(self, source: TensorSource, error: BaseException) -> None:
        self._source, self._error, self._left = source, error, 5

    def names(self):
        return self._source.names()

    def read(self, name: str) -> torch.Tensor:
        self._left -= 1
        if self._left == 0:
            raise self._error
        return self._source.read(name)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")])
def test_an_interrupted_write_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, expected, error: BaseException
) -> None:
    config, output = align_config(Case(**PARTS), tmp_path), tmp_path / "new"
    with pytest.raises(type(error)):
        write_checkpoint(output, config, Failing(InMemory(expected), error))
    assert not output.exists()
    (output / "iter_0000000.tmp").mkdir(parents=True)  # what a killed process leaves
    (output / "iter_0000000.tmp" / "__0_0.distcp").write_bytes(b"half")
    path = write_checkpoint(output, config, InMemory(expected))
    assert [item.name for item in output.iterdir()] == ["iter_0000000"]
    assert CheckpointTensors(path).names().keys() == expected.keys()
    with pytest.raises(ConversionError, match="already holds iter_0000000"):
        write_checkpoint(output, config, InMemory(expected))


def test_only_a_complete_model_is_written(tmp_path: Path, expected) -> None:
    config = align_config(Case(**PARTS), tmp_path)
    fewer = {name: value for name, value in expected.items() if name != "aligner_n.query"}
    with pytest.raises(ConversionError, match=r"lacks aligner_n\.query"):
        write_checkpoint(tmp_path / "new", config, InMemory(fewer))
    wider = expected | {"aligner_n.query": torch.ones(64, 3)}
    with pytest.raises(ConversionError, match=r"aligner_n\.query has shape \[64, 3\]"):
        write_checkpoint(tmp_path / "new", config, InMemory(wider))
    assert not (tmp_path / "new").exists()
