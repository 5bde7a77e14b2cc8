"""The documents: pages made from data are of today, links lead somewhere, commands are understood,
messages exist, and nothing is called verified that did not run."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
import yaml
from PIL import Image

from benchmarks import front_page
from megatron_kosmosg import __version__
from megatron_kosmosg.cli import main as cli
from megatron_kosmosg.hf import pipeline_kosmosg
from tests.support import settings_page, verification_page
from tests.support.document_commands import block_lines, problems

REPOSITORY = Path(__file__).parents[2]
NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
PAGES = [
    *(
        REPOSITORY / name
        for name in (*NAMES, "slurm/README.md", "kubernetes/README.md", "comfyui/README.md")
    ),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
BY_NAME = {str(path.relative_to(REPOSITORY)): path for path in PAGES}


def prose(path: Path) -> str:
    """Without fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """Of the headings, as the forges make them."""
    titles = re.findall(r"^#+ +(.+?) *$", prose(path), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in kept}


def test_tests_that_are_named_exist():
    tests = REPOSITORY / "tests"
    source = {path: path.read_text("utf-8") for path in tests.rglob("test_*.py")}
    defined = set(re.findall(r"^ *def (test_\w+)", "\n".join(source.values()), re.MULTILINE))
    files = {str(path.relative_to(REPOSITORY)) for path in source}
    for page in (*PAGES, *sorted(tests.rglob("*.md")), REPOSITORY / "docs" / "verification.yaml"):
        text = page.read_text("utf-8")
        named = re.findall(r"[\w/]*\btest_\w+\.py", text)
        missing = [n for n in named if not any(f"/{file}".endswith(f"/{n}") for file in files)]
        assert not missing, page
        assert set(re.findall(r"::(test_\w+)", text)) <= defined, page


def test_the_readme_fits_on_a_few_screens():
    assert len((REPOSITORY / "README.md").read_text("utf-8").splitlines()) <= 150


@pytest.mark.parametrize("name", BY_NAME)
def test_links_lead_somewhere(name):
    path = BY_NAME[name]
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = unquote(target).partition("#")
        aimed = (path.parent / file).resolve() if file else path
        assert aimed.exists(), target
        if anchor and aimed.suffix == ".md":
            assert anchor in anchors(aimed), target


def test_the_index_names_every_page_once():
    listed = re.findall(r"\]\(([a-z_]+\.md)", (REPOSITORY / "docs" / "README.md").read_text())
    pages = {path.name for path in (REPOSITORY / "docs").glob("*.md")} - {"README.md"}
    assert sorted(listed) == sorted(pages)


@pytest.mark.parametrize("name", BY_NAME)
def test_commands_are_understood(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    text = BY_NAME[name].read_text("utf-8")
    shown = [line for line in block_lines(text) if "error:" not in line]
    found = {line: problem for line in shown if (problem := problems(line))}
    refused = [line for line in found if is_shown_as_refused(line, text)]
    assert not {line: problem for line, problem in found.items() if line not in refused}


def is_shown_as_refused(line: str, page: str) -> bool:
    """Whether the page shows the error that the command ends with."""
    lines = [each.strip().removeprefix("$ ") for each in page.replace("\\\n", " ").splitlines()]
    after = lines[lines.index(line) + 1]
    return after.startswith("error:")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("kosmosg draw --model x", "no command draw"),
        ("python tools/draw.py", "there is no tools/draw.py"),
        ("kosmosg generate --model x --prompt a --output y --pic 3", "--pic"),
        ("kosmosg launch --ranks 2 train --config toy_align training.iters=3", "training.iters"),
        ("python -m benchmarks.nothing", "no module"),
        ("kosmosg train --config align_1gpu data.heldout=null", "needs held-out data"),
        ("kosmosg launch --ranks 3 train --config toy_pretrain", "3 ranks cannot be split"),
        ("kosmosg preprocess --sheet 3 ...", "no option --sheet"),
    ],
)
def test_a_command_that_fails_is_noticed(line, problem):
    assert any(problem in text for text in problems(line)), problems(line)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        # What `bash slurm/instruct_256gpu.sh --check --nodes=17` asks.
        ("slurm/README.md", "train --config instruct_256gpu --dry-run parallel.world_size=136"),
        (
            "docs/scaling.md",
            "plan --config instruct_256gpu --num-gpus 256 --gpu h100-80 score.ranks_per_replica=2",
        ),
    ],
)
def test_a_refusal_that_a_page_shows_is_today_s(name, command, capsys):
    assert cli.main(command.split()) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert " ".join(message.split()) in " ".join(BY_NAME[name].read_text("utf-8").split())


def test_commands_of_the_front_page_s_table_exist():
    text = (REPOSITORY / "README.md").read_text("utf-8")
    table = text.split("| I want to ... | command | page |", 1)[1].split("\n\n", 1)[0]
    commands = re.findall(r"`((?:kosmosg|bash|sbatch) [^`]+)`", table)
    assert len(commands) >= 12
    for command in commands:
        found = problems(command)
        assert not found or "are required" in found[0], (command, found)


def test_the_menu_of_the_site_names_every_page():
    menu = (REPOSITORY / "mkdocs.yml").read_text("utf-8").split("\nnav:\n", 1)[1]
    pages = {path.name for path in (REPOSITORY / "docs").glob("*.md")}
    assert sorted(re.findall(r"(\w+\.md)$", menu, re.MULTILINE)) == sorted(pages)


def test_links_of_the_index_for_programs_lead_somewhere():
    text = (REPOSITORY / "llms.txt").read_text("utf-8")
    linked = set(re.findall(r"\]\(([^)]+)\)", text))
    assert not [target for target in linked if not (REPOSITORY / target).is_file()]
    assert {f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")} <= linked | {
        "docs/README.md"
    }


def test_files_for_forges_say_what_is_so():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == __version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text("utf-8"))
    (repository,) = hooks["repos"]
    pins = (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines()
    assert f"ruff=={repository['rev'].removeprefix('v')}" in pins
    jobs = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text("utf-8"))["jobs"]
    run = " ".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    assert "bash .ci/run" in run and "bash tests/documents_site.sh" in run
    form = REPOSITORY / ".github/ISSUE_TEMPLATE/problem.yml"
    labels = [
        part.get("attributes", {}).get("label", "")
        for part in yaml.safe_load(form.read_text())["body"]
    ]
    assert any("--dry-run" in label for label in labels)


def test_generated_pages_are_of_today():
    for page in (settings_page, verification_page):
        assert page.PAGE.read_text("utf-8") == page.page(), f"python -m {page.__name__} --write"


ROWS = verification_page.cards()["rows"]


@pytest.mark.parametrize("row", ROWS, ids=[f"{r['workflow']}, {r['hardware']}" for r in ROWS])
def test_a_card_claims_what_ran_and_nothing_else(row):
    assert row["hardware"] in verification_page.cards()["hardware"]
    assert row["status"] in verification_page.STATUSES
    problem = problems(row["command"])
    assert not problem or "are required" in problem[0]
    evidence = row.get("evidence")
    if row["status"] not in ("verified", "rehearsed"):
        assert evidence is None
        assert not [key for key in verification_page.MEASURED if key in row]
        return
    if "ci" in evidence:
        steps = (REPOSITORY / ".ci" / "run").read_text("utf-8")
        assert f'step "{row["command"]}"' in steps and row["hardware"] == "cpu"
        assert not [key for key in verification_page.MEASURED if key in row]
        return
    if "test" in evidence:
        # On every commit, on CPUs: no figures of one run, no hardware that CI lacks.
        assert (REPOSITORY / evidence["test"]).is_file()
        assert not [key for key in verification_page.MEASURED if key in row]
        assert row["status"] == "rehearsed" or row["hardware"] == "cpu"
        return
    page = (REPOSITORY / evidence["page"]).read_text("utf-8")
    assert " ".join(evidence["quote"].split()) in " ".join(page.split())
    assert re.fullmatch(r"[0-9a-f]{7,}", str(row["commit"])) and row["date"]
    if row["hardware"] not in ("cpu", "fake_cluster"):
        assert evidence["page"] == "docs/gpu_results.md"


def test_every_hardware_has_a_card():
    assert {row["hardware"] for row in ROWS} == set(verification_page.cards()["hardware"])


def test_messages_of_the_troubleshooting_page_exist():
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text("utf-8")
    sources = [*(REPOSITORY / "megatron_kosmosg").rglob("*.py")]
    source = "\n".join(path.read_text("utf-8") for path in sources)
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    tables = text.split("| message | cause and remedy |")[1:]
    lines = [line for table in tables for line in table.split("\n\n")[0].splitlines()]
    cells = [line.split(" | ")[0] for line in lines if line.startswith("| `")]
    of_others = ("zsh", "No matching distribution", "Permission denied", "tools/")
    messages = [m for cell in cells for m in re.findall(r"`([^`]+)`", cell)]
    messages = [message for message in messages if not message.startswith(of_others)]
    assert len(messages) >= 12
    for message in messages:
        parts = re.split(r"\b[A-Z]\b|\bPATH\b|\.\.\.|\d+|=", message)
        longest = max(parts, key=len).strip()
        assert longest in source, message


def test_the_front_page_s_images_are_what_the_model_draws():
    torch.set_num_threads(1)
    found = front_page.rows()
    assert sum(sum(row.is_right) for row in found) >= 12
    made, kept = front_page.image_of(found), Image.open(front_page.GRID)
    assert made.size == kept.size
    levels = [torch.tensor(list(image.convert("RGB").tobytes())) for image in (made, kept)]
    # Another processor rounds otherwise; another model or another prompt differs by tens.
    assert (levels[0] - levels[1]).abs().float().mean() < 1.0


def test_the_front_page_s_python_runs(tmp_path, monkeypatch):
    text = (REPOSITORY / "README.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(code.split("\n\n")) == 2 and len(list(filter(None, code.splitlines()))) <= 9
    (name,) = re.findall(r'\.save\("([^"]+)"\)', code)
    monkeypatch.chdir(tmp_path)  # it works in any folder
    names: dict = {}
    exec(code, names)
    assert isinstance(names["pipe"], pipeline_kosmosg.KosmosGPipeline)
    assert Image.open(tmp_path / name).size == names["result"].images[0].size
