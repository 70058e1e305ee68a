"""Files that are either whole or not there, files of whole lines, and where a user's own belong."""

import fcntl
import os
import secrets
from contextlib import suppress
from pathlib import Path

from s3_megatron.errors import S3Error


def user_folder(variable: str, under_home: str) -> Path:
    """The folder that ``variable``, one of the XDG base directories, names; else ``under_home`` in the home folder.

    Raises S3Error where there is no home folder, as in a container whose user id has no name.
    """
    named = Path(os.environ.get(variable, ""))
    if named.is_absolute():  # the standard has any other passed over
        return named
    try:
        return Path.home() / under_home
    except RuntimeError:
        raise S3Error(
            f"there is no home folder: HOME is not set, and the user id {os.getuid()} has no name: "
            f"set HOME, or {variable} to a folder that can be written"
        ) from None


def write_file(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` at once: a reader sees the whole file or none; makes the folder.

    Several processes may write one file, on several nodes: the last one's stays. Raises S3Error where it cannot be
    written.
    """
    partial = Path(f"{path}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data)
            publish(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise S3Error(f"{path} cannot be written: {error.strerror or error}") from error


def append_line(path: Path, line: bytes) -> None:
    """Append ``line`` in one write, so that lines of several writers do not mix; a line torn before is ended first.

    Raises OSError where it is not written, or not as a whole.
    """
    with path.open("a+b", buffering=0) as file:
        line += b"\n"
        with suppress(OSError):  # a file system without locks
            # Or a line that another is writing looks torn, and an empty one comes between: a node without a name.
            fcntl.flock(file, fcntl.LOCK_EX)
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        if file.write(line) != len(line):
            raise OSError(None, "the disk took a part of it")


def publish(partial: Path, path: Path) -> None:
    """Give a finished file its name, once its bytes are on the disk; replaces what was there."""
    _fsync(partial)
    os.replace(partial, path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
