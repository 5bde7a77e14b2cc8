"""The rows of a stream, as hashes: what every layout, restart and form of a dataset must give."""

from __future__ import annotations

import hashlib

import torch

from megatron_kosmosg.data.loader import MicroBatchIterator

GLOBAL_BATCH = 12


def row_hashes(batch: dict[str, torch.Tensor]) -> list[str]:
    """One hash per row of everything that belongs to the row, whatever it is padded to."""
    hashes = []
    slots = batch["image_mask"].sum(1) // 4
    ends = torch.cumsum(slots, 0)
    for b in range(len(batch["tokens"])):
        digest = hashlib.sha256()
        n = int((~batch["padding_mask"][b]).sum())
        for name in sorted(batch.keys() - {"bad_samples", "replacements"}):
            if name == "pixel_values":
                value = batch[name][ends[b] - slots[b] : ends[b]]
            else:
                value = batch[name][b]
                is_row = value.ndim == 1 and name != "clip_tokens"
                value = value[:n] if is_row else value
            digest.update(name.encode() + value.numpy().tobytes())
        hashes.append(digest.hexdigest())
    return hashes


def global_stream(
    stream, dp_size, micro_batch_size, num_workers, start_batch, num_batches, balance=False
):
    """Row hashes in stream order, gathered from every data-parallel rank."""
    rows: dict[int, str] = {}
    for rank in range(dp_size):
        loader = MicroBatchIterator(
            stream,
            GLOBAL_BATCH,
            micro_batch_size,
            rank,
            dp_size,
            start_batch * GLOBAL_BATCH,
            num_workers,
            balance,
        )
        for number in range(num_batches * GLOBAL_BATCH // (micro_batch_size * dp_size)):
            own, _ = loader.positions(number)
            for position, value in zip(own, row_hashes(next(loader)), strict=True):
                assert position not in rows, "two ranks read the same sample"
                rows[position] = value
        loader.close()
    first = start_batch * GLOBAL_BATCH
    assert sorted(rows) == list(range(first, first + num_batches * GLOBAL_BATCH))
    return [rows[position] for position in sorted(rows)]
