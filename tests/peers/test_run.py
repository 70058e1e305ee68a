"""What `make test-peers` says of a checkout, and how it compares outcomes; torch's tests themselves take minutes."""

from pathlib import Path

import pytest

from tests.peers import expected, run
from tests.peers.expected import Outcome
from tests.peers.suites import SUITES, copy_tests

KNOWN = expected.versions()[-1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A source tree with every file that is asked for, each with a test of one line."""
    (tmp_path / "version.txt").write_text(f"{KNOWN}a0\n")
    for suite in SUITES:
        file = tmp_path / "test" / suite.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('@skip_if_lt_x_gpu(2)\ndef test_it(): x.cuda().to(\'cpu\'), "cuda", "nccl"\n')
    return tmp_path


def test_a_checkout_of_a_known_version_is_taken(checkout: Path) -> None:
    assert run.version_of(str(checkout)) == KNOWN


@pytest.mark.parametrize("spoil", ["unset", "no folder", "no version", "no file", "other version", "no torch"])
def test_what_cannot_be_used_is_one_line_and_exit_code_2(spoil, checkout: Path, tmp_path, capsys) -> None:
    path, message = str(checkout), ""
    if spoil == "unset":
        path, message = "", "TORCH is not set"
    if spoil == "no folder":
        path, message = str(tmp_path / "none"), "no such folder"
    if spoil == "no version":
        (checkout / "version.txt").unlink()
        message = "version.txt not there"
    if spoil == "no file":
        (checkout / "test" / SUITES[0].file).unlink()
        (checkout / "test" / SUITES[-1].file).unlink()
        message = f"test/{SUITES[0].file} and 1 more not there"
    if spoil == "other version":
        (checkout / "version.txt").write_text("1.0.0a0\n")
        message = f"version.txt has 1.0.0; outcomes are written down for {KNOWN}"
    if spoil == "no torch":
        (checkout / "version.txt").write_bytes(b"\xff\xfe")
        message = "version.txt has no version"
    assert run.main([path]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and message in err


def test_the_copy_runs_on_a_cpu_and_the_checkout_stays_as_it_was(checkout: Path, tmp_path_factory) -> None:
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    folder = tmp_path_factory.mktemp("copy")
    copy_tests(checkout, folder)
    for suite in SUITES:
        text = (folder / suite.file).read_text()
        if suite.file.startswith("distributed/"):
            assert text == 'def test_it(): x.to(\'cpu\'), "cpu", "gloo"\n'
        else:
            assert text == (checkout / "test" / suite.file).read_text()
    assert {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("version", expected.versions())
def test_every_line_of_a_list_is_read(version: str) -> None:
    files = {suite.file for suite in SUITES}
    tests = expected.read(version)
    assert tests and all(test.partition("::")[0] in files for test in tests)


@pytest.mark.parametrize(
    "text",
    ["failed passed a::b", "# why\n\nfailed passed a::b", "# why\npassed passed a::b", "# why\nred passed a::b"],
    ids=["no reason", "the block's reason has ended", "nothing to write down", "unknown word"],
)
def test_a_line_that_says_nothing_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expected, "HERE", tmp_path)
    (tmp_path / "2.txt").write_text(text)
    with pytest.raises(ValueError, match="comes twice, has no reason, or is nothing"):
        expected.read("2")


def test_whatever_is_not_as_written_down_is_a_line() -> None:
    """A test that passes now, one that vanished and one that S3 alone fails are all lines; what both pass is none."""
    both = Outcome("passed", "passed")
    red, grey = Outcome("failed", "passed"), Outcome("skipped", "skipped")
    found = {"a": both, "b": red, "c": both, "d": grey}
    assert expected.differences(found, {"d": grey}) == [
        "b: S3 failed, AdamW passed; written down: S3 passed, AdamW passed"
    ]
    lines = expected.differences(found, {"b": red, "c": red, "d": grey, "e": grey})
    assert [line[:1] for line in lines] == ["c", "e"] and "S3 absent" in lines[1]


def test_rows_of_one_test_are_put_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_table = {"T::test_x_S3_cpu": "failed", "T::test_x_AdamW_cpu": "passed", "T::test_y_AdamW_cpu": "skipped"}
    monkeypatch.setattr(run, "run", lambda suite, tests, options: in_the_table)
    assert run.both(SUITES[0], tmp_path) == {
        f"{SUITES[0].file}::T::test_x_ROW_cpu": Outcome("failed", "passed"),
        f"{SUITES[0].file}::T::test_y_ROW_cpu": Outcome("absent", "skipped"),
    }
