"""`import-fairseq`: the authors' checkpoints (stage 1, stage 2, final) as ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.config.load import configured_keys
from megatron_kosmosg.config.schema import ModelConfig, RunConfig
from megatron_kosmosg.conversion.authors import authors_table, has_fused_vision, stage_of
from megatron_kosmosg.conversion.checkpoint_writer import (
    model_tensors,
    refuse_existing,
    write_checkpoint,
)
from megatron_kosmosg.conversion.fairseq_file import FairseqFile, LazyTensors
from megatron_kosmosg.conversion.hf_tokenizer import checked_vocabulary
from megatron_kosmosg.conversion.imported_config import Imported, imported_config
from megatron_kosmosg.conversion.openai_clip import clip_table, read_clip_file
from megatron_kosmosg.conversion.rules import RuleTable
from megatron_kosmosg.conversion.sizes import (
    head_counts,
    native_shapes,
    refuse_contradictions,
    sizes,
)
from megatron_kosmosg.conversion.stored_names import TOWER
from megatron_kosmosg.conversion.tensors import (
    InDtype,
    JoinedSources,
    TensorSource,
    as_native,
    check_ties,
    widest_dtype,
)
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.progress import ProgressCallback
from megatron_kosmosg.stages import stage_facts

_FILE_OF_STAGE = {"pretrain": "stage 1", "align": "stage 2", "instruct": "final"}
_PRECISIONS = {dtype: name for name, dtype in platform.DTYPES.items()}


@dataclass(frozen=True)
class FairseqImport:
    """The file of the authors that is imported, and what the user says about it."""

    input: Path
    output: Path
    vision: Path | None = None
    """CLIP state dict for the image-tower tensors that the checkpoint lacks."""
    config_file: Path | None = None
    overrides: Sequence[str] = ()
    tokenizer: Path | None = None
    trust: bool = False
    """Rebuild Python objects in the files."""
    drop: Sequence[str] = ()
    """Patterns of further tensor names to leave out."""


def import_fairseq(job: FairseqImport, progress: ProgressCallback | None = None) -> Imported:
    """Writes a checkpoint of the authors as `job.output/iter_0000000`; its stage follows from the
    parts that the file holds.

    Raises ConversionError or ConfigError before anything is written.
    """
    refuse_existing(job.output)
    config, source, notes = open_fairseq(job)
    if job.tokenizer is None:
        notes.append("no tokenizer: set data.tokenizer_model where one is needed")
    return Imported(write_checkpoint(job.output, config, source, progress), notes)


def open_fairseq(job: FairseqImport) -> tuple[RunConfig, TensorSource, list[str]]:
    """(config, all tensors of that model under our names, notes); the tensors stay on disk until
    they are read.

    Raises ConversionError or ConfigError.
    """
    file = FairseqFile(job.input, trust=job.trust)
    clip = None if job.vision is None else read_clip_file(job.vision, trust=job.trust)
    try:
        return _opened(job, file, clip)
    except ConversionError as error:
        raise ConversionError(f"{job.input}: {error}") from None


def _opened(
    job: FairseqImport, file: FairseqFile, clip: LazyTensors | None
) -> tuple[RunConfig, TensorSource, list[str]]:
    dtype = widest_dtype(file)
    fused_vision = has_fused_vision(file.names())
    config = _config(job, file, clip, fused_vision, dtype)
    table = authors_table(config.model, fused_vision=fused_vision)
    table = RuleTable(table.rules, {**table.may_drop, **dict.fromkeys(job.drop, "as asked")})
    expected = model_tensors(config)
    from_clip = [] if clip is None else _absent_tower(table, file, expected)
    from_file = [name for name in expected if name not in from_clip]
    dropped = table.check(file.names(), from_file)
    check_ties(table, file)
    # Layers are stored in one block, which has one dtype.
    source: TensorSource = InDtype(as_native(table, file, from_file), dtype)
    if clip is not None:
        clip_table().check(clip.names(), [name for name in expected if name.startswith(TOWER)])
        source = JoinedSources(source, as_native(clip_table(), clip, from_clip))
    notes = [
        f"{_FILE_OF_STAGE[config.stage]} file -> stage {config.stage}, "
        f"{len(file.names())} tensors, {_PRECISIONS.get(dtype, dtype)}"
    ]
    notes += [f"left out ({reason}): {len(names)}" for reason, names in dropped.items()]
    if clip is not None:
        notes.append(f"{len(from_clip)} image-tower tensors from {job.vision}")
    return config, source, notes


def _config(
    job: FairseqImport,
    file: FairseqFile,
    clip: LazyTensors | None,
    fused_vision: bool,
    dtype: torch.dtype,
) -> RunConfig:
    stage = stage_of(file.names())
    shapes = {} if clip is None else native_shapes(clip_table(), clip)
    shapes |= native_shapes(authors_table(ModelConfig(), fused_vision=fused_vision), file)
    if not any(name.startswith(TOWER) for name in shapes):
        raise ConversionError("there is no image tower in it; add --vision ViT-L-14-sd.pt")
    overrides = list(job.overrides)
    configured = configured_keys(job.config_file, overrides)
    found = {"stage": stage, **sizes(shapes, stage)}
    found |= head_counts(found, stage, file.option("decoder_attention_heads"), configured)
    if stage_facts(stage).aligner_parts:
        found["model.aligner.kind"] = "full"
    refuse_contradictions(job.config_file, overrides, found)
    settings = {
        "logging.output_dir": str(job.output),
        "training.precision": _PRECISIONS.get(dtype, "fp32"),
    }
    if job.tokenizer is not None:
        settings["data.tokenizer_model"] = str(job.tokenizer.resolve())
    config = imported_config(found, settings, job.config_file, overrides)
    if job.tokenizer is not None:
        checked_vocabulary(job.tokenizer, config.model.vocab_size)
    if "model.resampler.num_attention_heads" in configured:
        return config
    heads = config.model.decoder.num_attention_heads  # so it is in the released code
    resampler = dataclasses.replace(config.model.resampler, num_attention_heads=heads)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, resampler=resampler))


def _absent_tower(
    table: RuleTable, file: FairseqFile, expected: dict[str, tuple[int, ...]]
) -> list[str]:
    present = file.names()
    return [
        name
        for name in expected
        if name.startswith(TOWER) and not set(table.native_recipe(name)[0]) <= present.keys()
    ]
