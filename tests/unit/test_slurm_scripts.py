"""The job scripts with stand-ins for srun, sbatch and Python: what is started, requeued, stopped.

tests/integration/test_slurm.py runs the same scripts on a real Slurm.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_kosmosg import exit_codes

REPOSITORY = Path(__file__).parents[2]
SHARED = ("common.sh", "checks.sh", "limits.sh")
SCRIPTS = sorted(path for path in (REPOSITORY / "slurm").glob("*.sh") if path.name not in SHARED)
STAGES = [path for path in SCRIPTS if path.name.endswith("_256gpu.sh")]

SRUN = """#!/bin/bash
echo "$@" >>"$CALLS"
while [ $# -gt 0 ] && [ "${1#-}" != "$1" ]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then
    [ -z "${ENDS:-}" ] || echo "   StartTime=x EndTime=$(date -d "$ENDS" +%FT%T) Deadline=N/A"
else
    echo "$@" >>"$CALLS"
fi
"""
PYTHON = """#!/bin/bash
wait_for_signal() {
    trap "$1" USR1
    touch "$RUN.up"
    for i in $(seq 100); do sleep .1; done
}
case "$*" in
*--dry-run*)
    [ "${WAITS:-}" != dry ] || wait_for_signal 'trap - USR1; kill -USR1 $$'
    echo "given: $*"
    printf 'logging:\\n  output_dir: %s\\ncheckpoint:\\n  save: null\\n' "$RUN"
    exit "${DRY:-0}"
    ;;
*"preflight.py node"*)
    [ "${WAITS:-}" != preflight ] || wait_for_signal 'trap - USR1; kill -USR1 $$'
    exit "${FIT:-0}"
    ;;
*plan.py*)
    echo "its settings: parallel.pipeline_layout=decoder*2|M data.latent_cache=null"
    exit "${PLANNED:-0}"
    ;;
*preflight.py*) exit "${FIT:-0}" ;;
esac
[ -z "${NEXT:-}" ] || mkdir -p "$RUN/checkpoints/$NEXT"
[ -z "${FAILURE:-}" ] || echo "$FAILURE" >"$RUN/failure.txt"
[ -z "${WAITS:-}" ] || wait_for_signal 'exit 85'
exit "${CODE:-0}"
"""


@dataclass
class Cluster:
    """Stand-ins in `folder`; `run` plays one start of a job."""

    folder: Path
    calls: Path = field(init=False)

    def __post_init__(self) -> None:
        self.calls = self.folder / "calls"
        (self.folder / "venv" / "bin").mkdir(parents=True)
        for path, text in (("srun", SRUN), ("venv/bin/python", PYTHON), ("scontrol", SCONTROL)):
            (self.folder / path).write_text(text)
            (self.folder / path).chmod(0o755)

    @property
    def run_folder(self) -> Path:
        return self.folder / "run"

    def environment(self, **more: str) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "KOSMOSG"))}
        return inherited | {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "RUN": str(self.run_folder),
            "VIRTUAL_ENV": str(self.folder / "venv"),
            "SLURM_JOB_ID": "7",
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_NODELIST": "n[01-02]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_NTASKS_PER_NODE": "4",
            "SLURM_CPUS_PER_TASK": "3",
            "SLURM_GPUS_PER_NODE": "4",
            **more,
        }

    def run(self, *arguments: str, script: str = "pretrain_256gpu.sh", **more: str):
        self.calls.write_text("")
        return subprocess.run(
            ["bash", str(REPOSITORY / "slurm" / script), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.folder,
            env=self.environment(**more),
        )

    def was_requeued(self) -> bool:
        return "requeue 7" in self.calls.read_text()


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path)


def test_one_task_per_gpu_with_the_jobs_sizes_and_the_users_settings(cluster):
    done = cluster.run("--", "training.train_iters=5", "logging.output_dir=a b")
    assert done.returncode == 0 and "done" in done.stdout, done.stderr
    dry, node, network, train = cluster.calls.read_text().splitlines()
    assert "--dry-run --check-files parallel.world_size=8 training.train_iters=5" in dry
    assert "--nodes=1 --ntasks=1" in dry
    assert "preflight.py node" in node and "--gpus 4" in node and "--ntasks-per-node=1" in node
    assert "preflight.py network" in network
    assert "-m megatron_kosmosg.train --config examples/configs/pretrain_256gpu.yaml" in train
    assert "parallel.world_size=8 training.train_iters=5 logging.output_dir=a b" in train
    assert "--kill-on-bad-exit=0 --wait=120" in train and "--cpus-per-task=3" in train
    assert "torchrun" not in train and not cluster.was_requeued()


def test_values_of_a_sweep_may_be_quoted_and_nothing_in_them_runs(cluster):
    path = cluster.folder / "sweep"
    path.write_text(
        """logging.output_dir="a b" data.blend='{x: {path: "y z"}}' training.seed=$(touch MARK)\n"""
        "optimizer.lr='1\n"
    )
    cluster.run(f"--sweep={path}", f"--config={STAGES[0].parents[1]}/README.md")
    lines = cluster.calls.read_text().splitlines()
    trained = [line for line in lines if "train --config" in line][-1]
    assert "/README.md parallel" in trained and trained.endswith(
        """logging.output_dir=a b data.blend={x: {path: "y z"}} """
        "training.seed=$(touch MARK)"
    )
    assert not list(cluster.folder.rglob("MARK")) and not (REPOSITORY / "MARK").exists()
    ended = cluster.run("--sweep", str(path), SLURM_ARRAY_TASK_ID="2")
    assert ended.returncode == 2 and "quotes do not end" in ended.stderr


def test_the_fastest_layout_is_asked_for_and_taken_but_for_the_latents(cluster):
    arguments = ("--fastest", "--", "data.latent_cache=/l x", "training.seed=5")
    done = cluster.run(*arguments, KOSMOSG_GPU="a100-80")
    assert "planned for 8 x a100-80: parallel.pipeline_layout=decoder*2|M" in done.stdout
    plan, dry, *_, train = cluster.calls.read_text().splitlines()
    assert "--num-gpus 8 --gpu a100-80 --search --keep-targets data.latent_cache=/l x" in plan
    taken = "data.latent_cache=/l x training.seed=5 parallel.pipeline_layout=decoder*2|M"
    assert dry.endswith(taken) and train.endswith(taken)
    ended = cluster.run(*arguments, PLANNED="2")
    assert ended.returncode == 2 and len(cluster.calls.read_text().splitlines()) == 1


def test_an_array_task_takes_its_line_of_a_sweep(cluster):
    (cluster.folder / "sweep").write_text("optimizer.lr=1\noptimizer.lr=2 training.seed=5\n")
    sweep = ("--sweep", str(cluster.folder / "sweep"), "--", "training.train_iters=9")
    cluster.run(*sweep, SLURM_ARRAY_TASK_ID="2")
    train = cluster.calls.read_text().splitlines()[-1]
    assert train.endswith("training.train_iters=9 optimizer.lr=2 training.seed=5")
    ended = cluster.run(*sweep, SLURM_ARRAY_TASK_ID="3")
    assert ended.returncode == 2 and "no line 3" in ended.stderr


def test_a_container_takes_the_place_of_the_virtual_environment(cluster):
    settings = {"KOSMOSG_CONTAINER": "/images/kosmosg.sqsh", "KOSMOSG_MOUNTS": "/data:/data"}
    (cluster.folder / "python").symlink_to(cluster.folder / "venv" / "bin" / "python")
    assert cluster.run(KOSMOSG_PREFLIGHT="0", VIRTUAL_ENV="", **settings).returncode == 0
    for call in cluster.calls.read_text().splitlines():
        assert "--container-image=/images/kosmosg.sqsh" in call and " python -m " in call
        assert f"--container-mounts={REPOSITORY}:{REPOSITORY},/data:/data" in call


@pytest.mark.parametrize("code", [85, 1, 137], ids=["stopped", "crashed", "killed"])
def test_a_stop_and_a_crash_are_requeued(cluster, code):
    ended = cluster.run(CODE=str(code), NEXT="iter_0000004")
    assert ended.returncode == 0 and cluster.was_requeued()


@pytest.mark.parametrize("code", [exit_codes.BAD_INPUT, exit_codes.MISSED])
def test_an_error_that_would_come_again_is_not_requeued(cluster, code):
    ended = cluster.run(CODE=str(code), NEXT="iter_0000004")
    assert ended.returncode == code and not cluster.was_requeued()
    assert "same error would come again" in ended.stdout


@pytest.mark.parametrize("error", ["FloatingPointError: 100 updates in a row", "config"])
def test_a_rank_killed_beside_such_an_error_does_not_hide_it(cluster, error):
    text = error.replace("config", "megatron_kosmosg.config.errors.ConfigError: no such file")
    ended = cluster.run(CODE="137", FAILURE=text)
    assert ended.returncode == 137 and not cluster.was_requeued()
    assert "same error would come again" in ended.stdout


def test_a_crash_loop_without_progress_ends_and_one_with_progress_does_not(cluster):
    limit = {"KOSMOSG_MAX_STALLED_STARTS": "2", "CODE": "1"}
    for restart in range(4):
        cluster.run(SLURM_RESTART_COUNT=str(restart), NEXT=f"iter_{restart:07d}", **limit)
        assert cluster.was_requeued(), restart
    requeued = []
    for restart in range(4, 8):
        ended = cluster.run(SLURM_RESTART_COUNT=str(restart), **limit)
        requeued.append(cluster.was_requeued())
        if not requeued[-1]:
            break
    assert requeued == [True, True, False] and ended.returncode == 1
    assert "no new checkpoint after iteration 3" in ended.stdout
    # Slurm itself requeues after the loss of a node: the next start counts, too.
    again = cluster.run(SLURM_RESTART_COUNT="9", **limit)
    assert again.returncode == 1 and "-m megatron_kosmosg.train --config" not in str(
        [c for c in cluster.calls.read_text().splitlines() if "--dry-run" not in c]
    )
    assert cluster.run(**limit).returncode == 0 and cluster.was_requeued()  # submitted anew


def test_half_a_checkpoint_is_no_progress(cluster):
    cluster.run(CODE="1", NEXT="iter_0000002")
    cluster.run(CODE="1", SLURM_RESTART_COUNT="1", NEXT="iter_0000004.tmp")
    cluster.run(CODE="1", SLURM_RESTART_COUNT="2")
    assert (cluster.run_folder / "slurm_starts").read_text() == "2 1\n"


@pytest.mark.parametrize(
    "planted", ["2 before[$(touch MARK)]", "before[$(touch MARK)] 0", "$(touch MARK)", "", "2 -1"]
)
def test_nothing_that_stands_in_the_run_folder_is_run(cluster, planted):
    mark = cluster.folder / "code-ran"
    cluster.run_folder.mkdir()
    (cluster.run_folder / "slurm_starts").write_text(planted.replace("MARK", str(mark)) + "\n")
    cluster.run(CODE="1", SLURM_RESTART_COUNT="1", NEXT="iter_0000002")
    assert not mark.exists() and cluster.was_requeued()
    assert (cluster.run_folder / "slurm_starts").read_text() in ("0 0\n", "2 0\n")


def test_numbers_of_the_environment_are_digits(cluster):
    mark = cluster.folder / "code-ran"
    ended = cluster.run(
        SLURM_JOB_NUM_NODES=f"x[$(touch {mark})]", KOSMOSG_MAX_STALLED_STARTS=f"x[$(touch {mark})]"
    )
    assert ended.returncode == 0 and not mark.exists()


def test_shellcheck_finds_nothing():
    scripts = [*(REPOSITORY / "slurm").glob("*.sh"), *(REPOSITORY / "tests").glob("*.sh")]
    scripts += (REPOSITORY / "examples").glob("*.sh")
    found = subprocess.run(
        ["shellcheck", "-x", "-P", "SCRIPTDIR", *scripts],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("when", ["dry", "preflight", "training"])
@pytest.mark.parametrize(
    ("number", "requeued", "code"),
    [(signal.SIGUSR1, True, 0), (signal.SIGTERM, False, 85)],
    ids=["usr1", "term"],
)
def test_a_signal_to_the_batch_shell_reaches_the_tasks(cluster, number, requeued, code, when):
    """Before training, the program of the step does not listen for it and dies of it."""
    process = subprocess.Popen(
        ["bash", str(REPOSITORY / "slurm" / "align_256gpu.sh")],
        env=cluster.environment(WAITS=when),
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (cluster.folder / "run.up").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code, output
    assert cluster.was_requeued() == requeued
    steps = [call for call in cluster.calls.read_text().splitlines() if "requeue" not in call]
    assert len(steps) == {"dry": 1, "preflight": 2, "training": 4}[when], steps


@pytest.mark.parametrize("seconds", [4, -5])
def test_tasks_are_warned_before_the_job_s_own_limit(cluster, seconds):
    """Within half of a limit of seconds, at once where it is over."""
    ends = time.strftime("%FT%T", time.localtime(time.time() + seconds))
    ended = cluster.run(WAITS="training", ENDS=ends)
    assert "signal USR1" in ended.stdout and "exit code 85: requeued" in ended.stdout
    assert ended.returncode == 0 and cluster.was_requeued()


def test_a_long_limit_warns_nobody_who_is_done_before(cluster):
    ended = cluster.run(ENDS="2 days")
    assert ended.returncode == 0 and "signal" not in ended.stdout


@pytest.mark.parametrize(
    "phases",
    [("dry",) * 3, ("training",) * 3, ("dry", "training", "dry"), ("training", "dry", "training")],
    ids="-".join,
)
def test_the_third_start_without_time_for_an_iteration_ends_the_job(cluster, phases):
    """Also where the signal comes before the run's folder is known, as Python may start slowly."""
    requeued = []
    for restart, when in enumerate(phases):
        ended = cluster.run(SLURM_RESTART_COUNT=str(restart), WAITS=when, ENDS="-1 second")
        requeued.append(cluster.was_requeued())
        (cluster.folder / "run.up").unlink(missing_ok=True)
    assert requeued == [True, True, False] and ended.returncode == exit_codes.FAILURE
    assert "the time limit is too short for a start, one iteration and one save" in ended.stdout
    assert not list(cluster.folder.glob(".slurm_starts*"))


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("--time=5", "warning: the time limit of 300 s leaves a start 240 s"),
        ("--time=1-00:00:00", "time limit 86400 s: tasks are told to save 600 s before"),
        ("--time=00:50:00", "time limit 3000 s: tasks are told to save 300 s before"),
    ],
)
def test_a_check_says_what_the_limit_leaves(cluster, limit, words):
    assert words in cluster.run("--check", limit, SLURM_JOB_ID="").stdout


def test_tasks_see_what_the_scripts_set_whatever_sbatch_exports(cluster):
    (cluster.folder / "srun").write_text(SRUN.replace("echo", 'env >"$CALLS.env"; echo', 1))
    cluster.run(SLURM_EXPORT_ENV="NONE")
    seen = Path(f"{cluster.calls}.env").read_text()
    assert "SLURM_EXPORT_ENV=ALL" in seen and "PYTHONUNBUFFERED=1" in seen


def test_a_run_folder_that_cannot_be_written_ends_the_job(cluster):
    cluster.run_folder.parent.mkdir(exist_ok=True)
    cluster.run_folder.write_text("a file, as a read-only disk for root's tests\n")
    ended = cluster.run()
    assert ended.returncode == exit_codes.BAD_INPUT and not cluster.was_requeued()
    assert f"{cluster.run_folder} cannot be written" in ended.stderr


def test_a_signal_that_only_the_tasks_get_before_training_is_a_stop_request(cluster):
    assert cluster.run(DRY="138").returncode == 0 and cluster.was_requeued()
    assert cluster.run(FIT="138").returncode == 0 and cluster.was_requeued()


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"DRY": "2"}, exit_codes.BAD_INPUT, ""),
        ({"FIT": "1"}, exit_codes.FAILURE, "--exclude=NODE"),
    ],
)
def test_a_bad_layout_or_node_ends_the_job_before_training(cluster, settings, code, words):
    ended = cluster.run(**settings)
    assert ended.returncode == code and words in ended.stdout and not cluster.was_requeued()
    trained = [c for c in cluster.calls.read_text().splitlines() if "train --config" in c]
    assert all("--dry-run" in call for call in trained)


@pytest.mark.parametrize(
    ("arguments", "job", "words"),
    [
        ((), "", "bash .*pretrain_256gpu.sh --check"),
        (("--nodes=4",), "7", "sbatch --nodes=4 SCRIPT"),
        (("training.train_iters=5",), "7", "after --"),
        (("--config",), "7", "needs a file"),
        (("--chekc",), "", "--chekc: not an option of this script"),
        (("--check", "--nodes", "16"), "", "as one word, --name=value"),
    ],
)
def test_wrong_arguments_say_what_to_write(cluster, arguments, job, words):
    ended = cluster.run(*arguments, SLURM_JOB_ID=job)
    assert ended.returncode == 2 and re.search(words, ended.stderr), ended.stderr


def test_help_needs_no_python_and_names_this_script(cluster):
    for script in SCRIPTS:
        checked = subprocess.run(
            ["bash", script.name, "--help"],
            capture_output=True,
            text=True,
            cwd=script.parent,
            env=cluster.environment(VIRTUAL_ENV="/no/such/venv", SLURM_JOB_ID=""),
        )
        assert checked.returncode == 0 and not checked.stderr
        assert f"sbatch slurm/{script.name}" in checked.stdout.replace(" --nodes=16", "")
        assert "--check" in checked.stdout and "set -uo" not in checked.stdout


SBATCH = """#!/bin/bash
echo "$@" >>"$CALLS"
echo "${ANSWER:-Job 8 to start at 2026-01-01T00:00:00 using 32 processors}" >&2
[ -z "${ANSWER:-}" ]
"""


def test_a_check_before_sbatch_is_of_the_size_that_sbatch_is_asked_for(cluster):
    (cluster.folder / "sbatch").write_text(SBATCH)
    (cluster.folder / "sbatch").chmod(0o755)
    checked = cluster.run("--check", "--nodes=4", "--", "training.seed=5", SLURM_JOB_ID="")
    assert checked.returncode == 0, checked.stderr
    assert "parallel.world_size=32 training.seed=5" in checked.stdout
    call = cluster.calls.read_text()
    assert call == f"--test-only --nodes=4 {REPOSITORY}/slurm/pretrain_256gpu.sh\n"
    checked = cluster.run("--check", SLURM_JOB_ID="")
    assert "parallel.world_size=256" in checked.stdout and "to start at" in checked.stdout
    alone = {"ANSWER": "Unable to contact slurm controller", "SLURM_JOB_ID": ""}
    checked = cluster.run("--check", **alone)
    assert checked.returncode == 2 and "from a login node" in checked.stderr


def test_no_python_says_what_to_set(cluster):
    ended = cluster.run(VIRTUAL_ENV="/no/such/venv")
    assert ended.returncode == 2 and "KOSMOSG_VENV" in ended.stderr


def test_tools_go_on_after_an_interruption_and_keep_their_own_errors(cluster):
    arguments = ("--", "--kind", "text")
    assert cluster.run(*arguments, script="preprocess_mpi.sh").returncode == 0
    (call,) = cluster.calls.read_text().splitlines()
    assert (
        "--mpi=pmi2" in call
        and "--kill-on-bad-exit=0" not in call
        and call.endswith("tools/preprocess_data.py --kind text")
    )
    cluster.run(*arguments, script="preprocess_mpi.sh", CODE="138")
    assert cluster.was_requeued()
    cluster.run(*arguments, script="preprocess_mpi.sh", SLURM_RESTART_COUNT="1")
    assert cluster.calls.read_text().endswith("--kind text --resume\n")
    ended = cluster.run(*arguments, script="cache_latents.sh", CODE="2")
    assert ended.returncode == 2 and not cluster.was_requeued()
    (call,) = cluster.calls.read_text().splitlines()
    assert call.index("--kill-on-bad-exit=1") < call.index("--kill-on-bad-exit=0")  # the last wins


def test_an_evaluation_by_its_name_generates_and_then_scores_on_all_tasks(cluster):
    arguments = ("--", "--model", "/runs/x y", "--output", "o")
    assert cluster.run("dreambench", *arguments, script="evaluate.sh").returncode == 0
    calls = cluster.calls.read_text().splitlines()
    assert len(calls) == 2 and all("--kill-on-bad-exit=0" in call for call in calls)
    for call, step in zip(calls, ("generate", "score"), strict=True):
        assert call.endswith(
            f"tools/evaluate_dreambench.py --model /runs/x y --output o --only {step}"
        )
    cluster.run("coco", *arguments, script="evaluate.sh", CODE="2")
    assert "coco" in cluster.calls.read_text() and "--only score" not in cluster.calls.read_text()
    cluster.run("coco", *arguments, "--only=score", script="evaluate.sh")
    assert cluster.calls.read_text().endswith("--output o --only=score\n")
    for name, tool in (("pairs", "evaluate_pairs"), ("toy", "evaluate_toy")):
        cluster.run(name, *arguments, script="evaluate.sh")
        assert cluster.calls.read_text().endswith(f"tools/{tool}.py --model /runs/x y --output o\n")
    cluster.run(*arguments, script="evaluate.sh", KOSMOSG_EVALUATION="evaluate_coco")
    assert cluster.calls.read_text().endswith(
        "tools/evaluate_coco.py --model /runs/x y --output o\n"
    )
    wrong = cluster.run("dreambnch", *arguments, script="evaluate.sh")
    assert wrong.returncode == 2 and "there are toy, dreambench, coco and pairs" in wrong.stderr


def test_a_tool_that_is_killed_every_time_is_given_up(cluster):
    killed = {"script": "cache_latents.sh", "CODE": "137"}
    requeued = []
    for restart in range(5):
        ended = cluster.run("--", SLURM_RESTART_COUNT=str(restart), **killed)
        requeued.append(cluster.was_requeued())
    assert requeued == [True, True, True, False, False] and ended.returncode == 137
    stopped = killed | {"CODE": "138"}  # by USR1: as often as somebody asks
    cluster.run("--", SLURM_RESTART_COUNT="9", **stopped)
    assert cluster.was_requeued()


def test_the_scripts_know_the_exit_codes_of_the_package():
    text = (REPOSITORY / "slurm" / "common.sh").read_text()
    found = {name: int(code) for name, code in re.findall(r"\bEXIT_([A-Z_]+)=(\d+)", text)}
    assert found == {name: getattr(exit_codes, name) for name in found}
    assert {"BAD_INPUT", "MISSED", "STOPPED"} <= set(found)


def test_all_scripts_find_the_project_alike():
    blocks = {
        re.search(r"# sbatch runs.*?common.sh\"\n\n", s.read_text(), re.S)[0] for s in SCRIPTS
    }
    assert len(SCRIPTS) == 7 and len(blocks) == 1


@pytest.mark.parametrize("script", STAGES, ids=lambda path: path.stem)
def test_stage_scripts_ask_for_32_nodes_of_8_gpus_and_a_second_chance(script):
    text = script.read_text()
    for option in ("nodes=32", "ntasks-per-node=8", "gpus-per-node=8", "requeue"):
        assert f"#SBATCH --{option}" in text, option
    assert "--signal" not in text  # limits.sh places the warning by the job's own limit
    assert f"examples/configs/{script.stem}.yaml" in text


def test_every_variable_that_is_set_or_read_is_explained():
    explained = (REPOSITORY / "slurm" / "README.md").read_text()
    code = "".join(path.read_text() for path in (REPOSITORY / "slurm").glob("*.sh"))
    is_set = set(re.findall(r"export ([A-Z_]+)=\$\{\1:-", code))
    is_read = set(re.findall(r"\$\{(KOSMOSG_[A-Z_]+)", code))
    assert {"NCCL_DEBUG", "OMP_NUM_THREADS"} <= is_set and len(is_read) >= 10
    assert not [name for name in sorted(is_set | is_read) if name not in explained]
