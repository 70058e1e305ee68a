"""A rehearsed iteration of the tiny GPT in bf16, with products in float32 and with torch's own, against one in float32.

configs/model/gpt2_tiny.yaml on one rank and one thread: Megatron's GPT, its distributed optimizer and S3, 8 sequences
an iteration. The sides take turns. ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 make a
better CPU one that has AVX2 alone.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.table import Table

from s3_megatron.bench import alone
from s3_megatron.bench.about import about
from s3_megatron.rehearsal import products

SEQUENCE, SEQUENCES, VOCABULARY = 128, 8, 4096
WARM_UP = 1


class Side:
    """A model of its own, and how its products are computed."""

    def __init__(self, dtype: torch.dtype, in_float32: bool, dropout: float) -> None:
        """Build the model and its optimizer."""
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.optimizer import get_megatron_optimizer
        from megatron.core.transformer import TransformerConfig

        from s3_megatron.engines.megatron import S3OptimizerConfig

        self.in_float32 = in_float32
        precision = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16, "params_dtype": dtype}
        config = TransformerConfig(
            num_layers=4,
            hidden_size=192,
            num_attention_heads=6,
            hidden_dropout=dropout,
            attention_dropout=dropout,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            gradient_accumulation_fusion=False,
            **precision,
        )
        net = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, SEQUENCE).to(dtype)
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.model = DistributedDataParallel(config, ddp, net)
        settings = S3OptimizerConfig(
            optimizer="s3", lr=1e-3, min_lr=0.0, weight_decay=0.1, use_distributed_optimizer=True, **precision
        )
        self.optimizer = get_megatron_optimizer(settings, [self.model])
        self.seconds: list[float] = []

    def iterate(self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> None:
        """Train one iteration, and note how long it took."""
        undo: Callable[[], Any] = products.compute_in_float32(list(products.NAMES)) if self.in_float32 else int
        start = time.perf_counter()
        self.model.zero_grad_buffer()
        loss = self.model(tokens, positions, mask, labels=tokens.roll(-1, 1)).float().mean()
        self.optimizer.scale_loss(loss).backward()
        self.model.finish_grad_sync()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        undo()


def measure(rounds: int, dropout: float) -> dict[str, Any]:
    """Train ``rounds`` iterations of every side; returns milliseconds, and what they were measured on."""
    os.environ["S3_REHEARSAL_PRODUCTS"] = "torch"  # the sides choose for themselves
    torch.set_num_threads(1)
    with alone.megatron("cpu"):
        results = _measure(rounds, dropout)
    made = about("cpu", "megatron-core")
    return {**made, "rounds": rounds, "dropout": dropout, "unit": "ms, median", "results": results}


def _measure(rounds: int, dropout: float) -> dict[str, float]:
    """Let the sides take turns; returns each one's median milliseconds."""
    sides = {
        "float32": Side(torch.float32, False, dropout),
        "bf16, products in float32": Side(torch.bfloat16, True, dropout),
        "bf16, torch's products": Side(torch.bfloat16, False, dropout),
        "fp16, products in float32": Side(torch.float16, True, dropout),
        "fp16, torch's products": Side(torch.float16, False, dropout),
    }
    positions = torch.arange(SEQUENCE).expand(SEQUENCES, SEQUENCE)
    mask = torch.ones(SEQUENCES, 1, SEQUENCE, SEQUENCE).triu(1).bool()
    for _ in range(WARM_UP + rounds):
        tokens = torch.randint(VOCABULARY, (SEQUENCES, SEQUENCE))
        for side in sides.values():
            side.iterate(tokens, positions, mask)
    return {name: round(statistics.median(side.seconds[WARM_UP:]) * 1e3, 1) for name, side in sides.items()}


def tables(measured: dict[str, Any]) -> Iterator[Table]:
    """Lay out the table."""
    limits = " ".join(f"{name}={value}" for name, value in measured["limits"].items())
    machine = f"{measured['processor']}, {torch.backends.cpu.get_cpu_capability()} {limits}".strip()
    table = Table(title=f"One iteration, dropout {measured['dropout']:g}: {machine}")
    for column in ("side", "ms", "x float32"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for name, milliseconds in measured["results"].items():
        table.add_row(name, f"{milliseconds:.0f}", f"{milliseconds / measured['results']['float32']:.2f}")
    yield table
