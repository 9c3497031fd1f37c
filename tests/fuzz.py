"""
Mutated files and options, for all that reads them: real ones with bytes flipped, cut, repeated and
spliced, and with values, keys, types and lengths of their JSON, tables and weights exchanged.

    python tests/fuzz.py --n=100000                 # under an hour on one core
    python tests/fuzz.py --only=video --n=2000
    python tests/fuzz.py --first=1234 --n=1         # one input again: its traceback, and its files

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
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
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
seconds = 10        # of a processor, that an input may take; six times as many on the clock
gigabytes = 2.0     # of memory that it may take
config = data.override(globals(), sys.argv[1:])
# --------------------------------------------------------------------------------------------------

WORDS = ('', ' ', '.', '..', '../../outside', '/etc/passwd', '{x.__class__}', '{episode_index.__class__}', '{0}', '{',
         '{episode_index:9999999999d}', '{chunk_index:>999999999}', '%03d', '\0', '\ud800', 'a' * 5000, 'é/日本', 'nan',
         'v2.0', 'v3.0', '1e999', '9' * 5000, 'None', '<f4', 'float32', 'int64', 'video', 'image', 'a\nb', 'a/b', 'a:2',
         '{}', ',', '*')
VALUES = (*WORDS, 0, -1, 1, 2, 7, .5, -.5, 1e-300, 1e308, math.inf, -math.inf, math.nan, 255, 10 ** 5, 2 ** 31 - 1,
          2 ** 31, 2 ** 32, 2 ** 63 - 1, 2 ** 63, 10 ** 30, -2 ** 63, None, True, False, [], {}, [[]], [1, 2, 3],
          [0] * 1000, {'a': 1}, [None], ['a'])
PIECES = (b'\0', b'\xff', b'\xff' * 4, b'\xff' * 8, b'\0' * 8, b'\x7f\xff\xff\xff', b'\x80\0\0\0', b'NaN', b'1e999',
          b'[' * 100000, b'{"a":' * 50000, b'9' * 5000, b'\\ud800', b'\xef\xbb\xbf', b'version https://git-lfs', b'"',
          b'\n')
TYPES = (pa.string(), pa.binary(), pa.bool_(), pa.int8(), pa.int64(), pa.uint64(), pa.float16(), pa.float64(),
         pa.null(), pa.date32(), pa.decimal128(20, 3), pa.timestamp('ns'), pa.list_(pa.float32()),
         pa.list_(pa.float32(), 2), pa.large_list(pa.int8()), pa.list_(pa.list_(pa.float64())),
         pa.dictionary(pa.int32(), pa.string()), pa.map_(pa.string(), pa.int8()),
         pa.struct([('bytes', pa.binary()), ('path', pa.string())]))
PICTURES = dict(png='rgb24', mjpeg='yuvj420p', bmp='bgr24', gif='rgb8', tiff='rgb24', libwebp='yuv420p', ppm='rgb24')
VIDEOS = dict(mp4='libx264', mkv='libx264', ts='libx264', avi='mpeg4', webm='libvpx-vp9', mov='mpeg4')
TINY = 32, 2, 2, 64, False, 0, 14, 4        # of a ViT, as in model.ENCODERS
TRAIN = (*SMALL, '--frames=3', '--context=3', '--eval_context=1', '--val_share=0.4', '--unlabelled=', '--workers=0')
SEARCH = dict(samples=4, elites=2, iterations=1, horizon=2)
SCRATCH = os.path.realpath(tempfile.mkdtemp(prefix='fuzz', dir='/dev/shm'))     # files in memory
SEEDS = f'{SCRATCH}/seeds'          # what is mutated
NOT_WRITTEN = pa.ArrowException, TypeError, ValueError, LookupError, OverflowError, RecursionError, AttributeError


# mutations; with rng None everything stays as it is

def bytes_of(rng, content, other):
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16)) if rng else 0):
        size = len(content) or 1
        near = rng.randrange(min(size, 200))            # headers are at the beginning or at the end
        at = rng.choice((rng.randrange(size), near, size - 1 - near))
        end = at + rng.choice((1, 2, 4, 8, 40, size))
        piece = rng.choice(PIECES)
        number = rng.choice((0, 1, 255, 4096, 65535, 10 ** 6, 2 ** 31 - 1, 2 ** 32 - 1))
        way = rng.randrange(9)
        if way < 3 and content:
            content[at] ^= 1 << rng.randrange(8)
        elif way == 3:
            del content[at:end]
        elif way == 4:
            content[at:at] = content[at:end] * rng.choice((1, 2, 50))
        elif way == 5:
            content[at:rng.choice((at, at + len(piece)))] = piece
        elif way == 6:
            content[at:at + 4] = number.to_bytes(4, rng.choice(('big', 'little')))
        elif way == 7:
            content[at:] = other[rng.randrange(len(other)):]
        else:
            content[at:end] = rng.randbytes(min(end, size) - at)
    return bytes(content)


def place_in(rng, x):
    """A (dict or list, key) somewhere in a tree of them."""
    while True:
        key = rng.choice(list(x) if isinstance(x, dict) else range(len(x)))
        inside = x[key]
        if not isinstance(inside, (dict, list)) or not inside or rng.random() < 0.2:
            return x, key
        x = inside


def tree_of(rng, x):
    """Values, keys, types and lengths of dicts and lists, changed in place."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8)) if rng else 0):
        box, key = place_in(rng, x or [0])
        other, name = place_in(rng, x or [0])
        value = box[key]
        way = rng.randrange(8)
        if way == 0:
            del box[key]
        elif way == 1 and isinstance(box, dict):
            box[rng.choice((*WORDS, f'{key}{key}'))] = box.pop(key)
        elif way == 2:
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


def header_of(rng, path):
    """A safetensors file with another header; the JSON in its metadata is changed as well."""
    content = Path(path).read_bytes()
    end = 8 + int.from_bytes(content[:8], 'little')
    header = json.loads(content[8:end])
    texts = header.get('__metadata__', {})
    for name in {'config', 'model'} & texts.keys():
        texts[name] = json.loads(texts[name])
    tree_of(rng, texts if rng and texts and rng.random() < 0.7 else header)
    for name, value in texts.items():
        texts[name] = value if isinstance(value, str) else json.dumps(value)
    header = json.dumps(header).encode()
    Path(path).write_bytes(len(header).to_bytes(8, 'little') + header + content[end:])


def json_of(rng, path):
    text = Path(path).read_text()
    lines = text.splitlines() if path.endswith('l') else [text]
    Path(path).write_text('\n'.join(map(json.dumps, tree_of(rng, [*map(json.loads, lines)]))))


def torch_of(rng, path):
    buffer = io.BytesIO()
    torch.save(tree_of(rng, torch.load(path, weights_only=True)), buffer)
    Path(path).write_bytes(buffer.getvalue())


BY_ENDING = dict(json=json_of, jsonl=json_of, parquet=table_of, safetensors=header_of, pt=torch_of, pth=torch_of)


def change(rng, path):
    """A file in a way of its kind, or byte by byte; a few become something else."""
    content = Path(path).read_bytes()
    way = rng.random() if rng else 0.5
    deep = BY_ENDING.get(path.rpartition('.')[2])
    if way < 0.01:
        os.remove(path)
        rng.choice((os.mkdir, os.mkfifo, str, lambda x: os.symlink(x, x)))(path)
    elif deep and way < 0.7:
        with contextlib.suppress(NOT_WRITTEN):
            deep(rng, path)
    else:
        Path(path).write_bytes(bytes_of(rng, content, Path(some(rng, '[pvw]*s/*.*')).read_bytes()))


def some(rng, pattern, folder=SEEDS):
    """One of the files that fit."""
    found = sorted(glob.glob(f'{folder}/{pattern}', recursive=True))
    return rng.choice(found) if rng else found[0]


# what reads them: functions of (rng, an empty folder)

def dataset(pattern):
    """A reader as training is one."""
    def read(rng, place):
        name, _, rest = some(rng, f'*/{pattern}').removeprefix(f'{SEEDS}/').partition('/')
        root = shutil.copytree(f'{SEEDS}/{name}', f'{place}/d')
        change(rng, f'{root}/{rest}')
        ds = data.LeRobot(root)
        with fine():
            clip = ds.clip(0, 0, 3, 1, (16, 24))
            assert clip['x'].shape == (3, 3, 16, 24) and clip['a'].isfinite().all()
        with fine():
            ds.frames(0, [ds.episodes[0].length - 1], 0, ds.cameras[-1])
        data.Clips([ds][:ds.action_dim], [ds][ds.action_dim:], 3, 1, (16, 24), 2, 1.0, 0.3)[0]
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


def encoded(folder):
    """A batch by the latents in a folder."""
    ds = data.LeRobot(f'{SEEDS}/v3')
    cpu = torch.device('cpu')
    encode = model.load_encoder('pixels', height=14, width=21)
    clips = data.Clips([ds], [], 3, 1, (14, 21), 2, 1.0, 0.3)
    clips.tokens = data.cached_latents([ds], encode, cpu, data.autocast(cpu, 'float32'), folder)
    return clips[0]


def latents(rng, place):
    shutil.copytree(f'{SEEDS}/latents', f'{place}/latents')
    change(rng, some(rng, 'latents/*/*', place))
    assert encoded(f'{place}/latents')['z'].shape == (2, 3, 6, 24)


def options(rng, place):
    """What is accepted can be counted with; and opens a dataset, or says why not."""
    g = json.loads(Path(some(rng, 'options/*')).read_text())
    argv = []
    for _ in range(rng.choice((1, 1, 2, 3)) if rng else 0):
        text = f'--{rng.choice(list(g))}={rng.choice(VALUES)}'
        other = bytes_of(rng, text.encode('utf8', 'replace'), b'-').decode('utf8', 'replace')
        argv.append(rng.choice((text, text, text, other)))
    for name, value in data.override(g | dict(__doc__=''), argv).items():
        most = 2 ** 63 if type(value) is int else math.inf
        assert isinstance(value, str) or abs(value) < most, f'--{name}={value} is accepted'
    word, camera, action = rng.sample([word for word in WORDS if '\n' not in word], 3) if rng else ('', '', '')
    paths = word, f'{SEEDS}/v3:{word}', f'{SEEDS}/v3,{word}'
    data.open_sets(rng.choice(paths) if rng else '', f'{camera},top', action, g.get('fps', 0.0))


def scripts(rng, place):
    """What a run leaves behind, for what goes on from it and looks at it; pictures for plan.py."""
    out = shutil.copytree(f'{SEEDS}/out', f'{place}/out')
    goal = shutil.copy(some(rng, 'pictures/*'), place)
    names = 'optim.pt', 'optim.pt', 'ckpt.safetensors', 'log.jsonl', 'decoder.safetensors', goal
    path = os.path.join(out, rng.choice(names) if rng else goal)
    change(rng, path)
    ckpt = f'--ckpt={out}/ckpt.safetensors'
    if path == goal:
        search = [f'--{key}={value}' for key, value in SEARCH.items()]
        script('plan.py', ckpt, f'--start={SEEDS}/pictures/a.png', f'--goal={goal}', f'--mask={goal}', *search)
    elif 'decoder' in path or rng.random() < 0.2:
        script('decode.py', ckpt, '--rows=1', '--steps=2')
    else:
        script('train.py', *TRAIN, f'--labelled={SEEDS}/v3', '--resume=True', '--max_steps=3', f'--out_dir={out}')


KINDS = {       # how many of a hundred (cheap ones more often), and what reads them
    'info': (6, dataset('meta/info.json')), 'lines': (6, dataset('meta/*s*.json*')),
    'table': (6, dataset('**/*.parquet')), 'video': (4, dataset('videos/**/*.mp4')), 'videos': (1, videos),
    'picture': (46, picture), 'checkpoint': (5, checkpoint), 'weights': (4, weights), 'latents': (2, latents),
    'options': (19.9, options), 'scripts': (0.1, scripts)}


def make_seeds():
    """What is mutated, as small as may be, by the project's own writers and by others'; all kinds can read it."""
    lengths = 6, 5
    write_lerobot(f'{SEEDS}/v3', [episode(length, i) for i, length in enumerate(lengths)], 10)
    write_v2(f'{SEEDS}/v2', 'v2.1', lengths=lengths)
    write_v2(f'{SEEDS}/image', 'v2.0', lengths=lengths, image=True)
    stats = json.loads(Path(f'{SEEDS}/v3/meta/stats.json').read_text())
    Path(f'{SEEDS}/v2/meta/stats.json').write_text(json.dumps(stats))
    lines = [json.dumps(dict(episode_index=i, stats=stats)) for i in range(2)]
    Path(f'{SEEDS}/image/meta/episodes_stats.jsonl').write_text('\n'.join(lines))
    for name in ('pictures', 'videos', 'weights', 'options'):
        os.mkdir(f'{SEEDS}/{name}')
    shot = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    for codec, kind in PICTURES.items():
        Path(f'{SEEDS}/pictures/a.{codec}').write_bytes(coded(shot, codec, kind))
    for ending, codec in VIDEOS.items():
        with av.open(f'{SEEDS}/videos/a.{ending}', 'w') as container:
            stream = container.add_stream(codec, 25, width=48, height=32, pix_fmt='yuv420p')
            for i in range(6):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(shot.clip(20 * i, 255), 'rgb24')))
            container.mux(stream.encode(None))
    state = model.ViT(*TINY).state_dict()
    safetensors.torch.save_file(state, f'{SEEDS}/weights/tiny2.safetensors')
    torch.save({'model': state}, f'{SEEDS}/weights/tiny2.pth')
    os.chdir(SEEDS)
    train = script('train.py', *TRAIN, f'--labelled={SEEDS}/v3', '--max_steps=2', '--out_dir=out')
    decode = script('decode.py', '--train=True', '--lpips=0', '--train_steps=2', '--train_frames=32', '--rows=1', '--steps=2')
    for name, g in dict(train=train, decode=decode, plan=vars(plan)).items():
        Path(f'{SEEDS}/options/{name}').write_text(json.dumps(g['config']))
    encoded(f'{SEEDS}/latents')
    for name, (_, read) in KINDS.items():
        os.mkdir(f'{SCRATCH}/{name}')
        read(None, f'{SCRATCH}/{name}')


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
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(f'{ROOT}/')]
        own = isinstance(error, (data.Bad, data.Away, SystemExit))
        own = own or type(error) is ValueError and frames[-1].line.startswith('raise')
        text = str(error)
        cause = error
        while cause:
            if isinstance(cause, MemoryError) or re.search('allocate.*memory|memory.*alloc', str(cause)):
                own = False
                text = f'memory: {cause} {text}'
            cause = cause.__context__
        if not own or not text or '\n' in text:
            frame = [f for f in frames if f.filename != __file__] or frames
            where = f'{os.path.basename(frame[-1].filename)}:{frame[-1].lineno}'
            raise Find(f'{type(error).__name__} at {where}: {" ".join(text.split())[:160]}') from error


WRITES = {'open': 0, 'os.mkdir': 0, 'os.remove': 0, 'os.rmdir': 0, 'os.truncate': 0, 'os.chmod': 0, 'os.rename': 1,
          'os.link': 1, 'os.symlink': 1}      # {event of an audit: number of its argument that is a path}


def guard(event, arguments):
    """An audit hook: ends an input that writes elsewhere, or begins a program."""
    path = arguments[WRITES[event]] if event in WRITES else None
    if path is None or isinstance(path, int) or event == 'open' and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        path = SCRATCH
    if event in ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn') \
            or not os.path.realpath(path).startswith((SCRATCH, os.devnull)):
        raise Find(f'{event} {arguments}')


def work(begin, log, stack):
    """Inputs, one after the other, until one of them ends this process."""
    faulthandler.enable(stack)
    for number in (signal.SIGPROF, signal.SIGALRM):
        faulthandler.register(number, stack, chain=True)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    if n > 1:
        os.dup2(nowhere, 2)
    sys.addaudithook(guard)
    size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize() + int(gigabytes * 2 ** 30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    for i in range(begin, min(begin + 2000, first + n)):
        # their signals end the process: neither a loop in C nor an except escapes them
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 6 * seconds)
        attempt(i, log)


def attempt(i, log):
    """Try input i; the log has that it began, and what was wrong with its end."""
    rng = random.Random(f'{seed} {i}')
    names = only.split(',') if only else list(KINDS)
    kind = rng.choices(names, [KINDS[name][0] for name in names])[0]
    print(json.dumps([i, kind, '']), file=log)
    place = f'{SCRATCH}/{i}'
    os.mkdir(place)
    os.chdir(place)
    data._warned.clear()
    try:
        with fine():
            KINDS[kind][1](rng, place)
    except Find as find:
        print(json.dumps([i, kind, str(find)]), file=log)
        if n == 1:
            traceback.print_exc()
    if n > 1:
        shutil.rmtree(place)


def run(call, *arguments):
    """The exit code of a process, or minus the signal that ended it."""
    child = multiprocessing.get_context('fork').Process(target=call, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def main():
    begun = time.monotonic()
    os.mkdir(SEEDS)
    tempfile.tempdir = SEEDS
    torch.set_num_threads(1)
    model.ENCODERS['tiny2'] = ('nobody/tiny2', *TINY)
    with torch.device('meta'):      # imports very much, once: not in every process
        model.WorldModel(model.model_config('nano', 24, (4, 4), 2))
    with open(f'{SCRATCH}/seeds.txt', 'w') as f, contextlib.redirect_stdout(f):
        if run(make_seeds):
            sys.exit('what is not mutated cannot be read')
    made = time.monotonic() - begun
    begin = first
    finds = collections.defaultdict(list)       # {(kind, exception and place): [(input, why)]}
    kinds = {}                                  # {input: kind}
    while begin < first + n:
        with open(f'{SCRATCH}/log', 'w+', buffering=1) as log, open(f'{SCRATCH}/stack', 'w+') as stack:
            code = run(work, begin, log, stack)
            lines = [json.loads(line) for line in Path(log.name).read_text().splitlines()]
            thread = Path(stack.name).read_text().rpartition('Current')[2]
            calls = re.findall(f'File "{ROOT}/(?!tests)(.*)", line (\\d+)', thread)
        begin, kind, _ = lines[-1]
        if code:
            why = signal.Signals(-code).name if code < 0 else f'exit code {code}'
            lines.append([begin, kind, f'{why} at {":".join(calls[0]) if calls else "?"}: '])
        begin += 1
        for i, kind, why in lines:
            kinds[i] = kind
            if why:
                finds[kind, why[:why.find(': ')]].append((i, why))
    for (kind, _), found in sorted(finds.items(), key=lambda item: -len(item[1])):
        print(f'{len(found):6} {kind:10} --first={found[0][0]}: {found[0][1]}')
    print(f'{n:,} inputs in {time.monotonic() - begun:.0f} s, {made:.0f} of them to make what is mutated:',
          f'{sum(map(len, finds.values()))} finds of {len(finds)} kinds', dict(collections.Counter(kinds.values())))
    if n == 1:
        print('files:', SCRATCH)
    else:
        shutil.rmtree(SCRATCH)
    sys.exit(bool(finds))


if __name__ == '__main__':
    main()
