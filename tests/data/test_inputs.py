"""Which files are taken, and why the others are not: one rule for a file, a folder and a glob."""

import gzip
import lzma
import os
from pathlib import Path

import pytest

from s3_megatron.data.inputs import Inputs, find_inputs
from s3_megatron.data.sources import read_documents
from s3_megatron.errors import S3Error

LINE = b'{"text": "a document"}\n'


def write(path: Path, data: bytes = LINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def names(found: Inputs, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in found.taken]


def reasons(found: Inputs) -> dict[str, str]:
    return {path.name: reason for path, reason in found.passed}


def test_inputs_keep_their_order_and_come_once(tmp_path: Path) -> None:
    """The first way of leaving out repeats kept a file's last place, not its first."""
    for name in ("b.txt", "a.jsonl", "deep/c.JSONL.gz", "deep/d.txt.zst", "deep/notes.md"):
        write(tmp_path / name, b"x")
    found = find_inputs([tmp_path / "deep", str(tmp_path / "*.txt"), tmp_path, str(tmp_path / "**" / "c*")])
    assert names(found, tmp_path) == ["deep/c.JSONL.gz", "deep/d.txt.zst", "b.txt", "a.jsonl"]
    assert set(reasons(found).values()) == {".md: unknown kind"}


def test_a_folder_as_corpora_come_is_taken_whole(tmp_path: Path) -> None:
    """C4 and Dolma name their lines .json.gz; .json, .ndjson and .xz in a folder were left out silently."""
    write(tmp_path / "c4-train.00000-of-01024.json.gz", gzip.compress(LINE))
    write(tmp_path / "b.json")
    write(tmp_path / "c.ndjson")
    write(tmp_path / "D.JSONL.XZ", lzma.compress(LINE))
    write(tmp_path / "dataset_info.json", b'{\n  "splits": 1\n}\n')
    write(tmp_path / "list.json", b'[{"text": "x"}]\n')
    write(tmp_path / "part.parquet")
    write(tmp_path / "all.tar.gz")
    for name in ("README", "_SUCCESS", ".DS_Store"):
        write(tmp_path / name)
    write(tmp_path / "empty.jsonl", b"")
    os.mkfifo(tmp_path / "pipe.jsonl")
    found = find_inputs([tmp_path])
    assert names(found, tmp_path) == ["D.JSONL.XZ", "b.json", "c.ndjson", "c4-train.00000-of-01024.json.gz"]
    assert len(list(read_documents(found.taken))) == 4
    assert reasons(found) == {
        ".DS_Store": "hidden",
        "README": "no ending: unknown kind",
        "_SUCCESS": "no ending: unknown kind",
        "all.tar.gz": "an archive of files: unpack it first",
        "dataset_info.json": "its first line is no JSON object: one a line is read",
        "empty.jsonl": "empty",
        "list.json": "its first line is no JSON object: one a line is read",
        "part.parquet": "Parquet: write its text to .jsonl first",
        "pipe.jsonl": "not a regular file",
    }


def test_a_folder_and_its_glob_give_the_same_files(tmp_path: Path) -> None:
    """A linked folder was left out of a folder and taken by its glob; an editor's hidden copies the other way round."""
    root = tmp_path / "corpus"
    write(root / "part0" / "a.jsonl")
    write(tmp_path / "elsewhere" / "b.jsonl")
    (root / "part1").symlink_to(tmp_path / "elsewhere")
    write(root / ".ipynb_checkpoints" / "a-checkpoint.jsonl")
    (root / "part0" / "up").symlink_to(root)
    (root / "again.jsonl").symlink_to("part0/a.jsonl")
    os.link(root / "part0" / "a.jsonl", root / "part0" / "hard.jsonl")
    (root / "gone.jsonl").symlink_to("nowhere")
    found = find_inputs([root])
    assert names(found, root) == ["again.jsonl", "part1/b.jsonl"], "one name of each file, the first"
    assert reasons(found) == {
        ".ipynb_checkpoints": "a hidden folder",
        "a.jsonl": "another name of a file that is taken",
        "gone.jsonl": "a link to nothing",
        "hard.jsonl": "another name of a file that is taken",
        "up": "another name of a folder that is searched",
    }
    for pattern in ("**/*.jsonl", "**", "*"):
        assert names(find_inputs([root / pattern]), root) == names(found, root)
    assert names(find_inputs([root / ".ipynb_checkpoints"]), root) == [".ipynb_checkpoints/a-checkpoint.jsonl"]


@pytest.mark.parametrize("name", ["nothing.txt", "empty_folder", "*.jsonl", "notes.md", "model.txt.lz4", "README"])
def test_an_input_that_gives_nothing_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty_folder").mkdir()
    for file in ("notes.md", "model.txt.lz4", "README"):
        write(tmp_path / file)
    with pytest.raises(S3Error, match=r"\.jsonl") as error:
        find_inputs([tmp_path / name])
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_that_is_no_text_is_read_and_shown(tmp_path: Path) -> None:
    """Paths are bytes: printing one that is no UTF-8 ended in a UnicodeEncodeError."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n.jsonl"))
    write(path, LINE + b"broken\n")
    (document, _) = read_documents(find_inputs([tmp_path]).taken)
    assert document.path == f"{tmp_path}/caf\\udce9\\n.jsonl"
    document.path.encode()


def test_a_damaged_json_file_is_no_unknown_kind(tmp_path: Path) -> None:
    """A look at its first line must not turn a download that was cut off into a file that is passed over."""
    write(tmp_path / "a.json.gz", gzip.compress(LINE)[:15])
    with pytest.raises(S3Error, match=r"a\.json\.gz cannot be read"):
        find_inputs([tmp_path])
