#!/usr/bin/env bash
# The lowest versions that requirements.txt allows, of all seven packages: a nightly run, in ten minutes.
#   bash tests/lowest.sh [python]
# It reads what is committed, makes a virtual environment aside, and runs the tests of what touches those packages most.
# numpy 1.24 wants Python 3.10 or 3.11. torch is pinned there; TORCH=2.11.0 bash tests/lowest.sh tries another.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${1:-python3}" -m venv "$folder/venv"
sed "s/>=/==/; s/^torch==.*/torch==${TORCH:-$(sed -n 's/^torch==//p' requirements.txt)}/" requirements.txt > "$folder/lowest.txt"
python="$folder/venv/bin/python"
"$python" -m pip install -q -r "$folder/lowest.txt" pytest hypothesis
"$python" -m pip list
git clone -q . "$folder/goaldream"
cd "$folder/goaldream"
export OMP_NUM_THREADS=1
"$python" -m pytest -q -x tests/test_data.py tests/test_decode.py tests/test_fuzz.py -k 'not gym'
cd "$folder"
"$python" goaldream/train.py --max_steps=20 --eval_interval=20 --eval_clips=4 --batch_size=8
"$python" goaldream/decode.py --rows=1 --steps=4
"$python" goaldream/plan.py --episodes=2 --blind_episodes=1 --samples=8 --elites=2 --iterations=1
