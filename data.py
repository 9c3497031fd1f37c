"""
Everything that comes from outside: the command line, pictures and video, LeRobot datasets, batches, cached latents.

    python data.py --labelled=path/to/dataset                                   # what is in it, what is wrong with it
    python data.py --cache=True --labelled=... --encoder=dinov2_vits14          # encode once, before training
    python data.py --record=gym_pusht/PushT-v0 --episodes=200 --out=pusht       # write a dataset: from a simulator,
    python data.py --videos='folder/*.mp4' --out=videos                         # or from plain videos

Letters: T frames of a clip, A action width, H W pixels. Frames are uint8 tensors (T, 3, H, W); wherever a
`size` is asked for, an int is a square, (height, width) a rectangle, and 0 the native size.
LeRobot's formats: v2.0 and v2.1 keep one parquet and one mp4 per episode, v3.0 keeps many episodes per file
(github.com/huggingface/lerobot). Here they are read with pyarrow and PyAV alone.
"""
import atexit
import collections
import contextlib
import difflib
import errno
import fractions
import functools
import glob
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import pathlib
import re
import runpy
import shutil
import signal
import sys
import threading
import time
import types

import av
import huggingface_hub.constants
import huggingface_hub.errors
import huggingface_hub.utils
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub.file_download import http_get
from tqdm import tqdm


# ----------------------------------------------------------------------------------------------------------------------
# the command line

def override(g, argv):
    """Set a script's constants, all bool, int, float and str in its globals() g, by argv, a list of --name=value.
    Returns them all, {name: value}, to print and to save. What cannot be set ends the script with one line."""
    config = {k: v for k, v in g.items() if k[0] != '_' and type(v) in (bool, int, float, str)}
    if '-h' in argv or '--help' in argv:
        print(g['__doc__'], *(f'  --{k}={v}' for k, v in config.items()), sep='\n')
        sys.exit()
    for arg in argv:
        name, eq, text = arg.removeprefix('--').partition('=')
        if not (arg.startswith('--') and eq):
            sys.exit(f'{arg}: write options as --name=value')
        if name not in config:
            near = difflib.get_close_matches(name, config, 1)
            sys.exit(f'--{name}: no such option' + (f', did you mean --{near[0]}?' if near else ''))
        kind = type(config[name])
        try:
            value = {'True': True, 'False': False}[text] if kind is bool else kind(text)
        except (KeyError, ValueError):
            sys.exit(f'--{name}: wants {"True or False" if kind is bool else kind.__name__}, got {text!r}')
        config[name] = g[name] = value
    return config


def one_of(name, value, choices):
    if value not in choices:
        sys.exit(f'--{name}: wants one of {", ".join(choices)}, got {value!r}')


def pick_device(name, index=0):
    """torch.device of 'auto' (CUDA, else MPS, else CPU) or of a name; index is this process's GPU."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(f'cuda:{index}' if name == 'cuda' else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f'--device={name}: not usable here ({str(error).splitlines()[0]})')
    return device


def autocast(device, dtype):
    """The autocast context of a device; 'auto' is bfloat16 on GPUs and CPUs that multiply it in hardware."""
    fast = device.type == 'cuda' or device.type == 'cpu' and torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == 'bfloat16' or dtype == 'auto' and fast)


def peak_flops(device):
    """Dense bfloat16 FLOP/s of a GPU by its maker's data sheet; 0.0 where that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
    return next((peak for part, peak in PEAK.items() if part in name), 0.0)


PEAK = {'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12,
        'RTX 4090': 165e12, 'RTX 3090': 71e12}


# ----------------------------------------------------------------------------------------------------------------------
# pictures and video

# One for everything: it keeps its swscale tables while sizes stay (a fresh one a frame costs up to half of the speed).
# BICUBIC comes nearest to the antialiased resize of encoders' training; AREA, a tenth faster, enlarges badly.
_reformat = functools.partial(av.video.reformatter.VideoReformatter().reformat, interpolation='BICUBIC', threads=1)
MAX_OPEN = 8  # containers kept open per process; one holds a decoder's frames, a few MB
MP4 = dict(format='mp4', options={'movflags': '+faststart'})
_open = collections.OrderedDict()
TELL = 10       # seconds between lines of progress, where there is no terminal
_notes = {}     # what is odd in the data, but usable, by text: True until a worker has told the main process


def _rgb(frame, size):
    """uint8 (H, W, 3) array of a decoded frame: colour and scale in one pass."""
    h, w = (size, size) if isinstance(size, int) else size
    return _reformat(frame, w or frame.width, h or frame.height, 'rgb24').to_ndarray()


class Bad(ValueError):
    """A file, frame or row of a dataset that cannot be used, named in one line. Batches count it and go on."""


class Outside(Bad):
    """A path that leaves the dataset's folder."""


class Away(Exception):
    """The hub cannot be reached for long: no fault of the data, so nothing is skipped or remembered because of it."""


def _note(text):
    """Print a line once for all processes: a worker's goes to the main process with its next batch."""
    worker = torch.utils.data.get_worker_info() is not None
    if text not in _notes and not worker and os.environ.get('RANK', '0') == '0':
        print(text, file=sys.stderr, flush=True)
    _notes.setdefault(text, worker)


@contextlib.contextmanager
def _reading(path):
    """What a bad file makes fail in here becomes a Bad that names it and says why; no other mistake does."""
    try:
        yield
    except (Bad, OSError, MemoryError, av.FFmpegError, pa.ArrowException, json.JSONDecodeError, UnicodeError) as error:
        if (os.getpid(), path) in _open:  # a decoder that failed is not used again
            _open.pop((os.getpid(), path)).container.close()
        why = f'cannot be read ({" ".join(str(error).split())})' if os.path.isfile(path) else 'no such file'
        with contextlib.suppress(OSError), open(path, 'rb') as f:
            if f.read(30).startswith(b'version https://git-lfs'):
                why = 'is a git-LFS pointer, not the file itself (git lfs pull)'
        raise Bad(f'{path}: {why}') from None


def _picture(data, size):
    """uint8 (H, W, 3) array of a picture's file, given as bytes."""
    if data[:2] == b'\xff\xd8' and b'\xff\xd9' not in data[-1024:]:  # ffmpeg forgives a JPEG without its end
        raise Bad('truncated')
    with av.open(io.BytesIO(data)) as container:
        if not container.streams.video or container.format.name == 'tty':  # any text would be ANSI art
            raise Bad('no picture in it')
        # else the missing half of a truncated picture would come out grey
        container.streams.video[0].codec_context.options = {'err_detect': 'explode'}
        if (frame := next(container.decode(video=0), None)) is None or frame.is_corrupt:
            raise Bad('truncated')
        return _rgb(frame, size)


def read_image(path, size=0):
    """uint8 tensor (3, H, W) of any picture that ffmpeg knows, resized exactly like a video's frames."""
    try:
        with open(path, 'rb') as f:
            return torch.from_numpy(_picture(f.read(), size)).permute(2, 0, 1)
    except (OSError, ValueError, av.FFmpegError) as error:
        sys.exit(f'{path}: not a readable picture ({getattr(error, "strerror", None) or error})')


def resize(x, size):
    """uint8 (n, 3, H, W) -> (n, 3, *size), by the same resampling as a video's frames."""
    frames = (av.VideoFrame.from_ndarray(rgb, 'rgb24') for rgb in x.permute(0, 2, 3, 1).contiguous().numpy())
    return torch.from_numpy(np.stack([_rgb(frame, size) for frame in frames])).permute(0, 3, 1, 2)


def enlarge(x, side=128):
    """uint8 (n, 3, H, W) -> the same with every pixel repeated until a picture is about `side` pixels high."""
    return torch.nn.functional.interpolate(x, scale_factor=max(1, round(side / x.shape[2])))


def write_image(path, x):
    """Write uint8 (3, H, W) as .png."""
    av.VideoFrame.from_ndarray(x.permute(1, 2, 0).cpu().numpy(), 'rgb24').save(str(path))


def _encode(container, rgb, i, fps, **options):
    """Append uint8 (H, W, 3) to an mp4 as frame i, shown at i / fps exactly. Returns the bytes that came out."""
    (H, W), rate = rgb.shape[:2], fractions.Fraction(fps).limit_denominator(1001)
    if not container.streams.video:  # without B-frames packets lie in the order of display
        container.add_stream('libx264', rate, {'bf': '0', **options}, width=W + W % 2, height=H + H % 2)
    rgb = np.pad(rgb, ((0, H % 2), (0, W % 2), (0, 0)), 'edge')  # yuv420p halves both sides
    frame = _reformat(av.VideoFrame.from_ndarray(rgb, 'rgb24'), format='yuv420p')
    frame.pts, frame.time_base = i, 1 / rate
    packets = container.streams.video[0].encode(frame)
    container.mux(packets)
    return sum(packet.size for packet in packets)


def write_video(path, x, fps):
    """Write uint8 (T, 3, H, W) as H.264 mp4, aside and then renamed; odd sides grow by one repeated line."""
    with av.open(f'{path}.tmp', 'w', **MP4) as container:
        for i, rgb in enumerate(x.permute(0, 2, 3, 1).cpu().numpy()):
            _encode(container, rgb, i, fps, crf='12')
        container.mux(container.streams.video[0].encode(None))
    os.replace(f'{path}.tmp', path)


def _video(path):
    """An open video, from a small LRU. A forked worker must not share its parent's file position: pid is a key."""
    key = os.getpid(), path
    if key not in _open:
        container = av.open(path)
        if not container.streams.video:
            raise Bad('no video stream')
        codec = container.streams.video[0].codec_context
        codec.thread_type, codec.thread_count = 'NONE', 1  # frame threads delay every seek; we have processes
        _open[key] = types.SimpleNamespace(container=container, fps=0, at=math.inf)
        if len(_open) > MAX_OPEN:
            _open.popitem(last=False)[1].container.close()
    _open.move_to_end(key)
    return _open[key]


def _decode(container, wanted, fps):
    """Yield (index, frame) for the set `wanted` of indices; others may come too.

    The caller takes out what came; once all did, it may put in others and go on. One seek, then forward: only what is
    wanted, and what that needs, is decoded, so that strides are cheap where key frames are dense.
    """
    stream, missing = container.streams.video[0], None
    if stream.average_rate == stream.base_rate:     # constant: frames count by number, whatever the metadata say
        fps = stream.average_rate or fps
    codec, origin, unit = stream.codec_context, stream.start_time or 0, float(stream.time_base * fps)

    def index(x):
        return math.nan if x.pts is None else round((x.pts - origin) * unit)

    def feed(packets):
        return ((index(frame), frame) for packet in packets for frame in codec.decode(packet))

    while wanted != missing:  # a second time where what was put in lies before what had been read
        missing, first = set(wanted), min(wanted)
        # mp4 seeks by decoding time, which runs ahead of display by the reordering of B-frames
        container.seek(origin + round((first - 8 * codec.has_b_frames) / unit), stream=stream)
        group, fed, high = [], 0, -1  # the packets since a key frame; how many of them, and up to which index, were fed
        for packet in (packet for packet in container.demux(stream) if packet.size):
            i, begin, first = index(packet), first, math.inf
            if i > begin:
                container.seek(origin, stream=stream)  # the file's index misled the seek
                continue
            if packet.is_keyframe:
                if group and index(group[0]) > max(wanted):
                    break
                if max(wanted) <= high or fed < len(group) and not any(high < w < i for w in wanted):
                    yield from feed([None])  # what the decoder still holds back; then it is clean
                    codec.flush_buffers()
                    fed = 0
                if any(high < w < i for w in wanted):  # an open group: B-frames shown before their key frame, which
                    yield from feed(group[fed:])       # need the group before it as well
                group, fed = [], 0
            group.append(packet)
            if i in wanted or max(wanted) <= high or packet.pts is None:
                yield from feed(group[fed:])
                fed, high = len(group), max(high, i)
        yield from feed([None])  # the next seek flushes


def read_frames(path, indices, fps, size=0):
    """uint8 tensor (n, 3, H, W): the frames shown i / fps seconds after a video's start, for indices i in any order.

    A Bad names the file that cannot be read, or that lacks a frame.
    """
    indices, out = np.array([int(i) for i in indices]), None
    with _reading(path):
        video = _video(path)
        if video.fps != fps or not 0 < indices.min() - video.at < fps:  # else it goes on: a key frame may be far back
            video.fps, video.wanted = fps, set()
            video.frames = _decode(video.container, video.wanted, fps)
        video.at = math.inf  # until all came
        video.wanted.update(indices.tolist())
        for i, frame in video.frames:
            if i in video.wanted:
                video.wanted.remove(i)
                rgb = _rgb(frame, size)
                if out is None:  # of numpy, which asks for huge pages: page faults cost as much as the copies
                    out = np.empty((len(indices), *rgb.shape), np.uint8)
                for n in np.flatnonzero(indices == i):
                    out[n] = rgb
                if not video.wanted:
                    video.at = i
                    return torch.from_numpy(out).permute(0, 3, 1, 2)
        raise Bad(f'frame {min(video.wanted)} is missing, of {video.container.streams.video[0].frames} frames')


def _count_frames(path):
    """Frames of a video by its header, or where that does not say, by its packets."""
    with av.open(path) as container:
        if not container.streams.video:
            raise Bad('no video stream')
        stream = container.streams.video[0]
        return stream.frames or sum(packet.size > 0 for packet in container.demux(stream))


# ----------------------------------------------------------------------------------------------------------------------
# LeRobot datasets

HUB_HOME = os.path.join(huggingface_hub.constants.HF_HOME, 'nanowm')    # files of hub datasets, one folder a revision
PATIENCE = 300      # seconds for which a hub that is busy or out of reach is asked again
STATS = 'mean', 'std', 'min', 'max'
QUANTILES = {'q01': .01, 'q10': .1, 'q50': .5, 'q90': .9, 'q99': .99}
PATHS = {'v3': dict(data='data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet',
                    video='videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4'),
         'v2': dict(data='data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet',
                    video='videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4')}


def _pool(parts):
    """Statistics of a whole from those of its parts, dicts of arrays with a count of rows; quantiles are averaged."""
    parts = {k: np.stack([np.asarray(p[k], np.float64) for p in parts]) for k in set.intersection(*map(set, parts))}
    n = parts['count'].sum(0)
    weight = (parts['count'] / n).reshape(-1, *[1] * (parts['mean'].ndim - 1))
    out = {k: (weight * v).sum(0) for k, v in parts.items() if k == 'mean' or k in QUANTILES}
    # without the cancellation of E[x^2] - E[x]^2
    out['std'] = np.sqrt((weight * (parts['std'] ** 2 + (parts['mean'] - out['mean']) ** 2)).sum(0))
    return {**out, 'min': parts['min'].min(0), 'max': parts['max'].max(0), 'count': n.astype(np.int64)}


def _describe(x):
    """Statistics of the rows of x (n, ...), as lerobot names them."""
    x = np.asarray(x, np.float64, order='F')        # each column in one piece
    out = dict(min=x.min(0), max=x.max(0), mean=x.mean(0), std=x.std(0), count=np.array([len(x)]))
    return {**out, **dict(zip(QUANTILES, np.quantile(x, list(QUANTILES.values()), axis=0)))}


def _table(path, names=(), needed=()):
    """The named columns of a parquet file, those it has; without names, all."""
    file = pq.ParquetFile(path, memory_map=True)
    for k in set(needed) - set(file.schema_arrow.names):
        raise Bad(f'no column {k}')
    return file.read([k for k in names or file.schema_arrow.names if k in file.schema_arrow.names])


@functools.lru_cache(maxsize=32)
def _columns(path, keys):
    """{key: array (rows, width)} of numeric columns; float32, but float64 for indices. Nulls are NaN."""
    with _reading(path):
        table, out = _table(path, keys), {}
        for key in table.column_names:
            column, valid = table[key].combine_chunks().drop_null(), table[key].is_valid().to_numpy()
            while isinstance(column.type, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
                column = column.flatten()
            width, rest = divmod(len(column), max(1, valid.sum()))
            if rest or not pa.types.is_primitive(column.type):
                raise Bad(f'{key} is {table[key].type}, not the same count of numbers in every row')
            out[key] = np.full((len(valid), width), np.nan, np.float64 if key.endswith('_index') else np.float32)
            out[key][valid] = column.to_numpy(zero_copy_only=False).reshape(valid.sum(), width)
        return out


@functools.lru_cache(maxsize=4)
def _row_group(path, group, key):
    """One row group of an image column; whole old files are one group, so it is kept for the next clip."""
    return pq.ParquetFile(path, memory_map=True).read_row_group(group, [key])[key]


def _ask_hub(what, call, first=False):
    """call() to the hub; again for PATIENCE seconds while it says to wait (429), fails (5xx) or breaks off.

    Raises Bad for what it does not have or give, Away if it does not come back; first: if it cannot be reached at all.
    """
    end, wait = time.monotonic() + PATIENCE, 1
    while True:
        try:
            return call()
        except (OSError, huggingface_hub.errors.HTTPError) as error:    # a transfer that breaks off is no OSError
            answers = [getattr(e, 'response', None) for e in (error, error.__cause__)]
            answer = next((a for a in answers if a is not None), None)      # one of an error is not true
            status, headers = (0, {}) if answer is None else (answer.status_code, answer.headers)
            asked = re.search(r'^\d+$|(?<=;t=)\d+', headers.get('Retry-After') or headers.get('RateLimit') or '')
            pause = max(wait, int(asked[0]) + 1 if asked else 0)
            full = getattr(error, 'errno', None) in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT)   # our disk
            none = status in (401, 403, 404)
            if none or full or first and not status or time.monotonic() + pause > end:
                why = f'{status} {headers.get("X-Error-Code", "")}' if status else str(error.__cause__ or error)
                raise (Bad if none else Away)(f'{what}: not to be had from the hub ({" ".join(why.split())})') from None
            time.sleep(pause)
            wait = min(2 * wait, 60)


huggingface_hub.utils.disable_progress_bars()       # of several processes at once


class LeRobot:
    """A LeRobot dataset v2.0, v2.1 or v3.0: a folder, or one of the hub, 'owner/name' or 'owner/name@revision'.

    camera: keys or their last parts, comma-separated, of which those that exist count ('front:3,wrist': with weights);
    '' is the first camera. action: comma-separated keys; '' is `action`, else `actions`, else all `action.*`, else
    nothing; 'none' ignores actions. fps: the nearest frames at this lower rate; 0 is all frames. action_mode, rotation:
    see rows. `episode` is a position in `.episodes`. A dataset that cannot be used ends the program with one line, a
    file of it that cannot be read is a Bad. A folder's files are compared with its metadata: what differs is named, the
    shorter counts, and .dropped says which episodes are left out. Files of the hub come when they are needed.
    """

    def __init__(self, root, camera='', action='', fps=0, action_mode='absolute', rotation='euler', cache_gb=50):
        self.name, self.repo, self.revision, self.weight, self.cache_gb = str(root), '', '', 0.0, cache_gb
        self.action_mode, self.rotation, self.dropped = action_mode, rotation, []
        try:
            if re.fullmatch(r'[\w.-]+/[\w.-]+(@[\w./-]+)?', self.name) and not os.path.isdir(root):
                root = self._from_hub()
            self.root = os.path.abspath(root)
            if not os.path.isdir(self.root):
                sys.exit(f'{root}: no such folder')
            if os.path.isdir(self._file('meta_data')):
                sys.exit(f'{root}: a LeRobot dataset of v1, which is too old: convert it to v2.1 or v3.0 with lerobot')
            if not os.path.isfile(self._file('meta/info.json')):
                sys.exit(f'{root}: not a LeRobot dataset: it has no meta/info.json')
            try:
                self._read_info(camera, action, fps)
                self.episodes = sorted(self._read_episodes(), key=lambda e: e['index'])
                # in v3.0 the text is pandas' index: its column may have any name
                tasks = self._load('meta/tasks.parquet' if self.v3 else 'meta/tasks.jsonl')
                self.tasks = {r['task_index']: r.get('task') or next(r[k] for k in r if k != 'task_index')
                              for r in tasks}
            except (TypeError, ValueError, LookupError, AttributeError, StopIteration) as error:
                raise error if isinstance(error, Bad) else Bad(f'{root}: odd metadata ({error!r})') from None
            if not self.repo:
                self._check()
            self.dropped = [e.get('why', f'{root}: an episode is empty') for e in self.episodes if e['have'] < 1]
            [_note(line) for line in self.dropped]
            self.episodes = [e for e in self.episodes if e['have'] > 0]
            if not self.episodes:
                sys.exit(f'{root}: has no episodes' + ''.join(f': {line}' for line in self.dropped[:1]))
            for e in self.episodes:     # frame j is the file's frame round(j step)
                e['length'] = math.ceil((e['have'] - fractions.Fraction(1, 2)) / self.step)
            self.stats = self._read_stats() if self.action_dim else None
        except (Bad, Away) as error:
            sys.exit(str(error))

    def _from_hub(self):
        """The folder of a hub dataset at one revision, with its metadata. What is whole is used without the network."""
        self.repo, _, self.revision = self.name.partition('@')
        home = os.path.join(HUB_HOME, self.repo.replace('/', '--'), '')
        if not os.path.exists(f'{home}{self.revision}/meta/.whole'):
            api, kind = huggingface_hub.HfApi(os.environ.get('HF_ENDPOINT')), 'dataset'
            asked = self.revision or None
            about = _ask_hub(self.name, lambda: api.repo_info(self.repo, repo_type=kind, revision=asked), first=True)
            self.revision, self.root = about.sha, home + about.sha
            for file in _ask_hub(self.name, lambda: list(api.list_repo_tree(
                    self.repo, 'meta', recursive=True, repo_type=kind, revision=self.revision))):
                if isinstance(file, huggingface_hub.hf_api.RepoFile):
                    self._fetch(self._file('{name}', name=file.path))
            open(f'{self.root}/meta/.whole', 'w').close()
        self.name = f'{self.repo}@{self.revision}'      # for the checkpoint: the hub's 'main' moves
        return home + self.revision

    def _fetch(self, path):
        """Bring a file from the hub unless it is here; of all that have come, those used longest ago make room."""
        with contextlib.suppress(FileNotFoundError):
            return os.utime(path)       # it is here, and used now
        name = os.path.relpath(path, self.root)
        part, url = f'{self.root}/.part/{name}', huggingface_hub.hf_hub_url(
            self.repo, name, repo_type='dataset', revision=self.revision, endpoint=os.environ.get('HF_ENDPOINT'))

        def download():     # goes on where an earlier one broke off or was killed; hf_hub_download begins anew
            size = huggingface_hub.get_hf_file_metadata(url).size
            if size > 1e8:
                print(f'fetching {url} ({size / 1e6:,.0f} MB)', file=sys.stderr, flush=True)
            with open(part, 'ab', buffering=0) as f:
                have = f.tell() if f.tell() <= size else f.truncate(0)
                if have < size:
                    headers = huggingface_hub.utils.build_hf_headers()
                    http_get(url, f, resume_size=have, headers=headers, expected_size=size)

        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.makedirs(os.path.dirname(part), exist_ok=True)
        with huggingface_hub.utils.WeakFileLock(f'{part}.lock'):
            if not os.path.exists(path):        # else another process was first
                _ask_hub(path, download)
                os.replace(part, path)
        with contextlib.suppress(FileNotFoundError):        # another process makes room as well
            files = [f for f in pathlib.Path(HUB_HOME).glob('*/*/[dv]*/**/*') if f.is_file()]   # data and videos alone
            left = [(f.stat().st_mtime, f.stat().st_size, f) for f in files]
            total = sum(size for _, size, _ in left)
            for _, size, f in sorted(left)[:-1]:
                if total > self.cache_gb * 1e9:
                    f.unlink()
                    total -= size

    def _read(self, path, call):
        """call() once the file is here; another process may have dropped it meanwhile, to make room."""
        for last in (False, False, True):
            if self.repo:
                self._fetch(path)
            try:
                return call()
            except Bad:
                if last or not self.repo or os.path.exists(path):
                    raise

    def _file(self, template, **values):
        """The path of a file of the dataset. Checked by spelling: links may lead elsewhere, as in the hub's cache."""
        try:
            path = os.path.normpath(os.path.join(self.root, template.format(**values)))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise Bad(f'{self.root}: cannot make a path from {template!r} and {values} ({error!r})') from None
        if os.path.commonpath([path, self.root]) != self.root:
            raise Outside(f'{self.root}: refused: {template!r} leads out of the dataset, to {path}')
        return path

    def _place(self, e, camera=''):
        """The file of an episode's frames by a camera, or, without one and where frames are there too, of its rows."""
        kind, where = ('video', e['video'][camera]) if camera in e['video'] else ('data', e['data'])
        return self._file(self.paths[kind], video_key=camera, **where)

    def _paths(self, e, camera=''):
        """{file: its camera, or '' for a table} that clips by a camera, or by all chosen, are read from."""
        cameras = [camera] if camera else [*self.chosen]
        return {self._place(e, k): k * (k in e['video']) for k in [''] * bool(self.action_keys) + cameras}

    def _load(self, name):
        """What a file of the dataset holds: a list of rows unless it is .json; {} if there is no such file."""
        path = self._file(name)
        if not os.path.isfile(path):
            return {}
        with _reading(path), open(path, 'rb') as f:
            if name.endswith('.parquet'):
                return _table(path).to_pylist()
            return [json.loads(line) for line in f if line.strip()] if name.endswith('.jsonl') else json.load(f)

    def _read_info(self, camera, action, fps):
        self.info, where = self._load('meta/info.json'), self._file('meta/info.json')
        version = str(self.info.get('codebase_version') if isinstance(self.info, dict) else None)
        if version not in ('v2.0', 'v2.1', 'v3.0'):
            sys.exit(f'{where}: wants codebase_version v2.0, v2.1 or v3.0 (lerobot converts older ones), got {version}')
        self.v3, self.native, features = version == 'v3.0', self.info.get('fps'), self.info.get('features')
        paths, videos = {k: self.info.get(f'{k}_path') for k in ('data', 'video')}, self.info.get('videos') or {}
        if features is None and 'video_keys' in self.info:      # the first dialect of v2.0
            kinds = {k: kind for name, kind in (('keys', 'float32'), ('image_keys', 'image'), ('video_keys', 'video'))
                     for k in self.info.get(name) or []}
            features = {k: dict(dtype=kind, shape=(self.info.get('shapes') or {}).get(k), info=videos.get(k))
                        for k, kind in kinds.items()}
            paths['video'] = videos.get('videos_path')
        if not isinstance(features, dict) or not isinstance(self.native, (int, float)) or not self.native > 0:
            sys.exit(f'{where}: wants features and fps, has only {", ".join(self.info)}')
        self.fps, exact = fps or self.native, lambda rate: fractions.Fraction(rate).limit_denominator(1001)
        self.step = exact(self.native) / exact(self.fps)
        if self.step < 1:
            sys.exit(f'--fps={fps}: {self.name} has only {self.native} frames per second')
        self.features, self.paths = features, {k: v or PATHS[version[:2]][k] for k, v in paths.items()}
        flags = {k: {**f, **(f.get('video_info') or {}), **(f.get('info') or {})} for k, f in features.items()}
        depth = {k for k, f in flags.items() for name in ('is_depth_map', 'video.is_depth_map')
                 if str(f.get(name)).lower() == 'true'}        # may be the text "false"
        self.cameras = [k for k, f in flags.items() if f.get('dtype') in ('video', 'image') and k not in depth]
        # an action of text exists as well
        numeric = [k for k, f in features.items() if re.match('float|u?int|bool', str(f.get('dtype')))]
        if not self.cameras:
            sys.exit(f'{self.root}: has no cameras, only {", ".join(features)}')
        wanted = weighted(camera) or [(self.cameras[0], None)]
        self.chosen = {k: 1.0 if w is None else w for name, w in wanted if w != 0
                       for k in self.cameras if name in (k, k.rpartition('.')[2])}
        if not self.chosen:
            sys.exit(f'{self.root}: has no camera {camera!r}, only {", ".join(self.cameras)}')
        self.camera = next(iter(self.chosen))
        default = [k for k in ('action', 'actions') if k in numeric][:1] or [k for k in numeric if k[:7] == 'action.']
        self.action_keys = default if not action else [] if action == 'none' else [k.strip() for k in action.split(',')]
        for key in set(self.action_keys) - set(numeric):
            sys.exit(f'{self.root}: has no numeric {key!r} to be an action, only {", ".join(numeric)}')
        self.widths = [int(np.prod(features[k].get('shape') or 1)) for k in self.action_keys]
        absolute, pose = self.action_mode == 'absolute', 3 + ROTATIONS[self.rotation]
        self.rows_each = math.ceil(self.step) if absolute else 1
        self.action_dim = self.rows_each * sum(w if absolute or w < pose else w - pose + 6 for w in self.widths)
        if not absolute and self.action_keys and max(self.widths) < pose:
            sys.exit(f'--action_mode={self.action_mode}: {self.name} has no pose of {pose} numbers in '
                     f'{", ".join(self.action_keys)} ({self.widths}): name it by --action=...')

    def _read_episodes(self):
        place, videos = ('chunk_index', 'file_index'), [k for k in self.chosen if self.features[k]['dtype'] == 'video']
        if not self.v3:
            lines, size = self._load('meta/episodes.jsonl'), self.info.get('chunks_size') or 1000
            for r in lines:
                if not {'episode_index', 'length'} <= r.keys():
                    raise Bad(f'{self._file("meta/episodes.jsonl")}: a line without episode_index and length')
                i = r['episode_index']
                where = dict(episode_index=i, episode_chunk=i // size, total_episodes=len(lines))
                n = int(r['length'])
                yield dict(index=i, full=n, have=n, tasks=r.get('tasks') or [], data=where,
                           video=dict.fromkeys(videos, where), base=dict.fromkeys(videos, 0))
            return
        needed = ['episode_index', 'length', *(f'data/{k}' for k in place)]
        needed += [f'videos/{v}/{k}' for v in videos for k in (*place, 'from_timestamp')]
        for path in sorted(glob.glob(glob.escape(self._file('meta/episodes')) + '/*/*.parquet')):
            with _reading(path):
                rows = _table(path, ['tasks', *needed], needed).to_pylist()
            for r in rows:      # to_timestamp is off by a frame in some datasets: only the beginning is used
                n = int(r['length'])
                yield dict(index=r['episode_index'], full=n, have=n, tasks=r.get('tasks') or [],
                           data={k: r[f'data/{k}'] for k in place},
                           video={v: {k: r[f'videos/{v}/{k}'] for k in place} for v in videos},
                           base={v: round((r[f'videos/{v}/from_timestamp'] or 0) * self.native) for v in videos})

    def _check(self):
        """Compare the lengths in metadata, rows and videos: name what differs, once; keep what all of them have."""
        users = {}
        for k, n in ('total_episodes', len(self.episodes)), ('total_frames', sum(e['full'] for e in self.episodes)):
            if self.info.get(k, n) != n:
                _note(f'{self.root}: info.json says {k} {self.info[k]}, its episodes make {n}')
        for e in self.episodes:
            try:
                for path, camera in self._paths(e).items():
                    users.setdefault((path, camera), []).append(e)
            except Outside:
                raise
            except Bad as error:
                e |= dict(have=0, why=str(error))
        for (path, camera), es in users.items():
            try:
                with _reading(path):
                    n = _count_frames(path) if camera else pq.read_metadata(path).num_rows
                want = max(e['base'][camera] + e['full'] for e in es) if camera else sum(e['full'] for e in es)
                if n != want:
                    _note(f'{path}: has {n} {"frames" if camera else "rows"}, the metadata say {want}')
                for e in es if n != want else ():
                    begin, count = (e['base'][camera], e['full']) if camera else self._span(path, e)
                    if min(count, n - begin) < e['have']:
                        e |= dict(have=max(0, min(count, n - begin)), why=f'{path}: lacks episode {e["index"]}')
            except Bad as error:
                [e.update(have=0, why=str(error)) for e in es]

    def _read_stats(self):
        stats = self._load('meta/stats.json')
        parts = [] if stats else [line.get('stats', {}) for line in self._load('meta/episodes_stats.jsonl')]
        try:
            stats = stats or {k: _pool([p[k] for p in parts]) for k in self.action_keys}
            out = {s: np.concatenate([np.asarray(stats[k][s], np.float32).reshape(width)
                                      for k, width in zip(self.action_keys, self.widths)]) for s in STATS}
            if self.action_mode == 'absolute' and np.isfinite([*out.values()]).all():
                return {s: np.tile(v, self.action_dim // len(v)) for s, v in out.items()}
        except (KeyError, ValueError, TypeError):
            pass  # missing, incomplete or of another shape: measured, without the rows that are not finite
        parts = []
        for i in range(0, len(self.episodes), -(-len(self.episodes) // 16) if self.repo else 1):
            with contextlib.suppress(Bad):  # is counted where it is drawn
                parts.append(self.rows(i)[np.isfinite(self.rows(i)).all(1)])
        parts = [_describe(a) for a in parts if len(a)]
        if not parts:
            sys.exit(f'{self.root}: no finite row in {", ".join(self.action_keys)}')
        return {k: v.astype(np.float32) for k, v in _pool(parts).items() if k in STATS}

    def _span(self, path, e):
        """(first row, number of rows) of an episode in its data file."""
        # dataset_from_index is scrambled in some converted datasets; the column in the file itself is not
        if not self.v3:
            return 0, e['full']
        index = self._read(path, lambda: _columns(path, ('episode_index',))).get('episode_index')
        if index is None:
            before = [o['full'] for o in self.episodes if o['data'] == e['data'] and o['index'] < e['index']]
            return sum(before), e['full']
        rows = np.flatnonzero(index[:, 0] == e['index'])
        whole = len(rows) and rows[-1] - rows[0] == len(rows) - 1       # neither none nor scattered
        return (int(rows[0]), len(rows)) if whole else (0, 0)

    def _at(self, j):
        """Frame numbers of the file for frames j."""
        return (2 * np.asarray(j) * self.step.numerator + self.step.denominator) // (2 * self.step.denominator)

    @functools.lru_cache(maxsize=16)
    def rows(self, episode):
        """float32 (length, action_dim): raw actions; row j is what is done between frames j and j + 1, NaN if unknown.

        'absolute': the columns as they are; at a lower rate all rows from one frame to the next, one after the other.
        'delta' and 'delta_tool': the pose that a column begins with (x y z and a rotation, see pose_deltas) becomes its
        motion since the frame before, in the base's or the tool's frame. What follows it, or has no pose, stays.
        A column of `observation.*` is a state, reached at the next frame; any other is a target, given at this one.
        """
        e, n = self.episodes[episode], self.episodes[episode]['length']
        if not self.action_dim:
            return np.zeros((n, 0), np.float32)
        path, keys = self._place(e), (*self.action_keys, 'timestamp', 'frame_index')
        columns, (begin, count) = self._read(path, lambda: _columns(path, keys)), self._span(path, e)
        raw = {k: v[begin:begin + min(e['have'], count)] for k, v in columns.items()}
        for key, width in zip(self.action_keys, self.widths):
            if key not in raw or raw[key].shape != (e['have'], width):
                raise Bad(f'{path}: {key} has shape {raw[key].shape if key in raw else None} in episode {e["index"]}, '
                          f'expected {e["have"], width}')
        a = np.concatenate([raw[k] for k in self.action_keys], 1)
        if bad := (~np.isfinite(a)).any(1).sum():
            _note(f'{path}: {bad} rows of {", ".join(self.action_keys)} in episode {e["index"]} are not finite: masked')
        off = np.abs(raw.get('timestamp', 0) - raw['frame_index'] / self.native).max() if len(raw) == len(keys) else 0
        if not off <= 0.5 / self.native:
            _note(f'{path}: timestamps of episode {e["index"]} are up to {off:.3g} s off the grid of {self.native} '
                  'frames a second: frames are taken by their number')
        at = self._at(np.arange(n + 1))
        if self.action_mode == 'absolute':
            i = at[:-1, None] + np.arange(self.rows_each) * np.diff(at)[:, None] // self.rows_each     # (n, rows each)
            return a[np.minimum(i, len(a) - 1)].reshape(n, -1)
        out, k = [], 3 + ROTATIONS[self.rotation]
        for key in self.action_keys:
            i = at - (not key.startswith('observation'))
            known = (i >= 0) & (i < len(a))
            x = np.where(known[:, None], raw[key][i.clip(0, len(a) - 1)], np.nan)           # (n + 1, width)
            pose = k if x.shape[1] >= k else 0
            if pose:
                out.append(pose_deltas(x[:-1, :k], x[1:, :k], self.rotation, self.action_mode == 'delta_tool'))
            out.append(x[1:, pose:])
        return np.concatenate(out, 1).astype(np.float32)

    def frames(self, episode, indices, size=0, camera=''):
        """uint8 (n, 3, H, W) of a camera, the first chosen if none is named, at frame numbers of an episode."""
        e, camera = self.episodes[episode], camera or self.camera
        if len(indices) == 0 or min(indices) < 0 or max(indices) >= e['length']:
            raise ValueError(f'{self.root}: episode {e["index"]} has {e["length"]} frames, not {[*map(int, indices)]}')
        path, at = self._place(e, camera), self._at(indices)
        if camera in e['video']:
            return self._read(path, lambda: read_frames(path, e['base'][camera] + at, self.native, size))
        begin, count = self._span(path, e)
        if max(at) >= count:
            raise Bad(f'{path}: has {count} rows of episode {e["index"]}, not {max(at) + 1}')
        return self._read(path, lambda: self._images(path, begin + at, size, camera))

    def _images(self, path, rows, size, camera):
        with _reading(path):
            meta, out = pq.read_metadata(path), []
            if camera not in pq.read_schema(path).names:
                raise Bad(f'no column {camera}')
            ends = np.cumsum([meta.row_group(g).num_rows for g in range(meta.num_row_groups)])
            for row in rows:
                group = int(np.searchsorted(ends, row, 'right'))
                cell = _row_group(path, group, camera)[int(row - ends[group])].as_py()  # counted from the end
                if not isinstance(cell, dict) or not cell.get('bytes') and not cell.get('path'):
                    raise Bad(f'{camera} is empty in row {row}')
                if not cell['bytes']:       # the picture is a file beside the table
                    cell['bytes'] = self._read(beside := self._file('{name}', name=cell['path']),
                                               lambda: pathlib.Path(beside).read_bytes())
                out.append(_picture(cell['bytes'], size))
            return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)

    def clip(self, episode, start, T, frameskip, size=0, pixels=True, camera=''):
        """dict(x, a, a_mask, z_mask, task): T model steps of `frameskip` dataset frames each.

        x (T, 3, H, W) uint8 is frame f(t) = start + t frameskip of the episode. Row i of the dataset's actions is what
        was done after frame i, so a[t] (frameskip * action_dim,) float32, raw, holds rows f(t-1) .. f(t)-1: what led
        from x[t-1] to x[t]. a_mask (T,) is False where that is not known: at t = 0, in padding, and where a row is not
        finite; a is 0 there. Past the end the last real frame is repeated and z_mask (T,) is False. pixels=False: no x.
        """
        e = self.episodes[episode]
        if not 0 <= start < e['length']:
            raise ValueError(f'{self.root}: episode {e["index"]} has {e["length"]} frames, not {start}')
        f = start + np.arange(T) * frameskip
        z_mask = f < e['length']
        a, a_mask = np.zeros((T, frameskip * self.action_dim), np.float32), np.zeros(T, bool)
        rows, real = self.rows(episode), int(z_mask.sum())
        a[1:real] = rows[start:f[real - 1]].reshape(real - 1, a.shape[1])
        a_mask[1:real] = np.isfinite(a[1:real]).all(1) & (self.action_dim > 0)
        a[~a_mask] = 0
        x = dict(x=self.frames(episode, np.where(z_mask, f, f[z_mask][-1]), size, camera)) if pixels else {}
        return x | dict(a=torch.from_numpy(a), a_mask=torch.from_numpy(a_mask), z_mask=torch.from_numpy(z_mask),
                        task=e['tasks'][0] if e['tasks'] else '')

    def fingerprint(self, camera):
        """What tells whether a camera's frames are the same as before: the hub's revision, or sizes and times."""
        if self.repo:
            return self.revision
        found = [(e['index'], e['base'], e['length']) for e in self.episodes]
        for path in dict.fromkeys(self._place(e, camera) for e in self.episodes):
            found.append((os.path.relpath(path, self.root), os.path.getsize(path), os.stat(path).st_mtime_ns))
        return hashlib.sha256(repr(found).encode()).hexdigest()


def weighted(text):
    """'a:2,b' -> [('a', 2.0), ('b', None)]: the names of a comma-separated list and the weights that are given."""
    parts = [p.strip().rpartition(':') for p in text.split(',') if p.strip()]
    return [(a, float(w)) if a and re.fullmatch(r'\d*\.?\d+', w) else (a + c + w, None) for a, c, w in parts]


def open_sets(text, *options):
    """The datasets of a comma-separated list ('folder:2,owner/name:1': with weights), opened with LeRobot's options."""
    sets = []
    for name, weight in weighted(text):
        sets.append(LeRobot(name, *options))
        sets[-1].weight = weight or 0.0
    if len({ds.weight > 0 for ds in sets}) > 1:
        sys.exit(f'{text}: wants a weight for every dataset, or for none')
    return sets


# columns of a pose after x y z
ROTATIONS = {'euler': 3, 'rotvec': 3, 'quat_xyzw': 4, 'quat_wxyz': 4, 'rot6d': 6, 'rot6d_rows': 6}
_norm = functools.partial(np.linalg.norm, axis=1, keepdims=True)


def _matrices(r, rotation):
    """(n, 3, 3): the rotation matrices of r (n, k), which one of ROTATIONS describes; NaN where r is no rotation."""
    if rotation == 'euler':  # about the fixed axes x, then y, then z
        x, y, z = (_matrices(r[:, i:i + 1] * np.eye(3)[i], 'rotvec') for i in range(3))
        return z @ y @ x
    if rotation[:5] == 'rot6d':  # R's first two columns, in UMI and GR00T its rows, made orthonormal: arXiv:1812.07035
        x, z = (v / _norm(v) for v in (r[:, :3], np.cross(r[:, :3], r[:, 3:])))
        return np.stack([x, np.cross(z, x), z], axis=1 if rotation == 'rot6d_rows' else 2)
    if rotation == 'rotvec':  # to w x y z; np.sinc(x) = sin(pi x) / (pi x)
        r = np.hstack([np.cos(_norm(r) / 2), np.sinc(_norm(r) / 2 / np.pi) / 2 * r])
    w, v = np.split(np.roll(r, rotation == 'quat_xyzw', axis=1)[:, None], [1], axis=2)
    K = np.cross(np.eye(3), v)  # K u = v x u
    return np.eye(3) + 2 * (w * K + K @ K) / (w * w + (v * v).sum(2, keepdims=True))


@np.errstate(all='ignore')  # what is no pose becomes NaN
def pose_deltas(before, after, rotation, tool):
    """(n, 6) float64: motions from pose to pose, 3 of translation and 3 of rotation vector (radians, at most pi long).

    before, after (n, 3 + k): x y z, then k of ROTATIONS. euler is R = Rz(yaw) Ry(pitch) Rx(roll), as DROID has it.
    In the base frame p1 - p0 and log(R1 R0^T); in the tool's before the motion R0^T times both. A NaN fills its row.
    """
    (p0, R0), (p1, R1) = ((p[:, :3], _matrices(p[:, 3:], rotation)) for p in map(np.float64, (before, after)))
    R, T = R1 @ R0.swapaxes(1, 2), R0 @ R1.swapaxes(1, 2)
    # 4 q q^T of the quaternion q = w x y z; the row with the greatest diagonal keeps its digits at any angle
    t, u = np.trace(R, axis1=1, axis2=2)[:, None, None], (R - T)[:, None, [2, 0, 1], [1, 2, 0]]
    Q = np.block([[1 + t, u], [u.swapaxes(1, 2), R + T + (1 - t) * np.eye(3)]])
    q = Q[np.arange(len(Q)), Q.diagonal(axis1=1, axis2=2).argmax(1)]
    w, v = np.split(q / _norm(q), [1], axis=1)
    half = np.arctan2(_norm(v), np.abs(w))  # of the angle; |v| is its sine
    out = np.stack([p1 - p0, 2 * v / np.copysign(np.sinc(half / np.pi), w)], axis=1) @ (R0 if tool else np.eye(3))
    return (out + 0 * out.sum((1, 2), keepdims=True)).reshape(-1, 6)


def write_lerobot(root, episodes, fps, names={}, robot_type='', crf=18, gop=2, file_mb=200):
    """Write a LeRobot v3.0 dataset, as root.tmp until it is whole.

    episodes: dicts of the same keys, read one by one: 'observation.images.<name>', uint8 (L, H, W, 3) or an iterator of
    (H, W, 3); 'task', a string; perhaps 'action' and 'observation.state', (L, width), read after the frames, so lists
    that grow meanwhile will do; names may name their dimensions: {'action': [...]}. Key frames every `gop` frames keep
    random clips cheap. Once a video has file_mb MB, the next episode begins new files.
    """
    tmp = str(root).rstrip('/') + '.tmp'
    if os.path.exists(root):
        sys.exit(f'{root}: exists already, will not write over it')
    shutil.rmtree(tmp, ignore_errors=True)  # left by a run that was interrupted
    os.makedirs(f'{tmp}/data/chunk-000')
    shapes, size, tasks, rows, parts, files, number, total = {}, {}, {}, [], [], contextlib.ExitStack(), -1, 0
    fps, told = int(fps) if fps == int(fps) else fps, time.monotonic()
    for i, e in enumerate(tqdm(episodes, f'writing {root}', unit='episode', disable=not sys.stderr.isatty())):
        cameras = [k for k in e if k.startswith('observation.images.')]
        if i == 0 or max(size.values()) >= file_mb * 2 ** 20:
            files.close()
            number, first, size, videos, writer = number + 1, 0, dict.fromkeys(cameras, 0), {}, None
            file = f'chunk-000/file-{number:03d}'
            for k in cameras:
                os.makedirs(f'{tmp}/videos/{k}/chunk-000', exist_ok=True)
                videos[k] = files.enter_context(av.open(f'{tmp}/videos/{k}/{file}.mp4', 'w', **MP4))
                files.callback(lambda video: video.mux(video.streams.video[0].encode(None)), videos[k])
        L, kept = 0, {k: [] for k in cameras}  # some small frames for statistics, fewer and fewer as an episode goes on
        for L, frames in enumerate(zip(*(e[k] for k in cameras), strict=True), 1):
            for k, x in zip(cameras, frames):
                assert x.shape == shapes.setdefault(k, x.shape), f'episode {i}, frame {L - 1}: {k} is {x.shape} now'
                size[k] += _encode(videos[k], x, first + L - 1, fps, crf=str(crf), g=str(gop))
                if L % (L // 32 + 1) == 0:
                    kept[k].append(x[::len(x) // 64 or 1, ::x.shape[1] // 64 or 1].copy())
        vectors = {k: np.float32(v) for k, v in e.items()
                   if k.startswith(('observation.state', 'action')) and np.size(v) > 0}
        frame = np.arange(L)[:, None]
        columns = vectors | dict(timestamp=np.float32(frame / fps), frame_index=frame, episode_index=0 * frame + i,
                                 index=total + frame, task_index=0 * frame + tasks.setdefault(e['task'], len(tasks)))
        table = pa.table({k: pa.FixedSizeListArray.from_arrays(v.ravel(), v.shape[1]) if v.shape[1] > 1 else v.ravel()
                          for k, v in columns.items()})  # lerobot wants plain numbers for width 1
        writer = writer or files.enter_context(pq.ParquetWriter(f'{tmp}/data/{file}.parquet', table.schema))
        writer.write_table(table)  # one table, one row group
        pictures = {k: np.stack(x).reshape(-1, 3, 1, 1) / 255 for k, x in kept.items()}
        parts.append({k: _describe(v) | dict(count=np.array([L])) for k, v in (vectors | pictures | columns).items()})
        span = dict(chunk_index=0, file_index=number, from_timestamp=first / fps, to_timestamp=(first + L) / fps)
        rows.append({'episode_index': i, 'tasks': [e['task']], 'length': L, 'data/chunk_index': 0,
                     'data/file_index': number, 'dataset_from_index': total, 'dataset_to_index': total + L,
                     **{f'videos/{k}/{n}': v for k in cameras for n, v in span.items()},
                     **{f'stats/{k}/{n}': v.tolist() for k, stats in parts[-1].items() for n, v in stats.items()},
                     'meta/episodes/chunk_index': 0, 'meta/episodes/file_index': 0})
        first, total = first + L, total + L
        if time.monotonic() > told + TELL and not sys.stderr.isatty():
            told = time.monotonic()
            print(f'writing {root}: {i + 1} episodes, {total:,} frames', flush=True)
    assert rows, f'{root}: no episodes to write'
    files.close()

    features = {k: dict(dtype=str(v.dtype), shape=[v.shape[1]], names=names.get(k)) for k, v in columns.items()}
    for k in cameras:
        H, W = (side + side % 2 for side in shapes[k][:2])
        video = dict(height=H, width=W, codec='h264', pix_fmt='yuv420p', fps=fps, channels=3, g=gop, crf=crf,
                     preset=None, fast_decode=0, video_backend='pyav', extra_options={'bf': '0'})
        features[k] = dict(dtype='video', shape=[H, W, 3], names=['height', 'width', 'channels'],
                           info={f'video.{n}': v for n, v in video.items()} | dict(has_audio=False, is_depth_map=False))
    info = dict(codebase_version='v3.0', fps=fps, features=features, total_episodes=len(rows), total_frames=total,
                total_tasks=len(tasks), chunks_size=1000, data_files_size_in_mb=100, robot_type=robot_type or None,
                video_files_size_in_mb=max(1, int(file_mb)), splits={'train': f'0:{len(rows)}'},
                data_path=PATHS['v3']['data'], video_path=PATHS['v3']['video'])
    stats = {k: {n: v.tolist() for n, v in _pool([part[k] for part in parts]).items()} for k in parts[0]}
    os.makedirs(f'{tmp}/meta/episodes/chunk-000')
    for name, value in ('info', info), ('stats', stats):
        with open(f'{tmp}/meta/{name}.json', 'w') as f:
            json.dump(value, f, indent=4)
    pq.write_table(pa.Table.from_pylist(rows), f'{tmp}/meta/episodes/chunk-000/file-000.parquet')
    index = dict(name='task', field_name='task', pandas_type='unicode', numpy_type='object', metadata=None)
    pandas = {'pandas': json.dumps(dict(index_columns=['task'], column_indexes=[], columns=[index]))}
    table = pa.table({'task_index': [*tasks.values()], 'task': pa.array(tasks, pa.large_string())}, metadata=pandas)
    pq.write_table(table, f'{tmp}/meta/tasks.parquet')  # lerobot looks for the text in the index that pandas makes
    os.replace(tmp, root)


class Gym:
    """One robot in any gymnasium environment, as far as recording needs it: pictures, actions, vectors. size (H, W), 0
    is the environment's own. The classes below know one environment each and add what honest evaluation needs.
    """
    exact = False   # whether restore() leaves no trace of what was before

    def __init__(self, env, size=(0, 0), flag='--record', package='', **options):
        try:
            importlib.import_module(package or (re.split('[/:]', env)[:-1] or ['gymnasium'])[0])  # makes env known
            import gymnasium
            self.world = gymnasium.make(env, render_mode='rgb_array', **options)
            self.world.reset()
            self.world.render()  # where a package for drawing is missing, it is noticed only here
        except ModuleNotFoundError as error:
            sys.exit(f'{flag}={env} needs: pip install {error.name.partition(".")[0].replace("_", "-")}')
        except gymnasium.error.Error as error:
            sys.exit(f'{flag}={env}: {" ".join(str(error).split())}')
        except (AttributeError, ImportError, RuntimeError) as error:    # OpenGL's ways to say that it is not there
            if not package:
                raise
            sys.exit(f'{flag}={env}: cannot draw with MUJOCO_GL={os.environ.get("MUJOCO_GL", "")} ({error}): egl wants '
                     'libegl1 and a driver, osmesa wants libosmesa6 (apt-get install)')
        self.space, self.fps, self.size = self.world.action_space, self.world.metadata.get('render_fps'), size

    def reset(self, seed):
        self.observation, self.over = self.world.reset(seed=seed)[0], False

    def step(self, action):
        self.observation, _, terminated, truncated, _ = self.world.step(action)
        self.over = terminated or truncated

    def frame(self):
        """uint8 (H, W, 3)."""
        return _rgb(av.VideoFrame.from_ndarray(np.ascontiguousarray(self.world.render()), 'rgb24'), self.size)

    def state(self):
        """All vectors of the observation, as one."""
        seen = self.observation.values() if isinstance(self.observation, dict) else [self.observation]
        return np.hstack([x for x in seen if np.ndim(x) == 1] or [()])

    def columns(self, action):
        """What a dataset's row says of an action."""
        import gymnasium
        return {'action': gymnasium.spaces.flatten(self.space, action)}

    # what the known ones share
    def rest(self):
        """The action that holds still."""
        return np.zeros(self.space.shape)

    def elsewhere(self, i, rng):
        """Another state, at rest, which has nothing to do with the present one; i: the episode's number."""
        self.reset(int(rng.integers(2 ** 31)))
        for _ in range(10):
            self.step(self.rest())

    def asks(self, i, begin, goal):
        """Whether going from one pose to another is worth asking: not if it is reached already."""
        return not self.far(begin, goal, begin)[1]


class PushT(Gym):
    """gym_pusht/PushT-v0: a disc, the agent, pushes a T on a plane of 512 x 512.

    The action is where the agent is to go: 'action' the target, 'action.relative' (target - agent); key says which one
    step() takes, datasets have both. Only bodies are drawn: the package's pictures also show a target that is not
    ours, the last action and the points of contact. pose: agent x, y, block x, y, angle. Reached, as in
    DINO-WM (arXiv:2411.04983, env/pusht/pusht_wrapper.py): the four positions together within 20, the angle within
    pi / 9.
    """
    unit = 'px of 512'

    def __init__(self, env, size=(0, 0), flag='--env', shift='', key='action'):
        super().__init__(env, size, flag, disable_env_checker=True)
        self.world, self.shift, self.key = self.world.unwrapped, shift, key
        self.reset(0)

    def reset(self, seed):
        super().reset(seed)
        for shape in self.world.block.shapes if self.shift == 'object' else ():
            shape.color = (205, 92, 60, 255)

    def step(self, action):
        agent = np.array(self.world.agent.position)
        super().step(np.clip(action + agent if self.key == 'action.relative' else action, 0, 512))
        self.over = False

    def columns(self, action):
        agent = np.array(self.world.agent.position)
        target = np.clip(action + agent if self.key == 'action.relative' else action, 0, 512)
        return {'action': target, 'action.relative': target - agent}

    def frame(self):
        import pygame
        from gym_pusht.envs.pymunk_override import DrawOptions
        screen = pygame.Surface((512, 512))
        screen.fill((250, 235, 190) if self.shift == 'background' else (255, 255, 255))
        options = DrawOptions(screen)
        options.flags = options.DRAW_SHAPES
        self.world.space.debug_draw(options)
        x = np.frombuffer(pygame.image.tobytes(screen, 'RGB'), np.uint8).reshape(512, 512, 3)
        if self.shift == 'light':       # from the right
            x = np.uint8(x * np.linspace(.55, 1, 512)[:, None])
        if self.shift == 'camera':      # 20 px to the left, 12 up
            x = np.pad(x, ((0, 12), (0, 20), (0, 0)), 'edge')[12:, 20:]
        return _rgb(av.VideoFrame.from_ndarray(np.ascontiguousarray(x), 'rgb24'), self.size)

    def state(self):
        bodies = self.world.agent, self.world.block
        return np.array([v for b in bodies for v in (*b.position, *b.velocity, b.angle, b.angular_velocity)])

    def restore(self, state):
        for b, (x, y, vx, vy, angle, turn) in zip((self.world.agent, self.world.block), state.reshape(2, 6)):
            b.angle = angle             # first: it turns about the centre of mass, which moves the position
            b.position, b.velocity, b.angular_velocity = (x, y), (vx, vy), turn
            self.world.space.reindex_shapes_for_body(b)

    def pose(self):
        return np.array([*self.world.agent.position, *self.world.block.position, self.world.block.angle])

    def rest(self):
        return np.zeros(2) if self.key == 'action.relative' else np.array(self.world.agent.position)

    def far(self, pose, goal, begin):
        """How far the positions are off, and whether the goal is reached."""
        turned = abs((pose[4] - goal[4] + np.pi) % (2 * np.pi) - np.pi)
        gap = np.linalg.norm(pose[:4] - goal[:4])
        return gap, gap < 20 and turned < np.pi / 9

    def script(self, rng):
        """Noisy play: half of the time get behind the block and push it towards a random place, else go to one or, one
        time in six, rest: a model that never saw rest cannot stay at a goal. An action at each call."""
        aims, left, drift = [], 0, np.zeros(2)
        def act():
            nonlocal left, drift
            agent, block = (np.array(v) for v in (self.world.agent.position, self.world.block.local_to_world(
                self.world.block.center_of_gravity)))
            left, drift = left - 1, .8 * drift + .6 * rng.normal(0, 6, 2)
            if aims and (left <= 0 or aims[0] is not None and np.linalg.norm(aims[0] - agent) < 15):
                aims.pop(0)
                left = rng.integers(8, 25)
            if not aims:
                place, left, kind = rng.uniform(60, 452, 2), rng.integers(8, 25), rng.random()
                push = (place - block) / np.linalg.norm(place - block)
                aims[:] = [place] if kind < .83 else [None]
                if kind < .5:
                    aims[:] = [(block - rng.uniform(60, 110) * push + rng.normal(0, 20, 2)).clip(20, 492),
                               block + (place - block) * rng.uniform(0, 1)]
            if aims[0] is None:
                move = np.zeros(2)
            else:
                want = aims[0] - agent
                move = want * min(1, 30 / max(np.linalg.norm(want), 1)) + drift
            return move if self.key == 'action.relative' else np.clip(agent + move, 0, 512)
        return act


class Mujoco(Gym):
    """PointMaze_*, FetchReach-* and FetchPush-* of gymnasium-robotics. Without a screen MUJOCO_GL is egl (or osmesa).

    PointMaze: a force (x, y) moves a ball, seen from above. pose: x, y in cells. Fetch: the motion (x, y, z) of a 7-DoF
    arm's hand in units of 5 cm, and its fingers, which both tasks keep shut. pose: the hand's and the object's x, y, z.
    Reached is what the environments call so: the ball within 0.45 cells, the hand (reach) or object (push) within 5 cm.
    The red sphere of the package's pictures is not drawn: it is a target that is not ours.
    """
    exact = True

    def __init__(self, env, size=(0, 0), flag='--env', shift=''):
        if not os.environ.get('DISPLAY'):
            os.environ.setdefault('MUJOCO_GL', 'egl')
        h, w = (n or 224 for n in size)
        super().__init__(env, (h, w), flag, 'gymnasium_robotics', width=w, height=h, disable_env_checker=True)
        import mujoco
        self.world = self.world.unwrapped
        maze = self.maze = getattr(self.world, 'maze', None)
        inner = self.world.point_env if maze else self.world
        self.model, self.data, self.mj, self.viewer = inner.model, inner.data, mujoco, inner.mujoco_renderer.viewer
        atexit.register(self.world.close)       # later, Python would do it when OpenGL is gone already
        self.push, self.unit, self.near = 'Push' in env, 'cells' if maze else 'm', .45 if maze else .05
        self.fps = round(1 / inner.dt)
        model, camera = self.model, self.viewer.cam
        camera.distance, camera.elevation, camera.azimuth, camera.lookat[:] = (
            (1.2 * max(maze.map_length, maze.map_width) - 2, -90, 90, 0) if maze else (1., -50, 180, (1.3, .75, .42)))
        model.site('target' if maze else 'target0').rgba[3] = 0
        if not maze:        # nor are the axes that show where the controller wants the hand
            model.geom_rgba[model.geom_bodyid == model.body('robot0:mocap').id, 3] = 0
        floor, thing = (('ground', 'particle_site') if maze else
                        ('floor0', 'object0' if self.push else 'robot0:gripper_link'))
        if shift == 'light':
            model.vis.headlight.diffuse[:] *= .5
            model.light_diffuse[:] *= .4
        if shift == 'camera':
            camera.azimuth += 5
            camera.lookat[:2] += .02 * camera.distance
        for which, name, colour in (('background', floor, (.9, .8, .5, 1)), ('object', thing, (.9, .3, .1, 1))):
            if shift == which:
                part = model.site(name) if name == 'particle_site' else model.geom(name)
                part.matid[:], part.rgba[:] = -1, colour
        self.reset(0)

    def frame(self):
        self.viewer.make_context_current()      # of several simulators; the renderer itself draws with the last one
        self.mj.mj_kinematics(self.model, self.data)    # a step leaves the bodies where they were before it
        return super().frame()

    def state(self):
        state = np.empty(self.mj.mj_stateSize(self.model, self.mj.mjtState.mjSTATE_INTEGRATION))
        self.mj.mj_getState(self.model, self.data, state, self.mj.mjtState.mjSTATE_INTEGRATION)
        return state

    def restore(self, state):
        self.mj.mj_setState(self.model, self.data, state, self.mj.mjtState.mjSTATE_INTEGRATION)
        self.mj.mj_forward(self.model, self.data)

    def step(self, action):
        super().step(np.clip(action, -1, 1).astype(np.float32))
        self.over = False

    def elsewhere(self, i, rng):
        self.reset(int(rng.integers(2 ** 31)))
        script = self.script(rng)
        for k in range(10 if self.maze or self.push else 50):   # a reset puts the hand where it always is
            self.step(script() if k < 40 and not (self.maze or self.push) else self.rest())

    def pose(self):
        if self.maze:
            return self.data.qpos.copy()
        return np.hstack([self.data.site(name).xpos for name in ('robot0:grip', 'object0')[:1 + self.push]])

    def asks(self, i, begin, goal):     # a cube that has fallen off the table does not come back
        return super().asks(i, begin, goal) and not (self.push and min(begin[5], goal[5]) < .4)

    def far(self, pose, goal, begin):
        gap = np.linalg.norm((pose - goal)[-3:])
        return gap, gap < self.near

    def script(self, rng):
        """Noisy behaviour: the ball goes through the maze to random places, the hand to random places, two in three
        times low and through the object; an action at each call."""
        left, aim, drift, way = 0, None, np.zeros(len(self.space.low)), []
        def route(start, end):      # breadth first over free cells
            came, todo = {end: end}, [end]
            for cell in todo:
                for near in ((cell[0] + i, cell[1] + j) for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0))):
                    if self.maze.maze_map[near[0]][near[1]] != 1 and near not in came:
                        came[near] = cell
                        todo.append(near)
            while start != end:
                start = came[start]
                yield start
        def act():
            nonlocal left, aim, drift, way
            pose, left, drift = self.pose(), left - 1, .9 * drift + .44 * rng.normal(0, .4, drift.shape)
            if self.maze:
                if left <= 0:
                    free = np.argwhere(np.asarray(self.maze.maze_map, object) != 1)
                    here = tuple(int(v) for v in self.maze.cell_xy_to_rowcol(pose))
                    way, left = [*route(here, tuple(int(v) for v in rng.choice(free)))], rng.integers(50, 200)
                    way, aim = [self.maze.cell_rowcol_to_xy(np.array(c)) + rng.uniform(-.25, .25, 2) for c in way], pose
                if way and np.linalg.norm(pose - aim) < .3:
                    aim = way.pop(0)
                return np.clip(2 * (aim - pose) - .4 * self.data.qvel + drift, -1, 1)
            hand = pose[:3]
            if left <= 0:
                left = rng.integers(4, 12)
                aim = np.array([1.34, .75, .53]) + rng.uniform((-.15, -.15, -.1), (.15, .15, .15))
                if self.push and rng.random() < .67:
                    beyond = pose[3:] + (pose[3:] - hand) * rng.uniform(.2, 1) + rng.normal(0, .03, 3)
                    aim = np.clip(beyond, (1.1, .45, 0), (1.5, 1.05, 1))
                    aim[2] = pose[5]
            return np.append(np.clip(8 * (aim - hand) + drift[:3], -1, 1), 0)
        return act


def simulator(env, size=(0, 0), flag='--env', shift='', key='action'):
    """The simulated robot of a name, None of one that can only be recorded. key: its actions' key in the dataset."""
    name = re.split('[/:]', env)[-1]
    if name == 'demo':
        return Demo(size, shift)
    if name.startswith('PushT-'):
        return PushT(env, size, flag, shift, key)
    if re.match('PointMaze_|FetchReach-|FetchPush-', name):
        return Mujoco(name, size, flag, shift)
    return None


def record(env, episodes, steps, policy, seed, fps=0, size=(0, 0), draw_every=1):
    """(episodes, fps) for write_lerobot(root, *..) from a gymnasium environment, which runs while they are written.

    Row i's action is what was done after frame i, flattened (discrete: one-hot); its state all vectors of the
    observation, or what restores a known simulator. policy: 'random', 'noise' (the same with a memory of 10 steps),
    'script' (a known simulator's noisy behaviour) or 'file.py:name', a function name(observation, frame, step, rng) ->
    action. steps: an episode's most. 0 is no limit of steps, the environment's own fps or size. draw_every: of so many
    frames one is drawn, the others repeat it. Ctrl-C ends the recording and keeps it, a second one the program.
    """
    world = (simulator(env, size, '--record', key='action.relative' if policy == 'script' else 'action')
             or Gym(env, size))
    fps = fps or world.fps or sys.exit(f'--fps: {env} does not say its frames per second')
    space, rng, z, states, stop = world.space, np.random.default_rng(seed), 0, [], []
    space.seed(seed)

    def noise(*_):
        nonlocal z
        z = .9 * z + .19 ** .5 * rng.standard_normal(space.shape)  # AR(1) of variance 1; its ndtr is uniform
        low, high = np.nan_to_num(space.low, neginf=-2), np.nan_to_num(space.high, posinf=2)
        return (low + (high - low) * torch.special.ndtr(torch.as_tensor(z)).numpy()).astype(space.dtype)

    script = hasattr(world, 'script') and (lambda *_: act())
    file, _, function = policy.rpartition(':')
    choose = ({'random': lambda *_: space.sample(), 'noise': hasattr(space, 'low') and noise,
               'script': script}.get(policy)
              or os.path.isfile(file) and runpy.run_path(file).get(function)
              or sys.exit(f'--policy={policy}: wants random, noise (not of discrete actions), file.py:name or script '
                          '(where the simulator is known)'))

    def frames():
        nonlocal act
        states[:] = []
        for values in rows.values():
            values[:] = []
        world.reset(seed=int(rng.integers(2 ** 31)))
        act = script and world.script(rng)
        for step in range(steps or sys.maxsize):
            if step % draw_every == 0:
                frame = world.frame()
            action = choose(world.observation, frame, step, rng)
            for k, v in world.columns(action).items():
                rows[k].append(v)
            states.append(world.state())
            yield frame
            world.step(action)
            if world.over or stop:
                return

    act = None
    rows = {k: [] for k in world.columns(space.sample())}
    signal.signal(signal.SIGINT, lambda *_: stop.append(signal.signal(signal.SIGINT, signal.default_int_handler)))
    return ({'observation.images.render': frames(), 'task': env, **rows, 'observation.state': states}
            for _ in itertools.takewhile(lambda _: not stop, range(episodes))), fps


def import_videos(pattern, fps=0, size=(0, 0)):
    """(episodes, fps) for write_lerobot, without actions, of plain videos, one each; pattern: 'folder/*.mp4'.

    All come upright, in one size and at one rate, by nearest time; 0: the first's. What cannot be read is named.
    """
    def upright(frame):
        return np.rot90(_rgb(frame, size[::-1] if frame.rotation % 180 else size), round(frame.rotation / 90))

    def frames(path):
        nonlocal fps, size
        i = 0
        try:
            with _reading(path), av.open(path) as container:
                stream = next(iter(container.streams.video), None)
                if stream is None or stream.start_time is None or container.format.name == 'tty':  # any text is a "tty"
                    raise Bad('no video with times in it')
                stream.thread_type, rate = 'AUTO', float(stream.average_rate or 30)
                start, fps = float(stream.start_time * stream.time_base), fps or round(rate, 3)
                for frame in container.decode(stream):
                    size = size if any(size) else upright(frame).shape[:2]
                    end = (frame.time or start) - start + (frame.duration * frame.time_base or 1 / rate) / 2
                    while i / fps < end + 1e-6:  # halfway between two frames, the earlier one
                        yield upright(frame)
                        i += 1
        except Bad as error:
            print(error, flush=True)

    good = ([path for path in sorted(glob.glob(pattern, recursive=True)) if next(frames(path), None) is not None]
            or sys.exit(f'--videos={pattern}: no video there that can be read'))
    return ({'observation.images.video': frames(path), 'task': os.path.splitext(os.path.basename(path))[0]}
            for path in good), fps


# ----------------------------------------------------------------------------------------------------------------------
# batches

SEGMENT = 2048      # windows that stay together while an epoch is put in order: an hour of video is many segments
BLOCK = 1 << 16     # windows that are shuffled among each other
AHEAD = 16          # batches whose files are fetched from the hub before their turn


class Order:
    """Windows of T steps in some episodes: [i] is an (episode, start), each once in `count`; at most `files` mixed."""

    def __init__(self, ds, episodes, T, frameskip, files, *seed):
        self.seed, units, place = seed, [], {}      # a unit: end, windows, episode, file
        for e in episodes:
            n = max(1, ds.episodes[e]['length'] - (T - 1) * frameskip)      # a short episode is padded
            file = str(ds.episodes[e]['video'].get(ds.camera, ds.episodes[e]['data'])) if ds.repo else ''
            file = place.setdefault(file, len(place))
            units += [(min(i + SEGMENT, n), min(SEGMENT, n - i), e, file) for i in range(0, n, SEGMENT)]
        self.units = np.array(units)
        self.count = int(self.units[:, 1].sum())
        self.block = max(1, min(BLOCK, self.count * files // len(place)))

    @functools.lru_cache(maxsize=64)
    def _block(self, epoch, block):     # of segments in random order, but one file is used up before the next one comes
        rng, units = np.random.default_rng((*self.seed, epoch)), self.units
        units = units[np.lexsort((rng.random(len(units)), rng.random(len(units))[units[:, 3]]))]
        ends, i = np.cumsum(units[:, 1]), np.arange(block * self.block, min((block + 1) * self.block, self.count))
        np.random.default_rng((*self.seed, epoch, block)).shuffle(i)
        u = np.searchsorted(ends, i, 'right')
        return np.stack([units[u, 2], units[u, 0] - (ends[u] - i)], 1)

    def __getitem__(self, i):
        epoch, i = divmod(i, self.count)
        return tuple(self._block(epoch, i // self.block)[i % self.block].tolist())


class Clips:
    """Batches of clips from two lists of LeRobot; clips[step] is a pure function of (seed, step, rank, world).

    A batch holds x (B, T, 3, H, W) uint8, or z (B, T, N, D) float16 once `tokens` are set (see cached_latents);
    a (B, T, A) normalised by each dataset's mean and std, clipped at +-5, padded to the widest; a_mask, z_mask (B, T);
    and `faults`, for count_faults. Of any 1/labelled_share consecutive clips of a rank exactly one is labelled. All
    datasets of a kind share clips exactly, by duration or the weights given; all ranks together see every window of one
    once before any again. Cameras are drawn by weight. A clip that cannot be read is replaced by one of its dataset.
    """

    def __init__(self, labelled, unlabelled, T, frameskip, size, batch_size, labelled_share, val_share, seed=0, rank=0,
                 world=1):
        self.T, self.frameskip, self.size, self.batch_size, self.tokens = T, frameskip, size, batch_size, None
        self.seed, self.rank, self.world, self.sets, self.faults = seed, rank, world, [*labelled, *unlabelled], {}
        self.kinds = range(len(labelled)), range(len(labelled), len(self.sets))
        share = labelled_share if labelled and unlabelled else bool(labelled)
        self.share = fractions.Fraction(share).limit_denominator(1000)
        self.A = frameskip * max([ds.action_dim for ds in labelled], default=0)
        self.train, self.val, self.orders, weight = [], [], [], []
        for s, ds in enumerate(self.sets):
            n = len(ds.episodes)
            if n < 2:
                sys.exit(f'{ds.root}: has {n} episode, splitting off whole episodes for validation wants at least 2')
            k = max(1, min(n - 1, round(n * val_share)))
            self.val.append([int((i + 0.5) * n / k) for i in range(k)])
            self.train.append(sorted({*range(n)} - {*self.val[s]}))
            mb = (ds.info.get('video_files_size_in_mb') or 10) * len(ds.chosen)     # half of the disk cache is in use
            self.orders.append(Order(ds, self.train[s], T, frameskip, max(1, int(ds.cache_gb * 500 / mb)), seed, 1, s))
            weight.append(fractions.Fraction(ds.weight).limit_denominator(10**6) or
                          self.orders[s].count / fractions.Fraction(ds.fps).limit_denominator(1001))
        # what each dataset gets of that which those of its kind before it leave
        self.rest = [weight[s] / sum(weight[s:kind.stop]) for kind in self.kinds for s in kind]

    @functools.lru_cache(maxsize=4 * AHEAD)
    def picks(self, step):
        """The (dataset, episode, start, camera) of each clip of a batch, without reading any."""
        rng, out = np.random.default_rng((self.seed, step, self.rank)), []
        for i in range(step * self.batch_size, (step + 1) * self.batch_size):
            k = i * self.share // 1                                     # labelled clips of this rank before this one
            labelled = (i + 1) * self.share // 1 > k
            i = (k if labelled else i - k) * self.world + self.rank     # now counted over all ranks, within the kind
            for s in self.kinds[not labelled]:
                k = i * self.rest[s] // 1
                if (i + 1) * self.rest[s] // 1 > k:
                    break
                i -= k
            weights = np.array([*self.sets[s].chosen.values()])
            out.append((s, *self.orders[s][k], str(rng.choice([*self.sets[s].chosen], p=weights / weights.sum()))))
        # the loss treats the first rows in a way of its own: which clips they are must not depend on their kind
        return [out[i] for i in rng.permutation(len(out))]

    def clip(self, s, e, start, camera, T):
        """One clip of dataset s, episode e, as it goes into a batch."""
        ds, z = self.sets[s], self.tokens and self.tokens[s, e, camera]
        if isinstance(z, str):
            raise Bad(z)
        c, a = ds.clip(e, start, T, self.frameskip, self.size, z is None, camera), torch.zeros(T, self.A)
        if z is not None:
            z = z[start + np.minimum(np.arange(T), int(c['z_mask'].sum()) - 1) * self.frameskip]
            c['z'] = torch.from_numpy(z['z'] * z['scale'][:, None] if 'scale' in z.dtype.names else z['z'])
        if s in self.kinds[0]:
            mean, std = (torch.from_numpy(ds.stats[k]).repeat(self.frameskip) for k in ('mean', 'std'))
            known = c['a_mask'][:, None] & (std > 1e-6)         # a dimension that never moves stays 0
            a[:, :len(mean)] = torch.where(known, (c['a'] - mean) / std, 0.0).clamp(-5, 5)
        c |= dict(a=a, a_mask=c['a_mask'] & (s in self.kinds[0]))
        return {k: c[k] for k in c if k != 'task'}

    def _bring(self, steps):
        """Bring the files of some batches from the hub."""
        for s, e, _, camera in itertools.chain(*map(self.picks, steps)):
            with contextlib.suppress(Bad, Away, OSError):       # the reader will meet it, too
                for path, video in self.sets[s]._paths(self.sets[s].episodes[e], camera).items():
                    if self.sets[s].repo and not (video and self.tokens):
                        self.sets[s]._fetch(path)

    def __getitem__(self, step):
        stride = getattr(torch.utils.data.get_worker_info(), 'num_workers', 1)
        for k in range(1, 5) if any(ds.repo for ds in self.sets) else ():       # four threads work ahead
            if f'ahead {self.T} {k}' not in [t.name for t in threading.enumerate()]:
                steps = range(step + k * stride, step + AHEAD * stride, 4 * stride)
                threading.Thread(target=self._bring, args=(steps,), name=f'ahead {self.T} {k}', daemon=True).start()
        clips, faults = [], []
        for i, (s, *where) in enumerate(self.picks(step)):
            for attempt in range(100):
                try:
                    clips.append(self.clip(s, *where, self.T))
                    break
                except Bad as error:    # not remembered: whether a clip is replaced must not depend on earlier ones
                    name = f'{self.sets[s].name}, episode {self.sets[s].episodes[where[0]]["index"]}'
                    faults.append([name, str(error)])
                    rng = np.random.default_rng((self.seed, step, self.rank, i, attempt))
                    near = [w for t, *w in self.picks(step) if t == s and w[0] != where[0] and self.sets[s].repo]
                    where = near[rng.integers(len(near))] if near else (    # of the hub, one whose file has come
                        *self.orders[s][int(rng.integers(self.orders[s].count))], where[2])
            else:
                raise Bad(f'{name}: 100 clips in a row cannot be read, at last {faults[-1][1]}')
        faults += [['', text] for text in _notes if _notes[text]]       # a worker's, for the main process to print
        _notes.update(dict.fromkeys(_notes, False))
        return torch.utils.data.default_collate(clips) | dict(faults=faults)

    def count_faults(self, batch, max_bad):
        """Print, once, what a batch (taken out of it) says is wrong; end the run if too many episodes are bad."""
        for episode, text in batch.pop('faults', ()):
            if (episode or text) not in self.faults:
                self.faults[episode or text] = bool(episode)
                print(f'{episode}: skipped: {text}' if episode else text, file=sys.stderr, flush=True)
        dropped = sum(len(ds.dropped) for ds in self.sets)
        bad, every = dropped + sum(self.faults.values()), dropped + sum(len(ds.episodes) for ds in self.sets)
        if bad > max_bad * every:
            sys.exit(f'--max_bad={max_bad}: {bad} of {every} episodes cannot be read (they are named above)')

    def _some(self, kind, split, n, T, read):
        """[read(dataset, episode, start, camera)] of up to n windows of T steps, of all datasets of a kind in turn."""
        orders, out = {s: Order(self.sets[s], split[s], T, self.frameskip, 4, 0) for s in kind}, []
        for i, s in [(i, s) for i in range(n) for s in kind if i < orders[s].count][:n]:
            try:
                out.append(read(s, *orders[s][i], [*self.sets[s].chosen][i % len(self.sets[s].chosen)]))
            except Bad as error:
                _note(f'{self.sets[s].name}: left out: {error}')
        return out

    def sample(self, n, m):
        """uint8 (about n m, 3, H, W): m frames of each of n training episodes."""
        out = self._some(range(len(self.sets)), self.train, n, sys.maxsize, lambda s, e, _, camera: self.sets[s].frames(
            e, np.linspace(0, self.sets[s].episodes[e]['length'] - 1, m).astype(int), self.size, camera))
        if not out:
            sys.exit(f'{", ".join(ds.name for ds in self.sets)}: no episode can be read')
        return torch.cat(out)

    def held_out(self, T, n):
        """{'labelled' and/or 'unlabelled': a batch of about n clips of T steps from validation episodes}."""
        clips = {name: self._some(kind, self.val, n, T, lambda *where: self.clip(*where, T))
                 for name, kind in zip(('labelled', 'unlabelled'), self.kinds)}
        return {name: torch.utils.data.default_collate(c) for name, c in clips.items() if c}

    def action_stats(self):
        """{name: (labelled datasets, A)} of raw actions of a model step: mean, std, low, high; and (n,) width, rows."""
        sets, out = [self.sets[s] for s in self.kinds[0]], {}
        for k, name in zip(('mean', 'std', 'low', 'high'), STATS):
            out[k] = torch.zeros(len(sets), self.A)
            for row, ds in zip(out[k], sets):
                row[:ds.action_dim * self.frameskip] = torch.from_numpy(ds.stats[name]).repeat(self.frameskip)
        return out | {k: torch.tensor([v * self.frameskip for v in of]) for k, of in (
            ('width', [ds.action_dim for ds in sets]), ('rows', [ds.rows_each for ds in sets]))}


class Lengths:
    """Batches of two Clips in turn: of any 1/share consecutive steps exactly one is of the second. [step]: a batch."""

    def __init__(self, short, long, share):
        self.short, self.long, self.share = short, long, fractions.Fraction(share).limit_denominator(1000)

    def which(self, step):
        """The Clips that a step takes its batch from, and the number of that batch there."""
        k = step * self.share // 1
        return (self.long, k) if (step + 1) * self.share // 1 > k else (self.short, step - k)

    def __getitem__(self, step):
        clips, i = self.which(step)
        return clips[i]


# ----------------------------------------------------------------------------------------------------------------------
# cached latents

CHUNK, PART = 64, 1 << 26       # frames encoded at once; bytes of a file


@torch.no_grad()
def cached_latents(sets, encoder, device, autocast, folder='', store='float16', workers=0, rank=0, world=1):
    """The latents of all frames: {(dataset, episode, camera): array, or the line that says why there is none}.

    array[j]['z'] (N, D) of frame j is float16; or int8, to be multiplied by array[j]['scale'] (D,), which puts the
    largest |z| of each channel at 127. Without a folder they stay in memory. Else every dataset and camera has a folder
    in there, named by a hash of what latents depend on, with memory-mapped files of some episodes each: what is there
    is not made again, the rest is shared out among ranks. Latents of files that have changed are refused.
    """
    def read(chunk):
        e, i = chunk
        try:
            return ds.frames(e, range(i - begin[e], min(i + CHUNK, begin[e + 1]) - begin[e]), size, camera)
        except Bad as why:
            return str(why)

    def encode(x):
        with autocast:
            v = encoder(x.to(device).float() / 255).float()                                         # (n, N, D)
        out = np.empty(len(v), kind)
        if store == 'int8':     # on the device: a quarter of the bytes to copy
            scale = (v.abs().amax(1) / 127).clamp(min=1e-6).half()
            q = (v / scale[:, None].float()).round().clamp(-127, 127)
            error[:] += torch.stack(((q * scale[:, None] - v).square().sum(),
                                     (v - v.mean((0, 1))).square().sum())).cpu().numpy()
            out['scale'], out['z'] = scale.cpu().numpy(), q.to(torch.int8).cpu().numpy()
        else:
            out['z'] = v.half().cpu().numpy()
        return out

    size, shape, weights = (encoder.size, encoder.width), (math.prod(encoder.grid), encoder.dim), hashlib.sha256()
    for k, v in sorted(encoder.state_dict().items()):
        weights.update(k.encode() + v.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    about = dict(encoder=encoder.name, weights=weights.hexdigest(), layer=encoder.layer, pool=encoder.pool, size=size,
                 dtype=str(autocast.fast_dtype) if autocast._enabled else 'float32', store=store, part=PART)
    kind = np.dtype([('z', 'i1', shape), ('scale', 'f2', shape[1:])] if store == 'int8' else [('z', 'f2', shape)])
    found, own, temp = {}, '', f'.{os.getpid()}'        # a file gets its name, without that, when it is whole
    for s, ds, camera in [(s, ds, k) for s, ds in enumerate(sets) for k in ds.chosen]:
        if folder:
            key = json.dumps(about | dict(source=ds.repo or ds.root, camera=camera, fps=float(ds.fps)), sort_keys=True)
            name = f'{os.path.basename(ds.repo or ds.root)}-{camera.rpartition(".")[2]}-'
            name = os.path.join(folder, name + hashlib.sha256(key.encode()).hexdigest()[:12] + '-')
            own = name + ds.fingerprint(camera)[:12]
            for old in {*glob.glob(glob.escape(name) + '*')} - {own}:
                sys.exit(f'{old}: holds latents of {ds.name} as it was; its files have changed since. Remove that '
                         'folder to encode them again')
            os.makedirs(own, exist_ok=True)
            for left in glob.glob(glob.escape(own) + '/*.[0-9]*'):
                with contextlib.suppress(FileNotFoundError):    # other ranks clear up as well
                    if time.time() - os.path.getmtime(left) > 3600:     # its run was killed
                        os.remove(left)
        begin = [*itertools.accumulate((e['length'] for e in ds.episodes), initial=0)]      # frames before an episode
        most = max(PART, begin[-1] * kind.itemsize >> 8)        # of 256 files at most: each keeps a descriptor open
        groups = itertools.groupby(range(len(ds.episodes)), lambda e: begin[e] * kind.itemsize // most)
        parts = {f'{own}/{i:03d}': [*episodes] for i, episodes in groups}
        todo = [p for i, p in enumerate(parts) if not own or (i + s) % world == rank and not os.path.exists(f'{p}.npy')]
        chunks = {path: [(e, i) for e in parts[path] for i in range(begin[e], begin[e + 1], CHUNK)] for path in todo}
        frames = iter(torch.utils.data.DataLoader(
            [*itertools.chain(*chunks.values())], batch_size=None, collate_fn=read, num_workers=workers,
            multiprocessing_context='fork' if workers else None))
        total, error, made = sum(ds.episodes[e]['length'] for path in todo for e in parts[path]), np.zeros(2), {}
        bar = tqdm(total=total, desc=f'encoding {ds.name}', unit='frame', disable=rank > 0 or not sys.stderr.isatty())
        clock = told = time.monotonic()
        for path in todo:
            first, bad = begin[parts[path][0]], {}
            n = begin[parts[path][-1] + 1] - first
            z = np.lib.format.open_memmap(f'{path}.npy{temp}', 'w+', kind, (n,)) if own else np.empty(n, kind)
            for (e, i), x in zip(chunks[path], frames):
                if isinstance(x, str):
                    bad[e] = x
                    _note(f'{ds.name}, episode {ds.episodes[e]["index"]}: {x}')
                else:
                    z[i - first:i - first + len(x)] = encode(x)
                bar.update(min(CHUNK, begin[e + 1] - i))
                if rank == 0 and bar.disable and time.monotonic() > told + TELL:
                    told = time.monotonic()
                    print(f'encoding {ds.name}, {camera}: frame {i:,} of {begin[-1]:,}', flush=True)
            if own:
                with open(f'{path}.json{temp}', 'w') as f:
                    json.dump([*bad.items()], f)
                z.flush()
                os.replace(f.name, f'{path}.json')
                os.replace(z.filename, f'{path}.npy')
            made[path] = z, bad
        bar.close()
        while own and not all(os.path.exists(f'{path}.npy') for path in parts):
            time.sleep(1)       # for the other ranks; a barrier would give up after some minutes
        for path, es in parts.items():
            if path not in made:
                try:
                    with open(f'{path}.json') as f:
                        made[path] = np.load(f'{path}.npy', mmap_mode='r'), dict(json.load(f))
                except (OSError, ValueError, TypeError, EOFError) as why:
                    sys.exit(f'{path}: a damaged file of latents ({why}). Remove {own} to encode them again')
            z, bad = made[path]
            for e in es:
                found[s, e, camera] = bad.get(e) or z[begin[e] - begin[es[0]]:begin[e + 1] - begin[es[0]]]
        if rank == 0:
            print(f'{ds.name}, {camera}: latents of {begin[-1]:,} frames, {begin[-1] * kind.itemsize / 1e6:,.0f} MB in '
                  f'{own or "memory"}, {total:,} encoded now, {total / (time.monotonic() - clock):.0f} frames/s'
                  + (f', int8 error {(error[0] / error[1]) ** 0.5:.2%} of the std' if error[1] else ''), flush=True)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# the demo world: a table seen from above; an arm's tip, moved by (dx, dy), pushes a disc; lengths are in table widths

DEMO_STEP, DEMO_NEAR = 0.05, 0.08   # the longest move of the tip in a frame; what counts as reached
TIP, DISC, HALO = 0.11, 0.15, 0.3   # radii


def demo_step(state, action):
    """state (n, 4): x, y of the tip and of the disc, in [0, 1]; action (n, 2): move of the tip -> next state."""
    def overlap(tip, disc):  # as a vector from the tip to the disc
        far = np.linalg.norm(disc - tip, axis=1, keepdims=True)
        return np.maximum(TIP + DISC - far, 0) * (disc - tip) / np.maximum(far, 1e-6)
    tip = np.clip(state[:, :2] + np.clip(action, -DEMO_STEP, DEMO_STEP), TIP, 1 - TIP)
    disc = np.clip(state[:, 2:] + overlap(tip, state[:, 2:]), DISC, 1 - DISC)
    tip = np.clip(tip - overlap(tip, disc), TIP, 1 - TIP)   # at the border the disc stops, and stops the tip
    return np.concatenate((tip, disc), axis=1)


def demo_draw(state, size=64):
    """uint8 (n, size, size, 3): large shapes with wide halos, so that distances of pictures say how far a shape is from
    its goal also without overlap. None can leave the table: half a tip is closer to any goal than a whole one."""
    at = (np.arange(size, dtype=np.float32) + 0.5) / size
    image = np.full((len(state), size, size, 3), (0.86, 0.84, 0.80), np.float32)
    for i, radius, colour in ((2, DISC, (0.15, 0.35, 0.80)), (0, TIP, (0.85, 0.25, 0.15))):
        x, y = ((at - centre[:, None]) ** 2 for centre in state.T[i:i + 2].astype(np.float32))      # (n, size)
        far = np.sqrt(y[:, :, None] + x[:, None, :])
        cover = np.maximum(np.clip((radius - far) / 0.03 + 0.5, 0, 1), 0.45 * np.exp(-(far / HALO) ** 2))
        image += cover[..., None] * (np.float32(colour) - image)
    return np.uint8(image * 255 + 0.5)


def demo_start(n, rng):
    """n states with the tip clear of the disc."""
    state = np.zeros((n, 4))
    while (near := np.linalg.norm(state[:, :2] - state[:, 2:], axis=1) < TIP + DISC + 0.02).any():
        state[near] = rng.uniform((0.12, 0.12, 0.22, 0.22), (0.88, 0.88, 0.78, 0.78), (near.sum(), 4))
    return state


def demo_script(n, rng):
    """A noisy script for n tables: a function state (n, 4) -> action (n, 2), which wanders to random places, often
    through the disc."""
    aim, left = np.zeros((n, 2)), np.zeros((n, 1))      # where the tip goes, and for how many frames
    def act(state):
        nonlocal aim, left
        tip, disc = state[:, :2], state[:, 2:]
        through = rng.random((n, 1)) < 0.6              # beyond the disc, as seen from the tip
        beyond = disc + (disc - tip) * rng.uniform(0.2, 1.2, (n, 1)) + rng.normal(0, 0.05, (n, 2))
        aim = np.where(left <= 0, np.where(through, beyond, rng.uniform(0, 1, (n, 2))).clip(0, 1), aim)
        left = np.where(left <= 0, rng.integers(6, 16, (n, 1)), left - 1)
        return ((aim - tip) * 0.5 + rng.normal(0, 0.015, (n, 2))).clip(-DEMO_STEP, DEMO_STEP)
    return act


def demo_episodes(n, T, rng):
    """States (n, T, 4) and actions (n, T, 2) of the script."""
    state, states, actions = demo_start(n, rng), np.empty((n, T, 4)), np.empty((n, T, 2))
    act = demo_script(n, rng)
    for t in range(T):
        action = act(state)
        states[:, t], actions[:, t], state = state, action, demo_step(state, action)
    return states, actions


class Demo:
    """One robot in the demo world, for evaluation. pose: x, y of tip and disc. Reached: the disc, where the goal has it
    elsewhere than the start, or else the tip, within DEMO_NEAR. Every other goal asks for a push."""
    exact, unit, fps, space = True, 'table widths', 10, types.SimpleNamespace(shape=(2,))

    def __init__(self, size=(0, 0), shift=''):
        self.size, self.shift = size, shift
        self.reset(0)

    def reset(self, seed):
        self.now = demo_start(1, np.random.default_rng(seed))[0]

    def state(self):
        return self.now.copy()

    pose = state

    def restore(self, state):
        self.now = np.array(state)

    def step(self, action):
        self.now = demo_step(self.now[None], np.asarray(action)[None])[0]

    def frame(self):
        x = demo_draw(self.now[None], 64)[0]
        if self.shift == 'light':
            x = np.uint8(x * np.linspace(.55, 1, 64)[:, None])
        if self.shift == 'camera':      # 3 px to the left, 2 up
            x = np.pad(x, ((0, 2), (0, 3), (0, 0)), 'edge')[2:, 3:]
        if self.shift in ('background', 'object'):      # less red in what is grey, or in what is coloured
            grey = np.ptp(x.astype(int), axis=2) < 40
            x[..., 0] = np.where(grey == (self.shift == 'background'), x[..., 0] * .7, x[..., 0])
        return _rgb(av.VideoFrame.from_ndarray(x, 'rgb24'), self.size)

    def script(self, rng):
        act = demo_script(1, rng)
        return lambda: act(self.now[None])[0]

    def columns(self, action):
        return {'action': action}

    def rest(self):
        return np.zeros(2)

    def elsewhere(self, i, rng):
        disc = self.now[2:]
        self.now = demo_start(1, rng)[0]
        if i % 2 == 0:      # reaching: the disc stays where it is
            self.now[2:] = disc

    def far(self, pose, goal, begin):
        which = slice(2, 4) if np.linalg.norm(goal[2:] - begin[2:]) > .02 else slice(0, 2)
        gap = np.linalg.norm((pose - goal)[which])
        return gap, gap < DEMO_NEAR

    def asks(self, i, begin, goal):
        tip, disc = (np.linalg.norm((goal - begin)[k:k + 2]) for k in (0, 2))
        clear = np.linalg.norm(goal[:2] - goal[2:]) > TIP + DISC - 1e-6
        return clear and (disc > .15 if i % 2 else tip > .2 and disc < .02)


def write_demo(root, n, labelled, seed):
    """Write n episodes of 60 frames of the demo world as a LeRobot dataset, with or without their actions."""
    states, actions = demo_episodes(n, 60, np.random.default_rng(seed))
    write_lerobot(root, ({'observation.images.top': demo_draw(s), 'task': 'push the disc'} |
                         ({'action': a} if labelled else {}) for s, a in zip(states, actions)),
                  fps=10, names={'action': ['dx', 'dy']})


if __name__ == '__main__':
    from_env = record       # the option takes its name
    # ------------------------------------------------------------------------------------------------------------------
    labelled = ''                   # LeRobot datasets: folders or names on the hub, comma-separated ...
    unlabelled = ''                 # ... and those whose actions are not used
    camera = ''                     # keys or their last parts, 'front:3,wrist:1'; '' = each dataset's first
    action = ''                     # keys; '' = action, else actions, else all action.*
    action_mode = 'absolute'        # absolute, delta or delta_tool: motions of the poses in the action keys
    rotation = 'euler'              # of those poses: euler, quat_xyzw, quat_wxyz, rotvec, rot6d or rot6d_rows
    fps = 0.0                       # frames per second that are used, at most the dataset's; 0 = all
    cache_gb = 50.0                 # of files from the hub that are kept on disk
    # encode every frame once, for train.py --cache_dir=... with the same options
    cache = False
    cache_dir = 'latents'
    store = 'float16'               # or int8: half the size
    encoder = 'dinov2_vits14'
    encoder_path = ''               # weights, .safetensors or .pth; '' = from the hub
    layer = -1
    frame_height = 0                # pixels; 0 = the encoder's own (videos: the first one's)
    frame_width = 0                 # 0 = square
    pool = 1                        # 2 averages 2x2 patches
    workers = 2                     # processes that decode video
    device = 'auto'
    dtype = 'auto'                  # float32 or bfloat16; auto = bfloat16 where the hardware multiplies it
    # write a LeRobot v3.0 dataset
    record = ''                     # a gymnasium environment: gym_pusht/PushT-v0
    videos = ''                     # or plain videos: 'folder/*.mp4'
    out = ''                        # the new dataset's folder
    episodes = 100
    steps = 300                     # the longest episode
    policy = 'random'               # random, noise (correlated in time) or file.py:function
    draw_every = 1                  # of so many frames one is drawn, for datasets that are read at a lower --fps
    seed = 0
    config = override({k: v for k, v in globals().items() if k.lower() == k}, sys.argv[1:])
    globals().update(config)
    # ------------------------------------------------------------------------------------------------------------------
    for name, choices in (('action_mode', ('absolute', 'delta', 'delta_tool')), ('rotation', [*ROTATIONS]),
                          ('store', ('float16', 'int8')), ('dtype', ('auto', 'float32', 'bfloat16'))):
        one_of(name, config[name], choices)
    for name, least in (('episodes', 1), ('steps', 0), ('seed', 0), ('frame_height', 0), ('frame_width', 0),
                        ('workers', 0), ('fps', 0), ('cache_gb', 0), ('draw_every', 1)):
        if not config[name] >= least:       # nor nan
            sys.exit(f'--{name}: wants at least {least}, got {config[name]}')
    if bool(record) + bool(videos) + bool(labelled or unlabelled) != 1:
        sys.exit('wants one of --labelled or --unlabelled, --record and --videos (python data.py --help)')
    if record or videos:
        if not out:
            sys.exit('--out: wants the folder that is to be written')
        size = (frame_height, frame_width or frame_height)
        found, rate = (from_env(record, episodes, steps, policy, seed, fps, size, draw_every) if record else
                       import_videos(videos, fps, size))
        write_lerobot(out, found, rate, robot_type=record, gop=max(2, draw_every))
        fps = 0.0
        labelled = out
    sets = open_sets(labelled, camera, action, fps, action_mode, rotation, cache_gb)
    sets += open_sets(unlabelled, camera, 'none', fps, action_mode, rotation, cache_gb)
    for ds in sets:
        n, spent = sum(e['length'] for e in ds.episodes), [f'{k} ({w})' for k, w in zip(ds.action_keys, ds.widths)]
        print(f'{ds.name}: {len(ds.episodes)} episodes ({len(ds.dropped)} left out), {n:,} frames at {ds.fps:g}/s, '
              f'{n / ds.fps / 3600:.2f} h; cameras {", ".join(ds.cameras)}; actions {", ".join(spent) or "none"}')
    if cache:
        from model import load_encoder
        if encoder == 'pixels':
            sys.exit('--encoder=pixels: is fitted by train.py, which caches it as well')
        device = pick_device(device, int(os.environ.get('LOCAL_RANK', 0)))
        encode = load_encoder(encoder, encoder_path, layer, frame_height, frame_width, pool).to(device)
        cached_latents(sets, encode, device, autocast(device, dtype), cache_dir, store, workers,
                       *(int(os.environ.get(k, v)) for k, v in (('RANK', 0), ('WORLD_SIZE', 1))))
