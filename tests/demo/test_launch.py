"""Starting, following, killing and ending a run: with a stand-in for torchrun, and once for real."""

import os
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from s3_megatron.demo.launch import Tail, Training
from s3_megatron.demo.recipe import load
from s3_megatron.demo.report import Outcome
from s3_megatron.demo.runs import Trainer
from s3_megatron.errors import S3Error
from s3_megatron.watch.metrics import MetricsWriter, read_metrics

ROOT = Path(__file__).resolve().parents[2]

# Starts two "ranks" in sessions of their own, as torchrun does, each with a helper process, and fails when one rank
# ends. SIGTERM ends the ranks unless they are deaf to it; nothing tells the helpers.
STAND_IN = """
import os, signal, subprocess, sys
deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" if "deaf" in sys.argv else ""
helper = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
rank = deaf + helper + "print('up', flush=True); time.sleep(60)"
ranks = [subprocess.Popen([sys.executable, "-c", rank], env={**os.environ, "RANK": str(i)}, start_new_session=True)
         for i in (1, 0)]
def end(*_):
    for process in ranks: process.terminate()
    for process in ranks: process.wait()
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
while all(process.poll() is None for process in ranks):
    signal.sigtimedwait([], 0.05)
print("ValueError: rank %d is gone" % [p.poll() is None for p in ranks].index(False))
end()
"""


def start(folder: Path, *args: str) -> tuple[Training, list[psutil.Process]]:
    training = Training([sys.executable, "-c", STAND_IN, *args], folder, os.environ)
    deadline = time.monotonic() + 30
    while training.log.read_text().count("up") < 2:
        assert time.monotonic() < deadline, training.log.read_text()
        time.sleep(0.05)
    return training, psutil.Process(training.pid).children(recursive=True)


def test_the_last_rank_is_killed_and_the_log_says_why_the_run_ended(tmp_path: Path):
    """A killed rank's helper, which Megatron had started to write a checkpoint, once stayed for ever."""
    training, family = start(tmp_path)
    with training:
        training.kill_last_rank()
        assert list(training.events()) == []
        with pytest.raises(S3Error, match=r"status 1: ValueError: rank 0 is gone \(whole log: .*log.txt\)"):
            training.check()  # rank 1 is the first child of the stand-in
    assert not any(map(lives, family))


def lives(process: psutil.Process) -> bool:
    """Whether it still runs; an orphan that ended stays a zombie until init looks after it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("manner", ["obedient", "deaf"])
def test_an_interrupted_demonstration_leaves_no_process(tmp_path: Path, manner: str, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C: the ranks live in sessions of their own, so nothing but this code ends them."""
    monkeypatch.setattr("s3_megatron.demo.launch.PATIENCE", 1)
    training, family = start(tmp_path, manner)
    with pytest.raises(KeyboardInterrupt), training:
        raise KeyboardInterrupt
    assert len(family) == 4
    assert not any(map(lives, family)) and not psutil.pid_exists(training.pid)


def test_tail_yields_whole_new_lines_only(tmp_path: Path):
    writer = MetricsWriter(tmp_path)
    writer.write({"event": "train", "iteration": 1})
    tail = Tail(tmp_path)
    assert tail.events() == []
    writer.write({"event": "train", "iteration": 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "tra')
    assert [event["iteration"] for event in tail.events()] == [2]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('in", "iteration": 3}\n')
    assert [event["iteration"] for event in tail.events()] == [3]
    assert Tail(tmp_path / "not there yet").events() == []


@pytest.mark.distributed
def test_kill_and_resume_through_the_real_launch(tmp_path: Path):
    """One rank of a real torchrun dies between two checkpoints; the same command goes on where the last one ended.

    The gap is 0 and not merely small: Megatron restores weights, both states, data order and random state, and its
    arithmetic on the CPU is the same every time.
    """
    config = load(ROOT / "configs/model/gpt2_tiny.yaml")
    config["model"] |= {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 32}
    config["run"] |= {"train_iters": 24, "lr_decay_iters": 24, "lr_warmup_iters": 2, "eval_interval": 24}
    config["checkpoint"] = {"save_interval": 8}
    mock = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "255"]
    trainer = Trainer(config, mock, tmp_path, 0, Console(quiet=True))
    assert (trainer.ranks, trainer.kill_at) == (2, 12)

    interruption = trainer.train_through_a_kill("s3-killed", "S3", "s3")
    # The run gets a little further before the signal arrives, but hardly to the checkpoint of iteration 16.
    assert 12 <= interruption.killed_at and interruption.resumed_from in (8, 16)
    trainer.train("s3", "S3", "s3")
    s3, resumed = (read_metrics(tmp_path / name) for name in ("s3", "s3-killed"))
    outcome = Outcome(s3=s3, resumed=resumed, adamw=s3, interruption=interruption)
    assert sorted(s3.train) == sorted(resumed.train) == list(range(1, 25))
    assert outcome.loss_gap() == 0
    assert "exitcode  : -9" in (tmp_path / "s3-killed/log.txt").read_text()
    assert len({event["lm_loss"] for event in s3.train.values()}) > 10, "the losses move"
