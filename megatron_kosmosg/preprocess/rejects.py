"""PREFIX.rejects.jsonl, the records that were left out; and which files are products of ours.

A pattern such as `*.jsonl` also matches what an earlier run left beside the input: files that
preprocessing wrote are recognised by what is in them, so that no run reads its own products.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_kosmosg.data.dataset_files import dataset_files
from megatron_kosmosg.data.kinds.record import Rejected
from megatron_kosmosg.data.manifest import is_manifest, manifest_path
from megatron_kosmosg.foreign_files import parse_json
from megatron_kosmosg.preprocess.work_folder import is_work_folder

ENDING = ".rejects.jsonl"
_NEEDED, _OPTIONAL = {"source", "key", "reason"}, {"detail"}
_ENDINGS = [str(path) for path in dataset_files("")]


def rejects_path(prefix: str | Path) -> Path:
    """The file of a dataset's rejects: PREFIX.rejects.jsonl."""
    return Path(f"{prefix}{ENDING}")


def reject_line(source: str, key: str, rejected: Rejected) -> str:
    """The line of a rejects file for one record."""
    line = {"source": source, "key": key, "reason": rejected.reason}
    if rejected.detail:
        line["detail"] = rejected.detail
    # ASCII: what is wrong with a record may be its Unicode.
    return json.dumps(line) + "\n"


def is_product(path: Path) -> bool:
    """Whether preprocessing wrote the file, of this dataset or another: rejects, the files of a
    finished dataset, those of an unfinished one."""
    if any(is_work_folder(folder) for folder in path.absolute().parents):
        return True
    if path.name.endswith(ENDING):
        return _holds_rejects(path)
    prefixes = [path.name.removesuffix(end) for end in _ENDINGS if path.name.endswith(end)]
    return any(is_manifest(manifest_path(path.with_name(prefix))) for prefix in prefixes if prefix)


def _holds_rejects(path: Path) -> bool:
    with path.open("rb") as file:
        line = file.readline(1 << 20)
    if not line:
        return True  # nothing was left out
    try:
        fields = parse_json(line)
    except ValueError:
        return False
    return isinstance(fields, dict) and _NEEDED <= fields.keys() <= _NEEDED | _OPTIONAL
