"""S3 inside the real DeepSpeed on 2, 4 and 1 gloo ranks (what is checked is in the files below)."""

from pathlib import Path

import pytest

from tests import rank_checks
from tests.engines.deepspeed.window import OLD

pytestmark = pytest.mark.distributed

NAMES = (
    "worker.py",
    "features.py",
    "checkpoints.py",
    "toy.py",
    "softsignum.py",
    "softmuon.py",
    "experts.py",
    *(("limits.py",) if OLD else ()),
)
SOURCES = [Path(__file__).with_name(name) for name in NAMES]
CHECKS = rank_checks.in_files(SOURCES)
UNIVERSAL = [check for check in CHECKS if "universal" in check]
# They write the checkpoints that all others load.
WRITERS = [UNIVERSAL[0], *(f"check_universal_checkpoints_of_{name}" for name in ("softsignum", "softmuon"))]
Results = dict[str, str]


def launch(request: pytest.FixtureRequest, nproc: int, folder: Path) -> Results:
    """The outcome of every selected check, from one launch."""
    names = rank_checks.selected(request, nproc=nproc)
    if nproc == 2 and any("universal" in name for name in rank_checks.selected(request)):
        names += [name for name in WRITERS if name not in names]
    return rank_checks.launch("tests.engines.deepspeed.worker", sorted(names, key=CHECKS.index), nproc, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def on_two(request: pytest.FixtureRequest, folder: Path) -> Results:
    return launch(request, 2, folder)


@pytest.fixture(scope="module")
def on_four(request: pytest.FixtureRequest, folder: Path, on_two: Results) -> Results:
    return launch(request, 4, folder)


@pytest.fixture(scope="module")
def on_one(request: pytest.FixtureRequest, folder: Path, on_two: Results) -> Results:
    return launch(request, 1, folder)


@pytest.mark.parametrize("nproc", [2])
@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(on_two: Results, nproc: int, check: str) -> None:
    rank_checks.passed(on_two[check])


@pytest.mark.parametrize("nproc", [4])
@pytest.mark.parametrize("check", CHECKS)
def test_on_four_ranks(on_four: Results, nproc: int, check: str) -> None:
    rank_checks.passed(on_four[check])


@pytest.mark.parametrize("nproc", [1])
@pytest.mark.parametrize("check", UNIVERSAL)
def test_on_one_rank(on_one: Results, nproc: int, check: str) -> None:
    rank_checks.passed(on_one[check])
