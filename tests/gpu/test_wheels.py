"""What ``make gpu`` gives a machine without a network: which wheels, and what it says of those that are no use."""

import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import steps, wheels
from tests.launcher import ROOT


def test_wheels_are_pinned_and_repacked(tmp_path: Path) -> None:
    pinned = wheels.pinned((ROOT / "constraints.txt").read_text())
    assert set(pinned) == set(wheels.CARRIED)
    with pytest.raises(KeyError):
        wheels.pinned("torch==2.13.0\n")
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    kept = ["bitsandbytes/libbitsandbytes_cuda130.so", "bitsandbytes/libbitsandbytes_cpu.so", "bitsandbytes/a.py"]
    other, record = "bitsandbytes/libbitsandbytes_cuda121.so", "bitsandbytes-1.dist-info/RECORD"
    with zipfile.ZipFile(wheel, "w") as made:
        for name in (*kept, other):
            made.writestr(name, name)
        made.writestr(record, "".join(f"{name},,\n" for name in (*kept, other, record)))
    wheels.repack(wheel)
    with zipfile.ZipFile(wheel) as repacked:
        assert repacked.namelist() == [*kept, record] and other not in repacked.read(record).decode()
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


WHEEL = "{0}-1-py3-none-any.whl"


def make_wheel(folder: Path, package: str, name: str = WHEEL) -> Path:
    """One that pip takes: a module of the package's name, which says where it is."""
    path = folder / name.format(package)
    about = f"{package}-1.dist-info"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr(f"{package}.py", "CARRIED = True\n")
        made.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        made.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        made.writestr(f"{about}/RECORD", "")
    return path


def test_wheels_that_fit_are_unpacked_and_all_others_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of another Python kept pip from unpacking any."""
    monkeypatch.setattr(wheels, "is_installed", lambda module: module not in ("hjson", "pydantic_core", "torchao"))
    make_wheel(tmp_path, "hjson")
    other = make_wheel(tmp_path, "pydantic_core", "{0}-2.50.4-cp311-cp311-manylinux_2_17_x86_64.whl")
    missing = wheels.install(tmp_path, tmp_path / "site", limit=60)
    assert missing == {
        "pydantic_core": f"{other.name} is for another Python than this {platform.python_version()}: take 3.12",
        "torchao": f"torchao is neither installed nor in {tmp_path.name}/: make gpu-wheels",
    }
    assert (tmp_path / "site/hjson.py").exists() and not (tmp_path / "site/pydantic_core.py").exists()


@pytest.mark.parametrize("harm", ["cut off", "empty", "slow"])
def test_a_wheel_that_cannot_be_unpacked_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    """As a copy to a full disk leaves it. The steps that need none of what is carried run all the same."""
    monkeypatch.setattr(wheels, "is_installed", lambda module: module != "hjson")
    path = make_wheel(tmp_path, "hjson")
    path.write_bytes(path.read_bytes()[: 0 if harm == "empty" else 150] if harm != "slow" else path.read_bytes())
    missing = wheels.install(tmp_path, tmp_path / "site", limit=0.01 if harm == "slow" else 60)
    assert list(missing) == ["hjson"] and "\n" not in missing["hjson"]
    assert ("pip did not unpack the wheels" if harm == "slow" else "hjson") in missing["hjson"]


def test_nothing_is_unpacked_where_all_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "is_installed", lambda module: True)
    assert wheels.install(tmp_path, tmp_path / "site", limit=60) == {} and not (tmp_path / "site").exists()


def test_a_python_without_anything_gets_one_line(tmp_path: Path) -> None:
    """The first import of rich was a traceback on a machine whose Python has torch alone, as docs/kernels.md asks."""
    code = "import runpy, sys; from pathlib import Path; from benchmarks.gpu import wheels; "
    code += f"wheels.FOLDER = Path({str(tmp_path)!r}); sys.argv = ['gpu']; "
    code += "runpy.run_module('benchmarks.gpu', run_name='__main__')"
    environment = {"PATH": os.environ["PATH"]}
    shown = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 2
    assert shown.stderr == f"error: rich is neither installed nor in {tmp_path.name}/: make gpu-wheels\n"


def test_every_module_that_a_step_names_is_carried(tmp_path: Path) -> None:
    needed = {module for step in steps.steps(tmp_path, dry=False) for module in step.modules}
    assert needed <= set(wheels.CARRIED.values()) and set(wheels.OWN) <= set(wheels.CARRIED.values())
    rehearsed = {step.name: step.modules for step in steps.steps(tmp_path, dry=True)}
    assert rehearsed == {step.name: step.modules for step in steps.steps(tmp_path, dry=False) if step.name in rehearsed}
