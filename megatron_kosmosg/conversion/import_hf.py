"""`import-hf` and `import-kosmos2`: stock Hugging Face folders as a checkpoint to train from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Kosmos2Config

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.conversion import hf_aligner, kosmos2
from megatron_kosmosg.conversion.checkpoint_writer import (
    model_tensors,
    refuse_existing,
    write_checkpoint,
)
from megatron_kosmosg.conversion.exported_folder import exported_parts, read_model_json
from megatron_kosmosg.conversion.hf_tokenizer import (
    check_same_tokens,
    checked_vocabulary,
    folder_model,
)
from megatron_kosmosg.conversion.imported_config import Imported, imported_config
from megatron_kosmosg.conversion.rules import RuleTable
from megatron_kosmosg.conversion.safetensors_files import (
    DIFFUSERS,
    TRANSFORMERS,
    SafetensorsFolder,
)
from megatron_kosmosg.conversion.tensors import (
    InDtype,
    JoinedSources,
    TensorSource,
    as_native,
    check_ties,
)
from megatron_kosmosg.progress import ProgressCallback


def import_hf(
    folder: Path,
    output: Path,
    dtype: torch.dtype | None = None,
    config_file: Path | None = None,
    overrides: Sequence[str] = (),
    progress: ProgressCallback | None = None,
) -> Imported:
    """Writes an exported folder as a checkpoint: the inverse of `export-hf` (an `instruct`
    checkpoint) and of `export-mllm` (`pretrain`).

    Args:
        folder: the exported folder. Sizes and the tokenizer's SentencePiece model are taken from
            it.
        output: folder of the checkpoint.
        dtype: of the weights; None keeps the folder's.
        config_file: a config that gives the settings beyond the sizes.
        overrides: such settings as `section.key=value`.
        progress: is told how far the writing is.
    """
    parts = exported_parts(folder)
    sizes, settings = _language_facts(parts.mllm, parts.image_processor)
    tokenizer = folder_model(parts.tokenizer)
    check_same_tokens(tokenizer, parts.tokenizer)
    checked_vocabulary(tokenizer, sizes["model.vocab_size"])
    settings |= _path_settings(output, tokenizer)
    sizes["stage"] = "pretrain"
    if parts.aligner is not None:
        sizes["stage"] = "instruct"
        sizes |= hf_aligner.aligner_sizes(parts.aligner)
        settings["model.diffusion.path"] = str(folder.resolve())
    config = imported_config(sizes, settings, config_file, overrides)
    refuse_existing(output)
    sources = [language_source(parts.mllm, config)]
    if parts.aligner is not None:
        sources.append(aligner_source(parts.aligner, config))
    written = write_checkpoint(output, config, InDtype(JoinedSources(*sources), dtype), progress)
    return Imported(written, [f"stage {config.stage}, tokenizer {config.data.tokenizer_model}"])


def import_kosmos2(
    folder: Path,
    output: Path,
    dtype: torch.dtype | None = None,
    config_file: Path | None = None,
    overrides: Sequence[str] = (),
    tokenizer: Path | None = None,
    progress: ProgressCallback | None = None,
) -> Imported:
    """Writes a `pretrain` checkpoint from a folder such as microsoft/kosmos-2-patch14-224. The rows
    of Kosmos-2's grounding tokens are cut off.

    Args:
        tokenizer: SentencePiece model, by default the folder's. Either way every id must mean the
            same in the folder's tokenizer.

    The other arguments are those of `import_hf`.
    """
    sizes, settings = _language_facts(folder, folder)
    tokenizer = tokenizer or folder_model(folder, ", or give --tokenizer-model")
    check_same_tokens(tokenizer, folder)
    rows = sizes["model.vocab_size"]
    sizes["model.vocab_size"] = checked_vocabulary(tokenizer, rows, or_fewer=True)
    sizes["stage"] = "pretrain"
    settings |= _path_settings(output, tokenizer)
    config = imported_config(sizes, settings, config_file, overrides)
    refuse_existing(output)
    source = InDtype(language_source(folder, config), dtype)
    notes = [f"stage {config.stage}, tokenizer {config.data.tokenizer_model}"]
    if config.model.vocab_size < rows:
        notes.append(
            f"kept the first {config.model.vocab_size:,} of {rows:,} embedding rows; the others "
            "belong to Kosmos-2's grounding tokens"
        )
    return Imported(write_checkpoint(output, config, source, progress), notes)


def language_source(mllm: Path, config: RunConfig) -> TensorSource:
    """The stock Kosmos-2 in `mllm` under our names. Raises ConversionError for other contents."""
    weights = SafetensorsFolder(mllm, TRANSFORMERS)
    return _translated(
        mllm, kosmos2.kosmos2_table(config.model), weights, config, kosmos2.NATIVE_PREFIXES
    )


def aligner_source(folder: Path, config: RunConfig) -> TensorSource:
    """The aligner component in `folder` under our names."""
    table = hf_aligner.aligner_table(config.model.aligner)
    weights = SafetensorsFolder(folder, DIFFUSERS)
    return _translated(folder, table, weights, config, hf_aligner.NATIVE_PREFIXES)


def _translated(
    folder: Path,
    table: RuleTable,
    weights: SafetensorsFolder,
    config: RunConfig,
    prefixes: tuple[str, ...],
) -> TensorSource:
    native = [name for name in model_tensors(config) if name.startswith(prefixes)]
    try:
        table.check(weights.names(), native)
        check_ties(table, weights)
    except ConversionError as error:
        raise ConversionError(f"{folder}: {error}") from None
    return as_native(table, weights, native)


def _language_facts(mllm: Path, processor: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(sizes, other settings) of the stock Kosmos-2 in a folder, both by dotted key."""
    stated = read_model_json(mllm / "config.json")
    if stated.get("model_type") != Kosmos2Config.model_type:
        raise ConversionError(
            f"{mllm} holds a model of type {stated.get('model_type')!r}, not 'kosmos-2'; give the "
            "folder that export-hf or export-mllm wrote, or one of microsoft/kosmos-2"
        )
    found = Kosmos2Config.from_pretrained(mllm)
    text, _ = kosmos2.text_and_vision(found)
    # Without attention_dropout: stock configs say 0.1, which the authors' kernel never applied.
    settings = {
        "model.decoder.hidden_dropout": text.dropout,
        "data.seq_length": text.max_position_embeddings,
    }
    if (processor / "preprocessor_config.json").is_file():
        images = read_model_json(processor / "preprocessor_config.json")
        for name in ("image_mean", "image_std"):
            if name in images:
                settings[f"data.{name}"] = images[name]
    return kosmos2.model_sizes(found, mllm), settings


def _path_settings(output: Path, tokenizer: Path) -> dict[str, str]:
    return {
        "logging.output_dir": str(output),
        "data.tokenizer_model": str(tokenizer.resolve()),
    }
