"""What is ranked, and what is not: against scipy, planted winners, and contenders that are equal."""

import itertools
import math
import random

import numpy as np
import pytest
from scipy import stats

from s3_megatron.evidence import statistics
from s3_megatron.evidence.analysis import Analysis
from s3_megatron.evidence.experiments import Tuning
from tests.evidence import simulated

NAN = math.nan


def test_a_pair_is_compared_as_scipy_does():
    """scipy's own paired tests of two samples; ours takes the differences. Alike to rounding."""
    draw = np.random.default_rng(0)
    for count in (2, 5, 8, 30):
        ours, theirs = draw.normal(1.5, 0.1, count), draw.normal(1.52, 0.1, count)
        found = statistics.paired(theirs, ours)
        test = stats.ttest_rel(theirs, ours)
        assert found.p == pytest.approx(test.pvalue, rel=1e-9)
        low, high = test.confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
        assert found.wilcoxon == pytest.approx(stats.wilcoxon(theirs, ours).pvalue, rel=1e-9)
        # A difference of more than .01 either way: scipy's one-sided tests of samples that are so much closer.
        sides = (
            stats.ttest_rel(theirs - 0.01, ours, alternative="greater"),
            stats.ttest_rel(theirs + 0.01, ours, alternative="less"),
        )
        assert found.beyond == pytest.approx(min(1, 2 * min(side.pvalue for side in sides)), rel=1e-9)
        assert found.mean == pytest.approx(np.mean(theirs) - np.mean(ours), rel=1e-9)


def test_a_pair_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t = 3.4641 with 2 degrees of freedom: p = .0742."""
    found = statistics.paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.mean == 2 and found.p == pytest.approx(0.07418, abs=1e-5)
    # The interval is 2 +- 4.30265 / sqrt(3), of the tables of Student's t.
    assert (found.low, found.high) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-5)
    assert found.wilcoxon == 0.25  # of 8 choices of signs, the 2 extreme ones


@pytest.mark.parametrize("count", [0, 1])
def test_one_seed_ranks_nothing(count):
    found = statistics.paired([2.0] * count, [1.0] * count)
    assert math.isnan(found.p) and math.isnan(found.low)
    assert statistics.verdict(found.mean, statistics.holm([found.p])[0]) == "no difference shown"


def test_equal_runs_are_not_ranked_and_warn_of_nothing():
    same = statistics.paired([1.5, 1.6], [1.5, 1.6])
    assert (same.p, same.wilcoxon, same.mean) == (1.0, 1.0, 0.0)
    shifted = statistics.paired([2.0, 3.0], [1.0, 2.0])  # no spread: no test can say how certain it is
    assert shifted.mean == 1 and math.isnan(shifted.p)


def test_holm_by_hand():
    """Sorted .001, .01, .03, .04 times 4, 3, 2, 1, never less than the one before."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.001]) == pytest.approx([0.03, 0.06, 0.06, 0.004])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    missing = statistics.holm([0.01, NAN])
    assert missing[0] == pytest.approx(0.02) and math.isnan(missing[1])


def test_a_verdict_is_never_taken_back_by_a_test_that_comes_later():
    """With any of the p-values missing, no adjusted one is lower than with all of them."""
    draw = random.Random(0)
    for _ in range(200):
        values = [draw.choice([1e-4, 1e-3, 0.1, 1.0]) * draw.random() for _ in range(5)]
        whole = statistics.holm(values)
        for kept in itertools.product([True, False], repeat=5):
            part = statistics.holm([p if k else NAN for p, k in zip(values, kept, strict=True)])
            assert all(math.isnan(early) or early >= late - 1e-15 for early, late in zip(part, whole, strict=True))


def test_a_planted_winner_is_ranked_first():
    """.05 nats under the others at its best, where a run has noise of .01."""
    asked = simulated.experiment()
    found = Analysis(asked, simulated.run(asked, simulated.losses(0.01, {"s3": -0.05})))
    assert [r.verdict for r in found.ranking("base")] == ["better"] * 3
    planted = Analysis(asked, simulated.run(asked, simulated.losses(0.01, {"lion": -0.05})))
    assert [r.verdict for r in planted.ranking("base")] == ["no difference shown", "no difference shown", "worse"]


@pytest.mark.parametrize("tuning", [{"seed": 0}, {"seed": 0, "wide": True}, {"seeds": [0, 9]}], ids=str)
def test_equal_optimizers_are_not_ranked(tuning):
    """200 grids, tuned by the plan, all contenders equal, noise of .01: at most alpha of the experiments rank anything.

    By p alone, as the rule first was, 16 of 200 did: one of two equal optimizers is tuned to a rate beside the
    best one, since tuning runs have noise, and eight seeds see it. So the rule asks for more than MARGIN.
    """
    false, by_p_alone = 0, 0
    for grid in range(200):
        asked = simulated.experiment(tuning=Tuning(runs=8, **tuning))
        ranked = Analysis(asked, simulated.run(asked, simulated.losses(0.01, grid=grid))).ranking("base")
        false += any(r.verdict != "no difference shown" for r in ranked)
        by_p_alone += min(statistics.holm([r.paired.p for r in ranked])) < statistics.ALPHA
    assert false <= statistics.ALPHA * 200
    assert tuning != {"seed": 0} or by_p_alone > 5 * statistics.ALPHA * 200


def test_the_width_of_a_range_of_rates():
    """Rates next to the best and within .05 of it; one beyond a worse rate does not count."""
    losses = {1e-3: 1.52, 2e-3: 1.60, 4e-3: 1.53, 8e-3: 1.50, 1.6e-2: 1.5499, 3.2e-2: 1.5501}
    assert statistics.width(losses) == statistics.Width(4e-3, 1.6e-2, False, False)
    assert statistics.width({1e-3: 1.5}) == statistics.Width(1e-3, 1e-3, True, True)
    assert statistics.width({1e-3: 1.5, 2e-3: 1.54, 4e-3: 9.0}) == statistics.Width(1e-3, 2e-3, True, False)
