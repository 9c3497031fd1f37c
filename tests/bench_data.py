"""
How fast clips are read, in one process and beside LeRobot's own reader and bare torchcodec where
those are installed.

    python tests/bench_data.py --root=path/to/dataset       # the table; minutes, on an idle core
    python tests/bench_data.py --root=path/to/dataset --clips=20000 --seconds=0     # memory alone

A cell is frames per second of wall time (of CPU time); a ratio is of CPU time, which other
processes disturb less. All are medians of rounds in which the readers take turns, on the same
clips; whole frames, uint8, except 'at 224'.
"""
import functools
import importlib.metadata
import itertools
import os
import resource
import statistics
import sys
import time

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # lerobot asks the hub even about a dataset that lies here
import data  # noqa: E402, from the root

try:
    from torchcodec.decoders import VideoDecoder
except (ImportError, RuntimeError):     # it is there, but not the libraries of ffmpeg it wants
    VideoDecoder = None
try:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
except ImportError:
    LeRobotDataset = None

# --------------------------------------------------------------------------------------------------
root = 'demo/labelled'      # a LeRobot dataset with video, in a folder
camera = ''                 # '' = its first
windows = '1,16,64,128'     # frames of a clip
strides = '1,3,6'           # from one to the next, in the dataset's frames, where that fits
seconds = 1.8               # of each reader, row and round; 0 = no table
rounds = 3
clips = 0                   # report the peak of memory after a tenth, half and all of so many
seed = 0
config = data.override(globals(), sys.argv[1:])
# --------------------------------------------------------------------------------------------------

torch.set_num_threads(1)  # as in a DataLoader's worker; with more, lerobot's speed is erratic
ds = data.LeRobot(root, camera)
lengths = [e.length for e in ds.episodes]
if ds.camera not in ds.episodes[0].video:
    sys.exit(f'--root={root}: {ds.camera} is not a video')


def draw(n, stride, start, rng):
    """Endless (episode, frame numbers): anywhere, or one clip after the other."""
    fits = [e for e, length in enumerate(lengths) if length > (n - 1) * stride]
    while True:
        e = fits[rng.integers(len(fits))]
        last = lengths[e] - (n - 1) * stride
        for first in [rng.integers(last)] if start == 'random' else range(0, last, n * stride):
            yield e, list(range(first, first + (n - 1) * stride + 1, stride))


@functools.lru_cache(maxsize=100)  # as many as lerobot keeps
def decoder(path):
    return VideoDecoder(path, dimension_order='NHWC', seek_mode='approximate')


def torchcodec(e, frames):
    e = ds.episodes[e]
    batch = decoder(ds.place(e, ds.camera)).get_frames_at([e.span[ds.camera][i] for i in frames])
    return batch.data.permute(0, 3, 1, 2)


def lerobot(n, stride):
    """Its items hold the other columns of a row as well, and a frame of every other camera."""
    times = [i * stride / ds.fps for i in range(n)]
    items = LeRobotDataset('local/local', ds.root, delta_timestamps={ds.camera: times},
                           video_backend='torchcodec', return_uint8=True)
    episodes = items.meta.episodes
    begin = dict(zip(episodes['episode_index'], episodes['dataset_from_index']))
    return lambda e, frames: items[begin[ds.episodes[e].index] + frames[0]][ds.camera]


def speed(read, picks):
    """Frames per second of wall and of CPU time."""
    read(*next(picks))  # opens what there is to open
    n = 0
    wall = time.perf_counter()
    cpu = time.process_time()
    while time.perf_counter() - wall < seconds:
        episode, frames = next(picks)
        read(episode, frames)
        n += len(frames)
    return n / (time.perf_counter() - wall), n / (time.process_time() - cpu)


for i, (e, frames) in zip(range(1, clips + 1), draw(16, 1, 'random', np.random.default_rng(seed))):
    ds.frames(e, frames)
    # before the table: what the others need would raise the peak
    if i in (clips // 10, clips // 2, clips):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak /= 2 ** 20 if sys.platform == 'darwin' else 2 ** 10
        print(f'{i:,} clips of 16 frames: peak memory of the process {peak:,.0f} MiB', flush=True)

missing = {}
differ = []
if LeRobotDataset is None or not ds.v3:
    missing['lerobot'] = 'v3.0 only' if LeRobotDataset else 'not installed'
if VideoDecoder is None:
    missing['torchcodec'] = missing['lerobot'] = 'not installed'
names = 'ours', 'at 224', 'lerobot', 'torchcodec'
if seconds:
    installed = {d.metadata['Name']: d.version for d in importlib.metadata.distributions()}
    used = [f'{k} {installed[k]}' for k in ('torch', 'av', 'torchcodec', 'lerobot') if k in installed]
    print(', '.join([ds.name, *used]))
    print('| frames | stride | start |', *(f'{k} |' for k in names),
          'ours / lerobot | ours / torchcodec |')
    print('|---' * (len(names) + 5) + '|')
rows = []
for n, stride in itertools.product(map(int, windows.split(',')), map(int, strides.split(','))):
    if (n > 1 or stride == 1) and max(lengths) > (n - 1) * stride:
        rows += [(n, stride, 'random'), (n, stride, 'sequential')]
for row in rows if seconds else []:
    readers = {'ours': ds.frames, 'at 224': lambda e, frames: ds.frames(e, frames, 224),
               'torchcodec': torchcodec}
    if 'lerobot' not in missing:
        readers['lerobot'] = lerobot(*row[:2])
    readers = {k: read for k, read in readers.items() if k not in missing}
    pick = next(draw(*row, np.random.default_rng(seed)))
    truth = ds.frames(*pick)
    differ += [f'{k} at {row}' for k, read in readers.items()
               if k != 'at 224' and not torch.equal(read(*pick).reshape(truth.shape), truth)]
    got = {k: [] for k in readers}
    for i in range(rounds):
        for k, read in readers.items():
            got[k].append(speed(read, draw(*row, np.random.default_rng((seed, i)))))
    cells = []
    for k in names:
        if k in missing:
            cells.append(missing[k])
            continue
        wall, cpu = map(statistics.median, zip(*got[k]))
        cells.append(f'{wall:.0f} ({cpu:.0f})')
    for k in names[2:]:
        ratios = [ours[1] / other[1] for ours, other in zip(got['ours'], got.get(k, ()))]
        cells.append(missing.get(k) or f'{statistics.median(ratios):.2f}')
    print('|', *(f'{c} |' for c in (*row, *cells)), flush=True)
if differ:
    print('not the same pixels as ours:', *differ, sep='\n')
