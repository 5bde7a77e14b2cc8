"""VAE moments of every target image, computed once: PREFIX.NAME.bin/.idx/.json beside a dataset."""

from __future__ import annotations

import argparse
import os
import sys

EPILOG = """\
`instruct` then takes the moments instead of decoding and encoding the images each time:
data.latent_cache=NAME. The posterior is still sampled anew for every use. A cache of another VAE,
image size or dataset is refused. 64 KiB a sample at 512 pixels.

Start it once, or on many GPUs; ranks come from torchrun or srun and share the work. After an
interruption the same command goes on where it stopped, also with another number of ranks.

Targets that cannot be decoded get no moments; the last line says how many and why, and more than
--max-bad-images end it with exit code 1.

examples:
  tools/cache_latents.py data/edit --stable-diffusion /data/stable-diffusion-v1-5
  torchrun --nproc-per-node 8 tools/cache_latents.py data/edit data/compositional data/caption \\
      --stable-diffusion /data/stable-diffusion-v1-5 --precision bf16 --workers 8
  python -m megatron_kosmosg.train --config F.yaml data.latent_cache=latents
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="datasets to encode")
    parser.add_argument(
        "--stable-diffusion", required=True, metavar="FOLDER", help="folder that holds vae/"
    )
    parser.add_argument("--name", default="latents", help="of the caches (latents)")
    parser.add_argument(
        "--image-size", type=int, default=512, metavar="N", help="data.target_image_size (512)"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the VAE (fp32)"
    )
    parser.add_argument("--image-backend", choices=("auto", "dali", "pillow"), default="auto")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images (16)")
    parser.add_argument(
        "--shard-size", type=int, default=1024, metavar="N", help="samples between marks (1024)"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="decoding threads (2)")
    parser.add_argument(
        "--max-bad-images",
        type=int,
        default=100,
        metavar="N",
        help="stop when more targets of a dataset cannot be decoded (100)",
    )
    given = parser.parse_args()
    if given.max_bad_images < 0:
        parser.error("--max-bad-images must not be negative")
    if min(given.image_size, given.batch_size, given.shard_size, given.workers) < 1:
        parser.error("--image-size, --batch-size, --shard-size and --workers must be at least 1")
    return given


def main() -> int:
    """0 when this rank's share is done; with a message on stderr 1 too many undecodable images, 2
    wrong input, 130 interrupted."""
    given = parse()
    from megatron_kosmosg.data.bad_images import TooManyBadImages
    from megatron_kosmosg.data.images import ImageDecoder, target_pixels
    from megatron_kosmosg.data.minute_lines import MinuteLines
    from megatron_kosmosg.data.store import SampleStore
    from megatron_kosmosg.models.diffusion import load_vae, vae_fingerprint
    from megatron_kosmosg.parallel.devices import choose_device
    from megatron_kosmosg.parallel.platform import torch_dtype
    from megatron_kosmosg.parallel.rendezvous import find_place
    from megatron_kosmosg.preprocess.latent_moments import LatentJob, cache_latents

    place = find_place(os.environ)
    device = choose_device(place)
    try:
        weights = load_vae(given.stable_diffusion, torch_dtype("fp32"))
        mark = vae_fingerprint(weights)
        vae = load_vae(given.stable_diffusion, torch_dtype(given.precision)).to(device)
        decoder = ImageDecoder(given.image_backend, device.index)
        for prefix in given.prefixes:
            job = LatentJob(
                store=SampleStore(prefix),
                name=given.name,
                transform=target_pixels(given.image_size),
                precision=given.precision,
                batch_size=given.batch_size,
                shard_size=given.shard_size,
                num_workers=given.workers,
                max_bad_images=given.max_bad_images,
            )
            said = MinuteLines(f"{prefix}.{given.name}")
            cached = cache_latents(job, vae, mark, decoder, place.rank, place.world_size, said)
            state = "this rank's share is done, others still work"
            if cached.is_complete:
                state = "complete"
            bad = cached.bad.text(len(job.store))
            print(f"{prefix}.{given.name}: {state}; {bad}", flush=True)
    except (ValueError, OSError) as error:
        print(f"cache_latents: {error}", file=sys.stderr)
        return 1 if isinstance(error, TooManyBadImages) else 2
    except KeyboardInterrupt:
        print("cache_latents: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
