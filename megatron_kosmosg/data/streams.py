"""The stream of each stage from the run's config.

`train` draws from data.blend, `heldout` from data.heldout under keys of its own, so that the same
positions are the same held-out samples at every evaluation.
"""

from __future__ import annotations

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.paths import packing_folder
from megatron_kosmosg.config.schema import BlendEntry, RunConfig
from megatron_kosmosg.data.align_stream import AlignStream, load_clip_tokenizer
from megatron_kosmosg.data.blend import Blend
from megatron_kosmosg.data.images import ImageDecoder
from megatron_kosmosg.data.instruct_stream import InstructStream, NoiseSource, PromptSource, Reads
from megatron_kosmosg.data.kinds import names_read_by
from megatron_kosmosg.data.latent_cache import LatentCache
from megatron_kosmosg.data.manifest import dataset_kind
from megatron_kosmosg.data.normalise import prompt_transform, target_transform
from megatron_kosmosg.data.order import SampleOrder
from megatron_kosmosg.data.packing import PackedDataset
from megatron_kosmosg.data.pretrain_stream import PretrainStream
from megatron_kosmosg.data.random_keys import StreamName
from megatron_kosmosg.data.samples import Split
from megatron_kosmosg.data.sequence import SequenceFormat
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.tokenizer import Tokenizer


def pretrain_stream(
    config: RunConfig, split: Split, device_id: int | None = None, decodes: bool = True
) -> PretrainStream:
    """The stream of packed rows.

    Args:
        device_id: CUDA device that decodes images; None decodes on the CPU.
        decodes: False leaves images undecoded, for ranks without the image tower.
    """
    parts = _StreamParts(config, "pretrain", split)
    sequence_format = parts.sequence_format
    datasets = {
        name: PackedDataset(
            name,
            store,
            parts.orders[name],
            sequence_format,
            config.data.seq_length + 1,
            packing_folder(config),
        )
        for name, store in parts.stores.items()
    }
    return PretrainStream(
        parts.blend,
        datasets,
        sequence_format,
        config.data.seq_length,
        ImageDecoder(config.data.image_backend, device_id),
        prompt_transform(config),
        decodes,
    )


def align_stream(config: RunConfig, split: Split) -> AlignStream:
    """The stream of captions for the decoder and the CLIP text encoder."""
    parts = _StreamParts(config, "align", split)
    captions = {}
    for name, store in parts.stores.items():
        if store.sample_kind.align is None:
            raise parts.wrong_kind(name, "align")
        captions[name] = store.sample_kind.align
    return AlignStream(
        parts.blend,
        parts.stores,
        captions,
        parts.orders,
        parts.sequence_format.tokenizer,
        load_clip_tokenizer(config.model.clip_text.path),
        config.model.aligner.num_queries,
        config.data.seq_length,
        config.model.vision.image_size,
        config.data.pack_prompts,
    )


def instruct_stream(
    config: RunConfig,
    split: Split,
    device_id: int | None = None,
    vae: str | None = None,
    reads: Reads = "all",
    decodes_prompts: bool = True,
    noise_source: NoiseSource | None = None,
) -> InstructStream:
    """The stream of prompts and targets.

    Args:
        device_id: CUDA device that decodes images; None decodes on the CPU.
        vae: fingerprint of the run's VAE, where data.latent_cache is set and targets are read. The
            held-out stream decodes its targets all the same, because its images are shown.
        reads: which images are read: all, or those of prompts or targets alone.
        decodes_prompts: False leaves prompt images undecoded, for ranks without the image tower.
        noise_source: further tensors of a batch, see InstructStream.
    """
    parts = _StreamParts(config, "instruct", split)
    data = config.data
    sources = {}
    for name, store in parts.stores.items():
        prompts = store.sample_kind.instruct
        if prompts is None:
            raise parts.wrong_kind(name, "instruct")
        latents = None
        if data.latent_cache is not None and split == "train" and reads != "prompts":
            if vae is None:
                raise ValueError("data.latent_cache needs the fingerprint of the run's VAE")
            latents = LatentCache(store, data.latent_cache, vae, target_transform(config))
        sources[name] = PromptSource(
            store, parts.orders[name], prompts.maker(parts.sequence_format, data), latents
        )
    return InstructStream(
        parts.blend,
        sources,
        config.training.seed,
        parts.stage_key,
        data.seq_length,
        parts.sequence_format.tokenizer.pad_id,
        ImageDecoder(data.image_backend, device_id),
        (prompt_transform(config), target_transform(config)),
        reads,
        decodes_prompts,
        data.pack_prompts,
        noise_source,
    )


class _StreamParts:
    """What all streams are made of: stores, their orders, the mixture, the tokenizer."""

    def __init__(self, config: RunConfig, stage: str, split: Split) -> None:
        self.section = {"train": "blend", "heldout": "heldout"}[split]
        entries: dict[str, BlendEntry] = {
            "blend": config.data.blend,
            "heldout": config.data.heldout,
        }[self.section]
        if not entries:
            raise ConfigError(f"data.{self.section} is empty; add data.{self.section}.NAME.path")
        if config.data.tokenizer_model is None:
            raise ConfigError("data.tokenizer_model is not set; it names a SentencePiece model")
        tokenizer = Tokenizer(config.data.tokenizer_model)
        if tokenizer.vocab_size != config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size={config.model.vocab_size}, but data.tokenizer_model "
                f"{config.data.tokenizer_model} has {tokenizer.vocab_size} ids; set "
                f"model.vocab_size={tokenizer.vocab_size}"
            )
        self.stage_key = StreamName(stage, split).order_key
        self.sequence_format = SequenceFormat(tokenizer, config.model.resampler.num_latent_queries)
        self.blend = Blend({name: entry.weight for name, entry in entries.items()})
        self.stores: dict[str, SampleStore] = {}
        self.orders: dict[str, SampleOrder] = {}
        for name, entry in entries.items():
            dataset_kind(f"data.{self.section}.{name}", entry)
            store = SampleStore(entry.path)
            store.check_tokenizer(tokenizer)
            self.stores[name] = store
            self.orders[name] = SampleOrder(name, len(store), config.training.seed, self.stage_key)

    def wrong_kind(self, name: str, stage: str) -> ConfigError:
        """Dataset `name` of the mixture is of a kind that `stage` does not read."""
        store = self.stores[name]
        return ConfigError(
            f"data.{self.section}.{name}: {store.prefix} is of kind {store.kind}; "
            f"{stage} reads {names_read_by(stage)}"
        )
