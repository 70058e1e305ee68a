"""Launching the Triton kernel: dtypes and form compiled in, everything else at run time."""

import contextlib
import functools
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from s3_megatron.kernels.call import AnyRule, Columns, Rule, SoftRule, Step, check_numbers, form
from s3_megatron.kernels.metadata import Memory
from s3_megatron.kernels.rows import lay_out
from s3_megatron.kernels.triton import kernel
from s3_megatron.kernels.triton.tables import Tables

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_tables = Tables(kernel.BLOCK, kernel.COLUMNS.value)


def step_(columns: Columns, rule: AnyRule, step: Step, memory: Memory | None = None) -> None:
    """Launch the kernel once or twice; see ``kernels.triton``."""
    if not columns:
        return
    check_numbers(columns["weight"][0], rule, step)
    laid = lay_out(columns, DTYPES, memory)
    arguments = _arguments(rule, step) | _types(columns)
    device = columns["weight"][0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # Here, where the current stream is that of the tensors' device: it is asked whether it captures.
        table = _tables.find(device, laid.straight.item_sizes(), laid.addresses, laid.sizes)
        for launch in table.launches:
            kernel.s3_step[(launch.work.numel(),)](
                launch.work,
                table.rows,
                **arguments,
                ALIGNED=launch.aligned,
                # LLVM has AMD's GPUs wait for every volatile load.
                TOGETHER=torch.version.hip is None,
                BLOCK=kernel.BLOCK,
                **options(_warp_size(device)),
            )
    laid.put_back()


def _types(columns: Columns) -> dict[str, Any]:
    """Name the dtypes that are compiled in."""
    dtypes = {kind: DTYPES[column[0].dtype] for kind, column in columns.lists.items()}
    model = dtypes.get("model weight")
    return {"PARAM": dtypes["weight"], "GRAD": dtypes["gradient"], "STATE": dtypes["m"], "MODEL": model}


def _arguments(rule: AnyRule, step: Step) -> dict[str, Any]:
    """Name the kernel's arguments that no tensor of the columns decides."""
    pointer = rule.lr if isinstance(rule.lr, Tensor) and rule.lr.device.type != "cpu" else None
    numbers = _soft_numbers(rule) if isinstance(rule, SoftRule) else _numbers(rule)
    return numbers | {
        "lr": float(rule.lr) if pointer is None else 0.0,
        "lr_pointer": pointer,
        "sign": -1.0 if rule.maximize else 1.0,
        "weight_decay": float(rule.weight_decay),
        "factor": step.factor,
        "found_inf": step.found_inf,
        "statistics": step.statistics,
        "seed": step.seed,
        "NESTEROV": rule.nesterov,
    }


def _numbers(rule: Rule) -> dict[str, Any]:
    return {
        "beta1": float(rule.beta1),
        "one_minus_beta1": 1.0 - rule.beta1,
        "beta2": float(rule.beta2),
        "one_minus_beta2": 1.0 - rule.beta2,
        "p": float(rule.p),
        "inverse_p": 1.0 / rule.p,
        "bound": rule.bound,
        "tau": 1.0,
        "FORM": form(rule.p),
    }


def _soft_numbers(rule: SoftRule) -> dict[str, Any]:
    """Those of one beta and no root."""
    unused = dict.fromkeys(("beta2", "one_minus_beta2", "p", "inverse_p", "bound"), 1.0)
    return unused | {
        "beta1": float(rule.beta),
        "one_minus_beta1": 1.0 - rule.beta,
        "tau": 1.0 if rule.hard else float(rule.tau),
        "FORM": (kernel.HARD if rule.hard else kernel.SOFT).value,
    }


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
