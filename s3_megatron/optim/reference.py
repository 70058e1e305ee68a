"""Algorithm 1 of the S3 paper (arXiv 2507.06464) for one tensor in float64: for readers, and the oracle of every test.

It follows the paper to the letter: s is kept as the mean of ``|g|^p``, not as its root, and nothing is clamped. The
optimizer itself (``optim/s3.py``) keeps the root and runs in float32; tests hold it to this file.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def s3_reference_step(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    s: Tensor,
    *,
    lr: float,
    beta1: float = 0.95,
    beta2: float = 0.95,
    p: float = 3.0,
    weight_decay: float = 0.0,
    nesterov: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of Algorithm 1; returns the new ``(param, m, s, update)`` and changes nothing in place.

    All tensors have one shape and are float64. ``update`` is n/b, the step in units of the learning rate; where b is
    0 (only zero gradients so far) it is 0. The paper has one shared beta; beta1 != beta2 serves the ablations.
    """
    m = beta1 * m + (1 - beta1) * grad  # line "m": EMA of the gradient
    s = beta2 * s + (1 - beta2) * grad.abs() ** p  # line "s": EMA of |gradient|^p
    if nesterov:  # the look-ahead: what m and s would be if the same gradient came once more
        n = beta1 * m + (1 - beta1) * grad
        b = (beta2 * s + (1 - beta2) * grad.abs() ** p) ** (1 / p)
    else:
        n, b = m, s ** (1 / p)
    update = torch.where(b == 0, torch.zeros_like(n), n / b)
    # Decoupled weight decay, as AdamW's.
    return param - lr * (update + weight_decay * param), m, s, update


def update_bound(step: int, *, beta: float, p: float) -> float:
    """The largest ``|n/b|`` possible at ``step`` (counted from 1) with one shared beta, by Hoelder's inequality.

    It is reached by a constant gradient, and is below 1 at every step.
    """
    return float((1 - beta ** (step + 1)) ** (1 - 1 / p))


def reference_updates(gradients: Iterable[Tensor], **hyperparameters: float | bool) -> Iterator[Tensor]:
    """Yield n/b for a stream of float64 gradients, starting from zero state."""
    m = s = x = None
    for grad in gradients:
        if m is None or s is None or x is None:
            m = s = x = torch.zeros_like(grad)
        x, m, s, update = s3_reference_step(x, grad, m, s, lr=1.0, **hyperparameters)  # type: ignore[arg-type]
        yield update
