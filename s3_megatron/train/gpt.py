"""GPT on megatron.training.pretrain (megatron-core 0.19.2), whose wheel has the loop but no script for a model."""

import argparse
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers, get_tokenizer, pretrain
from megatron.training.arguments import parse_args
from megatron.training.checkpointing import get_checkpoint_tracker_filename
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from s3_megatron.checkpoints import lease
from s3_megatron.checkpoints.whole import DEEPSPEED_POINTER
from s3_megatron.errors import S3Error
from s3_megatron.machine import is_first_rank
from s3_megatron.run_folder import of_this_job
from s3_megatron.train import loading, mistakes, numbers, requests
from s3_megatron.train.data import check_data

try:
    from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args
except ImportError as missing:
    raise S3Error(
        "the GPT entry needs megatron-core 0.19: install it, or run your own script with 'python -m "
        f"s3_megatron.train.run SCRIPT ARGS...' ({missing})"
    ) from missing

# The keys that get_batch_on_this_tp_rank reads.
_BATCH = (
    "tokens",
    "labels",
    "loss_mask",
    "position_ids",
    "attention_mask",
    "cu_seqlens",
    "cu_seqlens_padded",
    "max_seqlen",
    "local_cp_size",
    "hybrid_cp_group",
)
Loss = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]


def train() -> None:
    """Pretrain as the command line says.

    Raises:
        S3Error: a flag, a file or the vocabulary is wrong.
    """
    args = parse()
    megatrons = args.load is not None and Path(get_checkpoint_tracker_filename(args.load)).exists()
    if args.load is not None and not megatrons and (Path(args.load) / DEEPSPEED_POINTER).exists():
        raise S3Error(
            f"--load {args.load} holds DeepSpeed's checkpoints, and training would start from random weights: go on "
            "with s3_megatron.train.pretrain_gpt_deepspeed"
        )
    run(args)


def parse(
    add_flags: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
    check: Callable[[argparse.Namespace], None] = lambda args: None,
) -> argparse.Namespace:
    """Parse and validate the command line, with what ``add_flags`` adds; ``check`` sees it before validation.

    Raises:
        S3Error: a flag, a file or the vocabulary is wrong.
    """

    def prepare(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add_flags(parser)
        return _refuse_by_exception(parser)

    with _refusals():
        args = parse_args(prepare)
    mistakes.check_flags(args)
    check(args)
    numbers.check(args)
    with _refusals():
        args = parse_and_validate_args(prepare)
        mistakes.check_schedule(args)
    mistakes.check_vocabulary(args, get_tokenizer())
    check_data(args)
    return args


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn what Megatron raises of flags that do not go together into S3Error: trying again would not help.

    RuntimeError passes: CUDA raises it where a GPU is broken, which another node may cure.
    """
    try:
        yield
    except S3Error:
        raise
    except (AssertionError, ValueError) as error:
        # Some of Megatron's assertions have no text: the line of code is shown instead.
        text = " ".join(str(error).split()) or traceback.extract_tb(error.__traceback__)[-1].line
        raise S3Error(f"Megatron refuses the flags: {text}") from error


def configure(args: argparse.Namespace) -> Any:
    """Make the configurations of model and loop, whose own checks come with it."""
    return pretrain_cfg_container_from_args(args, gpt_config_from_args(args))


def run(args: argparse.Namespace) -> None:
    """Pretrain by ``args``, which are Megatron's global ones, too."""
    with _refusals():
        config = configure(args)
    with _alone_in(args.save), requests.obeyed(), loading.watches_megatron():
        pretrain(config, build_datasets, ModelType.encoder_or_decoder, forward_step)


@contextmanager
def _alone_in(folder: str | None) -> Iterator[None]:
    """Hold ``folder``, where this run saves, on rank 0; in a job the node agent does."""
    if folder is None or of_this_job() is not None or not is_first_rank():
        yield
        return
    with lease.held(Path(folder), _end):
        yield


def _end(why: str) -> None:
    """End this rank, and with it the others, from the thread that noticed ``why``."""
    print(f"s3_megatron: error: {why}", file=sys.stderr, flush=True)
    os._exit(1)


def _refuse_by_exception(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    def error(message: str) -> NoReturn:
        raise S3Error(f"{message} (--help lists every flag)")

    parser.error = error  # type: ignore[method-assign]
    return parser


def build_datasets(sizes: list[int], vp_stage: int | None = None) -> list[Any]:
    """Build the train, validation and test datasets, of ``sizes`` samples, on the ranks that read them."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    reads = functools.partial(_reads_data, args, vp_stage)
    return BlendedMegatronDatasetBuilder(kind, sizes, reads, config).build()


build_datasets.is_distributed = True  # type: ignore[attr-defined]  # pretrain() then calls it on every rank


def _has_mtp(args: argparse.Namespace, vp_stage: int | None) -> bool:
    return mtp_on_this_rank(
        layout=args.pipeline_model_parallel_layout,
        mtp_num_layers=args.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def _needs_batch(args: argparse.Namespace, vp_stage: int | None) -> bool:
    return is_first_or_last_pipeline_stage(vp_stage) or _has_mtp(args, vp_stage)


def _reads_data(args: argparse.Namespace, vp_stage: int | None) -> bool:
    return mpu.get_tensor_model_parallel_rank() == 0 and _needs_batch(args, vp_stage)


def get_batch(data_iterator: Iterator[dict[str, Any]] | None, vp_stage: int | None) -> dict[str, Any]:
    """Give this rank its part of the next micro-batch, [batch, sequence / cp]; None where a stage needs nothing."""
    args = get_args()
    if not _needs_batch(args, vp_stage):
        return dict.fromkeys(_BATCH)
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        sample = next(data_iterator)
        batch = {key: sample[key].cuda(non_blocking=True) if key in sample else None for key in _BATCH}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_has_mtp(args, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
    )
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())


def forward_step(data_iterator: Iterator[dict[str, Any]] | None, model: torch.nn.Module) -> tuple[torch.Tensor, Loss]:
    """Run ``model`` on its next micro-batch; returns its output and the function that makes a loss of it."""
    timer = get_timers()("batch-generator", log_level=2)
    timer.start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timer.stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, functools.partial(sum_loss, batch["loss_mask"])


def sum_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the ``losses`` of the tokens that ``loss_mask`` counts, both [micro batch, sequence / cp].

    Returns the sum, the number of tokens, and both as Megatron logs them: it divides by the tokens of all ranks.
    """
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(losses.reshape(-1).float() * mask)
    tokens = mask.sum().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(loss, torch.isnan, "loss is NaN")
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}
