"""What is shown of long work, on a terminal and in a log."""

import io

import pytest

from megatron_kosmosg import progress
from megatron_kosmosg.progress import LOG_SECONDS, Progress


class Screen(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.fixture
def clock(monkeypatch):
    """[seconds], of the lines."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def every_state(monkeypatch):
    """Of a bar is shown."""
    monkeypatch.setattr(progress, "TERMINAL_SECONDS", 0.0)


def test_a_terminal_gets_one_bar_that_is_rewritten(every_state):
    screen = Screen(True)
    show = Progress("shards", "shard", stream=screen)
    for done in range(11):
        show(done, 10, f"{done} rejected")
    text = screen.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n") and text.count("\r") >= 10
    last = text.split("\r")[-1]
    assert last.startswith("shards: 100%|") and "10/10" in last and "10 rejected" in last


def test_a_log_gets_whole_lines_now_and_then(clock):
    log = Screen(False)
    show = Progress("shards", "shard", stream=log)
    for done in range(101):
        clock[0] = done * LOG_SECONDS / 40
        show(done, 100, f"{done} rejected")
    text = log.getvalue()
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    first, second, last = text.splitlines()
    assert first.startswith("shards: 40% 40/100") and second.startswith("shards: 80% 80/100")
    assert first.endswith("1.33shard/s, 00:45 left, 40 rejected")
    assert last.startswith("shards: 100% 100/100") and "00:00 left" in last


def test_what_was_done_before_does_not_count_for_the_rate(clock):
    log = Screen(False)
    show = Progress("", "image", stream=log)
    show(900, 1000)
    clock[0] = 100.0
    show(950, 1000)
    assert log.getvalue() == "95% 950/1000,  2.00s/image, 01:40 left\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_closed_in_the_middle_what_follows_has_a_line_of_its_own(is_terminal, every_state, clock):
    screen = Screen(is_terminal)
    with pytest.raises(ValueError), Progress("x", stream=screen) as show:
        show(0, 10)
        clock[0] = LOG_SECONDS
        show(3, 10)
        raise ValueError
    assert "3/10" in screen.getvalue() and screen.getvalue().endswith("\n")
    before = screen.getvalue()
    show.close()
    assert screen.getvalue() == before


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_total_that_grows(is_terminal, every_state, clock):
    screen = Screen(is_terminal)
    show = Progress("x", stream=screen)
    show(0, 10)
    for done, total in ((5, 10), (9, 20), (20, 20)):
        clock[0] += LOG_SECONDS
        show(done, total)
    shown = screen.getvalue()
    assert [part in shown for part in ("5/10", "9/20", "20/20", "10/10")] == [True] * 3 + [False]
    assert show.total == 20


def test_the_next_work_starts_its_own_clock(clock):
    log = Screen(False)
    show = Progress("", "B", stream=log)
    for total in (10_000, 4_000_000):
        show(0, total)
        clock[0] += 2.0
        show(total, total)
        clock[0] += 1000.0
    assert log.getvalue().splitlines() == [
        "100% 10.0k/10.0k, 5.00kB/s, 00:00 left",
        "100% 4.00M/4.00M, 2.00MB/s, 00:00 left",
    ]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_no_work_and_work_that_is_over_at_once_show_nothing(is_terminal, clock):
    screen = Screen(is_terminal)
    show = Progress("x", stream=screen, delay=1.0)
    show(0, 10)
    show(10, 10)
    Progress("x", stream=screen)(0, 0)
    Progress("x", stream=screen, is_shown=False)(10, 10)
    assert not screen.getvalue()


def test_several_processes_on_a_terminal_get_lines():
    screen = Screen(True)
    Progress("rank 1", stream=screen, is_shared=True)(10, 10)
    assert "\r" not in screen.getvalue() and screen.getvalue().count("\n") == 1


def test_the_stream_is_found_when_work_begins(capsys):
    Progress("late", "sample")(10, 10)
    output = capsys.readouterr()
    assert output.err.startswith("late: 100% 10/10") and not output.out


def test_a_line_of_the_caller_stands_above_the_bar(every_state, capsys):
    screen = Screen(True)
    show = Progress("x", stream=screen)
    show(1, 10)
    show.write("loss 3")
    show(2, 10)
    show.close()
    assert capsys.readouterr().out.endswith("loss 3\n")
    show.write("later")
    assert capsys.readouterr().out == "later\n"
