"""Spikes of a loss curve, by the definition in docs/evidence.md."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

WINDOW, LEAST, SCORE = 128, 64, 7.0
CALM = 16  # accepted values in a row that end a spike


@dataclass
class Spike:
    """A spike: its first step, how many steps until the last outlier, and its height over the median before it."""

    start: int
    steps: int
    height: float  # infinite where a loss was not finite


def find(losses: Iterable[float]) -> list[Spike]:
    """Find the spikes of a curve with a loss for every step, counted from 0."""
    window: deque[float] = deque(maxlen=WINDOW)
    found: list[Spike] = []
    rejected = calm = 0  # in a row
    is_open = False
    for step, loss in enumerate(losses):
        centre, limit = math.nan, math.inf
        if len(window) >= LEAST:
            centre = median(window)
            spread = max(1.4826 * median(abs(x - centre) for x in window), 0.01 * centre / 6)
            limit = centre + SCORE * spread
        if math.isfinite(loss) and loss <= limit:
            window.append(loss)
            rejected, calm = 0, calm + 1
            is_open = is_open and calm < CALM
            continue
        rejected, calm = rejected + 1, 0
        if not is_open:
            found.append(Spike(step, 0, 0.0))
            is_open = True
        spike = found[-1]
        spike.steps = step - spike.start + 1
        spike.height = max(spike.height, loss - centre if math.isfinite(loss) else math.inf)
        if rejected >= WINDOW:  # a new level is no spike for ever
            window.clear()
    return found
