"""`kosmosg score-rank`: what it does when the run that it works for ends without a word."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_kosmosg.cli import score_rank
from megatron_kosmosg.config.load import load_config, to_yaml
from megatron_kosmosg.score import connect, rank, run_file
from megatron_kosmosg.score.member import DecoderLost
from megatron_kosmosg.score.wire import RunEnd

SILENT = "the decoder rank of replica 0 at tcp://n01:7 has said nothing for 600 s"


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run that can be joined."""
    settings = [f"logging.output_dir={tmp_path}", "score.placement=dedicated"]
    text = to_yaml(load_config("debug_instruct", settings))
    (tmp_path / "config.yaml").write_text(text)
    publish(tmp_path, "first")
    return tmp_path


def publish(folder: Path, start: str) -> None:
    text = (folder / "config.yaml").read_text()
    run_file.publish(folder, run_file.RunAddress(start, run_file.config_hash(text), "", "", ()))


@pytest.mark.parametrize("is_started_again", [False, True])
def test_a_joined_rank_whose_run_is_lost_waits_for_the_next_start(
    run, is_started_again, monkeypatch, capsys
):
    worked_for = []

    def join(config, address, device) -> SimpleNamespace:
        worked_for.append(address.start)
        return SimpleNamespace(membership=SimpleNamespace(end=RunEnd.DONE))

    def work(config, joined) -> bool:
        if len(worked_for) == 1:
            if is_started_again:
                publish(run, "second")
            raise DecoderLost(SILENT)
        return True

    monkeypatch.setattr(connect, "join_as_guest", join)
    monkeypatch.setattr(rank, "run_score_rank", work)
    code = score_rank.main(["--run", str(run), "--wait", "1"])
    said = capsys.readouterr().err
    assert f"{SILENT}; waiting for the next start of the run" in said
    if is_started_again:
        assert (code, worked_for) == (0, ["first", "second"])
    else:
        assert (code, worked_for) == (1, ["first"])
        assert f"error: {run}: no start of the run to join" in said
