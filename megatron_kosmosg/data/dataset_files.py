"""Which files a dataset is, and which a run reads: what no command may write over."""

from __future__ import annotations

from pathlib import Path

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.manifest import manifest_path
from megatron_kosmosg.data.sentences import sentence_paths


def dataset_files(prefix: str | Path) -> list[Path]:
    """Every file of the dataset under a prefix, there or not; the manifest last."""
    data = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
    return [*data, *sentence_paths(prefix), manifest_path(prefix)]


def files_read(config: RunConfig) -> list[Path]:
    """Files that a run of `config` opens: its datasets, the tokenizer model and weights of an
    evaluator. Model folders and the checkpoint that it starts from are `folders_read`."""
    entries = [*config.data.blend.values(), *config.data.heldout.values()]
    files = [file for entry in entries for file in dataset_files(entry.path)]
    named = (config.data.tokenizer_model, config.evaluation.dino)
    return [*files, *(Path(path) for path in named if path is not None)]


def folders_read(config: RunConfig) -> list[Path]:
    """Folders of models that a run of `config` may open."""
    model = config.model
    given = [model.vision.path, model.clip_text.path, model.diffusion.path, config.evaluation.clip]
    return [Path(path) for path in given if path is not None]
