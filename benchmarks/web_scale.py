"""What a dataset in shards costs to open, to read from and to pack, as its samples grow in number.

The captions are synthetic: their indices and sentence tables are whole and random, every sample's
bytes are the first of its shard, and the rest of a .bin file is a hole. Each measurement is a
process of its own. The files go to --folder and are deleted at the end: 63 bytes a sample, and 16.4
for the packing index.

    python benchmarks/web_scale.py --samples 1e6 1e7 1e8 --folder /scratch
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kosmosg.data.index_file import index_header
from megatron_kosmosg.data.manifest import SHARDS_VERSION, Manifest, manifest_path
from megatron_kosmosg.data.order import SampleOrder
from megatron_kosmosg.data.packing import PackedDataset
from megatron_kosmosg.data.sentences import sentence_paths
from megatron_kosmosg.data.sequence import SequenceFormat
from megatron_kosmosg.data.shard_list import ShardEntry
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.stored_sample import IMAGE, JSON, TOKENS
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.toy import assets

SHORTEST, LONGEST = 6, 30
"""Tokens of a caption."""
IMAGE_BYTES = 50_000
CAPACITY, IMAGE_POSITIONS = 2049, 64
GLOBAL_BATCH, OWN = 3584, 14
"""Samples of a global batch, whose lengths every rank looks up, and those that one of 256 reads."""


def write_shard(prefix: Path, num_samples: int, tokenizer: Tokenizer, seed: int) -> ShardEntry:
    """A shard whose samples share their bytes; returns its line of the list."""
    rng = np.random.default_rng(seed)
    info = b'{"key":"synthetic","caption":"a caption"}'
    tokens = np.full(LONGEST, tokenizer.unk_id, "<i4").tobytes()
    counts = rng.integers(SHORTEST, LONGEST + 1, num_samples, np.int32)
    lengths = np.empty((num_samples, 3), np.int32)
    lengths[:, 0], lengths[:, 1], lengths[:, 2] = len(info), 4 * counts, IMAGE_BYTES
    pointers = np.empty((num_samples, 3), np.int64)
    pointers[:] = 0, len(info), len(info) + len(tokens)
    num_bytes = int(lengths.sum(dtype=np.int64)) + len(tokens)
    pointers[-1, 2] = num_bytes - IMAGE_BYTES
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(index_header(np.dtype(np.uint8), 3 * num_samples, num_samples))
        file.write(lengths.tobytes())
        file.write(pointers.tobytes())
        file.write(np.arange(0, 3 * num_samples + 1, 3, np.int64).tobytes())
        file.write(np.tile(np.array([JSON, TOKENS, IMAGE], np.int8), num_samples).tobytes())
    with Path(f"{prefix}.bin").open("wb") as file:
        file.write(info + tokens)
        file.truncate(num_bytes)
    table, offsets = sentence_paths(prefix)
    np.save(table, np.stack([counts, np.ones_like(counts)], 1))
    np.save(offsets, np.arange(num_samples + 1))
    return ShardEntry(prefix.name, 0, num_samples, 3 * num_samples, num_bytes, f"synthetic-{seed}")


def write_dataset(prefix: Path, num_samples: int, shard_samples: int, tokenizer: Tokenizer) -> None:
    """Shards of `shard_samples` and the manifest over them."""
    entries, first = [], 0
    while first < num_samples:
        size = min(shard_samples, num_samples - first)
        number = len(entries)
        shard = prefix.with_name(f"{prefix.name}-{number:05d}")
        entry = write_shard(shard, size, tokenizer, seed=number)
        entries.append(ShardEntry(**(vars(entry) | {"first_sample": first})))
        first += size
    counts = num_samples, num_samples * (SHORTEST + LONGEST) // 2, num_samples, 0
    Manifest(
        *("caption", tokenizer.fingerprint, tokenizer.vocab_size),
        *counts,
        format_version=SHARDS_VERSION,
        shards=tuple(entries),
    ).write(manifest_path(prefix))


@contextmanager
def timed(found: dict[str, Any], name: str) -> Iterator[None]:
    """Notes the seconds of a block, and the memory of this process after it."""
    started = time.perf_counter()
    yield
    found[f"{name}: seconds"] = time.perf_counter() - started
    found[f"{name}: memory"] = resident_memory()


def resident_memory() -> int:
    """Bytes of this process that no other shares: mapped files are not among them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measure(prefix: str) -> dict[str, Any]:
    """What a rank does with the dataset when it starts, in this process."""
    found: dict[str, Any] = {"start: memory": resident_memory()}
    with timed(found, "open"):
        store = SampleStore(prefix)
    order = SampleOrder("synthetic", len(store), 1, "benchmark")
    with timed(found, "first batch"):
        lengths = store.part_lengths(order.take(np.arange(GLOBAL_BATCH)), 0)
        samples = [store[order[place]] for place in range(OWN)]
    assert lengths.min() >= SHORTEST and len(samples[0].images()[0]) == IMAGE_BYTES
    with timed(found, "next batch"):
        store.part_lengths(order.take(np.arange(GLOBAL_BATCH, 2 * GLOBAL_BATCH)), 0)
    with timed(found, "fingerprint"):
        store.fingerprint()
    return found


def measure_packing(prefix: str) -> dict[str, Any]:
    """The index of an epoch: made by the first process that needs it, mapped by others."""
    store, found = SampleStore(prefix), {}
    tokenizer = Tokenizer(assets.path() / "sentencepiece.model")
    order = SampleOrder("synthetic", len(store), 1, "benchmark")
    folder = Path(f"{prefix}.packing")
    for name in ("packing index made", "packing index mapped"):
        form = SequenceFormat(tokenizer, IMAGE_POSITIONS)
        with timed(found, name):
            packed = PackedDataset("synthetic", store, order, form, CAPACITY, folder)
            row = packed.row(0, 0)
    assert CAPACITY // 2 < len(row.tokens) <= CAPACITY
    sizes = [file.stat().st_size for file in folder.rglob("*.i64")]
    return found | {"packing index: bytes": sum(sizes)}


PARTS: dict[str, Callable[[str], dict[str, Any]]] = {"reading": measure, "packing": measure_packing}


def in_a_process(part: str, prefix: Path) -> dict[str, Any]:
    """What a part measures, in a process of its own."""
    command = [sys.executable, __file__, "--part", part, "--prefix", str(prefix)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def one_size(folder: Path, num_samples: int, shard_samples: int, packs: bool) -> dict[str, Any]:
    """All figures of a dataset of this size, whose files are then deleted."""
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix="web-scale-"))
    try:
        prefix = scratch / "all"
        write_dataset(
            prefix, num_samples, shard_samples, Tokenizer(assets.path() / "sentencepiece.model")
        )
        files = [file.stat() for file in scratch.iterdir() if file.suffix != ".bin"]
        found = {"shards": -(-num_samples // shard_samples)}
        found["index and tables: bytes"] = sum(file.st_size for file in files)
        for part in PARTS if packs else ["reading"]:
            found |= in_a_process(part, prefix)
    finally:
        shutil.rmtree(scratch)
    return found


def law(sizes: list[int], values: list[float]) -> str:
    """How a figure grows over the last two sizes: the power of the number of samples."""
    if len(sizes) < 2 or min(values[-2:]) <= 0:
        return ""
    power = math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])
    return f"n^{power:.2f}"


def shown(name: str, value: float) -> str:
    """For people."""
    if name.endswith("seconds"):
        return f"{value * 1e3:,.1f} ms" if value < 1 else f"{value:,.1f} s"
    if name.endswith(("bytes", "memory")):
        return f"{value / 2**20:,.1f} MiB"
    return f"{value:,.0f}"


def main() -> None:
    """Prints a table: a row for each figure, a column for each size, and the growth law."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=float, nargs="+", default=[1e6, 1e7])
    parser.add_argument("--shard-samples", type=float, default=1e6)
    parser.add_argument("--no-packing", action="store_true", help="leave the packing index out")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--prefix", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part is not None:
        print(json.dumps(PARTS[args.part](args.prefix)))
        return
    sizes = [int(size) for size in args.samples]
    needed = 84 * max(sizes)
    if shutil.disk_usage(args.folder).free < needed + (1 << 30):
        parser.error(f"{args.folder} has no {needed / 2**30:.0f} GiB free; give another --folder")
    found = [
        one_size(args.folder, size, int(args.shard_samples), not args.no_packing) for size in sizes
    ]
    print(f"{'samples':28}" + "".join(f"{size:>16,}" for size in sizes) + f"{'grows as':>10}")
    for name in found[0]:
        values = [each[name] for each in found]
        cells = "".join(f"{shown(name, value):>16}" for value in values)
        print(f"{name:28}{cells}{law(sizes, values):>10}")
    print(f"python {sys.version.split()[0]}, numpy {np.__version__}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
