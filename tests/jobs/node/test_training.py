"""A tiny training on two ranks under the node agent: what a person and SLURM ask of it, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from s3_megatron.checkpoints.whole import newest
from s3_megatron.watch.file import read_metrics
from tests.agent import end, start, wait_for
from tests.train.tiny import FLAGS, MOCK

pytestmark = pytest.mark.distributed

TRACKER = "latest_checkpointed_iteration.txt"


def train(run: Path, *flags: str) -> subprocess.Popen[str]:
    checkpoints, watch = str(run / "checkpoints"), str(run / "watch")
    folders = ["--save", checkpoints, "--load", checkpoints, "--watch-dir", watch, "--ckpt-format", "torch_dist"]
    torchrun = [sys.executable, "-m", "s3_megatron.jobs.node.torchrun", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["--tee", "3", "--log-dir", str(run / "logs"), "-m", "s3_megatron.train.pretrain_gpt"]
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "S3_REHEARSAL": "1"}
    job = ["--exit-signal-handler", "--save-interval", "1000", "--optimizer", "s3"]
    return start(run, [*torchrun, *FLAGS, *MOCK, *folders, *job, *flags], minutes=5, hang_minutes=5, **settings)


def test_a_run_saves_when_asked_to_goes_on_and_saves_when_it_must_end(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    agent = train(tmp_path, "--train-iters", "1000000")
    request.addfinalizer(agent.terminate)  # it ends the ranks
    wait_for(lambda: agent.poll() is not None or read_metrics(tmp_path / "watch").train, 300)
    (tmp_path / "SAVE").touch()
    wait_for(lambda: agent.poll() is not None or not (tmp_path / "SAVE").exists(), 200)
    assert agent.poll() is None, agent.communicate()[0][-4000:]
    saved = newest(tmp_path / "checkpoints").iteration
    assert saved is not None
    wait_for(lambda: agent.poll() is not None or max(read_metrics(tmp_path / "watch").train) > saved + 2, 200)

    # As SLURM does it: to every process of the step, torchrun too.
    for process in (psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)):
        os.kill(process.pid, signal.SIGTERM)
    code, report, printed = end(tmp_path, agent, timeout=200)
    assert (code, report["verdict"], report["error"]) == (0, "saved", None), printed[-4000:]
    last = newest(tmp_path / "checkpoints").iteration
    assert last is not None and last > saved and report["iteration"] == last
    assert (tmp_path / "checkpoints" / TRACKER).read_text() == str(last)
    assert not (tmp_path / "FINISHED").exists() and not (tmp_path / "ENDED").exists()

    # The newest checkpoint is damaged inside, which shows when it is loaded: the one line was missing, since torch's
    # CheckpointException is no Exception, and every later start failed on it again.
    damaged = tmp_path / f"checkpoints/iter_{last:07d}"
    (damaged / "__1_0.distcp").write_bytes(bytes((damaged / "__1_0.distcp").stat().st_size))
    code, report, printed = end(tmp_path, train(tmp_path, "--train-iters", str(last + 1)), timeout=150)
    assert (code, report["verdict"]) == (1, "failed"), printed[-4000:]
    assert report["error"]["message"].startswith(f"LoadError: {damaged} cannot be loaded: ")
    assert "the next start tries the one before it" in report["error"]["message"]

    # The rest of the training starts from the one before, and comes to its end.
    steps = ("--train-iters", str(saved + 2), "--override-opt-param-scheduler", "--exit-on-missing-checkpoint")
    code, report, printed = end(tmp_path, train(tmp_path, *steps), timeout=300)
    assert (code, report["verdict"], report["iteration"]) == (0, "finished", saved + 2), printed[-4000:]
    assert f"names '{last}', which is not whole (it could not be loaded (" in printed
    assert f": it now names iteration {saved}, the newest whole checkpoint" in printed
    assert json.loads((tmp_path / "FINISHED").read_text())["iteration"] == saved + 2


def test_flags_that_megatron_refuses_end_the_chain(tmp_path: Path) -> None:
    """Megatron's own answer is an AssertionError, as of a bug, which would be tried again and again."""
    code, report, printed = end(tmp_path, train(tmp_path, "--train-iters", "2", "--overlap-param-gather"), timeout=300)
    assert (code, report["verdict"]) == (2, "configuration"), printed[-4000:]
    assert report["error"]["message"].startswith("Megatron refuses the flags: ")
    assert (tmp_path / "ENDED").read_text() == f"configuration error: {report['error']['message']}\n"
    assert printed.count("s3_megatron: error: Megatron refuses the flags") == 1
    assert "Traceback" not in printed.split("FAILED")[0]
