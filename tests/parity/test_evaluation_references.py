"""Features and distances equal those of the reference implementations with the same weights.

CLIP's is transformers, which is always there. timm (DINO), torch-fidelity and torchmetrics (FID)
and scipy are laid over the environment by tests/evaluation_references.sh alone; without them their
tests are skipped, there they are not.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from megatron_kosmosg.evaluation.frechet import FeatureSums, Gaussian, frechet_distance
from megatron_kosmosg.evaluation.networks import (
    find_clip,
    find_dino,
    find_inception,
    open_network,
)
from megatron_kosmosg.evaluation.preprocessing import (
    FID_PROTOCOLS,
    clip_pixels,
    dino_pixels,
    tensorflow_resize,
)
from megatron_kosmosg.toy.stand_in_networks import write_clip, write_dino
from tests.support.evaluated_images import odd_images
from tests.support.scoring_networks import write_inception

CPU = torch.device("cpu")


def reference(name: str) -> ModuleType:
    """A module that the environment need not have."""
    if os.environ.get("KOSMOSG_REQUIRE_REFERENCES") == "1":
        return importlib.import_module(name)
    return pytest.importorskip(name)


def agree(what: str, difference: float | torch.Tensor, bound: float) -> None:
    """Asserts it, and says how near (`tests/evaluation_references.sh -s`, docs/evaluation.md)."""
    print(f"{what}: {float(difference):.1e}, bound {bound:.0e}")
    assert float(difference) < bound


@pytest.fixture
def no_torchvision(monkeypatch):
    """timm and torch-fidelity import it for what is not used here; it need not be installed."""
    names = ["", ".transforms", ".transforms.functional", ".datasets", ".models"]
    names += [".ops", ".ops.misc"]
    for name in (f"torchvision{end}" for end in names):
        stub = MagicMock(name=name)
        stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
        stub.__path__, stub.__version__ = [], "0.0"
        monkeypatch.setitem(sys.modules, name, stub)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    return write_inception(tmp_path_factory.mktemp("networks") / "inception.pth")


def test_clip_is_transformers(tmp_path):
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = write_clip(tmp_path / "clip")
    images = odd_images(6)
    texts = ["a red circle", "a blue square on a striped background and a long text"]
    model = CLIPModel.from_pretrained(folder).eval()
    prepared = CLIPImageProcessorPil()(images=images, return_tensors="pt")["pixel_values"]
    words = CLIPTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        seen = model.get_image_features(pixel_values=prepared).pooler_output
        read = model.get_text_features(**words).pooler_output
    pixels = torch.stack([clip_pixels(image) for image in images])
    agree("CLIP's pixels", (pixels - prepared).abs().max(), 2e-6)
    native = open_network(find_clip(folder), CPU)
    pairs = {
        "images": (native.features(pixels), seen),
        "texts": (native.text_features(texts), read),
    }
    for what, (found, expected) in pairs.items():
        distance = (F.cosine_similarity(found.double(), expected.double()) - 1).abs().max()
        agree(f"CLIP's {what}, cosine", distance, 1e-6)
    assert seen.std(dim=0).max() > 1e-3  # the images are told apart


def test_dino_is_timm_s(tmp_path, no_torchvision):
    timm = reference("timm")
    path = write_dino(tmp_path / "dino.pth")
    model = timm.create_model("vit_small_patch16_224.dino", pretrained=False, num_classes=0)
    model.load_state_dict(torch.load(path, weights_only=True))
    pixels = torch.stack([dino_pixels(image) for image in odd_images(4)])
    native = open_network(find_dino(path), CPU).features(pixels)
    with torch.no_grad():
        expected = model.eval()(pixels)
    found, by_timm = (
        F.cosine_similarity(each.double(), each.double().roll(1, 0)) for each in (native, expected)
    )
    agree("DINO and timm, cosines of pairs", (found - by_timm).abs().max(), 1e-6)
    agree("DINO and timm, features", (native - expected).abs().max(), 1e-4)


def test_inception_is_torch_fidelity_s_and_torchmetrics(inception, no_torchvision, monkeypatch):
    fidelity = reference("torch_fidelity.feature_extractor_inceptionv3")
    metrics = reference("torchmetrics.image.fid")
    monkeypatch.setattr(metrics, "_TORCH_FIDELITY_AVAILABLE", True)
    image = odd_images(6)[5]
    images = [image, image.transpose(Image.Transpose.ROTATE_90)]
    data = torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1) for each in images])
    protocol = FID_PROTOCOLS["kosmosg-first-run"]
    native = open_network(find_inception(inception), CPU).features(
        torch.stack([protocol.generated(image) for image in images])
    )
    network = fidelity.FeatureExtractorInceptionV3("x", ["2048"], str(inception))
    plain = metrics.NoTrainInceptionV3("y", ["2048"], str(inception), antialias=False)
    smooth = metrics.NoTrainInceptionV3("z", ["2048"], str(inception), antialias=True)
    with torch.no_grad():
        expected, same, other = network(data)[0], plain(data), smooth(data)
    scale = expected.abs().max()
    agree("Inception and torch-fidelity", (native - expected).abs().max() / scale, 1e-5)
    agree("Inception and torchmetrics", (native - same).abs().max() / scale, 1e-5)
    assert (native - other).abs().max() > 1e-3 * scale  # what newer torchmetrics do by themselves


@pytest.mark.parametrize("shape", [(256, 256), (32, 47), (512, 300)])
def test_the_resize_is_tensorflow_s(shape, no_torchvision):
    module = reference("torch_fidelity.interpolate_compat_tensorflow")
    pixels = torch.randint(0, 256, (3, *shape), generator=torch.Generator().manual_seed(4)).float()
    expected = module.interpolate_bilinear_2d_like_tensorflow1x(
        pixels[None], size=(299, 299), align_corners=False
    )
    agree("resize, of 255", (tensorflow_resize(pixels, 299) - expected[0]).abs().max(), 1e-3)


def gaussians(count: int, width: int = 48) -> tuple[list[torch.Tensor], list[Gaussian]]:
    generator = torch.Generator().manual_seed(count)
    mix = torch.randn(width, width, generator=generator)
    sets = [torch.randn(count, width, generator=generator) @ mix + shift for shift in (0.0, 0.1)]
    found = []
    for features in sets:
        sums = FeatureSums(width)
        for block in features.split(7):
            sums.add(block)
        found.append(sums.gaussian())
    return sets, found


@pytest.mark.parametrize("count", [300, 20])
def test_the_distance_is_torch_fidelity_s_and_scipy_s(count, no_torchvision):
    """Also with fewer features than dimensions, where the covariances have no inverse."""
    linalg = reference("scipy.linalg")
    metric = reference("torch_fidelity.metric_fid")
    sets, (one, other) = gaussians(count)
    means = [features.double().numpy().mean(0) for features in sets]
    covariances = [np.cov(features.double().numpy(), rowvar=False) for features in sets]
    assert np.abs(one.covariance.numpy() - covariances[0]).max() < 1e-10
    root = np.real(linalg.sqrtm(covariances[0] @ covariances[1]))
    by_scipy = np.sum((means[0] - means[1]) ** 2) + np.trace(
        covariances[0] + covariances[1] - 2 * root
    )
    statistics = [{"mu": m, "sigma": s} for m, s in zip(means, covariances, strict=True)]
    by_fidelity = metric.fid_statistics_to_metric(*statistics, verbose=False)[metric.KEY_METRIC_FID]
    found = frechet_distance(one, other)
    agree(f"FID of {count} and torch-fidelity", abs(found / by_fidelity - 1), 1e-5)
    agree(f"FID of {count} and scipy", abs(found / by_scipy - 1), 1e-5)


def test_the_distance_is_numpy_s_eigenvalues():
    """torch-fidelity's formula, of numpy alone."""
    sets, (one, other) = gaussians(200)
    means = [features.double().numpy().mean(0) for features in sets]
    first, second = (np.cov(features.double().numpy(), rowvar=False) for features in sets)
    roots = np.sqrt(np.linalg.eigvals(first @ second).astype(complex)).real.sum()
    expected = np.sum((means[0] - means[1]) ** 2) + np.trace(first + second) - 2 * roots
    agree("FID and numpy", abs(frechet_distance(one, other) / expected - 1), 1e-9)
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-6)
