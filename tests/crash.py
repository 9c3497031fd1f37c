"""
Kills training at random moments, starts it again, and compares what it ends with, bit for bit, to a run that nobody
disturbed: weights, their average, statistics, optimizer and log.

    python tests/crash.py                   # 50 kills, 10 full disks, a killed process of two: some ten minutes on two cores
    python tests/crash.py --kills=5 --disks=1 --torchrun=False

A moment is anywhere in a run (reading, encoding, computing, evaluating), or while a file of latents, a checkpoint or a
dataset is being written. A run is killed again and again until one kill comes too late.
"""
import glob
import json
import os
import random
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time

os.environ['OMP_NUM_THREADS'] = '1'

import safetensors.torch
import torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
sys.path.insert(0, ROOT)
import data  # noqa: E402, from the root
import model  # noqa: E402, F401, so that children need not import it

# --------------------------------------------------------------------------------------------------------------------
kills = 50
disks = 10          # that are full at a random byte of a save
torchrun = True
seed = 0
data.override(globals(), sys.argv[1:])
# --------------------------------------------------------------------------------------------------------------------
rng = random.Random(seed)
os.chdir(tempfile.mkdtemp(prefix='crash'))
print(f'in {os.getcwd()}', flush=True)
data.write_demo('labelled', 8, True, 1)
data.write_demo('unlabelled', 4, False, 2)
TRAIN = ('train.py', '--labelled=labelled', '--unlabelled=unlabelled', '--width=64', '--layers=2', '--heads=2',
         '--kv_heads=1', '--batch_size=4', '--eval_clips=4', '--K=2', '--dtype=float32', '--device=cpu', '--max_steps=16',
         '--bootstrap_start=0.2', '--save_interval=2', '--log_interval=1', '--eval_interval=6')
RECORD = 'data.py', '--videos=*/videos/*/*/*.mp4', '--frame_height=64'


def start(script, *options, bytes_of_a_file=-1):
    """The pid of a child that runs a script of the project; what it says is in its own file."""
    pid = os.fork()
    if pid:
        return pid
    out = os.open(f'{os.getpid()}.txt', os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_of_a_file, -1))
    sys.argv = [script, *options]
    code = 0
    try:
        runpy.run_path(f'{ROOT}/{script}', run_name='__main__')
    except BaseException as error:
        print(error, flush=True)
        code = 1
    os._exit(code)


def ended(pid, code=0):
    """What it said, of a child that ended well; None of one that was killed."""
    status = os.waitpid(pid, 0)[1]
    said = open(f'{pid}.txt').read()
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == code, said
    return None if os.WIFSIGNALED(status) else said


def files(out):
    """{name: bytes} of the files of a dataset, or of a checkpoint."""
    found = glob.glob(f'{out}/*.[ps]*[st]') + glob.glob(f'{out}/*/**/*.*', recursive=True)
    return {path.removeprefix(out): open(path, 'rb').read() for path in found if os.path.isfile(path)}


def contents(out):
    """What two runs are compared by: the tensors and the log, but for options and speeds."""
    if not os.path.isdir(f'{out}/meta'):
        state = torch.load(f'{out}/optim.pt')
        found = safetensors.torch.load_file(f'{out}/ckpt.safetensors') | {'rms': state['rms']}
        for i, moments in state['optimizer']['state'].items():
            found |= {f'{i}.{name}': v for name, v in moments.items()}
        found = {name: v.numpy().tobytes() for name, v in found.items()}
        log = [json.loads(line) for line in open(f'{out}/log.jsonl')]
        return found, [{k: v for k, v in entry.items() if k != 'tokens_per_s'} for entry in log]
    return files(out)


def goes_on(out, i):
    """The options of a run's next part, as its owner would give them."""
    resume = os.path.exists(f'{out}/ckpt.safetensors')
    return *TRAIN, f'--out_dir={out}', f'--cache_dir=latents{i}', f'--resume={resume}'


def kill(pid, moment, out, i, seconds):
    """True if the child was killed at the moment, False if it had ended before."""
    begun = time.monotonic()
    delay = rng.uniform(0, seconds)
    traces = dict(saving=f'{out}/*.new*', latents=f'latents{i}/*/*.npy.*', recording=f'{out}*tmp*')
    if moment in traces:
        delay = rng.uniform(0, 0.02 if moment == 'saving' else seconds / 4)
        old = set(glob.glob(traces[moment]))
        while not set(glob.glob(traces[moment])) - old and time.monotonic() < begun + seconds:
            time.sleep(1e-4)
        begun = time.monotonic()
    time.sleep(max(0, begun + delay - time.monotonic()))
    os.kill(pid, signal.SIGKILL)
    return ended(pid) is None


def undisturbed(*options):
    begun = time.monotonic()
    ended(start(*options))
    return time.monotonic() - begun


def has_saved(out, i):
    """Kills a run until there is a checkpoint of it."""
    while not os.path.exists(f'{out}/ckpt.safetensors'):
        kill(start(*goes_on(out, i)), 'saving', out, i, seconds)


def processes(out, restarts=0):
    """torchrun with two of them."""
    return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
         f'--max-restarts={restarts}', f'{ROOT}/train.py', *TRAIN[1:], f'--out_dir={out}'],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_one_of_two(out, restarts):
    """What is said and how long it takes after one process of two is killed, once there is a checkpoint."""
    run = processes(out, restarts)
    while not os.path.exists(f'{out}/ckpt.safetensors'):
        time.sleep(0.01)
    with open(f'/proc/{run.pid}/task/{run.pid}/children') as f:
        os.kill(rng.choice([int(pid) for pid in f.read().split()]), signal.SIGKILL)
    begun = time.monotonic()
    said = run.communicate()[0]
    return run.returncode, said, time.monotonic() - begun


seconds = undisturbed(*goes_on('whole', 0))
seconds_recording = undisturbed(*RECORD, '--out=recorded')
whole, recorded = contents('whole'), contents('recorded')
print(f'undisturbed: {seconds:.1f} s, a recording {seconds_recording:.1f} s', flush=True)
assert len(recorded) > 4
count = dict.fromkeys(('anywhere', 'saving', 'latents', 'recording'), 0)
i = 0
while sum(count.values()) < kills:
    i += 1
    if i % 4 == 0:
        while kill(start(*RECORD, f'--out=r{i}'), 'recording', f'r{i}', i, seconds_recording):
            count['recording'] += 1
        assert contents(f'r{i}') == recorded, f'r{i} differs'
        continue
    moment = 'latents'
    while kill(start(*goes_on(f'o{i}', i)), moment, f'o{i}', i, seconds):
        count[moment] += 1
        moment = rng.choice(('anywhere', 'saving', 'saving', 'latents'))
    assert contents(f'o{i}') == whole, f'o{i} differs'
    print(f'run {i}: {count}', flush=True)
print(f'{sum(count.values())} kills, {count}: every run went on, and ended with the same bits')

for i in range(disks):
    out = f'd{i}'
    has_saved(out, 0)
    before = files(out)
    room = rng.randrange(10000, os.path.getsize(f'{out}/optim.pt'))
    said = ended(start(*goes_on(out, 0), bytes_of_a_file=room), code=1)
    assert 'cannot be written' in said.splitlines()[-1] and 'Traceback' not in said, said
    assert files(out) == before, f'{out} has lost its checkpoint'
    undisturbed(*goes_on(out, 0))
    assert contents(out) == whole, f'{out} differs'
print(f'{disks} full disks: one line each, the checkpoint before stayed, and its run went on to the same bits')

if torchrun:
    said = processes('two').communicate()[0]
    code, said, took = kill_one_of_two('one', 0)
    print(f'one process of two killed: ended with {code} after {took:.0f} s')
    assert code and took < 60 and 'SIGKILL' in said, said
    code, said, took = kill_one_of_two('again', 1)
    assert code == 0 and contents('again') == contents('two'), said
    print(f'with --max-restarts=1 it went on to the same bits in {took:.0f} s')
