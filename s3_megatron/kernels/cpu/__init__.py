"""The S3 update as a C++ loop over any number of tensors: AVX-512, AVX2 or portable, chosen where it runs."""

import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.kernels import scalars
from s3_megatron.kernels.cpu import library
from s3_megatron.kernels.cpu.build import BuildError
from s3_megatron.kernels.examine import Columns
from s3_megatron.kernels.metadata import Memory
from s3_megatron.kernels.rows import lay_out


def unavailable() -> str | None:
    """Return None if the C++ kernel can run here, else the reason, for people; it may have to compile it first."""
    try:
        library.load()
    except (BuildError, OSError) as error:
        return str(error)
    return None


def loop_name() -> str:
    """Name the loop that runs on this CPU."""
    return library.loops()[0]


def s3_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_roots: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    p: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool = False,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    model_params: Sequence[Tensor] = (),
    statistics: Tensor | None = None,
    rounding_seed: Tensor | None = None,
    memory: Memory | None = None,
    loop: int = 0,
) -> None:
    """Move every parameter by one S3 step in one pass over memory, on torch's number of threads.

    A result depends on nothing but its own element: neither on threads, nor on where in which tensor it stands (but
    for stochastic rounding, whose noise goes by the element's number in the call).

    For arguments and effects see ``kernels.op``. All tensors are on the CPU, in float32, bfloat16 or float16, the
    states in float32 or bfloat16; ``loop`` is an index into ``library.loops()``, for tests.

    Raises:
        S3Error: the lists do not belong together, or a tensor's memory is not its value; nothing has been written.
    """
    if not params:
        return
    rate = lr if isinstance(lr, Tensor) else None
    scalars.check(params[0], statistics, lr=rate, scale=scale, found_inf=found_inf, rounding_seed=rounding_seed)
    columns: Columns = [
        params,
        grads,
        exp_avgs,
        exp_avg_roots,
        *([model_params] if model_params else []),
    ]
    if loop and not 0 < loop < len(library.loops()):
        raise S3Error(f"loop is {loop}: this CPU has {len(library.loops())}")
    rows = lay_out(columns, library.TYPES, memory)
    if found_inf is not None and found_inf.item():
        return
    seed = None if rounding_seed is None or exp_avgs[0].dtype != torch.bfloat16 else int(rounding_seed)
    settings = _settings(
        *(float(lr), weight_decay, (1.0 if scale is None else float(scale)) * (-1.0 if maximize else 1.0)),
        *(beta1, beta2, p, nesterov, seed),
        *(column[0].dtype for index, column in enumerate(columns) if index != 3),
    )
    threads = torch.get_num_threads()
    out = None if statistics is None else statistics.data_ptr()
    library.load().s3_step(rows.table.ctypes.data, len(params), ctypes.byref(settings), loop, threads, out)
    rows.put_back()


# A structure of this size takes longer to fill than one small tensor to move.
@functools.lru_cache(maxsize=64)
def _settings(
    lr: float,
    weight_decay: float,
    scale: float,
    beta1: float,
    beta2: float,
    p: float,
    nesterov: bool,
    seed: int | None,
    param: torch.dtype,
    grad: torch.dtype,
    state: torch.dtype,
    model: torch.dtype = torch.float32,
) -> library.Settings:
    return library.Settings(
        lr=lr,
        weight_decay=weight_decay,
        scale=scale,
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        p=p,
        bound=1.0 if beta1 == beta2 else math.inf,
        form=library.form(p),
        nesterov=nesterov,
        forgets=beta2 == 0,
        stochastic=seed is not None,
        param=library.TYPES[param],
        grad=library.TYPES[grad],
        state=library.TYPES[state],
        model=library.TYPES[model],
        # Two keys of the noise, each far from the next step's.
        seed=tuple(((seed or 0) * 0x9E3779B97F4A7C15 >> shift) & 0xFFFFFFFF for shift in (16, 32)),
    )
