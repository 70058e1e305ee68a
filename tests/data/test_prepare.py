"""Written files, read back with Megatron's own IndexedDataset."""

import gzip
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3_megatron.data import encoding, inspect, load_tokenizer, prepare, writer
from s3_megatron.errors import S3Error

EOD = 2


def documents_of(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    # One sequence a document, as GPT training expects.
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_megatron_reads_every_document_and_its_end(corpus: Path, model: Path, tmp_path: Path) -> None:
    report = prepare([corpus], tmp_path / "new" / "a", tokenizer_model=model, append_eod=True, workers=1)
    tokenizer = load_tokenizer("sentencepiece", model)
    texts = [path.read_text("utf-8") for path in sorted(corpus.iterdir())]
    assert documents_of(tmp_path / "new" / "a") == [[*tokenizer.encode(text), EOD] for text in texts]
    assert report.documents == len(texts)
    assert report.text_bytes == sum(len(text.encode()) for text in texts)
    assert report.tokens * 2 == (tmp_path / "new" / "a.bin").stat().st_size
    assert report.dtype == "uint16"
    assert not report.skipped
    assert report.megatron_flags[2:] == [
        *("--tokenizer-model", str(model)),
        *("--vocab-size", "1000"),
        *("--data-path", str(tmp_path / "new" / "a")),
    ]


def test_the_number_of_workers_changes_no_byte(corpus: Path, model: Path, tmp_path: Path) -> None:
    """From 3 processes on 2 cores batches come back out of order."""
    texts = [path.read_text("utf-8") for path in sorted(corpus.iterdir())]
    lines = write_jsonl(tmp_path / "a.jsonl", [line for text in texts for line in text.split("\n\n") if line.strip()])
    lines.write_bytes(lines.read_bytes().replace(b'{"text"', b'{"text', 1) + b"\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    reports, seen = [], []
    for workers in (1, 3):
        prefix = tmp_path / f"w{workers}"
        reports.append(
            prepare(
                [lines, corpus, tmp_path / "b.jsonl.gz"],
                prefix,
                tokenizer_model=model,
                append_eod=True,
                workers=workers,
                on_progress=seen.append,
            )
        )
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"w1{suffix}").read_bytes() == (tmp_path / f"w3{suffix}").read_bytes()
    assert reports[0].skipped == reports[1].skipped == {"broken JSON": 2, "empty document": 2}
    assert reports[0].skipped_where == reports[1].skipped_where
    assert len(seen) > 2 * encoding.AHEAD, "more batches than are on their way at once, else nothing was put in order"
    assert seen[-1].read == seen[-1].total > 0
    assert seen[-1].documents == reports[1].documents


@settings(max_examples=25)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")).filter(str.strip),
        min_size=1,
    )
)
def test_any_documents_come_back_through_the_files(model: Path, texts: list[str]) -> None:
    tokenizer = load_tokenizer("sentencepiece", model)
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(Path(folder) / "in.jsonl", texts)
        prepare([path], Path(folder) / "out", tokenizer_model=model, append_eod=True, workers=1)
        written = documents_of(Path(folder) / "out")
    assert [tokenizer.decode(ids[:-1]) for ids in written] == texts
    assert {ids[-1] for ids in written} == {EOD}


def test_bad_documents_are_counted_and_named(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + b"{broken\n" * 8 + b'{"text": "\xff"}\n{"x": 1}\n\n{"text": "good"}\n')
    report = prepare([path], tmp_path / "out", tokenizer_model=model, workers=1)
    assert report.documents == 2
    key = 'no text under key "text"'
    assert report.skipped == {"broken JSON": 8, "invalid UTF-8": 1, key: 1, "empty document": 1}
    assert report.skipped_where["broken JSON"] == [f"{path}:{line}" for line in range(2, 7)]
    assert report.skipped_where[key] == [f"{path}:11"]
    with pytest.raises(S3Error, match=r"a\.jsonl:2: broken JSON; .*without --strict"):
        prepare([path], tmp_path / "strict", tokenizer_model=model, workers=2, strict=True)
    with pytest.raises(S3Error, match=r"no usable document \(.*12 with no text under key \"body\", first .*:1"):
        path.write_bytes(b'{"text": "good"}\n' * 12)
        prepare([path], tmp_path / "none", tokenizer_model=model, workers=1, json_key="body")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "out.bin", "out.idx"]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, "uint16"), (65_500, "int32"), (250_000, "int32")])
def test_the_vocabulary_chooses_the_dtype_as_megatron_does(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    with writer.new_dataset(tmp_path / "a", vocab_size) as builder:
        builder.add_document(np.array([vocab_size - 1], np.int32), [1])
    assert documents_of(tmp_path / "a") == [[vocab_size - 1]]
    assert inspect(tmp_path / "a").dtype == dtype


def test_hugging_face_documents_end_in_their_own_eod(corpus: Path, hf_folder: Path, tmp_path: Path) -> None:
    report = prepare(
        [corpus / "json_tool.txt"], tmp_path / "a", tokenizer=f"hf:{hf_folder}", append_eod=True, workers=1
    )
    tokenizer = load_tokenizer(f"hf:{hf_folder}")
    (ids,) = documents_of(tmp_path / "a")
    assert ids[-1] == tokenizer.eod == 0
    assert tokenizer.decode(ids[:-1]) == (corpus / "json_tool.txt").read_text("utf-8")
    assert report.tokenizer_model is None


def test_append_eod_needs_an_eod(tmp_path: Path, corpus: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    with open(tmp_path / "no_eos.model", "wb") as file:
        lines = (corpus / "json_decoder.txt").read_text().split("\n")
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=200, eos_id=-1, minloglevel=2
        )
    with pytest.raises(S3Error, match=r"no_eos\.model has no end-of-sequence token"):
        prepare([corpus], tmp_path / "a", tokenizer_model=tmp_path / "no_eos.model", append_eod=True, workers=1)


def test_a_dataset_is_never_overwritten(corpus: Path, model: Path, tmp_path: Path) -> None:
    inputs = [corpus / "json_tool.txt"]
    prepare(inputs, tmp_path / "a", tokenizer_model=model, workers=1)
    before = (tmp_path / "a.bin").read_bytes(), (tmp_path / "a.idx").read_bytes()
    with pytest.raises(S3Error, match=r"a\.idx exists: choose another --output, or delete it"):
        prepare([corpus], tmp_path / "a", train_vocab_size=500)
    assert ((tmp_path / "a.bin").read_bytes(), (tmp_path / "a.idx").read_bytes()) == before
    assert not (tmp_path / "a.model").exists(), "refused before the training, not after"


def test_bad_settings_are_refused_before_any_work(corpus: Path, model: Path, tmp_path: Path) -> None:
    for settings_, message in [
        ({"workers": 0}, "--workers 0: at least 1"),
        ({"tokenizer": "gpt2", "train_vocab_size": 500}, "leave out --tokenizer gpt2"),
    ]:
        with pytest.raises(S3Error, match=message):
            prepare([corpus], tmp_path / "a", **settings_)
    (tmp_path / "file").touch()
    with pytest.raises(S3Error, match=r"cannot be written: (Not a directory|File exists)"):
        prepare([corpus], tmp_path / "file" / "a", tokenizer_model=model, workers=1)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_without_megatron_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.indexed_dataset", None)
    with (
        pytest.raises(S3Error, match=r"pip install 's3-megatron\[megatron\]'"),
        writer.new_dataset(tmp_path / "a", 100),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(28, os.strerror(28))

    with pytest.raises(S3Error, match="No space left"), writer.new_dataset(tmp_path / "a", 100) as builder:
        builder.add_document(np.array([1], np.int32), [1])
        fail()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def swallowing(tmp_path: Path) -> Path:
    """A model with SentencePiece's default normalisation, as most published ones have: it drops a zero-width space."""
    from sentencepiece import SentencePieceTrainer

    path = tmp_path / "nmt.model"
    with open(path, "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["ab cd ef"] * 50),
            model_writer=file,
            model_type="unigram",
            vocab_size=20,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


def test_documents_that_become_no_tokens_are_counted(tmp_path: Path, swallowing: Path) -> None:
    """They were written as documents of no tokens, after which inspect, or the report itself, ended in a traceback."""
    some, none = write_jsonl(tmp_path / "a.jsonl", ["\u200b", "ab cd"]), write_jsonl(tmp_path / "b.jsonl", ["\u200b"])
    report = prepare([some, none], tmp_path / "out", tokenizer_model=swallowing, append_eod=True, workers=1)
    assert (report.documents, report.skipped) == (1, {"no tokens": 2})
    assert report.files == {str(some): 1, str(none): 0}
    assert len(documents_of(tmp_path / "out")) == 1
    with pytest.raises(S3Error, match=r"no usable document \(1 with no tokens, first .*b\.jsonl:1\)"):
        prepare([none], tmp_path / "none", tokenizer_model=swallowing, append_eod=True, workers=1)
    with pytest.raises(S3Error, match=r"a\.jsonl:1: no tokens"):
        prepare([some], tmp_path / "none", tokenizer_model=swallowing, workers=1, strict=True)
    assert not list(tmp_path.glob("none*"))


@pytest.mark.parametrize(("vocab_size", "wrong"), [(100, 65_536), (100, -1), (65_499, 70_000), (65_500, 1 << 31)])
def test_an_id_that_does_not_fit_stops_the_run(tmp_path: Path, vocab_size: int, wrong: int) -> None:
    """Megatron's builder silently wrote 65,536 as 0."""
    with (
        pytest.raises(S3Error, match=f"token {wrong} does not fit (uint16|int32)"),
        writer.new_dataset(tmp_path / "a", vocab_size) as builder,
    ):
        builder.add_document(np.array([1, wrong], np.int64), [2])
    assert not list(tmp_path.iterdir())


def test_ids_beyond_the_tokenizers_own_size_stop_the_run(hf_folder: Path, tmp_path: Path) -> None:
    """A vocabulary with holes: len() counts its tokens, and its largest id is beyond Megatron's embedding."""
    import shutil

    folder = shutil.copytree(hf_folder, tmp_path / "holes")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["x"] = 70_000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    source = write_jsonl(tmp_path / "a.jsonl", ["fine", "x"])
    for workers in (1, 2):
        with pytest.raises(S3Error, match=r"a\.jsonl:2: tokenizer hf:.* makes token 70000 .* it has 600") as error:
            prepare([source], tmp_path / "out", tokenizer=f"hf:{folder}", workers=workers)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out*"))


def test_the_files_are_named_before_any_is_read(tmp_path: Path, model: Path) -> None:
    """What a glob or a folder leaves out must be seen before hours of tokenizing, not after."""
    source = write_jsonl(tmp_path / "a.jsonl", ["a document"])
    (tmp_path / "b.parquet").touch()

    def stop(found: object) -> None:
        assert (found.taken, [path.name for path, _ in found.passed]) == ([source], ["b.parquet"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([tmp_path], tmp_path / "out", train_vocab_size=300, on_inputs=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.parquet"]


@pytest.mark.parametrize("output", ["", ".", "..", "folder/"])
def test_an_output_without_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    """`folder/` made folder/.bin, which nothing shows."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(S3Error, match="is a folder: give the files' name too"):
        prepare(["a.jsonl"], output)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
