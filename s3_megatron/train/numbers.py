"""Numbers of the command line that cannot be, or do not go together.

Megatron (0.19.2) answers these by an assertion without a text or values, a ZeroDivisionError, late, or not at all.
"""

import argparse
from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from s3_megatron.errors import S3Error
from s3_megatron.optim.spec import flag_of

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]

# With one of these the pipeline's stages need not have as many layers each.
_UNEVEN_STAGES = (
    *("pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
)


class Numbers(BaseModel):
    """The ranges of single flags; None where a flag was not given and has no default."""

    model_config = ConfigDict(from_attributes=True)

    num_layers: Count | None
    hidden_size: Count | None
    num_attention_heads: Count | None
    ffn_hidden_size: Count | None
    kv_channels: Count | None
    num_query_groups: Count | None
    seq_length: Count | None
    max_position_embeddings: Count | None
    make_vocab_size_divisible_by: Count
    hidden_dropout: Share
    attention_dropout: Share
    tensor_model_parallel_size: Count
    pipeline_model_parallel_size: Count
    context_parallel_size: Count
    micro_batch_size: Count | None
    global_batch_size: Count | None
    train_iters: Whole | None
    train_samples: Whole | None
    lr: Amount | None
    min_lr: Amount
    lr_warmup_iters: Whole
    lr_decay_iters: Count | None
    weight_decay: Amount
    clip_grad: Amount
    seed: Count
    log_interval: Count
    eval_interval: Count
    eval_iters: Whole
    save_interval: Count | None


def check(args: argparse.Namespace) -> None:
    """Check the numbers of ``args``, parsed but not validated.

    Raises:
        S3Error: some cannot be, or do not go together; it names all of them.
    """
    try:
        Numbers.model_validate(args)
    except ValidationError as error:
        wrong = (f"{flag_of(str(each['loc'][0]))} {each['input']}: {each['msg']}" for each in error.errors())
        raise S3Error("; ".join(wrong)) from error
    contradictions = [*_length(args), *_saving(args)]
    if not args.use_checkpoint_args:  # else the model's shape is the checkpoint's
        contradictions += [*_shape(args), *_ranks(args)]
    if contradictions:
        raise S3Error("; ".join(contradictions))


def _length(args: argparse.Namespace) -> Iterator[str]:
    if args.skip_train:
        return
    if args.train_iters and args.train_samples:
        yield (
            f"--train-iters {args.train_iters} and --train-samples {args.train_samples} both give the length of the "
            "run: drop one"
        )
    if args.lr is not None and args.min_lr > args.lr:
        yield f"--min-lr {args.min_lr} is above --lr {args.lr}: make it at most that"
    name = "lr_decay_iters" if args.lr_decay_iters else "train_iters"
    flag, end = flag_of(name), getattr(args, name)
    if end and args.lr_warmup_iters >= end:
        yield f"--lr-warmup-iters {args.lr_warmup_iters} is not below {flag} {end}: make it at most {end - 1}"


def _saving(args: argparse.Namespace) -> Iterator[str]:
    interval, retain = args.save_interval, args.save_retain_interval
    if args.save is not None and interval is None:
        yield f"--save {args.save} needs --save-interval N, the iterations between two checkpoints"
    if args.save is None and interval is not None:
        yield f"--save-interval {interval} saves nothing without a folder: give --save DIR, or drop it"
    if interval and retain and retain % interval:
        yield f"--save-retain-interval {retain} is not a multiple of --save-interval {interval}: make it one"
    if args.ckpt_step and args.load is None and args.pretrained_checkpoint is None:
        yield f"--ckpt-step {args.ckpt_step} loads nothing without a folder: give --load DIR, or drop it"


def _shape(args: argparse.Namespace) -> Iterator[str]:
    tensor, context = args.tensor_model_parallel_size, args.context_parallel_size
    pairs = [("num_attention_heads", "tensor_model_parallel_size"), ("ffn_hidden_size", "tensor_model_parallel_size")]
    if args.kv_channels is None:
        pairs.append(("hidden_size", "num_attention_heads"))
    if args.group_query_attention:
        pairs.append(("num_attention_heads", "num_query_groups"))
    if not any(getattr(args, name) for name in _UNEVEN_STAGES):
        pairs.append(("num_layers", "pipeline_model_parallel_size"))
    divisions = [(flag_of(name), getattr(args, name), flag_of(other), getattr(args, other)) for name, other in pairs]
    if context > 1:  # each rank has an early and a late piece, as causal attention asks for
        divisions.append(("--seq-length", args.seq_length, "2 x --context-parallel-size", 2 * context))
    if args.sequence_parallel:
        shares = "--tensor-model-parallel-size x --context-parallel-size"
        divisions.append(("--seq-length", args.seq_length, shares, tensor * context))
    for flag, value, what, divisor in divisions:
        if value and divisor and value % divisor:
            more = -(-value // divisor) * divisor
            yield f"{flag} {value} is not a multiple of {divisor} ({what}): make it {more}, or change that"
    if args.fp16 and args.bf16:
        yield "--fp16 and --bf16 are both given: drop one"


def _ranks(args: argparse.Namespace) -> Iterator[str]:
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    parts = " x ".join(f"{flag_of(name)} {getattr(args, name)}" for name in sizes)
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    if args.world_size % model:
        yield (
            f"{args.world_size} ranks are not a multiple of {parts} = {model}: start a multiple of {model}, or split "
            "the model less"
        )
        return
    micro, batch = args.micro_batch_size, args.global_batch_size
    data = args.world_size // model
    is_fixed = args.rampup_batch_size is None and not args.decrease_batch_size_if_needed
    if micro and batch and is_fixed and batch % (micro * data):
        yield (
            f"--global-batch-size {batch} is not a multiple of --micro-batch-size {micro} x {data} data-parallel ranks "
            f"= {micro * data}: make it {-(-batch // (micro * data)) * micro * data}, or --micro-batch-size smaller"
        )
