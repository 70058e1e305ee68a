"""The kernels under one signature: lists of weights, gradients, m and r, and all else by keyword."""

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

from torch import Tensor

from s3_megatron.kernels.call import ROLES, Columns, Rule, Step


def columns_of(*lists: list[Tensor], model_params=()) -> Columns:
    """Weights, gradients, m and r, and perhaps model weights, as a kernel takes them."""
    return Columns(dict(zip(ROLES, [*lists, model_params] if len(model_params) else lists, strict=False)))


def _by_keyword(room: str, name: str = "s3_step_") -> Callable[..., None]:
    """The step of a module; ``loop``, ``implementation`` and ``memory`` are handed on."""
    module = import_module(f"s3_megatron.kernels.{room}")

    def s3_step_(
        *lists: list[Tensor], model_params=(), scale=None, found_inf=None, statistics=None, rounding_seed=None, **rest
    ) -> None:
        step = Step(factor=scale, found_inf=found_inf, statistics=statistics, seed=rounding_seed)
        handed = {name: rest.pop(name) for name in ("loop", "implementation", "memory") if name in rest}
        getattr(module, name)(columns_of(*lists, model_params=model_params), Rule(**rest), step, **handed)

    return s3_step_


cpu, foreach, triton = (SimpleNamespace(s3_step_=_by_keyword(room)) for room in ("cpu", "foreach", "triton"))
step_ = _by_keyword("op", "step_")
