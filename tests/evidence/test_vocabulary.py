"""Texts as SentencePiece's tokens."""

import math
import sys

import numpy as np
import pytest

from s3_megatron.errors import S3Error
from s3_megatron.evidence import experiments, reading, text
from s3_megatron.evidence.analysis import Analysis
from s3_megatron.evidence.cells import Cell
from s3_megatron.evidence.experiments import Setup
from s3_megatron.evidence.stack import Stack
from s3_megatron.evidence.training import train

VOCABULARY = 400
# Often enough to be a piece, were it in the training part.
HIDDEN = b" Xyzzyplughium"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory, corpus):
    """Bytes, the same as tokens, and the cache they lie in; words that only the validation part has among them."""
    folder = tmp_path_factory.mktemp("cache")
    data = bytearray(corpus.train.numpy().tobytes() + corpus.validation.numpy().tobytes())
    start = (text.EVERY - 1) * text.BLOCK
    data[start : start + 100 * len(HIDDEN)] = 100 * HIDDEN
    plain = text.cut(bytes(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "folder", lambda: folder)
        yield plain, text.encode(plain, VOCABULARY), folder


def test_tokens_are_fewer_than_bytes_and_within_the_vocabulary(pieces):
    plain, tokens, _ = pieces
    for part, whole in ((tokens.train, plain.train), (tokens.validation, plain.validation)):
        assert 0 <= part.min() and 256 <= part.max() < VOCABULARY
        assert len(part) < 0.8 * len(whole)


def test_the_tokenizer_is_trained_without_the_validation_text(pieces):
    """A piece that only validation has would make its loss a token another one."""
    _, tokens, _ = pieces
    head = tokens.validation[: 100 * 5].tolist()
    period = next(n for n in range(1, 100) if head[n : 4 * n] == head[: 3 * n])
    assert period > 6, "a word of fourteen letters that was trained on is few tokens"


def test_the_tokens_are_made_once_and_are_the_same_when_made_again(pieces, monkeypatch):
    plain, tokens, folder = pieces
    (file,) = folder.iterdir()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentencepiece", None)
        assert text.encode(plain, VOCABULARY).sha256 == tokens.sha256
        with pytest.raises(S3Error, match=r"SentencePiece is missing: pip install"):
            text.encode(plain, VOCABULARY + 1)
    assert list(folder.iterdir()) == [file]
    file.unlink()
    assert text.encode(plain, VOCABULARY).sha256 == tokens.sha256 != plain.sha256


@pytest.mark.parametrize("damage", [b"", b"PK", b"nothing of the kind"])
def test_a_damaged_file_of_tokens_is_one_line(damage, pieces, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "folder", lambda: tmp_path)
    (tmp_path / f"{pieces[0].sha256[:16]}-{VOCABULARY}.npz").write_bytes(damage)
    with pytest.raises(S3Error, match=r"\.npz cannot be read: .*; remove it, and it is made again"):
        text.encode(pieces[0], VOCABULARY)


def test_a_run_on_tokens(pieces, setup):
    """A model of as many tokens begins at about ln of their number, and diverges above that plus 1."""
    tokens = pieces[1]
    asked = Setup(**{**vars(setup), "vocabulary": VOCABULARY})
    assert Stack(asked.model, [1]).weights["tokens"].shape == (1, VOCABULARY, asked.width)
    calm, wild = (train([Cell("it", "s3", "base", asked, rate, "{}", 1, "text")], tokens) for rate in (1e-3, 1e3))
    assert calm[0]["losses"][0] == pytest.approx(math.log(VOCABULARY), abs=0.3)
    assert calm[0]["diverged"] is None and wild[0]["diverged"] is not None


class TestExperiment:
    """vocabulary in an experiment's setups."""

    def load(self, tmp_path, *vocabularies):
        content = reading.CONFIGS.joinpath("table2-tokens.yaml").read_text()
        setups = ", ".join(f"s{i}: {{steps: 20, vocabulary: {v}}}" for i, v in enumerate(vocabularies))
        base = "  base: {steps: 2000, layers: 2, width: 64, vocabulary: 1024}"
        assert base in content
        path = tmp_path / "x.yaml"
        path.write_text(content.replace(f"setups:\n{base}", f"setups: {{{setups}}}"))
        return experiments.load(str(path))

    def test_bytes_leave_the_hash_of_the_rules_as_it_was(self, tmp_path):
        bytes_, tokens = self.load(tmp_path, 256), self.load(tmp_path, 1024)
        assert "vocabulary" not in experiments.rules(bytes_.setups["s0"])
        assert (bytes_.vocabulary, tokens.vocabulary) == (256, 1024) and bytes_.sha256 != tokens.sha256

    @pytest.mark.parametrize("vocabulary", [-1, 0, 100, 257, 260])
    def test_what_holds_no_byte_is_refused(self, vocabulary, tmp_path):
        with pytest.raises(
            S3Error, match=rf"vocabulary {vocabulary}: must be 256 for bytes, or more than 260 for Sent"
        ):
            self.load(tmp_path, vocabulary)

    def test_one_text_has_one_vocabulary(self, tmp_path):
        with pytest.raises(S3Error, match=r"the setups' vocabulary \[256, 1024\]: must be one, since the text is"):
            self.load(tmp_path, 256, 1024)

    @pytest.mark.parametrize("loss", [None, math.nan, math.inf])
    def test_a_loss_that_is_no_number_counts_as_that_vocabularys(self, loss, tmp_path):
        asked = self.load(tmp_path, 1024)
        result = {
            "contender": "s3",
            "setup": "s0",
            "rate": 4e-3,
            "settings": {"beta": 0.95, "p": 3},
            "seed": 1,
            "key": "x",
            "weights": "w",
            "order": "o",
            "validation": loss,
            "spikes": [],
            "diverged": 3,
        }
        (counted,) = Analysis(asked, [result]).results.values()
        assert counted["final"] == math.log(1024) + 1


def test_the_cached_file_has_no_pickle(pieces):
    (file,) = pieces[2].iterdir()
    with np.load(file, allow_pickle=False) as kept:
        assert {name: part.dtype for name, part in kept.items()} == {"train": np.int32, "validation": np.int32}
