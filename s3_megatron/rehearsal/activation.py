"""Turning the rehearsal on and off in this process."""

import contextlib
import functools
import importlib
import logging
import queue
import sys
from collections.abc import Callable
from typing import Any

import torch

from s3_megatron.errors import S3Error
from s3_megatron.machine import is_first_rank
from s3_megatron.rehearsal import products
from s3_megatron.rehearsal.cuda import BOUND_BY_NAME, STAND_INS, CudaIsCpu
from s3_megatron.swap import SymbolSwap

_undo: contextlib.ExitStack | None = None


def activate() -> None:
    """Make unmodified Megatron train on CPU with gloo in this process; does nothing the second time.

    Replaces parts of torch.cuda (torch 2.13), of DataLoader, and of megatron-core (0.17.1 to 0.19.2); call it before
    Megatron is imported, so that its ``torch.compile`` decorators stay out, too.

    Raises:
        S3Error: this machine has a GPU, $S3_REHEARSAL_PRODUCTS has an unknown word, or a symbol that is replaced has
            moved.
    """
    global _undo
    if _undo is not None:
        return
    if torch.cuda.is_available():
        raise S3Error(
            f"a rehearsal is for machines without a GPU, and this one has {torch.cuda.get_device_name(0)}: drop "
            "--rehearsal (or unset S3_REHEARSAL), or hide the GPU with CUDA_VISIBLE_DEVICES="
        )
    dtypes = products.choose()
    # torch.optim loads it sooner or later, and while it loads it must find torch.cuda's own functions.
    importlib.import_module("torch._dynamo")
    with contextlib.ExitStack() as stack:
        swap = SymbolSwap(f"torch {torch.__version__}")
        stack.callback(swap.undo)
        for name, stand_in in STAND_INS.items():
            _put(swap, torch.cuda, name, stand_in)
        for module, names in BOUND_BY_NAME.items():
            for name in names:
                _put(swap, module, name, STAND_INS[name])
        _put(swap, torch.accelerator, "is_available", lambda: False)
        _put(swap, torch, "compile", _no_compile)
        swap.replace(torch.utils.data.DataLoader, "__iter__", _keep_rng)
        swap.replace(torch.distributed, "all_gather", _of_any_sizes)
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # for what is compiled already
        stack.enter_context(CudaIsCpu())
        if dtypes:
            stack.callback(products.compute_in_float32(dtypes))
        _prepare_megatron(stack)
        _undo = stack.pop_all()
    if is_first_rank():
        print(
            "REHEARSAL on CPU: torch.cuda is replaced and ranks talk over gloo; speeds mean nothing\n"
            f"REHEARSAL {products.describe(dtypes)}",
            file=sys.stderr,
        )


def deactivate() -> None:
    """Put torch and Megatron back; what was decorated or created meanwhile stays as it is."""
    global _undo
    if _undo is not None:
        _undo.close()
        _undo = None


def _put(swap: SymbolSwap, owner: Any, name: str, new: Any) -> None:
    swap.replace(owner, name, lambda _original: new)


def _no_compile(model: Any = None, **kwargs: Any) -> Any:
    """Stand in for torch.compile, with or without arguments: compiling small CPU kernels takes longer than they run."""
    return model if model is not None else lambda function: function


def _keep_rng(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wrap DataLoader.__iter__, which draws a seed from the CPU's generator.

    That generator is the GPU's, too, in a rehearsal: without this, a resumed run, which starts its loaders after it
    has loaded the generator's state, would drop out other elements than an uninterrupted one.
    """

    @functools.wraps(original)
    def __iter__(self: Any) -> Any:
        self.pin_memory = False
        with torch.random.fork_rng(devices=()):
            return original(self)

    return __iter__


def _of_any_sizes(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap torch.distributed.all_gather, by which NCCL gathers tensors of several sizes, too; gloo cannot.

    It returns when all is there: Megatron's ``_LayerwiseAllGatherHandle`` (0.17.1 to 0.19.2) waits for the last of
    several alone, since NCCL keeps their order, and gloo does not.
    """

    @functools.wraps(original)
    def all_gather(tensor_list: list[Any], tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        if len({each.shape for each in tensor_list}) > 1:
            tensor_list[torch.distributed.get_rank(group)].copy_(tensor)
            for rank, each in enumerate(tensor_list):
                if each.numel():
                    torch.distributed.broadcast(each, group=group, group_src=rank)
            return None
        work = original(tensor_list, tensor, group=group, async_op=async_op)
        if work is not None:
            work.wait()
        return work

    return all_gather


def _prepare_megatron(stack: contextlib.ExitStack) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    swap = SymbolSwap("this megatron-core")
    stack.callback(swap.undo)
    # Megatron starts a process (5 s of imports, 0.6 GB) in every rank for a queue that only --async-save needs, and
    # a killed rank leaves it behind.
    _put(swap, filesystem_async, "_results_queue", queue.Queue())
    swap.replace(DistributedOptimizer, "__init__", _allocate_adam)
    swap.replace(DistributedOptimizer, "load_state_dict", _restore_steps)
    swap.replace(LayerWiseDistributedOptimizer, "allgather_params", _broadcast)
    # CudaRNGStatesTracker.fork warns whenever the CPU's generator moves under it, which here is what it forks.
    tracker_log = logging.getLogger("megatron.core.tensor_parallel.random")
    tracker_log.addFilter(_not_about_rng)
    stack.callback(tracker_log.removeFilter, _not_about_rng)


def _broadcast(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap LayerWiseDistributedOptimizer.allgather_params, which gathers tensors of several sizes: gloo cannot."""

    @functools.wraps(original)
    def allgather_params(self: Any) -> None:
        self.broadcast_params()

    return allgather_params


def _not_about_rng(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


def _allocate_adam(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap DistributedOptimizer.__init__ so that torch's Adam has its state on the shards from the start.

    Without Transformer Engine or Apex, ``state_dict()`` demands one common ``step`` even of an optimizer that has
    not stepped, so a torch_dist checkpoint cannot be loaded into it (megatron-core 0.17.1 to 0.19.2,
    core/optimizer/distrib_optimizer.py).
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for _group, param in _adam_params(self.optimizer):
            self.optimizer.state[param] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }

    return __init__


def _restore_steps(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap DistributedOptimizer.load_state_dict so that torch's Adam counts on from the step that was saved.

    It gives every parameter the same ``step`` tensor, which Adam would count up once a parameter, and then loads
    the other tensors: one format copies the ``step`` from before loading over it, another misses it among what was
    saved (KeyError). So it finds no ``step`` there, and the saved one, left in the param groups, is put back
    afterwards (megatron-core 0.17.1 to 0.19.2, core/optimizer/distrib_optimizer.py).
    """

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        if not _adam_params(self.optimizer):
            return original(self, state_dict)
        hook = self.optimizer.register_load_state_dict_post_hook(_drop_steps)
        try:
            original(self, state_dict)
        finally:
            hook.remove()
        for group, param in _adam_params(self.optimizer):
            self.optimizer.state[param]["step"] = torch.tensor(float(group["step"]))

    return load_state_dict


def _drop_steps(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        del state["step"]


def _adam_params(optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """List the parameters of torch's Adam or AdamW with their groups; nothing of any other optimizer."""
    if not isinstance(optimizer, torch.optim.Adam):
        return []
    return [(group, param) for group in optimizer.param_groups for param in group["params"]]
