"""What each part of the package reads of an image file, and the table of it in docs/data.md.

`python -m tests.support.image_readers` writes the table into the page.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from examples.inference import caption_image
from examples.inference import shared as other_examples
from megatron_kosmosg.construction.square_images import SquareImages
from megatron_kosmosg.data.image_reading import read_image
from megatron_kosmosg.data.image_types import BadImage, ImageTransform, UnreadableImage
from megatron_kosmosg.data.images import ImageDecoder
from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.data.latent_cache import LatentCache
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.hf import pipeline_kosmosg
from megatron_kosmosg.inference.prompt_records import PromptError, open_image_file
from megatron_kosmosg.inspection.check import check_dataset
from megatron_kosmosg.preprocess import latent_moments
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob, preprocess
from tests.support.data_helpers import write_jsonl, write_tokenizer
from tests.support.image_cases import BACKENDS
from tests.support.image_files import image_files

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BEGIN, END = "<!-- image formats: begin -->", "<!-- image formats: end -->"
SIDE = 48
SQUARE = ImageTransform(SIDE, "bicubic", (0.5,) * 3, (0.5,) * 3)
LARGEST_DIFFERENCE = 0.5
"""Mean over an image in levels of 255."""
REFUSALS = (BadImage, OSError, PromptError, Rejected, SyntaxError, UnreadableImage, ValueError)
OPENED_BY_USERS = ("pipeline", "caption_image", "examples")
"""They see what Pillow has opened, and refuse in its words."""


def levels(pixels: torch.Tensor | np.ndarray) -> np.ndarray:
    """[3, SIDE, SIDE] in [-1, 1] -> [SIDE, SIDE, 3] in 0..255."""
    return np.asarray(pixels, np.float32).transpose(1, 2, 0) * 127.5 + 127.5


def cropped(image: Image.Image) -> np.ndarray:
    """The middle square of what is seen, as training cuts it; a PNG decodes to itself."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return levels(decoder("pillow").decode([out.getvalue()], SQUARE)[0])


class Datasets:
    """All files, preprocessed, checked, and their targets cached."""

    def __init__(self, folder: Path) -> None:
        files = image_files()
        records = []
        for number, (name, file) in enumerate(files.items()):
            (folder / f"{number}.img").write_bytes(file.data)
            records.append({"key": name, "image": f"{number}.img", "caption": "a house"})
        source = write_jsonl(folder / "all.jsonl", records)
        model, prefix = write_tokenizer(folder), folder / "all"
        job = PreprocessJob("caption", (str(source),), str(model), str(prefix))
        self.counts = preprocess(job, lambda *_: None)
        store = SampleStore(prefix)
        raws = [store[i] for i in range(len(store))]
        self.stored = {raw.info["key"]: raw.images()[0] for raw in raws}
        self.problems = list(check_dataset(store, Tokenizer(model), 1, lambda *_: None))
        self.latents = dict(zip(self.stored, self._cached(store), strict=True))

    @staticmethod
    def _cached(store: SampleStore) -> list[np.ndarray | None]:
        """Pixels in the place of moments."""
        job = latent_moments.LatentJob(store, "pixels", SQUARE, "fp32")
        vae = mock.Mock(device=torch.device("cpu"))
        decoder = ImageDecoder(BACKENDS[-1])
        with mock.patch.object(
            latent_moments, "vae_moments", lambda vae, pixels: torch.stack([pixels, pixels], 1)
        ):
            latent_moments.cache_latents(job, vae, "none", decoder, 0, 1, lambda *_: None)
        cache = LatentCache(store, "pixels", "none", SQUARE)
        found = [cache.moments(i) for i in range(len(store))]
        return [None if moments is None else levels(moments[0]) for moments in found]


@cache
def decoder(backend: str) -> ImageDecoder:
    """Set up once."""
    return ImageDecoder(backend)


def by_training(backend: str, data: bytes, datasets: Datasets, name: str) -> np.ndarray:
    """Of the file as older datasets have it, and of what is stored today: the same."""
    found = levels(decoder(backend).decode([data], SQUARE)[0])
    if name in datasets.stored:
        stored = levels(decoder(backend).decode([datasets.stored[name]], SQUARE)[0])
        assert np.abs(found - stored).mean() <= LARGEST_DIFFERENCE, name
    return found


def by_cache(data: bytes, datasets: Datasets, name: str) -> np.ndarray:
    """Only what was stored can be cached."""
    if name not in datasets.latents:
        return read_image(data)
    if datasets.latents[name] is None:
        raise ValueError("no moments")
    return datasets.latents[name]


def by_check(data: bytes, datasets: Datasets, name: str) -> np.ndarray:
    """A check gives no pixels: those of the specification, or its problem."""
    problems = [problem.reason for problem in datasets.problems if problem.key == name]
    if problems:
        raise ValueError(problems[0])
    return cropped(read_image(data))


def by_construction(data: bytes, datasets: Datasets, name: str) -> np.ndarray:
    record = Record("a", {"image": data}, Path())
    return cropped(SquareImages(Options()).square(record))


def by_pipeline(data: bytes, datasets: Datasets, name: str) -> np.ndarray:
    opened = Image.open(io.BytesIO(data))
    return np.asarray(pipeline_kosmosg.resize_and_crop(opened, SIDE, "image 1"), np.float32)


def by_generate(data: bytes, datasets: Datasets, name: str) -> np.ndarray:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        return cropped(open_image_file(Path(file.name)))


def by_caption_image(data: bytes, datasets: Datasets, name: str) -> np.ndarray:
    image = caption_image.upright_rgb(Image.open(io.BytesIO(data)))
    return np.asarray(caption_image.resize_and_crop(image, SIDE), np.float32)


def by_examples(data: bytes, datasets: Datasets, name: str) -> np.ndarray:
    return cropped(other_examples.upright_rgb(Image.open(io.BytesIO(data))))


Reader = Callable[[bytes, Datasets, str], np.ndarray]
READERS: dict[str, Reader | None] = {
    "inspect --check": by_check,
    "Pillow": partial(by_training, "pillow"),
    "DALI, CPU": partial(by_training, "dali") if "dali" in BACKENDS else None,
    "DALI, GPU": None,
    "cache_latents": by_cache,
    "build": by_construction,
    "pipeline": by_pipeline,
    "generate": by_generate,
    "caption_image": by_caption_image,
    "examples": by_examples,
}
"""None: not run on this machine."""


def outcome(reader: str, name: str, datasets: Datasets) -> str:
    """`same`, `refused`, or what is wrong."""
    file, read = image_files()[name], READERS[reader]
    if read is None:
        return "not run"
    try:
        found = read(file.data, datasets, name)
    except REFUSALS as error:
        said = getattr(error, "reason", None) or str(error)
        in_words = file.refused is not None and file.refused in f"the image {said}"
        if in_words or file.refused is not None and reader in OPENED_BY_USERS:
            return "refused"
        return f"wrong: {said}"
    if file.seen is None:
        return "taken"
    difference = np.abs(found - cropped(read_image(file.data))).mean()
    return "same" if difference <= LARGEST_DIFFERENCE else f"wrong: {difference:.1f}"


def stored_as(name: str, datasets: Datasets) -> str:
    """What preprocessing makes of a file."""
    file = image_files()[name]
    if name not in datasets.stored:
        return f"refused: {file.refused}"
    if datasets.stored[name] == file.data:
        return "as it is"
    return "PNG" if datasets.stored[name][1:4] == b"PNG" else "wrong"


def table(datasets: Datasets) -> str:
    """Markdown: a line a format, a column a reader."""
    heads = ["file", "stored", *READERS]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in image_files():
        cells = [name, stored_as(name, datasets)]
        cells += [outcome(reader, name, datasets) for reader in READERS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = table(Datasets(Path(folder)))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")
