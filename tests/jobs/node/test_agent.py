"""The node agent on small processes that stand for torchrun and its ranks."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from s3_megatron.checkpoints import lease
from s3_megatron.jobs.node import verdict, watchdog
from s3_megatron.run_folder import Attempt
from tests.agent import end, start, wait_for
from tests.launcher import ROOT
from tests.signals import is_in

FAILURE = [{"rank": 1, "host": "n", "message": "no such file: x", "time": 5.0, "exitcode": 2, "local_rank": 1}]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def test_the_end_of_training_is_distinguished_from_the_end_of_an_attempt(tmp_path: Path) -> None:
    watch = tmp_path / "watch"
    watch.mkdir()
    lines = ['{"event": "train", "iteration": 7}', '{"event": "validation", "iteration": 8}', '{"event": "tra']
    (watch / "metrics.jsonl").write_text("\n".join(lines))
    code, report, printed = end(tmp_path, start(tmp_path, ["true"], WANDB_API_KEY="hunter2secret"))
    assert (code, report["verdict"], report["exit_code"], report["iteration"]) == (0, "saved", 0, 7)
    assert report["error"] is None and report["started"] <= report["ended"]
    assert "environment: kernel: Linux" in printed and "torch 2" in printed and "hunter2" not in printed

    (tmp_path / "FINISHED").touch()
    code, report, printed = end(tmp_path, start(tmp_path, ["true"], SLURM_NODEID="1"))
    assert (code, report["verdict"]) == (0, "finished")
    assert "environment:" not in printed, "one node of a job says it"


def test_a_rank_that_dies_after_the_end_makes_no_failure_of_a_finished_run(tmp_path: Path) -> None:
    """Incident: torch aborted a rank in the last moment of Python, when everything was done and saved."""
    (tmp_path / "FINISHED").touch()
    code, report, _ = end(tmp_path, start(tmp_path, python("import os; os.abort()")))
    assert (code, report["verdict"], report["error"]) == (0, "finished", None)


def test_the_first_failure_of_the_ranks_is_the_verdicts(tmp_path: Path) -> None:
    command = python(f"""
        import os, sys
        open(os.environ["S3_FAILURES"], "w").write('''{json.dumps(FAILURE)}''')
        assert os.environ["S3_RUN_DIR"] == {str(tmp_path)!r}
        sys.exit(int(os.environ["CODE"]))""")
    (tmp_path / "attempts/1-0").mkdir(parents=True)
    code, report, _ = end(tmp_path, start(tmp_path, command, CODE="1"))
    assert (code, report["verdict"]) == (1, "failed")
    assert report["error"] == {"rank": 1, "host": "n", "message": "no such file: x", "time": 5.0}
    assert not (tmp_path / "ENDED").exists(), "another try may do"

    code, report, _ = end(tmp_path, start(tmp_path, command, CODE="2"))
    assert (code, report["verdict"]) == (2, "configuration")
    assert (tmp_path / "ENDED").read_text() == "configuration error: no such file: x\n"


def test_a_second_start_in_a_run_folder_leaves_the_first_alone(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    first = start(tmp_path, python("import time; print('trains', flush=True); time.sleep(600)"))
    request.addfinalizer(lambda: end(tmp_path, first))
    wait_for(lambda: (tmp_path / "checkpoints/holder").exists())
    second = start(tmp_path, ["touch", str(tmp_path / "trained")])
    printed, _ = second.communicate(timeout=60)
    assert second.returncode == 2 and f"process {first.pid} on" in printed and "Traceback" not in printed
    assert not (tmp_path / "trained").exists() and not (tmp_path / "ENDED").exists()
    assert first.poll() is None and not (tmp_path / "attempts/1-0/node1.json").exists()
    first.send_signal(signal.SIGINT)


def test_checkpoints_of_which_none_is_whole_end_the_chain(tmp_path: Path) -> None:
    for name in ("iter_0000005", "iter_0000010"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    code, report, printed = end(tmp_path, start(tmp_path, ["touch", str(tmp_path / "started")]))
    assert (code, report["verdict"]) == (2, "configuration")
    assert "would start from random weights" in (tmp_path / "ENDED").read_text()
    assert not (tmp_path / "started").exists()
    assert "Traceback" not in printed


# torchrun's place: it ignores SIGTERM and waits for two ranks; each says that it is there.
TORCHRUN = """
    import os, signal, subprocess, sys
    signal.signal(signal.SIGTERM, lambda *_: None)
    ranks = []
    for rank in range(2):
        code = "import os; open(os.path.join({folder!r}, 'rank' + os.environ['RANK']), 'w').write(str(os.getpid()));"
        environ = dict(os.environ, RANK=str(rank))
        ranks.append(subprocess.Popen([sys.executable, "-c", code + {rank!r}], env=environ, start_new_session=True))
    sys.exit(max(abs(rank.wait()) for rank in ranks))"""
SLEEP = "import time; time.sleep(600)"


def torchrun(folder: Path, rank: str) -> list[str]:
    return python(TORCHRUN.format(folder=str(folder), rank=rank))


def pids(folder: Path) -> list[int]:
    """Wait for both ranks."""
    texts = wait_for(
        lambda: [text for n in (0, 1) if (folder / f"rank{n}").exists() and (text := read(folder, n))][1:2]
    )
    return [int(read(folder, 0)), int(texts[0])]


def read(folder: Path, rank: int) -> str:
    return (folder / f"rank{rank}").read_text()


def test_sigterm_reaches_the_ranks_and_the_attempt_was_stopped(tmp_path: Path) -> None:
    agent = start(tmp_path, torchrun(tmp_path, SLEEP))
    ranks = pids(tmp_path)
    agent.terminate()
    code, report, _ = end(tmp_path, agent)
    assert (code, report["verdict"]) == (143, "stopped")
    assert not any(psutil.pid_exists(pid) for pid in ranks)


def test_ranks_that_save_on_sigterm_end_the_attempt_in_order(tmp_path: Path) -> None:
    saves = f"import signal; signal.sigwait([signal.SIGTERM]); open({str(tmp_path / 'saved')!r}, 'w')"
    block = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]);"
    agent = start(tmp_path, torchrun(tmp_path, block + saves))
    pids(tmp_path)
    agent.terminate()
    code, report, _ = end(tmp_path, agent)
    assert (code, report["verdict"]) == (0, "saved")
    assert (tmp_path / "saved").exists()


def test_a_node_that_slurm_ends_because_another_failed_says_so(tmp_path: Path) -> None:
    """srun --kill-on-bad-exit sends SIGTERM, as a pre-emption does, which does not count as a failure."""
    attempt = tmp_path / "attempts/1-0"
    error = {"rank": 3, "host": "node0", "message": "CUDA error", "time": 1.0}
    verdict.Verdict("failed", 1, error, 0.0, 1.0, 3).write(Attempt(attempt), "node0")
    agent = start(tmp_path, torchrun(tmp_path, SLEEP))
    pids(tmp_path)
    agent.terminate()
    code, report, _ = end(tmp_path, agent)
    assert (code, report["verdict"], report["error"]) == (1, "failed", error)


def test_nothing_outlives_the_agent(tmp_path: Path) -> None:
    """A helper of a rank, two sessions away, kept writing a checkpoint after the rank was killed."""
    child = f"import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True); {SLEEP}"
    agent = start(tmp_path, torchrun(tmp_path, child))
    first, second = pids(tmp_path)
    helpers = [wait_for(psutil.Process(pid).children)[0] for pid in (first, second)]
    for pid in (first, second):
        os.kill(pid, signal.SIGKILL)
    code, report, _ = end(tmp_path, agent)
    assert (code, report["verdict"]) == (1, "failed")
    assert not any(helper.is_running() for helper in helpers)


@pytest.mark.usefixtures("listens_to_ctrl_c")
@pytest.mark.parametrize("times", [1, 100])
def test_ctrl_c_ends_everything(tmp_path: Path, times: int) -> None:
    """Pressed twice it ended the agent in the middle of ending the others: torchrun trained on, with no verdict."""
    agent = start(tmp_path, torchrun(tmp_path, SLEEP))
    ranks = pids(tmp_path)
    for _ in range(times):
        agent.send_signal(signal.SIGINT)
        time.sleep(0.01)
    code, report, printed = end(tmp_path, agent)
    assert (code, report["verdict"]) == (143, "stopped")
    assert not any(psutil.pid_exists(pid) for pid in ranks)
    assert "Traceback" not in printed


@pytest.mark.usefixtures("listens_to_ctrl_c")
def test_ctrl_c_ends_the_wait_for_a_folder(tmp_path: Path) -> None:
    """A holder on another machine is waited for as long as its lease lasts, two minutes."""
    folder = tmp_path / "checkpoints"
    with lease.held(folder, print):
        (folder / lease.HOLDER).write_text("- elsewhere 1 2026-11-29 12:00:00\n")
        agent = start(tmp_path, ["true"])
        wait_for(lambda: is_in(agent.pid, "SigCgt", signal.SIGTERM))
        agent.send_signal(signal.SIGINT)
        agent.communicate(timeout=60)
    assert agent.returncode == -signal.SIGINT
    assert not (tmp_path / "attempts").exists()


def test_a_hang_is_found_dumped_and_ended_even_where_a_rank_is_stopped(tmp_path: Path) -> None:
    """Rank 1 is SIGSTOPped: py-spy of its own would stop it first, and wait for ever for that."""
    rank = "\ndef waits_in_vain():\n import time; time.sleep(600)\nwaits_in_vain()"
    (tmp_path / "watch").mkdir()
    agent = start(tmp_path, torchrun(tmp_path, rank), hang_minutes=3 / 60)
    first, second = pids(tmp_path)
    os.kill(second, signal.SIGSTOP)
    started = time.monotonic()
    with (tmp_path / "watch/metrics.jsonl").open("a") as heartbeat:
        for _ in range(7):  # alive for longer than --hang-minutes, which a loaded machine keeps between two lines
            heartbeat.write('{"event": "train", "iteration": 3}\n')
            heartbeat.flush()
            time.sleep(0.5)
    assert agent.poll() is None
    code, report, printed = end(tmp_path, agent)
    assert (code, report["verdict"], report["iteration"]) == (75, "hang", 3)
    assert time.monotonic() - started < 100
    assert "no iteration for" in printed and "stacks of 2 ranks" in printed
    for number in (0, 1):
        dump = (tmp_path / f"attempts/1-0/hang/node1-rank{number}.txt").read_text()
        assert "waits_in_vain" in dump
        assert dump.startswith("state: stopped" if number else "state: sleeping")
    assert not psutil.pid_exists(first) and not psutil.pid_exists(second)


@pytest.mark.parametrize("metrics", [None, '{"event": "train", "iteration": 9}\n'])
def test_a_start_that_takes_too_long_is_a_hang(tmp_path: Path, metrics: str | None) -> None:
    """What the attempt before wrote is no sign of life of this one."""
    if metrics:
        (tmp_path / "watch").mkdir()
        (tmp_path / "watch/metrics.jsonl").write_text(metrics)
    code, report, _ = end(tmp_path, start(tmp_path, ["sleep", "600"], minutes=1 / 60, hang_minutes=10))
    assert (code, report["verdict"]) == (75, "hang")


def test_the_agents_import_brings_no_torch() -> None:
    code = "import sys, s3_megatron.jobs.node.__main__, s3_megatron.jobs.node.health; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout == "False\n"


def test_a_node_that_has_dumped_waits_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end makes srun kill them, with their dumps half done."""
    monkeypatch.setenv("SLURM_NNODES", "2")
    monkeypatch.setattr(watchdog, "_WAIT_FOR_OTHERS_SECONDS", 1.5)
    started = time.monotonic()
    watchdog.dump_ranks(os.getpid(), Attempt(tmp_path))
    assert time.monotonic() - started >= 1.5, "but not for ever"
    (tmp_path / "hang/other.dumped").touch()
    monkeypatch.setattr(watchdog, "_WAIT_FOR_OTHERS_SECONDS", 60)
    started = time.monotonic()
    watchdog.dump_ranks(os.getpid(), Attempt(tmp_path))
    assert time.monotonic() - started < 30
