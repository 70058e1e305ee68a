"""The window of versions: what is logged of one that is not in it."""

import logging

import pytest

from s3_megatron.engines.versions import Window, check
from s3_megatron.errors import S3Error

WINDOW = Window("a-host", ("1.2.3", "1.4.0"), {"1.3": "its step does not step"})


@pytest.mark.parametrize("version", ["1.2.3", "1.4.0", "1.4.0+5e28418"])
def test_a_version_that_was_run_is_no_matter(version: str, caplog: pytest.LogCaptureFixture) -> None:
    """megatron-core 0.18.2 adds to its version the commit of whatever repository it is started in, and was warned
    about there."""
    check(WINDOW, version)
    assert not caplog.records


def test_another_version_is_warned_about_once_and_by_rank_0(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    check(WINDOW, "1.5.0")
    assert not caplog.records
    monkeypatch.setenv("RANK", "0")
    for _ in range(2):
        check(WINDOW, "1.5.0")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "a-host 1.5.0 was never run with S3: it was run with a-host 1.2.3, 1.4.0" in record.getMessage()


@pytest.mark.parametrize("version", ["1.3", "1.3.9", "1.3.9+local"])
def test_a_version_known_not_to_work_is_an_error(version: str) -> None:
    with pytest.raises(S3Error, match=r"a-host 1\.3\S* does not work with S3: its step does not step; .*1\.2\.3, 1\.4"):
        check(WINDOW, version)


def test_a_version_that_only_starts_alike_is_not_taken_for_it(caplog: pytest.LogCaptureFixture) -> None:
    check(WINDOW, "1.30.0")
    assert len(caplog.records) == 1
