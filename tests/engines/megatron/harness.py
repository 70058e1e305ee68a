"""A small model under Megatron's DDP, fed with injected gradients, and the unsharded S3 it is compared with.

Gradients are injected, equal on every data-parallel rank, instead of being computed: then the average over ranks is
exact (a sum of 2 or 4 equal numbers, divided by 2 or 4), so a sharded run may differ from an unsharded one by S3's
own arithmetic alone, and the tolerance can be that of float32.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import SkipTest
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s3_megatron import rehearsal

rehearsal.activate()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.optimizer import (  # noqa: E402
    DistributedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
)
from megatron.core.package_info import MAJOR, MINOR, __version__  # noqa: E402
from megatron.core.transformer import MegatronModule, TransformerConfig  # noqa: E402
from megatron.training import arguments, training  # noqa: E402

from s3_megatron.engines.megatron import S3OptimizerConfig, SoftSignumOptimizerConfig, install  # noqa: E402
from s3_megatron.optim import EXP_AVG, EXP_AVG_ROOT, S3  # noqa: E402
from tests.engines.megatron.gpt import flags  # noqa: E402

install()

from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402  (the installed one)

STEPS = 10
LR, DECAY = 3e-3, 0.1
TAKES_ONE_STATE = (MAJOR, MINOR) >= (0, 19)  # the distributed optimizer does, of an optimizer that has one
WRAPPERS = (True, False) if TAKES_ONE_STATE else (False,)  # with the distributed optimizer, and without


def since(minor: int, what: str) -> None:
    """Skip the check on a megatron-core older than 0.``minor``; by its version, so that a newer one never skips."""
    if (MAJOR, MINOR) < (0, minor):
        raise SkipTest(f"megatron-core {__version__} has no {what}, 0.{minor} has")


class Net(MegatronModule):
    """An embedding, a norm, a linear with bias and a single weight: odd sizes, so that shards are uneven."""

    def __init__(self, width: int = 13, vocabulary: int = 101) -> None:
        super().__init__(config=TransformerConfig(num_layers=1, hidden_size=width, num_attention_heads=1))
        self.embedding = nn.Embedding(vocabulary, width)
        self.embedding.weight.is_embedding_or_output_parameter = True
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, 2 * width + 1)
        self.scale = nn.Parameter(torch.ones(1))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return {
            name: dist_checkpointing.ShardedTensor.from_rank_offsets(
                prefix + name,
                tensor,
                replica_id=(0, 0, parallel_state.get_data_parallel_rank(with_context_parallel=True)),
                allow_shape_mismatch=False,
            )
            for name, tensor in self.state_dict(prefix="", keep_vars=True).items()
        }


class Single(MegatronModule):
    """One weight: with it, only the first rank holds anything."""

    def __init__(self) -> None:
        super().__init__(config=TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1))
        self.scale = nn.Parameter(torch.ones(1))


class Scattered(Single):
    """Two weights: on 4 ranks, the second rank's shard is what pads the first weight."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(1))


class Run:
    """A model under Megatron's DDP with a Megatron optimizer, fed with injected gradients."""

    def __init__(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        sharded: bool = True,
        optimizer: str = "s3",
        bucket_size: int | None = None,
        overrides: dict | None = None,
        net: nn.Module | None = None,
        make: Callable[..., MegatronOptimizer] = get_megatron_optimizer,
        **settings: object,
    ) -> None:
        torch.manual_seed(1)
        self.net = (net or Net()).to(dtype)
        config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=sharded,
            bucket_size=bucket_size,
            overlap_grad_reduce=bucket_size is not None,  # Megatron makes one bucket otherwise
        )
        self.ddp = DistributedDataParallel(self.net.config, config, self.net, disable_bucketing=bucket_size is None)
        kind = {"s3": S3OptimizerConfig, "softsignum": SoftSignumOptimizerConfig}.get(optimizer, OptimizerConfig)
        settings = {"lr": LR, "min_lr": 0.0, "weight_decay": DECAY, "clip_grad": 0.0, **settings}
        self.config = kind(
            optimizer=optimizer,
            fp16=dtype == torch.float16,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=sharded,
            **settings,
        )
        self.optimizer: MegatronOptimizer = make(self.config, [self.ddp], overrides)

    @property
    def part(self) -> MegatronOptimizer:
        """The one optimizer inside the chain."""
        (part,) = self.optimizer.chained_optimizers
        return part

    def step(self, gradients: dict[str, Tensor]) -> bool:
        """Inject, reduce, step; returns whether the host took the step."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        scale = self.optimizer.get_loss_scale()
        for name, param in self.net.named_parameters():
            param.main_grad.copy_(gradients[name] * scale)
        if self.ddp.ddp_config.overlap_grad_reduce:
            self.ddp.start_grad_sync()
        self.ddp.finish_grad_sync()  # starts by itself where nothing overlaps; twice would scale twice
        success, self.grad_norm, _ = self.optimizer.step()
        return success

    def weights(self) -> dict[str, Tensor]:
        """The model's parameters, copied."""
        return {name: param.detach().clone() for name, param in self.net.named_parameters()}

    def inner_tensors(self) -> list[Tensor]:
        """Masters, m and r of this rank, copied."""
        inner = self.part.optimizer
        params = [param for group in inner.param_groups for param in group["params"]]
        state = [inner.state[p][name] for p in params for name in inner.spec.state_names]
        return [tensor.detach().clone() for tensor in [*params, *state]]


def gradients(net: nn.Module, step: int) -> dict[str, Tensor]:
    """The same for every rank and layout, from one step to the next of changing size and sign."""
    generator = torch.Generator().manual_seed(100 + step)
    return {
        name: torch.randn(param.shape, generator=generator) * 10.0 ** (step % 5 - 2)
        for name, param in net.named_parameters()
    }


def by_flags(
    optimizer: str, *extra: str, iterations: int, precision: str | None = None, sharded: bool = True, **run: Any
) -> Run:
    """A run of the configuration that Megatron makes of its own command line."""
    given = ("--lr", f"{LR}", "--weight-decay", f"{DECAY}", "--clip-grad", "0", *extra)
    line = flags(iterations=iterations, optimizer=optimizer, precision=precision, extra=given)
    if not sharded:
        line.remove("--use-distributed-optimizer")
    with patch.object(sys, "argv", rehearsal.add_flags([optimizer, *line])):
        arguments.validate_args(args := arguments.parse_args())
    config, _ = training.get_megatron_optimizer_config(args)
    made = Run(make=lambda _, *rest: get_megatron_optimizer(config, *rest), sharded=sharded, **run)
    set_decay(made)
    return made


def unsharded(
    run: Run, kind: type[torch.optim.Optimizer] = S3, **settings: Any
) -> tuple[torch.optim.Optimizer, dict[str, Tensor]]:
    """A plain optimizer over float32 copies of ``run``'s parameters, with Megatron's choice of what decays."""
    copies = {name: nn.Parameter(param.detach().float().clone()) for name, param in run.net.named_parameters()}
    decayed = [p for p in copies.values() if p.ndim > 1]
    others = [p for p in copies.values() if p.ndim == 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return kind(groups, lr=LR, weight_decay=DECAY, **settings), copies


def step_reference(
    optimizer: torch.optim.Optimizer, copies: dict[str, Tensor], grads: dict[str, Tensor], clip: float = 0.0
) -> None:
    """One step of the unsharded run."""
    for name, param in copies.items():
        param.grad = grads[name].clone()
    if clip:
        torch.nn.utils.clip_grad_norm_(copies.values(), clip)
    optimizer.step()


def set_decay(run: Run) -> None:
    """What Megatron's scheduler does at every step: weight decay times the group's multiplier."""
    for group in run.optimizer.param_groups:
        group["weight_decay"] = DECAY * group["wd_mult"]


def compare(run: Run, *, clip: float = 0.0) -> None:
    """Ten steps of ``run`` against the unsharded S3: float32 weights to 1e-6 relative, others to one rounding.

    1e-6, of the weight or of the longest step, is about 8 ULP of float32. Both runs do the same arithmetic on every
    element, but an element may fall into a vector register in one and into the loop's tail in the other.
    """
    reference, copies = unsharded(run)
    before = run.weights()
    set_decay(run)
    for step in range(STEPS):
        grads = gradients(run.net, step)
        assert run.step(grads)
        step_reference(reference, copies, grads, clip)
    for name, weight in run.weights().items():
        expected = copies[name].detach().to(weight.dtype)
        tolerance = 1e-6 if weight.dtype == torch.float32 else 2 * torch.finfo(weight.dtype).eps
        torch.testing.assert_close(weight, expected, rtol=tolerance, atol=1e-6 * LR, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.equal(weight, before[name]), f"S3 did not move {name}"
    # S3's update is the same for any scale of the gradients, so a wrong average does not show in the weights: a test
    # that reduced twice, and saw 3/4 of every gradient, passed for that reason. It shows in m and r.
    for name in (EXP_AVG, EXP_AVG_ROOT):
        sharded = total(run.part.optimizer, name)
        if isinstance(run.part, DistributedOptimizer):
            dist.all_reduce(sharded)
        expected = total(reference, name)
        torch.testing.assert_close(sharded, expected, rtol=1e-5, atol=0.0, msg=lambda m, n=name: f"{n}: {m}")


def total(optimizer: torch.optim.Optimizer, name: str) -> Tensor:
    """Sum one state over all parameters of this rank, in float64."""
    tensors = [state[name].double().sum() for state in optimizer.state.values()]
    return torch.stack(tensors).sum() if tensors else torch.zeros((), dtype=torch.float64)


def _metadata(sharding: str) -> dict[str, Any]:
    """What Megatron's loop says of a checkpoint's form; by the last, keys are without the optimizers' numbers."""
    return {"distrib_optim_sharding_type": sharding, "chained_optim_avoid_prefix": True}


def save(run: Run, folder: Path, sharding: str) -> None:
    model = run.net.sharded_state_dict()
    state = {"optimizer": run.optimizer.sharded_state_dict(model, metadata=_metadata(sharding))}
    dist_checkpointing.save(state, str(folder), validate_access_integrity=False)


def load(run: Run, folder: Path, sharding: str) -> None:
    model = run.net.sharded_state_dict()
    wanted = run.optimizer.sharded_state_dict(model, is_loading=True, metadata=_metadata(sharding))
    run.optimizer.load_state_dict(
        dist_checkpointing.load({"optimizer": wanted}, str(folder), validate_access_integrity=False)["optimizer"]
    )


_LAYOUTS: dict[tuple[int, ...], dict[str, Any]] = {}  # the host's variables, by the sizes of the groups


@contextmanager
def parallel(tensor: int = 1, expert: int = 1, expert_tensor: int | None = None, context: int = 1) -> Iterator[None]:
    """All ranks in tensor-, expert-, expert-tensor- and context-parallel groups of these sizes; data-parallel ones
    across them.

    The groups of a layout are made once: the host's destroy_model_parallel ends none of gloo's threads (0.19.2), and a
    launch of 4 ranks had 2,400 in each.
    """
    host, sizes = vars(parallel_state), (tensor, expert, tensor if expert_tensor is None else expert_tensor, context)

    def variables() -> dict[str, Any]:
        return {name: value for name, value in host.items() if name.startswith("_") and name.isupper()}

    before = variables()
    _LAYOUTS.setdefault((1, 1, 1, 1), before)  # the worker's own
    if sizes not in _LAYOUTS:
        with patch.object(dist, "destroy_process_group"):  # it would end some of the groups, which come back
            parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            context_parallel_size=context,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=sizes[2],
        )
        _LAYOUTS[sizes] = variables()
    host.update(_LAYOUTS[sizes])
    try:
        yield
    finally:
        host.update(before)
