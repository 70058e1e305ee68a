"""``python -m tests.demo.stand_in``: the demonstration with a torchrun and ranks that do nothing but log.

Real ones take ten seconds a start, and are the same to a signal: processes in sessions of their own, with helpers.
Everything else is the demonstration's own, each run's script and node agent too. $PAUSE is what an iteration takes, in
seconds; one of the run $HOLD takes a second. With $TORCH set, torch is real.
"""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from s3_megatron.demo import __main__ as demo
from s3_megatron.jobs import trial
from s3_megatron.jobs.job import Job
from s3_megatron.jobs.render import render
from s3_megatron.run_folder import VARIABLE, RunFolder
from s3_megatron.watch.events import Evaluation, Optimizer, Train, Updates
from s3_megatron.watch.file import Writer

HELPER = "import time; time.sleep(120)"
RANK = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {HELPER!r}]); time.sleep(120)"
OPTIMIZER = Optimizer("s3", "DistributedOptimizer", 2, 1001, [501, 500], 4.0, 2.0)


def script(job: Job, run: Path) -> str:
    """The run's script, with this module for torchrun."""
    text, torchrun = render(job, run), "-m s3_megatron.jobs.node.torchrun "
    assert torchrun in text
    return text.replace(torchrun, "-m tests.demo.stand_in torchrun ")


def train(folder: RunFolder, iterations: int) -> None:
    """Be torchrun: start two ranks, end them on SIGTERM, fail when one is gone; save every 32 iterations."""
    run = folder.path
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK], env={**os.environ, "RANK": str(i)}, start_new_session=True)
        for i in (0, 1)
    ]

    def end(code: int) -> None:
        for rank in ranks:
            rank.terminate()
            rank.wait()
        sys.exit(code)

    signal.signal(signal.SIGTERM, lambda *_: end(1))
    writer, saved = Writer(run / "watch"), run / "saved"
    writer.write(OPTIMIZER)
    start = int(saved.read_text()) if saved.exists() else 0
    for iteration in range(start + 1, iterations + 1):
        time.sleep(1.0 if run.name == os.environ.get("HOLD") else float(os.environ["PAUSE"]))
        while run.name == "s3-killed" and not start and iteration == 90 and all(rank.poll() is None for rank in ranks):
            time.sleep(0.01)
        if any(rank.poll() is not None for rank in ranks):
            print("ValueError: a rank is gone")
            end(1)
        figures = {"lr": 1e-3, "grad_norm": 1.0, "seconds": 0.01, "updates": Updates(0.1, 0.5)}
        writer.write(Train(iteration, {"lm_loss": 4 + 4 * math.exp(-iteration / 40)}, **figures))
        if iteration % 32 == 0:
            saved.write_text(str(iteration))
    writer.write(Evaluation("validation", iterations, {"lm_loss": 4.1}))
    folder.finish(iterations)
    end(0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["torchrun"]:
        train(RunFolder(Path(os.environ[VARIABLE])), int(sys.argv[sys.argv.index("--train-iters") + 1]))
    else:
        trial.render = script
        if "TORCH" not in os.environ:
            # Its import takes seconds, and only who encodes text needs more of it than the number of GPUs.
            sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 0))  # type: ignore[assignment]
        demo.main()
