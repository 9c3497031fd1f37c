"""
Long runs: what grows, and what becomes slower. Training that decodes video with workers, rollouts, plans, and
plan.py --watch; of each process and its children memory, open files, threads and speed.

    python tests/soak.py                    # 30 minutes of training, then as long again for the rest, for RESULTS.md
    python tests/soak.py --minutes=0.5 --rollouts=60 --plans=20 --pictures=20       # in miniature

`early` is the second thirtieth of a run (of half an hour the second minute), `end` its last; the slope is of all that
follows the first fifteenth.
"""
import glob
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402, from the root

import numpy as np
import torch

# --------------------------------------------------------------------------------------------------
minutes = 30.0          # of training
rollouts = 10000
plans = 1000
pictures = 2000         # that arrive in a watched folder
part = ''               # rollouts or plans: run here what is measured from outside
config = data.override(globals(), sys.argv[1:])
# --------------------------------------------------------------------------------------------------
SMALL = ('--frames=4', '--width=64', '--layers=4', '--heads=2', '--kv_heads=1', '--batch_size=8', '--eval_clips=8',
         '--device=cpu', '--dtype=float32')
SEARCH = dict(samples=16, elites=4, iterations=2, horizon=3, device='cpu', dtype='float32')


def family(pid):
    """A process and all that came from it."""
    out = [pid]
    for path in glob.glob(f'/proc/{pid}/task/*/children'):
        try:
            for child in Path(path).read_text().split():
                out += family(child)
        except OSError:
            pass        # it has just ended
    return out


def state(pid):
    """[MB of memory, each page counted once; open files; threads] of a process and its children."""
    total = np.zeros(3)
    for p in family(pid):
        try:
            pss = re.search(r'Pss: *(\d+)', Path(f'/proc/{p}/smaps_rollup').read_text())[1]
            total += int(pss) / 1e3, len(os.listdir(f'/proc/{p}/fd')), len(os.listdir(f'/proc/{p}/task'))
        except (OSError, TypeError):
            pass        # it has just ended
    return total


def measure(name, command, done, all_of=math.inf, limit=math.inf, feed=None):
    """Watch a command until it has done() all_of its things, or for `limit` minutes; print a row of the table."""
    samples = []
    begun = time.monotonic()
    child = subprocess.Popen(command, stdout=open(f'{name}.txt', 'w'), stderr=subprocess.STDOUT)
    while child.poll() is None and done() < all_of and time.monotonic() < begun + 60 * limit:
        if feed:
            feed()
        if done():
            samples.append((time.monotonic(), done(), *state(child.pid)))
        time.sleep(min(1, max(0.05, (time.monotonic() - begun) / 300)))     # measuring costs, too
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
    if child.wait() not in (0, -signal.SIGTERM) or len(samples) < 9:
        sys.exit(f'{name}: measured {len(samples)} times, which is too few: {Path(f"{name}.txt").read_text()[-500:]}')
    t, count, memory, files, threads = np.array(samples).T
    k = max(3, len(t) // 30)
    early = slice(k, 2 * k)
    end = slice(-k, None)
    row = [name, f'{count[-1]:,.0f}', f'{(t[-1] - t[0]) / 60:.1f}']
    for x in memory, files, threads:
        row += [f'{x[early].mean():.0f}', f'{x[end].mean():.0f}']
    row += [f'{np.polyfit(t[2 * k:] / 3600, memory[2 * k:], 1)[0]:+.1f}']
    row += [f'{np.ptp(count[window]) / np.ptp(t[window]):.2f}' for window in (early, end)]
    print('| ' + ' | '.join(row) + ' |', flush=True)


def lines(path):
    return Path(path).read_text().count('\n') if os.path.exists(path) else 0


def steps():
    """Of training, by its log."""
    entries = Path('out/log.jsonl').read_text().splitlines() if os.path.exists('out/log.jsonl') else []
    return max([json.loads(line)['step'] for line in entries[-1:]], default=0)


def feed():
    """A few more pictures for --watch than it has answered."""
    for i in range(len(os.listdir('frames')), lines('watch.txt') + 6):
        data.write_image(f'frames/{i:06d}.png', x[i % 40])


def act_many():
    """A line for every rollout, or plan."""
    import model
    import plan
    planner = plan.Planner('out/ckpt.safetensors', plan.config | SEARCH, tell=False)
    frames = data.LeRobot('labelled').frames(0, range(40)).permute(0, 2, 3, 1).numpy()
    for i in range(rollouts if part == 'rollouts' else plans):
        if part == 'plans':
            planner.restart()
            print(planner.act(frames[:planner.past], frames[39 - i % 20]), flush=True)
            continue
        z = planner.latents(frames[None, :2])
        a = torch.zeros(1, 8, planner.model.config['action_dim'])
        imagined = model.rollout(planner.model, z, a, torch.ones(1, 8, dtype=torch.bool), seed=i)
        print(imagined.mean().item(), flush=True)


if part:
    act_many()
    sys.exit()
os.chdir(tempfile.mkdtemp(prefix='soak'))
data.write_demo('labelled', 12, True, 1)
data.write_demo('unlabelled', 6, False, 2)
os.mkdir('frames')
x = data.LeRobot('labelled').frames(0, range(40))
data.write_image('goal.png', x[39])
print('| | times | minutes | MB early | end | files early | end | threads early | end | MB/h | a second early | end |')
print('|' + '---|' * 12)
python = sys.executable
files = '--labelled=labelled', '--unlabelled=unlabelled'
often = '--log_interval=5', '--eval_interval=200', '--save_interval=50', '--max_steps=10000000'
search = [f'--{name}={value}' for name, value in SEARCH.items()]
# without a cache the workers decode video all the time
measure('training', [python, f'{ROOT}/train.py', *files, *SMALL, *often, '--workers=2', '--cache=False'], steps,
        limit=minutes)
for part, count in (('rollouts', rollouts), ('plans', plans)):
    measure(part, [python, __file__, f'--part={part}', f'--{part}={count}'], lambda: lines(f'{part}.txt'), count)
measure('watch', [python, f'{ROOT}/plan.py', '--watch=frames', '--goal=goal.png', *search], lambda: lines('watch.txt'),
        pictures, feed=feed)
print(f'{os.cpu_count()} cores, torch {torch.__version__}, {time.strftime("%F")}, in {os.getcwd()}')
