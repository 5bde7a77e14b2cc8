"""`kosmosg train`, the entry of all stages, also as `python -m megatron_kosmosg.train`.

Heavy imports happen inside `run`, so that `--help` and a mistyped setting answer at once.
Long because a rank's whole way is here, from its command line to its exit code.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from megatron_kosmosg import exit_codes
from megatron_kosmosg.checkpoint.folder import CONFIG_FILE
from megatron_kosmosg.command_line import (
    CommandParser,
    add_config,
    add_overrides,
    command_parser,
    note,
    quieten_imports,
    report_error,
)
from megatron_kosmosg.config.errors import ConfigError, InputError
from megatron_kosmosg.config.load import config_files, is_saved_config, load_config
from megatron_kosmosg.config.needed_files import check_writable, validate_files
from megatron_kosmosg.config.overwrites import refuse_to_overwrite, refuse_to_run_over_inputs
from megatron_kosmosg.config.paths import output_folder
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.validate import validate_layout
from megatron_kosmosg.evaluation.registry import build_evaluators, check_evaluators
from megatron_kosmosg.launcher import find_rank_info, is_first_rank
from megatron_kosmosg.models.pipeline_stage_specs import pipeline_stage_specs
from megatron_kosmosg.monitoring.trackers import check_trackers
from megatron_kosmosg.planning.gpus import gpu_named
from megatron_kosmosg.stages import build_stage, stage_facts
from megatron_kosmosg.terminal_text import printable_lines

if TYPE_CHECKING:
    from megatron_kosmosg.monitoring.notice import Notices
    from megatron_kosmosg.monitoring.run_owner import RunOwner
    from megatron_kosmosg.score.child_process import OwnProcess

DESCRIPTION = """\
Trains one stage (pretrain, align or instruct) of KOSMOS-G. Start it with `kosmosg launch` or srun,
one process per device, or alone. A rerun continues from the newest checkpoint of its output folder.
"""

EPILOG = """\
exit codes: 0 all iterations done; 85 a signal (TERM, USR1, Ctrl-C) asked to stop, state is saved,
start again to continue; 2 arguments, settings or inputs; 3 the limit of non-finite updates is
reached, or that of bad images, or the last updates were not finite; 130 a second Ctrl-C; 1 any
other error.
"""


def build_parser() -> CommandParser:
    """The command line: config, dry_run, overrides."""
    parser = command_parser("train", DESCRIPTION, EPILOG)
    add_config(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config, rank layout, parameter counts and batch arithmetic; "
        "needs no GPU and no data",
    )
    parser.add_argument(
        "--check-files",
        action="store_true",
        help="with --dry-run: exit code 2 when something that the run reads is not on this "
        "machine, or what it writes cannot be",
    )
    add_overrides(parser, "settings that win over the file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains the stage of the config, and returns the exit code of this rank."""
    parsed = build_parser().parse_intermixed_args(arguments)
    quieten_imports()
    try:
        config = load_config(parsed.config, parsed.overrides, note=note)
        check_evaluators(config)
        check_trackers(config)
        if parsed.dry_run:
            from megatron_kosmosg.planning.dry_run import dry_run_report

            print(printable_lines(dry_run_report(config)))
            if parsed.check_files:
                validate_files(config, stage_facts(config.stage))
            return exit_codes.DONE
        if parsed.config is not None:
            refuse_to_overwrite(
                [output_folder(config) / CONFIG_FILE],
                [file for file in config_files(parsed.config) if not is_saved_config(file)],
                "logging.output_dir",
            )
        facts = stage_facts(config.stage)
        validate_layout(config, find_rank_info().world_size, facts)
        pipeline_stage_specs(config, facts.aligner_parts)
        if config.logging.planned_gpu is not None:
            gpu_named(config.logging.planned_gpu)  # raises for one that is nowhere
    except ConfigError as error:  # the same on every rank: one of them says it
        return report_error(str(error)) if is_first_rank() else exit_codes.BAD_INPUT
    return run(config)


def run(config: RunConfig) -> int:
    """Trains; the exit code of this rank. Process groups are left in every case.

    On a score rank this returns in a child process alone.
    """
    started = time.time()
    child_process = _be_apart(config)
    _quieten_libraries()
    from megatron_kosmosg.monitoring.failure import (
        exit_code_of,
        report_failure,
        report_lost_rank,
    )
    from megatron_kosmosg.monitoring.run_owner import RunFolderTaken
    from megatron_kosmosg.parallel import platform
    from megatron_kosmosg.score.child_process import ScoreRankLost

    try:
        with _owner(config) as owner, ExitStack() as at_end:
            notices = _notices(config, owner)
            notices.started()
            try:
                code = _train(config, started, owner, child_process, at_end)
            except RunFolderTaken:
                raise  # the folder is another's: nothing is written there
            except ScoreRankLost as lost:
                report_lost_rank(output_folder(config), str(lost), lost.__cause__ or lost)
                assert child_process is not None
                child_process.is_lost()
                code = exit_codes.DONE  # a task that fails would end the others
            except (Exception, KeyboardInterrupt) as error:
                # Before the groups are left: the others then fail, and this error is the cause.
                report_failure(output_folder(config), find_rank_info().rank, error, started)
                code = exit_code_of(error)
            notices.ended(code)
            return code
    except InputError as error:  # of rank 0 alone; its launcher ends the others
        return report_error(str(error))
    except OSError as error:
        return report_error(
            f"logging.output_dir={output_folder(config)}: {error}", exit_codes.of_os_error(error)
        )
    except KeyboardInterrupt:
        return exit_codes.INTERRUPTED
    finally:
        platform.teardown()


def _be_apart(config: RunConfig) -> OwnProcess | None:
    """Lets a score rank work in a child, before anything is loaded; None for other ranks."""
    from megatron_kosmosg.config.rank_grid import has_score_ranks, rank_grid
    from megatron_kosmosg.score.child_process import go_on_as_child
    from megatron_kosmosg.score.run_watch import RunWatch

    if not has_score_ranks(config):
        return None
    rank_info, times = find_rank_info(), config.parallel
    if rank_grid(config, rank_info.world_size).coordinates(rank_info.rank).role != "score":
        return None
    run = RunWatch(output_folder(config), times.stall_seconds, times.timeout_seconds)
    return go_on_as_child(f"score rank {rank_info.rank}", run)


def _notices(config: RunConfig, owner: RunOwner | None) -> Notices:
    """The notices that rank 0 sends; those of the other ranks go nowhere."""
    from megatron_kosmosg.monitoring.notice import Notices

    target = config.logging.notify if owner is not None else None
    return Notices(target, config.stage, output_folder(config), note)


@contextmanager
def _owner(config: RunConfig) -> Iterator[RunOwner | None]:
    """The claim on the run's folder, which rank 0 holds; None on the others."""
    from megatron_kosmosg.monitoring.run_owner import RunOwner

    if find_rank_info().rank != 0:
        yield None
        return
    folder = output_folder(config)
    check_writable("logging.output_dir", folder)
    with RunOwner(folder, note) as owner:
        yield owner


def _train(
    config: RunConfig,
    started: float,
    owner: RunOwner | None,
    child_process: OwnProcess | None,
    at_end: ExitStack,
) -> int:
    """Trains, and returns the exit code. What is put on `at_end` is closed when a failure has been
    reported, so that others know its cause."""
    from megatron_kosmosg.monitoring.failure import forget_failure, raise_together
    from megatron_kosmosg.parallel import platform
    from megatron_kosmosg.planning.pipeline_balance import with_default_layout
    from megatron_kosmosg.planning.run_plan import plan_the_run
    from megatron_kosmosg.score.connect import join_as_score_rank, open_remote_score
    from megatron_kosmosg.score.rank import run_score_rank
    from megatron_kosmosg.score.wire import RunEnd
    from megatron_kosmosg.training.loop import fit
    from megatron_kosmosg.training.optimizer import check_optimizer

    config, planned = with_default_layout(config), None
    if find_rank_info().rank == 0:
        forget_failure(output_folder(config), started)
        planned = plan_the_run(config, find_rank_info().world_size)
    if platform.holds_unet_alone(config):
        rank = join_as_score_rank(config)
        assert child_process is not None
        child_process.has_joined(rank.start)
        finished = run_score_rank(config, rank)
    else:
        context = platform.initialize(config)
        raise_together(lambda: check_inputs(config))
        raise_together(lambda: check_optimizer(config, context.device))
        remote_score = open_remote_score(config, context)
        if remote_score is not None:
            at_end.callback(remote_score.close, RunEnd.FAILED)  # unless it is closed by then
        stage = build_stage(config, context, remote_score, build_evaluators(config))
        finished = fit(stage, config, context, owner, planned)
        if remote_score is not None:
            remote_score.close(RunEnd.DONE if finished else RunEnd.STOPPED)
    return exit_codes.DONE if finished else exit_codes.STOPPED


def check_inputs(config: RunConfig) -> None:
    """Raises ConfigError for what is missing, and for inputs that the run would write over."""
    from megatron_kosmosg.data.dataset_files import files_read, folders_read

    validate_files(config, stage_facts(config.stage))
    # Every rank asks; a run writes no file that could be a shard's.
    files = files_read(config, of_shards=False)
    refuse_to_run_over_inputs(config, files, folders_read(config))


def _quieten_libraries() -> None:
    """Hides what no user can act on: missing optional kernels, renamed collectives, a bar for
    every small file that is read."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from megatron_kosmosg.parallel import core_versions

    core_versions.quieten()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message=".*non-leaf Tensor.*", category=UserWarning)


if __name__ == "__main__":
    exit_codes.leave(main())
