"""`s3-megatron patch` as a person types it."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from s3_megatron.patch.release import versions
from tests.patch.hosts import DISTRIBUTIONS, TOUCHED, copy_some, patched_hosts
from tests.terminal import run_main

each_host = pytest.mark.parametrize("host", patched_hosts())
ROOT = Path(__file__).parents[2]


class Terminal:
    """Runs commands in this process; an exit code and what was printed come back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        return run_main(self._monkeypatch, "patch", *map(str, arguments)), *self._capsys.readouterr()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys)


@pytest.fixture
def root(host: str, tmp_path: Path) -> Path:
    """Its name has what rich would take for markup; S3's symbols are not in it, and warned about (test_symbols)."""
    return copy_some(host, tmp_path / "a [red]fork[/red]")


@each_host
def test_from_unpatched_to_patched_and_back(host: str, root: Path, terminal: Terminal) -> None:
    touched = root / TOUCHED[host]
    original = touched.read_bytes()
    assert terminal("verify", root)[0] == 1
    code, shown, _ = terminal("apply", "--dry-run", root)
    assert code == 0 and f"+++ b/{TOUCHED[host]}" in shown and "+_s3_" in shown and "would be patched" in shown
    assert touched.read_bytes() == original

    code, shown, _ = terminal("apply", root)
    assert code == 0 and shown.startswith(f"{root}: {host} ") and shown.endswith("is patched\n")
    assert terminal("apply", root)[1].endswith("is already patched\n")
    assert terminal("status", root)[:2] == (0, shown.replace(" is patched", ", patched"))
    assert terminal("verify", root)[0] == 0

    assert terminal("revert", root)[:2] == (0, shown.replace("is patched", "has our lines no more"))
    assert terminal("revert", root)[:2] == (0, shown.replace("is patched", "is not patched"))
    assert touched.read_bytes() == original


@each_host
@pytest.mark.parametrize("command", ["status", "apply", "verify", "revert"])
def test_a_path_may_be_the_package(host: str, root: Path, terminal: Terminal, command: str) -> None:
    inner = Path(TOUCHED[host]).parts[0]
    known = terminal(command, root)
    terminal("revert", root)
    assert terminal(command, root / inner) == known and str(root) in known[1]


@each_host
def test_a_fork(host: str, root: Path, terminal: Terminal) -> None:
    touched = root / TOUCHED[host]
    fork = b"# [bold] our fork\n" + touched.read_bytes()
    touched.write_bytes(fork)
    code, shown, error = terminal("apply", root)
    assert (code, shown) == (2, "") and f"{TOUCHED[host]} differs from {host}" in error and ": line 1; --three" in error
    assert terminal("verify", root)[0] == 1
    assert terminal("status", root)[1].endswith(f", changed\n  {TOUCHED[host]}: line 1\n")
    assert terminal("apply", "--three-way", root)[1].endswith("is patched\n")
    assert terminal("apply", root)[1].endswith("is already patched three-way\n")
    assert terminal("status", root)[1].endswith(f", patched three-way\n  {TOUCHED[host]}: line 1\n")
    assert terminal("verify", root)[0] == 0
    touched.write_bytes(touched.read_bytes() + b"def broken(:\n")
    code, _, error = terminal("verify", root)
    assert code == 1 and f"{TOUCHED[host]} is not Python: line " in error


@each_host
def test_versions_that_have_no_patch(host: str, root: Path, terminal: Terminal) -> None:
    """Development versions too: what they have is no release's."""
    if host == "megatron-lm":
        source = root / "megatron/core/package_info.py"
        source.write_text(source.read_text().replace('PRE_RELEASE = ""', 'PRE_RELEASE = "rc1"'))
    else:
        source = root / "deepspeed/git_version_info_installed.py"
        source.write_text("version='9.9.9rc1+abc'\n")
    for command in ("apply", "revert", "verify"):
        code, shown, error = terminal(command, root)
        assert (code, shown) == (2, "") and error.count("\n") == 1
        assert f"rc1, which there is no patch for; there are {', '.join(versions(host))}: docs/new-host-" in error
    code, shown, _ = terminal("status", root)
    assert code == 0 and shown.endswith("rc1, unknown version\n")
    source.write_text("raise SystemExit('never run')\n")
    code, _, error = terminal("status", root)
    assert code == 2 and f"does not say which version of {host} this is" in error


def become(host: str, root: Path, version: str) -> None:
    """Another version of the host, by what it says of itself."""
    if host == "deepspeed":
        (root / "deepspeed/git_version_info_installed.py").write_text(f"version='{version}'\n")
    else:
        numbers = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
        (root / "megatron/core/package_info.py").write_text("\n".join(f"{name} = {number}" for name, number in numbers))


@each_host
def test_a_release_without_a_patch_has_that_of_its_minor_version(host: str, root: Path, terminal: Terminal) -> None:
    """Megatron-LM's tag core_v0.19.0 holds 0.19.1: it was refused, with nothing in it that differs from 0.19.2."""
    near = importlib.metadata.version(DISTRIBUTIONS[host])
    before = (root / TOUCHED[host]).read_bytes()
    become(host, root, f"{near.rpartition('.')[0]}.77")
    code, shown, error = terminal("apply", root)
    assert code == 0 and shown.endswith(".77 is patched\n")
    assert f".77 was never run with S3, and the patch is {near}'s" in error
    assert terminal("status", root)[1].endswith(".77, patched\n")
    assert terminal("revert", root)[0] == 0 and (root / TOUCHED[host]).read_bytes() == before
    become(host, root, "0.99.0")
    assert terminal("apply", root)[0] == 2, "another minor version has another training loop"


def test_a_deepspeed_checkout_says_its_version_itself(tmp_path: Path, terminal: Terminal) -> None:
    """setup.py leaves git_version_info_installed.py in a checkout, which a later `git pull` makes a lie."""
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed/__init__.py").touch()
    (tmp_path / "deepspeed/git_version_info_installed.py").write_text("version='0.17.6+old'\n")
    wanted = "deepspeed 0.17.6, changed\n  deepspeed/__init__.py: without lines 1-409 of the release\n"
    assert terminal("status", tmp_path)[1].endswith(wanted)
    (tmp_path / "setup.py").touch()
    (tmp_path / "version.txt").write_text("9.9.9\n")
    assert terminal("status", tmp_path)[1].endswith("deepspeed 9.9.9, unknown version\n")


def test_paths_without_a_host_or_with_both(tmp_path: Path, terminal: Terminal) -> None:
    code, _, error = terminal("status", tmp_path / "mistyped")
    assert code == 2 and "mistyped is no folder: name a checkout of Megatron-LM or DeepSpeed" in error
    code, _, error = terminal("apply", tmp_path)
    assert code == 2 and "megatron/core/package_info.py or deepspeed/__init__.py is" in error
    for host in DISTRIBUTIONS:
        copy_some(host, tmp_path)
    code, _, error = terminal("status", tmp_path)
    assert code == 2 and "holds both Megatron and DeepSpeed: pass --host megatron-lm or --host deepspeed" in error
    for host in DISTRIBUTIONS:
        assert f": {host} " in terminal("status", "--host", host, tmp_path)[1]
        package = tmp_path / Path(TOUCHED[host]).parts[0]
        assert f": {host} " in terminal("status", package)[1], "a package folder says which"
    code, _, error = terminal("status", "--host", "torch", tmp_path)
    assert code == 2 and "--host is torch: it must be megatron-lm or deepspeed" in error
    code, _, error = terminal("status", "--host", "deepspeed", tmp_path / "megatron")
    assert code == 2 and "holds no deepspeed" in error


@each_host
def test_a_python_that_does_not_find_this_package(
    host: str, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patched host would not even import there; a venv without packages, and then with this one."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # it would lead there, too
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    copy_some(host, packages)
    code, shown, error = terminal("apply", packages)
    wanted = f"{venv}/bin/python does not find s3_megatron, which the patched {host} imports: install it there"
    assert code == 0 and shown.endswith("is patched\n") and wanted in error
    code, _, error = terminal("verify", packages)
    assert code == 1 and wanted in error
    (packages / "s3.pth").write_text(f"{ROOT}\n")
    code, _, error = terminal("verify", packages)
    assert code == 0 and wanted not in error


def test_git_knows_none_of_this_as_a_change_of_mode(tmp_path: Path, terminal: Terminal) -> None:
    """In a clean checkout `git diff` shows our lines and nothing else, and nothing after revert."""
    root = copy_some("megatron-lm", tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(root)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "release"], check=True)
    assert terminal("apply", root)[0] == 0
    diff = subprocess.run([*git, "diff", "-U0"], check=True, capture_output=True, text=True).stdout
    assert len([text for text in diff.splitlines() if text.startswith(("+_s3", "+from s3"))]) == 2
    assert "mode" not in diff.replace("100644", "")
    assert terminal("revert", root)[0] == 0
    status = subprocess.run([*git, "status", "--short"], check=True, capture_output=True, text=True).stdout
    assert status == ""
