"""A rehearsed iteration of the tiny GPT in bf16, with products in float32 and with torch's own, against one in float32.

    python benchmarks/rehearsal_products.py [--rounds 5] [--dropout 0.1] [--json FILE]

configs/model/gpt2_tiny.yaml on one rank and one thread: Megatron's GPT, its distributed optimizer and S3, 8 sequences
an iteration. The sides take turns. ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 make a
better CPU one that has AVX2 alone.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from s3_megatron import rehearsal
from s3_megatron.rehearsal import products

os.environ["S3_REHEARSAL_PRODUCTS"] = "torch"  # the sides choose for themselves
rehearsal.activate()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

from s3_megatron.engines.megatron import S3OptimizerConfig, install  # noqa: E402

install()

from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402  (the installed one)

SEQUENCE, SEQUENCES, VOCABULARY = 128, 8, 4096
WARM_UP = 1


class Side:
    """A model of its own, and how its products are computed."""

    def __init__(self, dtype: torch.dtype, in_float32: bool, dropout: float) -> None:
        """Build the model and its optimizer."""
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


def measure(rounds: int, dropout: float) -> dict[str, float]:
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


def main() -> None:
    """Measure, print, and write the file that was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="iterations of each side that count (default: 5)")
    parser.add_argument("--dropout", type=float, default=0.0, help="of both kinds (default: 0, the recipe's)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # Megatron lists every parameter
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    result = measure(args.rounds, args.dropout)

    cpu = torch.cpu.get_capabilities()
    limits = {
        name: os.environ[name]
        for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
        if name in os.environ
    }
    machine = f"{cpu.get('cpu_name', cpu['architecture'])}, {torch.backends.cpu.get_cpu_capability()} {limits or ''}"
    table = Table(title=f"One iteration, dropout {args.dropout}: {machine}")
    for column in ("side", "ms", "x float32"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for name, milliseconds in result.items():
        table.add_row(name, f"{milliseconds:.0f}", f"{milliseconds / result['float32']:.2f}")
    Console().print(table)
    if args.json is not None:
        record = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": " ".join(["python", "benchmarks/rehearsal_products.py", *sys.argv[1:]]),
            "machine": machine.strip(),
            "versions": {name: version(name) for name in ("torch", "megatron-core", "s3-megatron")},
            "rounds": args.rounds,
            "unit": "ms, median",
            **result,
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
