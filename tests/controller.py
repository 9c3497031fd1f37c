"""
The smallest controller: a linear map from what is seen and wanted to the action, found by CMA-ES inside the dream of
a world model (as in World Models, arXiv:1803.10122, where it is what acts). It plays the closed loop of the demo world.

    pip install cma
    python tests/controller.py --ckpt=out/ckpt.safetensors --labelled=demo/labelled

Its inputs are the leading principal components of whole frames of latents: of now, and of the goal less now. Printed
are the distance to the goal in the dream, beside that of doing nothing, and success in the world.
"""
import os
import sys

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
sys.path.insert(0, ROOT)
import data  # noqa: E402, before torch

import cma  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import model  # noqa: E402, from the root
import plan  # noqa: E402, from the root

# --------------------------------------------------------------------------------------------------------------------
ckpt = 'out/ckpt.safetensors'
labelled = 'demo/labelled'
components = 16
generations = 100
population = 24
starts = 80             # clips of the data that the dream begins at, drawn anew in every generation: dream_errors
                        # gives goals in turns of 5
episodes = 100          # of the closed loop
seed = 0
config = data.override(globals(), sys.argv[1:])
# --------------------------------------------------------------------------------------------------------------------
STEPS = 5

torch.set_num_threads(1)
planner = plan.Planner(ckpt, plan.config | dict(samples=2, elites=2), tell=False)
net = planner.model
context = planner.trained['eval_context']
clips = data.Clips(data.open_sets(labelled), [], context + STEPS, planner.frameskip, planner.frame_size, starts, 1.0, 0.1,
                   seed)
mean, basis = None, None


def inputs(now, goal):
    """(B, 2 components + 1) of latents (B, N, D)."""
    now, goal = ((z.flatten(1) - mean) @ basis for z in (now, goal))
    return torch.cat((now, goal - now, torch.ones(len(now), 1)), dim=1)


def controller(weights):
    """What policies of plan.py are, (before, now, goal, left) -> actions (B, A), of candidates' weights (candidates,
    inputs, A), each of which has its part of the rows."""
    def act(before, now, goal, left):
        x = inputs(now, goal).unflatten(0, (len(weights), -1))
        return (x @ weights).flatten(0, 1)
    return act


@torch.no_grad()
def dream(weights, step):
    """Mean distance to the goal (candidates,), in units of two random frames, of weights (candidates, inputs, A)."""
    batch = clips[step]
    z = model.standard(model.encode_frames(planner.encoder, batch['x'], planner.autocast), net.stats)
    many = [x.repeat(len(weights), *[1] * (x.dim() - 1)) for x in (z, batch['a'], batch['a_mask'], batch['z_mask'])]
    off = model.dream_errors(net, controller(weights), *many, context, STEPS, model.cost_weights(net), seed=step)
    return off.unflatten(0, (-1, starts)).mean(dim=1) / net.stats['z_pair']


z = model.standard(model.encode_frames(planner.encoder, clips.sample(64, 4), planner.autocast), net.stats).flatten(1)
mean = z.mean(dim=0)
basis = torch.pca_lowrank(z - mean, components)[2]
basis = basis / ((z - mean) @ basis).std(dim=0)
shape = 2 * components + 1, net.config['action_dim']
search = cma.CMAEvolutionStrategy(np.zeros(np.prod(shape)), 0.3, dict(popsize=population, seed=seed + 1, verbose=-9,
                                                                      CMA_diagonal=True))
for step in range(generations):
    candidates = search.ask()
    costs = dream(torch.tensor(np.array(candidates), dtype=torch.float32).view(-1, *shape), step)
    search.tell(candidates, costs.tolist())
    if step % 10 == 9:
        best = torch.tensor(search.mean, dtype=torch.float32).view(1, *shape)
        print(f'generation {step + 1}: distance {dream(best, 10000).item():.4f}, of doing nothing '
              f'{dream(0 * best, 10000).item():.4f}', flush=True)

planner.o.method = 'policy'
net.act = controller(best)
plan.ckpt = ckpt
o = plan.types.SimpleNamespace(**plan.config | dict(episodes=episodes, seed=seed + 1))
plan.check_loop(o)
sims = plan.robots(o, planner)
rng = np.random.default_rng(o.seed + 1_000_000)
questions = [plan.question(sim, i, rng, o.goals, o.goal_steps, planner.past) for i, sim in enumerate(sims)]
poses, executed, _, _ = plan.play(planner.act, sims, questions, o.budget, True)
row, _ = plan.score(sims, questions, poses, executed)
plan.tell('linear controller', row | plan.times(planner, episodes), sims[0].unit, episodes)
