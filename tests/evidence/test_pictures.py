"""The report's pictures: what is drawn, and a report where they cannot be."""

import sys
from pathlib import Path

from s3_megatron import evidence
from s3_megatron.evidence import analysis, pictures, report
from s3_megatron.evidence.experiments import Setup
from tests.evidence import simulated


def test_a_folder_without_cells_and_pictures_is_reported(tmp_path, monkeypatch):
    """In a folder that is read-only the removal of pictures that were not there was refused, with a traceback."""

    def refused(self, missing_ok=False):
        raise PermissionError

    monkeypatch.setattr(Path, "unlink", refused)
    assert pictures.draw(analysis.Analysis(simulated.experiment(), []), tmp_path) == []


def test_a_machine_without_matplotlib_reports_without_pictures(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3_megatron.evidence.pictures", None)
    monkeypatch.delattr(evidence, "pictures", raising=False)
    asked = simulated.experiment()
    simulated.write(tmp_path / "cells.jsonl", asked, simulated.run(asked, simulated.losses(0.01), 6))
    assert "no pictures: import of s3_megatron.evidence.pictures halted" in report.write(asked, tmp_path).read_text()


def test_what_never_recovered_is_drawn_as_that():
    """The picture of `spike` had AdamW at (.9, .95) recover after 772 steps, the one of three seeds that did: the
    median of a list with NaN is any of its values."""
    assert pictures._median([772, None, None], 954.0) == 954.0
    assert pictures._median([772, 800, None], 954.0) == 800


def test_every_setup_is_drawn(tmp_path):
    """QK-norm off and on, clipping off and on: four rows, not the first one alone."""
    asked = simulated.experiment(
        tuning=None, setups={"a": Setup(steps=100), "b": Setup(steps=100, clip=0.0)}, seeds=[1]
    )
    found = analysis.Analysis(asked, simulated.run(asked, simulated.losses(0.01)))
    figure = pictures.Figure(figsize=(11, 4.6))
    assert pictures._rates(found, figure) and len(figure.axes) == 2
    assert all(axes.get_title(loc="left").endswith("seeds (1); no run had a spike") for axes in figure.axes)
    next(iter(found.results.values()))["spikes"] = [[50, 2, 0.3]]
    figure = pictures.Figure(figsize=(11, 4.6))
    assert pictures._rates(found, figure) and len(figure.axes) == 4, "an empty panel says nothing"
    assert [axes.get_title(loc="left")[:3] for axes in figure.axes] == ["a: ", "a: ", "b: ", "b: "]


def test_of_many_contenders_the_lowest_have_colours_and_names():
    """19 of table4-small's lay over each other in ten colours, without a legend."""
    many = ("s3", *(f"s3-{i}" for i in range(pictures.MOST_NAMES)))
    asked = simulated.experiment(many, tuning=None, seeds=[1, 2])
    found = analysis.Analysis(asked, simulated.run(asked, lambda cell: 2.0 - 0.01 * len(cell.contender)))
    figure = pictures.Figure(figsize=(11, 4.6))
    assert pictures._rates(found, figure)
    losses = figure.axes[0]
    named = [text.get_text() for text in losses.get_legend().get_texts()]
    assert named[:2] == ["s3", "range of s3's seeds"] and named[-1] == f"the other {len(many) - pictures.FOREMOST}"
    assert len(named) == pictures.FOREMOST + 2 and set(named) >= {f"s3-{i}" for i in range(10, 16)}
    assert len(losses.lines) == len(many) + 1 and len(losses.collections) == 1, "one band, the reference's"
