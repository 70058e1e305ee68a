"""A net of matrices on Megatron's road for them, whole or in tensor-parallel parts, and the unsharded run beside it."""

import functools
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.training import arguments, training
from torch import Tensor, nn

from s3_megatron import rehearsal
from s3_megatron.engines.megatron.factory import parts_of
from s3_megatron.optim import S3, EngineOptimizer, SoftMuon, SoftSignum
from tests.engines.megatron import harness as on
from tests.engines.megatron.gpt import flags

STEPS, HARD = 8, 4
SHAPES = {"linear_qkv.weight": (16, 8), "fc1.weight": (20, 8), "fc2.weight": (8, 20), "gate.weight": (6, 8)}
CUT = {"linear_qkv.weight": 0, "fc1.weight": 0, "fc2.weight": 1}  # by tensor-parallel ranks; the gate is on all
EXPERT = "experts.weight"  # where there is one
QKV = (4, 2, 2)  # of four heads in two groups


class Net(MegatronModule):
    """An embedding, a norm, and the matrices of a layer, each of which this rank has its tensor-parallel part of."""

    def __init__(self) -> None:
        layout = {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 2}
        super().__init__(config=TransformerConfig(num_layers=1, hidden_size=8, **layout))
        for name in SHAPES:
            self.add_module(name.partition(".")[0], nn.Module())
        self.embedding, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.embedding.weight.is_embedding_or_output_parameter = True
        for name, value in whole_weights().items():
            param = nn.Parameter(mine(name, value).clone())
            if name in SHAPES:
                self.get_submodule(name.partition(".")[0]).weight = param
                param.tensor_model_parallel, param.partition_stride = name in CUT, 1
                param.partition_dim = CUT.get(name, -1)
                param.allreduce = name != EXPERT
            else:
                self.get_parameter(name).data.copy_(value)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        rank, ranks = parallel_state.get_tensor_model_parallel_rank(), size()
        return {
            name: dist_checkpointing.ShardedTensor.from_rank_offsets(
                prefix + name,
                tensor,
                *([(CUT[name], rank, ranks)] if name in CUT else []),
                replica_id=(
                    0,
                    0 if name in CUT else rank,
                    parallel_state.get_data_parallel_rank(with_context_parallel=True),
                ),
            )
            for name, tensor in self.state_dict(prefix="", keep_vars=True).items()
        }


def size() -> int:
    return parallel_state.get_tensor_model_parallel_world_size()


def mine(name: str, value: Tensor) -> Tensor:
    """This rank's tensor-parallel part."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    return value.chunk(size(), dim=CUT[name])[rank] if name in CUT else value


def whole_weights() -> dict[str, Tensor]:
    """Exact in bfloat16, of which Megatron makes its float32 masters."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"embedding.weight": (11, 8), "norm.weight": (8,), "norm.bias": (8,), **SHAPES}
    return {name: torch.randn(shape, generator=generator).bfloat16().float() for name, shape in shapes.items()}


def whole_gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    weights = whole_weights().items()
    return {name: torch.randn(w.shape, generator=generator) * 10.0 ** (step % 5 - 4) for name, w in weights}


class Run:
    """The net under Megatron's DDP, with the optimizer that Megatron makes of a command line."""

    def __init__(
        self,
        *extra: str,
        precision: str | None = "bf16",
        layer_wise: bool = True,
        optimizer: str = "softmuon",
        bucketing: bool = True,
        layout: bool = True,
        shards: bool = False,
        make: Callable[[list[Any]], MegatronOptimizer] | None = None,
        net: MegatronModule | None = None,
    ):
        own = ("--softmuon-soft-start", "0.5") if optimizer == "softmuon" else ()
        given = ("--lr", f"{on.LR}", "--weight-decay", f"{on.DECAY}", "--clip-grad", "0", *own, *extra)
        given += ("--context-parallel-size", f"{parallel_state.get_context_parallel_world_size()}")
        line = flags(iterations=STEPS, optimizer=optimizer, precision=precision, tensor_parallel=size(), extra=given)
        if not layer_wise:
            line.remove("--use-distributed-optimizer")
        with patch.object(sys, "argv", rehearsal.add_flags(["softmuon", *line])):
            arguments.validate_args(args := arguments.parse_args())
        config, _ = training.get_megatron_optimizer_config(args)
        self.net = (net or Net()).to(args.params_dtype)
        (self.ddp,) = training.wrap_model_chunks_with_ddp(
            [self.net],
            self.net.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=shards),
            use_layer_wise_distributed_optimizer=args.use_layer_wise_distributed_optimizer and not shards,
            use_layer_wise_param_layout=layout,
            disable_bucketing_per_chunk=[not bucketing],
        )
        make = make or functools.partial(on.get_megatron_optimizer, config)
        self.optimizer: MegatronOptimizer = make([self.ddp])
        on.set_decay(self)

    def of(self, kind: type) -> Any:
        (found,) = [part.optimizer for part in parts_of(self.optimizer) if type(part.optimizer) is kind]
        return found

    @property
    def softmuon(self) -> SoftMuon:
        return self.of(SoftMuon)

    def step(self, grads: dict[str, Tensor]) -> bool:
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        for name, param in self.net.named_parameters():
            param.main_grad.copy_(mine(name, grads[name]))
        self.ddp.finish_grad_sync()
        return bool(self.optimizer.step()[0])

    def weights(self) -> dict[str, Tensor]:
        """What this rank has of the model."""
        return {name: param.detach().clone() for name, param in self.net.named_parameters()}

    def masters(self) -> dict[str, Tensor]:
        """The matrices that this rank moves, in float32."""
        named = {id(param): name for name, param in self.net.named_parameters()}
        pairs = [(p, getattr(p, "main_param", p)) for p in self.net.parameters()]
        held = {id(p) for group in self.softmuon.param_groups for p in group["params"]}
        return {named[id(p)]: main.detach().clone() for p, main in pairs if id(main) in held}

    def everything(self) -> tuple[list[Tensor], list[Any]]:
        """Weights, masters and state of this rank; and the numbers of the schedule."""
        inner = [part.optimizer for part in parts_of(self.optimizer)]
        state = [
            x.clone() for each in inner for entry in each.state.values() for x in entry.values() if hasattr(x, "clone")
        ]
        numbers = [self.softmuon.schedule, self.softmuon.tau]
        numbers += [group["steps_taken"] for group in self.softmuon.param_groups]
        return [*self.weights().values(), *self.masters().values(), *map(torch.as_tensor, state)], numbers


def unsharded(rest: type[EngineOptimizer] = S3, **settings: Any) -> tuple[list[Any], dict[str, nn.Parameter]]:
    copies = {name: nn.Parameter(value) for name, value in whole_weights().items()}
    matrices = [{"params": [copies[name]], **({"qkv_split_shapes": QKV} if "qkv" in name else {})} for name in SHAPES]
    phases = {"total_steps": STEPS, "soft_start": 0.5}
    muon = SoftMuon(matrices, on.LR, weight_decay=on.DECAY, process_group=alone(), **{**phases, **settings})
    others = [{"params": [copies["embedding.weight"]]}]
    others.append({"params": [copies["norm.weight"], copies["norm.bias"]], "weight_decay": 0.0})
    more = {"process_group": alone(), **phases} if rest is SoftSignum else {}
    return [muon, rest(others, on.LR, weight_decay=on.DECAY, **more)], copies


@functools.cache
def alone() -> dist.ProcessGroup:
    """A group of this rank alone; all ranks come here."""
    return [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]


def advance(optimizers: list[Any], copies: dict[str, nn.Parameter], grads: dict[str, Tensor]) -> None:
    for name, param in copies.items():
        param.grad = grads[name].clone()
    for optimizer in optimizers:
        optimizer.step()


def compare(run: Run, optimizers: list[Any], copies: dict[str, nn.Parameter], map_error: float) -> None:
    """Masters to 1e-6 of the weight, some 8 ULP, and ``map_error`` of the longest step; model weights to a rounding."""
    step = on.LR * 0.2 * 20**0.5
    for name, master in run.masters().items():
        wanted = mine(name, copies[name].data)
        torch.testing.assert_close(master, wanted, rtol=1e-6, atol=map_error * step, msg=lambda m, n=name: f"{n}: {m}")
    for name, weight in run.weights().items():
        wanted, eps = mine(name, copies[name].data), torch.finfo(weight.dtype).eps
        rounding = 2 * eps if weight.dtype == torch.bfloat16 else 0.0
        error = map_error * step if name in SHAPES else 1e-6 * on.LR
        torch.testing.assert_close(
            weight.float(), wanted, rtol=1e-6 + rounding, atol=error, msg=lambda m, n=name: f"{n}: {m}"
        )
        moved = (wanted - mine(name, whole_weights()[name])).abs().max()
        assert moved > 10 * error, f"{name} moved by {moved} alone"
    ours, theirs = run.softmuon.schedule, optimizers[0].schedule
    assert (ours.first, ours.length) == (theirs.first, theirs.length) == (HARD, STEPS - HARD)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert abs(a - b) <= 1e-6 * abs(b), (a, b)


HIGHEST = ("--softmuon-fp32-matmul-prec", "highest")


def trained(run: Run, settings: dict[str, Any] | None = None, **more: Any) -> tuple[list[Any], dict[str, nn.Parameter]]:
    """The unsharded run beside ``run``, both after all steps."""
    optimizers, copies = unsharded(**(settings or {}), **more)
    for step in range(STEPS):
        assert run.step(whole_gradients(step))
        advance(optimizers, copies, whole_gradients(step))
    return optimizers, copies
