"""
Everything that comes from outside: the command line, pictures and video, LeRobot datasets.

Letters: T frames of a clip, A action width, H W pixels. Frames are uint8 tensors (T, 3, H, W); wherever a
`size` is asked for, an int is a square, (height, width) a rectangle, and 0 the native size.
LeRobot's formats: v2.0 and v2.1 keep one parquet and one mp4 per episode, v3.0 keeps many episodes per file
(github.com/huggingface/lerobot). Here they are read with pyarrow and PyAV alone.
"""
import collections
import contextlib
import difflib
import fractions
import functools
import glob
import io
import itertools
import json
import math
import os
import shutil
import sys

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch


# ----------------------------------------------------------------------------------------------------------------------
# the command line

def override(g, argv):
    """Set a script's constants from its command line and return them all.

    g is the script's globals(), argv a list of --name=value. Only names g already binds to a
    bool, int, float or str can be set, and the text must read as that type. Returns
    {name: value} for every such name: the config to print and to save. Anything else ends
    the script with one line that says what was wrong.
    """
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


def move_aside(folder, *marks):
    """Rename a folder that holds one of the files `marks` to the next free folder.1, folder.2, ..: no run is lost."""
    if any(os.path.exists(os.path.join(folder, mark)) for mark in marks):
        n = next(i for i in itertools.count(1) if not os.path.exists(f'{folder.rstrip("/")}.{i}'))
        os.rename(folder, f'{folder.rstrip("/")}.{n}')
        print(f'{folder} held an earlier run: it is now {folder.rstrip("/")}.{n}')


# ----------------------------------------------------------------------------------------------------------------------
# pictures and video

# One reformatter for everything: it keeps its swscale tables while the geometry stays the same (a fresh one per frame
# costs a quarter to a half of the speed). swscale low-passes when it shrinks; of its kernels BICUBIC comes nearest to
# the antialiased resize that image encoders are trained with, and unlike AREA, a tenth faster, it enlarges well.
_reformat = functools.partial(av.video.reformatter.VideoReformatter().reformat, interpolation='BICUBIC', threads=1)
MAX_OPEN = 8  # containers kept open per process; one holds a decoder's frames, a few MB
MP4 = dict(format='mp4', options={'movflags': '+faststart'})
_open = collections.OrderedDict()


def _rgb(frame, size):
    """uint8 (H, W, 3) array of a decoded frame: colour and scale in one pass."""
    h, w = (size, size) if isinstance(size, int) else size
    return _reformat(frame, w or frame.width, h or frame.height, 'rgb24').to_ndarray()


@contextlib.contextmanager
def _reading(path):
    """Whatever fails in here becomes a ValueError of one line that names the file and says what it looks like."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, av.FFmpegError, pa.ArrowException) as error:
        if (os.getpid(), path) in _open:  # a decoder that failed is not used again
            _open.pop((os.getpid(), path)).close()
        if not os.path.isfile(path):
            raise ValueError(f'{path}: no such file') from None
        with open(path, 'rb') as f:
            if f.read(30).startswith(b'version https://git-lfs'):
                raise ValueError(f'{path}: is a git-LFS pointer, not the file itself (git lfs pull)') from None
        reason = f'no {error} in it' if isinstance(error, KeyError) else ' '.join(str(error).split())
        raise ValueError(f'{path}: cannot be read ({reason})') from None


def _picture(data, size):
    """uint8 (H, W, 3) array of a picture's file, given as bytes."""
    if data[:2] == b'\xff\xd8' and b'\xff\xd9' not in data[-1024:]:  # ffmpeg forgives a JPEG without its end
        raise ValueError('truncated')
    with av.open(io.BytesIO(data)) as container:
        # without the tty check any text file would be "decoded" as ANSI art
        if not container.streams.video or container.format.name == 'tty':
            raise ValueError('no picture in it')
        # else the missing half of a truncated picture would come out grey, with a message at most
        container.streams.video[0].codec_context.options = {'err_detect': 'explode'}
        frame = next(container.decode(video=0), None)
        if frame is None or frame.is_corrupt:
            raise ValueError('truncated')
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
    frames = [av.VideoFrame.from_ndarray(rgb, 'rgb24') for rgb in x.permute(0, 2, 3, 1).contiguous().numpy()]
    return torch.from_numpy(np.stack([_rgb(f, size) for f in frames])).permute(0, 3, 1, 2)


def enlarge(x, side=128):
    """uint8 (n, 3, H, W) -> the same with every pixel repeated until a picture is about `side` pixels high."""
    k = max(1, round(side / x.shape[2]))
    return x.repeat_interleave(k, dim=2).repeat_interleave(k, dim=3)


def write_image(path, x):
    """Write uint8 (3, H, W) as PNG."""
    assert x.dtype == torch.uint8 and x.ndim == 3, f'wants uint8 (3, H, W), got {x.dtype} {tuple(x.shape)}'
    codec = av.CodecContext.create('png', 'w')
    codec.height, codec.width, codec.pix_fmt, codec.time_base = *x.shape[1:], 'rgb24', fractions.Fraction(1)
    frame = av.VideoFrame.from_ndarray(x.permute(1, 2, 0).contiguous().cpu().numpy(), 'rgb24')
    with open(path, 'wb') as f:
        f.writelines(map(bytes, codec.encode(frame) + codec.encode(None)))


def _encode(container, x, fps, start=0, **options):
    """Append uint8 (T, H, W, 3) to an mp4 as frames start, start + 1, ...: frame i is shown at i / fps exactly."""
    H, W = x.shape[1:3]
    rate = fractions.Fraction(fps).limit_denominator(1001)
    if start == 0:  # without B-frames packets lie in the order of display
        stream = container.add_stream('libx264', rate=rate, options={'bf': '0', **options})
        stream.width, stream.height, stream.pix_fmt = W + W % 2, H + H % 2, 'yuv420p'
    for i, rgb in enumerate(x, start):
        rgb = np.pad(rgb, ((0, H % 2), (0, W % 2), (0, 0)), 'edge')  # yuv420p halves both sides
        frame = _reformat(av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), 'rgb24'), format='yuv420p')
        frame.pts, frame.time_base = i, 1 / rate
        container.mux(container.streams.video[0].encode(frame))


def write_video(path, x, fps):
    """Write uint8 (T, 3, H, W) as H.264 mp4, aside and then renamed; odd sides grow by one repeated line."""
    assert x.dtype == torch.uint8 and x.ndim == 4, f'wants uint8 (T, 3, H, W), got {x.dtype} {tuple(x.shape)}'
    with av.open(f'{path}.tmp', 'w', **MP4) as container:
        _encode(container, x.permute(0, 2, 3, 1).cpu().numpy(), fps, crf='12')
        container.mux(container.streams.video[0].encode(None))
    os.replace(f'{path}.tmp', path)


def _container(path):
    """An open container, from a small LRU. A forked worker must not share its parent's file position: pid is a key."""
    key = os.getpid(), path
    if key not in _open:
        container = av.open(path)
        if not container.streams.video:
            raise ValueError('no video stream')
        codec = container.streams.video[0].codec_context
        codec.thread_type, codec.thread_count = 'NONE', 1  # frame threads delay every seek; we have processes
        _open[key] = container
        if len(_open) > MAX_OPEN:
            _open.popitem(last=False)[1].close()
    _open.move_to_end(key)
    return _open[key]


def _decode(path, wanted, fps):
    """Yield (index, frame) for the set `wanted` of indices of a video; others may come too.

    One seek, then forward. Groups of pictures without a wanted frame are not decoded: strides are cheap where key
    frames are dense. An open group (B-frames shown before their key frame) needs the one before it as well.
    """
    container = _container(path)
    stream = container.streams.video[0]
    codec, first, last = stream.codec_context, min(wanted), max(wanted)
    origin, unit = stream.start_time or 0, stream.time_base * fractions.Fraction(fps)

    def packets():
        return (packet for packet in container.demux(stream) if packet.size)

    def index(packet):
        return round((packet.pts - origin) * unit)

    def feed(group):
        for packet in group:
            yield from ((index(frame), frame) for frame in codec.decode(packet) if frame.pts is not None)

    # mp4 seeks by decoding time, which runs ahead of display by the reordering of B-frames
    container.seek(origin + round((first - codec.has_b_frames) / unit), stream=stream, backward=True)
    before, group, fed = [], [], False  # two groups in a row, and whether the decoder has seen the one before
    for packet in itertools.chain(packets(), [None]):
        if group and (packet is None or packet.is_keyframe):  # the group is complete
            times = [math.inf if p.pts is None else index(p) for p in group]
            if not before and times[0] > first >= 0 and container.seek(origin, stream=stream) is None:
                yield from feed(packets())  # the file's index misled the seek
                break
            if wanted.intersection(times) or math.inf in times:
                if not fed and min(times) < times[0]:
                    yield from feed(before)
                yield from feed(group)
                fed = True
            elif fed:  # what the decoder still holds back; then clean for the next group
                yield from feed([None])
                codec.flush_buffers()
                fed = False
            if times[0] > last:
                break
            before, group = group, []
        group.append(packet)
    yield from feed([None])  # the next seek flushes


def read_frames(path, indices, fps, size=0):
    """uint8 tensor (n, 3, H, W): the frames shown i / fps seconds after a video's start, for indices i in any order.

    A ValueError names the file that cannot be read, or that lacks a frame.
    """
    wanted, found = {int(i) for i in indices}, {}
    with _reading(path):
        for i, frame in _decode(path, wanted, fps):
            if i in wanted and i not in found:
                found[i] = _rgb(frame, size)
            if len(found) == len(wanted):
                break
        else:
            n = _container(path).streams.video[0].frames
            raise ValueError(f'frame {min(wanted - found.keys())} is missing, of {n} frames')
        return torch.from_numpy(np.stack([found[int(i)] for i in indices])).permute(0, 3, 1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# LeRobot datasets

STATS = 'mean', 'std', 'min', 'max'
QUANTILES = {'q01': .01, 'q10': .1, 'q50': .5, 'q90': .9, 'q99': .99}


def _pool(parts):
    """The statistics of a whole from those of its parts (dicts of arrays with a count of rows).

    var = sum n_i (s_i^2 + (m_i - mean)^2) / n: without the cancellation of E[x^2] - E[x]^2. Quantiles can only be
    averaged (as lerobot does): they are approximate.
    """
    parts = {k: np.stack([np.asarray(p[k], np.float64) for p in parts]) for k in set.intersection(*map(set, parts))}
    n = parts['count'].sum(0)
    weight = (parts['count'] / n).reshape(-1, *[1] * (parts['mean'].ndim - 1))
    out = {k: (weight * v).sum(0) for k, v in parts.items() if k == 'mean' or k in QUANTILES}
    out['std'] = np.sqrt((weight * (parts['std'] ** 2 + (parts['mean'] - out['mean']) ** 2)).sum(0))
    return {**out, 'min': parts['min'].min(0), 'max': parts['max'].max(0), 'count': n.astype(np.int64)}


def _describe(x):
    """Statistics of the rows of x (n, ...), as lerobot names them."""
    x = np.asarray(x, np.float64)
    out = dict(min=x.min(0), max=x.max(0), mean=x.mean(0), std=x.std(0), count=np.array([len(x)]))
    return {**out, **dict(zip(QUANTILES, np.quantile(x, list(QUANTILES.values()), axis=0)))}


def _table(path, names=()):
    """Those of the named columns that a parquet file has; without names, all."""
    file = pq.ParquetFile(path, memory_map=True)
    return file.read([k for k in names or file.schema_arrow.names if k in file.schema_arrow.names])


@functools.lru_cache(maxsize=32)
def _columns(path, keys):
    """{key: array (rows, width)} of numeric columns; float32, but int64 for episode_index. Nulls are NaN."""
    with _reading(path):
        table, out = _table(path, keys), {}
        for key in table.column_names:
            column, valid = table[key].combine_chunks().drop_null(), table[key].is_valid().to_numpy()
            while not pa.types.is_primitive(column.type):
                column = column.flatten()  # of lists and fixed-size lists alike
            values = column.to_numpy(zero_copy_only=False).reshape(valid.sum(), -1)
            kind, null = (np.int64, -1) if key == 'episode_index' else (np.float32, np.nan)
            out[key] = np.full((len(valid), values.shape[1]), null, kind)
            out[key][valid] = values
        return out


@functools.lru_cache(maxsize=4)
def _row_group(path, group, key):
    """One row group of an image column; whole old files are one group, so it is kept for the next clip."""
    return pq.ParquetFile(path, memory_map=True).read_row_group(group, [key])[key]


class LeRobot:
    """A LeRobot dataset v2.0, v2.1 or v3.0 in a local folder.

    camera: a key or its last part ('front'), or a comma-separated list of which the first that exists is taken; '' is
    the first camera. action: comma-separated keys; '' is `action`, else `actions`, else all `action.*`, else nothing;
    'none' ignores actions. `episode` is a position in `.episodes`. What is wrong with the dataset as a whole ends the
    program with one line; what is wrong with one file is a ValueError that names it.
    """

    def __init__(self, root, camera='', action=''):
        self.root = os.path.abspath(root)
        if not os.path.isdir(self.root):
            sys.exit(f'{root}: no such folder')
        if os.path.isdir(self._file('meta_data')):
            sys.exit(f'{root}: a LeRobot dataset of v1, which is too old: convert it to v2.1 or v3.0 with lerobot')
        if not os.path.isfile(self._file('meta/info.json')):
            sys.exit(f'{root}: not a LeRobot dataset: it has no meta/info.json')
        try:
            self._read_info(camera, action)
            self.episodes = sorted(self._read_episodes(), key=lambda e: e['index'])
            if not self.episodes:
                sys.exit(f'{root}: has no episodes')
            for kind in ('data', 'video')[:1 + self.is_video]:
                self._place(self.episodes[0], kind)  # so that a template which leaves the folder is refused at once
            self.tasks = self._read_tasks()
            self.stats = self._read_stats() if self.action_dim else None
        except ValueError as error:
            sys.exit(str(error))

    def _file(self, template, **values):
        """The path of a file of the dataset. Checked by spelling: links may lead elsewhere, as in the hub's cache."""
        try:
            path = os.path.normpath(os.path.join(self.root, template.format(**values)))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f'{self.root}: cannot make a path from {template!r} and {values} ({error!r})') from None
        if os.path.commonpath([path, self.root]) != self.root:
            sys.exit(f'{self.root}: refused: {template!r} leads out of the dataset, to {path}')
        return path

    def _place(self, e, kind):
        """The file of an episode's rows ('data') or frames ('video')."""
        return self._file(self.info.get(f'{kind}_path'), video_key=self.camera, **e[kind])

    def _load(self, name):
        """What a file of the dataset holds: a list of rows unless it is .json; {} if there is no such file."""
        path = self._file(name)
        if not os.path.isfile(path):
            return {}
        with _reading(path), open(path, 'rb') as f:
            if name.endswith('.parquet'):
                return _table(path).to_pylist()
            return [json.loads(line) for line in f if line.strip()] if name.endswith('.jsonl') else json.load(f)

    def _read_info(self, camera, action):
        self.info, where = self._load('meta/info.json'), self._file('meta/info.json')
        version = str(self.info.get('codebase_version') if isinstance(self.info, dict) else None)
        if version not in ('v2.0', 'v2.1', 'v3.0'):
            sys.exit(f'{where}: wants codebase_version v2.0, v2.1 or v3.0 (lerobot converts older ones), got {version}')
        self.v3, self.features, self.fps = version == 'v3.0', self.info.get('features'), self.info.get('fps')
        if not isinstance(self.features, dict) or not isinstance(self.fps, (int, float)):
            sys.exit(f'{where}: wants features and fps, has only {", ".join(self.info)}')
        self.cameras, numeric = [], []
        for k, f in self.features.items():
            flags = {**f, **(f.get('video_info') or {}), **(f.get('info') or {})}  # a flag may be the text "false"
            depth = 'true' in (str(flags.get(n)).lower() for n in ('is_depth_map', 'video.is_depth_map'))
            if f.get('dtype') in ('video', 'image') and not depth:
                self.cameras.append(k)
            if str(f.get('dtype')).startswith(('float', 'int', 'uint', 'bool')):  # an action of text exists as well
                numeric.append(k)
        if not self.cameras:
            sys.exit(f'{self.root}: has no cameras, only {", ".join(self.features)}')
        wanted = [name.strip() for name in camera.split(',')] if camera else self.cameras[:1]
        found = [k for name in wanted for k in self.cameras if name in (k, k.rpartition('.')[2])]
        if not found:
            sys.exit(f'{self.root}: has no camera {camera!r}, only {", ".join(self.cameras)}')
        self.camera, self.is_video = found[0], self.features[found[0]]['dtype'] == 'video'
        default = [k for k in ('action', 'actions') if k in numeric][:1] or [k for k in numeric if k[:7] == 'action.']
        self.action_keys = default if not action else [] if action == 'none' else [k.strip() for k in action.split(',')]
        for key in set(self.action_keys) - set(numeric):
            sys.exit(f'{self.root}: has no numeric {key!r} to be an action, only {", ".join(numeric)}')
        self.widths = [math.prod(self.features[k].get('shape') or [1]) for k in self.action_keys]
        self.action_dim = sum(self.widths)

    def _read_episodes(self):
        if not self.v3:
            size, total = self.info.get('chunks_size') or 1000, self.info.get('total_episodes')
            for r in self._load('meta/episodes.jsonl'):
                i = r['episode_index']
                place = dict(episode_index=i, episode_chunk=i // size, total_episodes=total)
                yield dict(index=i, length=r['length'], tasks=r.get('tasks') or [], data=place, video=place, base=0)
            return
        video, file = f'videos/{self.camera}/', ('chunk_index', 'file_index')
        names = ['episode_index', 'length', 'tasks', video + 'from_timestamp']
        names += [place + k for place in ('data/', video) for k in file]
        for path in sorted(glob.glob(glob.escape(self._file('meta/episodes')) + '/*/*.parquet')):
            with _reading(path):  # a KeyError names the column that is not there
                for r in _table(path, names).to_pylist():
                    e = dict(index=r['episode_index'], length=r['length'], tasks=r.get('tasks') or [])
                    e['data'] = {k: r['data/' + k] for k in file}
                    if self.is_video:  # to_timestamp is off by a frame in some datasets: only the beginning is used
                        e['video'] = {k: r[video + k] for k in file}
                        e['base'] = round((r[video + 'from_timestamp'] or 0) * self.fps)
                    yield e

    def _read_tasks(self):  # in v3.0 the text is pandas' index: its column may have any name
        rows = self._load('meta/tasks.parquet' if self.v3 else 'meta/tasks.jsonl')
        return {r['task_index']: r.get('task') or next(r[k] for k in r if k != 'task_index') for r in rows}

    def _read_stats(self):
        stats = self._load('meta/stats.json')
        parts = [] if stats else [line.get('stats', {}) for line in self._load('meta/episodes_stats.jsonl')]
        try:
            stats = stats or {k: _pool([p[k] for p in parts]) for k in self.action_keys}
            out = {s: np.concatenate([np.asarray(stats[k][s], np.float32).reshape(width)
                                      for k, width in zip(self.action_keys, self.widths)]) for s in STATS}
            if np.isfinite([*out.values()]).all():
                return out
        except (KeyError, ValueError, TypeError):
            pass  # missing, incomplete or of another shape: measured, without the rows that are not finite
        finite = (a[np.isfinite(a).all(1)] for a in map(self.rows, range(len(self.episodes))))
        parts = [_describe(a) for a in finite if len(a)]
        if not parts:
            sys.exit(f'{self.root}: no finite row in {", ".join(self.action_keys)}')
        return {k: v.astype(np.float32) for k, v in _pool(parts).items() if k in STATS}

    def _span(self, episode):
        """(file, first row, last row + 1) of an episode in its data file."""
        e = self.episodes[episode]
        path = self._place(e, 'data')
        # dataset_from_index is scrambled in some converted datasets; the column in the file itself is not
        index = _columns(path, ('episode_index',)).get('episode_index') if self.v3 else None
        if index is None:
            first = sum(o['length'] for o in self.episodes[:episode] if o['data'] == e['data']) if self.v3 else 0
            return path, first, first + e['length']
        rows = np.flatnonzero(index[:, 0] == e['index'])
        if len(rows) != e['length'] or rows[-1] - rows[0] != len(rows) - 1:
            raise ValueError(f'{path}: episode {e["index"]} has {len(rows)} rows here, expected {e["length"]}')
        return path, rows[0], rows[-1] + 1

    def rows(self, episode):
        """float32 (length, action_dim): the raw actions of an episode; NaN where the file has none."""
        if not self.action_dim:
            return np.zeros((self.episodes[episode]['length'], 0), np.float32)
        path, begin, end = self._span(episode)
        columns = _columns(path, tuple(self.action_keys))
        for key, width in zip(self.action_keys, self.widths):
            got = columns[key].shape if key in columns else None
            if got is None or got[1] != width or got[0] < end or not self.v3 and got[0] != end:
                raise ValueError(f'{path}: {key} has shape {got}, expected width {width} and {end} rows')
        return np.concatenate([columns[k][begin:end] for k in self.action_keys], 1)

    def frames(self, episode, indices, size=0):
        """uint8 (n, 3, H, W) of the chosen camera at frame numbers of an episode."""
        e = self.episodes[episode]
        if len(indices) == 0 or min(indices) < 0 or max(indices) >= e['length']:
            raise ValueError(f'{self.root}: episode {e["index"]} has {e["length"]} frames, not {[*map(int, indices)]}')
        if self.is_video:
            return read_frames(self._place(e, 'video'), [e['base'] + int(i) for i in indices], self.fps, size)
        path, begin, _ = self._span(episode)
        out = []
        with _reading(path):
            meta = pq.ParquetFile(path, memory_map=True).metadata
            ends = np.cumsum([meta.row_group(g).num_rows for g in range(meta.num_row_groups)])
            for row in begin + np.asarray(indices):
                group = int(np.searchsorted(ends, row, 'right'))
                cell = _row_group(path, group, self.camera)[int(row - ends[group])].as_py()  # counted from the end
                out.append(_picture(cell['bytes'], size))
            return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)

    def clip(self, episode, start, T, frameskip, size=0, pixels=True):
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
        x = dict(x=self.frames(episode, np.where(z_mask, f, f[z_mask][-1]), size)) if pixels else {}
        return x | dict(a=torch.from_numpy(a), a_mask=torch.from_numpy(a_mask), z_mask=torch.from_numpy(z_mask),
                        task=e['tasks'][0] if e['tasks'] else '')


def write_lerobot(root, episodes, fps, names={}, robot_type='', crf=18, gop=2):
    """Write a LeRobot v3.0 dataset.

    episodes: dicts of the same keys, read one by one: 'observation.images.<name>' uint8 (L, H, W, 3), 'task', a string,
    and perhaps 'action' and 'observation.state' float32 (L, width), whose dimensions names may name: {'action': [...]}.
    A camera's video has a key frame every `gop` frames: random clips cost little. Written as root.tmp, then renamed.
    """
    root, tmp = str(root).rstrip('/'), str(root).rstrip('/') + '.tmp'
    if os.path.exists(root):
        sys.exit(f'{root}: exists already, will not write over it')
    shutil.rmtree(tmp, ignore_errors=True)  # left by a run that was interrupted
    episodes = iter(episodes)
    first = next(episodes, None)
    if first is None:
        raise ValueError(f'{root}: no episodes to write')
    cameras = [k for k in first if k.startswith('observation.images.')]
    vectors = {k: np.asarray(first[k]).shape[1] for k in ('observation.state', 'action') if k in first}
    scalars = dict(timestamp='float32', frame_index='int64', episode_index='int64', index='int64', task_index='int64')
    schema = pa.schema([(k, pa.list_(pa.float32(), d)) for k, d in vectors.items()] +
                       [(k, pa.type_for_alias(t)) for k, t in scalars.items()])
    for folder in ('data', 'meta/episodes', *(f'videos/{k}' for k in cameras)):
        os.makedirs(f'{tmp}/{folder}/chunk-000')
    tasks, rows, parts, total = {}, [], [], 0
    videos = {k: av.open(f'{tmp}/videos/{k}/chunk-000/file-000.mp4', 'w', **MP4) for k in cameras}
    with pq.ParquetWriter(f'{tmp}/data/chunk-000/file-000.parquet', schema) as writer:
        for i, e in enumerate(itertools.chain([first], episodes)):
            L = len(e[cameras[0]])
            if set(e) != set(first) or L == 0 or any(len(e[k]) != L for k in [*cameras, *vectors]):
                raise ValueError(f'{root}: episode {i} wants {", ".join(first)}, of one length')
            task, frame = tasks.setdefault(e['task'], len(tasks)), np.arange(L)
            columns = {k: np.asarray(e[k], np.float32).reshape(L, d) for k, d in vectors.items()}
            columns |= dict(timestamp=(frame / fps).astype(np.float32), frame_index=frame, episode_index=np.full(L, i),
                            index=total + frame, task_index=np.full(L, task))
            writer.write_table(pa.table({k: list(v) for k, v in columns.items()}, schema))  # one table, one row group
            r = {'episode_index': i, 'tasks': [e['task']], 'length': L, 'data/chunk_index': 0, 'data/file_index': 0,
                 'dataset_from_index': total, 'dataset_to_index': total + L}
            stats = {k: _describe(v.reshape(L, -1)) for k, v in columns.items()}
            for k in cameras:
                r |= {f'videos/{k}/chunk_index': 0, f'videos/{k}/file_index': 0,
                      f'videos/{k}/from_timestamp': total / fps, f'videos/{k}/to_timestamp': (total + L) / fps}
                x = np.asarray(e[k])
                _encode(videos[k], x, fps, total, crf=str(crf), g=str(gop))
                # at most 100 frames of about 128 pixels' side: statistics for other readers need no more
                x = x[::-(-L // 100), ::-(-x.shape[1] // 128), ::-(-x.shape[2] // 128)]
                stats[k] = _describe(x.reshape(-1, 3, 1, 1) / 255) | dict(count=np.array([L]))
            r |= {f'stats/{k}/{s}': v.tolist() for k in (*vectors, *cameras, *scalars) for s, v in stats[k].items()}
            rows.append(r | {'meta/episodes/chunk_index': 0, 'meta/episodes/file_index': 0})
            parts.append(stats)
            total += L
    for video in videos.values():
        video.mux(video.streams.video[0].encode(None))
        video.close()

    features = {k: dict(dtype='float32', shape=[d], names=list(names.get(k) or [f'{k}_{j}' for j in range(d)]))
                for k, d in vectors.items()}
    for k in cameras:
        H, W = (side + side % 2 for side in np.asarray(first[k]).shape[1:3])
        video = dict(height=H, width=W, codec='h264', pix_fmt='yuv420p', fps=fps, channels=3, g=gop, crf=crf)
        video |= dict(preset=None, fast_decode=0, video_backend='pyav', extra_options={'bf': '0'})
        features[k] = dict(dtype='video', shape=[H, W, 3], names=['height', 'width', 'channels'],
                           info={f'video.{n}': v for n, v in video.items()} | dict(has_audio=False, is_depth_map=False))
    features |= {k: dict(dtype=t, shape=[1], names=None) for k, t in scalars.items()}
    info = dict(codebase_version='v3.0', fps=fps, features=features, total_episodes=len(rows), total_frames=total,
                total_tasks=len(tasks), chunks_size=1000, data_files_size_in_mb=100, video_files_size_in_mb=200,
                data_path='data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet',
                video_path='videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4',
                robot_type=robot_type or None, splits={'train': f'0:{len(rows)}'})
    pooled = {k: {s: v.tolist() for s, v in _pool([stats[k] for stats in parts]).items()} for k in features}
    for name, value in ('info', info), ('stats', pooled):
        with open(f'{tmp}/meta/{name}.json', 'w') as f:
            json.dump(value, f, indent=4)
    pq.write_table(pa.Table.from_pylist(rows), f'{tmp}/meta/episodes/chunk-000/file-000.parquet')
    # pandas.read_parquet must find the text as the index: that is where lerobot looks for it
    kinds = [dict(name='task_index', field_name='task_index', pandas_type='int64', numpy_type='int64', metadata=None),
             dict(name='task', field_name='task', pandas_type='unicode', numpy_type='object', metadata=None)]
    pandas = dict(index_columns=['task'], column_indexes=[], columns=kinds, pandas_version='2.0.0')
    table = pa.table({'task_index': pa.array(tasks.values(), pa.int64()), 'task': pa.array(tasks, pa.large_string())})
    pq.write_table(table.replace_schema_metadata({'pandas': json.dumps(pandas)}), f'{tmp}/meta/tasks.parquet')
    os.replace(tmp, root)


# ----------------------------------------------------------------------------------------------------------------------
# batches

def held_out(ds, val_share):
    """Positions of the episodes to train on and to validate on: every k-th is held out, at least one."""
    n = len(ds.episodes)
    if n < 2:
        sys.exit(f'{ds.root}: has {n} episode, splitting off whole episodes for validation wants at least 2')
    k = max(1, min(n - 1, round(n * val_share)))
    val = {int((i + 0.5) * n / k) for i in range(k)}
    return [i for i in range(n) if i not in val], sorted(val)


class Clips(torch.utils.data.Dataset):
    """Batches of clips from several datasets; clips[step] is a pure function of (seed, step, rank).

    labelled and unlabelled: lists of LeRobot (the actions of unlabelled ones are not read). A batch holds
    x (B, T, 3, H, W) uint8, or z (B, T, N, D) float16 where `tokens` is set ({(dataset, episode): (length, N, D)}),
    a (B, T, A) normalised by each dataset's own mean and std, clipped at +-5, padded to the widest, a_mask and z_mask
    (B, T). Of any 1/labelled_share consecutive clips of a rank exactly one is labelled (0.05: one of 20). Every window
    of a group's training episodes is as likely as any other; episodes shorter than a clip are padded.
    """

    def __init__(self, labelled, unlabelled, T, frameskip, size, batch_size, labelled_share, val_share, seed=0, rank=0):
        self.sets, self.groups = [*labelled, *unlabelled], [len(labelled), len(unlabelled)]
        self.T, self.frameskip, self.size, self.batch_size = T, frameskip, size, batch_size
        self.seed, self.rank, self.tokens = seed, rank, None
        share = 1.0 if not unlabelled else labelled_share if labelled else 0.0
        self.share = fractions.Fraction(share).limit_denominator(1000)
        self.A = frameskip * max([ds.action_dim for ds in labelled], default=0)
        self.train, self.val = zip(*(held_out(ds, val_share) for ds in self.sets))
        windows = [(s, e, max(1, ds.episodes[e]['length'] - (T - 1) * frameskip))
                   for s, ds in enumerate(self.sets) for e in self.train[s]]
        self.windows = [np.array([w for w in windows if (w[0] >= len(labelled)) == group]).reshape(-1, 3)
                        for group in (False, True)]

    def action_stats(self):
        """{name: tensor (labelled datasets, A)}: mean, std, low and high of a model step's raw actions; their width."""
        out = {k: torch.zeros(self.groups[0], self.A) for k in ('mean', 'std', 'low', 'high')}
        out['width'] = torch.tensor([ds.action_dim * self.frameskip for ds in self.sets[:self.groups[0]]])
        for s, ds in enumerate(self.sets[:self.groups[0]]):
            for k, name in (('mean', 'mean'), ('std', 'std'), ('low', 'min'), ('high', 'max')):
                out[k][s, :ds.action_dim * self.frameskip] = torch.from_numpy(ds.stats[name]).repeat(self.frameskip)
        return out

    def clip(self, s, e, start, T):
        """One clip of dataset s, episode e, as it goes into a batch."""
        ds = self.sets[s]
        c = ds.clip(e, start, T, self.frameskip, self.size, pixels=self.tokens is None)
        if self.tokens is not None:
            f = torch.arange(start, start + T * self.frameskip, self.frameskip)
            c['z'] = self.tokens[s, e][f.clamp(max=start + (int(c['z_mask'].sum()) - 1) * self.frameskip)]
        a = torch.zeros(T, self.A)
        if s < self.groups[0]:
            mean, std = (torch.from_numpy(ds.stats[k]).repeat(self.frameskip) for k in ('mean', 'std'))
            known = c['a_mask'][:, None] & (std > 1e-6)         # a dimension that never moves stays 0
            a[:, :len(mean)] = torch.where(known, (c['a'] - mean) / std.clamp(min=1e-6), 0.0).clamp(-5, 5)
        else:
            c['a_mask'] = torch.zeros(T, dtype=torch.bool)
        return {k: c[k] for k in ('x', 'z') if k in c} | dict(a=a, a_mask=c['a_mask'], z_mask=c['z_mask'])

    def __len__(self):
        return sys.maxsize

    def sample(self, n, m):
        """About n (dataset, episode, frame numbers) with m frames each, spread over all training episodes."""
        every = [(s, e) for s, es in enumerate(self.train) for e in es]
        for i in range(min(n, len(every))):
            s, e = every[int((i + 0.5) * len(every) / min(n, len(every)))]
            yield s, e, np.linspace(0, self.sets[s].episodes[e]['length'] - 1, m).astype(int)

    def picks(self, step):
        """The (dataset, episode, start) of each clip of a batch, without reading any."""
        rng, out = np.random.default_rng((self.seed, step, self.rank)), []
        for i in range(step * self.batch_size, (step + 1) * self.batch_size):
            labelled = int((i + 1) * self.share) > int(i * self.share)
            windows = self.windows[not labelled]
            ends = np.cumsum(windows[:, 2])
            at = rng.integers(ends[-1])
            row = np.searchsorted(ends, at, 'right')
            out.append((*map(int, windows[row, :2]), int(at - ends[row] + windows[row, 2])))
        # the loss treats the first rows in a way of its own: which clips they are must not depend on their kind
        return [out[i] for i in rng.permutation(len(out))]

    def __getitem__(self, step):
        return torch.utils.data.default_collate([self.clip(*pick, self.T) for pick in self.picks(step)])

    def held_out(self, T, n):
        """{'labelled' and/or 'unlabelled': a batch of about n clips of T steps, spread over validation episodes}."""
        out = {}
        for name, begin, end in (('labelled', 0, self.groups[0]), ('unlabelled', self.groups[0], len(self.sets))):
            windows = [(s, e, start) for s in range(begin, end) for e in self.val[s]
                       for start in range(max(1, self.sets[s].episodes[e]['length'] - (T - 1) * self.frameskip))]
            if windows:
                picks = [windows[int((i + 0.5) * len(windows) / n)] for i in range(min(n, len(windows)))]
                out[name] = torch.utils.data.default_collate([self.clip(*pick, T) for pick in picks])
        return out


# ----------------------------------------------------------------------------------------------------------------------
# the demo world: a table seen from above; an arm's tip, moved by (dx, dy), pushes a disc

DEMO_FPS, DEMO_STEP = 10, 0.05  # frames per second; the longest move of the tip in a frame, in table widths
TIP, DISC, HALO = 0.11, 0.15, 0.3   # radii, in table widths
DEMO_NEAR = 0.08                # what counts as reached, in table widths


def demo_step(state, action):
    """state (n, 4): x, y of the tip and of the disc, in [0, 1]; action (n, 2): move of the tip -> next state."""
    tip, disc = state[:, :2], state[:, 2:]
    tip = np.clip(tip + np.clip(action, -DEMO_STEP, DEMO_STEP), TIP, 1 - TIP)
    away = disc - tip
    far = np.linalg.norm(away, axis=1, keepdims=True)
    push = np.maximum(TIP + DISC - far, 0) * away / np.maximum(far, 1e-6)
    disc = np.clip(disc + push, DISC, 1 - DISC)
    away = disc - tip           # at the border the disc stops, and stops the tip
    far = np.linalg.norm(away, axis=1, keepdims=True)
    tip = tip - np.maximum(TIP + DISC - far, 0) * away / np.maximum(far, 1e-6)
    return np.concatenate((np.clip(tip, TIP, 1 - TIP), disc), axis=1)


def demo_draw(state, size=64):
    """uint8 (n, size, size, 3): large shapes with wide halos.

    A distance between pictures must say how far a shape is from its goal also where the two do not overlap; for the
    same reason no shape can leave the table: half a tip off the edge is closer to any goal than a whole one.
    """
    at = (np.arange(size, dtype=np.float32) + 0.5) / size
    image = np.broadcast_to(np.float32((0.86, 0.84, 0.80)), (len(state), size, size, 3)).copy()
    for centre, radius, colour in ((state[:, 2:], DISC, (0.15, 0.35, 0.80)), (state[:, :2], TIP, (0.85, 0.25, 0.15))):
        d2 = [((at - centre[:, i, None].astype(np.float32)) ** 2) for i in (0, 1)]
        far = np.sqrt(d2[1][:, :, None] + d2[0][:, None, :])                              # (n, rows = y, columns = x)
        cover = np.clip((radius - far) / 0.03 + 0.5, 0, 1)
        cover = np.maximum(cover, 0.45 * np.exp(-(far / HALO) ** 2))[..., None]
        image += cover * (np.float32(colour) - image)
    return np.uint8(image * 255 + 0.5)


def demo_start(n, rng):
    """n states with the tip clear of the disc."""
    low, high = (0.12, 0.12, 0.22, 0.22), (0.88, 0.88, 0.78, 0.78)
    state = rng.uniform(low, high, (n, 4))
    while len(near := np.flatnonzero(np.linalg.norm(state[:, :2] - state[:, 2:], axis=1) < TIP + DISC + 0.02)):
        state[near] = rng.uniform(low, high, (len(near), 4))
    return state


def demo_episodes(n, T, rng):
    """States (n, T, 4) and actions (n, T, 2) of a noisy script: wander to random places, often through the disc."""
    state, states, actions = demo_start(n, rng), [], []
    aim, left = np.zeros((n, 2)), np.zeros(n)
    for _ in range(T):
        new = left <= 0
        through = rng.random(n) < 0.6           # beyond the disc, as seen from the tip
        beyond = state[:, 2:] + (state[:, 2:] - state[:, :2]) * rng.uniform(0.2, 1.2, (n, 1))
        beyond = np.where(through[:, None], beyond + rng.normal(0, 0.05, (n, 2)), rng.uniform(0, 1, (n, 2)))
        aim = np.where(new[:, None], np.clip(beyond, 0, 1), aim)
        left = np.where(new, rng.integers(6, 16, n), left - 1)
        action = (aim - state[:, :2]) * 0.5 + rng.normal(0, 0.015, (n, 2))
        action = np.clip(action, -DEMO_STEP, DEMO_STEP)
        states.append(state)
        actions.append(action)
        state = demo_step(state, action)
    return np.stack(states, 1), np.stack(actions, 1)


def write_demo(root, n, labelled, seed):
    """Write n episodes of 60 frames of the demo world as a LeRobot dataset, with or without their actions."""
    states, actions = demo_episodes(n, 60, np.random.default_rng(seed))
    write_lerobot(root, ({'observation.images.top': demo_draw(s), 'task': 'push the disc'} |
                         ({'action': a} if labelled else {}) for s, a in zip(states, actions)),
                  DEMO_FPS, names={'action': ['dx', 'dy']})
