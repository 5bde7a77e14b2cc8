"""Files, options and names of an earlier version mean today what they meant when they were made.

tests/fixtures/README.md says what lies there and how it was made.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kosmosg.config.load import flatten, load_config
from megatron_kosmosg.config.renamed_keys import RENAMED_KEYS
from megatron_kosmosg.data.latent_cache import LatentCache
from megatron_kosmosg.data.normalise import target_pixels
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.models.diffusion import load_vae, vae_fingerprint
from tests.support import export_embeds, option_table
from tests.support.digests import (
    array_digest,
    iterations,
    newest_checkpoint,
    parameters_digest,
    sample_digest,
)

REPOSITORY = Path(__file__).parents[2]
FIXTURES = REPOSITORY / "tests" / "fixtures" / "c9c3073"
STAGES = ("pretrain", "align", "instruct")
TARGET_SIZE = 16
SAVED = 3
"""Iterations of each stored run."""
LOSS, EMBEDDING = 1e-5, 1e-5
"""Tolerances: of losses and gradient norms relative, of embeddings absolute. Other instruction sets
and numbers of threads move the numbers by less than 1e-6, other dropout masks by more than 3e-5."""


def recorded(name: str) -> Any:
    return json.loads((FIXTURES / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def run_python(preloaded_python):
    """Runs a Python program that begins with everything imported; what it wrote."""

    def run(*arguments: str | Path, cwd: Path) -> str:
        done = subprocess.run(
            [preloaded_python.venv / "bin" / "python", *arguments],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    return run


@pytest.mark.parametrize("name", recorded("samples"))
def test_every_sample_of_a_dataset_reads_back(past, name):
    expected, store = recorded("samples")[name], SampleStore(past / "stores" / name)
    assert store.kind == expected["kind"]
    samples = [store[index] for index in range(len(store))]
    found = [sample_digest(raw.info, raw.parts, raw.modes) for raw in samples]
    assert found == expected["samples"]


def test_latent_caches_hold_the_same_moments_of_the_same_vae(past):
    vae = vae_fingerprint(load_vae(str(past / "models" / "stable-diffusion"), torch.float32))
    for name, expected in recorded("moments").items():
        store = SampleStore(past / "stores" / name)
        cache = LatentCache(store, "latents", vae, target_pixels(TARGET_SIZE))
        assert [array_digest(cache.moments(index)) for index in range(len(store))] == expected


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_as_it_did(past, tmp_path, run_python, stage):
    """Also with the random state of its checkpoint, whose layout has fewer fields than today's."""
    expected, work = recorded("next_losses")[stage], tmp_path / "work"
    shutil.copytree(past, work)
    run = work / "runs" / stage
    assert parameters_digest(newest_checkpoint(run)) == expected["parameters_before"]
    command = ("-m", "megatron_kosmosg.train", "--config", f"{stage}.yaml")
    later = len(expected["losses"])
    output = run_python(*command, f"training.train_iters={SAVED + later}", cwd=work)
    assert "resumed from" in output and "another parallel layout" not in output
    found = iterations(run)[SAVED:]
    assert [line["iteration"] for line in found] == [SAVED + 1 + i for i in range(later)]
    losses, norms = ([line[key] for line in found] for key in ("loss", "grad_norm"))
    assert losses == pytest.approx(expected["losses"], rel=LOSS)
    assert norms == pytest.approx(expected["grad_norms"], rel=LOSS)
    assert "base.yaml: data.max_bad_samples is called data.max_bad_images today" in output


@pytest.mark.parametrize("way", ["package", "folder"])
def test_an_exported_folder_gives_the_same_embeddings(past, tmp_path, run_python, way):
    """With today's pipeline, and with the modules of its time that lie in it."""
    _compare_embeddings(past / "export", way, tmp_path, run_python)


def test_an_old_checkpoint_exports_to_the_same_pipeline(past, tmp_path, run_python):
    shutil.copy(past / "prompt.png", tmp_path)
    tool = REPOSITORY / "tools" / "convert_checkpoint.py"
    arguments = ("export-hf", "--input", "runs/instruct", "--sd", "models/stable-diffusion")
    run_python(tool, *arguments, "--output", tmp_path / "export", cwd=past)
    _compare_embeddings(tmp_path / "export", "package", tmp_path, run_python)


def _compare_embeddings(export: Path, way: str, folder: Path, run_python) -> None:
    expected = recorded("prompt_embeds")
    out = folder / "embeds.json"
    script = Path(export_embeds.__file__)
    run_python(script, way, export, FIXTURES / "prompt_embeds.json", out, cwd=folder)
    for name, value in json.loads(out.read_text()).items():
        torch.testing.assert_close(
            torch.tensor(value), torch.tensor(expected[name]), rtol=0, atol=EMBEDDING
        )


@pytest.mark.parametrize("name", recorded("settings"))
def test_an_old_config_says_what_it_said(name):
    """Every setting of its time has its value, defaults included."""
    today = flatten(load_config(FIXTURES / "configs" / f"{name}.yaml", []))
    expected = recorded("settings")[name]
    for old, renamed in RENAMED_KEYS.items():
        if old in expected:
            expected[renamed.key] = renamed.today(expected.pop(old))
    assert {key: today.get(key, "absent") for key in expected} == expected


def test_every_option_is_accepted_as_it_was_spelled(tmp_path, run_python):
    """Also every choice, and the positional arguments."""
    expected = recorded("options")
    script = Path(option_table.__file__)
    today = json.loads(run_python(script, *expected, cwd=REPOSITORY).splitlines()[0])
    missing = []
    for program, commands in expected.items():
        for command, old in commands.items():
            new = today[program].get(command)
            if new is None:
                missing.append(f"{program} {command}")
                continue
            if [p["nargs"] for p in new["positionals"]] != [p["nargs"] for p in old["positionals"]]:
                missing.append(f"{program} {command}: other positional arguments")
            for option, choices in old["options"].items():
                if option not in new["options"]:
                    missing.append(f"{program} {command} {option}")
                elif new["options"][option] is not None:
                    gone = set(choices or ()) - set(new["options"][option])
                    missing += [f"{program} {command} {option} {choice}" for choice in gone]
    assert missing == []


@pytest.mark.parametrize(
    ("module", "name"),
    [("pipeline_kosmosg", "KosmosGPipeline"), ("modeling_kosmosg_aligner", "KosmosGAligner")],
)
def test_former_import_paths_lead_to_the_same_classes_and_say_so(module, name):
    former, present = (f"megatron_kosmosg.{room}.{module}" for room in ("inference", "hf"))
    sys.modules.pop(former, None)
    with pytest.warns(FutureWarning, match=f"{former} is now {present}"):
        found = importlib.import_module(former)
    assert getattr(found, name) is getattr(importlib.import_module(present), name)
