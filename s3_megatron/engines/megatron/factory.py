"""Building our optimizers where megatron-core builds Adam, so that every wrapper of Megatron takes them."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import megatron.core.optimizer as host
import torch
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer, distrib_optimizer
from megatron.core.utils import log_single_rank

from s3_megatron.engines.megatron import layer_wise, single_pass, softmuon, watch
from s3_megatron.engines.megatron.bare_ranks import STEP, save_without_state
from s3_megatron.engines.megatron.checkpoint import guard_other, guard_own
from s3_megatron.engines.megatron.config import SpecOptimizerConfig, own_values, refuse_unsupported
from s3_megatron.engines.megatron.expert_layout import (
    let_experts_move,
    let_matrices_of_experts_move,
    name_what_does_not_fit,
)
from s3_megatron.engines.megatron.temperature import take_over_all_ranks
from s3_megatron.errors import S3Error
from s3_megatron.optim import EngineOptimizer, registry
from s3_megatron.optim.relaxed import RelaxedOptimizer
from s3_megatron.optim.spec import Spec
from s3_megatron.swap import SymbolSwap

logger = logging.getLogger(__name__)


def make_optimizer(original: Callable[..., MegatronOptimizer]) -> Callable[..., MegatronOptimizer]:
    """Wrap ``megatron.core.optimizer.get_megatron_optimizer`` (0.17.1 to 0.19.2)."""

    @functools.wraps(original)
    def get_megatron_optimizer(config: Any, model_chunks: list[Any], *args: Any, **kwargs: Any) -> MegatronOptimizer:
        spec = registry.find(config.optimizer)
        if spec is None:
            optimizer = original(config, model_chunks, *args, **kwargs)
            for part in parts_of(optimizer):
                guard_other(part)
            name_what_does_not_fit(optimizer)
        else:
            if not isinstance(config, SpecOptimizerConfig):
                is_own = spec in registry.OWN
                made = f"{spec.title}OptimizerConfig" if is_own else f"config.config_class(<the Spec {spec.name}>)"
                raise S3Error(
                    f"optimizer={spec.name!r} came in a plain OptimizerConfig: build it as s3_megatron.engines."
                    f"megatron.{made}, which has {spec.title}'s hyperparameters"
                )
            refuse_unsupported(config)
            if spec.beside:
                layer_wise.refuse_chunks(config, model_chunks)
            with _road(config):
                optimizer = original(config, model_chunks, *args, **kwargs)
            _finish_all(optimizer, config, model_chunks)
        watch.observe_parts(parts_of(optimizer), model_chunks)
        return optimizer

    return get_megatron_optimizer


def parts_of(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """List the optimizers in a ChainedOptimizer, and in those in it, without the stubs of ranks that train nothing."""
    if hasattr(optimizer, "chained_optimizers"):
        return [part for each in optimizer.chained_optimizers for part in parts_of(each)]
    return [] if getattr(optimizer, "is_stub_optimizer", False) else [optimizer]


@contextmanager
def _road(config: SpecOptimizerConfig) -> Iterator[None]:
    """Let the factory build the optimizer of ``config``.

    ``get_megatron_optimizer`` sends any name but adam and sgd to the emerging optimizers, which take whole matrices,
    and leave embeddings, norms and biases to Adam. By Adam's name it takes the element-wise road for every parameter.
    """
    spec = config.spec
    if spec.beside:
        _, *rest = layer_wise.used(spec, config)
        with softmuon.in_the_hosts_registry(config, init_state), _adam_slot_builds(config, *rest):
            yield
        return
    swap = SymbolSwap("this megatron-core")
    try:
        swap.replace(config, "optimizer", lambda ours: "adam")
        with _adam_slot_builds(config, spec):
            yield
    finally:
        swap.undo()


@contextmanager
def _adam_slot_builds(config: SpecOptimizerConfig, spec: Spec | None = None) -> Iterator[None]:
    """Let the factory put the optimizer of ``spec`` in Adam's place; None leaves that to Adam.

    It calls the module's ``Adam`` once a group of chunks (megatron-core 0.17.1 to 0.19.2, core/optimizer/__init__.py).

    0.17 and 0.18 take nothing but Adam into DistributedOptimizer, since they look for state by Adam's names, which are
    ours, too. They ask for the type that their module calls ``Adam``, and use that name for nothing else; 0.19 takes
    every optimizer that has an ``init_state_fn``.
    """
    if spec is None:
        yield
        return
    kind: Any = spec.load()

    def build(*, params: list[dict[str, Any]], lr: float, weight_decay: float, **_adams: Any) -> EngineOptimizer:
        made: EngineOptimizer = kind(params, lr=lr, weight_decay=weight_decay, **spec.chosen(own_values(spec, config)))
        return made

    swap = SymbolSwap("this megatron-core")
    try:
        swap.replace(host, "Adam", lambda adam: build)
        swap.replace(host, "USING_PYTORCH_OPTIMIZER", lambda plain: False)
        swap.replace(distrib_optimizer, "Adam", lambda adam: kind)
        yield
    finally:
        swap.undo()


def _finish_all(optimizer: MegatronOptimizer, config: SpecOptimizerConfig, model_chunks: list[Any]) -> None:
    """Check what Megatron has built, part by part, and complete it; Adam beside SoftMuon is the host's own."""
    spec, parts = config.spec, parts_of(optimizer)
    mine: dict[Spec, list[MegatronOptimizer]] = {each: [] for each in layer_wise.used(spec, config)}
    for part in parts:
        if spec.beside:
            softmuon.gather_what_shares_a_bucket_group(part)
        inner = part.optimizer
        found = inner.spec if isinstance(inner, EngineOptimizer) else None
        if found in mine:
            mine[found].append(part)
        elif not spec.beside or len(mine) > 1 or found is not None:
            raise S3Error(
                f"Megatron built {type(inner).__name__} where {spec.title} was asked for: report this version"
            )
        else:
            guard_other(part, spec.flag("scalar_optimizer"))
    for each, held in mine.items():
        for part in held:
            _finish(part, config, each)
        if issubclass(each.load(), RelaxedOptimizer):
            take_over_all_ranks(optimizer, held, model_chunks[0])
        _log_active(each, held, model_chunks)
    (let_matrices_of_experts_move if spec.beside else let_experts_move)(optimizer)


def _finish(part: MegatronOptimizer, config: SpecOptimizerConfig, spec: Spec) -> None:
    """Check what is in ``part``, allocate its state on the shards, watch over its checkpoints, merge its passes."""
    inner = part.optimizer
    init_state(inner)
    if isinstance(part, DistributedOptimizer):
        save_without_state(part)
        if not distrib_optimizer.HAVE_APEX_OR_TE:
            _put_steps(inner)
            inner.register_load_state_dict_post_hook(_put_steps)
    part.init_state_fn = init_state
    guard_own(part, config, spec)
    if inner.single_pass:
        single_pass.fuse(part)


def init_state(optimizer: EngineOptimizer, config: Any = None) -> None:
    """Megatron's ``init_state_fn``: allocate the state that is missing, in place."""
    optimizer.allocate_state()


def state_keys(original: property) -> property:
    """Wrap ``DistributedOptimizer.optimizer_state_keys`` (0.19.2), which knows Megatron's own optimizers, by name."""

    def optimizer_state_keys(self: Any) -> tuple[str, ...]:
        inner = self.optimizer
        return inner.spec.state_names if isinstance(inner, EngineOptimizer) else original.__get__(self)

    return property(optimizer_state_keys)


def _put_steps(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the ``step`` that DistributedOptimizer demands without TE and Apex.

    In megatron-core 0.17.1 to 0.19.2, ``state_dict()`` asserts one step common to all, even before the first step; ours
    have none, so it stays at 0. Its ``item()`` is all that is asked of it, and it must not be a tensor: the fully
    reshardable formats leave ``step`` out of what they load, and then miss it among the state's tensors
    (KeyError: 'step', for torch's Adam too).
    """
    for state in optimizer.state.values():
        state["step"] = STEP


def _log_active(spec: Spec, parts: list[MegatronOptimizer], model_chunks: list[Any]) -> None:
    groups: list[dict[str, Any]] = [group for part in parts for group in part.param_groups]
    held = [param for group in groups for param in group["params"]]
    model = sum(param.numel() for chunk in model_chunks for param in chunk.parameters())
    wrappers = ", ".join(sorted({type(part).__name__ for part in parts})) or "nothing to train"
    states = " and ".join(spec.state.values())
    group = next(iter(groups), {})
    log_single_rank(
        logger,
        logging.WARNING,  # Megatron's default level hides INFO, and this line is how a user knows what runs
        f"{spec.title} active in {wrappers}: this rank updates {len(held)} tensors, {sum(p.numel() for p in held):,} "
        f"of {model:,} elements; {states} in float32; {' '.join(f'{key}={group.get(key)}' for key in spec.state_keys)}",
    )
