"""One run of `kosmosg build-data` in one process: from what it is given to its steps.

Long because models and files of all three steps are checked before the first begins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_kosmosg.config.overwrites import refuse_to_overwrite, refuse_to_write_into
from megatron_kosmosg.construction.annotations import Annotations
from megatron_kosmosg.construction.build_report import ConstructionReport, make_report
from megatron_kosmosg.construction.caption_step import Captioner, ModelCaptions, ProvidedCaptions
from megatron_kosmosg.construction.entity_prompt import PROMPT
from megatron_kosmosg.construction.entity_step import Answerer, Entities
from megatron_kosmosg.construction.mask_step import Masks, Segmenter
from megatron_kosmosg.construction.model_folders import check_type, model_type
from megatron_kosmosg.construction.on_demand import OnDemand
from megatron_kosmosg.construction.record_tars import ImageFormat
from megatron_kosmosg.construction.shard_plan import BuildPlan, make_build_plan
from megatron_kosmosg.construction.sources import find_sources
from megatron_kosmosg.construction.square_images import SquareImages
from megatron_kosmosg.construction.step_rows import StepFolder
from megatron_kosmosg.construction.steps import Step, are_done, run_steps
from megatron_kosmosg.data.kinds.caption import CAPTION
from megatron_kosmosg.files import write_json, write_text
from megatron_kosmosg.launcher import RankInfo
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.progress import Progress

REPORT_FILES, SHEET_FILE = ("report.json", "report.txt"), "contact_sheet.png"
PRODUCTS = (*REPORT_FILES, SHEET_FILE, "plan", "captions", "entities", "records")
INPUT, NOUN_PHRASES = "input", "noun-phrases"
CAPTION_TYPE, CAPTION_EXAMPLE = "blip-2", "Salesforce/blip2-opt-6.7b"
MASK_TYPE, MASK_EXAMPLE = "clipseg", "CIDAS/clipseg-rd64-refined"


@dataclass(frozen=True)
class BuildJob:
    """What a run builds, and from what: the options of `kosmosg build-data`, where they are
    explained."""

    inputs: list[str]
    output: Path
    captions: str
    entities: str | None
    masks: str | None
    options: Options
    """How images are checked."""
    form: ImageFormat
    limit: int | None = None
    max_entities: int = 5
    threshold: float = 0.3
    min_entity_side: int = 32
    entity_prompt: str = PROMPT
    caption_tokens: int = 30
    entity_tokens: int = 64
    shard_size: int = 1000
    batch_size: int = 16
    num_threads: int = 4
    files_read: tuple[Path, ...] = ()
    """Further files that the command opened, such as the one of `entity_prompt`."""


@dataclass(frozen=True)
class ModelSettings:
    """How models are run, and how their files are told apart."""

    dtype: torch.dtype
    open_device: Callable[[], torch.device]
    fingerprint: Callable[[Path], str]


@dataclass(frozen=True)
class Built:
    """The result of this process's share of a run."""

    records: StepFolder | None
    """None: the run was to stop before."""
    num_shards: int
    report: ConstructionReport | None
    """None while others still work."""


def build(job: BuildJob, rank_info: RankInfo, models: ModelSettings) -> Built:
    """Does this process's share of building a dataset; the process that finds all shards finished
    writes the report.

    Args:
        job: what is built, and from what.
        rank_info: which of the processes this is.
        models: how models are run.

    Raises:
        ValueError: arguments or inputs cannot be used; raised before any model is opened.
    """
    job.options.check(CAPTION)
    origins = _Origins(job, models)
    reads = origins.files_read()
    refuse_to_overwrite([job.output / name for name in PRODUCTS], reads, "--output")
    refuse_to_write_into(job.output, [path for path in reads if path.is_dir()], "--output")
    plan = make_build_plan(job.output, job.inputs, job.shard_size, job.limit, job.options)
    steps = [step for step in origins.steps(plan) if step is not None]
    shown: dict[str, Progress] = {}

    def report(name: str, done: int, total: int) -> None:
        if name not in shown:
            who = f"rank {rank_info.rank}: {name}" if rank_info.world_size > 1 else name
            shown[name] = Progress(who, "shard", is_shared=rank_info.world_size > 1)
        shown[name](done, total)

    run_steps(steps, plan.num_shards, rank_info, report)
    records = steps[-1].folder if job.masks is not None else None
    if not are_done(steps, plan.num_shards):
        return Built(records, plan.num_shards, None)
    made = make_report([step.folder for step in steps], plan.num_shards)
    write_json(job.output / REPORT_FILES[0], made.json())
    write_text(job.output / REPORT_FILES[1], made.text() + "\n")
    return Built(records, plan.num_shards, made)


class _Origins:
    """Models and files of the three steps, checked."""

    def __init__(self, job: BuildJob, models: ModelSettings) -> None:
        self._job, self._models = job, models
        self._files: dict[Path, Annotations] = {}
        if job.captions != INPUT and self._is_model("--captions", job.captions, INPUT):
            check_type(Path(job.captions), "--captions", CAPTION_TYPE, CAPTION_EXAMPLE)
        if job.entities not in (None, NOUN_PHRASES):
            if self._is_model("--entities", job.entities, NOUN_PHRASES):
                model_type(Path(job.entities))
        if job.masks is not None and self._is_model("--masks", job.masks):
            check_type(Path(job.masks), "--masks", MASK_TYPE, MASK_EXAMPLE)

    def steps(self, plan: BuildPlan) -> list[Step | None]:
        """Captions, entities, records; None for those that are not asked for."""
        return [self._captions(plan), self._entities(), self._records(plan)]

    def files_read(self) -> list[Path]:
        """Files and folders of the job, whether they are read for one step or for all."""
        job, words = self._job, (None, INPUT, NOUN_PHRASES)
        makers = [Path(p) for p in (job.captions, job.entities, job.masks) if p not in words]
        root = [] if job.options.image_root is None else [Path(job.options.image_root)]
        sources = [source.path for source in find_sources(job.inputs)]
        return [*sources, *makers, *root, *job.files_read]

    def _captions(self, plan: BuildPlan) -> Step:
        job = self._job
        settings = {"made by": self._mark(job.captions, INPUT)}
        folder = self._folder("captions")
        if job.captions == INPUT or not Path(job.captions).is_dir():
            annotations = None if job.captions == INPUT else self._annotations(job.captions)
            return Step(folder, ProvidedCaptions(plan, annotations), settings)
        model: OnDemand[Captioner] = OnDemand(self._open_captioner)
        work = ModelCaptions(
            plan, SquareImages(job.options), model, job.batch_size, job.num_threads
        )
        settings |= {
            "--caption-tokens": job.caption_tokens,
            "--precision": str(self._models.dtype),
            "--min-image-side": job.options.min_image_side,
        }
        return Step(folder, work, settings, model)

    def _entities(self) -> Step | None:
        job = self._job
        if job.entities is None:
            return None
        settings: dict[str, Any] = {
            "made by": self._mark(job.entities, NOUN_PHRASES),
            "--max-entities": job.max_entities,
        }
        model: OnDemand[Answerer] | None = None
        annotations = None
        if job.entities != NOUN_PHRASES and Path(job.entities).is_dir():
            model = OnDemand(self._open_entity_model)
            settings |= {
                "--entity-tokens": job.entity_tokens,
                "--entity-prompt": job.entity_prompt,
                "--precision": str(self._models.dtype),
            }
        elif job.entities != NOUN_PHRASES:
            annotations = self._annotations(job.entities)
        captions = self._folder("captions")
        work = Entities(captions, model, annotations, job.batch_size, job.max_entities)
        return Step(self._folder("entities"), work, settings, model)

    def _records(self, plan: BuildPlan) -> Step | None:
        job = self._job
        if job.masks is None:
            return None
        settings: dict[str, Any] = {
            "made by": self._mark(job.masks),
            "--min-entity-side": job.min_entity_side,
            "--min-image-side": job.options.min_image_side,
            "--picture-size": job.form.max_side,
            "--picture-format": job.form.format,
        }
        model: OnDemand[Segmenter] | None = None
        finder: OnDemand[Segmenter] | Annotations
        if Path(job.masks).is_dir():
            finder = model = OnDemand(self._open_segmenter)
            settings |= {"--threshold": job.threshold, "--precision": str(self._models.dtype)}
        else:
            finder = self._annotations(job.masks)
        folder = self._folder("records")
        work = Masks(
            plan,
            SquareImages(job.options),
            self._folder("entities"),
            folder,
            finder,
            job.form,
            job.threshold,
            job.min_entity_side,
            job.batch_size,
            job.num_threads,
        )
        return Step(folder, work, settings, model)

    def _folder(self, name: str) -> StepFolder:
        return StepFolder(self._job.output, name)

    def _is_model(self, option: str, value: str, word: str | None = None) -> bool:
        if not Path(value).exists():
            also = f' or "{word}"' if word else ""
            raise ValueError(f"{option} {value} is neither a model folder nor a file{also}")
        return Path(value).is_dir()

    def _mark(self, value: str, word: str | None = None) -> str:
        if value == word:
            return value
        return f"{Path(value).name} {self._models.fingerprint(Path(value))}"

    def _annotations(self, value: str) -> Annotations:
        path = Path(value).resolve()
        if path not in self._files:
            self._files[path] = Annotations(path, self._job.options.image_root)
        return self._files[path]

    def _open_captioner(self) -> Captioner:
        # Models are imported when they are needed: own annotations need none of them.
        from megatron_kosmosg.construction.captioner import Blip2Captioner

        folder, device = Path(self._job.captions), self._models.open_device()
        return Blip2Captioner(folder, self._models.dtype, device, self._job.caption_tokens)

    def _open_entity_model(self) -> Answerer:
        from megatron_kosmosg.construction.entity_model import EntityModel

        assert self._job.entities is not None
        return EntityModel(
            Path(self._job.entities),
            self._models.dtype,
            self._models.open_device(),
            self._job.entity_tokens,
            self._job.entity_prompt,
        )

    def _open_segmenter(self) -> Segmenter:
        from megatron_kosmosg.construction.segmenter import ClipSegmenter

        assert self._job.masks is not None
        device = self._models.open_device()
        return ClipSegmenter(Path(self._job.masks), self._models.dtype, device)
