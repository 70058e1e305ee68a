"""Any script for Megatron or DeepSpeed, unmodified, with S3."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from s3_megatron.train.entry import RegisterWithDeepSpeed
from tests.launcher import losses, torchrun
from tests.train.tiny import FLAGS

SCRIPT = Path(__file__).parent / "stock_script.py"


@pytest.mark.distributed
def test_an_unmodified_script_trains_with_s3() -> None:
    """The script imports from its own folder and reads its own flags; S3_REHEARSAL=1 asks for the rehearsal."""
    assert "s3_megatron" not in SCRIPT.read_text()
    command = ["-m", "s3_megatron.train.run", str(SCRIPT), *FLAGS, "--mock-data", "--vocab-size", "255"]
    run = torchrun(
        [*command, "--train-iters", "6", "--optimizer", "s3"], nproc=2, timeout=280, env={"S3_REHEARSAL": "1"}
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "stock script: found its own folder" in run.stdout
    assert "S3 active in DistributedOptimizer" in run.stdout + run.stderr
    seen = losses(run.stdout)
    assert list(seen) == list(range(1, 7))
    assert seen[6] < seen[1] - 0.1


@pytest.mark.distributed
def test_an_unmodified_deepspeed_script_trains_with_s3() -> None:
    """register() is not called: it happens when the script imports DeepSpeed."""
    script = SCRIPT.with_name("stock_deepspeed_script.py")
    assert "s3_megatron" not in script.read_text()
    run = torchrun(["-m", "s3_megatron.train.run", str(script), "4", "5"], nproc=1, timeout=280)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "S3 active in DeepSpeedZeroOptimizer (ZeRO 1)" in run.stdout + run.stderr
    seen = [float(loss) for loss in re.findall(r"^loss \[(.*)\]$", run.stdout, flags=re.MULTILINE)]
    assert len(seen) == 5 and seen == sorted(seen, reverse=True)


def test_deepspeed_is_not_imported_for_those_who_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    finder = RegisterWithDeepSpeed()
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    assert finder.find_spec("json", None) is None and finder in sys.meta_path
    assert "deepspeed" not in sys.modules
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.loader is not None
    assert spec.loader.exec_module.__name__ == "execute_and_call"
    assert finder not in sys.meta_path and "deepspeed" not in sys.modules
