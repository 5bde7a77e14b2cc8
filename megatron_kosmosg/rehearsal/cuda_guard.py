"""What autograd's engine asks torch's C++ part before it works on device "cuda".

A CPU build of torch has no guard for the device, no hooks and no accelerator; those of a build with
CUDA ask the driver, which is not there. Forty lines of C++ answer instead: compiled once per
installation of torch (10 seconds), loaded before torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NUM_DEVICES = 8
"""GPUs that this machine claims to have: a node's."""

_SOURCE = r"""
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>)
extern "C" void register_guard() {
  static c10::impl::FakeGuardImpl<c10::DeviceType::CUDA> guard;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(&guard);
}

struct CUDAHooks final : at::CUDAHooksInterface {  // the name is the registry's key
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  void init() const override {}
  int getNumGPUs() const override { return NUM_DEVICES; }
  at::DeviceIndex deviceCount() const override { return NUM_DEVICES; }
  at::DeviceIndex current_device() const override { return 0; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(at::DeviceIndex) const override {}
  at::DeviceIndex exchangeDevice(at::DeviceIndex) const override { return 0; }
  at::DeviceIndex maybeExchangeDevice(at::DeviceIndex) const override { return 0; }
  void deviceSynchronize(at::DeviceIndex) const override {}
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
// Before those of a build with CUDA, which ask the driver.
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, CUDAHooks)

// Found before libtorch_cpu's own, because this library is loaded first, and globally.
namespace at::accelerator {
TORCH_API std::optional<c10::DeviceType> getAccelerator(bool) { return c10::kCUDA; }
}
"""


def why_not() -> str | None:
    """Why this machine cannot pretend to have a GPU; None where it can. Does not import torch."""
    if shutil.which("g++") is not None:
        return None
    return "there is no g++ to compile the stand-in for a CUDA driver with; install it"


def load_guard() -> None:
    """Loads the guard; call it before anything imports torch. Raises CalledProcessError when g++
    fails."""
    if "torch" in sys.modules:
        raise RuntimeError("the stand-in for CUDA must be loaded before torch, which is imported")
    library = ctypes.CDLL(str(_compiled()), mode=ctypes.RTLD_GLOBAL)
    if _is_cuda_build():
        import torch  # noqa: F401 - registers its own guard, which asks the driver

        library.register_guard()


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("torch is not installed")
    return Path(found.origin).parent


def _is_cuda_build() -> bool:
    text = (_torch_folder() / "version.py").read_text(encoding="utf-8")
    return re.search(r"^cuda\b[^=\n]*=\s*['\"]", text, re.MULTILINE) is not None


def _compiled() -> Path:
    """The library for this installation of torch, compiled where there is none yet."""
    torch_folder = _torch_folder()
    version = (torch_folder / "version.py").read_bytes()
    made_from = hashlib.sha256(_SOURCE.encode() + version + str(torch_folder).encode())
    folder = _cache()
    library = folder / f"stand_in_for_cuda_{made_from.hexdigest()[:16]}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source, made = Path(work) / "guard.cpp", Path(work) / "guard.so"
        source.write_text(_SOURCE)
        subprocess.run(
            [
                "g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-DNUM_DEVICES={NUM_DEVICES}",
                f"-I{torch_folder}/include", str(source), f"-L{torch_folder}/lib", "-lc10",
                "-ltorch_cpu", f"-Wl,-rpath,{torch_folder}/lib", "-o", str(made),
            ],
            check=True,
        )  # fmt: skip
        made.rename(library)
    return library


def _cache() -> Path:
    """A folder that nobody else can write to: what lies in it is run.

    Raises PermissionError for one that somebody else owns or may write to.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "megatron_kosmosg"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = os.stat(folder)
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} must belong to you alone: others may write to it")
    return folder
