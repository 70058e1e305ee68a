"""What a person sees of a run, on a terminal and in a log, and the time it is expected to take."""

import io

import pytest
from rich.console import Console

from s3_megatron.jobs import forecast, progress
from s3_megatron.jobs.forecast import Forecast, rounded
from s3_megatron.jobs.progress import is_live, run_line, share_line, stage_line
from s3_megatron.jobs.recipe import Schedule
from s3_megatron.watch.events import Train


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be moved on: minutes cannot be waited for."""
    now = [1000.0]
    for module in (progress, forecast):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def event(iteration: int, seconds: float = 0.2) -> Train:
    return Train(iteration, {"lm_loss": 8 - iteration / 100}, seconds=seconds)


class Screen(io.StringIO):
    """A terminal that keeps what is written to it."""

    def isatty(self) -> bool:
        return True


def test_a_log_has_a_line_now_and_then_and_no_control_characters(clock: list[float], monkeypatch: pytest.MonkeyPatch):
    """A line every 50 iterations meant five silent minutes on a slow machine; FORCE_COLOR, which CIs set, drew bars."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    with run_line(Console(file=file, width=40), "S3", 160) as line:
        line.status("starting ranks")
        for iteration in range(1, 161):
            clock[0] += 0.5
            line.event(event(iteration, 0.5))
    assert file.getvalue().splitlines() == [
        "S3: starting ranks",
        "S3: iteration 1 of 160, loss 7.990, 0.50 s/iteration",
        "S3: iteration 31 of 160, loss 7.690, 0.50 s/iteration, 1:04 left",
        "S3: iteration 61 of 160, loss 7.390, 0.50 s/iteration, 0:50 left",
        "S3: iteration 91 of 160, loss 7.090, 0.50 s/iteration, 0:34 left",
        "S3: iteration 121 of 160, loss 6.790, 0.50 s/iteration, 0:20 left",
        "S3: iteration 151 of 160, loss 6.490, 0.50 s/iteration, 0:04 left",
    ]


def test_the_log_of_a_night_can_be_read(clock: list[float]):
    """A line of `compare` was `table2-small: iteration 20585 of 216000, 10 cells, s3, 340:15 left`, each 15 seconds."""
    file = io.StringIO()
    with share_line(Console(file=file), "table2-small", 100_000) as line:
        for second in range(25_000):
            clock[0] += 1
            line.advance(2 * second, "10 of 108 runs, training s3")
    lines = file.getvalue().splitlines()
    assert lines[1] == "table2-small: 0%, 10 of 108 runs, training s3, 13 h 53 min left"
    assert lines[-1].startswith("table2-small: 50%, ") and 200 < len(lines) < 300


def test_a_stage_that_is_short_says_nothing_in_a_log(clock: list[float]):
    file = io.StringIO()
    with stage_line(Console(file=file), "corpus", None) as line:
        for done in range(4):
            line.advance(done, f"{done} documents")
            clock[0] += 10
    assert file.getvalue() == "corpus: 2 documents\n"


@pytest.mark.parametrize(("width", "seen"), [(80, ["loss 7.900", "0.20 s/iteration", "training"]), (40, ["6%"])])
def test_a_terminal_has_one_line_a_stage_however_narrow(width: int, seen: list[str]):
    screen = Screen()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    with run_line(console, "S3, one rank killed", 160) as line:
        for iteration in range(1, 11):
            line.event(event(iteration))
    last = screen.getvalue().split("\r")[-1].splitlines()[0]
    assert "S3, one rank killed" in last and all(part in last for part in seen)
    assert screen.getvalue().rstrip("\x1b[?25h\n").count("\n") <= 1, "wrapped lines would leave their halves behind"


def test_where_bars_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch):
    assert is_live(Console(file=Screen(), force_terminal=True, _environ={}))
    assert not is_live(Console(file=Screen(), _environ={"TERM": "dumb"}))
    assert not is_live(Console(file=io.StringIO(), _environ={"FORCE_COLOR": "1"}))


def report(clock: list[float], *rates: float) -> list[str]:
    """A start of 10 s and one iteration after the other, each of the given seconds; returns what is printed."""
    lines: list[str] = []
    watched = Forecast(lines.append, starts=4, work=500)
    watched.started()
    clock[0] += 10
    for iteration, rate in enumerate([0.0, *rates], 1):
        clock[0] += rate
        watched.event(event(iteration))
    return lines


def test_the_first_iterations_say_how_long_it_takes(clock: list[float]):
    """10 s of the first start, three more of them, and 500 iterations."""
    assert report(clock, *[0.5] * 5) == []
    assert report(clock, *[0.5] * 100) == ["about 5 minutes in all on this machine: 0.50 s an iteration"]
    assert report(clock, *[0.06] * 100) == ["about 70 seconds in all on this machine: 0.06 s an iteration"]


def test_a_misleading_start_is_corrected_once(clock: list[float]):
    first, second = report(clock, *[2.0] * 6, *[0.5] * 34, *[4.0] * 60)
    assert first == "about 17 minutes in all on this machine: 2.00 s an iteration"
    assert second == "corrected: about 7 minutes in all, 0.72 s an iteration"
    assert len(report(clock, *[0.55] * 6, *[0.5] * 94)) == 1


def test_validation_counts(clock: list[float]):
    schedule = Schedule(global_batch_size=1, train_iters=160, eval_interval=60, eval_iters=20)
    assert forecast.work(schedule) == pytest.approx(160 + 3 * 20 * forecast.VALIDATION)


@pytest.mark.parametrize(
    ("seconds", "text"), [(1, "10 seconds"), (88, "90 seconds"), (95, "2 minutes"), (390, "6 minutes")]
)
def test_rounded(seconds: float, text: str):
    assert rounded(seconds) == text
