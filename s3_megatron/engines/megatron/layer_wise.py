"""Where Megatron's road for optimizers of whole matrices goes, and where it does not (megatron-core 0.19.2)."""

import argparse
from typing import Any

import megatron.core.optimizer as host
from megatron.core.optimizer import OptimizerConfig
from megatron.core.package_info import __version__

from s3_megatron.errors import S3Error
from s3_megatron.optim.polar import library
from s3_megatron.optim.spec import Spec


def used(spec: Spec, settings: argparse.Namespace | OptimizerConfig) -> list[Spec]:
    """List what moves the weights: an optimizer of ours, and the one beside it, where that is not Megatron's Adam."""
    rest = getattr(settings, spec.field("scalar_optimizer")) if spec.beside else None
    return [spec, *(each for each in spec.beside if each.name == rest)]


def refuse(settings: argparse.Namespace | OptimizerConfig) -> None:
    """Raise S3Error where this Megatron's road for whole matrices is missing, or does not go."""
    # 0.17 has no such road, and 0.18's takes Adam's name for the rest otherwise.
    if not hasattr(host.DistributedOptimizer, "optimizer_state_keys"):
        raise S3Error(
            "--optimizer softmuon needs megatron-core 0.19, whose road for optimizers of whole matrices it takes, and "
            f"this is {__version__}: install 0.19, or take s3"
        )
    library()
    if not host.HAVE_EMERGING_OPTIMIZERS:
        raise S3Error(
            "Megatron cannot import all that it needs of emerging-optimizers: pip install emerging-optimizers==0.3.0"
        )
    if settings.fp16:  # _get_megatron_emerging_optimizer of core/optimizer/__init__.py refuses it
        raise S3Error(
            "--fp16 does not work with --optimizer softmuon: Megatron refuses it with every optimizer of whole "
            "matrices, with its Muon, too; train in --bf16"
        )
    layer_wise = settings.use_distributed_optimizer or getattr(settings, "use_layer_wise_distributed_optimizer", False)
    if not layer_wise:
        return
    if not settings.bf16:
        raise S3Error(
            "--use-distributed-optimizer with --optimizer softmuon needs --bf16, as with Megatron's Muon: its "
            "layer-wise optimizer knows no float32; without the flag every rank moves every matrix"
        )
    if getattr(settings, "ckpt_format", "torch_dist") != "torch_dist":
        raise S3Error(
            f"--ckpt-format {settings.ckpt_format} cannot save --optimizer softmuon with --use-distributed-optimizer: "
            "give --ckpt-format torch_dist"
        )
    if getattr(settings, "overlap_param_gather_with_optimizer_step", False):
        raise S3Error(
            "--overlap-param-gather-with-optimizer-step does not work with --optimizer softmuon: drop the flag"
        )
    if getattr(settings, "num_distributed_optimizer_instances", 1) > 1:
        raise S3Error(
            "--num-distributed-optimizer-instances above 1 does not work with --optimizer softmuon: drop the flag"
        )


def refuse_chunks(config: OptimizerConfig, model_chunks: list[Any]) -> None:
    """Raise S3Error for a model without a matrix on this rank, for experts on ranks of their own that the host does not
    serve, and for matrices' cut gradients.

    DDP cuts them for a DistributedOptimizer: each rank would step the matrices with gradients of its own, of which one
    shard is the average. Megatron's validation of flags turns the setting off; who builds configurations himself, or
    Megatron-Bridge, does not.
    """
    from megatron.core.optimizer.emerging_optimizers import _is_nonlinear_or_embedding as is_rest

    trained = [[param for param in chunk.parameters() if param.requires_grad] for chunk in model_chunks]
    if all(is_rest(param) for chunk in trained for param in chunk):
        raise S3Error(
            "a rank has no matrix to train, and --optimizer softmuon moves those of every rank: share the layers out "
            "over pipeline stages in another way, or take --optimizer s3 for all weights"
        )
    for chunk, params in zip(model_chunks, trained, strict=True):
        ddp = getattr(chunk, "ddp_config", None)
        if ddp is None:
            continue
        experts = [param for param in params if not getattr(param, "allreduce", True)]
        layer_wise = config.use_layer_wise_distributed_optimizer
        # It shares nothing out there: ranks step experts that they have no gradient of, and save each of them twice.
        if experts and layer_wise and chunk.dp_cp_group.size() == 1 < chunk.expt_dp_group.size():
            raise S3Error(
                "Megatron's layer-wise optimizer does not share experts out where dense weights have one data-parallel "
                f"rank and experts {chunk.expt_dp_group.size()}, with Muon neither: leave --use-distributed-optimizer "
                "out, or give other --expert-model-parallel-size or --expert-tensor-parallel-size"
            )
        if not ddp.use_distributed_optimizer:
            continue
        if any(map(is_rest, experts)):
            raise S3Error(
                "experts' biases have no optimizer beside --optimizer softmuon where Megatron lays its buffers out for "
                "the distributed one: train with --disable-bias-linear, or give --no-use-layer-wise-param-layout"
            )
        is_laid_out = all(hasattr(param, "is_managed_by_layer_wise_optimizer") for param in params)
        if not (layer_wise and is_laid_out):
            raise S3Error(
                "use_distributed_optimizer has gradients reduced into shards, and --optimizer softmuon steps whole "
                "matrices: set it to False in the configurations of DDP and of the optimizer; with "
                "use_layer_wise_distributed_optimizer=True each matrix is on one rank"
            )
