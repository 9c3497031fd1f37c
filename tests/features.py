"""
How well distances between features tell 'within the tolerance' from 'twice the tolerance': a planner cannot do better
than the distance that it minimises. No training.

    python tests/features.py --encoder_path=dinov2_vits14.safetensors                               # Push-T
    python tests/features.py --encoder_path=dinov2_vits14.safetensors --env=tests/simulators.py:FetchPush

Pairs of frames of the same scripted episode, where what the robot senses differs by less than twice the tolerance, so that
only the thing is left to tell: has it moved by a quarter of the tolerance to
all of it, or about twice the tolerance away (1.5 to 2.5)? The
number is the area under the curve: how often a pair of the first kind has the smaller distance (.5: chance).
Distances: 'all' is the mean over tokens of the squared distance, plan.py's; 'moving' weighs a token by its variance in
the data, 'rare' by the inverse of it; 'most' is the mean of the squares of the tokens' squared distances, 'root' of
their roots.
"""
import os
import sys

import numpy as np
import torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
sys.path.insert(0, ROOT)
import data  # noqa: E402, from the root
import model  # noqa: E402
import plan  # noqa: E402

# --------------------------------------------------------------------------------------------------------------------
env = 'tests/simulators.py:PushT'
encoder = 'dinov2_vits14'
encoder_path = ''
layers = '2,5,8,11'
grids = '112x1,224x2,224x1'     # pixels of a side, x patches of a side that are averaged
episodes = 30
steps = 300                     # of an episode; every fifth frame counts
seed = 0
config = data.override(globals(), sys.argv[1:])
# --------------------------------------------------------------------------------------------------------------------


def play(sim, size):
    """Frames (E, T, 3, size, size), poses (E, T, ..) and what the robot senses (E, T, ..) of the simulator's script."""
    frames, poses, senses = [], [], []
    for e in range(episodes):
        rng = np.random.default_rng([seed, e])
        sim.elsewhere(e, rng)
        act = sim.script(rng)
        for t in range(steps):
            if t % 5 == 0:
                frames.append(sim.frame())
                poses.append(sim.pose())
                senses.append(np.array(sim.sensors()))
            sim.step(act())
    T = len(frames) // episodes
    return (torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).unflatten(0, (episodes, T)),
            np.stack(poses).reshape(episodes, T, -1), np.stack(senses).reshape(episodes, T, -1))


def thing(pose, other):
    """The other pose with this one's robot, so that far() asks for the thing alone."""
    return np.concatenate((pose[:robot], other[robot:]))


def pairs(poses, senses):
    """(e, i, j) of pairs whose thing is within the tolerance, and of those where it is about twice as far."""
    near, far = [], []
    for e, (pose, sense) in enumerate(zip(poses, senses)):
        for i in range(len(pose)):
            for j in range(i):
                if np.linalg.norm(sense[i] - sense[j]) > 2 * tolerance:
                    continue
                gap, reached = sim.far(pose[i], thing(pose[i], pose[j]), pose[i])
                if reached and gap > tolerance / 4:
                    near.append((e, i, j))
                elif not reached and 1.5 * tolerance < gap < 2.5 * tolerance:
                    far.append((e, i, j))
    return np.array(near), np.array(far)


def below(near, far):
    """How often one of near is smaller than one of far."""
    order = np.sort(far)
    left, right = np.searchsorted(order, near, 'left'), np.searchsorted(order, near, 'right')
    return 1 - (left + right).mean() / 2 / len(far)


def distances(z, at, variance):
    """{name: (P,)} of the pairs at (P, 3) of latents z (E, T, N, D)."""
    off = torch.stack([(z[e, i] - z[e, j]).square().mean(dim=-1) for e, i, j in at])        # (P, N)
    return {'all': off.mean(dim=-1), 'moving': (off * variance).mean(dim=-1), 'rare': (off / variance).mean(dim=-1),
            'most': off.square().mean(dim=-1), 'root': off.sqrt().mean(dim=-1)}


torch.set_num_threads(1)
print(f'{env}, {episodes} episodes of {steps // 5} frames, seed {seed}', flush=True)
head = 'all moving rare most root'.split()
for grid in grids.split(','):
    size, pool = (int(v) for v in grid.split('x'))
    sim = plan.simulator(env, (size, size))
    tolerance = getattr(sim, 'near', 20.)
    frames, poses, senses = play(sim, size)
    robot = senses.shape[-1]            # poses begin with what the robot senses
    near, far = pairs(poses, senses)
    if grid == grids.split(',')[0]:
        print(f'{len(near)} pairs within {tolerance:g}, {len(far)} at twice that\n\n| pixels | layer | {" | ".join(head)} |'
              f'\n{"|---" * 7}|', flush=True)
    for layer in layers.split(','):
        encode = model.load_encoder(encoder, encoder_path, int(layer), size, size, pool)
        z = model.encode_frames(encode, frames, torch.autocast('cpu', enabled=False))
        variance = z.flatten(0, 1).var(dim=0).mean(dim=-1)      # (N,)
        within, beyond = distances(z, near, variance), distances(z, far, variance)
        areas = [below(within[name].numpy(), beyond[name].numpy()) for name in head]
        print(f'| {size}, pool {pool} | {layer} | {" | ".join(f"{area:.2f}" for area in areas)} |', flush=True)
