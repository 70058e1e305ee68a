"""A corpus without a download: the text that every installation of Python carries."""

import hashlib
import json
import platform
import pydoc_data.topics
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from s3_megatron.files import write_file
from s3_megatron.jobs.progress import print_line, stage_line

# Not part of every installation, or not text for a language model (encodings/ is tables of code points).
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "lib2to3", "pydoc_data"}
VALIDATION_PERCENT = 10
TRAIN, VALIDATION, MANIFEST = "train.jsonl", "validation.jsonl", "corpus.json"


@dataclass(frozen=True)
class Corpus:
    """A folder with ``train.jsonl`` and ``validation.jsonl``: one document a line under the key "text"."""

    folder: Path
    python: str
    documents: int
    bytes: int  # of UTF-8 text, both splits together

    @property
    def train(self) -> Path:
        """The training split."""
        return self.folder / TRAIN

    @property
    def validation(self) -> Path:
        """The validation split."""
        return self.folder / VALIDATION


def documents() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the standard library's sources, then of pydoc's topics, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not SKIPPED.intersection(name.parts):
            # A few sources keep a legacy encoding for their own sake; a replaced character does no harm here.
            yield f"lib/{name.as_posix()}", path.read_text(encoding="utf-8", errors="replace")
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield f"topics/{topic}", text


def in_validation(name: str) -> bool:
    """Whether the document of this name is held out for validation: by its hash, so that it never moves."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < VALIDATION_PERCENT


def build(root: Path, console: Console) -> Corpus:
    """Write the corpus into a folder of ``root`` that bears this Python's version, or reuse the one there.

    The manifest is written last, by renaming: a folder without it is not a corpus.
    """
    folder = root / platform.python_version()
    corpus = _existing(folder) or _write(folder, console)
    print_line(
        console, f"corpus: {corpus.bytes / 1e6:.1f} MB in {corpus.documents} documents of Python {corpus.python}"
    )
    return corpus


def _existing(folder: Path) -> Corpus | None:
    """Read the corpus in ``folder``; None where it is not whole, as after an interruption or a clean-up."""
    try:
        corpus = Corpus(folder, **json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return corpus if corpus.train.exists() and corpus.validation.exists() else None


def _write(folder: Path, console: Console) -> Corpus:
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = folder / TRAIN, folder / VALIDATION
    count = size = 0
    with (
        stage_line(console, "corpus", None) as line,
        train.open("w", encoding="utf-8") as training,
        held_out.open("w", encoding="utf-8") as validating,
    ):
        for name, text in documents():
            if text.strip():
                record = json.dumps({"text": text, "source": name}, ensure_ascii=False)
                (validating if in_validation(name) else training).write(record + "\n")
                count, size = count + 1, size + len(text.encode())
                line.advance(count, f"{count} documents")
    corpus = Corpus(folder, platform.python_version(), count, size)
    about = {"python": corpus.python, "documents": count, "bytes": size}
    write_file(folder / MANIFEST, json.dumps(about).encode() + b"\n")
    return corpus
