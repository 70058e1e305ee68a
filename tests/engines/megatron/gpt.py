"""The tiny GPT that the tests train: through the real entry, or, where the host is too old for it, a stock script."""

from importlib.metadata import version
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "train" / "stock_script.py"
HAS_ENTRY = tuple(map(int, version("megatron-core").split(".")[:2])) >= (0, 19)
if HAS_ENTRY:
    ENTRY = ["-m", "s3_megatron.train.pretrain_gpt", "--rehearsal"]
else:
    ENTRY = ["-m", "s3_megatron.train.run", "--rehearsal", str(SCRIPT)]


def flags(
    *,
    iterations: int,
    optimizer: str = "s3",
    precision: str | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    checkpoints: Path | None = None,
    save_every: int = 4,
    extra: tuple[str, ...] = (),
) -> list[str]:
    """Megatron's flags for 2 layers of width 32 on mock data; dropout off, so that layouts can be compared.

    255 tokens are padded to 256 under every layout. 0.17 counts one more, of 256 made 384 at TP=1 and 512 at TP=2, and
    the losses of the two differed by the logarithm of their quotient.
    """
    lr, decay = ("3e-3", "0.01") if optimizer == "s3" else ("3e-4", "0.1")
    command = [
        *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4"),
        *("--seq-length", "32", "--max-position-embeddings", "32", "--micro-batch-size", "2"),
        *("--global-batch-size", "8", "--train-iters", str(iterations), "--lr-decay-iters", "100"),
        *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "255", "--split", "90,5,5"),
        *("--hidden-dropout", "0", "--attention-dropout", "0", "--seed", "7"),
        *("--eval-interval", "100", "--eval-iters", "1"),
        *("--optimizer", optimizer, "--lr", lr, "--min-lr", "1e-5", "--weight-decay", decay, "--clip-grad", "1.0"),
        *("--lr-decay-style", "cosine", "--log-interval", "1", "--use-distributed-optimizer"),
        *("--tensor-model-parallel-size", str(tensor_parallel)),
        *("--pipeline-model-parallel-size", str(pipeline_parallel)),
        *extra,
    ]
    if precision is not None:
        command.append(f"--{precision}")
    if checkpoints is not None:
        command += ["--save", str(checkpoints), "--load", str(checkpoints), "--save-interval", str(save_every)]
        # The optimizer's state in a form that another tensor- or pipeline-parallel layout can read.
        command += ["--ckpt-format", "torch_dist", "--dist-ckpt-optim-fully-reshardable"]
    return command
