"""Both engines on one GPU, over NCCL: that S3's kernel steps, that a resume goes on, what memory it takes.

Without a GPU the same runs are rehearsals: three of them in ``make test``, all in ``make gpu DRY=1``.
"""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("pydantic")

from benchmarks.gpu import training
from s3_megatron.jobs import memory
from s3_megatron.jobs.job import Job
from s3_megatron.watch.events import Train
from s3_megatron.watch.file import read_metrics
from tests.gpu.card import REAL, needs_card

VISIT = REAL or os.environ.get("S3_GPU_VISIT") == "1"
in_a_visit = pytest.mark.skipif(
    not VISIT, reason="on CPUs tests/engines/deepspeed and tests/engines/megatron have it: make gpu DRY=1"
)
pytestmark = [pytest.mark.gpu, pytest.mark.distributed, pytest.mark.timeout(280)]

ITERATIONS, SAVED_AT = 8, 4
SMALL = ["model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=2", "model.seq_length=64"]
SMALL += ["model.vocab_size=512"]
LARGER = ["model.hidden_size=256", "model.num_attention_heads=8", "model.seq_length=256"]
KERNEL = "S3 steps on cuda by kernel triton" if REAL else "S3 steps on cpu by kernel cpu"


def job(*settings: str) -> Job:
    sizes = [*(LARGER if REAL else SMALL), f"schedule.train_iters={ITERATIONS}", f"checkpoint.save_interval={SAVED_AT}"]
    sizes += ["schedule.global_batch_size=8", "schedule.lr_warmup_iters=1", "schedule.eval_iters=0"]
    sizes += ["checkpoint.save_retain_interval=null"]
    return training.job("gpt2_tiny", REAL, [*sizes, *settings])


def train(made: Job, run: Path, *more: str, torchrun: bool = REAL) -> tuple[str, list[Train]]:
    """Train under torchrun, or, which is faster, in a forked rank; returns the output and what was logged."""
    if torchrun:
        shown = training.train(made, run, more, timeout=250)
        code, text = shown.code, shown.text
    else:
        from tests.ranks import ranks

        done = ranks(training.command(made, run, more), nproc=1, timeout=200, env=training.environment(made))
        code, text = done.returncode, done.stdout + done.stderr
    assert code == 0, text[-4000:]
    return text, list(read_metrics(run / "watch").train.values())


def falls(events: list[Train]) -> bool:
    losses = [event.losses["lm_loss"] for event in events if not event.skipped]
    return len(losses) > 2 and losses[-1] < losses[0]


def test_megatron_resumes_in_bf16_where_it_was(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    """On CPUs to the bit. A GPU does not promise it (atomic additions of the host's own kernels): bf16 sums in another
    order differ by 1e-5 here (tests/engines/megatron/test_pretrain.py), ten times that is allowed; the figure is
    recorded."""
    made = job()
    text, whole = train(made, tmp_path / "whole", torchrun=VISIT)
    assert KERNEL in text and len(whole) == ITERATIONS and falls(whole)
    saved = tmp_path / "resumed/checkpoints"
    shutil.copytree(tmp_path / f"whole/checkpoints/iter_{SAVED_AT:07d}", saved / f"iter_{SAVED_AT:07d}")
    (saved / "latest_checkpointed_iteration.txt").write_text(str(SAVED_AT))
    _, rest = train(made, tmp_path / "resumed")
    assert [event.iteration for event in rest] == list(range(SAVED_AT + 1, ITERATIONS + 1))
    off = max(
        abs(one.losses["lm_loss"] / other.losses["lm_loss"] - 1)
        for one, other in zip(rest, whole[SAVED_AT:], strict=True)
    )
    record_property("resume", f"off by {off:.1e}" if off else "equal to the bit")
    assert off <= (1e-4 if REAL else 0.0)


@in_a_visit
def test_softsignum_trains_through_both_phases(tmp_path: Path) -> None:
    """In bf16, in Megatron's distributed optimizer: the temperature is taken on the device, over its ranks."""
    text, events = train(job("optimizer=softsignum", "optimizer.soft_start=0.5"), tmp_path)
    assert KERNEL.replace("S3", "SoftSignum") in text and "SoftSignum is soft from step 5 on, for 4 steps" in text
    assert len(events) == ITERATIONS and falls(events)
    assert all(event.updates.max is not None and 0 < event.updates.max <= 1 for event in events)


@in_a_visit
def test_megatrons_fp16_scaler_skips_and_then_trains(tmp_path: Path) -> None:
    """A loss scale at which fp16's gradients overflow, halved after every step that is skipped."""
    scale = ["--fp16", "--initial-loss-scale", str(2**30), "--hysteresis", "1", "--loss-scale-window", "100"]
    text, events = train(job("precision=fp32", "schedule.train_iters=24"), tmp_path, *scale)
    skipped = [event.skipped for event in events]
    assert KERNEL in text and skipped[0] and skipped.count(False) >= 8
    assert all(math.isfinite(event.losses["lm_loss"]) for event in events if not event.skipped)


@pytest.mark.parametrize(
    "stage", [pytest.param("zero1", marks=in_a_visit), "zero2", pytest.param("zero3", marks=in_a_visit)]
)
def test_zero_trains(stage: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    text, events = train(job("engine=deepspeed", f"deepspeed={stage}"), tmp_path)
    assert KERNEL in text and falls(events)


@in_a_visit
def test_zero_with_offload_steps_on_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    text, events = train(job("engine=deepspeed", "deepspeed=zero2_offload"), tmp_path)
    assert "S3 steps on cpu by kernel cpu" in text and falls(events)


@needs_card
def test_peak_memory_is_what_check_estimates(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    """The paper's 345M, three iterations; the estimate without what is guessed of CUDA and NCCL."""
    sizes = [
        "schedule.train_iters=3",
        "schedule.micro_batch_size=2",
        "schedule.global_batch_size=2",
        "log.log_interval=1",
    ]
    made = training.job("gpt2_345m", True, [*sizes, "schedule.lr_warmup_iters=1", "schedule.eval_iters=0"])
    shown = training.train(made, tmp_path, timeout=120, saves=False)
    assert shown.code == 0, shown.text[-4000:]
    peak, estimate = shown.peak_gib(), memory.estimate(made)
    wanted = (estimate.total - estimate.fixed) / memory.GIB
    assert peak is not None
    record_property("peak", f"{peak:.2f} GiB, {peak / wanted:.2f} of the estimate")
    assert peak == pytest.approx(wanted, rel=0.05)
