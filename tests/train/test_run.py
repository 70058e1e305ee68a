"""Any Megatron script, unmodified, with S3."""

from pathlib import Path

import pytest

from tests.launcher import losses, torchrun
from tests.train.tiny import FLAGS

SCRIPT = Path(__file__).parent / "stock_script.py"


@pytest.mark.distributed
def test_an_unmodified_script_trains_with_s3() -> None:
    """The script imports from its own folder and reads its own flags; S3_REHEARSAL=1 asks for the rehearsal."""
    assert "s3_megatron" not in SCRIPT.read_text()
    command = ["-m", "s3_megatron.train.run", str(SCRIPT), *FLAGS, "--mock-data", "--vocab-size", "255"]
    run = torchrun(
        [*command, "--train-iters", "6", "--optimizer", "s3"], nproc=2, timeout=140, env={"S3_REHEARSAL": "1"}
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "stock script: found its own folder" in run.stdout
    assert "S3 active in DistributedOptimizer" in run.stdout + run.stderr
    seen = losses(run.stdout)
    assert list(seen) == list(range(1, 7))
    assert seen[6] < seen[1] - 0.1
