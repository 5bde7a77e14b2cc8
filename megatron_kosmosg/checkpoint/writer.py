"""How a rank's share of a checkpoint reaches the disk: from threads of this process, never forks.

Megatron-Core 0.16 forks a writer for each file, 0.19 one for each save in the background. A fork
copies only the calling thread, so a lock that a data, image or TensorBoard thread holds at that
moment stays locked in the child for ever.
"""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
)

from megatron_kosmosg.checkpoint import folder as checkpoint_folder
from megatron_kosmosg.parallel.core_versions import SaveStrategy

# Results travel between threads; Megatron-Core would start a server process for its own queue.
filesystem_async._results_queue = queue.Queue()


class ThreadSaveStrategy(SaveStrategy):
    """Megatron-Core's format and plan; each rank writes one file in the thread that runs it.

    Args:
        in_background: tensors are copied first, so that training may change them while they are
            written.
    """

    def __init__(self, *, in_background: bool) -> None:
        super().__init__("torch_dist", 1, thread_count=1)
        self._in_background = in_background

    def _get_save_and_finalize_callbacks(
        self, writer: FileSystemWriterAsync, save_state_dict_ret: tuple, *_: str
    ) -> AsyncRequest:
        # A writer begins with None for both: the plan sets the first, and the second if there is
        # something to write.
        buckets = [self._on_cpu(bucket) for bucket in cast(list, writer.write_buckets)]

        def write() -> None:
            if buckets:
                cast(queue.Queue, writer.results_queue).put(_write(buckets, [writer.transforms]))

        def finish() -> None:
            save_state_dict_async_finalize(*save_state_dict_ret)

        return AsyncRequest(write, (), [finish])

    def _on_cpu(self, bucket: tuple) -> tuple:
        path, key, (objects, tensors) = bucket
        moved = [(item, tensor.to("cpu")) for item, tensor in tensors]
        if self._in_background:
            moved = [
                (item, copy.clone() if tensor.is_cpu else copy)
                for (item, copy), (_, tensor) in zip(moved, tensors, strict=True)
            ]
        return path, key, (objects, moved)


class BackgroundSave:
    """Writes checkpoints in a thread of its own; on every rank at most one save is under way."""

    def __init__(self) -> None:
        self._saving: tuple[threading.Thread, AsyncRequest] | None = None

    def start(self, request: AsyncRequest) -> None:
        """Writes in the background; `poll` or `wait` finish it."""
        assert self._saving is None, "a save is still under way"
        thread = threading.Thread(target=request.async_fn, name="checkpoint", daemon=True)
        self._saving = thread, request
        thread.start()

    def poll(self, device: torch.device) -> None:
        """Finishes the save if all ranks have written; a collective while one is under way."""
        if self._saving is None:
            return
        thread, _ = self._saving
        writing = torch.tensor([int(thread.is_alive())], dtype=torch.int32, device=device)
        dist.all_reduce(writing, op=dist.ReduceOp.MAX)
        if not writing.item():
            self.wait()

    def wait(self) -> None:
        """Returns when no save is under way; raises what went wrong while writing."""
        if self._saving is None:
            return
        thread, request = self._saving
        thread.join()
        self._saving = None
        for finish in request.finalize_fns:
            finish()


def _write(buckets: list[tuple], transforms: list) -> dict[int, list] | Exception:
    """Writes this rank's buckets and returns {bucket number: results} in the form that
    Megatron-Core collects, or the error."""
    results = {}
    for number, bucket in enumerate(buckets):
        answers: queue.Queue = queue.Queue()
        work: queue.Queue = queue.Queue()
        work.put(number)
        # Its annotations name queues between processes.
        FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, cast(Any, answers), cast(Any, work), use_fsync=True
        )
        results[number] = answers.get()[1]
        if isinstance(results[number], Exception):
            return results[number]
        try:
            checkpoint_folder.write_checksum(Path(bucket[0]))
        except OSError as error:
            return error
    return results
