"""Building our optimizers where DeepSpeed builds its own, and seeing that it is these that run.

Every host symbol named here was read in deepspeed 0.19.8, runtime/engine.py unless another file is named.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import deepspeed.runtime.zero.stage3 as stage3
import deepspeed.runtime.zero.stage_1_and_2 as stage_1_and_2
import torch
from deepspeed.utils import log_dist

from s3_megatron.engines.deepspeed import checkpoint, gradients, loss_scale, softmuon, stepping, temperature
from s3_megatron.engines.deepspeed.layout import is_flat
from s3_megatron.errors import S3Error
from s3_megatron.optim import EngineOptimizer, registry
from s3_megatron.optim.relaxed import RelaxedOptimizer
from s3_megatron.optim.spec import FROM_ADAM, OVERRIDE, Spec
from s3_megatron.optim.state import written_by
from s3_megatron.swap import SymbolSwap

_FROM_TRAINER = ("lr", "weight_decay")  # what transformers and accelerate fill in for any optimizer
_IS_0_17 = deepspeed.__version__.startswith("0.17.")  # 0.17.6 is the oldest that S3 works with
_SPLIT_QKV = "split_qkv"
_STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def is_supported_optimizer(original: Callable[..., bool]) -> Callable[..., bool]:
    """Wrap ``DeepSpeedEngine._is_supported_optimizer``, which knows DeepSpeed's names and torch.optim's."""

    @functools.wraps(original)
    def _is_supported_optimizer(self: Any, optimizer_name: str) -> bool:
        return registry.find(optimizer_name) is not None or original(self, optimizer_name)

    return _is_supported_optimizer


def is_zero_supported_optimizer(original: Callable[..., bool]) -> Callable[..., bool]:
    """Wrap ``is_zero_supported_optimizer`` (runtime/zero/utils.py), a list of types that ZeRO was tested with."""

    @functools.wraps(original)
    def is_supported(optimizer: Any) -> bool:
        return isinstance(optimizer, EngineOptimizer) or original(optimizer)

    return is_supported


def configure_basic_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``DeepSpeedEngine._configure_basic_optimizer``, which builds what the configuration names."""

    @functools.wraps(original)
    def _configure_basic_optimizer(self: Any, model_parameters: Any) -> Any:
        spec = registry.find(self.optimizer_name())
        if spec is None:
            return original(self, model_parameters)
        host: dict[str, Any] = {"bf16_states": _has(self, "bf16_optimizer_states"), "steps": _scheduled_steps(self)}
        settings = {**(self.optimizer_params() or {})}
        if spec.beside:
            # The Spec's own is Megatron's, whose models have marks on these weights.
            asked = settings.pop(_SPLIT_QKV, None)
            asked = {} if asked in (None, "auto") else asked
            matrices, rest = softmuon.make_groups(self.module, model_parameters)
            found = softmuon.find_qkv(self.module, matrices, asked)
            build = functools.partial(softmuon.ZeroMatrices, rest=rest, split_qkv=asked, qkv=found)
            optimizer = make(spec, matrices, settings, **host, build=build)
        else:
            optimizer = make(spec, model_parameters, settings, **host)
        _freeze_step_during_init(optimizer)
        return optimizer

    return _configure_basic_optimizer


def _scheduled_steps(engine: Any) -> int | None:
    """Give the length of the run in steps by the configuration's WarmupDecayLR or WarmupCosineLR, if it has one."""
    steps = (engine.scheduler_params() or {}).get("total_num_steps")
    return steps if isinstance(steps, int) else None  # "auto" where no Trainer has put a number


def make(
    spec: Spec,
    params: Any,
    settings: dict[str, Any],
    *,
    bf16_states: bool,
    steps: int | None = None,
    build: Callable[..., Any] | None = None,
) -> EngineOptimizer:
    """Build an optimizer from the configuration's ``params``; ``bf16_states`` is DeepSpeed's ``bf16_optimizer_states``.

    ``steps``, the run's length by its scheduler, is for an optimizer that needs a length and is given none. ``build``
    makes it of what the class of ``spec`` takes, in the class's place.

    Raises:
        S3Error: an unknown name, a value that it does not take, or "auto" for what only a Trainer knows.
    """
    kind: Any = spec.load()
    # Its own arguments, without those that DeepSpeed gives or that do nothing under it.
    own = {*inspect.signature(kind).parameters} - {"params", "capturable", "process_group", "qkv_split_shapes"}
    switches = {*spec.switch_fields}
    unknown = sorted(set(settings) - own - switches)
    if unknown:
        # betas is for ablations, and whoever comes from Adam has a pair that does not fit: beta is what to see here.
        known = [name for name in sorted(own | switches | ({_SPLIT_QKV} if spec.beside else set())) if name != "betas"]
        raise S3Error(
            f"the DeepSpeed configuration gives optimizer {spec.title} the params {', '.join(map(repr, unknown))}, "
            f"which it does not have: take them out; it has {', '.join(known)}"
        )
    auto = sorted(name for name, value in settings.items() if isinstance(value, str) and value == "auto")
    if missing := [name for name in _FROM_TRAINER if name in auto]:
        raise S3Error(
            f'optimizer {spec.title} has "auto" for {", ".join(missing)} and no transformers or accelerate put its own '
            "value there: write a number"
        )
    if defaults := [name for name in auto if name != "implementation"]:  # which has an "auto" of its own
        text = f'"auto" for {", ".join(defaults)} of {spec.title} is its own default'
        log_dist(text, ranks=[0], level=logging.WARNING)
    arguments = {name: value for name, value in settings.items() if name not in {*switches, *defaults}}
    spec.check(arguments, lambda name: f"{spec.title}'s {name}")
    if steps is not None:
        values = {each.name: arguments.get(each.name, each.default) for each in spec.hyperparameters}
        found = {name: value for name, value in spec.complete(values, steps).items() if value != values[name]}
        for name, value in found.items():
            log_dist(f"{name} of {spec.title} is {value}, by the scheduler's total_num_steps", ranks=[0])
        arguments |= found
    if "state_dtype" in own:
        arguments["state_dtype"] = _state_dtype(spec, arguments.get("state_dtype"), bf16_states)
    elif bf16_states:
        raise S3Error(f"bf16_optimizer_states is true and {spec.title} has float32 states only: leave it out")
    made: EngineOptimizer = (build or kind)(params, **arguments)
    return made


def _state_dtype(spec: Spec, given: str | None, bf16_states: bool) -> torch.dtype:
    name = given or ("bfloat16" if bf16_states else "float32")
    if name not in _STATE_DTYPES:
        allowed = ", ".join(map(repr, _STATE_DTYPES))
        raise S3Error(f"{spec.title}'s state_dtype is {name!r}: it must be one of {allowed}")
    if bf16_states and name != "bfloat16":
        raise S3Error(
            f"bf16_optimizer_states is true and {spec.title}'s state_dtype is {name!r}: make it 'bfloat16' or leave it "
            "out"
        )
    return _STATE_DTYPES[name]


def configure_optimizer(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``DeepSpeedEngine._configure_optimizer``, which builds or takes an optimizer and wraps it for ZeRO."""

    @functools.wraps(original)
    def _configure_optimizer(self: Any, client_optimizer: Any, model_parameters: Any) -> None:
        if callable(client_optimizer) and not isinstance(client_optimizer, torch.optim.Optimizer):
            client_optimizer = client_optimizer(model_parameters)  # as the host would, a few lines further on
        named = None if client_optimizer is not None else registry.find(self.optimizer_name())
        spec = client_optimizer.spec if isinstance(client_optimizer, EngineOptimizer) else named
        if spec is None:
            original(self, client_optimizer, model_parameters)
            _check_not_replaced(self.basic_optimizer)
            checkpoint.guard_other(self.basic_optimizer, self.optimizer)
            return
        _refuse_what_cannot_work(self)
        if spec.beside:
            softmuon.refuse(self, client_optimizer)
        stepped_by = getattr(client_optimizer, "__dict__", {}).get("step")  # torch's scheduler
        if client_optimizer is not None:
            self._config.zero_force_ds_cpu_optimizer = False  # "use DeepSpeedCPUAdam": S3 has its own C++ kernel
            _freeze_step_during_init(client_optimizer)
        kind = softmuon.ZeroMatrices if spec.beside else spec.load()
        try:
            with _masters_may_be_16_bit(kind):
                original(self, client_optimizer, model_parameters)
        finally:
            for optimizer in (client_optimizer, getattr(self, "basic_optimizer", None)):
                getattr(optimizer, "__dict__", {}).pop("step", None)
            if stepped_by is not None:
                client_optimizer.step = stepped_by
        optimizer = self.basic_optimizer
        if type(optimizer) is not kind or getattr(self.optimizer, "optimizer", optimizer) is not optimizer:
            raise S3Error(
                f"DeepSpeed built {type(optimizer).__name__} in {type(self.optimizer).__name__} where {spec.title} was "
                "asked for: report this version"
            )
        params = (self.optimizer_params() or {}) if named else {}
        from_adam, override = (_is_on(params, spec.field(switch)) for switch in (FROM_ADAM, OVERRIDE))
        checkpoint.guard_own(optimizer, self.optimizer, from_adam=from_adam, override=override if named else None)
        if not isinstance(self.config, dict):  # a path, which is what checkpoints would then keep of it
            self.config = self._config._param_dict
        if _IS_0_17 and is_flat(self.optimizer):
            loss_scale.look_on_every_rank(self.optimizer)
        gradients.forget_after_the_step(self.optimizer)
        gradients.take_every_micro_batch(self.optimizer, self.param_names)
        if self.fp16_enabled():
            loss_scale.grow_after_the_step(self.optimizer)
        if isinstance(optimizer, RelaxedOptimizer):
            temperature.take_over_all_ranks(self)
        stepping.start(self)

    return _configure_optimizer


def _is_on(params: dict[str, Any], switch: str) -> bool:
    """Read a switch of the configuration; "auto" is its default, off."""
    value = params.get(switch, False)
    if value in (None, "auto"):
        return False
    if value not in (True, False):
        raise S3Error(f"{switch} is {value!r}: it must be true or false")
    return bool(value)


def _freeze_step_during_init(optimizer: EngineOptimizer) -> None:
    """Make ``step`` only allocate the state while DeepSpeed wraps ``optimizer``.

    FP16_UnfusedOptimizer and ZeRO-3 call it once with zero gradients so that state comes into being, and that step
    would already decay the weights. And ZeRO with 16-bit masters asks DeepSpeedCPUAdam for ``fp32_optimizer_states``
    (runtime/base_optimizer.py).
    """
    optimizer.step = optimizer.allocate_state  # type: ignore[method-assign, assignment]
    optimizer.fp32_optimizer_states = optimizer.state_dtype == torch.float32  # type: ignore[attr-defined]


@contextmanager
def _masters_may_be_16_bit(kind: type[EngineOptimizer]) -> Iterator[None]:
    """Let ZeRO keep 16-bit masters on the CPU for S3, which moves them in float32 and rounds once.

    Its constructors demand that the optimizer's type be the module's DeepSpeedCPUAdam (stage3.py and
    stage_1_and_2.py), a name that they use for nothing else that S3 meets.
    """
    swap = SymbolSwap("this DeepSpeed")
    for module in (stage3, stage_1_and_2):
        swap.replace(module, "DeepSpeedCPUAdam", lambda _: kind)
    try:
        yield
    finally:
        swap.undo()


def _refuse_what_cannot_work(engine: Any) -> None:
    """Raise S3Error for settings under which DeepSpeed would not use ours, or only for some weights or gradients."""
    if _IS_0_17:
        _refuse_what_0_17_gets_wrong(engine)
    offload = engine.zero_offload_optimizer()
    for name, section in (("offload_optimizer", offload), ("offload_param", engine.zero_offload_param())):
        if getattr(section, "device", None) == "nvme":
            raise S3Error(
                f"{name} has device 'nvme', which was never run with S3: set device to 'cpu', where S3's m and r take "
                "8 bytes a parameter (4 with state_dtype 'bfloat16')"
            )
    if getattr(offload, "device", None) == "cpu" and engine.zero_partial_offload() != 1.0:
        raise S3Error(
            f"offload_optimizer has ratio {engine.zero_partial_offload()}: below 1 DeepSpeed trains the rest of the "
            "weights with torch's AdamW; leave ratio out, or set it to 1"
        )
    if engine.fp16_enabled() and not engine.zero_optimization():
        raise S3Error(
            "fp16 at ZeRO stage 0: DeepSpeed 0.19 divides the gradients there by a loss scale that it never multiplied "
            "the loss with (engine.backward scales for ZeRO only), and small ones vanish; use stage 1, or bf16"
        )
    if _has(engine, "super_offload"):
        raise S3Error("offload_optimizer has super_offload, which runs DeepSpeed's own Adam: leave it out with S3")
    if engine.zenflow:
        raise S3Error("zero_optimization has zenflow, which runs DeepSpeed's own Adam: leave it out with S3")


def _refuse_what_0_17_gets_wrong(engine: Any) -> None:
    """Raise S3Error for what deepspeed 0.17.6 trains wrongly with any optimizer, and 0.19.8 does not."""
    stage, offload = engine.zero_optimization_stage(), engine.zero_cpu_offload()
    if stage == 2 and engine.gradient_accumulation_steps() > 1 and not offload:
        raise S3Error(
            f"gradient_accumulation_steps is {engine.gradient_accumulation_steps()} at ZeRO stage 2: DeepSpeed 0.17 "
            "keeps the gradients of the last micro-batch alone; use stage 1 or 3, or offload_optimizer"
        )
    model, accumulated = engine.get_data_types()
    if model != torch.float32 and (stage == 0 or (stage == 1 and accumulated != model and not offload)):
        raise S3Error(
            f"{model} at ZeRO stage 0, or at stage 1 with another grad_accum_dtype: DeepSpeed 0.17 shards nothing, "
            "decays frozen weights, and cannot load its own bf16 checkpoints there; use stage 1 without it, 2 or 3"
        )


def _has(engine: Any, setting: str) -> bool:
    """Whether ``setting`` is on: deepspeed 0.17.6 has not all of 0.19.8's."""
    return hasattr(type(engine), setting) and bool(getattr(engine, setting)())


def _check_not_replaced(optimizer: Any) -> None:
    """Raise S3Error if another optimizer was made out of the param groups of ours, as accelerate does."""
    if (name := written_by(getattr(optimizer, "param_groups", []))) is not None:
        title = registry.title(name)
        raise S3Error(
            f"the optimizer was {title} and arrived in DeepSpeed as {type(optimizer).__name__} (accelerate does so "
            'under offload): import accelerate before s3_megatron.engines.deepspeed.register(), or give {"type": '
            f'"{title}"}} in the DeepSpeed configuration instead of an object'
        )


def keep_ours(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wrap ``map_pytorch_optim_to_deepspeed`` (accelerate 1.15, utils/deepspeed.py).

    Under offload it makes a DeepSpeedCPUAdam of every optimizer that it does not know.
    """

    @functools.wraps(original)
    def map_pytorch_optim_to_deepspeed(optimizer: Any) -> Any:
        return optimizer if isinstance(optimizer, EngineOptimizer) else original(optimizer)

    return map_pytorch_optim_to_deepspeed
