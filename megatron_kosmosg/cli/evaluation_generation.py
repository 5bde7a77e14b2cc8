"""What the benchmarks have in common: the images are generated, then scored, then reported on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_kosmosg.command_line import (
    CommandParser,
    add_dtype,
    add_seed,
    add_stable_diffusion,
    add_tokenizer_model,
    file_path,
    number_from_zero,
    positive_int,
)
from megatron_kosmosg.inference.noise_schedules import SAVED, SCHEDULERS

if TYPE_CHECKING:
    from megatron_kosmosg.inference.prompt_records import PromptRecord
    from megatron_kosmosg.launcher import RankInfo

STEPS = ("generate", "score", "report")
IMAGES = "images"
"""Folder of the generated ones below the output."""
SEEDS, AUTHORS = "seeds", "authors"
AUTHORS_NOISE = (
    "the authors' rows (theirs were a GPU's draw in fp16; a CPU's generator draws other numbers)"
)


def add_generation(
    parser: CommandParser, *, images: int, steps: int, guidance: float, scheduler: str
) -> None:
    """The model and how it draws, with the authors' settings as defaults."""
    parser.add_argument(
        "--only",
        choices=STEPS,
        help="one step (all three in a row; several ranks take one at a time)",
    )
    group = parser.add_argument_group("generation", "with the authors' settings")
    group.add_argument(
        "--model",
        type=file_path,
        required=True,
        metavar="FOLDER",
        help="exported folder, or run or checkpoint of align or instruct",
    )
    add_stable_diffusion(group, "whose U-Net, VAE and scheduler draw (the model's own)")
    add_tokenizer_model(group, "of a checkpoint: as its config says")
    group.add_argument(
        "--num-images",
        type=positive_int,
        default=images,
        metavar="N",
        help=f"of each prompt ({images})",
    )
    group.add_argument(
        "--noise",
        choices=(SEEDS, AUTHORS),
        default=SEEDS,
        help="what images start from: a seed each, or the rows of the authors' batches (seeds)",
    )
    add_seed(group, "of --noise seeds")
    group.add_argument(
        "--steps", type=positive_int, default=steps, metavar="N", help=f"of the scheduler ({steps})"
    )
    group.add_argument(
        "--guidance-scale",
        type=number_from_zero,
        default=guidance,
        metavar="W",
        help=f"how closely to follow the prompt ({guidance:g})",
    )
    group.add_argument(
        "--scheduler",
        choices=(SAVED, *SCHEDULERS),
        default=scheduler,
        help=f"the scheduler ({scheduler})",
    )
    add_dtype(group, "all weights", None, "fp16 on a GPU, fp32 on a CPU")
    group.add_argument(
        "--batch-size", type=positive_int, default=1, metavar="N", help="prompts drawn together (1)"
    )


def takes(args: argparse.Namespace, step: str) -> bool:
    """Whether this call of the command is to do that step."""
    return args.only in (None, step)


def check_ranks(args: argparse.Namespace, rank_info: RankInfo) -> None:
    """Raises ConfigError where ranks would score what others have not drawn yet."""
    from megatron_kosmosg.config.errors import ConfigError

    if rank_info.world_size > 1 and args.only is None:
        raise ConfigError(
            f"{rank_info.world_size} ranks take one step at a time: give --only generate, and when "
            "all are done --only score, which writes the report, too"
        )


def draw(
    args: argparse.Namespace,
    records: Sequence[PromptRecord],
    rank_info: RankInfo,
    *,
    rounds_down: bool = False,
) -> None:
    """This rank's share of the images, into output/images; finished ones stay, and damaged ones
    are drawn again. Raises ConfigError and PromptError for what cannot be used."""
    from megatron_kosmosg.inference.generation_run import RunRequest, run
    from megatron_kosmosg.inference.model_source import find_model
    from megatron_kosmosg.inference.prompt_records import GenerationOptions
    from megatron_kosmosg.parallel.devices import named_device

    device = named_device(args.device, rank_info)
    request = RunRequest(
        records=records,
        is_list=True,
        source=find_model(args.model, args.stable_diffusion, args.tokenizer_model),
        defaults=GenerationOptions(
            negative_prompt="",
            seed=args.seed,
            num_images=args.num_images,
            steps=args.steps,
            guidance=args.guidance_scale,
        ),
        scheduler=args.scheduler,
        dtype=args.dtype or ("fp32" if device.type == "cpu" else "fp16"),
        device=device,
        output=args.output / IMAGES,
        batch_size=args.batch_size,
        rounds_down=rounds_down,
    )
    finished = run(request, rank_info)
    rank = f"rank {rank_info.rank}: " if rank_info.world_size > 1 else ""
    print(f"{rank}{finished.num_drawn} drawn, {finished.num_kept} kept in {request.output}")


def image_of(args: argparse.Namespace, name: str, index: int) -> Path:
    """The file of an image of a prompt. Raises ConfigError if it is not there."""
    from megatron_kosmosg.config.errors import ConfigError

    path: Path = args.output / IMAGES / f"{name}-{index}.png"
    if not path.is_file():
        raise ConfigError(f"{path} is not there; --only generate draws what is missing")
    return path


def generation_settings(args: argparse.Namespace) -> dict[str, object]:
    """The settings of the generation that the result states."""
    return {
        "images of a prompt": args.num_images,
        "noise": f"seed {args.seed}" if args.noise == SEEDS else AUTHORS_NOISE,
        "sampler": f"{args.scheduler}, {args.steps} steps, guidance {args.guidance_scale:g}",
    }
