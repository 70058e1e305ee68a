"""One pass over memory where megatron-core makes four: unscale, clip, step, copy to the model's parameters.

The kernels of S3 and SoftSignum multiply gradients by a factor and write the model's low-precision weights as they go.
So here the host's unscaling and clipping only leave their factor for the optimizer's ``next_step``, and its copy finds
its work done.
After a step the host's gradients are as the backward pass left them: scaled, and not clipped.
"""

import functools
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any
from weakref import ref

import torch
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer, clip_grads
from megatron.core.optimizer import optimizer as host
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MixedPrecisionOptimizer
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from s3_megatron.errors import S3Error
from s3_megatron.kernels.call import Step
from s3_megatron.optim import EngineOptimizer

_WRITABLE = (torch.float32, torch.bfloat16, torch.float16)
# Replaced on every part, and on those with low-precision weights or shards (megatron-core 0.17.1 to 0.19.2).
_METHODS = ("prepare_grads", "step_with_ready_grads")
_MIXED_METHODS = ("_unscale_main_grads_and_check_for_nan", "_copy_main_params_to_model_params")

# Whose a parameter is, and a gradient of a step that is going on: the host's functions get lists of them, and no
# optimizer. Nothing is kept alive by it.
_Owners = MutableMapping[Tensor, ref["SinglePass"]]
_param_owners: _Owners = WeakTensorKeyDictionary()
_grad_owners: _Owners = WeakTensorKeyDictionary()


def fuse(part: MegatronOptimizer) -> None:
    """Let the optimizer's step in ``part`` do the work of the host's other passes (replaces methods of this instance).

    Raises:
        S3Error: ``part`` lacks something that this goes through in megatron-core 0.17.1 to 0.19.2.
    """
    SinglePass(part)


class SinglePass:
    """One Megatron optimizer's step, its passes merged; lives as long as the optimizer, whose methods it holds."""

    def __init__(self, part: MegatronOptimizer) -> None:
        """Replace the methods of ``part``; see ``fuse``."""
        self.part: Any = part
        self.inner: EngineOptimizer = part.optimizer
        # The 2-norms, unscaled, of gradients that are still scaled.
        self.norms: dict[Tensor, Tensor] = {}
        # By which the step is to multiply the gradients.
        self._factor: Tensor | None = None
        self._copied = False
        self._sources: list[Tensor] = []
        self._addresses: list[int] = []
        self._shards: dict[Tensor, Tensor] | None = None
        names = _METHODS + (_MIXED_METHODS if isinstance(part, MixedPrecisionOptimizer) else ())
        _require(part, *names)
        self._host: dict[str, Callable[[], Any]] = {name: getattr(part, name) for name in names}
        for name in names:
            setattr(part, name, getattr(self, name))
        _param_owners.update((param, ref(self)) for param in part.get_parameters())

    def prepare_grads(self) -> Any:
        """Forget what a skipped step left, and let the host collect the gradients."""
        self._forget()
        found = self._host["prepare_grads"]()
        # Where there are norms, the gradients are known as ours.
        if not self.norms and not found and _host_reads_norms_one_by_one():
            self._own([param.grad for param in self.part.get_parameters() if param.grad is not None])
        return found

    @torch.no_grad()
    def _unscale_main_grads_and_check_for_nan(self) -> Any:
        """Read the gradients' norms instead of unscaling them; tells whether one on any rank is not finite.

        Every rank makes the host's one reduction, whichever way its own gradients go.
        """
        grads = [param.grad for param in self.part.get_parameters() if param.grad is not None]
        # After uninstall() the host would take the norm of the scaled gradients.
        if not grads or not hasattr(host.get_grad_norm_fp32, "__wrapped__"):
            return self._host["_unscale_main_grads_and_check_for_nan"]()
        norms = torch.stack(torch._foreach_norm(grads))
        # A NaN or inf, or squares beyond float32: the host looks at every element.
        if not norms.isfinite().all():
            return self._host["_unscale_main_grads_and_check_for_nan"]()
        inv_scale = self.part.grad_scaler.inv_scale
        self._factor = inv_scale.reshape(1)
        self.norms = dict(zip(grads, (norms * inv_scale).unbind(), strict=True))
        self._own(grads)
        self.part.found_inf.fill_(0.0)
        torch.distributed.all_reduce(
            self.part.found_inf, op=torch.distributed.ReduceOp.MAX, group=self.part.get_grad_stats_parallel_group()
        )
        found = self.part.found_inf.item() > 0
        if found:
            self._forget()
        return found

    def clip(self, coefficient: float | Tensor) -> None:
        """Remember the factor by which the host would multiply every gradient; one above 1 is none."""
        if not isinstance(coefficient, Tensor):
            if not coefficient < 1.0:  # NaN too: the host leaves the gradients alone
                return
            device = self.part.get_parameters()[0].device
            coefficient = torch.full((1,), coefficient, dtype=torch.float32, device=device)
        factor = coefficient.reshape(1).clamp(max=1.0)
        self._factor = factor if self._factor is None else self._factor * factor

    def _own(self, grads: list[Tensor]) -> None:
        _grad_owners.update((grad, ref(self)) for grad in grads)

    def owns(self, parameters: Any) -> bool:
        """Tell whether ``parameters`` are this optimizer's, all of them."""
        mine = self.part.get_parameters()
        return len(parameters) == len(mine) and all(a is b for a, b in zip(parameters, mine, strict=True))

    @torch.no_grad()
    def step_with_ready_grads(self) -> Any:
        """Step by the host's way, with the model's weights handed to the optimizer."""
        targets = self._targets()
        self.inner.next_step = Step(factor=self._factor, models=targets)
        # The optimizer passes over weights without a gradient; the host copies those as well.
        self._copied = targets is not None and all(main.grad is not None for main in targets)
        try:
            return self._host["step_with_ready_grads"]()
        finally:
            self.inner.next_step, self._copied = None, False
            self._forget()

    def _copy_main_params_to_model_params(self) -> None:
        """Do nothing where the step has just written the model's weights."""
        if not self._copied:
            self._host["_copy_main_params_to_model_params"]()

    def _forget(self) -> None:
        self._factor, self.norms = None, {}

    def _targets(self) -> dict[Tensor, Tensor] | None:
        """Find the model's weight for every master; None where the host has more to do than to copy."""
        if isinstance(self.part, Float16OptimizerWithFloat16Params):
            _require(self.part, "float16_groups", "fp32_from_float16_groups")
            pairs = _pairs(self.part.fp32_from_float16_groups, self.part.float16_groups)
            return _writable(dict(pairs), [model for _, model in pairs])
        if not isinstance(self.part, DistributedOptimizer) or _copies_otherwise(self.part):
            return None
        _require(self.part, "buffers", "model_param_gbuf_map", "_get_model_param_range_map")
        sources = [bucket.param_data for buffer in self.part.buffers for bucket in buffer.buckets]
        addresses = [source.data_ptr() for source in sources]
        moved = addresses != self._addresses or any(a is not b for a, b in zip(sources, self._sources, strict=True))
        if moved:
            models = [model for group in self.part.model_float16_groups for model in group]
            self._sources, self._addresses = sources, addresses
            self._shards = _writable(dict(_model_shards(self.part)), models)
        return self._shards


def clip_by_norm(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``clip_grad_by_total_norm_fp32`` of ``megatron.core.optimizer.optimizer`` (0.17.1 to 0.19.2)."""

    @functools.wraps(original)
    def clip_grad_by_total_norm_fp32(
        parameters: Any, max_norm: float, total_norm: float | Tensor, use_decoupled_grad: bool = False
    ) -> None:
        owner = _owner(_param_owners, parameters[0]) if parameters else None
        # The groups whose norms are taken apart share one step but not one factor: they are clipped as ever.
        if owner is None or use_decoupled_grad or not owner.owns(parameters):
            original(parameters, max_norm, total_norm, use_decoupled_grad=use_decoupled_grad)
        else:
            owner.clip(max_norm / (total_norm + 1.0e-6))

    return clip_grad_by_total_norm_fp32


def norm_of_unscaled(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``get_grad_norm_fp32`` of ``megatron.core.optimizer.optimizer`` (0.17.1 to 0.19.2).

    It reduces over ranks. The 2-norm of a list is the one of its tensors' norms, so each gradient that is still scaled
    gives way to its norm. So do the other gradients of what is fused where the host has neither Transformer Engine nor
    Apex: its ``local_multi_tensor_l2_norm`` waits for the GPU once a tensor.
    """

    @functools.wraps(original)
    def get_grad_norm_fp32(grads_for_norm: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(grads_for_norm, Tensor) or not _grad_owners:
            return original(grads_for_norm, *args, **kwargs)
        norms: list[Tensor] = []
        ours: list[Tensor] = []
        others: list[Tensor] = []
        one_by_one = _host_reads_norms_one_by_one()
        for grad in grads_for_norm:
            owner = _owner(_grad_owners, grad)
            norm = None if owner is None else owner.norms.get(grad)
            if norm is not None:
                norms.append(norm)
            else:
                (ours if owner is not None and type(grad) is Tensor and one_by_one else others).append(grad)
        if args or kwargs.get("norm_type", 2) != 2:
            if norms:
                raise S3Error(
                    "megatron-core asks for another norm than the 2-norm, as 0.19.2 does not: report this one"
                )
            return original(grads_for_norm, *args, **kwargs)
        if ours:
            norms += torch._foreach_norm(ours)
        return original([*([torch.stack(norms)] if norms else []), *others], **kwargs)

    return get_grad_norm_fp32


def _owner(owners: _Owners, tensor: Tensor) -> SinglePass | None:
    found = owners.get(tensor)
    return None if found is None else found()


def _host_reads_norms_one_by_one() -> bool:
    """Tell whether the host has neither Transformer Engine nor Apex (megatron-core 0.17.1 to 0.19.2)."""
    return getattr(clip_grads.l2_norm_impl, "__name__", "") == "local_multi_tensor_l2_norm"


def _require(part: Any, *names: str) -> None:
    for name in names:
        if not hasattr(part, name):
            raise S3Error(
                f"this megatron-core's {type(part).__name__} has no {name}, through which {part.optimizer.spec.title} "
                "makes its single pass in 0.19.2: install a version from the table in docs/versions.md, or report this "
                "one"
            )


def _copies_otherwise(part: Any) -> bool:
    """Tell whether DistributedOptimizer quantizes, or leaves the copying to others (megatron-core 0.17.1 to 0.19.2)."""
    ddp, config = part.ddp_config, part.config
    return bool(
        ddp.use_megatron_fsdp
        or ddp.fp8_param_gather
        or ddp.fp4_param_gather
        or config.reuse_grad_buf_for_mxfp8_param_ag
        or config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    )


def _pairs(mains: list[list[Tensor]], models: list[list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [pair for groups in zip(mains, models, strict=True) for pair in zip(*groups, strict=True)]


def _model_shards(part: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every master with its range of the parameter buffer, as DistributedOptimizer's own copy does."""
    for main, model in (
        *_pairs(part.shard_fp32_from_float16_groups, part.model_float16_groups),
        *_pairs(part.shard_fp32_groups, part.model_fp32_groups),
    ):
        index, _, bucket = part.model_param_gbuf_map[model]
        where = part._get_model_param_range_map(model)["gbuf_world_in_bucket"]
        shard = part.buffers[index].buckets[bucket].param_data.view(-1)[where.start : where.end]
        # A float32 shard is its part of the buffer; the host copies it onto itself.
        if (shard.data_ptr(), shard.dtype) != (main.data_ptr(), main.dtype):
            yield main, shard


def _writable(targets: dict[Tensor, Tensor], models: list[Tensor]) -> dict[Tensor, Tensor] | None:
    """Return ``targets`` if the kernels can write them all; quantized weights are subclasses of Tensor."""
    plain = all(type(model.data) is Tensor for model in models)
    if plain and all(target.dtype in _WRITABLE and target.is_contiguous() for target in targets.values()):
        return targets
    return None
