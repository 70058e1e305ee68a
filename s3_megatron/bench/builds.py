"""Before DeepSpeed compiles an optimizer of its own: what it needs, and what a killed build left behind."""

import contextlib
import logging
import os
import sys
import time
from pathlib import Path

from torch.utils import cpp_extension

logger = logging.getLogger(__name__)

# Longer than any build takes.
_STALE_SECONDS = 20 * 60


def prepare(name: str) -> None:
    """Find ninja, and wait for another build of the extension ``name``, but not for one that was killed.

    Ninja may stand beside this Python and not on the PATH. A killed build leaves its lock behind, for which torch's
    builder waits for ever (torch 2.13, ``torch.utils.file_baton``): one that is old is removed.
    """
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    lock = Path(cpp_extension._get_build_directory(name, False), "lock")
    if lock.exists():
        logger.warning("waiting for another build, which holds %s; after 20 minutes it counts as killed", lock)
    while lock.exists():
        with contextlib.suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime > _STALE_SECONDS:
                lock.unlink()
        time.sleep(0.2)
