"""The tokenizers data can be written with, each giving the ids that Megatron's own tokenizer gives."""

import logging
import os
from pathlib import Path
from typing import Any, Protocol

from s3_megatron.errors import S3Error


class Tokenizer(Protocol):
    """Text to ids and back; ``eod`` is the id Megatron takes for the end of a document, if any."""

    vocab_size: int
    eod: int | None
    megatron_flags: list[str]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the end-of-document id unless the tokenizer itself adds one."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of some ids."""
        ...


def load_tokenizer(name: str, model: str | Path | None = None) -> Tokenizer:
    """The tokenizer ``sentencepiece`` (with a model file), ``gpt2`` or ``hf:NAME`` (a folder or a hub name).

    Raises S3Error for another name, or where its files are not to be had.
    """
    if name == "sentencepiece":
        if model is None:
            raise S3Error(
                "tokenizer sentencepiece needs its model file: give --tokenizer-model FILE, "
                "or make one from the input with --train-tokenizer --vocab-size N"
            )
        return SentencePieceText(model)
    if model is not None:
        raise S3Error(f"--tokenizer-model {model} goes with --tokenizer sentencepiece, not with {name}: leave it out")
    if name == "gpt2" or (name.startswith("hf:") and name != "hf:"):
        return HuggingFaceText(name.removeprefix("hf:"))
    raise S3Error(f"tokenizer {name!r} is unknown: choose sentencepiece, gpt2 or hf:NAME (a folder or a hub name)")


class SentencePieceText:
    """A SentencePiece model as ``--tokenizer-type SentencePieceTokenizer`` uses it.

    megatron-core 0.19.2, core/tokenizers/text/libraries/sentencepiece_tokenizer.py: no legacy special tokens,
    eod is the model's own eos id.
    """

    def __init__(self, model: str | Path) -> None:
        sentencepiece = import_sentencepiece()
        if not os.path.isfile(model):
            raise S3Error(f"tokenizer model {model}: no such file; make one with --train-tokenizer --vocab-size N")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (RuntimeError, OSError) as error:
            raise S3Error(f"tokenizer model {model} is no SentencePiece model ({error})") from error
        self.vocab_size: int = self._processor.get_piece_size()
        eos = self._processor.eos_id()
        self.eod = None if eos < 0 else int(eos)
        self.megatron_flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


class HuggingFaceText:
    """A transformers tokenizer as ``--tokenizer-type HuggingFaceTokenizer`` uses it.

    megatron-core 0.19.2, core/tokenizers/text/libraries/huggingface_tokenizer.py: special tokens that
    the tokenizer adds stay in, eod is eos or, where there is none, sep. Code that came with it is never run.
    A special token's name in the text is text, as it is to SentencePiece; Megatron's own preprocessing makes the
    control id of it, and a page about tokenizers would end a document in its middle.
    """

    def __init__(self, name: str) -> None:
        self._tokenizer = _from_pretrained(name)
        self.vocab_size = len(self._tokenizer)
        eos, sep = self._tokenizer.eos_token_id, self._tokenizer.sep_token_id
        self.eod: int | None = sep if eos is None else eos
        self.megatron_flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", name]

    def encode(self, text: str) -> list[int]:
        # verbose=False: a document longer than the model's context is no news here.
        return self._tokenizer(text, verbose=False, split_special_tokens=True).input_ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


def _from_pretrained(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise S3Error(f"tokenizer {name} needs transformers: pip install 's3-megatron[data]' ({error})") from error
    # Offline the hub client logs each of its retries; the error below says it once.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        try:
            # What is here first: asking the hub takes a minute to fail on a node without internet.
            return AutoTokenizer.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError):
            return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        why = str(error).strip().split("\n")[0]
        if os.path.isdir(name):
            raise S3Error(
                f"tokenizer {name} is a folder without a tokenizer that transformers can load ({why}): name the one "
                "that AutoTokenizer.save_pretrained wrote"
            ) from error
        raise S3Error(
            f"tokenizer {name} is no tokenizer's folder, not in the Hugging Face cache and cannot be fetched "
            f"({why}): on a machine with internet save it with AutoTokenizer.from_pretrained({name!r})"
            ".save_pretrained(FOLDER), copy FOLDER here and give --tokenizer hf:FOLDER"
        ) from error


def import_sentencepiece() -> Any:
    """The module sentencepiece; raises S3Error with the command that installs it."""
    try:
        import sentencepiece
    except ImportError as error:
        raise S3Error(f"SentencePiece is missing: pip install 's3-megatron[data]' ({error})") from error
    return sentencepiece
