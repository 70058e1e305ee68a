"""Patching a host and taking the patch out: every touched file or none."""

import contextlib
import difflib
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from s3_megatron.errors import S3Error
from s3_megatron.files import publish
from s3_megatron.patch import edit
from s3_megatron.patch.edit import State
from s3_megatron.patch.place import Place
from s3_megatron.patch.release import Release, TouchedFile, file_hash, load, nearest, same_minor, versions


@dataclass(frozen=True)
class Change:
    """What a file is and what it is to be."""

    path: Path
    old: bytes
    new: bytes


def patch_for(place: Place) -> Release | None:
    """Give the patch for what is in ``place``: its own, or for a release without one that of its minor version.

    Development versions have none: what they have is no release's.
    """
    near = nearest(place.host, place.version)
    released = re.fullmatch(r"[\d.]+", place.version) is not None
    return load(place.host, near) if released and same_minor(near, place.version) else None


def release_of(place: Place) -> Release:
    """Give ``patch_for(place)``.

    Raises:
        S3Error: there is none for this version.
    """
    release = patch_for(place)
    if release is None:
        raise S3Error(
            f"{place.root} is {place.host} {place.version}, which there is no patch for; there are "
            f"{', '.join(versions(place.host))}: docs/new-host-version.md explains how to add one"
        )
    return release


def state(place: Place, release: Release) -> State:
    """Say what all touched files together are like."""
    states = {edit.state(file, data) for file, data in _contents(place, release)}
    if states <= {State.PATCHED, State.THREE_WAY}:
        return State.PATCHED if states == {State.PATCHED} else State.THREE_WAY
    return State.UNPATCHED if states == {State.UNPATCHED} else State.CHANGED


def broken(place: Place, release: Release) -> Iterator[str]:
    """Name the touched files that are not Python."""
    for file, data in _contents(place, release):
        try:
            edit.parse(data)
        except SyntaxError as error:
            yield f"{file.path} is not Python: line {error.lineno}: {error.msg}"


def differing(place: Place, release: Release) -> Iterator[str]:
    """Name the touched files that are neither the release's nor what our patch makes of it, and where."""
    for file, data in _contents(place, release):
        if edit.state(file, data) in (State.CHANGED, State.THREE_WAY):
            rest = edit.remove(file, data) if edit.state(file, data) is State.THREE_WAY else data
            yield f"{file.path}: {edit.differences(file, rest)}"


def patching(place: Place, release: Release, *, three_way: bool) -> list[Change]:
    """Work out what to write, to patch what is not patched; nothing is written.

    Raises:
        S3Error: a file differs from the release, and not ``three_way``; or it lacks the lines behind which ours go.
    """
    changes = []
    for file, data in _contents(place, release):
        now = edit.state(file, data)
        if now is State.CHANGED and not three_way:
            raise S3Error(
                f"{file.path} differs from {release.host} {release.version}: {edit.differences(file, data)}; "
                "--three-way puts our lines in where the lines before them are still there"
            )
        if now in (State.UNPATCHED, State.CHANGED):
            new = edit.insert(file, data)
            assert now is State.CHANGED or file_hash(new) == file.patched, f"{file.path}: the patch and its record"
            changes.append(Change(place.root / file.path, data, new))
    return changes


def reverting(place: Place, release: Release) -> list[Change]:
    """Work out what to write, to take our lines out; nothing is written.

    Raises:
        S3Error: lines of ours are there, but not whole.
    """
    changes = []
    for file, data in _contents(place, release):
        now = edit.state(file, data)
        if now is State.CHANGED:
            edit.refuse_strays(file, data)
        if now in (State.PATCHED, State.THREE_WAY):
            new = edit.remove(file, data)
            assert now is State.THREE_WAY or file_hash(new) == file.before, f"{file.path}: the patch and its record"
            changes.append(Change(place.root / file.path, data, new))
    return changes


def write(changes: list[Change]) -> None:
    """Write every change or none: what was written before one fails is put back.

    Raises:
        S3Error: a file cannot be written.
    """
    done: list[Change] = []
    try:
        for change in changes:
            _replace(change.path, change.new)
            done.append(change)
    except BaseException:
        for change in done:
            _replace(change.path, change.old)
        raise


def as_diff(root: Path, change: Change) -> str:
    """Show a change as ``git diff -U0`` would."""
    path = change.path.relative_to(root)
    old, new = (
        [f"{line}\n" for line in data.decode(errors="replace").splitlines()] for data in (change.old, change.new)
    )
    return "".join(difflib.unified_diff(old, new, f"a/{path}", f"b/{path}", n=0))


def python_without_us(root: Path) -> Path | None:
    """Give the Python to which a site-packages folder belongs, if it is there and cannot find this package."""
    python = root.parents[2] / "bin/python" if len(root.parents) > 2 and root.parent.name.startswith("python") else None
    if python is None or not python.exists():
        return None
    # In a folder of its own, because -c looks for packages in the folder that it is started in.
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('s3_megatron') is None)"
    found = subprocess.run([python, "-c", code], cwd=python.parent, capture_output=True, timeout=60).returncode == 0
    return None if found else python


def _contents(place: Place, release: Release) -> Iterator[tuple[TouchedFile, bytes]]:
    for file in release.files:
        try:
            yield file, (place.root / file.path).read_bytes()
        except OSError as error:
            raise S3Error(
                f"{place.root / file.path} cannot be read: {error.strerror}; {place.host} {place.version} has it: "
                "install it whole, or name a checkout"
            ) from error


def _replace(path: Path, data: bytes) -> None:
    """Write ``path`` anew, with its mode and owner; other hard links, as uv's cache has, and link targets stay."""
    partial = Path(f"{path}.{secrets.token_hex(4)}.partial")  # one of its own: several ranks' scripts may patch at once
    try:
        try:
            partial.write_bytes(data)
            shutil.copymode(path, partial)
            with contextlib.suppress(PermissionError):  # only root gives files away
                os.chown(partial, path.stat().st_uid, path.stat().st_gid)
            publish(partial, path)
        finally:
            if partial.is_file():
                partial.unlink()
    except OSError as error:
        raise S3Error(f"{path} cannot be written, nothing was changed: {error.strerror or error}") from error
