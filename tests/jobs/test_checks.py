"""What `check` says of jobs with mistakes, all at once, and of jobs without."""

import json
import os
import struct
from pathlib import Path

import pytest
from rich.console import Console

from s3_megatron.data import train_sentencepiece
from s3_megatron.finding import ERROR, OK, WARNING, Finding, table
from s3_megatron.jobs import catalog, checks, compose
from s3_megatron.jobs.checks import data, engines, numbers, places, resources
from s3_megatron.jobs.job import Job
from s3_megatron.jobs.render import render

RUN = Path("/shared/s3/runs/run")


def quick(job: Job) -> list[Finding]:
    """Everything but what starts a process."""
    looks = (numbers.check, engines.deepspeed, resources.check, places.check)
    return [finding for look in looks for finding in look(job, RUN)]


def wrong(job: Job, *, with_paths: bool = False) -> list[Finding]:
    where = () if with_paths else ("runs_dir", "data", "container", "python")
    return [finding for finding in quick(job) if finding.state != OK and not finding.name.startswith(where or "-")]


MISTAKES = [
    # recipe, cluster, settings, state, what the finding says, and what its fix says
    ("345m", "slurm", ["layout.pipeline=3"], "16 (nodes 2 x ranks_per_node 8) is not a multiple of tensor 1", "of 3"),
    (
        *("7b", "slurm_pyxis", ["layout.context=4", "layout.sequence_parallel=false", "model.seq_length=2052"]),
        *("seq_length 2052 is not a multiple of 2 x layout.context 8", "2056"),
    ),
    (
        "7b",
        "slurm_pyxis",
        ["layout.sequence_parallel=true", "model.seq_length=2050"],
        "2050 is not a multiple of layout.tensor x context 4",
        "2052",
    ),
    ("345m", "slurm", ["model.num_attention_heads=12"], "1024 is not a multiple of model.num_attention_heads", "1032"),
    ("7b", "slurm_pyxis", ["model.num_attention_heads=2"], "heads 2 is not a multiple of layout.tensor 4", "make it 4"),
    ("7b", "slurm_pyxis", ["model.ffn_hidden_size=10922"], "10922 is not a multiple of layout.tensor 4", "10924"),
    ("345m", "slurm", ["layout.pipeline=16"], "num_layers 24 is not a multiple of layout.pipeline 16", "32"),
    ("345m", "slurm", ["schedule.global_batch_size=500"], "500 is not a multiple of", "make it 512"),
    ("345m", "slurm_pyxis", ["layout.sequence_parallel=true"], "?does nothing with layout.tensor 1", "false"),
    (
        "7b",
        "slurm",
        ["layout.sequence_parallel=true"],
        "sequence_parallel true without Transformer Engine",
        "cluster.transformer_engine=true",
    ),
    (
        "7b",
        "slurm_pyxis",
        ["layout.sequence_parallel=true", "cluster.accelerator=cpu"],
        "sequence_parallel true on CPUs",
        "sequence_parallel=false",
    ),
    ("345m", "slurm", ["layout.context=2"], "layout.context 2 without Transformer Engine", "turn it off"),
    ("7b", "slurm_pyxis", ["cluster.ranks_per_node=2", "layout.nodes=16"], "?tensor 4 crosses nodes of 2", "divisor"),
    (
        *("7b", "slurm_pyxis", ["cluster.environment.CUDA_DEVICE_MAX_CONNECTIONS='8'"]),
        *("CUDA_DEVICE_MAX_CONNECTIONS 8", "leave it out"),
    ),
    ("345m", "slurm", ["schedule.lr_decay_iters=2000"], "2000 is not below schedule.lr_decay_iters 2000", "1999"),
    ("345m", "slurm", ["checkpoint.save_retain_interval=750"], "750 is not a multiple", "make it 1000"),
    (
        *("345m", "slurm", ["checkpoint.save_interval=60000", "checkpoint.save_retain_interval=null"]),
        *("?60000 is beyond schedule.train_iters 50000", "at most 50000"),
    ),
    ("345m", "slurm", ["cluster.watchdog.hang_minutes=2"], "?hang_minutes 2: a healthy run may be quiet", "at least 5"),
    ("7b", "slurm_pyxis", ["log.log_interval=100"], "?hang_minutes 30: a healthy run may be quiet", "at least 36"),
    ("345m", "slurm", ["cluster.restart.signal_seconds=600"], "?600 is not below save_margin_minutes 10", "than 600"),
    ("345m", "slurm", ["cluster.slurm.time_limit_minutes=15"], "?leaves 5 minutes to start and train", "longer"),
    ("345m", "slurm_pyxis", ["schedule.micro_batch_size=32", "cluster.gpu.memory_gib=40"], "?2% free: weights", "full"),
    ("345m", "slurm_pyxis", ["cluster.gpu.memory_gib=20"], "21.7 of 20 GiB a GPU, -8% free", "micro_batch_size"),
    ("345m", "slurm", ["engine=deepspeed", "deepspeed=zero9"], "there is no deepspeed 'zero9'", "configs/deepspeed"),
    ("345m", "slurm", ["engine=deepspeed", "layout.tensor=2"], "layout.tensor 2: the DeepSpeed entry", "tensor=1"),
    (
        *("345m", "slurm", ["engine=deepspeed", "deepspeed=zero3", "optimizer=softmuon"]),
        *("has ZeRO stage 3, and SoftMuon runs in ZeRO 1 and 2 alone", "deepspeed=zero1"),
    ),
    ("345m", "slurm", ["engine=deepspeed", "optimizer=adamw"], "?type 'S3', and the recipe trains with adamw", "meant"),
    ("345m", "slurm", ["cluster.scratch_dir=/shared/x"], "?/shared/x is under cluster.shared_dirs", "own disk"),
]


@pytest.mark.parametrize(("recipe", "cluster", "settings", "says", "fix"), MISTAKES)
def test_a_mistake_is_named_with_its_value_and_its_fix(
    recipe: str, cluster: str, settings: list[str], says: str, fix: str
) -> None:
    """``says`` begins with "?" where it is a warning. The mistake is the only one that is found."""
    found = wrong(compose.load(f"gpt2_{recipe}", cluster, settings))
    about = [finding for finding in found if says.lstrip("?") in finding.found and fix in finding.fix]
    assert len(about) == 1, found
    assert about[0].state == (WARNING if says.startswith("?") else ERROR)
    # What else follows: the DeepSpeed file that is not there leaves no memory to estimate, and so on.
    assert len(found) <= 2, found


@pytest.mark.parametrize("cluster", catalog.names("cluster"))
@pytest.mark.parametrize("recipe", catalog.names("model"))
def test_a_shipped_recipe_has_no_mistake_but_that_its_files_are_not_here(recipe: str, cluster: str) -> None:
    """But one: 7B splits a layer over 4 ranks and the sequence with it, which this machine's 2 processes, or GPUs
    without Transformer Engine, cannot do."""
    found = wrong(compose.load(recipe, cluster))
    if recipe == "gpt2_7b" and cluster == "local":
        assert {finding.name for finding in found} <= {"ranks", "layout"} and found
    else:
        assert not found


# Ten documents of 2,000 tokens each (uint16), as Megatron's IndexedDatasetBuilder writes them, without its import.
DATASET = {
    ".bin": bytes(2 * 2000 * 10),
    ".idx": struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, 10, 11)
    + struct.pack("<10i", *[2000] * 10)
    + struct.pack("<10q", *range(0, 40_000, 4000))
    + struct.pack("<11q", *range(11)),
}


def here(tmp_path: Path, *settings: str, shared: str = "") -> Job:
    """345M on two nodes, with everything that it names under ``tmp_path``."""
    for name in ("train", "validation"):
        for end in (".bin", ".idx"):
            file = tmp_path / "data/openwebtext" / f"{name}_text_document{end}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(DATASET[end])
    interpreter = tmp_path / "venv/bin/python"
    interpreter.parent.mkdir(parents=True)
    interpreter.symlink_to("/bin/sh")
    ours = {"runs_dir": tmp_path / "runs", "data_dir": tmp_path / "data", "python": interpreter}
    places = [f"cluster.{key}={value}" for key, value in ours.items()]
    return compose.load("gpt2_345m", "slurm", [*places, f"cluster.shared_dirs=[{shared or tmp_path}]", *settings])


def test_files_that_are_there_and_shared_are_in_order(tmp_path: Path) -> None:
    """A virtual environment's python, which is a link to the system's, counts as where its folder is."""
    assert not wrong(here(tmp_path), with_paths=True)


def test_every_missing_file_is_named(tmp_path: Path) -> None:
    job = here(tmp_path)
    (tmp_path / "data/openwebtext/train_text_document.idx").unlink()
    (tmp_path / "venv/bin/python").unlink()
    (tmp_path / "runs").touch()
    found = {finding.name: finding.found for finding in wrong(job, with_paths=True)}
    assert sorted(found) == ["data.train", "python", "runs_dir"]
    assert found["data.train"].endswith("train_text_document.idx does not exist here")
    assert found["runs_dir"].endswith("runs is not a folder that you can write in")


def test_what_other_nodes_cannot_see_is_refused(tmp_path: Path) -> None:
    """Also behind a link that leads out of shared storage; on one node nothing needs to be shared."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "local").mkdir()
    (tmp_path / "shared/runs").symlink_to(tmp_path / "local")
    settings = [f"cluster.runs_dir={tmp_path}/shared/runs"]
    found = {f.name: f.found for f in wrong(here(tmp_path, *settings, shared=f"{tmp_path}/shared"), with_paths=True)}
    assert sorted(found) == ["data.train", "data.validation", "python", "runs_dir"]
    assert f"shared/runs leads to {tmp_path}/local, which is not under cluster.shared_dirs" in found["runs_dir"]
    assert "is not under cluster.shared_dirs" in found["python"]


@pytest.mark.parametrize(
    ("runs", "kind", "state"),
    [
        ("/tmp/runs", "ext4", ERROR),
        ("/dev/shm/runs", "tmpfs", ERROR),
        ("/home/me/runs", "tmpfs", ERROR),
        ("/home/me/runs", "xfs", WARNING),  # a head node may export it
        ("/home/me/runs", "nfs4", OK),
        ("/home/me/runs", "lustre", OK),
    ],
)
def test_without_shared_dirs_the_file_system_shows_them(
    runs: str, kind: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_file_system", lambda path: kind)
    monkeypatch.setattr(places, "_there", lambda key, path: ())
    job = compose.load("gpt2_345m", "slurm", ["cluster.shared_dirs=[]", f"cluster.runs_dir={runs}", "data.mock=true"])
    assert [finding.state for finding in places.check(job, RUN) if finding.name == "runs_dir"] == [state]
    single = compose.load("gpt2_345m", "slurm", [f"cluster.runs_dir={runs}", "data.mock=true", "layout.nodes=1"])
    assert [finding.state for finding in places.check(single, RUN) if finding.name == "runs_dir"] == [OK]


def test_the_innermost_mount_counts(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda / ext4 rw 0 0\nserver:/x /shared nfs4 rw 0 0\nsmall /shared/my\\040tmp tmpfs rw 0 0\n"
        "x /over ext4 rw 0 0\nserver:/y /over lustre rw 0 0\n"
    )
    kinds = {
        "/etc": "ext4",
        "/shared/a/b": "nfs4",
        "/shared/my tmp/a": "tmpfs",
        "/sharedother": "ext4",
        "/over": "lustre",
    }
    assert {path: places._file_system(Path(path), mounts) for path in kinds} == kinds
    assert places._file_system(Path("/etc"), tmp_path / "none") == ""
    mounts.write_bytes("x / ext4 rw 0 0\ny /größe nfs4 rw 0 0\n".encode() + b"z /caf\xe9 lustre rw 0 0\n")
    assert places._file_system(Path("/größe/a"), mounts) == "nfs4", "a path is bytes"
    assert places._file_system(Path(os.fsdecode(b"/caf\xe9/a")), mounts) == "lustre"


def test_what_is_only_inside_the_container_is_not_looked_for() -> None:
    settings = [
        "cluster.container.mounts=['/lustre/d:/data:ro']",
        "cluster.data_dir=/data",
        "cluster.shared_dirs=[/lustre]",
    ]
    found = quick(compose.load("gpt2_345m", "slurm_pyxis", settings))
    data = [finding for finding in found if finding.name.startswith("data.")]
    assert len(data) == 4
    assert all(finding.state == OK and finding.found.endswith("inside the container: not checked") for finding in data)
    image = [finding for finding in found if finding.name == "container.image"]
    assert "/shared/s3/s3-megatron.sqsh does not exist here" in image[0].found, "the host opens it"


def test_a_login_node_without_megatron_prints_what_was_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None if name.startswith("deep") else name)
    (finding,) = engines.parser(compose.load("gpt2_345m", "slurm", ["engine=deepspeed"]), RUN)
    assert (finding.state, finding.found) == (WARNING, "not run: deepspeed is not installed here")


def test_deepspeeds_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    job = compose.load("gpt2_345m", "slurm_pyxis", ["engine=deepspeed", f"deepspeed={file}"])

    def message(content: str) -> list[str]:
        file.write_text(content)
        return [finding.found for finding in engines.deepspeed(job, RUN)]

    assert "cannot be read as JSON" in message("{")[0]
    assert "holds no JSON object" in message("[]")[0]
    assert "has zero_optimization {'stage': 4}" in message('{"zero_optimization": {"stage": 4}}')[0]
    assert "has ZeRO stage 0, and precision is bf16" in message("{}")[0]
    assert (
        "has optimizer type 'Lion'" in message('{"zero_optimization": {"stage": 1}, "optimizer": {"type": "Lion"}}')[0]
    )


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 400 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.txt"
    text.write_bytes(Path(json.__file__).read_bytes())
    return train_sentencepiece([text], folder / "small", 400)


@pytest.mark.slow
def test_everything_wrong_is_one_list_and_one_table(tmp_path: Path, sentences: Path) -> None:
    """Numbers, files, the tokenizer and Megatron's own verdict, of which none hides another."""
    settings = [
        *("schedule.global_batch_size=500", "checkpoint.save_retain_interval=750", "flags=[--no-such-flag]"),
        *(f"data.tokenizer_model={sentences}", "data.tokenizer=sentencepiece", "model.vocab_size=64"),
        *(f"cluster.runs_dir={tmp_path}", f"cluster.shared_dirs=[{tmp_path}/shared]"),
    ]
    report = checks.check(compose.load("gpt2_345m", "slurm", settings))
    found = {finding.name: finding for finding in report.errors}
    assert {"batch", "checkpoints", "data.train", "runs_dir", "tokenizer", "parser", "python"} <= set(found)
    assert "unrecognized arguments: --no-such-flag" in found["parser"].found
    assert "sentencepiece has 400 tokens, model.vocab_size is 64" in found["tokenizer"].found
    assert report.memory is not None and report.throughput.days is not None
    console = Console(width=240, record=True, file=open(os.devnull, "w"))
    console.print(table(report.findings))
    text = console.export_text()
    assert all(finding.found[:40] in text and finding.fix[:20] in text for finding in report.findings)


@pytest.mark.slow
def test_a_gpu_job_is_accepted_on_a_machine_without_one(tmp_path: Path) -> None:
    """Tensor and sequence parallelism on Transformer Engine: Megatron asks for neither GPUs nor that package before
    it builds the model. The finding says what was left out."""
    (finding,) = engines.parser(compose.load("gpt2_7b", "slurm_pyxis", ["cluster.environment={}"]), tmp_path)
    assert finding.state == OK
    assert "Megatron accepted the flags" in finding.found
    import torch

    if not torch.cuda.is_available():
        assert "no GPU here: checked on the rehearsal's stand-in" in finding.found
    assert not list(tmp_path.iterdir()), "it writes nothing"


@pytest.mark.slow
def test_megatrons_assertions_are_asked_whatever_python_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under PYTHONOPTIMIZE=1 Megatron accepted everything, in the check and on the nodes: it validates by asserting."""
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    flags = ["cluster.accelerator=cpu", "flags=[--distribute-saved-activations]"]
    (finding,) = engines.parser(compose.load("gpt2_tiny", "local", flags), tmp_path)
    assert finding.state == ERROR and "tensor model parallel" in finding.found
    for cluster in ("local", "slurm"):
        assert "\nexport PYTHONOPTIMIZE=''\n" in render(compose.load("gpt2_tiny", cluster), tmp_path)


@pytest.mark.slow
def test_deepspeeds_schema_is_asked(tmp_path: Path) -> None:
    """Without a process group DeepSpeed takes the world for one rank, and once refused every batch on 16."""
    shipped = json.loads((catalog.CONFIGS / "deepspeed/zero3.json").read_text())
    shipped["zero_optimization"]["stage3_max_live_parameters"] = "many"
    (tmp_path / "mine.json").write_text(json.dumps(shipped))
    job = compose.load("gpt2_345m", "slurm_pyxis", ["engine=deepspeed", f"deepspeed={tmp_path}/mine.json"])
    (finding,) = engines.parser(job, tmp_path)
    assert finding.state == ERROR
    assert "stage3_max_live_parameters" in finding.found and "batch" not in finding.found


def test_too_little_data_and_stale_caches_are_named(tmp_path: Path) -> None:
    """Megatron's index builder counts for ever where a data set has nothing, with every rank behind it."""
    job = here(tmp_path, "schedule.train_iters=100")
    folder = tmp_path / "data/openwebtext"
    (found,) = [finding for finding in data.check(job, RUN) if finding.name == "data.train tokens"]
    assert (found.state, found.found.split(";")[0]) == (OK, "20,000 tokens in 10 documents")
    empty = struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, 1, 2) + struct.pack("<iqqq", 0, 0, 0, 1)
    (folder / "train_text_document.idx").write_bytes(empty)
    (folder / "train_text_document.bin").write_bytes(b"")
    (folder / "validation_text_document.bin").write_bytes(bytes(7))
    found = {finding.name: finding for finding in data.check(job, RUN) if finding.state == ERROR}
    assert "has no token in 1 documents" in found["data.train tokens"].found
    assert found["data.train tokens"].fix == "prepare it again"
    assert "7 bytes where its .idx promises 40000" in found["data.validation tokens"].found
