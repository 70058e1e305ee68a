"""A cluster: where a recipe runs. Every key's unit is in its name, or in its description."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from s3_megatron.jobs.node.environment import SECRET
from s3_megatron.jobs.schema import Name, Section, Text

Count = Annotated[int, Field(ge=1)]
Minutes = Annotated[int, Field(ge=1)]


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("is no name of an environment variable")
    if SECRET.search(name):
        raise ValueError(
            "looks like a secret, and this file is copied into scripts and run folders: "
            "export it in the shell that submits, Slurm hands it on to the job"
        )
    return name


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError("must be an absolute path: a job does not start in the folder it was submitted from")
    return path


# What the script itself says to sbatch, and which setting decides it. Of two lines the last one counts: a second
# --nodes trains on more ranks than the recipe has, and --array puts several jobs into one run folder.
_DECIDED = {
    **dict.fromkeys(("--nodes", "-N"), "layout.nodes of the recipe"),
    **dict.fromkeys(
        ("--ntasks", "-n", "--ntasks-per-node", "--array", "-a"), "no setting: one task a node, and one job"
    ),
    **dict.fromkeys(("--cpus-per-task", "-c"), "cluster.slurm.cpus_per_node"),
    **dict.fromkeys(("--partition", "-p"), "cluster.slurm.partition"),
    **dict.fromkeys(("--account", "-A"), "cluster.slurm.account"),
    **dict.fromkeys(("--time", "-t", "--time-min"), "cluster.slurm.time_limit_minutes"),
    **dict.fromkeys(("--job-name", "-J", "--output", "-o", "--open-mode"), "the run's --name and cluster.runs_dir"),
    **dict.fromkeys(("--requeue", "--no-requeue"), "cluster.restart.how"),
    "--signal": "cluster.restart.signal_seconds",
}


def _option(text: str) -> str:
    flag = re.match(r"--[a-z-]+|-[A-Za-z]|", text)
    if not flag or not flag[0]:
        raise ValueError("must be an option of sbatch with its value, such as --qos=high")
    if flag[0] in _DECIDED:
        raise ValueError(f"is in the script already: {_DECIDED[flag[0]]} decides it")
    return text


Variable = Annotated[str, AfterValidator(_variable)]
Option = Annotated[Text, AfterValidator(_option)]
Folder = Annotated[Text, AfterValidator(_absolute)]


class Gpu(Section):
    """One accelerator, for the estimates of memory and days."""

    architecture: Literal["ampere", "hopper", "blackwell"] = "hopper"
    memory_gib: float = Field(80, gt=0)
    peak_tflops: float = Field(989, gt=0, description="dense bf16")


class Slurm(Section):
    """What goes into the script's #SBATCH lines; null leaves a line out."""

    partition: Name | None = None
    account: Name | None = None
    time_limit_minutes: Minutes = 1440
    cpus_per_node: Count | None = Field(None, description="null: the whole node's (--exclusive --mem=0)")
    gpu_request: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    options: tuple[Option, ...] = Field((), description="more #SBATCH lines, such as --qos=high")


class Container(Section):
    """Where the package is installed: in an image (pyxis, apptainer) or, with kind none, beside ``python``."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    image: Text | None = Field(None, description="a name or file that pyxis or apptainer takes")
    mounts: tuple[Text, ...] = Field((), description="HOST:CONTAINER; run and data folders are mounted by themselves")

    @model_validator(mode="after")
    def _has_an_image(self) -> Self:
        if (self.kind == "none") != (self.image is None):
            raise ValueError("container.kind and container.image go together: give both, or neither")
        return self


class Restart(Section):
    """How a job that has not finished goes on."""

    how: Literal["requeue", "chain", "never"] = Field(
        "requeue",
        description="requeue: the same job again; chain: a queue of jobs of one name, where requeueing is forbidden",
    )
    max_restarts: int = Field(20, ge=0)
    save_margin_minutes: Minutes = Field(10, description="training ends in order so long before the time limit")
    signal_seconds: Count = Field(300, description="SIGTERM so long before the time limit, should that not happen")


class Health(Section):
    """What a node must show before training starts."""

    min_free_gib: float = Field(20, ge=0, description="on scratch_dir and runs_dir")
    min_free_inodes: int = Field(10000, ge=0)
    max_clock_skew_seconds: float = Field(5, gt=0)
    allreduce: bool = Field(True, description="time an all-reduce over all nodes before training")
    min_allreduce_gbps: float = Field(0, ge=0, description="GB/s of bus bandwidth; 0: measured and printed only")


class Watchdog(Section):
    """When a job counts as hung: every rank is then dumped, and the job goes on from its last checkpoint."""

    hang_minutes: float = Field(30, gt=0, description="without an iteration; longer than a save and a validation take")
    start_minutes: float = Field(60, gt=0, description="until the first one")


class Cluster(Section):
    """Everything that decides where and how a recipe runs."""

    name: Name
    scheduler: Literal["slurm", "none"] = "slurm"
    accelerator: Literal["gpu", "cpu", "auto"] = Field("gpu", description="cpu: a rehearsal; auto: by what is here")
    ranks_per_node: Count = Field(8, description="one for each GPU")
    gpu: Gpu = Gpu()
    transformer_engine: bool = Field(True, description="installed, with Apex: NVIDIA's containers have both")
    slurm: Slurm = Slurm()
    container: Container = Container()
    python: Text = Field("python", description="the interpreter that has s3_megatron, on the nodes or in the image")
    runs_dir: Text = Field(description="run folders; on shared storage when there is more than one node")
    data_dir: Text = Field(description="where relative paths of a recipe's data begin")
    scratch_dir: Folder = Field("/tmp", description="node-local: compiled kernels")
    shared_dirs: tuple[Folder, ...] = Field((), description="mounted on every node; what is elsewhere is refused")
    network_interface: Text | None = Field(None, description="for NCCL and gloo; null: they choose")
    environment: dict[Variable, Text] = Field({}, description="more variables of the job")
    restart: Restart = Restart()
    health: Health = Health()
    watchdog: Watchdog = Watchdog()
    model_flops_utilization: float = Field(0.4, gt=0, le=1, description="assumed, for the days a run takes")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for key in ("runs_dir", "data_dir"):
            if getattr(self, key).startswith("~"):
                raise ValueError(f"{key} {getattr(self, key)!r}: ~ is the home folder for a shell only: write it out")
        if self.scheduler == "slurm":
            for key in ("runs_dir", "data_dir"):
                if not getattr(self, key).startswith("/"):
                    raise ValueError(f"{key} {getattr(self, key)!r} must be an absolute path on a cluster")
            if self.accelerator == "auto":
                raise ValueError(
                    "accelerator auto looks at this machine: on a cluster it must be gpu, or cpu to rehearse"
                )
            margin, limit = self.restart.save_margin_minutes, self.slurm.time_limit_minutes
            if margin >= limit:
                raise ValueError(
                    f"restart.save_margin_minutes {margin} leaves nothing of slurm.time_limit_minutes {limit}"
                )
        return self
