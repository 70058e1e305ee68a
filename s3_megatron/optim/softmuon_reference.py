"""SoftMuon's step (arXiv 2605.31371) for one matrix in float64: for readers, and the oracle of its tests.

The map goes through the singular values themselves. By the eigenvalues of M^T M, as its formula reads, singular values
below 1e-8 of the largest would drown in float64's rounding.
"""

import torch
from torch import Tensor


def softmuon_map(matrix: Tensor, tau: float) -> Tensor:
    """Return M (M^T M + tau^-2 I)^(-1/2) = U diag(tau*s / sqrt(1 + (tau*s)^2)) V^T, float64 [rows, cols].

    An infinite tau makes it the polar factor U V^T, where singular values of 0 stay 0.
    """
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    soft = torch.where(s > 0, torch.hypot(torch.ones_like(s), 1 / (tau * s)).reciprocal(), 0.0)
    return (u * soft) @ vt


def softmuon_reference_step(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    *,
    lr: float,
    tau: float,
    beta: float = 0.95,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One soft step; returns the new ``(param, m, update)`` and changes nothing in place.

    All tensors are float64 [rows, cols]. ``update`` is the step in units of the learning rate.
    """
    m = beta * m + (1 - beta) * grad
    look_ahead = beta * m + (1 - beta) * grad if nesterov else m
    update = scale * softmuon_map(look_ahead, tau)
    return param - lr * (update + weight_decay * param), m, update
