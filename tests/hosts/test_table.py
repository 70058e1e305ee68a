"""The window of versions, the pairs, the patches and docs/versions.md name the same versions."""

import re
from pathlib import Path

import pytest

from s3_megatron.engines.versions import DEEPSPEED, MEGATRON, Window
from tests.hosts import run, table

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def table_of_versions() -> list[list[str]]:
    """The cells of the table in docs/versions.md, line by line, without the one of dashes."""
    text = (ROOT / "docs/versions.md").read_text()
    lines = text.partition("<!-- make test-hosts -->\n")[2].partition("<!-- end -->")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [line for line in cells if set(line[0]) != {"-"}]


@pytest.mark.parametrize(("window", "position"), [(MEGATRON, 0), (DEEPSPEED, 1)], ids=["megatron", "deepspeed"])
def test_every_version_of_the_window_is_run_patched_and_in_the_table(window: Window, position: int) -> None:
    pairs = {path.stem.split("-")[position] for path in HERE.glob("*.txt")}
    folder = {"megatron-core": "megatron-lm"}.get(window.host, window.host)
    patches = {path.stem for path in (ROOT / "patches" / folder).glob("*.patch")}
    (_, *columns), *_ = table_of_versions()
    assert pairs == patches == {column.split(", ")[position] for column in columns} == set(window.tested)


def test_what_is_installed_for_older_hosts_is_what_make_installs() -> None:
    """SoftMuon's library came into the Makefile's list alone, and every test of it failed on the older hosts. Of the
    experiments' libraries no test that runs there has need."""
    (made,) = re.findall(r"--editable '\.\[(.*megatron.*)\]'", (ROOT / "Makefile").read_text())
    (installed,) = re.findall(r"^\.\[(.*)\]$", run.EXTRAS)
    assert {*installed.split(",")} == {*made.split(",")} - {"evidence"}


def test_what_deepspeed_has_compiled_is_found_by_the_same_torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder was a pair's: after another torch in constraints.txt it held libraries linked with the one before."""
    pair = "0.18.2-0.19.8"
    before = run.extensions(pair)
    monkeypatch.setattr(run, "NEWEST", {**run.NEWEST, "torch": "2.99.0"})
    after = run.extensions(pair)
    assert before != after and before.parent == after.parent == ROOT / f".hosts/{pair}.extensions"
    monkeypatch.setattr(run.sys.implementation, "cache_tag", "cpython-399")
    assert run.extensions(pair) != after


@pytest.mark.parametrize("pair", [path.stem for path in HERE.glob("*.txt")])
def test_every_pair_has_the_torch_of_make_test(pair: str) -> None:
    """Tests of the optimizers alone do not run here: with another torch they belong into ``run.SUITES``."""
    assert run.constraints(pair)["torch"] == run.NEWEST["torch"]


def test_the_table_is_of_these_features_and_nothing_failed() -> None:
    """What a host lacks, as SoftMuon before megatron-core 0.19, is skipped whole."""
    _, *rows = table_of_versions()
    assert [row[0] for row in rows] == [row[0] for row in table.rows({})]
    cells = [cell for row in rows for cell in row[1:]]
    assert cells and all(re.fullmatch(r"\d+ passed(, \d+ skipped)?|\d+ skipped", cell) for cell in cells), cells


def test_a_failure_and_a_missing_test_are_seen() -> None:
    outcomes = {
        "tests/engines/megatron/test_engine::test_on_ranks[check_single_pass_is_taken-2-ranks]": "failed",
        "tests/engines/megatron/test_engine::test_on_ranks[check_single_pass_is_taken-4-ranks]": "passed",
        "tests/engines/megatron/test_engine::test_on_ranks[check_single_pass_apart-4-ranks]": "skipped",
    }
    rows = {row[0]: row[1] for row in table.rows({"a pair": outcomes})}
    assert rows.pop("Megatron: one pass over memory") == "1 passed, 1 failed, 1 skipped"
    assert set(rows.values()) == {"not run"}
