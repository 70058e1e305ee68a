"""The kernels under one signature: lists of weights, gradients, m and r, and all else by keyword."""

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

from torch import Tensor

from s3_megatron.kernels.call import Columns, Kind, Rule, SoftRule, Step

KINDS: tuple[Kind, ...] = ("weight", "gradient", "m", "r")


def columns_of(*lists: list[Tensor], model_params=()) -> Columns:
    """Weights, gradients, m and perhaps r, and perhaps model weights, as a kernel takes them."""
    named = dict(zip(KINDS, lists, strict=False))
    return Columns(named | {"model weight": model_params} if len(model_params) else named)


def _by_keyword(room: str, name: str, rule: type = Rule) -> Callable[..., None]:
    """The step of a module; ``loop``, ``implementation`` and ``memory`` are handed on."""
    module = import_module(f"s3_megatron.kernels.{room}")

    def step_(
        *lists: list[Tensor], model_params=(), scale=None, found_inf=None, statistics=None, rounding_seed=None, **rest
    ) -> None:
        step = Step(factor=scale, found_inf=found_inf, statistics=statistics, seed=rounding_seed)
        handed = {name: rest.pop(name) for name in ("loop", "implementation", "memory") if name in rest}
        getattr(module, name)(columns_of(*lists, model_params=model_params), rule(**rest), step, **handed)

    return step_


cpu, triton = (SimpleNamespace(s3_step_=_by_keyword(room, "step_")) for room in ("cpu", "triton"))
foreach = SimpleNamespace(s3_step_=_by_keyword("foreach", "s3_step_"))
step_ = _by_keyword("op", "step_")
cpu.softsignum_step_, triton.softsignum_step_ = (_by_keyword(room, "step_", SoftRule) for room in ("cpu", "triton"))
foreach.softsignum_step_ = _by_keyword("softsignum", "foreach_", SoftRule)
softsignum_step_ = _by_keyword("op", "step_", SoftRule)
