"""The run folder: names that a script can hold, and small files that several programs write and read."""

import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from s3_megatron import run_folder
from s3_megatron.errors import S3Error
from s3_megatron.files import write_file
from s3_megatron.run_folder import RunFolder, of_this_job


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_every_name_can_stand_unquoted_in_a_script() -> None:
    """The templates put them between double quotes, where the quotes that a blank would get are part of the name."""
    names = {name: value for name, value in vars(run_folder).items() if name.isupper()}
    assert len(names) > 10
    assert [name for name, value in names.items() if not re.fullmatch(r"[\w./]+", value)] == []


def test_the_page_on_jobs_has_every_file_and_folder(run: RunFolder) -> None:
    page = (Path(__file__).parents[1] / "docs/jobs.md").read_text().split("### The run folder")[1].split("## Time")[0]
    named = set(re.findall(r"`([\w./-]+)`", page))
    names = {value.split("/")[-1] for name, value in vars(run_folder).items() if name.isupper() and name != "VARIABLE"}
    names |= {path.name for path in (run.recipe, run.cluster, run.about, run.deepspeed, run.jobs)}
    written = {part for name in named for part in name.split("/")}
    assert len(names) > 15 and sorted(names - written) == []


def test_it_imports_no_torch() -> None:
    code = "import sys, s3_megatron.run_folder; print('torch' in sys.modules, 'rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.stdout == "False False\n", done.stderr


def test_how_a_run_ends(run: RunFolder) -> None:
    assert not run.finished and run.ended is None
    run.end("configuration error: no such file: ü")
    assert run.ended == "configuration error: no such file: ü"
    (run.path / "chain").write_text("3 0 1 7-2\n")
    run.stop_request.touch()
    run.reopen()
    assert run.ended is None and not run.stop_request.exists() and not (run.path / "chain").exists()
    run.reopen()
    run.finish(12)
    assert run.finished and json.loads((run.path / "FINISHED").read_text())["iteration"] == 12
    assert [path.name for path in run.path.iterdir()] == ["FINISHED"], "nothing half-written is left"


def test_what_cannot_be_removed_is_one_line(run: RunFolder) -> None:
    run.stop_request.mkdir()  # as of another user's in a folder where each may remove his own alone
    with pytest.raises(S3Error, match=r"STOP cannot be removed \(.*\): remove it, and resume"):
        run.reopen()


def test_a_reason_that_is_not_utf8_is_read_all_the_same(run: RunFolder) -> None:
    """The batch script copies what scontrol and a person's own commands print, in whatever encoding that is."""
    (run.path / "ENDED").write_bytes(b"ung\xfcltig\n")
    run.attempt("1-0").path.mkdir(parents=True)
    (run.attempt("1-0").path / "bad_nodes").write_bytes(b"node1\tung\xfcltig\n")
    assert run.ended == "ung\ufffdltig"
    assert run.attempt("1-0").bad_nodes() == ["node1: ung\ufffdltig"]


def test_attempts_come_in_the_order_of_their_making(run: RunFolder) -> None:
    assert run.attempts() == []
    for name in ("10-0", "9-0", "9-1"):  # a number of SLURM's may begin anew
        run.attempt(name).path.mkdir(parents=True)
        time.sleep(0.02)
    (run.path / "attempts/.nfs0001").touch()  # what a file server leaves of a file that was removed while open
    assert [attempt.path.name for attempt in run.attempts()] == ["10-0", "9-0", "9-1"]


def test_many_nodes_report_themselves_at_the_same_time(run: RunFolder) -> None:
    attempt = run.attempt("7-0")
    assert attempt.bad_nodes() == []

    def report(node: int) -> None:
        for _ in range(50):
            attempt.report_bad_node(f"node{node}", f"reason\t{node}\nin two lines {'x' * 200}")

    threads = [threading.Thread(target=report, args=(node,)) for node in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (attempt.path / "bad_nodes").read_text().splitlines()
    assert sorted(set(lines)) == [f"node{node}\treason {node} in two lines {'x' * 200}" for node in range(8)]
    assert len(lines) == 400
    assert attempt.bad_nodes()[0].startswith("node")


def test_one_file_may_be_written_by_all_ranks_at_the_same_time(tmp_path: Path) -> None:
    """Every rank marks a damaged checkpoint. They shared the file that gets its name at the end, one found it gone, and
    its S3Error ended the job for good, where the next start would have tried the checkpoint before.
    """
    file, texts = tmp_path / "load_failed", [bytes([letter]) * 10_000 for letter in b"abcdefgh"]

    def write(text: bytes) -> None:
        for _ in range(20):
            write_file(file, text)
            assert file.read_bytes() in texts

    with ThreadPoolExecutor(len(texts)) as pool:
        assert [*pool.map(write, texts)] == [None] * len(texts)
    assert [*tmp_path.iterdir()] == [file]


def test_files_of_one_node_are_not_those_of_another(run: RunFolder) -> None:
    attempt = run.attempt("7-0")
    made = {kind(node) for node in ("a", "b") for kind in (attempt.verdict, attempt.failures, attempt.health)}
    assert len(made) == 6 and {path.parent for path in made} == {attempt.path}


def test_the_run_of_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("S3_RUN_DIR", raising=False)
    assert of_this_job() is None
    monkeypatch.setenv("S3_RUN_DIR", "")
    assert of_this_job() is None
    monkeypatch.setenv("S3_RUN_DIR", str(tmp_path))
    assert of_this_job() == RunFolder(tmp_path)


def test_the_names_are_written_in_one_place() -> None:
    """They were spelled in 13 files, so that a name could not change and a file could not be found by its readers."""
    root = Path(run_folder.__file__).parent
    # Quoted, or behind the slash of a path; prose and messages may name them.
    spelled = re.compile(r"""["'](FINISHED|ENDED|SAVE|STOP|attempts|bad_nodes|S3_RUN_DIR)["']|\$\{?run\}?/[A-Za-z]""")
    files = [path for path in root.rglob("*.py") if path.name != "run_folder.py"]
    files += (root / "jobs/templates").glob("*.j2")
    assert len(files) > 100
    assert [path.name for path in files if spelled.search(path.read_text(encoding="utf-8"))] == []
