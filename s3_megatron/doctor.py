"""What this machine has for training with S3, what is missing, and how to get it."""

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import s3_megatron
from s3_megatron import machine
from s3_megatron.finding import ERROR, OK, WARNING, Finding
from s3_megatron.optim import registry

# Seconds; a cold import of torch from a network disk takes a minute.
PATIENCE = 180
# A busy machine looks like a package that hangs.
AGAIN = "run doctor again while nothing else runs here"

# Each in its own process: a broken package may end or hang the one that imports it. `found` is printed.
PROBES = {
    "torch": """
import torch
cuda = torch.cuda.is_available()
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
found["gpus"] = [[gpu.name, gpu.total_memory] for gpu in gpus]
found["cuda"] = torch.version.cuda
found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if cuda else None
""",
    "megatron": """
import torch
from megatron.core.package_info import __version__
found["version"] = __version__
from s3_megatron import rehearsal
if not torch.cuda.is_available():
    rehearsal.activate()
from s3_megatron.engines.megatron import install
install()
import megatron.training.training
""",
    # Compiles the C++ kernel if it must: half a minute.
    "kernels": """
from s3_megatron.kernels import cpu, triton
obstacles = {"C++": cpu.unavailable(), "Triton": triton.unavailable()}
found["works_on"] = ["any device: foreach"]
if obstacles["C++"] is None:
    found["works_on"].append(f"CPU: C++ ({cpu.loop_name()})")
if obstacles["Triton"] is None:
    from s3_megatron.kernels.triton.trial import fault
    obstacles["Triton"] = fault("cuda")
if obstacles["Triton"] is None:
    found["works_on"].append("GPU: Triton")
found["obstacles"] = {name: obstacle for name, obstacle in obstacles.items() if obstacle}
""",
    "deepspeed": """
import deepspeed
from s3_megatron.engines.deepspeed import register
register()
""",
    "emerging_optimizers": """
from s3_megatron.optim.polar import library
library()
""",
    "sentencepiece": "import sentencepiece",
    "transformers": "import transformers",
    "zstd": """
try:
    import compression.zstd  # Python 3.14
except ImportError:
    import backports.zstd
""",
    "transformer_engine": "import transformer_engine.pytorch",
    # What distinguishes NVIDIA's apex from the unrelated package of that name.
    "apex": "from apex.optimizers import FusedAdam",
}

# Packages print what they like as well; and what one does wrong at the interpreter's end is no matter.
MARK = "s3-megatron doctor: "
PROGRAM = """
import json
found = {{}}
try:
{code}
    found["works"] = True
finally:
    print("\\n{mark}" + json.dumps(found), flush=True)
"""


@dataclass(frozen=True)
class Examination:
    """All rows, and whether a training run can start here in some form."""

    rows: list[Finding]
    can_train: bool


@dataclass(frozen=True)
class _Probe:
    """What a probe found; ``error`` says why it failed, "" where it did not."""

    found: dict[str, Any]
    error: str = ""
    is_slow: bool = False


def examine() -> Examination:
    """Look at everything once: imports take long, so one a core at a time. A broken package is a row."""
    with ThreadPoolExecutor(machine.cores()) as pool:
        probes = dict(zip(PROBES, pool.map(_probe, PROBES.values()), strict=True))
    can_train = not probes["megatron"].error
    rows = [*_machine(), *_core(probes), *_packages(probes), _compiler(), _verdict(probes)]
    return Examination(rows, can_train)


def _machine() -> list[Finding]:
    cores = machine.cores()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return [
        Finding(OK, "Python", f"{platform.python_version()}, {sys.executable}"),
        Finding(OK, "machine", f"{platform.platform()}, {cores} cores, {memory:.0f} GiB"),
        _own_name(),
        Finding(OK, "s3-megatron", s3_megatron.__version__),
    ]


def _own_name() -> Finding:
    """Whether other programs find this machine by its name: torchrun hands it out, over several nodes."""
    name = socket.gethostname()
    try:
        addresses = {found[4][0] for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        advice = "runs on this machine alone need it not; torchrun over several does: add a line to /etc/hosts"
        return Finding(WARNING, "own name", f"{name} does not resolve", advice)
    return Finding(OK, "own name", f"{name}: {', '.join(sorted(map(str, addresses)))}")


def _core(probes: dict[str, _Probe]) -> list[Finding]:
    torch, engine = probes["torch"], probes["megatron"]
    gpus = torch.found.get("gpus", [])
    if torch.error:
        gpu = Finding(ERROR, "GPU", "unknown, torch does not work")
    elif gpus:
        names = ", ".join(f"{name} ({memory / 2**30:.0f} GiB)" for name, memory in gpus)
        gpu = Finding(OK, "GPU", f"{names}; CUDA {torch.found['cuda']}, NCCL {torch.found['nccl']}")
    else:
        driver = shutil.which("nvidia-smi")
        advice = f"nvidia-smi is here, torch (CUDA {torch.found['cuda']}) sees no GPU: check driver and torch"
        gpu = Finding(WARNING, "GPU", "none: runs are rehearsals (CPU, gloo)", advice if driver else "")
    return [
        _package("torch", torch, "torch", "pip install torch", needed=True),
        gpu,
        _megatron(engine),
        _engine(engine, bool(gpus), has_polar=not probes["emerging_optimizers"].error),
        _kernels(probes["kernels"], bool(gpus)),
    ]


def _kernels(probe: _Probe, gpu: bool) -> Finding:
    if probe.error:
        return Finding(ERROR, "kernels", probe.error, AGAIN if probe.is_slow else "")
    # Without a GPU its kernel is not missed.
    missed = {name: why for name, why in probe.found["obstacles"].items() if gpu or name != "Triton"}
    advice = "; ".join(f"not {name}: {why}" for name, why in missed.items())
    return Finding(WARNING if missed else OK, "kernels", ", ".join(probe.found["works_on"]), advice)


def _megatron(engine: _Probe) -> Finding:
    # Not by its distribution: a checkout of Megatron-LM has none.
    if version := engine.found.get("version"):
        return Finding(OK, "megatron-core", version)
    if engine.is_slow:
        return Finding(ERROR, "megatron-core", "not known", AGAIN)
    return Finding(ERROR, "megatron-core", "not found", "pip install 's3-megatron[megatron]'")


def _engine(engine: _Probe, gpu: bool, has_polar: bool) -> Finding:
    if engine.error:
        return Finding(ERROR, "engine: Megatron", engine.error, AGAIN if engine.is_slow else "")
    how = "" if gpu else ", with --rehearsal"
    names = " or ".join(spec.name for spec in registry.specs() if has_polar or not spec.beside)
    return Finding(OK, "engine: Megatron", f"works: --optimizer {names}{how}")


def _packages(probes: dict[str, _Probe]) -> list[Finding]:
    data = "pip install 's3-megatron[data]'"
    container = "optional, faster on GPUs: comes with NVIDIA's PyTorch containers"
    return [
        _package("SentencePiece", probes["sentencepiece"], "sentencepiece", f"for tokenizing: {data}"),
        _package("transformers", probes["transformers"], "transformers", f"for gpt2 and hf: tokenizers: {data}"),
        _package("Zstandard", probes["zstd"], "backports.zstd", f"for .zst input: {data}"),
        _package(
            "DeepSpeed",
            probes["deepspeed"],
            "deepspeed",
            'for {"type": "S3"} in DeepSpeed: pip install \'s3-megatron[deepspeed]\'',
        ),
        _package(
            "emerging-optimizers",
            probes["emerging_optimizers"],
            "emerging-optimizers",
            "for SoftMuon: pip install 's3-megatron[softmuon]'",
        ),
        _package("Transformer Engine", probes["transformer_engine"], "transformer_engine", container),
        _apex(probes["apex"], container),
    ]


def _package(name: str, probe: _Probe, distribution: str, advice: str, needed: bool = False) -> Finding:
    state = ERROR if needed else WARNING
    version = _version(distribution)
    if probe.is_slow:
        found = f"{version or 'version unknown'}, not known to work: {probe.error}"
        return Finding(state, name, found, f"{AGAIN}; if that changes nothing, install it again: {advice}")
    if version is None and probe.error:
        return Finding(state, name, "not installed", advice)
    if probe.error:
        return Finding(state, name, f"{version}, broken: {probe.error}", f"install it again: {advice}")
    return Finding(OK, name, version or "works, version unknown")


def _apex(probe: _Probe, advice: str) -> Finding:
    version = _version("apex")
    if not probe.error:
        return Finding(OK, "NVIDIA apex", version or "works, version unknown")
    if version and version.startswith("0.9.10"):
        return Finding(
            WARNING,
            "NVIDIA apex",
            f"no: the installed apex {version} is an unrelated package of that name from PyPI",
            "pip uninstall apex",
        )
    return _package("NVIDIA apex", probe, "apex", advice)


def _compiler() -> Finding:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler:
        return Finding(OK, "C++ compiler", compiler)
    return Finding(WARNING, "C++ compiler", "none", "for Megatron from source, and DeepSpeed: apt-get install g++ make")


def _verdict(probes: dict[str, _Probe]) -> Finding:
    gpus = len(probes["torch"].found.get("gpus", []))
    if probes["megatron"].error:
        return Finding(ERROR, "training", "not possible here", "mend the errors above, from the top")
    return Finding(OK, "training", f"on {gpus} GPU{'s'[: gpus != 1]}" if gpus else "as a rehearsal without a GPU")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _probe(code: str) -> _Probe:
    program = PROGRAM.format(code=textwrap.indent(code, "    "), mark=MARK)
    try:
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return _Probe({}, f"its import takes more than {PATIENCE} s", is_slow=True)
    answers = [line.removeprefix(MARK) for line in run.stdout.splitlines() if line.startswith(MARK)]
    found = json.loads(answers[0]) if answers else {}
    if found.get("works"):
        return _Probe(found)
    if run.returncode < 0:
        return _Probe(found, f"its import dies of {signal.Signals(-run.returncode).name}")
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    return _Probe(found, lines[-1] if lines else "it gives no reason")
