#!/usr/bin/env bash
# What only a GPU can show, in parts that cannot stop each other, each with a time limit: 12 minutes in all.
#
#     bash tests/gpu.sh a b c                                         # kernels, training and imagining, planning
#     WEIGHTS=dinov2_vits14.safetensors bash tests/gpu.sh r d [OUT]   # Push-T at full size: recording, and all that follows
#     SMALL=1 bash tests/gpu.sh                                       # all of it in miniature on a CPU, some minutes
#
# Part d leaves OUT/plan.json, OUT/plan.mp4 and OUT/run/log.jsonl. TRAIN (steps), SAMPLES, ITERATIONS, MODEL, COMPILE and
# RECORD (seconds) suit it to what a and b have shown of the machine.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} SMALL=${SMALL:-} WEIGHTS=${WEIGHTS:-} CORES=${CORES:-$(nproc)}
export PYTHONUNBUFFERED=1
limit=1
if [ "$SMALL" ]; then
    limit=3                                                 # times as long as on a GPU
    export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
fi
parts=() OUT=
for word in "$@"; do
    case $word in
        [abcrd]) parts+=("$word") ;;
        *) OUT=$word ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(a b c r d)
OUT=$(realpath -m "${OUT:-${TMPDIR:-/tmp}/pusht}")

within() {      # within SECONDS COMMAND ..: SIGINT at the limit, and SIGKILL 15 seconds later
    local seconds=$1
    shift
    timeout -k 15 -s INT $((seconds * limit)) "$@"
    local code=$?
    [ $code -eq 0 ] || echo "(ended with $code: $*)"
}

kernels() {
    $PYTHON -c "import torch; print('torch', torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'no CUDA device')"
    within 120 $PYTHON -m pytest -q -p no:cacheprovider --durations=5 tests/test_model.py -k cuda
}

imagining() {
    if [ "$SMALL" ]; then
        within 60 $PYTHON tests/bench_model.py --parts=rollout --sizes=plain --rounds=1
    else
        within 130 $PYTHON tests/bench_model.py --device=cuda --limit=100
    fi
}

planning() {
    if [ "$SMALL" ]; then
        within 60 $PYTHON tests/bench_plan.py --tokens=16 --candidates=8 --samples=8 --rounds=1
    else
        within 75 $PYTHON tests/bench_plan.py --device=cuda --tokens=196 --rounds=2
    fi
}

record() {
    # 196 pixels are 14 x 14 tokens; a model step is 5 frames, and only the frames that the model sees are drawn
    local record=${RECORD:-105} size=${SIZE:-196} most=100000 begin=$SECONDS i
    if [ "$SMALL" ]; then
        record=60 size=28 CORES=2 most=6
    fi
    rm -rf "$OUT"
    mkdir -p "$OUT"
    for i in $(seq "$CORES"); do
        OMP_NUM_THREADS=1 timeout -k 15 -s INT "$record" $PYTHON plan.py --record=tests/simulators.py:PushT --policy=script \
            --seed="$i" --steps=60 --episodes=$most --frame_height="$size" --draw_every=5 --out="$OUT/data$i" \
            > "$OUT/record$i.log" 2>&1 &
    done
    wait
    tail -qn 1 "$OUT"/record*.log | head -3
    echo "recorded in $((SECONDS - begin)) s"
}

pusht() {
    local size=${SIZE:-196} train=${TRAIN:-3000} batch=${BATCH:-64} seconds=${SECONDS_TRAIN:-160}
    local model=${MODEL:---size=small --width=384 --heads=6 --layers=8} samples=${SAMPLES:-32} iterations=${ITERATIONS:-2}
    local episodes=${EVAL:-50} encoder=dinov2_vits14 layer=8 channels=64 compile=${COMPILE:-True}
    if [ "$SMALL" ]; then
        size=28 train=12 batch=8 model=--size=nano samples=8 iterations=2 episodes=2 seconds=60
        compile=${COMPILE:-False}
        if [ ! "$WEIGHTS" ]; then
            encoder=pixels layer=-1 channels=0
        fi
    fi
    local begin=$SECONDS i sets=("$OUT"/data*) n
    n=${#sets[@]}

    local same=(--action=action.relative --fps=2 --encoder=$encoder --layer=$layer --frame_height="$size"
                --encoder_path="$WEIGHTS" --cache_dir="$OUT/latents" --state=observation.state)
    if [ "$encoder" != pixels ]; then       # four processes, a quarter of the datasets each
        for i in 0 1 2 3; do
            local some=("${sets[@]:i * n / 4:(i + 1) * n / 4 - i * n / 4}")
            [ ${#some[@]} -eq 0 ] || OMP_NUM_THREADS=2 within 100 $PYTHON data.py --cache=True "${same[@]}" --workers=4 \
                --labelled="$(IFS=,; echo "${some[*]}")" > "$OUT/encode$i.log" 2>&1 &
        done
        wait
        tail -qn 1 "$OUT"/encode*.log
    fi
    echo "encoded in $((SECONDS - begin)) s"

    begin=$SECONDS
    within "$seconds" $PYTHON train.py "${same[@]}" --labelled="$(IFS=,; echo "${sets[*]}")" --unlabelled= --frameskip=1 \
        --objective=direct --channels=$channels $model --batch_size="$batch" --max_steps="$train" --learning_rate=${RATE:-0.001} \
        --warmup=100 --frames=6 --self_forcing=${FORCED:-0.3} --eval_interval=$((train / 2)) --save_interval=$((train / 4 + 1)) \
        --log_interval=$((train / 20 + 1)) --workers="$CORES" --compile="$compile" --policy=True --policy_rate=0.001 --out_dir="$OUT/run" \
        > "$OUT/train.log" 2>&1
    grep -vE '^[a-z_A-Z0-9]+ = ' "$OUT/train.log" | tail -n 30
    echo "trained in $((SECONDS - begin)) s"

    begin=$SECONDS
    within ${SECONDS_EVAL:-130} $PYTHON plan.py --ckpt="$OUT/run/ckpt.safetensors" --env=tests/simulators.py:PushT --episodes="$episodes" \
        --samples="$samples" --proposals=$((samples / 2)) --elites=$((samples / 8 + 1)) --iterations="$iterations" --warm_std=0.3 --state_weight=0.25 --seed=${SEED:-1} \
        --chunk=$((samples * episodes)) --out_dir="$OUT"
    echo "evaluated in $((SECONDS - begin)) s, $SECONDS s in all"
}

for part in "${parts[@]}"; do
    echo "== $part"
    case $part in
        a) kernels ;;
        b) imagining ;;
        c) planning ;;
        r) record ;;
        d) pusht ;;
    esac
done
