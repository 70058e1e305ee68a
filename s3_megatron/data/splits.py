"""Whether data sets have enough for their splits, by Megatron's arithmetic, before it counts.

Its index builder adds the tokens of a split until they are as many as the run asks for: where the split has none, or
next to none, for ever and silently (megatron-core 0.19.2, GPTDataset._get_num_epochs).
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from s3_megatron.data.index import read_index
from s3_megatron.errors import S3Error

NAMES = ("train", "valid", "test")
# What the command line says where it says nothing (megatron-core 0.19.2, training/arguments.py).
DEFAULT_SPLIT = "969, 30, 1"
# Megatron counts them one by one, and holds 16 bytes for each document of each: more is a slip, not a plan.
MOST_EPOCHS = 1_000_000

# Prefixes, and their weights where they have any: megatron.core.datasets.utils.get_blend_from_list.
Blend = tuple[Sequence[str], Sequence[float] | None]
Share = tuple[float, float]


@dataclass(frozen=True)
class Part:
    """One split of one data set, as Megatron builds it; ``samples`` None is one epoch.

    ``bounds`` is the share of the sequences, from and to.
    """

    name: str
    prefix: str
    bounds: Share
    samples: int | None


@dataclass(frozen=True)
class Request:
    """What a run asks of its data: one ``blend`` for all splits, or one for each in ``per_split``.

    ``samples`` counts train, valid and test; None is one epoch. ``surplus`` is Megatron's mid_level_dataset_surplus.
    """

    samples: Sequence[int | None]
    sequence: int
    blend: Blend | None = None
    split: str | None = None
    per_split: Sequence[Blend | None] = (None, None, None)
    surplus: float = 0.005


def samples(train: int, iterations: int, batch: int, eval_iters: int, eval_interval: int) -> tuple[int, int, int]:
    """Samples for train, valid and test (megatron-core 0.19.2, training.get_train_valid_test_num_samples)."""
    return train, (iterations // eval_interval + 1) * eval_iters * batch, eval_iters * batch


def bounds(split: str) -> list[Share | None]:
    """The share of a data set that each split gets; None where it gets none and is not built.

    Source: parse_and_normalize_split and convert_split_vector_to_split_matrix (0.19.2).
    Raises S3Error for a split that is no three numbers.
    """
    try:
        numbers = [float(number) for number in re.findall(r"[.0-9]+", split)]
    except ValueError:
        numbers = []
    if not 0 < len(numbers) <= len(NAMES) or not sum(numbers):
        raise S3Error(f"--split {split}: give up to three numbers, for train, valid and test, such as 969,30,1")
    vector = np.array([*numbers, *[0.0] * (len(NAMES) - len(numbers))])
    ends = accumulate((vector / vector.sum()).tolist(), initial=0)
    return [(start, end) if end > start else None for start, end in pairwise(ends)]


def left_out(documents: int) -> list[str]:
    """The splits that get none of so many documents where --split is not given."""
    shares = [share for share in bounds(DEFAULT_SPLIT) if share is not None]
    return [
        name
        for name, (start, end) in zip(NAMES, shares, strict=True)
        if round(start * float(documents)) == round(end * float(documents))
    ]


def parts(request: Request) -> Iterator[Part]:
    """Every split of every data set that Megatron's builder will build, with the samples it will ask for."""
    if request.blend is not None:
        yield from _of_blend(request, request.blend, bounds(request.split or DEFAULT_SPLIT), range(len(NAMES)))
        return
    for index, blend in enumerate(request.per_split):
        if blend is not None:
            shares: list[Share | None] = [(0.0, 1.0) if other == index else None for other in range(len(NAMES))]
            # One prefix of its own takes all samples, whatever its weight.
            alone = blend if len(blend[0]) > 1 else (blend[0], None)
            yield from _of_blend(request, alone, shares, [index])


def _of_blend(request: Request, blend: Blend, shares: Sequence[Share | None], splits: Sequence[int]) -> Iterator[Part]:
    prefixes, weights = blend
    total = sum(weights or ())
    given: Sequence[float | None] = weights or [None] * len(prefixes)
    for prefix, weight in zip(prefixes, given, strict=True):
        for index in splits:
            share, wanted = shares[index], request.samples[index]
            if share is None:
                continue
            if weight is not None:
                if weight <= 0:
                    raise S3Error(f"the data blend gives {prefix} the weight {weight:g}: leave it out, or give it more")
                if wanted is not None:
                    wanted = math.ceil(math.ceil(wanted * (weight / total)) * (1 + request.surplus))
            elif len(prefixes) > 1:
                wanted = None
            yield Part(NAMES[index], prefix, share, wanted)


def tokens(part: Part) -> tuple[int, int, int]:
    """The sequences and the tokens of a split, and the sequences of its whole data set.

    Raises S3Error where the data set cannot be read.
    """
    lengths = read_index(part.prefix).lengths
    first, last = (round(share * float(len(lengths))) for share in part.bounds)
    return last - first, int(lengths[first:last].sum(dtype=np.int64)), len(lengths)


def shortages(request: Request) -> Iterator[str]:
    """What each split lacks, one line each.

    Raises S3Error where a data set cannot be read, the split is no split, or a weight is not above 0.
    """
    built = list(parts(request))
    if request.samples[1] != 0 and all(part.name != "valid" for part in built):
        yield (
            "the run evaluates, and has no validation data, which would end it in its first evaluation: give "
            "--valid-data-path or a --split with a part for it, or --eval-iters 0"
        )
    for part in built:
        documents, count, all_documents = tokens(part)
        of = f"split {part.name} of {part.prefix}"
        if not documents:
            yield (
                f"{of} has none of its {all_documents:,} documents (--split {request.split or DEFAULT_SPLIT}), and "
                "Megatron would look for them for ever: give more documents, a split that leaves it out (--split "
                "100,0,0 and --eval-iters 0), or data of its own (--train-data-path, --valid-data-path)"
            )
        elif part.samples is None and count <= request.sequence:
            yield (
                f"{of} has {count:,} tokens in {documents:,} documents, and one sequence takes "
                f"{request.sequence + 1:,}: give more, or a shorter --seq-length"
            )
        elif not count:
            yield f"{of} has no token in {documents:,} documents, and Megatron would count for ever: prepare it again"
        elif part.samples is not None and epochs(request, part, count) > MOST_EPOCHS:
            yield (
                f"{of} has {count:,} tokens in {documents:,} documents, and the run reads them "
                f"{epochs(request, part, count):,} times ({part.samples:,} sequences of {request.sequence:,}): more "
                f"than {MOST_EPOCHS:,} times is taken for a mistake, since Megatron would count for hours; give more "
                "data or fewer iterations"
            )


def epochs(request: Request, part: Part, count: int) -> int:
    """How often ``part`` of ``count`` tokens is read, begun ones counted."""
    return 1 if part.samples is None else max(1, math.ceil((part.samples * request.sequence + 1) / count))
