"""How far an Adam moved the weights, in units of the learning rate, from the state that its last step left."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from s3_megatron.watch import statistics
from s3_megatron.watch.statistics import AGREEING, ELEMENTS, LARGEST, SATURATED, SUM

# Elements looked at in one go: what is computed of them is 64 MiB in float32, beside a model of any size.
_AT_ONCE = 2**24
# They keep Adam's state and move by another rule (torch 2.13; Apex, DeepSpeed).
_OTHER_RULES = ("NAdam", "RAdam", "FusedLAMB", "FusedLamb")


def adam_statistics(optimizer: torch.optim.Optimizer) -> Tensor:
    """Compute ``statistics`` of Adam's last |update|; what it does not count, saturated and agreeing, is NaN.

    The update is ``m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)``, decay left out: what torch's and
    TransformerEngine's Adam(W) multiply by the learning rate. It is computed where the state is, in float32 (float64
    of float64 states), and summed in float64; of a DTensor, this rank's part. Returns five float64 on the state's
    device; all are 0 where no parameter has Adam's state.
    """
    entries = [
        # torch keeps it with the parameter, TE with the group.
        (group, state, state.get("step", group.get("step")))
        for group, state in ([] if type(optimizer).__name__ in _OTHER_RULES else _states(optimizer))
        if {"betas", "eps"} <= group.keys() and {"exp_avg", "exp_avg_sq"} <= state.keys()
        if state["exp_avg"].is_floating_point()
    ]
    device = local(entries[0][1]["exp_avg"]).device if entries else None
    total, elements = statistics.zeros(device=device), 0
    for (group, state, _), step in zip(entries, _numbers([step for *_, step in entries]), strict=True):
        if step == 0:
            continue
        beta1, beta2 = group["betas"]
        mean_square = state.get("max_exp_avg_sq", state["exp_avg_sq"])  # the former with amsgrad
        for mean, square in zip(_parts(state["exp_avg"]), _parts(mean_square), strict=True):
            root = (square / (1 - beta2**step)).sqrt_()
            update = (mean / (1 - beta1**step)).div_(root.add_(group["eps"])).abs_()
            total[SUM] += update.sum(dtype=torch.float64).to(total.device)
            total[LARGEST] = torch.maximum(total[LARGEST], update.max().to(total))
            elements += update.numel()
    total[ELEMENTS].fill_(elements)
    if elements:
        for unknown in (SATURATED, AGREEING):  # an index of both would be a tensor on its way to the GPU
            total[unknown].fill_(torch.nan)
    return total


def _states(optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pair every parameter's state with its group."""
    groups = optimizer.param_groups
    if any(group["params"] for group in groups):
        return [(group, optimizer.state.get(param, {})) for group in groups for param in group["params"]]
    # DeepSpeed's ZeRO-3 (0.19.8) puts its tensors into the groups only while it steps.
    if len({(*group.get("betas", ()), group.get("eps")) for group in groups}) == 1:
        return [(groups[0], state) for state in optimizer.state.values()]
    return []


def local(tensor: Tensor) -> Tensor:
    """Give what this rank holds of ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _numbers(steps: list[Any]) -> list[float]:
    """Read all step counters; those on a GPU, as fused AdamW keeps them, in one copy."""
    tensors = [local(step) for step in steps if isinstance(step, Tensor)]
    read = iter(torch.stack([step.reshape(()).to(tensors[0].device) for step in tensors]).tolist() if tensors else [])
    return [next(read) if isinstance(step, Tensor) else float(step) for step in steps]


def _parts(state: Tensor) -> tuple[Tensor, ...]:
    state = local(state)
    wide = state.dtype if state.dtype == torch.float64 else torch.float32
    return tuple(part.to(wide) for part in state.reshape(-1).split(_AT_ONCE) if part.numel())
