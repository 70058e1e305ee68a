"""How far an Adam moved the weights, in units of the learning rate, from the state that its last step left."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from s3_megatron.watch import statistics
from s3_megatron.watch.statistics import AGREEING, ELEMENTS, LARGEST, SATURATED, SUM

# Elements looked at in one go: what is computed of them is 64 MiB in float32, beside a model of any size.
_AT_ONCE = 2**24
# Those that move by Adam's rule: torch's, TransformerEngine's, Apex's and DeepSpeed's, and what Megatron makes of them
# to offload. Many others keep the same state under the same names, and move by another rule.
_ADAMS = ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam", "HybridDeviceOptimizer")


def adam_statistics(optimizer: torch.optim.Optimizer) -> Tensor:
    """Compute ``statistics`` of Adam's last |update|; what it does not count, saturated and agreeing, is NaN.

    The update is ``m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)``, decay left out: what torch's and
    TransformerEngine's Adam(W) multiply by the learning rate; without ``bias_correction`` (a setting of the fused ones)
    ``m / (sqrt(v) + eps)``. It is computed where the state is, in float32 (float64 of float64 states), and summed in
    float64; of a DTensor, this rank's part. Returns five float64 on the state's device; all are 0 where no parameter
    has Adam's state.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # of accelerate's wrapper, which has its state
    entries = [
        # torch keeps it with the parameter, TE with the group.
        (group, param, state, state.get("step", group.get("step")))
        for group, param, state in (_states(optimizer) if type(inner).__name__ in _ADAMS else [])
        if {"betas", "eps"} <= group.keys() and {"exp_avg", "exp_avg_sq"} <= state.keys()
        if state["exp_avg"].is_floating_point()
    ]
    device = local(entries[0][2]["exp_avg"]).device if entries else None
    total, elements = statistics.zeros(device=device), 0
    for (group, param, state, _), step in zip(entries, _numbers([step for *_, step in entries]), strict=True):
        if step == 0:
            continue
        beta1, beta2 = group["betas"] if group.get("bias_correction", True) else (0.0, 0.0)
        # The former with amsgrad.
        square_name = "max_exp_avg_sq" if "max_exp_avg_sq" in state else "exp_avg_sq"
        pair = (_unscaled(optimizer, param, state, name) for name in ("exp_avg", square_name))
        for mean, square in zip(*map(_parts, pair), strict=True):
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


def _states(optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], Any, dict[str, Any]]]:
    """List every parameter and its state with its group."""
    groups = optimizer.param_groups
    if any(group["params"] for group in groups):
        return [(group, param, optimizer.state.get(param, {})) for group in groups for param in group["params"]]
    # DeepSpeed's ZeRO-3 (0.19.8) puts its tensors into the groups only while it steps.
    if len({(*group.get("betas", ()), group.get("eps")) for group in groups}) == 1:
        return [(groups[0], param, state) for param, state in optimizer.state.items()]
    return []


def _unscaled(optimizer: Any, param: Any, state: dict[str, Any], name: str) -> Tensor:
    """Give a state in its own unit: TransformerEngine (2) keeps a scale beside those in float16 and 8 bits."""
    read = getattr(optimizer, "get_unscaled_state", None)
    found: Tensor = state[name] if read is None else read(param, name)
    return found


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
