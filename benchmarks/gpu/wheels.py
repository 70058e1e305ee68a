"""The wheels that a bare GPU machine lacks: made where there is a network, installed there, where there is none.

    python -m benchmarks.gpu.wheels         # makes .whl/ anew; make gpu-wheels

Versions are those of constraints.txt. The machine is Linux on x86-64 with CPython 3.12.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".whl"
MOST_BYTES = 25 * 10**6
# By the name that Python imports them by. What such a machine has by itself is not carried.
CARRIED = {
    "filelock": "filelock",
    "megatron-core": "megatron.core",
    "omegaconf": "omegaconf",
    "deepspeed": "deepspeed",
    "hjson": "hjson",
    "rich": "rich",
    "markdown-it-py": "markdown_it",
    "mdurl": "mdurl",
    "Pygments": "pygments",
    "psutil": "psutil",
    "pytest": "pytest",
    "iniconfig": "iniconfig",
    "pluggy": "pluggy",
    "packaging": "packaging",
    "pytest-timeout": "pytest_timeout",
    "pytest-xdist": "xdist",
    "execnet": "execnet",
    "typer": "typer",
    "shellingham": "shellingham",
    "annotated-doc": "annotated_doc",
    "PyYAML": "yaml",
    "tqdm": "tqdm",
    "einops": "einops",
    "msgpack": "msgpack",
    "py-cpuinfo": "cpuinfo",
    "ninja": "ninja",
    "pydantic": "pydantic",
    "pydantic_core": "pydantic_core",
    "annotated-types": "annotated_types",
    "typing-inspection": "typing_inspection",
    "py-spy": "py_spy",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "pytorch-optimizer": "pytorch_optimizer",
    "schedulefree": "schedulefree",
}
# What make gpu-evidence takes of them; torch brings filelock.
FOR_EVIDENCE = ("pytorch-optimizer", "schedulefree", "PyYAML", "rich", "markdown-it-py", "mdurl", "Pygments")
OWN = ("rich", "psutil", "pytest", "pytest_timeout")  # without which there is no visit
BUILT = "deepspeed"  # has no wheel of its own
REPACKED = "bitsandbytes"  # 43 MB, with a library for every CUDA
_KEPT = re.compile(r"libbitsandbytes_(cuda130|cpu)\.so$")
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28)] + ["manylinux2014_x86_64"]


def main() -> None:
    """Make the folder anew; the old one stays where something fails."""
    versions = pinned((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".whl-") as name:
        made = Path(name)
        for package in CARRIED:
            print(f"{package} {versions[package]}", flush=True)
            (build if package == BUILT else download)(package, versions[package], made)
        for wheel in made.glob(f"{REPACKED}-*.whl"):
            repack(wheel)
        wheels = sorted(made.glob("*.whl"))
        size = sum(wheel.stat().st_size for wheel in wheels)
        if size > MOST_BYTES:
            sys.exit(f"the wheels have {size / 1e6:.1f} MB, and at most {MOST_BYTES / 1e6:g} travel: carry fewer")
        shutil.rmtree(FOLDER, ignore_errors=True)
        made.chmod(0o755)  # whoever visits the GPU may be another user
        made.rename(FOLDER)
        made.mkdir()  # for the context manager to remove
    print(f"{len(wheels)} wheels, {size / 1e6:.1f} MB, in {FOLDER.name}/")


def pinned(constraints: str) -> dict[str, str]:
    """Read the version of every carried package; raises KeyError for one that is not pinned."""
    lines = [line.partition("==") for line in constraints.splitlines() if not line.startswith("#")]
    known = {_normal(name): version for name, _, version in lines}
    return {name: known[_normal(name)] for name in CARRIED}


def download(package: str, version: str, folder: Path) -> None:
    """Fetch the wheel for the machine, whatever this one is."""
    target = ["--python-version", "3.12", "--implementation", "cp", *(f"--platform={name}" for name in _PLATFORMS)]
    _pip("download", "--no-deps", "--only-binary=:all:", *target, "-d", str(folder), f"{package}=={version}")


def build(package: str, version: str, folder: Path) -> None:
    """Make a wheel of a package that has its sources only; DeepSpeed's C++ is compiled where it is used."""
    _pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), f"{package}=={version}", DS_BUILD_OPS="0")


def _pip(*words: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    if subprocess.run(command, env={**os.environ, **environment}, check=False).returncode:
        sys.exit(f"no wheel: {' '.join(words)} failed, see above; is there a network?")


def repack(wheel: Path) -> None:
    """Leave out of bitsandbytes what is for other GPUs and other versions of CUDA."""
    beside = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        left_out = {name for name in old.namelist() if re.search(r"lib[^/]*\.so$", name) and not _KEPT.search(name)}
        for name in old.namelist():
            content = old.read(name)
            if name.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines()
                content = "".join(f"{line}\n" for line in lines if line.partition(",")[0] not in left_out).encode()
            if name not in left_out:
                new.writestr(name, content)
    beside.replace(wheel)


def install(folder: Path, site: Path, limit: float) -> dict[str, str]:
    """Unpack the wheels of ``folder`` into ``site``, in ``limit`` seconds, without a network; none where all is here.

    All that fit this Python: what the machine has of them is of other versions, which were not tried together. Returns
    the modules that are missing all the same, and why, in one line each.
    """
    absent = {package: module for package, module in CARRIED.items() if not is_installed(module)}
    if not absent:
        return {}
    wheels = sorted(folder.glob("*.whl"))
    fitting = [path for path in wheels if _fits(path.name)]
    names = {_package(path): path.name for path in wheels}
    missing = {}
    for package, module in absent.items():
        if (name := names.get(_normal(package))) is None:
            missing[module] = f"{package} is neither installed nor in {folder.name}/: make gpu-wheels"
        elif not _fits(name):
            missing[module] = f"{name} is for another Python than this {platform.python_version()}: take 3.12"
    complaint = _unpack(fitting, site, limit) if fitting else None
    return missing if complaint is None else {**dict.fromkeys(absent.values(), complaint), **missing}


def _unpack(wheels: list[Path], site: Path, limit: float) -> str | None:
    """Have pip do it; returns its complaint."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site), *map(str, wheels)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"pip did not unpack the wheels in {limit:.0f} s"
    return None if done.returncode == 0 else " ".join((done.stdout + done.stderr).split())


def carried(package: str, folder: Path = FOLDER) -> Path | None:
    """Return the wheel of a package that is for this Python."""
    return next((p for p in folder.glob("*.whl") if _package(p) == _normal(package) and _fits(p.name)), None)


def _fits(name: str) -> bool:
    """Whether a wheel is for this Python, by its name."""
    ours = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return any(tag in name for tag in (f"-{ours}-", "-py3-", "-py2.py3-", "-abi3-"))


def _package(wheel: Path) -> str:
    return _normal(wheel.name.partition("-")[0])


def is_installed(module: str) -> bool:
    """Whether this Python has a module, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent
        return False


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
