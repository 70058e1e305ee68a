"""GPT by a recipe on one rank, of a GPU or in the rehearsal: how fast, and in how much memory.

    python -m benchmarks.gpu.training s3|adamw [--dry]

The paper's 345M, micro-batch 8, 30 iterations of Megatron in bf16, without dropout; --dry: the tiny recipe, 4
iterations, in the rehearsal. Megatron's AdamW without Transformer Engine and Apex is torch's foreach AdamW, not its
fused one.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.runner import write_numbers
from s3_megatron import machine
from s3_megatron.jobs import compose, memory
from s3_megatron.jobs.flags import ENTRIES, deepspeed_file, megatron_flags
from s3_megatron.jobs.job import Job
from s3_megatron.jobs.recipe import Data
from s3_megatron.watch.file import read_metrics

# Megatron hides INFO otherwise, and with it the line that says which kernel steps.
_SAY = ["--logging-level", "20"]
_SAVING = ("--save", "--load", "--save-interval", "--save-retain-interval")
_TIMERS = ["--log-throughput", "--timing-log-level", "2"]
_ALLOCATED = re.compile(r"max allocated: *([\d.]+)")  # megatron.training.utils.report_memory (0.19.2), in MB of 2^20
_OPTIMIZER = re.compile(r"^ *optimizer \.*: *\(([\d.]+), ([\d.]+)\)", re.MULTILINE)


@dataclass(frozen=True)
class Shown:
    """What one run printed; ``code`` is its exit code."""

    code: int
    text: str

    def peak_gib(self) -> float | None:
        """The most memory that torch had given out when Megatron looked; None in a rehearsal."""
        found = [float(mb) for mb in _ALLOCATED.findall(self.text)]
        return max(found) / 1024 if found and max(found) else None

    def optimizer_ms(self) -> float | None:
        """The optimizer's part of an iteration, as the last log has it."""
        found = _OPTIMIZER.findall(self.text)
        return float(found[-1][1]) if found else None


def job(recipe: str, gpu: bool, settings: Sequence[str] = ()) -> Job:
    """``recipe`` on one rank of this machine, on random tokens."""
    where = ["cluster.accelerator=gpu" if gpu else "cluster.accelerator=cpu", "cluster.ranks_per_node=1"]
    made = compose.load(recipe, "local", [*where, "model.attention_dropout=0", "model.hidden_dropout=0", *settings])
    return Job(made.recipe.model_copy(update={"data": Data(mock=True)}), made.cluster)


def command(made: Job, run: Path, more: Sequence[str] = (), saves: bool = True) -> list[str]:
    """What a rank that trains ``made`` in the folder ``run`` is given: -m, the entry and its flags, last ``more``.

    A run that does not save spares the disk gigabytes at its end.
    """
    run.mkdir(parents=True, exist_ok=True)
    if made.recipe.engine == "deepspeed":
        (run / "deepspeed.json").write_bytes(deepspeed_file(made).read_bytes())
    flags = [word for words in megatron_flags(made, run) if saves or words[0] not in _SAVING for word in words]
    rehearsal = ["--rehearsal"] if made.rehearsed else []
    return ["-m", ENTRIES[made.recipe.engine], *rehearsal, *flags, *_SAY, *more]


def environment(made: Job) -> dict[str, str]:
    """The variables that a rank needs on a machine without a network and, but for the rehearsal, with GPUs."""
    interface = machine.loopback() or "lo"
    ours = {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    # Megatron compiles its small functions while it warms up, for longer than such a run lasts.
    ours |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    return ours | ({"CUDA_VISIBLE_DEVICES": ""} if made.rehearsed else {})


def train(made: Job, run: Path, more: Sequence[str] = (), timeout: float | None = None, saves: bool = True) -> Shown:
    """Run ``command`` under torchrun; its output goes to ``run``/log as well."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    words = [*launcher, "--nproc_per_node", "1", *command(made, run, more, saves)]
    with (run / "log").open("wb") as log:
        done = subprocess.run(
            words, env={**os.environ, **environment(made)}, stdout=log, stderr=log, timeout=timeout, check=False
        )
    return Shown(done.returncode, (run / "log").read_text(encoding="utf-8", errors="replace"))


def measure(optimizer: str, dry: bool) -> dict[str, Any]:
    """Train and time; exits where training fails."""
    iterations = 4 if dry else 30
    sizes = [f"schedule.train_iters={iterations}", "schedule.lr_warmup_iters=1", "schedule.eval_iters=0"]
    sizes += ["schedule.micro_batch_size=8", "schedule.global_batch_size=8", "log.log_interval=1"]
    sizes += [f"optimizer={optimizer}"]
    made = job("gpt2_tiny" if dry else "gpt2_345m", not dry, sizes)
    with tempfile.TemporaryDirectory(prefix="s3-gpu-") as name:
        run = Path(name)
        shown = train(made, run, _TIMERS, saves=False)
        print(shown.text)
        if shown.code:
            sys.exit(shown.code)
        trained = list(read_metrics(run / "watch").train.values())
    seconds = [event.seconds for event in trained if event.seconds is not None][-2 * iterations // 3 :]
    estimate = memory.estimate(made)
    return {
        "optimizer": optimizer,
        "iterations": len(trained),
        "ms": statistics.median(seconds) * 1e3,
        "optimizer_ms": shown.optimizer_ms(),
        "peak_gib": shown.peak_gib(),
        "estimated_gib": (estimate.total - estimate.fixed) / memory.GIB,
        "loss": trained[-1].losses["lm_loss"],
    }


def main() -> None:
    """Measure one optimizer, print, and write the figures where the runner wants them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("optimizer", choices=["s3", "adamw"])
    parser.add_argument("--dry", action="store_true", help="tiny, in the rehearsal")
    args = parser.parse_args()
    figures = measure(args.optimizer, args.dry)
    print(json.dumps(figures, indent=1))
    write_numbers(figures)


if __name__ == "__main__":
    main()
