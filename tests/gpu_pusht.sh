#!/bin/bash
# Push-T at full size on one GPU, in under 25 minutes: record 5,000 episodes in parallel processes, encode 196 tokens a
# frame, train, evaluate 50 expert goals within twice the expert's steps. Leaves OUT/plan.json and OUT/plan.mp4.
#
#     WEIGHTS=dinov2_vits14.safetensors bash tests/gpu_pusht.sh [OUT]
#
# Everything can be made smaller to try it: EPISODES=8 STEPS=40 SIZE=56 MODEL=nano TRAIN=20 EVAL=2 SAMPLES=16 ...
set -euo pipefail
OUT=$(realpath -m "${1:-pusht}")
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} WEIGHTS=${WEIGHTS:-} CORES=${CORES:-$(nproc)}
EPISODES=${EPISODES:-5000} STEPS=${STEPS:-60} SIZE=${SIZE:-196} MODEL=${MODEL:-tiny} TRAIN=${TRAIN:-12000}
BATCH=${BATCH:-64}
EVAL=${EVAL:-50} SAMPLES=${SAMPLES:-300} ELITES=${ELITES:-30} ITERATIONS=${ITERATIONS:-10}
mkdir -p "$OUT"

begin=$SECONDS
pids=()
for i in $(seq "$CORES"); do
    OMP_NUM_THREADS=1 $PYTHON data.py --record=gym_pusht/PushT-v0 --policy=script --seed="$i" --steps="$STEPS" \
        --episodes=$(((EPISODES + CORES - 1) / CORES)) --frame_height="$SIZE" --out="$OUT/data$i" \
        > "$OUT/record$i.log" 2>&1 &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done       # set -e ends here with the first that failed
echo "recorded in $((SECONDS - begin)) s"

sets=$(for i in $(seq "$CORES"); do printf '%s,' "$OUT/data$i"; done)
same=(--labelled="${sets%,}" --action=action.relative --encoder=dinov2_vits14 --encoder_path="$WEIGHTS" --layer=8
      --frame_height="$SIZE" --cache_dir="$OUT/latents" --store=int8)
begin=$SECONDS
$PYTHON data.py --cache=True "${same[@]}" --workers="$CORES"
echo "encoded in $((SECONDS - begin)) s"

begin=$SECONDS
$PYTHON train.py "${same[@]}" --unlabelled= --frameskip=5 --objective=direct --channels=64 --size="$MODEL" \
    --batch_size="$BATCH" --max_steps="$TRAIN" --learning_rate=0.004 --frames=6 --self_forcing=0.3 \
    --eval_interval=2000 --save_interval=2000 --out_dir="$OUT/run"
echo "trained in $((SECONDS - begin)) s"

begin=$SECONDS
$PYTHON plan.py --ckpt="$OUT/run/ckpt.safetensors" --env=gym_pusht/PushT-v0 --episodes="$EVAL" --samples="$SAMPLES" \
    --elites="$ELITES" --iterations="$ITERATIONS" --warm_std=0.3 --out_dir="$OUT"
echo "evaluated in $((SECONDS - begin)) s, $SECONDS s in all"
