"""How far a SoftSignum step moved the weights, for ``watch``."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from s3_megatron.kernels.foreach import accumulate_
from s3_megatron.watch import statistics

# Elements looked at in one go, as in watch/updates.py.
_AT_ONCE = 1 << 24


def add_updates_(
    total: Tensor,
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    beta: float,
    tau: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """Merge ``watch.statistics`` of the step that has left ``exp_avgs`` behind into ``total`` (modified in place).

    The update is computed again from m as it lies there, which the step has rounded where it is bfloat16, by
    ``kernels/softsignum.py``'s rules: 0 where the gradient is not finite. Nothing waits for a GPU.
    """
    for grad, exp_avg in zip(grads, exp_avgs, strict=True):
        dtype = torch.float64 if exp_avg.dtype == torch.float64 else torch.float32
        limit = torch.finfo(dtype).max / 4
        for part, m in zip(grad.reshape(-1).split(_AT_ONCE), exp_avg.reshape(-1).split(_AT_ONCE), strict=True):
            g, n = part.to(dtype), m.to(dtype)
            if maximize:
                g = -g
            kept = g.abs() <= limit  # NaN compares false
            if nesterov:
                n = beta * n + (1 - beta) * g
            # Below the smallest normal number a hard step has no sign.
            u = (n * tau).tanh() if tau < math.inf else n.sign() * (n.abs() >= torch.finfo(dtype).tiny)
            found = statistics.zeros(device=m.device)
            accumulate_(found, [torch.where(kept, u, 0.0)], [g])
            statistics.merge_(total, found.to(total.device))
