"""SoftSignum (arXiv 2605.31371) for one tensor in float64, with its temperature: for readers, and the tests' oracle."""

import math

from torch import Tensor


def softsignum_reference_step(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    *,
    lr: float,
    beta: float = 0.9,
    tau: float = math.inf,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step; returns the new ``(param, m, update)`` and changes nothing in place.

    All tensors have one shape and are float64. ``tau`` is the temperature; infinity is the hard step, a sign.
    """
    m = beta * m + (1 - beta) * grad
    n = beta * m + (1 - beta) * grad if nesterov else m  # the look-ahead: m if the same gradient came once more
    update = n.sign() if tau == math.inf else (tau * n).tanh()
    return param - lr * (update + weight_decay * param), m, update


def reference_temperature(m: Tensor, k: int, length: int, *, eps: float = 1e-4, tmax: float = 1e9) -> float:
    """The temperature of soft step ``k`` of ``length``, from all momentum of the model at the first soft step.

    ``m`` is float64, with its signs. A folded Cauchy distribution is laid through it; its quantile q at p = k/length
    becomes the magnitude of momentum at which tanh is 1 - eps. Found by halving an interval, not by a closed form.
    """
    mu = m.median().item()  # of an even number of elements the lower of the two in the middle
    sigma = (m - mu).abs().median().item()
    p = k / length

    def share_below(q: float) -> float:
        """The share of |y| below q, where y is Cauchy with centre mu and width sigma."""
        return (math.atan((q - mu) / sigma) + math.atan((q + mu) / sigma)) / math.pi

    low, high = 0.0, 1.0
    while share_below(high) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if share_below(middle) < p else (low, middle)
    return tmax if high == 0 else min(max(math.atanh(1 - eps) / high, 1.0), tmax)
