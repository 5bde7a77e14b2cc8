"""torchrun on two machines, which here are one: the training command under its agents."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_kosmosg.checkpoint.folder import latest_valid
from tests.support.ranks import free_port
from tests.support.toy_runs import REPOSITORY, arguments_of, records, write_data


@pytest.mark.timeout(400)
def test_two_agents_train_one_run(tmp_path):
    write_data(tmp_path, ("text", "caption", "interleaved"))
    line = arguments_of("pretrain", tmp_path, tmp_path / "run", None, "training.train_iters=2")
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    where = ["--master-addr=127.0.0.2", f"--master-port={free_port()}"]
    variables = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    machines = []
    for number in range(2):
        command = [*agent, f"--node-rank={number}", *where, "-m", "megatron_kosmosg.train", *line]
        log = (tmp_path / f"machine{number}").open("w")
        started = subprocess.Popen(
            command, cwd=REPOSITORY, env={**os.environ, **variables}, stdout=log, stderr=log
        )
        machines.append((started, Path(log.name)))
    codes = [machine.wait(timeout=300) for machine, _ in machines]
    assert codes == [0, 0], "\n".join(log.read_text() for _, log in machines)
    updates = [(number, lr) for number, _, _, lr, *_ in records(tmp_path / "run") if lr is not None]
    assert [number for number, _ in updates] == [1, 2]
    assert latest_valid(tmp_path / "run" / "checkpoints").name == "iter_0000002"
