"""Makes one dataset of finished ones: a manifest that lists them as shards, nothing is copied."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_kosmosg.config.dataset_prefixes import ENDINGS, shard_prefix
from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.data.fingerprint import dataset_fingerprint
from megatron_kosmosg.data.manifest import SHARDS_VERSION, Manifest, manifest_path
from megatron_kosmosg.data.remote_file import StorageError
from megatron_kosmosg.data.shard_list import ShardEntry, check_doubled, check_order, numbered
from megatron_kosmosg.data.store import SampleStore


@dataclass(frozen=True)
class CheckedShard:
    """What was found in one shard."""

    entry: ShardEntry
    problem: str | None
    """None where it is what the manifest says."""


def list_shards(prefix: str, shards: Sequence[str]) -> Manifest:
    """Writes PREFIX.json over `shards`, prefixes of finished datasets, in this order.

    One that lies below the folder of PREFIX is named relative to it, so that the folder may move.
    A list that is there already may get other places of its shards, and more behind them. Raises
    InputError where shards do not belong together or PREFIX is something else already.
    """
    path = manifest_path(prefix)
    found = [f"{prefix}{end}" for end in ENDINGS if os.path.lexists(f"{prefix}{end}")]
    if found:
        raise InputError(f"{found[0]} is there: {prefix} is a dataset in one piece; name another")
    before = Manifest.read(path).shards if path.exists() else ()
    manifests, entries = [], []
    for shard in shards:
        manifest, entry = shard_entry(prefix, shard)
        _check_fits(shards[0], manifests[0] if manifests else manifest, shard, manifest)
        manifests.append(manifest)
        entries.append(entry)
    try:
        made = joined_manifest(manifests, entries)
        check_order(made.shards, made.num_samples)
        check_doubled(made.shards)
    except ValueError as error:
        raise InputError(str(error)) from None
    for old, new in zip(before, [*entries, *[None] * len(before)], strict=False):
        if new is None or old.fingerprint != new.fingerprint:
            raise InputError(
                f"{path} lists shard {old.path} where {'nothing' if new is None else new.path} "
                "stands now: samples would change their numbers; give another PREFIX, or delete "
                "that file"
            )
    made.write(path)
    return made


def shard_entry(prefix: str, shard: str) -> tuple[Manifest, ShardEntry]:
    """Manifest of a finished dataset, and its line in that of PREFIX, first sample 0."""
    store = SampleStore(shard)
    if store.manifest is None or store.manifest.shards:
        what = "a list of shards itself" if store.manifest else "without a manifest"
        raise InputError(f"{shard} is {what}; a shard is a dataset of `kosmosg preprocess`")
    sequences = store.shards[0].sequences
    return store.manifest, ShardEntry(
        path=_path_from(prefix, shard),
        first_sample=0,
        num_samples=len(store),
        num_sequences=len(sequences),
        num_bytes=sequences.num_bytes,
        fingerprint=store.fingerprint(),
    )


def joined_manifest(manifests: Sequence[Manifest], entries: Sequence[ShardEntry]) -> Manifest:
    """The manifest of a dataset that consists of these shards."""
    first = manifests[0]
    return Manifest(
        first.kind,
        first.tokenizer_fingerprint,
        first.vocab_size,
        num_samples=sum(each.num_samples for each in manifests),
        num_tokens=sum(each.num_tokens for each in manifests),
        num_images=sum(each.num_images for each in manifests),
        num_rejects=sum(each.num_rejects for each in manifests),
        format_version=SHARDS_VERSION,
        shards=numbered(entries),
    )


def check_shards(prefix: str) -> Iterator[CheckedShard]:
    """Every shard of PREFIX, one after the other: its files, index, content and manifest. Costs
    what indices have to be read; samples are looked at by `kosmosg inspect --check`."""
    manifest = Manifest.read(manifest_path(prefix))
    if not manifest.shards:
        raise InputError(f"{prefix} is a dataset in one piece; `kosmosg inspect --check` checks it")
    for entry in manifest.shards:
        yield CheckedShard(entry, _problem(prefix, manifest, entry))


def _problem(prefix: str, manifest: Manifest, entry: ShardEntry) -> str | None:
    shard = shard_prefix(prefix, entry.path)
    try:
        store = SampleStore(shard)
        if store.manifest is not None:
            _check_fits(prefix, manifest, shard, store.manifest)
        for reason in store.shards[0].sequences.check_entries():
            return reason
        if dataset_fingerprint(shard) != entry.fingerprint:
            return f"{shard} has another content than {manifest_path(prefix)} notes of this shard"
    except StorageError:
        raise  # says nothing of the shard
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _check_fits(one: str, first: Manifest, other: str, manifest: Manifest) -> None:
    for name in ("kind", "tokenizer_fingerprint", "vocab_size"):
        here, there = getattr(first, name), getattr(manifest, name)
        if here != there:
            raise InputError(
                f"{one} and {other} are no shards of one dataset: {name} {here} and {there}"
            )


def _path_from(prefix: str, shard: str) -> str:
    folder, path = Path(prefix).absolute().parent, Path(shard).absolute()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
