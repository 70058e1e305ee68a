"""The scripts, as golden files and as a shell runs them."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from syrupy.assertion import SnapshotAssertion
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode

from s3_megatron.errors import S3Error
from s3_megatron.jobs import catalog, compose
from s3_megatron.jobs.flags import megatron_flags
from s3_megatron.jobs.job import Job
from s3_megatron.jobs.render import render

ROOT = Path(__file__).resolve().parents[2]
# Names for the scripts that people read; launch/ has them as they would be for these run folders.
EXAMPLES = {
    "launch/slurm/gpt2_345m.sbatch": ("gpt2_345m", "slurm"),
    "launch/slurm/gpt2_345m_apptainer.sbatch": ("gpt2_345m", "slurm_apptainer"),
    "launch/slurm/gpt2_7b_pyxis.sbatch": ("gpt2_7b", "slurm_pyxis"),
    "launch/local.sh": ("gpt2_345m", "local"),
}


class Golden(SingleFileSnapshotExtension):
    """tests/golden/NAME.sh, which shellcheck and a person can read."""

    _write_mode = WriteMode.TEXT
    file_extension = "sh"

    @classmethod
    def dirname(cls, *, test_location: Any) -> str:
        return str(ROOT / "tests/golden")

    @classmethod
    def get_snapshot_name(cls, *, test_location: Any, index: Any = 0) -> str:
        return str(index)


@pytest.fixture
def golden(snapshot: SnapshotAssertion) -> SnapshotAssertion:
    return snapshot.use_extension(Golden)


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The local cluster is what this machine is: let it be the same everywhere."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")


def script(recipe: str, cluster: str, *settings: str, run: Path | None = None) -> str:
    job = compose.load(recipe, cluster, settings)
    return render(job, run or Path("/shared/s3/runs") / recipe)


@pytest.mark.filterwarnings("ignore:(?s).*Can not relate snapshot")  # it would have them beside the tests
@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize("cluster", catalog.names("cluster"))
@pytest.mark.parametrize("recipe", catalog.names("model"))
def test_scripts_are_as_they_were(recipe: str, cluster: str, golden: SnapshotAssertion):
    """A change of a template is seen in review; after one: pytest tests/jobs/test_render.py --snapshot-update."""
    assert script(recipe, cluster) == golden(name=f"{recipe}.{cluster}")


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize("path", EXAMPLES)
def test_the_examples_are_what_the_command_prints(path: str):
    recipe, cluster = EXAMPLES[path]
    run = Path("runs/gpt2_345m") if cluster == "local" else None
    assert (ROOT / path).read_text() == script(recipe, cluster, run=run), (
        f"write it anew: s3-megatron submit {recipe} --cluster {cluster} --name {recipe} --dry-run > {path}"
    )


VARIANTS = {
    "rehearsal": ["cluster.accelerator=cpu", "cluster.slurm.cpus_per_node=4"],
    "chain": ["cluster.restart.how=chain"],
    "never": ["cluster.restart.how=never", "cluster.health.allreduce=false"],
    "gres": ["cluster.slurm.gpu_request=gres", "cluster.slurm.account=abc", "cluster.slurm.options=[--qos=high]"],
    "deepspeed": ["engine=deepspeed", "cluster.network_interface=ib0"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_branch_is_clean_shell(variant: str, tmp_path: Path):
    """The golden files are checked by `make lint`; these are the branches that none of them takes."""
    path = tmp_path / "job.sh"
    path.write_text(script("gpt2_345m", "slurm", *VARIANTS[variant]))
    for command in (["shellcheck"], ["shfmt", "-i", "4", "-ci", "-d"]):
        tool = Path(sys.executable).with_name(command[0])
        done = subprocess.run([tool, *command[1:], str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_what_each_branch_is_for():
    rehearsal, chain, never = (
        script("gpt2_345m", "slurm", *VARIANTS[name]) for name in ("rehearsal", "chain", "never")
    )
    assert "S3_REHEARSAL=1" in rehearsal and "--gpus" not in rehearsal.split("set -euo")[0]
    assert "--cpus-per-task=4" in rehearsal and "--exclusive" not in rehearsal
    assert "--dependency=singleton" in chain and "scontrol requeue" not in chain
    assert "scontrol requeue" not in never and "node.allreduce" not in never
    gres = script("gpt2_345m", "slurm", *VARIANTS["gres"]).split("set -euo")[0]
    assert "#SBATCH --gres=gpu:8\n" in gres and "#SBATCH --account=abc\n" in gres and "#SBATCH --qos=high\n" in gres
    deepspeed = script("gpt2_345m", "slurm", *VARIANTS["deepspeed"])
    assert "NCCL_SOCKET_IFNAME=ib0" in deepspeed and '--deepspeed-config "$run"/deepspeed.json' in deepspeed


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        (["layout.tensor=2"], "CUDA_DEVICE_MAX_CONNECTIONS=1"),
        (["layout.tensor=2", "cluster.gpu.architecture=blackwell"], None),
        (["layout.tensor=1"], None),
    ],
)
def test_connections_follow_the_generation(settings: list[str], value: str | None):
    found = [line for line in script("gpt2_345m", "slurm", *settings).splitlines() if "MAX_CONNECTIONS" in line]
    assert found == ([f"export {value}"] if value else [])


def test_one_setting_bounds_the_clocks_of_file_server_and_nodes():
    """The health program, which looks first, had 5 s of its own: a larger setting let no node pass."""
    text = script("gpt2_345m", "slurm", "cluster.health.max_clock_skew_seconds=7.5")
    assert text.count("--max-clock-skew 7.5") == 2


@pytest.mark.parametrize("path", ["/shared/a\nb", "/shared/a\\b", "/shared/\udce9"])
def test_a_run_folder_that_slurm_cannot_name_is_refused(path: str):
    with pytest.raises(S3Error, match="line break, a control character, a byte that is not UTF-8 or a backslash"):
        script("gpt2_tiny", "slurm", run=Path(path))


# ---- Nothing in a recipe or a path can run, or add a directive.

STUB = """#!/bin/bash
case ${0##*/} in
    scontrol) [[ $1 != show ]] || printf '%s\\n' node1 node2 ;;
    sleep) ;;
    squeue)
        if ((AWAY)) && read -r left <"$RECORD.away" && ((left)); then
            echo $((left - 1)) >"$RECORD.away"
            exit 1
        fi
        echo "${STATE:-CANCELLED}"
        ;;
    srun) printf '%s\\0' "$@" >>"$RECORD" ; printf '\\n\\0' >>"$RECORD" ;;
esac
"""


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SLURM's commands, which only write down what they were given: what is tested is the shell's reading."""
    folder = tmp_path_factory.mktemp("stubs")
    for name in ("scontrol", "squeue", "scancel", "sleep", "srun", "pwned"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    (folder / "pwned").write_text('#!/bin/bash\ntouch "$PWNED"\n')
    yield folder


def shell(text: str, stubs: Path, folder: Path, away: int = 0, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the stubs; ``away``: so many calls of squeue fail first."""
    record = folder / "record"
    record.unlink(missing_ok=True)
    record.with_name("record.away").write_text(f"{away}\n")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NAME": "job"}
    paths = {"PATH": f"{stubs}:{os.environ['PATH']}", "RECORD": str(record), "PWNED": str(folder / "pwned")}
    environ = slurm | paths | {"AWAY": str(away)} | environ
    return subprocess.run(["bash", "-c", text], env=environ, capture_output=True, text=True, cwd=folder)


def recorded(folder: Path) -> list[list[str]]:
    """The arguments of every srun."""
    return [step.split("\0")[:-1] for step in (folder / "record").read_text().split("\n\0")[:-1]]


def steps(text: str, stubs: Path, folder: Path) -> list[list[str]]:
    """Run a script to its end; returns the arguments of every srun."""
    done = shell(text, stubs, folder)
    assert done.returncode == 1 and "not requeued: the job is CANCELLED" in done.stdout, done.stdout + done.stderr
    assert not (folder / "pwned").exists()
    return recorded(folder)


def test_a_controller_that_comes_back_costs_nothing(stubs: Path, tmp_path: Path):
    """``squeue`` failed for a moment at the end of a start, ``set -e`` ended the script, and the job was over: neither
    requeued nor with a reason."""
    text = script("gpt2_345m", "slurm", run=tmp_path / "run")
    done = shell(text, stubs, tmp_path, away=3, STATE="RUNNING")
    assert done.stdout.endswith("requeued\n"), done.stdout + done.stderr
    assert done.stderr.count("failed, again in 10 s: squeue") == 3
    assert not (tmp_path / "run/ENDED").exists()


def test_a_job_whose_signal_is_under_way_is_requeued(stubs: Path, tmp_path: Path):
    """Of a job that a signal is on its way to, squeue says SIGNALING (its manual page): it was "not requeued", and its
    run was over. SLURM 22.05 was not seen to say it."""
    text = script("gpt2_345m", "slurm", run=tmp_path / "run")
    assert shell(text, stubs, tmp_path, STATE="SIGNALING").stdout.endswith("requeued\n")


@pytest.mark.parametrize("how", ["requeue", "chain"])
def test_a_controller_that_stays_away_is_the_end_with_a_reason(how: str, stubs: Path, tmp_path: Path):
    text = script("gpt2_345m", "slurm", f"cluster.restart.how={how}", run=tmp_path / "run")
    assert "SECONDS + 900" in text
    bad = tmp_path / "run/attempts/6-0"  # a chain asks the controller only where there is a node to leave out
    bad.mkdir(parents=True)
    (bad / "bad_nodes").write_text("node1\tno disk\n")
    done = shell(text.replace("SECONDS + 900", "SECONDS"), stubs, tmp_path, away=1000, STATE="RUNNING")
    assert done.returncode == 1
    assert (tmp_path / "run/ENDED").read_text().startswith("SLURM's controller has not answered")


def test_a_rendezvous_has_a_free_port_and_another_one_in_every_start(stubs: Path, tmp_path: Path):
    """A requeued job took the same port again, and one that something else held made torchrun wait for an hour. None of
    them is one that Linux gives to whoever asks for any."""
    text = script("gpt2_345m", "slurm", run=tmp_path / "run")

    def port() -> int:
        steps(text, stubs, tmp_path)
        (word,) = [word for word in recorded(tmp_path)[-1] if word.startswith("--rdzv-endpoint=node1:")]
        return int(word.rpartition(":")[2])

    first = port()
    shutil.rmtree(tmp_path / "run")
    with socket.create_server(("", first + 1)):
        assert port() == first + 2, "the all-reduce has the second of the two"
    shutil.rmtree(tmp_path / "run")
    with socket.create_server(("::", first), family=socket.AF_INET6):
        assert port() == first + 2
    assert 20000 <= first < 31998 and port() != first


def test_a_second_job_in_a_run_folder_is_refused_while_the_first_runs(stubs: Path, tmp_path: Path):
    """Both trained, and their iterations interleaved. A job that SLURM knows to be over keeps nothing."""
    text, checkpoints = script("gpt2_345m", "slurm", run=tmp_path / "run"), tmp_path / "run/checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "holder").write_text("6-0 node9 123 2026-11-28 12:00:00\n")
    (checkpoints / "lease").touch()
    done = shell(text, stubs, tmp_path, STATE="5\n6\n66")  # what squeue prints
    assert done.returncode == 2 and "refused: job 6-0 node9 123 2026-11-28 12:00:00" in done.stdout
    assert not (tmp_path / "run/chain").exists() and (checkpoints / "lease").exists()
    assert "training is not complete" in shell(text, stubs, tmp_path, STATE="5\n66").stdout
    assert not (checkpoints / "lease").exists()


def test_a_job_of_another_cluster_is_left_its_lease(stubs: Path, tmp_path: Path):
    """Of two clusters with one runs_dir the second did not find the first's job in its queue, removed the lease, and
    both trained. Whether that run is alive the lease itself says, by its refreshes."""
    text, checkpoints = script("gpt2_345m", "slurm", run=tmp_path / "run"), tmp_path / "run/checkpoints"
    checkpoints.mkdir(parents=True)
    for cluster, is_left in (("alpha", True), ("beta", False)):
        (checkpoints / "holder").write_text(f"6-0 node9 123 2026-11-28 12:00:00 {cluster}\n")
        (checkpoints / "lease").touch()
        done = shell(text, stubs, tmp_path, STATE="5", SLURM_CLUSTER_NAME="beta")
        assert "training is not complete" in done.stdout, done.stdout + done.stderr
        assert (checkpoints / "lease").exists() == is_left


def test_what_is_exported_reaches_the_ranks(stubs: Path, tmp_path: Path):
    """With ``--export=NONE`` for sbatch SLURM sets SLURM_EXPORT_ENV=NONE, and srun handed on nothing: no S3_RUN_DIR,
    no NCCL_SOCKET_IFNAME. tests/slurm runs a job under it."""
    found = steps(script("gpt2_345m", "slurm", run=tmp_path / "run"), stubs, tmp_path)
    assert len(found) == 3 and all(step[0] == "--export=ALL" for step in found)


EVIL = st.lists(
    st.sampled_from(["a", " ", "'", '"', "$(pwned)", "`pwned`", "${IFS}", ";pwned", "&", "|", "\\", "#", "%", "*", "~"])
    | st.characters(blacklist_categories=["C", "Z"], blacklist_characters="/\0"),
    min_size=1,
    max_size=8,
).map("".join)


BASE = compose.load("gpt2_7b", "slurm_pyxis")
PLAIN = render(BASE, Path("/shared/run"))


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(run=EVIL.filter(lambda text: "\\" not in text), data=EVIL, image=EVIL, value=EVIL, flag=EVIL, python=EVIL)
def test_nothing_in_a_recipe_or_a_path_runs(
    stubs: Path, tmp_path: Path, run: str, data: str, image: str, value: str, flag: str, python: str
):
    recipe = BASE.recipe.model_copy(
        update={"data": BASE.recipe.data.model_copy(update={"train": data}), "flags": (flag,)}
    )
    container = BASE.cluster.container.model_copy(update={"image": image})
    cluster = BASE.cluster.model_copy(update={"container": container, "environment": {"A": value}, "python": python})
    job, path = Job(recipe, cluster), tmp_path / "runs" / run
    shutil.rmtree(path, ignore_errors=True)
    text = render(job, path)
    directives = [line for line in text.splitlines() if line.startswith("#")]
    assert len(directives) == len([line for line in PLAIN.splitlines() if line.startswith("#")])
    health, allreduce, train = steps(text, stubs, tmp_path)
    for step in (health, allreduce, train):
        assert f"--container-image={image}" in step
        assert any(python in word for word in step)
        assert step[step.index("--run-dir") + 1] == str(path) if "--run-dir" in step else True
    wanted = [word for words in megatron_flags(job, path) for word in words]
    assert train[-len(wanted) - 2 : -2] == wanted


def test_an_odd_path_is_one_word_in_the_directive():
    """What sbatch makes of it is tested with the real one, tests/slurm."""
    line = next(
        line
        for line in script("gpt2_tiny", "slurm", run=Path('/a b/%j"x')).splitlines()
        if line.startswith("#SBATCH --output")
    )
    assert shlex.split(line.removeprefix("#SBATCH "))[0] == '--output=/a b/%%j"x/logs/job.log'
