"""The pytest plugin of ``make test-peers``: S3 in torch's table of optimizers or in Adam's place; ranks are forked."""

import multiprocessing
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.testing._internal import common_distributed, common_fsdp
from torch.testing._internal.common_optimizers import optim_db

from tests.peers.row import ROW, S3

ADAMS = ("Adam", "AdamW")


def _fork_ranks(case: common_distributed.MultiProcessTestCase) -> None:
    """Start a test's ranks with torch imported and the plugin at work; theirs import all of it in each."""
    case._start_processes(multiprocessing.get_context("fork").Process)


_init = FullyShardedDataParallel.__init__


def _init_on_cpu(model: FullyShardedDataParallel, *args: Any, **kwargs: Any) -> None:
    """Shard on the CPU, which FSDP does only where it is asked to."""
    _init(model, *args, **{"device_id": torch.device("cpu")} | kwargs)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stand-in", action="store_true", help="build S3 wherever a test builds an Adam")


def pytest_configure(config: pytest.Config) -> None:
    optim_db.append(ROW)
    common_distributed.MultiProcessTestCase._spawn_processes = _fork_ranks
    common_fsdp.DEVICE_COUNT = 2
    # The one it inherits asks for as many GPUs as ranks only where there is a GPU.
    common_fsdp.FSDPTest._run = classmethod(common_fsdp.FSDPTestMixin._run.__func__)
    # torch's CUDA counts a fork as an error even where there is none.
    torch.cuda._is_in_bad_fork = lambda: False
    FullyShardedDataParallel.__init__ = _init_on_cpu
    if config.getoption("stand_in"):
        for name in ADAMS:
            patch.object(torch.optim, name, S3).start()
