"""`transformer_engine_torch`, TransformerEngine's compiled part, for tensors without memory.

A kernel gives a result of the right shape and dtype, counts its call, and refuses what the real one
refuses: tensors on the host, of different dtypes, of shapes that do not fit. What the decoder,
AlignerNet and the optimizer do not need is a name without content, which cannot be called.

What is handed to them changed from 2.11 to 2.20: a name stands here with the release that brought
it or did away with it.
"""

from __future__ import annotations

import enum
import importlib.metadata
import re
from collections import Counter
from typing import Any

import torch
from packaging.specifiers import SpecifierSet

calls: Counter[str] = Counter()
"""Of the kernels, by name and kind."""

_INSTALLED = importlib.metadata.version("transformer-engine")


def _names(known: str) -> list[str]:
    """Those of `known` that the installed version has: `name>=2.12` came with 2.12, `name<2.15`
    went with 2.15."""
    entries = re.findall(r"(\w+)(\S*)", known)
    return [name for name, releases in entries if SpecifierSet(releases).contains(_INSTALLED)]


DType: Any = enum.IntEnum(
    "DType",
    _names(
        "kByte kInt16<2.17 kInt32 kInt64<2.17 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 "
        "kFloat8E8M0<2.17 kFloat4E2M1 kInt8<2.17"
    ),
    start=0,
)
_TORCH = {
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}
_HALF = (DType.kFloat16, DType.kBFloat16)


NVTE_Fused_Attn_Backend: Any = enum.IntEnum(
    "NVTE_Fused_Attn_Backend",
    _names("NVTE_No_Backend NVTE_F16_max512_seqlen<2.16 NVTE_F16_arbitrary_seqlen NVTE_FP8"),
    start=-1,
)


class _Name:
    """A class, an enumeration or a function of which nothing but the name is there."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> _Name:
        if name.startswith("__"):
            raise AttributeError(name)
        member = _Name(f"{self._name}.{name}")
        setattr(self, name, member)
        return member

    def __call__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(
            f"the stand-in for TransformerEngine's kernels lacks {self._name}"
        )

    def __int__(self) -> int:
        return 0  # asked for at import, of what numbers tensors of 8 bits

    def __repr__(self) -> str:
        return self._name


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return globals().setdefault(name, _Name(name))


def generic_gemm(
    A, transa, B, transb, out, quantizer, out_dtype, bias, bias_dtype, gelu, gelu_in, grad,
    workspace, workspace_size, accumulate, use_split_accumulator, **_: Any,
):  # fmt: skip  # noqa: N803 - names of the original
    """[the product, gradient of the bias, None, None]; A and B are matrices by columns, as cuBLAS
    has them: B A^T ("TN", forward), B A ("NN", gradient of the input), B^T A ("NT", of the weight).
    """
    layout = "NT"[transa] + "NT"[transb]
    calls[f"gemm {layout}" + (" into its buffer" if accumulate else "")] += 1
    given = [A, B, workspace] + [x for x in (bias, out) if x is not None]
    _check_device("GEMM", given)
    if A.dtype != B.dtype:
        raise RuntimeError(f"GEMM of {A.dtype} and {B.dtype}")
    if A.numel() == 0 or B.numel() == 0:  # newer versions fail there, in their Python
        raise RuntimeError(f"GEMM of tensors of {tuple(A.shape)} and {tuple(B.shape)}")
    a, b = A.reshape(-1, A.shape[-1]), B.reshape(-1, B.shape[-1])
    bias_gradient = None
    if layout == "TN":
        added = None if grad else bias
        product = b @ a.T if added is None else torch.addmm(added, b, a.T)
        product = product.view(*B.shape[:-1], A.shape[0])
    elif layout == "NN":
        product = (b @ a).view(*B.shape[:-1], A.shape[-1])
    else:
        product = b.T @ a
        if grad and bias is not None:
            bias_gradient = b.sum(0)
    wanted = product.dtype if out_dtype is None else _TORCH[out_dtype]
    if out is None:
        return product.to(wanted), bias_gradient, None, None
    if out.shape != product.shape:
        raise RuntimeError(f"a product of {tuple(product.shape)} into {tuple(out.shape)}")
    (out.add_ if accumulate else out.copy_)(product)
    return out, bias_gradient, None, None


def get_cublasLt_version() -> int:  # noqa: N802 - its name there
    return 130100


def get_num_cublas_streams() -> int:
    return 4


def get_cudnn_version() -> int:
    return 91400


def get_fused_attn_backend(*given: Any) -> Any:
    """cuDNN's, for 16 bits; there is none for 32. Since 2.20 with the reason why there is none."""
    is_one_object = len(given) == 1
    query, key = (given[0].qkv_dtype,) * 2 if is_one_object else given[1:3]
    kinds = NVTE_Fused_Attn_Backend
    is_taken = query in _HALF and query == key
    kind = kinds.NVTE_F16_arbitrary_seqlen if is_taken else kinds.NVTE_No_Backend
    return (kind, "it is not of 16 bits") if is_one_object else kind


_FORWARD = _names(
    "max_seqlen_q max_seqlen_kv is_training attn_scale dropout fast_zero_fill layout "
    "o_format>=2.15 scale_format>=2.15 bias_type mask_type softmax_type window_size "
    "bottom_right>=2.12 cu_seqlens_q cu_seqlens_kv q k v"
)
_BACKWARD = _names(
    "max_seqlen_q max_seqlen_kv attn_scale dropout fast_zero_fill layout o_format>=2.15 "
    "do_format>=2.15 dqkv_layout>=2.15 scale_format>=2.15 do_scale_format>=2.15 bias_type "
    "mask_type softmax_type window_size bottom_right>=2.12 deterministic cu_seqlens_q "
    "cu_seqlens_kv q k v o d_o"
)
"""The first arguments of attention; what follows them is not looked at."""


def fused_attn_fwd(*arguments: Any) -> list[torch.Tensor]:
    """[the output, log-sum-exp of the scores, state of the random numbers]."""
    given = dict(zip(_FORWARD, arguments, strict=False))
    q, v, ends = given["q"], given["v"], given["cu_seqlens_q"]
    calls[f"attention {given['layout']} {given['mask_type']}".replace("NVTE_", "")] += 1
    _check_attention(given)
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
    heads = q.shape[-2]
    rows = ends.shape[0] - 1
    lines = (len(q), heads, 1) if q.dim() == 3 else (rows, heads, given["max_seqlen_q"], 1)
    if not given["is_training"]:
        return [out]
    statistics = torch.empty(lines, dtype=torch.float32, device=q.device)
    return [out, statistics, torch.empty(2, dtype=torch.int64, device=q.device)]


def fused_attn_bwd(*arguments: Any) -> list[torch.Tensor | None]:
    """[gradients of query, key and value, None, None]."""
    given = dict(zip(_BACKWARD, arguments, strict=False))
    q, o, d_o = given["q"], given["o"], given["d_o"]
    calls["backward of attention"] += 1
    _check_attention(given)
    _check_device("attention", [o, d_o])
    if o.shape != d_o.shape or d_o.dtype != q.dtype:
        raise RuntimeError(f"attention gave {tuple(o.shape)} and gets {tuple(d_o.shape)} back")
    inputs = (q, given["k"], given["v"])
    gradients = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
    return [*gradients, None, None]


def multi_tensor_l2norm(chunk_size, noop, tensor_lists, per_tensor=False):
    """(float32 [1], float32 [number of tensors] or nothing)."""
    (tensors,) = _lists("l2norm", noop, tensor_lists, 1)
    norm = torch.linalg.vector_norm(tensors[0].float()).reshape(1)
    each = torch.empty(len(tensors) if per_tensor else 0, dtype=torch.float32, device=norm.device)
    return norm, each


def multi_tensor_scale(chunk_size, noop, tensor_lists, scale) -> None:
    sources, targets = _lists("scale", noop, tensor_lists, 2)
    torch._foreach_copy_(targets, sources)


def multi_tensor_adam(
    chunk_size, noop, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction,
    weight_decay,
) -> None:  # fmt: skip
    """In place; lists of gradients, parameters, first and second moments, and perhaps of float32
    weights."""
    calls["adam"] += 1
    _, parameters, first, second, *_main = _lists("adam", noop, tensor_lists, None)
    if not isinstance(step, int):
        raise TypeError(f"the number of updates is {step!r}")
    for tensors in (parameters, first, second):
        torch._foreach_mul_(tensors, beta1)


def _lists(what: str, noop: torch.Tensor, lists: list, number: int | None) -> list:
    """The lists, whose tensors the kernel addresses as flat memory."""
    calls[f"multi_tensor_{what}"] += 1
    if number is not None and len(lists) != number:
        raise RuntimeError(f"{what} gets {len(lists)} lists instead of {number}")
    _check_device(what, [noop, *(x for tensors in lists for x in tensors)])
    for tensors in lists:
        if [x.numel() for x in tensors] != [x.numel() for x in lists[0]]:
            raise RuntimeError(f"{what} of lists whose tensors differ in size")
        if not all(x.is_contiguous() for x in tensors):
            raise RuntimeError(f"{what} of a tensor that is not contiguous")
    return lists


def _check_attention(given: dict[str, Any]) -> None:
    names = ("cu_seqlens_q", "cu_seqlens_kv", "q", "k", "v")
    cu_seqlens_q, cu_seqlens_kv, q, k, v = (given[name] for name in names)
    _check_device("attention", [q, k, v, cu_seqlens_q, cu_seqlens_kv])
    if not q.dtype == k.dtype == v.dtype:
        raise RuntimeError(f"attention of {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[-1] % 8 or v.shape[-1] % 8:
        raise RuntimeError(f"cuDNN has no attention for heads of {q.shape[-1]}")
    for ends in (cu_seqlens_q, cu_seqlens_kv):
        if ends.dtype is not torch.int32 or ends.dim() != 1:
            raise RuntimeError(f"ends of rows as {ends.dtype} {tuple(ends.shape)}")


def _check_device(what: str, tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        if tensor.device.type != "cuda":
            raise RuntimeError(f"{what} of a tensor on {tensor.device}")
