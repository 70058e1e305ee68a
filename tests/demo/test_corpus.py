"""The corpus of the demonstration, made from this very Python."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from s3_megatron.demo import corpus

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> corpus.Corpus:
    return corpus.build(tmp_path_factory.mktemp("corpus"), QUIET)


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_there_is_enough_text_of_every_kind(built: corpus.Corpus):
    assert built.bytes >= 5e6
    written = records(built.train) + records(built.validation)
    assert len(written) == built.documents
    assert sum(len(record["text"].encode()) for record in written) == built.bytes
    assert all(record["text"].strip() for record in written)
    sources = {record["source"] for record in written}
    assert {"lib/os.py", "lib/json/decoder.py", "topics/assert"} <= sources
    assert not any("site-packages" in source or source.startswith("lib/test/") for source in sources)


def test_a_document_is_in_one_split_only(built: corpus.Corpus):
    train, held_out = (
        {(record["source"], record["text"]) for record in records(path)} for path in (built.train, built.validation)
    )
    assert not train & held_out
    share = sum(len(text) for _, text in held_out) / built.bytes
    assert 0.04 < share < 0.16, "a tenth of the documents; their sizes differ"


def test_the_same_python_writes_the_same_bytes(built: corpus.Corpus, tmp_path: Path):
    again = corpus.build(tmp_path, QUIET)
    assert again.train.read_bytes() == built.train.read_bytes()
    assert again.validation.read_bytes() == built.validation.read_bytes()


def test_a_complete_corpus_is_reused_and_an_interrupted_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpus, "documents", lambda: iter([("lib/a.py", "first"), ("lib/b.py", "  \n")]))
    first = corpus.build(tmp_path, QUIET)
    assert (first.documents, first.bytes) == (1, 5)
    monkeypatch.setattr(corpus, "documents", lambda: iter([("lib/a.py", "second!")]))
    assert corpus.build(tmp_path, QUIET) == first
    (first.folder / "corpus.json").unlink()
    assert corpus.build(tmp_path, QUIET).bytes == 7
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("harm", ["train.jsonl", "validation.jsonl", "corpus.json"])
def test_a_corpus_that_somebody_tidied_up_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str):
    """With corpus.json and no train.jsonl, or with half a corpus.json, the demonstration ended with a traceback."""
    monkeypatch.setattr(corpus, "documents", lambda: iter([("lib/a.py", "first")]))
    first = corpus.build(tmp_path, QUIET)
    if harm == "corpus.json":
        (first.folder / harm).write_text('{"python": ')
    else:
        (first.folder / harm).unlink()
    assert corpus.build(tmp_path, QUIET) == first
    assert first.train.exists() and first.validation.exists()
