"""Cached VAE moments: what is stored, restarts, refusals, and the loss of training with them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_kosmosg.cli import cache_latents as command
from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.config.schema import ScoreConfig
from megatron_kosmosg.data.bad_images import TooManyBadImages
from megatron_kosmosg.data.images import ImageDecoder
from megatron_kosmosg.data.latent_cache import LatentCache, LatentManifest
from megatron_kosmosg.data.normalise import normalise_batch, target_pixels
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.streams import instruct_stream
from megatron_kosmosg.models.diffusion import (
    FrozenDiffusion,
    load_vae,
    vae_fingerprint,
    vae_moments,
)
from megatron_kosmosg.parallel.context import single_process_context
from megatron_kosmosg.preprocess.latent_moments import LatentJob, cache_latents
from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob, preprocess
from megatron_kosmosg.preprocess.shards_of_dataset import list_shards
from megatron_kosmosg.score.loss import ColocatedScore
from tests.support.data_helpers import (
    break_image,
    build_dataset,
    encode_image,
    overwrite_image,
    run_config,
    write_jsonl,
    write_tokenizer,
)
from tests.support.tiny_models import (
    CONDITION_WIDTH,
    NUM_QUERIES,
    TARGET_SIZE,
    write_stable_diffusion,
)

KINDS = ("caption", "edit", "compositional")
CPU = torch.device("cpu")
TRANSFORM = target_pixels(TARGET_SIZE)
DECODER = ImageDecoder("pillow")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return load_vae(write_stable_diffusion(tmp_path_factory.mktemp("sd")), torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vae):
    """Datasets of all kinds, one with a bad target, and their caches."""
    folder = tmp_path_factory.mktemp("latents")
    for kind in KINDS:
        build_dataset(folder, kind, 14)
    break_image(folder, "edit", "-broken", 3, 1)
    for name in (*KINDS, "edit-broken"):
        assert encode(SampleStore(folder / name), vae)
    return folder


def encode(store: SampleStore, vae, name: str = "latents", rank=0, world_size=1, stop_after=None):
    job = LatentJob(store, name, TRANSFORM, "fp32", batch_size=2, shard_size=4)
    done = []

    def progress(samples: int, total: int) -> None:
        if samples:
            done.append(samples)
        if len(done) == stop_after:
            raise KeyboardInterrupt

    mark = vae_fingerprint(vae)
    return cache_latents(job, vae, mark, DECODER, rank, world_size, progress).is_complete


def test_moments_are_those_of_the_vae_within_half_precision(folder, vae):
    for kind, place in (("caption", 0), ("edit", 1), ("compositional", 0)):
        store = SampleStore(folder / kind)
        cache = LatentCache(store, "latents", vae_fingerprint(vae), TRANSFORM)
        pixels = DECODER.decode([store[i].images()[place] for i in range(14)], TRANSFORM)
        expected = vae_moments(vae, pixels).numpy()
        found = np.stack([cache.moments(i) for i in range(14)])
        assert found.dtype == np.float16 and found.shape == (14, 2, 4, 8, 8)
        np.testing.assert_allclose(found.astype(np.float32), expected, rtol=1e-3, atol=1e-4)


def test_ranks_and_restarts_write_the_same_bytes(folder, vae):
    store = SampleStore(folder / "edit")
    with pytest.raises(KeyboardInterrupt):
        encode(store, vae, "many", rank=1, world_size=2, stop_after=1)
    assert not encode(store, vae, "many", rank=0, world_size=3)
    assert not Path(f"{store.prefix}.many.json").exists()
    calls = []

    class Counting(type(vae)):
        def encode(self, pixels):
            calls.append(len(pixels))
            return super().encode(pixels)

    counting = Counting.from_config(vae.config)
    counting.load_state_dict(vae.state_dict())
    assert encode(store, counting, "many")
    assert sum(calls) == 4, "only the shard that nobody had done"
    for end in (".bin", ".idx", ".json"):
        one = Path(f"{store.prefix}.latents{end}").read_bytes()
        assert one == Path(f"{store.prefix}.many{end}").read_bytes()
    assert encode(store, vae, "many"), "a finished cache is left alone"
    left = {path.name for path in folder.iterdir() if path.name.startswith("edit.many")}
    assert left == {"edit.many.bin", "edit.many.idx", "edit.many.json", "edit.many.lock"}


def test_other_vae_transform_or_dataset_is_refused(folder, vae, tmp_path):
    store, mark = SampleStore(folder / "caption"), vae_fingerprint(vae)
    with pytest.raises(ValueError, match=r"transform: made from 16 px.*this run has 32 px"):
        LatentCache(store, "latents", mark, target_pixels(32))
    other = load_vae(write_stable_diffusion(tmp_path), torch.float32)
    with torch.no_grad():
        other.quant_conv.bias += 1e-3
    with pytest.raises(ValueError, match="vae: made from"):
        LatentCache(store, "latents", vae_fingerprint(other), TRANSFORM)
    with pytest.raises(ValueError, match="another vae"):
        encode(store, other)
    with pytest.raises(ValueError, match=r"run `kosmosg cache-latents --name absent`"):
        LatentCache(store, "absent", mark, TRANSFORM)
    changed = SampleStore(build_dataset(tmp_path, "caption", 15))
    for end in (".bin", ".idx", ".json"):
        content = Path(f"{store.prefix}.latents{end}").read_bytes()
        Path(f"{changed.prefix}.latents{end}").write_bytes(content)
    with pytest.raises(ValueError, match="dataset: made from"):
        LatentCache(changed, "latents", mark, TRANSFORM)
    with pytest.raises(ValueError, match="only caption, edit, compositional"):
        encode(SampleStore(build_dataset(tmp_path, "text", 2)), vae)


def test_shards_have_caches_of_their_own_and_take_that_of_the_joined_dataset(
    folder, vae, tmp_path, capsys
):
    mark = vae_fingerprint(vae)
    shards = [build_dataset(tmp_path, "edit", 3 + n, seed=n, name=f"-{n}") for n in range(2)]
    list_shards(str(tmp_path / "all"), shards)
    store = SampleStore(tmp_path / "all")
    assert encode(SampleStore(shards[0]), vae)
    with pytest.raises(InputError, match=r"no finished cache at .*edit-1\.latents; run"):
        LatentCache(store, "latents", mark, TRANSFORM)
    sd = write_stable_diffusion(tmp_path / "sd")
    arguments = [str(tmp_path / "all"), "--stable-diffusion", str(sd), "--name", "own"]
    arguments += ["--image-size", str(TRANSFORM.size), "--image-backend", "pillow"]
    assert command.main([*arguments, "--dtype", "fp32"]) == 0
    assert capsys.readouterr().out.count("complete; 0 of") == 2
    cache = LatentCache(store, "own", vae_fingerprint(load_vae(sd, torch.float32)), TRANSFORM)
    for number, shard in enumerate(shards):
        own_store = SampleStore(shard)
        shard_cache = LatentCache(own_store, "own", cache.manifest.source.vae, TRANSFORM)
        for index in range(len(own_store)):
            assert np.array_equal(shard_cache.moments(index), cache.moments(3 * number + index))
    for end in (".bin", ".idx", ".json"):  # one shard's under the other's name
        content = Path(f"{shards[0]}.own{end}").read_bytes()
        Path(f"{shards[1]}.own{end}").write_bytes(content)
    with pytest.raises(InputError, match=r"edit-1\.own does not fit this run\n  dataset: made"):
        LatentCache(store, "own", cache.manifest.source.vae, TRANSFORM)
    # A cache of the whole, made before the dataset was cut, is as good.
    assert encode(store, vae, "whole")
    whole = LatentCache(store, "whole", mark, TRANSFORM)
    assert whole.moments(len(store) - 1).shape == (2, 4, 8, 8)


def without_decoder(prefix: str) -> None:
    """As a cache was written before decoders were noted."""
    path = Path(f"{prefix}.latents.json")
    stated = json.loads(path.read_text())
    assert stated["source"].pop("decoder") == DECODER.description
    path.write_text(json.dumps(stated))


def test_a_cache_of_before_opens_with_a_note_unless_targets_are_transparent(tmp_path, vae, caplog):
    mark = vae_fingerprint(vae)
    prefix = build_dataset(tmp_path, "caption", 3)
    assert encode(SampleStore(prefix), vae)
    without_decoder(prefix)
    with caplog.at_level("WARNING"):
        cache = LatentCache(SampleStore(prefix), "latents", mark, TRANSFORM)
    assert "does not say what decoded its targets" in caplog.text
    assert cache.moments(2).shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="another decoder"):
        encode(SampleStore(prefix), vae)
    clear = Image.new("RGBA", (12, 12), (200, 30, 30, 255))
    clear.putpixel((3, 3), (0, 0, 0, 0))
    (tmp_path / "clear.png").write_bytes(encode_image(clear))
    source = write_jsonl(tmp_path / "c.jsonl", [{"image": "clear.png", "caption": "a dog"}])
    model, prefix = str(write_tokenizer(tmp_path)), str(tmp_path / "clear")
    preprocess(PreprocessJob("caption", (str(source),), model, prefix), lambda *_: None)
    assert encode(SampleStore(prefix), vae)
    LatentCache(SampleStore(prefix), "latents", mark, TRANSFORM)
    without_decoder(prefix)
    with pytest.raises(InputError, match="made before transparent pixels .* became white"):
        LatentCache(SampleStore(prefix), "latents", mark, TRANSFORM)


def test_the_decoders_of_the_vae_do_not_matter_to_its_fingerprint(vae):
    mark = vae_fingerprint(vae)
    with torch.no_grad():
        vae.post_quant_conv.bias += 1
        assert vae_fingerprint(vae) == mark
        vae.post_quant_conv.bias -= 1


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_loss_with_and_without_the_cache_differs_by_storage_error(
    folder, vae, tmp_path, prediction_type
):
    """Same samples, same keyed posterior sample; a bad target counts for nothing."""
    blend = {name: (str(folder / name), 1.0) for name in (*KINDS, "edit-broken")}
    config = run_config(folder, "instruct", blend, target_image_size=TARGET_SIZE)
    data = dataclasses.replace(config.data, latent_cache="latents")
    cached_config = dataclasses.replace(config, data=data)
    plain = instruct_stream(config, "train")
    cached = instruct_stream(cached_config, "train", vae=vae_fingerprint(vae))
    sd = write_stable_diffusion(tmp_path, prediction_type)
    diffusion = FrozenDiffusion.from_folder(sd, device=CPU, dtype=torch.float32)
    score = ColocatedScore(diffusion, single_process_context(CPU), ScoreConfig(), 7)
    condition = torch.randn(32, NUM_QUERIES, CONDITION_WIDTH)
    batches = [s.collate([s[p] for p in range(32)], 1) for s in (plain, cached)]
    batches = [normalise_batch(batch, config) for batch in batches]
    assert "target_pixel_values" not in batches[1]
    assert batches[1]["target_moments"].dtype == torch.float16
    assert batches[0]["bad_samples"] == batches[1]["bad_samples"] == 1
    assert torch.equal(batches[0]["tokens"], batches[1]["tokens"])
    weights = batches[0]["target_weights"]
    assert torch.equal(weights, batches[1]["target_weights"]) and weights.sum() == 31
    losses = [
        score(condition, targets, weights, batches[0]["stream_positions"], "instruct")
        for targets in (batches[0]["target_pixel_values"], batches[1]["target_moments"])
    ]
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)
    other = 100 + batches[0]["stream_positions"]
    other_noise = score(condition, batches[1]["target_moments"], weights, other, "instruct")
    assert (other_noise - losses[1]).abs() > 10 * (losses[0] - losses[1]).abs()


def broken_dataset(folder: Path, count: int) -> SampleStore:
    """Edits of which the first `count` of 14 have a target that cannot be decoded."""
    prefix = build_dataset(folder, "edit", 14)
    for index in range(count):
        overwrite_image(prefix, index, 1)
    return SampleStore(prefix)


def run_tool(store: SampleStore, sd: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_kosmosg.cli.cache_latents", str(store.prefix)]
    command += ["--stable-diffusion", str(sd), "--image-size", str(TARGET_SIZE)]
    command += ["--image-backend", "pillow", "--shard-size", "4", *more]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )


def test_the_tool_says_how_many_targets_are_bad_and_stops_at_the_limit(tmp_path, vae):
    store, sd = broken_dataset(tmp_path, 5), write_stable_diffusion(tmp_path / "sd")
    done = run_tool(store, sd, "--max-bad-images", "4")
    assert done.returncode == 3 and "complete" not in done.stdout
    last = done.stderr.splitlines()[-1]
    assert "5 of 14 target images cannot be decoded: sample edit-0: " in last
    assert "--max-bad-images allows 4" in last
    assert not Path(f"{store.prefix}.latents.json").exists()
    done = run_tool(store, sd, "--max-bad-images", "5")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    for part in ("latents: complete; 5 of 14 target images", "sample edit-0: ", "sample edit-2: "):
        assert part in last
    cache = LatentCache(store, "latents", vae_fingerprint(vae), TRANSFORM)
    assert [i for i in range(14) if cache.moments(i) is None] == [0, 1, 2, 3, 4]
    with pytest.raises(TooManyBadImages, match="5 of 14 .* sample edit-1: "):
        job = LatentJob(store, "latents", TRANSFORM, "fp32", max_bad_images=3)
        cache_latents(job, vae, vae_fingerprint(vae), DECODER, 0, 1, lambda *_: None)


def test_bad_targets_of_all_ranks_and_starts_count_together(tmp_path, vae):
    store, mark = broken_dataset(tmp_path, 5), vae_fingerprint(vae)
    job = LatentJob(store, "ranks", TRANSFORM, "fp32", shard_size=4, max_bad_images=4)
    first = cache_latents(job, vae, mark, DECODER, 0, 2, lambda *_: None)
    assert not first.is_complete and first.bad.count == 4
    with pytest.raises(TooManyBadImages, match="5 of 14"):
        cache_latents(job, vae, mark, DECODER, 1, 2, lambda *_: None)
    with pytest.raises(TooManyBadImages, match="4 of 14 .* allows 3"):
        less = dataclasses.replace(job, max_bad_images=3)
        cache_latents(less, vae, mark, DECODER, 0, 1, lambda *_: None)


def test_a_set_without_any_decodable_target_is_never_complete(tmp_path, vae):
    store = broken_dataset(tmp_path, 14)
    job = LatentJob(store, "none", TRANSFORM, "fp32", max_bad_images=1000)
    with pytest.raises(TooManyBadImages, match="14 of 14 .*one must be"):
        cache_latents(job, vae, vae_fingerprint(vae), DECODER, 0, 1, lambda *_: None)


def test_a_cache_of_before_says_no_reasons(folder, tmp_path):
    manifest = LatentManifest.read(folder / "edit-broken.latents.json")
    assert manifest.num_bad == 1 and manifest.first_bad[0].startswith("sample edit-3: ")
    old = json.loads((folder / "edit-broken.latents.json").read_text())
    del old["first_bad"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert LatentManifest.read(tmp_path / "old.json").first_bad == []


def test_the_held_out_stream_keeps_its_images(folder, vae):
    blend = {"edit": (str(folder / "edit"), 1.0)}
    config = run_config(
        folder, "instruct", blend, target_image_size=TARGET_SIZE, latent_cache="latents"
    )
    stream = instruct_stream(config, "heldout", vae=vae_fingerprint(vae))
    assert stream.collate([stream[0]], 1)["target_pixel_values"].shape == (1, 3, 16, 16)
