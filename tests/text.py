"""
What a text is worth, in a demo world of three tasks that begin alike: the error of imagination with the true text, that
of another task and none; what guidance does to error and spread; and a picture of imagination from words alone.

    python tests/text.py                        # a quarter of an hour on two cores
    python tests/text.py --max_steps=2 --starts=2 --tests=2 --samples=2         # in miniature

Writes text.png, and the datasets and checkpoint that it has not found, into --folder.
"""
import os
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import data  # noqa: E402, before torch
import numpy as np  # noqa: E402
import torch  # noqa: E402

import model  # noqa: E402

folder = '/tmp/text'
starts = 100            # of each kind of dataset, an episode for every task
max_steps = 1200
tests = 12              # new starts
samples = 4             # imagined futures of each
K = 4
data.LIMITS |= dict.fromkeys(('starts', 'tests', 'samples'), (2, 10000))
data.override(globals(), sys.argv[1:])

TASKS = dict(left='push the disc left', right='push the disc right', reach='reach')
FRAMES = 44


def episodes(n, rng):
    """States (3 n, FRAMES, 4) and actions, three tasks from each start; nothing moves in the first three frames."""
    disc, tip = rng.uniform(-0.08, 0.08, (2, n, 2)) + [[[0.5, 0.42]], [[0.5, 0.82]]]
    state = np.concatenate((tip, disc), axis=1).repeat(3, axis=0)
    side = np.tile([[1.0], [-1.0], [0.0]], (n, 1))          # where the tip goes first
    begun = np.zeros((3 * n, 1), bool)
    states, actions = [], []
    for t in range(FRAMES):
        tip, disc = state[:, :2], state[:, 2:]
        begun |= (side * (tip - disc)[:, :1] > 0.3) & (abs(tip - disc)[:, 1:] < 0.06)
        aim = disc + np.concatenate((side * np.where(begun, -0.3, 0.36), np.where(side == 0, 0.27, 0.0)), axis=1)
        move = (aim - tip) * 0.5 + rng.normal(0, 0.008, tip.shape)
        states.append(state)
        actions.append(move.clip(-data.DEMO_STEP, data.DEMO_STEP) * (t > 2))
        state = data.demo_step(state, actions[-1])
    return np.stack(states, axis=1), np.stack(actions, axis=1)


def write(root, seed, labelled):
    states, actions = episodes(starts, np.random.default_rng(seed))
    with data.Writer(root, 10, data.DEMO_NAMES) as writer:
        for e in range(len(states)):
            for frame, action in zip(data.demo_draw(states[e]), actions[e]):
                writer.add({'top': frame}, action if labelled else None)
            writer.end_episode([*TASKS.values()][e % 3])


ckpt = f'{folder}/out/ckpt.safetensors'
if not os.path.exists(ckpt):
    for seed, kind in enumerate(('labelled', 'unlabelled')):
        if not os.path.exists(f'{folder}/{kind}'):
            write(f'{folder}/{kind}', seed, kind == 'labelled')
    subprocess.run([sys.executable, 'train.py', *(f'--{kind}={folder}/{kind}' for kind in ('labelled', 'unlabelled')),
                    '--text=True', '--labelled_share=0.5', f'--max_steps={max_steps}', f'--out_dir={folder}/out'], check=True)

net, trained = model.load(ckpt)
encoder = model.restore_encoder(trained, net.stats)
states, actions = episodes(tests, np.random.default_rng(99))
x = torch.from_numpy(data.demo_draw(states[:, ::2].reshape(-1, 4), encoder.size)).permute(0, 3, 1, 2)
with torch.no_grad():
    z_raw = encoder(x.float() / 255).unflatten(0, (3 * tests, -1))
z = model.standard(z_raw, net.stats)            # (3 tests, T, N, D)
B, T = z.shape[:2]
own = torch.stack([data.text_bytes(words, 24) for words in TASKS.values()]).repeat(tests, 1)
other = own.unflatten(0, (tests, 3)).roll(1, 1).flatten(0, 1)
mean, std, *_ = model.robot_stats(net.stats, 0, ckpt)
rows = torch.from_numpy(actions[:, :2 * (T - 1)]).float().unflatten(1, (-1, 2))          # as frameskip has it
a = torch.cat((torch.zeros(B, 1, 4), ((rows - mean) / std).flatten(2)), dim=1)
known = torch.arange(T).expand(B, T) > 0


def imagined(text, guide, a_mask):
    """(samples, B, T - 2, N, D), from two frames, words, and actions where they are known."""
    net.guide = guide
    return torch.stack([model.rollout(net, z[:, :2], a, a_mask, K, seed=s, text=text) for s in range(samples)])


def disc_at(z):
    """Where the disc is from left to right, in table widths (..), as the picture of latents (.., N, D) shows it."""
    shape = z.shape[:-2]
    x = model.pictures(model.unstandard(z, net.stats).flatten(0, -3), encoder).float() / 255
    blue = (x[:, 2] - x[:, 0] - 0.15).clamp(min=0).sum(dim=1)           # (n, width)
    at = (torch.arange(blue.shape[1]) + 0.5) / blue.shape[1]
    return ((blue * at).sum(dim=1) / blue.sum(dim=1).clamp(min=1e-6)).view(shape)


moved = disc_at(z[:, -1]) - disc_at(z[:, 1])
print('the disc moves in truth, as pictures show it:', *(f'{name} {moved[i::3].mean():+.3f}' for i, name in enumerate(TASKS)))
print('guide  text               error at 1/5/10/20 steps         spread  the disc moves: ' + '  '.join(TASKS))
for guide in 0.0, 1.0, 1.5, 2.0, 3.0:
    for name, text in ('true', own), ('other', other), ('none', 0 * own), ('true, with actions', own):
        if 'true' in name or guide == 1:
            found = imagined(text, guide, known & ('actions' in name))
            error = (found - z[:, 2:]).square().mean(dim=(0, 1, 3, 4))
            spread = found.std(dim=0).square().mean().sqrt()
            moved = (disc_at(found[:, :, -1]) - disc_at(z[:, 1])).mean(dim=0)
            print(f'{guide:5g}  {name:18s} ' + '  '.join(f'{error[h - 1]:.3f}' for h in (1, 5, 10, 20))
                  + f'     {spread:.3f}   ' + '  '.join(f'{moved[i::3].mean():+.3f}' for i in range(3)), flush=True)

z_dream = torch.cat((z[:3, :2], imagined(own, 1.0, known & False)[0, :3]), dim=1)
rows = torch.stack((z_raw[:3], model.unstandard(z_dream, net.stats)), dim=1).flatten(0, 1)      # truth, imagined; thrice
shown = torch.linspace(1, T - 1, 8).round().long()
strips = data.enlarge(model.pictures(rows[:, shown].flatten(0, 1), encoder)).unflatten(0, (6, 8))
data.write_image(f'{folder}/text.png', torch.cat([torch.cat([*strip], dim=2) for strip in strips], dim=1))
print(f'wrote {folder}/text.png: truth and imagination from words alone, of {", ".join(TASKS.values())}')
