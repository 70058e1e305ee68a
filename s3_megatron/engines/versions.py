"""Which versions of the hosts S3 was run with, and which are known not to work."""

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from s3_megatron.errors import S3Error
from s3_megatron.machine import is_first_rank

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """The versions of one host.

    Attributes:
        host: its name on PyPI.
        tested: what ``make test-hosts`` runs, oldest first.
        broken: the start of a version, and what happens there.
    """

    host: str
    tested: tuple[str, ...]
    broken: Mapping[str, str]


MEGATRON = Window("megatron-core", ("0.17.1", "0.18.2", "0.19.2"), {})
DEEPSPEED = Window(
    "deepspeed",
    ("0.17.6", "0.19.8"),
    {
        # AdamW with torch 2.13; the operation that fails does so in torch 2.7.1, too. Nobody here has a GPU.
        "0.18.9": "its ZeRO 1 and 2 fail in the first step on CPUs, with AdamW too (DeepSpeed pull request 7948 mends "
        "it), so S3 was never run there"
    },
)


def check(window: Window, version: str) -> None:
    """Say, once a job, that ``version`` was never run; its local part, as in ``0.18.2+5e28418``, does not count.

    Raises:
        S3Error: it is known not to work.
    """
    version = version.partition("+")[0]
    known = f"it was run with {window.host} {', '.join(window.tested)}"
    for start, why in window.broken.items():
        if version == start or version.startswith(f"{start}."):
            raise S3Error(f"{window.host} {version} does not work with S3: {why}; {known}: install one of those")
    if version not in window.tested and is_first_rank():
        _warn(f"{window.host} {version} was never run with S3: {known}; compare a short run on one of those with yours")


@functools.cache  # a patched host checks while we do
def _warn(text: str) -> None:
    logger.warning(text)
