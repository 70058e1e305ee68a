"""What every entry point shares: the rehearsal's switch, S3's installation, and how a run ends."""

import ctypes
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch.distributed
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from s3_megatron import rehearsal
from s3_megatron.engines.imports import AfterImport
from s3_megatron.errors import S3Error
from s3_megatron.run_folder import of_this_job


def prepare(argv: list[str], rehearse: bool) -> list[str]:
    """Install S3 in Megatron, after starting the rehearsal where ``rehearse`` or S3_REHEARSAL=1 asks for it.

    Returns ``argv``, Megatron's flags, with those that the rehearsal adds. Call it before Megatron is imported.
    """
    if of_this_job() is not None and sys.platform == "linux":
        _allow_stack_dumps()
    if rehearse or os.environ.get("S3_REHEARSAL") == "1":
        os.environ["DS_ACCELERATOR"] = "cpu"  # the rehearsal's torch.cuda must not look like a GPU to DeepSpeed
        argv = rehearsal.add_flags(argv)
        rehearsal.activate()
    from s3_megatron.engines.megatron import install  # imports Megatron, which must see the rehearsal

    install()
    skip_helper_build()
    return argv


def _allow_stack_dumps() -> None:
    """Let py-spy, which the job's watchdog starts beside the ranks, read this process.

    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY); Yama's ptrace_scope 1, a usual default, lets parents only. Kernels
    without Yama answer with an error that means nothing.
    """
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)


def skip_helper_build() -> None:
    """Use the dataset helper that megatron-core's wheel ships compiled.

    The wheel (0.19.2) has no Makefile, and ``megatron.core.datasets.utils.compile_helpers`` ends the process when
    its make fails. In a Megatron-LM checkout, which has one, nothing changes.
    """
    from megatron.core.datasets import utils

    compiled = importlib.util.find_spec("megatron.core.datasets.helpers_cpp")
    if compiled and not (Path(utils.__file__).parent / "Makefile").exists():
        utils.compile_helpers = lambda: None


class RegisterWithDeepSpeed(AfterImport):
    """On ``sys.meta_path``, registers S3 as soon as DeepSpeed is imported.

    Whoever trains without it is spared its import, which takes seconds, and fails where its CUDA is not in order.
    """

    def __init__(self) -> None:
        """Wait for DeepSpeed."""
        super().__init__("deepspeed", _register)


def _register(_: ModuleType) -> None:
    from s3_megatron.engines.deepspeed import register

    register()


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a run's body well: S3Error becomes one line and exit code 2, and a good end leaves the process group.

    Any other exception keeps its traceback; torchrun then stops the other ranks. Both are in its error file.
    """
    errors = get_error_handler()  # as torch.distributed.elastic's @record, which cannot turn an error into a line
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        errors.initialize()  # a crash in C++ then shows its Python stack
    try:
        yield
    except S3Error as error:
        _ignore_sigterm()  # torchrun sends it once another rank has ended of the same mistake
        error.__traceback__ = error.__cause__ = None  # torchrun prints what is recorded, of every rank
        error.__suppress_context__ = True
        errors.record_exception(error)
        if _is_first_to_fail():
            print(f"s3_megatron: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except SystemExit as stop:  # Megatron's way to end at --exit-interval and its kin
        if not stop.code:
            _leave()
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        errors.record_exception(error)
        raise
    _leave()


def _ignore_sigterm() -> None:
    """Let a rank keep its exit code from here on. Python gives up handlers, but not SIG_IGN, before its last second."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _is_first_to_fail() -> bool:
    """Whether this rank should print: a mistake is often seen by every rank at once, but not always by rank 0."""
    if torch.distributed.is_initialized():
        store = torch.distributed.distributed_c10d._get_default_store()  # torch 2.13
        try:
            return store.add("s3_megatron/failed", 1) == 1
        except RuntimeError:  # without torchrun rank 0 has the store: it has ended, of the same mistake
            return False
    return os.environ.get("LOCAL_RANK", "0") == "0"  # flags and files: the same for every rank of a machine


def _leave() -> None:
    """End in order. What was to be saved is, and a SIGTERM that comes late must not make a failure of it."""
    _ignore_sigterm()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
