"""What counts as a spike: curves whose spikes are put there, on noise of .02 nats around 3."""

import math
from random import Random

import pytest

from s3_megatron.evidence import spikes


def curve(steps: int = 600, seed: int = 0) -> list[float]:
    noise = Random(seed)
    return [3 + noise.gauss(0, 0.02) for _ in range(steps)]


def bump(losses: list[float], start: int, height: float, decay: float) -> None:
    for step in range(start, len(losses)):
        losses[step] += height * math.exp(-(step - start) / decay)


@pytest.mark.parametrize("seed", range(20))
def test_noise_has_no_spike(seed: int):
    """The seeds are fixed, and a Gaussian value passes seven spreads, as estimated from 64 others, once in millions."""
    assert spikes.find(curve(300, seed)) == []


def test_a_spike_has_its_start_its_length_and_its_height():
    losses = curve()
    bump(losses, 300, 0.5, 20)
    (spike,) = spikes.find(losses)
    # It ends where the bump sinks below the limit, seven spreads: 20 ln(.5 / .14) = 25 steps, give or take noise.
    assert spike.start == 300 and 15 <= spike.steps <= 40
    # Over the median before, by the noise of one value.
    assert spike.height == pytest.approx(0.5, abs=0.08)


def test_a_small_spike_after_a_large_one_is_found():
    """A detector whose window takes the outliers in is blind to the second."""
    losses = curve()
    bump(losses, 300, 3.0, 5)
    bump(losses, 400, 0.3, 5)
    assert [spike.start for spike in spikes.find(losses)] == [300, 400]


def test_outliers_within_sixteen_steps_of_another_are_one_spike():
    """15 accepted values lie between the first two, 16 between these and the third."""
    losses = curve()
    for step in (300, 316, 333):
        losses[step] = 4.0
    assert [(spike.start, spike.steps) for spike in spikes.find(losses)] == [(300, 17), (333, 1)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_a_spike_of_one_step_wherever_it_is(value: float):
    losses = curve()
    losses[3] = losses[300] = value
    assert [(spike.start, spike.steps, spike.height) for spike in spikes.find(losses)] == [
        (3, 1, math.inf),
        (300, 1, math.inf),
    ]


def test_a_new_level_is_no_spike_for_ever():
    losses = curve()
    bump(losses, 300, 1.0, math.inf)
    (spike,) = spikes.find(losses)
    assert (spike.start, spike.steps) == (300, spikes.WINDOW)


def test_before_64_values_nothing_finite_is_an_outlier():
    losses = curve()
    losses[63] = 5.0
    assert spikes.find(losses) == []
    losses = curve()
    losses[64] = 5.0
    assert [spike.start for spike in spikes.find(losses)] == [64]


def test_on_a_curve_without_noise_a_hundredth_is_a_sixth_of_a_spread():
    """A loss that has come to rest has no spread, and every rounding was a spike: the limit is 7/600 above it."""
    for value, starts in ((3.03, []), (3.04, [100])):
        assert [spike.start for spike in spikes.find([3.0] * 100 + [value] + [3.0] * 50)] == starts
