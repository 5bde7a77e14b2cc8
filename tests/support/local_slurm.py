"""A real Slurm on this machine for tests: munged, slurmctld and one slurmd per fake node.

Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge. The daemons are children
of the test process, everything they write is in one folder; /etc/hosts gets a marked block with the
names of the nodes, which `stop` takes out again.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.ranks import free_port

COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged")
HOSTS = Path("/etc/hosts")

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job may not start before its old credential has expired (120 s by default).
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
# No control groups and no binding, which a container does not allow.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5,batch_sched_delay=1
EnforcePartLimits=ALL
ReturnToService=2
JobRequeue=1
KillWait=10
MessageTimeout=60
SlurmdTimeout=300
TreeWidth=64
# Believe the node lines rather than the hardware: two cores pose as any number.
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=1-00:00:00 DefaultTime=00:10:00 State=UP \
    PriorityTier=2 PreemptMode=OFF
PartitionName=lab Nodes=ALL AllowAccounts=lab State=UP PriorityTier=2 PreemptMode=OFF
# Its jobs give way to those of the others: TERM, and a minute later the end.
PartitionName=spare Nodes=ALL State=UP PriorityTier=1 GraceTime=60
"""


def why_not() -> str | None:
    """What this machine lacks for a Slurm of its own, or None."""
    missing = [name for name in COMMANDS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"no {', '.join(missing)} (apt-get install slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "slurmd needs root"
    return None


class LocalSlurm:
    """Nodes n01, n02, ...; each claims 64 CPUs and `gpus` GPUs. Use as a context manager."""

    def __init__(self, folder: Path, num_nodes: int, gpus: int = 8) -> None:
        self.folder = folder
        self.nodes = [f"n{number:02d}" for number in range(1, num_nodes + 1)]
        self._gpus = gpus
        self._daemons: dict[str, subprocess.Popen] = {}
        # pytest's folders have long names; a socket's may have 107 letters only.
        assert len(str(folder / "munge.socket")) < 107, folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": _path(),
        }

    def __enter__(self) -> LocalSlurm:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, *command: str, **settings) -> subprocess.CompletedProcess[str]:
        """A client command; output is captured. settings: of subprocess.run."""
        environment = {**self.environment, **settings.pop("env", {})}
        return subprocess.run(
            command, env=environment, text=True, capture_output=True, timeout=120, **settings
        )

    def submit(self, *arguments: str, **settings) -> str:
        """The id of the job that `sbatch arguments` made."""
        answer = self.run("sbatch", "--parsable", *arguments, **settings)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout.strip().split(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number).stdout
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def output(self, number: str) -> str:
        """What a job, or all tasks of an array, wrote so far."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number).stdout
        files = [field for field in shown.split() if field.startswith("StdOut=")]
        paths = [Path(file.removeprefix("StdOut=")) for file in files]
        return "".join(path.read_text() for path in paths if path.exists())

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = 300) -> None:
        """Returns when the condition holds. Raises TimeoutError with the state of the cluster."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {seconds} s not yet: {what}\n{self._state()}")
            time.sleep(0.3)

    def finish(self, number: str, state: str = "COMPLETED", seconds: float = 300) -> str:
        """What the job wrote, when it has ended. Raises AssertionError if not in this state."""
        unfinished = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"}

        def has_ended() -> bool:
            job = self.job(number)
            if job["Reason"] == "DependencyNeverSatisfied":
                raise AssertionError(f"job {number} will never start\n{self._state()}")
            return job["JobState"] not in unfinished

        self.wait_until(has_ended, f"end of job {number}", seconds)
        reached, written = self.job(number)["JobState"], self.output(number)
        if reached != state:
            raise AssertionError(f"job {number} ended as {reached}:\n{written}")
        return written

    def _state(self) -> str:
        """Queue and nodes, and the end of what every job wrote that is not complete."""
        shown = self.run("squeue").stdout + self.run("sinfo", "-N", "-l").stdout
        for line in self.run("scontrol", "--oneliner", "show", "job").stdout.splitlines():
            if "JobState=COMPLETED" not in line and line.startswith("JobId="):
                number = line.split()[0].removeprefix("JobId=")
                shown += f"\n--- job {number}\n{self.output(number)[-4000:]}"
        return shown

    def processes(self, node: str) -> list[int]:
        """Processes of jobs on this node: batch scripts, their srun, tasks and slurmstepd."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                is_ours = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode() in variables
                if is_ours and f"SLURMD_NODENAME={node}".encode() in variables:
                    found.add(int(folder.name))
                    if _name(parent) == "slurmstepd":
                        found.add(parent)
            except (OSError, IndexError):
                continue  # it ended meanwhile
        return sorted(found)

    def kill_node(self, node: str) -> None:
        """SIGKILL to its slurmd and all that runs on it, as if the power had failed.

        The node is marked down, as slurmctld does by itself after SlurmdTimeout: a node that is
        back sooner than that need not be noticed at all, and its job would hang.
        """
        self._daemons[node].kill()
        self._daemons.pop(node).wait()
        for process in self.processes(node):
            _signal(process, signal.SIGKILL)
        marked = self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=killed")
        assert marked.returncode == 0, marked.stderr

    def start_node(self, node: str) -> None:
        (self.folder / "spool" / node).mkdir(parents=True, exist_ok=True)
        self._run_daemon(node, "slurmd", "-D", "-N", node)

    def stop(self) -> None:
        """Ends all jobs and daemons, and takes the block out of /etc/hosts."""
        if "slurmctld" in self._daemons:
            numbers = self.run("squeue", "-h", "-o", "%A").stdout.split()
            if numbers:
                self.run("scancel", *numbers)
                time.sleep(1)
        for node in self.nodes:
            for process in self.processes(node):
                _signal(process, signal.SIGKILL)
        for daemon in self._daemons.values():
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        self._write_hosts([])

    def _start(self) -> None:
        for name in ("state", "spool", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._write_hosts(self.nodes)
        self._write_config()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.folder.chmod(0o755)
        self._run_daemon(
            "munged", "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket",
            f"--key-file={key}", f"--pid-file={self.folder}/munged.pid",
            f"--seed-file={self.folder}/munge.seed", f"--log-file={self.folder}/munged.log",
        )  # fmt: skip
        self.wait_until((self.folder / "munge.socket").exists, "munged", 60)
        self._run_daemon("slurmctld", "slurmctld", "-D", "-i")
        self.wait_until(lambda: "UP" in self.run("scontrol", "ping").stdout, "slurmctld", 60)
        for node in self.nodes:
            self.start_node(node)
        self.wait_until(
            lambda: (
                self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").stdout.split()
                == ["idle"] * len(self.nodes)
            ),
            "all nodes idle",
            180,
        )

    def _run_daemon(self, key: str, program: str, *arguments: str) -> None:
        with (self.folder / f"{key}.out").open("ab") as log:
            self._daemons[key] = subprocess.Popen(
                [program, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def _write_config(self) -> None:
        host = socket.gethostname().split(".")[0]
        gres = f"Gres=gpu:{self._gpus}" if self._gpus else ""
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=64 "
            f"RealMemory=1000000 {gres} State=UNKNOWN"
            for node in self.nodes
        ]
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(host=host, port=free_port(), folder=self.folder, nodes="\n".join(lines))
        )
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\nConstrainDevices=no\n")
        devices = [self.folder / "dev" / f"gpu{number}" for number in range(self._gpus)]
        for device in devices:  # twins of /dev/null; plain files would be counted but not assigned
            os.mknod(device, 0o600 | 0o020000, os.makedev(1, 3))
        files = f"{self.folder}/dev/gpu[0-{self._gpus - 1}]"
        names = f"n[01-{len(self.nodes):02d}]"
        line = f"NodeName={names} Name=gpu File={files}\n" if self._gpus else ""
        (self.folder / "gres.conf").write_text(line)

    def _write_hosts(self, names: list[str]) -> None:
        begin, end = (f"# {which} of the nodes of {self.folder}" for which in ("begin", "end"))
        kept, inside = [], False
        for line in HOSTS.read_text().splitlines():
            inside = inside or line == begin
            if not inside:
                kept.append(line)
            inside = inside and line != end
        block = [begin, *(f"127.0.0.1 {name}" for name in names), end] if names else []
        text = "\n".join([*kept, *block]) + "\n"
        if text != HOSTS.read_text():
            HOSTS.write_text(text)  # in place: it may be a mount


def die_with_parent() -> None:
    """For a child process: SIGKILL when its parent ends in whatever way (Linux only)."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


def _name(process: int) -> str:
    return Path(f"/proc/{process}/comm").read_text().strip()


def _signal(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return
