"""The tar reader: webdataset samples, that is neighbouring members that share a name up to the dot.

KEY.json holds fields, KEY.txt a caption, the other members images (as img2dataset writes them).
A field of the JSON may call a member by what follows KEY and the dot: {"target": "after.png"}.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from megatron_kosmosg.data.kinds.record import Record, Rejected, is_filled
from megatron_kosmosg.foreign_files import MAX_FILE_BYTES
from megatron_kosmosg.preprocess.jsonl import parse_object
from megatron_kosmosg.preprocess.lines import decode_utf8
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.record_readers import BadRecord, Shard, ShardSize

Group = tuple[str, list[tarfile.TarInfo]]
BLOCK = 512
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
OTHER_EXTENSIONS = tuple(
    "jfif jpe avif heic heif jxl jp2 ico tga pcx dds ppm pgm pnm psd svg dng cr2 nef arw".split()
)
"""Of images, too, most of which are refused: by their content and counted, not by their name."""


class TarReader:
    """Uncompressed tar files. A damaged one gives the samples before the damage and a reject."""

    def shards(self, path: Path, limit: int | None, size: ShardSize) -> list[Shard]:
        """Cuts the archive into shards, as Reader asks for. The last shard runs to the end, so that
        its reader meets any damage."""
        shards: list[Shard] = []
        start = first = number = 0
        try:
            with path.open("rb") as file:
                for _, members in _groups(file):
                    if number == limit:
                        break
                    at = members[0].offset
                    if number - first == size.records or at - start >= size.image_bytes:
                        shards.append(Shard(path, start, first, number - first))
                        start, first = at, number
                    number += 1
        except Rejected:
            pass
        rest = None if limit is None else max(number - first, 1)
        return [*shards, Shard(path, start, first, rest)] if limit != 0 else []

    def read(self, shard: Shard, options: Options) -> Iterator[Record | BadRecord]:
        """Records named `file/KEY`, with the members of each sample in memory."""
        with shard.path.open("rb") as file:
            file.seek(shard.offset)
            for key, members in islice(_groups(file), shard.num_records):
                source = f"{shard.name}/{key}"
                try:
                    yield _record(file, key, members, shard.path, source)
                except Rejected as rejected:
                    yield BadRecord(source, rejected)


def _groups(file: IO[bytes]) -> Iterator[Group]:
    """Samples from the file's position on. Raises Rejected at damage, after the whole samples."""
    group: Group | None = None
    damage: Rejected | None = None
    members = _members(file)
    while True:
        try:
            member = next(members)
        except StopIteration:
            break
        except Rejected as rejected:
            damage = rejected
            break
        if member is None:
            if group is not None:
                yield group
            group = None
            continue
        folder, _, name = member.name.rpartition("/")
        stem = name.split(".", 1)[0]
        if member.isdir() or not stem:
            continue
        key = f"{folder}/{stem}".removeprefix("./") if folder else stem
        if group is None or group[0] != key:
            if group is not None:
                yield group
            group = (key, [])
        group[1].append(member)
    if group is not None:
        yield group
    if damage is not None:
        raise damage


def _members(file: IO[bytes]) -> Iterator[tarfile.TarInfo | None]:
    """Members of all archives that stand in the file one after the other, None after each
    (`cat a.tar b.tar` gives such files)."""
    end = os.fstat(file.fileno()).st_size
    if end == 0:
        raise Rejected("tar is an empty file")
    start: int | None = file.tell()
    while start is not None:
        file.seek(start)
        yield from _members_of_archive(file, end)
        start = _next_archive(file)
        yield None


def _members_of_archive(file: IO[bytes], end: int) -> Iterator[tarfile.TarInfo]:
    """The members of one archive. After them the file stands behind the block that marks the
    archive's end."""
    try:
        with tarfile.TarFile(fileobj=file) as archive:
            while (member := archive.next()) is not None:
                cast(Any, archive).members.clear()  # it would keep them all
                if member.isreg() and member.offset_data + member.size > end:
                    raise Rejected("tar is truncated", member.name)
                yield member
            # tarfile takes any damage after the first member for the end.
            file.seek(archive.offset)
            mark = file.read(BLOCK)
    except tarfile.TarError as error:
        is_short = "end of data" in str(error)
        raise Rejected("tar is truncated" if is_short else "tar is damaged", str(error)) from error
    if len(mark) < BLOCK:
        raise Rejected("tar is truncated", "no end mark")
    if mark.strip(b"\0"):
        raise Rejected("tar is damaged", f"no header at byte {archive.offset}")


def _next_archive(file: IO[bytes]) -> int | None:
    """The place where the first block that is not all zeros begins; None where there is none."""
    at = file.tell()
    while block := file.read(BLOCK):
        if block.strip(b"\0"):
            return at
        at += len(block)
    return None


def _record(
    file: IO[bytes], key: str, members: list[tarfile.TarInfo], path: Path, source: str
) -> Record:
    files: dict[str, bytes] = {}
    for member in members:
        name = member.name.rpartition("/")[2].split(".", 1)
        extension = name[1].lower() if len(name) == 2 else ""
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise Rejected("tar member leaves its folder", member.name)
        if not member.isreg():
            raise Rejected("tar member is a link or a device", member.name)
        if extension in files:
            raise Rejected("tar member stands there twice", member.name)
        if member.size > MAX_FILE_BYTES:
            raise Rejected("tar member is too large", f"{member.name}: {member.size:,} bytes")
        file.seek(member.offset_data)
        files[extension] = file.read(member.size)
    return Record(source, member_fields(key, files), path.parent, files)


def member_fields(key: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """The fields of a sample whose parts are files; {what follows KEY and the dot: content}.

    The only image is `image`, and the .txt `caption`, unless the JSON calls another member so or
    has a caption: img2dataset writes null for one that it did not find, and addresses for images.
    Raises Rejected.
    """
    fields = parse_object(files["json"]) if "json" in files else {}
    fields["key"] = key
    others = {v for name, v in fields.items() if name != "image" and isinstance(v, str)}
    free = [end for end in files if end not in others]
    images = [end for end in free if end in IMAGE_EXTENSIONS]
    images = images or [end for end in free if end in OTHER_EXTENSIONS]
    image = fields.get("image")
    if len(images) == 1 and not (isinstance(image, str) and image in files):
        fields["image"] = images[0]
    if "txt" in files and not is_filled(fields.get("caption")):
        fields["caption"] = decode_utf8(files["txt"])
    return fields
