"""Mistakes that Megatron would answer with a traceback, or not at all."""

import argparse
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.core.datasets.indexed_dataset import get_bin_path, get_idx_path
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.tokenizers.utils.build_tokenizer import SP_TOKENIZERS
from megatron.training import training
from megatron.training.utils import get_blend_and_blend_per_split

from s3_megatron.errors import S3Error
from s3_megatron.optim.spec import flag_of

# Other models, and batches that are made otherwise: gpt.py would pass over these flags in silence.
_OTHER_SCRIPTS = (
    "yaml_cfg",  # first: what it gives lacks the other names
    "sft",
    "fim_data",
    "dataloader_inter_document_masking",
    "per_dataset_sequences_path",
    "hybrid_context_parallel",
    "hybrid_layer_pattern",
    "perform_rl_step",
    "logits_save_dir",
    "logits_load_dir",
    "freeze_all_layers",  # pretrain() passes over it where a configuration builds the model, as in gpt.py (0.19.2)
)


def check_flags(args: argparse.Namespace) -> None:
    """Check what ``args``, parsed but not validated, asks for, and that the files it names exist.

    Raises:
        S3Error: a flag is missing or another script's, or a checkpoint, a tokenizer's or data set's file is not there.
    """
    for name in _OTHER_SCRIPTS:
        if getattr(args, name):
            raise S3Error(
                f"{flag_of(name)} is not for this script: run one that knows it, such as Megatron-LM's "
                "pretrain_gpt.py, with 'python -m s3_megatron.train.run SCRIPT ARGS...'"
            )
    if not args.skip_train:
        if args.lr is None:
            raise S3Error("--lr is missing: give the peak rate")
        if not args.train_iters and not args.train_samples:
            raise S3Error("--train-iters is missing or 0: give the length of the run, or --train-samples")
    check_checkpoint(args)
    _check_tokenizer(args)
    if not args.mock_data:
        _check_data(args)


def check_checkpoint(args: argparse.Namespace) -> None:
    """Check that what --load and --ckpt-step name is there: from a mistyped folder training begins at random.

    Raises:
        S3Error: it is not. A folder that is --save's, too, may be new.
    """
    if args.load is None or is_object_storage_path(args.load):
        return
    folder = Path(args.load)
    if not folder.is_dir() and (args.save is None or Path(args.save) != folder):
        raise S3Error(
            f"--load {folder} is not there, and training would begin from random weights: give the folder of a run's "
            "checkpoints, or leave it out"
        )
    if args.ckpt_step and not (folder / f"iter_{args.ckpt_step:07d}").exists():
        there = sorted(int(path.name[5:]) for path in folder.glob("iter_*") if path.name[5:].isdigit())
        found = f"but of {', '.join(map(str, there))}" if there else "nor any other"
        raise S3Error(f"--load {folder} has no checkpoint of iteration {args.ckpt_step} (--ckpt-step), {found}")


def _check_tokenizer(args: argparse.Namespace) -> None:
    kind, model = args.tokenizer_type, args.tokenizer_model
    if kind in (*SP_TOKENIZERS, "TikTokenizer"):
        if model is None:
            raise S3Error(f"--tokenizer-type {kind} needs a file: give --tokenizer-model FILE")
        _check_file("--tokenizer-model", model)
    if kind == "HuggingFaceTokenizer" and model is None:
        raise S3Error(f"--tokenizer-type {kind} needs a name or a folder: give --tokenizer-model NAME")
    if kind == "NullTokenizer" and not args.vocab_size:
        raise S3Error(f"--tokenizer-type {kind} needs the number of tokens: give --vocab-size N, at least 1")
    files = (("--vocab-file", args.vocab_file), ("--merge-file", args.merge_file))
    for flag, path in files:
        if path is not None:
            _check_file(flag, path)
    if kind == "GPT2BPETokenizer" and not all(path for _, path in files) and find_spec("wget") is None:
        raise S3Error(
            f"--tokenizer-type {kind} needs two files: give --vocab-file FILE and --merge-file FILE (to fetch them "
            "Megatron needs a network and the package wget)"
        )


def _check_data(args: argparse.Namespace) -> None:
    for flag in ("data_args_path", "per_split_data_args_path"):
        if getattr(args, flag) is not None:
            _check_file(flag_of(flag), getattr(args, flag))
    whole, per_split = get_blend_and_blend_per_split(args)
    blends = [blend for blend in (whole, *(per_split or ())) if blend is not None]
    if not blends:
        raise S3Error("no data to train on: give --data-path PREFIX, --train-data-path PREFIX, or --mock-data")
    missing = [
        path
        for prefixes, _weights in blends
        for prefix in prefixes
        if not is_object_storage_path(prefix)
        for path in (get_bin_path(prefix), get_idx_path(prefix))
        if not Path(path).is_file()
    ]
    if missing:
        raise S3Error(
            f"missing data files: {', '.join(missing)}; a data path is a prefix, without .bin or .idx "
            "('s3-megatron data prepare' makes both files)"
        )


def _check_file(flag: str, path: str) -> None:
    if not is_object_storage_path(path) and not Path(path).is_file():
        raise S3Error(f"{flag} {path} is not a file: give the path of an existing one")


def check_schedule(args: argparse.Namespace) -> None:
    """Build the schedule of ``args``, validated and Megatron's global ones, and go to its last step; changes nothing.

    Megatron (0.19.2, OptimizerParamScheduler) checks it only after model and data are built, by assertions.

    Raises:
        AssertionError: a length, a rate or a style of the schedule does not go with the others.
    """
    given = dict(vars(args))
    try:
        schedule = training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=[{}]))
        schedule.step(schedule.lr_decay_steps)
    finally:
        vars(args).clear()
        vars(args).update(given)


def check_vocabulary(args: argparse.Namespace, tokenizer: Any) -> None:
    """Check that the model embeds every token of ``tokenizer``.

    Megatron (0.19.2) silently overrules a small --vocab-size, and takes a small --padded-vocab-size, with
    which the first large token ends the run in an index error.

    Raises:
        S3Error: ``tokenizer`` has more tokens than the flags give the model.
    """
    for flag, limit in (("--vocab-size", args.vocab_size), ("--padded-vocab-size", args.padded_vocab_size)):
        if limit is not None and tokenizer.vocab_size > limit:
            raise S3Error(
                f"the tokenizer ({args.tokenizer_model or args.tokenizer_type}) has {tokenizer.vocab_size} tokens, "
                f"more than {flag} {limit}: leave {flag} out, or make it at least {tokenizer.vocab_size}"
            )
