"""Whether data are enough, against Megatron's own arithmetic, and against its index builder."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3_megatron.data import caches, splits, writer
from s3_megatron.data.splits import Request
from s3_megatron.errors import S3Error

Dataset = Callable[..., str]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Writes a data set of documents of these lengths; returns its prefix."""

    def write(lengths: list[int], name: str = "data") -> str:
        with writer.new_dataset(tmp_path / name, 255) as builder:
            for length in lengths:
                builder.add_document(np.arange(length) % 250, [length])
        return str(tmp_path / name)

    return write


def lacks(request: Request) -> str:
    return "\n".join(splits.shortages(request))


def of(prefix: str, **settings_: object) -> Request:
    return Request(**{"samples": (8, 4, 4), "sequence": 16, "blend": ([prefix], None), **settings_})


def build(request: Request, cache: Path | None = None) -> list[object]:
    """What Megatron builds of a request, in this process."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    # A stand-in, of which only its name for the cache and the ids of end and padding are asked.
    tokenizer = SimpleNamespace(eod=254, pad=253, vocab_size=255, unique_identifiers={"class": "stand-in"})
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=request.sequence,
        blend=request.blend,
        blend_per_split=None if request.blend else list(request.per_split),
        split=request.split,
        path_to_cache=None if cache is None else str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        mid_level_dataset_surplus=request.surplus,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, list(request.samples), lambda: True, config).build()


def leaves(built: list[object]) -> list[tuple[str, str, int | None, int]]:
    """Split, prefix, samples asked for and sequences of each data set that Megatron built."""
    parts = [part for whole in built if whole is not None for part in getattr(whole, "datasets", [whole])]
    return [(part.index_split.name, part.dataset_path, part.num_samples, len(part.indices)) for part in parts]


def ours(request: Request) -> list[tuple[str, str, int | None, int]]:
    return [(part.name, part.prefix, part.samples, splits.tokens(part)[0]) for part in splits.parts(request)]


def test_parts_are_those_that_megatron_builds(dataset: Dataset) -> None:
    """Sizes, weights, rounding and the surplus, for every way to name data."""
    a, b = dataset([40] * 103, "a"), dataset([33] * 57, "b")
    requests = [
        of(a, split="90,5,5"),
        of(a, split="100,0,0", samples=(7, 0, 0)),
        of(a, split="1,1", samples=(5, 3, 0)),
        of(a, blend=([a, b], [0.3, 1.7]), split="80,10,10", samples=(1001, 101, 11)),
        of(a, blend=([a, b], None), split="80,10,10"),
        of(a, blend=([a], [5.0]), split="80,10,10"),
        Request((30, 5, 0), 16, per_split=(([a, b], [0.5, 0.5]), ([b], [1.0]), None)),
        Request((30, 5, 7), 16, per_split=(([a, b], None), ([b], None), ([a], None))),
    ]
    for request in requests:
        assert not lacks(request)
        assert sorted(ours(request)) == sorted(leaves(build(request)))


@given(
    st.lists(st.floats(0, 1000).map(lambda x: round(x, 3)), min_size=1, max_size=3).filter(sum), st.integers(0, 9999)
)
def test_shares_are_megatrons(numbers: list[float], count: int) -> None:
    from megatron.core.datasets import blended_megatron_dataset_config as host

    text = ",".join(f"{number:.3f}" for number in numbers)
    theirs = host.convert_split_vector_to_split_matrix(host.parse_and_normalize_split(text))
    assert splits.bounds(text) == [None if share is None else tuple(share) for share in theirs]
    shares = host.convert_split_vector_to_split_matrix(host.parse_and_normalize_split(splits.DEFAULT_SPLIT))
    empty = [round(start * float(count)) == round(end * float(count)) for start, end in shares]
    assert splits.left_out(count) == [name for name, none in zip(splits.NAMES, empty, strict=True) if none]


def test_megatron_counts_for_ever_where_a_split_has_nothing(dataset: Dataset) -> None:
    """The control: the host's own loop, ended by an alarm, on what we refuse; and at rest on what we let pass."""
    from megatron.core.datasets.gpt_dataset import GPTDataset

    assert threading.current_thread() is threading.main_thread(), "where alarms arrive"

    class Alarm(Exception):
        pass

    def ring(*_: object) -> None:
        raise Alarm

    def count(samples: int, tokens: int) -> int:
        asked = SimpleNamespace(
            num_samples=samples, config=SimpleNamespace(sequence_length=16, add_extra_token_to_sequence=True)
        )
        before = signal.signal(signal.SIGALRM, ring)
        timer = signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            return GPTDataset._get_num_epochs(asked, tokens)
        finally:
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, before)

    # Even where no sample is asked for: one token more than none.
    for samples in (0, 1):
        with pytest.raises(Alarm):
            count(samples, 0)
    for samples, tokens in ((8, 30), (8, 129), (8, 128), (0, 1), (1, 17), (1, 16)):
        part = splits.Part("train", "", (0, 1), samples)
        assert splits.epochs(of(""), part, tokens) == count(samples, tokens)


def test_splits_that_get_nothing_are_named(dataset: Dataset) -> None:
    """969,30,1 of ten documents: none to validate, none to test, and no message for as long as one waits."""
    prefix = dataset([200] * 10)
    lines = lacks(of(prefix)).split("\n")
    assert [line.split(" has none of its 10 documents (--split 969, 30, 1)")[0] for line in lines] == [
        f"split valid of {prefix}",
        f"split test of {prefix}",
    ]
    assert lacks(of(prefix, samples=(8, 0, 0))).count("has none") == 2, "built although nothing is evaluated"
    assert not lacks(of(prefix, samples=(8, 0, 0), split="100,0,0"))
    assert not lacks(of(prefix, split="80,10,10"))
    assert splits.left_out(10) == ["valid", "test"]
    assert splits.left_out(1000) == []


def test_one_document_trains(dataset: Dataset) -> None:
    assert not lacks(of(dataset([200]), split="1", samples=(8, 0, 0)))


def test_evaluation_without_data_is_named(dataset: Dataset) -> None:
    """Megatron asks an iterator that is None, after the last iteration or at the first --eval-interval."""
    prefix = dataset([200] * 10)
    assert "the run evaluates, and has no validation data" in lacks(of(prefix, split="100,0,0"))
    only = Request((8, None, 0), 16, per_split=(([prefix], None), None, None))
    assert "the run evaluates" in lacks(only), "--full-validation"


def test_documents_without_tokens_and_far_too_few_tokens_are_named(dataset: Dataset) -> None:
    empty, tiny = dataset([0] * 10, "empty"), dataset([3], "tiny")
    assert "has no token in 8 documents" in lacks(of(empty, split="80,10,10"))
    line = lacks(of(tiny, samples=(1_000_000, 0, 0), split="1"))
    assert "has 3 tokens in 1 documents, and the run reads them 5,333,334 times" in line
    assert not lacks(of(tiny, samples=(100, 0, 0), split="1"))


def test_blends_are_looked_at_one_by_one(dataset: Dataset) -> None:
    large, small = dataset([200] * 1000, "large"), dataset([17] * 3, "small")
    weighted = of(large, blend=([large, small], [0.9, 0.1]))
    assert f"split valid of {small} has none of its 3 documents" in lacks(weighted)
    assert large not in lacks(weighted)
    # Without weights, one epoch of each; Megatron asserts that none is empty.
    short = Request((8, 4, 0), 64, per_split=(([large, small], None), ([large], None), None))
    assert lacks(short).startswith(f"split train of {small} has 51 tokens in 3 documents, and one sequence takes 65")
    with pytest.raises(AssertionError):
        build(short)
    with pytest.raises(S3Error, match="the weight 0: leave it out"):
        lacks(of(large, blend=([large, small], [1.0, 0.0])))
    with pytest.raises(S3Error, match=r"--split a,b: give up to three numbers"):
        lacks(of(large, split="a,b"))
    with pytest.raises(S3Error, match=r"nowhere\.idx is missing"):
        lacks(of("nowhere"))


def test_a_cache_of_other_data_is_named(dataset: Dataset, tmp_path: Path) -> None:
    """Megatron's key is the path: with more documents under the same name it went on with those it knew."""
    request = of(dataset([40] * 100), split="90,5,5")
    prefix = Path(request.blend[0][0])
    cache = tmp_path / "cache"
    for folder in (cache, None):
        build(request, folder)
        assert not list(caches.stale(request, folder, 1))
    for end in (".bin", ".idx"):
        Path(f"{prefix}{end}").unlink()
    dataset([40] * 100)
    assert not list(caches.stale(request, cache, 1)), "written anew, and the same: a copy to a node's disk"
    for end in (".bin", ".idx"):
        Path(f"{prefix}{end}").unlink()
    dataset([41] * 150)
    # The control: Megatron takes it, and the documents it knew are all that it reads.
    assert build(request, cache)[0].document_index.max() < 90
    for folder in (cache, None):
        lines = list(caches.stale(request, folder, 1))
        assert len(lines) == 3
        assert all("was built for other data" in line and "\n" not in line for line in lines)
    for other in ({"sequence": 8}, {"samples": (9, 5, 5)}, {"split": "80,10,10"}):
        assert not list(caches.stale(of(str(prefix), **{"split": "90,5,5", **other}), cache, 1)), "not what it loads"
    assert not list(caches.stale(request, cache, 2))
    for file in [*cache.iterdir(), *(prefix / "cache" / "GPTDataset_indices").iterdir()]:
        file.unlink()
    assert build(request, cache)[0].document_index.max() > 90
    assert not list(caches.stale(request, cache, 1))


def test_a_damaged_cache_of_older_data_is_named(dataset: Dataset, tmp_path: Path) -> None:
    request = of(dataset([40] * 100), split="100,0,0", samples=(8, 0, 0))
    build(request, tmp_path / "cache")
    (index,) = (tmp_path / "cache").glob("*sample_index.npy")
    index.write_bytes(index.read_bytes()[:40])
    idx = Path(f"{request.blend[0][0]}.idx")
    idx.write_bytes(idx.read_bytes())
    assert len(list(caches.stale(request, tmp_path / "cache", 1))) == 1
