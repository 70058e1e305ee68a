"""The data sets of a run, looked at before its ranks meet."""

import argparse
import os

from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.training.utils import get_blend_and_blend_per_split

from s3_megatron.data import caches, splits
from s3_megatron.errors import S3Error


def check_data(args: argparse.Namespace) -> None:
    """Check that every split of ``args``, validated, has tokens enough, and no index cache of other data.

    One rank of a machine looks, since it reads every index.

    Raises:
        S3Error: a split has too few documents or tokens, a cache is stale, or a data set cannot be read.
    """
    if args.mock_data or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    blend, per_split = get_blend_and_blend_per_split(args)
    blends = [one for one in (blend, *(per_split or ())) if one is not None]
    if any(is_object_storage_path(prefix) for prefixes, _ in blends for prefix in prefixes):
        return  # its index is elsewhere
    request = splits.Request(
        _samples(args),
        args.seq_length,
        blend,
        args.split,
        per_split or (None,) * len(splits.NAMES),
        args.mid_level_dataset_surplus,
    )
    for lack in splits.shortages(request):
        raise S3Error(f"too little data: {lack}")
    for line in caches.stale(request, args.data_cache_path, args.seed):
        raise S3Error(line)


def _samples(args: argparse.Namespace) -> tuple[int, int | None, int]:
    batch = args.global_batch_size
    # Megatron derives the iterations later where samples are given; with a growing batch they are a few more.
    iterations = args.train_iters or (args.train_samples or 0) // batch
    train = args.train_samples or iterations * batch
    evaluated = getattr(args, "eval_global_batch_size", batch)
    _, valid, test = splits.samples(train, iterations, evaluated, args.eval_iters, args.eval_interval)
    if args.skip_train:
        valid = test
    elif args.start_eval_at_iter is not None:
        valid -= min(valid, args.start_eval_at_iter // args.eval_interval * args.eval_iters * evaluated)
    return train, None if args.full_validation else valid, test
