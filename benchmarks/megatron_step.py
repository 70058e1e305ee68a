"""The time of one optimizer step inside Megatron, by part: S3 with the host's separate passes, and with its single one.

    python benchmarks/megatron_step.py [--rounds 15] [--json benchmarks/results/megatron_step.json]

One process, on a GPU or in Megatron's rehearsal on the CPU, a GPT of 20 million parameters under DistributedOptimizer,
random gradients in its buffers, clipped at every step. Two copies of the model take turns, and Megatron's own timers
measure the parts, so both runs are the same host code but for what S3 replaces. Medians, in milliseconds.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import sys
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from s3_megatron import __version__, rehearsal

# isort: split  (the rehearsal has to come before Megatron is imported)
GPU = torch.cuda.is_available()
if not GPU:
    rehearsal.activate()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.timers import Timers  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

from s3_megatron.engines.megatron import S3OptimizerConfig, install, single_pass  # noqa: E402

install()

from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402  (the installed one)

WIDTH, LAYERS, VOCABULARY, LENGTH = 384, 8, 8192, 128
WARM_UP = 3
MACHINE = torch.cuda.get_device_name() if GPU else f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
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


def measure(dtype: torch.dtype, rounds: int) -> dict[str, object]:
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
    result: dict[str, object] = {"parameters": sides["single"].elements}
    for name, side in sides.items():
        timed = {part: times[WARM_UP:] for part, times in side.times.items()}
        timed["total"] = [sum(parts) for parts in zip(*timed.values(), strict=True)]
        result[name] = {part: round(statistics.median(times), 3) for part, times in timed.items()}
    separate, single = result["separate"], result["single"]
    assert isinstance(separate, dict) and isinstance(single, dict)
    result["ratio"] = round(single["total"] / separate["total"], 3)
    return result


def show(results: dict[str, dict[str, object]]) -> None:
    """Print a table a precision."""
    for precision, result in results.items():
        table = Table(title=f"{precision}: one step of {result['parameters']:,} parameters, ms")
        for column in ("part", "separate passes", "single pass", "ratio"):
            table.add_column(column, justify="left" if column == "part" else "right")
        separate, single = result["separate"], result["single"]
        assert isinstance(separate, dict) and isinstance(single, dict)
        for part, before in separate.items():
            ratio = f"{single[part] / before:.2f}" if before else "-"
            table.add_row(part, f"{before:.2f}", f"{single[part]:.2f}", ratio)
        Console().print(table)


def main() -> None:
    """Measure bf16 and fp16, print, and write the file that was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="steps of each side that count (default: 15)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # Megatron lists every parameter
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29555", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("nccl" if GPU else "gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    results = {name: measure(getattr(torch, name), args.rounds) for name in ("bfloat16", "float16")}
    show(results)
    if args.json is not None:
        record = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": " ".join(["python", "benchmarks/megatron_step.py", *sys.argv[1:]]),
            "machine": MACHINE,
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "megatron-core")} | {"s3-megatron": __version__},
            "rounds": args.rounds,
            "unit": "ms, median",
            **results,
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
