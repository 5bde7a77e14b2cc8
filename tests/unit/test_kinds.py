"""The table of kinds: whole, read without torch, and the only place that names kinds."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_kosmosg.data import kinds
from megatron_kosmosg.data.kinds import KINDS, find_kind, names_read_by, read_by

PACKAGE = Path(kinds.__file__).parents[2]
NAMED_ELSEWHERE = {
    "preprocess/layouts.py",  # published datasets, by the kind of their samples
    "preprocess/prompt_folders.py",  # a field of InstructPix2Pix is called so
    "toy/world_files.py",
    "toy/toy_records.py",
}
"""Facts about certain data, which are not facts about a kind."""


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_kind_is_whole(kind):
    assert KINDS[kind.name] is find_kind(kind.name) is kind
    assert (kind.convert is None) == kind.is_plain_text
    assert any(kind.use(stage) for stage in ("pretrain", "align", "instruct"))
    assert all(name in kind.record for name in kind.fields[:1])
    for stage in ("pretrain", "align", "instruct"):
        if kind.use(stage) is not None:
            usual = kind.use(stage).usual_size(50)
            assert 0 < usual.length <= 50 and usual.images >= 0
            assert kind in read_by(stage) and kind.name in names_read_by(stage)


def test_an_unknown_kind_is_an_error_that_lists_the_kinds():
    with pytest.raises(ValueError, match="kind txet is not known; the kinds are text, caption"):
        find_kind("txet")


def test_records_and_plans_need_no_torch():
    program = (
        "import sys, megatron_kosmosg.data.manifest, megatron_kosmosg.preprocess.preprocess_run, "
        "megatron_kosmosg.planning.workload\n"
        "print([name for name in ('torch', 'megatron.core') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_no_other_file_names_a_kind():
    """`text` and `caption` are fields of records, too, so they are not looked for."""
    looked_for = set(KINDS) - {"text", "caption"}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in looked_for:
                found.add(path.relative_to(PACKAGE).as_posix())
    assert {name for name in found if not name.startswith("data/kinds/")} == NAMED_ELSEWHERE
