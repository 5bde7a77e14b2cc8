"""Images of scenes as files, drawn many at a time because that is faster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from megatron_kosmosg.toy.training.pool import to_bytes
from megatron_kosmosg.toy.world import Entity, Scene, entity_masks, render_batch

BATCH = 64
JPEG_EVERY = 4
"""Every so many records have JPEG images, so that both decoders are used."""
JPEG_OPTIONS: dict[str, Any] = {"quality": 95, "subsampling": 0}


class ImageFiles:
    """Hands out file names at once; all files are there after `finish`."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder, self._kind = folder, kind
        self._scenes: list[tuple[str, Scene]] = []
        self._masks: list[tuple[str, Entity]] = []
        self._record = self._number = 0

    def begin(self, record: int) -> None:
        """The names that follow belong to this record."""
        self._record, self._number = record, 0

    def add(self, scene: Scene) -> str:
        """The name of the scene's image, relative to the folder."""
        name = self._name("jpg" if self._record % JPEG_EVERY == 0 else "png")
        self._scenes.append((name, scene))
        if len(self._scenes) >= BATCH:
            self._write_scenes()
        return name

    def add_mask(self, entity: Entity) -> str:
        """The name of the entity's mask (255 = entity), relative to the folder."""
        name = self._name("png")
        self._masks.append((name, entity))
        if len(self._masks) >= BATCH:
            self._write_masks()
        return name

    def finish(self) -> None:
        """Writes the files that are still to be drawn."""
        self._write_scenes()
        self._write_masks()

    def _name(self, ending: str) -> str:
        self._number += 1
        thousand = f"{self._record // 1000:03d}"
        return f"images/{self._kind}/{thousand}/{self._record:06d}-{self._number}.{ending}"

    def _write_scenes(self) -> None:
        if self._scenes:
            pixels = to_bytes(render_batch([scene for _, scene in self._scenes]))
            for (name, _), array in zip(self._scenes, pixels.permute(0, 2, 3, 1), strict=True):
                self._save(name, array.numpy())
        self._scenes = []

    def _write_masks(self) -> None:
        if self._masks:
            pixels = (entity_masks([e for _, e in self._masks]) * 255.0).round().byte()
            for (name, _), array in zip(self._masks, pixels, strict=True):
                self._save(name, array.numpy())
        self._masks = []

    def _save(self, name: str, array: Any) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        options = JPEG_OPTIONS if path.suffix == ".jpg" else {}
        Image.fromarray(array).save(path, **options)
