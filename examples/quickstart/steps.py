"""Which commands the quickstart runs, in order, with what sizes: the whole recipe as data."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_kosmosg import exit_codes

SECTIONS = {"train": "data.blend", "heldout": "data.heldout"}
"""Where a stage's config names the datasets of a split."""
SD_FOLDER = Path("megatron_kosmosg/toy/assets/stable-diffusion")
STAGES = ("pretrain", "align", "instruct")
STAGE_TITLES = {
    "pretrain": "pretrain: read text and images",
    "align": "align: speak the image decoder's language",
    "instruct": "instruct: draw what the prompt's images show",
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything; `seconds` are wall times on two quiet cores and only steer the
    time remaining."""

    world: int
    """Training scenes of the toy world."""
    seconds: dict[str, float]
    """Expected wall time per step name; preprocessing shares one entry."""
    overrides: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Config overrides per stage; none means the config as shipped."""
    evaluation: tuple[str, ...] = ()
    """Extra arguments of the evaluation."""


@dataclass(frozen=True)
class Step:
    """One command. It is done when its outputs exist and its stamp holds the same key."""

    name: str
    title: str
    command: tuple[str, ...]
    outputs: tuple[Path, ...]
    """Files or folders it makes; removed before it starts anew."""
    seconds: float
    after: tuple[str, ...] = ()
    """Steps whose outputs it reads."""
    inputs: tuple[Path, ...] = ()
    """Files in the repository whose content decides its result."""
    metrics: Path | None = None
    """metrics.jsonl of a training step, which tells how far it is."""
    iterations: int | None = None
    """Iterations of a training step."""
    always: bool = False
    """Runs every time: quick, and shows what the other steps left."""
    accepts: tuple[int, ...] = (exit_codes.DONE,)
    """Exit codes with which its outputs are whole."""


def train_command(config: Path, overrides: Iterable[str]) -> tuple[str, ...]:
    """The command line of one stage on two local ranks."""
    launcher = ("-m", "megatron_kosmosg", "launch", "--ranks", "2")
    return (sys.executable, *launcher, "train", "--config", str(config), *overrides)


BLENDS = {
    "pretrain": {"train": ("text", "caption", "interleaved"), "heldout": ("interleaved",)},
    "align": {"train": ("caption",), "heldout": ("caption",)},
    "instruct": {"train": ("compositional", "edit", "caption"), "heldout": ("compositional",)},
}
"""Names under `data.blend` (train) and `data.heldout` in each stage's config; also the kinds of
sample that they read."""

FULL = Sizes(
    world=4000,
    seconds={"world": 40, "data": 12, "pretrain": 230, "align": 340, "instruct": 620}
    | {"export": 15, "generate": 20, "dreambench-subjects": 7, "dreambench": 18}
    | {"evaluate": 90, "report": 8},
)

FAST = Sizes(
    world=240,
    seconds={"world": 6, "data": 8, "pretrain": 30, "align": 28, "instruct": 35}
    | {"export": 15, "generate": 20, "dreambench-subjects": 7, "dreambench": 18}
    | {"evaluate": 20, "report": 6},
    overrides={
        stage: (
            f"training.train_iters={iterations}",
            "optimizer.lr_warmup_iters=2",
            "training.eval_interval=0",
            "training.eval_iters=1",
            f"checkpoint.save_interval={iterations}",
            "logging.log_interval=5",
            "logging.image_interval=0",
        )
        for stage, iterations in (("pretrain", 20), ("align", 20), ("instruct", 12))
    },
    evaluation=("--fast",),
)


@dataclass(frozen=True)
class Ablation:
    """One variant of the paper's Table 2: a stage trained again with other settings."""

    name: str
    stage: str
    title: str
    load: str
    """Run that gives its initial weights."""
    overrides: tuple[str, ...] = ()


_NO_ENCODER = "model.aligner.kind=decoder_only"
_NO_ALIGNER = "model.aligner.kind=none"
_DEEP = "model.aligner.num_layers=6"

ABLATIONS = (
    Ablation(
        *("instruct_unaligned", "instruct", "instruct without align"),
        *("pretrain", ("checkpoint.load_stage=pretrain",)),
    ),
    Ablation("align_decoder_only", "align", "align, M without encoder", "pretrain", (_NO_ENCODER,)),
    Ablation(
        *("instruct_decoder_only", "instruct", "instruct, M without encoder"),
        *("align_decoder_only", (_NO_ENCODER,)),
    ),
    Ablation("align_none", "align", "align, linear map", "pretrain", (_NO_ALIGNER,)),
    Ablation("instruct_none", "instruct", "instruct, linear map", "align_none", (_NO_ALIGNER,)),
    Ablation("align_deep", "align", "align, deeper AlignerNet", "pretrain", (_DEEP,)),
    Ablation("instruct_deep", "instruct", "instruct, deeper AlignerNet", "align_deep", (_DEEP,)),
)


def plan(
    repository: Path, out: Path, *, fast: bool, ablations: bool, seed: int | None = None
) -> list[Step]:
    """All steps of one quickstart into the absolute folder `out`, in order. `seed` is that of
    every training; the data and the evaluation stay the same."""
    sizes = FAST if fast else FULL
    if seed is not None:
        seeded = {s: (*sizes.overrides.get(s, ()), f"training.seed={seed}") for s in STAGES}
        sizes = replace(sizes, overrides=seeded)
    steps = [_world_step(out, sizes), *_data_steps(repository, out, sizes)]
    previous: str | None = None
    for stage in STAGES:
        steps.append(_train_step(repository, out, sizes, stage, previous))
        previous = stage
    runs = {stage: out / stage for stage in STAGES}
    steps += [_export_step(out, sizes), _generate_step(out, sizes)]
    steps += _dreambench_steps(out, sizes)
    if ablations:
        for ablation in ABLATIONS:
            steps.append(_ablation_step(repository, out, sizes, ablation, runs))
            runs[ablation.name] = out / "ablations" / ablation.name
    steps.append(_evaluation_step(out, sizes, runs))
    steps.append(
        Step(
            name="report",
            title="page",
            command=(sys.executable, "tools/make_report.py", "--output", str(out)),
            outputs=(out / "report.html",),
            seconds=sizes.seconds["report"],
            after=tuple(step.name for step in steps),
            always=True,
        )
    )
    return steps


def _world_step(out: Path, sizes: Sizes) -> Step:
    command = ("tools/make_toy_world.py", "--output", str(out / "world"))
    return Step(
        name="world",
        title="toy world: images and captions as files",
        command=(sys.executable, *command, "--size", str(sizes.world), "--seed", "0"),
        outputs=(out / "world",),
        seconds=sizes.seconds["world"],
    )


def _data_steps(repository: Path, out: Path, sizes: Sizes) -> list[Step]:
    steps = []
    for split in SECTIONS:
        kinds = dict.fromkeys(kind for stage in STAGES for kind in BLENDS[stage][split])
        for kind in kinds:
            prefix = out / "data" / split / kind
            tokenizer = Path("megatron_kosmosg/toy/assets/sentencepiece.model")
            command = (
                *("tools/preprocess_data.py", "--kind", kind),
                *("--input", str(out / "world" / split / f"{kind}.jsonl")),
                *("--tokenizer-model", str(tokenizer)),
                *("--output-prefix", str(prefix), "--workers", "2"),
            )
            steps.append(
                Step(
                    name=f"data-{split}-{kind}",
                    title=f"preprocess: {kind}, {split}",
                    command=(sys.executable, *command),
                    outputs=tuple(prefix.with_suffix(end) for end in (".bin", ".idx")),
                    seconds=sizes.seconds["data"],
                    after=("world",),
                    inputs=(repository / tokenizer,),
                )
            )
    return steps


def _train_step(
    repository: Path, out: Path, sizes: Sizes, stage: str, previous: str | None
) -> Step:
    return _training(
        repository,
        out,
        stage,
        name=stage,
        title=STAGE_TITLES[stage],
        folder=out / stage,
        load=None if previous is None else (previous, out / previous),
        overrides=sizes.overrides.get(stage, ()),
        seconds=sizes.seconds[stage],
    )


def _ablation_step(
    repository: Path, out: Path, sizes: Sizes, ablation: Ablation, runs: dict[str, Path]
) -> Step:
    return _training(
        repository,
        out,
        ablation.stage,
        name=ablation.name,
        title=f"ablation: {ablation.title}",
        folder=out / "ablations" / ablation.name,
        load=(ablation.load, runs[ablation.load]),
        overrides=(*sizes.overrides.get(ablation.stage, ()), *ablation.overrides),
        seconds=sizes.seconds[ablation.stage],
    )


def _training(
    repository: Path,
    out: Path,
    stage: str,
    *,
    name: str,
    title: str,
    folder: Path,
    load: tuple[str, Path] | None,
    overrides: tuple[str, ...],
    seconds: float,
) -> Step:
    config = Path(f"examples/configs/toy_{stage}.yaml")
    settings = [f"logging.output_dir={folder}"]
    if load is not None:
        settings.append(f"checkpoint.load={load[1]}")
    data = []
    for split, section in SECTIONS.items():
        for kind in BLENDS[stage][split]:
            settings.append(f"{section}.{kind}.path={out / 'data' / split / kind}")
            data.append(f"data-{split}-{kind}")
    settings += overrides
    return Step(
        name=name,
        title=title,
        command=train_command(config, settings),
        outputs=(folder,),
        seconds=seconds,
        after=tuple(data) if load is None else (*data, load[0]),
        inputs=_with_included(repository / config),
        metrics=folder / "metrics.jsonl",
        iterations=_train_iters(repository / config, overrides),
    )


def _with_included(config: Path) -> tuple[Path, ...]:
    """The YAML file and the files that it includes."""
    files = [config]
    if config.is_file():
        for line in config.read_text(encoding="utf-8").splitlines():
            if line.startswith("include:"):
                files += _with_included(config.parent / line.removeprefix("include:").strip())
    return tuple(files)


def _train_iters(config: Path, overrides: Iterable[str]) -> int | None:
    """`training.train_iters` as overridden, else as the file says; None when neither says it."""
    for text in overrides:
        key, _, value = text.partition("=")
        if key == "training.train_iters":
            return int(value)
    if config.is_file():
        for line in config.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "train_iters":
                return int(value.split("#")[0])
    return None


def _export_step(out: Path, sizes: Sizes) -> Step:
    command = ("tools/convert_checkpoint.py", "export-hf", "--input", str(out / "instruct"))
    return Step(
        name="export",
        title="export: a folder that diffusers and transformers open",
        command=(
            *(sys.executable, *command, "--stable-diffusion", str(SD_FOLDER)),
            *("--output", str(out / "export")),
        ),
        outputs=(out / "export",),
        seconds=sizes.seconds["export"],
        after=("instruct",),
    )


def _generate_step(out: Path, sizes: Sizes) -> Step:
    prompts = out / "world" / "heldout" / "prompts.jsonl"
    command = ("tools/generate.py", "--model", str(out / "export"), "--prompts", str(prompts))
    drawing = ("--num-images", "4", "--steps", "8", "--guidance-scale", "2")
    return Step(
        name="generate",
        title="draw held-out prompts with the exported pipeline",
        command=(sys.executable, *command, *drawing, "--output", str(out / "generated")),
        outputs=(out / "generated",),
        seconds=sizes.seconds["generate"],
        after=("world", "export"),
    )


def _dreambench_steps(out: Path, sizes: Sizes) -> list[Step]:
    """The benchmark's whole command on toy shapes, with one and with two of them in a prompt."""
    folder = out / "dreambench"
    made = Step(
        name="dreambench-subjects",
        title="a DreamBench of toy shapes",
        command=(sys.executable, "tools/make_toy_dreambench.py", "--output", str(folder / "toy")),
        outputs=(folder / "toy",),
        seconds=sizes.seconds["dreambench-subjects"],
    )
    steps = [made]
    for number, name in ((1, "single"), (2, "pairs")):
        command = (
            *("tools/evaluate_dreambench.py", "--model", str(out / "export")),
            *("--dreambooth", str(folder / "toy" / "dreambooth")),
            *("--dino", str(folder / "toy" / "dino.pth"), "--clip", str(folder / "toy" / "clip")),
            *("--num-subjects", str(number), "--num-prompts", "1", "--num-images", "1"),
            *("--steps", "8", "--guidance-scale", "2", "--batch-size", "10"),
            *("--output", str(folder / name)),
        )
        steps.append(
            Step(
                name=f"dreambench-{name}",
                title=f"DreamBench, {name}: draw, score, report",
                command=(sys.executable, *command),
                outputs=(folder / name,),
                seconds=sizes.seconds["dreambench"],
                after=("export", made.name),
            )
        )
    return steps


def _evaluation_step(out: Path, sizes: Sizes, runs: dict[str, Path]) -> Step:
    arguments = [word for name, path in runs.items() for word in ("--run", f"{name}={path}")]
    arguments += ["--output", str(out / "evaluation")]
    return Step(
        name="evaluate",
        title="draw held-out prompts and judge the images",
        command=(sys.executable, "tools/evaluate_toy.py", *arguments, *sizes.evaluation),
        outputs=(out / "evaluation" / "metrics.json",),
        seconds=sizes.seconds["evaluate"],
        after=tuple(runs),
        accepts=(exit_codes.DONE, exit_codes.MISSED),  # the last word is the quickstart's
    )
