"""The kernel as it is against variants of it, and against what a copy of the memory reaches.

    python -m benchmarks.gpu.variants [--elements 5e8] [--device cuda|cpu]

Which of its loads a GPU's compiler puts up front decides how much of the memory's bandwidth a step gets, and only a
clock measures what each way costs: "plain" leaves it to the compiler, which saves registers, and "registers" allows it
128 a thread; as it is, the kernel keeps them together. One process, all taking turns; medians of CUDA events. On a CPU,
for a rehearsal, in Triton's interpreter.
"""

import argparse
import importlib.util
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.gpu.runner import write_numbers
from s3_megatron.bench import timing
from s3_megatron.bench.timing import WARM_UP
from s3_megatron.kernels.call import STATES, AnyRule, Columns, Kind, Rule, SoftRule, Step
from s3_megatron.kernels.triton import kernel, step_

ROUNDS = 15
_TOGETHER = "volatile=TOGETHER"
F32, BF16 = torch.float32, torch.bfloat16
# Name: dtypes of the states and of the model's weights, if any, and p, or the tau of SoftSignum, or dtypes of what a
# step has beside; weights and gradients are float32.
CASES: dict[str, tuple[torch.dtype, torch.dtype | None, dict[str, Any]]] = {
    "fp32": (F32, None, {}),
    "bf16 states": (BF16, None, {}),
    "bf16 stochastic": (BF16, None, {"seed": torch.int64}),
    "Megatron bf16": (F32, BF16, {"factor": F32}),
    "p=1.5": (F32, None, {"p": 1.5}),
    "SoftSignum, hard": (F32, None, {"tau": math.inf}),
    "SoftSignum, soft": (F32, None, {"tau": 50.0}),
    "SoftSignum, soft, Megatron bf16": (F32, BF16, {"tau": 50.0, "factor": F32}),
}


class _With:
    """A kernel with options added to every launch."""

    def __init__(self, inner: Any, **options: int) -> None:
        self.inner, self.options = inner, options

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.inner[grid](*args, **kwargs, **self.options)


def variants(folder: Path) -> dict[str, Any]:
    """The kernel, and others made from its source, which are modules in ``folder``."""
    source = Path(kernel.__file__).read_text(encoding="utf-8")
    if source.count(_TOGETHER) != 4:  # weight, gradient, m and r
        raise RuntimeError(f"kernel.py has {source.count(_TOGETHER)} loads with {_TOGETHER}, and 4 were known")
    plain = _compiled(folder, "plain", source.replace(_TOGETHER, "volatile=False"))
    return {"as it is": kernel.s3_step, "plain": plain, "registers": _With(plain, maxnreg=128)}


def _compiled(folder: Path, name: str, source: str) -> Any:
    path = folder / f"s3_variant_{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # Triton looks a function's globals up there
    spec.loader.exec_module(module)
    return module.s3_step


def copied(elements: int, device: str, rounds: int) -> float:
    """10^9 bytes a second of a float32 copy, counting what is read and what is written."""
    source, target = torch.randn(elements, device=device), torch.empty(elements, device=device)
    return 8 * elements / timing.steady(lambda: target.copy_(source), device, rounds) / 1e9


def measure(elements: int, device: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time every case and variant; ``of_copy`` is the share of the copy's bandwidth."""
    ceiling = copied(elements, device, rounds)
    rows: list[dict[str, Any]] = []
    original = kernel.s3_step
    with tempfile.TemporaryDirectory() as name:
        found = variants(Path(name))
        try:
            for case, (state, model, settings) in CASES.items():
                run, size = _problem(elements, device, state, model, dict(settings))
                times: dict[str, list[float]] = {variant: [] for variant in found}
                for _ in range(WARM_UP + rounds):
                    for variant, one in found.items():
                        kernel.s3_step = one
                        times[variant].append(timing.queued(run, device) * 1e3)
                for variant, took in times.items():
                    ms = statistics.median(took[WARM_UP:])
                    rate = size * elements / ms / 1e6
                    rows.append({"case": case, "variant": variant, "ms": ms, "gbps": rate, "of_copy": rate / ceiling})
                del run
        finally:
            kernel.s3_step = original
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU, interpreted"
    return {"device": where, "elements": elements, "copy_gbps": ceiling, "rows": rows}


def _problem(
    elements: int, device: str, state: torch.dtype, model: torch.dtype | None, settings: dict[str, Any]
) -> tuple[Callable[[], None], int]:
    """A step of one tensor, and its bytes an element."""
    x, g = torch.randn(elements, device=device), torch.randn(elements, device=device)
    r = torch.rand(elements, device=device).add_(0.1).to(state)
    m = (r * 0.5).to(state)
    lists: dict[Kind, list[Tensor]] = {"weight": [x], "gradient": [g], "m": [m]}
    rule: AnyRule
    if "tau" in settings:
        rule = SoftRule(torch.tensor(1e-4), 0.9, settings.pop("tau"), weight_decay=0.1, nesterov=False)
    else:
        lists["r"] = [r]
        rule = Rule(torch.tensor(1e-4), 0.95, 0.95, settings.pop("p", 3), weight_decay=0.1, nesterov=True)
    size = 12 + 2 * sum(column[0].element_size() for kind, column in lists.items() if kind in STATES)
    if model is not None:
        lists["model weight"] = [x.to(model)]
        size += lists["model weight"][0].element_size()
    columns = Columns({**lists})
    step = Step(**{name: torch.ones(1, dtype=dtype, device=device) for name, dtype in settings.items()})
    return lambda: step_(columns, rule, step), size


def table(found: dict[str, Any]) -> Table:
    """The rows for a terminal."""
    shown = Table(
        title=f"{found['device']}: {found['elements']:,} weights, copy {found['copy_gbps']:.0f} GB/s", box=None
    )
    for heading in ("case", "kernel", "ms", "GB/s", "of the copy"):
        shown.add_column(heading, justify="left" if heading in ("case", "kernel") else "right")
    for row in found["rows"]:
        shown.add_row(row["case"], row["variant"], f"{row['ms']:.3f}", f"{row['gbps']:.0f}", f"{row['of_copy']:.1%}")
    return shown


def main() -> None:
    """Measure, print, and write the figures where the runner wants them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--elements", type=float, default=5e8, help="weights of a step (default: 5e8)")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu needs TRITON_INTERPRET=1")
    args = parser.parse_args()
    found = measure(int(args.elements), args.device, args.rounds)
    Console(width=100).print(table(found))
    write_numbers(found)


if __name__ == "__main__":
    main()
