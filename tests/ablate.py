"""
What each choice does to the error of imagined latents on the demo world: one change at a time, several seeds.

    python tests/ablate.py                                  # every row, an hour and a half on two cores; writes ablate/
    python tests/ablate.py --only=objective,ramp --seeds=1

A run that is in out_dir already is not trained again, so it can be stopped and started. Errors are of labelled clips
of held-out episodes, 1, 5, 10 and 20 model steps ahead, in the units of the default's latents, so that rows compare:
mean over seeds (standard deviation). Squared error prefers a blurred mean to a sharp sample, so a sample's error alone
rewards a model that does not dare to choose: beside it, 5 steps ahead, are the error of the mean of four samples and
the spread, their variance. A model that samples as it should has the spread of many small steps (K = k_max).
Rows of k_max 64, where a frame takes up to 64 steps, are of 32 clips and end after 5 steps; the others of 64 clips.
"""
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
sys.path.insert(0, ROOT)
import data  # noqa: E402, from the root
import model  # noqa: E402, from the root

# --------------------------------------------------------------------------------------------------------------------
out_dir = 'ablate'
steps = 600             # of training
seeds = 3
processes = 2           # runs at once, with one thread each
only = ''               # rows whose name holds one of these words, comma-separated; '' = all
config = data.override(globals(), sys.argv[1:])
# --------------------------------------------------------------------------------------------------------------------

ROWS = {  # name: options of train.py
    'default': '',
    'tau uniform': '--tau_schedule=uniform',
    'tau uniform, no clean past': '--tau_schedule=uniform --p_past=0.0',
    'tau logit-normal': '--tau_schedule=logit-normal',
    'tau shift 2': '--tau_shift=2.0',
    'objective: diffusion': '--objective=diffusion',
    'objective: direct': '--objective=direct',
    'objective: k_max 64': '--k_max=64',
    'objective: k_max 64, no bootstrap': '--k_max=64 --bootstrap=0.0',
    'objective: k_max 64, diffusion': '--k_max=64 --objective=diffusion',
    'no ramp': '--ramp=False',
    'v-loss': '--space=v --ramp=False',
    'no registers': '--registers=0',
    'time layer every 2': '--time_every=2',
    'flat attention': '--attention=flat',
    'flat attention, direct': '--attention=flat --objective=direct',
    'MHA (4 key heads)': '--kv_heads=4',
    'action on its token alone': '--action_on=token',
    'no average': '--ema=0.0',
    'p_null 0.3': '--p_null=0.3',
    'latents of unit variance': '--whiten=1.0',
    'wide head': '--wide_layers=2',
    'self-forcing': '--self_forcing=0.2',
    'long clips': '--long_frames=8 --long_share=0.25',
    'growing clips': '--frames=8 --batch_size=16 --grow=0.3',
    'clips of 8': '--frames=8 --batch_size=16',
    'constant, then decay': '--decay=0.3'}
ROWS = {name: options for name, options in ROWS.items() if any(word in name for word in only.split(','))}


def train(run):
    name, seed = run
    folder = os.path.join(out_dir, f'{name.translate(str.maketrans(" :,", "___"))}-{steps}-{seed}')
    if not os.path.isfile(os.path.join(folder, 'done')):
        command = [sys.executable, os.path.join(ROOT, 'train.py'), *ROWS[name].split(), f'--max_steps={steps}',
                   f'--seed={seed}', f'--eval_interval={steps}', f'--save_interval={steps}', f'--out_dir={folder}']
        for kind in ('labelled', 'unlabelled'):
            command.append(f'--{kind}={os.path.join(out_dir, kind)}')
        got = subprocess.run(command, env=dict(os.environ, OMP_NUM_THREADS='1'), capture_output=True, text=True)
        if got.returncode:
            sys.exit(f'{name}: {got.stderr.strip().splitlines()[-1]}')
        open(os.path.join(folder, 'done'), 'w').close()
        print(f'trained {folder}', flush=True)
    tokens = 20 if 'no registers' not in name else 18       # of a frame
    with open(os.path.join(folder, 'log.jsonl')) as f:
        ms = [1000 * 128 * tokens / e['tokens_per_s'] for e in map(json.loads, f) if 'loss' in e]
    return folder, statistics.median(ms)


@torch.no_grad()
def errors(folder, K, unit, clips, frames, samples=4):
    """Lists over horizons 1, 5, 10, 20: error of a sample, error of the mean of several, variance between them."""
    net, trained = model.load(os.path.join(folder, 'ckpt.safetensors'))
    encode, stats = model.restore_encoder(trained, net.stats), net.stats
    sets = data.open_sets(trained['labelled'])
    read = data.Clips(sets, [], 2, trained['frameskip'], (encode.size, encode.width), 1, 1.0, trained['val_share'])
    batch = read.held_out(2 + frames, clips)['labelled']
    z = model.encode_frames(encode, batch['x'], data.autocast(torch.device('cpu'), 'float32'))
    z = model.standard(z, stats)
    found = torch.stack([model.rollout(net, z[:, :2], batch['a'], batch['a_mask'], K, seed=s) for s in range(samples)])
    scale = (stats['z_std'] / unit) ** 2
    error, error_of_mean, spread = (((x ** 2) * scale).mean(dim=(-2, -1)) for x in (
        (found - z[:, 2:]), found.mean(dim=0) - z[:, 2:], found.std(dim=0)))              # ([samples,] B, 20)
    real = batch['z_mask'][:, 2:]
    return [[of[..., h - 1][..., real[:, h - 1]].mean().item() for h in (1, 5, 10, 20) if h <= frames]
            for of in (error, error_of_mean, spread)]


def text(values):
    spread = f' ({statistics.stdev(values):.3f})' if len(values) > 1 else ''
    return f'{statistics.mean(values):.3f}{spread}'


for kind, episodes in (('labelled', 300), ('unlabelled', 100)):
    if not os.path.isdir(os.path.join(out_dir, kind)):
        data.write_demo(os.path.join(out_dir, kind), episodes, kind == 'labelled', seed=1 + (kind == 'unlabelled'))
ROWS = {'default': ''} | ROWS       # its latents are the unit
with ThreadPoolExecutor(processes) as pool:
    runs = [(name, seed) for seed in range(seeds) for name in ROWS]
    done = dict(zip(runs, pool.map(train, runs)))
unit = model.load(os.path.join(done['default', 0][0], 'ckpt.safetensors'))[0].stats['z_std']
print(f'\n{steps} steps, {seeds} seeds\n\n| change | K | ms per 128 frames | error at 1 | 5 | 10 | 20 | mean of 4 | '
      f'spread |\n{"|---" * 9}|')
for name in ROWS:
    ms = statistics.median(done[name, seed][1] for seed in range(seeds))
    many = (1, 4, 64) if '64' in name else (1, 2, 4, 8) if name in ('default', 'objective: diffusion') else (4,)
    for K in many:
        each = [errors(done[name, seed][0], K, unit, *((32, 5) if '64' in name else (64, 20))) for seed in range(seeds)]
        print(f'| {name} | {"-" if "direct" in name else K} | {ms:.0f} | '
              + ' | '.join(text([e[0][h] for e in each]) if h < len(each[0][0]) else '-' for h in range(4))
              + f' | {text([e[1][1] for e in each])} | {text([e[2][1] for e in each])} |', flush=True)
