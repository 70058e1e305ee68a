"""Recipes and clusters as people write, change and mistype them."""

import json
import re
from pathlib import Path

import pytest
import yaml

from s3_megatron.errors import S3Error
from s3_megatron.jobs import catalog, compose
from s3_megatron.jobs.cluster import Cluster
from s3_megatron.jobs.flags import megatron_flags


def refused(recipe: str, cluster: str, *settings: str) -> str:
    with pytest.raises(S3Error) as error:
        compose.load(recipe, cluster, settings)
    line = str(error.value)
    assert "\n" not in line
    return line


def flags(recipe: str, cluster: str, *settings: str) -> dict[str, str]:
    words = megatron_flags(compose.load(recipe, cluster, settings), Path("/run"))
    assert len({flag for flag, *_ in words}) == len(words), "a flag is given once"
    return {flag: " ".join(values) for flag, *values in words}


@pytest.mark.parametrize("cluster", catalog.names("cluster"))
@pytest.mark.parametrize("recipe", catalog.names("model"))
def test_every_recipe_loads_on_every_cluster_and_survives_a_run_folder(recipe: str, cluster: str, tmp_path: Path):
    job = compose.load(recipe, cluster)
    (tmp_path / "recipe.yaml").write_text(catalog.as_yaml(job.recipe))
    (tmp_path / "cluster.yaml").write_text(catalog.as_yaml(job.cluster))
    assert compose.load(str(tmp_path / "recipe.yaml"), str(tmp_path / "cluster.yaml")) == job
    if cluster != "local":  # which may be smaller than the recipe's layout: `check` says so
        assert job.ranks % job.model_parallel == 0
        assert job.recipe.schedule.global_batch_size % (job.micro_batch_size * job.data_parallel) == 0


def test_the_papers_rates_follow_from_the_papers_rule():
    """The rule of the paper: AdamW 3e-4 with 0.1 gives S3 at 3e-3 a decay of 0.01; at Lion's 6e-5 it would be 0.5."""
    s3 = flags("gpt2_345m", "slurm")
    assert (s3["--optimizer"], s3["--lr"], s3["--min-lr"], s3["--weight-decay"]) == ("s3", "0.003", "0.0003", "0.01")
    assert (s3["--s3-beta"], s3["--s3-p"]) == ("0.95", "3")
    assert flags("gpt2_345m", "slurm", "optimizer.lr=6e-5")["--weight-decay"] == "0.5"
    assert flags("gpt2_345m", "slurm", "optimizer.weight_decay=0")["--weight-decay"] == "0"


def test_the_optimizer_is_exchanged_whole():
    adamw = flags("gpt2_7b", "slurm", "optimizer.lr=1e-3", "optimizer=adamw")
    assert (adamw["--optimizer"], adamw["--lr"], adamw["--weight-decay"]) == ("adam", "0.001", "0.1")
    assert (adamw["--adam-beta1"], adamw["--adam-beta2"]) == ("0.9", "0.999")
    assert not [flag for flag in adamw if flag.startswith("--s3")]
    assert "there is no optimizer 'lion': give a file's path or one of adamw, s3" in refused(
        "gpt2_tiny", "local", "optimizer=lion"
    )


def test_a_recipe_has_every_hyperparameter_of_its_optimizer():
    """Ablations of the paper could not be written as recipes."""
    given = flags("gpt2_7b", "slurm", "optimizer.nesterov=false", "optimizer.betas=[0.9,0.95]")
    assert "--s3-no-nesterov" in given and "--s3-beta" not in given
    assert given["--s3-betas"] == "0.9 0.95"
    assert "--s3-no-nesterov" not in flags("gpt2_7b", "slurm")
    assert "optimizer.betas" in refused("gpt2_7b", "slurm", "optimizer.betas=[0.9]")


def test_settings_reach_both_files():
    job = compose.load("gpt2_7b", "slurm", ["layout.nodes=8", "cluster.ranks_per_node=4", "cluster.slurm.account=abc"])
    assert (job.ranks, job.model_parallel, job.data_parallel) == (32, 4, 8)
    assert job.cluster.slurm.account == "abc"
    assert flags("gpt2_7b", "slurm", "flags=[--lr-wsd-decay-style,linear]")["--lr-wsd-decay-style"] == ""


def test_every_mistake_is_named_at_once_with_the_nearest_key():
    line = refused("gpt2_7b", "slurm", "model.layers=12", "schedule.train_iters=x", "precision=fp8", "optimizer.lrr=3")
    assert "model.layers is unknown; did you mean num_layers?" in line
    assert 'schedule.train_iters = "x": Input should be a valid integer' in line
    assert "precision = \"fp8\": Input should be 'bf16' or 'fp32'" in line
    assert "optimizer.lrr is unknown; did you mean lr?" in line


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("num_layers=3", "num_layers is unknown; did you mean model.num_layers?"),
        ("num_layrs=3", "num_layrs is unknown; did you mean model.num_layers?"),
        ("layout.seed=2", "layout.seed is unknown; did you mean schedule.seed?"),
        ("model.lr=1", "model.lr is unknown; did you mean optimizer.lr or optimizer.adamw.lr?"),
        ("cluster.partition=x", "partition is unknown; did you mean slurm.partition?"),
        ("optimizer.adamw.lrr=1", "optimizer.adamw.lrr is unknown; did you mean lr?"),
        ("optimizer.soft_start=.5", "it is a setting of softmuon and softsignum, not of s3"),
    ],
)
def test_a_key_in_the_wrong_section_is_named_with_its_own(setting: str, message: str) -> None:
    """`--set optimizer.soft_start=.5` on S3 was "unknown; did you mean soft_start?", and so was a key at the top."""
    assert message in refused("gpt2_tiny", "slurm", setting)


def test_a_key_of_another_optimizer_is_no_suggestion() -> None:
    """Of softsignum's sign_iters S3 has nothing: the hint led to the next refusal."""
    assert refused("gpt2_tiny", "slurm", "optimizer.sign_iter=3").endswith("optimizer.sign_iter is unknown")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.num_layers"], "must be KEY=VALUE"),
        # Pydantic's "valid tuple", "dictionary or instance of Model", "Input tag" are no words of a YAML file.
        (["flags=--adam-eps"], 'flags = "--adam-eps": must be a list, as in [a, b]'),
        (["optimizer.betas=3"], "optimizer.betas = 3: must be a list"),
        (["cluster.shared_dirs=/a"], "must be a list"),
        (["model=3"], "model = 3: must be a mapping of keys to values"),
        (["model=[1]"], "--set model: model: must be a mapping of keys to values"),  # was "Cannot merge ... full_key"
        (["schedule={train_itres: 3}"], "schedule.train_itres is unknown; did you mean train_iters?"),
        (["cluster.environment=3"], "environment = 3: must be a mapping of keys to values"),
        (["optimizer.name=x"], "optimizer.name must be one of s3, softsignum, softmuon, adamw"),
        (["model.num_layers=0"], "greater than or equal to 1"),
        (["schedule.seed=0"], "seed = 0: Input should be greater than or equal to 1"),  # Megatron: a positive one
        (["data.mock=false"], "name the files of data.train and data.validation"),
        (["optimizer.beta=1"], "less than 1"),
        (["name=a b"], "letters, digits"),
        (['data.train="a\\nb"'], "line break"),
        (["cluster.environment.WANDB_API_KEY=abc"], "looks like a secret"),
        (["cluster.environment.A-B=abc"], "no name of an environment variable"),
        (["cluster.scratch_dir=tmp"], "absolute path"),
        (["cluster.slurm.time_limit_minutes=10"], "leaves nothing of slurm.time_limit_minutes 10"),
        (["cluster.container.kind=pyxis"], "container.image go together"),
        (["cluster.accelerator=auto"], "on a cluster it must be gpu"),
        (["cluster.runs_dir=runs"], "must be an absolute path on a cluster"),
        # Of two #SBATCH lines the last counts: --nodes=4 trained on four times the ranks, --array in one folder.
        (["cluster.slurm.options=[--nodes=4]"], '"--nodes=4": is in the script already: layout.nodes of the recipe'),
        (["cluster.slurm.options=['-t 10']"], "cluster.slurm.time_limit_minutes decides it"),
        (["cluster.slurm.options=[--array=1-3]"], "one task a node, and one job"),
        (["cluster.slurm.options=[qos=high]"], "must be an option of sbatch with its value, such as --qos=high"),
        (["schedule.lr_decay_style=WSD"], "schedule.lr_wsd_decay_iters is missing"),
        (["schedule.lr_wsd_decay_iters=5"], "schedule.lr_decay_style is cosine: give both"),
        (["schedule.lr_decay_style=WSD", "schedule.lr_wsd_decay_iters=9999999"], "are more than the"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(settings: list[str], message: str):
    assert message in refused("gpt2_tiny", "slurm", *settings)


@pytest.mark.parametrize(
    "flags",
    [
        "--ckpt-format,torch",
        "--ckpt-format=torch",
        "--load,/elsewhere",
        "--finetune",
        "--no-load-optim",
        "--ckpt-step,'4'",
    ],
)
def test_a_flag_that_takes_the_resume_away_is_refused(flags: str):
    """``flags: [--ckpt-format, torch]`` passed ``check``, trained and saved; ``status`` saw no checkpoint, and the next
    start ended the run although every checkpoint was whole."""
    assert f"flags has {flags.partition(',')[0]}, but" in refused("gpt2_tiny", "slurm", f"flags=[{flags}]")


def test_wsd_reaches_megatron_with_its_length():
    style = ["schedule.lr_decay_style=WSD", "schedule.lr_wsd_decay_iters=5"]
    assert flags("gpt2_tiny", "slurm", *style)["--lr-wsd-decay-iters"] == "5"
    assert "--lr-wsd-decay-iters" not in flags("gpt2_tiny", "slurm")


def test_a_number_in_the_place_of_a_text_stays_as_written(tmp_path: Path):
    """``flags: [--x, 1e-3]`` was refused, as was a partition 3090. By YAML's numbers, 0123 would become 83."""
    words, partition = "[--a, 007, --b, 1e-3, --c, 1:30, --d, '08']", "partition: 0123"
    recipe, cluster = (catalog.find(*which).read_text() for which in (("model", "gpt2_345m"), ("cluster", "slurm")))
    (tmp_path / "recipe.yaml").write_text(f"{recipe}\nflags: {words}\n")
    (tmp_path / "cluster.yaml").write_text(re.sub("partition: .*", partition, cluster))
    more = ["cluster.container.mounts=[/a,10]", "cluster.environment.NCCL_IB_TIMEOUT=22.50", "layout.nodes=2"]
    by_file = compose.load(str(tmp_path / "recipe.yaml"), str(tmp_path / "cluster.yaml"), more)
    by_setting = compose.load("gpt2_345m", "slurm", [f"flags={words}", "cluster.slurm.partition=0123", *more])
    assert by_file == by_setting
    assert by_file.recipe.flags == ("--a", "007", "--b", "1e-3", "--c", "1:30", "--d", "08")
    assert (by_file.cluster.slurm.partition, by_file.cluster.container.mounts) == ("0123", ("/a", "10"))
    assert by_file.cluster.environment["NCCL_IB_TIMEOUT"] == "22.50"
    assert by_file.recipe.layout.nodes == 2, "a number in its own place stays one"
    account = compose.load("gpt2_345m", "slurm", ["cluster.slurm.account=1e5"]).cluster
    assert account.slurm.account == "1e5"
    (tmp_path / "again.yaml").write_text(catalog.as_yaml(account))
    assert compose.load("gpt2_345m", str(tmp_path / "again.yaml")).cluster == account, "as a run folder keeps it"


@pytest.mark.parametrize(("written", "read"), [("12:00:00", 43200), ("1:30", 90), ("0100", 64)])
def test_a_number_that_yaml_reads_as_another_is_refused(written: str, read: int, tmp_path: Path) -> None:
    """``time_limit_minutes: 12:00:00``, as people write it for sbatch, became 43,200 minutes: a month."""
    line = f"time_limit_minutes = {written}: YAML reads {read}: write a plain number"
    assert line in refused("gpt2_tiny", "slurm", f"cluster.slurm.time_limit_minutes={written}")
    cluster = catalog.find("cluster", "slurm").read_text()
    (tmp_path / "mine.yaml").write_text(cluster.replace("minutes: 1440", f"minutes: {written}"))
    assert line in refused("gpt2_tiny", str(tmp_path / "mine.yaml"))
    with pytest.raises(S3Error, match=line):
        compose.load_plain(Cluster, tmp_path / "mine.yaml")


def test_a_tilde_is_no_home_folder() -> None:
    """``runs_dir: ~/runs`` made a folder called ~ beside the recipe, which people then remove by ``rm -r ~``."""
    for key in ("runs_dir", "data_dir"):
        line = refused("gpt2_tiny", "local", f"cluster.{key}=~/runs")
        assert f"{key} '~/runs': ~ is the home folder for a shell only: write it out" in line


def test_a_section_whose_keys_are_commented_out_can_be_set(tmp_path: Path) -> None:
    text = re.sub(r"(?m)^(slurm:)\n(  .*\n)+", r"\1\n", catalog.find("cluster", "slurm").read_text())
    assert "partition" not in text
    (tmp_path / "mine.yaml").write_text(f"\ufeff{text}".replace("\n", "\r\n"), encoding="utf-8", newline="")
    job = compose.load("gpt2_tiny", str(tmp_path / "mine.yaml"), ["cluster.slurm.partition=012"])
    assert job.cluster.slurm.partition == "012"


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    """In a run's recipe.yaml the last one won in silence: an edit of the first changed nothing at the resume."""
    text = catalog.find("cluster", "slurm").read_text() + "runs_dir: /other\n"
    (tmp_path / "twice.yaml").write_text(text)
    assert "duplicate key runs_dir" in refused("gpt2_tiny", str(tmp_path / "twice.yaml"))
    with pytest.raises(S3Error, match="duplicate key runs_dir"):
        compose.load_plain(Cluster, tmp_path / "twice.yaml")


def test_what_yaml_reads_as_a_truth_value_needs_quotes():
    assert "flags.1 = true: must be text: write it in quotes" in refused("gpt2_tiny", "local", "flags=[--x,yes]")
    assert "slurm.partition = false: must be text: write it in quotes" in refused(
        "gpt2_tiny", "slurm", "cluster.slurm.partition=no"
    )


def test_a_value_that_was_set_beside_the_file_is_not_the_files():
    """``--set cluster.slurm.partition="a b"`` was answered with the file's name alone, in which it is not."""
    line = refused("gpt2_tiny", "slurm", "cluster.slurm.partition=a b", "cluster.name=c")
    assert "slurm.yaml with --set cluster.slurm.partition cluster.name: slurm.partition" in line
    assert "gpt2_tiny.yaml with --set model.layers: model.layers is unknown" in refused(
        "gpt2_tiny", "slurm", "model.layers=4"
    )


def test_a_secrets_value_is_not_repeated():
    assert "hunter2" not in refused("gpt2_tiny", "slurm", "cluster.environment.DB_PASSWORD=hunter2")
    # OmegaConf's own refusals came with every setting as it was given.
    line = refused("gpt2_tiny", "slurm", "cluster.environment.DB_PASSWORD=hunter2", "cluster.name=${none}")
    assert "hunter2" not in line and "with --set cluster.environment.DB_PASSWORD cluster.name: " in line, line


def test_unknown_names_are_answered_with_the_known(tmp_path: Path):
    assert "did you mean gpt2_345m?" in refused("gpt2_354m", "slurm")
    assert "one of local, slurm, slurm_apptainer, slurm_pyxis" in refused("gpt2_7b", "mine")
    assert "mine.yaml is not a file" in refused("gpt2_7b", "mine.yaml")
    broken = tmp_path / "broken.yaml"
    for text, message in (("a: [1", "is no YAML"), ("- 1\n", "must be a mapping")):
        broken.write_text(text)
        assert message in refused(str(broken), "slurm")


def test_without_a_scheduler_there_is_one_node_with_what_it_has(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    job = compose.load("gpt2_345m", "local")
    assert (job.recipe.layout.nodes, job.cluster.accelerator, job.ranks, job.rehearsed) == (1, "cpu", 2, True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    job = compose.load("gpt2_345m", "local")
    assert (job.cluster.accelerator, job.ranks, job.rehearsed) == ("gpu", 4, False)
    assert job.cluster.gpu.memory_gib == 80, "nvidia-smi does not say here"


def test_the_memory_of_the_gpus_that_are_here_counts(monkeypatch: pytest.MonkeyPatch):
    """80 GiB were assumed of every GPU, and a job that cannot fit a smaller one passed its check."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(compose, "least_memory", lambda: 23.99)  # nvidia-smi: these machines have none
    assert compose.load("gpt2_345m", "local").cluster.gpu.memory_gib == 23.99
    assert compose.load("gpt2_345m", "local", ["cluster.gpu.memory_gib=40"]).cluster.gpu.memory_gib == 40
    assert compose.load("gpt2_345m", "slurm").cluster.gpu.memory_gib == 80, "the cluster's file says so"


def test_flags_say_what_the_recipe_says():
    seven = flags("gpt2_7b", "slurm_pyxis", "layout.sequence_parallel=true", "layout.recompute=selective")
    expected = {
        "--num-layers": "32",
        "--max-position-embeddings": "2048",
        "--tensor-model-parallel-size": "4",
        "--recompute-granularity": "selective",
        "--train-data-path": "/shared/s3/data/refinedweb/train_text_document",
        "--tokenizer-model": "gpt2",
        "--save": "/run/checkpoints",
        "--load": "/run/checkpoints",
        "--lr-decay-iters": "50000",
    }
    assert expected.items() <= seven.items()
    assert {"--bf16", "--sequence-parallel", "--exit-signal-handler", "--overlap-grad-reduce"} <= seven.keys()
    assert "--transformer-impl" not in seven, "the image has Transformer Engine"
    assert flags("gpt2_7b", "slurm")["--transformer-impl"] == "local"
    assert "--bf16" not in flags("gpt2_7b", "slurm", "precision=fp32")
    deepspeed = flags("gpt2_345m", "slurm", "engine=deepspeed")
    assert deepspeed["--deepspeed-config"] == "/run/deepspeed.json" and "--use-distributed-optimizer" not in deepspeed


def test_recipes_explain_themselves():
    """Every value of the shipped recipes that the paper does not state is marked so, and every section is there."""
    for name in ("gpt2_345m", "gpt2_7b"):
        text = (catalog.CONFIGS / "model" / f"{name}.yaml").read_text()
        assert text.count("not stated by the paper") >= 8 and "the paper's" in text
        assert {"model", "data", "schedule", "layout", "checkpoint", "log"} <= yaml.safe_load(text).keys()


def test_deepspeed_files_are_found():
    for name in catalog.names("deepspeed"):
        assert json.loads(catalog.find("deepspeed", name, ".json").read_text())["optimizer"]["type"] == "S3"
