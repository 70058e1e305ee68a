"""The hosts' own entries train with S3 once they are patched, and are as pip installed them after revert.

A patched copy stands first on PYTHONPATH; install() and register() are not called there. Its losses must be
those of the unpatched host under ``s3_megatron.train.run``, to the bit: the same operations run in the same order.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines.megatron.gpt import SCRIPT, flags
from tests.launcher import ROOT, torchrun
from tests.patch.hosts import apply, copy_whole, patched_hosts, revert, unlike_record
from tests.ranks import ranks

BARE = str(ROOT / "tests/engines/megatron/bare.py")
ITERATIONS = 20
DEEPSPEED_SCRIPT = [str(SCRIPT.with_name("stock_deepspeed_script.py")), "4", str(ITERATIONS)]


@pytest.fixture(scope="module", params=patched_hosts())
def host(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def patched(host: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = copy_whole(host, tmp_path_factory.mktemp("hosts"))
    assert unlike_record(host, root) == []
    apply(host, root)
    return root


def path_with(root: Path) -> str:
    return os.pathsep.join(filter(None, (str(root), str(ROOT), os.environ.get("PYTHONPATH"))))


@pytest.mark.distributed
def test_training_is_that_of_the_plugin(host: str, patched: Path, tmp_path: Path) -> None:
    train = train_megatron if host == "megatron-lm" else train_deepspeed
    # The first on PYTHONPATH wins over what is installed.
    seen = train(None, tmp_path / "plugin"), train(patched, tmp_path / "patched")
    assert len(seen[0]) == ITERATIONS
    assert seen[0] == seen[1]
    assert seen[0][0] != seen[0][-1]
    revert(host, patched)
    try:
        assert unlike_record(host, patched) == []
    finally:
        apply(host, patched)


def train_megatron(patched: Path | None, folder: Path) -> list[dict[str, Any]]:
    """``megatron.training.pretrain`` from a script that knows nothing of this package; --watch-dir has every bit."""
    arguments = [*flags(iterations=ITERATIONS, precision="bf16"), "--watch-dir", str(folder)]
    if patched is None:
        plugin = ["-m", "s3_megatron.train.run", "--rehearsal", str(SCRIPT), *arguments]
        run = ranks(plugin, nproc=2, timeout=280)
    else:
        env = {"PYTHONPATH": path_with(patched), "DS_ACCELERATOR": "cpu"}
        run = torchrun([BARE, str(SCRIPT), *arguments], nproc=2, timeout=280, env=env)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert "S3 active in DistributedOptimizer" in run.stdout + run.stderr
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for event in events:
        event.pop("seconds", None)
    return [event for event in events if event["event"] == "train"]


def train_deepspeed(patched: Path | None, folder: Path) -> list[str]:
    """``deepspeed.initialize`` with {"type": "S3"}."""
    if patched is None:
        run = torchrun(["-m", "s3_megatron.train.run", *DEEPSPEED_SCRIPT], nproc=2, timeout=280)
    else:
        run = torchrun(DEEPSPEED_SCRIPT, nproc=2, timeout=280, env={"PYTHONPATH": path_with(patched)})
        assert f"host {patched / 'deepspeed'}" in run.stdout, run.stderr[-4000:]
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert "S3 active in DeepSpeedZeroOptimizer (ZeRO 1)" in run.stdout + run.stderr
    return re.findall(r"^loss (.*)$", run.stdout, flags=re.MULTILINE)


REENTERED = {
    "megatron-lm": "from s3_megatron.engines.megatron import install as turn_on; turn_on(); import megatron.training; "
    "from s3_megatron.engines.megatron.install import _swap",
    "deepspeed": "from s3_megatron.engines.deepspeed import register as turn_on; turn_on(); import deepspeed; "
    "from s3_megatron.engines.deepspeed.register import _swap",
}


@pytest.mark.slow
def test_whoever_calls_install_too_gets_it_once(host: str, patched: Path) -> None:
    """Then the engine's own import of the host, half done, is where the patch calls back into the engine."""
    code = (
        "import os; os.environ['DS_ACCELERATOR'] = 'cpu'; from s3_megatron import rehearsal; rehearsal.activate(); "
        f"{REENTERED[host]}; turn_on(); names = [(id(owner), name) for owner, name, _ in _swap._undo]; "
        "assert names and len(names) == len(set(names)), names; print('once')"
    )
    env = {**os.environ, "PYTHONPATH": path_with(patched), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0 and done.stdout.endswith("once\n"), done.stderr[-3000:]
