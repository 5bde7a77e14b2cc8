"""Prints how a run is: progress, time left, latest sign of life, checkpoint, disk, owner, last
error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import (
    CommandParser,
    command_parser,
    existing_folder,
    file_path,
    run_command,
)
from megatron_kosmosg.files import write_text
from megatron_kosmosg.terminal_text import printable_lines

EPILOG = """\
Reads the run's folder alone, so it works from any machine that sees it and disturbs nothing.

exit codes: 0 the run starts, runs, or is done; 1 it failed, stalled, gives no sign of life, or was
stopped before its end; 2 the folder is not that of a run;
141 nobody read the answer to its end (`| head`).

examples:
  kosmosg status /runs/instruct
  kosmosg status /runs/instruct --json /tmp/instruct.json
"""


def build_parser() -> CommandParser:
    """The parser of the command and its options."""
    parser = command_parser("status", __doc__, EPILOG)
    parser.add_argument("run", type=existing_folder, metavar="RUN", help="folder of a run")
    parser.add_argument("--json", type=file_path, metavar="FILE", help="also write it there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 where all is well with the run, 1 where somebody should look after it, 2 where
    there is no run."""
    args = build_parser().parse_args(arguments)
    return run_command(lambda: _show(args.run, args.json), writes="--json")


def _show(folder: Path, file: Path | None) -> int:
    from megatron_kosmosg.config.overwrites import refuse_to_write_into
    from megatron_kosmosg.monitoring.run_status import run_status, to_json, to_text

    status = run_status(folder)
    print(printable_lines(to_text(status)))
    if file is not None:
        refuse_to_write_into(file, [folder], "--json")
        write_text(file, to_json(status) + "\n")
    return exit_codes.DONE if status.is_well else exit_codes.FAILURE


if __name__ == "__main__":
    sys.exit(main())
