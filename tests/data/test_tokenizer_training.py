"""SentencePiece models: repeatable, lossless, and with the special ids Megatron expects."""

import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from s3_megatron.data import load_tokenizer, tokenizer_training, train_sentencepiece
from s3_megatron.errors import S3Error

# Every character UTF-8 has but U+2581: SentencePiece writes spaces as that, and cannot tell the two apart.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))
CODE = st.text(st.sampled_from(list("\n\t  abcdef_019(){}[]:=+'\"#\\@.,")))


def test_the_same_input_gives_the_same_model(corpus: Path, model: Path, tmp_path: Path) -> None:
    again = train_sentencepiece([corpus], tmp_path / "again.model", 1000)
    assert again == tmp_path / "again.model"
    assert again.read_bytes() == model.read_bytes()


def test_special_tokens_are_where_megatron_looks(model: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert processor.get_piece_size() == 1000
    assert [processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()] == [0, 1, 2, 3]
    # No text may produce a special id: pad would be masked out of the loss, eos would end a document.
    assert not {0, 1, 2, 3} & set(processor.encode("<unk> <s> </s> <pad> \x00 \ufffd <0x0A>"))


@settings(max_examples=300)
@given(text=ANY_TEXT | CODE)
def test_any_text_comes_back(model: Path, text: str) -> None:
    tokenizer = load_tokenizer("sentencepiece", model)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_python_source_comes_back_and_is_compressed(corpus: Path, model: Path) -> None:
    tokenizer = load_tokenizer("sentencepiece", model)
    size = tokens = 0
    for path in sorted(corpus.iterdir()):
        text = path.read_text("utf-8")
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        size, tokens = size + len(text.encode()), tokens + len(ids)
    # Bytes alone would give 1 byte a token, these 1,000 pieces (740 of them learned) give 2.2.
    assert size / tokens > 2
    assert len(tokenizer.encode("\n            return")) <= 3, "indentation is one piece, not twelve"


def test_a_large_input_is_sampled_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_training, "SAMPLED_LINES", 1000)
    kept = tokenizer_training._sample(str(i) for i in range(100_000))
    assert kept == tokenizer_training._sample(str(i) for i in range(100_000))
    assert len(set(kept)) == 1000
    # The mean of 1,000 fair draws from 0..99,999 has a standard deviation of 913: 5 of them.
    assert abs(sum(map(int, kept)) / 1000 - 50_000) < 5 * 913


def test_bad_documents_are_left_out_or_refused(tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps({"body": (corpus / "json_decoder.txt").read_text()})
    path.write_text(good + "\n{broken\n")
    assert train_sentencepiece([path], tmp_path / "a", 400, json_key="body").exists()
    with pytest.raises(S3Error, match=r"a\.jsonl:2: broken JSON"):
        train_sentencepiece([path], tmp_path / "b", 400, json_key="body", strict=True)
    with pytest.raises(S3Error, match=r"no line to train .*--json-key"):
        train_sentencepiece([path], tmp_path / "b", 400)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "a.model"]


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (260, r"260 .*take 260"),
        (-5, "-5"),
        (265, r"265 is too small .*at least 2"),
        (50_000, r"50000 .*at most \d+,"),
    ],
)
def test_a_vocabulary_the_text_cannot_fill_names_the_limit(tmp_path: Path, vocab_size: int, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    with pytest.raises(S3Error, match=message):
        train_sentencepiece([path], tmp_path / "a", vocab_size)
    assert not (tmp_path / "a.model").exists()


def test_a_model_is_never_overwritten(model: Path, corpus: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    with pytest.raises(S3Error, match=r"exists: use it without --train-tokenizer"):
        train_sentencepiece([corpus], model, 500)
    assert model.read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(S3Error, match="cannot be written"):
        train_sentencepiece([corpus], tmp_path / "file" / "model", 500)
