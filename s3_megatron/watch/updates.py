"""How far an optimizer moved the weights, in units of the learning rate."""

import torch
from torch import Tensor


def adam_update_statistics(optimizer: torch.optim.Optimizer) -> Tensor:
    """Compute [sum, max] of Adam's last |update| from the state that its last step left.

    The update is ``m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)``, decay left out: what torch's and
    TransformerEngine's Adam(W) multiply by the learning rate. Returns two float64 values; parameters without
    state, and groups without Adam's betas and eps, count as nothing.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for group in optimizer.param_groups:
        if "betas" not in group or "eps" not in group:
            continue
        beta1, beta2 = group["betas"]
        for param in group["params"]:
            state = optimizer.state.get(param)
            if not state or not param.numel():
                continue
            step = float(state.get("step", group.get("step")))  # torch keeps it with the parameter, TE with the group
            if step == 0:
                continue
            mean = state["exp_avg"].double() / (1 - beta1**step)
            root = (state["exp_avg_sq"].double() / (1 - beta2**step)).sqrt()
            update = (mean / (root + group["eps"])).abs().cpu()
            total[0] += update.sum()
            total[1] = torch.maximum(total[1], update.max())
    return total
