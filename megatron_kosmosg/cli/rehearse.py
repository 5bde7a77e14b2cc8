"""An update of every kind of rank on GPUs that are not there: errors, kernels, memory, waits."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import (
    CommandParser,
    add_config,
    add_overrides,
    command_parser,
    file_path,
    positive_int,
    report_error,
    run_command,
)
from megatron_kosmosg.files import write_text
from megatron_kosmosg.launcher import as_typed
from megatron_kosmosg.planning.gpus import gpu_named, name_from_anywhere
from megatron_kosmosg.terminal_text import printable_lines

EPILOG = """\
The run's own code starts one rank of every kind (each pipeline stage, the score ranks) and makes an
update on tensors that have a shape, a dtype and a device and no memory; other ranks are pretended.
A wrong device, dtype or shape, or a tensor that NCCL would refuse, is an error with its line. No
data and no weights are read. Figures are rehearsed, not measured; the last line says what such a
rehearsal cannot see. It needs g++.

exit codes: 0 every rank made its update; 1 one did not; 2 bad input or layout.

examples:
  kosmosg rehearse --config instruct_256gpu
  kosmosg rehearse --config pretrain_256gpu --num-gpus 64 --gpu a100-80 --page pretrain.html \\
      parallel.pipeline_model_parallel_size=2
"""


def build_parser() -> CommandParser:
    """The parser of the command and its options."""
    parser = command_parser("rehearse", __doc__, EPILOG)
    add_config(parser, required=True)
    parser.add_argument(
        "--num-gpus", type=positive_int, metavar="N", help="of the run (parallel.world_size)"
    )
    parser.add_argument(
        "--gpu", default="h100-80", metavar="GPU", help="what they are, as for plan (h100-80)"
    )
    parser.add_argument(
        "--json", type=file_path, metavar="FILE", help="also write all counts there"
    )
    parser.add_argument(
        "--page", type=file_path, metavar="FILE", help="also write an HTML page with charts there"
    )
    add_overrides(parser, "settings that win over the file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when every kind of rank made its update, 1 when one did not, 2 for bad input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = build_parser().parse_intermixed_args(words)
    return run_command(lambda: _rehearse(args, words), writes="--json or --page")


def _rehearse(args: argparse.Namespace, words: list[str]) -> int:
    from megatron_kosmosg.config.errors import ConfigError
    from megatron_kosmosg.config.load import config_files, load_config
    from megatron_kosmosg.config.overwrites import refuse_to_overwrite, refuse_to_write_into
    from megatron_kosmosg.config.validate import validate_layout
    from megatron_kosmosg.data.dataset_files import files_read, folders_read
    from megatron_kosmosg.progress import Progress
    from megatron_kosmosg.rehearsal.fake_device import FakeDevice, FakeDeviceError
    from megatron_kosmosg.rehearsal.rehearsal_page import to_page
    from megatron_kosmosg.rehearsal.rehearsal_report import failure, has_errors, to_text
    from megatron_kosmosg.rehearsal.rehearse import rehearse
    from megatron_kosmosg.stages import stage_facts

    # As in a plan, the option wins over the size that a config was written for.
    size = [] if args.num_gpus is None else [f"parallel.world_size={args.num_gpus}"]
    overrides = [*args.overrides, *size]
    config = load_config(args.config, overrides)
    num_gpus = args.num_gpus or config.parallel.world_size
    if num_gpus is None or num_gpus < 1:
        raise ConfigError("how many GPUs? give --num-gpus or parallel.world_size")
    # Raises for a GPU that is nowhere, or has no such arithmetic.
    gpu_named(args.gpu).peak_flops(config.training.precision)
    gpu = name_from_anywhere(args.gpu)
    validate_layout(config, num_gpus, stage_facts(config.stage))
    reads = [*config_files(args.config), *files_read(config)]
    for option, output in (("--json", args.json), ("--page", args.page)):
        if output is not None:
            refuse_to_overwrite([output], reads, option)
            refuse_to_write_into(output, folders_read(config), option)
    try:
        with FakeDevice() as device, Progress("rehearsing", "rank") as progress:
            found = rehearse(device, args.config, overrides, num_gpus, gpu, progress)
    except FakeDeviceError as error:
        return report_error(str(error), exit_codes.FAILURE)
    print(printable_lines(to_text(found)))
    if args.json is not None:
        write_text(args.json, json.dumps({"figures": "rehearsed"} | found, indent=2) + "\n")
    if args.page is not None:
        write_text(args.page, to_page(found, f"{as_typed('rehearse')} {shlex.join(words)}"))
    for kind in found["kinds"]:
        wrong = failure(kind)
        if wrong is not None:
            report_error(wrong)
    return exit_codes.FAILURE if has_errors(found) else exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
