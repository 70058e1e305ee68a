"""What of a job's environment is shown: never a secret."""

import re

from hypothesis import given
from hypothesis import strategies as st

from s3_megatron.jobs.node.environment import public, report

SECRET = re.compile("key|token(?!izer)|secret|passw|credential", re.IGNORECASE)
words = st.sampled_from(["NCCL_", "SLURM_", "S3_", "WANDB_", "API_", "Key", "TOKEN", "secret", "DEBUG", "_", "passwd"])
names = st.lists(words, min_size=1, max_size=4).map("".join)
values = st.one_of(st.text("ab1 ", max_size=4), st.sampled_from(["hunter2", "a hunter2 b", "1", "", "false", "INFO"]))


@given(st.dictionaries(names, values, max_size=8))
def test_nothing_secret_is_public(environ: dict[str, str]) -> None:
    kept = public(environ)
    switches = {"", "0", "1", "true", "false", "yes", "no", "on", "off"}
    secrets = [value for name, value in environ.items() if SECRET.search(name)]
    for name, value in kept.items():
        assert environ[name] == value
        assert name.startswith(("NCCL_", "SLURM_", "TORCH_", "CUDA_", "S3_", "OMP_"))
        assert not SECRET.search(name)
        assert not any(secret in value for secret in secrets if secret.strip().lower() not in switches)
    # And what is kept is all there is to keep: nothing else is a reason to drop a variable.
    held = [secret for secret in secrets if secret.strip().lower() not in switches]
    assert kept == {
        name: value
        for name, value in environ.items()
        if name.startswith(("NCCL_", "SLURM_", "TORCH_", "CUDA_", "S3_", "OMP_"))
        and not SECRET.search(name)
        and not any(secret in value or secret in name for secret in held)
    }


def test_a_copy_of_a_secret_is_one_and_a_switch_is_none() -> None:
    environ = {
        "WANDB_API_KEY": "abcdef",
        "NCCL_DEBUG": "INFO",
        "SLURM_EXPORT_ENV": "ALL,WANDB_API_KEY=abcdef",
        "S3_HTTP": "x",
        "TOKENIZERS_PARALLELISM": "false",
        "NCCL_IB_DISABLE": "false",
        "HOME": "/home/me",
        "SLURM_JWT_TOKEN": "t",
    }
    assert public(environ) == {"NCCL_DEBUG": "INFO", "NCCL_IB_DISABLE": "false"} | {"S3_HTTP": "x"}


def test_the_report_names_what_a_job_runs_on() -> None:
    text = "\n".join(report())
    for part in ("kernel: Linux", "torch 2.", "megatron-core 0.19", "gpus: ", "s3-megatron "):
        assert part in text
