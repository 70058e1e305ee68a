"""What `make dist` builds: what is in it, and that it trains where there is no compiler."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import torch

import s3_megatron
from s3_megatron.kernels.cpu import build
from s3_megatron.watch.file import read_metrics

ROOT = Path(__file__).resolve().parents[2]
LINKED = {"s3_megatron/jobs/configs": "configs", "s3_megatron/jobs/templates": "launch/slurm"}
LINKED |= {"s3_megatron/patch/patches": "patches"}


def copy_of_the_checkout(target: Path) -> Path:
    """What git tracks, as it is in the working tree, under a git of its own."""
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, target], check=True)
    changed = ["git", "-C", ROOT, "diff", "HEAD", "--binary"]
    patch = subprocess.run(changed, check=True, capture_output=True).stdout
    if patch:
        subprocess.run(["git", "-C", target, "apply", "--whitespace=nowarn"], input=patch, check=True)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False])
def test_configs_templates_and_patches_are_files_in_a_build(links: bool, tmp_path: Path):
    """git on Windows, and some unpackers of archives, leave a text file where a link was: the package was installed
    without its recipes, and failed at the first command. What an older build left in build/ went into it as well."""
    source = copy_of_the_checkout(tmp_path / "checkout")
    if not links:
        for link in LINKED:
            target = os.readlink(source / link)
            (source / link).unlink()
            (source / link).write_text(target)
    (tmp_path / "lib/s3_megatron").mkdir(parents=True)
    (tmp_path / "lib/s3_megatron/removed_long_ago.py").touch()
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    built = tmp_path / "lib"
    assert not (built / "s3_megatron/removed_long_ago.py").exists()
    assert not [path for path in built.rglob("*") if path.is_symlink()]
    for link, folder in LINKED.items():
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and file.suffix in (".yaml", ".json", ".j2", ".patch", ".txt"):
                assert (built / link / file.relative_to(ROOT / folder)).read_bytes() == file.read_bytes()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder dist/ after two calls, the second by another user's habits; both must give the same bytes.

    About the checkout lies what must not get in: an untracked file, and an older build.
    """
    source = copy_of_the_checkout(tmp_path_factory.mktemp("dist") / "checkout")
    (source / "s3_megatron/untracked.py").touch()
    (source / "s3_megatron/jobs/configs/model/untracked.yaml").touch()
    (source / "build/lib/s3_megatron").mkdir(parents=True)
    (source / "build/lib/s3_megatron/stale.py").touch()
    sums = []
    for habits in ({}, {"TZ": "Asia/Tokyo", "LC_ALL": "C"}):
        command = ["bash", "-c", f'umask {"077" if habits else "022"}; exec "$0" launch/dist.py', sys.executable]
        done = subprocess.run(command, cwd=source, env=os.environ | habits, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        sums.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (source / "dist").iterdir()})
    assert sums[0] == sums[1] and len(sums[0]) == 2
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.mark.dist
def test_the_wheel_has_the_package_and_nothing_else(wheel: Path, tmp_path: Path):
    version, machine = s3_megatron.__version__, os.uname().machine
    assert re.fullmatch(rf"s3_megatron-{version}-py3-none-manylinux_2_\d+_{machine}.*\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        archive.extractall(tmp_path)
    assert {(entry.external_attr >> 16) & 0o170000 for entry in entries} == {0o100000}, "plain files, no links"
    names = {entry.filename for entry in entries}
    assert {name.split("/")[0] for name in names} == {"s3_megatron", f"s3_megatron-{version}.dist-info"}
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "-s", "s3_megatron"], capture_output=True, text=True)
    python = {line.split("\t")[1] for line in tracked.stdout.splitlines() if line.endswith(".py")}
    assert {name for name in names if name.endswith(".py")} == python
    assert {"s3_megatron/py.typed", f"s3_megatron-{version}.dist-info/licenses/LICENSE"} <= names
    for link, folder in LINKED.items():
        assert {name for name in names if name.startswith(link)}, folder

    about = message_from_string((tmp_path / f"s3_megatron-{version}.dist-info/METADATA").read_text())
    assert about["Version"] == version
    targets = re.findall(r"\]\(([^)]*)\)", about.get_payload())
    assert targets and all(target.startswith("https://") for target in targets), "an index has no files beside"


@pytest.mark.dist
def test_the_library_in_it_is_ours_and_runs_anywhere(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        library = Path(archive.extract("s3_megatron/kernels/cpu/_step.so", tmp_path))
        assert [name for name in archive.namelist() if ".so" in name] == ["s3_megatron/kernels/cpu/_step.so"]
    data = library.read_bytes()
    assert build.fingerprint().encode() in data
    for place in (b"/tmp/", b"/home/", os.fsencode(ROOT), os.fsencode(tmp_path.parent)):
        assert place not in data, "a path of the machine it was built on"
    needs = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    assert set(re.findall(r"NEEDED.*\[(.*)\]", needs)) <= {
        *("libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6"),
        "libgomp.so.1",  # torch's, which is loaded already: one set of threads for both
    }
    assert "RUNPATH" not in needs and "RPATH" not in needs


@pytest.mark.dist
def test_the_sdist_falls_back_where_there_is_no_compiler(built: Path, wheel: Path, tmp_path: Path):
    sdist = next(built.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if not member.isfile() and not member.isdir()], "no links"
    files = {member.name.partition("/")[2] for member in members if member.isfile()}
    assert not [name for name in files if name.startswith("tests/") or name.endswith(".so")]
    with zipfile.ZipFile(wheel) as archive:
        package = {name for name in archive.namelist() if name.startswith("s3_megatron/") and name[-1] != "/"}
    assert package - {"s3_megatron/kernels/cpu/_step.so"} == {name for name in files if name.startswith("s3_megatron/")}

    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", tmp_path, sdist],
        env=os.environ | {"CXX": "/nowhere/g++"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = [line for line in done.stderr.splitlines() if "the C++ kernel was not compiled" in line]
    assert len(printed) == 1 and "/nowhere/g++" in printed[0], done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        assert {name for name in archive.namelist() if name.startswith("s3_megatron/")} == package - {
            "s3_megatron/kernels/cpu/_step.so"
        }


@pytest.fixture(scope="module")
def bare_machine(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine without a compiler, with the wheel in a clean venv.

    torch and the hosts are not installed again: a .pth file shows the venv what this Python has. The wheel's folder
    comes before, and an editable installation's own .pth file is not read from there.
    """
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheel], check=True)
    next((folder / "venv").glob("lib/python*/site-packages")).joinpath("shared.pth").write_text(
        f"{Path(torch.__file__).parents[1]}\n"
    )
    (folder / "bin").mkdir()
    for name in ("bash", "date", "mkdir", "uname", "env"):
        (folder / "bin" / name).symlink_to(str(shutil.which(name)))
    return {"PATH": f"{folder}/venv/bin:{folder}/bin", "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}


STEP = """
import torch
from s3_megatron.kernels.cpu import library
from s3_megatron.optim import S3
p = torch.nn.Parameter(torch.ones(64))
p.grad = torch.ones(64)
S3([p], lr=1e-2, weight_decay=0.1, implementation="cpu").step()
print(library.load()._name, p[0].item() < 1)
"""


@pytest.mark.dist
def test_it_trains_where_there_is_no_compiler(bare_machine: dict[str, str], tmp_path: Path):
    venv = Path(bare_machine["PATH"].partition(":")[0])

    def run(*command: str) -> str:
        done = subprocess.run(
            [venv / command[0], *command[1:]], env=bare_machine, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    loaded, moved = run("python", "-W", "ignore", "-c", STEP).split()
    assert Path(loaded).is_relative_to(venv.parent) and moved == "True"
    printed = " ".join(run("s3-megatron", "doctor").split())
    assert "CPU: C++ (" in printed and "C++ compiler warning none" in printed
    # In bf16, whose products a CPU without such instructions computes slowly, three iterations take a minute.
    settings = ["precision=fp32", "data.mock=true", "schedule.train_iters=3", "schedule.lr_warmup_iters=0"]
    settings += ["model.num_layers=1", "schedule.eval_iters=0"]
    text = run("s3-megatron", "launch", "gpt2_tiny", "--name", "first", *(f"--set={one}" for one in settings))
    assert "S3 steps on cpu by kernel cpu" in text
    assert list(read_metrics(tmp_path / "runs/first/watch").train) == [1, 2, 3]
    assert not Path(bare_machine["HOME"], ".cache").exists(), "nothing was compiled"
