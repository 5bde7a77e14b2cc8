"""A machine with a GPU and without a C compiler, or Python's headers, runs torch's own kernels."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from megatron_kosmosg.parallel import platform


@pytest.fixture(autouse=True)
def has_gpu(monkeypatch) -> None:
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(platform, "transformer_impl", lambda: "local")


def headers_in(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(folder)})


def test_without_a_compiler_nothing_is_fused_by_it(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "no C compiler" in platform.why_no_compiler()
    assert not platform.transformer_flags()["bias_dropout_fusion"]
    monkeypatch.setenv("CC", "/opt/cc")
    assert "no C compiler" not in (platform.why_no_compiler() or "")


def test_headers_are_looked_for_where_triton_does(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    headers_in(tmp_path / "include", monkeypatch)
    assert "Python.h" in platform.why_no_compiler()
    assert not platform.transformer_flags()["bias_dropout_fusion"]
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CPATH", f"/nowhere:{tmp_path}")
    assert (
        platform.why_no_compiler() is None and platform.transformer_flags()["bias_dropout_fusion"]
    )
