"""A corpus without a download: the text that every installation of Python carries."""

import hashlib
import json
import os
import platform
import pydoc_data.topics
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Not part of every installation, or not text for a language model (encodings/ is tables of code points).
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "lib2to3", "pydoc_data"}
VALIDATION_PERCENT = 10


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
        return self.folder / "train.jsonl"

    @property
    def validation(self) -> Path:
        """The validation split."""
        return self.folder / "validation.jsonl"


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


def build(root: Path) -> Corpus:
    """Write the corpus into a folder of ``root`` that bears this Python's version, or reuse the one there.

    The manifest is written last, by renaming: a folder without it is not a corpus.
    """
    python = platform.python_version()
    folder = root / python
    manifest = folder / "corpus.json"
    if manifest.exists():
        return Corpus(folder, **json.loads(manifest.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    texts = [(name, text) for name, text in documents() if text.strip()]
    corpus = Corpus(folder, python, len(texts), sum(len(text.encode()) for _, text in texts))
    with corpus.train.open("w", encoding="utf-8") as train, corpus.validation.open("w", encoding="utf-8") as held_out:
        for name, text in texts:
            line = json.dumps({"text": text, "source": name}, ensure_ascii=False)
            (held_out if in_validation(name) else train).write(line + "\n")
    beside = folder / "corpus.json.tmp"
    beside.write_text(json.dumps({"python": python, "documents": corpus.documents, "bytes": corpus.bytes}) + "\n")
    os.replace(beside, manifest)
    return corpus
