"""S3 as torch's own tests build an optimizer: by the flags of its Adam, and as a row of its table of optimizers."""

from typing import Any

import torch
from torch.testing._internal import common_optimizers as theirs
from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerInfo, OptimizerInput

from s3_megatron import optim

# Of Adam's arguments those that S3 has too, under the same name and with the same meaning.
SHARED = {"lr", "weight_decay", "maximize", "capturable"}


class S3(optim.S3):
    """S3 that takes Adam's arguments: what it lacks is left out, and its kernels go by the names of Adam's."""

    def __init__(self, params: Any, lr: float | torch.Tensor = 1e-3, **adams: Any) -> None:
        kernel = "cpu" if adams.get("fused") else "foreach" if "foreach" in adams or "fused" in adams else "auto"
        kept = {name: value for name, value in adams.items() if name in SHARED}
        super().__init__(params, lr, implementation=kernel, **kept)


def _inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    del device, dtype
    settings: dict[str, dict[str, Any]] = {
        "default": {},
        "non-default lr": {"lr": 0.01},
        "nonzero weight_decay": {"weight_decay": 0.1},
        "maximize": {"weight_decay": 0.1, "maximize": True},
        "capturable": {"weight_decay": 0.1, "capturable": True},
        "Tensor lr with capturable": {"lr": torch.tensor(0.001), "capturable": True},
    }
    return [OptimizerInput(params=None, kwargs=kwargs, desc=name) for name, kwargs in settings.items()]


def _error_inputs(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    wrong: dict[str, dict[str, Any]] = {
        "lr is -1": {"lr": -1.0},
        "weight_decay is -1": {"weight_decay": -1.0},
    }
    shared = theirs.get_error_inputs_for_all_optims(device, dtype)
    for each in shared:
        if each.error_regex == "Tensor lr must be 1-element":
            each.error_regex = "it must be one number"
    return shared + [
        ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs=kwargs, desc=message), error_type=ValueError, error_regex=message
        )
        for message, kwargs in wrong.items()
    ]


ROW = OptimizerInfo(
    S3,
    optim_inputs_func=_inputs,
    optim_error_inputs_func=_error_inputs,
    # Not "differentiable": a step is taken without autograd.
    supported_impls=("foreach", "fused"),
    not_og_supported_flags=(),
    supports_fused_on=("cpu",),
    has_capturable_arg=True,
    supports_complex=False,
)
