"""What the fork server of tests/ranks.py imports once, so that no rank has to: 6 s of CPU for each, otherwise."""

import argparse
import functools
import gc
import importlib
import os
import sys
import warnings
from contextlib import suppress
from datetime import timedelta

import psutil

PATH = list(sys.path)  # a rank's own, before multiprocessing gives it pytest's

import torch._inductor.compile_fx  # noqa: E402  (what DeepSpeed's decorators import at their first call)
import torch.distributed.checkpoint.state_dict  # noqa: E402
import torch.distributed.fsdp  # noqa: E402
from torch.distributed import ProcessGroupGloo, Store  # noqa: E402
from torch.distributed.constants import default_pg_timeout  # noqa: E402

from s3_megatron import rehearsal  # noqa: E402

# Imported by functions of the hosts, and not there in all of their versions, nor on a bare machine (make gpu).
LATE = {
    "torch": ("torch.utils.tensorboard",),
    "megatron": (
        "megatron.core.datasets.gpt_dataset",
        "megatron.core.datasets.blended_megatron_dataset_builder",
        "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
        "megatron.core.models.mimo.optimizer",
        "megatron.core.tokenizers.text.text_tokenizer",
    ),
    "deepspeed": (
        "deepspeed.module_inject.auto_ep_layer",
        "deepspeed.ops.op_builder.all_ops",
        "deepspeed.runtime.superoffload.superoffload_stage3",
        "deepspeed.runtime.zero.muon.muon_optimizer",
    ),
}


def late(host: str) -> None:
    for name in LATE[host]:
        with suppress(ModuleNotFoundError):
            importlib.import_module(name)


def share_a_device() -> None:
    """Let all of a rank's gloo groups have one device: each has a thread, which wakes up 100 times a second.

    Megatron has 20 groups, and they outlive a run, for its DistributedDataParallel is not freed: 34 runs on 4 ranks had
    1,500 such threads, and up to half of the machine went to them.
    """
    make = ProcessGroupGloo.__init__

    @functools.cache
    def device() -> ProcessGroupGloo.Device:
        if names := os.environ.get("GLOO_SOCKET_IFNAME"):  # which torch goes by, too
            return ProcessGroupGloo.create_device(interface=names.partition(",")[0])
        return ProcessGroupGloo.create_default_device()

    def on_the_device(
        group: ProcessGroupGloo,
        store: Store,
        rank: int,
        size: int,
        timeout: timedelta = default_pg_timeout,
        **_: object,  # of torch 2.14: options that c10d leaves at their defaults
    ) -> None:
        options = ProcessGroupGloo._Options()
        options._devices, options._timeout = [device()], timeout
        make(group, store, rank, size, options)

    ProcessGroupGloo.__init__ = on_the_device


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the hosts say of themselves, once here instead of in every rank
    late("torch")
    rehearsal.activate()  # Megatron's torch.compile decorators stay out; a rank turns it on for itself if it wants it
    import megatron.core.dist_checkpointing
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.training.training

    late("megatron")
    from megatron.training import argument_utils, arguments

    if hasattr(argument_utils, "ArgumentGroupFactory"):  # not in 0.17
        # Megatron reads its own source for the texts of --help, 0.4 s of CPU a parse, and parses thrice a run.
        factory = argument_utils.ArgumentGroupFactory
        texts = functools.cache(functools.partial(factory._get_field_docstrings, factory.__new__(factory)))
        factory._get_field_docstrings = lambda self, config: texts(config)
        arguments.add_megatron_arguments(argparse.ArgumentParser())
    rehearsal.deactivate()
    import deepspeed.checkpoint.ds_to_universal
    import deepspeed.moe.layer
    import deepspeed.utils.zero_to_fp32

    late("deepspeed")

share_a_device()

# Neither S3 in the hosts, nor a module that binds what S3 replaces in them: both are a rank's own choice.
assert psutil.Process().num_threads() == 1, "a fork has only the thread that forks; what the others held stays locked"
gc.collect()
gc.freeze()  # a rank's collections then pass over all of this
