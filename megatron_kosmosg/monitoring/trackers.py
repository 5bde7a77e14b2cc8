"""Where the numbers and images of a run are shown beside metrics.jsonl: TensorBoard, and Weights &
Biases where `logging.wandb` names a project. Of rank 0 alone."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import flatten
from megatron_kosmosg.config.paths import output_folder
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.files import write_text

_CHARTS = {"loss": {"train and held out": ["Multiline", ["train/loss$", "heldout/heldout_loss$"]]}}
"""For TensorBoard's Custom Scalars: {category: {chart: [kind, tags]}}."""


class Tracker(Protocol):
    """One place that shows a run, such as TensorBoard."""

    def numbers(self, group: str, values: Mapping[str, float], iteration: int) -> None:
        """Shows numbers of an iteration. `group` is train or heldout."""
        ...

    def image(self, name: str, image: Image.Image, words: Sequence[str], iteration: int) -> None:
        """Shows an image. `words` say what its rows are of, and are shown beside it."""
        ...

    def close(self) -> None:
        """Keeps everything that was told so far, and ends."""
        ...


def open_trackers(config: RunConfig, start_iteration: int) -> list[Tracker]:
    """The trackers that `config` asks for. What earlier starts told of iterations after
    start_iteration is void.

    Raises ConfigError where Weights & Biases refuses to begin.
    """
    trackers: list[Tracker] = []
    if config.logging.tensorboard:
        trackers.append(TensorBoard(output_folder(config) / "tensorboard", start_iteration))
    if config.logging.wandb is not None:
        trackers.append(WeightsAndBiases(config))
    return trackers


def check_trackers(config: RunConfig) -> None:
    """Raises ConfigError for one whose package is not installed."""
    if config.logging.wandb is not None and find_spec("wandb") is None:
        raise ConfigError(
            f"logging.wandb={config.logging.wandb} needs the package wandb, which is not "
            "installed: pip install 'megatron-kosmosg[wandb]', or set logging.wandb=null"
        )


class TensorBoard:
    """Event files in `folder`. Training and held-out loss also share a chart."""

    def __init__(self, folder: Path, start_iteration: int) -> None:
        # Imports torch, which a mistyped setting does not wait for.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_iteration + 1)
        self._writer.add_custom_scalars(_CHARTS)

    def numbers(self, group: str, values: Mapping[str, float], iteration: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, iteration)

    def image(self, name: str, image: Image.Image, words: Sequence[str], iteration: int) -> None:
        import numpy as np  # not for --help

        pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image(name, pixels, iteration, dataformats="HWC")
        if words:
            # An indented block: nothing in a caption is taken for markup.
            block = "\n".join(f"    {line}" for line in _numbered(words))
            self._writer.add_text(f"{name}/words", block, iteration)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project `logging.wandb`, which a resumed run goes on with.

    WANDB_MODE=offline keeps all of it in the run's folder (`wandb sync` sends it later). Charts are
    over `iteration`: what is told again after a resume is shown twice, nothing can be taken back.
    """

    def __init__(self, config: RunConfig) -> None:
        wandb: Any = import_module("wandb")
        self._wandb, folder = wandb, output_folder(config)
        settings = wandb.Settings(
            silent=True, console="off", x_disable_stats=True, save_code=False, disable_git=True
        )
        try:
            self._run = wandb.init(
                project=config.logging.wandb,
                name=folder.name,
                id=_run_id(folder / "wandb" / "run_id"),
                resume="allow",
                dir=str(folder),
                config=flatten(config),
                settings=settings,
            )
        except (wandb.Error, OSError) as error:
            raise ConfigError(
                f"logging.wandb={config.logging.wandb}: {error}; log in once with `wandb login`, "
                "or set WANDB_MODE=offline"
            ) from error
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def numbers(self, group: str, values: Mapping[str, float], iteration: int) -> None:
        named = {f"{group}/{name}": value for name, value in values.items()}
        self._run.log({"iteration": iteration, **named})

    def image(self, name: str, image: Image.Image, words: Sequence[str], iteration: int) -> None:
        shown: Any = self._wandb.Image(image.convert("RGB"), caption="\n".join(_numbered(words)))
        self._run.log({"iteration": iteration, name: shown})

    def close(self) -> None:
        self._run.finish()


def _numbered(words: Sequence[str]) -> list[str]:
    """The words in one line for each row of an image."""
    return [f"{row} {' '.join(text.split())}" for row, text in enumerate(words, start=1)]


def _run_id(file: Path) -> str:
    """The run's name at Weights & Biases, the same at every start of the run."""
    if file.is_file():
        found = file.read_text(encoding="utf-8").strip()
        if re.fullmatch("[0-9a-f]{16}", found):
            return found
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, secrets.token_hex(8) + "\n", only_writer=True)
    return file.read_text(encoding="utf-8").strip()
