"""The updates as C++ loops over any number of tensors: AVX-512, AVX2 or portable, chosen where it runs."""

import ctypes
import functools
import math

import torch
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.kernels.call import AnyRule, Columns, SoftRule, Step, check_numbers, form
from s3_megatron.kernels.cpu import library
from s3_megatron.kernels.cpu.build import BuildError
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


def step_(columns: Columns, rule: AnyRule, step: Step, memory: Memory | None = None, *, loop: int = 0) -> None:
    """Move every parameter by one step in one pass over memory, on torch's number of threads.

    A result depends on nothing but its own element: neither on threads, nor on where in which tensor it stands (but
    for stochastic rounding, whose noise goes by the element's number in the call).

    For arguments and effects see ``kernels.call``. All tensors are on the CPU, in float32, bfloat16 or float16, the
    states in float32 or bfloat16; ``memory`` is what ``rows.read`` returned of these columns just now, ``loop`` an
    index into ``library.loops()``, for tests.

    Raises:
        S3Error: the lists do not belong together, or a tensor's memory is not its value; nothing has been written.
    """
    if not columns:
        return
    check_numbers(columns["weight"][0], rule, step)
    if loop and not 0 < loop < len(library.loops()):
        raise S3Error(f"loop is {loop}: this CPU has {len(library.loops())}")
    rows = lay_out(columns, library.TYPES, memory)
    if step.found_inf is not None and step.found_inf.item():
        return
    # They are looked up by their values.
    if isinstance(rule.lr, Tensor):
        rule = rule._replace(lr=float(rule.lr))
    factor = 1.0 if step.factor is None else float(step.factor)
    seed = None
    if step.seed is not None and (stored := columns.stored()) is not None and stored.name == "bfloat16":
        seed = int(step.seed)
    settings = _settings(rule, factor, seed, *(None if x is None else x.dtype for x in columns.by_role()))
    threads = torch.get_num_threads()
    out = None if step.statistics is None else step.statistics.data_ptr()
    loaded = library.load()
    move = loaded.s3_softsignum_step if isinstance(rule, SoftRule) else loaded.s3_step
    move(rows.table.ctypes.data, len(columns), ctypes.byref(settings), loop, threads, out)
    rows.put_back()


# A structure of this size takes longer to fill than one small tensor to move.
@functools.lru_cache(maxsize=64)
def _settings(rule: AnyRule, factor: float, seed: int | None, *dtypes: torch.dtype | None) -> library.Settings:
    shared = {
        "lr": rule.lr,
        "weight_decay": rule.weight_decay,
        "factor": -factor if rule.maximize else factor,
        "nesterov": rule.nesterov,
        "stochastic": seed is not None,
        "types": tuple(0 if dtype is None else library.TYPES[dtype] for dtype in dtypes),
        # Two keys of the noise, each far from the next step's.
        "seed": tuple(((seed or 0) * 0x9E3779B97F4A7C15 >> shift) & 0xFFFFFFFF for shift in (16, 32)),
    }
    if isinstance(rule, SoftRule):
        return library.Settings(
            **shared, beta1=rule.beta, one_minus_beta1=1 - rule.beta, tau=math.inf if rule.hard else rule.tau
        )
    return library.Settings(
        **shared,
        beta1=rule.beta1,
        one_minus_beta1=1 - rule.beta1,
        beta2=rule.beta2,
        one_minus_beta2=1 - rule.beta2,
        p=rule.p,
        bound=rule.bound,
        form=form(rule.p),
        forgets=rule.beta2 == 0,
    )
