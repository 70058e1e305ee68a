"""Launching the Triton kernel: dtypes and form compiled in, everything else at run time."""

import contextlib
import functools
from typing import Any

import torch
import triton.language as tl

from s3_megatron.kernels import scalars
from s3_megatron.kernels.examine import Columns
from s3_megatron.kernels.metadata import Memory
from s3_megatron.kernels.rows import lay_out
from s3_megatron.kernels.triton import kernel
from s3_megatron.kernels.triton.tables import Tables

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_tables = Tables(kernel.BLOCK, kernel.COLUMNS.value)


def step_(columns: Columns, hyperparameters: dict[str, Any], memory: Memory | None = None) -> None:
    """Launch the kernel on rows of weight, gradient, m, r and, if there is a fifth column, model weight.

    ``hyperparameters`` are the kernel's arguments by name, ``memory`` is ``rows.read``'s. All but the gradients are
    modified in place.
    """
    if not columns[0]:
        return
    numbers = {"lr": hyperparameters["lr_pointer"]}
    numbers |= {name: hyperparameters[name] for name in ("scale", "found_inf", "rounding_seed")}
    scalars.check(columns[0][0], hyperparameters["statistics"], **numbers)
    laid = lay_out(columns, DTYPES, memory)
    param, grad, state, _, *model = (DTYPES[column[0].dtype] for column in columns)
    device = columns[0][0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # Here, where the current stream is that of the tensors' device: it is asked whether it captures.
        table = _tables.find([column[0] for column in laid.straight], laid.addresses, laid.sizes)
        for launch in table.launches:
            kernel.s3_step[(launch.work.numel(),)](
                launch.work,
                table.rows,
                **hyperparameters,
                PARAM=param,
                GRAD=grad,
                STATE=state,
                MODEL=model[0] if model else None,
                ALIGNED=launch.aligned,
                # LLVM has AMD's GPUs wait for every volatile load.
                TOGETHER=torch.version.hip is None,
                BLOCK=kernel.BLOCK,
                **options(_warp_size(device)),
            )
    laid.put_back()


def form(p: float) -> int:
    """The kernel's FORM: p by one of its own formulas, or 0."""
    return {1: 1, 1.5: 15, 2: 2, 3: 3}.get(p, 0)


def options(warp_size: int) -> dict[str, Any]:
    """Return Triton's compile options for warps (wavefronts) of this size."""
    return {
        "num_warps": kernel.BLOCK // (kernel.ELEMENTS_PER_THREAD * warp_size),
        # The same bits however a row is aligned or sharded: the compiler may not choose where to fuse.
        "enable_fp_fusion": False,
    }


@functools.cache
def _warp_size(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).warp_size) if device.type == "cuda" else 32
