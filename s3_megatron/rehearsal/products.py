"""Matrix products of 16-bit operands, computed in float32 and rounded once where the CPU is slow at them.

Without instructions for bfloat16, torch's own product (2.13) takes 3 to 15 times as long as float32's. The kernels that
torch registers for the CPU are replaced, below autograd: so it does not matter which function, thread, mode or custom
autograd function asks for a product, forward or backward. ``loss.backward()``, for one, runs with every
TorchFunctionMode off.
"""

import os
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from s3_megatron.errors import S3Error

VARIABLE = "S3_REHEARSAL_PRODUCTS"
WORDS = ("auto", "float32", "torch")
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# Of torch.cpu.get_capabilities(): any one makes products of the dtype at least as fast as float32's.
INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}

# What matmul, linear, einsum, mv and the like, and their gradients, come down to on a CPU (torch 2.13).
PRODUCTS = (
    *("mm", "mm.out", "addmm", "addmm.out", "addmm_", "_addmm_activation", "_addmm_activation.out"),
    *("bmm", "bmm.out", "baddbmm", "baddbmm.out", "baddbmm_", "addbmm", "addbmm.out", "addbmm_"),
    *("addmv", "addmv.out", "addmv_", "dot", "vdot"),
)
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
ATTENTION = (_ATTENTION, f"{_ATTENTION}_backward")

Kernel = Callable[..., Any]


def choose() -> list[torch.dtype]:
    """Return the dtypes whose products are to be computed in float32, as $S3_REHEARSAL_PRODUCTS and the CPU say.

    The CPU's features decide, not a measurement: a run that is resumed must decide as it did at its start.

    Raises:
        S3Error: the variable has an unknown word, or this torch has no way to replace a kernel.
    """
    word = os.environ.get(VARIABLE) or "auto"
    if word not in WORDS:
        raise S3Error(f"{VARIABLE}={word} is none of {', '.join(WORDS)}: use one of them, or unset it")
    # An older torch cannot replace kernels, and `s3-megatron check` and `doctor`, which rehearse no product, need not.
    able = hasattr(torch.library, "get_kernel") and hasattr(torch.cpu, "get_capabilities")
    if word == "torch" or (word == "auto" and not able):
        return []
    if not able:
        raise _unknown_torch("it has no torch.library.get_kernel")
    return [dtype for dtype in NAMES if word == "float32" or not _is_fast(dtype)]


def _unknown_torch(reason: str) -> S3Error:
    return S3Error(
        f"the rehearsal cannot compute products in float32 with torch {torch.__version__} ({reason}): use torch 2.13, "
        f"or set {VARIABLE}=torch, which is slow in bf16 and fp16 on many CPUs"
    )


def _is_fast(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of ``dtype``, and oneDNN uses them.

    oneDNN alone (torch 2.13) says yes to bf16 on any AVX-512, where its product takes twice as long as float32's; the
    instructions alone do not count its ONEDNN_MAX_CPU_ISA, nor a torch that is built without it.
    """
    supported = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    cpu = torch.cpu.get_capabilities()
    return (
        torch.backends.mkldnn.is_available()
        and any(cpu.get(name, False) for name in INSTRUCTIONS[dtype])
        and getattr(torch.ops.mkldnn, supported[dtype])()
    )


def describe(dtypes: Collection[torch.dtype]) -> str:
    """Say in one line how products are computed if those of ``dtypes`` are in float32."""
    ways = [f"{name} {'in float32, rounded once' if dtype in dtypes else 'by torch'}" for dtype, name in NAMES.items()]
    return f"matrix products: {'; '.join(ways)} ({VARIABLE}={os.environ.get(VARIABLE) or 'auto'})"


def compute_in_float32(dtypes: Collection[torch.dtype]) -> Callable[[], None]:
    """Replace torch's CPU kernels for products whose operands all have one of ``dtypes``; returns what undoes it.

    Products of other dtypes, and of mixed ones, which torch refuses, go to torch's kernels as they are.

    Raises:
        S3Error: this torch has other kernels.
    """
    try:
        kernels = {name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in (*PRODUCTS, *ATTENTION)}
    except RuntimeError as missing:
        raise _unknown_torch(str(missing)) from None
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in kernels.items():
        replacement = _attention(kernel, dtypes) if name in ATTENTION else _product(name, kernel, dtypes)
        library.impl(name, replacement, "CPU", with_keyset=True)
    return library._destroy  # torch 2.13


def _product(name: str, kernel: Any, dtypes: Collection[torch.dtype]) -> Kernel:
    writes = name.endswith((".out", "_"))

    def product(keyset: Any, *args: Any, **kwargs: Any) -> Tensor:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        dtype = tensors[0].dtype
        if dtype not in dtypes or any(tensor.dtype != dtype for tensor in tensors):
            return kernel.call_boxed(keyset, *args, **kwargs)
        widened = {key: _widen(value) for key, value in kwargs.items()}
        result: Tensor = kernel.call_boxed(keyset, *map(_widen, args), **widened)
        if not writes:
            return result.to(dtype)
        # torch's kernel has warned if it had to resize the float32 copy of ``out``.
        target: Tensor = kwargs.get("out", args[0])
        return target.resize_(result.shape).copy_(result)

    return product


def _attention(kernel: Any, dtypes: Collection[torch.dtype]) -> Kernel:
    """Wrap flash attention: its logsumexp is float32 in any case, the rest has the query's dtype."""

    def attention(keyset: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        dtype = args[0].dtype
        if dtype not in dtypes:
            return kernel.call_boxed(keyset, *args, **kwargs)
        widened = {key: _widen(value) for key, value in kwargs.items()}
        results = kernel.call_boxed(keyset, *map(_widen, args), **widened)
        if len(results) == 2:
            output, logsumexp = results
            return output.to(dtype), logsumexp
        return tuple(gradient.to(dtype) for gradient in results)

    return attention


def _widen(value: Any) -> Any:
    """Turn a 16-bit tensor into a float32 one; leave the rest alone."""
    return value.float() if isinstance(value, Tensor) and value.dtype in NAMES else value
