"""python -m pytest tests/test_simulators.py: simulators, of plan.py and simulators.py, and recording from them."""
import functools
import itertools
import os
import signal
import sys
import types

import numpy as np
import pytest
import torch

import data
import plan
from conftest import ROOT, SMALL, ends, script

FILE = f'{ROOT}/tests/simulators.py'
PUSHT, MAZE, REACH, PUSH = (f'{FILE}:{name}' for name in ('PushT', 'PointMaze', 'FetchReach', 'FetchPush'))
ROBOTS = 'demo', PUSHT, MAZE, REACH, PUSH
SHIFTS = 'light', 'background', 'object', 'camera'
NAMES = {env: env.rpartition(':')[2] for env in ROBOTS}
robots = pytest.mark.parametrize('env', ROBOTS, ids=NAMES.get)


@functools.cache
def made(env, size, **given):
    return plan.simulator(env, size, **given)


def robot(env, size=(64, 64), new=False, **given):
    """Skips where a simulator's package is not installed, or cannot draw."""
    try:
        return (plan.simulator if new else made)(env, size, **given)
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


# --------------------------------------------------------------------------------------------------
# what all robots promise

@robots
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
    assert sim.exact == (env != PUSHT)


@robots
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


def questions(env, n, goals, goal_steps, past=3, seed=0, **given):
    sim = robot(env, **given)
    sims = [sim] * n if sim.exact else [robot(env, new=True, **given) for _ in range(n)]
    rng = np.random.default_rng(seed)
    return sims, [plan.question(s, i, rng, goals, goal_steps, past) for i, s in enumerate(sims)]


@pytest.mark.parametrize('env, goal_steps, n, least, key', [
    ('demo', 10, 20, 1.0, 'action'), (PUSHT, 25, 10, 0.9, 'action'), (PUSHT, 25, 10, 0.9, 'action.relative'),
    (MAZE, 100, 6, 1.0, 'action'), (REACH, 25, 4, 1.0, 'action'), (PUSH, 25, 4, 1.0, 'action')], ids=NAMES.get)
def test_the_script_itself_reaches_its_goals_and_rest_does_not(env, goal_steps, n, least, key):
    sims, asked = questions(env, n, 'expert', goal_steps, key=key)
    for policy, reaches in ((plan.replay(asked), True), (lambda rests: rests, False)):
        poses, actions, _, _ = plan.play(policy, sims, asked, goal_steps + 1, False)
        assert poses.shape[:2] == (goal_steps + 2, n) and actions.shape[:2] == (goal_steps + 1, n)
        assert np.allclose(poses[0], [q.begin for q in asked], atol=1e-9)
        far = [s.far(p, q.pose, q.begin) for s, p, q in zip(sims, poses[goal_steps], asked)]
        ok = np.mean([reached for _, reached in far])
        rolls_on = 0.5 if sims[0].exact and env != 'demo' else 0
        assert ok >= least if reaches else ok <= rolls_on
        if reaches and sims[0].exact:
            assert max(gap for gap, _ in far) == 0


@robots
def test_random_goals_are_elsewhere_and_at_rest(env):
    sims, asked = questions(env, 4, 'random', 0)
    for sim, q in zip(sims, asked):
        assert not sim.far(q.begin, q.pose, q.begin)[1] and q.expert == []
        sim.restore(q.goal)
        assert np.array_equal(sim.pose(), q.pose)
        for _ in range(3):
            sim.step(sim.rest())
        assert sim.far(sim.pose(), q.pose, q.begin)[1], 'a goal that does not stay cannot be held'
        assert len(q.states) == 3 and q.actions.shape == (2, len(sim.rest()))
        sim.restore(q.states[-1])
        assert np.array_equal(sim.pose(), q.begin)
    assert len(np.unique([q.pose for q in asked], axis=0)) == 4


# --------------------------------------------------------------------------------------------------
# the demo world and Push-T

def test_what_counts_as_reached_in_the_demo_world():
    far, begin = plan.Demo().far, np.array([0.2, 0.2, 0.5, 0.5])
    push, reach = np.array([0.4, 0.4, 0.7, 0.5]), np.array([0.6, 0.2, 0.5, 0.5])
    assert far(np.array([0.9, 0.9, 0.63, 0.5]), push, begin) == (pytest.approx(0.07), True)
    assert far(np.array([0.4, 0.4, 0.61, 0.5]), push, begin) == (pytest.approx(0.09), False)
    assert far(np.array([0.6, 0.27, 0.1, 0.1]), reach, begin) == (pytest.approx(0.07), True)
    assert far(np.array([0.6, 0.29, 0.5, 0.5]), reach, begin) == (pytest.approx(0.09), False)


def test_neither_goal_nor_action_are_drawn_in_pusht():
    sim = robot(PUSHT, (512, 512))
    states, _ = moved(sim, 40)
    for state in [sim.state(), *states[::4]]:
        sim.restore(state)
        x = sim.frame().astype(int)
        assert not ((x[..., 1] > x[..., 0] + 30) & (x[..., 1] > x[..., 2] + 30)).any(), 'the green T'
        assert not ((x[..., 0] > x[..., 1] + 60) & (x[..., 0] > x[..., 2] + 60)).any(), 'the red cross, or contacts'
        assert ((x[..., 2] > x[..., 0] + 60).sum() > 200) and (np.ptp(x, axis=2) < 40).mean() > 0.5, 'agent and block'


def test_keys_of_pushts_actions_mean_the_same():
    """The script plays alike whichever of the two the model was trained with, and moves the block now and then."""
    sim, relative = (robot(PUSHT, new=True, key=k) for k in ('action', 'action.relative'))
    far = []
    for seed in range(3):
        states = moved(sim, 60, seed)[0]
        assert np.allclose(states, moved(relative, 60, seed)[0], atol=1e-6)
        far.append(np.linalg.norm((states[-1] - states[0])[6:8]))
    assert max(far) > 20
    agent = sim.pose()[:2]
    for s, action in ((sim, agent + (30, 900)), (relative, np.array([30.0, 900.0]))):
        columns = s.columns(action)
        assert np.allclose(columns['action'], (agent + (30, 900)).clip(0, 512))
        assert np.allclose(columns['action.relative'], columns['action'] - agent)
        s.restore(s.state() * [1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1, 0])
        for _ in range(3):
            s.step(s.rest())
        assert np.allclose(s.pose()[:2], agent, atol=0.5), 'rest holds still'


def test_the_script_of_pusht_rests_now_and_then():
    sim = robot(PUSHT, key='action.relative')
    rest = [not a.any() for a in itertools.chain(*(moved(sim, 50, seed)[1] for seed in range(6)))]
    assert 0.02 < np.mean(rest) < 0.3
    runs = [len(list(run)) for still, run in itertools.groupby(rest) if still]
    assert np.mean(runs) > 5, 'for some frames, as at a goal'


def test_pusht_is_solved_by_its_own_script():
    """Most of the time within half of what counts as reached, whatever noise; and not by standing still."""
    sim = robot(PUSHT, key='action.relative')
    near = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        sim.reset(seed)
        block = sim.world.block
        centre = np.array(block.local_to_world(block.center_of_gravity))
        place, angle = (centre + rng.normal(0, 40, 2)).clip(120, 390), block.angle + rng.uniform(-.7, .7)
        act = sim.solve(rng, place, angle)
        best = np.inf
        for _ in range(120):
            sim.step(act())
            centre = np.array(block.local_to_world(block.center_of_gravity))
            best = min(best, max(np.linalg.norm(place - centre) / 20, abs(block.angle - angle) / (np.pi / 9)))
        near += best < .6
    assert near >= 6


@pytest.mark.parametrize('place', [(10, 10, 0), (480, 500, 2), (250, 505, 0)])
def test_a_way_out_of_every_corner_of_pusht(place):
    sim = robot(PUSHT, key='action.relative')
    state = sim.state()
    state[6:8], state[10] = place[:2], place[2]
    sim.restore(state)
    act = sim.solve(np.random.default_rng(0), np.array([256, 256]), 0)
    for _ in range(60):
        move = act()
        assert np.isfinite(move).all()
        sim.step(move)


def test_the_cube_is_brought_to_its_place():
    sim = robot(PUSH)
    near = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        sim.reset(seed)
        place = (sim.pose()[3:5] + rng.normal(0, .08, 2)).clip((1.2, .6), (1.4, .9))
        before = gap = np.linalg.norm(place - sim.pose()[3:5])
        act = sim.solve(rng, place)
        for _ in range(50):
            sim.step(act())
            gap = min(gap, np.linalg.norm(place - sim.pose()[3:5]))
        near += gap < min(.03, .5 * before)
    assert near >= 5


def test_far_of_pusht_wraps_its_angle():
    far = plan.from_file(PUSHT).far
    goal = np.array([100.0, 100, 300, 300, 0.1])
    for turns in (-2, -1, 0, 1, 3):
        for off, ok in ((0, True), (np.pi / 9 - 0.01, True), (-np.pi / 9 + 0.01, True), (np.pi / 9 + 0.01, False),
                        (-np.pi / 9 - 0.01, False), (np.pi, False), (np.pi - 0.1, False), (2, False), (-2, False)):
            gap, reached = far(None, goal + [0, 0, 0, 0, off + 2 * np.pi * turns], goal, None)
            assert reached == ok and gap == 0
    for off, gap, ok in (([10, 10, 10, 9, 0], 381 ** .5, True), ([10, 10, 10, 11, 0], 421 ** .5, False),
                         ([25, 0, 0, 0, 0], 25, False)):        # the agent counts too
        assert far(None, goal + off, goal, None) == (pytest.approx(gap), ok)


# --------------------------------------------------------------------------------------------------
# MuJoCo

@pytest.mark.parametrize('env', ROBOTS[2:], ids=NAMES.get)
def test_the_goal_of_the_package_is_not_drawn(env):
    sim = robot(env)
    moved(sim, 5)
    state, target = sim.state(), sim.model.site(sim.target)
    x, at = sim.frame(), target.pos.copy()
    target.pos[:] = (1.0, 0.0, 0.2) if env == MAZE else (1.3, 0.7, 0.5)
    sim.restore(state)
    assert np.array_equal(sim.frame(), x)
    target.rgba[3] = 1
    assert not np.array_equal(sim.frame(), x), 'it would be seen'
    target.rgba[3], target.pos[:] = 0, at
    for seed in range(3):
        sim.reset(seed)
        sim.step(sim.rest())
        assert target.rgba[3] == 0


@pytest.mark.parametrize('env, n', [('PointMaze_UMaze-v3', 7), ('PointMaze_Medium-v3', 26)])
def test_the_whole_maze_is_in_the_picture(monkeypatch, env, n):
    monkeypatch.setattr(plan.from_file(MAZE), 'env', env)
    sim = robot(MAZE, (112, 112), new=True)
    maze = sim.world.maze
    free = np.argwhere(np.asarray(maze.maze_map, object) != 1)
    assert len(free) == n
    for cell in free:
        for corner in itertools.product((-0.4, 0.4), repeat=2):         # the ball's radius is 0.1
            sim.data.qpos[:] = maze.cell_rowcol_to_xy(cell) + corner
            x = sim.frame().astype(int)
            y, x = np.nonzero((x[..., 1] > x[..., 0] + 20) & (x[..., 1] > x[..., 2] + 20))
            assert len(y) >= 8 and 0 < min(*y, *x) and max(*y, *x) < 111, 'green, and clear of the border'


def test_a_cube_off_the_table_is_not_asked_for():
    sim = robot(PUSH)
    sim.reset(0)
    begin = sim.pose()
    pushed = begin + [0, 0, 0, 0.1, 0, 0]
    assert begin[5] > 0.4 and sim.asks(0, begin, pushed) and not sim.asks(0, begin, begin)
    sim.world._utils.set_joint_qpos(sim.model, sim.data, 'object0:joint', [2.0, 0.7, 0.45, 1, 0, 0, 0])
    for _ in range(20):
        sim.step(sim.rest())
    assert sim.pose()[5] < 0.4 and not sim.asks(0, begin, sim.pose()) and not sim.asks(0, sim.pose(), begin)


# --------------------------------------------------------------------------------------------------
# which simulator an option names

def test_simulators_draw_at_the_size_that_is_asked_for():
    for env, size, shape in ((PUSHT, (0, 0), (512, 512, 3)), (PUSHT, (96, 64), (96, 64, 3)),
                             ('demo', (0, 0), (64, 64, 3)), ('demo', (32, 48), (32, 48, 3))):
        x = robot(env, size).frame()
        assert x.shape == shape and x.dtype == np.uint8


@pytest.mark.parametrize('env, missing, package', [
    ('gym_pusht/PushT-v0', 'gym_pusht', 'gym-pusht'), ('gym_pusht/PushT-v0', 'gymnasium', 'gymnasium'),
    ('CartPole-v1', 'gymnasium', 'gymnasium'), ('gym_nowhere/World-v0', 'gym_nowhere', 'gym-nowhere'),
    (PUSHT, 'gym_pusht', 'gym-pusht'), (MAZE, 'gymnasium_robotics', 'gymnasium-robotics'),
    (PUSH, 'gymnasium_robotics', 'gymnasium-robotics')], ids=NAMES.get)
def test_a_package_that_is_not_installed(trained, tmp_path, monkeypatch, env, missing, package):
    if missing != 'gymnasium':
        pytest.importorskip('gymnasium', reason='gymnasium is not installed')
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == 'gymnasium':
        monkeypatch.delitem(sys.modules, 'gym_pusht', raising=False)
    given = f'--ckpt={trained}/ckpt.safetensors', f'--out_dir={tmp_path}/out', '--dtype=float32', '--device=cpu'
    for line in (ends('plan.py', f'--record={env}', f'--out={tmp_path}/d'), ends('plan.py', f'--env={env}', *given)):
        assert f'needs: pip install {package}' in line
    assert not os.listdir(tmp_path)


def test_what_a_simulator_lacks(trained, tmp_path):
    pytest.importorskip('gymnasium', reason='gymnasium is not installed')
    (tmp_path / 'mine.py').write_text('class Half:\n    name, fps, space = "half", 5, None\n\n'
                                      '    def __init__(self, size, shift, key):\n        pass\n')
    given = f'--ckpt={trained}/ckpt.safetensors', '--dtype=float32', '--device=cpu'
    line = ends('plan.py', '--env=CartPole-v1', *given)
    assert line.startswith('CartPole-v1: lacks restore, pose, far, unit, script, which')
    line = ends('plan.py', f'--record={tmp_path}/mine.py:Half', f'--out={tmp_path}/d')
    assert line.startswith(f'{tmp_path}/mine.py:Half: lacks reset, step, frame, state, columns, observation, over, which')
    assert robot(REACH).name == 'FetchReach-v4'
    assert 'takes 4 numbers as action' in ends('plan.py', f'--env={REACH}', *given)


# --------------------------------------------------------------------------------------------------
# recording

WORLD = """
import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete

box, pixels = Box(-np.inf, np.inf, (2,), np.float64), Box(0, 255, (32, 48, 3), np.uint8)

class Sum(gymnasium.Env):
    # the grey level of a frame is 20 + the running sum of the actions; 200 is the end
    metadata = {'render_modes': ['rgb_array'], 'render_fps': 5}
    action_space = Box(0, 4, (1, 2))
    observation_space = Dict(pixels=pixels, other=Box(-1, 1, (3,)), agent_pos=box)

    def __init__(self, render_mode=None):
        self.render_mode, self.picture, self.position = render_mode, np.zeros((32, 48, 3), np.uint8), np.zeros(2)

    def see(self):
        return {'pixels': self.render(), 'other': np.zeros(3, np.float32), 'agent_pos': self.position}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position[:] = self.np_random.integers(0, 9), 0
        return self.see(), {}

    def step(self, action):
        self.position += np.ravel(action)  # in place, as some do
        return self.see(), 0.0, bool(self.position[0] > 180), False, {}

    def render(self):
        self.picture[:] = round(20 + self.position[0])
        return self.picture

class Vector(Sum):
    observation_space = box
    def see(self):
        return self.position

class Pixels(Sum):
    observation_space = pixels
    def see(self):
        return self.render()

class Switch(Sum):
    action_space = Discrete(3, start=1)
    def step(self, action):
        return super().step((action, 0))

class Timeless(Sum):
    metadata = {'render_modes': ['rgb_array']}

for world in Sum, Vector, Switch, Timeless:
    gymnasium.register(f'sumworld/{world.__name__}-v0', world)
gymnasium.register('sumworld/Pixels-v0', Pixels, max_episode_steps=7)
gymnasium.register('Bare-v0', Sum)
"""


@pytest.fixture
def sums(tmp_path, monkeypatch):
    """A folder in which to record; the module sumworld can be imported from it. Afterwards Ctrl-C is what it was."""
    before = signal.getsignal(signal.SIGINT)
    pytest.importorskip('gymnasium', reason='gymnasium is not installed')
    (tmp_path / 'sumworld.py').write_text(WORLD)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    signal.signal(signal.SIGINT, before)


def record(root, env='sumworld/Sum-v0', policy='random', episodes=2, steps=10, seed=0, **given):
    plan.record_dataset(types.SimpleNamespace(**plan.config | dict(
        out=root, record=env, policy=policy, episodes=episodes, steps=steps, seed=seed) | given))
    return data.LeRobot(root)


def rows(d, key=''):
    """A column of a dataset, episode by episode; the actions by default."""
    d = data.LeRobot(d.root, action=key) if key else d
    return [d.rows(i) for i in range(len(d.episodes))]


def levels(d, i):
    return d.frames(i, range(len(d.rows(i)))).float().mean((1, 2, 3)).numpy() - 20


@pytest.mark.parametrize('policy', ['random', 'noise'])
@pytest.mark.parametrize('steps', [40, 0])
def test_recorded_actions_stand_at_the_frame_before_them(sums, steps, policy):
    d = record(sums / 'd', policy=policy, episodes=3, steps=steps)
    actions, states = rows(d), rows(d, data.ENVIRONMENT)
    assert (d.fps, d.action_dim, states[0].shape[1], len(actions)) == (5, 2, 5, 3)
    assert d.camera == 'observation.images.render' and d.episodes[0].tasks == ['sumworld/Sum-v0']
    for i, (a, s) in enumerate(zip(actions, states)):
        s = s[:, 3:]
        before = s[0] + np.concatenate([np.zeros((1, 2)), a.cumsum(0)[:-1]])
        assert np.allclose(s, before, atol=1e-3) and abs(levels(d, i) - before[:, 0]).max() < 2.5
        assert a.min() >= 0 and a.max() <= 4 and a.std() > .3
        if steps:
            assert len(a) == 40 and s[-1, 0] + a[-1, 0] <= 180
        else:
            assert s[-1, 0] <= 180 < s[-1, 0] + a[-1, 0]  # the last row is the action that ended it
    c = d.clip(1, 2, 5, 3)
    assert np.allclose(c['x'].float().mean((1, 2, 3)).diff(), c['a'].view(5, 3, 2)[1:, :, 0].sum(1), atol=2)


def test_frames_between_those_that_are_drawn_repeat(sums):
    d, every = (record(sums / f'd{k}', draw_every=k) for k in (3, 1))
    assert np.array_equal(rows(d), rows(every)), 'all actions are kept'
    groups = [x.features[x.camera]['info']['video.g'] for x in (d, every)]
    assert groups == [3, 2], 'every drawn frame is a key frame'
    for i in range(2):
        want = levels(every, i)[[0, 0, 0, 3, 3, 3, 6, 6, 6, 9]]
        assert abs(levels(d, i) - want).max() < 1 and np.ptp(want) > 5


def test_what_becomes_the_state(sums):
    for name, width in (('Vector', 2), ('Pixels', 0), ('Sum', 5)):
        d = record(sums / name, f'sumworld/{name}-v0', fps=12.5)
        assert d.features.get(data.ENVIRONMENT, {'shape': [0]})['shape'] == [width] and d.fps == 12.5
        # what of it the robot senses is known where it has lerobot's name
        assert d.features.get('observation.state', {'shape': [0]})['shape'] == [2 * (name == 'Sum')]
        if name == 'Sum':
            assert np.array_equal(rows(d, 'observation.state')[1], rows(d, data.ENVIRONMENT)[1][:, 3:])
        assert [len(a) for a in rows(d)] == [7 if name == 'Pixels' else 10] * 2  # its own limit of time
    assert record(sums / 'bare', 'sumworld:Bare-v0').episodes[0].tasks == ['sumworld:Bare-v0']


def test_discrete_actions_become_one_hot(sums):
    d = record(sums / 'd', 'sumworld/Switch-v0', steps=60)
    for i, a in enumerate(rows(d)):
        assert a.shape == (60, 3) and (a.sum(1) == 1).all() and set(a.ravel()) == {0, 1}
        assert abs(np.diff(levels(d, i)) - (a @ [1, 2, 3])[:-1]).max() < 2.5


@pytest.mark.parametrize('policy', ['random', 'noise', 'function'])
def test_a_seed_is_a_dataset(sums, policy):
    (sums / 'mine.py').write_text('def act(observation, frame, step, rng):\n    return rng.uniform(0, 4, (1, 2))\n')
    policy = f'{sums}/mine.py:act' if policy == 'function' else policy
    one, again, other = (record(sums / name, policy=policy, seed=seed) for name, seed in (('a', 3), ('b', 3), ('c', 4)))
    assert np.array_equal(rows(one), rows(again)) and torch.equal(one.frames(1, [9]), again.frames(1, [9]))
    assert not np.array_equal(rows(one), rows(other)) and not np.array_equal(*rows(one))


def test_noise_is_correlated_over_ten_steps_and_fills_the_bounds(sums):
    a = rows(record(sums / 'd', 'sumworld/Vector-v0', 'noise', 40, 50))
    for lag in (1, 10):
        pairs = np.concatenate([np.stack([r[:-lag], r[lag:]]) for r in a], 1)
        assert abs(np.corrcoef(pairs[0].ravel(), pairs[1].ravel())[0, 1] - np.exp(-lag / 10)) < .08
    a = np.concatenate(a)
    assert 0 <= a.min() < .1 and 3.9 < a.max() <= 4 and abs(a.mean() - 2) < .25
    assert np.histogram(a, 4, (0, 4))[0].min() > .15 * a.size


def test_policy_of_ones_own(sums):
    (sums / 'mine.py').write_text('''
def act(observation, frame, step, rng):
    assert frame.shape == (32, 48, 3) and observation['agent_pos'].shape == (2,)
    return [[step % 3, frame.mean() / 100]]
''')
    d = record(sums / 'd', policy=f'{sums}/mine.py:act', episodes=12, steps=9)
    for i, a in enumerate(rows(d)):
        assert a[:, 0].tolist() == [0, 1, 2] * 3 and np.allclose(a[:, 1] * 100 - 20, levels(d, i), atol=2)


def test_a_script_begins_anew_in_every_episode():
    sim = types.SimpleNamespace(space=None, script=lambda rng: itertools.count(rng).__next__)
    act = plan.find_policy('script', sim)
    assert [act(None, None, step, rng) for rng, step in ((0, 0), (0, 1), (7, 0), (7, 1))] == [0, 1, 7, 8]


def test_policies_take_turns_by_weight(sums):
    """One per episode, from the seed."""
    (sums / 'two.py').write_text('def one(observation, frame, step, rng): return [.1, 0]\ndef two(observation, frame, step, rng): return [.2, 0]\n')
    policy = f'{sums}/two.py:one:3,{sums}/two.py:two:1'
    kinds = [a[:, 0] for a in rows(record(sums / 'd', policy=policy, episodes=60, steps=2))]
    assert all(len({*kind}) == 1 for kind in kinds) and 33 <= sum(kind[0] < .15 for kind in kinds) <= 54
    line = ends('plan.py', '--record=sumworld/Sum-v0', '--policy=random:0,noise:0', f'--out={sums}/e')
    assert line == '--policy=random:0,noise:0: wants a weight above 0'
    assert 'wants random, noise' in ends('plan.py', '--record=sumworld/Sum-v0', '--policy=noise,no', f'--out={sums}/e')


@pytest.mark.parametrize('when, lengths', [('act', [10, 5]), ('add', [10, 3]), ('twice', [])])
def test_ctrl_c_keeps_what_was_recorded(sums, monkeypatch, when, lengths):
    """While an action is chosen, or a frame is encoded; a second one leaves nothing."""
    calls, add = itertools.count(1), data.Writer.add

    def act(observation, frame, step, rng):
        if when != 'add' and next(calls) == 15:
            for _ in range(2 if when == 'twice' else 1):
                signal.raise_signal(signal.SIGINT)
        return [[1, 1]]

    def interrupted(*args, **given):
        if when == 'add' and next(calls) == 13:
            signal.raise_signal(signal.SIGINT)
        return add(*args, **given)
    monkeypatch.setattr(plan, 'find_policy', lambda policy, sim: act)
    monkeypatch.setattr(data.Writer, 'add', interrupted)
    if when == 'twice':
        with pytest.raises(KeyboardInterrupt):
            record(sums / 'd', episodes=5)
        assert not (sums / 'd').exists()
        return
    d = record(sums / 'd', episodes=5)
    assert [len(a) for a in rows(d)] == lengths
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert abs(np.diff(levels(d, 1)) - 1).max() < 1.5


@pytest.mark.parametrize('fails', [1, 3])
def test_an_exception_keeps_the_episodes_before(sums, monkeypatch, fails):
    calls = itertools.count()

    def act(observation, frame, step, rng):
        if next(calls) // 10 == fails - 1 and step == 4:
            raise ZeroDivisionError('of a policy')
        return [[1, 1]]
    monkeypatch.setattr(plan, 'find_policy', lambda policy, sim: act)
    with pytest.raises(ZeroDivisionError):
        record(sums / 'd', episodes=5)
    assert (sums / 'd').exists() == (fails == 3)
    if fails == 3:
        assert [len(a) for a in rows(data.LeRobot(sums / 'd'))] == [10, 10]


@pytest.mark.parametrize('given, words', [
    (['--record=sumworld/Sum-v0'], ['--out']),
    (['--record=sumworld/Nope-v0', '--out={tmp}/o'], ['sumworld/Nope-v0']),
    (['--record=sumworld/Timeless-v0', '--out={tmp}/o'], ['--fps', 'sumworld/Timeless-v0']),
    (['--record=sumworld/Switch-v0', '--out={tmp}/o', '--policy=noise'], ['--policy=noise', 'discrete']),
    (['--record={tmp}/none.py:Robot', '--out={tmp}/o'], ['none.py:Robot']),
    (['--record=sumworld/Sum-v0', '--out={tmp}'], ['{tmp}', 'exists']),
    *((['--record=sumworld/Sum-v0', '--out={tmp}/o', f'--policy={policy}'], [policy, 'random', 'file.py:name'])
      for policy in ('nope', 'script', '{tmp}/no.py:act', '{tmp}/sumworld.py:none'))])
def test_recording_refuses(sums, given, words):
    line = ends('plan.py', *(o.format(tmp=sums) for o in given))
    assert all(w.format(tmp=sums) in line for w in words), line
    assert not {*os.listdir(sums)} - {'sumworld.py', '__pycache__'}


def test_the_command_line_records(sums):
    script('plan.py', '--record=sumworld/Sum-v0', '--episodes=3', '--steps=12', f'--out={sums}/d', '--frame_height=32')
    d = data.LeRobot(sums / 'd')
    assert d.frames(0, [0]).shape[2:] == (32, 32) and d.action_dim == 2 and [len(a) for a in rows(d)] == [12] * 3


@pytest.mark.parametrize('env, width, fps', [('demo', 2, 10), (PUSHT, 2, 10), (MAZE, 2, 100), (REACH, 4, 25),
                                             (PUSH, 4, 25)], ids=NAMES.get)
def test_a_row_is_a_state_and_what_is_done_in_it(sums, env, width, fps):
    sim = robot(env, (48, 64))
    d, again, noise, random = (
        record(sums / copy, env, policy, 2, 30, 1, frame_height=48, frame_width=64)
        for copy, policy in (('a', 'script'), ('b', 'script'), ('n', 'noise'), ('r', 'random')))
    actions, states = rows(d)[1], rows(d, data.ENVIRONMENT)[1]
    sim.restore(np.float64(states[-1]))
    pose = sim.pose()
    sensed = rows(d, 'observation.state')[1]
    assert sensed.shape == (30, len(sim.sensors())) and np.ptp(sensed, axis=0).min() > 0
    assert (d.fps, d.action_dim) == (fps, width) and states.shape == (30, len(sim.state()))
    assert np.array_equal(actions, rows(again)[1]) and torch.equal(d.frames(1, [29]), again.frames(1, [29]))
    for a in (actions, rows(noise)[1], rows(random)[1]):
        a = (a - sim.space.low) / (sim.space.high - sim.space.low)
        assert a.shape == (30, width) and a.min() > -1e-6 and a.max() < 1 + 1e-6 and np.ptp(a) > 0.1
    assert not np.array_equal(actions, rows(noise)[1]) and d.frames(0, [0]).shape == (1, 3, 48, 64)
    called = sim.names[data.ENVIRONMENT]        # one name for each number, and those of a cube or block are its own
    assert len({*called}) == len(called) == states.shape[1] == len(d.features[data.ENVIRONMENT]['names'])
    thing = {'demo': 'disc_x disc_y', PUSHT: 'block_x block_y block_turn_rad', PUSH: 'object0:joint_x object0:joint_y object0:joint_z'}
    if env in thing:
        at = [called.index(name) for name in thing[env].split()]
        assert np.allclose(states[-1][at], pose[-len(at):], atol=1e-3)
    read = data.LeRobot(sums / 'a', probe=data.ENVIRONMENT).probe_names
    assert 0 < len(read) < len(called) or env == 'demo'
    for t in (0, 12, 28):       # a row is where its picture was taken; its action leads to the next row
        sim.restore(np.float64(states[t]))
        assert np.allclose(sim.sensors(), sensed[t], atol=1e-4)
        x = torch.from_numpy(sim.frame()).permute(2, 0, 1)
        assert (x.float() - d.frames(1, [t])[0].float()).mean(dim=0).abs().mean() < 3     # colours are coarser
        sim.step(actions[t])
        after = sim.pose()
        sim.restore(np.float64(states[t + 1]))
        known = None if sim.exact else 2        # the agent, not the block that it is in contact with
        assert np.allclose(sim.pose()[:known], after[:known], atol=1e-3)


@pytest.mark.parametrize('policy', ['script', 'noise', 'random'])
def test_pusht_has_its_actions_in_two_ways(sums, policy):
    """The target, and how far it is from the agent, which the state of the same row tells."""
    robot(PUSHT)
    d = record(sums / 'd', PUSHT, policy, 3, 60, frame_height=96)
    assert d.action_keys == ['action'] and d.episodes[0].tasks == ['gym_pusht/PushT-v0']
    target, motion, state, sensed = (
        np.concatenate(rows(d, k)) for k in ('action', 'action.relative', data.ENVIRONMENT, 'observation.state'))
    assert np.array_equal(sensed, state[:, :2]), 'the agent, nothing of the block'
    assert target.shape == motion.shape == (180, 2) and state.shape == (180, 12)
    assert np.allclose(target - state[:, :2], motion, atol=1e-3) and 0 <= target.min() and target.max() <= 512
    if policy == 'script':      # short motions, which push the block now and then
        assert np.median(np.linalg.norm(motion, axis=1)) < 60
        assert max(np.ptp(state[i:i + 60, 6:8], axis=0).max() for i in (0, 60, 120)) > 30
    else:                       # the arm moves towards its action: what it did is told by the row before
        assert np.median(np.linalg.norm(motion, axis=1)) > 60
        s, a = state[:60], target[:59]
        assert (np.linalg.norm(s[1:, :2] - a, axis=1) < np.linalg.norm(s[:-1, :2] - a, axis=1)).all()
    assert np.corrcoef(np.diff(state[:60, 0]), state[1:60, 2])[0, 1] > 0.5, 'velocities of the agent'


def test_a_model_trained_in_pusht_is_tried_there(sums):
    """From recording to the report, with the actions as they were recorded."""
    robot(PUSHT)
    record(sums / 'd', PUSHT, 'script', 4, 24, frame_height=64)
    for key in ('action', 'action.relative'):
        out = sums / key
        script('train.py', f'--labelled={sums / "d"}', '--unlabelled=', f'--action={key}', *SMALL, '--max_steps=1',
               '--workers=0', '--frames=3', f'--out_dir={out}')
        o = types.SimpleNamespace(**plan.config | dict(
            ckpt=f'{out}/ckpt.safetensors', out_dir=str(out), env=PUSHT, episodes=3, budget=26, replan=2, samples=6,
            elites=2, iterations=1, horizon=2, dtype='float32', device='cpu'))
        report = plan.evaluate(o)
        assert report['methods']['expert']['success_ever'] >= 0.6 > report['methods']['zero']['success_ever']
        assert report['goal_steps'] == 25 and (out / 'plan.mp4').is_file()
        planner = plan.Planner(o.ckpt, vars(o), tell=False)
        assert len({id(sim) for sim in plan.robots(o, planner)}) == 3, 'restored, one is not exactly another'
