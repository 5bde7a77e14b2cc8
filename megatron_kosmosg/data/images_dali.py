"""Pictures through DALI: decoded from bytes in batches, resized and cropped in one operation.

DALI fails a whole batch when one picture is bad and calls the pipeline invalid after that, so a
failed pipeline is thrown away. Each thread has its own pipelines.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from megatron_kosmosg.data.image_types import Encoded, ImageTransform
from megatron_kosmosg.data.samples import EntityImage
from megatron_kosmosg.data.transparency import without_transparency

MAX_BATCH = 64
"""Pictures that one pipeline run takes; longer lists are cut."""
_FILTERS = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}


class DaliBackend:
    """Batched decoding; on `device_id` with the hardware decoder, else on the CPU."""

    def __init__(self, device_id: int | None) -> None:
        self._device_id = device_id
        self._local = threading.local()

    def decode(self, images: Sequence[Encoded], transform: ImageTransform) -> np.ndarray:
        """float32 [n, 3, size, size]; raises RuntimeError when one of them is bad."""
        # DALI shows the colours under transparent pixels.
        images = [without_transparency(image) for image in images]
        pixels = np.empty((len(images), 3, transform.size, transform.size), np.float32)
        plain = [i for i, image in enumerate(images) if _mask(image) is None]
        masked = [i for i, image in enumerate(images) if _mask(image) is not None]
        for places, has_mask in ((plain, False), (masked, True)):
            for start in range(0, len(places), MAX_BATCH):
                chunk = places[start : start + MAX_BATCH]
                pixels[chunk] = self._run([images[i] for i in chunk], transform, has_mask)
        return pixels

    def _run(self, images: list[Encoded], transform: ImageTransform, has_mask: bool) -> np.ndarray:
        if "pipelines" not in self._local.__dict__:
            self._local.pipelines = {}
        pipelines: dict[tuple[ImageTransform, bool], Pipeline] = self._local.pipelines
        key = (transform, has_mask)
        pipeline = pipelines.pop(key, None) or _build(transform, has_mask, self._device_id)
        pipeline.feed_input("image", [_array(_picture(image)) for image in images])
        if has_mask:
            pipeline.feed_input("mask", [_array(_mask(image) or b"") for image in images])
        (output,) = pipeline.run()
        if self._device_id is not None:
            output = output.as_cpu()
        result = np.array(output.as_tensor())
        # Only a pipeline that has not failed is used again.
        pipelines[key] = pipeline
        return result


def _picture(encoded: Encoded) -> bytes:
    return encoded.image if isinstance(encoded, EntityImage) else encoded


def _mask(encoded: Encoded) -> bytes | None:
    return encoded.mask if isinstance(encoded, EntityImage) else None


def _array(data: bytes) -> np.ndarray:
    if not data:
        raise RuntimeError("empty file")
    return np.frombuffer(data, np.uint8)


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
        image = fn.decoders.image(_bytes_input("image"), device=device, output_type=types.RGB)
        if has_mask:
            mask = fn.decoders.image(_bytes_input("mask"), device=device, output_type=types.GRAY)
            image = _paint_background_white(image, mask)
        image = _resize_and_crop(image, transform)
        pipeline.set_outputs(
            fn.crop_mirror_normalize(
                image,
                mean=[255 * value for value in transform.mean],
                std=[255 * value for value in transform.std],
                output_layout="CHW",
                dtype=types.FLOAT,
            )
        )
    pipeline.build()
    return pipeline


def _bytes_input(name: str) -> DataNode:
    return fn.external_source(name=name, dtype=types.UINT8, ndim=1)


def _paint_background_white(image: DataNode, mask: DataNode) -> DataNode:
    """uint8 HWC: the picture where the mask is 255, white where it is 0, mixed in between."""
    keep = fn.cast(mask, dtype=types.FLOAT) / 255.0
    mixed = 255.0 - (255.0 - fn.cast(image, dtype=types.FLOAT)) * keep
    return fn.reinterpret(fn.cast(mixed, dtype=types.UINT8), layout="HWC")


def _resize_and_crop(image: DataNode, transform: ImageTransform) -> DataNode:
    """uint8 [size, size, 3], computed from the region of the picture that survives the crop."""
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
