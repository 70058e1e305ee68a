"""Compiling at first use: once for all ranks, all or nothing, and with a line for people where it cannot be."""

import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from s3_megatron.kernels.cpu import build, library

# Stands in for the compiler, which takes 40 CPU seconds: what is tested is who calls it and what becomes of its output.
# It counts its calls, and takes as long as it is asked to; linking gives the real library.
COMPILER = """#!{python}
import os, shutil, sys, time
with open({log!r}, "a") as log:
    log.write("call " + " ".join(sys.argv[1:]) + "\\n")
time.sleep(float(os.environ.get("SLOW", 0)))
if os.environ.get("BROKEN"):
    sys.exit("step.cpp:7: error: something is not as it was")
if os.environ.get("REFUSED", "nothing") in sys.argv:
    sys.exit(f"clang: error: unsupported option '{{os.environ['REFUSED']}}'")
target = sys.argv[sys.argv.index("-o") + 1]
shutil.copy({real!r}, target) if "-shared" in sys.argv else open(target, "w").close()
"""
# What a rank does; the installed library is out of the way.
RANK = """
import os, pwd
from pathlib import Path
from s3_megatron.kernels.cpu import library, unavailable
if os.environ.get("NAMELESS"):
    pwd.getpwuid = lambda number: {}[number]
library.INSTALLED = Path("/nowhere")
print(unavailable() or library.loops()[-1])
"""
CALLS = len(build.STEPS) * len(build.LOOPS) + len(build.OTHERS) + 2  # the look for OpenMP, and linking


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """An environment with an empty cache and the stand-in for a compiler."""
    script, log = tmp_path / "compiler", tmp_path / "calls"
    log.touch()
    script.write_text(COMPILER.format(python=sys.executable, log=str(log), real=library.load()._name))
    script.chmod(0o755)
    return os.environ | {"CXX": str(script), "S3_MEGATRON_CACHE": str(tmp_path / "cache")}


def start(environment: dict[str, str], **more: str) -> subprocess.Popen:
    command = [sys.executable, "-c", RANK]
    return subprocess.Popen(command, env=environment | more, stdout=subprocess.PIPE, text=True, start_new_session=True)


def calls(environment: dict[str, str]) -> int:
    return Path(environment["CXX"]).with_name("calls").read_text().count("call ")


@pytest.mark.slow
def test_ranks_that_start_together_compile_once(machine):
    ranks = [start(machine, SLOW="0.5") for _ in range(3)]
    assert [rank.communicate(timeout=250)[0].strip() for rank in ranks] == ["portable"] * 3
    assert calls(machine) == CALLS
    assert start(machine).communicate(timeout=250)[0].strip() == "portable"
    assert calls(machine) == CALLS


@pytest.mark.slow
def test_a_rank_killed_while_compiling_is_not_waited_for(machine):
    """torch.utils.cpp_extension's lock is a file, which a killed rank leaves behind: the next ones wait for ever."""
    rank = start(machine, SLOW="60")
    for _ in range(600):
        if calls(machine):
            break
        time.sleep(0.1)
    os.killpg(rank.pid, signal.SIGKILL)
    rank.communicate()
    assert start(machine).communicate(timeout=250)[0].strip() == "portable"


@pytest.mark.slow
def test_a_compiler_that_fails_leaves_nothing_and_its_error_is_raised(machine):
    message, _ = start(machine, BROKEN="1").communicate(timeout=250)
    assert "error: something is not as it was" in message
    cache = Path(machine["S3_MEGATRON_CACHE"])
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_named(machine, tmp_path):
    (tmp_path / "file").touch()
    message, _ = start(machine, S3_MEGATRON_CACHE=str(tmp_path / "file" / "cache")).communicate(timeout=250)
    assert str(tmp_path / "file" / "cache") in message and "S3_MEGATRON_CACHE" in message


@pytest.mark.slow
def test_without_a_home_the_error_names_what_to_set_and_a_named_cache_works(machine, tmp_path):
    """A user id without a name and without HOME, as in containers: the first step was a RuntimeError, with
    S3_MEGATRON_CACHE set, too, where AdamW steps."""
    nameless = {"S3_MEGATRON_CACHE": "", "XDG_CACHE_HOME": "", "NAMELESS": "1"}
    homeless = {key: value for key, value in machine.items() if key != "HOME"}
    message, _ = start(homeless, **nameless).communicate(timeout=60)
    assert "set HOME, or XDG_CACHE_HOME" in message and "S3_MEGATRON_CACHE" in message and message.count("\n") == 1
    nameless["S3_MEGATRON_CACHE"] = str(tmp_path / "named")
    assert start(homeless, **nameless).communicate(timeout=60)[0].strip() == "portable"


def test_a_compilation_is_announced_once(machine, monkeypatch, caplog):
    """A rehearsal on a busy machine compiled for ten minutes in silence, and was ended as a run that hangs."""
    for name in ("CXX", "S3_MEGATRON_CACHE"):
        monkeypatch.setenv(name, machine[name])
    library._cached()
    library._cached()
    (line,) = (record.getMessage() for record in caplog.records)
    assert f"compiling the CPU kernels into {machine['S3_MEGATRON_CACHE']}, once" in line


def test_a_cache_that_only_its_owner_can_write_is_read(machine, monkeypatch, tmp_path):
    """As in an image whose cache was filled when it was built."""
    monkeypatch.setenv("S3_MEGATRON_CACHE", str(tmp_path))
    monkeypatch.setattr(library, "FileLock", lambda path: pytest.fail(f"{path} is not needed"))
    target = tmp_path / f"step-{build.fingerprint()}-{os.uname().machine}.so"
    target.touch()
    assert library._cached() == target


def test_a_library_that_cannot_be_loaded_from_its_folder_is_named(machine, monkeypatch, tmp_path):
    """What a folder mounted noexec does: tests/launch/test_machines.py mounts one."""
    broken = tmp_path / "cache" / f"step-{build.fingerprint()}-{os.uname().machine}.so"
    broken.parent.mkdir()
    broken.write_bytes(b"not for this machine")
    message, _ = start(machine).communicate(timeout=60)
    assert f"is {broken.parent} mounted noexec?" in message and "S3_MEGATRON_CACHE" in message


@pytest.fixture
def without_openmp(machine, monkeypatch) -> Path:
    """A compiler that refuses -fopenmp, as Apple's clang does, of which there is none here; the log of its calls."""
    monkeypatch.setenv("CXX", machine["CXX"])
    monkeypatch.setenv("REFUSED", "-fopenmp")
    return Path(machine["CXX"]).with_name("calls")


def test_a_compiler_without_openmp_gives_a_library_for_one_thread(without_openmp, tmp_path, caplog):
    """Apple's clang refuses -fopenmp: the kernel did not compile there, and S3 stepped by foreach."""
    build.compile_library(tmp_path / "step.so")
    message = "without OpenMP and runs on one thread"
    assert [message in line and "unsupported option '-fopenmp'" in line for line in caplog.messages] == [True]
    refused, *others = without_openmp.read_text().splitlines()
    assert "-fopenmp" in refused and not [line for line in others if "-fopenmp" in line or "-lomp" in line]
    assert (tmp_path / "step.so").exists()


@pytest.mark.slow
def test_a_library_without_openmp_is_found_again(machine):
    """Its flags are not those of the fingerprint's list: it must not be taken for an outdated one at every start."""
    for _ in range(2):
        assert start(machine, REFUSED="-fopenmp").communicate(timeout=250)[0].strip() == "portable"
        assert calls(machine) == CALLS + 1  # the look for OpenMP, and whether anything compiles at all
    log = Path(machine["CXX"]).with_name("calls").read_text()
    assert f'-DS3_FINGERPRINT="{build.fingerprint()}"' in log
    cache = Path(machine["S3_MEGATRON_CACHE"])
    assert [path.name for path in cache.glob("*.so")] == [f"step-{build.fingerprint()}-{os.uname().machine}.so"]


def test_on_macos_openmp_is_not_looked_for(without_openmp, tmp_path, monkeypatch):
    """Homebrew's clang would link its libomp beside torch's, which ends the process: "OMP: Error #15"."""
    monkeypatch.setattr(sys, "platform", "darwin")
    build.compile_library(tmp_path / "step.so")
    assert "-fopenmp" not in without_openmp.read_text()


def test_flags_of_x86_are_not_passed_on_arm(monkeypatch):
    for machine, loops in {"macosx-14.0-arm64": 1, "linux-aarch64": 1, "macosx-14.0-x86_64": 4}.items():
        monkeypatch.setenv("_PYTHON_HOST_PLATFORM", machine)
        assert len(runpy.run_path(build.__file__)["LOOPS"]) == loops


@pytest.mark.parametrize("named", ["", "/nowhere/g++"])
def test_no_compiler_is_an_error_with_advice(named, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", named)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(build.BuildError, match="CXX" if not named else "did not start"):
        build.compile_library(tmp_path / "step.so")
    assert not list(tmp_path.iterdir())


def test_an_outdated_library_is_not_taken_for_a_current_one(monkeypatch):
    """A change of a source, a flag or a loop changes the fingerprint, which the library carries."""
    current = build.fingerprint()
    assert library.load().s3_fingerprint().decode() == current
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-g"])
    assert build.fingerprint() != current


def test_an_installed_library_of_older_sources_is_passed_over(monkeypatch, tmp_path):
    """After a pull into an editable install every step ended in "undefined symbol", as a function had come."""
    source = tmp_path / "old.c"
    source.write_text('void s3_step() {} char *s3_loop() { return 0; } char *s3_fingerprint() { return ""; }')
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(tmp_path / "_step.so"), str(source)], check=True)
    monkeypatch.setattr(library, "INSTALLED", tmp_path)
    monkeypatch.delenv("S3_MEGATRON_KERNEL", raising=False)
    assert library._installed() is None


@pytest.mark.parametrize("value", ["avx512", "avx2", "default", "AVX2", ""])
def test_torchs_variable_limits_the_loops(value, monkeypatch, tmp_path):
    """A value that torch does not have limits neither: torch warns of it, and goes on with all (2.13)."""
    everywhere, limited = library.loops(), {"avx2": ["AVX2", "portable"], "default": ["portable"]}
    copy = shutil.copy(library.load()._name, tmp_path / "step.so")  # loops are found once a loaded library
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", value)
    monkeypatch.setattr(library, "load", lambda: library._open(Path(copy)))
    wanted = [name for name in everywhere if name in limited.get(value, everywhere)]
    assert library.loops() == wanted
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    assert library.loops() == wanted, "the loop of an index changed while the process ran"


def test_the_library_needs_no_cpu_that_only_one_loop_has():
    """Incident (of others): an inline function compiled with AVX-512 was linked for all, and older CPUs died of it.

    Symbols that may be merged with those of another object file are weak ones; the loops must share none.
    """
    symbols = subprocess.run(["nm", "-C", library.load()._name], check=True, capture_output=True, text=True).stdout
    weak = [line for line in symbols.splitlines() if line[17:18] in "WVu"]
    assert not [line for line in weak if "s3_" in line or "Lanes" in line or "Power" in line], weak
