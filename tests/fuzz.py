"""
Mutated files and options, for all that reads them: real ones with bytes flipped, cut, repeated and
spliced, and with values, keys, types and lengths of their JSON, tables and weights exchanged.

    python tests/fuzz.py --n=100000                 # under an hour on one core
    python tests/fuzz.py --only=video --n=2000
    python tests/fuzz.py --first=1234 --n=1         # one input again, with its traceback; its files stay

A find, and exit code 1, is any end but a value or one line of the project's own; a process that dies; an
input that takes more than 10 seconds or 2 GiB; a file written or a program begun outside the scratch folder.
"""
import collections
import contextlib
import faulthandler
import glob
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import traceback
from pathlib import Path

os.environ['HF_ENDPOINT'] = 'http://127.0.0.1:9'        # names on the hub reach nobody
sys.dont_write_bytecode = True

import av  # noqa: E402
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from conftest import ROOT, SMALL, data, script, write_lerobot
from test_data import coded, episode, write_v2
import model
import plan

# --------------------------------------------------------------------------------------------------
n = 3000
first = 0           # number of the first input
only = ''           # kinds, comma-separated; '' = all
seed = 0
seconds = 10        # of a processor, that an input may take; three times as many on the clock
gigabytes = 2.0     # of memory that it may take
config = data.override(globals(), sys.argv[1:] if __name__ == '__main__' else [])
# --------------------------------------------------------------------------------------------------

WORDS = ('', ' ', '.', '..', '../../outside', '/etc/passwd', '{x.__class__}', '{episode_index.__class__}', '{0}', '{', '{}',
         '{episode_index:9999999999d}', '{chunk_index:>999999999}', '%03d', '\0', '\ud800', 'a' * 5000, 'é/日本', 'nan', 'v2.0',
         'v3.0', '1e999', '9' * 5000, 'None', '<f4', 'float32', 'int64', 'video', 'image', 'a\nb', 'a/b', 'a:2', ',', '*')
VALUES = (*WORDS, 0, -1, 1, 2, 7, 0.5, -0.5, 1e-300, 1e308, math.inf, -math.inf, math.nan, 255, 10 ** 5, 2 ** 31 - 1, 2 ** 31,
          2 ** 32, 2 ** 63 - 1, 2 ** 63, 10 ** 30, -2 ** 63, None, True, False, [], {}, [[]], [1, 2, 3], [0] * 1000, {'a': 1},
          [None], ['a'])
PIECES = (b'\0', b'\xff', b'\xff' * 4, b'\xff' * 8, b'\0' * 8, b'\x7f\xff\xff\xff', b'\x80\0\0\0', b'NaN', b'1e999', b'"', b'\n',
          b'[' * 100000, b'{"a":' * 50000, b'9' * 5000, b'\\ud800', b'\xef\xbb\xbf', b'version https://git-lfs')
TYPES = (pa.string(), pa.large_string(), pa.binary(), pa.bool_(), pa.int8(), pa.int64(), pa.uint64(), pa.float16(), pa.null(),
         pa.float64(), pa.decimal128(20, 3), pa.timestamp('ns'), pa.date32(), pa.list_(pa.float32()), pa.list_(pa.float32(), 2),
         pa.list_(pa.list_(pa.float64())), pa.large_list(pa.int8()), pa.dictionary(pa.int32(), pa.string()),
         pa.struct([('bytes', pa.binary()), ('path', pa.string())]), pa.map_(pa.string(), pa.int8()))
TINY = 32, 2, 2, 64, False, 0, 14, 4        # of a ViT, as in model.ENCODERS
SEEDS = ''                                  # the folder of unchanged files, in the scratch folder
TRAIN = (*SMALL, '--frames=3', '--context=3', '--eval_context=1', '--val_share=0.4', '--unlabelled=', '--workers=0')
SEARCH = dict(samples=4, elites=2, iterations=1, horizon=2)


# mutations; with rng None everything stays as it is

def bytes_of(rng, content, other):
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16)) if rng else 0):
        size = len(content) or 1
        near = rng.randrange(min(size, 200))            # headers are at the beginning or at the end
        at = rng.choice((rng.randrange(size), near, size - 1 - near))
        end = at + rng.choice((1, 2, 4, 8, 40, size))
        way = rng.randrange(9)
        if way < 3 and content:
            content[at] ^= 1 << rng.randrange(8)
        elif way == 3:
            del content[at:end]
        elif way == 4:
            content[at:at] = content[at:end] * rng.choice((1, 2, 50))
        elif way == 5:
            piece = rng.choice(PIECES)
            content[at:rng.choice((at, at + len(piece)))] = piece
        elif way == 6:
            number = rng.choice((0, 1, 255, 4096, 65535, 10 ** 6, 2 ** 31 - 1, 2 ** 32 - 1))
            content[at:at + 4] = number.to_bytes(4, rng.choice(('big', 'little')))
        elif way == 7:
            content[at:] = other[rng.randrange(len(other)):]
        else:
            content[at:end] = rng.randbytes(min(end, size) - at)
    return bytes(content)


def places(x):
    """Every (dict or list, key) in a tree of them."""
    keys = range(len(x)) if isinstance(x, list) else list(x) if isinstance(x, dict) else ()
    for key in keys:
        yield x, key
        yield from places(x[key])


def tree_of(rng, x):
    """Values, keys, types and lengths of dicts and lists, changed in place."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8)) if rng else 0):
        there = list(places(x))
        if not there:
            break
        box, key = rng.choice(there)
        value = box[key]
        way = rng.randrange(8)
        if way == 0:
            del box[key]
        elif way == 1 and isinstance(box, dict):
            box[rng.choice((*WORDS, f'{key}{key}'))] = box.pop(key)
        elif way == 2:
            other, name = rng.choice(there)
            box[key] = pickle.loads(pickle.dumps(other[name]))
        elif way == 3 and isinstance(box, list):
            box += [value] * rng.choice((1, 3))
        elif way == 4 and type(value) in (int, float) and abs(value) < 1e18:
            box[key] = rng.choice((value + 1, value - 1, -value, value * 1000, str(value), float(value)))
        elif way == 5:
            box[key] = rng.choice(([value], {'a': value}, str(value)[:100]))
        else:
            box[key] = rng.choice(VALUES)
    return x


NOT_WRITTEN = pa.ArrowException, TypeError, ValueError, LookupError, OverflowError, RecursionError, AttributeError


def table_of(rng, path):
    """A parquet file with other values, columns, types, lengths and row groups."""
    table = pq.read_table(path)
    columns = {}
    for name, values in tree_of(rng, table.to_pydict()).items():
        kind = table.schema.field(name).type if name in table.column_names else None
        kind = rng.choice((kind, kind, kind, kind, rng.choice(TYPES))) if rng else kind
        values = values if isinstance(values, list) else [values] * table.num_rows
        try:
            columns[name] = pa.array(values, kind)
        except NOT_WRITTEN:
            columns[name] = pa.nulls(len(values), kind)
    rows = max(map(len, columns.values()))
    for name, values in columns.items():
        columns[name] = pa.concat_arrays([values, pa.nulls(rows - len(values), values.type)])
    pq.write_table(pa.table(columns), path, rng.choice((1, 2, 100)) if rng else 100)


def header_of(rng, content):
    """A safetensors file with another header; the JSON in its metadata is changed as well."""
    end = 8 + int.from_bytes(content[:8], 'little')
    header = json.loads(content[8:end])
    texts = header.get('__metadata__', {})
    for name in {'config', 'model'} & texts.keys():
        texts[name] = json.loads(texts[name])
    tree_of(rng, texts if rng and texts and rng.random() < 0.7 else header)
    for name, value in texts.items():
        texts[name] = value if isinstance(value, str) else json.dumps(value)
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, 'little') + header + content[end:]


def change(rng, path):
    """A file in a way of its kind, or byte by byte; a few become something else."""
    with open(path, 'rb') as f:
        content = f.read()
    way = rng.random() if rng else 0.5
    if way < 0.01:
        os.remove(path)
        return rng.choice((os.mkdir, os.mkfifo, str, lambda x: os.symlink(x, x)))(path)
    ending = os.path.splitext(path)[1]
    try:
        if ending == '.safetensors' and way < 0.7:
            content = header_of(rng, content)
        elif ending == '.parquet' and way < 0.7:
            return table_of(rng, path)
        elif ending in ('.pt', '.pth') and way < 0.7:
            buffer = io.BytesIO()
            torch.save(tree_of(rng, torch.load(path, weights_only=True)), buffer)
            content = buffer.getvalue()
        elif ending in ('.json', '.jsonl') and way < 0.7:
            lines = content.splitlines() if ending == '.jsonl' else [content]
            content = '\n'.join(map(json.dumps, tree_of(rng, [*map(json.loads, lines)]))).encode()
        else:
            content = bytes_of(rng, content, Path(some(rng, '[pvw]*s/*.*')).read_bytes())
    except NOT_WRITTEN:
        content = content[1:]
    with open(path, 'wb') as f:
        f.write(content)


def some(rng, pattern, folder=''):
    """One of the files that fit."""
    found = sorted(glob.glob(f'{folder or SEEDS}/{pattern}', recursive=True))
    return rng.choice(found) if rng else found[0]


# what reads them: functions of (rng, an empty folder)

def use(root, *options):
    """What training does with a dataset."""
    ds = data.LeRobot(root, *options)
    for e in range(min(3, len(ds.episodes))):
        with fine():
            clip = ds.clip(e, 0, 3, 1, (16, 24))
            assert clip['x'].shape == (3, 3, 16, 24) and clip['a'].isfinite().all()
        with fine():
            ds.frames(e, [ds.episodes[e].length - 1], 0, ds.cameras[-1])
    data.Clips([ds][:ds.action_dim], [ds][ds.action_dim:], 3, 1, (16, 24), 2, 1.0, 0.3)[0]


def dataset(pattern):
    def read(rng, place):
        path = some(rng, f'*/{pattern}')
        root = '/'.join(path.split('/')[:len(SEEDS.split('/')) + 1])
        shutil.copytree(root, f'{place}/d')
        change(rng, path.replace(root, f'{place}/d'))
        use(f'{place}/d')
    return read


def picture(rng, place):
    path = shutil.copy(some(rng, 'pictures/*'), place)
    change(rng, path)
    data.read_image(path, rng.choice((0, 20, (16, 24))) if rng else 0)


def videos(rng, place):
    path = shutil.copy(some(rng, 'videos/*'), place)
    change(rng, path)
    data.import_videos(f'{place}/out', path, rng.choice((0, 5, 30)) if rng else 0, (16, 24))
    data.LeRobot(f'{place}/out').frames(0, [0])


def checkpoint(rng, place):
    path = shutil.copy(f'{SEEDS}/out/ckpt.safetensors', place)
    change(rng, path)
    planner = plan.Planner(path, plan.config | SEARCH, tell=False)
    row = planner.act(np.zeros((planner.past, 32, 48, 3), np.uint8), np.full((32, 48, 3), 255, np.uint8))
    assert row.shape == (planner.width,)


def weights(rng, place):
    path = shutil.copy(some(rng, 'weights/*'), place)
    change(rng, path)
    encoder = model.load_encoder('tiny2', path, height=28)
    assert encoder(torch.zeros(1, 3, 28, 28)).shape == (1, 4, 32)


def latents(rng, place):
    shutil.copytree(f'{SEEDS}/latents', f'{place}/latents')
    change(rng, some(rng, 'latents/*/*', place))
    ds = data.LeRobot(f'{SEEDS}/v3')
    encode = model.load_encoder('pixels', height=14, width=21)
    clips = data.Clips([ds], [], 3, 1, (14, 21), 2, 1.0, 0.3)
    cpu = torch.device('cpu')
    clips.tokens = data.cached_latents([ds], encode, cpu, data.autocast(cpu, 'float32'), f'{place}/latents')
    assert clips[0]['z'].shape == (2, 3, 6, 24)


def options(rng, place):
    """What is accepted can be counted with, and opens a dataset or says why not."""
    name = rng.choice(('train.py', 'plan.py', 'decode.py', 'data.py')) if rng else 'train.py'
    block = re.findall(r'# -{40,}\n((?:(?! *# -{40,}).*\n)+?) *config = ', (ROOT / name).read_text('utf8'))[-1]
    g = dict(__doc__='')
    exec(textwrap.dedent(block), g)
    del g['__builtins__']
    argv = []
    for _ in range(rng.choice((1, 1, 2, 3)) if rng else 0):
        text = f'--{rng.choice(list(g))}={rng.choice(VALUES)}'
        argv.append(rng.choice((text, text, text, bytes_of(rng, text.encode('utf8', 'replace'), b'-').decode('utf8', 'replace'))))
    for name, value in data.override(g, argv).items():
        if isinstance(value, (int, float)):
            assert abs(value) < (math.inf if isinstance(value, float) else 2 ** 63), f'--{name}={value} is accepted'
    if rng:
        word, camera, action = rng.sample(WORDS, 3)
        path = rng.choice((word, f'{SEEDS}/v3:{word}', f'{SEEDS}/v3,{word}'))
        camera = rng.choice(('', camera, f'top:{camera}', f'{camera},top'))
        data.open_sets(path, camera, rng.choice(('', action, f'action,{action}')), g.get('fps', 0.0))


def scripts(rng, place):
    """What a run leaves behind, for what goes on from it and looks at it; pictures for plan.py."""
    out = shutil.copytree(f'{SEEDS}/out', f'{place}/out')
    shutil.copy(f'{SEEDS}/pictures/a.png', out)
    names = ['optim.pt', 'optim.pt', 'ckpt.safetensors', 'log.jsonl', 'decoder.safetensors', 'a.png']
    name = rng.choice(names) if rng else 'optim.pt'
    change(rng, f'{out}/{name}')
    ckpt = f'--ckpt={out}/ckpt.safetensors'
    if name == 'a.png':
        pictures = f'--start={SEEDS}/pictures/a.png', f'--goal={out}/a.png', f'--mask={out}/a.png'
        script('plan.py', ckpt, *pictures, *(f'--{key}={value}' for key, value in SEARCH.items()))
    elif name == 'decoder.safetensors' or rng and rng.random() < 0.2:
        script('decode.py', ckpt, '--rows=1', '--steps=2')
    else:
        script('train.py', *TRAIN, f'--labelled={SEEDS}/v3', '--resume=True', '--max_steps=3', f'--out_dir={out}')


KINDS = {       # how many of a hundred, and what reads them
    'info': (14, dataset('meta/info.json')), 'lines': (10, dataset('meta/*s*.json*')), 'table': (18, dataset('**/*.parquet')),
    'video': (14, dataset('videos/**/*.mp4')), 'videos': (5, videos), 'picture': (14, picture), 'checkpoint': (8, checkpoint),
    'weights': (6, weights), 'latents': (4, latents), 'options': (6.7, options), 'scripts': (0.3, scripts)}


def make_seeds():
    """What is changed, as small as may be: by the project's own writers, and by others'."""
    lengths = 6, 5, 7
    write_lerobot(f'{SEEDS}/v3', [episode(length, i) for i, length in enumerate(lengths)], 10)
    write_v2(f'{SEEDS}/v2', 'v2.1', lengths=lengths)
    shutil.copy(f'{SEEDS}/v3/meta/stats.json', f'{SEEDS}/v2/meta')
    write_v2(f'{SEEDS}/image', 'v2.0', lengths=lengths, image=True)
    stats = json.loads(Path(f'{SEEDS}/v3/meta/stats.json').read_text())
    lines = [json.dumps(dict(episode_index=i, stats=stats)) for i in range(3)]
    Path(f'{SEEDS}/image/meta/episodes_stats.jsonl').write_text('\n'.join(lines))
    for name in ('pictures', 'videos', 'weights'):
        os.mkdir(f'{SEEDS}/{name}')
    shot = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    for ending, codec, kind in (('png', 'png', 'rgb24'), ('jpg', 'mjpeg', 'yuvj420p'), ('bmp', 'bmp', 'bgr24'),
                                ('gif', 'gif', 'rgb8'), ('tif', 'tiff', 'rgb24'), ('webp', 'libwebp', 'yuv420p'),
                                ('ppm', 'ppm', 'rgb24')):
        Path(f'{SEEDS}/pictures/a.{ending}').write_bytes(coded(shot, codec, kind))
    for ending, codec, kind, rate in (('mp4', 'libx264', 'yuv420p', 10), ('mkv', 'libx264', 'yuv420p', 30),
                                      ('ts', 'libx264', 'yuv420p', 25), ('avi', 'mpeg4', 'yuv420p', 10),
                                      ('webm', 'libvpx-vp9', 'yuv420p', 25), ('mov', 'mjpeg', 'yuvj420p', 10)):
        with av.open(f'{SEEDS}/videos/a.{ending}', 'w') as container:
            stream = container.add_stream(codec, rate, width=48, height=32, pix_fmt=kind)
            for i in range(6):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(shot.clip(20 * i, 255), 'rgb24')))
            container.mux(stream.encode(None))
    state = model.ViT(*TINY).state_dict()
    safetensors.torch.save_file(state, f'{SEEDS}/weights/tiny2.safetensors')
    torch.save({'model': state}, f'{SEEDS}/weights/tiny2.pth')
    os.chdir(SEEDS)
    script('train.py', *TRAIN, f'--labelled={SEEDS}/v3', '--max_steps=2', '--out_dir=out')
    script('decode.py', '--train=True', '--train_steps=2', '--train_frames=32', '--rows=1', '--steps=2')
    sets = [data.LeRobot(f'{SEEDS}/v3')]
    cpu = torch.device('cpu')
    encode = model.load_encoder('pixels', height=14, width=21)
    data.cached_latents(sets, encode, cpu, data.autocast(cpu, 'float32'), f'{SEEDS}/latents')
    for name, (_, read) in KINDS.items():       # what is not changed must be read
        os.mkdir(f'{SEEDS}/../{name}')
        read(None, f'{SEEDS}/../{name}')


# one input, and many

class Find(BaseException):
    """What is wrong with the way in which an input ended."""


@contextlib.contextmanager
def fine():
    """Ends well, or in one line of the project's own, or else in a Find."""
    try:
        yield
    except Find:
        raise
    except BaseException as error:
        why = fault(error)
        if why:
            raise Find(why) from error


def fault(error):
    name = type(error).__name__
    text = str(error)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(f'{ROOT}/')]
    own = isinstance(error, (data.Bad, data.Away, SystemExit)) or name == 'ValueError' and frames[-1].line.startswith('raise')
    cause = error
    while cause:
        if isinstance(cause, MemoryError) or re.search('allocate.*memory|memory.*alloc', str(cause)):
            own = False
            text = f'memory: {cause} {text}'
        cause = cause.__context__
    if own and text and '\n' not in text:
        return ''
    frames = [f for f in frames if f.filename != __file__] or frames
    where = [f'{os.path.basename(f.filename)}:{f.lineno}' for f in frames[-1:]]
    return f'{name} at {"".join(where)}: {" ".join(text.split())[:160]}'


def guard(event, arguments):
    """An audit hook: ends an input that writes elsewhere, or begins a program."""
    path = ''
    if event == 'open' and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        path = arguments[0]
    elif event in ('os.mkdir', 'os.remove', 'os.rmdir', 'os.truncate', 'os.chmod'):
        path = arguments[0]
    elif event in ('os.rename', 'os.link', 'os.symlink'):
        path = arguments[1]
    elif event in ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn'):
        raise Find(f'{event} {arguments}')
    if path and isinstance(path, (str, os.PathLike)) and path != os.devnull:
        if not os.path.realpath(path).startswith(os.path.dirname(SEEDS)):
            raise Find(f'{event} of {path}')


def attempt(i, log):
    """Try input i; the log has that it began, and what was wrong with its end."""
    rng = random.Random(f'{seed} {i}')
    names = only.split(',') if only else list(KINDS)
    kind = rng.choices(names, [KINDS[name][0] for name in names])[0]
    print(json.dumps([i, kind, 'begun']), file=log)
    place = f'{os.path.dirname(SEEDS)}/{i}'
    os.mkdir(place)
    os.chdir(place)
    data._warned.clear()
    why = ''
    try:
        with fine():
            KINDS[kind][1](rng, place)
    except Find as find:
        why = str(find)
        if n == 1:
            traceback.print_exc()
    if n > 1:
        shutil.rmtree(place)
    print(json.dumps([i, kind, why]), file=log)


def work(begin, log, stack):
    """Inputs, one after the other, until one of them ends this process."""
    faulthandler.enable(stack)
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
        faulthandler.register(number, stack, chain=True)
    sys.addaudithook(guard)
    size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize() + int(gigabytes * 2 ** 30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    for i in range(begin, min(begin + 2000, first + n)):
        # their signals end the process: neither a loop in C nor an except escapes them
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 3 * seconds)
        attempt(i, log)


def forked(call, *arguments):
    """How a process of this call ended, as os.waitpid says it."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    code = 1
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1,) if n == 1 or call is make_seeds else (1, 2):
            os.dup2(nowhere, number)
        call(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main():
    global SEEDS
    scratch = os.path.realpath(tempfile.mkdtemp(prefix='fuzz'))
    SEEDS = f'{scratch}/seeds'
    os.mkdir(SEEDS)
    tempfile.tempdir = SEEDS
    torch.set_num_threads(1)
    model.ENCODERS['tiny2'] = ('nobody/tiny2', *TINY)
    begun = time.monotonic()
    if forked(make_seeds):
        sys.exit('what is not mutated cannot be read')
    made = time.monotonic() - begun
    begin = first
    finds = collections.defaultdict(list)       # {(kind, why, numbers apart): [(input, why)]}
    counts = collections.Counter()
    while begin < first + n:
        with open(f'{scratch}/log', 'w+', buffering=1) as log, open(f'{scratch}/stack', 'w+') as stack:
            status = forked(work, begin, log, stack)
            log.seek(0)
            lines = [json.loads(line) for line in log]
            calls = re.findall(f'File "{ROOT}/(?!tests)(.*)", line (\\d+)', Path(stack.name).read_text())
            begin, kind, why = lines[-1]
            if status:
                why = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else 'exit'
                lines[-1][2] = f'{why} at {":".join(calls[0])}: ' if calls else f'{why} '
            begin += 1
            for i, kind, why in lines:
                if why != 'begun':
                    counts[kind] += 1
                if why not in ('begun', ''):
                    finds[kind, why.partition(':')[0] + why.partition(':')[2][:5]].append((i, why))
            if sys.stderr.isatty() or n > 10000:
                print(f'{begin - first:,} of {n:,}, {sum(map(len, finds.values()))} finds of {len(finds)} kinds, '
                      f'{time.monotonic() - begun:.0f} s', file=sys.stderr)
    for (kind, _), found in sorted(finds.items(), key=lambda item: -len(item[1])):
        print(f'{len(found):6} {kind:10} --first={found[0][0]}: {found[0][1]}')
    print(f'{n:,} inputs in {time.monotonic() - begun:.0f} s ({made:.0f} s to make what is mutated): {sum(map(len, finds.values()))} finds of {len(finds)} kinds;', dict(counts))
    if n == 1:
        print('files:', scratch)
    else:
        shutil.rmtree(scratch)
    sys.exit(bool(finds))


if __name__ == '__main__':
    main()
