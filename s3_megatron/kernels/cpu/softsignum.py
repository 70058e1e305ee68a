"""The SoftSignum update by the C++ library's loops: one pass over memory, 20 bytes an element in float32."""

import ctypes
import functools

import torch
from torch import Tensor

from s3_megatron.kernels.call import Columns, SoftRule
from s3_megatron.kernels.cpu import library
from s3_megatron.kernels.rows import lay_out


def step_(columns: Columns, rule: SoftRule, rounding_seed: int | None = None, *, loop: int = 0) -> None:
    """Move every parameter by one SoftSignum step, on torch's number of threads.

    As with ``cpu.s3_step_`` a result depends on nothing but its own element, but for stochastic rounding, whose noise
    goes by the element's number in the call.

    Args:
        columns: weights, gradients and m, at least one row; on the CPU, in float32, bfloat16 or float16, and m in
            float32 or bfloat16. Weights and m are modified in place.
        rule: the numbers of the update.
        rounding_seed: rounds a bfloat16 m stochastically.
        loop: an index into ``library.loops()``, for tests.

    Raises:
        S3Error: the lists do not belong together, or a tensor's memory is not its value; nothing has been written.
    """
    rows = lay_out(columns, library.TYPES)
    # They are looked up by their values.
    if isinstance(rule.lr, Tensor):
        rule = rule._replace(lr=float(rule.lr.reshape(())))
    seed = rounding_seed if columns["m"][0].dtype == torch.bfloat16 else None
    settings = _settings(rule, seed, *columns.dtypes())
    threads = torch.get_num_threads()
    library.load().s3_softsignum_step(rows.table.ctypes.data, len(columns), ctypes.byref(settings), loop, threads)
    rows.put_back()
    # It writes past autograd, which must know that what it may have saved is no more.
    torch.autograd.graph.increment_version([*columns["weight"], *columns["m"]])


@functools.lru_cache(maxsize=64)
def _settings(rule: SoftRule, seed: int | None, *dtypes: torch.dtype) -> library.Settings:
    return library.Settings(
        lr=rule.lr,
        weight_decay=rule.weight_decay,
        factor=-1.0 if rule.maximize else 1.0,
        beta1=rule.beta,
        one_minus_beta1=1 - rule.beta,
        nesterov=rule.nesterov,
        stochastic=seed is not None,
        types=tuple(map(library.TYPES.__getitem__, dtypes)),
        seed=library.keys(seed),
        tau=rule.tau,
    )
