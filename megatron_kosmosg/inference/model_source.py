"""Which files a pipeline is made of: an exported folder or a training checkpoint, and additions.

Finding and fingerprinting them needs no library that takes long to import; opening does.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from megatron_kosmosg.checkpoint.folder import CONFIG_FILE, find_checkpoint
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import load_saved_config
from megatron_kosmosg.conversion.exported_folder import INDEX_FILE
from megatron_kosmosg.files import fingerprint


@dataclass(frozen=True)
class ModelSource:
    """Folders and files that were found to exist."""

    folder: Path
    """An exported folder, or the `iter_` folder of a checkpoint."""
    is_exported: bool
    stable_diffusion: Path | None
    """`unet/ vae/ scheduler/` that draw; None: those of the exported folder."""
    tokenizer_model: Path | None = None
    """SentencePiece model of a checkpoint; None: as its config says."""
    loras: tuple[tuple[Path, float], ...] = ()
    """Files and strengths."""
    controlnet: tuple[Path, float] | None = None
    """Folder and strength."""

    def model_fingerprint(self) -> str:
        """Changes with any weight or setting that draws, apart from LoRAs and ControlNet."""
        files = (self.folder, self.stable_diffusion, self.tokenizer_model)
        return fingerprint(*(file for file in files if file is not None))

    def controlnet_fingerprint(self) -> tuple[str, float] | None:
        """(fingerprint of the ControlNet's folder, its strength); None without one."""
        return self.controlnet and (fingerprint(self.controlnet[0]), self.controlnet[1])


def find_model(
    path: Path,
    stable_diffusion: Path | None = None,
    tokenizer_model: Path | None = None,
    loras: tuple[tuple[Path, float], ...] = (),
    controlnet: tuple[Path, float] | None = None,
    draws: bool = True,
) -> ModelSource:
    """The model at `path`. Raises ConfigError, naming the option, for what is not there or may not
    be read, and for a tokenizer beside an exported folder, which has its own.

    stable_diffusion: replaces the U-Net, VAE and scheduler; a checkpoint's default is its
    `model.diffusion.path`. draws=False: those of a checkpoint are not looked for.
    """
    try:
        is_exported = (path / INDEX_FILE).is_file()
        folder = path if is_exported else _checkpoint(path)
        if is_exported:
            (path / INDEX_FILE).read_bytes()
    except OSError as error:
        raise ConfigError(f"--model {path} cannot be read: {error}") from error
    if is_exported and tokenizer_model is not None:
        raise ConfigError(
            f"--tokenizer-model {tokenizer_model}: --model {path} is an exported folder, which has "
            "its tokenizer; the option belongs to a checkpoint"
        )
    if draws and not is_exported and stable_diffusion is None:
        named = load_saved_config(folder / CONFIG_FILE).model.diffusion.path
        if named is None:
            raise ConfigError(
                f"{folder} names no Stable Diffusion folder (model.diffusion.path); give "
                "--stable-diffusion"
            )
        stable_diffusion = Path(named)
    if stable_diffusion is not None and not (stable_diffusion / "unet").is_dir():
        raise ConfigError(
            f"{stable_diffusion} is no Stable Diffusion folder (unet/ vae/ scheduler/); give one "
            "with --stable-diffusion"
        )
    found = tuple((lora_file(path), strength) for path, strength in loras)
    if found and find_spec("peft") is None:
        raise ConfigError("--lora needs peft: pip install 'megatron-kosmosg[diffusers]'")
    if controlnet is not None:
        check_controlnet(controlnet[0])
    return ModelSource(folder, is_exported, stable_diffusion, tokenizer_model, found, controlnet)


def lora_file(path: Path) -> Path:
    """The adapter's file: `path`, or the only .safetensors file of the folder `path`. Raises
    ConfigError."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ConfigError(f"--lora {path}: no such file or folder")
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ConfigError(f"--lora {path}: {len(files)} .safetensors files there; give one of them")
    return files[0]


def check_controlnet(folder: Path) -> None:
    """Raises ConfigError for a folder that is none of a ControlNet."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--controlnet {folder}: no config.json there")


def _checkpoint(path: Path) -> Path:
    try:
        return find_checkpoint(path, option="")
    except ConfigError as error:
        raise ConfigError(
            f"--model {path} is no exported folder, which would have a {INDEX_FILE}; and {error}"
        ) from error
