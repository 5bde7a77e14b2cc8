"""The shipped configs for one GPU and one node: each with what it says to add for a card leaves a
tenth of that card's memory free, by the plan."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from torch import nn

from megatron_kosmosg import train
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.input_paths import CONFIGS
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.needed_files import validate_files
from megatron_kosmosg.config.rank_grid import rank_grid
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.validate import validate_layout
from megatron_kosmosg.planning.estimate import Estimate, estimate
from megatron_kosmosg.planning.gpus import GPUS, Efficiency
from megatron_kosmosg.planning.memory import GIB
from megatron_kosmosg.planning.model_counts import model_shares, whole_model
from megatron_kosmosg.planning.pipeline_balance import with_default_layout
from megatron_kosmosg.stages import stage_facts

CARDS = {24: 22.5, 40: 39.4, 48: 44.5, 80: 79.1}
"""{what a card is called, GB: GiB that the driver reports of the smallest of them}: L4 and A10G,
A100-40, L40S, A100-80 and H100."""
RECIPES = Path(__file__).parents[2] / "docs" / "recipes.md"
ADVICE = re.compile(r"^#   (\d+) GB: (.+)$", re.MULTILINE)


def advice(name: str) -> dict[int, list[str]]:
    """{card: settings to add} as the comment of a config gives them."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    return {int(card): settings.split() for card, settings in ADVICE.findall(text)}


CASES = [
    (name, card)
    for name in ("align_1gpu", "align_8gpu", "instruct_1gpu", "instruct_8gpu", "pretrain_8gpu")
    for card in advice(name)
]


def planned(config: RunConfig) -> Estimate:
    """On A100-80."""
    size = config.parallel.world_size
    validate_layout(config, size, stage_facts(config.stage))
    config = with_default_layout(config)
    shares = model_shares(config, built(config.stage, config.lora.rank))
    return estimate(config, rank_grid(config, size), GPUS["a100-80"], Efficiency(), shares)


def largest_gib(config: RunConfig) -> float:
    """Of the kinds of rank, planned."""
    return max(kind.memory.total for kind in planned(config).kinds) / GIB


@cache
def built(stage: str, rank: int) -> nn.Module:
    """The model of a stage on the meta device; nothing but adapters changes it in these configs."""
    name = {"pretrain": "pretrain_8gpu"}.get(stage, f"{stage}_1gpu")
    return whole_model(load_config(name, [f"lora.rank={rank}"]))


@pytest.mark.parametrize(("name", "card"), CASES)
def test_a_tenth_of_the_card_stays_free(name, card):
    config = load_config(name, advice(name)[card])
    assert largest_gib(config) <= 0.9 * CARDS[card]


def test_all_that_trains_fits_24_gb_with_adams_states_on_the_host():
    config = load_config("instruct_1gpu", ["optimizer.optimizer_cpu_offload=true"])
    assert largest_gib(config) <= 0.9 * CARDS[24]


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_the_recipes_table_is_the_plan_s(name):
    """Memory of the four cards, speed and hours of the first and last."""
    (line,) = re.findall(rf"^\| `{name}` \|(.*)\|$", RECIPES.read_text(), re.MULTILINE)
    *gib, _, speed = line.split(" | ")
    configs = [load_config(name, settings) for settings in advice(name).values()]
    assert [float(cell.split()[0]) for cell in gib] == [round(largest_gib(c), 1) for c in configs]
    for config, number, hours in zip(
        (configs[0], configs[-1]),
        re.findall(r"([\d,]+)", speed)[:2],
        re.findall(r"(\d+) (?:to|hours)", speed.split(": ")[1]),
        strict=True,
    ):
        batch, seconds = config.training.global_batch_size, planned(config).seconds
        assert number == f"{batch / seconds:,.0f}"
        assert hours == f"{config.training.train_iters * seconds / 3600:.0f}"


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_as_it_is_a_config_fits_the_smallest_card_that_trains_all(name):
    settings = advice(name)
    assert settings.keys() == CARDS.keys()
    whole = min(card for card in settings if not settings[card][0].startswith("lora."))
    assert load_config(name, []) == load_config(name, settings[whole])


def test_a_dry_run_needs_neither_data_nor_models(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--config", "instruct_1gpu", "--dry-run"]) == 0
    report = capsys.readouterr().out
    assert "128 samples an update = 4 per micro-batch x 32 micro-batches x 1 replicas" in report
    assert "not ready on this machine" in report


def test_raw_kosmos2_as_a_start_is_answered_before_anything_runs(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "kosmos-2"}')
    for suffix in (".bin", ".idx"):
        (tmp_path / f"captions{suffix}").touch()
    data = [f"data.{part}.caption.path={tmp_path}/captions" for part in ("blend", "heldout")]
    places = [f"checkpoint.load={tmp_path}", f"logging.output_dir={tmp_path}/out"]
    config = load_config("debug_align", [*data, *places])
    with pytest.raises(ConfigError, match=f"kosmosg convert import-kosmos2 --input {tmp_path}"):
        validate_files(config, stage_facts(config.stage))
