"""Writes the toy world as ordinary files: OUTPUT/{train,heldout}/KIND.jsonl and their pictures."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from megatron_kosmosg.toy.files import World, is_complete, write_world

EPILOG = """\
KIND is text, caption, interleaved, compositional or edit; tools/preprocess_data.py --help shows
their fields. The same size and seed give the same files. A finished world of that size and seed
is left as it is; another one in the same folder is replaced when the new one is complete.
"""


class ProgressLine:
    """Percent and time remaining on stderr: in place on a terminal, else every ten seconds."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._started = self._printed = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._printed < (0.2 if self._terminal else 10.0):
            return
        self._printed = now
        left = (now - self._started) * (total - done) / done
        line = f"{100 * done // total:3d}%  {done:,} of {total:,} records  {left:.0f} s left"
        end = "\n" if done == total or not self._terminal else ""
        print(("\r\x1b[K" if self._terminal else "") + line, end=end, file=sys.stderr, flush=True)


def main() -> int:
    """0 when the world is there, 1 (message on stderr) when it could not be written."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--size", type=int, default=4000, metavar="N", help="scenes (4000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="decides all draws (0)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    try:
        world = World(given.size, given.seed)
        if is_complete(given.output, world):
            print(f"{given.output}: complete, left as it is")
            return 0
        write_world(given.output, world, ProgressLine())
    except (ValueError, OSError) as error:
        print(f"make_toy_world: {error}", file=sys.stderr)
        return 1
    print(f"{given.output}: {given.size} scenes, {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
