import json
import types

import av
import numpy as np
import pytest
import torch

import data
import model
import plan
from conftest import SMALL, ends, script


def test_cem_finds_the_optimum_of_each_episode():
    best = torch.tensor([[[0.5, -1.0], [0.2, 0.0]], [[-0.3, 0.9], [0.0, 1.5]]])               # (E, H, A)
    cost = lambda actions, i: (actions - best[:, None]).square().sum(dim=(2, 3))
    mean, std = torch.zeros_like(best), torch.ones_like(best)
    g = torch.Generator().manual_seed(0)
    options = dict(samples=256, elites=16, iterations=12, min_std=0.01, generator=g)
    found, costs = plan.cem(cost, mean, std, -2.0, 2.0, **options)
    assert (found - best).abs().max() < 0.05 and (costs[-1] < 0.01).all() and costs.shape == (12, 2)
    found, _ = plan.cem(cost, mean, std, -1.0, 1.0, **options)
    assert found.abs().max() <= 1 and (found - best.clamp(-1, 1)).abs().max() < 0.1, 'bounds hold, also for the result'


def test_the_first_candidate_is_the_mean_and_all_are_within_bounds():
    seen = []
    cost = lambda actions, i: seen.append(actions) or actions.square().sum(dim=(2, 3))
    mean = torch.full((1, 3, 2), 0.4)
    plan.cem(cost, mean, torch.ones(1, 3, 2), -0.5, 0.7, samples=32, elites=4, iterations=3)
    assert torch.equal(seen[0][:, 0], mean) and all(-0.5 <= a.min() and a.max() <= 0.7 for a in seen)
    assert all(a[0, :, 0, 0].std() > 0.03 for a in seen), 'a least std keeps the search alive'


class Additive(torch.nn.Module):
    """A world that is known: every latent moves by the action of its frame. Only what rollout needs of a model."""
    def __init__(self):
        super().__init__()
        self.config = dict(objective='direct', k_max=8)
        self.stats = {'z_std': torch.ones(2)}

    def forward(self, z, tau, d, a, a_mask, rings=None, start=0, commit=False):
        return z + torch.where(a_mask[..., None], a, 0.0)[:, :, None]

    def new_rings(self, B, T, dtype):
        return []


@pytest.mark.parametrize('cost', ['all', 'last'])
def test_plan_reaches_the_goal_in_a_known_world(cost):
    z_ctx = torch.zeros(2, 2, 3, 2)
    z_goal = torch.tensor([[1.5, -0.6], [-0.9, 0.3]])[:, None].expand(2, 3, 2)
    found, info = plan.plan(Additive(), z_ctx, torch.zeros(2, 2, 2), z_goal, horizon=3, low=-1.0, high=1.0, cost=cost,
                            samples=300, elites=20, iterations=15, chunk=70, min_std=0.01)
    assert found.shape == (2, 3, 2) and (found.sum(dim=1) - z_goal[:, 0]).abs().max() < 0.1
    assert (info['z'][:, -1] - z_goal).abs().max() < 0.1 and info['cost'].shape == (15, 2)
    one, _ = plan.plan(Additive(), z_ctx, torch.zeros(2, 2, 2), z_goal, horizon=3, low=-1.0, high=1.0, cost=cost,
                       samples=300, elites=20, iterations=15, chunk=100000, min_std=0.01)
    assert torch.allclose(found, one, atol=1e-5), 'the size of a chunk changes nothing'


def test_smoothness_and_channel_weights_count():
    z_goal = torch.tensor([[[2.0, 2.0]]])
    args = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2), z_goal
    options = dict(horizon=4, low=-1.0, high=1.0, samples=300, elites=20, iterations=15)
    rough, smooth = (plan.plan(Additive(), *args, smooth=s, **options)[0].diff(dim=1).square().mean()
                     for s in (0.0, 10.0))
    assert smooth < 0.2 * rough
    net = Additive()
    net.stats['z_std'] = torch.tensor([1.0, 1e-4])
    found, _ = plan.plan(net, *args, **options)
    assert found[0, 0, 0] > 0.8 and found[0, 0, 1] < 0.7, 'a channel without variance in the data does not count'


def test_wilson_interval():
    assert plan.wilson(0, 10) == pytest.approx([0.0, 0.2775], abs=1e-3)         # Newcombe 1998, and by hand
    assert plan.wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-3)
    assert plan.wilson(10, 10)[1] == 1.0


QUICK = ('--samples=6', '--elites=2', '--iterations=1', '--horizon=2', '--dtype=float32', '--device=cpu')


def test_closed_loop_leaves_its_report(trained):
    script('plan.py', f'--ckpt={trained}/ckpt.safetensors', '--episodes=4', '--budget=6', *QUICK)
    report = json.loads((trained / 'plan.json').read_text())
    assert {k: report[k] for k in ('env', 'episodes', 'budget_steps', 'goals', 'seed')} == \
        dict(env='demo', episodes=4, budget_steps=6, goals='expert', seed=0)
    assert set(report['methods']) == {'model', 'random', 'zero', 'mean', 'expert'}
    for m in report['methods'].values():
        assert {'success_end', 'success_ever', 'ci95', 'steps', 'distance_end', 'seconds_per_plan', 'jerk'} <= set(m)
        assert 0 <= m['ci95'][0] <= m['success_end'] <= m['ci95'][1] <= 1 and m['success_end'] <= m['success_ever']
    with av.open(str(trained / 'plan.mp4')) as video:
        assert video.streams.video[0].frames >= 7


def test_the_script_itself_reaches_its_goals_and_doing_nothing_does_not(trained, tmp_path):
    for goals in ('expert', 'random'):
        script('plan.py', f'--ckpt={trained}/ckpt.safetensors', f'--out_dir={tmp_path / goals}', f'--goals={goals}',
               '--episodes=20', '--budget=12', '--replan=2', '--seed=3', *QUICK)
        methods = json.loads((tmp_path / goals / 'plan.json').read_text())['methods']
        assert methods['zero']['success_end'] == methods['mean']['success_end'] == 0
        assert methods['random']['success_end'] < 0.25 and methods['zero']['jerk'] == 0 < methods['random']['jerk']
        if goals == 'expert':
            assert methods['expert']['success_end'] == 1 and methods['expert']['steps'] <= 10
        else:
            assert 'expert' not in methods


def test_the_planner_cannot_reach_the_simulator():
    """The world is stepped by run alone: nothing that plans has it among its names."""
    for f in (plan.plan, plan.cem, model.rollout):
        inner = [c for c in f.__code__.co_consts if isinstance(c, types.CodeType)]
        names = {n for code in (f.__code__, *inner) for n in code.co_names}
        assert not {n for n in names if 'demo' in n or n == 'data'}


def pictures(folder, n=2):
    for i in range(n):
        state = np.array([[0.2 + 0.3 * i, 0.5, 0.7, 0.6]])
        data.write_image(folder / f'{i}.png', torch.from_numpy(data.demo_draw(state, 80)[0]).permute(2, 0, 1))
    return folder / '0.png', folder / '1.png'


def test_a_plan_between_two_pictures(trained, tmp_path, capsys):
    now, goal = pictures(tmp_path)
    script_ends(f'--ckpt={trained}/ckpt.safetensors', f'--out_dir={tmp_path / "o"}', f'--start={now}',
                f'--goal={goal}', *QUICK)
    actions = np.load(tmp_path / 'o' / 'plan.npy')
    assert actions.shape == (2 * 2, 2), 'one row per dataset step, in physical units'
    assert np.abs(actions).max() <= data.DEMO_STEP + 1e-6
    said = capsys.readouterr().out
    assert '4 actions in' in said and 'plan.mp4' in said
    with av.open(str(tmp_path / 'o' / 'plan.mp4')) as video:
        assert video.streams.video[0].frames == 3


def script_ends(*options):
    with pytest.raises(SystemExit) as e:
        script('plan.py', *options)
    assert e.value.code in (None, 0)


def test_each_mistake_is_one_line(trained, tmp_path):
    now, goal = pictures(tmp_path)
    ckpt, out = f'--ckpt={trained}/ckpt.safetensors', tmp_path / 'out'
    (tmp_path / 'text.png').write_text('not a picture')
    (tmp_path / 'cut.safetensors').write_bytes((trained / 'ckpt.safetensors').read_bytes()[:5000])
    for options, said in (
            (['--ckpt=nowhere.safetensors'], 'nowhere.safetensors: not a readable checkpoint'),
            ([f'--ckpt={tmp_path}/cut.safetensors'], 'cut.safetensors: not a readable checkpoint'),
            ([ckpt, f'--start={now}'], '--start and --goal come together'),
            ([ckpt, f'--start={now}', f'--goal={tmp_path}/text.png'], 'text.png: not a readable picture'),
            ([ckpt, f'--start={now}', f'--goal={tmp_path}/none.png'], 'none.png: not a readable picture'),
            ([ckpt, '--K=3'], '--K=3: wants a power of two up to 8'), ([ckpt, '--K=16'], '--K=16'),
            ([ckpt, '--cost=best'], '--cost: wants one of all, last'), ([ckpt, '--goals=none'], '--goals'),
            ([ckpt, '--persist=2'], '--persist: wants 0 to 1'), ([ckpt, '--goal_steps=2'], '--goal_steps=2'),
            ([ckpt, '--seed=-1'], '--seed'), ([ckpt, '--elites=1'], '--elites=1'), ([ckpt, '--replan=9'], '--replan=9'),
            ([ckpt, '--robot=1', f'--start={now}', f'--goal={goal}'], 'knows 1 labelled datasets'),
            ([ckpt, '--horizn=3'], 'did you mean --horizon?')):
        assert said in ends('plan.py', f'--out_dir={out}', *options), options
        assert not out.exists()


def test_a_model_without_actions_cannot_plan(demo, tmp_path):
    script('train.py', '--labelled=', demo[1], *SMALL, '--max_steps=1', f'--out_dir={tmp_path / "o"}')
    assert 'trained without actions' in ends('plan.py', f'--ckpt={tmp_path}/o/ckpt.safetensors')
