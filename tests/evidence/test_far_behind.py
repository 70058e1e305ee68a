"""A contender that is implausibly far behind."""

import re

import pytest

from s3_megatron.evidence import analysis, report
from s3_megatron.evidence.experiments import Setup
from tests.evidence import simulated


class TestFarBehind:
    """A contender implausibly far behind is a fault to look for: AdamW once was, by 1.5 nats, for its gradients."""

    @pytest.mark.parametrize("shift, is_flagged", [(0.25, False), (0.4, True), (1.5, True)])
    @pytest.mark.parametrize("cells", [20, 64])
    def test_it_is_flagged_from_the_tuning_on(self, shift, is_flagged, cells):
        asked = simulated.experiment()
        found = analysis.Analysis(asked, simulated.run(asked, simulated.losses(0.001, {"adamw": shift}), cells))
        (setup,) = asked.setups
        assert list(found.far_behind(setup)) == (["adamw"] if is_flagged else [])
        text = report.render({}, found)
        assert text.count("Look for a fault first: ") == is_flagged
        if is_flagged:
            assert re.search(rf"first: adamw is {shift - 0.05:.1f}\d nats|first: adamw is {shift:.1f}\d? nats", text)

    def test_final_runs_count_where_a_tuning_run_was_lucky(self):
        """Lion in table2-tiny: 1.55 with the tuning seed, 2.00 in the mean of eight others; the report was silent."""
        asked, draw = simulated.experiment(), simulated.losses(0.001)
        assert asked.tuning is not None

        def losses(cell):
            return draw(cell) + 0.5 * (cell.contender == "lion" and cell.seed != asked.tuning.seed)

        assert list(analysis.Analysis(asked, simulated.run(asked, losses)).far_behind("base")) == ["lion"]

    @pytest.mark.parametrize("kick, is_flagged", [(1.0, True), (1e3, False)])
    def test_one_that_a_kick_threw_far_is_none(self, kick, is_flagged):
        """AdamW at (.9, .999) after one gradient times 1,000: to remember it is what the experiment measures."""
        kicked = Setup(steps=100, kick=kick, kick_step=50, watch_every=1)
        asked = simulated.experiment(tuning=None, setups={"base": kicked})
        found = analysis.Analysis(asked, simulated.run(asked, simulated.losses(0.001, {"adamw": 0.4})))
        assert bool(found.far_behind("base")) == is_flagged

    def test_a_winner_far_ahead_flags_none_of_many(self):
        """The median of the others is a rival's."""
        asked = simulated.experiment()
        found = analysis.Analysis(asked, simulated.run(asked, simulated.losses(0.001, {"s3": -1.0})))
        assert found.far_behind("base") == {}

    def test_one_contender_is_behind_none(self):
        asked = simulated.experiment(names=("s3",))
        assert analysis.Analysis(asked, simulated.run(asked, simulated.losses(0.001))).far_behind("base") == {}
