"""Images through DALI: decoded from bytes in batches, resized and cropped in one operation.

Only those that DALI decodes as image_reading.py has it (image_headers.py); the others are another
backend's. Masks are read by image_reading.py: DALI knows neither their forms nor their turns.
DALI fails a whole batch when one image is bad and calls the pipeline invalid after that, so a
failed pipeline is thrown away. Each thread has its own pipelines, and on a GPU its own stream.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch
from nvidia.dali import math
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from megatron_kosmosg.data.image_headers import dali_form, stored_layout
from megatron_kosmosg.data.image_reading import fitted_mask
from megatron_kosmosg.data.image_types import Backend, Encoded, ImageTransform
from megatron_kosmosg.data.samples import EntityImage

# Any: DALI fills these modules when they are imported, which a type checker does not see.
fn: Any = import_module("nvidia.dali.fn")
types: Any = import_module("nvidia.dali.types")

MAX_BATCH = 64
"""Images that one pipeline run takes; longer lists are cut."""
MAX_PAINTED_PIXELS = 1 << 22
"""Of an image with a mask: painting takes 12 bytes and more of each."""
Feed = tuple[np.ndarray, ...]
"""Encoded bytes uint8 [n], and where it has one the mask uint8 [h, w, 1] of the upright image."""
_FILTERS = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}


class DaliBackend:
    """Batched decoding; on `device_id` with the hardware decoder, else on the CPU."""

    def __init__(self, device_id: int | None, others: Backend) -> None:
        """Builds no pipeline yet: each thread builds its own when images come.

        Args:
            device_id: CUDA device on which DALI decodes; None decodes on the CPU.
            others: decodes what DALI must not be given.
        """
        self._device_id = device_id
        self._device = torch.device("cpu" if device_id is None else f"cuda:{device_id}")
        self._streams: Any = torch.get_device_module(self._device)
        self._others = others
        self._local = threading.local()

    def decode(self, images: Sequence[Encoded], transform: ImageTransform) -> torch.Tensor:
        """The decoded images, uint8 [n, 3, size, size], where they were decoded and whole. Raises
        any exception when one of them is bad."""
        plain, masked, of_others = {}, {}, {}
        for i, image in enumerate(images):
            feed = _feed(image)
            if feed is None:
                of_others[i] = self._others.decode([image], transform)[0]
            else:
                (plain if len(feed) == 1 else masked)[i] = feed
        shape = (len(images), 3, transform.size, transform.size)
        with self._stream():
            pixels = torch.empty(shape, dtype=torch.uint8, device=self._device)
            for i, image in of_others.items():
                pixels[i] = image.to(self._device)
            for feeds in (plain, masked):
                places = list(feeds)
                for start in range(0, len(places), MAX_BATCH):
                    chunk = places[start : start + MAX_BATCH]
                    decoded = self._run([feeds[i] for i in chunk], transform)
                    for i, image in zip(chunk, decoded, strict=True):
                        pixels[i] = image
        if self._device_id is not None:
            # Training reads them there: this thread's memory is not used again before it has.
            pixels.record_stream(self._streams.default_stream(self._device))
        return pixels

    @contextmanager
    def _stream(self) -> Iterator[None]:
        """Context in which this thread works on a stream of its own, beside training; at its end
        that work is done. Nothing on a CPU."""
        if self._device_id is None:
            yield
            return
        if "stream" not in self._local.__dict__:
            # A thread begins on GPU 0, and would come back there from the stream of another one:
            # every rank's readers would take memory of GPU 0.
            self._streams.set_device(self._device)
            self._local.stream = self._streams.Stream(self._device)
        with self._streams.stream(self._local.stream):
            yield
        self._local.stream.synchronize()

    def _run(self, feeds: list[Feed], transform: ImageTransform) -> torch.Tensor:
        if "pipelines" not in self._local.__dict__:
            self._local.pipelines = {}
        pipelines: dict[tuple[ImageTransform, bool], Pipeline] = self._local.pipelines
        key = (transform, has_mask) = (transform, len(feeds[0]) == 2)
        pipeline = pipelines.pop(key, None) or _build(transform, has_mask, self._device_id)
        for name, arrays in zip(("image", "mask"), zip(*feeds, strict=True), strict=False):
            pipeline.feed_input(name, list(arrays))
        (output,) = pipeline.run()
        result = _copied(output, self._device)
        # Only a pipeline that has not failed is used again.
        pipelines[key] = pipeline
        return result


def _copied(output: Any, device: torch.device) -> torch.Tensor:
    """DALI's images in memory of torch on `device`, where they were decoded: a pipeline's next run
    uses its own memory again. On a GPU the copy is made on the current stream."""
    if device.type == "cpu":
        return torch.from_numpy(np.array(output.as_tensor()))
    from nvidia.dali.plugin.pytorch import feed_ndarray  # it is another second of imports

    whole = output.as_tensor()
    copy = torch.empty(whole.shape(), dtype=torch.uint8, device=device)
    stream = torch.get_device_module(device).current_stream(device)
    return feed_ndarray(whole, copy, cuda_stream=stream)


def _feed(encoded: Encoded) -> Feed | None:
    """What the pipelines are given for an image; None for one that DALI must not be given."""
    is_entity = isinstance(encoded, EntityImage)
    data = dali_form(encoded.image if is_entity else encoded)
    if data is None:
        return None
    image = np.frombuffer(data, np.uint8)
    if not is_entity or encoded.mask is None:
        return (image,)
    size, orientation = stored_layout(data)
    if size[0] * size[1] > MAX_PAINTED_PIXELS:
        return None
    mask = fitted_mask(encoded.mask, size, orientation)
    return image, np.asarray(mask)[..., None]


def _build(transform: ImageTransform, has_mask: bool, device_id: int | None) -> Pipeline:
    pipeline = Pipeline(
        batch_size=MAX_BATCH,
        num_threads=1,
        device_id=device_id,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
        # The only executor that may read on the CPU (the sizes below) what the GPU has decoded.
        exec_dynamic=device_id is not None,
    )
    device = "cpu" if device_id is None else "mixed"
    with pipeline:
        encoded = fn.external_source(name="image", dtype=types.UINT8, ndim=1)
        image = fn.decoders.image(
            encoded,
            device=device,
            output_type=types.RGB,
            # As on a CPU, in libjpeg and in Pillow; a GPU's decoder repeats the colour otherwise.
            jpeg_fancy_upsampling=True,
        )
        if has_mask:
            mask = fn.external_source(name="mask", dtype=types.UINT8, ndim=3, layout="HWC")
            if device_id is not None:
                mask = mask.gpu()
            image = _paint_background_white(image, mask)
        image = _resize_and_crop(image, transform)
        pipeline.set_outputs(fn.transpose(image, perm=[2, 0, 1]))
    pipeline.build()
    return pipeline


def _paint_background_white(image: DataNode, mask: DataNode) -> DataNode:
    """The image where the mask is 255, white where it is 0, mixed in between; uint8, HWC."""
    keep = fn.cast(mask, dtype=types.FLOAT) / 255.0
    mixed = 255.0 - (255.0 - fn.cast(image, dtype=types.FLOAT)) * keep
    return fn.reinterpret(fn.cast(mixed, dtype=types.UINT8), layout="HWC")


def _resize_and_crop(image: DataNode, transform: ImageTransform) -> DataNode:
    """The image resized and cropped, uint8 [size, size, 3]; only the region that survives the
    crop is computed."""
    shape = image.shape(dtype=types.FLOAT)
    height, width = shape[0], shape[1]
    shorter = math.min(height, width)
    top, bottom = _kept_range(height, shorter, transform.size)
    left, right = _kept_range(width, shorter, transform.size)
    return fn.resize(
        image,
        size=(transform.size, transform.size),
        roi_start=fn.stack(top, left),
        roi_end=fn.stack(bottom, right),
        interp_type=_FILTERS[transform.interpolation],
        antialias=True,
        dtype=types.UINT8,
    )


def _kept_range(side: DataNode, shorter: DataNode, size: int) -> tuple[DataNode, DataNode]:
    """Source pixels [start, end) along one side that the centre crop keeps.

    As torchvision computes it: the resized side is rounded down, the crop offset half to even.
    """
    resized = math.floor(size * side / shorter)
    surplus = resized - size
    offset = math.floor(surplus * 0.5) + (surplus - 4.0 * math.floor(surplus * 0.25) == 3.0)
    scale = side / resized
    return offset * scale, (offset + size) * scale
