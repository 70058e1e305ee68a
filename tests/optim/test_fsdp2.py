"""S3, SoftSignum and SoftMuon in PyTorch's FSDP2 on 2 gloo ranks, and on 4 and 1 with what those have saved.

The checks are in fsdp2.py, softsignum_ranks.py and softmuon_ranks.py.
"""

from pathlib import Path

import pytest

from tests import rank_checks

pytestmark = pytest.mark.distributed

WORKERS = [Path(__file__).with_name(name) for name in ("fsdp2.py", "softsignum_ranks.py", "softmuon_ranks.py")]
CHECKS = rank_checks.in_files(WORKERS)


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """Every selected check's outcome by number of ranks; the first two leave the checkpoint that the others load."""
    folder = tmp_path_factory.mktemp("fsdp2")
    names = {2: rank_checks.selected(request)} | {nproc: rank_checks.selected(request, nproc=nproc) for nproc in (4, 1)}
    return {nproc: rank_checks.launch("tests.optim.fsdp2", some, nproc, folder) for nproc, some in names.items()}


@pytest.mark.parametrize("nproc", [2, 4, 1])
@pytest.mark.parametrize("check", CHECKS)
def test_on_ranks(found: dict[int, dict[str, str]], check: str, nproc: int) -> None:
    rank_checks.passed(found[nproc][check])
