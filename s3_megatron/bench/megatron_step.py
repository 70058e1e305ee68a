"""The time of one optimizer step inside Megatron, by part: with the host's separate passes, and with the single one.

S3 in bf16 and fp16, and SoftSignum's soft step in bf16. One process, on a GPU or in Megatron's rehearsal on the CPU, a
GPT of 20 million parameters under DistributedOptimizer, random gradients in its buffers, clipped at every step. Two
copies of the model take turns, and Megatron's own timers measure the parts, so both runs are the same host code but for
what is replaced. Medians, in milliseconds.
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
from s3_megatron.optim import registry
from s3_megatron.optim.spec import Spec

WIDTH, LAYERS, VOCABULARY, LENGTH = 384, 8, 8192, 128
WARM_UP = 3
# Precision, optimizer, and what its configuration has beside: all steps of SoftSignum are soft.
RUNS: tuple[tuple[str, str, dict[str, int]], ...] = (
    ("bfloat16", "s3", {}),
    ("float16", "s3", {}),
    ("bfloat16", "softsignum", {"softsignum_sign_iters": 0, "softsignum_transition_iters": 10**6}),
)
# Megatron's timers (0.19.2, MixedPrecisionOptimizer), by what a reader calls them.
PARTS = {
    "unscale": "optimizer-unscale-and-check-inf",
    "clip": "optimizer-clip-main-grad",
    "step": "optimizer-inner-step",
    "copy": "optimizer-copy-main-to-model-params",
}


class Side:
    """A model and its optimizer, with or without the single pass."""

    def __init__(self, dtype: torch.dtype, spec: Spec, own: dict[str, int], merged: bool) -> None:
        """Build both; the weights are the same on either side."""
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.optimizer import get_megatron_optimizer
        from megatron.core.timers import Timers
        from megatron.core.transformer import TransformerConfig

        from s3_megatron.engines.megatron import single_pass
        from s3_megatron.engines.megatron.config import config_class

        torch.manual_seed(1)
        shape = TransformerConfig(num_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=8, params_dtype=dtype)
        net = GPTModel(shape, get_gpt_layer_local_spec(), vocab_size=VOCABULARY, max_sequence_length=LENGTH)
        net = net.to(dtype).cuda()
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.ddp = DistributedDataParallel(shape, ddp, net)
        self.timers = Timers(1, "max")
        config = config_class(spec)(
            **own,
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
    """Step each of RUNS ``rounds`` times; returns milliseconds, and what they were measured on."""
    device = alone.device()
    made = about(device, "megatron-core")
    with alone.megatron(device):
        results = {}
        for precision, name, own in RUNS:
            spec = registry.find(name)
            assert spec is not None
            title = precision if spec is registry.S3 else f"{precision}, {spec.title}"
            results[title] = _measure(getattr(torch, precision), spec, own, rounds)
    return {**made, "rounds": rounds, "unit": "ms, median", "results": results}


def _measure(dtype: torch.dtype, spec: Spec, own: dict[str, int], rounds: int) -> dict[str, Any]:
    """Step both sides in turn; returns the median milliseconds of every part and of their sum."""
    sides = {"separate": Side(dtype, spec, own, merged=False), "single": Side(dtype, spec, own, merged=True)}
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
