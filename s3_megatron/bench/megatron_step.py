"""The time of one optimizer step inside Megatron, by part: S3 with the host's separate passes, and with its single one.

One process, on a GPU or in Megatron's rehearsal on the CPU, a GPT of 20 million parameters under DistributedOptimizer,
random gradients in its buffers, clipped at every step. Two copies of the model take turns, and Megatron's own timers
measure the parts, so both runs are the same host code but for what S3 replaces. Medians, in milliseconds.
"""

import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from rich.table import Table

from s3_megatron.bench import alone
from s3_megatron.bench.about import about

WIDTH, LAYERS, VOCABULARY, LENGTH = 384, 8, 8192, 128
WARM_UP = 3
# Megatron's timers (0.19.2, MixedPrecisionOptimizer), by what a reader calls them.
PARTS = {
    "unscale": "optimizer-unscale-and-check-inf",
    "clip": "optimizer-clip-main-grad",
    "step": "optimizer-inner-step",
    "copy": "optimizer-copy-main-to-model-params",
}


class Side:
    """A model and its optimizer, with or without the single pass."""

    def __init__(self, dtype: torch.dtype, merged: bool) -> None:
        """Build both; the weights are the same on either side."""
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.optimizer import get_megatron_optimizer
        from megatron.core.timers import Timers
        from megatron.core.transformer import TransformerConfig

        from s3_megatron.engines.megatron import S3OptimizerConfig, single_pass

        torch.manual_seed(1)
        shape = TransformerConfig(num_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=8, params_dtype=dtype)
        net = GPTModel(shape, get_gpt_layer_local_spec(), vocab_size=VOCABULARY, max_sequence_length=LENGTH)
        net = net.to(dtype).cuda()
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.ddp = DistributedDataParallel(shape, ddp, net)
        self.timers = Timers(1, "max")
        config = S3OptimizerConfig(
            lr=3e-3,
            weight_decay=0.01,
            clip_grad=1.0,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            initial_loss_scale=1024.0,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            timers=self.timers,
        )
        with nullcontext() if merged else patch.object(single_pass, "fuse", lambda part: None):
            (self.part,) = get_megatron_optimizer(config, [self.ddp]).chained_optimizers
        self.elements = sum(param.numel() for param in net.parameters())
        self.times: dict[str, list[float]] = {part: [] for part in PARTS}

    def step(self, gradients: torch.Tensor) -> float:
        """Take one step; returns the norm of its gradients."""
        (buffer,) = self.ddp.buffers
        buffer.grad_data.copy_(gradients[: buffer.numel]).mul_(self.part.get_loss_scale())
        took, norm, _ = self.part.step()
        assert took and norm > 1.0, "a step that clips is to be measured"
        for part, timer in PARTS.items():
            known = timer in self.timers._timers
            self.times[part].append(self.timers(timer, log_level=1).elapsed(reset=True) * 1e3 if known else 0.0)
        return float(norm)


def measure(rounds: int) -> dict[str, Any]:
    """Step bf16 and fp16, ``rounds`` of each; returns milliseconds, and what they were measured on."""
    device = alone.device()
    made = about(device, "megatron-core")
    with alone.megatron(device):
        results = {name: _measure(getattr(torch, name), rounds) for name in ("bfloat16", "float16")}
    return {**made, "rounds": rounds, "unit": "ms, median", "results": results}


def _measure(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Step both sides in turn; returns the median milliseconds of every part and of their sum."""
    sides = {"separate": Side(dtype, merged=False), "single": Side(dtype, merged=True)}
    size = max(buffer.numel for side in sides.values() for buffer in side.ddp.buffers)
    for round_ in range(WARM_UP + rounds):
        torch.manual_seed(round_)
        gradients = torch.randn(size, device="cuda") * 1e-2  # in a rehearsal that is the CPU
        # Who goes second finds a warmer or a colder cache.
        order = list(sides.values())[:: 1 if round_ % 2 else -1]
        norms = [side.step(gradients) for side in order]
        assert abs(norms[0] / norms[1] - 1) < 1e-5, norms
    result: dict[str, Any] = {"parameters": sides["single"].elements}
    for name, side in sides.items():
        timed = {part: times[WARM_UP:] for part, times in side.times.items()}
        timed["total"] = [sum(parts) for parts in zip(*timed.values(), strict=True)]
        result[name] = {part: round(statistics.median(times), 3) for part, times in timed.items()}
    result["ratio"] = round(result["single"]["total"] / result["separate"]["total"], 3)
    return result


def tables(measured: dict[str, Any]) -> Iterator[Table]:
    """Lay out a table a precision."""
    for precision, result in measured["results"].items():
        table = Table(title=f"{precision}: one step of {result['parameters']:,} parameters, ms")
        for column in ("part", "separate passes", "single pass", "ratio"):
            table.add_column(column, justify="left" if column == "part" else "right")
        for part, before in result["separate"].items():
            after = result["single"][part]
            table.add_row(part, f"{before:.2f}", f"{after:.2f}", f"{after / before:.2f}" if before else "-")
        yield table
