"""Our ids against those of Megatron's own tokenizers, built as its training builds them."""

import argparse
from pathlib import Path

import pytest

from s3_megatron.data import load_tokenizer
from s3_megatron.errors import S3Error

TEXTS = ["def f(x):\n    return x  # caf\u00e9\n", "  two  spaces  ", "<s> </s>", "\tTab\r\n", "x"]


def megatrons(flags: list[str]) -> object:
    """What megatron.training builds from these flags (megatron-core 0.19.2, training/global_vars.py)."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import _add_tokenizer_args

    args = _add_tokenizer_args(argparse.ArgumentParser()).parse_args(flags)
    args.rank, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size = 0, 128, 1
    args.tiktoken_pattern = args.special_tokens = None
    return build_tokenizer(args)


@pytest.mark.parametrize("kind", ["sentencepiece", "hf"])
def test_ids_and_eod_are_megatrons(kind: str, model: Path, hf_folder: Path) -> None:
    ours = load_tokenizer("sentencepiece", model) if kind == "sentencepiece" else load_tokenizer(f"hf:{hf_folder}")
    theirs = megatrons(ours.megatron_flags)
    for text in TEXTS:
        assert ours.encode(text) == theirs.tokenize(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.eod == theirs.eod
    assert ours.vocab_size == theirs.vocab_size


def test_special_tokens_the_tokenizer_adds_stay_as_in_megatron(hf_folder: Path, tmp_path: Path) -> None:
    """Llama's tokenizer begins each text with bos, and so does Megatron's preprocessing."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf_folder)
    end = ("<|endoftext|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{end[0]} $A", special_tokens=[end])
    tokenizer.save_pretrained(tmp_path)
    ours = load_tokenizer(f"hf:{tmp_path}")
    assert ours.encode("x")[0] == ours.eod
    assert ours.encode("x") == megatrons(ours.megatron_flags).tokenize("x")


def test_a_folder_without_a_tokenizer_is_called_one(tmp_path: Path) -> None:
    """It was "no tokenizer's folder and cannot be fetched", with the advice to fetch it by its path."""
    with pytest.raises(S3Error, match="is a folder without a tokenizer that transformers can load"):
        load_tokenizer(f"hf:{tmp_path}")


def test_gpt2_is_the_hub_name(hf_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder of that name answers for the hub, here as in Megatron.
    monkeypatch.chdir(hf_folder.parent)
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.megatron_flags == [
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        "gpt2",
    ]
    assert tokenizer.vocab_size == 600


def test_files_that_are_not_to_be_had_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Else the hub client tries for a minute to reach its host.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "hf:nobody/nothing", f"hf:{tmp_path}"):
        with pytest.raises(S3Error, match="save_pretrained") as error:
            load_tokenizer(name)
        assert name.removeprefix("hf:") in str(error.value)
        assert "\n" not in str(error.value)


def test_wrong_names_and_files_say_what_to_do(tmp_path: Path, model: Path) -> None:
    (tmp_path / "bad.model").write_text("no model")
    for arguments, message in [
        (("sentencepiece",), "--train-tokenizer"),
        (("sentencepiece", tmp_path / "none.model"), r"none\.model: no such file"),
        (("sentencepiece", tmp_path / "bad.model"), r"bad\.model is no SentencePiece model"),
        (("gpt2", model), "leave it out"),
        (("bert",), "'bert' is unknown: choose sentencepiece, gpt2 or hf:NAME"),
        (("hf:",), "'hf:' is unknown"),
    ]:
        with pytest.raises(S3Error, match=message):
            load_tokenizer(*arguments)


@pytest.mark.parametrize("kind", ["sentencepiece", "hf"])
def test_a_special_token_in_the_text_is_text(kind: str, model: Path, hf_folder: Path) -> None:
    """A page that writes <|endoftext|> or </s> out must not end a document where it does.

    The control is the tokenizer itself, which makes one id of it.
    """
    ours = load_tokenizer("sentencepiece", model) if kind == "sentencepiece" else load_tokenizer(f"hf:{hf_folder}")
    text = "a </s> b <s> <unk> <pad> <|endoftext|> c"
    ids = ours.encode(text)
    assert not {0, 1, 2, 3, ours.eod} & set(ids) if kind == "sentencepiece" else ours.eod not in ids
    assert ours.decode(ids) == text
    if kind == "hf":
        from transformers import AutoTokenizer

        assert ours.eod in AutoTokenizer.from_pretrained(hf_folder)(text).input_ids
