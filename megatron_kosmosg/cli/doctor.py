"""Which kernels, image decoder, collectives and versions a run on this machine uses, and why not
others."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable, Mapping, Sequence

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import CommandParser, command_parser, run_command
from megatron_kosmosg.terminal_text import printable
from megatron_kosmosg.unusable_packages import Unusable, hide_unusable

EPILOG = """\
Everything is tried, not looked up: a package that is installed and does not work is said to be so,
with what repairs it, and a run takes the next best and says it once. Versions that no test ran with
are warned of here and refused nowhere. Start it where training runs: inside the container, on a
node with GPUs.

examples:
  kosmosg doctor
  srun --nodes=1 --ntasks=1 --gres=gpu:1 kosmosg doctor
Exit codes: 0 in any case; 2 wrong arguments.
"""

Hidden = Mapping[str, Unusable]
"""What is installed and does not work, by module."""
TESTED = {"torch": ("2.13.0", "2.13.0"), "megatron-core": ("0.16.1", "0.19.2")}
"""Oldest and newest version that the tests ran with; conversion/model_card.py has the others."""


def build_parser() -> CommandParser:
    """The parser of the command, which has no options: it says what is."""
    return command_parser("doctor", __doc__, EPILOG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the diagnosis and returns 0, whatever was found."""
    build_parser().parse_args(arguments)
    return run_command(_print)


def _print() -> int:
    for line in diagnosis():
        print(printable(line), flush=True)
    return exit_codes.DONE


def diagnosis() -> list[str]:
    """One line for each version and each part of a run; a part that cannot be asked says so."""
    lines = _versions()
    unusable = {found.name: found for found in hide_unusable()}  # before Megatron-Core looks
    for part, report in _PARTS.items():
        try:
            lines += report(unusable)
        except Exception as error:  # noqa: BLE001 - what is broken is what this is about
            lines.append(f"{part}: cannot be asked: {_one_line(error)}")
    return lines


def _versions() -> list[str]:
    from megatron_kosmosg import __version__
    from megatron_kosmosg.conversion.model_card import TESTED as TESTED_OF_EXPORTS

    package = f"megatron-kosmosg {__version__} on Python {platform.python_version()}, "
    lines = [f"{package}{platform.system()} {platform.machine()}"]
    for name, (oldest, newest) in (TESTED | TESTED_OF_EXPORTS).items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name}: not installed")
            continue
        span = oldest if oldest == newest else f"{oldest} to {newest}"
        tested = _release(oldest) <= _release(version) <= _release(newest)
        state = "" if tested else f"; warning: tested is {span}, others are not refused"
        lines.append(f"{name} {version}{state}")
    return lines


def _release(version: str) -> list[int]:
    """The major and minor number of a version: [2, 10] of 2.10.0a0+b558c986e8.nv25.11. Patches are
    taken for equal."""
    return [int(number) for number in version.split(".")[:2]]


def _devices(_: Hidden) -> list[str]:
    from megatron_kosmosg.parallel.kernels import device_choices

    return [_line(choice.part, choice.taken, choice.others) for choice in device_choices()]


def _kernels(unusable: Hidden) -> list[str]:
    from megatron_kosmosg.parallel.kernels import kernel_choices

    return [_line(choice.part, choice.taken, choice.others) for choice in kernel_choices(unusable)]


def _decoder(_: Hidden) -> list[str]:
    from megatron_kosmosg.data.images import BrokenDecoder, ImageDecoder
    from megatron_kosmosg.launcher import ALONE
    from megatron_kosmosg.parallel.devices import choose_device

    device = choose_device(ALONE)
    try:
        ImageDecoder("dali", device.index)
    except BrokenDecoder as error:
        return [_line("image decoder", "Pillow", (f"DALI: {error.reason}",))]
    except ValueError as error:
        return [_line("image decoder", "Pillow", (f"DALI: {_one_line(error)}",))]
    version = next(
        f" {found.version}"
        for found in importlib.metadata.distributions()
        if found.name.startswith("nvidia-dali-cuda")
    )
    return [
        _line(
            "image decoder", f"DALI{version} on {'the CPU' if device.index is None else 'the GPU'}"
        )
    ]


def _mpi(_: Hidden) -> list[str]:
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI

        library = " ".join(MPI.Get_library_version().split("\n")[0].split(",")[0].split())
    except (ImportError, RuntimeError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "mpi4py"
        reason = "not installed" if missing else _one_line(error)
        return [_line("workers of preprocess", "of this machine", (f"MPI: {reason}",))]
    return [_line("workers of preprocess", f"of this machine, or of mpirun ({library})")]


_PARTS: dict[str, Callable[[Hidden], list[str]]] = {
    "device": _devices,
    "kernels": _kernels,
    "image decoder": _decoder,
    "workers of preprocess": _mpi,
}


def _line(part: str, taken: str, others: Sequence[str] = ()) -> str:
    return f"{part}: {taken}" + "".join(f"; not {other}" for other in others)


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


if __name__ == "__main__":
    sys.exit(main())
