import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# tiny models are faster on one thread, and pytest-xdist fills the other cores
os.environ.setdefault('OMP_NUM_THREADS', '1')

import data  # noqa: E402, from the root


@pytest.fixture
def shared():
    """The folder of real weights and datasets; tests that need it are skipped where it is not there."""
    folder = Path(os.environ.get('GOALDREAM_SHARED') or ROOT.parent / 'shared')
    if not folder.is_dir():
        pytest.skip(f'no real data: {folder} does not exist (GOALDREAM_SHARED names another)')
    return folder


def script(name, *options):
    """Run a script of the project in this process, with its command line; returns its globals."""
    argv, sys.argv = sys.argv, [name, *options]
    data._warned.clear()        # as in a process of its own
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        return runpy.run_path(str(ROOT / name), run_name='__main__')
    finally:
        sys.argv = argv
        signal.set_wakeup_fd(-1)
        for n, handler in handlers.items():
            signal.signal(n, handler)


def ends(name, *options):
    """The one line that a script ends with when an option or a file is wrong."""
    with pytest.raises(SystemExit) as error:
        script(name, *options)
    assert isinstance(error.value.code, str) and '\n' not in error.value.code, error.value.code
    return error.value.code


def write_lerobot(root, episodes, fps, *args, **options):
    """Write a dataset of episodes: dicts of 'observation.images.<name>', an iterable of frames
    (H, W, 3); 'task'; and of other columns, an iterable of vectors."""
    with data.Writer(root, fps, *args, **options) as writer:
        for e in episodes:
            columns = {k: values for k, values in e.items() if k != 'task'}
            for values in zip(*columns.values(), strict=True):
                row = dict(zip(columns, values))
                frames = {k.rpartition('.')[2]: row.pop(k) for k in columns if '.images.' in k}
                writer.add(frames, row.pop('action', None), row.pop('observation.state', None), row)
            writer.end_episode(e['task'])


def own(folder, names, ready):
    for name in names:
        data.own(folder, name)
    ready.set()
    time.sleep(60)


@contextlib.contextmanager
def owner(folder, *names):
    """Another process that owns a folder, until it is killed."""
    forks = multiprocessing.get_context('fork')
    ready = forks.Event()
    child = forks.Process(target=own, args=(folder, names or ['.lock'], ready))
    child.start()
    try:
        assert ready.wait(60)
        yield child
    finally:
        child.kill()
        child.join()


# a model that trains in a second; to fork workers takes longer than the little that they do
SMALL = ('--width=32', '--layers=2', '--heads=2', '--kv_heads=1', '--batch_size=4', '--eval_clips=4',
         '--warmup=2', '--K=2', '--dtype=float32', '--device=cpu', '--workers=0')


@pytest.fixture(scope='session')
def demo(tmp_path_factory):
    """Options for training on a demo world of a few episodes."""
    folder = tmp_path_factory.mktemp('world')
    data.write_demo(folder / 'labelled', 6, True, seed=0)
    data.write_demo(folder / 'unlabelled', 4, False, seed=1)
    return f'--labelled={folder / "labelled"}', f'--unlabelled={folder / "unlabelled"}'


@pytest.fixture(scope='session')
def trained(demo, tmp_path_factory):
    """The folder of a checkpoint that has seen a few steps."""
    out = tmp_path_factory.mktemp('trained') / 'out'
    script('train.py', *demo, *SMALL, '--workers=2', '--max_steps=20', f'--out_dir={out}')
    return out
