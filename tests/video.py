"""
What video without actions buys, and whether diffusion matters for it: a robot with little action data, in the demo
world. 5 % of the episodes have actions; the others are left out, or seen as video; and, as the limit, all have actions.

    python tests/video.py                   # every row, an hour on two cores; writes video/
    python tests/video.py --only=direct

A run that is in out_dir already is not made again. All are asked about the same held-out episodes, which no run has
seen: errors of imagined latents 1, 5, 10 and 20 model steps ahead as a share of what repeating the last frame has;
how many times as large the error is 5 steps ahead if actions are those of another clip; and the planner's success
with its 95 % interval.
"""
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
sys.path.insert(0, ROOT)
import data  # noqa: E402, from the root
import model  # noqa: E402, from the root

# --------------------------------------------------------------------------------------------------------------------
out_dir = 'video'
steps = 600             # of training
episodes = 40           # of the closed loop, with a lighter search than plan.py's own
seed = 0
processes = 2           # runs at once, with one thread each
only = ''               # rows whose name holds one of these words, comma-separated; '' = all
config = data.override(globals(), sys.argv[1:])
# --------------------------------------------------------------------------------------------------------------------
SETS = {'few': (15, True), 'rest': (285, False), 'all': (300, True), 'asked': (40, True)}       # episodes, actions
DATA = {
    '5 % with actions': '--labelled=few --unlabelled=',
    '5 % and video in 25 % of the clips': '--labelled=few --unlabelled=rest --labelled_share=0.75',
    '5 % and video in 75 % of the clips': '--labelled=few --unlabelled=rest --labelled_share=0.25',
    '5 % and video in 95 % of the clips': '--labelled=few --unlabelled=rest --labelled_share=0.05',
    '5 % and video in 25 % of the clips, relabelled':
        '--labelled=few --unlabelled=rest --labelled_share=0.75 --policy=True --relabel=1.0',
    '5 % and video in 75 % of the clips, relabelled':
        '--labelled=few --unlabelled=rest --labelled_share=0.25 --policy=True --relabel=1.0',
    '5 % and video in 95 % of the clips, relabelled':
        '--labelled=few --unlabelled=rest --labelled_share=0.05 --policy=True --relabel=1.0',
    '100 % with actions': '--labelled=all --unlabelled='}
ROWS = {}
for objective, (name, options) in itertools.product(('shortcut', 'diffusion', 'direct'), DATA.items()):
    ROWS[f'{objective} | {name}'] = f'{options} --objective={objective}'
ROWS = {name: options for name, options in ROWS.items() if any(word in name for word in only.split(','))}


def run(command, folder):
    """What a script of the project leaves in a folder, unless it is there."""
    if os.path.isdir(f'{folder}/done'):
        return
    got = subprocess.run([sys.executable, os.path.join(ROOT, command[0]), *command[1:], f'--out_dir={folder}'],
                         env=dict(os.environ, OMP_NUM_THREADS='1'), capture_output=True, text=True)
    if got.returncode:
        sys.exit(f'{" ".join(command)}: {got.stderr.strip()[-500:]}')
    os.mkdir(f'{folder}/done')


@torch.no_grad()
def errors(folder):
    """The model's share of the error of repeating, 1, 5, 10, 20 steps ahead; with other actions, of its own."""
    net, trained = model.load(f'{folder}/ckpt.safetensors')
    encode = model.restore_encoder(trained, net.stats)
    asked = data.open_sets('asked')
    asked[0].stats = data.open_sets(trained['labelled'])[0].stats       # actions in units of its training
    clips = data.Clips(asked, [], 2, trained['frameskip'], (encode.size, encode.width), 1, 1.0, 0.5)
    clips.A = net.config['action_dim']      # one wider where guesses are marked
    batch = clips.held_out(22, 64)['labelled']
    z = model.standard(model.encode_frames(encode, batch['x'], data.autocast(torch.device('cpu'), 'float32')), net.stats)
    error = []
    for a in batch['a'], batch['a'].roll(32, 0):
        imagined = model.rollout(net, z[:, :2], a, batch['a_mask'])
        error.append((imagined - z[:, 2:]).square().mean(dim=(2, 3)))           # (64, 20)
    error.append((z[:, 1:2] - z[:, 2:]).square().mean(dim=(2, 3)))
    real = batch['z_mask'][:, 2:]
    mine, other, repeat = (torch.where(real, e, 0).sum(dim=0) / real.sum(dim=0) for e in error)     # (20,)
    return (mine / repeat)[[0, 4, 9, 19]].tolist(), (other / mine)[4].item()


def row(name):
    folder = f'{"".join(c if c.isalnum() else "_" for c in name)}-{steps}-{seed}'
    run(['train.py', *ROWS[name].split(), f'--max_steps={steps}', f'--eval_interval={steps}', f'--seed={seed}'], folder)
    played = f'{folder}/plan-{episodes}'
    run(['plan.py', f'--ckpt={folder}/ckpt.safetensors', f'--episodes={episodes}', '--seed=1', '--blind_episodes=1',
         '--iterations=3', '--replan=2'], played)
    shares, shuffled = errors(folder)
    with open(f'{played}/plan.json') as f:
        got = json.load(f)['methods']['model']
    low, high = got['ci95']
    return (f'| {name} | {" | ".join(f"{share:.3f}" for share in shares)} | {shuffled:.2f} | '
            f'{got["success_end"]:.2f} ({low:.2f} to {high:.2f}) | {got["success_ever"]:.2f} |')


torch.set_num_threads(1)
os.makedirs(out_dir, exist_ok=True)
os.chdir(out_dir)
for i, (name, (n, labelled)) in enumerate(SETS.items()):
    if not os.path.isdir(name):
        data.write_demo(name, n, labelled, seed=i + 1)
print(f'{steps} steps, seed {seed}, {episodes} questions\n\n| objective | data | 1 | 5 | 10 | 20 | other actions | '
      f'success | ever |\n{"|---" * 9}|', flush=True)
with ThreadPoolExecutor(processes) as pool:
    for text in pool.map(row, ROWS):
        print(text, flush=True)
