"""Odd machines: text becomes tokens and S3 trains an iteration on them wherever a program of its kind can run.

Each machine is this one in namespaces of its own (unshare), so it takes root. docs/machines.md is the table of them.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE_PACKAGES = sysconfig.get_path("purelib")
pytestmark = [
    pytest.mark.machines,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts and user ids of its own take root"),
]

# The commands of a first run, each as a person types it; a step by AdamW, and S3's without the compiled kernel.
COMMANDS = """
set -eu
"$python" "$folder/step.py" >"$folder/step.log" 2>&1
"$python" -m s3_megatron.cli data prepare text.txt --output tokens --train-tokenizer --vocab-size 300
"$python" -m s3_megatron.cli launch gpt2_tiny --name first --set precision=fp32 --set schedule.train_iters=1 \
    --set schedule.lr_warmup_iters=0 --set schedule.eval_iters=0 --set schedule.global_batch_size=4 \
    --set model.num_layers=1 --set model.seq_length=32 --set model.vocab_size=512 --set data.mock=false \
    --set data.train=tokens --set data.validation=tokens --set data.tokenizer=sentencepiece \
    --set data.tokenizer_model=tokens.model
"$python" -m s3_megatron.cli status runs/first
"$python" -m s3_megatron.cli runs
"""
STEP = """
import torch
from pathlib import Path
from s3_megatron.kernels.cpu import library
library.INSTALLED = Path("/nowhere")  # as installed without a compiler
from s3_megatron.optim import S3
for kind in (torch.optim.AdamW, S3):
    p = torch.nn.Parameter(torch.ones(64))
    p.grad = torch.ones(64)
    kind([p], lr=1e-2, weight_decay=0.1).step()
    assert 0.98 < p[0].item() < 1, (kind, p[0].item())
"""


@dataclass(frozen=True)
class Machine:
    """What is odd: commands before ours, unshare's options, environment; ``says`` is what the output must hold."""

    setup: str = ""
    unshare: tuple[str, ...] = ("--mount",)
    environment: Mapping[str, str | None] = field(default_factory=dict)
    folder: str = "work"
    says: tuple[str, ...] = ()
    runs_code: int = 0  # of `s3-megatron runs`, which comes last


READ_ONLY = """
for place in "$site" "$root"; do
    mount --bind "$place" "$place"
    mount -o remount,bind,ro "$place"
done
"""
NOEXEC = """
mount --bind /tmp /tmp
mount -o remount,bind,noexec /tmp
"""
# The loopback has 127.0.0.1, as every Linux gives it; the network has IPv6 alone.
IPV6 = """
ip link set lo up
ip -6 addr add fd00::9/128 dev lo nodad
hostname six.example
printf '::1 localhost\\n127.0.0.1 localhost\\nfd00::9 six.example\\n' >"$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts
"""
NO_LIST = "is missing in the list of s3-megatron runs"
# Several oddities to a machine, where one cannot hide the other: a start of ranks takes most of the time.
MACHINES = {
    "no HOME, a user id without a name": Machine(
        unshare=("--user", "--map-user=12345", "--map-group=12345"),
        environment={"HOME": None, "USER": None, "LOGNAME": None},
        says=(NO_LIST, "set HOME, or XDG_STATE_HOME"),
        runs_code=2,
    ),
    "HOME cannot be written, TMPDIR is not there, umask 077, another zone": Machine(
        setup="umask 077",
        environment={"HOME": "/proc/none", "TMPDIR": "/nowhere/tmp", "TZ": "Asia/Kathmandu"},
        says=(NO_LIST,),
    ),
    "XDG folders cannot be written, the own name does not resolve": Machine(
        setup="hostname no-such-host.invalid",
        unshare=("--mount", "--uts"),
        environment={"XDG_STATE_HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none"},
        says=(NO_LIST, "name another folder in S3_MEGATRON_CACHE"),
    ),
    "ASCII without Python's UTF-8 mode, a folder with spaces and umlauts, relative XDG folders": Machine(
        environment={
            "LC_ALL": "C",
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
            "XDG_STATE_HOME": "x",
            "XDG_CACHE_HOME": "x",
        },
        folder="Größe und „mehr“",
    ),
    "/tmp mounted noexec, LC_ALL=C, IPv6 only": Machine(
        setup=IPV6 + NOEXEC,
        unshare=("--mount", "--net", "--uts"),
        environment={"XDG_CACHE_HOME": "/tmp/s3-megatron-noexec", "LC_ALL": "C"},
        says=("mounted noexec?",),
    ),
    "site-packages and the checkout read-only, no network but the loopback": Machine(
        setup=READ_ONLY + "ip link set lo up", unshare=("--mount", "--net")
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_a_first_run(name: str, tmp_path: Path):
    machine = MACHINES[name]
    folder = tmp_path / machine.folder
    folder.mkdir()
    tmp_path.chmod(0o777)
    folder.chmod(0o777)
    (folder / "text.txt").write_text("Grüße aus Köln, sagt der Bär. " * 400, encoding="utf-8")
    (folder / "step.py").write_text(STEP)
    home = tmp_path / "home"
    home.mkdir(mode=0o777)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "S3_"))}
    environment |= {"HOME": str(home), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"CXX": f"bash {compiler(tmp_path)}", "python": sys.executable, "folder": str(folder)}
    environment |= {"site": SITE_PACKAGES, "root": str(ROOT)} | machine.environment
    done = subprocess.run(
        ["unshare", *machine.unshare, "bash", "-euc", f"{machine.setup}\n{COMMANDS}"],
        env={key: value for key, value in environment.items() if value is not None},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=280,
    )
    shutil.rmtree("/tmp/s3-megatron-noexec", ignore_errors=True)
    output = done.stdout.decode(errors="replace") + (folder / "step.log").read_text(errors="replace")
    assert "Traceback" not in output, output[-3000:]
    assert (folder / "runs/first/FINISHED").exists(), output[-3000:]
    assert done.returncode == machine.runs_code, output[-3000:]
    for text in machine.says:
        assert text in output, output[-3000:]


def compiler(folder: Path) -> Path:
    """A compiler that hands out the installed library: the real one takes 40 CPU seconds, fifteen times over."""
    from s3_megatron.kernels.cpu import library

    script = folder / "compiler"
    script.write_text(
        "#!/bin/bash\nout=${*: -1}\n"
        f'[[ " $* " == *" -shared "* ]] && exec cp {library.load()._name} "$out"\nexec touch "$out"\n'
    )
    script.chmod(0o755)
    return script
