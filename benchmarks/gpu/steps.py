"""The steps of a visit to a GPU, in order of worth, and the same steps on a CPU for a rehearsal of it."""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.runner import Step

ROOT = Path(__file__).resolve().parents[2]
KERNEL = ["tests/gpu/test_triton.py", "tests/gpu/test_softsignum.py"]
SMALL = "oracles or alignment or aligned"  # of the kernel's tests: what a memory checker can run in seconds
# Of what is carried (benchmarks/gpu/wheels.py), by what imports it.
HOSTS = ("omegaconf", "yaml", "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "megatron.core")
DEEPSPEED = (*HOSTS, "deepspeed", "hjson", "tqdm", "einops", "msgpack", "cpuinfo", "ninja")
COMMANDS = ("typer", "shellingham", "annotated_doc")


def steps(folder: Path, dry: bool) -> list[Step]:
    """All of them; junit files and what a step keeps go into ``folder``."""
    real = _real(folder, sys.executable)
    if not dry:
        return real
    needed = {step.name: step.modules for step in real}
    return [replace(step, gpu=False, modules=needed[step.name]) for step in _dry(folder, sys.executable)]


def _real(folder: Path, python: str) -> list[Step]:
    build = "from s3_megatron.bench.contenders import contenders; print(*contenders('cuda')[1], sep='\\n')"
    sizes = [word for size in (30_000_000, 345_000_000, 1_000_000_000) for word in ("--parameters", str(size))]
    bench = [python, "-m", "s3_megatron.cli", "bench"]
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    checked = _pytest(python, folder, "memcheck", [*KERNEL, "-k", SMALL])
    # All variants have that name and take turns: after three launches comes the second of the kernel as it is.
    profiler = ["ncu", "--clock-control", "none", "--kernel-name", "regex:s3_step", "--launch-skip", "3"]
    profiler += ["--launch-count", "1"]
    for section in ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats"):
        profiler += ["--section", section]
    variants = [python, "-m", "benchmarks.gpu.variants"]
    training = [python, "-m", "benchmarks.gpu.training"]
    return [
        Step("health", 1, 60, _health(python, folder)),
        Step("kernel", 1, 100, _pytest(python, folder, "kernel", KERNEL, ranks=4), gib=20),
        Step("optimizer", 1, 100, _pytest(python, folder, "optimizer", ["tests/gpu/test_optimizer.py"])),
        Step(
            *("engines", 1, 150, _pytest(python, folder, "engines", ["tests/gpu/test_engines.py"], ranks=6)),
            modules=DEEPSPEED,
            gib=40,
        ),
        Step(
            *("memcheck", 1, 120, [*sanitizer, *checked]),
            programs=("compute-sanitizer",),
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
        Step("rivals", 1, 120, [python, "-c", build], modules=DEEPSPEED),
        Step("variants", 2, 60, [*variants, "--elements", "5e8"], gib=14),
        Step(
            *("bench", 3, 80, [*bench, "step", "--device", "cuda", *sizes, "--json", str(folder / "bench.json")]),
            modules=COMMANDS,
            gib=40,
        ),
        Step("345m-s3", 4, 60, [*training, "s3"], modules=HOSTS, gib=50),
        Step("345m-adamw", 5, 60, [*training, "adamw"], modules=HOSTS, gib=50),
        Step(
            *("megatron-step", 6, 40, [*bench, "megatron-step", "--rounds", "9"]),
            modules=(*HOSTS, *COMMANDS),
            gib=4,
        ),
        Step(
            *("deepspeed-step", 6, 40, [*bench, "deepspeed-step", "--rounds", "9"]),
            modules=(*DEEPSPEED, *COMMANDS),
            gib=4,
        ),
        Step("ncu", 7, 60, [*profiler, *variants, "--elements", "1e8", "--rounds", "1"], programs=("ncu",), gib=4),
    ]


def _dry(folder: Path, python: str) -> list[Step]:
    """The same programs and options, small, in the interpreter and the rehearsal; profiler and checker are left out."""
    interpreted = {"TRITON_INTERPRET": "1"}
    few = ["-k", "oracles and types1 and 3 or aligned or capture or stream or synchronises"]
    variants = [python, "-m", "benchmarks.gpu.variants", "--device", "cpu", "--elements", "2048", "--rounds", "1"]
    bench = [python, "-m", "s3_megatron.cli", "bench"]
    small = ["step", "--device", "cpu", "--parameters", "20011", "--repeats", "1"]
    build = "from s3_megatron.bench.contenders import contenders; print(*contenders('cpu')[1], sep='\\n')"
    training = [python, "-m", "benchmarks.gpu.training", "--dry"]
    tests = {"kernel": [*KERNEL, *few], "optimizer": ["tests/gpu/test_optimizer.py"]}
    return [
        Step("health", 1, 60, [*_health(python, folder), "--cpu"]),
        *(
            Step(name, 1, 200, _pytest(python, folder, name, words), environment=interpreted)
            for name, words in tests.items()
        ),
        Step("engines", 2, 300, _pytest(python, folder, "engines", ["tests/gpu/test_engines.py"])),
        Step(
            *("memcheck", 1, 200, _pytest(python, folder, "memcheck", [*KERNEL, "-k", "aligned"])),
            environment=interpreted,
        ),
        Step("rivals", 1, 300, [python, "-c", build]),
        Step("variants", 3, 200, variants, environment=interpreted),
        Step("bench", 3, 200, [*bench, *small, "--json", str(folder / "bench.json")]),
        Step("345m-s3", 4, 200, [*training, "s3"]),
        Step("345m-adamw", 4, 200, [*training, "adamw"]),
        Step("megatron-step", 5, 200, [*bench, "megatron-step", "--rounds", "1"]),
        Step("deepspeed-step", 5, 200, [*bench, "deepspeed-step", "--rounds", "1"]),
    ]


def _pytest(python: str, folder: Path, name: str, words: Sequence[str], ranks: int = 0) -> list[str]:
    side_by_side = ["-n", str(ranks)] if ranks and importlib.util.find_spec("xdist") else []
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *side_by_side, *words]
    return [*command, f"--junitxml={folder / name}.xml"]


def _health(python: str, folder: Path) -> list[str]:
    command = [python, "-m", "s3_megatron.jobs.node.health", "--run-dir", str(folder), "--attempt", "gpu"]
    return [*command, "--gpus", "1", "--min-free-gib", "1", "--min-free-inodes", "1", "--scratch", str(folder)]
