"""The report, from small metrics files written by the same writer that training uses."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from rich.console import Console

from s3_megatron.demo import figure, report
from s3_megatron.demo.runs import load, rival
from s3_megatron.errors import S3Error
from s3_megatron.jobs.trial import Interruption
from s3_megatron.watch.events import Evaluation, Event, Optimizer, Train, Updates
from s3_megatron.watch.file import Writer

INTERRUPTION = Interruption(killed_at=7, resumed_from=4)
CORPUS = {"python": "3.12.1", "bytes": 8_000_000}
OPTIMIZER = Optimizer("s3", "DistributedOptimizer", 2, 1001, [501, 500], 4.0, 2.0)


def step(iteration: int, *, shift: float = 0.0, update: float = 0.5) -> Train:
    loss = {"lm_loss": 8 - 0.1 * iteration + shift}
    return Train(iteration, loss, lr=1e-3, grad_norm=1.0, updates=Updates(update / 5, update), seconds=0.2)


def validation(loss: float) -> Evaluation:
    return Evaluation("validation", 10, {"lm_loss": loss})


def write(folder: Path, *events: Event) -> None:
    writer = Writer(folder / "watch")
    for event in events:
        writer.write(event)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three runs of 10 iterations; the killed one did 5 to 7 twice, first with other losses."""
    write(tmp_path / "s3", OPTIMIZER, *map(step, range(1, 11)), validation(6.5))
    write(tmp_path / "s3-killed", OPTIMIZER, *map(step, range(1, 5)), *(step(i, shift=1) for i in range(5, 8)))
    write(tmp_path / "s3-killed", OPTIMIZER, *map(step, range(5, 11)), validation(6.5))
    adam = replace(OPTIMIZER, name="adam")
    write(tmp_path / "adamw", adam, *(step(i, shift=0.2, update=3.0) for i in range(1, 11)), validation(6.7))
    return tmp_path


def summary(folder: Path, engine: str = "megatron", optimizer: str = "s3") -> tuple[report.Outcome, dict[str, Any]]:
    names = optimizer, rival(optimizer)
    outcome = report.Outcome.read(folder, names, INTERRUPTION)
    ours, theirs = (load(name, engine).recipe for name in names)
    return outcome, report.summarize(outcome, ours, theirs, gpus=0, corpus=CORPUS)


def test_what_report_json_holds(folder: Path):
    report.write_json(folder / "report.json", summary(folder)[1])
    found = json.loads((folder / "report.json").read_text())
    assert (found["s3"]["val_loss"], found["adamw"]["val_loss"]) == (6.5, 6.7)
    assert found["s3"]["state_bytes_per_param_rank"] == found["adamw"]["state_bytes_per_param_rank"] == 4.0
    assert found["s3"]["shard_elements"] == [501, 500]
    assert (found["s3"]["largest_update"], found["adamw"]["largest_update"]) == (0.5, 3.0)
    assert (found["s3"]["lr"], found["s3"]["weight_decay"]) == pytest.approx((3e-3, 0.01))
    assert found["resume"] == {
        "killed_at": 7, "resumed_from": 4, "iterations_lost": 3, "loss_gap": 0.0, "val_loss": 6.5,
    }  # fmt: skip
    assert (found["seed"], found["schedule"]["train_iters"], found["model"]["num_layers"]) == (1234, 128, 4)
    assert (found["adamw"]["betas"], found["s3"]["beta"], found["s3"]["p"]) == ([0.9, 0.999], 0.95, 3)
    assert set(found["versions"]) == {"s3-megatron", "python", "torch", "megatron-core"}
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize(
    ("engine", "title", "packages"),
    [
        ("megatron", "in Megatron's distributed optimizer, 2 ranks", set()),
        ("deepspeed", "in DeepSpeed's ZeRO 1, 2 ranks", {"deepspeed"}),
    ],
)
def test_report_and_picture_name_the_engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, engine: str, title: str, packages: set[str]
):
    titles = []
    monkeypatch.setattr(figure.Figure, "suptitle", lambda self, text, **_: titles.append(text))
    outcome, found = summary(folder, engine)
    figure.draw(folder / "report.png", outcome, found)
    assert titles[0].startswith("GPT-2 with 0.0M weights ") and title in titles[0]
    assert found["engine"] == engine
    assert set(found["versions"]) == {"s3-megatron", "python", "torch", "megatron-core"} | packages


def test_the_gap_is_the_largest_difference_after_the_resume(folder: Path):
    """The shifts are exact in float64 up to the rounding of the losses, 8 * 2^-53."""
    write(folder / "s3-killed", step(8, shift=-0.25), step(9, shift=0.125))
    assert summary(folder)[1]["resume"]["loss_gap"] == pytest.approx(0.25, abs=1e-14)


def test_a_loss_that_is_no_number_is_a_gap(folder: Path):
    """A resume after which losses were NaN had a gap of 0, and a rehearsal called it the undisturbed run."""
    write(folder / "s3-killed", replace(step(8), losses={"lm_loss": float("nan")}))
    write(folder / "adamw", step(8, update=float("nan")))
    found = summary(folder)[1]
    assert math.isnan(found["resume"]["loss_gap"]) and math.isnan(found["adamw"]["largest_update"])


def test_iterations_before_the_resume_do_not_count(folder: Path):
    write(folder / "s3-killed", step(3, shift=1))
    assert summary(folder)[1]["resume"]["loss_gap"] == 0


def test_a_resumed_run_that_stopped_early_has_no_gap(folder: Path):
    (folder / "s3-killed/watch/metrics.jsonl").unlink()
    write(folder / "s3-killed", OPTIMIZER, *map(step, range(1, 9)), validation(6.5))
    with pytest.raises(S3Error, match="no loss of iteration 9"):
        summary(folder)


@pytest.mark.parametrize(
    ("events", "part"),
    [
        ([], "optimizer"),
        ([step(1), validation(6.0)], "optimizer"),
        ([OPTIMIZER, validation(6.0)], "train"),
        ([OPTIMIZER, step(1)], "validation"),
    ],
)
def test_a_run_that_did_not_end_is_named(folder: Path, events: list[Event], part: str):
    (folder / "adamw/watch/metrics.jsonl").unlink()
    write(folder / "adamw", *events)
    with pytest.raises(S3Error, match=f"adamw has no {part} event"):
        summary(folder)


def test_a_run_without_update_sizes_is_reported(folder: Path):
    """Megatron's fp16 skips steps; a skipped one moved nothing and has no update."""
    (folder / "adamw/watch/metrics.jsonl").unlink()
    skipped = [replace(step(i), updates=Updates()) for i in range(1, 11)]
    write(folder / "adamw", OPTIMIZER, *skipped, validation(6.7))
    outcome, found = summary(folder)
    assert found["adamw"]["largest_update"] is None
    figure.draw(folder / "report.png", outcome, found)
    assert "-" in shown(found)


def shown(found: dict[str, Any]) -> str:
    console = Console(width=90, record=True, quiet=False, file=open("/dev/null", "w"))
    console.print(report.table(found))
    return console.export_text()


def test_softsignum_is_shown_beside_s3(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """In its own run, in the killed one and its resume; S3's numbers are in AdamW's place."""
    for ours, name in (("s3-killed", "softsignum-killed"), ("s3", "softsignum"), ("adamw", "s3")):
        (folder / ours).rename(folder / name)
    drawn: list[str] = []
    monkeypatch.setattr(figure.Figure, "suptitle", lambda self, text, **_: drawn.append(text))
    monkeypatch.setattr(figure.Axes, "legend", lambda self, **_: drawn.extend(self.get_legend_handles_labels()[1]))
    outcome, found = summary(folder, optimizer="softsignum")
    figure.draw(folder / "report.png", outcome, found)
    assert found["optimizers"] == ["softsignum", "s3"] and "adamw" not in found
    assert (found["softsignum"]["soft_start"], found["softsignum"]["lr"]) == (0.5, 1e-4)
    assert (found["s3"]["p"], found["s3"]["largest_update"]) == (3, 3.0)
    assert re.search("SoftSignum .+ S3 ", shown(found).splitlines()[2])
    for part in ("SoftSignum and S3", "S3, validation 6.700", "SoftSignum after kill", "SoftSignum, largest"):
        assert sum(part in text for text in drawn) == 1, (part, drawn)


def test_the_table_and_the_picture(folder: Path):
    outcome, found = summary(folder)
    text = shown(found)
    for part in ("6.5000", "6.7000", "0.003", "0.0003", "4.00", "501", "4 (3)", "not evidence"):
        assert part in text
    figure.draw(folder / "report.png", outcome, found)
    height, width, _ = imread(folder / "report.png").shape
    assert width >= 1200 and height >= 500
    assert not list(folder.glob("*.tmp"))
