"""What an optimizer of matrices under DeepSpeed has to know of Megatron's GPT, so that it moves it as in Megatron."""

from typing import Any

from megatron.core.optimizer import emerging_optimizers as host
from torch import nn

from s3_megatron.errors import S3Error

# How Megatron finds fused QKV weights (_get_megatron_emerging_optimizer of megatron-core 0.19.2, core/optimizer).
_FUSED_QKV = "linear_qkv.weight"


def describe(model: nn.Module, model_config: Any, params: dict[str, Any], split_qkv: bool) -> None:
    """Mark the weights that are matrices by Megatron's rule, and add ``split_qkv`` to DeepSpeed's ``params``, in place.

    ``model_config`` is the model's TransformerConfig.

    Raises:
        S3Error: ``params`` have another ``split_qkv`` than the flag.
    """
    for param in model.parameters():
        param.use_muon = not host._is_nonlinear_or_embedding(param)  # type: ignore[attr-defined]
    is_fused = any(name.endswith(_FUSED_QKV) and param.requires_grad for name, param in model.named_parameters())
    wanted = {f"*{_FUSED_QKV}": host._get_qkv_split_shapes(model_config)} if split_qkv and is_fused else {}
    if params.setdefault("split_qkv", wanted) != wanted:
        raise S3Error(
            f"DeepSpeed's file has optimizer.params.split_qkv = {params['split_qkv']} and the flags make it {wanted}: "
            "leave it out of the file; --softmuon-no-split-qkv splits nothing"
        )
