#!/bin/bash
# gpt2_7b on slurm: 4 nodes, 32 ranks. Made by s3-megatron 0.1.0, whose command line it does not
# need: make the folder of --output, then `sbatch THIS_FILE`. The package must be in the nodes' environment. See docs/jobs.md.
#SBATCH --job-name=gpt2_7b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive --mem=0
#SBATCH --partition=gpu
#SBATCH --time=1440
# To the ranks, not to this shell, should they not have ended in order by then: they save and end.
#SBATCH --signal=TERM@300
#SBATCH --requeue --open-mode=append
#SBATCH --output="/shared/s3/runs/gpt2_7b/logs/job.log"

set -euo pipefail
trap '' TERM # a warning, or pre-emption, is for the ranks; this shell decides afterwards

run=/shared/s3/runs/gpt2_7b
attempt=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
mkdir -p "$run/attempts/$attempt" "$run/logs/ranks"

say() { printf '%s %s\n' "$(date '+%F %T')" "$*"; }

# finish CODE REASON: no start follows this one.
finish() {
    say "the end: $2"
    if [[ ! -e $run/FINISHED && ! -e $run/ENDED ]]; then
        printf '%s\n' "$2" >"$run/ENDED.new"
        mv "$run/ENDED.new" "$run/ENDED"
    fi
    exit "$1"
}

# patiently COMMAND...: again while it fails, for a quarter of an hour: SLURM's controller is restarted now and then.
patiently() {
    local end=$((SECONDS + 900))
    until "$@"; do
        ((SECONDS < end)) || return 1
        say "failed, again in 10 s: $*" >&2
        sleep 10
    done
}

# ours FIELD: what squeue prints of this job. A failure is the controller's: the job is there while this script runs.
ours() {
    patiently squeue --noheader --jobs="$SLURM_JOB_ID" --format="$1"
}

no_answer() {
    finish 1 "SLURM's controller has not answered for a quarter of an hour; start again with s3-megatron resume"
}

# go_on REASON: another start, without the nodes that a start of this run found bad.
go_on() {
    say "$1"
    local bad
    bad=$(find "$run/attempts" -name bad_nodes -exec cut -f1 {} + | sort -u | paste -sd,)
    # After scancel, and at the time limit, it is COMPLETING: a requeue would bring it back against its owner's will.
    # SIGNALING is a running job with a signal under way, such as the one that made it save.
    local state before
    state=$(ours %T) || no_answer
    if [[ $state != RUNNING && $state != SIGNALING ]]; then
        say "not requeued: the job is ${state:-gone}"
        exit 1
    fi
    if [[ -z $bad ]]; then
        patiently scontrol requeue "$SLURM_JOB_ID" || no_answer
        say 'requeued'
        exit 1
    fi
    before=$(ours %x) || no_answer # nodes that it may not have already
    until sbatch --test-only --partition="$SLURM_JOB_PARTITION" --nodes="$SLURM_NNODES" \
        --exclude="${before:+$before,}$bad" --wrap=true; do
        # It answers, so the refusal is its own.
        ! squeue --noheader --jobs="$SLURM_JOB_ID" >/dev/null || finish 1 "too few nodes are left without $bad"
        ours %T >/dev/null || no_answer
    done
    say "requeued without $bad"
    patiently scontrol requeuehold "$SLURM_JOB_ID" || no_answer # a running job's list cannot be changed
    patiently scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${before:+$before,}$bad" || no_answer
    patiently scontrol release "$SLURM_JOB_ID" || no_answer
    exit 1
}

# saved_iteration: that of the newest checkpoint, by Megatron's or DeepSpeed's pointer; 0 without one.
saved_iteration() {
    local pointer number=0
    for pointer in "$run/checkpoints/latest_checkpointed_iteration.txt" "$run/checkpoints/latest"; do
        [[ ! -s $pointer ]] || number=$(tr -dc 0-9 <"$pointer")
    done
    echo $((10#${number:-0}))
}

# on_every_node COMMAND...: one task a node; the first that fails ends the others.
on_every_node() {
    # --export: with --export=NONE for sbatch, or a site's SBATCH_EXPORT, srun would hand on nothing of what is set here.
    srun --export=ALL --nodes="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 \
        --output=/shared/s3/runs/gpt2_7b/logs/%N.log --open-mode=append \
        "$@"
}

[[ ! -e $run/FINISHED ]] || finish 0 'this run had finished already'
[[ ! -e $run/ENDED ]] || finish 2 "this run had ended already: $(<"$run/ENDED")"

# Two jobs in one run folder would train over each other. What SLURM knows to be over has left its lease behind. Of
# another cluster's jobs it knows nothing: the agent then waits for the lease.
holder=- cluster='' checkpoints=$run/checkpoints
[[ ! -s $checkpoints/holder ]] || read -r holder _ _ _ _ cluster <"$checkpoints/holder"
holder=${holder%-*} # of JOB-RESTART
if [[ $holder =~ ^[0-9]+$ && $holder != "$SLURM_JOB_ID" && ${cluster:-${SLURM_CLUSTER_NAME-}} == "${SLURM_CLUSTER_NAME-}" ]]; then
    alive=$(patiently squeue --noheader --states=RUNNING,SUSPENDED,STOPPED,SIGNALING --format=%A) || alive=$holder
    if grep -qx "$holder" <<<"$alive"; then
        say "refused: job $(<"$checkpoints/holder") has this run folder"
        exit 2
    fi
    rm -f "$checkpoints/lease"
fi

# The chain's memory: starts so far, the checkpoint that the last one began with, how many starts have brought none.
saved=$(saved_iteration)
starts=0 before=-1 idle=0 last=none
[[ ! -s $run/chain ]] || read -r starts before idle last <"$run/chain"
if ((saved > before)); then
    idle=0
elif ! grep -qs '"verdict": "stopped"' "$run/attempts/$last"/*.json && [[ ! -s $run/attempts/$last/bad_nodes ]]; then
    idle=$((idle + 1)) # neither asked to stop nor on a bad node
fi
printf '%s\n' "$((starts + 1)) $saved $idle $attempt" >"$run/chain.new"
mv "$run/chain.new" "$run/chain"
((idle < 2)) || finish 1 "two starts in a row brought no checkpoint after that of iteration $saved: see $run/logs"
((starts <= 20)) || finish 1 'restarted 20 times, which is restart.max_restarts'

minutes=$((1440 - 10 - SECONDS / 60)) # until training saves and ends, before the time limit

mapfile -t nodes < <(patiently scontrol show hostnames "$SLURM_JOB_NODELIST")
((${#nodes[@]} == SLURM_NNODES)) || finish 1 "scontrol names ${#nodes[@]} of $SLURM_NNODES nodes: there is no rendezvous"
say "start $((starts + 1)) on ${nodes[*]}, from iteration $saved"

export PYTHONUNBUFFERED=1
export PYTHONOPTIMIZE=''
export OMP_NUM_THREADS=1
export CUDA_DEVICE_MAX_CONNECTIONS=1
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# Compiled kernels stay on the node: a shared folder would be a lock that all ranks wait for.
export TRITON_CACHE_DIR=/tmp/s3-megatron-$UID/triton
export TORCHINDUCTOR_CACHE_DIR=/tmp/s3-megatron-$UID/inductor
export S3_RUN_DIR=$run

python=/shared/s3/venv/bin/python
# Not torchrun itself: this one leaves SIGTERM to the ranks, and writes down which of them failed first.
elastic=("$python" -m s3_megatron.jobs.node.torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=8
    --rdzv-backend=c10d --rdzv-id="$attempt" --rdzv-conf=join_timeout=3600 --max-restarts=0)

# free PORT: nothing on this machine, the first node and so torchrun's host, listens there.
free() {
    ! grep -qs "^ *[0-9]*: [0-9A-F]*:$(printf %04X "$1") [0-9A-F]*:0000 0A " /proc/net/tcp /proc/net/tcp6
}

# Below 32768, where Linux begins to give ports away; two jobs that share a node, and two starts of one, begin elsewhere.
port=$((20000 + (SLURM_JOB_ID + starts * 997) % 6000 * 2)) tries=0
until free "$port" && free $((port + 1)); do
    ((++tries < 100)) || go_on "no free port from 20000 to 31999 on ${nodes[0]}"
    port=$((20000 + (port - 19998) % 12000))
done

on_every_node "$python" -m s3_megatron.jobs.node.health --run-dir "$run" --attempt "$attempt" \
    --gpus 8 --scratch /tmp --min-free-gib 20.0 \
    --min-free-inodes 10000 --max-clock-skew 5.0 || go_on 'a node is not fit for training'
on_every_node timeout 900 "${elastic[@]}" --rdzv-endpoint="${nodes[0]}:$((port + 1))" \
    -m s3_megatron.jobs.node.allreduce --run-dir "$run" --attempt "$attempt" --floor-gbps 0.0 \
    --max-clock-skew 5.0 || go_on 'the all-reduce before training failed'

train=(
    --num-layers 32
    --hidden-size 4096
    --num-attention-heads 32
    --seq-length 2048
    --attention-dropout 0
    --hidden-dropout 0
    --max-position-embeddings 2048
    --micro-batch-size 4
    --global-batch-size 1024
    --train-iters 50000
    --lr-decay-style cosine
    --lr-warmup-iters 2000
    --clip-grad 1
    --seed 1234
    --eval-interval 1000
    --eval-iters 10
    --lr-decay-iters 50000
    --optimizer s3
    --lr 0.003
    --min-lr 0.0003
    --weight-decay 0.01
    --s3-beta 0.95
    --s3-p 3
    --bf16
    --tensor-model-parallel-size 4
    --pipeline-model-parallel-size 1
    --context-parallel-size 1
    --use-distributed-optimizer
    --ckpt-format torch_dist
    --transformer-impl local
    --no-persist-layer-norm
    --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion
    --no-rope-fusion
    --train-data-path /shared/s3/data/refinedweb/train_text_document
    --valid-data-path /shared/s3/data/refinedweb/validation_text_document
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model gpt2
    --save-interval 200
    --save-retain-interval 5000
    --save "$run"/checkpoints
    --load "$run"/checkpoints
    --data-cache-path "$run"/cache
    --watch-dir "$run"/watch
    --log-interval 5
    --exit-signal-handler
    --overlap-grad-reduce
    --overlap-param-gather
    --exit-duration-in-mins "$minutes"
)
status=0
on_every_node "$python" -m s3_megatron.jobs.node --run-dir "$run" --attempt "$attempt" \
    --hang-minutes 30.0 --start-minutes 60.0 -- \
    "${elastic[@]}" --rdzv-endpoint="${nodes[0]}:$port" --role=local_rank --tee=3 --log-dir="$run/logs/ranks" \
    -m s3_megatron.train.pretrain_gpt "${train[@]}" || status=$?

[[ ! -e $run/FINISHED ]] || finish 0 'training is complete'
[[ ! -e $run/ENDED ]] || finish 2 "$(<"$run/ENDED")"
if ((status == 2)); then
    say 'refused: another run has this run folder'
    exit 2
fi
go_on "training is not complete (srun's exit code: $status)"
