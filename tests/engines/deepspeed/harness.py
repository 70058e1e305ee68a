"""A small model in a DeepSpeed engine, fed with chosen gradients, and the unsharded S3 it is compared with.

The loss is the sum of every weight times a chosen number, which is then that weight's gradient. It is the same on
every rank, and the average over 2 or 4 ranks and micro-batches is exact, so that a sharded run may differ from an
unsharded one by S3's own arithmetic alone, and the tolerance can be that of float32.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger, safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from s3_megatron.engines.deepspeed import activity, register
from s3_megatron.engines.deepspeed.layout import masters
from s3_megatron.optim import EXP_AVG, EXP_AVG_ROOT, S3
from tests.engines.deepspeed.window import OLD

register()

STEPS, STEPS_SHORT = 10, 4
LR, DECAY = 3e-3, 0.1
STATES = (EXP_AVG, EXP_AVG_ROOT)
ALONE = not OLD  # a group of which some rank holds only padding
FLOAT32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}


class Net(nn.Module):
    """Odd sizes, so that shards cross parameters and need padding; a frozen weight, and one that gets no gradient."""

    def __init__(self, *, empty: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def weight(*shape: int) -> nn.Parameter:
            # Exact in bfloat16, in which DeepSpeed casts the model before it makes float32 masters of it.
            return nn.Parameter((torch.randn(shape, generator=generator) / 4).bfloat16().float())

        self.embedding, self.linear = weight(101, 13), weight(27, 13)
        self.bias, self.scale = weight(27), weight(1)
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.register_buffer("seen", torch.tensor([2.0, 4.0]))
        if empty:
            self.empty = weight(0, 3)

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        """The loss whose gradients these are; it does not use the parameters of which there is none."""
        params = {name: p for name, p in self.named_parameters() if p.requires_grad and name in gradients}
        return torch.stack([(param * gradients[name].to(param.dtype)).sum() for name, param in params.items()]).sum()


def groups(net: nn.Module, *, alone: bool = ALONE) -> list[dict[str, Any]]:
    """Param groups: what decays, what does not, and ``alone`` one weight, of which most ranks hold only padding."""
    named = dict(net.named_parameters())
    last = [{"params": [named.pop("scale")], "weight_decay": 0.5}] if alone else []
    shape = {name: getattr(param, "ds_shape", param.shape) for name, param in named.items()}
    return [
        {"params": [p for name, p in named.items() if len(shape[name]) > 1]},
        {"params": [p for name, p in named.items() if len(shape[name]) == 1], "weight_decay": 0.0},
        *last,
    ]


def gradients(step: int, like: nn.Module | None = None) -> dict[str, Tensor]:
    """The same for every rank and stage, of changing size and sign from one step to the next; exact in bfloat16."""
    generator = torch.Generator().manual_seed(100 + step)
    return {
        name: (torch.randn(param.shape, generator=generator) * 10.0 ** (step % 5 - 2)).bfloat16().float()
        for name, param in (like or Net()).named_parameters()
    }


class Run:
    """A DeepSpeed engine over ``Net``."""

    def __init__(
        self,
        stage: int,
        precision: str = "fp32",
        *,
        accumulate: int = 1,
        clip: float = 0.0,
        offload: bool = False,
        params: dict[str, Any] | None = None,
        optimizer: str = "S3",
        client: Any = None,
        net: Net | None = None,
        alone: bool = ALONE,
        schedule: Any = None,
        **config: Any,
    ) -> None:
        self.net = net or Net()
        self.accumulate = accumulate
        zero: dict[str, Any] = {"stage": stage, **config.pop("zero", {})}
        if offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulate,
            "gradient_clipping": clip,
            "zero_optimization": zero,
            **({} if precision == "fp32" else {precision: {"enabled": True, **config.pop(precision, {})}}),
            **config,
        }
        if client is None:
            settings["optimizer"] = {"type": optimizer, "params": {"lr": LR, "weight_decay": DECAY, **(params or {})}}
        self.engine, *_ = deepspeed.initialize(
            model=self.net,
            model_parameters=groups(self.net, alone=alone),
            optimizer=client,
            lr_scheduler=schedule,
            config=settings,
        )

    @property
    def s3(self) -> S3:
        return self.engine.basic_optimizer

    @property
    def wrapper(self) -> Any:
        return self.engine.optimizer

    def step(self, grads: dict[str, Tensor]) -> bool:
        """One step of ``accumulate`` micro-batches; returns whether DeepSpeed applied it."""
        for _ in range(self.accumulate):
            self.engine.backward(self.engine(grads))
            self.engine.step()
        return self.engine.was_step_applied()

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad and name != "empty"}

    def _unsharded(self) -> dict[str, Tensor] | None:
        """The masters at stage 0, where each parameter has its own."""
        if int(self.engine.zero_optimization_stage()) > 0:
            return None
        mine = [p for group in groups(self.net) for p in group["params"] if p.requires_grad]
        names = {id(p): name for name, p in self.net.named_parameters()}
        return {names[id(p)]: master for p, master in zip(mine, masters(self.wrapper), strict=True)}

    def weights(self) -> dict[str, Tensor]:
        """The whole masters, copied."""
        own = self._unsharded()
        if own is not None:
            return {name: own[name].detach().clone() for name in self.trained()}
        return {name: safe_get_full_fp32_param(p).detach().clone() for name, p in self.trained().items()}

    def model_weights(self) -> dict[str, Tensor]:
        """The model's parameters as forward sees them, copied."""
        with deepspeed.zero.GatheredParameters(list(self.net.parameters())):
            return {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def state(self, name: str) -> dict[str, Tensor]:
        """The whole m or r of every parameter, copied."""
        own = self._unsharded()
        if own is not None:
            return {key: self.s3.state[own[key]][name].detach().clone() for key in self.trained()}
        if not isinstance(self.s3, S3) and hasattr(self.wrapper, "_hp_optimizer_states_linked"):
            self.wrapper._hp_optimizer_states_linked = False  # S3's engine mends this; Adam runs as it is
            self.wrapper._lazy_init_hp_params_optimizer_state()
        return {key: safe_get_full_optimizer_state(p, name).detach().clone() for key, p in self.trained().items()}

    def everything(self) -> list[Tensor]:
        """Masters, m and r of this rank, copied."""
        held = masters(self.wrapper)
        return [
            t.detach().clone()
            for t in (*held, *(self.s3.state[p][name] for p in held for name in self.s3.spec.state_names))
        ]


class Reference:
    """A plain optimizer over float32 copies."""

    def __init__(self, kind: type[torch.optim.Optimizer] = S3, *, alone: bool = ALONE, **settings: Any) -> None:
        self.net = Net()
        self.optimizer = kind(groups(self.net, alone=alone), lr=LR, weight_decay=DECAY, **settings)

    def step(self, grads: dict[str, Tensor], clip: float = 0.0) -> None:
        for name, param in self.net.named_parameters():
            param.grad = grads[name].clone() if param.requires_grad else None
        if clip:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), clip)
        self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return {name: param.detach() for name, param in self.net.named_parameters() if param.requires_grad}

    def state(self, name: str) -> dict[str, Tensor]:
        return {
            key: self.optimizer.state[param][name] for key, param in self.net.named_parameters() if param.requires_grad
        }


def compare(run: Run, *, clip: float = 0.0, steps: int = STEPS, tolerance: float = 1e-6) -> Reference:
    """Some steps of ``run`` against the unsharded S3, in masters, m, r, and the model's own weights.

    1e-6, of the value or of the longest step, is about 8 ULP of float32: both do the same arithmetic on every element,
    but an element may fall into a vector register in one and into the loop's tail in the other, and clipping by a norm
    that was summed in another order adds a rounding. (r reaches 300 here, m 200.)
    """
    reference = Reference()
    for step in range(steps):
        assert run.step(gradients(step))
        reference.step(gradients(step), clip)
    same(run, reference, tolerance)
    assert activity(run.engine).steps == steps
    return reference


def same(run: Run, reference: Reference, tolerance: float = 1e-6) -> None:
    """Assert that weights, m and r are the reference's."""
    close(run.weights(), reference.weights(), rtol=tolerance, atol=tolerance * LR)
    for name in STATES:
        # S3's update is the same for any scale of the gradients, so a wrong average would show here alone. m is a sum
        # of terms that may cancel: it is as exact as the largest of them, which r has the size of.
        largest = {key: float(r.max()) for key, r in reference.state(EXP_AVG_ROOT).items()}
        for key, value in run.state(name).items():
            close({key: value}, {key: reference.state(name)[key]}, rtol=tolerance, atol=tolerance * largest[key])
    model = run.model_weights()
    for name, expected in reference.weights().items():
        rounding = 0.0 if model[name].dtype == torch.float32 else 2 * torch.finfo(model[name].dtype).eps
        close({name: model[name].float()}, {name: expected}, rtol=tolerance + rounding, atol=tolerance * LR)
    assert torch.equal(model["frozen"].float(), torch.ones(5))


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], *, rtol: float, atol: float) -> None:
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Bit for bit; ZeRO-3's alignment padding may hold NaN from uninitialized memory."""
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)


@contextmanager
def logged() -> Iterator[list[str]]:
    """The lines that DeepSpeed's logger gets on this rank."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


@contextmanager
def float16_allowed() -> Iterator[None]:
    """DeepSpeed (0.19.8) refuses float16 on a CPU without AVX512-FP16, where it is slow but right: lifted here."""
    accelerator = type(deepspeed.accelerator.get_accelerator())
    original = accelerator.is_fp16_supported
    accelerator.is_fp16_supported = lambda self: True
    try:
        yield
    finally:
        accelerator.is_fp16_supported = original
