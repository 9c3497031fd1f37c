"""
Plan towards a goal image by searching actions inside a trained world model.

    python plan.py                                                # closed loop in the demo world, beside baselines
    python plan.py --env=gym_pusht/PushT-v0 --ckpt=pusht/ckpt.safetensors --episodes=50        # in a simulator
    python plan.py --ckpt=out/ckpt.safetensors --start=now.png --goal=goal.png                 # one plan, two pictures
    python plan.py --ckpt=out/ckpt.safetensors --watch=frames/ --goal=goal.png      # a new picture in, a line out

Leaves plan.json and plan.mp4 (closed loop), or plan.npy and plan.mp4 (pictures), in the folder of the checkpoint.
Letters: E episodes at once, M candidates, H model steps, A action width, Tc frames of context, N tokens, D channels.
"""
import copy
import functools
import glob
import json
import math
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
from model import (WorldModel, compile_layers, half_weights, load, pictures, remember, restore_encoder, rollout,
                   standard, unstandard)

# --------------------------------------------------------------------------------------------------------------------
ckpt = 'out/ckpt.safetensors'
out_dir = ''                # '' = the folder of the checkpoint
encoder_path = ''           # the encoder's weights; '' = where training found them
robot = 0                   # whose actions: the number of the labelled dataset, counted from 0
# a plan between two pictures, or for every new picture in a folder
start = ''                  # a picture of now, of a robot at rest, or several a model step apart: before.png,now.png
goal = ''                   # a picture of what is wanted
watch = ''                  # a folder of pictures, read in order of their names until Ctrl-C
# search
method = 'cem'              # cem, icem, mppi or adam (gradients through the model)
horizon = 5                 # model steps
samples = 64                # candidates per iteration; adam: starts
elites = 8                  # the best of them, which the next iteration is drawn from
iterations = 5
init_std = 1.0              # of the first candidates of a search, in units of the actions' std
warm_std = 0.0              # the same where a search begins from the last plan: smaller stays closer; 0 = init_std
min_std = 0.05              # in units of the actions' std, so that the search does not collapse
beta = 2.0                  # colour of the noise: power 1 / f^beta over a plan's rows; 0 = independent rows
momentum = 0.0              # of mean and std from iteration to iteration (iCEM: 0.1; mppi: of the mean alone)
keep = 0.3                  # icem: share of the elites that lives on in the next iteration, and in the next plan
temperature = 0.5           # mppi: of the weights, in units of the elites' standard deviation of cost
step_size = 0.1             # adam: in units of the actions' std
warm = True                 # begin from the last plan, shifted by the steps that were executed
budget_ms = 0.0             # stop the search at this deadline, whatever iterations says; 0 = none
chunk = 0                   # candidates imagined at once: 0 = as many as have 1,024 tokens on a CPU, else 4,096
# the model's use and the cost
K = 1                       # denoising steps per imagined frame
seeds = 1                   # noises under which every candidate is imagined
risk = 'mean'               # what counts of their costs: mean, worst, or std (mean + standard deviation)
cost = 'all'                # distance to the goal: all = over the steps, last = at the last one
discount = 1.0              # with cost=all: weight of a step relative to the one before it
mask = ''                   # a picture, white where the goal counts; '' = everywhere
smooth = 0.0                # weight of squared changes of the action, in normalised units
# closed loop
env = 'demo'                # or gym_pusht/PushT-v0, PointMaze_UMaze-v3, FetchReach-v4, FetchPush-v4
episodes = 20
goals = 'expert'            # expert: a state goal_steps later on a scripted trajectory; random: another state, at rest
goal_steps = 0              # environment steps; 0 = 10 in the demo world, else 25
budget = 0                  # environment steps, fixed in advance; 0 = twice goal_steps
replan = 1                  # model steps that are executed before planning again
shift = ''                  # also under: light, background, object, camera (comma-separated), which training never saw
frame_height = 0            # pixels that the simulator draws, as the dataset was recorded; 0 = what the encoder sees
frame_width = 0             # 0 = square
seed = 0
device = 'auto'
dtype = 'auto'              # float32 or bfloat16; auto = bfloat16 where the hardware multiplies it
compile = False             # torch.compile: up to a minute at the start, for a closed loop
config = data.override(globals(), sys.argv[1:] if __name__ == '__main__' else [])
# --------------------------------------------------------------------------------------------------------------------


def coloured(E, M, H, A, beta, generator=None):
    """Gaussian noise (E, M, H, A) with power 1 / f^beta over the H steps (Timmer & Koenig 1995, as in iCEM,
    arXiv:2008.06389) and unit variance at every step of any H: a circular filter of white noise, whose rows have norm
    one. The mean (f = 0) has the power of the lowest frequency."""
    f = torch.fft.rfftfreq(H)
    f[0] = f[1] if H > 1 else 1
    kernel = torch.fft.irfft(f ** (-beta / 2), n=H)
    step = torch.arange(H)
    return torch.einsum('st,emta->emsa', kernel[(step[:, None] - step) % H] / kernel.norm(),
                        torch.randn(E, M, H, A, generator=generator))


def draw(mean, std, low, high, samples, beta, generator):
    """Candidates (E, samples, H, A) within bounds; the first is the mean itself."""
    E, H, A = mean.shape
    actions = mean[:, None] + std[:, None] * coloured(E, samples, H, A, beta, generator).to(mean)
    actions[:, 0] = mean
    return actions.clamp(low, high)


def best(actions, costs, n):
    """The n best of candidates (E, M, H, A) by costs (E, M): (E, n, H, A) and (E, n), best first."""
    found, which = costs.topk(n, dim=1, largest=False)
    return actions.gather(1, which[:, :, None, None].expand(-1, -1, *actions.shape[2:])), found


def late(begun, done, deadline):
    """Whether one more iteration, as long as the `done` since `begun`, would end after the deadline."""
    now = time.perf_counter()
    return now + (now - begun) / done > deadline


# The planners. cost(actions (E, M, H, A), iteration) -> (E, M), lower is better; mean and std (E, H, A) are where to
# begin, low and high bound every candidate, all in normalised units. H are rows of the dataset here, A numbers of a
# row. Each returns a plan (E, H, A), the best cost of every iteration (iterations, E), and the elites (E, n, H, A),
# which icem takes up as `carried` (E, n, up to H, A).
# deadline: of time.perf_counter(); an iteration that would end after it is not begun, except for the first.

def cem(cost, mean, std, low, high, samples=64, elites=8, iterations=5, min_std=0.05, beta=0.0, momentum=0.0, keep=0.3,
        temperature=0.5, step_size=0.1, carried=None, generator=None, deadline=math.inf):
    """Cross-entropy method, as in DINO-WM (arXiv:2411.04983): mean and std move to those of the elites; the last mean.
    On top of it: bounds, a least std, and as options momentum (JEPA-WMs, arXiv:2512.24497) and coloured noise."""
    costs, begun = [], time.perf_counter()
    for i in range(iterations):
        actions = draw(mean, std, low, high, samples, beta, generator)
        elite, found = best(actions, cost(actions, i), elites)
        mean = momentum * mean + (1 - momentum) * elite.mean(dim=1)
        std = (momentum * std + (1 - momentum) * elite.std(dim=1)).clamp(min=min_std)
        costs.append(found[:, 0])
        if late(begun, i + 1, deadline):
            break
    return mean.clamp(low, high), torch.stack(costs), elite


def icem(cost, mean, std, low, high, samples=64, elites=8, iterations=5, min_std=0.05, beta=0.0, momentum=0.0, keep=0.3,
         temperature=0.5, step_size=0.1, carried=None, generator=None, deadline=math.inf):
    """iCEM (arXiv:2008.06389): ever fewer samples, max(2 elites, samples / 1.25^i), of coloured noise; a share `keep`
    of the elites stays among the candidates, and with `carried` those of the time step before, shifted, their missing
    last steps drawn anew; the best candidate of the last iteration. Differences: the mean is the first candidate of
    every iteration, not of the last alone; a least std."""
    costs, elite, begun = [], None, time.perf_counter()
    for i in range(iterations):
        actions = draw(mean, std, low, high, max(2 * elites, int(samples / 1.25 ** i)), beta, generator)
        if i == 0 and carried is not None:
            elite = draw(mean, std, low, high, 1 + carried.shape[1], beta, generator)[:, 1:]
            elite[:, :, :carried.shape[2]] = carried
        if elite is not None:
            actions = torch.cat((actions, elite[:, :math.ceil(keep * elites)]), dim=1)
        elite, found = best(actions, cost(actions, i), elites)
        mean = momentum * mean + (1 - momentum) * elite.mean(dim=1)
        std = (momentum * std + (1 - momentum) * elite.std(dim=1)).clamp(min=min_std)
        costs.append(found[:, 0])
        if late(begun, i + 1, deadline):
            break
    return elite[:, 0], torch.stack(costs), elite


def mppi(cost, mean, std, low, high, samples=64, elites=8, iterations=5, min_std=0.05, beta=0.0, momentum=0.0, keep=0.3,
         temperature=0.5, step_size=0.1, carried=None, generator=None, deadline=math.inf):
    """MPPI as in TD-MPC2 (arXiv:2310.16828): mean and std of the elites, weighted by exp(-cost / temperature); the last
    mean. Differences: costs are counted from the best in units of the elites' standard deviation, as a distance of
    latents has no scale of its own; no policy is among the candidates; the mean is returned, not a drawn elite."""
    costs, begun = [], time.perf_counter()
    for i in range(iterations):
        actions = draw(mean, std, low, high, samples, beta, generator)
        elite, found = best(actions, cost(actions, i), elites)
        weight = (found - found[:, :1]) / found.std(dim=1, keepdim=True).clamp(min=1e-12)
        weight = torch.softmax(-weight / temperature, dim=1)[:, :, None, None]                # (E, elites, 1, 1)
        mean = momentum * mean + (1 - momentum) * (weight * elite).sum(dim=1)
        std = (weight * (elite - mean[:, None]).square()).sum(dim=1).sqrt().clamp(min=min_std)
        costs.append(found[:, 0])
        if late(begun, i + 1, deadline):
            break
    return mean.clamp(low, high), torch.stack(costs), elite


def adam(cost, mean, std, low, high, samples=64, elites=8, iterations=5, min_std=0.05, beta=0.0, momentum=0.0, keep=0.3,
         temperature=0.5, step_size=0.1, carried=None, generator=None, deadline=math.inf):
    """Gradient descent on the actions through the model, by Adam (arXiv:1412.6980) from `samples` starts at once, with
    steps back into the bounds (arXiv:2512.09929 finds Adam better than plain descent); the best ever seen."""
    actions = draw(mean, std, low, high, samples, beta, generator).requires_grad_()
    optimizer, begun = torch.optim.Adam([actions], lr=step_size), time.perf_counter()
    costs, elite, found = [], actions.detach()[:, :0], None
    for i in range(iterations + 1):
        with torch.set_grad_enabled(i < iterations):
            now = cost(actions, i)
        seen = now.detach() if found is None else torch.cat((found, now.detach()), dim=1)
        elite, found = best(torch.cat((elite, actions.detach()), dim=1), seen, elites)
        costs.append(found[:, 0])
        if i == iterations or late(begun, i + 1, deadline):
            break
        actions.grad, = torch.autograd.grad(now, actions, torch.ones_like(now))
        optimizer.step()
        actions.data.clamp_(low, high)
    return elite[:, 0], torch.stack(costs), elite


def plan(model, z_ctx, a_ctx, z_goal, horizon=5, low=-5.0, high=5.0, a_mask=None, mean=None, carried=None, method='cem',
         K=1, seeds=1, risk='mean', cost='all', discount=1.0, tokens=None, smooth=0.0, samples=64, elites=8,
         iterations=5, init_std=1.0, min_std=0.05, beta=2.0, momentum=0.0, keep=0.3, temperature=0.5, step_size=0.1,
         chunk=0, budget_ms=0.0, seed=0, rows=1, width=0):
    """Normalised actions (E, horizon, A) that lead the model from its context to the goal, and info.

    z_ctx (E, Tc, N, D), a_ctx (E, Tc, A) with a_ctx[:, t] what led to z_ctx[:, t] where a_mask (E, Tc) says that it is
    known (by default all but the first), z_goal (E, N, D): normalised. mean (E, horizon, A) and carried (E, n, up to
    horizon, A): where to begin, e.g. the last plan and its elites, shifted. The cost is the squared distance to the
    goal in un-whitened latents, each channel counting by its variance in the data, over tokens (N,) by their weight.
    An action is `rows` rows of the dataset with `width` numbers each (0: A / rows), and zeros up to A. The noise of the
    search is coloured over all rows of a plan: drawn apart, those of a step would cancel each other.
    All candidates of an iteration see the same denoising noise, and share the context's keys and values, which are
    computed once. info: 'cost' (iterations, E), 'elites', 'imagine': actions (E, M, H, A) -> (E, M, H, N, D).
    """
    E, Tc, A = a_ctx.shape
    device = z_ctx.device
    deadline = time.perf_counter() + budget_ms / 1000 if budget_ms else math.inf
    weight = model.stats['z_std'] ** 2
    weight = weight / weight.mean()
    if tokens is not None:
        weight = weight * (tokens / tokens.mean())[:, None]                               # (N, D)
    chunk = chunk or (max(1, 1024 // z_goal.shape[1]) if device.type == 'cpu' else 4096)
    low, high = (torch.as_tensor(v, dtype=z_ctx.dtype, device=device).expand(A) for v in (low, high))
    if a_mask is None:
        a_mask = torch.arange(Tc, device=device).expand(E, Tc) > 0
    width = width or A // rows

    def apart(v):       # (.., h, A) -> (.., h x rows, width), what the search is over
        return v[..., :rows * width].unflatten(-1, (rows, width)).flatten(-3, -2)

    def together(v):    # its inverse
        return F.pad(v.unflatten(-2, (-1, rows)).flatten(-2), (0, A - rows * width))

    counted = slice(0 if cost == 'all' else horizon - 1, horizon)
    step_weight = (discount ** torch.arange(horizon, device=device))[counted]
    step_weight = step_weight / step_weight.sum()
    with torch.no_grad():
        rings = remember(model, z_ctx, a_ctx, a_mask, Tc + horizon, seed=seed)

    def imagine(actions, seed, grad=False):     # (E, M, H, A) -> (E, M, H, N, D)
        M = actions.shape[1]
        a = torch.cat((a_ctx[:, None].expand(-1, M, -1, -1), actions), dim=2)
        known = torch.cat((a_mask, a_mask.new_ones(E, horizon)), dim=1).repeat_interleave(M, dim=0)
        z = rollout(model, z_ctx, a.flatten(0, 1), known, K=K, seed=seed, rings=rings, grad=grad)
        return z.unflatten(0, (E, M))

    def distance(part, i):
        costs = []
        for s in range(seeds):
            z = imagine(part, hash((seed, i, s)) % 2 ** 31, 'all' if torch.is_grad_enabled() else False)
            error = (z[:, :, counted] - z_goal[:, None, None]).square() * weight              # (E, M, counted, N, D)
            costs.append((error.mean(dim=(3, 4)) * step_weight).sum(dim=2))
        costs = torch.stack(costs)                                                        # (seeds, E, M)
        total = costs.amax(dim=0) if risk == 'worst' else costs.mean(dim=0)
        if risk == 'std' and seeds > 1:
            total = total + costs.std(dim=0)
        first = (part[:, :, :1] - a_ctx[:, None, -1:]) * a_mask[:, None, -1:, None]
        return total + smooth * torch.cat((first, part.diff(dim=2)), dim=2).square().mean(dim=(2, 3))

    def distances(actions, i):
        parts = together(actions).split(max(1, chunk // E), dim=1)
        if torch.is_grad_enabled() and len(parts) > 1:  # the graph of one chunk at a time: its activations come again
            return torch.cat([checkpoint(distance, part, i, use_reentrant=False) for part in parts], dim=1)
        return torch.cat([distance(part, i) for part in parts], dim=1)

    generator = torch.Generator().manual_seed(seed)
    mean = torch.zeros(E, horizon, A, device=device) if mean is None else mean
    mean, low, high = (apart(v) for v in (mean, low.expand(horizon, A), high.expand(horizon, A)))
    carried = None if carried is None else apart(carried)
    search = dict(cem=cem, icem=icem, mppi=mppi, adam=adam)[method]
    with torch.no_grad():
        actions, costs, elite = search(distances, mean, torch.full_like(mean, init_std), low, high, samples, elites,
                                       iterations, min_std, beta, momentum, keep, temperature, step_size, carried,
                                       generator, deadline)
    return together(actions), {'cost': costs, 'elites': together(elite),
                               'imagine': functools.partial(imagine, seed=seed)}


class Planner:
    """A trained model as the controller of a robot, or of E robots at once: pictures in, the next action out.

    It knows the pictures, the actions that were executed, and nothing else. options: this file's constants, for
    example plan.config | {'samples': 128}. past: how many frames the first call wants. seconds, iterations: of every
    search so far. tell: print a line about each.
    """
    def __init__(self, ckpt, options=config, tell=True):
        o = self.options = options
        for name, choices in (('method', ('cem', 'icem', 'mppi', 'adam')), ('cost', ('all', 'last')),
                              ('risk', ('mean', 'worst', 'std')), ('dtype', ('auto', 'float32', 'bfloat16'))):
            data.one_of(name, o[name], choices)
        for name in ('horizon', 'samples', 'iterations', 'replan', 'seeds'):
            if o[name] < 1:
                sys.exit(f'--{name}: wants at least 1, got {o[name]}')
        for name, low, high in (('init_std', 1e-6, 100), ('warm_std', 0, 100), ('min_std', 0, 100), ('keep', 0, 1),
                                ('seed', 0, 2 ** 31), ('momentum', 0, 0.999), ('beta', 0, 10), ('chunk', 0, 1e9),
                                ('temperature', 1e-6, 1e6), ('step_size', 1e-6, 100), ('discount', 1e-6, 1),
                                ('smooth', 0, 1e9), ('budget_ms', 0, 1e9)):
            if not low <= o[name] <= high:
                sys.exit(f'--{name}: wants {low} to {high}, got {o[name]}')
        if not 2 <= o['elites'] <= o['samples']:
            sys.exit(f'--elites={o["elites"]}: wants 2 to samples={o["samples"]}, a std needs two')
        if o['replan'] > o['horizon']:
            sys.exit(f'--replan={o["replan"]}: a plan has only horizon={o["horizon"]} steps')
        self.device, self.tell = data.pick_device(o['device']), tell
        self.autocast = data.autocast(self.device, o['dtype'])
        self.model, self.trained = load(ckpt, self.device)
        c, stats = self.model.requires_grad_(False).config, {k: v.cpu() for k, v in self.model.stats.items()}
        if not c['action_dim']:
            sys.exit(f'{ckpt}: was trained without actions, there is nothing to search')
        if o['K'] < 1 or o['K'] & (o['K'] - 1) or o['K'] > c['k_max']:
            sys.exit(f'--K={o["K"]}: wants a power of two up to {c["k_max"]}, the k_max that {ckpt} was trained with')
        if self.autocast._enabled:
            half_weights(self.model, self.autocast.fast_dtype)
        if o['compile']:
            compile_layers(self.model)
        self.encode = restore_encoder(self.trained, self.model.stats, o['encoder_path']).to(self.device)
        self.frame_size = self.encode.size, self.encode.width
        if not 0 <= o['robot'] < len(stats['a_mean']):
            sys.exit(f'--robot={o["robot"]}: {ckpt} knows {len(stats["a_mean"])} labelled datasets, counted from 0')
        self.a_mean, self.a_std, self.a_low, self.a_high = (stats[f'a_{k}'][o['robot']]
                                                            for k in ('mean', 'std', 'low', 'high'))
        self.used = int(stats['a_width'][o['robot']])           # of the padded width
        self.frameskip = int(stats['a_rows'][o['robot']])       # dataset rows in a model step
        self.width = self.used // self.frameskip                # numbers in a row
        self.scale = torch.where(self.a_std > 1e-6, self.a_std, torch.inf)  # constant dimensions stay at their mean
        bounds = [((v - self.a_mean) / self.scale).clamp(-5, 5).to(self.device) for v in (self.a_low, self.a_high)]
        tokens = None
        if o['mask']:
            tokens = data.read_image(o['mask'], self.frame_size).float().mean(dim=0)[None]            # (1, H, W)
            tokens = F.adaptive_avg_pool2d(tokens, self.encode.grid).flatten().to(self.device)        # (N,)
            if not tokens.any():
                sys.exit(f'--mask={o["mask"]}: is black, wants white where the goal counts')
        self.search = dict(low=bounds[0], high=bounds[1], tokens=tokens, rows=self.frameskip, width=self.width) | {
            k: o[k] for k in ('horizon', 'method', 'K', 'seeds', 'risk', 'cost', 'discount', 'smooth', 'samples',
                              'elites', 'iterations', 'min_std', 'beta', 'momentum', 'keep', 'temperature',
                              'step_size', 'chunk', 'budget_ms')}
        self.past = (self.trained['eval_context'] - 1) * self.frameskip + 1
        self.seconds, self.iterations = [], []
        self.reset()

    def reset(self):
        """Forget what was seen and planned: a new episode."""
        self.z = self.goal = self.last = None
        self.done, self.queue = [], []

    @torch.no_grad()
    def latents(self, x):
        """Normalised latents (.., N, D) of uint8 frames (.., H, W, 3)."""
        x = torch.as_tensor(x)
        flat = data.resize(x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2), self.frame_size)
        with self.autocast:
            z = torch.cat([self.encode(part.to(self.device).float() / 255).float() for part in flat.split(64)])
        return standard(z, self.model.stats).unflatten(0, x.shape[:-3])

    def physical(self, a):
        """(.., A) normalised -> (.., frameskip, width): rows of the dataset, in its units."""
        std = torch.where(self.a_std > 1e-6, self.a_std, 0.0)
        return (a.cpu() * std + self.a_mean)[..., :self.used].unflatten(-1, (self.frameskip, -1))

    def normalised(self, rows):
        """The inverse of physical, padded to the model's width."""
        a = F.pad(torch.as_tensor(rows, dtype=torch.float32).flatten(-2), (0, len(self.a_mean) - self.used))
        return ((a - self.a_mean) / self.scale).clamp(-5, 5).to(self.device)

    def act(self, frames, goal, actions=None):
        """The next action, a row of the dataset in its units: (width,).

        frames (n, H, W, 3) uint8: those since the last call, oldest first, one per row; (H, W, 3) is one. The first
        call wants `past` of them at least, as the model was trained to see: a robot at rest may repeat its picture.
        goal (H, W, 3) uint8. actions: what was executed, where that is not what act returned: (width,), at the first
        call the rows (n - 1, width) between its frames, which are else not known. For E robots at once everything has
        E in front. A search happens every `replan` x frameskip calls; the calls between them return at once.
        """
        frames, goal = np.asarray(frames), np.asarray(goal)
        one = goal.ndim == 3
        if one:
            frames, goal = frames.reshape(1, -1, *frames.shape[-3:]), goal[None]
            actions = None if actions is None else np.asarray(actions)[None]
        E, n, H, W, _ = frames.shape
        if aspects_differ(frames.shape[2:], goal.shape[1:]):
            raise ValueError(f'the goal picture is {goal.shape[2]} x {goal.shape[1]} pixels, the frames are {W} x {H}: '
                             'wants the same aspect')
        if self.z is None:
            if n < self.past:
                raise ValueError(f'{n} frames to begin with: the model was trained to see {self.past} '
                                 f'({self.trained["eval_context"]} of them, {self.frameskip} apart)')
            self.z = self.latents(frames[:, n - self.past::self.frameskip])                   # (E, Tc, N, D)
            self.a = torch.zeros(*self.z.shape[:2], len(self.a_mean), device=self.device)
            self.known = torch.zeros(self.z.shape[:2], dtype=torch.bool, device=self.device)
            if actions is not None and self.past > 1:
                rows = np.asarray(actions)[:, 1 - self.past:].reshape(E, -1, self.frameskip, self.width)
                self.a[:, 1:], self.known[:, 1:] = self.normalised(rows), True
        else:
            assert n == 1, f'{n} frames after one action'
            if actions is not None:
                self.done[-1] = np.asarray(actions)
            if len(self.done) == self.frameskip:
                self.z = torch.cat((self.z[:, 1:], self.latents(frames)), dim=1)
                self.a = torch.cat((self.a[:, 1:], self.normalised(np.stack(self.done, axis=1))[:, None]), dim=1)
                self.known = torch.cat((self.known[:, 1:], torch.ones_like(self.known[:, :1])), dim=1)
                self.known[:, 0] = False        # what led to the first frame is out of sight
                self.done = []
        if self.goal is None or not np.array_equal(goal, self.goal):
            self.goal, self.z_goal = goal, self.latents(goal)
        if not self.queue:
            begun, mean, carried, steps = time.perf_counter(), None, None, self.options['replan']
            if self.last is not None and self.options['warm']:
                plan_before, elite = self.last
                mean = torch.cat((plan_before[:, steps:], torch.zeros_like(plan_before[:, :steps])), dim=1)
                carried = elite[:, :, steps:]
            std = mean is not None and self.options['warm_std'] or self.options['init_std']
            with self.autocast:
                found, info = plan(self.model, self.z, self.a, self.z_goal, a_mask=self.known, mean=mean, init_std=std,
                                   carried=carried, seed=self.options['seed'] + 1000 * len(self.seconds), **self.search)
            self.last = found, info['elites']
            rows = self.physical(found[:, :steps]).flatten(1, 2).numpy()                      # (E, steps, width)
            self.queue = [*rows.swapaxes(0, 1)]
            self.seconds.append(time.perf_counter() - begun)
            self.iterations.append(len(info['cost']) - (self.options['method'] == 'adam'))     # it ends with a look
            if self.tell:
                print(f'plan {len(self.seconds)}: {1000 * self.seconds[-1]:.0f} ms, {self.iterations[-1]} iterations, '
                      f'cost {info["cost"][0].mean():.4f} -> {info["cost"][-1].mean():.4f}', flush=True)
        self.done.append(self.queue.pop(0))
        return self.done[-1][0] if one else self.done[-1]


def aspects_differ(a, b):
    """Whether pictures of shapes (H, W, ..) are stretched differently when both are brought to the encoder's size."""
    return abs(math.log(a[0] * b[1] / (a[1] * b[0]))) > 0.02


def random_weights(planner, seed):
    """The same planner with a model that has learned nothing."""
    other = copy.copy(planner)
    torch.manual_seed(seed)
    net = WorldModel(planner.model.config).to(planner.device).requires_grad_(False)
    for head in ([net.head.out] if planner.model.config['wide_layers'] else [net.head]):
        torch.nn.init.normal_(head.weight, std=0.02)            # training begins with zeros, which imagine nothing
    net.stats = planner.model.stats
    other.model = half_weights(net, planner.autocast.fast_dtype) if planner.autocast._enabled else net
    if planner.options['compile']:
        compile_layers(net)
    other.reset()
    other.seconds, other.iterations = [], []
    return other


def wilson(k, n, z=1.96):
    """The 95 % interval of a share k / n (Wilson 1927): honest for small n and near 0 and 1."""
    centre, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def question(sim, i, rng, goals, goal_steps, past):
    """An episode to be played: states of the `past` frames before its start, the actions between them, the goal's state
    and pose, and for expert goals the script's own actions."""
    while True:
        sim.reset(int(rng.integers(2 ** 31)))
        script, states, actions = sim.script(rng), [sim.state()], []
        play = script if goals == 'expert' else sim.rest
        for _ in range(past - 1 + (rng.integers(20) if goals == 'expert' else 0)):
            actions.append(play())
            sim.step(actions[-1])
            states.append(sim.state())
        states, actions, begin, expert = states[-past:], actions[len(actions) - past + 1:], sim.pose(), []
        if goals == 'random':
            sim.elsewhere(i, rng)
        for _ in range(goal_steps if goals == 'expert' else 0):
            expert.append(script())
            sim.step(expert[-1])
        if sim.asks(i, begin, sim.pose()):
            return dict(states=states, actions=np.array(actions).reshape(past - 1, -1), begin=begin,
                        goal=sim.state(), pose=sim.pose(), expert=expert)


def play(policy, sims, questions, budget, see):
    """A fixed budget of steps under policy(frames, goals, actions, t), all episodes abreast: poses (budget + 1, E, ..),
    actions (budget, E, width), and where see is set frames (budget + 1, E, H, W, 3) and goals. The simulator is here;
    a policy gets the frames since its last call, and at first the actions between them."""
    def look(sim, state):
        sim.restore(state)
        return sim.frame()

    own = len(set(map(id, sims))) == len(sims)          # else one simulator plays all episodes in turn
    goals = np.stack([look(s, q['goal']) for s, q in zip(sims, questions)]) if see else None
    given = np.stack([[look(s, x) for x in q['states']] for s, q in zip(sims, questions)]) if see else None
    states, poses, actions, shown = [q['states'][-1] for q in questions], [], [], []
    for sim, state in zip(sims, states):
        sim.restore(state)
    for t in range(budget + 1):
        poses.append([])
        for e, sim in enumerate(sims):
            if not own:
                sim.restore(states[e])
            if t:
                sim.step(actions[-1][e])
                states[e] = sim.state()
            poses[-1].append(sim.pose())
            if t and see:
                given[e, :1] = sim.frame()
        given = given if t == 0 or not see else given[:, :1]
        shown.append(given[:, -1].copy() if see else None)
        if t < budget:
            past = np.stack([q['actions'] for q in questions]) if t == 0 else None
            actions.append(np.asarray(policy(given, goals, past, t)))
    return np.array(poses), np.array(actions), shown, goals


if __name__ == '__main__':
    data.one_of('goals', goals, ('expert', 'random'))
    shifts = [s for s in shift.split(',') if s]
    for s in shifts:
        data.one_of('shift', s, ('light', 'background', 'object', 'camera'))
    goal_steps = goal_steps or (10 if env == 'demo' else 25)
    budget = budget or 2 * goal_steps
    for name, value in (('episodes', episodes), ('goal_steps', goal_steps), ('budget', budget)):
        if value < 1:
            sys.exit(f'--{name}: wants at least 1, got {value}')
    if goals == 'expert' and goal_steps < 5:
        sys.exit(f'--goal_steps={goal_steps}: nothing gets far enough for a goal, wants at least 5')
    if start and watch or bool(start or watch) != bool(goal):
        sys.exit('--goal comes with --start (one plan for two pictures) or with --watch (a folder of pictures)')
    if watch and not os.path.isdir(watch):
        sys.exit(f'--watch={watch}: no such folder')
    planner = Planner(ckpt, config, tell=False)
    out_dir = out_dir or os.path.dirname(ckpt) or '.'
    wanted = goal and data.read_image(goal).permute(1, 2, 0).numpy()

    if start:
        given = [data.read_image(path).permute(1, 2, 0).numpy() for path in start.split(',')]
        context = planner.trained['eval_context']
        given = given * context if len(given) == 1 else given
        if len(given) < context:
            sys.exit(f'--start: {len(given)} pictures, {ckpt} was trained to see {context}: give as many, or one of a '
                     'robot at rest')
        for x in given:
            if aspects_differ(x.shape, wanted.shape):
                sys.exit(f'--goal={goal}: is {wanted.shape[1]} x {wanted.shape[0]} pixels, --start={start} '
                         f'{x.shape[1]} x {x.shape[0]}: wants the same aspect')
        z_ctx, z_goal = torch.cat([planner.latents(x[None]) for x in given])[None], planner.latents(wanted[None])
        begun = time.perf_counter()
        with planner.autocast, torch.no_grad():
            nothing = torch.zeros(1, len(given), len(planner.a_mean), device=planner.device)
            actions, info = plan(planner.model, z_ctx, nothing, z_goal, a_mask=nothing[..., 0] > 0, seed=seed,
                                 init_std=init_std, **planner.search)
            rows = planner.physical(actions[0]).flatten(0, 1).numpy()                     # (horizon x frameskip, width)
            seconds = time.perf_counter() - begun
            z = info['imagine'](actions[:, None])[0, 0]                                   # (horizon, N, D)
        z_now = z_ctx[:, -1]
        for i, row in enumerate(rows):
            print(f'{i:3d}  ' + ' '.join(f'{v:9.4f}' for v in row))
        stats = planner.model.stats
        weight = (stats['z_std'] ** 2 / (stats['z_std'] ** 2).mean())
        far = [((x - z_goal[0]).square() * weight).mean().item() for x in (z_now[0], z[-1])]
        print(f'{len(rows)} actions in {seconds:.2f} s, {len(info["cost"])} iterations; latent distance to the goal '
              f'{far[0]:.4f} now, {far[1]:.4f} imagined at the end')
        os.makedirs(out_dir, exist_ok=True)
        np.save(os.path.join(out_dir, 'plan.npy'), rows)
        shown = pictures(unstandard(torch.cat((z_now, z, z_goal)), stats), planner.encode)
        video = torch.cat((shown[:-1], shown[-1:].expand(len(shown) - 1, -1, -1, -1)), dim=3)     # imagined | goal
        data.write_video(os.path.join(out_dir, 'plan.mp4'), data.enlarge(video), 2)
        print('wrote', os.path.join(out_dir, 'plan.npy'), 'and', os.path.join(out_dir, 'plan.mp4'))
        sys.exit()

    if watch:       # one line of actions per picture, from the first moment with enough of them
        seen, first = set(), []
        print(f'watching {watch}: the first {planner.past} pictures are the past, Ctrl-C ends it', flush=True)
        try:
            while True:
                names = sorted(set(glob.glob(os.path.join(glob.escape(watch), '*.[pj][np]g'))) - seen)
                for name in names:
                    if time.time() - os.path.getmtime(name) < 0.1:      # perhaps still being written
                        break
                    seen.add(name)
                    x = data.read_image(name).permute(1, 2, 0).numpy()
                    first.append(x)
                    if planner.z is None and len(first) < planner.past:
                        continue
                    begun = time.perf_counter()
                    row = planner.act(np.stack(first) if planner.z is None else x, wanted)
                    print(f'{os.path.basename(name)}  ' + ' '.join(f'{v:.6g}' for v in row)
                          + f'  ({1000 * (time.perf_counter() - begun):.0f} ms)', flush=True)
                time.sleep(0.02)
        except ValueError as error:
            sys.exit(f'--watch={watch}: {error}')
        except KeyboardInterrupt:
            sys.exit()

    # closed loop
    size = (frame_height, frame_width or frame_height) if frame_height or env == 'demo' else planner.frame_size
    key = planner.trained['action'] or 'action'
    sim = data.simulator(env, size, '--env', '', key)
    if sim is None:
        sys.exit(f'--env={env}: closed loop wants demo, gym_pusht/PushT-v0, PointMaze_*, FetchReach-* or FetchPush-*')
    if sim.space.shape != (planner.width,):
        sys.exit(f'--env={env}: takes {sim.space.shape[0]} numbers as {key}, {ckpt} was trained with {planner.width}')
    if key not in ('action', *sim.columns(sim.rest())):
        sys.exit(f'--env={env}: has no {key}, the actions that {ckpt} was trained with')
    if env == 'demo' and (planner.a_high[:planner.used] - data.DEMO_STEP).abs().max() > 0.1 * data.DEMO_STEP:
        sys.exit(f'{ckpt}: was trained on another robot, not on the demo world: give --env, or --start and --goal')

    def robots(shift=''):       # one that can be put into any state exactly serves all episodes
        first = data.simulator(env, size, '--env', shift, key)
        return [first] * episodes if first.exact else [first] + [data.simulator(env, size, '--env', shift, key)
                                                                 for _ in range(episodes - 1)]

    rng = np.random.default_rng(seed + 1_000_000)               # of no dataset
    sims = robots()
    questions = [question(s, i, rng, goals, goal_steps, planner.past) for i, s in enumerate(sims)]

    def replay(frames, wanted, past, t):        # the script's own actions, then rest
        return [q['expert'][t] if t < goal_steps else s.rest() for s, q in zip(sims, questions)]

    def random(frames, wanted, past, t):
        low, high = (v[:planner.width].numpy() for v in (planner.a_low, planner.a_high))
        return rng.uniform(low, high, (episodes, planner.width))

    mean_rows = planner.physical(torch.zeros(len(planner.a_mean))).numpy()                    # (frameskip, width)
    blind = random_weights(planner, seed)
    policies = {'model': (planner, sims)} | {f'model, {s}': (planner, robots(s)) for s in shifts} | {
        'random weights': (blind, sims), 'random': (random, sims),
        'zero': (lambda frames, wanted, past, t: [s.rest() for s in sims], sims),
        'mean': (lambda frames, wanted, past, t: [mean_rows[t % planner.frameskip]] * episodes, sims)}
    if goals == 'expert':
        policies['expert'] = replay, sims
    print(f'{env}: {episodes} episodes, {goals} goals' + (f' {goal_steps} steps ahead' if goals == 'expert' else '')
          + f'; budget {budget} environment steps ({budget / sim.fps:.3g} s); {method}, {samples} candidates x '
          f'{iterations} iterations x {horizon} steps of {planner.frameskip}', flush=True)
    methods, shown = {}, None
    for name, (policy, robots_of) in tqdm(policies.items(), disable=not sys.stderr.isatty()):
        plans = isinstance(policy, Planner)
        if plans:
            policy.reset()
            policy.seconds, policy.iterations = [], []
        step = (lambda frames, wanted, past, t: policy.act(frames, wanted, past)) if plans else policy
        poses, executed, frames, targets = play(step, robots_of, questions, budget, plans)
        far = [[sim.far(p, q['pose'], q['begin']) for p, q in zip(row, questions)] for row in poses]
        gap, ok = (np.array([[f[k] for f in row] for row in far]) for k in (0, 1))            # (budget + 1, E)
        end, ever = ok[-1], ok.any(axis=0)
        jerk = np.diff(executed, 2, axis=0) * sim.fps ** 2
        r = methods[name] = dict(
            success_end=end.mean().item(), success_ever=ever.mean().item(), ci95=wilson(int(end.sum()), episodes),
            steps=ok.argmax(axis=0)[ever].mean().item() if ever.any() else None, distance_end=gap[-1].mean().item(),
            seconds_per_plan=sum(policy.seconds) / len(policy.seconds) / episodes if plans else None,
            plans_per_second=episodes * len(policy.seconds) / sum(policy.seconds) if plans else None,
            iterations=float(np.mean(policy.iterations)) if plans else None,
            jerk=np.square(jerk).sum(axis=2).mean().item() if budget > 2 else None)
        if ',' in name:
            r['drop'] = methods['model']['success_end'] - r['success_end']
        tqdm.write(f'{name:17s} success at the end {r["success_end"]:.2f} (95 % interval {r["ci95"][0]:.2f} to '
                   f'{r["ci95"][1]:.2f}), ever {r["success_ever"]:.2f}'
                   + (f' after {r["steps"]:.0f} steps' if ever.any() else '')
                   + f', distance {r["distance_end"]:.3g} {sim.unit}, jerk {r["jerk"] or 0:.3g}'
                   + (f', {r["seconds_per_plan"]:.3f} s per plan ({episodes} at once)' if plans else ''),
                   file=sys.stdout)
        sys.stdout.flush()
        if name == 'model':
            shown = frames, targets, ok
    os.makedirs(out_dir, exist_ok=True)
    report = dict(env=env, episodes=episodes, budget_steps=budget, goals=goals, goal_steps=goal_steps, seed=seed,
                  methods=methods)
    print(json.dumps(report))
    with open(os.path.join(out_dir, 'plan.json'), 'w') as f:
        json.dump(report, f, indent=1)
    # up to eight episodes, each: now | goal; the line below turns green while the goal is reached
    n, video = min(8, episodes), []
    for frames, good in zip(shown[0], shown[2]):
        tiles = torch.from_numpy(np.concatenate((frames[:n], shown[1][:n]), axis=2)).permute(0, 3, 1, 2)
        bar = torch.where(torch.from_numpy(good[:n])[:, None, None, None], torch.tensor([40, 170, 70])[:, None, None],
                          torch.tensor([200, 200, 200])[:, None, None]).to(torch.uint8)
        tiles = data.enlarge(tiles, 96)
        tiles = F.pad(torch.cat((tiles, bar.expand(-1, -1, 6, tiles.shape[3])), dim=2), (3, 3, 3, 3), value=255)
        rows = [torch.cat(list(tiles[i:i + 2]), dim=2) for i in range(0, n - n % 2, 2)] or [tiles[0]]
        video.append(torch.cat(rows, dim=1))
    data.write_video(os.path.join(out_dir, 'plan.mp4'), torch.stack(video + video[-1:] * 5), min(sim.fps, 10))
    print('wrote', os.path.join(out_dir, 'plan.json'), 'and', os.path.join(out_dir, 'plan.mp4'))
