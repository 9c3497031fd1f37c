"""
Kills training at random moments and starts it again; what it ends with must be what an undisturbed run ends with, bit
for bit: weights, their average, statistics, optimizer and log.

    python tests/crash.py           # 50 kills, 10 full disks, one process of two: a quarter of an hour on two cores

A moment is anywhere in a run (opening, encoding, computing, evaluating), or one at which a file of latents, a checkpoint
or a dataset is being written. A run is killed eight times, if no kill comes too late.
"""
import contextlib
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

import safetensors.torch  # noqa: E402
import torch  # noqa: E402

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
sys.path.insert(0, ROOT)
import data  # noqa: E402, from the root
import model  # noqa: E402, F401, so that no child has to import it

kills = 50
disks = 10          # that are full at a random byte of a save
torchrun = True
seed = 0
data.override(globals(), sys.argv[1:])
rng = random.Random(seed)
os.chdir(tempfile.mkdtemp(prefix='crash'))
data.write_demo('labelled', 8, True, 1)
data.write_demo('unlabelled', 4, False, 2)
TRAIN = ('--labelled=labelled --unlabelled=unlabelled --width=64 --layers=2 --heads=2 --kv_heads=1 --batch_size=4 --K=2 '
         '--eval_clips=4 --dtype=float32 --device=cpu --max_steps=16 --bootstrap_start=0.2 --save_interval=2 '
         '--log_interval=1 --eval_interval=6').split()
RECORD = 'data.py', '--videos=*labelled/videos/*/*/*.mp4', '--frame_height=64'
count = dict.fromkeys(('anywhere', 'saving', 'latents', 'recording'), 0)


def start(script, *options, largest_file=-1):
    """The pid of a child that runs a script of the project; what it says is in PID.txt."""
    pid = os.fork()
    if pid:
        return pid
    for descriptor in 1, 2:
        os.dup2(os.open(f'{os.getpid()}.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, -1))
    sys.argv = [script, *options]
    try:
        runpy.run_path(f'{ROOT}/{script}', run_name='__main__')
    except SystemExit as error:
        print(error, flush=True)
        os._exit(1)
    os._exit(0)


def ended(pid, code=0):
    """What a child said that ended with that code; None of one that was killed."""
    status = os.waitpid(pid, 0)[1]
    said = open(f'{pid}.txt').read()
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == code, said
    return None if os.WIFSIGNALED(status) else said


def run(out, i=0):
    """What begins a run, or goes on with it, as its owner would."""
    resume = os.path.exists(f'{out}/ckpt.safetensors')
    return 'train.py', *TRAIN, f'--out_dir={out}', f'--cache_dir=latents{i}', f'--resume={resume}'


def newest(pattern):
    """When one of some files was last changed."""
    times = [0]
    for path in glob.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            times.append(os.path.getmtime(path))
    return max(times)


def kill(pid, moment, out, i, seconds):
    """At a moment, unless the child ends before."""
    begun = time.time()
    end = begun + rng.uniform(0.3 * seconds, seconds)
    traces = dict(saving=f'{out}/*.new*', latents=f'latents{i}/*', recording=f'{out}*tmp*')
    while time.time() < end and (moment not in traces or newest(traces[moment]) <= begun):
        time.sleep(1e-4)
    time.sleep(rng.uniform(0, dict(saving=0.02, latents=1, recording=seconds).get(moment, 0)))
    os.kill(pid, signal.SIGKILL)
    count[moment] += ended(pid) is None


def files(out):
    """{name: bytes} of a dataset, or of a checkpoint."""
    found = glob.glob(f'{out}/*.[ps]*[st]') + glob.glob(f'{out}/*/**/*.*', recursive=True)
    return {path.removeprefix(out): open(path, 'rb').read() for path in found if os.path.isfile(path)}


def result(out):
    """What runs are compared by: all tensors; the log, but for speeds."""
    state = torch.load(f'{out}/optim.pt')
    found = safetensors.torch.load_file(f'{out}/ckpt.safetensors') | {'rms': state['rms']}
    for i, moments in state['optimizer']['state'].items():
        found |= {f'{i}.{name}': v for name, v in moments.items()}
    log = [json.loads(line) | dict(tokens_per_s=0) for line in open(f'{out}/log.jsonl')]
    return {name: v.numpy().tobytes() for name, v in found.items()}, log


def finish(out, i=0):
    ended(start(*run(out, i)))
    assert result(out) == whole, f'{out} differs'


def two_processes(out, restarts, kill_one):
    """torchrun's code, what it says, and how long it takes from when one is killed, once it has saved."""
    run = subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                            f'--max-restarts={restarts}', f'{ROOT}/train.py', *TRAIN, f'--out_dir={out}'],
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while kill_one and not os.path.exists(f'{out}/ckpt.safetensors'):
        time.sleep(0.01)
    begun = time.monotonic()
    if kill_one:
        children = open(f'/proc/{run.pid}/task/{run.pid}/children').read().split()
        os.kill(int(rng.choice(children)), signal.SIGKILL)
    said = run.communicate()[0]
    return run.returncode, said, time.monotonic() - begun


begun = time.monotonic()
ended(start(*run('whole')))
seconds = time.monotonic() - begun
ended(start(*RECORD, '--out=recorded'))
recording = time.monotonic() - begun - seconds
whole = result('whole')
print(f'undisturbed: {seconds:.1f} s, a recording {recording:.1f} s', flush=True)
i = 0
while sum(count.values()) < kills:
    i += 1
    kill(start(*RECORD, f'--out=r{i}'), 'recording', f'r{i}', i, recording)
    if not os.path.exists(f'r{i}'):
        ended(start(*RECORD, f'--out=r{i}'))
    assert files(f'r{i}') == files('recorded'), f'r{i} differs'
    for moment in 'latents', *rng.choices(('anywhere', 'saving', 'saving', 'latents'), k=7):
        kill(start(*run(f'o{i}', i)), moment, f'o{i}', i, seconds)
    finish(f'o{i}', i)
    print(f'run {i} has the same bits: {count}', flush=True)

for i in range(disks):
    out = f'd{i}'
    while not os.path.exists(f'{out}/ckpt.safetensors'):
        kill(start(*run(out)), 'saving', out, 0, seconds)
    before = files(out)
    room = rng.randrange(20000, os.path.getsize(f'{out}/optim.pt'))
    said = ended(start(*run(out), largest_file=room), code=1)
    assert 'cannot be written' in said.splitlines()[-1] and 'Traceback' not in said, said
    assert files(out) == before, f'{out} has lost its checkpoint'
    finish(out)
    print(f'full after {room:,} bytes: one line, the checkpoint before stays, the same bits in the end', flush=True)

if torchrun:
    code, said, took = two_processes('one', 0, True)
    assert code and took < 60 and 'SIGKILL' in said, said
    print(f'one process of two killed: the end after {took:.0f} s', flush=True)
    two_processes('two', 0, False)
    code, said, took = two_processes('again', 1, True)
    assert code == 0 and result('again') == result('two'), said
    print(f'with --max-restarts=1: the same bits after {took:.0f} s')
