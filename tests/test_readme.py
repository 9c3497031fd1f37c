"""What README.md tells people to type must exist, and options must have limits."""
import ast
import re

import pytest
import torch

import data
import model
from conftest import ROOT

TEXT = (ROOT / 'README.md').read_text()
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
    loop, = re.findall(r'```python\n(.*?)```', TEXT, re.S)
    assert f"'{env}'" in loop
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out').symlink_to(trained)
    data.write_image('goal.png', torch.zeros(3, 64, 64, dtype=torch.uint8))
    names = {}
    exec(loop.replace("'demo'", f"'{env}'").replace('budget_ms=100.0', 'budget_ms=5.0'), names)
    assert names['action'].shape == (2,) and len(names['planner'].seconds) == 10


def test_old_checkpoints_get_the_defaults_of_training():
    trains = constants('train.py') | dict(labelled='', unlabelled='', encoder_hash='', state_names='', probe_names='')
    assert model.CONFIG_DEFAULTS == {k: trains[k] for k in model.CONFIG_DEFAULTS}


def test_pictures_exist():
    for picture in re.findall(r'!\[.*?\]\((.*?)\)', TEXT):
        assert (ROOT / picture).is_file(), picture
