"""One step over lists of tensors, by whichever kernel is best for where they are; S3's is ``torch.ops.s3.step_``."""

import functools
import logging
import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from s3_megatron.errors import S3Error
from s3_megatron.kernels import cpu, foreach, softsignum, triton
from s3_megatron.kernels.call import STATES, AnyRule, Columns, Kind, Rule, SoftRule, Step
from s3_megatron.kernels.examine import examine
from s3_megatron.kernels.formats import FORMATS
from s3_megatron.kernels.metadata import Memory
from s3_megatron.kernels.rows import Unfit, sort

logger = logging.getLogger(__name__)

type Implementation = Literal["auto", "foreach", "cpu", "triton"]
IMPLEMENTATIONS = get_args(Implementation.__value__)

_FAST_KERNELS = {"cpu": cpu, "triton": triton}
# The fast kernel of each device, and the dtypes and formats of states it takes; foreach takes everything.
_FAST = {"cpu": "cpu", "cuda": "triton"}
_FAST_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
_FAST_FORMATS = ("float32", "bfloat16")


def step_(columns: Columns, rule: AnyRule, step: Step, implementation: str, memory: Memory | None = None) -> None:
    """Move every parameter by one step of S3 or SoftSignum, in one pass over memory where a fast kernel runs.

    In what is compiled S3's is ``torch.ops.s3.step_``; SoftSignum is not compiled. Without a compiler to see it, this
    function itself is the shorter way: the dispatcher takes 6 us a tensor.

    The state is m and, of S3, the root ``r = s^(1/p)``. The arithmetic is float32 (float64 for float64
    states); the tensors of a row have one shape and device. Nothing waits for a GPU.

    Before anything is written, every tensor is looked at. A kernel that works on memory gets plain dense tensors only;
    all others (subclasses with an own ``__torch_dispatch__``, the negative bit, several in one memory) go to foreach.

    Args:
        columns: weights, float32, bfloat16, float16 or float64; gradients of any floating dtype; the states, all
            float32, bfloat16 or float64; model weights in low precision. All but the gradients are modified in place. A
            coordinate whose gradient is not finite (or beyond a quarter of the state arithmetic's range) keeps its
            weight and states bit for bit.
        rule: the numbers of the update, in range; whose they are is whose step it is.
        step: what this step has beside.
        implementation: one of ``IMPLEMENTATIONS``.
        memory: what ``rows.read`` returned of these columns just now, which are then not read again.

    Raises:
        S3Error: the implementation does not run here, or not for these tensors; or they do not belong together.
            Nothing has been written.
    """
    if not columns:
        return
    if torch.compiler.is_compiling():
        assert isinstance(rule, Rule), "SoftSignum.step is not compiled"
        _as_op(columns, rule, step, implementation)
        return
    title = "SoftSignum" if isinstance(rule, SoftRule) else "S3"
    kernel = _kernel_for(columns, implementation, title)
    if kernel != "foreach":
        try:
            _run(kernel, columns, rule, step, memory)
            return
        except Unfit:
            pass
    # Several dtypes or devices, or tensors that not every kernel takes. Every row is looked at, and every part finds a
    # kernel, before the first is moved.
    examine(columns)
    parts = sort(columns)
    for kernel, part in zip([_kernel_for(part, implementation, title) for part in parts], parts, strict=True):
        try:
            _run(kernel, part, rule, step)
        except Unfit as unfit:
            if implementation != "auto":
                raise S3Error(f"implementation={implementation!r} cannot run: {unfit}; 'auto' can") from None
            _run("foreach", part, rule, step)


def _kernel_for(columns: Columns, implementation: str, title: str) -> str:
    """Choose by the first row."""
    if not all(columns.lists.values()):
        return "foreach"  # which refuses lists of several lengths
    stored, device = columns.stored(), columns["weight"][0].device.type
    format = "float32" if stored is None else stored.name
    return choose(implementation, device, frozenset(columns.dtypes()), format, title)


def _run(kernel: str, columns: Columns, rule: AnyRule, step: Step, memory: Memory | None = None) -> None:
    if kernel == "foreach":
        if isinstance(rule, SoftRule):
            softsignum.foreach_(columns, rule, step)
        else:
            foreach.s3_step_(columns, rule, step)
        return
    _FAST_KERNELS[kernel].step_(columns, rule, step, memory)
    # It writes past autograd, which must know that what it may have saved is no more.
    if memory is None or not memory.count_up_versions():
        torch.autograd.graph.increment_version([*chain.from_iterable(columns.written().values())])


def _as_op(columns: Columns, rule: Rule, step: Step, implementation: str) -> None:
    lr = rule.lr
    if not isinstance(lr, Tensor):
        # Not as_tensor, for which torch's compiler takes a float as it is, and compiles again for the next.
        lr = torch.full((), lr, dtype=torch.float64, device="cpu")
    numbers = {name: getattr(rule, name) for name in ("beta1", "beta2", "p", "weight_decay", "nesterov", "maximize")}
    states = [*chain.from_iterable(columns[kind] for kind in STATES)]
    lists = columns["weight"], columns["gradient"], states, columns.lists.get("model weight", [])
    given = step.factor, step.found_inf, step.statistics, step.seed
    torch.ops.s3.step_(*lists, lr, *given, **numbers, format=columns.format, implementation=implementation)


def _op_(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    model_params: list[Tensor],
    lr: Tensor,
    factor: Tensor | None,
    found_inf: Tensor | None,
    statistics: Tensor | None,
    seed: Tensor | None,
    *,
    format: str,
    implementation: str,
    **numbers: Any,
) -> None:
    """``step_`` for compiled code, which no S3 object has looked at: it refuses a wrong rate.

    ``states`` are those of the format, column after column.
    """
    if lr.device.type == "cpu" and lr.numel() == 1 and not 0 <= float(lr) < math.inf:
        raise S3Error(f"lr is {float(lr)}: it must be a finite number >= 0; look at what writes it")
    if format not in FORMATS:
        raise S3Error(f"format is {format!r}: it must be one of {', '.join(FORMATS)}")
    lists: dict[Kind, Sequence[Tensor]] = {"weight": params, "gradient": grads}
    for i, kind in enumerate(FORMATS[format].columns):
        lists[kind] = states[i * len(params) : (i + 1) * len(params)]
    if model_params:
        lists["model weight"] = model_params
    step_(Columns(lists, format), Rule(lr, **numbers), Step(factor, found_inf, statistics, seed), implementation)


_op = torch.library.custom_op(
    "s3::step_",
    _op_,
    mutates_args=("params", "states", "model_params", "statistics"),
    schema=(
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] model_params, Tensor lr, "
        "Tensor? factor, Tensor? found_inf, Tensor(d!)? statistics, Tensor? seed, *, float beta1, float beta2, "
        "float p, float weight_decay, bool nesterov, bool maximize, str format, str implementation) -> ()"
    ),
)


@_op.register_fake
def _(*args: object, **kwargs: object) -> None:
    """Compute nothing: all outputs are written in place."""


def check_implementation(name: str) -> None:
    """Raise S3Error unless it is one of ``IMPLEMENTATIONS``."""
    if name not in IMPLEMENTATIONS:
        raise S3Error(f"implementation is {name!r}: it must be one of {', '.join(IMPLEMENTATIONS)}")


@functools.cache
def choose(
    implementation: str, device: str, dtypes: frozenset[torch.dtype], format: str = "float32", title: str = "S3"
) -> str:
    """Name the kernel that runs for tensors of these dtypes on this type of device; says so once.

    ``format`` is the states', one of ``FORMATS``; ``title`` is the optimizer's, for people.

    Raises:
        S3Error: the implementation asked for is unknown, or cannot run.
    """
    check_implementation(implementation)
    if implementation == "foreach":
        return "foreach"
    reason = _obstacle(_FAST.get(device) if implementation == "auto" else implementation, device, dtypes, format)
    if implementation != "auto":
        if reason is not None:
            raise S3Error(f"implementation={implementation!r} cannot run here: {reason}; 'auto' takes what can")
        return implementation
    if reason is None:
        return _announce(title, device, None)
    if device in _FAST and dtypes <= _FAST_DTYPES and format in _FAST_FORMATS:
        return _announce(title, device, reason)
    return "foreach"


@functools.cache
def _announce(title: str, device: str, obstacle: str | None) -> str:
    """Name what "auto" takes, and say so once a device, however many dtypes come."""
    fast = _FAST[device]
    if obstacle is None:
        loop = f" ({cpu.loop_name()})" if fast == "cpu" else ""
        logger.info("%s steps on %s by kernel %s%s", title, device, fast, loop)
        return fast
    message = "%s steps on %s by kernel foreach, in about ten passes over memory where %s takes one: %s"
    logger.warning(message, title, device, fast, obstacle)
    return "foreach"


def _obstacle(kernel: str | None, device: str, dtypes: frozenset[torch.dtype], format: str) -> str | None:
    """Say why a fast kernel cannot run, if it cannot."""
    if kernel is None or _FAST.get(device) != kernel:
        return f"the tensors are on {device}"
    if not dtypes <= _FAST_DTYPES:
        return f"it takes float32, bfloat16 and float16, and not {', '.join(map(str, dtypes - _FAST_DTYPES))}"
    if format not in _FAST_FORMATS:
        return f"it takes states in {' and '.join(_FAST_FORMATS)}, and not in {format}"
    return _FAST_KERNELS[kernel].unavailable()
