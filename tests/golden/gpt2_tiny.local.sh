#!/bin/bash
# gpt2_tiny on this machine: 8 GPUs. Made by s3-megatron 0.1.0, whose
# command line it does not need. Run it again, and it goes on from its last checkpoint.
set -euo pipefail
# A run of this machine alone, in a shell on one of a job's nodes, too.
unset "${!SLURM_@}"

run=/shared/s3/runs/gpt2_tiny
attempt=local-$(date +%Y%m%d-%H%M%S)
mkdir -p "$run/attempts/$attempt" "$run/logs/ranks"

export PYTHONUNBUFFERED=1
export PYTHONOPTIMIZE=''
export OMP_NUM_THREADS=1
export S3_RUN_DIR=$run

python=python
train=(
    --num-layers 4
    --hidden-size 192
    --num-attention-heads 6
    --seq-length 128
    --attention-dropout 0
    --hidden-dropout 0
    --max-position-embeddings 128
    --micro-batch-size 2
    --global-batch-size 16
    --train-iters 128
    --lr-decay-style cosine
    --lr-warmup-iters 13
    --clip-grad 1
    --seed 1234
    --eval-interval 64
    --eval-iters 20
    --lr-decay-iters 128
    --optimizer s3
    --lr 0.003
    --min-lr 0.0003
    --weight-decay 0.01
    --s3-beta 0.95
    --s3-p 3
    --bf16
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1
    --context-parallel-size 1
    --use-distributed-optimizer
    --ckpt-format torch_dist
    --transformer-impl local
    --no-persist-layer-norm
    --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion
    --no-rope-fusion
    --mock-data
    --tokenizer-type NullTokenizer
    --vocab-size 4095
    --save-interval 32
    --save-retain-interval 192
    --save "$run"/checkpoints
    --load "$run"/checkpoints
    --data-cache-path "$run"/cache
    --watch-dir "$run"/watch
    --log-interval 1
    --exit-signal-handler
)
exec "$python" -m s3_megatron.jobs.node --run-dir "$run" --attempt "$attempt" \
    --hang-minutes 30.0 --start-minutes 60.0 -- \
    "$python" -m s3_megatron.jobs.node.torchrun --standalone --local-addr=127.0.0.1 \
    --nproc-per-node=8 --max-restarts=0 \
    --role=local_rank --tee=3 --log-dir="$run/logs/ranks" \
    -m s3_megatron.train.pretrain_gpt "${train[@]}"
