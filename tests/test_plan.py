"""python -m pytest tests/test_plan.py: planners, the cost of a plan, the controller, the closed loop."""
import functools
import inspect
import itertools
import json
import math
import os
import re
import shutil
import sys
import threading
import time
import types

import av
import numpy as np
import pytest
import torch
import torch._dynamo.testing

import data
import decode
import model
import plan
from conftest import ROOT, SMALL, ends, owner, script

PLANNERS = 'cem', 'icem', 'mppi', 'adam'


def options(**changes):
    assert changes.keys() <= plan.config.keys(), changes
    return types.SimpleNamespace(**plan.config | changes)


# --------------------------------------------------------------------------------------------------
# the planners, on costs whose best actions are known

def search(method, cost, mean, low=-2.0, high=2.0, std=1.0, seed=0, deadline=math.inf, carried=None, proposals=None, **changes):
    generator = torch.Generator().manual_seed(seed)
    proposals = mean[:, None][:, :0] if proposals is None else proposals
    with torch.no_grad():
        return getattr(plan, method)(cost, mean, torch.full_like(mean, std), low, high,
                                     options(**dict(beta=0.0) | changes), generator=generator,
                                     deadline=deadline, carried=carried, proposals=proposals)


def watched(cost):
    """The cost, and a list that gets a copy of every batch of candidates with what it cost."""
    seen = []

    def also(actions, i):
        costs = cost(actions, i)
        seen.append((actions.detach().double().numpy().copy(), costs.detach().double().numpy().copy()))
        return costs
    return also, seen


BEST = torch.tensor([[[0.5, -1.0], [0.2, 0.0]], [[-0.3, 0.9], [0.0, 1.5]]])             # (E, H, A)
MIX = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3)))[0]
MIX *= torch.logspace(0, -0.6, 6)
LOW_POINT = torch.tensor([0.6, -0.4, 0.3, 0.7, -0.2, -0.5]).view(3, 2)


def squares(actions, i=0):
    return (actions - BEST[:, None]).square().sum(dim=(2, 3))


def rosenbrock(actions, i=0):
    x, y = actions[:, :, 0].unbind(-1)
    return (1 - x) ** 2 + 20 * (y - x * x) ** 2


def valley(actions, i=0):
    """All six numbers are coupled; curvatures differ sixteenfold."""
    return ((actions - LOW_POINT).flatten(2) @ MIX).square().sum(dim=2)


@pytest.mark.parametrize('method', PLANNERS)
@pytest.mark.parametrize('cost, shape', [(squares, (2, 2, 2)), (rosenbrock, (1, 1, 2)), (valley, (1, 3, 2))])
def test_the_optimum_of_each_episode_is_found(method, cost, shape):
    start = torch.full(shape, -0.8)
    found, costs, elite = search(method, cost, start, samples=200, elites=20, min_std=0.01 if cost is squares else 0.03,
                                 iterations=150 if method == 'adam' else 80)
    assert (cost(found[:, None]) < 5e-3 * cost(start[:, None])).all() and (costs[-1] < costs[0]).all()
    assert elite.shape == (shape[0], 20, *shape[1:]) and (cost(elite).diff(dim=1) >= 0).all(), 'best first'
    assert cost is not squares or (found - BEST).abs().max() < 0.03 and costs.shape[1] == 2


@pytest.mark.parametrize('method', PLANNERS)
def test_bounds_hold_also_where_the_optimum_is_outside(method):
    low, high = torch.tensor([-0.4, -0.6]), torch.tensor([0.3, 1.0])
    cost, seen = watched(squares)
    mean = torch.full_like(BEST, 0.2)
    found, _, elite = search(method, cost, mean, low, high, samples=128, elites=16, iterations=30, min_std=0.02)
    assert np.array_equal(seen[0][0][:, 0], mean.numpy()), 'the first candidate is the mean'
    for actions in (*(torch.tensor(a) for a, _ in seen), found, elite):
        assert (actions >= low - 1e-6).all() and (actions <= high + 1e-6).all()
    assert (found - BEST.clamp(low, high)).abs().max() < 0.06


@pytest.mark.parametrize('method, keep', [('cem', 0.3), ('mppi', 0.3), ('icem', 0.3), ('icem', 0.0)])
def test_the_update_rule(method, keep):
    """Ten iterations beside numpy, which has the noise and writes down the rest, section by section of the papers. With
    a cost that turns about in the last one, the best and the mean are apart."""
    N, K, T, wide, last = 30, 6, 0.7, 100.0, 9

    def cost(actions, i):
        return squares(actions if i < last else -actions) * (1 + i) + actions[..., 0].sum(dim=2).sin()
    spied, seen = watched(cost)
    mean = torch.tensor([[[0.1, 0.2], [0.3, -0.2]], [[0.0, 0.5], [1.0, 0.0]]]).double()
    found, costs, elites = search(method, spied, mean, -wide, wide, 0.8, seed=5, samples=N, elites=K,
                                  iterations=last + 1, min_std=0.15, beta=1.5, keep=keep, temperature=T)
    sizes = [N] * 10 if method != 'icem' else [30, 24, 19, 15, 12, 12, 12, 12, 12, 12]      # at least twice the elites
    generator = torch.Generator().manual_seed(5)
    noise = [plan.coloured(2, n, 2, 2, 1.5, generator).double().numpy() for n in sizes]
    for e in range(2):
        mu, sigma, kept, least = mean[e].numpy(), np.full((2, 2), 0.8), np.zeros((0, 2, 2)), 0
        for i in range(last + 1):
            want = mu + sigma * noise[i][e]
            want[0] = mu
            want = np.concatenate((want, kept))
            got, c = seen[i][0][e], seen[i][1][e]
            assert got.shape == want.shape and np.allclose(got, want, atol=1e-6)
            E = got[c.argsort()[:K]]
            assert np.isclose(costs[i, e].item(), c.min())
            mu, sigma = E.mean(axis=0), E.std(axis=0, ddof=1)
            if method == 'mppi':
                S = np.sort(c)[:K]
                w = np.exp(-(S - S[0]) / (T * S.std(ddof=1)))
                w = (w / w.sum())[:, None, None]
                mu = (w * E).sum(axis=0)
                sigma = np.sqrt((w * (E - mu) ** 2).sum(axis=0))
            least += (sigma < 0.15).sum()
            sigma = np.maximum(sigma, 0.15)
            kept = E[:math.ceil(keep * K)] if method == 'icem' else kept
        assert np.allclose(found[e], E[0] if method == 'icem' else mu, atol=1e-6) and least > 5
        assert np.allclose(elites[e], E, atol=1e-6) and not np.allclose(E[0], mu, atol=1e-4)


def test_icem_takes_up_the_elites_of_the_step_before():
    mean, far = torch.zeros(1, 4, 2), torch.linspace(-1, 1, 5 * 6).view(1, 5, 3, 2)
    cost, seen = watched(lambda actions, i: (actions[:, :, :3] - far[:, 1:2]).square().sum(dim=(2, 3)))
    found, _, _ = search('icem', cost, mean, -1.5, 0.9, samples=20, elites=5, iterations=1, keep=0.5, carried=far)
    first = seen[0][0][0]
    assert len(first) == 20 + math.ceil(0.5 * 5)
    assert np.allclose(first[20:, :3], far[0, :3].clamp(-1.5, 0.9)), 'the better first, within bounds'
    fresh = first[20:, 3]
    assert len(np.unique(fresh.round(6), axis=0)) == 3 and fresh.min() >= -1.5 and fresh.max() <= 0.9
    assert np.abs(fresh).max() > 1e-3
    assert torch.allclose(found[:, :3], far[:, 1]), 'the best candidate itself comes back'
    draws = []
    for seed in range(200):
        cost, seen = watched(squares)
        search('icem', cost, torch.zeros(2, 2, 2), -9, 9, 0.7, seed, samples=10, elites=5, iterations=1,
               carried=torch.zeros(2, 1, 1, 2))
        draws.append(seen[0][0][:, 10, 1])
    assert 0.6 < np.std(draws) < 0.8 and abs(np.mean(draws)) < 0.1, 'drawn as any other action is'


def test_elites_of_equal_cost_weigh_the_same():
    found, _, elite = search('mppi', lambda a, i: 0 * squares(a), torch.zeros_like(BEST), iterations=1)
    assert torch.allclose(found, elite.mean(dim=1), atol=1e-6)


def test_adam_is_torchs_adam_from_the_same_starts():
    mix, low_point, best = MIX.double(), LOW_POINT.double(), BEST.double()

    def cost(actions, i=0):     # in the end all are worse, so that the best was seen before
        return (((actions - low_point).flatten(2) @ mix).square().sum(dim=2) + (100 if i == 25 else 0)
                + (actions[:, :, :2] - best[:, None]).square().sum(dim=(2, 3)))
    spied, seen = watched(cost)
    mean = torch.full((2, 3, 2), -0.6, dtype=torch.float64)
    found, costs, elite = search('adam', spied, mean, -0.7, 0.65, samples=5, elites=3, iterations=25, step_size=0.07)
    x = torch.tensor(seen[0][0], requires_grad=True)
    optimizer, all_costs, all_actions = torch.optim.Adam([x], lr=0.07), [], []
    for i in range(26):
        assert np.allclose(seen[i][0], x.detach().numpy(), atol=1e-12)
        optimizer.zero_grad()
        c = cost(x, i)
        all_costs.append(c.detach())
        all_actions.append(x.detach().clone())
        c.sum().backward()
        optimizer.step()
        with torch.no_grad():
            x.clamp_(-0.7, 0.65)
    assert len(seen) == len(costs) == 26, 'the starts, and what each step led to'
    all_costs, all_actions = torch.cat(all_costs, dim=1), torch.cat(all_actions, dim=1)
    for e in range(2):
        order = all_costs[e].argsort()[:3]
        assert torch.equal(elite[e], all_actions[e, order]) and torch.equal(found[e], elite[e, 0])
    assert torch.equal(costs[-1], all_costs.min(dim=1).values) and (costs.diff(dim=0) <= 0).all()


@pytest.mark.parametrize('method', PLANNERS)
def test_a_plan_depends_on_its_seed_and_on_no_other_episode(method):
    def other(actions, i):
        costs = squares(actions)
        return torch.stack((costs[0], 50 * (actions[1] + 1.7).square().sum(dim=(1, 2))))
    (a, costs_a, elite_a), (b, costs_b, elite_b), (c, _, _) = (
        search(method, f, torch.zeros_like(BEST), seed=s, samples=40, elites=8, iterations=6)
        for f, s in ((squares, 0), (other, 0), (squares, 1)))
    assert torch.equal(a[0], b[0]) and torch.equal(costs_a[:, 0], costs_b[:, 0])
    assert torch.equal(elite_a[0], elite_b[0])
    assert (a[1] - b[1]).abs().max() > 0.5 and not torch.equal(a, c)


# --------------------------------------------------------------------------------------------------
# coloured noise

@pytest.mark.parametrize('beta', [0.0, 1.0, 2.0, 3.5])
def test_noise_is_gaussian_of_unit_variance_at_every_step(beta):
    for H in (1, 2, 3, 5, 30):
        x = plan.coloured(10, 3000, H, 2, beta, torch.Generator().manual_seed(H)).double().numpy()
        assert x.shape == (10, 3000, H, 2)
        x = x.transpose(0, 1, 3, 2).reshape(-1, H)                                       # (60000, H)
        assert np.abs(x.mean(axis=0)).max() < 0.02 and np.abs((x ** 2).mean(axis=0) - 1).max() < 0.03
        kurtosis = (x ** 4).mean(axis=0) / (x ** 2).mean(axis=0) ** 2
        assert np.abs(kurtosis - 3).max() < 0.15, 'Gaussian, not scaled row by row'
        if beta == 0:
            assert np.abs(x.T @ x / len(x) - np.eye(H)).max() < 0.03, 'white'
        elif H > 3:         # else there is one frequency beside the mean
            assert (x[:, 1:] * x[:, :-1]).mean() > 0.1, 'neighbours go the same way'
    x = plan.coloured(2, 3000, 8, 2, beta, torch.Generator().manual_seed(0)).double().numpy()
    assert abs((x[:, :, :, 0] * x[:, :, :, 1]).mean()) < 0.03, 'actions are independent'
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < 0.03 and abs((x[0] * x[1]).mean()) < 0.03
    x = plan.coloured(1, 2000, 256, 1, beta, torch.Generator().manual_seed(0))[0, :, :, 0].double().numpy()
    power = (np.abs(np.fft.rfft(x, axis=1)) ** 2).mean(axis=0)[1:128]
    slope = np.polyfit(np.log(np.arange(1, 128)), np.log(power), 1)[0]
    assert abs(slope + beta) < 0.03
    assert np.abs(power / power[0] * np.arange(1, 128) ** beta - 1).max() < 0.25, 'at every frequency'


# --------------------------------------------------------------------------------------------------
# the cost of a plan, in worlds that are known

class World(torch.nn.Module):
    """Every latent moves by the action of its frame, by `drift` times the sum of the actions known of
    the past, and by `luck` times the noise that the sampler begins from. What remember and rollout
    need of a model, and no more."""
    def __init__(self, drift=0.0, luck=0.0, z_std=(1.0, 1.0)):
        super().__init__()
        self.config = dict(objective='shortcut' if luck else 'direct', k_max=8, context=100, memory=0)
        self.reach = 0
        self.stats, self.drift, self.luck, self.calls = {'z_std': torch.tensor(z_std)}, drift, luck, []
        self.register_buffer('a_base', torch.zeros(1))

    def forward(self, z, tau, d, a, a_mask, cache=None, start=0, commit=False, **_):
        self.calls.append(dict(z=z.clone(), a=a.clone(), start=start, commit=commit))
        (sums, last), = cache
        moves = torch.where(a_mask[..., None], a, 0.0)
        if commit:
            if start == 0:      # the context, which for 'direct' comes shifted by a frame
                sums.copy_(moves.sum(dim=1, keepdim=True))
            return None
        before = last if self.luck else z
        out = before + moves[:, :, None] + self.drift * sums[:, :, None] + self.luck * z
        if self.luck:
            cache[0] = sums, out
        return out

    def new_cache(self, B, T, dtype):
        return [(torch.zeros(B, 1, 2, dtype=dtype), torch.zeros(B, 1, 3, 2, dtype=dtype))]


GOAL = torch.tensor([[1.5, -0.6], [-0.9, 0.3]])[:, None].expand(2, 3, 2)                # (E, N, D)
PARAMETERS = inspect.signature(plan.plan).parameters.keys()


def nowhere(E=2, Tc=2):
    return torch.zeros(E, Tc, 3, 2), torch.zeros(E, Tc, 2)


def find(net, z_ctx, a_ctx, z_goal, **given):
    """plan.plan, its options among the other parameters."""
    parameters = {k: given.pop(k) for k in [*given] if k in PARAMETERS}
    return plan.plan(net, z_ctx, a_ctx, z_goal, options(**given), **parameters)


def by_hand(actions, z, z_goal, a_last, known, weight, tokens, steps, smooth):
    """The cost of candidates (M, H, A), whose imagined latents are z (S, M, H, N, D), in numpy and float64."""
    share = np.outer(tokens, weight) / (sum(tokens) * sum(weight))
    total = (share * (z[:, :, steps] - np.float64(z_goal)) ** 2).sum(axis=(3, 4)).mean(axis=(0, 2))
    first = (actions[:, :1] - np.float64(a_last)) * known
    return total + smooth * (np.concatenate((first, np.diff(actions, axis=1)), axis=1) ** 2).mean(axis=(1, 2))


@pytest.mark.parametrize('given', [
    dict(), dict(cost='last'), dict(smooth=0.7), dict(tokens=torch.tensor([0.0, 0.2, 1.0])), dict(seeds=3),
    dict(seeds=2, cost='last', smooth=0.3, chunk=4)], ids=str)
@pytest.mark.parametrize('known', [True, False])
def test_the_cost_of_a_plan(given, known):
    o = dict(cost='all', smooth=0.0, tokens=torch.ones(3), seeds=1) | given
    E, Tc, M, H, z_std = 2, 2, 6, 3, (0.5, 2.0)
    world = World(luck=0.4, z_std=z_std)
    z_ctx, _ = nowhere()
    g = torch.Generator().manual_seed(1)
    a_ctx, z_goal = torch.randn(E, Tc, 2, generator=g), torch.randn(E, 3, 2, generator=g)
    a_mask = torch.tensor([[False, known]] * 2)
    found, info = find(world, z_ctx, a_ctx, z_goal, horizon=H, a_mask=a_mask, samples=M, elites=M,
                       iterations=1, init_std=0.5, **given)
    calls = [c for c in world.calls if not c['commit']]
    parts = len(calls) // (H * o['seeds'])
    assert parts == (3 if 'chunk' in given else 1)      # 4 candidates at once are 2 of each episode
    per = M // parts
    calls = [calls[i:i + H] for i in range(0, len(calls), H)]
    for e in range(E):
        actions, z = np.zeros((M, H, 2)), np.zeros((o['seeds'], M, H, 3, 2))
        for p, s in np.ndindex(parts, o['seeds']):
            run = calls[p * o['seeds'] + s]
            rows = slice(p * per, (p + 1) * per)
            actions[rows] = torch.cat([c['a'] for c in run], dim=1).unflatten(0, (E, per))[e]
            luck = 0.4 * torch.cat([c['z'] for c in run], dim=1).unflatten(0, (E, per))[e].numpy()
            z[s, rows] = np.cumsum(actions[rows][:, :, None] + luck, axis=1)
        steps = [H - 1] if o['cost'] == 'last' else range(H)
        costs = by_hand(actions, z, z_goal[e], a_ctx[e, -1], known, [v * v for v in z_std],
                        o['tokens'].tolist(), steps, o['smooth'])
        assert info['cost'][0, e].item() == pytest.approx(costs.min(), rel=1e-4)
        order = costs.argsort()
        assert np.diff(costs[order]).min() > 1e-4 and np.allclose(info['elites'][e], actions[order], atol=1e-6)


@pytest.mark.parametrize('method', PLANNERS)
@pytest.mark.parametrize('cost', ['all', 'last'])
def test_the_goal_is_reached_from_the_context_which_is_computed_once(method, cost):
    world, (z_ctx, a_ctx) = World(drift=0.1), nowhere(2, 3)
    a_ctx[0, 1:] = torch.tensor([[1.0, 2.0], [1.0, -5.0]])
    a_ctx[:, 0] = 1e3                               # what led to the first frame is not known
    given = dict(low=-1.0, high=1.0, samples=300, elites=20, iterations=15, min_std=0.01, horizon=3, cost=cost,
                 method=method)
    if method == 'adam':
        given |= dict(iterations=60, samples=50)
    past = 0.1 * torch.tensor([[2.0, -3.0], [0.0, 0.0]])        # how far it drifts in a step
    found, info = find(world, z_ctx, a_ctx, GOAL, **given)
    assert found.shape == (2, 3, 2) and (found.sum(dim=1) + 3 * past - GOAL[:, 0]).abs().max() < 0.1
    assert info['cost'].shape[1] == 2 and (info['cost'][-1] <= info['cost'][0]).all() and not found.requires_grad
    if cost == 'all':       # as far as it may at once, then rest
        assert (found[1, 0] - GOAL[1, 0].clamp(-1, 1)).abs().max() < 0.15
    imagined = info['imagine'](torch.stack((found, torch.zeros_like(found)), dim=1))            # (E, 2, H, N, D)
    still = torch.arange(1, 4)[:, None] * past[:, None]
    assert torch.allclose(imagined[:, 0, :, 0], found.cumsum(dim=1) + still, atol=1e-5)
    assert torch.allclose(imagined[:, 1, :, 2], still, atol=1e-6)
    assert [len(c['z'][0]) for c in world.calls if c['start'] == 0] == [3] and world.calls[0]['commit']
    assert all(len(c['z'][0]) == 1 for c in world.calls[1:]), 'nor is the context seen again for pictures of the plan'
    unknown, _ = find(world, z_ctx, a_ctx, GOAL, a_mask=torch.zeros(2, 3, dtype=torch.bool), **given)
    assert (unknown.sum(dim=1) - GOAL[:, 0]).abs().max() < 0.1


def test_candidates_of_an_iteration_share_their_noise():
    world, given = World(luck=1.0), dict(horizon=2, samples=12, elites=4, iterations=3, seeds=2, chunk=8)
    find(world, *nowhere(), GOAL, **given)
    looks = torch.stack([c['z'] for c in world.calls if not c['commit']]).unflatten(1, (2, -1))
    assert (looks == looks[:, :, :1]).all(), 'every candidate of an episode'            # (.., E, M, 1, N, D)
    looks = looks[:, :, 0].unflatten(0, (3, 3, 2, 2))           # (iterations, parts, seeds, H, ..)
    assert (looks == looks[:, :1]).all(), 'in every chunk'
    each = looks[:, 0].flatten(0, 2).flatten(1)
    assert len({tuple(x.tolist()) for x in each}) == 12, 'other noise in every iteration, seed and step'
    assert abs(each.mean()) < 0.3 and 0.7 < each.std() < 1.3
    again, other = World(luck=1.0), World(luck=1.0)
    find(again, *nowhere(), GOAL, **given)
    assert all(torch.equal(a['z'], b['z']) for a, b in zip(world.calls, again.calls))
    find(other, *nowhere(), GOAL, seed=1, **given)
    assert not torch.equal(other.calls[-1]['z'], world.calls[-1]['z'])


def test_a_mean_is_where_a_search_begins():     # with its own standard deviation, if one is given
    mean = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0))
    for start, warm_std, want in ((None, 0.25, 0.5), (mean, 0.25, 0.25), (mean, 0.0, 0.5)):
        world = World()
        find(world, *nowhere(), GOAL, mean=start, horizon=3, samples=1000, elites=8, iterations=1, chunk=2000,
             init_std=0.5, warm_std=warm_std)
        drawn = torch.cat([c['a'] for c in world.calls if not c['commit']], dim=1).unflatten(0, (2, -1))
        assert torch.equal(drawn[:, 0], torch.zeros_like(mean) if start is None else mean)
        assert (drawn[:, 1:].std(dim=1) - want).abs().max() < 0.05


@pytest.mark.parametrize('method', ['cem', 'icem', 'mppi'])
def test_what_is_rare_and_large_is_found(method):
    """A trigger that one row in a hundred pulls: ten standard deviations from its mean."""
    for far in (9.95, 31.6):
        low, high = torch.tensor([[-0.1, -2.0]]), torch.tensor([[far, 2.0]])
        world, goal = World(), torch.tensor([far, -0.6]).expand(2, 3, 2)
        found, _ = find(world, *nowhere(), goal, low=low, high=high, horizon=1, method=method)
        told = torch.cat([c['a'] for c in world.calls if not c['commit']])
        assert (found[:, 0, 0] > 0.75 * far).all() and (found[:, 0, 1] + 0.6).abs().max() < 0.6
        assert (told >= low).all() and (told <= high).all() and told[..., 0].max() > 0.8 * far


@pytest.mark.parametrize('method', PLANNERS)
def test_a_time_budget_is_kept(method, monkeypatch):
    """On a machine on which nothing but passes takes time: 10 ms of context, 20 each iteration."""
    now = 100.0
    monkeypatch.setattr(plan, 'time', types.SimpleNamespace(perf_counter=lambda: now))

    class Slow(World):
        def forward(self, *args, **given):
            nonlocal now
            now += 0.010
            return super().forward(*args, **given)
    for budget, n in ((95.0, 4), (90.1, 4), (89.9, 3), (5.0, 1), (0.0, 9 + (method == 'adam'))):
        begun = now
        found, info = find(Slow(), *nowhere(), GOAL, budget_ms=budget, horizon=2, samples=8, elites=4, iterations=9,
                           method=method)
        assert len(info['cost']) == n and round((now - begun) / 0.010) == 1 + 2 * n and found.isfinite().all()


# --------------------------------------------------------------------------------------------------
# gradients through a real model

@pytest.fixture
def double(monkeypatch):
    """Float64 throughout: finite differences can be trusted to many digits."""
    monkeypatch.setattr(torch.Tensor, 'float', torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tiny(A, objective='shortcut'):
    """A model of actions (A,) whose head, too, does something."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = model.WorldModel(model.model_config('nano', 6, (2, 2), A, width=16, layers=2, heads=2, kv_heads=1,
                                              context=3, k_max=4, objective=objective))
    for p in net.eval().requires_grad_(False).parameters():
        p += 0.1 * torch.randn(p.shape, generator=g)
    net.stats = {'z_std': torch.rand(6, generator=g) + 0.5}
    return net


@pytest.mark.parametrize('objective, K', [('shortcut', 1), ('shortcut', 2), ('direct', 1)])
@pytest.mark.parametrize('chunk', [1000, 2])
def test_the_gradient_of_a_plans_cost(double, monkeypatch, objective, K, chunk):
    net = tiny(3, objective)
    E, Tc, M, H = 2, 2, 3, 3            # longer than what the model sees: what is forgotten has no gradient
    z_ctx, a_ctx, z_goal, at = (torch.randn(s) for s in ((E, Tc, 4, 6), (E, Tc, 3), (E, 4, 6), (E, M, H, 3)))
    caught = []
    monkeypatch.setattr(plan, 'adam', lambda cost, mean, *_: caught.append(cost) or (mean, torch.zeros(1, E), mean))
    find(net, z_ctx, a_ctx, z_goal, horizon=H, method='adam', K=K, seeds=2,
         tokens=torch.tensor([1.0, 2.0, 0.0, 1.0]), smooth=0.1, chunk=chunk)
    at.requires_grad_()
    with torch.enable_grad():
        total = caught[0](at, 3)
        gradient, = torch.autograd.grad(total.sum(), at)
    assert total.shape == (E, M) and gradient.abs().amin(dim=(0, 1, 3)).min() > 0
    with torch.no_grad():
        assert torch.allclose(caught[0](at, 3), total, atol=1e-12)
        for where in ((0, 0, 0, 0), (0, 2, 1, 2), (1, 1, 2, 1), (1, 0, 0, 2), (1, 2, 0, 1)):
            e = torch.zeros_like(at)
            e[where] = 1e-5
            slope = (caught[0](at + e, 3) - caught[0](at - e, 3)).sum() / 2e-5
            assert slope.item() == pytest.approx(gradient[where].item(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize('method', PLANNERS)
def test_the_rows_of_a_step_are_searched_as_steps_of_their_own(method):
    """As a search over six steps of two numbers, where the model is given three at once; the seventh is padding."""
    net, H, rows = tiny(7, 'direct'), 2, 3
    net.stats = {'z_std': torch.ones(6)}
    low, high = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 0.5])
    z_ctx, a_ctx, z_goal, mean, carried = (torch.randn(s) for s in ((2, 2, 4, 6), (2, 2, 7), (2, 4, 6), (2, H, 7),
                                                                    (2, 5, 1, 7)))
    given = dict(samples=8, elites=3, iterations=4)
    found, info = find(net, z_ctx, a_ctx, z_goal, method=method, horizon=H, low=low.expand(rows, 2),
                       high=high.expand(rows, 2), mean=mean, carried=carried, **given)

    def cost(actions, i):       # (E, M, 6, 2) -> (E, M)
        steps = torch.zeros(*actions.shape[:2], H, 7)
        for t in range(H * rows):
            steps[:, :, t // rows, t % rows * 2:t % rows * 2 + 2] = actions[:, :, t]
        z = info['imagine'](steps)
        return (z - z_goal[:, None, None]).square().mean(dim=(2, 3, 4))

    def apart(v):
        return torch.stack([v[..., t // rows, t % rows * 2:t % rows * 2 + 2] for t in range(v.shape[-2] * rows)], -2)

    want, best, elite = search(method, cost, apart(mean), low, high, beta=2.0, carried=apart(carried), **given)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(apart(found), want)
    close(info['cost'], best)
    close(apart(info['elites']), elite)
    assert found[..., 6].eq(0).all() and found.std() > 0.1


# --------------------------------------------------------------------------------------------------
# the controller

QUICK = ('--samples=6', '--elites=2', '--iterations=1', '--horizon=2', '--dtype=float32', '--device=cpu')
SMALL_SEARCH = dict(samples=6, elites=2, iterations=2, horizon=3, dtype='float32', device='cpu')


@pytest.fixture
def controller(trained):
    return lambda **changes: plan.Planner(f'{trained}/ckpt.safetensors', plan.config | SMALL_SEARCH | changes,
                                          tell=False)


def film(E, n, seed=0):
    """Pictures (E, n, 64, 64, 3) of other places each."""
    rng = np.random.default_rng(seed)
    return data.demo_draw(data.demo_start(E * n, rng)).reshape(E, n, 64, 64, 3)


@pytest.fixture
def planned(monkeypatch):
    """What plan.plan was given, call by call, and what it answered: a known function of the latest latents."""
    calls, signature = [], inspect.signature(plan.plan)

    def fake(*args, **keywords):
        given = signature.bind(*args, **keywords)
        given.apply_defaults()
        given = {k: v.clone() if torch.is_tensor(v) else v for k, v in given.arguments.items()}
        z, a, H = given['z_ctx'], given['a_ctx'], given['o'].horizon
        E, A = z.shape[0], a.shape[2]
        place = z[:, -1].mean(dim=1)[:, :3].sum(dim=1) + given['z_goal'].mean(dim=(1, 2)) + a[:, -1].sum(dim=1)
        found = torch.sin(3 * place[:, None] + torch.arange(H * A).float()).unflatten(1, (H, A))
        elites = torch.stack((found, -0.5 * found), dim=1)
        path = z[:, -1:] + 0.1 * torch.arange(1., H + 1)[:, None, None]         # (E, H, N, D)
        calls.append(given | dict(found=found, elites=elites, path=path))
        return found, {'cost': torch.zeros(2, E), 'elites': elites, 'imagine': lambda actions: path[:, None]}
    monkeypatch.setattr(plan, 'plan', fake)
    return calls


def test_robots_at_once_do_what_each_does_alone(controller, planned):
    x, goals, rng = film(3, 12), film(3, 1, seed=1)[:, 0], np.random.default_rng(0)
    rows = rng.uniform(-0.05, 0.05, (3, 2, 2))
    together = controller(replan=2)
    alone = [controller(replan=2) for _ in range(3)]
    for t in range(3, 13):
        frames = x[:, :3] if t == 3 else x[:, t - 1:t]
        a = together.act(frames, goals, rows if t == 3 else None)
        for e, p in enumerate(alone):       # a single picture may come without the dimension of time
            given = frames[e, 0] if t > 3 and t % 2 == 0 else frames[e]
            b = p.act(given, goals[e], rows[e] if t == 3 else None)
            assert np.allclose(a[e], b, atol=1e-5)
    assert len(together.seconds) == len(together.iterations) == 3


def by_the_numbers(p, rows):
    """Rows (.., n, width) as the model knows actions: n at a time, in numpy."""
    mean, std = (p.model.stats[f'a_{k}'][0].numpy() for k in ('mean', 'std'))
    return ((rows.reshape(*rows.shape[:-2], -1) - mean) / std)


@pytest.mark.parametrize('replan', [1, 3])
@pytest.mark.parametrize('told', ['all', 'not the first', 'what was executed'])
def test_what_the_search_is_given(controller, planned, replan, told):
    """Latents one model step apart, each with the rows that led to it; every call's action is the next row."""
    p, E, n, rng = controller(replan=replan), 2, 25, np.random.default_rng(0)
    p.trained, p.past = p.trained | {'eval_context': 3}, 5          # as if trained with a longer past
    f, x, goals = p.frameskip, film(E, n), film(E, 1, seed=1)[:, 0]
    assert f == 2
    before, returned = rng.uniform(-0.05, 0.05, (E, 6, 2)), []      # of 7 pictures, two more than are wanted
    rows = [*before.swapaxes(0, 1)]
    for frame in range(6, n):
        given = None
        if frame == 6:
            given = None if told == 'not the first' else before
        elif told == 'what was executed':
            given = rows[-1] = rng.uniform(-0.05, 0.05, (E, 2))
        returned.append(p.act(x[:, :7] if frame == 6 else x[:, frame:frame + 1], goals, given))
        rows.append(returned[-1])
    rows = np.stack(rows, axis=1)                                   # (E, n, 2): row i leads from picture i to i + 1
    assert len(planned) == math.ceil((n - 6) / (f * replan))
    mean, std = (p.model.stats[f'a_{m}'][0].numpy() for m in ('mean', 'std'))
    for k, call in enumerate(planned):
        frame = 6 + k * f * replan
        shown = [frame - 4, frame - 2, frame]
        assert torch.allclose(call['z_ctx'], p.latents(x[:, shown]), atol=1e-5)
        assert torch.allclose(call['z_goal'], p.latents(goals), atol=1e-5)
        for j in (1, 2):
            known = told != 'not the first' or shown[j - 1] >= 6
            assert (call['a_mask'][:, j] == known).all()
            if known:
                want = by_the_numbers(p, rows[:, shown[j - 1]:shown[j]])
                assert np.allclose(call['a_ctx'][:, j], want, atol=1e-4)
        assert not call['a_mask'][:, 0].any(), 'what led to the first picture is out of sight'
        want = (call['found'][:, :replan].numpy() * std + mean).reshape(E, replan * f, 2)
        got = returned[k * replan * f:(k + 1) * replan * f]
        assert np.allclose(np.stack(got, axis=1), want[:, :len(got)], atol=1e-6)
        low = by_the_numbers(p, p.model.stats['a_low'][0].numpy().reshape(f, 2)).reshape(f, 2)
        assert np.allclose(call['low'], low, atol=1e-5) and (call['low'] < call['high']).all()
        far = by_the_numbers(p, p.a_high.numpy() + 9).reshape(f, 2)
        assert far.min() > 99 and np.allclose(p.normalised(p.a_high + 9), far), 'the model is told what was executed'
    assert len({call['seed'] for call in planned}) == len(planned), 'other noise in every search'


def test_what_the_search_remembers(controller, planned, monkeypatch):
    """The frames before the context, one model step apart, as far back as the model's memory; of this episode."""
    p, n = controller(), 31
    p.model.reach = 6
    f, x, goal = p.frameskip, film(2, n), film(2, 1, seed=1)[:, 0]
    for episode in range(2):
        for frame in range(2, n):
            p.act(x[:, :3] if frame == 2 else x[:, frame:frame + 1], goal)
        for k, call in enumerate(planned[-math.ceil((n - 2) / f):]):
            gone = [z.clone() for z in call['gone']]
            assert len(gone) == min(k, 7)
            for back, z in enumerate(gone[::-1]):
                assert torch.allclose(z, p.latents(x[:, f * (k - 1 - back)]), atol=1e-5)
        p.reset()
    assert not p.gone


def test_a_plan_with_memory_is_one_of_the_frames_that_it_remembers():
    """Through plan: candidates see what remember() was given."""
    c = model.model_config('nano', 3, (2, 3), 2, width=32, layers=2, heads=2, kv_heads=1, context=2, memory=3, memory_frames=3)
    torch.manual_seed(0)
    net = model.WorldModel(c).eval()
    torch.nn.init.normal_(net.head.weight, std=0.3)
    net.stats = dict(z_std=torch.ones(3))
    z, goal, gone = torch.randn(2, 2, 6, 3), torch.randn(2, 6, 3), [*torch.randn(9, 2, 6, 3)]
    o = types.SimpleNamespace(**plan.config | SMALL_SEARCH | dict(horizon=3))
    a = torch.randn(2, 4, 3, 2)
    looks = []
    for old in gone, [], [*gone[:-3], gone[-3] + 1, *gone[-2:]], [*gone[:-1], gone[-1] + 1]:
        _, info = plan.plan(net, z, torch.zeros(2, 2, 2), goal, o, gone=old)
        looks.append(info['imagine'](a))
    assert not torch.allclose(looks[0], looks[1], atol=1e-4) and not torch.allclose(looks[0], looks[2], atol=1e-4)
    assert torch.equal(looks[0], looks[3]), 'another frame than every third'
    known = torch.arange(5).expand(8, 5) > 0
    want = model.rollout(net, z, torch.cat((torch.zeros(8, 2, 2), a.flatten(0, 1)), dim=1), known, o.K, gone=gone)
    assert torch.allclose(looks[0].flatten(0, 1), want, atol=1e-5)


@pytest.mark.parametrize('warm', [True, False])
@pytest.mark.parametrize('replan', [1, 2])
def test_a_plan_begins_from_the_last_one(controller, planned, warm, replan):
    p = controller(warm=warm, replan=replan)
    x, goal = film(2, 20), film(2, 1, seed=1)[:, 0]
    p.act(x[:, :3], goal)
    for t in range(3, 4 + 4 * replan):
        p.act(x[:, t:t + 1], goal)
    assert len(planned) == 3 and planned[0]['mean'] is None and planned[0]['carried'] is None
    for before, call in itertools.pairwise(planned):
        if warm:
            assert torch.equal(call['mean'][:, :3 - replan], before['found'][:, replan:])
            assert call['mean'].shape == before['found'].shape and not call['mean'][:, 3 - replan:].any()
            assert torch.equal(call['carried'], before['elites'][:, :, replan:])
        else:
            assert call['mean'] is None and call['carried'] is None


def test_reset_forgets(controller, planned):
    p, x, goal = controller(replan=2), film(1, 20), film(1, 1, seed=1)[:, 0]
    first = [p.act(x[0, :3], goal[0]), *(p.act(x[0, t], goal[0]) for t in range(3, 6))]
    p.reset()
    with pytest.raises(ValueError):
        p.act(x[0, 6], goal[0])
    again = [p.act(x[0, :3], goal[0]), *(p.act(x[0, t], goal[0]) for t in range(3, 6))]
    assert np.array_equal(first, again) and len(planned) == 2 and planned[1]['mean'] is None
    assert not planned[1]['a_mask'].any()


def test_a_goal_is_encoded_once(controller, planned, monkeypatch):
    p, x, goals = controller(replan=2), film(2, 20), film(2, 2, seed=1)
    encode, seen = plan.encode_frames, []
    monkeypatch.setattr(plan, 'encode_frames', lambda e, x, autocast: seen.append(len(x)) or encode(e, x, autocast))
    p.act(x[:, :3], goals[:, 0])
    assert sum(seen) == 2 * 2 + 2 and p.past == 3
    for t in range(3, 9):
        seen.clear()
        p.act(x[:, t:t + 1], goals[:, 0].copy())
        assert sum(seen) == (2 if t % 2 == 0 else 0), 'only pictures a model step apart are looked at'
    seen.clear()
    p.act(x[:, 9:10], goals[:, 1])
    assert sum(seen) == 2
    p.act(x[:, 10:11], goals[:, 1])
    assert torch.allclose(planned[-1]['z_goal'], p.latents(goals[:, 1]), atol=1e-5)


def test_what_act_refuses(controller, monkeypatch):
    p, x = controller(), film(1, 3)[0]
    goal, rows = x[0], np.zeros((2, 2))
    pairs = x[None].repeat(2, 0), x[:2]         # of two robots
    for given, words in (((x / 255, goal), 'pictures float64'), ((x.transpose(0, 3, 1, 2), goal), 'wants uint8 .1, n, H'),
                         ((x, goal.mean(-1, keepdims=True)), 'wants uint8'), ((x[None].repeat(3, 0), x[:2]), 'wants uint8 .2'),
                         ((x, goal, rows[:, :1]), 'actions .1, 2, 1.: wants finite numbers .1, 2, 2'),
                         ((x, goal, rows[:1]), 'wants finite'), ((x, goal, rows * np.nan), 'wants finite')):
        with pytest.raises(ValueError, match=words):
            p.act(*given)
        assert p.z is None, 'it may be asked again'
    p.act(x, goal, rows)
    for given, words in (((x[0], goal, [0.0, 0.0, 0.0]), 'actions .1, 3.: wants finite numbers .1, 2'),
                         ((x[0], goal, [0.0, np.inf]), 'wants finite'), ((x, goal), '3 frames after one action'),
                         (pairs, 'wants uint8 .1, n'), ((pairs[0][:, 0], pairs[1]), 'wants uint8 .1, n')):
        with pytest.raises(ValueError, match=words):
            p.act(*given)
    assert p.act(x[0], goal, [0.0, 0.01]).shape == (2,)
    p.reset()
    monkeypatch.setattr(plan, 'distance', lambda z, *_: z.mean(dim=(-2, -1)) * np.nan)
    with pytest.raises(ValueError, match='not finite'):
        p.act(x, goal)
    monkeypatch.undo()
    p.act(x, goal)
    p.reset()
    with pytest.raises(ValueError, match=r'\b2 frames.* 3\b') as error:
        p.act(x[:2], x[0])
    assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match='64 x 32 pixels.* 64 x 64'):
        p.act(x, x[0, :32])
    p.act(x, data.demo_draw(data.demo_start(1, np.random.default_rng(5)), 96)[0])      # larger, but of the same aspect
    with pytest.raises(SystemExit, match='--samples: wants'):
        controller(samples=0)


def test_pictures_of_another_aspect_are_told_once(controller, planned, capsys):
    p, x = controller(), film(1, 5)[0]
    p.act(x[:3], x[0])
    assert not capsys.readouterr().err
    p.reset()
    data._warned.clear()
    for t in (2, 3, 4):
        p.act(x[:3, 14:50] if t == 2 else x[t, 14:50], x[0, 14:50])
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith('pictures of 64 x 36 pixels are squeezed to 28 x 28')


@pytest.mark.parametrize('method', PLANNERS)
def test_each_search_is_told(trained, capsys, method):
    p = plan.Planner(f'{trained}/ckpt.safetensors', plan.config | SMALL_SEARCH | dict(method=method))
    x = film(1, 5)[0]
    actions = [p.act(x[:3] if t == 2 else x[t], x[0]) for t in (2, 3, 4)]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and 'plan 2:' in lines[1] and '2 iterations' in lines[1] and ' ms' in lines[1]
    assert p.iterations == [2, 2] and all(s > 0 for s in p.seconds)
    assert np.shape(actions) == (3, 2) and np.abs(actions).max() <= data.DEMO_STEP * 1.001


def test_random_weights_are_another_model_of_the_same_shape(controller):
    p = controller()
    blind, again = plan.random_weights(p, 3), plan.random_weights(p, 3)
    kept = {k: v.clone() for k, v in p.model.state_dict().items()}
    x, goal = film(1, 3), film(1, 1, seed=1)[:, 0]
    assert not np.allclose(p.act(x, goal), blind.act(x, goal)) and len(p.seconds) == len(blind.seconds) == 1
    for k, v in blind.model.state_dict().items():
        assert v.shape == kept[k].shape and torch.equal(v, again.model.state_dict()[k])
        assert torch.equal(kept[k], p.model.state_dict()[k])
    far = blind.model(torch.randn(1, 1, 16, 24), *torch.ones(2, 1, 1), torch.randn(1, 1, 4), torch.ones(1, 1) > 0)
    assert far.std() > 0.01, 'it imagines something, only nothing that was learned'


# --------------------------------------------------------------------------------------------------
# the closed loop in the demo world

def asked(n, goals='expert', past=3, seed=0):
    sim = plan.Demo()
    rng = np.random.default_rng(seed)
    return [sim] * n, [plan.question(sim, i, rng, goals, 10, past) for i in range(n)]


def test_questions():
    """A seed is a set of them; their past, and what the script did, is what happened."""
    for goals in ('expert', 'random'):
        first, again, other = ([np.hstack([q.begin, q.pose, *map(np.ravel, (q.actions, q.expert))])
                                for q in asked(6, goals, seed=s)[1]] for s in (0, 0, 1))
        assert np.array_equal(first, again) and not any((a == b).all() for a, b in zip(first, other))
    assert asked(1, past=1)[1][0].actions.shape == (0, 2)
    for sim, q in zip(*asked(6, past=4)):
        assert len(q.states) == 4 and q.actions.shape == (3, 2)
        for before, action, after in zip(q.states, q.actions, q.states[1:]):
            sim.restore(before)
            sim.step(action)
            assert np.array_equal(sim.state(), after)
        for action in q.expert:
            sim.step(action)
        assert np.array_equal(sim.state(), q.goal)


def test_an_episode_towards_a_picture(trained, tmp_path, monkeypatch, capsys):
    """From where the first episode of the evaluation begins, whose goal it left; as its user types it, in another folder."""
    given = f'--ckpt={trained}/ckpt.safetensors', f'--out_dir={tmp_path}/o', *QUICK
    script('plan.py', *given, '--episodes', '2', '--budget', '4')
    first = json.loads((tmp_path / 'o/plan.json').read_text())
    (tmp_path / 'o/plan.mp4').unlink()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    seen = []
    act = plan.Planner.act
    monkeypatch.setattr(data, 'write_video', lambda path, x, fps: seen.append(x))
    script('plan.py', '--ckpt', f'{trained}/ckpt.safetensors', '--out_dir', 'o', '--goal', 'o/goal.png', *QUICK,
           '--budget', '4', '--warm', 'False', '--warm_std', '0.5')
    said = capsys.readouterr().out
    assert re.search(r'4 steps in demo: latent distance to the goal \d\.\d{4} before, \d\.\d{4} after\nwrote o/plan.mp4\n$', said)
    sims, questions = asked(1, seed=1_000_000)
    sims[0].restore(questions[0].states[-1])
    video, = seen
    side = (video.shape[3] - 6) // 2
    shown = [data.enlarge(torch.from_numpy(sims[0].frame()).permute(2, 0, 1)[None], 96)[0]]
    sims[0].restore(questions[0].goal)
    shown.append(data.enlarge(torch.from_numpy(sims[0].frame()).permute(2, 0, 1)[None], 96)[0])
    for i, want in enumerate(shown):
        got = video[0, :, 3:3 + side, 3 + i * side:3 + (i + 1) * side]
        assert (got.float() - want.float()).abs().mean() < 1
    assert len(video) == 5 + 5 and first['episodes'] == 2
    net, config = model.load(f'{trained}/ckpt.safetensors')
    probe = model.Probe(16, net.config['dim'], torch.zeros(2), torch.ones(2), torch.zeros(2))
    stats = net.stats | {f'probe.{name}': v for name, v in probe.state_dict().items()}
    model.save('read.safetensors', net, config | dict(probe_names='a.x,a.y'), {}, stats)
    script('plan.py', '--ckpt=read.safetensors', '--out_dir=o', '--goal=o/goal.png', *QUICK, '--budget=4')
    z = model.standard(model.encode_frames(model.restore_encoder(config, net.stats), data.resize(video[:1, :, 3:3 + side, 3:3 + side], (28, 28)),
                                           data.autocast(torch.device('cpu'), 'float32')), net.stats)
    want, = probe.read(z).tolist()
    read = re.findall(r'(a.[xy]), as the probe reads it: (\S+) before, \S+ after, \S+ in the picture of the goal', capsys.readouterr().out)
    assert [name for name, _ in read] == ['a.x', 'a.y'] and [float(v) for _, v in read] == pytest.approx(want, abs=0.02)


def test_what_a_policy_sees():
    """At first the pictures and actions of the past, then one picture at a time, of the world that it acts in."""
    sims, questions = asked(3)
    seen = []

    def policy(frames, goals, past):
        seen.append((frames.copy(), goals.copy(), past))
        return np.full((3, 2), 0.01 * (len(seen) - 1))
    poses, actions, shown, goals = plan.play(policy, sims, questions, 5, True)
    felt = []
    plan.play(lambda *given: felt.append(given[3:]) or np.full((3, 2), 0.01 * (len(felt) - 1)), sims, questions, 5, True, True)
    assert np.allclose(felt[0][0], [[s[:2] for s in q.states] for q in questions]), 'the tip, not the disc'
    assert all(np.allclose(now, poses[t, :, None, :2]) for t, (now, _) in enumerate(felt) if t)
    assert all(np.allclose(wanted, [q.goal[:2] for q in questions]) for _, wanted in felt)

    def drawn(state):
        sims[0].restore(state)
        return sims[0].frame()
    assert len(seen) == 5 and len(poses) == len(shown) == 6
    assert np.array_equal(seen[0][0], [[drawn(s) for s in q.states] for q in questions])
    assert np.array_equal(seen[0][2], [q.actions for q in questions]) and all(s[2] is None for s in seen[1:])
    for t in range(1, 5):
        assert np.array_equal(seen[t][0], [[drawn(p)] for p in poses[t]])
    assert all(np.array_equal(s[1], [drawn(q.goal) for q in questions]) for s in seen)
    assert np.array_equal(shown, [[drawn(p) for p in row] for row in poses]) and np.array_equal(goals, seen[0][1])
    assert np.allclose(actions[:, :, 0], 0.01 * np.arange(5)[:, None])
    for t in range(5):
        assert np.allclose(data.demo_step(poses[t], actions[t]), poses[t + 1])


@pytest.fixture
def guarded(monkeypatch):
    """Every method of the simulator fails while a planner acts; counts of those that the closed loop calls."""
    calls = []

    def guard(f):
        def method(*args, **keywords):
            frame, stack = sys._getframe(1), []
            while frame:
                stack.append((os.path.basename(frame.f_code.co_filename), frame.f_code.co_name))
                frame = frame.f_back
            assert ('plan.py', 'act') not in stack, f'{f.__name__} while planning'
            if ('plan.py', 'play') in stack:
                calls.append(f.__name__)
            return f(*args, **keywords)
        return method
    for owner, names in ((plan.Demo, [k for k, f in vars(plan.Demo).items() if isinstance(f, types.FunctionType)]),
                         (data, ['demo_step', 'demo_draw', 'demo_start', 'demo_script'])):
        for k in names:
            monkeypatch.setattr(owner, k, guard(getattr(owner, k)))
    return calls


def test_the_guard_would_notice(guarded):
    inside = {'sim': plan.Demo()}
    exec(compile('def act(): return sim.state()', str(ROOT / 'plan.py'), 'exec'), inside)
    with pytest.raises(AssertionError, match='state while planning'):
        inside['act']()


def evaluated(trained, out, **changes):
    return plan.evaluate(options(**SMALL_SEARCH | dict(iterations=1, horizon=2, ckpt=f'{trained}/ckpt.safetensors',
                                                       out_dir=str(out), seed=3) | changes))


METHODS = ['model', 'model, light', 'model, camera', 'random weights', 'random', 'zero', 'mean', 'expert']


def test_random_weights_play_fewer_episodes(trained, tmp_path):
    methods = evaluated(trained, tmp_path, episodes=3, budget=2, blind_episodes=2)['methods']
    assert [m['episodes'] for m in methods.values()] == [3, 2, 3, 3, 3, 3]
    everything = evaluated(trained, tmp_path, episodes=3, budget=2, blind_episodes=0)['methods']
    assert everything['random weights']['episodes'] == 3 and everything['model'].items() >= {
        k: v for k, v in methods['model'].items() if 'second' not in k}.items()


def test_closed_loop_leaves_its_report(trained, tmp_path, guarded):
    out = tmp_path / 'out'
    evaluated(trained, out, episodes=4, budget=6, shift='light,camera')
    report = json.loads((out / 'plan.json').read_text())
    assert {k: report[k] for k in ('env', 'episodes', 'budget_steps', 'goals', 'goal_steps', 'seed')} == \
        dict(env='demo', episodes=4, budget_steps=6, goals='expert', goal_steps=10, seed=3)
    assert list(report['methods']) == METHODS
    for name, m in report['methods'].items():
        assert {'success_end', 'success_ever', 'ci95', 'steps', 'distance_end', 'seconds_per_plan', 'plans_per_second',
                'iterations', 'jerk'} <= set(m)
        assert 0 <= m['ci95'][0] <= m['success_end'] <= m['ci95'][1] <= 1 and m['success_end'] <= m['success_ever']
        assert m['ci95'] == pytest.approx(plan.wilson(round(4 * m['success_end']), 4))
        plans = 'model' in name or name == 'random weights'
        assert (m['seconds_per_plan'] is not None) == (m['iterations'] is not None) == plans
        if plans:
            assert m['plans_per_second'] == pytest.approx(1 / m['seconds_per_plan']) and m['iterations'] == 1
        assert ('drop' in m) == (',' in name)
        if ',' in name:
            assert m['drop'] == report['methods']['model']['success_end'] - m['success_end']
    assert report['methods']['model']['distance_end'] != report['methods']['random weights']['distance_end']
    with av.open(str(out / 'plan.mp4')) as video:
        assert video.streams.video[0].frames >= 7
    # the budget, for every method: steps of the world itself, none of them while planning
    assert guarded.count('step') == guarded.count('demo_step') == len(METHODS) * 4 * 6
    # jerk of the script, in units of the action per second squared: second differences at 10 steps a second
    a = np.array([q.expert[:6] for q in asked(4, seed=3 + 1_000_000)[1]])                             # (4, 6, 2)
    second = [a[e, t] - 2 * a[e, t + 1] + a[e, t + 2] for e in range(4) for t in range(4)]
    assert report['methods']['expert']['jerk'] == pytest.approx(np.mean([(100 * s) @ (100 * s) for s in second]))
    assert report['methods']['zero']['jerk'] == 0 < report['methods']['random']['jerk']


def test_every_method_is_asked_the_same(trained, tmp_path):
    ends_at = []
    for method, seed in (('cem', 3), ('mppi', 3), ('cem', 4)):
        methods = evaluated(trained, tmp_path, episodes=3, budget=2, method=method, seed=seed)['methods']
        ends_at.append([methods[k]['distance_end'] for k in ('zero', 'random', 'mean', 'expert')])
    assert ends_at[0] == ends_at[1] and not np.equal(ends_at[0], ends_at[2]).any()


@pytest.mark.parametrize('goals', ['expert', 'random'])
def test_doing_nothing_gets_nowhere_and_the_script_does(trained, tmp_path, goals):
    methods = evaluated(trained, tmp_path, goals=goals, episodes=20, budget=12, replan=2)['methods']
    assert methods['zero']['success_end'] == methods['mean']['success_end'] == methods['zero']['success_ever'] == 0
    assert methods['random']['success_end'] < 0.25 and methods['random weights']['success_end'] < 0.5
    assert methods['zero']['steps'] is None
    if goals == 'expert':
        assert methods['expert']['success_end'] == 1 and methods['expert']['steps'] <= 10
    else:
        assert 'expert' not in methods


def test_the_score_of_what_was_played():
    """One reaches its goal in the first of two steps and leaves it, one in the last, one never."""
    sims, questions = asked(3)
    far, goal = np.array([q.begin for q in questions]), np.array([q.pose for q in questions])
    first, last = np.array([[True], [False], [False]]), np.array([[False], [True], [False]])
    poses = np.stack([far, np.where(first, goal, far), np.where(last, goal, far)])
    row, reached = plan.score(sims, questions, poses, np.zeros((2, 3, 2)))
    assert (row['success_end'], row['success_ever'], row['steps']) == pytest.approx((1 / 3, 2 / 3, 1.5))
    assert row['ci95'] == plan.wilson(1, 3) and row['jerk'] is None and reached.sum() == 2
    assert row['distance_end'] == pytest.approx(np.mean([0 if e == 1 else sims[e].far(far[e], goal[e], far[e])[0]
                                                         for e in range(3)]))


def test_wilson_interval():
    assert plan.wilson(0, 10) == pytest.approx([0.0, 0.2775], abs=1e-3)         # Newcombe 1998, and by hand
    assert plan.wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-3)
    assert plan.wilson(10, 10)[1] == 1.0


# --------------------------------------------------------------------------------------------------
# the robot's own state

@pytest.fixture(scope='module')
def sensing(demo, tmp_path_factory):
    """The folder of a checkpoint that knows the tip's place."""
    out = tmp_path_factory.mktemp('sensing') / 'out'
    script('train.py', *demo, *SMALL, '--state=observation.state', '--max_steps=20', f'--out_dir={out}')
    return out


def test_a_state_weighs_as_much_as_the_picture_for_random_frames(sensing):
    """The distance of frames at random, on average; every number by how fast it changes; and none that is not known."""
    net, _ = model.load(f'{sensing}/ckpt.safetensors')
    mean, std, change = model.robot_state(net.stats, 0)
    rng = np.random.default_rng(0)
    states = data.demo_start(4000, rng)
    encoder = model.restore_encoder(_, net.stats)
    x = torch.from_numpy(data.demo_draw(states, 28)).permute(0, 3, 1, 2)
    z = model.standard(model.encode_frames(encoder, x, data.autocast(torch.device('cpu'), 'float32')), net.stats)
    s = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))        # of the data's spread
    joined, halves = model.add_state(z, s), (slice(0, 2000), slice(2000, 4000))
    weight = plan.channel_weights(net)
    both, latents, unknown = (
        plan.distance(joined[halves[0]], goal, plan.cost_weights(net, None, w)).mean().item() for goal, w in (
            (joined[halves[1]], 1.0), (joined[halves[1]], 0.0),
            (model.add_state(z[halves[1]], s[halves[1]] * torch.nan), 1.0)))
    alone = plan.distance(z[halves[0]], z[halves[1]], weight).mean().item()
    assert latents == pytest.approx(alone, rel=1e-5) == unknown
    assert both - alone == pytest.approx(net.stats['z_pair'].item(), rel=0.1)
    assert net.stats['z_pair'].item() == pytest.approx(alone, rel=0.35), 'of its own data, on other tables'
    goal, one = joined[:1].clone(), joined[:1].clone()
    costs = []
    for k in range(2):
        one[:, -1, :2] = goal[:, -1, :2]
        one[:, -1, k] += 1.0
        costs.append(plan.distance(one, goal, plan.cost_weights(net)).item())
    assert costs[0] / costs[1] == pytest.approx(((std[0] ** 2 / change[0]) / (std[1] ** 2 / change[1])).item(), rel=1e-4)


def test_what_does_not_move_does_not_count(sensing):
    net, _ = model.load(f'{sensing}/ckpt.safetensors')
    for name, value in (('std', 0.0), ('change', 0.0)):
        other = types.SimpleNamespace(config=net.config, stats={k: v.clone() for k, v in net.stats.items()})
        other.stats[f's_{name}'][0, 1] = value
        weight = plan.cost_weights(other)
        assert weight.isfinite().all() and weight[-1, 0] > 0 and not weight[-1, 1:].any()


def test_the_planner_is_told_the_state(sensing, planned):
    p = plan.Planner(f'{sensing}/ckpt.safetensors', plan.config | SMALL_SEARCH | dict(replan=1), tell=False)
    x, goals = film(2, 7), film(2, 1, seed=1)[:, 0]
    rng = np.random.default_rng(0)
    s, wanted = rng.uniform(size=(2, 7, 2)), rng.uniform(size=(2, 2))
    assert (p.past, p.frameskip) == (3, 2)
    p.act(x[:, :3], goals, None, s[:, :3], wanted)
    for t in range(3, 7):
        p.act(x[:, t:t + 1], goals, None, s[:, t:t + 1], wanted)
    assert len(planned) == 3
    mean, std, _ = model.robot_state(p.model.stats, 0)
    for k, call in enumerate(planned):
        for got, want in ((call['z_ctx'], s[:, [2 * k, 2 * k + 2]]), (call['z_goal'], wanted)):
            assert torch.allclose(got[..., -1, :2], (torch.from_numpy(want) - mean).float() / std, atol=1e-5)
        assert torch.allclose(call['z_ctx'][..., :-1, :], p.latents(x[:, [2 * k, 2 * k + 2]]), atol=1e-5)
    p.reset()
    p.act(x[:, :3], goals)
    assert planned[-1]['z_ctx'][..., -1, :2].isnan().all() and planned[-1]['z_goal'][..., -1, :2].isnan().all()
    p.reset()
    for given, words in (((s[:, :2], wanted), 'a state .2, 2, 2.: wants .2, 3, 2'), ((s[:, :3], wanted[:1]), 'wants .2, 2'),
                         ((None, wanted), 'wants states as well')):
        with pytest.raises(ValueError, match=words):
            p.act(x[:, :3], goals, None, *given)
    p.act(x[0, :3][None], goals[:1], None, s[:1, :3], wanted[:1] * np.nan)
    p.reset()
    alone = p.act(x[0, :3], goals[0], None, s[0, :3], wanted[0])        # one robot
    assert alone.shape == (2,) and torch.allclose(planned[-1]['z_ctx'][0], planned[0]['z_ctx'][0], atol=1e-5)


def test_a_robot_that_is_there_rests(sensing, planned, tmp_path):
    """Each on its own, for whole steps of the model; what was planned before is not done afterwards."""
    known = plan.config | SMALL_SEARCH | dict(hold=0.1)
    p = plan.Planner(f'{sensing}/ckpt.safetensors', known | dict(replan=3, rest='zero'), tell=False)
    x, goals = film(2, 12), film(2, 1, seed=1)[:, 0]
    wanted = np.array([[0.5, 0.5], [0.2, 0.4]])
    far, near, near1 = [0.9, 0.9], [0.45, 0.55], [0.25, 0.4]
    at = [[far, far], [far, far], [far, far], [near, near1], [near, far], [far, far], [near, near1], [far, far], [far, far], [near, near1]]
    at = np.array(at, float).swapaxes(0, 1)         # (E, 10, 2), two of them of the past
    rows = [p.act(x[:, :3], goals, None, at[:, :3], wanted)]
    rows += [p.act(x[:, t:t + 1], goals, None, at[:, t:t + 1], wanted) for t in range(3, 10)]
    held = [[not row[e].any() for row in rows] for e in range(2)]
    assert held == [[False, False, True, True, True, True, False, False], [False, False, False, False, True, True, False, False]]
    assert len(planned) == 2, 'not while both rest, but then anew'
    want = p.physical(planned[0]['found']).flatten(1, 2)
    assert np.allclose(np.stack(rows[:2], axis=1), want[:, :2], atol=1e-6) and np.allclose(rows[3][1], want[1, 3], atol=1e-6)
    assert torch.allclose(planned[1]['a_ctx'][:, -1], p.normalised(np.zeros((2, 2, 2))).flatten(1))
    assert torch.allclose(planned[1]['z_ctx'][:, -1, :-1], p.latents(x[:, 8:9])[:, 0], atol=1e-5), 'of now'
    for goal, reached in ([0.5, np.nan], True), ([np.nan, 0.5], False), ([np.nan, np.nan], False):
        assert p.there(2, [[far, [0.45, 99]]] * 2, [goal] * 2)[0].tolist() == [reached] * 2
    p.a_low[:, 1] = p.a_high[:, 1] = 0.03
    assert np.allclose(p.there(2, [[near]] * 2, wanted)[1], [[0, 0.03]] * 2), 'constant numbers stay as they are, at rest too'
    q = plan.Planner(f'{sensing}/ckpt.safetensors', known | dict(rest='state'), tell=False)
    assert np.allclose(q.act(x[0, :3], goals[0], None, [near] * 3, wanted[0]), near)
    assert not q.there(1, [[[0.5, np.nan]]], [[0.5, np.nan]])[0].any(), 'nobody knows all of where it is'
    net, config = model.load(f'{sensing}/ckpt.safetensors')
    model.save(f'{tmp_path}/m.safetensors', net, config | dict(action_mode='delta'), {}, net.stats)
    assert 'wants --rest=zero' in ends('plan.py', f'--ckpt={tmp_path}/m.safetensors', '--hold=0.1', '--rest=state'), 'motions'
    model.save(f'{tmp_path}/ckpt.safetensors', net, config, {}, net.stats | dict(s_width=torch.zeros(1)))
    assert '--hold=0.1: wants' in ends('plan.py', f'--ckpt={tmp_path}/ckpt.safetensors', '--hold=0.1', '--rest=zero'), 'another robot'


def test_a_robot_without_sensors_rests_where_its_probe_reads_the_goal(trained, tmp_path):
    net, config = model.load(f'{trained}/ckpt.safetensors')
    names = ['observation.environment_state.disc_x', 'observation.state.x', 'observation.state.y']
    torch.manual_seed(0)
    probe = model.Probe(16, net.config['dim'], torch.full((3,), 0.5), torch.full((3,), 0.2), torch.zeros(3))
    stats = net.stats | {f'probe.{name}': v for name, v in probe.state_dict().items()}
    model.save(f'{tmp_path}/ckpt.safetensors', net, config | dict(probe_names=','.join(names)), {}, stats)
    x, goals = film(2, 3), film(2, 1, seed=1)[:, 0]

    def planner(hold):
        return plan.Planner(f'{tmp_path}/ckpt.safetensors', plan.config | SMALL_SEARCH | dict(hold=hold, rest='zero'), tell=False)
    p = planner(1.0)
    now, then = (probe.read(p.latents(frames))[:, [names.index(f'observation.state.{c}') for c in 'xy']] for frames in (x[:, -1], goals))
    nearer, farther = sorted((now - then).square().sum(dim=1).sqrt().tolist())
    rest = [not planner(hold).act(x, goals).any(axis=1).all() for hold in (0.99 * nearer, 1.01 * nearer, 1.01 * farther)]
    assert rest == [False, True, True] and not planner(1.01 * farther).act(x, goals).any()


def test_a_robot_of_which_nothing_is_read_rests_where_latents_are_the_goals(trained, sensing):
    """In units of two random frames; not where --hold knows the state, which tells better."""
    x, goals = film(2, 3), film(2, 1, seed=1)[:, 0]
    net, _ = model.load(f'{trained}/ckpt.safetensors')

    def planner(hold_latents, ckpt=trained, hold=0.0):
        options = plan.config | SMALL_SEARCH | dict(hold_latents=hold_latents, rest='zero', hold=hold)
        return plan.Planner(f'{ckpt}/ckpt.safetensors', options, tell=False)
    p = planner(1.0)
    gap = plan.distance(p.latents(x[:, -1]), p.latents(goals), plan.channel_weights(net)) / net.stats['z_pair']
    nearer, farther = sorted(gap.tolist())
    rest = [not planner(hold).act(x, goals).any(axis=1).all() for hold in (0.99 * nearer, 1.01 * nearer, 1.01 * farther)]
    assert rest == [False, True, True] and not planner(1.01 * farther).act(x, goals).any()
    known = x, goals, None, np.zeros((2, 3, 2)), np.ones((2, 2))
    p = planner(1000.0, sensing, hold=0.1)
    assert p.act(*known).any(axis=1).all()
    p.reset()
    assert not p.act(x, goals).any()
    assert not planner(1000.0, sensing).act(*known).any(), 'without --hold it alone decides'


@pytest.fixture(scope='module')
def acting(demo, tmp_path_factory):
    """The folder of a checkpoint with a policy."""
    out = tmp_path_factory.mktemp('acting') / 'out'
    script('train.py', *demo, *SMALL, '--state=observation.state', '--policy=True', '--max_steps=60', f'--out_dir={out}')
    return out


def test_a_policy_acts_without_a_search(acting, planned, tmp_path, capsys):
    """From the last two frames of the model and the goal, with fewer and fewer steps left; in the data's range."""
    p = plan.Planner(f'{acting}/ckpt.safetensors', plan.config | SMALL_SEARCH | dict(method='policy', horizon=3))
    x, goals = film(2, 11), film(2, 1, seed=1)[:, 0]
    rows, s = [], np.full((2, 11, 2), [0.4, 0.6])
    wanted = np.array([[0.5, 0.5], [0.2, np.nan]])
    for t in range(3, 12):
        sight = slice(0, 3) if t == 3 else slice(t - 1, t)
        rows.append(p.act(x[:, sight], goals, None, s[:, sight], wanted))
    z, goal = p.with_state(p.latents(x[:, ::2]), s[:, ::2]), p.with_state(p.latents(goals), wanted)
    low, high = p.a_low.numpy(), p.a_high.numpy()
    for k, left in enumerate((3, 2, 1, 1)):
        want = p.physical(p.model.act(z[:, k], z[:, k + 1], goal, torch.full((2,), left))).numpy().clip(low, high)
        assert np.allclose(np.stack(rows[2 * k:2 * k + 2], axis=1), want, atol=1e-5), k
    assert not planned and p.iterations == [0] * 5 and 'policy: ' in capsys.readouterr().out
    p.act(x[:, :1], goals[:, ::-1].copy(), None, s[:, :1], wanted)         # in the middle of a model step
    p.act(x[:, :1], goals[:, ::-1].copy(), None, s[:, :1], wanted)
    assert p.left.tolist() == [2, 2], 'a new goal'
    q = plan.Planner(f'{acting}/ckpt.safetensors', plan.config | SMALL_SEARCH | dict(method='policy', horizon=5, hold=0.05, rest='zero'), tell=False)
    s[1, :3] = wanted[1] = 0.2, 0.4
    assert not q.act(x[:, :3], goals, None, s[:, :3], wanted)[1].any() and q.left.tolist() == [4, 5], 'who rests has time'
    wanted[1, 1] = np.nan
    p.model.policy.out.bias.data += 100.0
    p.reset()
    assert np.allclose(p.act(x[:, :3], goals, None, s[:, :3], wanted), high[0]) and p.left.tolist() == [2, 2]
    p.model.policy.out.bias.data += torch.nan
    p.reset()
    with pytest.raises(ValueError, match='not finite'):
        p.act(x[:, :3], goals, None, s[:, :3], wanted)
    report = evaluated(acting, tmp_path, episodes=2, budget=4, method='policy')
    assert report['methods']['model']['iterations'] == 0 and 'random weights' in report['methods']


@pytest.fixture(scope='module')
def coarse(acting, demo, tmp_path_factory):
    """A checkpoint of the same data whose steps are three of `acting`."""
    out = tmp_path_factory.mktemp('coarse') / 'out'
    script('train.py', *demo, f'--init={acting}/ckpt.safetensors', '--policy=False', '--state=observation.state', '--frameskip=6', '--action_pca=3',
           '--frames=2', '--batch_size=4', '--eval_clips=4', '--max_steps=10', '--device=cpu', '--dtype=float32', f'--out_dir={out}')
    return f'{out}/ckpt.safetensors'


def pursuing(acting, coarse, **changes):
    return plan.Planner(f'{acting}/ckpt.safetensors', plan.config | SMALL_SEARCH | dict(method='policy', coarse=coarse) | changes, tell=False)


def test_a_sub_goal_is_on_the_best_way_of_the_datas_own_actions(acting, coarse, planned, monkeypatch):
    """Every candidate rolled out by itself; for some robots of many, in their numbers."""
    p = pursuing(acting, coarse, samples=7, iterations=3, coarse_horizon=3, cost='last', smooth=0.1, proposals=0)
    monkeypatch.undo()      # the search itself
    x, goals = film(3, 1), film(3, 1, seed=1)[:, 0]
    s, wanted = np.array([[[0.4, 0.6]], [[0.4, np.nan]], [[0.1, 0.2]]]), np.array([[0.5, 0.5], [0.3, 0.2], [0.2, np.nan]])
    p.begin(p.with_state(p.latents(x), s))
    p.z_of_goal = p.latents(goals)
    p.z_goal = p.with_state(p.z_of_goal, wanted)
    which = torch.tensor([False, True, True])
    with torch.no_grad():
        got = p.find_sub_goals(which)
    net, known = p.coarse, p.coarse.stats['a_chunks']
    generator = torch.Generator().manual_seed(hash((0, 2)) % 2 ** 32)
    ways = known[torch.randint(len(known), (2, 21, 3), generator=generator)]
    weight = plan.cost_weights(net, None, p.o.state_weight)
    z, known = p.z[which, -1:], torch.arange(4).expand(2, 4) > 0
    cache = model.remember(net, z, torch.zeros(2, 1, 3), known[:, :1], 4, seed=0)
    for i, e in enumerate((1, 2)):
        costs, firsts = [], []
        for m in range(21):
            a = torch.cat((torch.zeros(2, 1, 3), ways[:, m]), dim=1)
            imagined = model.rollout(net, z, a, known, K=1, seed=hash((0, 0, 0)) % 2 ** 31, cache=cache)[i]
            off = torch.where(p.z_goal[e].isnan() | p.z[e, -1].isnan(), 0.0, imagined[-1] - p.z_goal[e])
            costs.append((off ** 2 * weight).mean().item() + 0.1 * ways[i, m].diff(dim=0).square().mean().item() * 2 / 3)
            firsts.append(model.rollout(net, z, a, known, K=1, seed=0, cache=cache)[i, 0])
        best = int(np.argmin(costs))
        assert torch.allclose(got[i], firsts[best], atol=1e-4, equal_nan=True) and len({round(c, 6) for c in costs}) > 10
    assert got[0, -1].isnan().sum() == 1, 'what is not sensed now is not asked for'


def test_when_the_goal_itself_is_pursued(acting, coarse, capsys):
    """One robot is far, until it is there; another near from the first: their goals, and the steps that the policy has."""
    p = pursuing(acting, coarse, horizon=9)
    assert f'sub-goals 6 rows ahead by {coarse}' in capsys.readouterr().out
    x, goals = film(2, 40), film(2, 1, seed=1)[:, 0]
    x[1, 2] = goals[1]
    real, asked, seen = [], [], []
    act = p.model.act
    p.model.act = lambda before, now, goal, left: seen.append((goal.clone(), left.tolist())) or act(before, now, goal, left)

    def find(which):
        asked.append(which.tolist())
        return p.z[which, -1] if len(asked) == 3 else 100.0 + len(asked) + torch.zeros_like(p.z_goal[which])
    p.find_sub_goals = find
    # half of it is the way from the start to the goal of the first robot
    z, z_goal = p.latents(x[:, 2:3])[:, 0], p.latents(goals)
    gap = plan.distance(z, z_goal, plan.channel_weights(p.model))
    assert gap[1] < 1e-9
    change = p.coarse.stats['a_change']
    change *= 0.5 * gap[0] / (change * plan.channel_weights(p.model)).mean()
    x[0, 4:30:2] = x[0, 2]
    x[0, 20] = goals[0]
    for t in range(3, 26):
        p.act(x[:, slice(0, 3) if t == 3 else slice(t - 1, t)], goals)
    # at frames 2, 4, ..: the sub-goal is due after three steps; the third is reached at once; the goal at frame 20
    assert asked == [[True, False]] * 4
    left = [n[0] for _, n in seen]
    assert left == [3, 2, 1, 3, 2, 1, 3, 3, 2, 3, 2, 1] and [n[1] for _, n in seen] == [3, 2] + [1] * 10
    where = [goal[0, 0, 0].item() for goal, _ in seen]
    assert where[:6] == [101.0] * 3 + [102.0] * 3 and where[7:9] == [104.0] * 2
    assert all(torch.equal(goal[1, :-1], z_goal[1]) for goal, _ in seen) and all(torch.equal(goal[0, :-1], z_goal[0]) for goal, _ in seen[9:])
    assert torch.equal(p.z_of_goal, z_goal)
    for t in 26, 27:        # far again, but it goes for the goal, whose state is told now
        p.act(x[:, t - 1:t], goals, None, np.full((2, 1, 2), 0.5), np.array([[0.2, 0.2], [0.3, 0.3]]))
    assert len(asked) == 4 and torch.equal(p.sub_goal, p.z_goal) and not p.z_goal.isnan().any()
    p.coarse.stats['a_change'] *= 0
    p.act(x[:, 30:31], goals[::-1].copy())      # a new goal: anew at the next model step
    p.act(x[:, 31:32], goals[::-1].copy())
    assert asked[4:] == [[True, True]]
    # with a search: towards the same, its first `replan` steps count
    q = pursuing(acting, coarse, method='cem', replan=2, controller=True)
    q.coarse.stats['a_change'] *= 0
    asked.clear()
    q.find_sub_goals = lambda which: asked.append(which.tolist()) or q.z_goal[which] + 1
    for t in range(3, 14):
        q.act(x[:, slice(0, 3) if t == 3 else slice(t - 1, t)], goals)
    assert asked == [[True, True]] * 2


@pytest.mark.parametrize('method', ['policy', 'cem'])
def test_the_closed_loop_with_sub_goals(acting, coarse, tmp_path, capsys, method):
    more = dict(shift='light') if method == 'cem' else dict(controller=True)
    report = evaluated(acting, tmp_path, episodes=2, budget=8, method=method, coarse=coarse, **more)
    names = ['model', 'model without state', 'model without sub-goals', *(['model, light'] if method == 'cem' else []), 'random weights']
    assert [name for name in report['methods'] if 'model' in name or 'weights' in name] == names
    ways = [report['methods'][name]['distance_end'] for name in names]
    assert report['coarse'] == coarse and len({*ways}) > 2 and 'sub-goals 6 rows ahead' in capsys.readouterr().out
    flat = evaluated(acting, tmp_path, episodes=2, budget=8, method=method, **more)['methods']
    assert flat['model']['distance_end'] == ways[2] and flat['random weights']['distance_end'] == ways[-1]
    given = f'--ckpt={acting}/ckpt.safetensors', f'--coarse={coarse}', f'--out_dir={tmp_path}', f'--method={method}', *QUICK
    script('plan.py', *given, f'--goal={tmp_path}/goal.png', '--budget=4')
    assert 'latent distance to the goal' in capsys.readouterr().out


def test_what_sub_goals_want(acting, coarse, trained, demo, tmp_path):
    stateless = tmp_path / 'o/ckpt.safetensors'
    script('train.py', *demo, f'--init={acting}/ckpt.safetensors', '--policy=False', '--frameskip=6', '--action_pca=3', '--frames=2', '--batch_size=4',
           '--eval_clips=4', '--max_steps=1', '--device=cpu', f'--out_dir={stateless.parent}')
    for frameskip in 2, 3:
        script('train.py', *demo, f'--init={acting}/ckpt.safetensors', '--policy=False', f'--frameskip={frameskip}', '--action_pca=3', '--frames=2',
               '--batch_size=4', '--eval_clips=4', '--max_steps=1', '--device=cpu', '--state=observation.state', f'--out_dir={tmp_path}/{frameskip}')
    now, goal = pictures(tmp_path)
    net, config = model.load(coarse)
    model.save(f'{tmp_path}/other.safetensors', net, config, {}, net.stats | {'z_std': 1.1 * net.stats['z_std']})
    model.save(f'{tmp_path}/bad.safetensors', net, config, {}, net.stats, 1, net.state_dict() | {'s_out.bias': torch.full((2,), 3e38)})
    for ckpt, coarsely, options, words in (
            (coarse, '', [], f'{coarse}: was trained with --action_pca'),
            (f'{acting}/ckpt.safetensors', f'{acting}/ckpt.safetensors', [], 'was trained without --action_pca'),
            (f'{acting}/ckpt.safetensors', coarse, ['--budget_ms=5'], '--coarse: comes without --budget_ms'),
            (f'{acting}/ckpt.safetensors', f'{tmp_path}/none.safetensors', [], 'none.safetensors: not a readable checkpoint'),
            (f'{acting}/ckpt.safetensors', f'{tmp_path}/other.safetensors', [], 'has another z_std than --ckpt'),
            (f'{trained}/ckpt.safetensors', coarse, [], 'has another s_mean than --ckpt'),
            (f'{acting}/ckpt.safetensors', stateless, [], 'has another s_mean than --ckpt'),
            *((f'{acting}/ckpt.safetensors', f'{tmp_path}/{n}/ckpt.safetensors', [], f'of 2 rows each, got {n}') for n in (2, 3)),
            (f'{acting}/ckpt.safetensors', coarse, ['--coarse_horizon=0'], '--coarse_horizon: wants 1 or more'),
            (f'{acting}/ckpt.safetensors', coarse, [f'--start={now}', f'--goal={goal}'], '--coarse: comes with --env, --goal or --watch')):
        assert words in ends('plan.py', f'--ckpt={ckpt}', f'--coarse={coarsely}', *QUICK, *options), words
    p = pursuing(acting, f'{tmp_path}/bad.safetensors')
    with pytest.raises(ValueError, match='not finite'):
        p.act(film(1, 3), film(1, 1, seed=1)[:, 0], None, np.full((1, 3, 2), 0.5), np.array([[0.2, 0.2]]))
    assert p.z is None
    q = pursuing(trained, str(stateless), method='cem')         # neither has a state
    q.coarse.stats['a_change'] *= 0
    x, goals = film(2, 3), film(2, 1, seed=1)[:, 0]
    q.act(x, goals)
    assert torch.equal(q.z_of_goal, q.latents(goals)) and not torch.equal(q.sub_goal, q.z_of_goal)


@pytest.mark.parametrize('method', ['cem', 'policy'])
def test_a_controller_acts_at_every_frame_of_the_camera(acting, planned, method):
    """On the frame of now and that of a model step before, towards what is imagined for about a model step later, or the goal."""
    p = plan.Planner(f'{acting}/ckpt.safetensors', plan.config | SMALL_SEARCH | dict(method=method, controller=True, replan=1 + (method == 'cem')), tell=False)
    x, goals = film(2, 11), film(2, 1, seed=1)[:, 0]
    s = np.random.default_rng(0).uniform(0.2, 0.8, (2, 11, 2)).astype(np.float32)
    wanted = np.array([[0.5, 0.5], [0.2, 0.4]])
    rows = [p.act(x[:, :3], goals, None, s[:, :3], wanted)]
    rows += [p.act(x[:, t:t + 1], goals, None, s[:, t:t + 1], wanted) for t in range(3, 11)]
    z, goal = p.with_state(p.latents(x), s), p.with_state(p.latents(goals), wanted)
    low, high = p.a_low[0].numpy(), p.a_high[0].numpy()
    for i, row in enumerate(rows):
        target, left = goal, max(1, 3 - i // 2)
        if method == 'cem':     # two model steps of two rows each: the second row is nearer to the later frame
            call = planned[i // 4]
            target, left = call['path'][:, (i % 4 + 1) // 2], 1
        a = p.model.act(z[:, i], z[:, i + 2], target, torch.full((2,), left))
        assert np.allclose(row, p.physical(a)[:, 0].numpy().clip(low, high), atol=1e-5), i
    assert len(p.acting) == 9 and len(planned) == (3 if method == 'cem' else 0)
    assert 'seconds_per_action' in plan.times(p, 2)


def test_what_a_planner_does_is_recorded(acting, tmp_path):
    """Without noise as in the closed loop, towards the same goals; with noise within the data's range. The goal, all of
    the simulator's state and what it has seen stay its own business."""
    known = f'--ckpt={acting}/ckpt.safetensors', '--method=policy', '--record=demo', '--policy=model', '--episodes=2', '--budget=9', '--seed=4'
    script('plan.py', *known, '--explore=0', f'--out={tmp_path}/a')
    script('plan.py', *known, '--explore=0.5', f'--out={tmp_path}/b')
    a, b = data.LeRobot(tmp_path / 'a', state='observation.state'), data.LeRobot(tmp_path / 'b')
    p = plan.Planner(f'{acting}/ckpt.safetensors', plan.config | dict(method='policy'), tell=False)
    rng, sim = np.random.default_rng(4), plan.simulator('demo', (0, 0))
    for i in range(2):
        rng.integers(2 ** 31)
        asked = plan.question(sim, i, rng, 'expert', 10, p.past)
        p.reset()
        poses, executed, shown, _ = plan.play(p.act, [sim], [asked], 9, True, True)
        assert np.allclose(a.rows(i), executed[:, 0], atol=1e-6) and len(a.rows(i)) == 9
        assert np.allclose(a.states(i), poses[:9, 0, :2], atol=1e-5)
        assert (a.frames(i, np.arange(9), 0, '').permute(0, 2, 3, 1).numpy().astype(int) - np.stack([x[0] for x in shown[:9]])).__abs__().mean() < 8
        rng.standard_normal((9, p.width))       # the noise, also where it counts nothing
    off = b.rows(0)[0] - a.rows(0)[0]
    assert 0 < np.abs(off).max() and (b.rows(0) <= p.a_high[0].numpy() + 1e-6).all() and (b.rows(1) >= p.a_low[0].numpy() - 1e-6).all()
    for options, words in ((['--draw_every=3'], '--draw_every=3: the planner looks at every 2th frame'),
                           (['--draw_every=2', '--controller=True'], '--draw_every=2: the planner looks at every 1th frame'),
                           (['--ckpt=/nowhere'], '/nowhere: not a readable')):
        assert words in ends('plan.py', *known, *options, f'--out={tmp_path}/c')
    assert not (tmp_path / 'c').exists()


@pytest.mark.parametrize('method', ['cem', 'icem', 'mppi', 'adam'])
def test_proposals_of_a_policy_are_among_the_first_candidates(acting, method):
    """Its own way through the model, and that with noise; a search does not end above them."""
    net, _ = model.load(f'{acting}/ckpt.safetensors')
    net.requires_grad_(False)
    torch.manual_seed(0)
    z = torch.randn(2, 4, 16, net.config['dim'])
    z = model.add_state(z, torch.full((2, 4, 2), torch.nan))
    a_ctx, low, high = torch.zeros(2, 2, 4), torch.full((2, 2), -0.3), torch.full((2, 2), 0.4)
    candidates = []
    def find(o):
        candidates.clear()
        step_cost = plan.goal_cost

        def watch(imagine, *rest):
            cost = step_cost(imagine, *rest)
            return lambda actions, i: candidates.append(actions.detach()) or cost(actions, i)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, 'goal_cost', watch)
            return plan.plan(net, z[:, :2], a_ctx, z[:, 3], options(horizon=3, samples=9, elites=3, iterations=2, proposal_std=0.5, chunk=100, **o), 5, low, high)
    way, info = find(dict(method='policy'))
    want, frames, now = [], z[:, :2], z[:, 1]
    for h in range(3):
        want.append(net.act(frames[:, -2], frames[:, -1], z[:, 3], torch.full((2,), 3 - h)).clamp(-0.3, 0.4))
        a = torch.cat((a_ctx, torch.stack(want, dim=1)), dim=1)
        frames = torch.cat((z[:, :2], model.rollout(net, z[:, :2], a, torch.arange(3 + h).expand(2, -1) > 0, 1, seed=5)), dim=1)
    want = torch.stack(want, dim=1)
    assert torch.allclose(way, want, atol=1e-5) and info['cost'].shape == (1, 2)
    best = find(dict(method=method, proposals=4))[1]['cost']
    first = candidates[0]
    assert first.shape[1] == 9 and torch.allclose(first[:, 5], want, atol=1e-5)
    off = first[:, 6:] - want[:, None]
    moved = off[0, :, 0].abs() > 1e-4       # their noise is not that of the candidates that were drawn
    assert (first[0, 1:4, 0].sign() != off[0, :, 0].sign())[moved].any()
    assert 0.02 < off.abs().mean() < 0.5 and first.min() >= -0.3 - 1e-6 and first.max() <= 0.4 + 1e-6
    assert (best[0] <= info['cost'][0] + 1e-6).all(), 'the best of the first iteration is no worse than the policy'


def test_a_number_that_is_not_known_now_does_not_count(sensing):
    """Whether the whole state is missing or one sensor, in the last frame of the context alone."""
    x, goal = film(1, 3)[0], film(1, 1, seed=1)[0, 0]
    rows = []
    for sensed, wanted in (([0.1, 0.2], [0.5, 0.5]), ([np.nan, 0.2], [0.5, 0.5]), ([np.nan, 0.2], [np.nan, 0.5]), ([np.nan] * 2, [0.5, 0.5])):
        p = plan.Planner(f'{sensing}/ckpt.safetensors', plan.config | SMALL_SEARCH | dict(samples=30), tell=False)
        rows.append(p.act(x, goal, None, [[0.1, 0.2], [0.1, 0.2], sensed], wanted))
    assert np.isfinite(rows).all() and np.array_equal(rows[1], rows[2]) and not np.array_equal(rows[0], rows[1])


def test_the_closed_loop_with_a_state_and_without(sensing, tmp_path, capsys):
    report = evaluated(sensing, tmp_path, episodes=3, budget=4, shift='light')
    methods = report['methods']
    assert [*methods][:4] == ['model', 'model without state', 'model, light', 'random weights']
    assert [methods[k]['state'] for k in [*methods][:4]] == [True, False, True, True]
    assert methods['model']['distance_end'] != methods['model without state']['distance_end']
    assert 'state observation.state' in capsys.readouterr().out
    without = evaluated(sensing, tmp_path, episodes=3, budget=4, state_weight=0.0)['methods']
    assert 'model without state' not in without and not without['model']['state']
    assert without['model']['distance_end'] == methods['model without state']['distance_end']
    rested = evaluated(sensing, tmp_path, episodes=2, budget=4, hold=9.0, rest='zero')['methods']['model']
    assert rested['jerk'] == 0 and rested['seconds_per_plan'] is None


def test_states_of_pictures(sensing, trained, tmp_path):
    now, goal = pictures(tmp_path)
    given = f'--ckpt={sensing}/ckpt.safetensors', f'--start={now}', f'--goal={goal}', f'--out_dir={tmp_path}/o', *QUICK, '--samples=160'

    def planned(*options):
        script('plan.py', *given, *options)
        return np.load(tmp_path / 'o/plan.npy')
    both = planned('--start_state=0.2,0.5', '--goal_state=0.5,0.5')
    assert np.array_equal(both, planned('--start_state=y=0.5,x=0.2', '--goal_state=y=.5, x=5e-1'))
    assert not np.array_equal(both, planned()) and both.shape == (4, 2)
    assert not np.array_equal(*(planned('--start_state=0.2,0.5', f'--goal_state=y={y}', '--state_weight=1000') for y in (.1, .9)))
    for options, words in ((['--goal_state=.5,.5'], '--goal_state: wants --start_state as well'),
                           (['--start_state=.5'], '--start_state=.5: wants 2 numbers (x, y), or some'),
                           (['--goal_state=1,2,3'], '--goal_state=1,2,3: '),
                           (['--start_state=z=1'], '--start_state=z=1: wants 2 numbers'),
                           (['--start_state=here,there'], 'wants 2 numbers'), (['--start_state=x=inf'], 'wants 2 numbers'),
                           (['--state_weight=-1'], '--state_weight: wants'), (['--rest=lie'], '--rest: wants one of zero, state'),
                           (['--hold=1', '--rest=zero'], '--hold, --hold_latents: come with --env or --watch'),
                           (['--start_state=x=1', '--goal_state=y=1'], 'of the same numbers'),
                           (['--method=policy'], '--method=policy --proposals=0 --controller=False: '), (['--controller=True'], 'was trained without --policy'), (['--method=policy', '--replan=2'], 'with --replan=1, not 2'),
                           (['--method=policy', '--guide=2'], 'comes without --text and --guide'), (['--method=policy', '--mask=m.png'], 'comes without --mask'), (['--method=policy', '--smooth=1'], '--smooth and --cost'),
                           (['--method=policy', '--cost=last'], '--smooth and --cost'), (['--proposals=3'], 'was trained without --policy'),
                           (['--proposals=300'], '--proposals=300: wants at most samples=160'),
                           ([f'--ckpt={trained}/ckpt.safetensors', '--goal_state=1,2'], 'was trained without --state')):
        assert words in ends('plan.py', *given, *options)
    for ckpt, options in (sensing, ['--hold=1']), (trained, ['--hold=1', '--rest=zero']):
        assert '--hold=1.0: wants --rest, and a model that was trained with --state or' in ends(
            'plan.py', f'--ckpt={ckpt}/ckpt.safetensors', *options)
    assert '--hold_latents=0.5: wants --rest' in ends('plan.py', f'--ckpt={trained}/ckpt.safetensors', '--hold_latents=0.5')
    assert '--hold: pictures come without a state' in ends('plan.py', f'--ckpt={sensing}/ckpt.safetensors', '--hold=1', '--rest=zero',
                                                  f'--watch={tmp_path}', f'--goal={goal}')
    assert 'come without a state' in ends('plan.py', f'--watch={tmp_path}', f'--goal={goal}', '--goal_state=1,2')


# --------------------------------------------------------------------------------------------------
# two pictures, a folder of pictures, mistakes

def pictures(folder, n=2):
    for i in range(n):
        state = np.array([[0.2 + 0.3 * i / (n - 1), 0.5, 0.7, 0.6]])
        data.write_image(folder / f'{i}.png', torch.from_numpy(data.demo_draw(state, 80)[0]).permute(2, 0, 1))
    return folder / '0.png', folder / f'{n - 1}.png'


@pytest.mark.parametrize('method', PLANNERS)
def test_a_plan_between_two_pictures(trained, tmp_path, capsys, method):
    now, goal = pictures(tmp_path)
    script('plan.py', f'--ckpt={trained}/ckpt.safetensors', f'--out_dir={tmp_path / "o"}', f'--start={now}',
           f'--goal={goal}', f'--method={method}', *QUICK)
    actions = np.load(tmp_path / 'o' / 'plan.npy')
    assert actions.shape == (2 * 2, 2), 'one row per dataset step, in physical units'
    assert np.abs(actions).max() <= data.DEMO_STEP + 1e-6
    said = capsys.readouterr().out
    assert '4 actions in' in said and '1 iterations' in said and 'plan.mp4' in said
    with av.open(str(tmp_path / 'o' / 'plan.mp4')) as video:
        assert video.streams.video[0].frames == 3


def test_a_plan_is_shown_through_the_decoder_beside_the_checkpoint(trained, tmp_path):
    """Whatever the folder of the results: here one that paints everything red."""
    now, goal = pictures(tmp_path)
    (tmp_path / 'run').mkdir()
    shutil.copy(trained / 'ckpt.safetensors', tmp_path / 'run')
    options = f'--ckpt={tmp_path}/run/ckpt.safetensors', f'--start={now}', f'--goal={goal}', *QUICK

    def shown(out):
        script('plan.py', *options, f'--out_dir={tmp_path}/{out}')
        return data.read_frames(f'{tmp_path}/{out}/plan.mp4', [1])[0].float().mean(dim=(1, 2))
    assert shown('inverse')[1:].min() > 60, 'of pixels: a bright table'
    net, config = model.load(tmp_path / 'run/ckpt.safetensors')
    decoder = decode.Decoder(model.restore_encoder(config, net.stats), 16)
    decoder.out.weight.data.zero_()
    decoder.out.bias.data.copy_(torch.tensor([9.0, -9.0, -9.0]).repeat_interleave(4))     # of four pixels each
    model.write_tensors(f'{tmp_path}/run/decoder.safetensors', decoder.state_dict())
    red, *others = shown('red')
    assert red > 230 and max(others) < 20
    model.write_tensors(f'{tmp_path}/run/decoder.safetensors', dict(other=torch.zeros(1)))
    assert 'what the latents want' in ends('plan.py', *options, f'--out_dir={tmp_path}/none')
    assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize('given, words', [
    (['--ckpt=nowhere.safetensors'], 'nowhere.safetensors: not a readable checkpoint'),
    (['--ckpt={tmp}/cut.safetensors'], 'cut.safetensors: not a readable checkpoint'),
    (['--goal_state=1,2'], '--start_state, --goal_state: come with --goal'),
    (['--policy=model'], '--policy, --out: come with --record'), (['--goal={goal}', '--out={tmp}/o'], '--policy, --out: come with --record'),
    (['--start={now}'], '--goal'), (['--watch={tmp}'], '--goal'),
    (['--goal={tmp}/none.png'], 'none.png: not a readable picture'), (['--goal={goal}', '--start_state=1'], '--start_state'),
    (['--goal={tmp}/wide.png'], 'wide.png: is 80 x 40 pixels, --env=demo 64 x 64: wants the same aspect'),
    (['--goal={goal}', '--env={tmp}/none.py:Robot'], 'no such file, or nothing of that name in it'),
    (['--start={now}', '--goal={goal}', '--watch={tmp}'], '--watch'),
    (['--start={now}', '--goal={goal}', '--record=demo'], '--record'),
    (['--watch={tmp}/nowhere', '--goal={goal}'], '--watch={tmp}/nowhere: no such folder'),
    (['--watch={now}', '--goal={goal}'], 'no such folder'),
    (['--watch={tmp}/wide', '--goal={goal}'],
     '--watch={tmp}/wide: the goal picture is 80 x 80 pixels, the frames are 80 x 40'),
    (['--watch={tmp}', '--goal={tmp}/none.png'], 'none.png: not a readable picture'),
    (['--start={now}', '--goal={tmp}/text.png'], 'text.png: not a readable picture'),
    (['--start={now}', '--goal={tmp}/none.png'], 'none.png: not a readable picture'),
    (['--start={tmp}/none.png', '--goal={goal}'], 'none.png: not a readable picture'),
    (['--start={now}', '--goal={tmp}/wide.png'], 'wide.png: is 80 x 40 pixels, --start={now} 80 x 80'),
    (['--mask={tmp}/black.png'], 'black.png: is black'),
    (['--mask={tmp}/none.png'], 'none.png: not a readable picture'),
    (['--K=3'], '--K=3: wants a power of two up to 8'), (['--K=16'], '--K=16'), (['--K=0'], '--K: wants'),
    (['--cost=best'], '--cost: wants one of all, last'), (['--goals=none'], '--goals: wants one of expert, random'),
    (['--method=sgd'], '--method: wants one of cem, icem, mppi, adam'),
    (['--dtype=float16'], '--dtype'), (['--device=tpu'], '--device=tpu'), (['--shift=fog'], '--shift'),
    (['--record=demo', '--out={tmp}/r', '--shift=light'], '--shift: comes with neither'), (['--goal=g.png', '--shift=light'], '--shift: comes with neither'),
    (['--record=demo', '--out={tmp}/r', '--policy=model', '--steps=7'], '--steps: --policy=model acts for --budget'),
    (['--shift=light,fog'], 'fog'), (['--env=nowhere/X-v0'], 'nowhere'),
    (['--env={tmp}/none.py:Robot'], '{tmp}/none.py:Robot: no such file, or nothing of that name in it'),
    (['--goal_steps=2'], '--goal_steps=2'), (['--elites=7'], '--elites=7: wants at most samples=6'),
    (['--replan=3'], '--replan=3: a plan has only horizon=2'),
    (['--horizn=3'], 'did you mean --horizon?'), (['--horizon', '3', '4'], '4: write options as'),
    *(([f'--{name}={value}'], f'--{name}: wants') for name, value in (
        ('horizon', 0), ('samples', 0), ('iterations', 0), ('replan', 0), ('seeds', 0), ('seed', -1), ('init_std', 0),
        ('warm_std', -1), ('min_std', -1), ('keep', 2), ('beta', -1), ('temperature', 0), ('chunk', -1),
        ('step_size', 0), ('smooth', -1), ('smooth', 'nan'), ('budget_ms', -1), ('elites', 1), ('episodes', 0),
        ('goal_steps', -5), ('budget', -1), ('robot', -1), ('draw_every', 0), ('samples', 'many'), ('warm', 'yes'))),
    (['--robot=1'], '--robot=1: {ckpt} knows 1 labelled datasets')], ids=' '.join)
def test_each_mistake_is_one_line(trained, tmp_path, given, words):
    now, goal = pictures(tmp_path)
    (tmp_path / 'text.png').write_text('not a picture')
    (tmp_path / 'cut.safetensors').write_bytes((trained / 'ckpt.safetensors').read_bytes()[:5000])
    for name, shape in (('black', (3, 80, 80)), ('wide', (3, 40, 80))):
        data.write_image(tmp_path / f'{name}.png', torch.zeros(shape, dtype=torch.uint8))
    (tmp_path / 'wide').mkdir()
    for i in range(3):
        shutil.copy(tmp_path / 'wide.png', tmp_path / f'wide/{i}.png')
        os.utime(tmp_path / f'wide/{i}.png', (1, 1))
    before = {*os.listdir(tmp_path)}
    names = dict(tmp=tmp_path, now=now, goal=goal, ckpt=trained / 'ckpt.safetensors')
    line = ends('plan.py', f'--ckpt={trained}/ckpt.safetensors', f'--out_dir={tmp_path / "out"}', *QUICK,
                *(o.format(**names) for o in given))
    assert words.format(**names) in line and {*os.listdir(tmp_path)} == before


def test_a_folder_in_which_another_process_writes(trained, tmp_path):
    now, goal = pictures(tmp_path)
    given = f'--ckpt={trained}/ckpt.safetensors', f'--out_dir={tmp_path}/o'
    with owner(tmp_path / 'o', '.plan.lock', '.decode.lock') as other:
        for name, *options in (('plan.py', *QUICK), ('plan.py', f'--start={now}', f'--goal={goal}', *QUICK), ('decode.py',)):
            assert f'{tmp_path}/o: process {other.pid} ' in ends(name, *given, *options)
        assert sorted(os.listdir(tmp_path / 'o')) == ['.decode.lock', '.plan.lock']
    (tmp_path / 'file').touch()
    assert f'{tmp_path}/file: ' in ends('plan.py', given[0], f'--out_dir={tmp_path}/file', *QUICK)


class Targets(plan.Demo):
    """The demo world by places: to rest is to stay at this one."""
    space = plan.Box([0, 0], [1, 1])

    def step(self, action):
        super().step((np.asarray(action) - self.now[:2]).clip(-data.DEMO_STEP, data.DEMO_STEP))

    def rest(self):
        return self.now[:2].copy()

    def script(self, rng):
        act = super().script(rng)
        return lambda: self.now[:2] + act()


def test_each_robot_rests_where_it_is():
    sim = Targets()
    rng = np.random.default_rng(0)
    asked = [plan.question(sim, i, rng, 'expert', 6, 3) for i in range(3)]
    of_data = types.SimpleNamespace(a_low=torch.zeros(1, 2), a_high=torch.ones(1, 2), a_mean=torch.zeros(1, 2), width=2)
    policies = plan.baselines(of_data, asked, rng)
    for name, begin in ('zero', 0), ('expert', 6):
        poses, executed, *_ = plan.play(policies[name], [sim] * 3, asked, 12, False)
        assert np.allclose(poses[begin:, :, :2], poses[begin, :, :2], atol=1e-6)
    assert np.allclose(poses[6, :, :2], [q.pose[:2] for q in asked]), 'the expert got there'


@pytest.mark.parametrize('rows', [1, 2])
def test_smooth_plans_change_little_from_row_to_row(rows):
    """Of a robot's own numbers, not of what pads them; from the last row that was executed."""
    generator = torch.Generator().manual_seed(0)
    way = torch.randn(1, 5, 4, 2, generator=generator)          # (E, M, rows of the plan, width)
    last = torch.randn(1, rows, 2, generator=generator)
    net = types.SimpleNamespace(stats={'z_std': torch.ones(2)}, config=dict(state_dim=0, grid=(1, 1)))
    for known in True, False:
        cost = plan.goal_cost(lambda actions, seed: torch.zeros(1, 5, 4 // rows, 1, 2), torch.zeros(1, 1, 2), plan.to_steps(last, rows, 7)[:, 0],
                              torch.tensor([known]), torch.ones(1, 2), options(smooth=0.7), 0, rows, 2)
        got = cost(plan.to_steps(way, rows, 7), 0)
        first = (way[:, :, :1] - last[:, None, -1:]) * known
        want = 0.7 * torch.cat((first, way[:, :, 1:] - way[:, :, :-1]), dim=2).square().mean(dim=(2, 3))
        assert torch.allclose(got, want, atol=1e-6)


def test_a_planner_keeps_nothing_of_the_callers(trained):
    """Buffers are filled anew, answers changed; and pictures are views, or lists of states."""
    options = plan.config | SMALL_SEARCH | dict(iterations=1, replan=2)
    p = plan.Planner(f'{trained}/ckpt.safetensors', options, tell=False)
    x, goals = film(1, 8)[0], film(2, 1, seed=1)[:, 0]
    goal = goals[0].copy()
    row = p.act(x[:3], goal)
    kept = row.copy()
    row *= 100
    done = np.full(2, .01)
    z = p.z_of_goal.clone()
    p.act(x[3], goal)
    assert np.allclose(p.done[0][0], kept), 'that was executed'
    p.act(x[4], goal, done)
    goal[:] = goals[1]
    p.act(x[5], goal, done)
    done[:] = .02
    assert torch.allclose(p.z_of_goal, p.latents(goals[1][None])) and not torch.equal(p.z_of_goal, z)
    p.act(x[6], goal, done)
    assert np.allclose(p.physical(p.a[0, -1])[:2], [[.01, .01], [.02, .02]])
    p.reset()
    flipped = p.act(x[:3, ..., ::-1], goal[..., ::-1])
    p.reset()
    p.restart()
    assert np.allclose(p.act(x[:3, ..., ::-1].copy(), goal[..., ::-1].copy()), flipped, atol=.2)

    def interrupted():
        raise KeyboardInterrupt
    p.search = interrupted
    p.restart()
    with pytest.raises(KeyboardInterrupt):
        p.act(x[:3], goal)
    with pytest.raises(ValueError, match='the last call was interrupted: begin anew, with 3 frames'):
        p.act(x[3], goal, done)
    del p.search
    p.act(x[:3], goal)


def test_states_may_be_lists(acting):
    p = plan.Planner(f'{acting}/ckpt.safetensors', plan.config | dict(method='policy'), tell=False)
    x, goals = film(2, 3), film(2, 1, seed=1)[:, 0]
    states = np.full((2, 3, 2), .4)
    rows = p.act(x, goals, None, states, [[.5, .5]] * 2)
    p.reset()
    assert np.array_equal(p.act(x, goals, None, states.tolist(), [[.5, .5]] * 2), rows)


def test_a_simulator_of_another_rate_is_told(trained, capsys):
    p = plan.Planner(f'{trained}/ckpt.safetensors', plan.config, tell=False)
    o = options(ckpt='x')
    sim = plan.Demo()
    plan.check_robot(o, p, sim)
    p.a_high = p.a_high * .8        # nobody went that fast
    plan.check_robot(o, p, sim)
    assert capsys.readouterr().err == ''
    p.fps = 12.0
    plan.check_robot(o, p, sim)
    assert 'demo has 10 frames per second, rows of x are 12 a second' in capsys.readouterr().err
    sim.fps = None
    with pytest.raises(SystemExit, match='--env=demo: does not say its frames per second'):
        plan.check_robot(o, p, sim)


def test_somebodys_own_goal_picture_stays(trained, tmp_path):
    (tmp_path / 'goal.png').write_bytes(b'mine')
    evaluated(trained, tmp_path, episodes=1, budget=2, blind_episodes=1)
    assert (tmp_path / 'goal.png').read_bytes() == b'mine' and (tmp_path / 'plan.json').exists()


def test_another_robots_checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    for key, scale, words in (('action.hand', .05, '--env=demo: has no action.hand'),
                              ('action', 9, 'was trained on another robot')):
        out = tmp_path / key
        with data.Writer(tmp_path / f'{key}-set', 10) as writer:
            for i in range(4):
                for x in film(1, 30, i)[0]:
                    a = rng.uniform(-scale, scale, 2)
                    writer.add(x, action=a if key == 'action' else None, extra={} if key == 'action' else {key: a})
                writer.end_episode('')
        script('train.py', f'--labelled={tmp_path / f"{key}-set"}', '--unlabelled=', *SMALL,
               '--max_steps=1', '--workers=0', f'--out_dir={out}')
        assert words in ends('plan.py', f'--ckpt={out}/ckpt.safetensors', *QUICK)
        assert not [name for name in os.listdir(out) if name.startswith('plan')]


def test_a_model_without_actions_cannot_plan(demo, tmp_path):
    script('train.py', '--labelled=', demo[1], *SMALL, '--max_steps=1', f'--out_dir={tmp_path / "o"}')
    assert 'trained without actions' in ends('plan.py', f'--ckpt={tmp_path}/o/ckpt.safetensors')


def test_compiled_plans_are_the_same(trained, tmp_path, monkeypatch):
    """Traced in whole graphs; what a compiler makes of those, test_train.py tests."""
    now, goal = pictures(tmp_path)
    counter, rows = torch._dynamo.testing.CompileCounter(), []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **how: setattr(
        self, '_compiled_call_impl', torch.compile(self._call_impl, backend=counter, **how)))
    for compile in (False, True):
        assert not counter.frame_count
        script('plan.py', f'--ckpt={trained}/ckpt.safetensors', f'--start={now}', f'--goal={goal}', *QUICK,
               f'--out_dir={tmp_path}', f'--compile={compile}')
        rows.append(np.load(tmp_path / 'plan.npy'))
    np.testing.assert_allclose(*rows, rtol=1e-4, atol=1e-6)
    assert counter.frame_count


def test_the_mask_reaches_the_search(tmp_path, controller, planned):
    x = torch.zeros(3, 80, 80, dtype=torch.uint8)
    x[:, 40:, :40] = 255                            # the lower left quarter counts
    data.write_image(tmp_path / 'mask.png', x)
    for mask in (str(tmp_path / 'mask.png'), ''):
        controller(mask=mask).act(film(1, 3)[0], film(1, 1)[0, 0])
    want = torch.zeros(4, 4)
    want[2:, :2] = 255
    assert (planned[0]['tokens'].view(4, 4) - want).abs().max() < 40 and planned[1]['tokens'] is None


def test_watching_a_folder(trained, tmp_path, monkeypatch, capsys):
    """A line of actions for every picture from the first moment with enough of them; Ctrl-C is the ordinary end. What
    is still being written is waited for, whatever its clock says, and what stays half is named and skipped."""
    folder, waits = tmp_path / 'frames', itertools.count()
    folder.mkdir()
    _, goal = pictures(tmp_path, 6)
    (folder / 'notes.txt').write_text('no picture')
    names = [f'frame{i}{ending}' for i, ending in enumerate(('.png', '.jpeg', '.JPG', '.bmp', '.webp', '.PNG'))]

    def sleep(seconds):     # meanwhile: half a picture, and it stays so for a second; frame 3 for ever
        if threading.current_thread() is not threading.main_thread():       # of an earlier test
            return really_sleep(seconds)
        i, tenths = divmod(next(waits), 10)
        clock[0] += 0.25 if i == 3 else 0.1
        if i == 6:
            raise KeyboardInterrupt
        whole = (tmp_path / f'{i}.png').read_bytes()
        (folder / names[i]).write_bytes(whole if tenths == 9 and i != 3 else whole[:100])
        os.utime(folder / names[i], (time.time() + 999, time.time() + 999))
    really_sleep, clock = time.sleep, [0.0]
    monkeypatch.setattr(time, 'sleep', sleep)
    monkeypatch.setattr(time, 'monotonic', lambda: clock[0])
    with pytest.raises(SystemExit) as end:
        script('plan.py', f'--ckpt={trained}/ckpt.safetensors', f'--watch={folder}', f'--goal={goal}', *QUICK)
    assert end.value.code is None
    first, *lines = capsys.readouterr().out.splitlines()
    assert 'first 3 pictures' in first and len(lines) == 4
    assert lines.pop(1) == (f'{folder}/frame3.bmp: not a readable picture of up to 134 megapixels '
                            '(Invalid data found when processing input): skipped')
    for i, line in zip((2, 4, 5), lines, strict=True):          # the third picture is the first with an answer
        name, *numbers, milliseconds, unit = line.split()
        assert name == names[i] and len(numbers) == 2 and unit == 'ms)' and milliseconds[0] == '('
        assert all(abs(float(v)) <= data.DEMO_STEP + 1e-6 for v in numbers)
