"""Which parameters decay."""

from typing import Any

from torch import nn


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters into two param groups: matrices decay; biases, norms and scalars do not.

    Under ZeRO-3's ``zero.Init`` every parameter is one-dimensional, and its own shape is in ``ds_shape``
    (deepspeed 0.19.8): a choice by ``param.ndim`` would exempt the whole model from decay. A group that would be
    empty is left out.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for param in model.parameters():
        if param.requires_grad:
            (matrices if len(getattr(param, "ds_shape", param.shape)) > 1 else others).append(param)
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
