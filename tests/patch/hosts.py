"""Copies of the hosts that are installed here, made by pip's RECORD of them."""

import base64
import hashlib
import importlib.metadata
import shutil
from pathlib import Path

import pytest

from s3_megatron.patch import place, release, work
from s3_megatron.patch.release import Release

DISTRIBUTIONS = {"megatron-lm": "megatron-core", "deepspeed": "deepspeed"}
TOUCHED = {"megatron-lm": "megatron/training/__init__.py", "deepspeed": "deepspeed/__init__.py"}
_VERSION = {"megatron-lm": "megatron/core/package_info.py", "deepspeed": "deepspeed/git_version_info_installed.py"}


def patched_hosts() -> list[object]:
    """The hosts, as parameters of a test; those that are installed in a version without a patch are skipped."""
    found = {host: importlib.metadata.version(name) for host, name in DISTRIBUTIONS.items()}
    return [
        pytest.param(
            host,
            marks=pytest.mark.skipif(version not in release.versions(host), reason=f"no patch for {host} {version}"),
        )
        for host, version in found.items()
    ]


def _recorded(host: str) -> list[importlib.metadata.PackagePath]:
    files = importlib.metadata.files(DISTRIBUTIONS[host]) or []
    return [file for file in files if file.hash is not None and file.parts[0] in ("megatron", "deepspeed")]


def copy_whole(host: str, root: Path) -> Path:
    """Copy everything that can be imported."""
    for file in _recorded(host):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(file.locate()), root / file)
    return root


def copy_some(host: str, root: Path) -> Path:
    """Copy what names the version, and what the patch touches."""
    for file in _recorded(host):
        if str(file) in (TOUCHED[host], _VERSION[host]):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(file.locate()), root / file)
    return root


def unlike_record(host: str, root: Path) -> list[str]:
    """List the copied files whose sha256 is not the one that pip recorded, or that are gone."""
    return [str(file) for file in _recorded(host) if _digest(root / file) != (file.hash and file.hash.value)]


def _digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")


def opened(host: str, root: Path) -> tuple[place.Place, Release]:
    """The host in ``root`` and its patch."""
    found = place.find(root, host)
    return found, work.release_of(found)


def apply(host: str, root: Path, *, three_way: bool = False) -> None:
    """What the command of this name does to files."""
    work.write(work.patching(*opened(host, root), three_way=three_way))


def revert(host: str, root: Path) -> None:
    """What the command of this name does to files."""
    work.write(work.reverting(*opened(host, root)))
