"""Which files a dataset is, and which a run reads: what no command may write over."""

from __future__ import annotations

from pathlib import Path

from megatron_kosmosg.config.dataset_prefixes import stored_prefixes
from megatron_kosmosg.config.remote_data import url_path
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.manifest import manifest_path
from megatron_kosmosg.data.sentences import sentence_paths


def dataset_files(prefix: str | Path) -> list[Path]:
    """Every file of the dataset under a prefix, there or not; the manifest last."""
    data = Path(f"{prefix}.bin")
    return [
        data,
        url_path(data),
        Path(f"{prefix}.idx"),
        *sentence_paths(prefix),
        manifest_path(prefix),
    ]


def files_of_all_shards(prefix: str | Path) -> list[Path]:
    """The files of the dataset itself and of every shard that its manifest lists."""
    shards = [shard for shard in stored_prefixes(prefix) if shard != str(prefix)]
    return [file for each in (*shards, prefix) for file in dataset_files(each)]


def files_read(config: RunConfig, *, of_shards: bool = True) -> list[Path]:
    """Files that a run of `config` opens: its datasets, the tokenizer model and weights of an
    evaluator. Model folders and the checkpoint that it starts from are `folders_read`.

    Args:
        of_shards: with those of datasets' shards, of which there may be thousands.
    """
    entries = [*config.data.blend.values(), *config.data.heldout.values()]
    files_of = files_of_all_shards if of_shards else dataset_files
    files = [file for entry in entries for file in files_of(entry.path)]
    named = (config.data.tokenizer_model, config.evaluation.dino)
    return [*files, *(Path(path) for path in named if path is not None)]


def folders_read(config: RunConfig) -> list[Path]:
    """Folders of models that a run of `config` may open."""
    model = config.model
    frozen = [model.vision.path, model.clip_text.path, model.diffusion.path]
    configured = [*frozen, config.evaluation.clip]
    return [Path(path) for path in configured if path is not None]
