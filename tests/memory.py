"""
What memory is worth, in a demo world where a curtain hides a disc for longer than the model sees: the error of what is
imagined when the curtain opens again, with and without memory, after equal training.

    python tests/memory.py                      # ten minutes on one core
    python tests/memory.py --max_steps=2 --episodes=4 --tests=2         # in miniature

Writes memory.png, and the dataset and checkpoints that it has not found, into --folder.
"""
import os
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import data  # noqa: E402, before torch
import numpy as np  # noqa: E402
import torch  # noqa: E402

import model  # noqa: E402

folder = '/tmp/memory'
episodes = 200
max_steps = 1000
tests = 64              # new episodes
objective = 'direct'
data.LIMITS |= dict.fromkeys(('episodes', 'tests'), (2, 10000))
data.override(globals(), sys.argv[1:])

CURTAIN = 0.30, 0.28, 0.32
SEEN, HIDDEN = 6, 10    # frames of the tests: seen, hidden, seen


def worlds(n, T, rng, closed):
    """States (n, T, 4) and actions (n, T, 3): a tip that wanders above a disc which nobody touches, and whether the
    curtain, closed (n, T + 1), is closed in the next frame."""
    disc = np.stack((rng.uniform(0.2, 0.8, n), np.full(n, 0.75)), axis=1)
    state = np.concatenate((rng.uniform((0.12, 0.12), (0.88, 0.32), (n, 2)), disc), axis=1)
    states, actions = [], []
    for t in range(T):
        if t % 8 == 0:
            aim = rng.uniform((0.12, 0.12), (0.88, 0.32), (n, 2))
        move = ((aim - state[:, :2]) * 0.5 + rng.normal(0, 0.01, (n, 2))).clip(-data.DEMO_STEP, data.DEMO_STEP)
        states.append(state)
        actions.append(np.concatenate((move, closed[:, t + 1:t + 2]), axis=1))
        state = data.demo_step(state, move)
    return np.stack(states, axis=1), np.stack(actions, axis=1)


def draw(states, closed):
    """uint8 (T, 64, 64, 3): the curtain is the lower half, and no halo betrays what is behind it."""
    shown = np.where(closed[:, None], [0, 0, 0.5, 0.75], states)
    shown[:, :2] = states[:, :2]
    x = data.demo_draw(shown)
    x[closed, 32:] = np.uint8(np.array(CURTAIN) * 255)
    return x


def write(root):
    rng = np.random.default_rng(0)
    closed = np.zeros((episodes, 61), bool)
    for row in closed:
        t = 0
        while t < 61:
            t += rng.integers(5, 11)
            row[t:t + (hidden := rng.integers(8, 15))] = True
            t += hidden
    states, actions = worlds(episodes, 60, rng, closed)
    names = data.DEMO_NAMES | {'action': ['dx', 'dy', 'curtain']}
    with data.Writer(root, 10, {'action': names['action']}) as writer:
        for e in range(episodes):
            for frame, action in zip(draw(states[e], closed[e, :60]), actions[e]):
                writer.add({'top': frame}, action)
            writer.end_episode('wander')


# as many frames in a step, and as many steps
ways = {'without': ('--frames=12',), 'with': ('--frames=9', '--memory=8', '--memory_frames=4')}
for name, options in ways.items():
    if not os.path.exists(f'{folder}/{name}/ckpt.safetensors'):
        if not os.path.exists(f'{folder}/data'):
            write(f'{folder}/data')
        subprocess.run([sys.executable, 'train.py', f'--labelled={folder}/data', '--unlabelled=', '--frameskip=1', '--batch_size=8',
                        f'--objective={objective}', f'--max_steps={max_steps}', f'--eval_interval={max_steps}',
                        f'--out_dir={folder}/{name}', *options], check=True)

T = SEEN + HIDDEN + 6
closed = np.zeros((tests, T + 1), bool)
closed[:, SEEN:SEEN + HIDDEN] = True
states, actions = worlds(tests, T, np.random.default_rng(99), closed)
x = np.stack([draw(states[e], closed[e, :T]) for e in range(tests)])
films = []


def disc_at(x):
    """Where the disc is from left to right, in table widths (n,), in pictures (n, 3, H, W)."""
    x = x.float() / 255
    blue = (x[:, 2] - x[:, 0] - 0.15).clamp(min=0).sum(dim=1)           # (n, W)
    at = (torch.arange(blue.shape[1]) + 0.5) / blue.shape[1]
    return (blue * at).sum(dim=1) / blue.sum(dim=1).clamp(min=1e-6)


print(f'{tests} episodes, 2 frames given, the curtain closed in frames {SEEN} to {SEEN + HIDDEN - 1} of {T}')
print('memory   error before   while closed   on opening   5 frames later   the disc on opening is off by')
for name in ways:
    net, trained = model.load(f'{folder}/{name}/ckpt.safetensors')
    encoder = model.restore_encoder(trained, net.stats)
    with torch.no_grad():
        flat = data.resize(torch.from_numpy(x).flatten(0, 1).permute(0, 3, 1, 2), encoder.size)
        z = model.standard(encoder(flat.float() / 255).unflatten(0, (tests, T)), net.stats)
    mean, std, *_ = model.robot_stats(net.stats, 0, name)
    a = torch.zeros(tests, T, 3)
    a[:, 1:] = (torch.from_numpy(actions[:, :-1]).float() - mean) / std
    known = (torch.arange(T) > 0).expand(tests, T)
    imagined = model.rollout(net, z[:, :2], a, known, 4)
    error = (imagined - z[:, 2:]).square().mean(dim=(0, 2, 3))
    opens = SEEN + HIDDEN - 2           # in what is imagined
    shown, true = (model.pictures(model.unstandard(v, net.stats), encoder) for v in (imagined[:, opens], z[:, 2 + opens]))
    off = (disc_at(shown) - disc_at(true)).abs().mean()
    print(f'{name:8s} {error[:SEEN - 2].mean():.3f}          {error[SEEN - 2:opens].mean():.3f}          '
          f'{error[opens]:.3f}        {error[opens + 5]:.3f}            {off:.3f}', flush=True)
    film = torch.cat((z[0, :2], imagined[0]))
    films.append(model.pictures(model.unstandard(film, net.stats), encoder))
rows = [torch.cat([*data.enlarge(film)], dim=2) for film in (flat[:T], *films)]
data.write_image(f'{folder}/memory.png', torch.cat(rows, dim=1))
print(f'wrote {folder}/memory.png: truth, without and with memory')
