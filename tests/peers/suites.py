"""Which of torch's own tests are run with S3, and how they are made to run on a machine without a GPU."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Suite:
    """A file under torch's test/ and how S3 comes into it: as a row of its table, or in place of an Adam."""

    file: str
    has_rows: bool = False

    @property
    def rows(self) -> dict[str, list[str]]:
        """What pytest is given to run the file with S3, and with AdamW as the control."""
        if self.has_rows:
            both = ["-k", "TestOptimRenewed and (_S3_ or _AdamW_)"]
            return {"S3": both}
        return {"S3": ["--stand-in"], "AdamW": []}


SUITES = [
    Suite("test_optim.py", has_rows=True),
    Suite("optim/test_optim.py"),
    Suite("optim/test_lrscheduler.py"),
    Suite("optim/test_swa_utils.py"),
    Suite("distributed/optim/test_named_optimizer.py"),
    Suite("distributed/optim/test_apply_optimizer_in_backward.py"),
    Suite("distributed/optim/test_zero_redundancy_optimizer.py"),
    Suite("distributed/_tensor/test_optimizers.py"),
    Suite("distributed/checkpoint/test_state_dict.py"),
    Suite("distributed/checkpoint/test_fsdp_optim_state.py"),
    Suite("distributed/fsdp/test_fsdp_optim_state.py"),
]

# Most of the distributed ones name a GPU, and hold on a CPU as well.
ON_A_CPU = {
    r'"cpu:gloo,cuda:nccl"': '"gloo"',
    r'"cuda"': '"cpu"',
    r'"nccl"': '"gloo"',
    r"\.cuda\([^()]*\)": "",
    r"device_ids=\[[^\[\]]*\]": "device_ids=None",
    r"torch\.cuda\.device_count\(\)": "2",
    r"(?m)^ *@(common_distributed\.)?(skip_if_(lt_x_gpu\(\d\)|no_gpu|rocm_multiprocess)|requires_nccl\(\))\n": "",
}


def copy_tests(checkout: Path, folder: Path) -> None:
    """Copy torch's tests of optimizers into ``folder``, the distributed ones put on the CPU."""
    shutil.copytree(checkout / "test" / "optim", folder / "optim")
    for suite in SUITES:
        text = (checkout / "test" / suite.file).read_text(encoding="utf-8")
        if suite.file.startswith("distributed/"):
            for old, new in ON_A_CPU.items():
                text = re.sub(old, new, text)
        copied = folder / suite.file
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_text(text, encoding="utf-8")
