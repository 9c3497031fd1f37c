"""What README.md tells people to type must exist, and options must have limits."""
import ast
import re
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import data
import model
import plan
from conftest import ROOT, SMALL, script, write_lerobot

TEXT = (ROOT / 'README.md').read_text()
LOOP, LEROBOT_LOOP = re.findall(r'```python\n(.*?)```', TEXT, re.S)
COMMANDS = [c.strip() for c in re.findall(r'^    (\S.*)$', TEXT.replace('\\\n', ' '), re.M) if '.py' in c]


def constants(name):
    """The options of a script: its constants before override(); in data.py in its last if."""
    out, body = {}, ast.parse((ROOT / name).read_text()).body
    for node in body[-1].body if name == 'data.py' else body:
        if isinstance(node, ast.Assign) and 'override(' in ast.unparse(node.value):
            break
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Constant, ast.UnaryOp)):
            out[node.targets[0].id] = ast.literal_eval(node.value)
    return out


@pytest.mark.parametrize('name', ['data', 'train', 'plan', 'decode'])
def test_every_number_has_limits_and_defaults_keep_them(name):
    options = constants(f'{name}.py')
    numbers = {k for k, v in options.items() if type(v) in (int, float)}
    assert numbers <= data.LIMITS.keys(), 'give them a place in data.LIMITS'
    for k, v in options.items():
        data.check(k, v)


def test_there_are_two_commands_to_begin_with():
    start = TEXT.split('## Quick start')[1].split('##')[0]
    assert len([line for line in start.splitlines() if 'pip install' in line and line.startswith('    ')]) == 2


@pytest.mark.parametrize('command', COMMANDS)
def test_files_and_options_exist(command):
    scripts = re.findall(r'\b(data|train|plan|decode|tests/\w+)\.py((?:\s+--?\S+)*)', command)
    assert scripts
    for name, options in scripts:
        if name.startswith('tests/test_'):
            continue
        known = constants(f'{name}.py')
        for option in re.findall(r'--(\w+)=(\S*)', options):
            assert option[0] in known, option


def test_every_option_named_in_the_text_exists():
    known = {'nproc_per_node'}
    for name in ('data', 'train', 'plan', 'decode', 'tests/bench_data', 'tests/bench_model',
                 'tests/bench_plan', 'tests/ablate'):
        known |= constants(f'{name}.py').keys()
    assert {o for o in re.findall(r'`--(\w+)', TEXT)} <= known


@pytest.mark.parametrize('env', ['demo', 'gym_pusht/PushT-v0'])
def test_the_control_loop_runs_as_printed(trained, tmp_path, monkeypatch, env):
    if env != 'demo':
        pytest.importorskip('gym_pusht', reason='gym-pusht is not installed')
    assert f"'{env}'" in LOOP
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out').symlink_to(trained)
    data.write_image('goal.png', torch.zeros(3, 64, 64, dtype=torch.uint8))
    names = {}
    exec(LOOP.replace("'demo'", f"'{env}'").replace('budget_ms=100.0', 'budget_ms=5.0'), names)
    assert names['action'].shape == (2,) and len(names['planner'].seconds) == 10


JOINTS = [f'{joint}.pos' for joint in ('shoulder_pan', 'shoulder_lift', 'elbow_flex', 'wrist_flex', 'wrist_roll', 'gripper')]
MIDDLE = np.array([0, -40, 60, 20, 0, 30], np.float32)      # degrees, but the gripper's 0 to 100
FPS = 20


def seen(joints, camera):
    """What one of an arm's cameras shows: bars as long as joints are far from the middle, or nothing at the wrist."""
    x = np.full((64, 64, 3), 40, np.uint8)
    for i, far in enumerate(joints - MIDDLE if camera == 'front' else []):
        x[10 * i:10 * i + 8, :int(np.clip(32 + far, 0, 64))] = 220
    return x


class Arm:
    """An arm that goes to targets, at most 4 at once, as lerobot's with max_relative_target; its sensors are off by one."""
    def connect(self, calibrate=True):
        self.joints = dict(zip(JOINTS, MIDDLE.tolist()))
        self.looked, self.asked, self.sent = [], [], []

    def disconnect(self):
        self.joints = None

    def get_observation(self):
        self.looked.append((time.perf_counter(), [*self.joints.values()]))
        joints = np.array(self.looked[-1][1])
        pictures = {camera: seen(joints, camera) for camera in ('wrist', 'front')}
        return pictures | {name: self.joints[name] + 1 for name in sorted(JOINTS)}

    def send_action(self, action):
        self.asked.append(action)
        self.sent.append({name: float(np.clip(to, self.joints[name] - 4, self.joints[name] + 4)) for name, to in action.items()})
        self.joints |= self.sent[-1]
        return self.sent[-1]


class PlainArm(Arm):
    def __enter__(self):
        self.connect()

    def __exit__(self, *_):
        self.disconnect()


def lerobot_arm(folder):
    robots = pytest.importorskip('lerobot.robots', reason='lerobot is not installed')

    @dataclass
    class Config(robots.RobotConfig):
        pass

    class LerobotArm(Arm, robots.Robot):
        config_class, name, joints = Config, 'pretended_arm', None
        action_features = dict.fromkeys(JOINTS, float)
        observation_features = action_features | dict.fromkeys(('wrist', 'front'), (64, 64, 3))
        is_connected = property(lambda self: self.joints is not None)
        is_calibrated = True
        calibrate = configure = lambda self: None

    return LerobotArm(Config(id='one', calibration_dir=folder))


@pytest.fixture(scope='module')
def arm_ckpt(demo, tmp_path_factory):
    """Of the demo world's robot, and an arm with two cameras, which is seen at half its rate."""
    folder, rng, episodes = tmp_path_factory.mktemp('arm'), np.random.default_rng(0), []
    for _ in range(4):
        targets = MIDDLE + rng.normal(size=(40, 6)).cumsum(axis=0).astype(np.float32)
        pictures = {f'observation.images.{camera}': np.stack([seen(x, camera) for x in targets]) for camera in ('wrist', 'front')}
        episodes.append(pictures | {'action': targets, 'observation.state': targets + 1, 'task': 'reach'})
    write_lerobot(folder / 'arm', episodes, FPS, {'action': JOINTS, 'observation.state': JOINTS}, 'so101_follower')
    world = demo[0].removeprefix('--labelled=')
    script('train.py', f'--labelled={world},{folder}/arm', '--unlabelled=', '--camera=front,top', '--fps=10', '--state=observation.state', *SMALL,
           '--max_steps=2', f'--out_dir={folder}/out')
    return folder / 'out/ckpt.safetensors'


@pytest.mark.parametrize('kind', ['plain', 'lerobot'])
def test_the_loop_for_robots_of_lerobot_runs_as_printed(arm_ckpt, tmp_path, monkeypatch, kind):
    """Its actions, senses and pictures are those that training knew by these names, at the dataset's rate."""
    robot = lerobot_arm(tmp_path) if kind == 'lerobot' else PlainArm()
    planner = plan.Planner(arm_ckpt, plan.config | dict(robot=1, samples=8, iterations=1, device='cpu'))
    goal = seen(MIDDLE + 10, 'front')
    acts, act = [], planner.act

    def spy(frames, to, actions=None, states=None, goal_state=None):
        if np.ndim(to) == 3:        # not its own call for one robot of several
            acts.append((np.array(frames), actions, np.array(states)))
        return act(frames, to, actions, states, goal_state)

    monkeypatch.setattr(planner, 'act', spy)
    assert 'range(300)' in LEROBOT_LOOP
    exec(LEROBOT_LOOP.replace('range(300)', 'range(7)'), dict(planner=planner, goal=goal, robot=robot))
    assert len(acts) == len(robot.sent) == 7 and robot.joints is None
    low, high = planner.a_low.min(0).values, planner.a_high.max(0).values
    for i, (frames, actions, states) in enumerate(acts):
        n = 1 if i else planner.past
        joints = np.array(robot.looked[i][1])
        assert np.array_equal(frames, [seen(joints, 'front')] * n) and np.allclose(states, [joints + 1] * n)
        assert actions == ([*robot.sent[i - 1].values()] if i else None)
        assert [*robot.asked[i]] == JOINTS and {*map(type, robot.asked[i].values())} == {float}
        row = torch.tensor([*robot.asked[i].values()])
        assert (row > low - 1e-3).all() and (row < high + 1e-3).all()
    assert any(asked != sent for asked, sent in zip(robot.asked, robot.sent))
    waits = np.diff([t for t, _ in robot.looked])
    assert waits.min() > 0.95 / FPS and waits.min() < 1.8 / FPS


def test_the_loop_for_robots_of_lerobot_without_a_state(trained):
    class Tip(PlainArm):
        def get_observation(self):
            return {'top': np.zeros((64, 64, 3), np.uint8)}

        def send_action(self, action):
            self.sent.append(action)
            return action

    planner = plan.Planner(trained / 'ckpt.safetensors', plan.config | dict(samples=8, iterations=1, device='cpu'))
    robot = Tip()
    exec(LEROBOT_LOOP.replace('range(300)', 'range(3)'), dict(planner=planner, goal=np.zeros((64, 64, 3), np.uint8), robot=robot))
    assert planner.state_names == [] and [[*action] for action in robot.sent] == [['dx', 'dy']] * 3


def test_the_loop_stops_where_names_are_missing(arm_ckpt):
    """An older checkpoint's, or fewer than numbers: before anything is sent."""
    for names in [], JOINTS[:5]:
        planner = plan.Planner(arm_ckpt, plan.config | dict(robot=1, samples=8, iterations=1, device='cpu'))
        planner.action_names = names
        robot = PlainArm()
        with pytest.raises(ValueError, match='zip'):
            exec(LEROBOT_LOOP, dict(planner=planner, goal=seen(MIDDLE, 'front'), robot=robot))
        assert robot.sent == [] and robot.joints is None


def test_a_checkpoint_knows_its_robots(arm_ckpt, tmp_path):
    told = [(p.action_names, p.state_names, p.camera, p.fps) for p in
            (plan.Planner(arm_ckpt, plan.config | dict(robot=i, device='cpu')) for i in (0, 1))]
    assert told == [(data.DEMO_NAMES['action'], data.DEMO_NAMES['observation.state'], 'top', 10), (JOINTS, JOINTS, 'front', FPS)]
    net, config = model.load(arm_ckpt)
    for key in 'action_names', 'cameras', 'rates':      # of before they were told
        del config[key]
    model.save(tmp_path / 'old.safetensors', net, config, {}, net.stats)
    p = plan.Planner(tmp_path / 'old.safetensors', plan.config | dict(robot=1, device='cpu'))
    assert (p.action_names, p.state_names, p.camera, p.fps) == ([], JOINTS, '', 0)


def test_old_checkpoints_get_the_defaults_of_training():
    trains = constants('train.py') | dict(labelled='', unlabelled='', encoder_hash='', state_names='',
                                         probe_names='', action_names='', action_keys='', cameras='', rates='')
    assert model.CONFIG_DEFAULTS == {k: trains[k] for k in model.CONFIG_DEFAULTS}


def test_pictures_exist():
    for picture in re.findall(r'!\[.*?\]\((.*?)\)', TEXT):
        assert (ROOT / picture).is_file(), picture
