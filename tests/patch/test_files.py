"""Our lines in the hosts' real files, and everything that may be wrong with these."""

import os
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s3_megatron.engines import versions
from s3_megatron.errors import S3Error
from s3_megatron.patch import edit, record, work
from s3_megatron.patch.edit import State
from s3_megatron.patch.place import Place
from s3_megatron.patch.release import PATCHES, Release, load, touched_files
from s3_megatron.patch.release import versions as patched_versions
from tests.patch.hosts import TOUCHED, apply, copy_some, opened, patched_hosts, revert, unlike_record

each_host = pytest.mark.parametrize("host", patched_hosts())


@pytest.fixture
def root(host: str, tmp_path: Path) -> Path:
    return copy_some(host, tmp_path / "a checkout")


@pytest.fixture
def touched(host: str, root: Path) -> Path:
    return root / TOUCHED[host]


def state(host: str, root: Path) -> State:
    return work.state(*opened(host, root))


def snapshot(root: Path) -> dict[Path, tuple[bytes, int]]:
    """Every file's content and when it was last written."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


def test_there_is_a_patch_for_every_version_that_is_tested() -> None:
    assert patched_versions("megatron-lm") == list(versions.MEGATRON.tested)
    assert patched_versions("deepspeed") == list(versions.DEEPSPEED.tested)


@pytest.mark.parametrize("path", sorted(PATCHES.glob("*/*.patch")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_patch_is_lines_of_ours_only(path: Path) -> None:
    """No text of a host is kept: nothing but three added lines, and the record's are hashes and names."""
    lines = path.read_text().splitlines()
    assert [line[0] for line in lines] == ["-", "+", "@", "+", "+", "+"]
    assert all("s3" in line for line in lines[3:])
    for file in load(path.parent.name, path.stem).files:
        assert all(len(digest) == 8 for digest in file.lines)
        (hunk,) = file.hunks
        assert hunk.after == len(file.lines)


@each_host
def test_apply_and_revert_twice_each(host: str, root: Path, touched: Path) -> None:
    before = touched.read_bytes()
    assert state(host, root) is State.UNPATCHED
    apply(host, root)
    patched = snapshot(root)
    assert state(host, root) is State.PATCHED
    assert touched.read_bytes().startswith(before) and touched.read_bytes().count(b"\n") == before.count(b"\n") + 3
    apply(host, root)
    assert snapshot(root) == patched, "already patched: nothing is written"
    revert(host, root)
    assert touched.read_bytes() == before and TOUCHED[host] not in unlike_record(host, root)
    reverted = snapshot(root)
    revert(host, root)
    assert snapshot(root) == reverted


@each_host
def test_git_applies_the_same_bytes(host: str, root: Path, touched: Path) -> None:
    place, release = opened(host, root)
    patch = PATCHES / host / f"{release.version}.patch"
    apply(host, root)
    ours = touched.read_bytes()
    revert(host, root)
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)  # git apply looks for a repository upwards
    git = ["git", "apply", "--unidiff-zero", str(patch)]
    subprocess.run(git, cwd=root, check=True)
    assert touched.read_bytes() == ours and work.state(place, release) is State.PATCHED
    subprocess.run([*git, "--reverse"], cwd=root, check=True)
    assert work.state(place, release) is State.UNPATCHED


@each_host
def test_a_checkout_with_crlf(host: str, root: Path, touched: Path) -> None:
    """git's autocrlf gives every line a CRLF, ours too; it is the release's file all the same."""
    crlf = touched.read_bytes().replace(b"\n", b"\r\n")
    touched.write_bytes(crlf)
    assert state(host, root) is State.UNPATCHED
    apply(host, root)
    assert state(host, root) is State.PATCHED
    assert touched.read_bytes().startswith(crlf) and touched.read_bytes().replace(b"\r\n", b"").count(b"\n") == 0
    revert(host, root)
    assert touched.read_bytes() == crlf


@each_host
def test_mode_links_and_what_they_share(host: str, root: Path, touched: Path, tmp_path: Path) -> None:
    """uv links files of its cache into every venv, hard or symbolic: the cache and other venvs stay as they are."""
    before = touched.read_bytes()
    touched.chmod(0o440)
    cached = tmp_path / "cache.py"
    os.link(touched, cached)
    apply(host, root)
    assert stat.S_IMODE(touched.stat().st_mode) == 0o440
    assert cached.read_bytes() == before and touched.read_bytes() != before
    revert(host, root)
    assert stat.S_IMODE(touched.stat().st_mode) == 0o440 and touched.read_bytes() == before

    touched.unlink()
    touched.symlink_to(cached)
    apply(host, root)
    assert cached.read_bytes() == before and state(host, root) is State.PATCHED
    revert(host, root)
    assert touched.read_bytes() == before == cached.read_bytes()


@each_host
def test_a_changed_file_is_refused_by_its_lines(host: str, root: Path, touched: Path) -> None:
    lines = touched.read_bytes().splitlines(keepends=True)
    touched.write_bytes(
        b"".join([*lines[:2], b"X = 1\n", b"Y = 2\n", *lines[2:6], *lines[7:-3], b"Z = 3\n", *lines[-3:]])
    )
    before = snapshot(root)
    with pytest.raises(S3Error) as refusal:
        apply(host, root)
    last = len(lines) + 2 - 1 - 2
    wanted = f"{TOUCHED[host]} differs from {host} .*: lines 3-4, {last}, without line 7 of the release; --three-way"
    assert refusal.match(wanted) and "\n" not in str(refusal.value)
    assert snapshot(root) == before


@each_host
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_three_way_on_a_fork(host: str, root: Path, touched: Path, end: bytes) -> None:
    """A fork with lines of its own at both ends of the file, which may end in the middle of a line."""
    fork = b"import json\n" + touched.read_bytes() + b"LOCAL = json.dumps(\n    {}\n)" + end
    touched.write_bytes(fork)
    apply(host, root, three_way=True)
    assert state(host, root) is State.THREE_WAY
    assert touched.read_bytes().endswith(b")\n" + b"LOCAL = json.dumps(\n    {}\n)" + end)
    patched = snapshot(root)
    apply(host, root)
    apply(host, root, three_way=True)
    assert snapshot(root) == patched
    assert list(work.differing(*opened(host, root))) == [
        f"{TOUCHED[host]}: lines 1, {fork.count(b'\n') - 2 + (not end)}-{fork.count(b'\n') + (not end)}"
    ]
    revert(host, root)
    assert touched.read_bytes() == fork


@each_host
def test_a_fork_whose_last_line_has_no_end(host: str, root: Path, touched: Path) -> None:
    fork = b"# a fork\n" + touched.read_bytes().rstrip(b"\n")
    touched.write_bytes(fork)
    apply(host, root, three_way=True)
    assert state(host, root) is State.THREE_WAY and not touched.read_bytes().endswith(b"\n")
    compile(touched.read_bytes(), "patched", "exec")
    revert(host, root)
    assert touched.read_bytes() == fork


@each_host
def test_three_way_refuses_what_has_no_place(host: str, root: Path, touched: Path) -> None:
    original = touched.read_bytes()
    lines = original.splitlines(keepends=True)
    (file,) = opened(host, root)[1].files
    anchor = len(file.anchor(file.hunks[0]))
    cases = {
        b"".join([*lines[:-1], b"    # " + lines[-1].lstrip()]): f"line.* {len(lines)} of the release, .* missing here",
        original + b"".join(lines[-anchor:]): "there 2 times here",
        original + b"    if broken:\n": "would not be Python with our lines",
        b"def wrapper():\n    '''\n" + original + b"    '''\n": "inside of a function|would not be Python",
    }
    for data, words in cases.items():
        touched.write_bytes(data)
        with pytest.raises(S3Error, match=words) as refusal:
            apply(host, root, three_way=True)
        assert TOUCHED[host] in str(refusal.value) and "\n" not in str(refusal.value)
        assert touched.read_bytes() == data


@each_host
def test_our_lines_must_be_whole(host: str, root: Path, touched: Path) -> None:
    """Half a patch, or two of them, are neither patched again nor taken for one."""
    original = touched.read_bytes()
    apply(host, root)
    lines = touched.read_bytes().splitlines(keepends=True)
    number = len(lines)
    for data, words in {
        b"".join(lines[:-1]): f"lines {number - 2}-{number - 1}",
        b"".join([*lines[:-3], lines[-2], lines[-1]]): f"lines {number - 2}-{number - 1}",
        b"".join([*lines, *lines[-3:]]): f"lines {number - 2}-{number + 3}",
    }.items():
        touched.write_bytes(data)
        assert state(host, root) is State.CHANGED
        for action in (lambda: apply(host, root, three_way=True), lambda: revert(host, root)):
            with pytest.raises(S3Error, match=f"not as they were put in: {words};"):
                action()
        with pytest.raises(S3Error, match="differs from"):
            apply(host, root)
        assert touched.read_bytes() == data
    touched.write_bytes(original + b"# a fork that was never patched\n")
    revert(host, root)
    assert touched.read_bytes() == original + b"# a fork that was never patched\n"


@each_host
def test_a_touched_file_that_is_missing(host: str, root: Path, touched: Path) -> None:
    place, release = opened(host, root)  # without DeepSpeed's __init__.py there is no DeepSpeed to be found
    touched.unlink()
    with pytest.raises(S3Error, match=r"__init__\.py cannot be read: No such file .*: install it whole"):
        work.patching(place, release, three_way=False)


@each_host
def test_a_file_that_cannot_be_written(host: str, root: Path, touched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so a folder stands where the new content would be written first."""
    monkeypatch.setattr(work.secrets, "token_hex", lambda _: "0")
    (touched.parent / f"{touched.name}.0.partial").mkdir()
    before = snapshot(root)
    with pytest.raises(S3Error, match=r"cannot be written, nothing was changed: Is a directory"):
        apply(host, root)
    assert snapshot(root) == before


@pytest.fixture
def several(tmp_path: Path) -> tuple[Place, Release]:
    """Made up, because today's patches touch one file each: a release with two files and three hunks."""
    patch = (
        "--- a/p/one.py\n+++ b/p/one.py\n@@ -1,0 +2,1 @@\n+first()\n@@ -3,0 +5,2 @@\n+second()\n+third()\n"
        "--- a/p/two.py\n+++ b/p/two.py\n@@ -2,0 +3,1 @@\n+first()\n"
    )
    place = Place(tmp_path / "several", "megatron-lm", "1.2.3")
    (place.root / "p").mkdir(parents=True)
    (place.root / "p/one.py").write_text("a = 1\nb = 2\nc = 3\nd = 4\n")
    (place.root / "p/two.py").write_text("a = 1\nb = 2\n")
    touched = touched_files(record.make_record(place, patch), patch)
    return place, Release(place.host, place.version, touched, {})


def test_several_files_and_hunks(several: tuple[Place, Release]) -> None:
    place, release = several
    before = snapshot(place.root)
    work.write(work.patching(place, release, three_way=False))
    assert (place.root / "p/one.py").read_text() == "a = 1\nfirst()\nb = 2\nc = 3\nsecond()\nthird()\nd = 4\n"
    assert work.state(place, release) is State.PATCHED
    (place.root / "p/two.py").write_text("a = 1\nb = 2\n")
    assert work.state(place, release) is State.CHANGED
    work.write(work.patching(place, release, three_way=False))  # as after an interruption between two files
    assert work.state(place, release) is State.PATCHED
    work.write(work.reverting(place, release))
    assert {path: data for path, (data, _) in snapshot(place.root).items()} == {
        path: data for path, (data, _) in before.items()
    }


def test_a_failure_in_the_middle_changes_nothing(
    several: tuple[Place, Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, release = several
    monkeypatch.setattr(work.secrets, "token_hex", lambda _: "0")
    before = {path: data for path, (data, _) in snapshot(place.root).items()}
    (place.root / "p/two.py.0.partial").mkdir()
    changes = work.patching(place, release, three_way=False)
    assert [change.path.name for change in changes] == ["one.py", "two.py"]
    with pytest.raises(S3Error, match=r"two\.py cannot be written, nothing was changed"):
        work.write(changes)
    assert {path: data for path, (data, _) in snapshot(place.root).items()} == before

    times = snapshot(place.root)
    (place.root / "p/two.py").write_text("a = 1\nother = 2\n")
    with pytest.raises(S3Error, match=r"p/two\.py differs"):
        work.patching(place, release, three_way=False)
    assert snapshot(place.root)[place.root / "p/one.py"] == times[place.root / "p/one.py"]


def test_two_that_patch_at_once_leave_a_whole_file(
    several: tuple[Place, Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank's script patches the shared checkout. They wrote one partial file: the second began it anew while the
    first gave it its name, so that a third imported half of a file, or the first ended in a FileNotFoundError."""
    place, release = several
    changes = work.patching(place, release, three_way=False)
    publish, waiting = work.publish, [changes[0]]

    def meanwhile(partial: Path, path: Path) -> None:
        if waiting:
            work.write([waiting.pop()])
        publish(partial, path)

    monkeypatch.setattr(work, "publish", meanwhile)
    work.write(changes)
    assert work.state(place, release) is State.PATCHED
    assert not list(place.root.rglob("*.partial"))


LINES = st.sampled_from([b"# theirs\n", b"\n", b"x = 1\r\n", b"    # indented\r\n", b"'''text'''\n"])


@each_host
# The fixtures are read only here.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60)
@given(data=st.data())
def test_apply_then_revert_is_the_identity_on_any_fork(
    host: str, touched: Path, root: Path, data: st.DataObject
) -> None:
    """Lines are added anywhere but inside of the anchor; what is then not Python is refused, and nothing else is."""
    (file,) = opened(host, root)[1].files
    lines = touched.read_bytes().splitlines(keepends=True)
    anchor = len(file.anchor(file.hunks[0]))
    spots = st.integers(0, len(lines) - anchor) | st.just(len(lines))
    for at, added in sorted(data.draw(st.lists(st.tuples(spots, LINES), min_size=1, max_size=6)), reverse=True):
        lines.insert(at, added)
    fork = b"".join(lines)
    if data.draw(st.booleans()):
        fork = fork.rstrip(b"\r\n")
    try:
        compile(fork, "fork", "exec")
    except SyntaxError:
        return
    try:
        patched = edit.insert(file, fork)
    except S3Error as refusal:
        # An indented line behind the anchor, which is a function's end, would fall out of that function.
        assert "would not be Python" in str(refusal)
        return
    assert edit.state(file, patched) is State.THREE_WAY
    assert len(patched.splitlines()) == len(fork.splitlines()) + 3
    assert edit.remove(file, patched) == fork
