"""The latents of every target image, computed once: PREFIX.NAME.bin/.idx/.json beside a dataset."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import (
    CommandParser,
    add_dtype,
    add_stable_diffusion,
    command_parser,
    name_part,
    natural_int,
    positive_int,
    report_error,
    run_command,
    some_text,
)
from megatron_kosmosg.terminal_text import printable

EPILOG = """\
`instruct` then takes the moments instead of decoding and encoding the images each time:
data.latent_cache=NAME. The posterior is still sampled anew for every use. A cache of another VAE,
image size or dataset is refused. 64 KiB a sample at 512 pixels.

Start it once, or on many GPUs; ranks come from launch or srun and share the work. After an
interruption the same command goes on where it stopped, also with another number of ranks.

Targets that cannot be decoded get no moments; the last line says how many and why, and more than
--max-bad-images end it with exit code 3. A dataset in shards gets a cache of each shard; what is
said here of a dataset is then said of a shard.

examples:
  kosmosg cache-latents data/edit --stable-diffusion /data/stable-diffusion-v1-5
  kosmosg launch --ranks 8 cache-latents data/edit data/compositional \\
      data/caption --stable-diffusion /data/stable-diffusion-v1-5 --dtype bf16 --threads 8
  kosmosg train --config F.yaml data.latent_cache=latents
"""


def build_parser() -> CommandParser:
    """The parser of the command and its options."""
    parser = command_parser("cache-latents", __doc__, EPILOG)
    add = parser.add_argument
    add("prefixes", nargs="+", type=some_text, metavar="PREFIX", help="datasets to encode")
    add_stable_diffusion(parser, "whose vae/ encodes", required=True)
    add("--name", type=name_part, default="latents", help="of the caches (latents)")
    add(
        "--image-size",
        type=positive_int,
        default=512,
        metavar="N",
        help="side in pixels, as data.target_image_size (512)",
    )
    add_dtype(parser, "the VAE")
    parser.renamed("--precision", "--dtype")
    add(
        "--image-backend",
        choices=("auto", "dali", "pillow"),
        default="auto",
        help="what decodes (auto: DALI where it is installed)",
    )
    add("--batch-size", type=positive_int, default=16, metavar="N", help="images (16)")
    add(
        "--shard-size",
        type=positive_int,
        default=1024,
        metavar="N",
        help="samples whose work is lost at most when a process ends (1024)",
    )
    add("--threads", type=positive_int, default=2, metavar="N", help="that decode (2)")
    parser.renamed("--workers", "--threads")
    add(
        "--max-bad-images",
        type=natural_int,
        default=100,
        metavar="N",
        help="stop when more targets of a dataset cannot be decoded (100)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when this rank's share is done; with a message on stderr 2 for wrong input, 3 for
    too many undecodable images, 130 when interrupted."""
    args = build_parser().parse_args(arguments)
    return run_command(lambda: _cache(args), "interrupted; the same command goes on from here")


def _cache(args: argparse.Namespace) -> int:
    from megatron_kosmosg.data.store import SampleStore

    # Before the libraries, which take seconds. A dataset in shards gets a cache of each shard.
    prefixes = [p for name in args.prefixes for p in SampleStore(name).shards.prefixes]

    from megatron_kosmosg.data.bad_images import TooManyBadImages
    from megatron_kosmosg.data.images import ImageDecoder
    from megatron_kosmosg.data.normalise import target_pixels
    from megatron_kosmosg.files import naming_disk
    from megatron_kosmosg.launcher import find_rank_info
    from megatron_kosmosg.models.diffusion import load_vae, vae_fingerprint
    from megatron_kosmosg.parallel.devices import choose_device, on_device
    from megatron_kosmosg.parallel.platform import torch_dtype
    from megatron_kosmosg.preprocess.latent_moments import LatentJob, cache_latents
    from megatron_kosmosg.progress import Progress

    rank_info = find_rank_info()
    device = choose_device(rank_info)
    folder = str(args.stable_diffusion)
    mark = vae_fingerprint(load_vae(folder, torch_dtype("fp32")))
    vae = on_device(load_vae(folder, torch_dtype(args.dtype)), device)
    decoder = ImageDecoder(args.image_backend, device.index)
    for prefix in prefixes:
        job = LatentJob(
            store=SampleStore(prefix),
            name=args.name,
            transform=target_pixels(args.image_size),
            precision=args.dtype,
            batch_size=args.batch_size,
            shard_size=args.shard_size,
            num_workers=args.threads,
            max_bad_images=args.max_bad_images,
        )
        shown = Progress(f"{prefix}.{args.name}", "sample", is_shared=rank_info.world_size > 1)
        try:
            with naming_disk(Path(f"{prefix}.{args.name}")):
                cached = cache_latents(
                    job, vae, mark, decoder, rank_info.rank, rank_info.world_size, shown
                )
        except TooManyBadImages as error:
            return report_error(str(error), exit_codes.MISSED)
        state = "this rank's share is done, others still work"
        if cached.is_complete:
            state = "complete"
        line = f"{prefix}.{args.name}: {state}; {cached.bad.text(len(job.store))}"
        print(printable(line), flush=True)
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
