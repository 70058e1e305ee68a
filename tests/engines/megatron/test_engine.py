"""S3 inside megatron-core's own optimizers, on 2 and 4 gloo ranks (the checks are in SOURCES)."""

from pathlib import Path

import pytest

from tests import rank_checks

NAMES = (
    "worker.py",
    "passes.py",
    "resumes.py",
    "watching.py",
    "toy.py",
    "softsignum.py",
    "soft_passes.py",
    "softmuon.py",
    "experts.py",
    "softmuon_experts.py",
)
SOURCES = [Path(__file__).with_name(name) for name in NAMES]
CHECKS = rank_checks.in_files(SOURCES)


@pytest.fixture(scope="module", params=[2, 4], ids=lambda n: f"{n}-ranks")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The outcome of every selected check, from one launch for each world size."""
    names = sorted(rank_checks.selected(request, results=request.param))
    return rank_checks.launch("tests.engines.megatron.worker", names, request.param, tmp_path_factory.mktemp("worker"))


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS)
def test_on_ranks(results: dict[str, str], check: str) -> None:
    rank_checks.passed(results[check])
