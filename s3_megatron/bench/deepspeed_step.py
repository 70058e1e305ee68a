"""The time of one offloaded step inside DeepSpeed: S3 and DeepSpeed's own CPU AdamW in one run.

One process, the model on a GPU where there is one, ZeRO 2 with offload_optimizer on the CPU, bfloat16 weights, float32
masters, 30 million parameters, random gradients. The engines take turns. "optimizer" is the optimizer's own step;
"engine" is engine.step(), with the norm, the unscaling and the copy of the masters to the weights, which DeepSpeed does
for all alike. Medians, in milliseconds. Needs a C++ compiler and ninja, as DeepSpeedCPUAdam does.
"""

import logging
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor, nn

from s3_megatron.bench import alone, builds
from s3_megatron.bench.about import about
from s3_megatron.optim import S3

PARAMETERS, TENSORS = 30_000_000, 12
WARM_UP = 3
ADAMW = "DeepSpeedCPUAdam"
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "S3": {"type": "S3", "params": {"lr": 3e-3, "weight_decay": 0.01}},
    "S3, bfloat16 states": {"type": "S3", "params": {"lr": 3e-3, "weight_decay": 0.01, "state_dtype": "bfloat16"}},
    ADAMW: {"type": "AdamW", "params": {"lr": 3e-4, "weight_decay": 0.1}},
}


class Net(nn.Module):
    """Weights whose gradients are what forward is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.full((PARAMETERS // TENSORS // 1000, 1000), 0.5) for _ in range(TENSORS))

    def forward(self, gradients: list[Tensor]) -> Tensor:
        """Sum every weight times its gradient."""
        return torch.stack([(w * g).sum() for w, g in zip(self.weights, gradients, strict=True)]).sum()


def _now() -> float:
    """The clock's seconds once the GPU, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Side:
    """An engine with one of the optimizers, and its times."""

    def __init__(self, name: str, optimizer: dict[str, Any]) -> None:
        """Build the engine and check that the optimizer is the one that was asked for."""
        import deepspeed
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": optimizer,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        }
        self.engine, *_ = deepspeed.initialize(model=Net(), config=config)
        found = type(self.engine.basic_optimizer)
        assert found is (DeepSpeedCPUAdam if name == ADAMW else S3), found
        self.times: dict[str, list[float]] = {"optimizer": [], "engine": []}
        optimizer_step = self.engine.basic_optimizer.step

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = _now()
            result = optimizer_step(*args, **kwargs)
            self.times["optimizer"].append((_now() - started) * 1e3)
            return result

        self.engine.basic_optimizer.step = timed

    def step(self, gradients: list[Tensor]) -> None:
        """Take one step with these gradients."""
        self.engine.backward(self.engine(gradients))
        started = _now()
        self.engine.step()
        self.times["engine"].append((_now() - started) * 1e3)
        assert self.engine.was_step_applied()


def measure(rounds: int) -> dict[str, Any]:
    """Step all engines ``rounds`` times; returns milliseconds, ratios, and what they were measured on."""
    import deepspeed

    from s3_megatron.engines.deepspeed import register, use_gloo

    device = alone.device()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ |= alone.ENVIRONMENT
    builds.prepare("cpu_adam")
    register()
    if device == "cpu":
        use_gloo()
    deepspeed.init_distributed("gloo" if device == "cpu" else "nccl", verbose=False)
    try:
        results = _measure(device, rounds)
    finally:
        dist.destroy_process_group()
    return {**about(device, "deepspeed"), "parameters": PARAMETERS, "rounds": rounds, "results": results}


def _measure(device: str, rounds: int) -> dict[str, Any]:
    """Step all engines in turn; returns median milliseconds, and ratios to DeepSpeedCPUAdam's."""
    from s3_megatron.engines.deepspeed import activity

    sides = {name: Side(name, optimizer) for name, optimizer in OPTIMIZERS.items()}
    shape = sides["S3"].engine.module.weights[0].shape
    for round_ in range(WARM_UP + rounds):
        generator = torch.Generator().manual_seed(round_)
        gradients = [(torch.randn(shape, generator=generator) * 1e-2).bfloat16().to(device) for _ in range(TENSORS)]
        # Who goes second finds a warmer or a colder cache.
        for side in list(sides.values())[:: 1 if round_ % 2 else -1]:
            side.step(gradients)
    assert activity(sides["S3"].engine).steps == WARM_UP + rounds
    medians = {
        name: {part: statistics.median(times[WARM_UP:]) for part, times in side.times.items()}
        for name, side in sides.items()
    }
    return {
        name: {
            **{f"{part}_ms": round(value, 2) for part, value in parts.items()},
            **{f"{part}_ratio": round(value / medians[ADAMW][part], 3) for part, value in parts.items()},
        }
        for name, parts in medians.items()
    }


def tables(measured: dict[str, Any]) -> Iterator[Table]:
    """Lay out the table."""
    table = Table(title=f"one offloaded step of {PARAMETERS:,} parameters, {measured['threads']} threads")
    for column in ("", "optimizer, ms", "ratio", "engine.step(), ms", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in measured["results"].items():
        keys = ("optimizer_ms", "optimizer_ratio", "engine_ms", "engine_ratio")
        table.add_row(name, *(f"{row[key]:.2f}" for key in keys))
    yield table
