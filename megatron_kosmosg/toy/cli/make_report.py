"""Writes OUT/report.html, one self-contained page, from a quickstart's output folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_kosmosg.toy.report.page import write_report


def main(arguments: list[str] | None = None) -> int:
    """0 when the page is written, 1 (message on stderr) when it could not be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the quickstart")
    given = parser.parse_args(arguments)
    try:
        print(write_report(given.out))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
