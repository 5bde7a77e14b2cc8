"""A process that is a GPU rank: `python -m megatron_kosmosg.rehearsal.server FOLDER`.

Reads a case a line, as JSON, and answers each with a line. Every case runs in a child of its own,
because the program and its libraries keep state; what takes long, importing, happens once.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_kosmosg.rehearsal.case import RehearsalCase
from megatron_kosmosg.rehearsal.cuda_guard import load_guard

if TYPE_CHECKING:
    from megatron_kosmosg.rehearsal.stand_ins import StandIns


def main(folder: str) -> None:
    """Serves until its input ends. folder: for files, an empty one.

    Standard output carries the answers alone.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    load_guard()
    from megatron_kosmosg.rehearsal.stand_ins import install

    stand_ins = install(Path(folder))
    gc.collect()
    gc.freeze()  # no case frees anything of what was imported, and each would search it
    for line in sys.stdin:
        answers.write(_in_child(RehearsalCase(**_tuples(json.loads(line))), stand_ins))
        answers.flush()


def _in_child(case: RehearsalCase, stand_ins: StandIns) -> str:
    """Runs the case in a child process, and returns the answer's line."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        try:
            with os.fdopen(send, "w") as answer:
                answer.write(json.dumps(_run(case, stand_ins)) + "\n")
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as answer:
        line = answer.read()
    os.waitpid(child, 0)
    return line or json.dumps({"error": {"message": "the process died", "phase": "?"}}) + "\n"


def _run(case: RehearsalCase, stand_ins: StandIns) -> dict:
    module, _, function = case.do.partition(":")
    try:
        answer = getattr(importlib.import_module(module), function)(case, stand_ins)
    except Exception as error:  # whatever the program raises is what the case is run for
        frames = traceback.extract_tb(error.__traceback__)
        program = [frame for frame in frames if "/torch/" not in frame.filename]
        return {
            "error": {
                "message": f"{type(error).__name__}: {error}",
                "phase": stand_ins.recorder.name,
                "place": _place(frames),
                "lines": [f"{x.filename}:{x.lineno} {x.name}: {x.line}" for x in program[-12:]],
            }
        }
    times = os.times()
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return answer | {"cpu_seconds": times.user + times.system, "resident_bytes": largest}


def _place(frames: traceback.StackSummary) -> str:
    """The line of the program where something went wrong, as file:line."""
    package, rehearsal_folder = Path(__file__).parents[1], Path(__file__).parent
    package_frames = [x for x in frames if package in Path(x.filename).parents]
    program = (
        [x for x in package_frames if rehearsal_folder not in Path(x.filename).parents]
        or package_frames
        or list(frames)
    )
    file = Path(program[-1].filename)
    shown = file.relative_to(package.parent) if package in file.parents else file
    return f"{shown}:{program[-1].lineno}"


def _tuples(fields: dict) -> dict:
    """The fields with tuples in place of lists, since JSON knows lists only."""

    def restored(value: object) -> object:
        return tuple(map(restored, value)) if isinstance(value, list) else value

    return {key: restored(value) for key, value in fields.items()}


if __name__ == "__main__":
    main(sys.argv[1])
