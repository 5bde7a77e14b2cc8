"""Settings: what is read, what is refused, and that a refusal says how to go on."""

from __future__ import annotations

import dataclasses
import os
import shutil

import pytest

from megatron_kosmosg.checkpoint.changed_settings import check_resume
from megatron_kosmosg.config.batching import data_parallel_size, num_microbatches
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.frozen_weights import weights_variant
from megatron_kosmosg.config.known_keys import known_keys
from megatron_kosmosg.config.load import (
    config_differences,
    configured_keys,
    flatten,
    load_config,
    load_saved_config,
    to_yaml,
)
from megatron_kosmosg.config.needed_files import validate_files
from megatron_kosmosg.config.renamed_keys import RENAMED_KEYS
from megatron_kosmosg.config.validate import validate_layout
from megatron_kosmosg.stages import stage_facts
from megatron_kosmosg.stages.facts import ALIGN, INSTRUCT

BASE = ["stage=align", "logging.output_dir=run", "training.global_batch_size=8"]


def refusal(function, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    return str(caught.value)


def test_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "stage: align\nlogging: {output_dir: run}\noptimizer: {lr: 1e-4}\n"
        "training: {train_iters: 7, seed: 3}\n"
    )
    config = load_config(path, ["training.train_iters=9", "data.blend.web.path=/d/web"])
    assert (config.training.train_iters, config.training.seed) == (9, 3)
    assert config.optimizer.lr == 1e-4 and config.optimizer.adam_beta2 == 0.98
    assert config.data.blend["web"].path == "/d/web"


def test_yaml_round_trip_is_exact():
    config = load_config(None, [*BASE, "data.blend.a.path=x", "data.blend.a.weight=0.3"])
    assert config_differences(config, config) == {}
    assert flatten(config)["data.blend.a.weight"] == 0.3


def test_yaml_written_by_a_run_is_read_back_equal(tmp_path):
    config = load_config(None, [*BASE, "data.blend.a.path=x", "optimizer.lr=3e-5"])
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path, []) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.trian_iters=5", ["training.trian_iters", "training.train_iters"]),
        ("optimiser.lr=1", ["optimiser", "optimizer"]),
        ("lr=1", ["unknown key lr", "optimizer.lr"]),
        ("model.decoder.num_layer=2", ["model.decoder.num_layer", "model.decoder.num_layers"]),
        ("data.blend.web.pth=x", ["data.blend.web.pth", "path"]),
        ("training.train_iters=many", ["training.train_iters", "many"]),
        ("stage=finetune", ["stage", "pretrain"]),
        ("training.train_iters", ["section.key=value"]),
    ],
)
def test_bad_setting_is_named_with_a_way_out(override, words):
    message = refusal(load_config, None, [*BASE, override])
    assert all(word in message for word in words), message


@pytest.mark.parametrize("value", ["foo", "5", "[1]", "true"])
@pytest.mark.parametrize("key", ["data", "model.vision", "data.blend", "data.blend.a"])
def test_one_value_where_settings_belong_is_refused(key, value):
    text = refusal(load_config, None, [*BASE, f"{key}={value}"])
    assert f"{key} is " in text and f"such as {key}." in text


@pytest.mark.parametrize("name", ["5", "[a, b]", "{a: b}", "x" * 5000, '"a\\0b"'])
def test_an_include_that_is_no_name_is_refused(tmp_path, name):
    path = tmp_path / "c.yaml"
    path.write_text(f"include: {name}\n")
    assert "include is" in (text := refusal(load_config, path, [])) or "neither a file" in text


def test_unknown_key_in_yaml_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("stage: align\nparalel: {tensor_model_parallel_size: 2}\n")
    message = refusal(load_config, path, [])
    assert "mine.yaml" in message and "paralel" in message and "parallel" in message


def test_missing_mandatory_settings_are_listed():
    assert "logging.output_dir" in refusal(load_config, None, ["stage=align"])
    assert "no such file" in refusal(load_config, "nowhere.yaml", [])


def test_a_key_of_an_earlier_version_still_loads_with_one_note(tmp_path, capsys):
    path, base = tmp_path / "c.yaml", tmp_path / "base.yaml"
    base.write_text("stage: align\nlogging: {output_dir: run}\ndata: {max_bad_samples: 7}\n")
    path.write_text("include: base.yaml\ndata: {seq_length: 9, max_bad_samples: 8}\n")
    config = load_config(path, [])
    assert config.data.max_bad_images == 8 and config.data.seq_length == 9
    (note,) = capsys.readouterr().err.splitlines()
    assert (
        "data.max_bad_samples is called data.max_bad_images today" in note and "base.yaml" in note
    )
    assert load_config(path, ["data.max_bad_samples=3"]).data.max_bad_images == 3
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert load_config(path, ["data.max_bad_images=4"]).data.max_bad_images == 4
    assert "data.max_bad_images" in configured_keys(path, [])
    capsys.readouterr()
    assert load_saved_config(base).data.max_bad_images == 7 and not capsys.readouterr().err
    path.write_text("include: base.yaml\ndata: {max_bad_images: 1, max_bad_samples: 8}\n")
    assert "both are given" in refusal(load_config, path, [])


@pytest.mark.parametrize(("old", "today"), [("none", []), ("toy", ["toy"])])
def test_the_values_of_a_renamed_key_become_todays(old, today, capsys):
    """What a later layer says wins, whichever of the keys it uses."""
    config = load_config(None, [*BASE, f"logging.picture_judge={old}"])
    assert config.evaluation.grid == today
    (note,) = capsys.readouterr().err.splitlines()
    assert note.endswith(
        f"logging.picture_judge is called evaluation.grid today, and {old} is [{', '.join(today)}]"
    )
    both = ["evaluation.grid=[x]", f"logging.picture_judge={old}"]
    assert load_config(None, [*BASE, *both]).evaluation.grid == today
    assert load_config(None, [*BASE, *reversed(both)]).evaluation.grid == ["x"]


def test_a_value_that_a_renamed_key_never_had_is_refused():
    message = refusal(load_config, None, [*BASE, "logging.picture_judge=tyo"])
    assert "logging.picture_judge=tyo" in message and "none, toy" in message
    assert "evaluation.grid" in message


def test_a_change_may_be_accepted_under_its_earlier_key(capsys):
    accepted = "checkpoint.accept_changes=[optimizer.lr, data.max_bad_samples]"
    config = load_config(None, [*BASE, accepted])
    assert config.checkpoint.accept_changes == ["optimizer.lr", "data.max_bad_images"]
    assert "data.max_bad_samples is called data.max_bad_images today" in capsys.readouterr().err


def test_renamed_keys_lead_to_keys_of_today():
    assert {renamed.key for renamed in RENAMED_KEYS.values()} <= set(known_keys())
    assert not set(RENAMED_KEYS) & set(known_keys())


def test_config_cannot_be_written_to():
    config = load_config(None, BASE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.training.seed = 1  # type: ignore[misc]  # what is refused


def test_batch_arithmetic():
    config = load_config(
        None, [*BASE, "training.micro_batch_size=2", "parallel.tensor_model_parallel_size=2"]
    )
    assert data_parallel_size(config, 4) == 2
    assert num_microbatches(config, 2) == 2  # 8 samples = 2 ranks x 2 samples x 2
    message = refusal(num_microbatches, config, 3)
    assert "training.global_batch_size=8" in message and "6 or 12" in message
    assert "4 or 6" in refusal(data_parallel_size, config, 5)


OFFLOAD = ("training.precision=bf16", "optimizer.optimizer_cpu_offload=true")
AWARE = ("training.precision=bf16", "optimizer.use_precision_aware_optimizer=true")


def _interleaved(stages: int, chunks: int) -> list[str]:
    """Of 24 ranks with tensor size 2: 4 replicas at 3 stages."""
    return [
        f"parallel.pipeline_model_parallel_size={stages}",
        f"parallel.virtual_pipeline_model_parallel_size={chunks}",
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["parallel.tensor_model_parallel_size=3"],
            ["num_attention_heads=32", "parallel.tensor_model_parallel_size=3", "widths: 1, 2, 4"],
        ),
        (["model.decoder.num_attention_heads=30"], ["=30", "2048", "nearest: 16 or 32"]),
        (["model.decoder.ffn_hidden_size=8191"], ["ffn_hidden_size=8191"]),
        (["parallel.tensor_model_parallel_size=8"], ["model.aligner.num_attention_heads=12"]),
        (
            ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=true"],
            ["sequence_parallel", "tensor_model_parallel_size > 1"],
        ),
        (
            [
                "parallel.tensor_model_parallel_size=1",
                "parallel.pipeline_model_parallel_size=2",
                "parallel.virtual_pipeline_model_parallel_size=2",
            ],
            ["pipeline_model_parallel_size=2", "to 3 or more", "virtual_pipeline_model_parallel"],
        ),
        (
            ["parallel.pipeline_model_parallel_size=2", "model.decoder.num_layers=1"],
            ["num_layers=1", "2 pipeline stages", "to at most 1,"],
        ),
        (
            [*_interleaved(3, 2), "model.decoder.num_layers=5"],
            ["num_layers=5", "3 ranks x 2 = 6", "virtual_pipeline_model_parallel_size to null"],
        ),
        (
            [*_interleaved(3, 3), "model.decoder.num_layers=8"],
            ["8", "3 ranks x 3 = 9", "virtual_pipeline_model_parallel_size to 2,"],
        ),
        (
            [*_interleaved(3, 2), "training.global_batch_size=16"],
            ["4 micro-batches", "(3)", "global_batch_size to 12 or 24"],
        ),
        (
            [*_interleaved(3, 2), "training.micro_batch_size=3"],
            ["2 micro-batches", "micro_batch_size to 1, 2 or", "global_batch_size to 36"],
        ),
        (["parallel.virtual_pipeline_model_parallel_size=1"], ["at least 2", "null"]),
        (["training.global_batch_size=30"], ["30", "= 12", "24 or 36"]),
        (["parallel.tensor_model_parallel_size=16"], ["num_attention_heads=12", "1, 2, 4"]),
        (["parallel.world_size=256"], ["256", "24 ranks"]),
        (["optimizer.lr_warmup_iters=10", "training.train_iters=10"], ["lr_warmup_iters=10"]),
        (["optimizer.exp_avg_dtype=bf16"], ["exp_avg_dtype=bf16", "aware_optimizer=true"]),
        ([*OFFLOAD, "optimizer.optimizer_offload_fraction=0"], ["fraction=0.0", "at most 1"]),
        ([*OFFLOAD, *AWARE], ["set one of them to false"]),
        ([*OFFLOAD, "training.precision=fp32"], ["cpu_offload=true", "training.precision=bf16"]),
        ([*AWARE, "parallel.use_distributed_optimizer=false"], ["use_distributed_optimizer=true"]),
        (
            [*AWARE, "optimizer.ema_decay=0.99"],
            ["ema_decay=0.99", "precision_aware_optimizer=true"],
        ),
        (["score.condition_drop_prob=1.5"], ["condition_drop_prob=1.5"]),
        (
            ["score.placement=dedicated", "stage=instruct", "score.ranks_per_replica=30"],
            ["score.ranks_per_replica", "score.placement=colocated"],
        ),
        (["score.window=17"], ["score.window=17", "at most 16"]),
        (
            ["performance.compile=cudagraph", "score.recompute=true"],
            ["performance.compile=cudagraph", "score.recompute=false"],
        ),
        (
            ["stage=pretrain", "data.pack_prompts=true"],
            ["data.pack_prompts=true", "stage=pretrain", "data.pack_prompts=false"],
        ),
        (["parallel.overlap_param_gather=true"], ["overlap_grad_reduce"]),
        (["training.micro_batch_size=0"], ["training.micro_batch_size=0"]),
        (["model.vision.patch_size=15"], ["patch_size=15"]),
    ],
)
def test_layouts_that_cannot_work_are_refused(overrides, words):
    config = load_config(
        None,
        [
            *BASE,
            "training.global_batch_size=24",
            "parallel.tensor_model_parallel_size=2",
            *overrides,
        ],
    )
    message = refusal(validate_layout, config, 24, stage_facts(config.stage))
    assert all(word in message for word in words), message


def test_a_fitting_layout_passes():
    validate_layout(load_config(None, BASE), 8, ALIGN)


WEIGHTS = "diffusion_pytorch_model.safetensors"


def _instruct(tmp_path, **paths) -> list[str]:
    for name in ("tok.model", "d.bin", "d.idx"):
        (tmp_path / name).write_bytes(b"x")
    for part in ("unet", "vae", "scheduler"):
        (tmp_path / "sd" / part).mkdir(parents=True, exist_ok=True)
        (tmp_path / "sd" / part / "config.json").touch()
        (tmp_path / "sd" / part / WEIGHTS).touch()
    (tmp_path / "previous" / "checkpoints" / "iter_0000004").mkdir(parents=True, exist_ok=True)
    (tmp_path / "previous" / "checkpoints" / "iter_0000004" / "complete.json").touch()
    settings = {
        "data.tokenizer_model": "tok.model",
        "data.blend.web.path": "d",
        "model.diffusion.path": "sd",
        "checkpoint.load": "previous",
        "logging.output_dir": "out",
    } | paths
    return ["stage=instruct", *(f"{key}={tmp_path / value}" for key, value in settings.items())]


def test_complete_input_passes(tmp_path):
    validate_files(load_config(None, _instruct(tmp_path)), INSTRUCT)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.tokenizer_model", "nope.model"),
        ("data.blend.web.path", "nope"),
        ("model.diffusion.path", "nope"),
        ("checkpoint.load", "nope"),
        ("logging.output_dir", "tok.model/out"),
    ],
)
def test_missing_input_is_named(tmp_path, key, value):
    message = refusal(
        validate_files, load_config(None, _instruct(tmp_path, **{key: value})), INSTRUCT
    )
    assert key in message and str(tmp_path / value) in message


def test_all_missing_inputs_are_named_at_once(tmp_path):
    settings = _instruct(tmp_path)
    wrong = [f"data.heldout.h.path={tmp_path / 'h'}", f"checkpoint.load={tmp_path / 'nowhere'}"]
    (tmp_path / "tok.model").unlink()
    (tmp_path / "sd" / "unet" / WEIGHTS).unlink()
    message = refusal(validate_files, load_config(None, [*settings, *wrong]), INSTRUCT)
    assert message.startswith("4 inputs are missing:\n  ")
    for key in ("data.tokenizer_model=", "data.heldout.h.path=", "checkpoint.load="):
        assert key in message
    assert "unet has no weights" in message


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        ([WEIGHTS, "diffusion_pytorch_model.fp16.safetensors"], None),
        (["diffusion_pytorch_model.fp16.safetensors"], "fp16"),
        (["diffusion_pytorch_model.bin"], None),
        (["diffusion_pytorch_model.non_ema.bin", "diffusion_pytorch_model.fp16.bin"], "fp16"),
        (["diffusion_pytorch_model-00001-of-00002.safetensors"], None),
        (["diffusion_pytorch_model.fp16-00001-of-00002.safetensors"], "fp16"),
    ],
)
def test_weights_of_every_published_kind_are_found_by_their_names(tmp_path, names, variant):
    for name in names:
        (tmp_path / name).touch()
    assert weights_variant(tmp_path) == variant


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        ("vae", "has no folder vae"),
        (f"unet/{WEIGHTS}", "unet has no weights (diffusion_pytorch_model.safetensors"),
        ("scheduler/config.json", "scheduler has no config.json"),
    ],
)
def test_a_stable_diffusion_that_is_not_whole_is_named(tmp_path, removed, words):
    config = load_config(None, _instruct(tmp_path))
    gone = tmp_path / "sd" / removed
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert words in refusal(validate_files, config, INSTRUCT)


def test_a_start_from_a_run_that_saved_nothing_is_missing(tmp_path):
    config = load_config(None, _instruct(tmp_path))
    (tmp_path / "previous" / "checkpoints" / "iter_0000004" / "complete.json").unlink()
    message = refusal(validate_files, config, INSTRUCT)
    assert f"checkpoint.load={tmp_path / 'previous'} holds no finished checkpoint" in message


def test_a_folder_without_write_permission_is_named(tmp_path, monkeypatch):
    config = load_config(None, _instruct(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    message = refusal(validate_files, config, INSTRUCT)
    assert f"logging.output_dir={tmp_path / 'out'}: no permission" in message


@pytest.mark.parametrize("key", ["training.eval_interval", "logging.image_interval"])
def test_evaluation_without_held_out_data_is_refused(tmp_path, key):
    settings = [*_instruct(tmp_path), f"{key}=10"]
    message = refusal(validate_files, load_config(None, settings), INSTRUCT)
    assert key in message and "data.heldout.NAME.path" in message
    held_out = f"data.heldout.web.path={tmp_path / 'd'}"
    validate_files(load_config(None, [*settings, held_out]), INSTRUCT)


def test_stage_names_what_it_needs():
    message = refusal(validate_files, load_config(None, ["stage=instruct", *BASE[1:]]), INSTRUCT)
    for key in ("data.tokenizer_model", "data.blend", "model.diffusion.path", "checkpoint.load"):
        assert key in message


def test_resume_notes_a_new_layout_and_refuses_new_maths():
    saved = load_config(None, BASE)
    moved = load_config(
        None, [*BASE, "parallel.tensor_model_parallel_size=2", "training.micro_batch_size=2"]
    )
    assert len(check_resume(saved, moved)) == 2
    for change in (
        "optimizer.lr=5e-4",
        "training.seed=1",
        "training.global_batch_size=16",
        "model.decoder.num_layers=2",
        "data.pack_prompts=true",
        "data.blend.more.path=x",
        "training.train_iters=300000",
    ):
        key = change.split("=", 1)[0]
        message = refusal(check_resume, saved, load_config(None, [*BASE, change]))
        assert key.removesuffix(".path") in message and "accept_changes" in message
        section = key.removesuffix(".more.path")
        accepted = load_config(None, [*BASE, change, f"checkpoint.accept_changes=[{section}]"])
        assert any(line.startswith(section) for line in check_resume(saved, accepted))


def test_a_dataset_may_move_but_not_change_between_save_and_resume():
    first, second = "data.blend.a.path=p/a", "data.blend.b.path=p/b"
    saved = load_config(None, [*BASE, first, second])
    moved = load_config(None, [*BASE, "data.blend.a.path=q/a", second])
    prints = {"a": "123", "b": "456"}
    message = refusal(check_resume, saved, moved)  # nothing is known of the content
    assert "data.blend.a.path: p/a -> q/a" in message
    (note,) = check_resume(saved, moved, prints, prints)
    assert note.startswith("data.blend.a.path")
    changed = prints | {"b": "789"}
    message = refusal(check_resume, saved, saved, prints, changed)
    assert "data.blend.b.content: the dataset p/b" in message and "456 -> 789" in message
    for accepted in ("data.blend.b.content", "data.blend.b", "data.blend"):
        willing = load_config(
            None, [*BASE, first, second, f"checkpoint.accept_changes=[{accepted}]"]
        )
        assert any("456 -> 789" in line for line in check_resume(saved, willing, prints, changed))


def test_weights_and_order_of_a_mixture_may_not_change_unnoticed():
    first, second = "data.blend.a.path=p/a", "data.blend.b.path=p/b"
    saved = load_config(None, [*BASE, first, second])
    turned = load_config(None, [*BASE, second, first])
    assert "data.blend: order a, b -> b, a" in refusal(check_resume, saved, turned)
    heavier = load_config(None, [*BASE, first, second, "data.blend.b.weight=2"])
    assert "data.blend.b.weight: 1.0 -> 2.0" in refusal(check_resume, saved, heavier)


def test_a_longer_run_with_the_same_decay_resumes():
    saved = load_config(None, [*BASE, "training.train_iters=100"])
    longer = load_config(None, [*BASE, "training.train_iters=150", "optimizer.lr_decay_iters=100"])
    assert any("train_iters" in line for line in check_resume(saved, longer))


def test_a_number_that_no_float_holds_is_an_error_that_names_the_key(tmp_path):
    with pytest.raises(ConfigError, match=r"optimizer\.lr: the number is too large"):
        load_config(None, ["stage=pretrain", f"optimizer.lr={'9' * 400}"])
    path = tmp_path / "config.yaml"
    path.write_text(f"stage: pretrain\noptimizer: {{adam_beta1: {'9' * 400}}}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: optimizer\.adam_beta1: the number"):
        load_config(path, [])
