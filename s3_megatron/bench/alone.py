"""Megatron with one rank, in this process: on a GPU, or in the rehearsal."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

# What hosts read of torchrun; the port is a free one.
ENVIRONMENT = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def device() -> str:
    """Where a model is: "cuda", or "cpu" where torch sees no GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def megatron(device: str) -> Iterator[None]:
    """Have Megatron with S3, and a process group of this rank alone; on the "cpu" it is the rehearsal.

    Megatron may be imported inside only: the rehearsal comes first.
    """
    if device == "cpu":
        from s3_megatron import rehearsal

        rehearsal.activate()
    from megatron.core import parallel_state, tensor_parallel

    from s3_megatron.engines.megatron import install

    install()
    logging.disable(logging.WARNING)  # Megatron lists every parameter
    os.environ |= ENVIRONMENT
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        dist.destroy_process_group()
