"""The VAE's latents of target images, computed once: PREFIX.NAME.bin/.idx/.json beside a dataset.

The files are a Megatron multimodal indexed dataset like the samples': document i holds the moments
of sample i, float16 [2, channels, height, width], mean and standard deviation of the posterior.
The posterior is still sampled anew for every use. The manifest names what the moments were made
from; anything else is refused. A dataset in shards has a cache of each shard, SHARD.NAME.

Long because manifest, reading and writing are one format.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.data.image_headers import may_be_transparent
from megatron_kosmosg.data.image_types import ImageTransform
from megatron_kosmosg.data.index_file import write_index
from megatron_kosmosg.data.manifest import check_fields
from megatron_kosmosg.data.shard_list import ShardEntry, check_shard_files, named
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.stored_shards import StoredShards
from megatron_kosmosg.files import open_itself, replacing, write_json
from megatron_kosmosg.foreign_files import read_json

MOMENTS, NO_MOMENTS = 3, 4
"""Modes of a part: moments, or filling for a target that could not be decoded."""
MOMENTS_TYPE = np.dtype("<f2")
FORMAT_VERSION = 1
NUM_LOOKED_AT = 4096
"""Targets of a dataset whose headers are read to tell whether an old cache may be used."""

logger = logging.getLogger(__name__)
MAX_SIDE = 1 << 12
"""Of moments, in any direction."""


@dataclass(frozen=True)
class LatentSource:
    """What moments are made from; two caches with the same source are interchangeable."""

    dataset: str
    """Fingerprint of the dataset."""
    vae: str
    """Fingerprint of the VAE encoder's weights."""
    transform: str
    """How the image becomes pixels."""
    decoder: str = ""
    """`ImageDecoder.description` of what decoded; older caches do not say."""


@dataclass(frozen=True)
class LatentManifest:
    """PREFIX.NAME.json; its presence means that the cache is whole."""

    source: LatentSource
    shape: list[int]
    """[2, channels, height, width]."""
    num_samples: int
    num_bad: int
    """Targets that could not be decoded."""
    precision: str
    """In which the VAE ran."""
    format_version: int = FORMAT_VERSION
    first_bad: list[str] = field(default_factory=list)
    """Sample and reason of the first few of num_bad; older caches do not say."""

    def write(self, path: Path) -> None:
        """Writes the manifest as JSON, whole or not at all."""
        write_json(path, asdict(self))

    @staticmethod
    def read(path: Path) -> LatentManifest:
        """The manifest at `path`. Raises InputError for another version or a broken file."""
        try:
            fields = read_json(path)
            if fields["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {fields['format_version']}")
            check_fields(fields, LatentManifest)
            check_fields(fields["source"], LatentSource)
            shape = fields["shape"]
            if [type(side) for side in shape] != [int] * 4 or not all(
                0 < side <= MAX_SIDE for side in shape
            ):
                raise ValueError(f"shape {str(shape)[:80]} is none of moments")
            if not all(isinstance(text, str) for text in fields.get("first_bad", [])):
                raise ValueError("first_bad is no list of texts")
            return LatentManifest(**(fields | {"source": LatentSource(**fields["source"])}))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise InputError(f"{path} is not a readable manifest: {error}") from error


def describe_transform(transform: ImageTransform) -> str:
    """The part of LatentSource that says how the image becomes pixels."""
    return (
        f"{transform.size} px, {transform.interpolation}, centre crop, "
        f"mean {transform.mean}, std {transform.std}"
    )


def latent_prefix(dataset_prefix: str | Path, name: str) -> str:
    """The prefix of the cache's files: PREFIX.NAME."""
    return f"{dataset_prefix}.{name}"


class LatentCache:
    """The moments of one dataset by sample number; safe to read from several threads."""

    def __init__(self, store: SampleStore, name: str, vae: str, transform: ImageTransform) -> None:
        """Opens the cache. Raises InputError where there is no whole cache, of the dataset or of
        each of its shards, and where it was made from something else, naming what.

        Args:
            vae: fingerprint of the run's VAE.
        """
        whole = latent_prefix(store.prefix, name)
        in_shards = bool(store.shards.entries) and not Path(f"{whole}.json").exists()
        self._name = name
        source = LatentSource(store.fingerprint(), vae, describe_transform(transform))
        if in_shards:
            made_of = [replace(source, dataset=each.fingerprint) for each in store.shards.entries]
            prefixes = [latent_prefix(prefix, name) for prefix in store.shards.prefixes]
        else:
            made_of, prefixes = [source], [whole]
        manifests = self._read(prefixes, made_of)
        self.manifest = manifests[0]
        """Of the cache, or of the first shard's."""
        for number, (prefix, manifest) in enumerate(zip(prefixes, manifests, strict=True)):
            if manifest.shape != self.manifest.shape:
                raise InputError(f"{prefix} holds {manifest.shape}, not {self.manifest.shape}")
            if not manifest.source.decoder:
                shard_store = SampleStore(store.shards.prefixes[number]) if in_shards else store
                _require_opaque(shard_store, prefix, self._advice)
        entries = self._entries(store.shards.entries) if in_shards else []
        remote = check_shard_files(whole, entries, has_modes=True)
        self._shards = StoredShards(whole, entries, True, remote)
        if self._shards.num_samples != len(store):
            found = self._shards.num_samples
            raise InputError(f"{whole} has {found} entries for {len(store)} samples")

    def moments(self, index: int) -> np.ndarray | None:
        """The moments of a sample's target image, float16 [2, channels, height, width]; None where
        the image is bad."""
        shard, number = self._shards.locate(index)
        data, mode = shard.sequences[number]
        if mode == NO_MOMENTS:
            return None
        return data.view(MOMENTS_TYPE).reshape(self.manifest.shape)

    @property
    def _advice(self) -> str:
        return f"run `kosmosg cache-latents --name {self._name}`, or set data.latent_cache=null"

    def _read(self, prefixes: list[str], made_of: list[LatentSource]) -> list[LatentManifest]:
        """The manifests of the caches, which are made from what they should be."""
        missing = [prefix for prefix in prefixes if not Path(f"{prefix}.json").exists()]
        if missing:
            raise InputError(
                f"data.latent_cache={self._name}: no finished cache at {named(missing)}; "
                f"{self._advice}"
            )
        manifests = [LatentManifest.read(Path(f"{prefix}.json")) for prefix in prefixes]
        for prefix, manifest, expected in zip(prefixes, manifests, made_of, strict=True):
            made, required = asdict(manifest.source), asdict(expected)
            # Those of another decoder are as good, whatever this run decodes prompts with.
            required.pop("decoder")
            differ = [
                f"{key}: made from {made[key]}, this run has {required[key]}"
                for key in required
                if made[key] != required[key]
            ]
            if differ:
                raise InputError(
                    f"data.latent_cache={self._name}: {prefix} does not fit this run\n  "
                    + "\n  ".join(differ)
                    + f"\n{self._advice}"
                )
        return manifests

    def _entries(self, shards: Sequence[ShardEntry]) -> list[ShardEntry]:
        """The caches of the shards as shards: a record of one size for each sample."""
        record = int(np.prod(self.manifest.shape)) * MOMENTS_TYPE.itemsize
        return [
            replace(
                shard,
                path=latent_prefix(shard.path, self._name),
                num_sequences=shard.num_samples,
                num_bytes=shard.num_samples * record,
            )
            for shard in shards
        ]


def _require_opaque(store: SampleStore, prefix: str, advice: str) -> None:
    """Refuses a cache from before decoders were noted where targets may be transparent: it has the
    colours under transparent pixels.

    Raises InputError where a target has such pixels, of up to NUM_LOOKED_AT spread evenly.
    """
    prompts = store.sample_kind.instruct
    assert prompts is not None, "a kind without targets has no cache"
    for index in range(0, len(store), -(-len(store) // NUM_LOOKED_AT)):
        raw = store[index]
        if may_be_transparent(bytes(prompts.target(raw))):
            raise InputError(
                f"{prefix} was made before transparent pixels of targets became white, and the "
                f"target of sample {raw.info['key']} has some; delete {prefix}.json and {advice}"
            )
    logger.warning(
        "%s does not say what decoded its targets: it is used as it is; photos that a camera "
        "stored turned may lie on their side in it, then delete %s.json and cache anew",
        *(prefix, prefix),
    )


class LatentWriter:
    """Writes moments in any order, from several processes: records have one size.

    `PREFIX.NAME.partial.bin` gets the data; `finish` turns it into the cache.
    """

    def __init__(self, prefix: str, shape: tuple[int, ...], num_samples: int) -> None:
        self._prefix, self._shape, self._num_samples = prefix, shape, num_samples
        self._record = int(np.prod(shape)) * MOMENTS_TYPE.itemsize
        self.data_path = Path(f"{prefix}.partial.bin")
        with open_itself(self.data_path, "ab") as file:
            file.truncate(num_samples * self._record)

    def write(self, first: int, moments: np.ndarray) -> None:
        """Stores `moments` [n, 2, channels, height, width] of samples `first`, `first` + 1, ..."""
        assert moments.shape[1:] == self._shape
        with open_itself(self.data_path, "r+b") as file:
            file.seek(first * self._record)
            file.write(np.ascontiguousarray(moments, MOMENTS_TYPE).tobytes())
            file.flush()
            os.fsync(file.fileno())

    def finish(
        self, source: LatentSource, bad: list[int], precision: str, first_bad: list[str]
    ) -> None:
        """Completes the cache. bad: the samples without moments; first_bad: the manifest's."""
        modes = np.full(self._num_samples, MOMENTS, np.int8)
        modes[bad] = NO_MOMENTS
        lengths, ones = np.full(len(modes), self._record), np.ones(len(modes), np.int64)
        with replacing(Path(f"{self._prefix}.idx"), only_writer=True) as index:
            write_index(index, np.dtype(np.uint8), lengths, modes, ones)
            self.data_path.rename(f"{self._prefix}.bin")
        manifest = LatentManifest(
            source,
            list(self._shape),
            self._num_samples,
            len(bad),
            precision,
            first_bad=first_bad,
        )
        manifest.write(Path(f"{self._prefix}.json"))
