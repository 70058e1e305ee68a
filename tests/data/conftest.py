"""Text and tokenizers that the tests of a session share."""

import asyncio
import email
import json
from pathlib import Path

import pytest

from s3_megatron.data import train_sentencepiece


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 1 MB of Python source, one .txt file a module: the kind of text the demo trains on."""
    folder = tmp_path_factory.mktemp("corpus")
    for package in (asyncio, email, json):
        for source in sorted(Path(package.__file__).parent.glob("*.py")):
            (folder / f"{package.__name__}_{source.stem}.txt").write_bytes(source.read_bytes())
    return folder


@pytest.fixture(scope="session")
def model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model trained on the corpus, vocabulary 1,000."""
    return train_sentencepiece([corpus], tmp_path_factory.mktemp("model") / "python", 1000)


@pytest.fixture(scope="session")
def hf_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer in GPT-2's manner, saved as transformers saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((path.read_text("utf-8") for path in sorted(corpus.iterdir())), trainer)
    folder = tmp_path_factory.mktemp("hf") / "gpt2"
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder
