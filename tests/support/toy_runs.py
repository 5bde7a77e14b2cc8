"""A small toy world on disk, and the shipped toy configs cut down to seconds, for whole runs."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob, preprocess
from megatron_kosmosg.stages import build_stage
from megatron_kosmosg.toy import assets
from megatron_kosmosg.toy.world_files import World, write_world
from megatron_kosmosg.training.loop import fit

REPOSITORY = Path(__file__).parents[2]
KINDS = ("text", "caption", "interleaved", "edit", "compositional")
ITERATIONS = 5
SMALL = (
    f"training.train_iters={ITERATIONS}",
    "training.global_batch_size=8",
    "training.micro_batch_size=2",
    "training.eval_interval=0",
    "training.eval_iters=1",
    "optimizer.lr_warmup_iters=1",
    "logging.image_interval=0",
    "logging.num_images=2",
    "logging.num_inference_steps=2",
    "logging.tensorboard=false",
)


def write_data(folder: Path, kinds: tuple[str, ...] = KINDS) -> None:
    """Datasets of these kinds in `folder`/data/{train,heldout}."""
    write_world(folder / "world", World(24, 0), lambda done, total: None)
    for split in ("train", "heldout"):
        for kind in kinds:
            job = PreprocessJob(
                kind=kind,
                inputs=(str(folder / "world" / split / f"{kind}.jsonl"),),
                tokenizer_model=str(assets.path() / "sentencepiece.model"),
                output_prefix=str(folder / "data" / split / kind),
            )
            preprocess(job, lambda *_: None)


def arguments_of(
    stage: str, data: Path, output_dir: Path, previous: Path | None, *more: str
) -> list[str]:
    """The command line of a small run of `stage`; `more` wins."""
    file = REPOSITORY / "examples" / "configs" / f"toy_{stage}.yaml"
    shipped = load_config(file, [])
    frozen = assets.path() / "stable-diffusion"
    settings = [
        f"data.tokenizer_model={assets.path() / 'sentencepiece.model'}",
        f"model.vision.path={assets.path() / 'clip-vision'}",
        f"model.diffusion.path={frozen}",
        f"model.clip_text.path={frozen}",
        f"logging.output_dir={output_dir}",
        f"checkpoint.load={previous or 'null'}",
    ]
    for name in shipped.data.blend:
        settings.append(f"data.blend.{name}.path={data / 'data' / 'train' / name}")
    for name in shipped.data.heldout:
        settings.append(f"data.heldout.{name}.path={data / 'data' / 'heldout' / name}")
    return ["--config", str(file), *settings, *SMALL, *more]


def config_of(
    stage: str, data: Path, output_dir: Path, previous: Path | None, *more: str
) -> RunConfig:
    """The config of the same run."""
    _, file, *settings = arguments_of(stage, data, output_dir, previous, *more)
    return load_config(file, settings)


def train_from_nothing(config: RunConfig) -> None:
    """One rank's part of a run that starts from random weights, for the stage after it."""
    context = platform.initialize(config)
    try:
        stage = build_stage(config, context)
        stage.initial_weights = lambda: None
        fit(stage, config, context)
    finally:
        platform.teardown()


def records(run: Path) -> list[tuple]:
    """What each line of the run's metrics says of the numbers that are learnt."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("iteration", "loss", "grad_norm", "lr", "consumed_train_samples", "heldout_loss")
    return [tuple(line.get(key) for key in keys) for line in lines]
