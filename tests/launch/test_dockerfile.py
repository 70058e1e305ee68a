"""The Dockerfile, as far as it can be held to its word without Docker.

What only Docker can show is not tested: that the images' tags exist, and that the build runs through.
"""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement

from tests.launch.dockerfile import ROOT, copy_context, instructions, normalized, pip_installs, target

# What NVIDIA's container has built for its GPUs, or what would bring another torch along.
BUILT = {"torch", "triton", "pytorch-triton", "transformer-engine", "apex", "flash-attn", "torchvision", "nvidia-nccl"}
EXTRAS = {"megatron", "deepspeed", "data", "jobs"}


def wanted(name: str, extras: frozenset[str] = frozenset()) -> set[str]:
    """What an installed distribution asks for here, one step deep."""
    asked = (Requirement(line) for line in requires(name) or ())
    met = (one for one in asked if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in {"", *extras}))
    return {normalized(one.name) for one in met}


def everything(names: set[str]) -> set[str]:
    """The names and all that they ask for, at any depth."""
    seen: set[str] = set()
    while names:
        name = names.pop()
        seen.add(name)
        try:
            names |= wanted(name) - seen
        except PackageNotFoundError:
            assert name == "py-spy", f"{name} is not installed here: run make"
    return seen


def own_requirements() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    return {normalized(Requirement(line).name) for line in lines}


def named(arguments: list[str]) -> set[str]:
    """The packages in one ``pip install``, without its options and their values."""
    values = {arguments[i + 1] for i, one in enumerate(arguments) if one == "--constraint"}
    return {normalized(one) for one in arguments if not one.startswith("-") and one not in values}


def test_hadolint_finds_nothing_and_no_rule_is_off_for_the_whole_file() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, timeout=250)
    assert (found.returncode, found.stdout) == (0, ""), found.stdout + found.stderr
    assert not list(ROOT.glob(".hadolint.y*ml")) and "global ignore" not in (ROOT / "Dockerfile").read_text()


def test_base_images_are_pinned() -> None:
    """A release of NVIDIA's container (year, month), a patch release of Python."""
    defaults = dict(value.split("=", 1) for instruction, value in instructions() if instruction == "ARG")
    bases = [value for instruction, value in instructions() if instruction == "FROM"]
    full = [re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], base) for base in bases]
    assert len(full) == 2
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3 AS gpu", full[0])
    assert re.fullmatch(r"python:3\.12\.\d+-slim-bookworm AS cpu", full[1])


def test_pip_cannot_replace_what_the_gpu_container_brings() -> None:
    """Either pip follows no requirement, or it is held to the container's versions, and none leads to torch."""
    commands = pip_installs("gpu")
    assert len(commands) == 3
    for arguments in commands:
        assert not named(arguments) & BUILT
        assert not {"--upgrade", "-U", "--force-reinstall", "--ignore-installed", "--pre"} & set(arguments)
        if "--no-deps" not in arguments:
            assert arguments[:2] == ["--constraint", "container.txt"]
            assert not everything(named(arguments)) & BUILT


def test_gpu_image_has_all_that_is_asked_for_but_torch() -> None:
    needs, bare, _ = map(named, pip_installs("gpu"))
    asked = (
        own_requirements()
        | wanted("megatron-core", frozenset({"training"}))
        | wanted("deepspeed")
        | wanted("accelerate")
    )
    assert needs | bare == asked - {"torch"}


def test_gpu_build_stops_where_a_package_of_the_container_changed(tmp_path: Path) -> None:
    """The line that compares the lists before and after, run as it stands."""
    check = next(value for instruction, value in target("gpu") if instruction == "RUN" and "comm" in value)
    line = check.split("&&")[1]
    before, same = "apex==0.1\ntorch==2.9.0a0+5\n", "apex==0.1\nrich==15.0.0\ntorch==2.9.0a0+5\n"
    for after, code in ((same, 0), (before.replace("2.9.0a0+5", "2.9.1"), 1), (before.replace("apex==0.1\n", ""), 1)):
        (tmp_path / "container.txt").write_text(before)
        (tmp_path / "now.txt").write_text(after)
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", line], cwd=tmp_path, capture_output=True, timeout=100)
        assert done.returncode == code, (after, done)


def test_what_is_copied_installs(tmp_path: Path) -> None:
    """The package built from the copied files alone has what the one built from all of the project would have."""
    for name in ("gpu", "context"):
        copy_context(name.replace("context", "cpu"), tmp_path / name)
    gpu, cpu = (
        {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*")} for name in ("gpu", "context")
    )
    assert gpu ^ cpu == {"pins.txt", "constraints.txt"}
    # No compiler: that the kernel compiles is tested elsewhere, and a failure does not stop an installation.
    env = {**os.environ, "CXX": "false"}
    command = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        ".",
        "./context",
    ]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=250)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "s3_megatron").rglob("*.py")}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "s3_megatron/kernels/cpu").glob("*.cpp")}
    settings = {f"s3_megatron/jobs/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    templates = {f"s3_megatron/jobs/templates/{path.name}" for path in (ROOT / "launch/slurm").glob("*.j2")}
    patches = {f"s3_megatron/patch/{path.relative_to(ROOT)}" for path in (ROOT / "patches").rglob("*.*")}
    assert not (code | sources | settings | templates | patches) - packed


def test_images_hold_no_secret_and_run_without_root() -> None:
    for name in ("gpu", "cpu"):
        steps = target(name)
        assert [value for instruction, value in steps if instruction == "USER"] == ["1000:1000"]
        given = [value.split("=")[0] for instruction, value in steps if instruction == "ARG"]
        assert given == ["GIT_COMMIT"], "a build argument stays readable in the image's history"
        assert any(instruction == "LABEL" and 'revision="${GIT_COMMIT}"' in value for instruction, value in steps)
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"
