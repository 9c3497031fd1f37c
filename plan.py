"""
Whatever acts: planners, which search actions inside a trained world model for a goal picture, the
controller of robots, simulators, recording, the closed loop.

    python plan.py                                          # closed loop in the demo world
    python plan.py --env=tests/simulators.py:PushT --ckpt=pusht/ckpt.safetensors    # in another
    python plan.py --goal=out/goal.png                      # one episode, towards a picture
    python plan.py --start=now.png --goal=goal.png          # one plan between two pictures
    python plan.py --watch=frames/ --goal=goal.png          # a new picture in, a line out
    python plan.py --record=gym_pusht/PushT-v0 --policy=noise --out=pusht   # a dataset

Leaves plan.json, plan.mp4 and, where there is none, goal.png, the first episode's (closed loop), or
plan.npy and plan.mp4 (pictures), in the folder of the checkpoint. Letters: E episodes at once, M
candidates, H model steps, A action width, Tc frames of context, N tokens, D channels.
"""
import copy
import dataclasses
import functools
import glob
import importlib
import itertools
import json
import math
import mimetypes
import os
import re
import runpy
import signal
import sys
import time
import types

import data     # before torch: it sets how threads wait

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from decode import load_decoder
from model import (WorldModel, add_state, channel_weights, compile_layers, cost_weights, distance,
                   encode_frames, half_weights, load, open_run, pictures, remember, restore_probe,
                   robot_state, robot_stats, rollout, standard, unstandard)

# --------------------------------------------------------------------------------------------------
ckpt = 'out/ckpt.safetensors'        # or owner/name, of the hub
out_dir = ''            # '' = the folder of the checkpoint
encoder_path = ''       # the encoder's weights; '' = where training found them
robot = 0               # whose actions: number of the labelled dataset, from 0
# a plan between two pictures, or for every new picture in a folder
start = ''              # picture of now, of a robot at rest, or several, a step apart: a.png,b.png
goal = ''               # a picture of what is wanted
start_state = ''        # what the robot senses at --start and is to sense at --goal, where it is to
goal_state = ''         # count: numbers in the dataset's units, in order or as name=number,..
watch = ''              # a folder of pictures, read in order of their names until Ctrl-C
# search
method = 'cem'          # cem, icem, mppi, adam (gradients) or policy (no search, see train.py)
horizon = 5             # model steps
coarse = ''             # a checkpoint with a longer frameskip and --action_pca: while the goal is
                        # far, what it imagines a step of its later is the goal of the search
coarse_horizon = 2      # its steps; it tries samples x iterations ways of the data's own actions
samples = 64            # candidates per iteration; adam: starts
elites = 8              # the best of them, which the next iteration is drawn from
iterations = 5
init_std = 1.0          # of the first candidates of a search, in units of the actions' std: wider
                        # where the data's range is beyond five of these
warm_std = 0.0          # where a search begins from the last plan; 0 = init_std
min_std = 0.05          # in units of the actions' std, so that the search does not collapse
beta = 2.0              # the noise has power 1 / f^beta over a plan's rows; 0 = white
controller = False      # the policy acts at every frame of the camera: towards what a search has
                        # imagined for a model step later, or the goal (--method=policy)
proposals = 0           # so many of the first candidates of a search come from the policy, and
proposal_std = 0.3      # noise of this size makes them differ, in units of the actions' std
keep = 0.3              # icem: share of the elites that the next iteration and plan keep
temperature = 0.5       # mppi: of the weights, in std of the elites' costs
step_size = 0.1         # adam: in units of the actions' std
warm = True             # begin from the last plan, shifted by the steps that were executed
budget_ms = 0.0         # stop the search at this deadline, whatever iterations says; 0 = none
chunk = 0               # candidates imagined at once; 0 = 1,024 tokens on a CPU, else 4,096 plans
# the model's use and the cost
K = 1                   # denoising steps per imagined frame
text = ''               # what is being done, in words, of models with --text; '' = not known
guide = 1.0             # above 1: imagination does more of what actions and text say
seeds = 1               # noises under which every candidate is imagined; the mean counts
cost = 'all'            # distance to the goal: all = over the steps, last = at the last one
mask = ''               # a picture, white where the goal counts; '' = everywhere
state_weight = 1.0      # of the robot's own state beside the picture, where the goal's is known: 1
                        # = for random pairs of frames as much as the picture; 0 = none
smooth = 0.0            # weight of squared changes from row to row, in normalised units
hold = 0.0              # rest while the robot is that close to the goal's place, in the dataset's
                        # units, as it senses or else a probe of observation.state reads: where
                        # that is all that the goal asks for; 0 = never
hold_latents = 0.0      # likewise where neither does: latents are so near, of random frames 1
rest = ''               # how they rest: zero (actions are motions) or state (they are targets)
# closed loop
env = 'demo'            # or a class of a file: tests/simulators.py:PushT, ...:PointMaze
episodes = 20           # also of a recording
blind_episodes = 5      # of these a model of random weights plays, as it takes long; 0 = all
goals = 'expert'        # expert: where a script is goal_steps later; random: anywhere, at rest
goal_steps = 0          # environment steps; 0 = 10 in the demo world, else 25
budget = 0              # environment steps, fixed in advance; 0 = twice goal_steps
replan = 1              # model steps that are executed before planning again
shift = ''              # also with another: light, background, object, camera (or several)
frame_height = 0        # pixels that are drawn, as the dataset was; 0 = what the encoder sees
frame_width = 0         # 0 = square
# recording
record = ''             # demo, any gymnasium environment, or file.py:Name
out = ''                # the new dataset's folder
policy = 'random'       # random, noise (correlated in time), script or solve (a simulator's: free
                        # play, tasks done), file.py:function; script:3,solve:1 is one per episode,
                        # by weight; or model: the planner of --ckpt, to the closed loop's goals
explore = 0.3           # noise on its actions, in units of their std, with a memory of 10 steps
steps = 300             # the longest episode; 0 = until the environment ends it
fps = 0.0               # frames per second; 0 = the environment's own
draw_every = 1          # frames per drawn one, which is repeated: for training at a lower --fps
seed = 0
device = 'auto'
dtype = 'auto'          # float32 or bfloat16; auto = bfloat16 where the hardware multiplies it
compile = False         # torch.compile: up to a minute at the start, for a closed loop
config = data.override(globals(), sys.argv[1:])
# --------------------------------------------------------------------------------------------------


# --------------------------------------------------------------------------------------------------
# Planners: functions cost(actions (E, M, H, A), iteration) -> (E, M), lower is better, where to
# begin, mean and std (E, H, A), and bounds of every candidate, low and high, all in normalised
# units. H are rows of the dataset here, A numbers of a row. o: this file's options, by name.
# deadline: of time.perf_counter(); an iteration that would end after it is not begun, except for
# the first. Each returns a plan (E, H, A), the best cost of every iteration (iterations, E), and
# the elites (E, n, H, A), which icem takes up in the next search as `carried` (E, n, up to H, A).

def coloured(E, M, H, A, beta, generator):
    """Gaussian noise (E, M, H, A) with power 1 / f^beta over the H steps (Timmer & Koenig 1995, as
    in iCEM, arXiv:2008.06389) and unit variance at every step of any H: a circular filter of white
    noise, whose rows have norm one. The mean (f = 0) has the power of the lowest frequency."""
    f = torch.fft.rfftfreq(H)
    f[0] = f[1] if H > 1 else 1
    kernel = torch.fft.irfft(f ** (-beta / 2), n=H)
    step = torch.arange(H)
    circular = kernel[(step[:, None] - step) % H] / kernel.norm()       # (H, H)
    return torch.einsum('st,emta->emsa', circular, torch.randn(E, M, H, A, generator=generator))


def draw(mean, std, low, high, samples, o, generator):
    """Candidates (E, samples, H, A) within bounds; the first is the mean itself."""
    E, H, A = mean.shape
    std = std.clamp(min=o.min_std)[:, None]
    actions = mean[:, None] + std * coloured(E, samples, H, A, o.beta, generator).to(mean)
    actions[:, 0] = mean
    return actions.clamp(low, high)


def replace_last(actions, proposals):
    return torch.cat((actions[:, :actions.shape[1] - proposals.shape[1]], proposals), dim=1)


def best(actions, costs, n):
    """The n best of candidates (E, M, H, A) by costs (E, M): (E, n, H, A) and (E, n), best
    first."""
    costs, which = costs.topk(n, dim=1, largest=False)
    return actions.take_along_dim(which[:, :, None, None], dim=1), costs


def in_time(iterations, deadline):
    """0, 1, .. as range(iterations), but no more once another one, as long as those so far, would
    end after the deadline."""
    begun = time.perf_counter()
    for i in range(iterations):
        yield i
        now = time.perf_counter()
        if now + (now - begun) / (i + 1) > deadline:
            break


def cem(cost, mean, std, low, high, o, generator, deadline, carried, proposals):
    """Cross-entropy method, as in DINO-WM (arXiv:2411.04983): mean and std move to those of the
    elites; the last mean. On top of it: bounds, a least std, and coloured noise."""
    best_costs = []
    for i in in_time(o.iterations, deadline):
        actions = draw(mean, std, low, high, o.samples, o, generator)
        if i == 0:
            actions = replace_last(actions, proposals)
        elites, costs = best(actions, cost(actions, i), o.elites)
        mean = elites.mean(dim=1)
        std = elites.std(dim=1)
        best_costs.append(costs[:, 0])
    return mean.clamp(low, high), torch.stack(best_costs), elites


def icem(cost, mean, std, low, high, o, generator, deadline, carried, proposals):
    """iCEM (arXiv:2008.06389): ever fewer samples, max(2 elites, samples / 1.25^i), of coloured
    noise; a share `keep` of the elites stays among the candidates, and with `carried` those of the
    time step before, shifted, their missing last steps drawn anew; the best candidate of the last
    iteration. Differences: the mean is the first candidate of every iteration, not of the last
    alone; a least std."""
    best_costs = []
    elites = None
    for i in in_time(o.iterations, deadline):
        samples = max(2 * o.elites, int(o.samples / 1.25 ** i))
        actions = draw(mean, std, low, high, samples, o, generator)
        if i == 0:
            actions = replace_last(actions, proposals)
        if i == 0 and carried is not None:
            elites = draw(mean, std, low, high, 1 + carried.shape[1], o, generator)[:, 1:]
            elites[:, :, :carried.shape[2]] = carried
        if elites is not None:
            actions = torch.cat((actions, elites[:, :math.ceil(o.keep * o.elites)]), dim=1)
        elites, costs = best(actions, cost(actions, i), o.elites)
        mean = elites.mean(dim=1)
        std = elites.std(dim=1)
        best_costs.append(costs[:, 0])
    return elites[:, 0], torch.stack(best_costs), elites


def mppi(cost, mean, std, low, high, o, generator, deadline, carried, proposals):
    """MPPI as in TD-MPC2 (arXiv:2310.16828): mean and std of the elites, weighted by exp(-cost /
    temperature); the last mean. Differences: costs are counted from the best in units of the
    elites' standard deviation, as a distance of latents has no scale of its own; a policy's ways
    are among the first candidates alone; the mean is returned, not a drawn elite."""
    best_costs = []
    for i in in_time(o.iterations, deadline):
        actions = draw(mean, std, low, high, o.samples, o, generator)
        if i == 0:
            actions = replace_last(actions, proposals)
        elites, costs = best(actions, cost(actions, i), o.elites)
        regret = (costs - costs[:, :1]) / costs.std(dim=1, keepdim=True).clamp(min=1e-12)
        weight = torch.softmax(-regret / o.temperature, dim=1)[:, :, None, None]
        mean = (weight * elites).sum(dim=1)
        variance = (weight * (elites - mean[:, None]).square()).sum(dim=1)
        std = variance.sqrt()
        best_costs.append(costs[:, 0])
    return mean.clamp(low, high), torch.stack(best_costs), elites


def adam(cost, mean, std, low, high, o, generator, deadline, carried, proposals):
    """Gradient descent on the actions through the model, by Adam (arXiv:1412.6980) from `samples`
    starts at once, with steps back into the bounds (arXiv:2512.09929 finds Adam better than plain
    descent); the best ever seen."""
    actions = draw(mean, std, low, high, o.samples, o, generator)
    actions = replace_last(actions, proposals).requires_grad_()
    optimizer = torch.optim.Adam([actions], lr=o.step_size)
    best_costs = []
    elites = actions.detach()[:, :0]
    costs = actions.new_zeros(len(actions), 0)
    for i in in_time(o.iterations + 1, deadline):       # the last sees where the last step led to
        if i > 0:
            actions.grad, = torch.autograd.grad(total, actions)
            optimizer.step()
            actions.data.clamp_(low, high)
        with torch.set_grad_enabled(i < o.iterations):      # else a search has no gradients
            now = cost(actions, i)
            total = now.sum()
        seen = torch.cat((elites, actions.detach()), dim=1)
        elites, costs = best(seen, torch.cat((costs, now.detach()), dim=1), o.elites)
        best_costs.append(costs[:, 0])
    return elites[:, 0], torch.stack(best_costs), elites


def no_search(cost, mean, std, low, high, o, generator, deadline, carried, proposals):
    """The best of the proposals, as they are: the policy's own way alone, or those of --coarse."""
    ways, costs = best(proposals, cost(proposals, 0), 1)
    return ways[:, 0], costs.T, ways


# --------------------------------------------------------------------------------------------------
# A plan: the model imagines every candidate, its distance to the goal is the cost. All candidates
# of an iteration see the same denoising noise, and share the context's keys and values, which are
# computed once. The noise of the search is coloured over all rows of a plan: drawn apart, those of
# a step would cancel each other.

def to_rows(a, rows, width):
    """Actions of model steps (.., H, A) as rows of the dataset (.., H x rows, width), which the
    search is over."""
    return a[..., :rows * width].unflatten(-1, (rows, width)).flatten(-3, -2)


def to_steps(a, rows, A):
    """The inverse of to_rows, padded with zeros to A."""
    a = a.unflatten(-2, (-1, rows)).flatten(-2)
    return F.pad(a, (0, A - a.shape[-1]))


def goal_cost(imagine, z_goal, a_last, known, weight, o, seed, rows, width):
    """The cost of a plan, a function (actions (E, M, H, A), iteration) -> (E, M): distance to the
    goal and smoothness from row to row, also from the last action a_last (E, A) where it is known
    (E,)."""
    last = to_rows(a_last[:, None], rows, width)[:, None, -1:]          # (E, 1, 1, width)

    def cost(actions, i):
        distances = []
        for s in range(o.seeds):
            noise = hash((seed, i, s)) % 2 ** 31
            z = imagine(actions, noise)
            if o.cost == 'last':
                z = z[:, :, -1:]
            distances.append(distance(z, z_goal[:, None, None], weight).mean(dim=2))
        way = to_rows(actions, rows, width)                 # (E, M, H x rows, width)
        change = (way[:, :, :1] - last) * known[:, None, None, None]
        change = torch.cat((change, way.diff(dim=2)), dim=2)
        return torch.stack(distances).mean(dim=0) + o.smooth * change.square().mean(dim=(2, 3))
    return cost


def plans_at_once(z_goal, o):
    """How many candidates of each goal (E, N, D) are imagined together."""
    all_at_once = 4096
    if z_goal.device.type == 'cpu':
        all_at_once = max(1, 1024 // z_goal.shape[1])
    return max(1, (o.chunk or all_at_once) // len(z_goal))


def in_parts(step_cost, chunk, rows, A):
    """goal_cost's function for candidates (E, M, H x rows, width), so many at a time."""
    def cost(actions, i):
        parts = to_steps(actions, rows, A).split(chunk, dim=1)
        cost = step_cost
        if torch.is_grad_enabled() and len(parts) > 1:      # keeps the graph of one chunk at a time
            cost = functools.partial(checkpoint, step_cost, use_reentrant=False)
        return torch.cat([cost(part, i) for part in parts], dim=1)
    return cost


def propose(model, imagine, z_goal, low, high, rows, A, o, seed):
    """Ways (E, M, H x rows, width) of the policy through the model, M = o.proposals or 1, all but
    the first with noise on their actions. low, high (H x rows, width): bounds. Of a --coarse model
    instead some of the data's own steps, in any order."""
    E = len(z_goal)
    generator = torch.Generator().manual_seed(hash((seed, 2)) % 2 ** 32)    # not the search's
    known = model.stats.get('a_chunks')
    if known is not None:
        shape = E, o.samples * o.iterations, o.horizon
        return known[torch.randint(len(known), shape, generator=generator)]
    noise = coloured(E, max(1, o.proposals), *low.shape, o.beta, generator).to(low)
    noise[:, 0] = 0
    noise, least, most = (to_steps(v, rows, A) for v in (o.proposal_std * noise, low, high))

    def follow(noise):          # (E, M, H, A)
        E, M, H, _ = noise.shape
        goal = z_goal.repeat_interleave(M, dim=0)
        way = []

        def act(before, now, h):
            left = torch.full((len(now),), H - h, device=now.device)
            a = model.act(before, now, goal, left) + noise[:, :, h].flatten(0, 1)
            way.append(torch.clamp(a, least[h], most[h]))
            return way[-1]

        imagine(noise, act=act)         # whose actions are not noise's
        return torch.stack(way, dim=1).unflatten(0, (E, M))

    ways = torch.cat([follow(part) for part in noise.split(plans_at_once(z_goal, o), dim=1)], dim=1)
    return to_rows(ways, rows, low.shape[1])


def plan(model, z_ctx, a_ctx, z_goal, o, seed=0, low=-5.0, high=5.0, a_mask=None, mean=None,
         carried=None, tokens=None, gone=()):
    """Normalised actions (E, horizon, A) that lead the model from its context to the goal; info.

    z_ctx (E, Tc, N, D), z_goal (E, N, D): normalised latents. a_ctx (E, Tc, A): a_ctx[:, t] is what
    led to z_ctx[:, t], where a_mask (E, Tc) says that it is known (by default all but the first).
    low, high: bounds, numbers or (rows, width): an action is so many rows of so many numbers, and
    zeros up to A. mean (E, horizon, A) and carried (E, n, up to horizon, A): where to begin, the
    last plan and its elites, shifted. tokens (N,): their weights. gone: see remember.
    info: 'cost' (iterations, E), 'elites', 'imagine': actions (E, M, H, A) -> (E, M, H, N, D)."""
    deadline = time.perf_counter() + o.budget_ms / 1000 if o.budget_ms else math.inf
    E, Tc, A = a_ctx.shape
    rows, width = np.shape(low) or (1, A)
    low, high = (torch.as_tensor(v).to(z_ctx).expand(rows, width).repeat(o.horizon, 1)
                 for v in (low, high))
    if a_mask is None:
        a_mask = torch.arange(Tc, device=z_ctx.device).expand(E, Tc) > 0
    z_goal = torch.where(z_ctx[:, -1].isnan(), torch.nan, z_goal)       # nor is what follows known
    with torch.no_grad():
        text = data.text_bytes(o.text)[None].to(z_ctx.device)
        cache = remember(model, z_ctx, a_ctx, a_mask, Tc + o.horizon, seed=seed, text=text,
                         gone=gone)

    def imagine(actions, seed=seed, act=None):
        M = actions.shape[1]
        a = torch.cat((a_ctx[:, None].expand(-1, M, -1, -1), actions), dim=2)
        known = F.pad(a_mask, (0, o.horizon), value=True).repeat_interleave(M, dim=0)
        grad = torch.is_grad_enabled() and 'all'
        z = rollout(model, z_ctx, a.flatten(0, 1), known, o.K, seed=seed, cache=cache, grad=grad,
                    act=act, text=text)
        return z.unflatten(0, (E, M))

    weight = cost_weights(model, tokens, o.state_weight, o.robot)
    step_cost = goal_cost(imagine, z_goal, a_ctx[:, -1], a_mask[:, -1], weight, o, seed, rows,
                          width)
    cost = in_parts(step_cost, plans_at_once(z_goal, o), rows, A)
    std = o.init_std if mean is None else o.warm_std or o.init_std
    mean = to_rows(z_ctx.new_zeros(E, o.horizon, A) if mean is None else mean, rows, width)
    carried = None if carried is None else to_rows(carried, rows, width)
    std = std * (torch.maximum(-low, high) / 2 - 1.5).clamp(min=1)      # 1.0 within 5
    with torch.no_grad():
        ways = mean[:, None][:, :0]
        if o.method == 'policy' or o.proposals:
            ways = propose(model, imagine, z_goal, low, high, rows, A, o, seed)
        search = dict(cem=cem, icem=icem, mppi=mppi, adam=adam, policy=no_search)[o.method]
        generator = torch.Generator().manual_seed(seed)
        actions, costs, elites = search(cost, mean, std.expand_as(mean), low, high, o, generator,
                                        deadline, carried, ways)
    info = dict(cost=costs, elites=to_steps(elites, rows, A), imagine=imagine)
    return to_steps(actions, rows, A), info


# --------------------------------------------------------------------------------------------------
# the controller of robots

class Planner:
    """A trained model as the controller of a robot, or of E robots at once: pictures in, the next
    action out.

    It knows the pictures, the actions that were executed, and nothing else. options: this file's
    constants, for example plan.config | {'samples': 128}. past: how many frames the first call
    wants. seconds, iterations: of every search so far. tell: print a line about each.
    action_names, state_names: of the numbers of a row and a state, as in the robot's dataset;
    camera: whose pictures these are, as lerobot's robots call it; fps: rows a second. Empty or 0
    where the checkpoint does not say; motions of poses have no names.
    """
    def __init__(self, ckpt, options=config, tell=True):
        for name, value in options.items():
            data.check(name, value)
        o = self.o = types.SimpleNamespace(**options)
        if o.elites > o.samples and o.method != 'policy':
            sys.exit(f'--elites={o.elites}: wants at most samples={o.samples}')
        if o.replan > o.horizon:
            sys.exit(f'--replan={o.replan}: a plan has only horizon={o.horizon} steps')
        self.tell = tell
        self.device = data.pick_device(o.device)
        self.autocast = data.autocast(self.device, o.dtype)
        self.model, self.trained, self.encoder = open_run(
            ckpt, self.device, o.K, o.guide, o.text, o.encoder_path)
        self.model.requires_grad_(False)
        self.check_model(ckpt)
        self.make_fast(self.model)
        self.frame_size = self.encoder.size, self.encoder.width
        self.key = self.told('action_keys') or self.trained['action'] or 'action'   # column
        self.a_mean, self.a_std, self.a_low, self.a_high = robot_stats(
            self.model.stats, o.robot, ckpt)
        # constant dimensions stay at their mean
        self.scale = torch.where(self.a_std > 1e-6, self.a_std, torch.inf)
        self.frameskip, self.width = self.a_mean.shape
        self.used = self.a_mean.numel()         # of the padded width
        self.tokens = self.read_mask(o.mask) if o.mask else None
        self.s_mean = self.s_std = torch.zeros(0)       # of the state, where the model has one
        self.S = self.model.config['state_dim']
        if self.S:
            self.s_mean, self.s_std, _ = robot_state(self.model.stats, o.robot)
        self.reader = restore_probe(self.model.stats)
        names = self.trained['probe_names'].split(',')
        self.own = [i for i, name in enumerate(names) if name.startswith('observation.state.')]
        if o.hold and not (o.rest and (len(self.s_mean) or self.own)):
            sys.exit(f'--hold={o.hold}: wants --rest, and a model that was trained with --state or '
                     '--probe=observation.state')
        if o.hold_latents and not (o.rest and 'z_pair' in self.model.stats):
            sys.exit(f'--hold_latents={o.hold_latents}: wants --rest, and a model that is not of '
                     'before there was --state')
        if o.rest == 'state' and len(self.s_mean) != self.width:
            sys.exit(f'--rest=state: actions have {self.width} numbers, states {len(self.s_mean)}')
        if o.rest == 'state' and self.trained['action_mode'] != 'absolute':
            sys.exit('--rest=state: actions are motions (--action_mode='
                     f'{self.trained["action_mode"]}), wants --rest=zero')
        self.past = (self.trained['eval_context'] - 1) * self.frameskip + 1
        self.action_names = re.findall('[^,]+', self.told('action_names'))
        self.state_names = re.findall('[^,]+', self.told('state_names'))
        self.camera = self.told('cameras').removeprefix('observation.images.')
        self.fps = float(self.told('rates') or 0)
        self.coarse = self.read_coarse(o.coarse) if o.coarse else None
        self.restart()

    def check_model(self, ckpt):
        o = self.o
        if o.method == 'policy' and (o.text or o.guide != 1):
            sys.exit('--method=policy: imagines nothing, it comes without --text and --guide')
        weighs = o.mask or o.smooth or o.cost != 'all'
        if o.method == 'policy' and weighs and not o.coarse:
            sys.exit('--method=policy: weighs nothing, comes without --mask, --smooth and --cost')
        if not self.model.config['action_dim']:
            sys.exit(f'{ckpt}: was trained without actions, there is nothing to search')
        if 'a_basis' in self.model.stats:
            sys.exit(f'{ckpt}: was trained with --action_pca, which is for --coarse: no robot can '
                     'execute what it knows as actions')
        if o.proposals > o.samples:
            sys.exit(f'--proposals={o.proposals}: wants at most samples={o.samples}')
        if o.method == 'policy' and (o.proposals or o.replan > 1):
            sys.exit(f'--method=policy: comes without --proposals={o.proposals}, and with '
                     f'--replan=1, not {o.replan}')
        if (o.method == 'policy' or o.proposals or o.controller) and not self.model.policy:
            sys.exit(f'--method={o.method} --proposals={o.proposals} --controller={o.controller}: '
                     f'{ckpt} was trained without --policy')

    def told(self, what):
        """What the checkpoint says of this robot's dataset; '' in an older one."""
        return (self.trained[what] + ';' * self.o.robot).split(';')[self.o.robot]

    def read_coarse(self, path):
        """The model of --coarse, which has to know latents and states as self.model does."""
        if self.o.budget_ms:
            sys.exit('--coarse: comes without --budget_ms, as sub-goals take their time')
        model, _ = load(path, self.device)
        if 'a_basis' not in model.stats:
            sys.exit(f'--coarse={path}: was trained without --action_pca')
        for name in 'z_std', 's_mean', 's_std':     # as of no other encoder, or fit of one
            mine, other = (m.stats.get(name, torch.zeros(0)).cpu() for m in (self.model, model))
            if not torch.equal(mine, other):
                sys.exit(f'--coarse={path}: has another {name} than --ckpt: train it with --init '
                         'of that, on the same datasets with the same --state')
        rows = len(robot_stats(model.stats, self.o.robot, path)[0])
        self.stride = rows // self.frameskip
        if rows % self.frameskip or self.stride < 2:
            sys.exit(f'--coarse={path}: wants a step as long as two or more of --ckpt, of '
                     f'{self.frameskip} rows each, got {rows}')
        self.make_fast(model.requires_grad_(False))
        print(f'sub-goals {rows} rows ahead by {path}', flush=True)
        return model

    def make_fast(self, model):
        if self.autocast._enabled:
            half_weights(model, self.autocast.fast_dtype)
        if self.o.compile:
            compile_layers(model)

    def read_mask(self, path):
        """How white a picture is where the tokens are (N,)."""
        white = data.read_image(path, self.frame_size).float().mean(dim=0)[None]       # (1, H, W)
        white = F.adaptive_avg_pool2d(white, self.encoder.grid).flatten()
        if len(white) == 1:
            sys.exit(f'--mask={path}: the one token of {self.encoder.name} has no places')
        if not white.any():
            sys.exit(f'--mask={path}: is black, wants white where the goal counts')
        return white.to(self.device)

    def restart(self):
        """As made: forget the times of searches, too."""
        self.seconds = []
        self.acting = []        # seconds of the controller, for all robots at once
        self.iterations = []
        self.reset()

    def reset(self):
        """Forget what was seen and planned: a new episode."""
        self.z = None           # latents of the context (E, Tc, N, D); self.a, self.known: actions
        self.gone = []          # latents of the frames before it
        self.goal = None
        self.last_plan = None
        self.last_elites = None
        self.held = None        # which robots rest until their model step is over
        self.left = None        # model steps that the policy has (E,); self.steps: in this one
        self.recent = []        # latents of the frames of the last model step, for the controller
        self.sub_goal = None    # or the goal, once that is near (E, N, D)
        self.path = None        # what the last search imagines (E, H, N, D), likewise
        self.done = []          # rows executed since the context's last frame
        self.queue = []         # rows planned and not yet executed

    def latents(self, x):
        """Normalised latents (.., N, D) of uint8 frames (.., H, W, 3)."""
        x = torch.as_tensor(x)
        if aspects_differ(x.shape[-3:-1], self.frame_size):
            data.warn(f'pictures of {x.shape[-2]} x {x.shape[-3]} pixels are squeezed to '
                      f'{self.frame_size[1]} x {self.frame_size[0]}: right if training did')
        flat = data.resize(x.flatten(0, -4).permute(0, 3, 1, 2), self.frame_size)
        z = encode_frames(self.encoder, flat, self.autocast)
        return standard(z, self.model.stats).unflatten(0, x.shape[:-3])

    def with_state(self, z, states):
        """Latents (.., N, D) and the robot's states (.., width) as one more token, where the model
        has one; None: they are not known."""
        if not self.S:
            return z
        if states is None:
            states = torch.full((1,), torch.nan)
        states = torch.as_tensor(np.asarray(states, np.float32))
        s = (states - self.s_mean) / torch.where(self.s_std > 1e-6, self.s_std, torch.inf)
        s = F.pad(s, (0, self.S - s.shape[-1]), value=torch.nan)
        return add_state(z, s.to(z).expand(*z.shape[:-2], self.S))

    def physical(self, a):
        """(.., A) normalised -> (.., frameskip, width): rows of the dataset, in its units."""
        a = a[..., :self.used].unflatten(-1, (self.frameskip, self.width))
        return a.cpu() * self.a_std + self.a_mean

    def normalised(self, rows):
        """The inverse of physical, as rows (.., frameskip, width)."""
        rows = torch.as_tensor(rows, dtype=torch.float32)
        return ((rows - self.a_mean) / self.scale).to(self.device)

    def begin(self, z):
        """Latents (E, Tc, N, D) of the past, between which nobody knows the actions."""
        self.z = z
        self.a = z.new_zeros(*z.shape[:2], self.model.config['action_dim'])
        self.known = z.new_zeros(z.shape[:2], dtype=torch.bool)

    def sight(self, frames, states, which):
        """Latents (E, n, N, D) of some of the frames, with their states."""
        states = None if states is None else states[:, which]
        return self.with_state(self.latents(frames[:, which]), states)

    def see_past(self, frames, actions, states):
        """The first frames (E, n, H, W, 3), the rows between them and the states where they are
        known."""
        E, n = frames.shape[:2]
        if n < self.past:
            raise ValueError(f'{n} frames to begin with: the model was trained to see {self.past} '
                             f'({self.trained["eval_context"]} of them, {self.frameskip} apart)')
        self.begin(self.sight(frames, states, slice(n - self.past, None, self.frameskip)))
        if self.o.controller:
            row_by_row = slice(n - min(self.past, self.frameskip + 1), None)
            self.recent = [*self.sight(frames, states, row_by_row).unbind(dim=1)]
        if actions is not None and self.past > 1:
            rows = actions[:, 1 - self.past:].reshape(E, -1, self.frameskip, self.width)
            self.a[:, 1:, :self.used] = self.normalised(rows).flatten(2)
            self.known[:, 1:] = True

    def see_next(self, frames, actions, states):
        """One more frame (E, 1, H, W, 3), the row that was executed where it is not the planned
        one, and the state."""
        if frames.shape[1] != 1:
            raise ValueError(f'{frames.shape[1]} frames after one action: wants one')
        if actions is not None:
            self.done[-1] = actions
        over = len(self.done) == self.frameskip
        if over or self.o.controller:
            z = self.sight(frames, states, slice(None))
            self.recent = [*self.recent[-self.frameskip:], z[:, 0]]
        if not over:
            return
        self.gone = [*self.gone, self.z[:, 0]][-self.model.reach - 1:]
        self.z = torch.cat((self.z[:, 1:], z), dim=1)
        self.a = self.a.roll(-1, dims=1)
        self.a[:, -1, :self.used] = self.normalised(np.stack(self.done, axis=1)).flatten(1)
        self.known = self.known.roll(-1, dims=1)
        self.known[:, -1] = True
        self.known[:, 0] = False        # what led to the first frame is out of sight
        self.done = []

    def aim(self):
        """What the robots go for, latents (E, N, D): the goal, once it has been nearer than frames
        a step of --coarse apart; before, a sub-goal, another where that is reached or due."""
        if not self.coarse:
            return self.z_goal
        if self.sub_goal is None:
            self.sub_goal = self.z_goal.clone()
            self.due = torch.zeros(len(self.z))     # in so many model steps; inf: the goal is near
        weight = channel_weights(self.model, self.tokens)
        step = (self.coarse.stats['a_change'] * weight).mean().cpu()
        N = self.z_of_goal.shape[1]         # without the token of the state
        to_goal, to_sub_goal = (distance(self.z[:, -1, :N], z[:, :N], weight).cpu()
                                for z in (self.z_goal, self.sub_goal))
        near = (to_goal < step) | self.due.isinf()
        anew = ~near & ((self.due < 1) | (to_sub_goal < step / self.stride))
        self.left[anew | near & self.due.isfinite()] = self.stride
        self.due[anew] = self.stride
        self.due[near] = torch.inf
        self.due -= self.o.replan
        self.sub_goal[near] = self.z_goal[near]
        if anew.any():
            self.sub_goal[anew] = self.find_sub_goals(anew)
        return self.sub_goal

    def find_sub_goals(self, which):
        """The first frames (n, N, D) of the best ways that --coarse imagines from the frames of now
        to the goals of some robots, which (E,)."""
        o = copy.copy(self.o)
        o.method = 'policy'         # see propose
        o.horizon = o.coarse_horizon
        z = self.z[which, -1:]
        a = z.new_zeros(*z.shape[:2], self.coarse.config['action_dim'])
        seed = o.seed + 1000 * len(self.seconds)
        with self.autocast:
            way, info = plan(self.coarse, z, a, self.z_goal[which], o, seed, tokens=self.tokens)
            self.check_cost(info)
            return info['imagine'](way[:, None])[:, 0, 0]

    def check_cost(self, info):
        if not info['cost'].isfinite().all():
            self.reset()
            raise ValueError('the model imagines numbers that are not finite: no action is better')

    def search(self):
        """Plan from what was seen to the goal or sub-goal, and queue the rows of the plan's first
        `replan` steps."""
        o = self.o
        begun = time.perf_counter()
        z_goal = self.aim()
        mean = carried = None
        if self.last_plan is not None and o.warm:
            mean = F.pad(self.last_plan[:, o.replan:], (0, 0, 0, o.replan))
            carried = self.last_elites[:, :, o.replan:]
        seed = o.seed + 1000 * len(self.seconds)
        with self.autocast:
            self.last_plan, info = plan(self.model, self.z, self.a, z_goal, o, seed,
                                        self.normalised(self.a_low), self.normalised(self.a_high),
                                        self.known, mean, carried, self.tokens, self.gone)
        self.check_cost(info)
        self.last_elites = info['elites']
        if o.controller:
            with self.autocast, torch.no_grad():
                self.path = info['imagine'](self.last_plan[:, None])[:, 0]
        rows = self.physical(self.last_plan[:, :o.replan]).flatten(1, 2)        # (E, rows, width)
        self.queue = [*rows.transpose(0, 1).numpy()]
        self.seconds.append(time.perf_counter() - begun)
        iterations = len(info['cost'])
        if o.method == 'adam':
            iterations -= 1             # it ends with a look at where the last step led to
        self.iterations.append(iterations)
        if self.tell:
            print(f'plan {len(self.seconds)}: {1000 * self.seconds[-1]:.0f} ms, {iterations} '
                  f'iterations, cost {info["cost"][0].mean():.4f} -> {info["cost"][-1].mean():.4f}',
                  flush=True)
        return info

    def follow(self):
        """Queue the policy's rows of one model step, which wants no imagination. It is to be there
        in `horizon` steps, then in one less."""
        begun = time.perf_counter()
        z_goal = self.aim()
        with self.autocast:
            a = self.model.act(self.z[:, -2:][:, 0], self.z[:, -1], z_goal,
                               self.left.to(self.device))
        if not a.isfinite().all():
            self.reset()
            raise ValueError('the policy answers with numbers that are not finite')
        rows = self.physical(a).clamp(self.a_low, self.a_high)          # (E, rows, width)
        self.queue = [*rows.transpose(0, 1).numpy()]
        moves = torch.from_numpy(~self.held).int()
        self.steps = self.left
        self.left = (self.left - moves).clamp(min=1)
        self.seconds.append(time.perf_counter() - begun)
        self.iterations.append(0)
        if self.tell:
            print(f'policy: {1000 * self.seconds[-1]:.1f} ms', flush=True)

    @torch.no_grad()
    def act(self, frames, goal, actions=None, states=None, goal_state=None):
        """The next action, a row of the dataset in its units: (width,).

        frames (n, H, W, 3) uint8: those since the last call, oldest first, one per row; (H, W, 3)
        is one. The first call wants `past` of them at least, as the model was trained to see: a
        robot at rest may repeat its picture. goal (H, W, 3) uint8. actions: what was executed,
        where that is not what act returned: (width,), at the first call the rows (n - 1, width)
        between its frames, which are else not known. states (n, numbers of the state): what the
        robot sensed at the frames, and goal_state what it is to sense at the goal, in the dataset's
        units, where the model was trained with --state: NaN is not known. For E robots at once
        everything has E in front. A search happens every `replan` x frameskip calls; the calls
        between them return at once.
        """
        frames = np.ascontiguousarray(frames)       # torch takes no negative strides
        goal = np.array(goal)           # a copy: the caller may fill a buffer anew
        if goal.ndim == 3:      # one robot
            frames = frames.reshape(1, -1, *frames.shape[-3:])
            if states is not None:
                states = np.reshape(states, (frames.shape[1], -1))
            rest = (None if x is None else np.asarray(x)[None]
                    for x in (actions, states, goal_state))
            return self.act(frames, goal[None], *rest)[0]
        if self.z is not None and not self.done:
            self.reset()
            raise ValueError(f'the last call was interrupted: begin anew, with {self.past} frames')
        E = len(goal if self.z is None else self.z)
        if actions is not None:
            actions = np.array(actions, float)
        if states is not None:
            states = np.asarray(states, np.float32)
        self.check_seen(E, frames, goal, actions)
        self.check_states((E, frames.shape[1]), states, goal_state)
        if self.z is None:
            self.see_past(frames, actions, states)
        else:
            self.see_next(frames, actions, states)
        if not np.array_equal(goal, self.goal):
            self.goal = goal
            self.z_of_goal = self.latents(goal)
            self.left = torch.full((E,), self.o.horizon)
            self.sub_goal = None
        self.z_goal = self.with_state(self.z_of_goal, goal_state)
        if not self.done:       # a model step begins
            self.held, self.still = self.there(E, states, goal_state)
        self.done.append(self.next_row())
        return self.done[-1].copy()

    @torch.no_grad()
    def control(self):
        """The first row (E, width) of what the policy does from this frame of the camera on."""
        if self.o.method == 'policy':
            goal = self.z_goal if self.sub_goal is None else self.sub_goal
            left = self.steps
        else:       # what was imagined for about one model step later
            rows = self.o.replan * self.frameskip - len(self.queue) - 1     # since the search
            ahead = min((rows + self.frameskip // 2) // self.frameskip, self.o.horizon - 1)
            goal, left = self.path[:, ahead], torch.ones(len(self.z))
        begun = time.perf_counter()
        with self.autocast:
            a = self.model.act(self.recent[0], self.recent[-1], goal, left.to(self.device))
        row = self.physical(a)[:, 0].clamp(self.a_low[0], self.a_high[0]).numpy()
        self.acting.append(time.perf_counter() - begun)
        return row

    def next_row(self):
        row = self.still
        if self.held.all():
            self.queue = []         # what was planned is of another time
        else:
            if not self.queue and self.o.method == 'policy':
                self.follow()
            elif not self.queue:
                self.search()
            row = self.queue.pop(0)
            if self.o.controller:
                row = self.control()
        return np.where(self.held[:, None], self.still, row)

    def there(self, E, states, goal_state):
        """Which of E robots are at the goal (E,), as --hold has it, and the rows (E, width) that
        let them rest."""
        still = np.zeros((E, self.width), np.float32)       # constant numbers stay as they are
        still = still.clip(self.a_low[0].numpy(), self.a_high[0].numpy())
        if not self.o.hold + self.o.hold_latents:
            return np.zeros(E, bool), still
        now = np.full((E, len(self.s_mean)), np.nan, np.float32)
        off = now
        if states is not None:
            now = np.asarray(states, np.float32)[:, -1]
        if goal_state is not None:
            off = now - goal_state      # NaN: not known
        z = self.z[:, -1, :self.z_of_goal.shape[1]]         # without the token of the state
        there = np.sqrt(np.nansum(np.square(off), axis=1)) < self.o.hold
        if self.own and self.o.hold:
            own = self.reader.off(z, self.reader.read(self.z_of_goal))[:, self.own]
            unsensed = own.norm(dim=1) < self.o.hold
        else:
            gap = distance(z, self.z_of_goal, channel_weights(self.model, self.tokens))
            unsensed = gap < self.o.hold_latents * self.model.stats.get('z_pair', 0)
        sensed = np.isfinite(off).any(axis=1) & (self.o.hold > 0)
        there = np.where(sensed, there, unsensed.cpu().numpy())
        if self.o.rest == 'state':
            still = np.nan_to_num(now)
            there &= np.isfinite(now).all(axis=1)
        return there, still

    def check_seen(self, E, frames, goal, actions):
        for x in (frames, goal[:, None]):
            if x.dtype != np.uint8 or x.shape[::4] != (E, 3):
                raise ValueError(f'pictures {x.dtype} {x.shape}: wants uint8 ({E}, n, H, W, 3)')
        if actions is not None:
            wants = (E, self.width) if self.z is not None else (E, frames.shape[1] - 1, self.width)
            if actions.shape != wants or not np.isfinite(actions).all():
                raise ValueError(f'actions {actions.shape}: wants finite numbers {wants}')
        if aspects_differ(frames.shape[2:], goal.shape[1:]):
            raise ValueError(
                f'the goal picture is {goal.shape[2]} x {goal.shape[1]} pixels, the frames are '
                f'{frames.shape[3]} x {frames.shape[2]}: wants the same aspect')

    def check_states(self, shape, states, goal_state):
        width = len(self.s_mean)
        for x, wants in (states, (*shape, width)), (goal_state, (shape[0], width)):
            if x is not None and np.shape(x) != wants:
                raise ValueError(f'a state {np.shape(x)}: wants {wants}')
        if goal_state is not None and np.isfinite(goal_state).any() and states is None:
            raise ValueError('goal_state: wants states as well, what the robot senses now')


def aspects_differ(a, b):
    """Whether pictures of shapes (H, W, ..) are stretched differently when both are brought to the
    encoder's size."""
    return abs(math.log(a[0] * b[1] / (a[1] * b[0]))) > 0.02


def random_weights(planner, seed):
    """The same planner with a model that has learned nothing."""
    other = copy.copy(planner)
    torch.manual_seed(seed)
    other.model = WorldModel(planner.model.config).to(planner.device).requires_grad_(False)
    for m in other.model.last:      # they begin with zeros, which imagine nothing
        torch.nn.init.normal_(m.weight, std=0.02)
    other.model.stats = planner.model.stats
    other.make_fast(other.model)
    other.coarse = None
    other.restart()
    return other


# --------------------------------------------------------------------------------------------------
# Simulators. One is a class of your own in a file of your own: --record=file.py:Name and
# --env=file.py:Name call Name(size, shift, key). size: (height, width) of pictures, 0 = its own;
# shift: '' or what is to look other than in training, light, background, object or camera; key: the
# column of the dataset that step() takes. tests/simulators.py has four.
#
# Recording needs
#   name, fps               what datasets call it; steps per second
#   space                   of actions, as gymnasium's: shape, low, high, sample(), seed()
#   reset(seed)             begin an episode
#   step(action)            what is one row of the dataset
#   frame()                 uint8 (H, W, 3)
#   state()                 a vector, of all that restore() needs
#   sensors()               what the robot itself senses, without velocities: observation.state,
#                           also after restore(); () = nothing, as where there is none
#   columns(action)         {column: vector} of an action about to be done: 'action', or more
#   names                   {column: names of its numbers}, which end in rad or deg where these are
#                           angles that go round; may be left out, as sensors
#   observation, over       what policies of one's own see, too; whether the episode has ended
# and for --policy=script, as for the questions of an evaluation,
#   script(rng)             a function () -> action: noisy behaviour that gets about
# Evaluation needs in addition
#   restore(state)          be in a state() of before
#   exact                   whether restore leaves no trace: one simulator then serves all episodes
#   pose()                  a vector of what goals are about; policies never see it
#   far(pose, goal, begin)  how far a pose is from the goal's, and whether it counts as reached
#   unit                    of that distance
#   rest()                  the action that holds still
#   elsewhere(i, rng)       go to another state, at rest: the random goal of episode i
#   asks(i, begin, goal)    whether going from one pose to another is worth asking

def scaled(x, size):
    """uint8 (H, W, 3) in a size, resampled as a video's frames are."""
    x = torch.from_numpy(np.array(x)).permute(2, 0, 1)
    return data.resize(x[None], size)[0].permute(1, 2, 0).numpy()


class Gym:
    """Any gymnasium environment, as far as recording needs it, and what of evaluation robots at
    rest share. options: gymnasium.make's."""
    exact = False
    names = {}
    observation = None
    over = False

    def __init__(self, env, size, options={}):
        try:
            import gymnasium
            package = re.split('[/:]', env)[:-1] or ['gymnasium']
            importlib.import_module(package[0])         # makes env known
            self.world = gymnasium.make(env, render_mode='rgb_array', **options)
            self.world.reset()
            self.world.render()         # a missing package for drawing is noticed only here
        except ModuleNotFoundError as error:
            sys.exit(f'{env} needs: pip install {error.name.partition(".")[0].replace("_", "-")}')
        except gymnasium.error.Error as error:
            sys.exit(f'{env}: {" ".join(str(error).split())}')
        self.name = env
        self.size = size
        self.space = self.world.action_space
        self.fps = self.world.metadata.get('render_fps')

    def reset(self, seed):
        self.observation, _ = self.world.reset(seed=seed)
        self.over = False

    def step(self, action):
        self.observation, _, terminated, truncated, _ = self.world.step(action)
        self.over = terminated or truncated

    def frame(self):
        return scaled(self.world.render(), self.size)

    def state(self):        # all vectors of the observation, as one
        parts = [self.observation]
        if isinstance(self.observation, dict):
            parts = self.observation.values()
        return np.hstack([x for x in parts if np.ndim(x) == 1] or [()])

    def sensors(self):      # lerobot's name in its environments
        if isinstance(self.observation, dict):
            return self.observation.get('agent_pos', ())
        return ()

    def columns(self, action):      # discrete ones become one-hot
        import gymnasium
        return {'action': gymnasium.spaces.flatten(self.space, action)}

    def rest(self):
        return np.zeros(self.space.shape)

    def elsewhere(self, i, rng):
        self.reset(int(rng.integers(2 ** 31)))
        for _ in range(10):
            self.step(self.rest())

    def asks(self, i, begin, goal):     # not if it is reached already
        return not self.far(begin, goal, begin)[1]


class Box:
    """Actions between low and high, as gymnasium.spaces.Box has them."""
    def __init__(self, low, high):
        self.low = np.float32(low)
        self.high = np.float32(high)
        self.shape = self.low.shape

    def seed(self, seed):
        self.rng = np.random.default_rng(seed)

    def sample(self):
        return self.rng.uniform(self.low, self.high)


class Demo:
    """A robot in the demo world. pose: x, y of tip and disc. Reached: the disc, where the goal has
    it elsewhere than the start, or else the tip, within DEMO_NEAR. Every other goal asks for a
    push."""
    name = 'demo'
    fps = 10
    unit = 'table widths'
    exact = True
    over = False
    names = data.DEMO_NAMES
    space = Box([-data.DEMO_STEP] * 2, [data.DEMO_STEP] * 2)

    def __init__(self, size=(0, 0), shift='', key='action'):
        self.size = size
        self.shift = shift
        self.reset(0)

    def reset(self, seed):
        self.now = data.demo_start(1, np.random.default_rng(seed))[0]

    def step(self, action):
        self.now = data.demo_step(self.now[None], np.asarray(action)[None])[0]

    def frame(self):
        x = data.demo_draw(self.now[None], 64)[0]
        if self.shift == 'light':
            x = np.uint8(x * np.linspace(.55, 1, 64)[:, None])
        if self.shift == 'camera':      # 3 px to the left, 2 up
            x = np.pad(x, ((0, 2), (0, 3), (0, 0)), 'edge')[2:, 3:]
        if self.shift in ('background', 'object'):      # less red in what is grey, or coloured
            grey = np.ptp(x.astype(int), axis=2) < 40
            x[..., 0] = np.where(grey == (self.shift == 'background'), x[..., 0] * .7, x[..., 0])
        return scaled(x, self.size)

    def state(self):
        return self.now.copy()

    pose = state
    observation = property(state)

    def sensors(self):
        return self.now[:2].copy()

    def restore(self, state):
        self.now = np.array(state)

    def columns(self, action):
        return {'action': action}

    def script(self, rng):
        act = data.demo_script(1, rng)
        return lambda: act(self.now[None])[0]

    def rest(self):
        return np.zeros(2)

    def elsewhere(self, i, rng):
        disc = self.now[2:]
        self.now = data.demo_start(1, rng)[0]
        if i % 2 == 0:      # reaching: the disc stays where it is
            self.now[2:] = disc

    def far(self, pose, goal, begin):
        which = slice(2, 4) if np.linalg.norm(goal[2:] - begin[2:]) > .02 else slice(0, 2)
        gap = np.linalg.norm((pose - goal)[which])
        return gap, gap < data.DEMO_NEAR

    def asks(self, i, begin, goal):
        tip = np.linalg.norm((goal - begin)[:2])
        disc = np.linalg.norm((goal - begin)[2:])
        clear = np.linalg.norm(goal[:2] - goal[2:]) > data.TIP + data.DISC - 1e-6
        return clear and (disc > .15 if i % 2 else tip > .2 and disc < .02)


@functools.cache
def from_file(text):
    """What file.py:name names; None where there is no such thing."""
    file, _, name = text.rpartition(':')
    return runpy.run_path(file).get(name) if os.path.isfile(file) else None


def simulator(env, size, shift='', key='action'):
    """A new simulator of an --env or --record."""
    if env == 'demo':
        return Demo(size, shift, key)
    if '.py:' not in env:
        return Gym(env, size)
    simulator_class = from_file(env)
    if simulator_class is None:
        sys.exit(f'{env}: no such file, or nothing of that name in it')
    sim = simulator_class(size, shift, key)
    if not hasattr(sim, 'sensors'):     # may be left out
        sim.sensors = tuple
    if not hasattr(sim, 'names'):
        sim.names = {}
    demand(env, sim, 'name fps space reset step frame state sensors columns observation over')
    return sim


def demand(env, sim, names):
    """End with one line where a simulator lacks some of the names of the interface."""
    missing = [name for name in names.split() if not hasattr(sim, name)]
    if missing:
        sys.exit(f'{env}: lacks {", ".join(missing)}, which this wants (simulators, in plan.py)')


# --------------------------------------------------------------------------------------------------
# recording

def noise_policy(space):
    """Uniform actions with a memory of 10 steps; where there are no bounds, from -2 to 2."""
    low = np.nan_to_num(space.low, neginf=-2)
    high = np.nan_to_num(space.high, posinf=2)
    z = 0
    def noise(observation, frame, step, rng):
        nonlocal z
        # AR(1) of variance 1; its ndtr is uniform
        z = .9 * z + .19 ** .5 * rng.standard_normal(space.shape)
        uniform = torch.special.ndtr(torch.as_tensor(z)).numpy()
        return (low + (high - low) * uniform).astype(low.dtype)
    return noise


def script_policy(script):
    """What a simulator's script or solve does, anew in every episode."""
    act = None
    def scripted(observation, frame, step, rng):
        nonlocal act
        if step == 0:
            act = script(rng)
        return act()
    return scripted


def begin_question(o, planner, sim, sense, i, rng):
    """Put the simulator where episode i of a closed loop begins; returns what the planner does from
    there on, with noise, as a policy."""
    asked = question(sim, i, rng, o.goals, o.goal_steps, planner.past)
    looks = []
    for state in (asked.goal, *asked.states):
        sim.restore(state)
        looks.append((sim.frame(), sim.sensors()))
    (goal, wanted), *past = looks
    std, low, high = (x[0].numpy() for x in (planner.a_std, planner.a_low, planner.a_high))
    off = np.zeros(planner.width)
    done = asked.actions
    planner.reset()

    def act(observation, frame, step, rng):
        nonlocal off, done
        now = [(frame, sim.sensors())] if step else past
        frames, states = (np.stack(x) for x in zip(*now))
        senses = (states, wanted) if sense else ()
        row = planner.act(frames, goal, done, *senses)
        off = .9 * off + .19 ** .5 * rng.standard_normal(planner.width)
        done = np.clip(row + o.explore * std * off, low, high)
        return done
    return act


def find_policy(policy, sim):
    """The function (observation, frame, step, rng) -> action that --policy names."""
    if policy == 'random':
        return lambda *_: sim.space.sample()
    if policy == 'noise' and hasattr(sim.space, 'low'):
        return noise_policy(sim.space)
    if policy in ('script', 'solve') and hasattr(sim, policy):
        return script_policy(getattr(sim, policy))
    choose = from_file(policy)
    if choose is None:
        sys.exit(f'--policy={policy}: wants random, noise (not of discrete actions), file.py:name, '
                 'script or solve (of a simulator that has them) or model (with --ckpt)')
    return choose


def one_of(text, sim):
    """The policy of 'name:weight,..', another in every episode."""
    names = data.weighted(text)
    policies = [find_policy(name, sim) for name, _ in names]
    if len(names) == 1:
        return policies[0]
    weights = np.array([1.0 if weight is None else weight for _, weight in names])
    if not weights.sum():
        sys.exit(f'--policy={text}: wants a weight above 0')
    act = None

    def choose(observation, frame, step, rng):
        nonlocal act
        if step == 0:
            act = policies[rng.choice(len(policies), p=weights / weights.sum())]
        return act(observation, frame, step, rng)
    return choose


def recorded(o):
    """Whoever acts where that is a planner, or None, whether it senses, and the simulator."""
    size = o.frame_height, o.frame_width or o.frame_height
    if o.policy != 'model':
        return None, False, simulator(o.record, size)
    o.env = o.record
    check_loop(o)
    planner = Planner(o.ckpt, vars(o), tell=False)
    looks = 1 if o.controller else planner.frameskip
    if looks % o.draw_every:
        sys.exit(f'--draw_every={o.draw_every}: the planner looks at every {looks}th frame')
    sim = simulator(o.record, size, key=planner.key)
    demand(o.record, sim, 'restore pose far rest elsewhere asks script')
    check_robot(o, planner, sim)
    return planner, senses_alike(o, planner, sim), sim


def record_dataset(o):
    """Write a LeRobot dataset of a simulator.

    Row i's action is what was done after frame i, flattened (discrete: one-hot); observation.state
    what the robot senses, observation.environment_state what restores a simulator that can be
    restored, else all vectors of the observation: no model may see that. Ctrl-C ends the
    recording and keeps it, a second one the program; an exception keeps the episodes before.
    """
    if not o.out:
        sys.exit('--out: wants the folder that is to be written')
    planner, sense, sim = recorded(o)
    fps = o.fps or sim.fps
    if not fps:
        sys.exit(f'--fps: {o.record} does not say its frames per second')
    choose = None if planner else one_of(o.policy, sim)
    sim.space.seed(o.seed)
    sim.space.sample()          # which nobody does: a seed records what it has always recorded
    failed = None
    gop = max(2, o.draw_every)      # what is read of them begins at a key frame
    with data.Writer(o.out, fps, sim.names, sim.name, gop=gop) as writer:
        try:
            record_episodes(o, planner, sense, sim, choose, writer)
        except Exception as error:      # of a simulator or a policy
            if not writer.rows or getattr(error, 'errno', None) in data.OUR_DISK:
                raise
            failed = error
    print(f'wrote {o.out}: {len(writer.rows)} episodes at {fps:g} frames per second')
    if failed:
        raise failed


def record_episodes(o, planner, sense, sim, choose, writer):
    rng = np.random.default_rng(o.seed)
    stop = False

    def interrupt(*_):
        nonlocal stop
        stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, interrupt)
    for i in tqdm(range(o.episodes), f'recording {o.out}', disable=None):
        sim.reset(seed=int(rng.integers(2 ** 31)))
        if planner:
            choose = begin_question(o, planner, sim, sense, i, rng)
        for step in range(o.budget if planner else o.steps or sys.maxsize):
            if step % o.draw_every == 0:
                frame = sim.frame()
            action = choose(sim.observation, frame, step, rng)
            columns = sim.columns(action) | {data.ENVIRONMENT: sim.state()}
            writer.add(frame, columns.pop('action'), sim.sensors(), columns)
            sim.step(action)
            if sim.over or stop:
                break
        writer.end_episode(sim.name)
        if stop:
            break


# --------------------------------------------------------------------------------------------------
# The closed loop. A policy is a function (frames, goals, past) -> actions (E, width), as a
# planner's act: frames (E, n, H, W, 3) since its last call, pictures of the goals, at first the
# actions between the first frames; with `sense` also what the robots sensed at the frames (E, n,
# S), and what they are to sense. A planner is never handed a simulator. Baselines see nothing: they
# are functions of what would hold the robots still, (E, width).

@dataclasses.dataclass
class Question:
    """An episode to be played."""
    states: list            # of the frames of the past, the last is the start
    actions: np.ndarray     # (past - 1, width) between them
    begin: np.ndarray       # pose at the start
    goal: np.ndarray        # state
    pose: np.ndarray        # pose of the goal
    expert: list            # the script's own actions from start to goal; [] for random goals


def question(sim, i, rng, goals, goal_steps, past):
    """Episode i's question, with `past` frames before its start."""
    while True:
        sim.reset(int(rng.integers(2 ** 31)))
        script = sim.script(rng)
        lead = past - 1
        if goals == 'expert':
            lead += rng.integers(20)
        states = [sim.state()]
        actions = []
        for _ in range(lead):
            actions.append(script() if goals == 'expert' else sim.rest())
            sim.step(actions[-1])
            states.append(sim.state())
        begin = sim.pose()
        expert = []
        if goals == 'random':
            sim.elsewhere(i, rng)
        else:
            for _ in range(goal_steps):
                expert.append(script())
                sim.step(expert[-1])
        if sim.asks(i, begin, sim.pose()):
            between = np.array(actions[lead - past + 1:]).reshape(past - 1, len(sim.rest()))
            return Question(states[-past:], between, begin, sim.state(), sim.pose(), expert)


def look(sims, states):
    """Frames (E, n, H, W, 3) and what robots sense (E, n, S) in n states of each question."""
    shown = []
    sensed = []
    for sim, several in zip(sims, states):
        for state in several:
            sim.restore(state)
            shown.append(sim.frame())
            sensed.append(sim.sensors())
    n = len(states[0])
    return [np.stack(x).reshape(len(sims), n, *np.shape(x[0])) for x in (shown, sensed)]


def play(policy, sims, questions, budget, see, sense=False):
    """A fixed budget of steps under a policy, all episodes abreast: poses (budget + 1, E, ..),
    actions (budget, E, width), and where see is set the frames (budget + 1, E, H, W, 3) and goals
    (E, H, W, 3)."""
    frames = goals = sensed = wanted = None
    if see:
        goals, wanted = look(sims, [[q.goal] for q in questions])
        goals = goals[:, 0]
        wanted = wanted[:, 0]
        frames, sensed = look(sims, [q.states for q in questions])
    past = np.stack([q.actions for q in questions])
    states = [q.states[-1] for q in questions]
    poses, executed = [], []
    shown = []
    for t in range(budget + 1):
        poses.append([])
        now = []
        felt = []
        rests = []
        for e, sim in enumerate(sims):
            if t == 0 or sim.exact:         # such a one plays all episodes in turn
                sim.restore(states[e])
            if t > 0:
                sim.step(executed[-1][e])
                states[e] = sim.state()
            poses[-1].append(sim.pose())
            if not see:
                rests.append(sim.rest())
            elif t > 0:
                now.append(sim.frame())
                felt.append(sim.sensors())
        if see:
            if t > 0:
                frames = np.stack(now)[:, None]             # (E, 1, H, W, 3)
                sensed = np.stack(felt)[:, None]
            shown.append(frames[:, -1])
            data.progress(f'playing {len(sims)} episodes:', f'step {t} of {budget}')
        if t < budget:
            given = rests,
            if see:
                given = frames, goals, past
            if sense:
                given += sensed, wanted
            executed.append(np.asarray(policy(*given)))
            past = None
    return np.array(poses), np.array(executed), shown, goals


# baselines

def replay(questions):      # the script's own actions, then rest
    experts = [iter(q.expert) for q in questions]
    return lambda rests: [next(actions, rest) for rest, actions in zip(rests, experts)]


def baselines(planner, questions, rng):
    """What planning has to beat: {name: policy}; an expert where goals are of one."""
    bounds = planner.a_low[0], planner.a_high[0]
    mean = itertools.cycle(planner.a_mean.numpy())          # frameskip rows
    policies = {
        'random': lambda rests: rng.uniform(*bounds, (len(rests), planner.width)),
        'zero': lambda rests: rests,
        'mean': lambda rests: [next(mean)] * len(rests),
    }
    if questions[0].expert:
        policies['expert'] = replay(questions)
    return policies


# the report

def wilson(k, n, z=1.96):
    """The 95 % interval of a share k / n (Wilson 1927): honest for small n and near 0 and 1."""
    centre = (k + z * z / 2) / (n + z * z)
    half = z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def score(sims, questions, poses, executed):
    """What the report says of play's poses and actions, and whether the goal was reached (budget +
    1, E)."""
    gap = np.zeros(poses.shape[:2])
    reached = np.zeros_like(gap, bool)
    for t, e in np.ndindex(gap.shape):
        q = questions[e]
        gap[t, e], reached[t, e] = sims[e].far(poses[t, e], q.pose, q.begin)
    end = reached[-1]
    ever = reached.any(axis=0)
    row = dict.fromkeys(('steps', 'jerk', 'seconds_per_plan', 'plans_per_second', 'iterations'))
    row |= dict(episodes=len(end), success_end=end.mean().item(),
                success_ever=ever.mean().item(), ci95=wilson(int(end.sum()), len(end)),
                distance_end=gap[-1].mean().item())
    if ever.any():
        row['steps'] = reached.argmax(axis=0)[ever].mean().item()
    if len(executed) > 2:
        jerk = np.diff(executed, 2, axis=0) * sims[0].fps ** 2
        row['jerk'] = np.square(jerk).sum(axis=2).mean().item()
    return row, reached


def times(planner, E):
    """What the report says of a planner's searches for E robots at once; nothing if they rested."""
    if not planner.seconds:
        return {}
    seconds = np.mean(planner.seconds).item() / E
    row = dict(seconds_per_plan=seconds, plans_per_second=1 / seconds,
               iterations=np.mean(planner.iterations).item())
    if planner.acting:      # without the encoder, which sees every frame of the camera then
        row['seconds_per_action'] = np.mean(planner.acting).item() / E
    return row


def tell(name, row, unit, E):
    low, high = row['ci95']
    line = (f'{name:19s} success at the end {row["success_end"]:.2f} (95 % interval {low:.2f} to '
            f'{high:.2f}), ever {row["success_ever"]:.2f}')
    if row['steps'] is not None:
        line += f' after {row["steps"]:.0f} steps'
    line += f', distance {row["distance_end"]:.3g} {unit}, jerk {row["jerk"] or 0:.3g}'
    if row['seconds_per_plan'] is not None:
        line += f', {row["seconds_per_plan"]:.3g} s per plan ({E} at once)'
    if 'seconds_per_action' in row:
        line += f', {1000 * row["seconds_per_action"]:.3g} ms per action'
    print(line, flush=True)


def film(shown, goals, reached):
    """A video (frames, 3, H, W) of up to eight episodes, each now | goal; the line below turns
    green while the goal is reached."""
    n = min(8, len(goals))
    columns = min(2, n)
    n -= n % columns
    colours = torch.tensor([[200, 200, 200], [40, 170, 70]], dtype=torch.uint8)
    video = []
    for frames, good in zip(shown, reached):
        tiles = torch.from_numpy(np.concatenate((frames[:n], goals[:n]), axis=2))
        tiles = data.enlarge(tiles.permute(0, 3, 1, 2), 96)
        bar = colours[good[:n].astype(int)][:, :, None, None]           # (n, 3, 1, 1)
        tiles = torch.cat((tiles, bar.expand(-1, -1, 6, tiles.shape[3])), dim=2)
        tiles = F.pad(tiles, (3, 3, 3, 3), value=255)
        rows = [torch.cat([*row], dim=2) for row in tiles.split(columns)]
        video.append(torch.cat(rows, dim=1))
    return torch.stack(video + video[-1:] * 5)


def robots(o, planner, shift=''):
    """A simulator for every episode; one that can be put into any state exactly serves them all."""
    size = planner.frame_size
    if o.frame_height or o.env == 'demo':
        size = o.frame_height, o.frame_width or o.frame_height
    arguments = o.env, size, shift, planner.key
    first = simulator(*arguments)
    demand(o.env, first, 'exact restore pose far unit rest elsewhere asks script')
    if first.exact:
        return [first] * o.episodes
    return [first] + [simulator(*arguments) for _ in range(o.episodes - 1)]


def check_robot(o, planner, sim):
    """Whether the checkpoint was trained on this robot's actions."""
    instead = ''
    if o.env == 'demo':
        instead = (': give --env, or --goal with --start (one plan) or --watch (a folder of '
                   'pictures)')
    if sim.space.shape != (planner.width,):
        sys.exit(f'--env={o.env}: takes {sim.space.shape[0]} numbers as {planner.key}, {o.ckpt} '
                 f'was trained with {planner.width}{instead}')
    if planner.key not in sim.columns(sim.rest()):
        sys.exit(f'--env={o.env}: has no {planner.key}, the actions that {o.ckpt} was trained with')
    if not sim.fps:
        sys.exit(f'--env={o.env}: does not say its frames per second')
    if planner.fps and abs(planner.fps / sim.fps - 1) > 0.01:
        data.warn(f'--env={o.env} has {sim.fps:g} frames per second, rows of {o.ckpt} are '
                  f'{planner.fps:.3g} a second: a step of the model is of another time')
    other = planner.action_names not in ([], ['0', '1'], data.DEMO_NAMES['action'])
    if o.env == 'demo' and (other or planner.a_high.max() > 1.1 * data.DEMO_STEP):
        sys.exit(f'{o.ckpt}: was trained on another robot, not on the demo world{instead}')


def check_loop(o):
    """Settle the lengths of the closed loop; returns the names in --shift."""
    o.goal_steps = o.goal_steps or (10 if o.env == 'demo' else 25)
    o.budget = o.budget or 2 * o.goal_steps
    if o.goals == 'expert' and o.goal_steps < 5:
        sys.exit(f'--goal_steps={o.goal_steps}: nothing gets far enough for a goal, wants at least '
                 '5')
    shifts = [name for name in o.shift.split(',') if name]
    for name in shifts:
        if name not in ('light', 'background', 'object', 'camera'):
            sys.exit(f'--shift: wants some of light, background, object, camera, got {name!r}')
    return shifts


def senses_alike(o, planner, sim):
    """Whether the simulator senses the state that the model was trained with."""
    width = len(planner.s_mean)
    if not width:
        return False
    alike = planner.trained['state'].strip() == 'observation.state' and len(sim.sensors()) == width
    if not alike:
        print(f'the state is not used: {o.env} senses {len(sim.sensors())} numbers of '
              f'observation.state, {o.ckpt} knows {planner.trained["state"]} ({width})', flush=True)
    return alike


def contestants(o, planner, sims, shifts):
    """Who plans in the closed loop: (name, planner, simulators, whether the cost knows the state of
    the goal)."""
    state = senses_alike(o, planner, sims[0]) and o.state_weight > 0
    out = [('model', planner, sims, state)]
    if state:
        print(f'the cost knows the state {planner.trained["state"]} of the goal, at '
              f'state_weight {o.state_weight:g}', flush=True)
        out.append(('model without state', planner, sims, False))
    if planner.coarse:
        flat = copy.copy(planner)
        flat.coarse = None
        out.append(('model without sub-goals', flat, sims, state))
    for name in shifts:
        out.append((f'model, {name}', planner, robots(o, planner, name), state))
    blind = random_weights(planner, o.seed)
    return out + [('random weights', blind, sims[:o.blind_episodes or None], state)]


# --------------------------------------------------------------------------------------------------
# the programs

def evaluate(o):
    """The closed loop: questions, the planner beside baselines, plan.json and plan.mp4. Returns the
    report."""
    shifts = check_loop(o)
    planner = Planner(o.ckpt, vars(o), tell=False)
    sims = robots(o, planner)
    sim = sims[0]
    check_robot(o, planner, sim)
    folder = own_folder(o)
    rng = np.random.default_rng(o.seed + 1_000_000)               # of no dataset
    questions = [question(world, i, rng, o.goals, o.goal_steps, planner.past)
                 for i, world in enumerate(sims)]
    ahead = f' {o.goal_steps} steps ahead' if o.goals == 'expert' else ''
    search = ''
    if o.method != 'policy':
        search = (f', {o.samples} candidates ({o.proposals} of the policy) x {o.iterations} '
                  f'iterations x {o.horizon} steps of {planner.frameskip}')
    print(f'{o.env}: {o.episodes} episodes, {o.goals} goals{ahead}; budget {o.budget} environment '
          f'steps ({o.budget / sim.fps:.3g} s); {o.method}{search}', flush=True)

    methods = {}
    for name, who, worlds, state in contestants(o, planner, sims, shifts):
        who.restart()
        asked = questions[:len(worlds)]
        poses, executed, shown, goals = play(who.act, worlds, asked, o.budget, True, state)
        row, reached = score(worlds, asked, poses, executed)
        methods[name] = row | dict(state=state) | times(who, len(worlds))
        if name == 'model':
            video = film(shown, goals, reached)
            asked_goal = goals[0]
        if name.startswith('model, '):
            methods[name]['drop'] = methods['model']['success_end'] - row['success_end']
        tell(name, methods[name], sim.unit, len(worlds))
    for name, policy in baselines(planner, questions, rng).items():
        poses, executed, _, _ = play(policy, sims, questions, o.budget, False)
        methods[name], _ = score(sims, questions, poses, executed)
        tell(name, methods[name], sim.unit, o.episodes)

    report = dict(env=o.env, episodes=o.episodes, budget_steps=o.budget, goals=o.goals,
                  goal_steps=o.goal_steps, seed=o.seed, method=o.method, proposals=o.proposals,
                  coarse=o.coarse, methods=methods)
    print(json.dumps(report))
    with data.writing(folder), open(f'{folder}/plan.json', 'w') as f:
        json.dump(report, f, indent=1)
    data.write_video(f'{folder}/plan.mp4', video, min(sim.fps, 10))
    print(f'wrote {folder}/plan.json and {folder}/plan.mp4')
    if not os.path.exists(f'{folder}/goal.png'):        # it may be somebody's own
        data.write_image(f'{folder}/goal.png', torch.from_numpy(asked_goal).permute(2, 0, 1))
        print(f'wrote {folder}/goal.png')
    return report


def play_towards(o):
    """One episode towards the picture of --goal, from where the first episode of the closed loop
    with the same options begins: plan.mp4."""
    o.episodes = 1
    check_loop(o)
    goal = picture(o.goal)
    planner = Planner(o.ckpt, vars(o))
    sims = robots(o, planner)
    check_robot(o, planner, sims[0])
    wanted = read_state(o, 'goal_state', planner)
    if o.start_state:
        sys.exit('--start_state: comes with --start; a simulator says what its robot senses')
    rng = np.random.default_rng(o.seed + 1_000_000)               # of no dataset
    asked = question(sims[0], 0, rng, o.goals, o.goal_steps, planner.past)
    frame = sims[0].frame()
    if aspects_differ(frame.shape, goal.shape):
        sys.exit(f'--goal={o.goal}: is {goal.shape[1]} x {goal.shape[0]} pixels, --env={o.env} '
                 f'{frame.shape[1]} x {frame.shape[0]}: wants the same aspect')
    sense = senses_alike(o, planner, sims[0])
    folder = own_folder(o)

    def towards(frames, _, past, *senses):
        if sense:
            senses = senses[0], wanted[None]
        return planner.act(frames, goal[None], past, *senses)

    poses, _, shown, _ = play(towards, sims, [asked], o.budget, True, sense)
    goal = scaled(goal, frame.shape[:2])
    z = planner.latents(np.stack((shown[0][0], shown[-1][0], goal)))
    before, after = distance(z[:2], z[2:], channel_weights(planner.model)).tolist()
    print(f'{o.budget} steps in {o.env}: latent distance to the goal {before:.4f} before, '
          f'{after:.4f} after')
    if planner.reader:
        names = planner.trained['probe_names'].split(',')
        for name, (before, after, wanted) in zip(names, planner.reader.read(z).T.tolist()):
            print(f'{name}, as the probe reads it: {before:.3g} before, {after:.3g} after, '
                  f'{wanted:.3g} in the picture of the goal')
    never = np.zeros((len(poses), 1), bool)         # nobody knows the goal's pose
    data.write_video(f'{folder}/plan.mp4', film(shown, goal[None], never), min(sims[0].fps, 10))
    print(f'wrote {folder}/plan.mp4')


def picture(path):
    """uint8 (H, W, 3)."""
    return data.read_image(path).permute(1, 2, 0).numpy()


def own_folder(o):
    """Where results go, and no other process writes."""
    folder = o.out_dir or os.path.dirname(o.ckpt) or '.'
    data.own(folder, '.plan.lock')      # a running training may be looked at
    return folder


def plan_once(o):
    """One plan from the pictures of --start to --goal: plan.npy, and the imagined way as
    plan.mp4."""
    planner = Planner(o.ckpt, vars(o), tell=False)
    decoder = load_decoder(os.path.dirname(o.ckpt) or '.', planner.encoder, planner.device)
    goal = picture(o.goal)
    frames = [picture(path) for path in o.start.split(',')]
    context = planner.trained['eval_context']
    if len(frames) == 1:
        frames = frames * context
    if len(frames) < context:
        sys.exit(f'--start: {len(frames)} pictures, {o.ckpt} was trained to see {context}: give as '
                 'many, or one of a robot at rest')
    for x in frames:
        if aspects_differ(x.shape, goal.shape):
            sys.exit(f'--goal={o.goal}: is {goal.shape[1]} x {goal.shape[0]} pixels, '
                     f'--start={o.start} {x.shape[1]} x {x.shape[0]}: wants the same aspect')
    now, then = (read_state(o, name, planner) for name in ('start_state', 'goal_state'))
    if (np.isfinite(then) & ~np.isfinite(now)).any():
        sys.exit('--goal_state: wants --start_state as well, of the same numbers')
    folder = own_folder(o)
    with torch.no_grad():
        z = torch.cat([planner.latents(x[None]) for x in frames])
        states = np.tile(now, (len(frames), 1))
        if o.start.count(','):      # of the last picture
            states[:-1] = np.nan
        planner.begin(planner.with_state(z, states)[None])
        planner.z_goal = planner.with_state(planner.latents(goal[None]), then[None])
        info = planner.search()
        with planner.autocast:
            z = info['imagine'](planner.last_plan[:, None])[0, 0]           # (horizon, N, D)
    rows = planner.physical(planner.last_plan[0]).flatten(0, 1).numpy()
    for i, row in enumerate(rows):
        print(f'{i:3d}  {" ".join(f"{v:9.4f}" for v in row)}')
    N = math.prod(planner.encoder.grid)
    z = torch.cat((planner.z[:, -1], z, planner.z_goal))[:, :N]
    now, then = distance(z[[0, -2]], z[-1:], channel_weights(planner.model)).tolist()
    print(f'{len(rows)} actions in {planner.seconds[0]:.2f} s, {planner.iterations[0]} iterations; '
          f'latent distance to the goal {now:.4f} now, {then:.4f} imagined at the end')
    with data.writing(folder):
        np.save(f'{folder}/plan.npy', rows)
    shown = pictures(unstandard(z, planner.model.stats), planner.encoder, decoder)
    goals = shown[-1:].expand_as(shown[:-1])
    video = data.enlarge(torch.cat((shown[:-1], goals), dim=3))         # imagined | goal
    data.write_video(f'{folder}/plan.mp4', video, 2)
    print(f'wrote {folder}/plan.npy and {folder}/plan.mp4')


def read_state(o, option, planner):
    """The numbers (width,) of --start_state or --goal_state, NaN where nothing is said."""
    text = getattr(o, option)
    width = len(planner.s_mean)
    if not text:
        return np.full(width, np.nan)
    if not width:
        sys.exit(f'--{option}={text}: {o.ckpt} was trained without --state')
    names = planner.state_names
    values = np.full(width, np.nan)
    try:
        if '=' in text:
            for part in text.split(','):
                name, number = part.split('=')
                values[names.index(name.strip())] = float(number)
        else:
            values = np.reshape([float(number) for number in text.split(',')], width)
        if np.isinf(values).any():
            raise ValueError
    except (ValueError, IndexError):
        sys.exit(f'--{option}={text}: wants {width} numbers ({", ".join(names)}), or some of them '
                 'as name=number')
    return values


def arriving(folder):
    """(path, picture) of a folder's pictures in order of their names, also of those that are still
    to come. What cannot be read may be half written: it has two seconds from its last change."""
    seen = set()
    since = {}
    while True:
        for path in sorted({*glob.glob(f'{glob.escape(folder)}/*')} - seen):
            if 'image/' not in str(mimetypes.guess_type(path, strict=False)):
                continue
            try:
                yield path, picture(path)
            except SystemExit as why:
                state = path, os.path.exists(path) and os.path.getsize(path)
                now = time.monotonic()
                if now < since.setdefault(state, now) + 2:
                    break
                print(f'{why}: skipped', flush=True)
            seen.add(path)
        time.sleep(0.02)


def watch_folder(o):
    """A line of actions for every picture in a folder, from the first moment with enough of
    them."""
    if not os.path.isdir(o.watch):
        sys.exit(f'--watch={o.watch}: no such folder')
    if o.start_state or o.goal_state:
        sys.exit('--watch: pictures in a folder come without a state; plan.Planner takes one')
    planner = Planner(o.ckpt, vars(o), tell=False)
    if o.rest == 'state' or o.hold and not planner.own:
        sys.exit('--hold: pictures come without a state: wants --rest=zero, and a model that was '
                 'trained with --probe=observation.state')
    goal = picture(o.goal)
    print(f'watching {o.watch}: the first {planner.past} pictures are the past, Ctrl-C ends it',
          flush=True)
    frames = []
    wanted = planner.past
    for path, x in arriving(o.watch):
        frames.append(x)
        if len(frames) < wanted:
            continue
        begun = time.perf_counter()
        row = planner.act(np.stack(frames), goal)
        frames = []
        wanted = 1
        print(f'{os.path.basename(path)}  {" ".join(f"{v:.6g}" for v in row)}  '
              f'({1000 * (time.perf_counter() - begun):.0f} ms)', flush=True)


if __name__ == '__main__':
    o = types.SimpleNamespace(**config)
    if bool(record) + bool(start) + bool(watch) > 1 or bool(start or watch) > bool(goal):
        sys.exit('--goal comes alone (an episode in --env), with --start (one plan for two '
                 'pictures) or with --watch (a folder of pictures), and --record with none of them')
    if record and goal:
        sys.exit('--record: comes without --goal')
    if shift and (record or goal):
        sys.exit('--shift: comes with neither --record nor --goal')
    if policy == 'model' and 'steps' in data.given(sys.argv[1:]):
        sys.exit('--steps: --policy=model acts for --budget steps')
    if (start_state or goal_state) and not goal:
        sys.exit('--start_state, --goal_state: come with --goal')
    if (out or policy != 'random') and not record:
        sys.exit('--policy, --out: come with --record; a trained policy acts by --method=policy')
    if rest and start:
        sys.exit('--hold, --hold_latents: come with --env or --watch, a plan for two pictures does '
                 'not end')
    if coarse and start:
        sys.exit('--coarse: comes with --env, --goal or --watch, a single plan has no sub-goals')
    o.ckpt = data.checkpoint(o.ckpt)
    o.coarse = o.coarse and data.checkpoint(o.coarse)
    if record:
        record_dataset(o)
    elif start:
        plan_once(o)
    elif watch:
        try:
            watch_folder(o)
        except ValueError as error:
            sys.exit(f'--watch={watch}: {error}')
        except KeyboardInterrupt:
            sys.exit()
    elif goal:
        play_towards(o)
    else:
        evaluate(o)
