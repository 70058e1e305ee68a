"""The tiny GPT of these tests: 2 layers, width 64, sequence 64, Megatron's default dropout."""

FLAGS = [
    *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"),
    *("--seq-length", "64", "--max-position-embeddings", "64", "--micro-batch-size", "4", "--global-batch-size", "8"),
    *("--lr", "1e-3", "--lr-decay-style", "constant", "--eval-interval", "100", "--eval-iters", "1"),
    *("--log-interval", "1", "--bf16", "--use-distributed-optimizer"),
]
MOCK = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "255", "--split", "90,5,5"]
