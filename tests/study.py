"""
Which latents to plan in: for encoders, projections, predictors and objectives, what a probe reads from them, how far off
imagination is, and how often plans from pictures alone succeed. All else is equal; where tokens are not, the table says so.

    python tests/study.py --weights=folder                  # hours on two cores; writes study/
    python tests/study.py --envs=PushT --only=pixels,class --steps=200
    python tests/study.py --envs=PushT --only=patches,aligned --ahead=5,10,15,20      # also nearer goals

A row that is in study/rows.jsonl is not made again, so it can be stopped, started and added to. Encoders whose file, such as
dinov2_vits14.safetensors, is not in --weights have a row that says so. The table is printed at the end, and with --steps=0
alone: of what there is.
"""
import json
import os
import re
import subprocess
import sys
import time

import torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
sys.path.insert(0, ROOT)
import data  # noqa: E402, from the root
import model  # noqa: E402, from the root

# --------------------------------------------------------------------------------------------------------------------
folder = 'study'
weights = ''            # folder of the encoders' files
envs = 'PushT,PointMaze'
episodes = 400          # recorded of each
steps = 500             # of training
questions = 100         # for the planner
seed = 1
ahead = ''              # also goals so many environment steps ahead, comma-separated: a table of their own
only = ''               # rows whose name holds one of these words, comma-separated; '' = all
data.LIMITS |= dict.fromkeys(('steps', 'episodes', 'questions'), (0, 100000))
data.override(globals(), sys.argv[1:])
# --------------------------------------------------------------------------------------------------------------------

ENVS = {  # recorded frames, of which every so-manyth is drawn, and how far goals are ahead; options of plan.py and of train.py
    'PushT': (60, 5, 25, '--policy=script', '--warm_std=0.3', '--action=action.relative'),
    'PointMaze': (150, 10, 50, '', '', ''),
}
PATCHES = 'dinov2_vits14 --layer=8 --frame_height=112'       # 8 x 8 tokens
ROWS = {  # the encoder and options of train.py
    'DINOv2-S patches': PATCHES,
    'pixels': 'pixels --frame_height=56',
    'DINOv2-S class token': 'dinov2_vits14_cls --frame_height=112',
    'learned projection': PATCHES + ' --project=learned',
    'aligned, regression': PATCHES + ' --project=learned --align=regress',
    'aligned, InfoNCE': PATCHES + ' --project=learned --align=infonce',
    'flat attention': PATCHES + ' --attention=flat',
    'shortcut forcing': PATCHES + ' --objective=shortcut',
    'DINOv3-S patches': 'dinov3_vits16 --frame_height=128',
    'SigLIP 2 patches': 'siglip2_base16_224 --frame_height=128',
    'V-JEPA 2 patches': 'vjepa2_vitl16 --frame_height=128',
}
SEARCH = '--samples=32', '--iterations=2', '--elites=5', '--state_weight=0', '--blind_episodes=1'
rows_file = f'{folder}/rows.jsonl'
ahead_file = f'{folder}/ahead.jsonl'


def run(script, *options):
    name = f'{folder}/log.txt'
    with open(name, 'a') as log:
        command = [sys.executable, os.path.join(ROOT, script), *filter(None, options)]
        if subprocess.run(command, stdout=log, stderr=log).returncode:
            sys.exit(f'{name}: its last command has failed')


def closed_loop(env, name, goal_steps):
    """What plan.py measures, {method: numbers}."""
    plans = ENVS[env][4]
    out = f'{folder}/{env} {name}'
    run('plan.py', f'--ckpt={out}/ckpt.safetensors', f'--env={ROOT}/tests/simulators.py:{env}', f'--episodes={questions}',
        f'--seed={seed}', f'--goal_steps={goal_steps}', plans, *SEARCH, f'--out_dir={out}')
    with open(f'{out}/plan.json') as f:
        return json.load(f)['methods']


def row_of(env, name, given):
    """What is measured of one row, {column: value}."""
    length, every, goal_steps, acts, _, learns = ENVS[env]
    encoder, *more = given.split()
    path = f'{weights}/{encoder.removesuffix("_cls")}.safetensors'
    if encoder != 'pixels' and not os.path.isfile(path):
        return dict(missing=f'no {path}')
    recorded = f'{folder}/{env}'
    if not os.path.exists(recorded):
        run('plan.py', f'--record={ROOT}/tests/simulators.py:{env}', f'--episodes={episodes}', f'--steps={length}',
            f'--draw_every={every}', '--frame_height=112', f'--out={recorded}', acts)
    with open(f'{recorded}/meta/info.json') as f:
        fps = json.load(f)['fps'] / every
    out = f'{folder}/{env} {name}'
    began = time.time()
    run('train.py', f'--labelled={recorded}', '--unlabelled=', f'--fps={fps}', '--frameskip=1', f'--encoder={encoder}',
        f'--encoder_path={path}' if encoder != 'pixels' else '', '--channels=24', '--objective=direct', '--frames=6',
        '--batch_size=24', '--self_forcing=0.3', '--learning_rate=0.005', f'--probe={data.ENVIRONMENT}', '--dtype=float32',
        f'--max_steps={steps}', f'--seed={seed}', f'--eval_interval={steps}', f'--cache_dir={folder}/latents', learns,
        f'--out_dir={out}', *more)
    trained = time.time() - began
    with open(f'{out}/log.jsonl') as f:
        log = [json.loads(line) for line in f]
    errors = [entry['val'] for entry in log if 'val' in entry][-1]['labelled']
    probe = [entry['probe'] for entry in log if 'probe' in entry][-1]
    row = dict(trained=trained)
    for when in 'real', '5':
        shares = [numbers[when]['r2'] for numbers in probe.values() if when in numbers]
        row[f'r2 {when}'] = sum(shares) / len(shares) if shares else None
    for h in '1', '5', '10', '20':
        pair = errors['model'][h], errors['repeat'][h]
        row[f'error {h}'] = pair[0] / pair[1] if None not in pair else None
    plan = closed_loop(env, name, goal_steps)
    row |= {key: plan['model'][key] for key in ('success_end', 'success_ever', 'ci95', 'seconds_per_plan')}
    row['random'] = plan['random']['success_end']
    net, config = model.load(f'{out}/ckpt.safetensors')
    encode = model.restore_encoder(config, net.stats, grid=net.config['grid'])
    x = torch.zeros(8, 3, encode.size, encode.width)
    a = torch.zeros(1, 10, net.config['action_dim'])
    z = torch.zeros(1, 2, len(encode(x)[0]), net.config['dim'])
    with torch.no_grad():
        for key, call, frames in (('encode', lambda: encode(x), 8),
                                  ('imagine', lambda: model.rollout(net, z, a, a[..., 0] == 0, K=1), 8)):
            call()
            began = time.time()
            call()
            row[key] = 1000 * (time.time() - began) / frames
    return row | dict(tokens=z.shape[2])


def table(rows):
    """The rows as Markdown."""
    print('| | tokens | R2 of the state: real, 5 ahead | error / repeat 1 / 5 / 10 / 20 ahead | success at the end, ever | random |'
          ' encode, imagine, ms a frame |\n' + '|---' * 7 + '|')
    for row in rows:
        name = f'{row["env"]}, {row["name"]}'
        if 'missing' in row:
            print(f'| {name} | no weights | - | - | - | - | - |')
            continue
        number = [f'{row[key]:.2f}' if row[key] is not None else '-' for key in row if key.startswith(('r2', 'error'))]
        low, high = row['ci95']
        print(f'| {name} | {row["tokens"]} | {", ".join(number[:2])} | {" / ".join(number[2:])} | '
              f'{row["success_end"]:.2f} ({low:.2f} to {high:.2f}), {row["success_ever"]:.2f} | {row["random"]:.2f} | '
              f'{row["encode"]:.1f}, {row["imagine"]:.1f} |')


def table_ahead(rows):
    print('\n| success at the end, ever | goal steps ahead | model | random |\n' + '|---' * 4 + '|')
    for row in rows:
        print(f'| {row["env"]}, {row["name"]} | {row["ahead"]} | {row["model"][0]:.2f}, {row["model"][1]:.2f} | '
              f'{row["random"][0]:.2f}, {row["random"][1]:.2f} |')


def stored(path):
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f]


os.makedirs(folder, exist_ok=True)
done = stored(rows_file)
nearer = stored(ahead_file)
for env in envs.split(','):
    for name, given in ROWS.items():
        wanted = any(word in name for word in only.split(','))
        if not steps or not wanted or any((row['env'], row['name']) == (env, name) for row in done):
            continue
        done.append(dict(env=env, name=name, steps=steps) | row_of(env, name, given))
        print(done[-1], flush=True)
        if 'missing' not in done[-1]:       # its file may come
            with open(rows_file, 'a') as f:
                f.write(json.dumps(done[-1]) + '\n')
for row in done:
    wanted = any(word in row['name'] for word in only.split(',')) and row['env'] in envs.split(',')
    for n in re.findall('[^,]+', ahead):
        at = dict(env=row['env'], name=row['name'], ahead=int(n))
        if not wanted or 'missing' in row or any(at.items() <= other.items() for other in nearer):
            continue
        plan = closed_loop(row['env'], row['name'], n)
        numbers = {method: [plan[method][key] for key in ('success_end', 'success_ever')] for method in ('model', 'random')}
        nearer.append(at | numbers)
        print(nearer[-1], flush=True)
        with open(ahead_file, 'a') as f:
            f.write(json.dumps(nearer[-1]) + '\n')
table(done)
if nearer:
    table_ahead(nearer)
