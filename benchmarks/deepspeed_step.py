"""The time of one offloaded step inside DeepSpeed: S3 and DeepSpeed's own CPU AdamW in one run.

    python benchmarks/deepspeed_step.py [--rounds 15] [--json benchmarks/results/deepspeed_step.json]

One process, the model on a GPU where there is one, ZeRO 2 with offload_optimizer on the CPU, bfloat16 weights, float32
masters, 30 million parameters, random
gradients. Both engines take turns. "optimizer" is the optimizer's own step; "engine" is engine.step(), with the norm,
the unscaling and the copy of the masters to the weights, which DeepSpeed does for both alike. Medians, in
milliseconds. Needs a C++ compiler and ninja, as DeepSpeedCPUAdam does.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from s3_megatron.bench import builds
from s3_megatron.engines.deepspeed import activity, register, use_gloo
from s3_megatron.optim import S3

PARAMETERS, TENSORS = 30_000_000, 12
WARM_UP = 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "S3": (S3, {"type": "S3", "params": {"lr": 3e-3, "weight_decay": 0.01}}),
    "S3, bfloat16 states": (
        S3,
        {"type": "S3", "params": {"lr": 3e-3, "weight_decay": 0.01, "state_dtype": "bfloat16"}},
    ),
    "DeepSpeedCPUAdam": (DeepSpeedCPUAdam, {"type": "AdamW", "params": {"lr": 3e-4, "weight_decay": 0.1}}),
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
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Side:
    """An engine with one of the optimizers, and its times."""

    def __init__(self, kind: type, optimizer: dict[str, Any]) -> None:
        """Build the engine and check that the optimizer is the one that was asked for."""
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": optimizer,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        }
        self.engine, *_ = deepspeed.initialize(model=Net(), config=config)
        assert type(self.engine.basic_optimizer) is kind, type(self.engine.basic_optimizer)
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
    """Step all engines in turn; returns median milliseconds, and ratios to DeepSpeedCPUAdam's."""
    sides = {name: Side(kind, optimizer) for name, (kind, optimizer) in OPTIMIZERS.items()}
    shape = sides["S3"].engine.module.weights[0].shape
    for round_ in range(WARM_UP + rounds):
        generator = torch.Generator().manual_seed(round_)
        gradients = [(torch.randn(shape, generator=generator) * 1e-2).bfloat16().to(DEVICE) for _ in range(TENSORS)]
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
            **{f"{part}_ratio": round(value / medians["DeepSpeedCPUAdam"][part], 3) for part, value in parts.items()},
        }
        for name, parts in medians.items()
    }


def show(results: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title=f"one offloaded step of {PARAMETERS:,} parameters, {torch.get_num_threads()} threads")
    for column in ("", "optimizer, ms", "ratio", "engine.step(), ms", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in results.items():
        keys = ("optimizer_ms", "optimizer_ratio", "engine_ms", "engine_ratio")
        table.add_row(name, *(f"{row[key]:.2f}" for key in keys))
    Console().print(table)


def main() -> None:
    """Measure, print, and with --json write the figures with what they were measured on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="29513")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    builds.prepare("cpu_adam")
    register()
    if DEVICE == "cpu":
        use_gloo()
    deepspeed.init_distributed("gloo" if DEVICE == "cpu" else "nccl", verbose=False)
    results = measure(options.rounds)
    show(results)
    if options.json:
        about = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "machine": platform.machine() if DEVICE == "cpu" else torch.cuda.get_device_name(),
            "threads": torch.get_num_threads(),
            "parameters": PARAMETERS,
            "versions": {name: version(name) for name in ("torch", "deepspeed")},
        }
        options.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
