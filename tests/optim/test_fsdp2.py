"""S3 in PyTorch's FSDP2 on 2 gloo ranks, and on 4 and 1 with what those have saved (the checks are in fsdp2.py)."""

import json
import re
from pathlib import Path

import pytest

from tests.checks import passed
from tests.launcher import torchrun

pytestmark = pytest.mark.distributed

CHECKS = re.findall(r"^def (check_\w+)", Path(__file__).with_name("fsdp2.py").read_text(), flags=re.MULTILINE)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """What every check said, by number of ranks; the first two leave the checkpoint that the others load."""
    folder = tmp_path_factory.mktemp("fsdp2")
    found = {}
    for nproc in (2, 4, 1):
        output = folder / f"{nproc}.json"
        run = torchrun(["-m", "tests.optim.fsdp2", str(output), str(folder / "saved")], nproc=nproc, timeout=100)
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
        found[nproc] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize("nproc", [2, 4, 1])
@pytest.mark.parametrize("check", CHECKS)
def test_on_ranks(found: dict[int, dict[str, str]], check: str, nproc: int) -> None:
    passed(found[nproc][check])
