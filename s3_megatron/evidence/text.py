"""The text of the runs: compressed files, cut in two, and the order in which a seed reads them."""

import hashlib
import io
import lzma
import subprocess
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from s3_megatron.data.tokenizer_training import train_sentencepiece
from s3_megatron.data.tokenizers import load_tokenizer
from s3_megatron.errors import S3Error
from s3_megatron.files import user_folder, write_file

BYTES = 256  # the vocabulary without a tokenizer
BLOCK, EVERY = 16 << 10, 40  # of the blocks of this many bytes, every fortieth is for validation
# Debian's package of a text, and its files there: two dictionaries, and source code in Python.
PACKAGES = {
    "gcide": ("dict-gcide", "usr/share/dictd/gcide.dict.dz"),
    "wordnet": ("dict-wn", "usr/share/dictd/wn.dict.dz"),
    "sympy": ("python3-sympy", "usr/lib/python3/dist-packages/**/*.py"),
}


@dataclass(frozen=True)
class Text:
    """Tokens to train on and to validate on, [tokens]: bytes as uint8, or pieces as int32; and their SHA-256."""

    train: Tensor
    validation: Tensor
    sha256: str

    def to(self, device: str) -> "Text":
        """Return the same text on a device."""
        return Text(self.train.to(device), self.validation.to(device), self.sha256)


def cut(data: bytes) -> Text:
    """Cut a text into the two."""
    if len(data) < BLOCK * EVERY:
        raise S3Error(f"the text has {len(data)} bytes: it must have {BLOCK * EVERY} at least, or validation has none")
    everything = np.frombuffer(data, np.uint8)
    blocks = np.arange(len(everything)) // BLOCK % EVERY
    train, validation = (everything[blocks != EVERY - 1], everything[blocks == EVERY - 1])
    return Text(torch.from_numpy(train.copy()), torch.from_numpy(validation.copy()), hashlib.sha256(data).hexdigest())


def folder() -> Path:
    """Where texts are kept: in the user's cache."""
    return user_folder("XDG_CACHE_HOME", ".cache") / "s3-megatron" / "text"


def load(name: str, vocabulary: int = BYTES) -> Text:
    """Read a text by its file's path (.xz) or its name, names joined by +, making what is missing of Debian's packages.

    Its tokens are bytes, or with another ``vocabulary`` SentencePiece's.

    Raises:
        S3Error: there is no such text, it cannot be made here, or the file is damaged.
    """
    parts = [name] if name.endswith(".xz") else name.split("+")
    text = cut(b"".join(map(_read, parts)))
    return text if vocabulary == BYTES else encode(text, vocabulary)


def encode(text: Text, vocabulary: int) -> Text:
    """Cut bytes into the pieces of a SentencePiece model of so many, trained on the training part, once."""
    path = folder() / f"{text.sha256[:16]}-{vocabulary}.npz"
    if not path.exists():
        _make_pieces(text, vocabulary, path)
    try:
        with np.load(path) as kept:
            parts = {name: kept[name] for name in ("train", "validation")}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise S3Error(f"{path} cannot be read: {error}; remove it, and it is made again") from error
    digest = hashlib.sha256(b"".join(part.tobytes() for part in parts.values())).hexdigest()
    return Text(**{name: torch.from_numpy(part) for name, part in parts.items()}, sha256=digest)


def _make_pieces(text: Text, vocabulary: int, path: Path) -> None:
    train, validation = (part.numpy().tobytes().decode(errors="replace") for part in (text.train, text.validation))
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "train.txt")
        source.write_text(train, encoding="utf-8", newline="")
        tokenizer = load_tokenizer("sentencepiece", train_sentencepiece([source], Path(scratch, "pieces"), vocabulary))

    def ids(part: str) -> NDArray[np.int32]:
        # By line, since SentencePiece's memory and time grow with what it is given at once.
        return np.concatenate([np.array(tokenizer.encode(line), np.int32) for line in part.splitlines(keepends=True)])

    file = io.BytesIO()
    np.savez_compressed(file, train=ids(train), validation=ids(validation))
    write_file(path, file.getvalue())


def _read(name: str) -> bytes:
    path = Path(name) if name.endswith(".xz") else folder() / f"{name}.xz"
    if not path.exists():
        if name not in PACKAGES:
            raise S3Error(f"the text {name} is not here: give an .xz file's path, or one of {', '.join(PACKAGES)}")
        make(name, path)
    try:
        return lzma.decompress(path.read_bytes())
    except (OSError, lzma.LZMAError, EOFError) as error:
        raise S3Error(f"{path} cannot be read: {error}; remove it, and it is made again") from error


def make(name: str, path: Path) -> None:
    """Write the text of a Debian package to ``path``; nothing is installed. Several files follow each other by name."""
    package, members = PACKAGES[name]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for command in (["apt-get", "download", package], ["dpkg-deb", "-x", f"{package}.deb", "."]):
                if command[0] == "dpkg-deb":
                    command[2] = next(Path(scratch).glob(f"{package}_*.deb")).name
                subprocess.run(command, cwd=scratch, check=True, capture_output=True, encoding="utf-8")
            files = sorted(Path(scratch).glob(members), key=Path.as_posix)
            data = b"".join(map(_plain, files))
            if not data:
                raise OSError(f"it has no {members}")
        except (OSError, zlib.error, subprocess.CalledProcessError, StopIteration) as error:
            reason = (getattr(error, "stderr", None) or str(error) or repr(error)).strip().splitlines()[-1]
            raise S3Error(
                f"the text {name} is Debian's package {package}, which cannot be fetched here ({reason}): "
                f"run the same command with --dry-run on a machine with apt-get, which makes {path}, and carry it here"
            ) from None
    write_file(path, lzma.compress(data))


def _plain(path: Path) -> bytes:
    data = path.read_bytes()
    return zlib.decompress(data, wbits=31) if path.suffix == ".dz" else data


def order(text: Text, seed: int, steps: int, batch: int, length: int) -> Tensor:
    """Draw where each sequence of each step begins in the training text: int64 [steps, batch], from the seed alone."""
    generator = torch.Generator().manual_seed(2 * seed + 1)
    return torch.randint(0, len(text.train) - length, (steps, batch), generator=generator)


def windows(data: Tensor, starts: Tensor, length: int) -> Tensor:
    """Read ``length`` tokens from each start: int64 [..., length]."""
    return data[starts[..., None] + torch.arange(length, device=data.device)].long()


def validation_starts(text: Text, size: int, length: int) -> Tensor:
    """Spread sequences of ``length`` tokens, ``size`` tokens in all at most, evenly over the validation text."""
    count = min(size, len(text.validation) - 1) // length
    return torch.linspace(0, len(text.validation) - 1 - length, count, dtype=torch.float64).long()


def fingerprint(*tensors: Tensor) -> str:
    """Hash tensors' bytes: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
