"""The report page: complete, self-contained, honest about misses, and robust to what is absent."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from megatron_kosmosg.toy.report.charts import stage_chart
from megatron_kosmosg.toy.report.history import read_history, smooth
from megatron_kosmosg.toy.report.report_inputs import read_inputs
from megatron_kosmosg.toy.report.report_page import write_report
from megatron_kosmosg.toy.report.sections import conclusion, duration
from tests.support.report_files import ROW, write_metrics, write_run


def test_the_page_needs_no_other_file(tmp_path):
    write_run(tmp_path, [ROW])
    page = write_report(tmp_path).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#|https://arxiv\.org/)([^"]*)"', page)
    assert len(re.findall(r'<img src="data:image/svg\+xml', page)) == 3
    assert len(re.findall(r'<img src="data:image/png', page)) == 1
    assert list(tmp_path.glob("*.tmp")) == []


def test_the_page_shows_values_labels_commands_and_escapes_them(tmp_path):
    write_run(tmp_path, [ROW])
    page = write_report(tmp_path).read_text()
    for text in ("6.25", "hue &lt;median&gt;", "a &lt;image&gt; on red", "shown &amp; drawn"):
        assert text in page
    assert "python -m x &#39;a b&#39;" in page
    assert "1 min 15 s" in page


SCRIPT = "<script>alert(1)</script>"


def marked(value: object) -> object:
    """The same, with an HTML element behind every text but names of files and of the mode."""
    if isinstance(value, dict):
        kept = {"file", "mode", "direction"}
        return {name: v if name in kept else marked(v) for name, v in value.items()}
    if isinstance(value, list):
        return [marked(v) for v in value]
    return value + SCRIPT if isinstance(value, str) else value


def test_no_text_of_the_files_is_markup(tmp_path):
    # c9c3073 put `machine.system` on the page as it stood.
    write_run(tmp_path, [ROW, ROW | {"passed": False}])
    files = ("quickstart.json", "evaluation/images.json", "evaluation/metrics.json")
    for path in (tmp_path / name for name in files):
        path.write_text(json.dumps(marked(json.loads(path.read_text()))))
    page = write_report(tmp_path).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 15


def test_a_page_holds_no_file_from_elsewhere(tmp_path):
    # c9c3073 embedded whatever images.json named, and whatever a link led to.
    secret = tmp_path / "secret"
    secret.write_text("a private key")
    out = tmp_path / "out"
    write_run(out, [ROW])
    listing = out / "evaluation" / "images.json"
    (out / "evaluation" / "link.png").symlink_to(secret)
    (out / "evaluation" / "text.png").write_text("no picture")
    for name in (str(secret), "../../secret", "link.png", "text.png"):
        listing.write_text(json.dumps([{"file": name, "title": "a", "caption": "b"}]))
        with pytest.raises(ValueError, match="lies outside|is no PNG"):
            write_report(out)
    assert not (out / "report.html").exists()


@pytest.mark.parametrize(
    "file, content",
    [
        ("quickstart.json", {"steps": [{"name": "pretrain"}]}),
        ("quickstart.json", {"machine": {"system": ["Linux"]}}),
        ("quickstart.json", []),
        ("evaluation/metrics.json", {"rows": [{"group": "a"}]}),
        ("evaluation/metrics.json", {"rows": [3]}),
        ("evaluation/images.json", [{"file": 3}]),
    ],
)
def test_files_that_no_quickstart_writes_are_refused(tmp_path, file, content):
    write_run(tmp_path, [ROW])
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no quickstart writes"):
        write_report(tmp_path)


def test_the_bar_runs_from_chance_to_ceiling(tmp_path):
    write_run(tmp_path, [ROW])
    page = write_report(tmp_path).read_text()
    share = 100 * (90.0 - 6.25) / (90.0 - 0.6)
    assert f"width:{share:.1f}%" in page


@pytest.mark.parametrize(
    "passed, mode, expected, unexpected",
    [
        (True, "full", "All 1 thresholds are met", "missed"),
        (False, "full", "1 of 1 thresholds are missed: instruct: hue", "are met"),
        (False, "fast", "Fast run", "thresholds are missed"),
        (None, "full", "No threshold was evaluated", "are met"),
    ],
)
def test_the_banner_says_what_was_reached(tmp_path, passed, mode, expected, unexpected):
    write_run(tmp_path, [ROW | {"passed": passed}], mode)
    _, banner = conclusion(read_inputs(tmp_path))
    assert expected in banner
    assert unexpected not in banner


def test_a_page_is_made_of_training_alone(tmp_path):
    write_metrics(tmp_path / "pretrain")
    assert "Curves" in write_report(tmp_path).read_text()


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no metrics.jsonl"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_repeated_iteration_counts_once_and_bad_values_leave_no_point(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"iteration": 1, "loss": 9.0}\n{"iteration": 2, "loss": 8.0}\n'
        '{"iteration": 2, "loss": 7.0}\n{"iteration": 3, "loss": NaN, "lr": 1.0}\n{"itera'
    )
    history = read_history(path)
    assert history.series["loss"] == ([1, 2], [9.0, 7.0])
    assert history.series["lr"] == ([3], [1.0])
    assert history.last_iteration == 3


def test_series_are_sorted_by_what_they_are(tmp_path):
    write_metrics(tmp_path / "align")
    history = read_history(tmp_path / "align" / "metrics.jsonl")
    assert history.losses() == ["loss"]
    assert history.others() == ["cosine", "accuracy"]
    assert history.held_out("loss") == ([10, 20, 30], [0.4, 0.2, 4.0 / 30])
    assert history.held_out("cosine") is None


def test_smoothing_keeps_constants_and_averages_the_window():
    assert smooth([2.0] * 9, 4) == [2.0] * 9
    assert smooth([0.0, 3.0, 6.0, 0.0], 2) == [0.0, 3.0, 3.0, 3.0]
    assert smooth([], 5) == []


def test_the_chart_is_valid_svg_with_its_titles(tmp_path):
    write_metrics(tmp_path / "align", count=2000)
    svg = stage_chart(read_history(tmp_path / "align" / "metrics.jsonl"))
    ElementTree.fromstring(svg)
    for title in (
        "loss",
        "cosine, accuracy",
        "accuracy, held out",
        "gradient norm",
        "learning rate",
        "samples per second",
    ):
        assert title in svg
    assert len(svg) < 250_000


def test_durations():
    assert [duration(s) for s in (8.42, 42.0, 75.0, 3700.0)] == [
        "8.4 s",
        "42 s",
        "1 min 15 s",
        "1 h 1 min",
    ]
