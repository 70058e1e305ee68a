"""Megatron's training loop (megatron-core 0.19.2) with DeepSpeed's engine (0.19.8) in its optimizer's place.

The loop, its data, schedule, validation, logging and ways to end stay Megatron's. What binds it to Megatron's
optimizer is replaced: how model and optimizer are set up, one training step, and checkpoints.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import megatron.training.training as host
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel.schedules import forward_step
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import unwrap_model
from megatron.training import get_args, get_timers
from torch import Tensor, nn

from s3_megatron.engines.deepspeed import decay_groups, register, use_gloo
from s3_megatron.engines.deepspeed import watch as deepspeed_watch
from s3_megatron.engines.megatron import watch as megatron_watch
from s3_megatron.optim import registry
from s3_megatron.swap import SymbolSwap
from s3_megatron.train import deepspeed_checkpoint, deepspeed_matrices, gpt
from s3_megatron.train.deepspeed_config import Config, DeepSpeedFlags, refusals


def train() -> None:
    """Pretrain as the command line says.

    Raises:
        S3Error: a flag, a file or the vocabulary is wrong, or the flags and DeepSpeed's file contradict each other.
    """
    flags = DeepSpeedFlags(sys.argv[1:])
    args = gpt.parse(flags.add, flags.check)
    config = flags.complete(args)
    register()
    if get_accelerator().device_name() == "cpu":
        use_gloo()
    with _in_megatrons_loop(config):
        gpt.run(args)


@contextmanager
def _in_megatrons_loop(config: Config) -> Iterator[None]:
    """Replace what binds the loop to Megatron's optimizer."""
    swap = SymbolSwap("this megatron-core")
    swap.replace(host, "setup_model_and_optimizer", lambda _: functools.partial(setup_model_and_optimizer, config))
    swap.replace(host, "train_step", lambda _: train_step)
    swap.replace(host, "save_checkpoint", lambda _: deepspeed_checkpoint.save)
    try:
        yield
    finally:
        swap.undo()


class EngineModel(nn.Module):
    """What Megatron's loop takes for its model: it runs DeepSpeed's engine, and has the model's attributes."""

    def __init__(self, engine: Any) -> None:
        """Stand before ``engine``, whose model is this one's ``module``, as in Megatron's own wrappers."""
        super().__init__()
        self.module = engine.module
        self._engine = (engine,)  # in a tuple, so that it is not a submodule, which would count its parameters twice

    @property
    def engine(self) -> Any:
        """The DeepSpeedEngine."""
        return self._engine[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self.engine(*args, **kwargs)

    def train(self, mode: bool = True) -> "EngineModel":
        """Turn dropout on or off."""
        self.engine.train(mode)
        return super().train(mode)


class EngineOptimizer:
    """What Megatron's loop and its OptimizerParamScheduler ask of an optimizer."""

    is_stub_optimizer = False

    def __init__(self, engine: Any) -> None:
        """Stand before the optimizer of ``engine``."""
        self._engine = engine

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups whose rate and decay the schedule sets."""
        groups: list[dict[str, Any]] = self._engine.basic_optimizer.param_groups
        return groups

    def get_loss_scale(self) -> Tensor:
        """Give the loss scale, for the log: 1 but in fp16."""
        return torch.tensor(float(getattr(self._engine.optimizer, "loss_scale", 1.0)))

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return ``loss``: the engine scales it."""
        return loss


def setup_model_and_optimizer(
    config: Config, model_type: Any, cfg_container: Any, pg_collection: Any, **_unused: Any
) -> tuple[list[EngineModel], EngineOptimizer, Any]:
    """Replace ``megatron.training.training.setup_model_and_optimizer``; ``config`` is DeepSpeed's."""
    args = get_args()
    builder = cfg_container.model.get_builder_cls()(cfg_container.model)
    (model,) = builder.build_distributed_models(pg_collection=pg_collection, wrap_with_ddp=False)
    _leave_out_empty_extra_state(unwrap_model(model))
    if (spec := registry.find(args.optimizer)) is not None and spec.beside:
        params = config["optimizer"]["params"]
        split_qkv = getattr(args, spec.field("split_qkv"))
        deepspeed_matrices.describe(model, unwrap_model(model).config, params, split_qkv=split_qkv)
    with refusals(args.deepspeed_config):
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=_param_groups(model), config=config, dist_init_required=False
        )
    optimizer = EngineOptimizer(engine)
    scheduler = host.get_optimizer_param_scheduler(optimizer)
    if (run := megatron_watch.run()) is not None:
        run.observer.add([deepspeed_watch.part(engine, args.optimizer)])
    args.iteration, args.num_floating_point_operations_so_far = deepspeed_checkpoint.load(engine, scheduler)
    return [EngineModel(engine)], optimizer, scheduler


def _leave_out_empty_extra_state(model: nn.Module) -> None:
    """Keep ``_extra_state`` that is None, as of every linear layer without FP8, out of checkpoints.

    ds_to_universal (deepspeed 0.19.8) calls ``float()`` on all that is not a trained parameter.
    """

    def drop(module: nn.Module, state_dict: dict[str, Any], *_unused: Any) -> None:
        for key in [key for key, value in state_dict.items() if value is None]:
            del state_dict[key]

    def forgive(module: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith("_extra_state")]

    model.register_state_dict_post_hook(drop)
    model.register_load_state_dict_post_hook(forgive)


def _param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Split the parameters as Megatron does, with its names for what its scheduler reads.

    It multiplies every group's decay by ``wd_mult``, and logs the rate of the ``default_config`` group.
    """
    groups = decay_groups(model)
    for group in groups:
        group["wd_mult"] = float("weight_decay" not in group)
    groups[0]["default_config"] = True
    return groups


def train_step(
    forward_step_func: Callable[..., Any],
    data_iterator: Iterator[Any],
    model: list[EngineModel],
    optimizer: EngineOptimizer,
    opt_param_scheduler: Any,
    config: Any,
    *_unused: Any,
    **_unused_too: Any,
) -> tuple[Any, ...]:
    """Replace ``megatron.training.training.train_step``; returns what it returns.

    ``forward_step`` divides a micro-batch's loss by its tokens and by the number of micro-batches, and the engine
    averages gradients over ranks: what Megatron does.
    """
    args, timers = get_args(), get_timers()
    engine, count = model[0].engine, get_num_microbatches()
    losses: list[dict[str, Tensor]] = []
    rerun = get_rerun_state_machine()
    while rerun.should_run_forward_backward(data_iterator):
        timers("forward-backward", log_level=1).start(barrier=args.barrier_with_L1_time)
        for index in range(count):
            if index:
                engine.step()  # only counts: the engine accumulates
            loss, _ = forward_step(forward_step_func, data_iterator, model[0], count, None, losses, config, 1)
            engine.backward(loss, scale_wrt_gas=False)
        timers("forward-backward").stop()
    timers("optimizer", log_level=1).start(barrier=args.barrier_with_L1_time)
    engine.step()
    timers("optimizer").stop()
    if engine.was_step_applied():
        opt_param_scheduler.step(increment=args.micro_batch_size * args.data_parallel_size * count)
    skipped = int(not engine.was_step_applied())
    norm = engine.get_global_grad_norm()
    norm = None if norm is None else float(norm)
    return _mean_losses(losses), skipped, *rerun.should_checkpoint_and_exit(), norm, None, 0


def _mean_losses(losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Divide the losses by the tokens of all micro-batches and ranks, as Megatron's train_step does."""
    means = {}
    for key in losses[0]:
        total = torch.vstack([loss[key].view(-1) for loss in losses]).sum(dim=0)
        dist.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
        means[key] = total[0] / total[1]
    return means
