"""Before DeepSpeed compiles an optimizer of its own: what it needs."""

import os
import sys
from pathlib import Path

from s3_megatron.engines.deepspeed import builds


def prepare(name: str) -> None:
    """Find ninja, which may stand beside this Python and not on the PATH, and wait for other builds of ``name``."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    builds.wait(name)
