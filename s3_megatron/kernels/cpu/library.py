"""Finding, compiling and loading the C++ library; its functions as Python sees them."""

import ctypes
import functools
import logging
import os
import platform
from pathlib import Path

import torch
from filelock import FileLock

from s3_megatron.errors import S3Error
from s3_megatron.files import user_folder
from s3_megatron.kernels.call import ROLES
from s3_megatron.kernels.cpu.build import BuildError, compile_library, fingerprint

logger = logging.getLogger(__name__)

INSTALLED = Path(__file__).parent

# As in step.h.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Settings(ctypes.Structure):
    """``S3Settings`` of step.h."""

    _fields_ = [
        *((name, ctypes.c_float) for name in ("lr", "weight_decay", "factor", "beta1", "one_minus_beta1", "beta2")),
        *((name, ctypes.c_float) for name in ("one_minus_beta2", "p", "bound")),
        *((name, ctypes.c_int32) for name in ("form", "nesterov", "forgets", "stochastic")),
        ("types", ctypes.c_int32 * len(ROLES)),
        ("seed", ctypes.c_uint32 * 2),
        ("tau", ctypes.c_float),
    ]


@functools.cache
def load() -> ctypes.CDLL:
    """Load the library: the one installed with the package, else one from the cache, compiled there at first use.

    $S3_MEGATRON_KERNEL names another instead: `make sanitize` does.

    Raises:
        BuildError: it is not there and cannot be compiled, or not be loaded from where it is.
    """
    return _installed() or _from_cache(_cached())


def at_hand() -> ctypes.CDLL | None:
    """Return the library if it has been compiled and loads: what a GPU needs of it is not worth a compilation."""
    return load() if load.cache_info().currsize else _compiled_before()


@functools.cache
def _compiled_before() -> ctypes.CDLL | None:
    try:
        return _installed() or (_from_cache(_target()) if _target().exists() else None)
    except (BuildError, OSError):
        return None


def _installed() -> ctypes.CDLL | None:
    if named := os.environ.get("S3_MEGATRON_KERNEL"):
        return _open(Path(named))
    for installed in INSTALLED.glob("_step*.so"):
        try:
            library = _open(installed)
        except (OSError, AttributeError):  # built for another kind of machine, or of sources that had fewer functions
            continue
        if library.s3_fingerprint().decode() == fingerprint():
            return library
    return None


def _from_cache(cached: Path) -> ctypes.CDLL:
    try:
        return _open(cached)
    except OSError as error:
        raise BuildError(
            f"the kernel cannot be loaded ({error}): is {cached.parent} mounted noexec? name another folder in "
            "S3_MEGATRON_CACHE"
        ) from None


def loops() -> list[str]:
    """Name the loops that run on this CPU, best first."""
    names = iter(lambda: load().s3_loop(len(found)), None)
    found: list[str] = []
    for name in names:
        found.append(name.decode())
    return found


def cache_folder() -> Path:
    """Where a library compiled at first use is kept: $S3_MEGATRON_CACHE, else the user's cache folder.

    Raises:
        BuildError: there is no home folder.
    """
    if named := os.environ.get("S3_MEGATRON_CACHE"):
        return Path(named)
    try:
        return user_folder("XDG_CACHE_HOME", ".cache") / "s3_megatron"
    except S3Error as error:
        raise BuildError(f"{error}; S3_MEGATRON_CACHE does for the kernel alone") from None


def _target() -> Path:
    return cache_folder() / f"step-{fingerprint()}-{platform.machine()}.so"


def _cached() -> Path:
    # Not torch.utils.cpp_extension: its lock is a file, which a rank that is killed while compiling leaves behind, and
    # every later rank then waits for ever. The kernel takes this one back from a dead process.
    target = _target()
    if target.exists():  # also in a cache that only its owner can write
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(target.with_suffix(".lock")):
            if not target.exists():
                logger.warning("compiling the CPU kernels into %s, once: one to two minutes of a core", target.parent)
                compile_library(target)
    except OSError as error:
        raise BuildError(
            f"{target.parent} cannot be written ({error}): name another folder in S3_MEGATRON_CACHE"
        ) from None
    return target


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.s3_loop.argtypes, library.s3_loop.restype = [ctypes.c_int32], ctypes.c_char_p
    library.s3_fingerprint.argtypes, library.s3_fingerprint.restype = [], ctypes.c_char_p
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    for step in (library.s3_step, library.s3_softsignum_step):
        step.argtypes = [pointer, count, ctypes.POINTER(Settings), ctypes.c_int32, ctypes.c_int32, pointer]
        step.restype = None
    return library
