"""What the tests say of each feature, as a table for people."""

import re
from collections import Counter

# A row, and the tests that show it: an expression for "FILE::NAME".
FEATURES = {
    "Megatron": {
        "`--optimizer s3`, its flags and refusals": r"megatron/test_install|test_pretrain.*update_sizes",
        "distributed optimizer: float32, bf16, fp16": r"megatron/.*(_shard|_masters_|buckets|fp16_overf|partitioned)",
        "float32 and 16-bit optimizers, unsharded": r"megatron/.*(fp32_optimizer|float16_optimizer)",
        "one pass over memory": r"megatron/.*(single_pass|threshold)",
        "save and load": r"megatron/.*(save_and_load|legacy|outlives|loading_and)",
        "resume on 1, 2, 4 ranks, TP 2, PP 2": r"megatron/.*every_layout",
        "from Adam": r"megatron/.*[Aa]dams_checkpoint",
        "Adam as without S3": r"megatron/.*adam_is_bit",
        "Megatron-Bridge's hook (a stub calls it)": r"megatron/.*bridge",
        "patched, without a wrapper": r"patch/.*megatron",
    },
    "DeepSpeed": {
        '`{"type": "S3"}` and S3 objects': r"deepspeed/(test_register|.*(lower_case|client_opt|first_line))",
        "ZeRO 0 to 3: float32, bf16, fp16": r"deepspeed/.*(every_stage|float16_un|bfloat16_with|partitioned)",
        "offload, 16-bit masters and states": r"deepspeed/.*(offload_equals|16_bit_masters|half_size)",
        "resume on as many ranks": r"deepspeed/.*resuming",
        "universal checkpoints: other ranks": r"deepspeed/.*(universal_checkpoints_go_on|zero_3_cannot)",
        "from Adam": r"deepspeed/.*an_adam_checkpoint|deepspeed/.*universal_checkpoints_of_adam",
        "transformers.Trainer and accelerate": r"deepspeed/.*(twenty_steps|trainer|accelerate)",
        "patched, without a call": r"patch/.*deepspeed",
    },
}


def rows(columns: dict[str, dict[str, str]]) -> list[list[str]]:
    """Give a row a feature: its name, and a cell a column, made of the outcomes of the column's tests."""
    return [
        [f"{host}: {feature}", *(_cell(outcomes, pattern) for outcomes in columns.values())]
        for host, features in FEATURES.items()
        for feature, pattern in features.items()
    ]


def _cell(outcomes: dict[str, str], pattern: str) -> str:
    """Say how many tests passed; a failure, and a test that does not apply, are named beside it."""
    counts = Counter(outcome for test, outcome in outcomes.items() if re.search(pattern, test))
    parts = [f"{counts['passed']} passed"] if counts["passed"] else []
    parts += [f"{counts[kind]} {kind}" for kind in ("failed", "skipped") if counts[kind]]
    return ", ".join(parts) or "not run"


def markdown(head: list[str], body: list[list[str]]) -> str:
    """Write a table in GitHub's form."""
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
