"""The scripts, as golden files and as a shell runs them."""

import os
import shlex
import shutil
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
    assert "scontrol requeue" not in never and "train.allreduce" not in never
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


@pytest.mark.parametrize("path", ["/shared/a\nb", "/shared/a\\b"])
def test_a_run_folder_that_slurm_cannot_name_is_refused(path: str):
    with pytest.raises(S3Error, match="line break, a control character or a backslash"):
        script("gpt2_tiny", "slurm", run=Path(path))


# ---- Nothing in a recipe or a path can run, or add a directive.

STUB = """#!/bin/bash
case ${0##*/} in
    scontrol) [[ $1 != show ]] || printf '%s\\n' node1 node2 ;;
    squeue) echo CANCELLED ;;
    srun) printf '%s\\0' "$@" >>"$RECORD" ; printf '\\n\\0' >>"$RECORD" ;;
esac
"""


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SLURM's commands, which only write down what they were given: what is tested is the shell's reading."""
    folder = tmp_path_factory.mktemp("stubs")
    for name in ("scontrol", "squeue", "scancel", "srun", "pwned"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    (folder / "pwned").write_text('#!/bin/bash\ntouch "$PWNED"\n')
    yield folder


def steps(text: str, stubs: Path, folder: Path) -> list[list[str]]:
    """Run a script with the stubs; returns the arguments of every srun."""
    record, pwned = folder / "record", folder / "pwned"
    record.unlink(missing_ok=True)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NAME": "job"}
    paths = {"PATH": f"{stubs}:{os.environ['PATH']}", "RECORD": str(record), "PWNED": str(pwned)}
    done = subprocess.run(["bash", "-c", text], env=slurm | paths, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 1 and "not requeued: the job is CANCELLED" in done.stdout, done.stdout + done.stderr
    assert not pwned.exists()
    return [step.split("\0")[:-1] for step in record.read_text().split("\n\0")[:-1]]


EVIL = st.lists(
    st.sampled_from(["a", " ", "'", '"', "$(pwned)", "`pwned`", "${IFS}", ";pwned", "&", "|", "\\", "#", "%", "*", "~"])
    | st.characters(blacklist_categories=["C", "Z"], blacklist_characters="/\0"),
    min_size=1,
    max_size=8,
).map("".join)


BASE = compose.load("gpt2_7b", "slurm_pyxis")
PLAIN = render(BASE, Path("/shared/run"))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
