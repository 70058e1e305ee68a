"""``torch.ops.s3.step_``: one S3 step over lists of tensors, by whichever kernel is best for where they are."""

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.kernels import cpu, foreach, triton
from s3_megatron.kernels.examine import Columns, examine
from s3_megatron.kernels.metadata import Memory
from s3_megatron.kernels.rows import Unfit, sort

logger = logging.getLogger(__name__)

type Implementation = Literal["auto", "foreach", "cpu", "triton"]
IMPLEMENTATIONS = get_args(Implementation.__value__)

_KERNELS = {"foreach": foreach, "cpu": cpu, "triton": triton}
# The fast kernel of each device, and the dtypes it takes; foreach takes everything.
_FAST = {"cpu": "cpu", "cuda": "triton"}
_FAST_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_roots: Sequence[Tensor],
    model_params: Sequence[Tensor],
    statistics: Tensor | None,
    lr: float | Tensor,
    scale: Tensor | None,
    found_inf: Tensor | None,
    rounding_seed: Tensor | None,
    *,
    beta1: float,
    beta2: float,
    p: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    implementation: str,
    memory: Memory | None = None,
) -> None:
    """Move every parameter by one S3 step, in a single pass over memory where a fast kernel runs.

    Compiled code calls it as ``torch.ops.s3.step_``. Without a compiler to see it, this function itself is the shorter
    way: the dispatcher takes 6 us a tensor.

    The state is m and the root ``r = s^(1/p)``. The arithmetic is float32 (float64 for float64
    states); the tensors of a row have one shape and device. Nothing waits for a GPU.

    Before anything is written, every tensor is looked at. A kernel that works on memory gets plain dense tensors only;
    all others (subclasses with an own ``__torch_dispatch__``, the negative bit, several in one memory) go to foreach.

    Args:
        params: weights, float32, bfloat16, float16 or float64 (modified in place).
        grads: gradients of the same shapes, any floating dtype; never modified. A coordinate whose gradient is not
            finite (or beyond a quarter of the state arithmetic's range) keeps its weight, m and r bit for bit.
        exp_avgs: m, float32, bfloat16 or float64 (modified in place).
        exp_avg_roots: r, of m's dtype (modified in place).
        model_params: empty, or for each parameter a tensor, in low precision, to which its new value is written too.
        statistics: None, or ``watch.statistics.zeros`` on the parameters' device, to which this step's are added
            (modified in place); u is the update in units of the rate, 0 where a coordinate was left out.
        lr: learning rate, a number or 0-dim, on the CPU or on the parameters' device.
        scale: None, or one float32 on the parameters' device by which gradients are multiplied first (1 / loss
            scale, and the clip coefficient).
        found_inf: None, or one float32 on the parameters' device; not 0 makes the whole step do nothing.
        rounding_seed: None, or one int64 on the parameters' device; bfloat16 states are then rounded stochastically,
            with noise of this seed, not to nearest even.
        beta1: decay of m, in [0, 1).
        beta2: decay of s, in [0, 1). If it equals beta1 the update is clamped to [-1, 1]: |n/b| < 1 in exact
            arithmetic, and float32 rounding reaches 1 + 1.1e-6. Betas apart have a larger bound and no clamp.
        p: exponent of the denominator, >= 1; 1, 2 and 3 have forms of their own.
        weight_decay: decoupled, ``x <- x - lr * (update + weight_decay * x)``.
        nesterov: look ahead by one step, as Algorithm 1 does.
        maximize: ascend instead of descending; the decay still shrinks.
        implementation: one of ``IMPLEMENTATIONS``.
        memory: what ``rows.read`` returned of these lists just now, which is then not read again.

    Raises:
        S3Error: the implementation does not run here, or not for these tensors; or they do not belong together.
            Nothing has been written.
    """
    if not params:
        return
    columns: Columns = [params, grads, exp_avgs, exp_avg_roots, *([model_params] if model_params else [])]
    settings = {
        "lr": lr,
        "beta1": beta1,
        "beta2": beta2,
        "p": p,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
        "scale": scale,
        "found_inf": found_inf,
        "statistics": statistics,
        "rounding_seed": rounding_seed,
    }
    kernel = _kernel_for(columns, implementation)
    if kernel != "foreach":
        try:
            _run(kernel, columns, settings, memory)
            return
        except Unfit:
            pass
    # Several dtypes or devices, or tensors that not every kernel takes. Every row is looked at, and every part finds a
    # kernel, before the first is moved.
    examine(columns)
    parts = sort(columns)
    for kernel, part in zip([_kernel_for(part, implementation) for part in parts], parts, strict=True):
        try:
            _run(kernel, part, settings)
        except Unfit as unfit:
            if implementation != "auto":
                raise S3Error(f"implementation={implementation!r} cannot run: {unfit}; 'auto' can") from None
            _run("foreach", part, settings)


def _kernel_for(columns: Columns, implementation: str) -> str:
    """Choose by the first row."""
    if not all(columns):
        return "foreach"  # which refuses lists of several lengths
    return choose(implementation, columns[0][0].device.type, frozenset([column[0].dtype for column in columns]))


def _run(kernel: str, columns: Columns, settings: dict[str, Any], memory: Memory | None = None) -> None:
    params, grads, exp_avgs, exp_avg_roots, *models = columns
    model_params = models[0] if models else ()
    if kernel == "foreach":
        _KERNELS[kernel].s3_step_(params, grads, exp_avgs, exp_avg_roots, model_params=model_params, **settings)
        return
    step_of = _KERNELS[kernel].s3_step_
    step_of(params, grads, exp_avgs, exp_avg_roots, model_params=model_params, memory=memory, **settings)
    # It writes past autograd, which must know that what it may have saved is no more.
    if memory is None or not memory.count_up_versions():
        torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_roots, *model_params])


def _checked_step_(*columns: Any, **settings: Any) -> None:
    """``step_`` for code that no S3 object has looked at, compiled code above all: it refuses a wrong rate."""
    lr = columns[6]
    if lr.device.type == "cpu" and lr.numel() == 1 and not 0 <= float(lr) < math.inf:
        raise S3Error(f"lr is {float(lr)}: it must be a finite number >= 0; look at what writes it")
    step_(*columns, **settings)


_op = torch.library.custom_op(
    "s3::step_",
    _checked_step_,
    mutates_args=("params", "exp_avgs", "exp_avg_roots", "model_params", "statistics"),
    schema=(
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_roots, "
        "Tensor(d!)[] model_params, Tensor(e!)? statistics, Tensor lr, Tensor? scale, Tensor? found_inf, "
        "Tensor? rounding_seed, *, float beta1, float beta2, float p, float weight_decay, bool nesterov, "
        "bool maximize, str implementation) -> ()"
    ),
)


@_op.register_fake
def _(*args: object, **kwargs: object) -> None:
    """Compute nothing: all outputs are written in place."""


@functools.cache
def choose(implementation: str, device: str, dtypes: frozenset[torch.dtype]) -> str:
    """Name the kernel that runs for tensors of these dtypes on this type of device; says so once.

    Raises:
        S3Error: the implementation asked for is unknown, or cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise S3Error(f"implementation is {implementation!r}: it must be one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "foreach":
        return "foreach"
    reason = _obstacle(_FAST.get(device) if implementation == "auto" else implementation, device, dtypes)
    if implementation != "auto":
        if reason is not None:
            raise S3Error(f"implementation={implementation!r} cannot run here: {reason}; 'auto' takes what can")
        return implementation
    if reason is None:
        return _announce(device, None)
    if device in _FAST and dtypes <= _FAST_DTYPES:
        return _announce(device, reason)
    return "foreach"


@functools.cache
def _announce(device: str, obstacle: str | None) -> str:
    """Name what "auto" takes, and say so once a device, however many dtypes come."""
    fast = _FAST[device]
    if obstacle is None:
        logger.info("S3 steps on %s by kernel %s%s", device, fast, f" ({cpu.loop_name()})" if fast == "cpu" else "")
        return fast
    message = "S3 steps on %s by kernel foreach, in about ten passes over memory where %s takes one: %s"
    logger.warning(message, device, fast, obstacle)
    return "foreach"


def _obstacle(kernel: str | None, device: str, dtypes: frozenset[torch.dtype]) -> str | None:
    """Say why a fast kernel cannot run, if it cannot."""
    if kernel is None or _FAST.get(device) != kernel:
        return f"the tensors are on {device}"
    if not dtypes <= _FAST_DTYPES:
        return f"it takes float32, bfloat16 and float16, and not {', '.join(map(str, dtypes - _FAST_DTYPES))}"
    return _KERNELS[kernel].unavailable()
