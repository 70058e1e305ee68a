"""One line of a report, and the table that doctor, check and patch share."""

import pytest
from rich.console import Console

from s3_megatron.cli import output
from s3_megatron.finding import ERROR, NOT_CHECKED, OK, WARNING, Finding, or_ok, table

ROWS = [
    Finding(OK, "one", "it is [bold]so[/bold]"),
    Finding(WARNING, "two", "maybe", "look at [/]"),
    Finding(NOT_CHECKED, "[three]", "unknown"),
    Finding(ERROR, "four", "wrong", "mend it"),
]


def test_what_looks_like_markup_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """A path, a reason or a host's symbol may hold brackets, which rich takes for colours, or for an error."""
    Console(width=200).print(table(ROWS))
    shown = capsys.readouterr().out
    assert all(text in shown for row in ROWS for text in (row.name, row.found, row.fix))
    assert shown.splitlines()[0].split() == ["found", "what", "to", "do"]


def test_each_state_has_its_colour() -> None:
    console = Console(width=200, force_terminal=True, color_system="standard", legacy_windows=False)
    with console.capture() as capture:
        console.print(table(ROWS))
    codes = [line.split("\x1b[")[1].split("m")[0] for line in capture.get().splitlines() if "\x1b[3" in line]
    assert [code for code in codes if code.startswith("3")] == ["32", "33", "33", "31"]


def test_a_log_says_what_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Without colours a row to mend looked like one to consider: "mend the red rows above"."""
    Console(width=200, no_color=True).print(table(ROWS))
    shown = capsys.readouterr().out.splitlines()[1:]
    for row, line in zip(ROWS, shown, strict=True):
        assert line.removeprefix(row.name).strip().startswith(f"{row.state} "), line


def test_a_log_has_a_finding_a_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns, which a pipe gets, broke a host's symbol in two, and grep did not find it."""
    symbol = ".".join(["megatron.core.optimizer.distrib_optimizer"] * 4)
    monkeypatch.setattr(output, "console", Console(width=80, force_terminal=False))
    output.report([Finding(WARNING, symbol, "signature changed")])
    line = next(line for line in capsys.readouterr().out.splitlines() if "megatron" in line)
    assert line.split() == [symbol, "warning", "signature", "changed"]


def test_where_nothing_is_wrong_something_is_right() -> None:
    assert list(or_ok("name", "fine", [])) == [Finding(OK, "name", "fine")]
    assert list(or_ok("name", "fine", ROWS[1:])) == ROWS[1:]
