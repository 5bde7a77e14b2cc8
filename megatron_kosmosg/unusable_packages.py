"""A TransformerEngine that is installed and does not work is hidden before Megatron-Core sees it.

`pip install transformer-engine` without extras brings a package whose import raises RuntimeError.
Megatron-Core expects nothing but ImportError, so that with such a package every command would end
in a traceback, also those that need no GPU.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

REPAIR = (
    "pip install --no-build-isolation 'transformer-engine[pytorch,core_cu13]>=2.9,<2.12', "
    "or pip uninstall transformer-engine"
)


def hide_unusable_before_megatron() -> None:
    """Look at TransformerEngine when `megatron.core` is first imported, and no sooner: the look
    takes seconds and imports torch."""
    if "megatron.core" not in sys.modules:
        sys.meta_path.insert(0, _BeforeMegatron())


class _BeforeMegatron(MetaPathFinder):
    """Finds nothing; it is asked first and sees which module is about to be imported."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "megatron.core" and self in sys.meta_path:
            sys.meta_path.remove(self)
            _hide_unusable_transformer_engine()


def _hide_unusable_transformer_engine() -> None:
    name = "transformer_engine"
    if find_spec(name) is None:
        return
    try:
        importlib.import_module(f"{name}.pytorch")
    except Exception as error:  # noqa: BLE001 - it fails with whatever its parts raise
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[module]
        # Python's own way to say that a module cannot be imported; find_spec heeds it, too.
        sys.modules[name] = None  # type: ignore[assignment]
        from megatron_kosmosg.launcher import is_first_rank

        if is_first_rank():
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            print(
                f"warning: the installed transformer-engine does not work and is not used: "
                f"{reason[:120]}; to repair: {REPAIR}",
                file=sys.stderr,
            )
