"""Runs on ranks, from worker.py: experts, whose data-parallel ranks are others than the dense weights', in both phases.

Megatron makes an optimizer of its own of them, and the temperature is one for all.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor, nn

from s3_megatron.engines.megatron.factory import parts_of
from s3_megatron.optim import EXP_AVG, S3, EngineOptimizer, SoftSignum
from tests.engines.megatron import harness as on
from tests.engines.megatron.softmuon_harness import alone
from tests.rank_checks import refuses, shared_folder

STEPS, HARD, EXPERTS = 8, 4, 4
DENSE = {"embedding_weight": (11, 8), "norm_weight": (8,), "router_weight": (EXPERTS, 8), "linear_weight": (12, 8)}
EXPERT = {"fc1_weight": (6, 8), "fc2_weight": (8, 6), "fc2_bias": (8,)}
SHAPES = DENSE | {f"experts{i}_{name}": shape for i in range(EXPERTS) for name, shape in EXPERT.items()}
CUT = {"linear_weight": 0, "fc1_weight": 0, "fc2_weight": 1}  # by tensor-parallel ranks; the rest is on all
# Sizes of tensor-, expert-, expert-tensor- and context-parallel groups, by the number of ranks.
LAYOUTS = {
    2: [(1, 2, 1), (2, 2, 1), (2, 1, 1), (1, 2, 1, 2)],
    4: [(1, 2, 1), (1, 4, 1), (2, 2, 1), (2, 2, 2), (2, 4, 1), (1, 2, 1, 2)],
}
# Context-parallel ranks have the same dense weights as data-parallel ones, and experts' groups know no others.
WITH_CONTEXT = {"data_parallel": {"with_context_parallel": True}}
SOFT = ("--softsignum-soft-start", "0.5")
Change = Callable[[dict[str, Tensor]], None]


def rank_in(kind: str) -> int:
    return getattr(parallel_state, f"get_{kind}_rank")(**WITH_CONTEXT.get(kind, {}))


def size_of(kind: str) -> int:
    return getattr(parallel_state, f"get_{kind}_world_size")(**WITH_CONTEXT.get(kind, {}))


def cut_of(name: str) -> tuple[int, int, int] | None:
    """The dimension that tensor-parallel ranks cut, this rank's number among them, and theirs."""
    dim = CUT.get(name[9:] if name.startswith("expert") else name)
    kind = "expert_tensor_parallel" if name.startswith("expert") else "tensor_model_parallel"
    return None if dim is None else (dim, rank_in(kind), size_of(kind))


def mine(name: str, value: Tensor) -> Tensor:
    cut = cut_of(name)
    return value if cut is None else value.chunk(cut[2], dim=cut[0])[cut[1]]


def whole_weights() -> dict[str, Tensor]:
    """Exact in bfloat16, of which Megatron makes its float32 masters."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).bfloat16().float() for name, shape in SHAPES.items()}


def whole_gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator) * 10.0 ** (step % 5 - 4) for name, shape in SHAPES.items()}


class Net(MegatronModule):
    """Dense weights, and this rank's experts; of each the part that this rank has, marked as the host's layers do."""

    def __init__(self) -> None:
        super().__init__(config=TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1))
        each = EXPERTS // size_of("expert_model_parallel")
        first = rank_in("expert_model_parallel") * each
        own_ranks = each < EXPERTS or size_of("expert_tensor_parallel") != size_of("tensor_model_parallel")
        for name, value in whole_weights().items():
            is_expert = name.startswith("expert")
            if is_expert and not first <= int(name[7]) < first + each:
                continue
            param = nn.Parameter(mine(name, value).clone())
            cut = cut_of(name)
            param.tensor_model_parallel, param.partition_stride = cut is not None, 1
            param.partition_dim = -1 if cut is None else cut[0]
            param.allreduce = not (is_expert and own_ranks)
            param.is_embedding_or_output_parameter = name == "embedding_weight"
            self.register_parameter(name, param)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        made = {}
        for name, param in self.named_parameters():
            kinds = ("tensor_model_parallel", "data_parallel")
            if name.startswith("expert"):
                kinds = ("expert_tensor_parallel", "expert_data_parallel")
            cut = cut_of(name)
            replica = (0, 0 if cut else rank_in(kinds[0]), rank_in(kinds[1]))
            made[name] = dist_checkpointing.ShardedTensor.from_rank_offsets(
                prefix + name, param, *([cut] if cut else []), replica_id=replica
            )
        return made


def started(
    optimizer: str = "softsignum", *, sharded: bool = True, dtype: torch.dtype = torch.float32, frozen: str = "none"
) -> on.Run:
    net = Net()
    for name, param in net.named_parameters():
        param.requires_grad_(not name.startswith(frozen))
    precision = {torch.float32: None, torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    given = (*SOFT, *(("--initial-loss-scale", "1024", "--hysteresis", "1") if precision == "fp16" else ()))
    return on.by_flags(optimizer, *given, iterations=STEPS, precision=precision, sharded=sharded, dtype=dtype, net=net)


def inner(run: on.Run) -> list[EngineOptimizer]:
    return [part.optimizer for part in parts_of(run.optimizer)]


def step(run: on.Run, grads: dict[str, Tensor]) -> bool:
    """Step by what the whole model's gradients are; the host divides an expert's sum over few ranks by all of them."""
    factor = size_of("data_parallel") / size_of("expert_data_parallel")
    params = dict(run.net.named_parameters())
    mean = {
        name: mine(name, grads[name]) * (1.0 if param.allreduce else factor)
        for name, param in params.items()
        if param.requires_grad
    }
    run.ddp.zero_grad_buffer()
    run.optimizer.zero_grad()
    scale = run.optimizer.get_loss_scale()
    for name, grad in mean.items():
        params[name].main_grad.copy_(grad * scale)
    run.ddp.finish_grad_sync()
    return run.optimizer.step()[0]


def unsharded(kind: type[EngineOptimizer] = SoftSignum, frozen: str = "none") -> tuple[Any, dict[str, nn.Parameter]]:
    copies = {name: nn.Parameter(value) for name, value in whole_weights().items() if not name.startswith(frozen)}
    groups = [
        {"params": [p for p in copies.values() if p.ndim > 1]},
        {"params": [p for p in copies.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    own = {"total_steps": STEPS, "soft_start": 0.5, "process_group": alone()} if kind is SoftSignum else {}
    return kind(groups, lr=on.LR, weight_decay=on.DECAY, **own), copies


def numbers(run: on.Run) -> set[tuple[Any, ...]]:
    """Schedule, temperature and steps of every optimizer on every rank."""
    own = {(each.schedule, each.tau, group["steps_taken"]) for each in inner(run) for group in each.param_groups}
    everywhere: list[set[Any]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return set.union(*everywhere)


def compare(run: on.Run, copies: dict[str, nn.Parameter]) -> None:
    """Weights to 1e-6, 8 ULP of float32, of the weight or of the longest step; those in 16 bits to one rounding."""
    for name, weight in run.weights().items():
        wanted = mine(name, copies[name].data if name in copies else whole_weights()[name])
        rounding = 0.0 if weight.dtype == torch.float32 else 2 * torch.finfo(weight.dtype).eps
        torch.testing.assert_close(
            weight.float(), wanted, rtol=1e-6 + rounding, atol=1e-6 * on.LR, msg=lambda m, n=name: f"{n}: {m}"
        )


def trained(run: on.Run, *, frozen: str = "none", change: Change = lambda grads: None) -> None:
    """All steps beside the unsharded run; every optimizer on every rank has its schedule, to the bit."""
    reference, copies = unsharded(frozen=frozen)
    for number in range(STEPS):
        grads = whole_gradients(number)
        change(grads)
        assert step(run, grads)
        on.step_reference(reference, copies, grads)
        assert numbers(run) == {(reference.schedule, reference.tau, number + 1)}, number
    assert reference.schedule.first == HARD
    compare(run, copies)


def check_softsignum_with_experts_equals_the_unsharded_run() -> None:
    """Each optimizer had a median of its own. Dense weights are on all expert-parallel ranks, routers and norms on all
    tensor-parallel ones, an expert's bias on its own: each counts once, so the schedule is that of one process, to the
    bit."""
    for layout in LAYOUTS[dist.get_world_size()]:
        for sharded in on.WRAPPERS:
            for dtype in (torch.float32, torch.bfloat16):
                with on.parallel(*layout):
                    run = started(sharded=sharded, dtype=dtype)
                    assert len(inner(run)) == 2, layout
                    trained(run)


def check_frozen_experts_and_frozen_dense_weights() -> None:
    """Of what is frozen there is no optimizer, or one without weights: it counts for nothing."""
    with on.parallel(1, 2):
        for sharded in on.WRAPPERS:
            for frozen in ("expert", "experts0", ("embedding", "norm", "router", "linear")):
                trained(started(sharded=sharded, frozen=frozen), frozen=frozen)


def check_an_expert_without_tokens_has_an_update_of_0() -> None:
    """For whole steps, in both phases, and throughout: a gradient of 0, and an m that counts."""

    def idle(grads: dict[str, Tensor]) -> None:
        for name, grad in grads.items():
            if name.startswith(("experts1", "experts3")):
                grad.zero_()

    with on.parallel(1, 2):
        for sharded in on.WRAPPERS:
            run = started(sharded=sharded)
            trained(run, change=idle)
            for name, weight in run.weights().items():
                if name.startswith(("experts1", "experts3")):
                    decay = 1.0 if weight.ndim == 1 else (1 - on.LR * on.DECAY) ** STEPS
                    torch.testing.assert_close(weight, mine(name, whole_weights()[name]) * decay)


def check_an_experts_overflow_is_skipped_everywhere() -> None:
    """On one rank, in fp16, where the soft phase would begin and in it: no optimizer steps, no schedule advances."""
    with on.parallel(1, 2):
        for sharded in on.WRAPPERS:
            run = started(sharded=sharded, dtype=torch.float16)
            for number in range(STEPS):
                if number in (HARD, HARD + 1):
                    before, found = run.weights(), numbers(run)
                    bad = whole_gradients(3)
                    bad["experts0_fc1_weight"][1, 2] = float("inf")
                    assert not step(run, bad)
                    assert numbers(run) == found
                    assert all(torch.equal(before[name], weight) for name, weight in run.weights().items())
                assert step(run, whole_gradients(3))
            ((schedule, _, taken),) = numbers(run)
            assert (schedule.first, taken) == (HARD, STEPS)


def loaded(run: on.Run, weights: dict[str, Tensor], folder: Path, kind: str) -> on.Run:
    for name, param in run.net.named_parameters():
        param.data.copy_(mine(name, weights[name]))
    on.load(run, folder, kind)
    on.set_decay(run)
    return run


def whole(run: on.Run) -> dict[str, Tensor]:
    """The model's weights, of all ranks; a part where tensor-parallel ranks cut them is not needed here."""
    everywhere: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, run.weights())
    return {name: weight for rank in everywhere for name, weight in rank.items()}


def check_experts_resume_to_the_bit_in_both_phases() -> None:
    with on.parallel(1, 2):
        for kind, sharded in (("dp_reshardable", True), ("fully_reshardable", True), ("none", False)):
            if sharded not in on.WRAPPERS:
                continue
            run, resumed = started(sharded=sharded), []
            for number in range(STEPS):
                if number in (2, HARD, HARD + 1, HARD + 2):
                    on.save(run, folder := shared_folder(), kind)
                    resumed.append(loaded(started(sharded=sharded), whole(run), folder, kind))
                assert all(step(each, whole_gradients(number)) for each in (run, *resumed))
            for other in resumed:
                assert numbers(other) == numbers(run), kind
                assert all(torch.equal(run.weights()[name], weight) for name, weight in other.weights().items())
                for a, b in zip(inner(run), inner(other), strict=True):
                    pairs = zip(a.state.values(), b.state.values(), strict=True)
                    assert all(torch.equal(x[EXP_AVG], y[EXP_AVG]) for x, y in pairs), kind


def check_experts_resume_under_another_expert_parallelism() -> None:
    """With --expert-model-parallel-size 1 experts are in the dense weights' optimizer, with more in a second one: it
    was RuntimeError 'Expected 2 entries in state dict, but got 4' or KeyError 'optimizer', of Adam too. In both phases,
    to and fro; S3 as well."""
    changes = [(1, 2), (2, 1)] if dist.get_world_size() == 2 else [(1, 4), (2, 4), (4, 1)]
    for before, after in changes:
        for name, kind in (("softsignum", SoftSignum), ("s3", S3)):
            for sharded in on.WRAPPERS if name == "softsignum" else (True, False):
                for saved_at in (2, HARD + 2):
                    reference, copies = unsharded(kind)
                    with on.parallel(1, before):
                        run = started(name, sharded=sharded)
                        for number in range(saved_at):
                            assert step(run, whole_gradients(number))
                        on.save(run, folder := shared_folder(), "fully_reshardable")
                        weights = whole(run)
                    with on.parallel(1, after):
                        run = loaded(started(name, sharded=sharded), weights, folder, "fully_reshardable")
                        for number in range(STEPS):
                            on.step_reference(reference, copies, whole_gradients(number))
                            if number >= saved_at:
                                assert step(run, whole_gradients(number))
                        if name == "softsignum":
                            assert numbers(run) == {(reference.schedule, reference.tau, STEPS)}
                        compare(run, copies)


def check_adam_says_that_experts_moved() -> None:
    """2 to 1 was a KeyError 'optimizer', of which our entry made that the checkpoint has no optimizer's state."""
    for before, after in ((1, 2), (2, 1)):
        for name, advice in (("adam", "--expert-model-parallel-size"), ("s3", "--optimizer s3")):
            with on.parallel(1, before):
                run = started(name)
                assert step(run, whole_gradients(0))
                on.save(run, folder := shared_folder(), "fully_reshardable")
            with on.parallel(1, after):
                refuses(lambda f=folder: on.load(started("adam"), f, "fully_reshardable"), advice, "--no-load-optim")
