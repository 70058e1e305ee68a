"""The worker's checks of what DeepSpeed can do besides: offload, 16-bit masters, experts, zero.Init."""

import functools
import itertools
import warnings
from typing import Any
from unittest import SkipTest

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_optimizer_state,
)
from torch import nn
from torch.optim import lr_scheduler as schedules

from s3_megatron.engines.deepspeed import activity, decay_groups
from s3_megatron.engines.deepspeed.layout import masters
from s3_megatron.optim import S3
from tests.engines.deepspeed.harness import (
    DECAY,
    FLOAT32_ACCUMULATION,
    LR,
    STATES,
    STEPS_SHORT,
    Net,
    Reference,
    Run,
    close,
    compare,
    equal,
    gradients,
    groups,
    logged,
    same,
)
from tests.engines.deepspeed.window import OLD, ZERO_OF_16_BIT
from tests.rank_checks import refuses

# Where a step does not use every parameter: stage, precision, and what else makes the run.
UNUSED: list[tuple[int, str, dict[str, Any]]] = [
    (0, "fp32", {}),
    (1, "fp32", {}),
    (1, "bf16", {"offload": True}),
    (1, "bf16", FLOAT32_ACCUMULATION),
    (2, "fp32", {}),
    (2, "bf16", {"offload": True}),
    (3, "fp32", {}),
    (3, "bf16", {"zero": {"sub_group_size": 400}}),
    (3, "fp32", {"offload": True}),
]
if OLD:  # two micro-batches are refused there (limits.py)
    UNUSED = [case for case in UNUSED if case[2] != FLOAT32_ACCUMULATION and (case[0] != 2 or "offload" in case[2])]


def check_offload_equals_no_offload() -> None:
    """To the bit on a CPU, where both use the same kernel; a GPU's Triton kernel may differ by 1e-6.

    With clipping to rounding: DeepSpeed sums the norm under offload in another order, and on a CPU without AVX-512 its
    last bits differed (4.1714873 and 4.1714869 of a GPT-2). The tolerances are those of clipping without offload.
    """
    for stage in (1, 2, 3):
        for precision in ("fp32", "bf16"):
            plain, offloaded = Run(stage, precision), Run(stage, precision, offload=True)
            for step in range(STEPS_SHORT):
                assert plain.step(gradients(step)) and offloaded.step(gradients(step))
            equal([*offloaded.weights().values()], [*plain.weights().values()])
            for name in STATES:
                equal([*offloaded.state(name).values()], [*plain.state(name).values()])
            assert {tensor.device.type for tensor in offloaded.everything()} == {"cpu"}
        if not OLD:
            compare(Run(stage, clip=0.5, offload=True), clip=0.5)
            compare(Run(stage, "bf16", clip=0.5, offload=True), clip=0.5, tolerance=1e-5)
    compare(Run(3, "bf16", offload=True, zero={"offload_param": {"device": "cpu"}, "sub_group_size": 400}))


def check_16_bit_masters_and_states() -> None:
    """A bfloat16 master is moved in float32 and rounded once a step: 2^-8 of the weight, STEPS_SHORT times."""
    if OLD:
        raise SkipTest("DeepSpeed 0.17.6 has neither bf16_master_weights_and_grads nor its states")
    both = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    cases = [
        (1, False, both, torch.bfloat16),
        (2, False, both, torch.bfloat16),
        (3, False, both, torch.bfloat16),
        (1, True, both, torch.bfloat16),
        (2, True, {"bf16_master_weights_and_grads": True}, torch.float32),
        (3, True, {"bf16_master_weights_and_grads": True}, torch.float32),
        (3, True, both, torch.bfloat16),
    ]
    for stage, offload, options, state_dtype in cases:
        run = Run(stage, "bf16", offload=offload, bf16=options)
        assert {m.dtype for m in masters(run.wrapper)} == {torch.bfloat16}
        assert run.s3.state_dtype == state_dtype
        reference = Reference()
        for step in range(STEPS_SHORT):
            assert run.step(gradients(step))
            reference.step(gradients(step))
        assert {run.s3.state[m][name].dtype for m in masters(run.wrapper) for name in STATES} == {state_dtype}
        weights = {name: weight.float() for name, weight in run.weights().items()}
        close(weights, reference.weights(), rtol=STEPS_SHORT * 2**-8, atol=LR / 2)
    refuses(lambda: Run(2, "bf16", bf16=both, params={"state_dtype": "float32"}), "bf16_optimizer_states", "float32")


def check_half_size_states() -> None:
    run = Run(2, "bf16", params={"state_dtype": "bfloat16"})
    reference = Reference(state_dtype=torch.bfloat16)
    for step in range(STEPS_SHORT):
        assert run.step(gradients(step))
        reference.step(gradients(step))
    close(run.weights(), reference.weights(), rtol=1e-6, atol=1e-6 * LR)


def check_client_optimizers_need_no_flags() -> None:
    """An S3 object, and a function that makes one, with offload too: no zero_allow_untested_optimizer, no others."""
    for stage, offload in ((0, False), (1, False), (2, True), (3, True)):
        net = Net()
        precision = "bf16" if stage in ZERO_OF_16_BIT else "fp32"
        compare(Run(stage, precision, offload=offload, net=net, client=S3(groups(net), lr=LR, weight_decay=DECAY)))
        compare(Run(stage, offload=offload, client=lambda params: S3(params, lr=LR, weight_decay=DECAY)))


def check_type_in_lower_case() -> None:
    assert type(Run(1, optimizer="s3").s3) is S3


def check_moe_groups_are_moved_whole() -> None:
    """DeepSpeed splits experts off into param groups of their own; every weight, theirs too, makes S3's first step:
    lr * (0.2118 * sign(g) + decay * x), whose size no gradient enters."""
    torch.manual_seed(0)
    ranks = dist.get_world_size()
    for stage in (1, 2):
        torch.manual_seed(dist.get_rank())  # expert-parallel ranks hold different experts
        expert = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
        layer = deepspeed.moe.layer.MoE(8, expert, num_experts=ranks, ep_size=ranks, k=1, min_capacity=0)
        net = nn.ModuleDict({"in": nn.Linear(6, 8), "moe": layer})
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "S3", "params": {"lr": LR, "weight_decay": DECAY}},
        }
        params = [{"params": list(net.parameters()), "name": "all"}]
        engine, *_ = deepspeed.initialize(model=net, model_parameters=params, config=config)
        assert sum("moe" in group and group["moe"] for group in engine.basic_optimizer.param_groups) == 1
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        hidden, gate_loss, _ = net["moe"](net["in"](torch.randn(32, 6)))
        engine.enable_backward_allreduce = True
        engine.backward(hidden.square().mean() + gate_loss)
        engine.step()
        assert activity(engine).steps == 1
        first = (1 - 0.95**2) ** (2 / 3)
        moved = 0
        for name, p in net.named_parameters():
            update = (before[name] - p.detach()) / LR - DECAY * before[name]
            # The difference of two weights up to 0.5, divided by the rate: 2^-24 / 3e-3 is 2e-5.
            sizes = torch.minimum((update.abs() - first).abs(), update.abs())
            assert sizes.max() < 1e-4, f"{name}: {sizes.max()}"
            moved += int((update.abs() > first / 2).sum())
        assert moved > 100


def check_zero_init_keeps_the_choice_of_what_decays() -> None:
    """Under zero.Init every parameter is 1-D: grouping by ndim exempted the whole model from decay."""
    with deepspeed.zero.Init(
        config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    ):
        net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    decayed, others = decay_groups(net)
    assert [p.ds_numel for p in decayed["params"]] == [32] and "weight_decay" not in decayed
    assert [p.ds_numel for p in others["params"]] == [8, 8, 8] and others["weight_decay"] == 0.0
    assert len(decay_groups(nn.Linear(4, 8, bias=False))) == 1


def check_safe_get_and_set_reach_every_group() -> None:
    """DeepSpeed links state after the first group's first step: of later groups it then found none."""
    for stage in (1, 2, 3):
        run = Run(stage, "bf16")
        params = run.trained()
        for name in STATES:  # before any step as well
            assert all(not safe_get_full_optimizer_state(p, name).any() for p in params.values())
        run.step(gradients(0))
        if stage == 3:
            ranks, rank = dist.get_world_size(), dist.get_rank()
            for name in STATES:
                for p in params.values():
                    full = safe_get_full_optimizer_state(p, name).flatten()
                    size = -(-full.numel() // ranks)
                    mine = full[rank * size : (rank + 1) * size]
                    equal([safe_get_local_optimizer_state(p, name)[: mine.numel()]], [mine])
            continue  # setting a parameter of odd size fails there with AdamW too (docs/deepspeed.md)
        for p in params.values():
            for name in STATES:
                safe_set_full_optimizer_state(p, torch.full(p.shape, 0.5), name)
                assert (safe_get_full_optimizer_state(p, name) == 0.5).all()
        assert {float(run.s3.state[m][name].max()) for m in masters(run.wrapper) for name in STATES} <= {0.0, 0.5}


def check_a_gradient_is_used_once() -> None:
    """ZeRO-3, and all of ZeRO under offload, kept the gradient of a parameter that a step does not use, and applied
    it in every step after it, with AdamW too; in an accumulation the first gradient of a parameter that a later
    micro-batch reaches was added to it. As in ZeRO 1 and 2 it is zero: m, r and the weight go on without it.
    """
    used = [  # the parameters that each micro-batch of a step reaches
        (("embedding", "linear", "bias", "scale"),) * 2,
        (("embedding", "bias"),) * 2,
        (("embedding",), ("embedding", "linear")),
        (("bias", "scale"), ("bias",)),
        (("linear",),) * 2,
    ]
    for stage, precision, settings in UNUSED:
        run, reference = Run(stage, precision, accumulate=2, **settings), Reference()
        for step, batches in enumerate(used):
            if OLD and stage > 1 and settings.get("offload"):
                batches = batches[-1:] * 2  # what the last does not reach is lost there: the next check
            every, total = gradients(step), {name: torch.zeros_like(g) for name, g in gradients(step).items()}
            for names in batches:
                run.engine.backward(run.engine({name: every[name] for name in names}))
                run.engine.step()
                for name in names:
                    total[name] += every[name] / 2
            assert run.engine.was_step_applied()
            reference.step(total)
        try:
            same(run, reference)
        except AssertionError as error:
            raise AssertionError(f"ZeRO {stage} {precision} {settings}") from error
    run, reference = Run(3), Reference()
    run.engine.backward(run.engine(gradients(0)))
    run.wrapper.zero_grad()  # thrown away, as after a bad batch
    few = {name: grad for name, grad in gradients(1).items() if name != "linear"}
    run.step(few)
    reference.step({"linear": torch.zeros_like(gradients(1)["linear"]), **few})
    same(run, reference)


def check_what_the_last_micro_batch_leaves_out_is_used() -> None:
    """ZeRO 2 and 3 under offload silently lost the gradient of a parameter that only an earlier micro-batch reaches.

    AdamW, which runs as without S3, still loses it: where that fails, DeepSpeed has fixed it. The sizes show that the
    norm counts it, too: clipped by the norm of the others alone, the gradient would be longer.
    """
    few = {name: grad for name, grad in gradients(0).items() if name != "linear"}
    adam = {"optimizer": "AdamW", "params": {"torch_adam": True}}
    for stage, precision in itertools.product((2, 3), ("fp32", "bf16")):
        for clip, kind in ((0.0, {}), (0.5, {}), (0.0, adam)):
            run, reference = Run(stage, precision, accumulate=2, clip=clip, offload=True, **kind), Reference()
            with logged() as lines:
                for grads in (gradients(0), few) * 2:
                    run.engine.backward(run.engine(grads))
                    run.engine.step()
            assert run.engine.was_step_applied()
            if kind or OLD:
                assert not run.state(STATES[0])["linear"].any() and run.state(STATES[0])["embedding"].any()
                warnings = [line for line in lines if "loses the gradients of" in line]
                assert all("linear" in line and "use ZeRO 1" in line for line in warnings)
                assert len(warnings) <= 1
                found: list[int] = [0] * dist.get_world_size()
                dist.all_gather_object(found, len(warnings))
                assert any(found) == (not kind), found
                continue
            half = {**gradients(0), "linear": gradients(0)["linear"] / 2}
            for _ in range(2):
                reference.step(half, clip)
            same(run, reference)


def check_gathered_weights_are_all_there() -> None:
    """0.17.6 waits for the last of several gathers alone: gloo then wrote a weight as it had been over the one that was
    loaded, once in some runs of check_zero_3_loads_the_weights_that_are_asked_for. The large one comes late here."""
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 4, "zero_optimization": {"stage": 3}}):
        weights = [nn.Linear(*sizes, bias=False).weight for sizes in ((2048, 2048), (2, 2))]
    for weight in weights:
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            weight.data.fill_(2.0)
    for _ in range(3):
        with deepspeed.zero.GatheredParameters(weights):
            assert [float((weight != 2.0).sum()) for weight in weights] == [0.0, 0.0]


def check_schedulers_keep_to_the_rate() -> None:
    """DeepSpeed's OneCycle wrote betas of 0.8 to 0.9 and 0.99 into S3's groups, and weights moved by 1.7 rates."""
    one = {"cycle_min_lr": LR / 10, "cycle_max_lr": LR, "cycle_first_step_size": 4}
    two = {"max_lr": LR, "total_steps": 20}
    three = {"base_lr": LR / 10, "max_lr": LR, "step_size_up": 4}
    advice = ("has cycle_momentum on", "cycle_momentum=False")
    # By their names DeepSpeed gives torch's schedulers its own wrapper, which they take at stage 0 in float32 alone.
    for kind, stage, params in (("OneCycle", 1, one), ("OneCycleLR", 0, two), ("CyclicLR", 0, three)):
        made = functools.partial(Run, stage)
        refuses(functools.partial(made, scheduler={"type": kind, "params": params}), kind, *advice)
        stays_in_bounds(made(scheduler={"type": kind, "params": {**params, "cycle_momentum": False}}))
    client = S3(groups(net := Net()), lr=LR, weight_decay=DECAY)
    of_client = schedules.OneCycleLR(client, **two)
    refuses(lambda: Run(1, client=client, net=net, schedule=of_client), "OneCycleLR", *advice)

    def nested(optimizer: torch.optim.Optimizer) -> schedules.SequentialLR:
        parts = [schedules.ConstantLR(optimizer), schedules.CyclicLR(optimizer, **three)]
        return schedules.SequentialLR(optimizer, parts, milestones=[2])

    for stage in (0, 3):
        refuses(lambda stage=stage: Run(stage, schedule=nested), "CyclicLR", *advice)
    run = Run(2, schedule=lambda optimizer: schedules.LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    stays_in_bounds(run)
    assert run.s3.param_groups[0]["lr"] < LR
    Run(1, optimizer="AdamW", params={"torch_adam": True}, scheduler={"type": "OneCycle", "params": one})


def check_a_scheduler_made_before_the_engine_sees_its_steps() -> None:
    """torch's scheduler puts itself in the place of the optimizer's step. The engine threw it away, and a run with an
    S3 object began with torch's warning that step() had been overridden; one with AdamW does not."""
    client = S3(groups(net := Net()), lr=LR, weight_decay=DECAY)
    run = Run(1, client=client, net=net, schedule=schedules.LambdaLR(client, lambda step: 1 / (1 + step)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run.step(gradients(0))
    assert not [each for each in caught if "optimizer.step()" in str(each.message)]
    assert client.param_groups[0]["lr"] == LR / 2


def stays_in_bounds(run: Run) -> None:
    """Five steps in which no weight moves by more than its rate; the decays stay S3's."""
    activity(run.engine).watch()
    for step in range(5):
        run.step(gradients(step))
        assert 0 < float(activity(run.engine).statistics[1]) <= 1
    assert {group["betas"] for group in run.s3.param_groups} == {(0.95, 0.95)}
