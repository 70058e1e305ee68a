"""What every entry point shares: the rehearsal's switch, S3's installation, and how a run ends."""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch.distributed

from s3_megatron import rehearsal
from s3_megatron.errors import S3Error


def prepare(argv: list[str], rehearse: bool) -> list[str]:
    """Install S3 in Megatron, after starting the rehearsal where ``rehearse`` or S3_REHEARSAL=1 asks for it.

    Returns ``argv``, Megatron's flags, with those that the rehearsal adds. Call it before Megatron is imported.
    """
    if rehearse or os.environ.get("S3_REHEARSAL") == "1":
        os.environ["DS_ACCELERATOR"] = "cpu"  # the rehearsal's torch.cuda must not look like a GPU to DeepSpeed
        argv = rehearsal.add_flags(argv)
        rehearsal.activate()
    from s3_megatron.engines.megatron import install  # imports Megatron, which must see the rehearsal

    install()
    skip_helper_build()
    return argv


def skip_helper_build() -> None:
    """Use the dataset helper that megatron-core's wheel ships compiled.

    The wheel (0.19.2) has no Makefile, and ``megatron.core.datasets.utils.compile_helpers`` ends the process when
    its make fails. In a Megatron-LM checkout, which has one, nothing changes.
    """
    from megatron.core.datasets import utils

    compiled = importlib.util.find_spec("megatron.core.datasets.helpers_cpp")
    if compiled and not (Path(utils.__file__).parent / "Makefile").exists():
        utils.compile_helpers = lambda: None


class RegisterWithDeepSpeed(importlib.abc.MetaPathFinder):
    """On ``sys.meta_path``, registers S3 as soon as somebody imports DeepSpeed.

    Whoever trains without it is spared its import, which takes seconds, and fails where its CUDA is not in order.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find ``deepspeed`` as the others do, with the registration behind its import."""
        if name != "deepspeed":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                from s3_megatron.engines.deepspeed import register

                register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a run's body well: S3Error becomes one line and exit code 2, and a good end leaves the process group.

    Any other exception keeps its traceback; torchrun then stops the other ranks.
    """
    try:
        yield
    except S3Error as error:
        if _is_first_to_fail():
            print(f"s3_megatron: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except SystemExit as stop:  # Megatron's way to end at --exit-interval and its kin
        if not stop.code:
            _leave_group()
        raise
    _leave_group()


def _is_first_to_fail() -> bool:
    """Whether this rank should print: a mistake is often seen by every rank at once, but not always by rank 0."""
    if torch.distributed.is_initialized():
        store = torch.distributed.distributed_c10d._get_default_store()  # torch 2.13
        return store.add("s3_megatron/failed", 1) == 1
    return os.environ.get("LOCAL_RANK", "0") == "0"  # flags and files: the same for every rank of a machine


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
