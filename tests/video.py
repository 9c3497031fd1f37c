"""
What video without actions buys, and whether diffusion matters for it: a robot with little action data, in the demo
world or in simulators that others wrote. 5 % of the episodes have actions; the others are left out, or seen as video;
and, as the limit, all have actions.

    python tests/video.py                   # every row of the demo world, an hour on two cores; writes video/
    python tests/video.py --only=direct
    python tests/video.py --envs=PushT,FetchReach,FetchPush --weights=folder --steps=1000      # an hour each

What is in folder already is not made again. Rows of an environment are asked about the same held-out episodes, which no
run has seen: errors of imagined latents 1, 5, 10 and 20 model steps ahead as a share of what repeating the last frame
has; how many times as large the error is 5 steps ahead if actions are those of another clip; and the planner's success,
from pictures alone, with its 95 % interval. --weights has dinov2_vits14.safetensors, which simulators want.
"""
import itertools
import json
import math
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
folder = 'video'
weights = ''            # folder of the encoder's file
envs = 'demo'           # or PushT, FetchReach, FetchPush, comma-separated
steps = 600             # of training
questions = 40          # of the closed loop, with a lighter search than plan.py's own
seed = 0
processes = 2           # runs at once, with one thread each
only = ''               # rows whose name holds one of these words, comma-separated; '' = all
data.LIMITS |= dict.fromkeys(('steps', 'questions', 'processes'), (1, 100000))
config = data.override(globals(), sys.argv[1:])
# --------------------------------------------------------------------------------------------------------------------
DINO = (f'--encoder=dinov2_vits14 --encoder_path={os.path.abspath(weights)}/dinov2_vits14.safetensors --layer=8 '
        '--frame_height=112 --pool=2 --dtype=float32 --cache_dir=latents')
TRAIN = '--channels=24 --frameskip=1 --frames=6 --batch_size=24 --learning_rate=0.005'
SEARCH = '--warm_std=0.3 --samples=32 --iterations=2 --elites=5'
ENVS = {    # episodes with actions, and others; options of a recording, of its latents, of train.py and of plan.py
    'demo': (15, 285, '', '', '', '--iterations=3 --replan=2'),
    'PushT': (79, 1500, '--steps=60', f'{DINO} --fps=2', f'{TRAIN} --action=action.relative',
              f'{SEARCH} --goal_steps=10'),
    'FetchReach': (20, 380, '--steps=50', f'{DINO} --fps=5', TRAIN, f'{SEARCH} --replan=2 --beta=1.0'),
    'FetchPush': (50, 950, '--steps=50', f'{DINO} --fps=5', TRAIN, f'{SEARCH} --replan=2')}
DATA = {    # NAME is the environment's
    '5 % with actions': '--labelled=NAME/few --unlabelled=',
    '5 % and video in 25 % of the clips': '--labelled=NAME/few --unlabelled=NAME/rest --labelled_share=0.75',
    '5 % and video in 75 % of the clips': '--labelled=NAME/few --unlabelled=NAME/rest --labelled_share=0.25',
    '5 % and video in 95 % of the clips': '--labelled=NAME/few --unlabelled=NAME/rest --labelled_share=0.05',
    '5 % and relabelled video in 25 % of the clips':
        '--labelled=NAME/few --unlabelled=NAME/rest --labelled_share=0.75 --policy=True --relabel=1.0',
    '5 % and relabelled video in 75 % of the clips':
        '--labelled=NAME/few --unlabelled=NAME/rest --labelled_share=0.25 --policy=True --relabel=1.0',
    '5 % and relabelled video in 95 % of the clips':
        '--labelled=NAME/few --unlabelled=NAME/rest --labelled_share=0.05 --policy=True --relabel=1.0',
    '100 % with actions': '--labelled=NAME/few,NAME/rest --unlabelled='}
ROWS = {}
for env, objective, name in itertools.product(envs.split(','), ('shortcut', 'diffusion', 'direct'), DATA):
    ROWS[f'{env} | {objective} | {name}'] = env, f'{DATA[name].replace("NAME", env)} --objective={objective}'
ROWS = {name: row for name, row in ROWS.items() if any(word in name for word in only.split(','))}


def run(script, *options):
    """A script of the project, whose last words stand in the error if it fails."""
    got = subprocess.run([sys.executable, os.path.join(ROOT, script), *options],
                         env=dict(os.environ, OMP_NUM_THREADS='1'), capture_output=True, text=True)
    if got.returncode:
        sys.exit(f'{script} {" ".join(options)}: {got.stderr.strip()[-500:]}')


def simulator(env):
    return env if env == 'demo' else f'{ROOT}/tests/simulators.py:{env}'


def record(env, name, episodes, seed):
    out = f'{env}/{name}'
    if os.path.isdir(out):
        return
    if env == 'demo':
        data.write_demo(out, episodes, True, seed=seed)
    else:
        run('plan.py', f'--record={simulator(env)}', '--policy=script', f'--episodes={episodes}', '--draw_every=5',
            '--frame_height=112', f'--seed={seed}', f'--out={out}', *ENVS[env][2].split())


@torch.no_grad()
def errors(env, out):
    """The model's share of the error of repeating, 1, 5, 10, 20 steps ahead; with other actions, of its own."""
    net, trained = model.load(f'{out}/ckpt.safetensors')
    encode = model.restore_encoder(trained, net.stats)
    asked = data.open_sets(f'{env}/asked', '', trained['action'], trained['fps'])
    units = data.open_sets(trained['labelled'], '', trained['action'], trained['fps'])
    asked[0].stats = units[0].stats         # actions in units of its training
    clips = data.Clips(asked, [], 2, trained['frameskip'], (encode.size, encode.width), 1, 1.0, 0.5)
    clips.A = net.config['action_dim']      # one wider where guesses are marked
    batch = clips.some(22, 100, 'labelled', [range(len(asked[0].episodes))])
    z = model.encode_frames(encode, batch['x'], data.autocast(torch.device('cpu'), 'float32'))
    z = model.standard(z, net.stats)
    error = []
    for a in batch['a'], batch['a'].roll(32, 0):
        imagined = model.rollout(net, z[:, :2], a, batch['a_mask'])
        error.append((imagined - z[:, 2:]).square().mean(dim=(2, 3)))           # (100, 20)
    error.append((z[:, 1:2] - z[:, 2:]).square().mean(dim=(2, 3)))
    real = batch['z_mask'][:, 2:]
    mine, other, repeat = (torch.where(real, e, 0).sum(dim=0) / real.sum(dim=0) for e in error)     # (20,)
    return (mine / repeat)[[0, 4, 9, 19]].tolist(), (other / mine)[4].item()


def row(name):
    """The row of that name, as Markdown; its run is trained and asked unless that was done."""
    env, options = ROWS[name]
    out = f'{"".join(c if c.isalnum() else "_" for c in name)}-{steps}-{seed}'
    done = f'{out}/row-{questions}.txt'
    if not os.path.isfile(done):
        if not os.path.isdir(f'{out}/trained'):
            run('train.py', *ENVS[env][3].split(), *ENVS[env][4].split(), *options.split(), f'--max_steps={steps}',
                f'--eval_interval={steps}', f'--seed={seed}', f'--out_dir={out}')
            os.mkdir(f'{out}/trained')
        run('plan.py', f'--ckpt={out}/ckpt.safetensors', f'--env={simulator(env)}', f'--episodes={questions}',
            '--seed=1', '--blind_episodes=1', f'--out_dir={out}', *ENVS[env][5].split())
        shares, shuffled = errors(env, out)
        with open(f'{out}/plan.json') as f:
            methods = json.load(f)['methods']
        mine = methods['model']
        low, high = mine['ci95']
        chance = methods['random']
        text = ' / '.join('-' if math.isnan(share) else f'{share:.2f}' for share in shares)
        with open(done, 'w') as f:
            f.write(f'| {name} | {text} | {shuffled:.2f} | {mine["success_end"]:.2f} ({low:.2f} to {high:.2f}), '
                    f'{mine["success_ever"]:.2f} | {chance["success_end"]:.2f}, {chance["success_ever"]:.2f} |')
    with open(done) as f:
        return f.read()


torch.set_num_threads(1)
os.makedirs(folder, exist_ok=True)
os.chdir(folder)
for env in envs.split(','):
    for i, (name, episodes) in enumerate((('few', ENVS[env][0]), ('rest', ENVS[env][1]), ('asked', 100))):
        record(env, name, episodes, i + 1)
    if env != 'demo':       # before two runs want the same
        run('data.py', '--cache=True', f'--labelled={env}/few,{env}/rest', '--unlabelled=', *ENVS[env][3].split())
print(f'{steps} steps, seed {seed}, {questions} questions\n\n'
      '| | objective | data | error / repeat 1 / 5 / 10 / 20 ahead | other actions | success at the end, ever | '
      f'of random actions |\n{"|---" * 7}|', flush=True)
with ThreadPoolExecutor(processes) as pool:
    for text in pool.map(row, ROWS):
        print(text, flush=True)
