"""python -m pytest tests/test_plan.py: planners, the cost of a plan, the controller, the closed loop."""
import functools
import inspect
import itertools
import json
import math
import os
import signal
import subprocess
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
import model
import plan
from conftest import ROOT, SMALL, ends, script

# ----------------------------------------------------------------------------------------------------------------------
# the planners, on costs whose best actions are known

PLANNERS = 'cem', 'icem', 'mppi', 'adam'


def search(method, cost, mean, low=-2.0, high=2.0, std=1.0, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return getattr(plan, method)(cost, mean, torch.full_like(mean, std), low, high, generator=generator, **options)


def watched(cost):
    """The cost, and a list that gets a copy of every batch of candidates with what it cost."""
    seen = []

    def also(actions, i):
        costs = cost(actions, i)
        seen.append((actions.detach().double().numpy().copy(), costs.detach().double().numpy().copy()))
        return costs
    return also, seen


def noise_of(shapes, beta=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [plan.coloured(*shape, beta, generator).double().numpy() for shape in shapes]


BEST = torch.tensor([[[0.5, -1.0], [0.2, 0.0]], [[-0.3, 0.9], [0.0, 1.5]]])                       # (E, H, A)


def squares(actions, i=0):
    return (actions - BEST[:, None]).square().sum(dim=(2, 3))


def test_planners_have_one_signature():
    assert len({inspect.signature(getattr(plan, name)) for name in PLANNERS}) == 1


@pytest.mark.parametrize('method', PLANNERS)
def test_the_optimum_of_each_episode_is_found(method):
    found, costs, elite = search(method, squares, torch.zeros_like(BEST), samples=256, elites=16, iterations=40,
                                 min_std=0.01, beta=0.0)
    assert (found - BEST).abs().max() < 0.03 and (costs[-1] < 0.005).all() and (costs[0] > 0.005).all()
    assert elite.shape == (2, 16, 2, 2) and (squares(elite).diff(dim=1) >= 0).all(), 'best first'
    assert costs.shape[1] == 2 and found.shape == BEST.shape


@pytest.mark.parametrize('method', PLANNERS)
def test_bounds_hold_also_where_the_optimum_is_outside(method):
    low, high = torch.tensor([-0.4, -0.6]), torch.tensor([0.3, 1.0])
    cost, seen = watched(squares)
    found, _, elite = search(method, cost, torch.full_like(BEST, 0.2), low, high, samples=128, elites=16,
                             iterations=30, min_std=0.02, momentum=0.1)
    for actions in (*(torch.tensor(a) for a, _ in seen), found, elite):
        assert (actions >= low - 1e-6).all() and (actions <= high + 1e-6).all()
    assert (found - BEST.clamp(low, high)).abs().max() < 0.06


def rosenbrock(actions, i=0):
    x, y = actions[:, :, 0].unbind(-1)
    return (1 - x) ** 2 + 20 * (y - x * x) ** 2


MIX = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3)))[0] * torch.logspace(0, -0.6, 6)
LOW_POINT = torch.tensor([0.6, -0.4, 0.3, 0.7, -0.2, -0.5]).view(3, 2)


def valley(actions, i=0):
    """All six numbers are coupled; curvatures differ sixteenfold."""
    return ((actions - LOW_POINT).flatten(2) @ MIX).square().sum(dim=2)


@pytest.mark.parametrize('method', PLANNERS)
@pytest.mark.parametrize('cost, shape', [(rosenbrock, (1, 1, 2)), (valley, (1, 3, 2))])
def test_coupled_actions(method, cost, shape):
    start = torch.full(shape, -0.8)
    found, costs, _ = search(method, cost, start, samples=200, elites=20, iterations=150 if method == 'adam' else 80,
                             min_std=0.03, momentum=0.1)
    assert cost(found[:, None]) < 5e-3 * cost(start[:, None])


@pytest.mark.parametrize('method', PLANNERS)
def test_the_first_candidate_is_the_mean(method):
    cost, seen = watched(squares)
    mean = torch.full_like(BEST, 0.4)
    search(method, cost, mean, -0.5, 0.7, samples=32, elites=4, iterations=4)
    assert np.array_equal(seen[0][0][:, 0], mean.numpy())
    if method in ('cem', 'icem'):
        for (actions, costs), (later, _) in itertools.pairwise(seen):
            elite = np.take_along_axis(actions, costs.argsort(axis=1)[:, :4, None, None], axis=1)
            assert np.allclose(later[:, 0], elite.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize('method', ['cem', 'icem', 'mppi'])
def test_a_least_std_keeps_the_search_alive(method):
    for least in (0.0, 0.2):
        cost, seen = watched(squares)
        search(method, cost, BEST.clone(), samples=200, elites=80, iterations=60, min_std=least)
        spread = seen[-1][0][:, 1:150].std(axis=1, ddof=1)        # of those that were drawn, not kept
        assert (spread < 1e-3).all() if least == 0 else (abs(spread - 0.2) < 0.05).all()


@pytest.mark.parametrize('method', ['cem', 'icem', 'mppi'])
@pytest.mark.parametrize('momentum', [0.0, 0.3])
def test_the_update_rule(method, momentum):
    """Three iterations beside numpy, which has the noise and writes down the rest, section by section of the papers."""
    N, K, keep, T, wide = 30, 6, 0.3, 0.7, 100.0
    def cost(actions, i):
        return squares(actions) * (1 + i) + actions[..., 0].sum(dim=2).sin()
    spied, seen = watched(cost)
    mean = torch.tensor([[[0.1, 0.2], [0.3, -0.2]], [[0.0, 0.5], [1.0, 0.0]]]).double()
    best = BEST.double()
    found, costs, elites = search(method, spied, mean, -wide, wide, 0.8, seed=5, samples=N, elites=K, iterations=3,
                                  min_std=0.15, beta=1.5, momentum=momentum, keep=keep, temperature=T)
    sizes = [max(2 * K, int(N / 1.25 ** i)) if method == 'icem' else N for i in range(3)]
    assert method != 'icem' or sizes == [30, 24, 19]
    noise = noise_of([(2, n, 2, 2) for n in sizes], 1.5, seed=5)
    for e in range(2):
        mu, sigma, kept = mean[e].numpy(), np.full((2, 2), 0.8), np.zeros((0, 2, 2))
        for i in range(3):
            want = mu + sigma * noise[i][e]
            want[0] = mu
            want = np.concatenate((want, kept))
            got, c = seen[i][0][e], seen[i][1][e]
            assert got.shape == want.shape and np.allclose(got, want, atol=1e-6)
            assert np.allclose(c, ((got - best[e].numpy()) ** 2).sum(axis=(1, 2)) * (1 + i)
                               + np.sin(got[..., 0].sum(axis=1)))
            E = got[c.argsort()[:K]]
            assert np.isclose(costs[i, e].item(), c.min())
            if method == 'mppi':
                S = np.sort(c)[:K]
                w = np.exp(-(S - S[0]) / (T * S.std(ddof=1)))
                w = (w / w.sum())[:, None, None]
                inner = (w * E).sum(axis=0)
                mu = momentum * mu + (1 - momentum) * inner
                # TD-MPC gives momentum to the mean alone; about which mean sigma is taken matters only then
                sigma = np.maximum(np.sqrt((w * (E - mu) ** 2).sum(axis=0)), 0.15)
            else:
                mu = momentum * mu + (1 - momentum) * E.mean(axis=0)
                sigma = np.maximum(momentum * sigma + (1 - momentum) * E.std(axis=0, ddof=1), 0.15)
            kept = E[:math.ceil(keep * K)] if method == 'icem' else kept
        assert np.allclose(found[e], E[0] if method == 'icem' else mu, atol=1e-6)
        assert np.allclose(elites[e], E, atol=1e-6)


def test_icem_draws_fewer_and_keeps_the_best():
    cost, seen = watched(squares)
    search('icem', cost, torch.zeros_like(BEST), samples=64, elites=5, iterations=12, keep=0.5)
    drawn = [max(10, int(64 / 1.25 ** i)) for i in range(12)]
    assert [a.shape[1] for a, _ in seen] == [drawn[0], *(n + 3 for n in drawn[1:])] and drawn[-1] == 10
    for (actions, costs), (later, _) in itertools.pairwise(seen):
        for e in range(2):
            assert np.array_equal(later[e, -3:], actions[e, costs[e].argsort()[:3]])
    cost, seen = watched(squares)
    search('icem', cost, torch.zeros_like(BEST), samples=64, elites=5, iterations=2, keep=0.0)
    assert seen[1][0].shape[1] == 51


def test_icem_takes_up_the_elites_of_the_step_before():
    mean, far = torch.zeros(1, 4, 2), torch.linspace(-1, 1, 5 * 6).view(1, 5, 3, 2)
    cost, seen = watched(lambda actions, i: (actions[:, :, :3] - far[:, 1:2]).square().sum(dim=(2, 3)))
    found, _, _ = search('icem', cost, mean, -1.5, 0.9, samples=20, elites=5, iterations=1, keep=0.5, carried=far)
    first = seen[0][0][0]
    assert len(first) == 20 + math.ceil(0.5 * 5)
    assert np.allclose(first[20:, :3], far[0, :3].clamp(-1.5, 0.9)), 'the better ones come first, and within bounds'
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


def test_who_returns_what():
    """With a cost that changes its mind in the last iteration, the best candidate and the mean are far apart."""
    def cost(actions, i):
        return (actions - (1.0 if i == 2 else -1.0)).square().sum(dim=(2, 3))
    for method in PLANNERS[:3]:
        spied, seen = watched(cost)
        found, _, _ = search(method, spied, torch.zeros(1, 2, 1), samples=60, elites=6, iterations=3)
        last, costs = seen[-1]
        order = costs[0].argsort()
        if method == 'icem':
            assert np.allclose(found[0], last[0, order[0]])
        else:
            assert not np.allclose(found[0], last[0, order[0]], atol=1e-4)
        if method == 'cem':
            assert np.allclose(found[0], last[0, order[:6]].mean(axis=0), atol=1e-6)
    found, _, _ = search('adam', lambda a, i: cost(a, 0) if i < 3 else cost(a, 0) + 100, torch.zeros(1, 2, 1),
                         samples=60, elites=6, iterations=3)
    spied, seen = watched(lambda a, i: cost(a, 0))
    search('adam', spied, torch.zeros(1, 2, 1), samples=60, elites=6, iterations=3)
    assert np.allclose(found[0], seen[2][0][0, seen[2][1][0].argmin()], atol=1e-6), 'the best ever seen'


def test_mppi_weighs_by_cost_in_its_own_units():
    """Whatever the scale of the costs, the plan is the same; a low temperature takes the best alone."""
    mean = torch.zeros_like(BEST)
    options = dict(samples=50, elites=10, iterations=3, temperature=0.5)
    one, million = (search('mppi', lambda a, i: 7 + s * squares(a), mean, **options)[0] for s in (1.0, 1e-3))
    assert torch.allclose(one, million, atol=1e-2)
    spied, seen = watched(squares)
    found, _, _ = search('mppi', spied, mean, samples=50, elites=10, iterations=1, temperature=1e-4)
    first, costs = seen[0]
    assert np.allclose(found, first[np.arange(2), costs.argmin(axis=1)], atol=1e-5)
    found, _, _ = search('mppi', lambda a, i: 0 * squares(a), mean, samples=50, elites=10, iterations=1)
    assert found.isfinite().all(), 'elites of equal cost weigh the same'


def test_adam_is_torchs_adam_from_the_same_starts():
    mix, low_point, best = MIX.double(), LOW_POINT.double(), BEST.double()

    def cost(actions, i=0):
        return (((actions - low_point).flatten(2) @ mix).square().sum(dim=2)
                + (actions[:, :, :2] - best[:, None]).square().sum(dim=(2, 3)))
    spied, seen = watched(cost)
    mean = torch.full((2, 3, 2), -0.6, dtype=torch.float64)
    found, costs, elite = search('adam', spied, mean, -0.7, 0.65, samples=5, elites=3, iterations=25, step_size=0.07)
    x = torch.tensor(seen[0][0], requires_grad=True)
    optimizer, all_costs, all_actions = torch.optim.Adam([x], lr=0.07), [], []
    for i in range(26):
        assert np.allclose(seen[i][0], x.detach().numpy(), atol=1e-12)
        optimizer.zero_grad()
        c = cost(x)
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
def test_an_episode_does_not_depend_on_the_others(method):
    def other(actions, i):
        costs = squares(actions)
        return torch.stack((costs[0], 50 * (actions[1] + 1.7).square().sum(dim=(1, 2))))
    options = dict(samples=40, elites=8, iterations=6, momentum=0.1)
    (a, costs_a, elite_a), (b, costs_b, elite_b) = (search(method, c, torch.zeros_like(BEST), **options)
                                                    for c in (squares, other))
    assert torch.equal(a[0], b[0]) and torch.equal(costs_a[:, 0], costs_b[:, 0]) and torch.equal(elite_a[0], elite_b[0])
    assert (a[1] - b[1]).abs().max() > 0.5


@pytest.mark.parametrize('method', PLANNERS)
def test_a_generator_makes_it_reproducible(method):
    options = dict(samples=40, elites=8, iterations=3)
    a, b, c = (search(method, squares, torch.zeros_like(BEST), seed=s, **options)[0] for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


class Clock:
    """time.perf_counter of a machine on which nothing but `passes` takes time."""
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(plan, 'time', types.SimpleNamespace(perf_counter=lambda: self.now))


@pytest.mark.parametrize('method', PLANNERS)
def test_a_deadline_ends_the_search(method, monkeypatch):
    clock = Clock(monkeypatch)

    def slow(actions, i):
        clock.now += 1.0
        return squares(actions)
    for seconds, n in ((3.5, 3), (4.01, 4), (0.2, 1), (-1.0, 1), (math.inf, 9)):
        cost, seen = watched(slow)
        found, costs, _ = search(method, cost, torch.zeros_like(BEST), samples=20, elites=4, iterations=9,
                                 deadline=clock.now + seconds)
        assert len(costs) == len(seen) and found.isfinite().all()
        assert len(seen) == n + (method == 'adam' and n == 9), 'an iteration that would end too late is not begun'


# ----------------------------------------------------------------------------------------------------------------------
# coloured noise

@pytest.mark.parametrize('H', [1, 2, 3, 5, 30])
@pytest.mark.parametrize('beta', [0.0, 1.0, 2.0, 3.5])
def test_noise_is_gaussian_of_unit_variance_at_every_step(H, beta):
    x = plan.coloured(10, 3000, H, 2, beta, torch.Generator().manual_seed(H)).double().numpy()
    assert x.shape == (10, 3000, H, 2)
    x = x.transpose(0, 1, 3, 2).reshape(-1, H)                                           # (60000, H)
    assert np.abs(x.mean(axis=0)).max() < 0.02 and np.abs((x ** 2).mean(axis=0) - 1).max() < 0.03
    kurtosis = (x ** 4).mean(axis=0) / (x ** 2).mean(axis=0) ** 2
    assert np.abs(kurtosis - 3).max() < 0.15, 'Gaussian, not scaled row by row'
    if beta == 0:
        assert np.abs(x.T @ x / len(x) - np.eye(H)).max() < 0.03, 'white'
    elif H > 3:         # else there is one frequency beside the mean
        assert (x[:, 1:] * x[:, :-1]).mean() > 0.1, 'neighbours go the same way'


@pytest.mark.parametrize('beta', [0.0, 1.0, 2.0, 3.5])
def test_the_power_of_noise_falls_with_frequency(beta):
    x = plan.coloured(1, 2000, 256, 1, beta, torch.Generator().manual_seed(0))[0, :, :, 0].double().numpy()
    power = (np.abs(np.fft.rfft(x, axis=1)) ** 2).mean(axis=0)[1:128]
    slope = np.polyfit(np.log(np.arange(1, 128)), np.log(power), 1)[0]
    assert abs(slope + beta) < 0.03
    assert np.abs(power / power[0] * np.arange(1, 128) ** beta - 1).max() < 0.25, 'at every frequency'


def test_noise_of_actions_candidates_and_episodes_is_independent():
    x = plan.coloured(2, 3000, 8, 2, 2.0, torch.Generator().manual_seed(0)).double().numpy()
    assert abs((x[:, :, :, 0] * x[:, :, :, 1]).mean()) < 0.03
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < 0.03 and abs((x[0] * x[1]).mean()) < 0.03


# ----------------------------------------------------------------------------------------------------------------------
# the cost of a plan, in worlds that are known

class World(torch.nn.Module):
    """Every latent moves by the action of its frame, by `drift` times the sum of the actions known of the past, and by
    `luck` times the noise that the sampler begins from. What remember and rollout need of a model, and no more."""
    def __init__(self, drift=0.0, luck=0.0, z_std=(1.0, 1.0)):
        super().__init__()
        self.config = dict(objective='shortcut' if luck else 'direct', k_max=8, context=100)
        self.stats, self.drift, self.luck, self.calls = {'z_std': torch.tensor(z_std)}, drift, luck, []
        self.register_buffer('a_base', torch.zeros(1))

    def forward(self, z, tau, d, a, a_mask, alone=None, rings=None, start=0, commit=False):
        self.calls.append(dict(z=z.clone(), a=a.clone(), start=start, commit=commit))
        (sums, last), = rings
        if commit:
            if start == 0:      # the context, which for 'direct' comes shifted by a frame
                sums.copy_(torch.where(a_mask[..., None], a, 0.0).sum(dim=1, keepdim=True))
            return None
        before = last if self.luck else z
        out = before + torch.where(a_mask[..., None], a, 0.0)[:, :, None] + self.drift * sums[:, :, None] \
            + (self.luck * z if self.luck else 0.0)
        if self.luck:
            rings[0] = sums, out
        return out

    def new_rings(self, B, T, dtype):
        return [(torch.zeros(B, 1, 2, dtype=dtype), torch.zeros(B, 1, 3, 2, dtype=dtype))]


GOAL = torch.tensor([[1.5, -0.6], [-0.9, 0.3]])[:, None].expand(2, 3, 2)                          # (E, N, D)
EXACT = dict(low=-1.0, high=1.0, samples=300, elites=20, iterations=15, min_std=0.01)


def nowhere(E=2, Tc=2):
    return torch.zeros(E, Tc, 3, 2), torch.zeros(E, Tc, 2)


@pytest.mark.parametrize('method', PLANNERS)
@pytest.mark.parametrize('cost', ['all', 'last'])
def test_plan_reaches_the_goal_in_a_known_world(method, cost):
    options = EXACT | dict(iterations=60 if method == 'adam' else 15, samples=100, beta=1.0)
    found, info = plan.plan(World(), *nowhere(), GOAL, horizon=3, cost=cost, method=method, **options)
    assert found.shape == (2, 3, 2) and (found.sum(dim=1) - GOAL[:, 0]).abs().max() < 0.1
    imagined = info['imagine'](found[:, None])
    assert imagined.shape == (2, 1, 3, 3, 2) and (imagined[:, 0, -1] - GOAL).abs().max() < 0.1
    assert torch.allclose(imagined[:, 0, :, 0], found.cumsum(dim=1), atol=1e-6)
    assert info['cost'].shape[1] == 2 and (info['cost'][-1] <= info['cost'][0]).all()
    assert not found.requires_grad
    if cost == 'all':       # as far as it may at once, then rest
        assert (found[:, 0] - GOAL[:, 0].clamp(-1, 1)).abs().max() < 0.15


def by_hand(actions, z, z_goal, a_last, known, weight, tokens, steps, smooth, risk):
    """The cost of candidates (M, H, A), whose imagined latents are z (S, M, H, N, D), in numpy and float64."""
    z, z_goal, actions, a_last = (np.asarray(v, np.float64) for v in (z, z_goal, actions, a_last))
    total = np.zeros(z.shape[:2])
    for s, m in np.ndindex(*total.shape):
        for t, w in enumerate(steps):
            error = 0
            for n, d in np.ndindex(*z_goal.shape):
                error += tokens[n] * weight[d] * (z[s, m, t, n, d] - z_goal[n, d]) ** 2
            total[s, m] += w / sum(steps) * error / (sum(tokens) * sum(weight))
    total = {'mean': total.mean(axis=0), 'worst': total.max(axis=0),
             'std': total.mean(axis=0) + (total.std(axis=0, ddof=1) if len(z) > 1 else 0)}[risk]
    for m, a in enumerate(actions):
        change = np.diff(a, axis=0)
        first = (a[:1] - a_last) if known else np.zeros((1, a.shape[1]))
        total[m] += smooth * (np.concatenate((first, change)) ** 2).mean()
    return total


@pytest.mark.parametrize('options', [
    dict(), dict(cost='last'), dict(discount=0.6), dict(cost='last', discount=0.6), dict(smooth=0.7),
    dict(tokens=torch.tensor([0.0, 0.2, 1.0])), dict(seeds=3), dict(seeds=3, risk='worst'), dict(seeds=3, risk='std'),
    dict(seeds=1, risk='std'), dict(seeds=2, risk='worst', discount=0.5, smooth=0.3, chunk=4)], ids=str)
@pytest.mark.parametrize('known', [True, False])
def test_the_cost_of_a_plan(options, known):
    o = dict(cost='all', discount=1.0, smooth=0.0, tokens=torch.ones(3), seeds=1, risk='mean') | options
    E, Tc, M, H, z_std = 2, 2, 6, 3, (0.5, 2.0)
    world = World(luck=0.4, z_std=z_std)
    z_ctx, _ = nowhere()
    g = torch.Generator().manual_seed(1)
    a_ctx, z_goal = torch.randn(E, Tc, 2, generator=g), torch.randn(E, 3, 2, generator=g)
    a_mask = torch.tensor([[False, known]] * 2)
    found, info = plan.plan(world, z_ctx, a_ctx, z_goal, horizon=H, a_mask=a_mask, samples=M, elites=M, iterations=1,
                            init_std=0.5, **options)
    calls = [c for c in world.calls if not c['commit']]
    parts = len(calls) // (H * o['seeds'])
    assert parts == (3 if 'chunk' in options else 1)        # 4 candidates at once are 2 for each of two episodes
    per = M // parts
    calls = [calls[i:i + H] for i in range(0, len(calls), H)]
    for e in range(E):
        actions, z = np.zeros((M, H, 2)), np.zeros((o['seeds'], M, H, 3, 2))
        for p in range(parts):
            for s in range(o['seeds']):
                run = calls[p * o['seeds'] + s]
                rows = slice(p * per, (p + 1) * per)
                actions[rows] = torch.cat([c['a'] for c in run], dim=1).unflatten(0, (E, per))[e]
                luck = 0.4 * torch.cat([c['z'] for c in run], dim=1).unflatten(0, (E, per))[e].numpy()
                z[s, rows] = np.cumsum(actions[rows][:, :, None] + luck, axis=1)
        steps = [0] * (H - 1) + [1] if o['cost'] == 'last' else [o['discount'] ** t for t in range(H)]
        costs = by_hand(actions, z, z_goal[e], a_ctx[e, -1], known, [v * v for v in z_std], o['tokens'].tolist(), steps,
                        o['smooth'], o['risk'])
        assert info['cost'][0, e].item() == pytest.approx(costs.min(), rel=1e-4)
        order = costs.argsort()
        assert np.diff(costs[order]).min() > 1e-4 and np.allclose(info['elites'][e], actions[order], atol=1e-6)


def test_discount_and_distance_in_numbers():
    """One latent of one number: 1 and 3 away from the goal after two steps; weights 1 and 1/2: (1 + 9 / 2) / 1.5."""
    world = World()
    z_ctx, a_ctx = nowhere(1, 1)
    z_goal, mean = torch.full((1, 3, 2), 3.0), torch.tensor([[[2.0, 2.0], [-2.0, -2.0]]])
    for options, want in ((dict(discount=0.5), 5.5 / 1.5), (dict(), 5.0), (dict(cost='last'), 9.0),
                          (dict(cost='last', smooth=0.5), 9.0 + 0.5 * (16 + 0) / 2)):
        _, info = plan.plan(world, z_ctx, a_ctx, z_goal, horizon=2, mean=mean, init_std=1e-6, samples=2, elites=2,
                            iterations=1, min_std=0.0, **options)
        assert info['cost'][0, 0].item() == pytest.approx(want, rel=1e-4)


def test_the_last_action_counts_for_smoothness_only_where_it_is_known():
    z_ctx, a_ctx = nowhere(1)
    a_ctx[:, -1] = torch.tensor([2.0, -1.0])
    mean = torch.full((1, 2, 2), 3.0)
    for known, want in ((True, (1 + 16) / 4), (False, 0.0)):
        _, info = plan.plan(World(), z_ctx, a_ctx, 3.0 * torch.tensor([1.0, 2.0])[None, :1, None].expand(1, 3, 2),
                            horizon=2, mean=mean, a_mask=torch.tensor([[False, known]]), init_std=1e-6, samples=2,
                            elites=2, iterations=1, min_std=0.0, smooth=1.0)
        assert info['cost'][0, 0].item() == pytest.approx(want + 9 / 2, rel=1e-4)         # 3 from the goal at the end


def test_masked_tokens_do_not_count():
    z_goal = GOAL.clone()
    z_goal[:, 0] = -GOAL[:, 0]
    found, _ = plan.plan(World(), *nowhere(), z_goal, horizon=3, tokens=torch.tensor([0.0, 1.0, 1.0]), cost='last',
                         **EXACT)
    assert (found.sum(dim=1) - GOAL[:, 0]).abs().max() < 0.1


@pytest.mark.parametrize('method', PLANNERS)
def test_the_size_of_a_chunk_changes_nothing(method):
    options = dict(horizon=3, method=method, seeds=2, risk='std', samples=30, elites=5, iterations=3)
    a, b, c = (plan.plan(World(luck=0.3), *nowhere(), GOAL, chunk=n, **options) for n in (2, 14, 100000))
    for x in (b, c):
        assert torch.allclose(a[0], x[0], atol=1e-5) and torch.allclose(a[1]['cost'], x[1]['cost'], atol=1e-5)


def test_smoothness_and_channel_weights_count():
    z_goal = torch.tensor([[[2.0, 2.0]] * 3])
    options = EXACT | dict(horizon=4, min_std=0.05)
    rough, smooth = (plan.plan(World(), *nowhere(1), z_goal, smooth=s, beta=0.0, **options)[0].diff(dim=1).square()
                     .mean() for s in (0.0, 10.0))
    assert smooth < 0.2 * rough
    found, _ = plan.plan(World(z_std=(1.0, 1e-4)), *nowhere(1), z_goal, beta=0.0, **options)
    assert found[0, 0, 0] > 0.8 and found[0, 0, 1] < 0.7, 'a channel without variance in the data does not count'


@pytest.mark.parametrize('method', PLANNERS)
def test_past_actions_matter_and_the_context_is_computed_once(method):
    world, (z_ctx, a_ctx) = World(drift=0.1), nowhere(2, 3)
    a_ctx[0, 1:] = torch.tensor([[1.0, 2.0], [1.0, -5.0]])
    a_ctx[:, 0] = 1e3                               # what led to the first frame is not known
    options = dict(EXACT, iterations=60, samples=50) if method == 'adam' else EXACT
    found, info = plan.plan(world, z_ctx, a_ctx, GOAL, horizon=3, cost='last', method=method, **options)
    past = torch.tensor([[2.0, -3.0], [0.0, 0.0]])
    assert (found.sum(dim=1) + 3 * 0.1 * past - GOAL[:, 0]).abs().max() < 0.1
    assert [len(c['z'][0]) for c in world.calls if c['start'] == 0] == [3] and world.calls[0]['commit']
    assert all(len(c['z'][0]) == 1 for c in world.calls[1:])
    still = info['imagine'](torch.zeros(2, 1, 3, 2))[:, 0, :, 0]
    assert torch.allclose(still[0], torch.arange(1, 4)[:, None] * 0.1 * past[0]) and still[1].abs().max() == 0
    assert [len(c['z'][0]) for c in world.calls if c['start'] == 0] == [3], 'nor for pictures of the plan'
    unknown, _ = plan.plan(world, z_ctx, a_ctx, GOAL, horizon=3, cost='last', method=method,
                           a_mask=torch.zeros(2, 3, dtype=torch.bool), **options)
    assert (unknown.sum(dim=1) - GOAL[:, 0]).abs().max() < 0.1


def test_candidates_of_an_iteration_share_their_noise():
    world, options = World(luck=1.0), dict(horizon=2, samples=12, elites=4, iterations=3, seeds=2, chunk=8)
    plan.plan(world, *nowhere(), GOAL, **options)
    looks = torch.stack([c['z'] for c in world.calls if not c['commit']]).unflatten(1, (2, -1))   # (.., E, M, 1, N, D)
    assert (looks == looks[:, :, :1]).all(), 'every candidate of an episode'
    looks = looks[:, :, 0].unflatten(0, (3, 3, 2, 2))                               # (iterations, parts, seeds, H, ..)
    assert (looks == looks[:, :1]).all(), 'in every chunk'
    each = looks[:, 0].flatten(0, 2).flatten(1)
    assert len({tuple(x.tolist()) for x in each}) == 12, 'other noise in every iteration, seed and step'
    assert abs(each.mean()) < 0.3 and 0.7 < each.std() < 1.3
    again = World(luck=1.0)
    plan.plan(again, *nowhere(), GOAL, **options)
    assert all(torch.equal(a['z'], b['z']) for a, b in zip(world.calls, again.calls))
    plan.plan(other := World(luck=1.0), *nowhere(), GOAL, seed=1, **options)
    assert not torch.equal(other.calls[-1]['z'], world.calls[-1]['z'])


@pytest.mark.parametrize('risk, bold', [('mean', True), ('std', False), ('worst', False)])
def test_risk_is_what_it_says(risk, bold):
    """Beyond 0.5 the ground is slippery: on average that is the nearer way to the goal, but not for certain."""
    class Slippery(World):
        def forward(self, z, tau, d, a, a_mask, rings=None, start=0, commit=False, **_):
            if commit:
                return None
            slip = (a[:, :, :1] > 0.5) * z.mean(dim=2)[..., :1]
            return (a + slip)[:, :, None].expand(-1, -1, 3, -1)
    z_goal = torch.tensor([[[1.5, 0.0]] * 3])
    found, _ = plan.plan(Slippery(luck=1.0), *nowhere(1), z_goal, horizon=1, seeds=40, risk=risk, beta=0.0, **EXACT)
    assert found[0, 0, 0] > 0.9 if bold else 0.4 < found[0, 0, 0] < 0.55


def test_a_seed_is_a_plan_and_a_mean_is_where_it_begins():
    options = dict(horizon=3, samples=40, elites=8, iterations=2)
    a, b, c = (plan.plan(World(luck=0.2), *nowhere(), GOAL, seed=s, **options)[0] for s in (4, 4, 5))
    assert torch.equal(a, b) and not torch.equal(a, c)
    world, mean = World(), torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0))
    plan.plan(world, *nowhere(), GOAL, mean=mean, **options)
    assert torch.equal(torch.cat([c['a'] for c in world.calls[1:4]], dim=1).unflatten(0, (2, -1))[:, 0], mean)


@pytest.mark.parametrize('method', PLANNERS)
def test_a_time_budget_is_kept(method, monkeypatch):
    clock = Clock(monkeypatch)

    class Slow(World):
        def forward(self, *args, **options):
            clock.now += 0.010
            return super().forward(*args, **options)
    options = dict(horizon=2, samples=8, elites=4, iterations=30, method=method)
    for budget, n in ((95.0, 4), (5.0, 1), (0.0, 30 + (method == 'adam'))):       # 10 ms of context, 20 an iteration
        begun = clock.now
        _, info = plan.plan(Slow(), *nowhere(), GOAL, budget_ms=budget, **options)
        assert len(info['cost']) == n and round((clock.now - begun) / 0.010) == 1 + 2 * n


# ----------------------------------------------------------------------------------------------------------------------
# gradients through a real model

@pytest.fixture
def double(monkeypatch):
    """Float64 throughout: finite differences can be trusted to many digits."""
    monkeypatch.setattr(torch.Tensor, 'float', torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('objective, K', [('shortcut', 1), ('shortcut', 2), ('direct', 1)])
@pytest.mark.parametrize('chunk', [1000, 2])
def test_the_gradient_of_a_plans_cost(double, monkeypatch, objective, K, chunk):
    g = torch.Generator().manual_seed(0)
    net = model.WorldModel(model.model_config('nano', 6, (2, 2), 3, width=16, layers=2, heads=2, kv_heads=1, context=3,
                                              k_max=4, objective=objective)).eval().requires_grad_(False)
    for p in net.parameters():
        p += 0.1 * torch.randn(p.shape, generator=g)
    net.stats = {'z_std': torch.rand(6, generator=g) + 0.5}
    E, Tc, M, H = 2, 2, 3, 3            # longer than what the model sees: what is forgotten has no gradient
    z_ctx, a_ctx, z_goal, at = (torch.randn(s, generator=g) for s in ((E, Tc, 4, 6), (E, Tc, 3), (E, 4, 6),
                                                                     (E, M, H, 3)))
    caught = []
    monkeypatch.setattr(plan, 'adam', lambda cost, mean, *_: caught.append(cost) or (mean, torch.zeros(1, E), mean))
    plan.plan(net, z_ctx, a_ctx, z_goal, horizon=H, method='adam', K=K, seeds=2, risk='std', discount=0.9,
              tokens=torch.tensor([1.0, 2.0, 0.0, 1.0]), smooth=0.1, chunk=chunk)
    at.requires_grad_()
    with torch.enable_grad():
        total = caught[0](at, 0)
        gradient, = torch.autograd.grad(total.sum(), at)
    assert total.shape == (E, M) and gradient.abs().amin(dim=(0, 1, 3)).min() > 0
    with torch.no_grad():
        assert torch.allclose(caught[0](at, 0), total, atol=1e-12)
        for where in ((0, 0, 0, 0), (0, 2, 1, 2), (1, 1, 2, 1), (1, 0, 0, 2), (1, 2, 0, 1)):
            e = torch.zeros_like(at)
            e[where] = 1e-5
            slope = (caught[0](at + e, 0) - caught[0](at - e, 0)).sum() / 2e-5
            assert slope.item() == pytest.approx(gradient[where].item(), rel=1e-5, abs=1e-9)


def tiny(A, objective='shortcut'):
    """A model of actions (A,) whose head, too, does something."""
    torch.manual_seed(0)
    net = model.WorldModel(model.model_config('nano', 6, (2, 2), A, width=16, layers=2, heads=2, kv_heads=1,
                                              context=3, k_max=4, objective=objective)).eval().requires_grad_(False)
    for p in net.parameters():
        p += 0.1 * torch.randn_like(p)
    net.stats = {'z_std': torch.ones(6)}
    return net


def test_adam_descends_in_a_real_model():
    net = tiny(3)
    given = torch.randn(2, 2, 4, 6), torch.randn(2, 2, 3), torch.randn(2, 4, 6)
    found, info = plan.plan(net, *given, horizon=3, method='adam', low=-2.0, high=1.5, samples=6, elites=2,
                            iterations=20)
    assert found.abs().max() <= 2 and found.max() <= 1.5 and (info['cost'].diff(dim=0) <= 0).all()
    assert (info['cost'][-1] < info['cost'][0]).all() and not found.requires_grad


@pytest.mark.parametrize('method', PLANNERS)
def test_the_rows_of_a_step_are_searched_as_steps_of_their_own(method):
    """As a search over six steps of two numbers, where the model is given three at once; the seventh is padding."""
    net, H, rows = tiny(7, 'direct'), 2, 3
    low, high = (torch.tensor(v * rows + [0.0]) for v in ([-2.0, -1.0], [2.0, 0.5]))
    z_ctx, a_ctx, z_goal, mean, carried = (torch.randn(s) for s in ((2, 2, 4, 6), (2, 2, 7), (2, 4, 6), (2, H, 7),
                                                                    (2, 5, 1, 7)))
    given = dict(method=method, samples=8, elites=3, iterations=4)
    found, info = plan.plan(net, z_ctx, a_ctx, z_goal, horizon=H, low=low, high=high, rows=rows, width=2,
                            mean=mean, carried=carried, **given)

    def cost(actions, i):       # (E, M, 6, 2) -> (E, M)
        steps = torch.zeros(*actions.shape[:2], H, 7)
        for t in range(H * rows):
            steps[:, :, t // rows, t % rows * 2:t % rows * 2 + 2] = actions[:, :, t]
        z = info['imagine'](steps, grad='all' if torch.is_grad_enabled() else False)
        return (z - z_goal[:, None, None]).square().mean(dim=(2, 3, 4))

    def apart(v):
        return torch.stack([v[..., t // rows, t % rows * 2:t % rows * 2 + 2] for t in range(v.shape[-2] * rows)], -2)

    with torch.no_grad():
        want, best, elite = getattr(plan, method)(
            cost, apart(mean), torch.ones(2, H * rows, 2), low[:2], high[:2], beta=2.0, carried=apart(carried),
            generator=torch.Generator().manual_seed(0), **{k: v for k, v in given.items() if k != 'method'})
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(apart(found), want)
    close(info['cost'], best)
    close(apart(info['elites']), elite)
    assert found[..., 6].eq(0).all() and found.std() > 0.1


@pytest.mark.parametrize('beta', [0.0, 1.0, 2.0])
def test_noise_is_coloured_over_the_rows_of_all_steps(monkeypatch, beta):
    """The correlation of rows is the Fourier transform of the power, also from the last row of a step to the next."""
    H, rows, M = 3, 4, 20000
    monkeypatch.setattr(plan, 'remember', lambda *_, **__: None)
    monkeypatch.setattr(plan, 'rollout', lambda net, z, a, *_, **__: torch.zeros(len(a), H, 3, 2))
    _, info = plan.plan(World(), torch.zeros(1, 2, 3, 2), torch.zeros(1, 2, 2 * rows), GOAL[:1], horizon=H, samples=M,
                        elites=M, iterations=1, beta=beta, rows=rows, low=-50.0, high=50.0)
    seen, n = info['elites'].reshape(M, H * rows, 2), H * rows
    f = torch.tensor([1, *range(1, n // 2 + 1)]) / n
    power = f ** -beta * torch.tensor([1.0, *[2.0] * (n // 2 - 1), 1.0])
    want = [(power * torch.cos(2 * math.pi * torch.arange(n // 2 + 1) * k / n)).sum() / power.sum() for k in range(n)]
    got = torch.einsum('msa,mta->st', seen, seen) / (2 * M)
    for s in range(n):
        for t in range(n):
            assert abs(got[s, t] - want[abs(s - t)]) < 0.04, (s, t)


# ----------------------------------------------------------------------------------------------------------------------
# the controller

QUICK = ('--samples=6', '--elites=2', '--iterations=1', '--horizon=2', '--dtype=float32', '--device=cpu')
SMALL_SEARCH = dict(samples=6, elites=2, iterations=2, horizon=3, dtype='float32', device='cpu')


@pytest.fixture
def controller(trained):
    return lambda **options: plan.Planner(str(trained / 'ckpt.safetensors'), plan.config | SMALL_SEARCH | options,
                                          tell=False)


def film(E, n, seed=0):
    """Pictures (E, n, 64, 64, 3) of other places each."""
    rng = np.random.default_rng(seed)
    return data.demo_draw(data.demo_start(E * n, rng)).reshape(E, n, 64, 64, 3)


@pytest.fixture
def planned(monkeypatch):
    """What plan.plan was given, call by call, and what it answered: a known function of the latest latents."""
    calls = []

    def fake(net, z, a, z_goal, a_mask=None, mean=None, carried=None, seed=0, horizon=5, samples=6, elites=2, **search):
        E, A = z.shape[0], a.shape[2]
        place = (z[:, -1].mean(dim=1)[:, :3].sum(dim=1) + z_goal.mean(dim=(1, 2)) + a[:, -1].sum(dim=1))[:, None]
        found = torch.sin(3 * place + torch.arange(horizon * A).float()).unflatten(1, (horizon, A))
        elite = torch.stack((found, -0.5 * found), dim=1)
        calls.append(dict(z=z.clone(), a=a.clone(), z_goal=z_goal.clone(), a_mask=a_mask.clone(), mean=mean,
                          carried=carried, seed=seed, found=found, elite=elite, init_std=search['init_std']))
        return found, {'cost': torch.zeros(2, E), 'elites': elite}
    monkeypatch.setattr(plan, 'plan', fake)
    return calls


@pytest.mark.parametrize('method', PLANNERS)
def test_one_robot_or_a_batch_of_one(controller, method):
    x, goal = film(1, 8), film(1, 1, seed=1)[:, 0]
    one, batch = controller(method=method), controller(method=method)
    for t in range(3, 8):
        given = slice(0, 3) if t == 3 else slice(t - 1, t)
        a, b = one.act(x[0, given], goal[0]), batch.act(x[:, given], goal)
        assert a.shape == (2,) and b.shape == (1, 2) and np.array_equal(a, b[0])
    low, high = data.DEMO_STEP * -1.001, data.DEMO_STEP * 1.001
    assert low <= a.min() and a.max() <= high


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
    assert len(together.seconds) == len(together.iterations) == 3 and together.iterations == [2, 2, 2]
    assert all(s > 0 for s in together.seconds)


def by_the_numbers(p, rows):
    """Rows (.., n, width) as the model knows actions: n at a time, in numpy."""
    mean, std = (p.model.stats[f'a_{k}'][0].numpy() for k in ('mean', 'std'))
    return ((rows.reshape(*rows.shape[:-2], -1) - mean) / std).clip(-5, 5)


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
    for k, call in enumerate(planned):
        frame = 6 + k * f * replan
        shown = [frame - 4, frame - 2, frame]
        assert torch.allclose(call['z'], p.latents(x[:, shown]), atol=1e-5)
        assert torch.allclose(call['z_goal'], p.latents(goals), atol=1e-5)
        for j in (1, 2):
            known = told != 'not the first' or shown[j - 1] >= 6
            assert (call['a_mask'][:, j] == known).all()
            if known:
                assert np.allclose(call['a'][:, j], by_the_numbers(p, rows[:, shown[j - 1]:shown[j]]), atol=1e-4)
        assert not call['a_mask'][:, 0].any(), 'what led to the first picture is out of sight'
        mean, std = (p.model.stats[f'a_{m}'][0].numpy() for m in ('mean', 'std'))
        want = (call['found'][:, :replan].numpy() * std + mean).reshape(E, replan * f, 2)
        got = returned[k * replan * f:(k + 1) * replan * f]
        assert np.allclose(np.stack(got, axis=1), want[:, :len(got)], atol=1e-6)
    assert len({call['seed'] for call in planned}) == len(planned), 'other noise in every search'


@pytest.mark.parametrize('warm', [True, False])
@pytest.mark.parametrize('replan', [1, 2])
@pytest.mark.parametrize('warm_std', [0.0, 0.25])
def test_a_plan_begins_from_the_last_one(controller, planned, warm, replan, warm_std):
    p = controller(warm=warm, replan=replan, warm_std=warm_std, init_std=0.75)
    x, goal = film(2, 20), film(2, 1, seed=1)[:, 0]
    p.act(x[:, :3], goal)
    for t in range(3, 4 + 4 * replan):
        p.act(x[:, t:t + 1], goal)
    assert len(planned) == 3 and planned[0]['mean'] is None and planned[0]['carried'] is None
    assert [c['init_std'] for c in planned] == [0.75, *[warm_std if warm and warm_std else 0.75] * 2]
    for before, call in itertools.pairwise(planned):
        if warm:
            assert torch.equal(call['mean'][:, :3 - replan], before['found'][:, replan:])
            assert call['mean'].shape == before['found'].shape and not call['mean'][:, 3 - replan:].any()
            assert torch.equal(call['carried'], before['elite'][:, :, replan:])
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


def test_a_goal_is_encoded_once(controller, planned):
    p, x, goals = controller(replan=2), film(2, 20), film(2, 2, seed=1)
    encode, seen = p.encode, []
    p.encode = lambda frames: seen.append(len(frames)) or encode(frames)
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


def test_what_act_refuses(controller):
    p, x = controller(), film(1, 3)[0]
    with pytest.raises(ValueError, match=r'\b2 frames.* 3\b') as error:
        p.act(x[:2], x[0])
    assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match='64 x 32 pixels.* 64 x 64'):
        p.act(x, x[0, :32])
    p.act(x, data.demo_draw(data.demo_start(1, np.random.default_rng(5)), 96)[0])      # larger, but of the same aspect


def test_units_there_and_back(controller):
    p = controller()
    rows = np.random.default_rng(0).uniform(-0.05, 0.05, (4, 2, 2)).astype(np.float32)
    assert torch.allclose(p.physical(p.normalised(rows)), torch.from_numpy(rows), atol=1e-6)
    assert np.allclose(p.normalised(rows), by_the_numbers(p, rows), atol=1e-5)


def test_each_search_is_told(trained, capsys):
    p = plan.Planner(str(trained / 'ckpt.safetensors'), plan.config | SMALL_SEARCH)
    x = film(1, 5)[0]
    p.act(x[:3], x[0])
    p.act(x[3], x[0])
    p.act(x[4], x[0])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and 'plan 2:' in lines[1] and '2 iterations' in lines[1] and ' ms' in lines[1]


def test_random_weights_are_another_model_of_the_same_shape(controller):
    p = controller()
    blind = plan.random_weights(p, 3)
    assert all(a.shape == b.shape for a, b in zip(p.model.state_dict().values(), blind.model.state_dict().values()))
    x, goal = film(1, 3), film(1, 1, seed=1)[:, 0]
    kept = {k: v.clone() for k, v in p.model.state_dict().items()}
    a, b = p.act(x, goal), blind.act(x, goal)
    assert not np.allclose(a, b) and len(p.seconds) == len(blind.seconds) == 1
    assert all(torch.equal(v, p.model.state_dict()[k]) for k, v in kept.items())
    again = plan.random_weights(p, 3)
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in blind.model.state_dict().items())
    far = blind.model(torch.randn(1, 1, 16, 24), *torch.ones(2, 1, 1), torch.randn(1, 1, 4), torch.ones(1, 1) > 0)
    assert far.std() > 0.01, 'it imagines something, only nothing that was learned'


# ----------------------------------------------------------------------------------------------------------------------
# simulators

ROBOTS = 'demo', 'gym_pusht/PushT-v0', 'PointMaze_UMaze-v3', 'FetchReach-v4', 'FetchPush-v4'
SHIFTS = 'light', 'background', 'object', 'camera'


@functools.cache
def made(env, size, **options):
    return data.simulator(env, size, **options)


def robot(env, size=(64, 64), new=False, **options):
    """Skips where a simulator's package is not installed, or cannot draw."""
    try:
        return (data.simulator if new else made)(env, size, **options)
    except SystemExit as why:
        assert 'needs: pip install' in why.code or 'cannot draw' in why.code, why.code
        pytest.skip(why.code)


def moved(sim, steps, seed=0):
    """The simulator after some steps of its script; its states and actions."""
    rng, states, actions = np.random.default_rng(seed), [], []
    sim.reset(seed)
    act = sim.script(rng)
    for _ in range(steps):
        states.append(sim.state())
        actions.append(np.array(act()))
        sim.step(actions[-1])
    return states, actions


@pytest.mark.parametrize('env', ROBOTS)
def test_restore_is_exact(env):
    """Poses and pictures, and where the class says so, all that follows, to the last bit."""
    sim = robot(env)
    states, actions = moved(sim, 60)
    states.append(sim.state())
    poses, shown = [], []
    for state in states:
        sim.restore(state)
        poses.append(sim.pose())
        shown.append(sim.frame())
        assert np.array_equal(sim.state(), state)
    assert len(np.unique(np.round(poses, 6), axis=0)) > 40
    for begin in (50, 7, 33):
        sim.restore(states[begin])
        assert np.array_equal(sim.pose(), poses[begin]) and np.array_equal(sim.frame(), shown[begin])
        for t in range(begin, 60):
            sim.step(actions[t])
            if sim.exact:
                assert np.array_equal(sim.state(), states[t + 1]) and np.array_equal(sim.pose(), poses[t + 1])
        if sim.exact:
            assert np.array_equal(sim.frame(), shown[60]), 'a picture tells the state, not how it came about'
    assert sim.exact == (env != 'gym_pusht/PushT-v0')


def test_the_block_of_pusht_is_put_where_it_was():
    sim = robot('gym_pusht/PushT-v0')
    _, _ = moved(sim, 40)
    state = np.array([100.0, 200, 0, 0, 0, 0, 300, 250, 0, 0, 2.5, 0])
    for angle in (2.5, -1.0, 9.0):
        state[10] = angle
        sim.restore(state)
        assert np.allclose(sim.pose(), [100, 200, 300, 250, angle], rtol=0, atol=1e-9)
        assert np.allclose(sim.world.block.position, (300, 250)) and sim.world.block.angle == angle
    assert np.allclose(sim.world.block.local_to_world((0, 0)), (300, 250))


@pytest.mark.parametrize('env', ROBOTS)
def test_a_shift_changes_pictures_and_nothing_else(env):
    """All simulators live at once, as in the closed loop, and each draws its own world."""
    plain, again, others = robot(env), robot(env, new=True), {s: robot(env, shift=s) for s in SHIFTS}
    states, actions = moved(plain, 40)
    moved(again, 20, seed=1)
    for state in states[::13]:
        plain.restore(state)
        x = plain.frame().astype(int)
        assert x.std() > 5 and x.shape == (64, 64, 3)
        again.restore(state)
        assert np.array_equal(again.frame(), x)
    for name, sim in others.items():
        differences = []
        for state in states[::13]:
            sim.restore(state)
            plain.restore(state)
            assert np.array_equal(sim.pose(), plain.pose())
            differences.append(np.abs(sim.frame().astype(int) - plain.frame()).mean())
        assert max(differences) > (0.05 if name == 'object' else 0.5), name
        for a in actions[:10] if sim.exact else ():
            sim.step(a)
            plain.step(a)
        assert np.array_equal(sim.pose(), plain.pose())
    views = [others[s].frame() for s in SHIFTS]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(views, 2))


@pytest.mark.parametrize('env', ROBOTS[2:])
def test_the_goal_of_the_package_is_not_drawn(env):
    sim = robot(env)
    moved(sim, 5)
    state, target = sim.state(), sim.model.site('target' if sim.maze else 'target0')
    x, at = sim.frame(), target.pos.copy()
    target.pos[:] = (1.0, 0.0, 0.2) if sim.maze else (1.3, 0.7, 0.5)
    sim.restore(state)
    assert np.array_equal(sim.frame(), x)
    target.rgba[3] = 1
    assert not np.array_equal(sim.frame(), x), 'it would be seen'
    target.rgba[3], target.pos[:] = 0, at
    for seed in range(3):
        sim.reset(seed)
        sim.step(sim.rest())
        assert target.rgba[3] == 0


def test_neither_goal_nor_action_are_drawn_in_pusht():
    sim = robot('gym_pusht/PushT-v0', (512, 512))
    states, _ = moved(sim, 40)
    for state in [sim.state(), *states[::4]]:
        x = sim.frame().astype(int)
        sim.restore(state)
        assert not ((x[..., 1] > x[..., 0] + 30) & (x[..., 1] > x[..., 2] + 30)).any(), 'the green T'
        assert not ((x[..., 0] > x[..., 1] + 60) & (x[..., 0] > x[..., 2] + 60)).any(), 'the red cross, or contacts'
        assert ((x[..., 2] > x[..., 0] + 60).sum() > 200) and (np.ptp(x, axis=2) < 40).mean() > 0.5, 'agent and block'


@pytest.mark.parametrize('key', ['action', 'action.relative'])
def test_keys_of_pushts_actions_mean_the_same(key):
    """The script plays alike whichever of the two the model was trained with, and moves the block now and then."""
    sim, relative = (robot('gym_pusht/PushT-v0', new=True, key=k) for k in (key, 'action.relative'))
    far = 0
    for seed in range(3):
        for s in (sim, relative):
            s.reset(seed)
        a, b = sim.script(np.random.default_rng(seed)), relative.script(np.random.default_rng(seed))
        begin = sim.pose()
        for _ in range(60):
            sim.step(a())
            relative.step(b())
            assert np.allclose(sim.pose(), relative.pose(), atol=1e-6)
        far = max(far, np.linalg.norm((sim.pose() - begin)[2:4]))
    assert far > 20
    agent = sim.pose()[:2]
    columns = sim.columns(np.array([30.0, 20.0]) if key == 'action.relative' else agent + (30, 20))
    assert np.allclose(columns['action'], (agent + (30, 20)).clip(0, 512))
    assert np.allclose(columns['action.relative'], columns['action'] - agent)
    rest = sim.pose()[:2]
    sim.restore(sim.state() * [1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1, 0])
    for _ in range(3):
        sim.step(sim.rest())
    assert np.allclose(sim.pose()[:2], rest, atol=0.5), 'rest holds still'


def test_the_script_of_pusht_rests_now_and_then():
    sim, rest = robot('gym_pusht/PushT-v0', key='action.relative'), []
    for seed in range(6):
        sim.reset(seed)
        act = sim.script(np.random.default_rng(seed))
        for _ in range(50):
            action = act()
            rest.append(not action.any())
            sim.step(action)
    assert 0.02 < np.mean(rest) < 0.3
    runs = [len(list(run)) for still, run in itertools.groupby(rest) if still]
    assert np.mean(runs) > 5, 'for some frames, as at a goal'


@pytest.mark.parametrize('env, n', [('PointMaze_UMaze-v3', 7), ('PointMaze_Medium-v3', 26)])
def test_the_whole_maze_is_in_the_picture(env, n):
    sim = robot(env, (112, 112))
    free = np.argwhere(np.asarray(sim.maze.maze_map, object) != 1)
    assert len(free) == n
    for cell in free:
        for corner in itertools.product((-0.4, 0.4), repeat=2):         # the ball's radius is 0.1
            sim.data.qpos[:] = sim.maze.cell_rowcol_to_xy(cell) + corner
            x = sim.frame().astype(int)
            y, x = np.nonzero((x[..., 1] > x[..., 0] + 20) & (x[..., 1] > x[..., 2] + 20))
            assert len(y) >= 8 and 0 < min(*y, *x) and max(*y, *x) < 111, 'green, and clear of the border'


def test_far_of_pusht_wraps_its_angle():
    far = data.PushT.far
    goal = np.array([100.0, 100, 300, 300, 0.1])
    for turns in (-2, -1, 0, 1, 3):
        for off, ok in ((0, True), (np.pi / 9 - 0.01, True), (-np.pi / 9 + 0.01, True), (np.pi / 9 + 0.01, False),
                        (-np.pi / 9 - 0.01, False), (np.pi, False), (np.pi - 0.1, False), (2, False), (-2, False)):
            gap, reached = far(None, goal + [0, 0, 0, 0, off + 2 * np.pi * turns], goal, None)
            assert reached == ok and gap == 0
    assert far(None, goal + [10, 10, 10, 9, 0], goal, None) == (pytest.approx(381 ** .5), True)
    assert far(None, goal + [10, 10, 10, 11, 0], goal, None) == (pytest.approx(421 ** .5), False)
    assert far(None, goal + [25, 0, 0, 0, 0], goal, None)[1] == False, 'the agent counts too'      # noqa: E712


def test_a_cube_off_the_table_is_not_asked_for():
    sim = robot('FetchPush-v4')
    sim.reset(0)
    begin = sim.pose()
    pushed = begin + [0, 0, 0, 0.1, 0, 0]
    assert begin[5] > 0.4 and sim.asks(0, begin, pushed) and not sim.asks(0, begin, begin)
    sim.world._utils.set_joint_qpos(sim.model, sim.data, 'object0:joint', [2.0, 0.7, 0.45, 1, 0, 0, 0])
    for _ in range(20):
        sim.step(sim.rest())
    assert sim.pose()[5] < 0.4 and not sim.asks(0, begin, sim.pose()) and not sim.asks(0, sim.pose(), begin)


def test_what_counts_as_reached_in_the_demo_world():
    far, begin = data.Demo().far, np.array([0.2, 0.2, 0.5, 0.5])
    push, reach = np.array([0.4, 0.4, 0.7, 0.5]), np.array([0.6, 0.2, 0.5, 0.5])
    assert far(np.array([0.9, 0.9, 0.63, 0.5]), push, begin) == (pytest.approx(0.07), True)
    assert far(np.array([0.4, 0.4, 0.61, 0.5]), push, begin) == (pytest.approx(0.09), False)
    assert far(np.array([0.6, 0.27, 0.1, 0.1]), reach, begin) == (pytest.approx(0.07), True)
    assert far(np.array([0.6, 0.29, 0.5, 0.5]), reach, begin) == (pytest.approx(0.09), False)


# ----------------------------------------------------------------------------------------------------------------------
# the closed loop

def questions(env, n, goals, goal_steps, past=3, seed=0, **options):
    sim = robot(env, **options)
    sims = [sim] * n if sim.exact else [robot(env, new=True, **options) for _ in range(n)]
    rng = np.random.default_rng(seed)
    return sims, [plan.question(s, i, rng, goals, goal_steps, past) for i, s in enumerate(sims)]


@pytest.mark.parametrize('env, goal_steps, n, least, key', [
    ('demo', 10, 20, 1.0, 'action'), ('gym_pusht/PushT-v0', 25, 10, 0.9, 'action'),
    ('gym_pusht/PushT-v0', 25, 10, 0.9, 'action.relative'), ('PointMaze_UMaze-v3', 100, 6, 1.0, 'action'),
    ('FetchReach-v4', 25, 4, 1.0, 'action'), ('FetchPush-v4', 25, 4, 1.0, 'action')])
def test_the_script_itself_reaches_its_goals_and_rest_does_not(env, goal_steps, n, least, key):
    sims, asked = questions(env, n, 'expert', goal_steps, key=key)
    for policy, reaches in (('expert', True), ('zero', False)):
        def act(frames, goals, past, t):
            return [q['expert'][t] if policy == 'expert' and t < goal_steps else s.rest() for s, q in zip(sims, asked)]
        poses, actions, _, _ = plan.play(act, sims, asked, goal_steps + 1, False)
        assert poses.shape[:2] == (goal_steps + 2, n) and actions.shape[:2] == (goal_steps + 1, n)
        assert np.allclose(poses[0], [q['begin'] for q in asked], atol=1e-9)
        far = [s.far(p, q['pose'], q['begin']) for s, p, q in zip(sims, poses[goal_steps], asked)]
        ok = np.mean([reached for _, reached in far])
        rolls_on = 0.5 if sims[0].exact and env != 'demo' else 0
        assert ok >= least if reaches else ok <= rolls_on
        if reaches and sims[0].exact:
            assert max(gap for gap, _ in far) == 0


@pytest.mark.parametrize('env', ROBOTS)
def test_random_goals_are_elsewhere_and_at_rest(env):
    sims, asked = questions(env, 4, 'random', 0)
    for i, (sim, q) in enumerate(zip(sims, asked)):
        assert not sim.far(q['begin'], q['pose'], q['begin'])[1] and q['expert'] == []
        sim.restore(q['goal'])
        assert np.array_equal(sim.pose(), q['pose'])
        for _ in range(3):
            sim.step(sim.rest())
        assert sim.far(sim.pose(), q['pose'], q['begin'])[1], 'a goal that does not stay cannot be held'
        assert len(q['states']) == 3 and q['actions'].shape == (2, len(sim.rest()))
        sim.restore(q['states'][-1])
        assert np.array_equal(sim.pose(), q['begin'])
    assert len(np.unique([q['pose'] for q in asked], axis=0)) == 4


@pytest.mark.parametrize('goals', ['expert', 'random'])
def test_a_seed_is_a_set_of_questions(goals):
    first, again, other = ([np.hstack([q['begin'], q['pose'], *map(np.ravel, (q['actions'], q['expert']))])
                            for q in questions('demo', 6, goals, 10, seed=s)[1]] for s in (0, 0, 1))
    assert np.array_equal(first, again) and not any((a == b).all() for a, b in zip(first, other))


def test_the_past_of_a_question_is_what_happened():
    sims, asked = questions('demo', 6, 'expert', 10, past=4)
    for sim, q in zip(sims, asked):
        assert len(q['states']) == 4 and q['actions'].shape == (3, 2)
        for before, action, after in zip(q['states'], q['actions'], q['states'][1:]):
            sim.restore(before)
            sim.step(action)
            assert np.array_equal(sim.state(), after)
        for action in q['expert']:
            sim.step(action)
        assert np.array_equal(sim.state(), q['goal'])


def test_what_a_policy_sees():
    """At first the pictures and actions of the past, then one picture at a time, of the world that it acts in."""
    sims, asked = questions('demo', 3, 'expert', 10)
    seen = []

    def policy(frames, goals, past, t):
        seen.append((frames.copy(), goals.copy(), past))
        return np.full((3, 2), 0.01 * t)
    poses, actions, shown, goals = plan.play(policy, sims, asked, 5, True)

    def drawn(state):
        sims[0].restore(state)
        return sims[0].frame()
    assert len(seen) == 5 and len(poses) == len(shown) == 6
    assert np.array_equal(seen[0][0], [[drawn(s) for s in q['states']] for q in asked])
    assert np.array_equal(seen[0][2], [q['actions'] for q in asked]) and all(s[2] is None for s in seen[1:])
    for t in range(1, 5):
        assert np.array_equal(seen[t][0], [[drawn(p)] for p in poses[t]])
    assert all(np.array_equal(s[1], [drawn(q['goal']) for q in asked]) for s in seen)
    assert np.array_equal(shown, [[drawn(p) for p in row] for row in poses]) and np.array_equal(goals, seen[0][1])
    assert np.allclose(actions[:, :, 0], 0.01 * np.arange(5)[:, None])
    for t in range(5):
        assert np.allclose(data.demo_step(poses[t], actions[t]), poses[t + 1])


@pytest.fixture
def guarded(monkeypatch):
    """Every method of the simulators fails while a planner acts; counts of those that the closed loop calls."""
    calls = []

    def guard(f):
        def method(*args, **options):
            frame, stack = sys._getframe(1), []
            while frame:
                stack.append((os.path.basename(frame.f_code.co_filename), frame.f_code.co_name))
                frame = frame.f_back
            assert ('plan.py', 'act') not in stack, f'{f.__name__} while planning'
            if ('plan.py', 'play') in stack:
                calls.append(f.__name__)
            return f(*args, **options)
        return method
    for name in ('Demo', 'Gym', 'PushT', 'Mujoco'):
        cls = getattr(data, name)
        for k, f in vars(cls).items():
            if isinstance(f, types.FunctionType) and k != '__init__':
                monkeypatch.setattr(cls, k, guard(f))
    for k in ('demo_step', 'demo_draw', 'demo_start', 'demo_script'):
        monkeypatch.setattr(data, k, guard(getattr(data, k)))
    return calls


def test_the_guard_would_notice(guarded):
    inside = {'sim': data.Demo()}
    exec(compile('def act(): return sim.state()', str(ROOT / 'plan.py'), 'exec'), inside)
    with pytest.raises(AssertionError, match='state while planning'):
        inside['act']()


METHODS = ['model', 'model, light', 'model, camera', 'random weights', 'random', 'zero', 'mean', 'expert']


def test_closed_loop_leaves_its_report(trained, guarded):
    g = script('plan.py', f'--ckpt={trained}/ckpt.safetensors', '--episodes=4', '--budget=6', '--shift=light,camera',
               '--seed=3', *QUICK)
    report = json.loads((trained / 'plan.json').read_text())
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
    with av.open(str(trained / 'plan.mp4')) as video:
        assert video.streams.video[0].frames >= 7
    # the budget, for every method: steps of the world itself, none of them while planning
    assert guarded.count('step') == guarded.count('demo_step') == len(METHODS) * 4 * 6
    # jerk of the script, in units of the action per second squared: second differences at 10 steps a second
    a = np.array([q['expert'][:6] for q in g['questions']])                                           # (4, 6, 2)
    second = [a[e, t] - 2 * a[e, t + 1] + a[e, t + 2] for e in range(4) for t in range(4)]
    assert report['methods']['expert']['jerk'] == pytest.approx(np.mean([(100 * s) @ (100 * s) for s in second]))
    assert report['methods']['zero']['jerk'] == 0 < report['methods']['random']['jerk']


def test_every_method_is_asked_the_same(trained, tmp_path):
    asked, ends_at = [], []
    for method, seed in (('cem', 3), ('mppi', 3), ('cem', 4)):
        g = script('plan.py', f'--ckpt={trained}/ckpt.safetensors', f'--out_dir={tmp_path / method}', '--episodes=3',
                   '--budget=2', f'--method={method}', f'--seed={seed}', *QUICK)
        asked.append(np.array([np.hstack((q['begin'], q['goal'])) for q in g['questions']]))
        ends_at.append([g['methods'][k]['distance_end'] for k in ('zero', 'random', 'mean', 'expert')])
        with pytest.raises(AssertionError):
            np.testing.assert_array_equal(g['poses'][0], g['poses'][-1])
    assert np.array_equal(asked[0], asked[1]) and not (asked[0] == asked[2]).any()
    assert ends_at[0] == ends_at[1] != ends_at[2]


@pytest.mark.parametrize('goals', ['expert', 'random'])
def test_doing_nothing_gets_nowhere_and_the_script_does(trained, tmp_path, goals):
    script('plan.py', f'--ckpt={trained}/ckpt.safetensors', f'--out_dir={tmp_path}', f'--goals={goals}',
           '--episodes=20', '--budget=12', '--replan=2', '--seed=3', *QUICK)
    methods = json.loads((tmp_path / 'plan.json').read_text())['methods']
    assert methods['zero']['success_end'] == methods['mean']['success_end'] == methods['zero']['success_ever'] == 0
    assert methods['random']['success_end'] < 0.25 and methods['random weights']['success_end'] < 0.5
    assert methods['zero']['steps'] is None
    if goals == 'expert':
        assert methods['expert']['success_end'] == 1 and methods['expert']['steps'] <= 10
    else:
        assert 'expert' not in methods


def test_a_model_trained_in_pusht_is_tried_there(tmp_path):
    """From recording to the report, with the actions as they were recorded."""
    robot('gym_pusht/PushT-v0')
    data.write_lerobot(tmp_path / 'd', *data.record('gym_pusht/PushT-v0', 4, 24, 'script', 0, size=(64, 64)))
    for key in ('action', 'action.relative'):
        out = tmp_path / key
        script('train.py', f'--labelled={tmp_path / "d"}', '--unlabelled=', f'--action={key}', *SMALL, '--max_steps=1',
               '--workers=0', '--frames=3', f'--out_dir={out}')
        g = script('plan.py', f'--ckpt={out}/ckpt.safetensors', '--env=gym_pusht/PushT-v0', '--episodes=3',
                   '--budget=26', '--replan=2', *QUICK)
        assert g['report']['methods']['expert']['success_ever'] >= 0.6 > g['report']['methods']['zero']['success_ever']
        assert g['report']['goal_steps'] == 25 and (out / 'plan.mp4').is_file()
        assert len({id(s) for s in g['sims']}) == 3


def test_wilson_interval():
    assert plan.wilson(0, 10) == pytest.approx([0.0, 0.2775], abs=1e-3)         # Newcombe 1998, and by hand
    assert plan.wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-3)
    assert plan.wilson(10, 10)[1] == 1.0


# ----------------------------------------------------------------------------------------------------------------------
# two pictures, a folder of pictures, mistakes

def pictures(folder, n=2):
    for i in range(n):
        state = np.array([[0.2 + 0.3 * i / (n - 1), 0.5, 0.7, 0.6]])
        data.write_image(folder / f'{i}.png', torch.from_numpy(data.demo_draw(state, 80)[0]).permute(2, 0, 1))
    return folder / '0.png', folder / f'{n - 1}.png'


def script_ends(*options):
    with pytest.raises(SystemExit) as e:
        script('plan.py', *options)
    assert e.value.code in (None, 0)


@pytest.mark.parametrize('method', PLANNERS)
def test_a_plan_between_two_pictures(trained, tmp_path, capsys, method):
    now, goal = pictures(tmp_path)
    script_ends(f'--ckpt={trained}/ckpt.safetensors', f'--out_dir={tmp_path / "o"}', f'--start={now}',
                f'--goal={goal}', f'--method={method}', *QUICK)
    actions = np.load(tmp_path / 'o' / 'plan.npy')
    assert actions.shape == (2 * 2, 2), 'one row per dataset step, in physical units'
    assert np.abs(actions).max() <= data.DEMO_STEP + 1e-6
    said = capsys.readouterr().out
    assert '4 actions in' in said and 'plan.mp4' in said
    with av.open(str(tmp_path / 'o' / 'plan.mp4')) as video:
        assert video.streams.video[0].frames == 3


@pytest.mark.parametrize('options, words', [
    (['--ckpt=nowhere.safetensors'], 'nowhere.safetensors: not a readable checkpoint'),
    (['--ckpt={tmp}/cut.safetensors'], 'cut.safetensors: not a readable checkpoint'),
    (['--start={now}'], '--goal'), (['--goal={goal}'], '--start'), (['--watch={tmp}'], '--goal'),
    (['--start={now}', '--goal={goal}', '--watch={tmp}'], '--watch'),
    (['--watch={tmp}/nowhere', '--goal={goal}'], '--watch={tmp}/nowhere: no such folder'),
    (['--watch={now}', '--goal={goal}'], 'no such folder'),
    (['--watch={tmp}', '--goal={tmp}/none.png'], 'none.png: not a readable picture'),
    (['--start={now}', '--goal={tmp}/text.png'], 'text.png: not a readable picture'),
    (['--start={now}', '--goal={tmp}/none.png'], 'none.png: not a readable picture'),
    (['--start={tmp}/none.png', '--goal={goal}'], 'none.png: not a readable picture'),
    (['--start={now}', '--goal={tmp}/wide.png'], 'wide.png: is 80 x 40 pixels, --start={now} 80 x 80'),
    (['--mask={tmp}/black.png'], 'black.png: is black'),
    (['--mask={tmp}/none.png'], 'none.png: not a readable picture'),
    (['--K=3'], '--K=3: wants a power of two up to 8'), (['--K=16'], '--K=16'), (['--K=0'], '--K=0'),
    (['--cost=best'], '--cost: wants one of all, last'), (['--goals=none'], '--goals: wants one of expert, random'),
    (['--method=sgd'], '--method: wants one of cem, icem, mppi, adam'), (['--risk=best'], '--risk: wants one of mean'),
    (['--dtype=float16'], '--dtype'), (['--device=tpu'], '--device=tpu'), (['--shift=fog'], '--shift'),
    (['--shift=light,fog'], 'fog'), (['--env=nowhere'], '--env=nowhere: closed loop wants demo'),
    (['--env=CartPole-v1'], '--env=CartPole-v1: closed loop wants demo'), (['--goal_steps=2'], '--goal_steps=2'),
    (['--goal_steps=-5'], '--goal_steps'), (['--episodes=0'], '--episodes: wants at least 1, got 0'),
    (['--budget=-1'], '--budget: wants at least 1, got -1'), (['--elites=1'], '--elites=1'),
    (['--elites=7'], '--elites=7: wants 2 to samples=6'), (['--replan=3'], '--replan=3: a plan has only horizon=2'),
    (['--horizn=3'], 'did you mean --horizon?'), (['--horizon', '3'], 'write options as --name=value'),
    *(([f'--{name}={value}'], f'--{name}: wants') for name, value in (
        ('horizon', 0), ('samples', 0), ('iterations', 0), ('replan', 0), ('seeds', 0), ('seed', -1), ('init_std', 0),
        ('warm_std', -1),
        ('min_std', -1), ('keep', 2), ('momentum', 1), ('beta', -1), ('temperature', 0), ('chunk', -1),
        ('step_size', 0), ('discount', 0), ('discount', 1.5), ('smooth', -1), ('smooth', 'nan'), ('budget_ms', -1),
        ('samples', 'many'), ('warm', 'yes'))),
    (['--robot=1'], '--robot=1: {ckpt} knows 1 labelled datasets'), (['--robot=-1'], '--robot=-1')], ids=' '.join)
def test_each_mistake_is_one_line(trained, tmp_path, options, words):
    now, goal = pictures(tmp_path)
    (tmp_path / 'text.png').write_text('not a picture')
    (tmp_path / 'cut.safetensors').write_bytes((trained / 'ckpt.safetensors').read_bytes()[:5000])
    for name, shape in (('black', (3, 80, 80)), ('wide', (3, 40, 80))):
        data.write_image(tmp_path / f'{name}.png', torch.zeros(shape, dtype=torch.uint8))
    before = {*os.listdir(tmp_path)}
    names = dict(tmp=tmp_path, now=now, goal=goal, ckpt=trained / 'ckpt.safetensors')
    line = ends('plan.py', f'--ckpt={trained}/ckpt.safetensors', f'--out_dir={tmp_path / "out"}', *QUICK,
                *(o.format(**names) for o in options))
    assert words.format(**names) in line and {*os.listdir(tmp_path)} == before


@pytest.mark.parametrize('env, missing, package', [
    ('gym_pusht/PushT-v0', 'gym_pusht', 'gym-pusht'),
    ('PointMaze_UMaze-v3', 'gymnasium_robotics', 'gymnasium-robotics'),
    ('FetchReach-v4', 'gymnasium_robotics', 'gymnasium-robotics')])
def test_a_package_that_is_not_installed(trained, tmp_path, monkeypatch, env, missing, package):
    pytest.importorskip('gymnasium', reason='gymnasium is not installed')
    monkeypatch.setitem(sys.modules, missing, None)
    line = ends('plan.py', f'--ckpt={trained}/ckpt.safetensors', f'--out_dir={tmp_path / "out"}', f'--env={env}',
                *QUICK)
    assert f'--env={env}' in line and f'pip install {package}' in line and not os.listdir(tmp_path)


def test_another_robots_checkpoint(trained, tmp_path):
    options = f'--ckpt={trained}/ckpt.safetensors', f'--out_dir={tmp_path / "out"}', *QUICK
    robot('FetchReach-v4')
    assert '--env=FetchReach-v4: takes 4 numbers as action' in ends('plan.py', '--env=FetchReach-v4', *options)
    assert '--env=FetchReach-v9:' in ends('plan.py', '--env=FetchReach-v9', *options)
    rng, out = np.random.default_rng(0), tmp_path / 'other'
    data.write_lerobot(tmp_path / 'd', [{'observation.images.top': film(1, 30, i)[0], 'task': '', 'action.hand': a} for
                                        i, a in enumerate(rng.uniform(-.05, .05, (4, 30, 2)))], 10)
    script('train.py', f'--labelled={tmp_path / "d"}', '--unlabelled=', '--action=action.hand', *SMALL, '--max_steps=1',
           '--workers=0', f'--out_dir={out}')
    options = f'--ckpt={out}/ckpt.safetensors', *QUICK
    assert '--env=demo: has no action.hand' in ends('plan.py', *options)
    data.write_lerobot(tmp_path / 'far', [{'observation.images.top': film(1, 30, i)[0], 'task': '', 'action': a} for
                                          i, a in enumerate(rng.uniform(0, 9, (4, 30, 2)))], 10)
    script('train.py', f'--labelled={tmp_path / "far"}', '--unlabelled=', *SMALL, '--max_steps=1', '--workers=0',
           f'--out_dir={out}')
    assert 'was trained on another robot' in ends('plan.py', *options)
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
        script_ends(f'--ckpt={trained}/ckpt.safetensors', f'--start={now}', f'--goal={goal}', *QUICK,
                    f'--out_dir={tmp_path}', f'--compile={compile}')
        rows.append(np.load(tmp_path / 'plan.npy'))
    np.testing.assert_allclose(*rows, rtol=1e-4, atol=1e-6)
    assert counter.frame_count


def test_the_mask_reaches_the_search(trained, tmp_path, controller):
    x = torch.zeros(3, 80, 80, dtype=torch.uint8)
    x[:, 40:, :40] = 255                            # the lower left quarter counts
    data.write_image(tmp_path / 'mask.png', x)
    tokens = controller(mask=str(tmp_path / 'mask.png')).search['tokens'].view(4, 4)
    want = torch.zeros(4, 4)
    want[2:, :2] = 255
    assert (tokens - want).abs().max() < 40 and controller().search['tokens'] is None


def test_watching_a_folder(trained, tmp_path):
    """A line of actions for every picture from the first moment with enough of them; Ctrl-C is the ordinary end."""
    folder, aside = tmp_path / 'frames', tmp_path / 'aside'
    folder.mkdir()
    aside.mkdir()
    _, goal = pictures(tmp_path)
    pictures(aside, 6)
    (folder / 'notes.txt').write_text('no picture')
    command = [sys.executable, '-u', str(ROOT / 'plan.py'), f'--ckpt={trained}/ckpt.safetensors', f'--watch={folder}',
               f'--goal={goal}', *QUICK]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                                env=os.environ | {'OMP_NUM_THREADS': '1'})
    ends_anyway = threading.Timer(120, watching.kill)
    ends_anyway.start()
    try:
        lines = []
        while 'watching' not in (lines or [''])[-1]:
            lines.append(watching.stdout.readline())
            assert lines[-1], watching.stderr.read()
        assert 'first 3 pictures' in lines[-1]
        found = []
        for i in range(6):                          # the third picture is the first with an answer
            os.rename(aside / f'{i}.png', folder / f'frame{i}.png')
            if i >= 2:
                found.append(watching.stdout.readline())
        time.sleep(0.1)
        watching.send_signal(signal.SIGINT)
        rest, errors = watching.communicate()
    finally:
        ends_anyway.cancel()
        watching.kill()
    assert watching.returncode == 0 and rest == '' and 'Traceback' not in errors
    for i, line in enumerate(found, 2):
        name, *numbers, milliseconds, unit = line.split()
        assert name == f'frame{i}.png' and len(numbers) == 2 and unit == 'ms)' and milliseconds[0] == '('
        assert all(abs(float(v)) <= data.DEMO_STEP + 1e-6 for v in numbers)


def test_watching_pictures_of_another_shape(trained, tmp_path):
    _, goal = pictures(tmp_path)
    for i in range(3):
        data.write_image(tmp_path / f'{i}.png', torch.zeros(3, 40, 80, dtype=torch.uint8))
        os.utime(tmp_path / f'{i}.png', (1, 1))
    data.write_image(tmp_path / 'goal.jpg.png', torch.zeros(3, 80, 80, dtype=torch.uint8))
    goal = (tmp_path / 'goal.jpg.png').rename(tmp_path.parent / f'{tmp_path.name}.png')
    line = ends('plan.py', f'--ckpt={trained}/ckpt.safetensors', f'--watch={tmp_path}', f'--goal={goal}', *QUICK)
    assert f'--watch={tmp_path}' in line and '80 x 40' in line and '80 x 80' in line
