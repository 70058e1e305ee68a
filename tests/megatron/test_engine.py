"""S3 inside megatron-core's own optimizers, on 2 and 4 gloo ranks (the checks are in worker.py and passes.py)."""

import json
import re
from pathlib import Path

import pytest

from tests.checks import passed
from tests.launcher import torchrun

SOURCES = [Path(__file__).with_name(name) for name in ("worker.py", "passes.py")]
CHECKS = [check for file in SOURCES for check in re.findall(r"^def (check_\w+)", file.read_text(), flags=re.MULTILINE)]


@pytest.fixture(scope="module", params=[2, 4], ids=lambda n: f"{n}-ranks")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What every check said, from one launch a world size."""
    output = tmp_path_factory.mktemp("worker") / "results.json"
    run = torchrun(["-m", "tests.megatron.worker", str(output)], nproc=request.param, timeout=300)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS)
def test_on_ranks(results: dict[str, str], check: str) -> None:
    passed(results[check])
