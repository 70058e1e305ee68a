"""How far an optimizer moved the weights, in units of the learning rate."""

from typing import Any

import torch
from torch import Tensor

# Elements looked at in one go: what is computed of them is 64 MiB in float32, beside a model of any size.
_AT_ONCE = 2**24


def adam_update_statistics(optimizer: torch.optim.Optimizer) -> Tensor:
    """Compute [sum, max] of Adam's last |update| from the state that its last step left.

    The update is ``m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)``, decay left out: what torch's and
    TransformerEngine's Adam(W) multiply by the learning rate. It is computed where the state is, in float32 (float64
    of float64 states), and summed in float64. Returns two float64 values on the state's device; parameters without
    state, and groups without Adam's betas and eps, count as nothing.
    """
    entries: list[tuple[dict[str, Any], dict[str, Any], Any]] = []
    for group in optimizer.param_groups:
        if "betas" in group and "eps" in group:
            for param in group["params"]:
                state = optimizer.state.get(param)
                if state and param.numel():
                    # torch keeps it with the parameter, TE with the group.
                    entries.append((group, state, state.get("step", group.get("step"))))
    device = entries[0][1]["exp_avg"].device if entries else None
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for (group, state, _), step in zip(entries, _numbers([step for *_, step in entries]), strict=True):
        if step == 0:
            continue
        beta1, beta2 = group["betas"]
        for mean, square in zip(_parts(state["exp_avg"]), _parts(state["exp_avg_sq"]), strict=True):
            root = (square / (1 - beta2**step)).sqrt_()
            update = (mean / (1 - beta1**step)).div_(root.add_(group["eps"])).abs_()
            total[0] += update.sum(dtype=torch.float64).to(total.device)
            total[1] = torch.maximum(total[1], update.max().to(total))
    return total


def _numbers(steps: list[Any]) -> list[float]:
    """Read all step counters; those on a GPU, as fused AdamW keeps them, in one copy."""
    tensors = [step for step in steps if isinstance(step, Tensor)]
    read = iter(torch.stack([step.reshape(()).to(tensors[0].device) for step in tensors]).tolist() if tensors else [])
    return [next(read) if isinstance(step, Tensor) else float(step) for step in steps]


def _parts(state: Tensor) -> tuple[Tensor, ...]:
    wide = state.dtype if state.dtype == torch.float64 else torch.float32
    return tuple(part.to(wide) for part in state.reshape(-1).split(_AT_ONCE))
