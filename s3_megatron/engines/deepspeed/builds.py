"""Waiting for another build of an extension of DeepSpeed's, but not for one that was killed.

Torch's builder (torch 2.13, ``torch.utils.file_baton``) takes a file for its lock, which a build that is killed leaves
behind, and waits for it for ever, in silence. The CPU kernels of this package are built under a lock of the system's,
which ends with its process.
"""

import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils import cpp_extension

from s3_megatron.errors import S3Error

logger = logging.getLogger(__name__)

# Longer than any build takes.
_STALE_SECONDS = 20 * 60


def jit_load(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``OpBuilder.jit_load`` (deepspeed 0.19.8, ops/op_builder/builder.py)."""

    @functools.wraps(original)
    def jit_load(self: Any, *args: Any, **kwargs: Any) -> Any:
        wait(self.name)
        return original(self, *args, **kwargs)

    return jit_load


def wait(name: str) -> None:
    """Wait until no build of the extension ``name`` is under way; a lock that is old is removed."""
    lock = Path(cpp_extension._get_build_directory(name, False), "lock")
    if lock.exists():
        logger.warning(
            "waiting for another build of %s, which holds %s; if none is under way, one was killed: remove that file, "
            "or wait until it is 20 minutes old",
            name,
            lock,
        )
    while lock.exists():
        try:
            if time.time() - lock.stat().st_mtime > _STALE_SECONDS:
                lock.unlink()
        except FileNotFoundError:
            return
        except PermissionError as error:
            raise S3Error(
                f"{lock}, of a build that was killed, cannot be removed ({error.strerror}): let its owner do it, or "
                "set TORCH_EXTENSIONS_DIR to a folder of your own"
            ) from error
        time.sleep(0.2)
