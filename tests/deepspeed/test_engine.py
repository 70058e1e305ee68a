"""S3 inside the real DeepSpeed on 2, 4 and 1 gloo ranks (what is checked is in the files below)."""

import json
import re
from pathlib import Path

import pytest

from tests.checks import passed
from tests.deepspeed.window import OLD
from tests.launcher import torchrun

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

NAMES = ("worker.py", "features.py", "checkpoints.py", *(("limits.py",) if OLD else ()))
SOURCES = [Path(__file__).with_name(name) for name in NAMES]
CHECKS = [check for file in SOURCES for check in re.findall(r"^def (check_\w+)", file.read_text(), flags=re.MULTILINE)]
UNIVERSAL = [check for check in CHECKS if "universal" in check]


def launch(nproc: int, folder: Path) -> dict[str, str]:
    """What every check said, from one launch."""
    output = folder / f"results-{nproc}.json"
    run = torchrun(["-m", "tests.deepspeed.worker", str(output), str(folder)], nproc=nproc, timeout=400)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def on_two(folder: Path) -> dict[str, str]:
    """Comes first: it leaves the universal checkpoints that the others load."""
    return launch(2, folder)


@pytest.fixture(scope="module")
def on_four(folder: Path, on_two: dict[str, str]) -> dict[str, str]:
    return launch(4, folder)


@pytest.fixture(scope="module")
def on_one(folder: Path, on_two: dict[str, str]) -> dict[str, str]:
    return launch(1, folder)


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(on_two: dict[str, str], check: str) -> None:
    passed(on_two[check])


@pytest.mark.parametrize("check", CHECKS)
def test_on_four_ranks(on_four: dict[str, str], check: str) -> None:
    passed(on_four[check])


@pytest.mark.parametrize("check", UNIVERSAL)
def test_on_one_rank(on_one: dict[str, str], check: str) -> None:
    passed(on_one[check])
