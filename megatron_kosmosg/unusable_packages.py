"""Packages with GPU kernels that are installed and do not work are hidden before Megatron-Core,
peft and this package see them, each with one line that says why and how to repair it.

Whether one works is found by importing it. `pip install transformer-engine` without extras brings a
package whose import raises RuntimeError; Megatron-Core expects nothing but ImportError, and peft,
which diffusers imports, nothing at all, so that every command would end in a traceback. PyPI's
`apex` is another project, and NVIDIA's can be built without its CUDA extensions, or for another
torch: it imports and fails at the first call. Where no GPU is visible all of them are hidden, those
that work, too: their optimizers cannot run there.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

_MEGATRON = "megatron.core"
_READERS = (_MEGATRON, "peft")
"""Who imports them, and fails where they do not work."""
ENGINE = {"3.11": ">=2.9,<2.12", "3.12": ">=2.11,<2.21"}
"""Versions of TransformerEngine that the extra `gpu` takes, by version of Python."""
_BOUNDS = ENGINE.get(f"{sys.version_info.major}.{sys.version_info.minor}", "")
_APEX = "build NVIDIA's (github.com/NVIDIA/apex) with --cpp_ext --cuda_ext for the installed torch"


@dataclass(frozen=True)
class _Package:
    """An optional package, and what must be importable for it to be of use."""

    name: str
    """Top-level module; it is the one that is hidden."""
    title: str
    needed: tuple[tuple[str, str], ...]
    """(module, what it means that it cannot be imported, "" for the error's own words), in the
    order in which they are tried."""
    repair: str


_PACKAGES = (
    _Package(
        "transformer_engine",
        "transformer-engine",
        (("transformer_engine.pytorch", ""),),
        f"pip install --no-build-isolation 'transformer-engine[pytorch,core_cu13]{_BOUNDS}', or "
        "pip uninstall transformer-engine",
    ),
    _Package(
        "apex",
        "apex",
        (
            ("apex.optimizers", "it is not NVIDIA's"),
            ("amp_C", "it was built without its CUDA extensions, or for another torch"),
        ),
        f"{_APEX}, or pip uninstall apex",
    ),
    _Package(
        "fused_layer_norm_cuda",
        "layer norm of apex",
        (("fused_layer_norm_cuda", ""),),
        _APEX,
    ),
    _Package(
        "fused_weight_gradient_mlp_cuda",
        "weight-gradient kernel of apex",
        (("fused_weight_gradient_mlp_cuda", ""),),
        _APEX,
    ),
)


@dataclass(frozen=True)
class Unusable:
    """A package that is installed, does not work here and is hidden from now on."""

    name: str
    """Of its module."""
    title: str
    reason: str
    repair: str = ""
    """"" for one that works where there is a GPU."""


def hide_unusable_in_time() -> None:
    """Look at the packages when one that reads them is first imported, and no sooner: the look
    takes seconds and imports torch."""
    if _MEGATRON not in sys.modules:
        sys.meta_path.insert(0, _BeforeReaders())


def hide_unusable() -> tuple[Unusable, ...]:
    """Tries the packages that are installed and hides those that do not work; a second call finds
    no more."""
    found = []
    for package in _PACKAGES:
        if find_spec(package.name) is None:
            continue
        reason, repair = _why_not(package), package.repair
        if reason is None:
            if _is_gpu_visible():
                continue
            reason, repair = "it needs a GPU", ""
        _hide(package.name)
        found.append(Unusable(package.name, package.title, reason, repair))
    return tuple(found)


class _BeforeReaders(MetaPathFinder):
    """Finds nothing; it is asked first and sees which module is about to be imported."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname in _READERS and self in sys.meta_path:
            sys.meta_path.remove(self)
            for unusable in hide_unusable():
                if unusable.repair:
                    _warn(unusable)


def _why_not(package: _Package) -> str | None:
    for module, meaning in package.needed:
        try:
            importlib.import_module("torch")  # whose libraries the extensions are linked with
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - it fails with whatever its parts raise
            message = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            return f"{meaning} ({message})" if meaning else message
    return None


def _is_gpu_visible() -> bool:
    return importlib.import_module("torch").cuda.device_count() > 0


def _hide(name: str) -> None:
    for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
        del sys.modules[module]
    # Python's own way to say that a module cannot be imported; find_spec heeds it, too.
    sys.modules[name] = None  # type: ignore[assignment]  # typeshed knows modules only


def _warn(unusable: Unusable) -> None:
    from megatron_kosmosg.launcher import is_first_rank

    if is_first_rank():
        print(
            f"warning: the installed {unusable.title} does not work and is not used: "
            f"{unusable.reason}; to repair: {unusable.repair}",
            file=sys.stderr,
        )
