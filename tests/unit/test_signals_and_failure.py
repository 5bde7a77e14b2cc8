"""Stop requests leave a note, a second Ctrl-C interrupts; the first failure is the one shown."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_kosmosg import exit_codes
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.data import images
from megatron_kosmosg.data.bad_images import TooManyBadImages
from megatron_kosmosg.data.blend import Blend
from megatron_kosmosg.data.images import ImageDecoder
from megatron_kosmosg.data.kinds import find_kind
from megatron_kosmosg.data.manifest import Manifest
from megatron_kosmosg.data.random_keys import KeyedPermutation
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.monitoring import signals
from megatron_kosmosg.monitoring.failure import (
    exit_code_of,
    forget_failure,
    report_failure,
    report_lost_rank,
)
from megatron_kosmosg.monitoring.signals import STOP_SIGNALS, StopRequest
from tests.support.data_helpers import build_dataset


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
    assert signal.getsignal(number) is before


def test_an_echo_is_ignored_and_a_later_interrupt_interrupts(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 1
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        now[0] += 4
        os.kill(os.getpid(), signal.SIGINT)


def test_own_work_is_left_at_once_and_later_work_is_not_begun():
    with StopRequest() as stop:
        assert stop.run_alone(lambda: 5) == 5
        done = []

        def work():
            os.kill(os.getpid(), signal.SIGUSR1)
            done.append("after the signal")

        assert stop.run_alone(work) is None and stop.received == signal.SIGUSR1
        assert stop.run_alone(lambda: done.append("another")) is None
        assert done == []
        os.kill(os.getpid(), signal.SIGTERM)  # outside such work, a note and no more


def raised(text: str) -> Exception:
    try:
        raise ValueError(text)
    except ValueError as error:
        return error


def test_only_the_first_failure_is_written_out(tmp_path, capsys):
    started = time.time() - 1
    assert report_failure(tmp_path, 3, raised("no memory"), started)
    first = capsys.readouterr().err
    assert "rank 3 failed" in first and "Traceback" in first
    assert not report_failure(tmp_path, 0, raised("connection lost"), started)
    late = capsys.readouterr().err
    assert "connection lost" not in late and "failure.txt" in late
    assert not report_failure(tmp_path, 5, raised("connection lost"), started)
    assert capsys.readouterr().err == ""  # a line for the run, not one a rank
    assert "no memory" in (tmp_path / "failure.txt").read_text()


def test_ranks_that_start_at_different_moments_know_this_run_s_failure_from_an_earlier_one(
    tmp_path, capsys
):
    now = time.time()
    report_failure(tmp_path, 3, raised("no memory"), now - 100)
    os.utime(tmp_path / "failure.txt", (now - 50, now - 50))
    # Rank 1 fails before rank 0 has come to forget the earlier run.
    assert report_failure(tmp_path, 1, ConfigError("no such device"), now - 10)
    assert capsys.readouterr().err.endswith("error: no such device\n")
    forget_failure(tmp_path, now - 5)
    assert not report_failure(tmp_path, 0, raised("nobody came"), now - 5)
    assert "no such device" in (tmp_path / "failure.txt").read_text()
    forget_failure(tmp_path, now + 60)
    assert not (tmp_path / "failure.txt").exists()


def test_errors_of_ranks_without_which_the_run_goes_on_are_all_kept(tmp_path, capsys):
    for name in ("score rank 2", "score rank 5"):
        report_lost_rank(tmp_path, name, raised(f"trouble of {name}"))
    kept = (tmp_path / "lost_ranks.txt").read_text()
    for text in (kept, capsys.readouterr().err):
        assert text.count("Traceback") == 2 and text.count("which does not end the run") == 2
        assert text.index("trouble of score rank 2") < text.index("score rank 5 on ")
    assert report_failure(tmp_path, 0, raised("no memory"), time.time())
    report_lost_rank(tmp_path / "nowhere", "score rank 2", raised("it is said all the same"))
    assert "it is said all the same" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_without_a_folder_to_agree_in_everyone_speaks(tmp_path, capsys, name):
    (tmp_path / "file").write_text("")
    forget_failure(tmp_path / name, time.time())
    assert report_failure(tmp_path / name, 2, raised("bad path"), time.time())
    assert "bad path" in capsys.readouterr().err


def test_an_error_about_the_input_is_one_line_and_the_file_has_the_traceback(tmp_path, capsys):
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["stage=align", "nonsense=1"])
    report_failure(tmp_path, 0, caught.value, time.time())
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert "Traceback" in (tmp_path / "failure.txt").read_text()


def caught(work: Callable[[], object], words: str) -> Exception:
    with pytest.raises(ValueError, match=words) as raised:
        work()
    return raised.value


def damaged(folder: Path) -> SampleStore:
    """A dataset whose last byte is missing."""
    prefix = build_dataset(folder, "caption", 2)
    data = Path(f"{prefix}.bin")
    data.write_bytes(data.read_bytes()[:-1])
    return SampleStore(prefix)


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda folder: Blend({}), "mixture is empty"),
        (damaged, "its index needs"),
        (lambda folder: Tokenizer(__file__), "is not a SentencePiece model"),
        (lambda folder: Manifest.read(Path(__file__)), "not a readable manifest"),
        (lambda folder: find_kind("txet"), "kind txet is not known"),
        (lambda folder: ImageDecoder("dali"), "nvidia-dali is not installed"),
    ],
)
def test_what_is_wrong_with_an_input_is_not_tried_again(tmp_path, monkeypatch, read, words):
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    error = caught(lambda: read(tmp_path), words)
    assert exit_code_of(error) == exit_codes.BAD_INPUT


def test_a_mistake_of_our_own_code_may_be_tried_again_and_shows_where_it_was(tmp_path, capsys):
    error = caught(lambda: KeyedPermutation(0, key=1), "at least one element")
    assert exit_code_of(error) == exit_codes.FAILURE
    report_failure(tmp_path, 0, error, time.time())
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_takes_nothing_more_is_said_as_that(tmp_path, capsys, code):
    error = OSError(code, os.strerror(code), "/runs/a/metrics.jsonl")
    report_failure(tmp_path, 0, error, time.time())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the disk takes nothing more")
    assert os.strerror(code) in line and "/runs/a/metrics.jsonl" in line


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (lambda: ConfigError("data.blend.x.path does not exist"), exit_codes.BAD_INPUT),
        (lambda: TooManyBadImages("4 undecodable images so far"), exit_codes.MISSED),
        (lambda: FloatingPointError("100 updates in a row"), exit_codes.MISSED),
        (KeyboardInterrupt, exit_codes.INTERRUPTED),
        (lambda: raised("of a library, or a mistake of ours"), exit_codes.FAILURE),
        (lambda: OSError(errno.ESTALE, "stale file handle"), exit_codes.FAILURE),
        (lambda: OSError(errno.ENOSPC, "no space left"), exit_codes.BAD_INPUT),
        (lambda: OSError(errno.EROFS, "read-only"), exit_codes.BAD_INPUT),
        (lambda: OSError(errno.EDQUOT, "over the quota"), exit_codes.BAD_INPUT),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error, code):
    assert exit_code_of(error()) == code


@pytest.mark.parametrize(
    ("code", "waits"), [(exit_codes.STOPPED, False), (exit_codes.BAD_INPUT, True)]
)
def test_a_stopped_process_does_not_wait_for_its_threads(code, waits):
    program = (
        "import threading, time\nfrom megatron_kosmosg import exit_codes\n"
        "def build():\n    time.sleep(0.5)\n    print('built', flush=True)\n"
        f"threading.Thread(target=build).start()\nprint('told')\nexit_codes.leave({code})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code and not done.stderr
    assert done.stdout.splitlines() == (["told", "built"] if waits else ["told"])
