"""How a sign is relaxed near the end of a run (arXiv 2605.31371): the phases, and the temperature of each soft step.

Imports no torch. The momentum that it starts from is measured in ``optim/pooled_median.py``.
"""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import NamedTuple

from s3_megatron.errors import S3Error

# For each map y = phi(x): the x at which phi is 1 - eps. tanh(x) is SoftSignum's, x / sqrt(1 + x^2) SoftMuon's.
REACHES: dict[str, Callable[[float], float]] = {
    "tanh": lambda eps: math.log((2 - eps) / eps) / 2,
    "algebraic": lambda eps: (1 - eps) / math.sqrt(eps * (2 - eps)),
}


class Schedule(NamedTuple):
    """The temperatures of a soft phase in six values; every tau follows from them and from the step.

    Attributes:
        mu: median of the signed momentum (SoftMuon: of the singular values) at the first soft step.
        sigma: their median absolute deviation from mu.
        eps: how far phi stays below 1 at each quantile.
        first: number of the first soft step; the run's first step is 0.
        length: soft steps.
        map: phi, a key of ``REACHES``.
    """

    mu: float
    sigma: float
    eps: float
    first: int
    length: int
    map: str

    def tau(self, step: int, tmax: float) -> float:
        """Return the temperature of a step, in [1, tmax]: of the first tmax; behind the last one its own stays."""
        k = min(max(step - self.first, 0), self.length - 1)
        q = folded_cauchy_quantile(self.mu, self.sigma, k / self.length)
        return tmax if q == 0 else min(max(REACHES[self.map](self.eps) / q, 1.0), tmax)


def folded_cauchy_quantile(mu: float, sigma: float, p: float) -> float:
    """Return the q with P(|y| <= q) = p for a Cauchy y with centre mu and width sigma; p in [0, 1).

    Closed form: tan of a sum of two angles is p's, which makes it the root of a quadratic. At p = 0 it is 0, even
    for a width of 0.
    """
    scale = max(abs(mu), sigma)
    if scale == 0 or p == 0:
        return 0.0
    mu, sigma = mu / scale, sigma / scale  # squares of denormals are 0
    sine, cosine = math.sin(math.pi * p), math.cos(math.pi * p)
    root = math.sqrt(sigma**2 * cosine**2 + (sigma**2 + mu**2) * sine**2)
    # Of two equal forms the one that adds numbers of one sign.
    if p <= 0.5:
        return scale * (sigma**2 + mu**2) * sine / (sigma * cosine + root)
    return scale * (root - sigma * cosine) / sine


def phases(
    total_steps: int | None, soft_start: float, sign_iters: int | None, transition_iters: int | None
) -> tuple[int, int]:
    """Return how many hard steps a run has, and how many soft ones.

    Either ``soft_start``, the share of ``total_steps`` that is hard, or ``sign_iters`` hard steps, and
    ``transition_iters`` soft ones or those up to ``total_steps``.

    Raises:
        S3Error: a value is out of range, the length of the run is not known, or two values contradict each other.
    """
    for name, value in {
        "total_steps": total_steps,
        "sign_iters": sign_iters,
        "transition_iters": transition_iters,
    }.items():
        low = 0 if name == "sign_iters" else 1
        if value is not None and (not isinstance(value, Integral) or value < low):
            raise S3Error(f"{name} is {value!r}: it must be a whole number >= {low}; soft_start=1 has no soft step")
    if not isinstance(soft_start, Real) or not 0 <= soft_start <= 1:
        raise S3Error(
            f"soft_start is {soft_start!r}: it must lie in [0, 1], the share of the run that is hard; .9 is usual"
        )
    if sign_iters is None:
        if transition_iters is not None:
            raise S3Error(f"transition_iters is {transition_iters} without sign_iters: give both, or soft_start")
        if total_steps is None:
            if soft_start < 1:
                raise S3Error(
                    "the length of the run is not known: give total_steps, or sign_iters and transition_iters, or "
                    "soft_start=1 for hard steps alone (Signum)"
                )
            return 0, 0
        hard = round(soft_start * total_steps)
        if soft_start < 1 and hard == total_steps:
            raise S3Error(
                f"soft_start={soft_start} leaves no soft step of total_steps={total_steps}: lower it, or give "
                "soft_start=1 for hard steps alone"
            )
        return hard, total_steps - hard
    if transition_iters is None:
        if total_steps is None or total_steps <= sign_iters:
            raise S3Error(
                f"sign_iters is {sign_iters} and total_steps {total_steps}: no soft step is left; give "
                "transition_iters, or a larger total_steps"
            )
        return sign_iters, total_steps - sign_iters
    if total_steps is not None and total_steps != sign_iters + transition_iters:
        raise S3Error(
            f"sign_iters + transition_iters is {sign_iters + transition_iters} and total_steps {total_steps}: they "
            "must be equal; leave out one of the three"
        )
    return sign_iters, transition_iters
