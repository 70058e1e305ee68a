"""What a user gets wrong: one line that names it, before any rank has built anything."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import sentencepiece

from s3_megatron import rehearsal
from s3_megatron.checkpoints.lease import held
from s3_megatron.errors import S3Error
from s3_megatron.train import entry, mistakes, numbers
from tests.launcher import torchrun
from tests.train import refusals
from tests.train.tiny import FLAGS, MOCK


@pytest.fixture(scope="module")
def gpt() -> Iterator[ModuleType]:
    """The entry's module in this process, on one rehearsed rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        entry.prepare([], rehearse=True)
        from s3_megatron.engines.megatron import uninstall
        from s3_megatron.train import gpt

        yield gpt
        uninstall()
        rehearsal.deactivate()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 60 tokens."""
    prefix = tmp_path_factory.mktemp("tokenizer") / "tiny"
    text = [" ".join(sys.stdlib_module_names)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(prefix), vocab_size=60, minloglevel=2
    )
    return prefix.with_suffix(".model")


def refusal(gpt: ModuleType, monkeypatch: pytest.MonkeyPatch, *flags: str) -> str:
    return refusals.refusal(gpt.train, monkeypatch, *FLAGS, "--global-batch-size", "4", "--train-iters", "1", *flags)


def test_a_folder_of_deepspeeds_checkpoints_is_not_trained_over(
    gpt: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Megatron found none of its own there, and started from random weights."""
    (tmp_path / "latest").write_text("iter_0000004")
    assert "holds DeepSpeed's checkpoints" in refusal(gpt, monkeypatch, *MOCK, "--load", str(tmp_path))


def test_a_folder_that_another_run_saves_to_is_refused(
    gpt: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both trained: a bare torchrun has no node agent that would look."""
    monkeypatch.delenv("S3_RUN_DIR", raising=False)
    with held(tmp_path, print):
        line = refusal(gpt, monkeypatch, *MOCK, "--save", str(tmp_path), "--save-interval", "1", "--lr", "1e-3")
    assert line.startswith(f"{tmp_path} is held by process {os.getpid()} on ")


def test_a_checkpoint_to_load_that_is_not_there_is_named(
    gpt: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a mistyped --load training began from random weights; --ckpt-step 2 was a FileNotFoundError."""
    line = refusal(gpt, monkeypatch, *MOCK, "--load", str(tmp_path / "typo"))
    assert f"--load {tmp_path / 'typo'} is not there" in line
    (tmp_path / "iter_0000003").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    line = refusal(gpt, monkeypatch, *MOCK, "--load", str(tmp_path), "--ckpt-step", "2")
    assert f"{tmp_path} has no checkpoint of iteration 2 (--ckpt-step), but of 3" in line


def test_a_folder_to_save_to_may_be_new(tmp_path: Path) -> None:
    """A job's first start has one folder for --save and --load, which is not there yet."""
    new = str(tmp_path / "new")
    mistakes.check_checkpoint(SimpleNamespace(load=new, save=f"{new}/", ckpt_step=None))
    mistakes.check_checkpoint(SimpleNamespace(load=None, save=None, ckpt_step=None))


def test_data_files_that_are_not_there_are_named(
    gpt: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "half.bin").touch()
    data = ["0.5", str(tmp_path / "none"), "0.5", str(tmp_path / "half")]
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "255"]
    for flag in ("--data-path", "--train-data-path"):
        line = refusal(gpt, monkeypatch, *null, "--split", "1,0,0", flag, *data)
        for missing in ("none.bin", "none.idx", "half.idx"):
            assert str(tmp_path / missing) in line
        assert "half.bin" not in line

    line = refusal(gpt, monkeypatch, *null, "--data-args-path", str(tmp_path / "list.txt"))
    assert f"--data-args-path {tmp_path / 'list.txt'} is not a file" in line
    assert "--mock-data" in refusal(gpt, monkeypatch, *null), "no data at all"


def test_a_tokenizer_that_is_not_there_is_named(
    gpt: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    piece = ["--mock-data", "--tokenizer-type", "GPTSentencePieceTokenizer"]
    model = str(tmp_path / "none.model")
    line = refusal(gpt, monkeypatch, *piece, "--tokenizer-model", model)
    assert f"--tokenizer-model {model} is not a file" in line
    assert "give --tokenizer-model" in refusal(gpt, monkeypatch, *piece)
    words = ["--mock-data", "--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", model]
    assert f"--vocab-file {model} is not a file" in refusal(gpt, monkeypatch, *words)


@pytest.mark.parametrize("flag", ["--vocab-size", "--padded-vocab-size"])
def test_a_vocabulary_larger_than_the_models_is_refused(
    gpt: ModuleType, monkeypatch: pytest.MonkeyPatch, tokenizer: Path, flag: str
) -> None:
    """Megatron 0.19.2 ignores a small --vocab-size and, with a small --padded-vocab-size, trains until a token is out
    of range."""
    model = ["--tokenizer-type", "GPTSentencePieceTokenizer", "--tokenizer-model", str(tokenizer)]
    line = refusal(gpt, monkeypatch, "--mock-data", *model, flag, "59")
    assert f"({tokenizer}) has 60 tokens, more than {flag} 59" in line
    assert "at least 60" in line


@pytest.mark.parametrize("flag", ["--fim-data", "--freeze-all-layers"])
def test_flags_of_other_scripts_are_refused(gpt: ModuleType, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    """With --freeze-all-layers every layer was trained: megatron-core 0.19 freezes in another function."""
    line = refusal(gpt, monkeypatch, *MOCK, flag)
    assert line.startswith(f"{flag} is not for this script")
    assert "s3_megatron.train.run" in line


@pytest.mark.parametrize(
    ("flags", "ranks", "line"),
    [
        ("--hidden-size 66", 1, "--hidden-size 66 is not a multiple of 4 (--num-attention-heads): make it 68"),
        ("--tensor-model-parallel-size 3", 3, "--num-attention-heads 4 is not a multiple of 3 (--tensor-model-para"),
        ("--group-query-attention --num-query-groups 3", 1, "4 is not a multiple of 3 (--num-query-groups)"),
        ("--ffn-hidden-size 33 --tensor-model-parallel-size 2", 2, "--ffn-hidden-size 33 is not a multiple of 2"),
        ("--num-layers 3 --pipeline-model-parallel-size 2", 2, "--num-layers 3 is not a multiple of 2 (--pipeline"),
        ("--seq-length 62 --context-parallel-size 2", 2, "62 is not a multiple of 4 (2 x --context-parallel-size)"),
        ("--tensor-model-parallel-size 2", 3, "3 ranks are not a multiple of --tensor-model-parallel-size 2 x "),
        ("--global-batch-size 5", 2, "--micro-batch-size 4 x 2 data-parallel ranks = 8: make it 8, or"),
        ("--fp16", 1, "--fp16 and --bf16 are both given"),
        ("--seed 0 --log-interval 0 --num-layers 0", 1, "--num-layers 0: Input should be greater than or equal to 1; "),
        ("--tensor-model-parallel-size 0", 1, "--tensor-model-parallel-size 0: Input should be greater"),
        ("--lr nan", 1, "--lr nan: Input should be a finite number"),
        ("--min-lr 1", 1, "--min-lr 1.0 is above --lr 0.001"),
        ("--lr-warmup-iters 4 --lr-decay-iters 4", 1, "--lr-warmup-iters 4 is not below --lr-decay-iters 4: make it "),
        ("--train-samples 8", 1, "--train-iters 1 and --train-samples 8 both give the length"),
        ("--save new", 1, "--save new needs --save-interval N"),
        ("--save-interval 2", 1, "--save-interval 2 saves nothing without a folder: give --save"),
        ("--save new --save-interval 2 --save-retain-interval 3", 1, "--save-retain-interval 3 is not a multiple of "),
        ("--ckpt-step 3", 1, "--ckpt-step 3 loads nothing without a folder: give --load"),
        ("--tokenizer-type GPT2BPETokenizer", 1, "needs two files: give --vocab-file FILE and --merge-file FILE"),
        ("--tokenizer-type HuggingFaceTokenizer", 1, "needs a name or a folder: give --tokenizer-model"),
        ("--vocab-size 0", 1, "needs the number of tokens: give --vocab-size N"),
    ],
)
def test_numbers_that_do_not_go_together_are_named(
    gpt: ModuleType, monkeypatch: pytest.MonkeyPatch, flags: str, ranks: int, line: str
) -> None:
    """Megatron's answers were "assert args.hidden_size % args.num_attention_heads == 0", a ZeroDivisionError, a
    traceback once model and data were built, or none: --save-interval without --save trained and saved nothing."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setattr(mistakes, "find_spec", lambda _: None)  # wget, with which Megatron fetches GPT-2's files
    assert line in refusal(gpt, monkeypatch, *MOCK, *flags.split())


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ("--decrease-batch-size-if-needed --global-batch-size 5", 2),
        ("--global-batch-size 9 --rampup-batch-size 4 4 8", 2),
        ("--num-layers 3 --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1", 2),
        ("--hidden-size 66 --kv-channels 16", 1),
        ("--use-checkpoint-args --hidden-size 66 --load old", 3),
        ("--lr-warmup-iters 4 --lr-decay-iters 5 --train-iters 3", 1),
        ("--min-lr 1e-3", 1),
        ("--clip-grad 0 --eval-iters 0 --weight-decay 0 --hidden-dropout 0", 1),
        ("--skip-train --train-samples 8", 1),
    ],
)
def test_numbers_that_megatron_takes_are_not_refused(
    gpt: ModuleType, monkeypatch: pytest.MonkeyPatch, flags: str, ranks: int
) -> None:
    """Where Megatron rounds a batch, splits unevenly or takes a checkpoint's shape, nothing has to divide."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    given = [*FLAGS, "--global-batch-size", "4", "--train-iters", "5", *MOCK, *flags.split()]
    monkeypatch.setattr("sys.argv", ["entry", *given])
    numbers.check(gpt.parse_args())


def test_what_megatron_refuses_with_the_model_is_one_line(gpt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a traceback and exit code 1, which a job tries again."""
    line = refusal(gpt, monkeypatch, *MOCK, "--recompute-granularity", "full")
    assert line.startswith("Megatron refuses the flags: ") and "recompute_method must be" in line


@pytest.mark.parametrize(
    "flags",
    [
        ("--lr-decay-style", "WSD"),
        ("--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"),
        ("--weight-decay-incr-style", "linear", "--start-weight-decay", "0.1", "--end-weight-decay", "0.01"),
    ],
    ids=lambda flags: flags[0],
)
def test_a_schedule_that_cannot_be_is_refused_before_anything_is_built(
    gpt: ModuleType, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    """Megatron asserts when it builds the scheduler, after model and data: ``check`` passed, and every start failed."""
    rates = ("--lr", "1e-3", "--min-lr", "0", "--lr-decay-iters", "1", "--lr-warmup-iters", "0")
    assert "Megatron refuses the flags: " in refusal(gpt, monkeypatch, *MOCK, *rates, *flags)


@pytest.mark.parametrize(("flag", "said"), [("--lr", "give the peak rate"), ("--train-iters", "or --train-samples")])
def test_a_flag_that_every_run_needs_is_named(
    gpt: ModuleType, monkeypatch: pytest.MonkeyPatch, flag: str, said: str
) -> None:
    """Without --lr Megatron builds model and data, and ends in float(None); so it did without a length."""
    given = [*FLAGS, *MOCK, "--train-iters", "1"]
    where = given.index(flag)
    line = refusals.refusal(gpt.train, monkeypatch, *given[:where], *given[where + 2 :])
    assert line.startswith(f"{flag} is missing") and said in line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--optimizer", "s3", "--adam-beta2", "0.95", "--softsignum-beta", "0.5"), "--softsignum-beta, --adam-beta2"),
        (("--optimizer", "s3", "--adam-beta2", "0.999", "--s3-p", "2"), ""),
        (("--optimizer", "adam", "--adam-beta2", "0.95", "--s3-p", "2"), "--s3-p"),
        (("--optimizer", "adam", "--adam-beta2", "0.95"), ""),
        (("--optimizer", "softmuon", "--softmuon-soft-start", "0", "--s3-p", "2", "--adam-eps", "1"), "--adam-eps"),
        (
            (
                *("--optimizer", "softmuon", "--softmuon-soft-start", "0", "--softmuon-scalar-optimizer", "adam"),
                *("--s3-p", "2", "--adam-eps", "1"),
            ),
            "--s3-p",
        ),
    ],
)
def test_flags_of_an_optimizer_that_is_not_used_are_named(
    gpt: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    flags: tuple[str, ...],
    named: str,
) -> None:
    """Whoever turned --optimizer s3 on in a command for Adam kept --adam-beta2 0.95, which did nothing, in silence."""
    refusal(gpt, monkeypatch, *MOCK, *flags, "--lr-decay-style", "WSD")  # found after the flags are validated
    lines = [record.getMessage() for record in caplog.records if "without effect on" in record.getMessage()]
    assert lines == ([f"of another optimizer, and without effect on --optimizer {flags[1]}: {named}"] if named else [])


def test_the_engines_refusals_arrive_as_they_are(gpt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--s3-p" in refusal(gpt, monkeypatch, *MOCK, "--optimizer", "s3", "--s3-p", "0.5")


def test_a_script_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from s3_megatron.train import run

    monkeypatch.setattr(sys, "argv", ["run", "--rehearsal", "nowhere.py", "--lr", "1"])
    with pytest.raises(SystemExit) as stop:
        run.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("s3_megatron: error: nowhere.py is not a file")
    assert error.count("\n") == 1


@pytest.mark.distributed
def test_an_unknown_flag_ends_every_rank_with_one_line() -> None:
    """Megatron's own answer is its usage, hundreds of lines from every rank."""
    run = torchrun(
        ["-m", "s3_megatron.train.pretrain_gpt", "--rehearsal", *FLAGS, "--lerning-rate", "1"], 2, timeout=280
    )
    assert run.returncode != 0
    assert run.stderr.count("s3_megatron: error: unrecognized arguments: --lerning-rate 1") == 1
    assert "usage:" not in run.stderr
    assert "exitcode  : 2" in run.stderr, "torchrun's summary of the rank that ended first"
    assert "REHEARSAL" in run.stderr


LONELY = """
import torch.distributed as dist
from s3_megatron.errors import S3Error
from s3_megatron.train.entry import one_line_errors
with one_line_errors():
    dist.init_process_group("gloo")
    dist.barrier()
    if dist.get_rank() == 1:
        raise S3Error("seen by rank 1 alone")
    dist.barrier()
"""


@pytest.mark.distributed
def test_a_mistake_that_rank_1_alone_sees_is_reported_and_no_rank_hangs(tmp_path: Path) -> None:
    """The last rank alone writes metrics; its mistake must not be lost because rank 0 is the one that prints."""
    script = tmp_path / "lonely.py"
    script.write_text(LONELY)
    run = torchrun([str(script)], nproc=2, timeout=280)
    assert run.returncode != 0
    assert run.stderr.count("s3_megatron: error: seen by rank 1 alone") == 1
    assert "exitcode  : 2" in run.stderr
    assert 'raise S3Error("seen' not in run.stderr, "torchrun's summary had the traceback of a mistake, of every rank"


def test_a_mistake_that_rank_0_ended_of_first_keeps_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where srun starts the ranks, rank 0 has the store: the others ended in 'Connection reset by peer', code 1."""
    import torch.distributed as dist

    class Store:
        def add(self, key: str, amount: int) -> int:
            raise dist.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", Store)
    with pytest.raises(SystemExit) as stop, entry.one_line_errors():
        raise S3Error("a mistake")
    assert stop.value.code == 2
    assert not capsys.readouterr().err


def test_too_little_data_and_a_stale_cache_are_named(
    gpt: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Megatron's index builder counts for ever where a split has no document, and every other rank waits for it."""
    from s3_megatron.data import writer

    def dataset(documents: int) -> None:
        with writer.new_dataset(tmp_path / "a", 255) as builder:
            for _ in range(documents):
                builder.add_document([5] * 200, [200])

    dataset(10)
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "255", "--data-path", str(tmp_path / "a")]
    assert "split valid of" in refusal(gpt, monkeypatch, *flags)
    assert "split test of" in refusal(gpt, monkeypatch, *flags, "--split", "60,40,0.1", "--eval-iters", "0")
    assert "has no validation data" in refusal(gpt, monkeypatch, *flags, "--split", "100,0,0")
    per_split = [*flags[:4], "--train-data-path", str(tmp_path / "a")]
    assert "has no validation data" in refusal(gpt, monkeypatch, *per_split)
    assert "has no validation data" in refusal(gpt, monkeypatch, *per_split, "--full-validation")
