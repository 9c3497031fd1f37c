"""
The road from files to batches: command line | pictures and video | LeRobot in | LeRobot out |
batches | latents on disk | the demo world.

    python data.py --labelled=path/to/dataset                           # what is in it, and wrong
    python data.py --cache=True --labelled=... --encoder=dinov2_vits14  # encode before training
    python data.py --videos='folder/*.mp4' --out=videos                 # a dataset of plain videos
    python data.py --hdf5=can/ph/image.hdf5 --out=can                   # ... of robomimic's demos

Letters: T frames of a clip, A action width, H W pixels. Frames are uint8 tensors (T, 3, H, W);
wherever a `size` is asked for, an int is a square, (height, width) a rectangle, and 0 the native
size. LeRobot's formats: v2.0 and v2.1 keep one parquet and one mp4 per episode, v3.0 keeps many
episodes per file (github.com/huggingface/lerobot). Here they are read with pyarrow and PyAV alone.
"""
import array
import bisect
import difflib
import errno
import glob
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections import defaultdict, deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

try:
    import fcntl
except ImportError:         # Windows
    import msvcrt

# Before torch is loaded: OpenMP's threads wait for each other by spinning, for up to a tenth of a
# second, and beside another busy process that takes away the core of the one they wait for.
os.environ.setdefault('GOMP_SPINCOUNT', '5000')

import av  # noqa: E402
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from huggingface_hub.file_download import http_get
from torch.utils.data import DataLoader, default_collate, get_worker_info
from tqdm import tqdm


# --------------------------------------------------------------------------------------------------
# the command line

MANY = 2 ** 31
# {option: (least, most)} of all numbers of all scripts; what depends on others, they check
LIMITS = {}
for _least, _most, _names in (
        (0, 1, 'labelled_share long_share val_share grow max_bad whiten bootstrap bootstrap_start '
               'p_past p_image p_null self_forcing decay keep ema learning_rate min_lr policy_rate '
               'augment relabel dream'),
        (0, 0.999999, 'beta1 beta2'),
        (0, 10, 'beta proposal_std explore noise lpips'),
        (0, 100, 'frameskip warm_std min_std workers guide'),
        (0, 100000, 'fps long_frames frame_height frame_width channels width layers heads kv_heads '
                    'registers context memory time_every wide_layers k_max robot cache_gb soft_cap '
                    'tau_shift weight_decay grad_clip smooth state_weight hold support '
                    'relabel_weight hold_latents action_pca align_weight align_dynamics'),
        (0, MANY, 'seed warmup micro_batch blind_episodes budget_ms chunk goal_steps budget steps '
                  'skip_nonfinite proposals dream_steps'),
        (0, 65535, 'port'),
        (1e-6, 100, 'init_std step_size'),
        (1e-6, 1e6, 'temperature'),
        (-1, 1000, 'layer'),
        (1, 10000, 'pool eval_context K horizon iterations seeds replan draw_every rows '
                   'coarse_horizon memory_frames'),
        (1, MANY, 'batch_size max_steps eval_interval save_interval log_interval samples episodes '
                  'train_frames train_steps policy_steps'),
        (2, MANY, 'frames eval_clips elites')):
    LIMITS |= dict.fromkeys(_names.split(), (_least, _most))
# columns of a rotation
ROTATIONS = {'euler': 3, 'rotvec': 3, 'quat_xyzw': 4, 'quat_wxyz': 4, 'rot6d': 6, 'rot6d_rows': 6}
CHOICES = {
    'action_mode': ('absolute', 'delta', 'delta_tool'),
    'rotation': tuple(ROTATIONS),
    'store': ('float16', 'int8'),
    'dtype': ('auto', 'float32', 'bfloat16'),
    'preset': ('robot', 'thesis', ''),
    'size': ('nano', 'tiny', 'small', 'base', 'large'),
    'action_on': ('all', 'token'),
    'project': ('pca', 'learned'),
    'align': ('', 'infonce', 'regress'),
    'attention': ('factored', 'flat'),
    'objective': ('shortcut', 'diffusion', 'direct'),
    'tau_schedule': ('uniform', 'shift', 'logit-normal'),
    'space': ('x', 'v'),
    'method': ('cem', 'icem', 'mppi', 'adam', 'policy'),
    'cost': ('all', 'last'),
    'rest': ('', 'zero', 'state'),
    'decoder': ('conv', 'rae'),
    'goals': ('expert', 'random'),
}


def check(name, value):
    """End the script with one line unless an option's value is within LIMITS or one of CHOICES."""
    least, most = LIMITS.get(name, (-MANY, MANY))       # of scripts elsewhere
    if type(value) in (int, float) and not least <= value <= most:      # nor nan
        bounds = f'{least} or more' if value < least else f'{least} to {most}'
        sys.exit(f'--{name}: wants {bounds}, got {value}')
    if value not in CHOICES.get(name, [value]):
        sys.exit(f'--{name}: wants one of {", ".join(filter(None, CHOICES[name]))}, got {value!r}')


def options(argv, config):
    """[(name, text)] of a command line, --name=value or --name value, for the constants in config;
    a bool may stand alone, which is True."""
    out = []
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        name, equals, text = arg.removeprefix('--').partition('=')
        if '\n' in arg:
            sys.exit(f'{arg!r}: wants one line')
        if not arg.startswith('--'):
            after = f', after --{out[-1][0]}, which has its value' if out else ''
            sys.exit(f'{arg}: write options as --name=value or --name value{after}')
        if name not in config:
            close = [f', did you mean --{k}?' for k in difflib.get_close_matches(name, config, 1)]
            sys.exit(f'--{name}: no such option' + ''.join(close))
        if not equals:
            alone = type(config[name]) is bool and rest[:1] not in (['True'], ['False'])
            if not alone and (not rest or rest[0].startswith('--')):
                sys.exit(f'--{name}: wants a value, write options as --name=value or --name value')
            text = 'True' if alone else rest.pop(0)
        out.append((name, text))
    return out


def override(g, argv, presets={}):
    """Set a script's constants, all bool, int, float and str in its globals() g, by argv, see
    options, after those of the preset that it names, {preset: {name: value}}; of a file that is
    imported they stay. Returns them all, {name: value}, to print and to save. What cannot be set,
    or is out of LIMITS or CHOICES, ends the script with one line."""
    if g.get('__name__', '__main__') != '__main__':
        argv = []
    config = {k: v for k, v in g.items() if k[0] != '_' and type(v) in (bool, int, float, str)}
    if '-h' in argv or '--help' in argv:
        print(g['__doc__'], *(f'  --{k}={v}' for k, v in config.items()), sep='\n')
        sys.exit()
    pairs = options(argv, config)
    for name, text in list(pairs):
        if name == 'preset':
            pairs = [(k, str(v)) for k, v in presets.get(text, {}).items()] + pairs
    for name, text in pairs:
        if '\n' in text:
            sys.exit(f'--{name}: wants one line, got {text!r}')
        kind = type(config[name])
        try:
            value = {'True': True, 'False': False}[text] if kind is bool else kind(text)
        except (KeyError, ValueError):
            wanted = 'True or False' if kind is bool else kind.__name__
            sys.exit(f'--{name}: wants {wanted}, got {text!r}')
        check(name, value)
        config[name] = value
    if config.get('workers') and not hasattr(os, 'fork'):       # one would run the script again
        config['workers'] = 0
    g.update(config)
    return config


def given(argv):
    """The names of the options that stand on a command line, whatever their values."""
    return {arg[2:].partition('=')[0] for arg in argv if arg.startswith('--')}


def pick_device(name, index=0):
    """torch.device of 'auto' (CUDA, MPS, .., else CPU) or of a name; index: this process's GPU."""
    if name == 'auto':
        name = str(torch.accelerator.current_accelerator(check_available=True) or 'cpu')
    try:
        device = torch.device(f'cuda:{index}' if name == 'cuda' else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        sys.exit(f'--device={name}: not usable here ({str(error).splitlines()[0]})')
    return device


def autocast(device, dtype):
    """The autocast context of a device; 'auto': bfloat16 where GPUs and CPUs multiply it in
    hardware."""
    fast = device.type == 'cuda' or device.type == 'cpu' and torch.cpu._is_amx_tile_supported()
    enabled = dtype == 'bfloat16' or dtype == 'auto' and fast
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


# dense bfloat16 FLOP/s by the makers' data sheets; the first name that fits counts
PEAK = {'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'A100': 312e12,
        'L40S': 362e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}


def peak_flops(device):
    """Of a GPU; 0.0 where that is not known."""
    card = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
    for name, peak in PEAK.items():
        if name in card:
            return peak
    return 0.0


# --------------------------------------------------------------------------------------------------
# what is wrong with the data: a Bad says it, warn() prints it once

class Bad(ValueError):
    """A file, frame or row of a dataset that cannot be used. Batches count it and go on."""

    def __init__(self, why, path=''):
        super().__init__((f'{path}: {why}' if path else str(why)).replace('\n', ' '))
        self.why = why
        self.path = path


class Away(SystemExit):
    """The hub cannot be reached for long: no fault of the data, so nothing is skipped because of
    it. Where nobody waits for it to come back the program ends with its line."""


_warned = set()     # lines, or causes, that were printed or in a worker go with its next batch
_unsent = []        # the latter


def warn(line, everywhere=False, cause=''):
    """Print a line about the data once, or the first line of a cause, by the first process or
    everywhere; what a worker has to say goes with its next batch."""
    if (cause or line) in _warned:
        return
    _warned.add(cause or line)
    if get_worker_info() is not None:
        _unsent.append(line)
    elif everywhere or os.environ.get('RANK', '0') == '0':
        print(line, file=sys.stderr, flush=True)


TELL = 10       # seconds between lines of progress
_told = {}      # {what: when there was a line}


def progress(what, done):
    """Print how much of something is done: after two seconds, then every TELL."""
    now = time.monotonic()
    if now > _told.setdefault(what, now - 0.8 * TELL) + TELL:
        _told[what] = now
        print(what, done, flush=True)


def one_line_a_cause(faults):
    """Lines that tell of some Bad. Of several with one cause, numbers apart, three are named."""
    causes = defaultdict(list)
    for fault in {str(fault): fault for fault in faults}.values():
        causes[re.sub(r'\d+', '#', fault.why)].append(fault)
    for first, *others in causes.values():
        names = ', '.join(fault.path for fault in others[:2])
        yield f'{first} ({len(others):,} more: {names}, ..)' if others else str(first)


def a_file(path):
    """Refuse what is none: a pipe would be waited for."""
    if not os.path.isfile(path):
        raise Bad('no such file', path)


@contextmanager
def reading(path):
    """What a bad file makes fail in here becomes a Bad that names it; no other mistake does."""
    a_file(path)
    try:
        yield
    except (Bad, OSError, MemoryError, RecursionError, av.FFmpegError, pa.ArrowException,
            json.JSONDecodeError, UnicodeError) as error:
        close_video(path)       # a decoder that failed is not used again
        if getattr(error, 'path', ''):
            raise
        why = f'cannot be read ({error})'
        with suppress(OSError), open(path, 'rb') as f:
            if f.read(30).startswith(b'version https://git-lfs'):
                why = 'is a git-LFS pointer, not the file itself (git lfs pull)'
        raise Bad(why, path) from None


# --------------------------------------------------------------------------------------------------
# what is written: by one process, and aside until it is whole

@contextmanager
def writing(path):
    """What the disk refuses in here ends the program with one line that names the path."""
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        why = ' '.join(str(error).split())
        sys.exit(f'{path}: cannot be written ({why}): make room, or name another place')


_locks = []     # open files; a lock ends with its process, however that ends


def own(folder, name='.lock'):
    """Make a folder where there is none, and keep out other processes that ask for the same, until
    the open file that this returns is closed. One line ends the program if another was first, or
    if nothing can be written there."""
    with writing(folder):
        os.makedirs(folder, exist_ok=True)
        lock = open(f'{folder}/{name}', 'a+b', buffering=0)
        try:
            if 'fcntl' in globals():
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)    # a forked worker has it not
            else:
                lock.seek(1 << 20)      # others can read what is not locked
                msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            sys.exit(f'{folder}: {lock.read().decode()}: give another folder, or wait')
        except OSError as error:        # of some network file systems
            warn(f'{folder}: nothing keeps another process out ({error})')
        lock.truncate(0)
        lock.write(f'process {os.getpid()} on host {socket.gethostname()} writes there since '
                   f'{time.strftime("%Y-%m-%d %H:%M")}'.encode())
    _locks.append(lock)
    return lock


def own_tmp(path):
    """A new name beside a path, of this process alone, for what os.replace then gives that path."""
    return f'{path}.{os.getpid()}@{socket.gethostname()}.{time.time_ns()}.tmp'


# --------------------------------------------------------------------------------------------------
# pictures and video

# One for everything: it keeps its swscale tables while sizes stay (a fresh one a frame costs up to
# half of the speed). BICUBIC comes nearest to the antialiased resize of encoders' training; AREA,
# a tenth faster, enlarges badly.
_reformat = partial(av.video.reformatter.VideoReformatter().reformat,
                              interpolation='BICUBIC', threads=1)
MP4 = dict(format='mp4', options={'movflags': '+faststart'})
# what somebody made may be a list of other files or addresses, or take all memory to decode
SAFE = {'protocol_whitelist': 'none', 'max_pixels': str(1 << 27)}
# else the missing half of a truncated picture would come out grey
STRICT = SAFE | {'err_detect': 'explode'}
MAX_OPEN = 8    # videos kept open per process; one holds a decoder's frames, a few MB
GO_ON = 30      # frames over which a video is read on, not sought: a key frame may be far back


def _rgb(frame, size):
    """uint8 (H, W, 3) array of a decoded frame: colour and scale in one pass."""
    H, W = (size, size) if isinstance(size, int) else size
    return _reformat(frame, W or frame.width, H or frame.height, 'rgb24').to_ndarray()


def from_rgb(rgb):
    """The frame of an uint8 (H, W, 3) array."""
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), 'rgb24')


def _upright(frame, size, mirrored=False):
    """As _rgb, turned as the file says: a phone's pictures and videos may lie on their side."""
    if frame.rotation % 180 and not isinstance(size, int):
        size = size[::-1]
    rgb = _rgb(frame, size)
    return np.rot90(rgb[::-1] if mirrored else rgb, round(frame.rotation / 90))


# the entry of Exif, in either order of bytes, for a picture that is mirrored as well
MIRRORED = re.compile(rb'(?is)Exif.{,999}?(\x01\x12\x00\x03\x00{3}\x01\x00|'
                      rb'\x12\x01\x03\x00\x01\x00{3})[\x02\x04\x05\x07]')


def video_stream(file, options=SAFE):
    """That of an open file, or of bytes: then ffmpeg cannot open others, whatever is in it."""
    container = av.open(file, options=options)
    stream = next(iter(container.streams.video), None)
    # ffmpeg knows the codec, and no ANSI art, which any text is
    if not stream or not stream.codec_context or container.format.name == 'tty':
        raise Bad('no picture or video in it, or of an unknown codec')
    stream.codec_context.options = options
    return stream


def decode_picture(content, size):
    """uint8 (H, W, 3) array of a picture's file, given as bytes."""
    # ffmpeg forgives a JPEG without its end
    if content[:2] == b'\xff\xd8' and b'\xff\xd9' not in content:
        raise Bad('truncated')
    with video_stream(io.BytesIO(content), STRICT).container as container:
        frame = next(container.decode(video=0), None)
        if frame is None or frame.is_corrupt:
            raise Bad('truncated')
        return _upright(frame, size, MIRRORED.search(content[:1 << 16]))


def read_image(path, size=0):
    """uint8 tensor (3, H, W) of any picture ffmpeg knows, resized exactly like a video's frames."""
    try:
        a_file(path)
        rgb = decode_picture(Path(path).read_bytes(), size)
    except (OSError, ValueError, av.FFmpegError) as error:
        why = getattr(error, 'strerror', None) or getattr(error, 'why', error)
        sys.exit(f'{path}: not a readable picture of up to 134 megapixels ({why})')
    return torch.from_numpy(rgb.copy()).permute(2, 0, 1)


def resize(x, size):
    """uint8 (n, 3, H, W) -> (n, 3, *size), by the same resampling as a video's frames."""
    out = [_rgb(from_rgb(rgb), size) for rgb in x.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


def seen_otherwise(x, rng):
    """Frames of a clip, uint8 (T, 3, H, W), as another camera in other light might see them: all
    with the same random crop (60 % of the picture or more), resized, and the same change of
    brightness, contrast, saturation and hue."""
    H, W = x.shape[2:]
    h, w = (round(n * rng.uniform(0.775, 1)) for n in (H, W))
    top = int(rng.integers(H - h + 1))
    left = int(rng.integers(W - w + 1))
    x = resize(x[:, :, top:top + h, left:left + w], (H, W)).permute(0, 2, 3, 1).float() / 255
    brightness, contrast, saturation = rng.uniform(0.7, 1.3, 3)
    # one that turns about the axis of grey by at most 18 degrees, and stretches what is off it
    turn = _matrices(np.full((1, 3), rng.uniform(-0.1, 0.1) * np.pi / 3 ** 0.5), 'rotvec')[0]
    grey = np.full((3, 3), 1 / 3)
    colour = torch.from_numpy(grey + saturation * (turn - grey)).float()
    x = brightness * (x @ colour.T)                     # (T, H, W, 3)
    mean = x[0].mean()
    x = mean + contrast * (x - mean)
    return (255 * x).round().clamp(0, 255).to(torch.uint8).permute(0, 3, 1, 2)


def enlarge(x, side=128):
    """uint8 (.., H, W) -> the same with every pixel repeated until H is about `side`."""
    n = max(1, round(side / x.shape[-2]))
    return x.repeat_interleave(n, dim=-2).repeat_interleave(n, dim=-1)


def write_image(path, x):
    """Write uint8 (3, H, W) as .png."""
    with writing(path):
        from_rgb(x.permute(1, 2, 0).cpu().numpy()).save(str(path))


def exact_rate(fps):
    """30000 / 1001 of 29.97 as well."""
    return Fraction(fps).limit_denominator(1001) or Fraction(1, 1001)


def _encode(container, rgb, i, fps, **options):
    """Append uint8 (H, W, 3) to an mp4 as frame i, shown at i / fps exactly; the bytes it took."""
    H, W = rgb.shape[:2]
    rate = exact_rate(fps)
    if not container.streams.video:  # without B-frames packets lie in the order of presentation
        container.add_stream('libx264', rate, {'bf': '0', **options}, width=W + W % 2,
                             height=H + H % 2)
    rgb = np.pad(rgb, ((0, H % 2), (0, W % 2), (0, 0)), 'edge')  # yuv420p halves both sides
    frame = _reformat(from_rgb(rgb), format='yuv420p')
    frame.pts = i
    frame.time_base = 1 / rate
    packets = container.streams.video[0].encode(frame)
    container.mux(packets)
    return sum(packet.size for packet in packets)


def finish(container):
    """Write what the encoder still holds back, and close."""
    container.mux(container.streams.video[0].encode(None))
    container.close()


def write_video(path, x, fps):
    """Write uint8 (T, 3, H, W) as H.264 mp4, aside and then renamed; odd sides grow by a line."""
    tmp = own_tmp(path)
    with writing(path):
        container = av.open(tmp, 'w', **MP4)
        for i, rgb in enumerate(x.permute(0, 2, 3, 1).cpu().numpy()):
            _encode(container, rgb, i, fps, crf='12')
        finish(container)
        os.replace(tmp, path)


def frame_times(container):
    """When the frames of a video are shown, in units of its clock, sorted: frame i is the i-th.

    An mp4 begins with a list of when its frames are decoded (0.7 us each to look at). If these are
    evenly spaced, so is what is shown. Of any other file, all packets are read (20 us each).
    """
    stream = container.streams.video[0]
    decoded = [entry.timestamp for entry in stream.index_entries if not entry.is_discard]
    gaps = set(np.diff(decoded).tolist())
    if len(decoded) == stream.frames and len(gaps) == 1:
        gap = gaps.pop()
        start = stream.start_time or 0
        return range(start, start + len(decoded) * gap, gap)
    packets = (packet for packet in container.demux(stream) if packet.size)
    times = [packet.pts for packet in packets if packet.pts is not None and not packet.is_discard]
    return array.array('q', sorted(times))


_times = {}     # {(path, when it was changed): frame_times}, of all videos that were open


class Video:
    """An open video, read forward. A frame's number is its place in the order of presentation.

    Packets come in groups that begin with a key frame. A group without a wanted frame is not
    decoded, so that strides are cheap where key frames are dense.
    """

    def __init__(self, path):
        self.stream = video_stream(open(path, 'rb'))
        self.container = self.stream.container
        self.codec = self.stream.codec_context
        self.codec.thread_count = 1         # more delay every seek; we have processes
        key = path, os.stat(path).st_mtime_ns
        if key not in _times:
            _times[key] = frame_times(self.container)
        self.times = _times[key]
        self.last = math.inf    # the last frame that was asked for; inf: seek, whatever comes next

    def number(self, x):
        """Of a packet or frame."""
        return bisect.bisect_left(self.times, x.pts)

    def seek(self, first):
        """To the key frame that a frame needs."""
        # mp4 seeks by times of decoding; reordered frames are shown up to 16 later than decoded
        early = max(0, first - 16) if self.codec.has_b_frames else first
        for start in early, 0:
            self.container.seek(self.times[start], stream=self.stream)  # cleans the decoder, too
            self.packets = (packet for packet in self.container.demux(self.stream) if packet.size)
            packet = next(self.packets, None)
            if packet and self.number(packet) <= first:     # else the file's index misled the seek
                break
        self.packets = chain([packet], self.packets, [None])
        self.group = []                     # packets since a key frame that were not decoded
        self.fed = set()                    # numbers of those that were
        self.begin = 0                      # what comes before in order of presentation is lost
        self.decoded = deque()  # (number, frame) in order of presentation

    def feed(self, packets):
        """Decode; None drains the decoder."""
        for packet in packets:
            for frame in self.codec.decode(packet):
                self.decoded.append((self.number(frame), frame))
            if packet:
                self.fed.add(self.number(packet))

    def advance(self, wanted):
        """Read a packet. Decode it, and what it needs, if it is wanted or the decoder waits for it.
        """
        packet = next(self.packets, 'ended')
        if packet == 'ended':
            raise Bad(f'frame {min(wanted)} is missing, of {len(self.times)} frames')
        if packet is None:
            self.feed([None])
            return
        number = self.number(packet)
        if packet.is_keyframe:
            if any(i < number and i not in self.fed for i in wanted):
                self.feed(self.group)   # an open group: shown before its key frame, but decoded
            elif self.group or wanted <= self.fed:      # after it and after the group before
                self.feed([None])       # what the decoder still holds back
                self.codec.flush_buffers()
                self.fed.clear()
                self.begin = number
            self.group = []
        self.group.append(packet)
        if number in wanted or wanted <= self.fed:
            self.feed(self.group)
            self.group = []

    def read(self, numbers):
        """Yield (number, frame) of different numbers, in the order of presentation."""
        wanted = set(numbers)
        first = min(wanted)
        last = max(wanted)
        for i in first, last:
            if not 0 <= i < len(self.times):
                raise Bad(f'frame {i} is missing, of {len(self.times)} frames')
        if not self.last < first <= self.last + GO_ON or first < self.begin:
            self.seek(first)
        elif any(self.number(packet) in wanted for packet in self.group):
            self.feed(self.group)
            self.group = []
        self.last = math.inf    # until all came
        while wanted:
            if not self.decoded:
                self.advance(wanted)
                continue
            number, frame = self.decoded.popleft()
            if number in wanted:
                wanted.remove(number)
                yield number, frame
        self.last = last


_videos = {}    # open ones, the one used last at the end


def open_video(path):
    """A Video of a small LRU. A forked worker must not share its parent's file position: pid is a
    key."""
    key = os.getpid(), path
    _videos[key] = video = _videos.pop(key, None) or Video(path)
    if len(_videos) > MAX_OPEN:
        _videos.pop(next(iter(_videos))).container.close()
    return video


def video_times(path):
    """When the frames of a video are shown, in seconds after the first one."""
    with reading(path):
        video = Video(path)     # not open_video, which keeps it open
        times = np.array(video.times, float)
        return (times - times[:1]) * float(video.stream.time_base)


def close_video(path):
    _videos.pop((os.getpid(), path), None)      # which closes it


def read_frames(path, numbers, size=0):
    """uint8 tensor (n, 3, H, W): a video's frames of these numbers, in any order.

    A Bad names the file that cannot be read, or that lacks a frame.
    """
    numbers = np.array(numbers, int)
    out = None
    with reading(path):
        for number, frame in open_video(path).read(numbers.tolist()):
            rgb = _rgb(frame, size)
            if out is None:     # of numpy, which asks for huge pages: faults cost as much as copies
                out = np.empty((len(numbers), *rgb.shape), np.uint8)
            for place in np.flatnonzero(numbers == number):
                out[place] = rgb
    return torch.from_numpy(out).permute(0, 3, 1, 2)


# --------------------------------------------------------------------------------------------------
# LeRobot in: files of the hub

HUB_HOME = f'{huggingface_hub.constants.HF_HOME}/goaldream'    # one folder a revision
HUB_NAME = re.compile(r'(?a)\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?')
PATIENCE = 300      # seconds for which a hub that is busy or out of reach is asked again
huggingface_hub.utils.disable_progress_bars()       # of several processes at once


def ask_hub(what, call, first=False):
    """call() to the hub; again for PATIENCE seconds while it says to wait (429), fails (5xx) or
    breaks off. huggingface_hub's own five retries are over within a minute.

    Raises Bad for what it does not have or give, Away if it does not come back; first: at once if
    it cannot be reached at all.
    """
    end = time.monotonic() + PATIENCE
    wait = 1
    while True:
        try:
            return call()
        except (OSError, ValueError, huggingface_hub.errors.HTTPError) as error:    # httpx's, too
            answer = getattr(error, 'response', None) or getattr(error.__cause__, 'response', None)
            why = str(error.__cause__ or error)
            pause = wait
            hopeless = first or huggingface_hub.constants.HF_HUB_OFFLINE or getattr(
                error, 'errno', None) in OUR_DISK
            if answer:
                hopeless = False
                why = f'{answer.status_code} {answer.headers.get("X-Error-Code", "")}'
                limit = huggingface_hub.utils.parse_ratelimit_headers(answer.headers)
                after = answer.headers.get('Retry-After', '')
                if limit and limit.remaining == 0:
                    pause = max(wait, limit.reset_in_seconds + 1)
                elif after.isdigit():       # may be a date
                    pause = max(wait, int(after) + 1)
            why = f'not to be had from the hub ({" ".join(why.split())})'
            if answer and answer.status_code in (401, 403, 404):
                raise Bad(why, what) from None
            if hopeless or time.monotonic() + pause > end:
                raise Away(f'{what}: {why}') from None
            if why not in _warned:      # now, not with a worker's next batch
                _warned.add(why)
                print(f'{what}: {why}: asked again for {PATIENCE} s', file=sys.stderr, flush=True)
            time.sleep(pause)
            wait = min(2 * wait, 60)


def answer_of_hub(what, call, wants, first=True):
    """As ask_hub, where one line that ends with `wants` ends the program instead."""
    try:
        return ask_hub(what, call, first)
    except (Bad, Away, RuntimeError) as error:      # the last: of an upload
        sys.exit(f'{" ".join(str(error).split())}: {wants}')


def checkpoint(name):
    """The file of a checkpoint: name itself, or, where there is none, what 'owner/name[@revision]'
    of the hub has: it comes to a folder here of the same name, with -- for each slash, where what
    is made of it goes as well."""
    if os.path.exists(name) or name.endswith('.safetensors') or not HUB_NAME.fullmatch(name):
        return name
    repo, _, revision = name.partition('@')
    return answer_of_hub(name, lambda: huggingface_hub.hf_hub_download(
        repo, 'ckpt.safetensors', revision=revision or None, local_dir=name.replace('/', '--'),
        endpoint=os.environ.get('HF_ENDPOINT')), 'nor is there such a file here')


OUR_DISK = errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EFBIG


class Hub:
    """A dataset on the hub, 'owner/name' or 'owner/name@revision', as a folder whose files come
    when they are needed. What is whole is used without the network.

    huggingface_hub names revisions, lists files and transfers them. Ours is what it does not do: a
    large file goes on where a killed process left off (hf_hub_download begins anew), and of files
    that have come, those used longest ago make room (its cache only grows). snapshot_download would
    list all files for a few of metadata: 400 requests for a dataset like DROID with a file an
    episode.
    """

    def __init__(self, name, cache_gb):
        self.repo, _, self.revision = name.partition('@')
        self.cache_gb = cache_gb
        self.endpoint = os.environ.get('HF_ENDPOINT')
        folder = f'{HUB_HOME}/{self.repo.replace("/", "--")}/'
        api = huggingface_hub.HfApi(self.endpoint)
        if not os.path.exists(f'{folder}{self.revision}/meta/.whole'):
            asked = self.revision or 'main'
            known = Path(f'{folder}{asked.replace("/", "--")}.sha')      # what it was the last time
            try:
                info = ask_hub(name, lambda: api.dataset_info(self.repo, revision=asked), True)
                self.revision = info.sha or asked       # of some mirrors
                with writing(known):
                    make_folder_of(known)
                    known.write_text(self.revision)
            except Away as error:
                if not known.exists():
                    raise
                self.revision = known.read_text()
                warn(f'{error}: goes on with what came last, {self.revision}')
        self.root = folder + self.revision
        if os.path.exists(f'{self.root}/meta/.whole'):
            return
        for file in ask_hub(name, lambda: list(api.list_repo_tree(
                self.repo, 'meta', recursive=True, repo_type='dataset', revision=self.revision))):
            if isinstance(file, huggingface_hub.hf_api.RepoFile):
                self.fetch(inside(self.root, '{name}', name=file.path))
        Path(f'{self.root}/meta/.whole').touch()

    def fetch(self, path):
        """Bring a file unless it is here."""
        with suppress(FileNotFoundError):
            return os.utime(path)       # it is here, and used now
        name = os.path.relpath(path, self.root)
        part = f'{self.root}/.part/{name}'
        make_folder_of(path)
        make_folder_of(part)
        # The lock spares a second download, but does nothing on some network file systems. So each
        # download has a part of its own, or one that another left: none in use is idle so long.
        with huggingface_hub.utils.WeakFileLock(f'{part}.lock'):
            if not os.path.exists(path):
                mine = f'{part}.{os.urandom(8).hex()}'
                idle = time.time() - 2 * huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
                for left in glob.glob(f'{glob.escape(part)}.{"?" * 16}'):
                    with suppress(FileNotFoundError):        # another was first
                        if os.path.getmtime(left) < idle:
                            os.rename(left, mine)
                ask_hub(path, lambda: self.download(name, mine))
                os.replace(mine, path)
        self.make_room()

    def download(self, name, part):
        url = huggingface_hub.hf_hub_url(self.repo, name, repo_type='dataset',
                                         revision=self.revision, endpoint=self.endpoint)
        size = huggingface_hub.get_hf_file_metadata(url).size
        if size and size > 1e8:
            print(f'fetching {url} ({size / 1e6:,.0f} MB)', file=sys.stderr, flush=True)
        with open(part, 'ab', buffering=0) as f:
            if size is None or f.tell() > size:     # some mirrors say it with the file alone
                f.truncate(0)
            if f.tell() != size:
                http_get(url, f, resume_size=f.tell(), expected_size=size,
                         headers=huggingface_hub.utils.build_hf_headers())

    def make_room(self):
        """Remove the data and videos used longest ago until cache_gb suffice, never the newest."""
        with suppress(FileNotFoundError):        # another process makes room as well
            files = []
            for path in Path(HUB_HOME).glob('*/*/[dv]*/**/*'):
                if path.is_file():
                    files.append((path.stat().st_mtime, path.stat().st_size, path))
            total = sum(size for _, size, _ in files)
            for _, size, path in sorted(files)[:-1]:
                if total > self.cache_gb * 1e9:
                    path.unlink()
                    total -= size


def make_folder_of(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)


_real = lru_cache(maxsize=None)(os.path.realpath)
# str.format would read attributes, and pad for ever
FIELD = re.compile(r'\{(\w+)(?::(0?\d?d?))?\}')


def inside(root, template, **values):
    """The path of a file of a dataset. By spelling: links, as in the hub's cache, are followed,
    which is said."""
    try:
        path = FIELD.sub(lambda field: format(values[field[1]], field[2] or ''), template)
        path = os.path.normpath(os.path.join(root, path))
        if os.path.commonpath([path, root]) != root:
            raise ValueError(f'refused: {path} is not in the dataset')
        if b'\0' in os.fsencode(path) or re.search('[{}]', FIELD.sub('', template)):
            raise ValueError('no path')
    except (LookupError, TypeError, ValueError) as error:
        raise Bad(f'cannot make a path from {template!r} and {values} ({error!r})', root) from None
    real = _real(os.path.dirname(path))
    if os.path.islink(path) or os.path.commonpath([real, _real(root)]) != _real(root):
        warn(f'{root}: has symbolic links, which are followed')
    return path


# --------------------------------------------------------------------------------------------------
# LeRobot in: tables and statistics

TEXT = '(large_)?(str|utf|text|binary)|bytes|image|video|audio|lang'  # what is no number
STATS = 'mean', 'std', 'min', 'max'
ENVIRONMENT = 'observation.environment_state'   # lerobot's name of what a simulator knows
# words in the names of numbers that a single picture does not show
NO_PLACE = '(?i)(?<![a-z])q?(vel|velocity|speed|force|torque|effort|time)(?![a-z])'
PROBE = 1 << 12     # bytes of a file that are looked at in two places, to know it again
QUANTILES = {'q01': .01, 'q10': .1, 'q50': .5, 'q90': .9, 'q99': .99}


def _pool(parts):
    """Statistics of a whole from those of its parts, dicts of arrays with a count of rows;
    quantiles are averaged."""
    whole = {}
    for name in parts[0]:
        whole[name] = np.stack([np.asarray(part[name], np.float64) for part in parts])
    parts = whole
    count = parts['count'].sum(0)
    weight = (parts['count'] / count).reshape(-1, *[1] * (parts['mean'].ndim - 1))
    out = {k: (weight * parts[k]).sum(0) for k in ('mean', *QUANTILES) if k in parts}
    # without the cancellation of E[x^2] - E[x]^2
    variance = weight * (parts['std'] ** 2 + (parts['mean'] - out['mean']) ** 2)
    return out | dict(std=np.sqrt(variance.sum(0)), min=parts['min'].min(0),
                      max=parts['max'].max(0), count=count.astype(np.int64))


def _describe(x):
    """Statistics of the rows of x (n, ...), as lerobot names them."""
    x = np.asarray(x, np.float64, order='F')        # each column in one piece
    out = dict(min=x.min(0), max=x.max(0), mean=x.mean(0), std=x.std(0), count=np.array([len(x)]))
    return out | dict(zip(QUANTILES, np.quantile(x, list(QUANTILES.values()), axis=0)))


def _table(path, names=()):
    """The named columns of a parquet file, those it has; without names, all but statistics."""
    file = pq.ParquetFile(path, memory_map=True)
    names = names or [name for name in file.schema_arrow.names if not name.startswith('stats/')]
    return file.read(names, use_threads=False)      # they cost more than small files take


@lru_cache(maxsize=32)
def _columns(path, needed):
    """{name: float32 (rows, width)} of the columns needed; float64 (rows,) of those that number the
    rows, as far as a table has them."""
    with reading(path):
        table = _table(path, ('episode_index', 'frame_index', 'timestamp', *needed))
        for name in set(needed).difference(table.column_names):
            raise Bad(f'no column {name}')
        rows = np.arange(table.num_rows)
        out = dict(row=rows, frame_index=rows, timestamp=rows * np.nan)
        for name in set(table.column_names).difference(needed):
            with suppress(Bad):
                values = _numbers(name, table[name])
                if np.isfinite(values).all():
                    out[name] = values[:, 0]
        for name in needed:
            out[name] = np.float32(_numbers(name, table[name]))
    return out


def _numbers(name, column):
    """float64 (rows, width) of a column of numbers, or of lists of them. NaN: null, or a row of
    another width than most."""
    row = np.flatnonzero(column.is_valid())     # of each number
    values = column.combine_chunks().drop_null()
    try:
        # pyarrow ends the process where it flattens a map
        while isinstance(values.type, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
            row = row[pc.list_parent_indices(values)]
            values = values.flatten()
        values = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    except pa.ArrowException:
        raise Bad(f'{name} is {column.type}, not numbers') from None
    widths = np.bincount(row, minlength=len(column))
    width = np.bincount(widths[widths > 0], minlength=1).argmax() or 1
    out = np.full((len(column), width), np.nan)
    out[widths == width] = values[widths[row] == width].reshape(-1, width)
    return out


@lru_cache(maxsize=4)
def _row_group(path, group, name):
    """One row group of an image column; whole old files are one group, so it is kept for the next.
    """
    return pq.ParquetFile(path, memory_map=True).read_row_group(group, [name])[name]


# --------------------------------------------------------------------------------------------------
# LeRobot in: the dataset

PATHS = {
    'v2': dict(data='data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet',
               video='videos/chunk-{episode_chunk:03d}/{video_key}/'
                     'episode_{episode_index:06d}.mp4'),
    'v3': dict(data='data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet',
               video='videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4')}


@dataclass
class Episode:
    index: int      # its number in the dataset
    stated: int     # frames, by the metadata
    usable: int     # frames that the table and every video chosen really have
    tasks: list     # what is done, in words
    data: dict      # what its table's path is made of
    video: dict     # {camera: what its video's path is made of}; pictures in the table have none
    start: dict     # {camera: when it begins in that video, in seconds}
    span: dict      # {camera: range of that video's frames until the next episode}, see _locate
    length: int = 0     # frames at the rate asked for, as all else counts them
    fault: Bad = None   # what makes it shorter than stated


class LeRobot:
    """A LeRobot dataset v2.0, v2.1 or v3.0: a folder, or 'owner/name[@revision]' of the hub.

    camera: keys or their last parts, comma-separated, of which those that exist count
    ('front:3,wrist': with weights); '' is the first camera. action: comma-separated keys; '' is
    `action`, else `actions`, else all `action.*`, else nothing; 'none' ignores actions. fps: the
    nearest frames at this lower rate; 0 is all frames. action_mode, rotation: see rows. state: keys
    or numbers of them, 'observation.state.elbow', comma-separated; a dataset that lacks one has no
    state. probe: likewise, what a probe learns to read; of a whole key without what its names call
    velocities, forces or time. `episode` is a position in `.episodes`. A dataset that cannot be
    used ends the program with one line, a file of it that cannot be read is a Bad. A folder's files
    are compared with its metadata: what differs is named, the shorter counts, and .dropped has what
    is wrong with the episodes left out.
    """

    def __init__(self, root, camera='', action='', fps=0, action_mode='absolute', rotation='euler',
                 cache_gb=50, state='', probe=''):
        self.name = str(root)
        self.weight = 0.0       # among other datasets, see open_sets
        self.action_mode = action_mode
        self.rotation = rotation
        self.hub = None
        try:
            if HUB_NAME.fullmatch(self.name) and not os.path.isdir(root):
                self.hub = Hub(self.name, cache_gb)
                self.name = f'{self.hub.repo}@{self.hub.revision}'  # as the hub's 'main' moves
                root = self.hub.root
            self.root = os.path.abspath(root)
            try:
                self._read_info(fps)
                self._choose_cameras(camera)
                self._choose_actions(action)
                self._choose_numbers(state, probe)
                self._read_episodes()
            except Bad:
                raise
            except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
                raise Bad(f'odd metadata ({error!r})', self.root) from None
            self._compare()
            self.stats = self._read_stats() if self.action_dim else None
        except Bad as error:
            sys.exit(str(error))

    # files

    def place(self, e, camera=''):
        """The file with an episode's frames by a camera; without one, and where frames are there
        too, with its rows."""
        if camera in e.video:
            return inside(self.root, self.paths['video'], video_key=camera, **e.video[camera])
        return inside(self.root, self.paths['data'], **e.data)

    def files(self, e, camera=''):
        """{file: its camera, or '' for a table} that clips by a camera, or all chosen, are read
        from."""
        files = {}
        for key in *self.columns, *([camera] if camera else self.chosen):
            files[self.place(e, key)] = key if key in e.video else ''
        return files

    def read(self, call, path, *arguments):
        """call(path, ..) once the file is here; another process may have made room by it again."""
        for attempt in range(3):
            if self.hub:
                self.hub.fetch(path)
            try:
                return call(path, *arguments)
            except Bad:
                if attempt == 2 or os.path.exists(path):
                    raise

    def load(self, pattern):
        """What files of metadata hold: a list of rows, empty if there are none, unless .json."""
        rows = []
        for path in sorted(glob.glob(f'{glob.escape(self.root)}/{pattern}')):
            with reading(path):
                if path.endswith('.parquet'):
                    rows += _table(path).to_pylist()
                    continue
                text = Path(path).read_text('utf8')
                if path.endswith('.json'):
                    return json.loads(text)
                rows += [json.loads(line) for line in text.splitlines() if line.strip()]
        return rows

    # metadata

    def _read_info(self, fps):
        """info.json: the features, templates of paths, the rate."""
        if not os.path.isdir(self.root):
            sys.exit(f'{self.root}: no such folder')
        if os.path.isdir(f'{self.root}/meta_data'):
            sys.exit(f'{self.root}: a LeRobot dataset of v1, which is too old: convert it to v2.1 '
                     'or v3.0 with lerobot')
        where = f'{self.root}/meta/info.json'
        if not os.path.isfile(where):
            sys.exit(f'{self.root}: not a LeRobot dataset: it has no meta/info.json')
        info = self.load('meta/info.json')
        version = info.get('codebase_version')
        if version not in ('v2.0', 'v2.1', 'v3.0'):
            sys.exit(f'{where}: wants codebase_version v2.0, v2.1 or v3.0 (lerobot converts older '
                     f'ones), got {" ".join(str(version).split())[:80]}')
        self.info = info
        self.v3 = version == 'v3.0'
        self.features = info.get('features')
        paths = dict(data=info.get('data_path'), video=info.get('video_path'))
        if self.features is None and 'video_keys' in info:      # the first dialect of v2.0
            videos = info.get('videos') or {}
            paths['video'] = videos.get('videos_path')
            self.features = {}
            for name, kind in dict(keys='float32', image_keys='image', video_keys='video').items():
                for key in info.get(name) or []:
                    shape = (info.get('shapes') or {}).get(key)
                    self.features[key] = dict(dtype=kind, shape=shape, info=videos.get(key))
        self.paths = {kind: path or PATHS[version[:2]][kind] for kind, path in paths.items()}
        self.native = info.get('fps')
        if self.features is None or type(self.native) is str or not 0 < self.native < math.inf:
            sys.exit(f'{where}: wants features and fps, a number above 0, has {", ".join(info)} '
                     f'and fps {self.native!r}')
        self.fps = fps or self.native
        self.ratio = exact_rate(self.native) / exact_rate(self.fps)     # of the files' rate to ours
        if self.ratio < 1:
            sys.exit(f'--fps={fps}: {self.name} has only {self.native} frames per second')

    def _choose_cameras(self, camera):
        self.cameras = []
        for key, feature in self.features.items():
            flags = feature | (feature.get('video_info') or {}) | (feature.get('info') or {})
            depth = flags.get('is_depth_map', flags.get('video.is_depth_map'))
            if flags.get('dtype') in ('video', 'image') and str(depth).lower() != 'true':
                self.cameras.append(key)
        if not self.cameras:
            sys.exit(f'{self.root}: has no cameras, only {", ".join(self.features)}')
        self.chosen = {}        # {camera: weight}
        for name, weight in weighted(camera) or [(self.cameras[0], 1.0)]:
            for key in self.cameras:
                if name in (key, key.rpartition('.')[2]) and weight != 0:
                    self.chosen[key] = weight or 1.0
        if not self.chosen:
            sys.exit(f'{self.root}: has no camera {camera!r}, only {", ".join(self.cameras)}')
        self.camera = list(self.chosen)[0]

    def _choose_actions(self, action):
        # an action of text exists as well
        numeric = [key for key, feature in self.features.items()
                   if not re.match(TEXT, str(feature.get('dtype')))]
        numeric.sort(key=lambda key: not key.startswith('action'))      # as they are named below
        keys = [key for key in ('action', 'actions') if key in numeric][:1]
        keys = keys or [key for key in numeric if key.startswith('action.')]
        if action:
            keys = [] if action == 'none' else [key.strip() for key in action.split(',')]
        if len({*keys}) < len(keys):
            sys.exit(f'{action}: names a key twice')
        for key in set(keys) - set(numeric):
            sys.exit(f'{self.root}: has no numeric {key!r} to be an action, only '
                     f'{", ".join(numeric)}')
        self.action_keys = keys
        self.widths = [int(np.prod(self.features[key].get('shape') or 1)) for key in keys]
        self.rows_each = 1          # rows of the table in a row of rows()
        self.action_names = []      # of the numbers of such a row; motions of poses have none
        if self.action_mode == 'absolute':
            self.rows_each = math.ceil(self.ratio)
            self.action_dim = self.rows_each * sum(self.widths)
            for key in keys:
                names = self._names_of(key)
                if len(keys) > 1:       # they may share some
                    names = [f'{key}.{name}' for name in names]
                self.action_names += names
            return
        pose = 3 + ROTATIONS[self.rotation]
        self.action_dim = sum(w - pose + 6 if w >= pose else w for w in self.widths)
        if keys and max(self.widths) < pose:
            sys.exit(f'--action_mode={self.action_mode}: {self.name} has no pose of {pose} numbers '
                     f'in {", ".join(keys)} ({self.widths}): name it by --action=...')

    def _choose_numbers(self, state, probe):
        for part in state.split(','):
            if part.strip().startswith((ENVIRONMENT, 'action')):
                sys.exit(f'--state={part}: is what a simulator knows or a robot was told, not what '
                         'it senses')
        self.state_numbers, names = self._numbers_of(state, '')
        self.state_names = [name for _, name in names]
        if len({*self.state_names}) < len(names):       # of several keys, which share some
            self.state_names = ['.'.join(name) for name in names]
        self.probe_numbers, names = self._numbers_of(probe, NO_PLACE)
        self.probe_names = ['.'.join(name) for name in names]
        self.state_dim = len(self.state_names)
        self.probe_dim = len(self.probe_names)
        sensed = [key for key, _ in self.state_numbers]
        self.columns = [*dict.fromkeys(self.action_keys + sensed)]

    def _numbers_of(self, text, but):
        """((key, which of its numbers), ..) and the (key, name) of each, of a list of keys and
        numbers of keys; of a whole key without those whose names match `but`. Nothing where one is
        missing."""
        chosen = []
        pairs = []
        for part in filter(None, map(str.strip, text.split(','))):
            found = self._numbers_called(part)
            if found is None:
                return (), []
            key, names, numbers = found
            if but and part == key:
                numbers = [i for i in numbers if not re.search(but, names[i])]
            if numbers:
                chosen.append((key, tuple(numbers)))
            pairs += [(key, names[i]) for i in numbers]
        if len({*pairs}) < len(pairs):
            sys.exit(f'{text}: names a number twice')
        return tuple(chosen), pairs

    def _numbers_called(self, part):
        """(key, names of its numbers, which of them) of a key, or of a key and a name; None where
        there is none."""
        for key, feature in self.features.items():
            numeric = not re.match(TEXT, str(feature.get('dtype')))
            if not numeric or not f'{part}.'.startswith(f'{key}.'):
                continue
            names = self._names_of(key)
            if part == key:
                return key, names, [*range(len(names))]
            if part.removeprefix(f'{key}.') in names:
                return key, names, [names.index(part.removeprefix(f'{key}.'))]

    def _names_of(self, key):
        width = int(np.prod(self.features[key].get('shape') or 1))
        names = flat_names(self.features[key].get('names'))
        if len({*names}) != width:      # none, or the same of two arms
            names = [str(i) for i in range(width)]
        return names

    def _read_episodes(self):
        videos = [key for key in self.chosen if self.features[key]['dtype'] == 'video']
        source = 'meta/episodes/*/*.parquet' if self.v3 else 'meta/episodes.jsonl'
        rows = self.load(source)
        if not rows:
            version = self.info['codebase_version']
            there = os.listdir(f'{self.root}/meta')
            raise Bad(f'has no episodes: nothing in {source}, where {version} has them; there is '
                      f'{there}', self.root)
        episodes = {}
        for row in rows:
            i = int(row['episode_index'])
            length = int(row['length'])
            start = dict.fromkeys(videos, 0)
            if self.v3:
                place = numbers_of_file(row, 'data')
                video = {key: numbers_of_file(row, f'videos/{key}') for key in videos}
                # to_timestamp is off by a frame in some datasets
                start = {key: float(row[f'videos/{key}/from_timestamp'] or 0) for key in videos}
            else:
                chunk = i // (self.info.get('chunks_size') or 1000)
                place = dict(episode_index=i, episode_chunk=chunk, total_episodes=len(rows),
                             chunk_index=chunk, file_index=i)
                video = dict.fromkeys(videos, place)
            tasks = np.atleast_1d(row.get('tasks') or []).tolist()
            episodes[i] = Episode(i, length, length, tasks, place, video, start, {})
        if len(episodes) < len(rows):
            warn(f'{self.root}: its metadata list {len(rows) - len(episodes)} episodes again: the '
                 'last entry of each counts')
        self.listed = self.episodes = [episodes[i] for i in sorted(episodes)]
        self.words = {}         # of tasks, by their numbers, where an episode has several
        if any(len(e.tasks) > 1 for e in self.listed):
            for row in self.load('meta/tasks.parquet' if self.v3 else 'meta/tasks.jsonl'):
                self.words[row['task_index']] = row.get('task', row.get('__index_level_0__'))

    def _compare(self):
        """Find how much of every episode is there, name once what differs, drop what has nothing.
        """
        if not self.hub:
            for i, e in enumerate(self.episodes):
                self._measure(e)
                progress(f'{self.name}: looked at', f'{i:,} of {len(self.episodes):,} episodes')
        empty = Bad('an episode is empty', self.root)
        dropped = [e.fault or empty for e in self.listed if e.usable < 1]
        self.episodes = [e for e in self.listed if e.usable > 0]
        for e in self.episodes:     # frame j is the files' frame round(j ratio)
            e.length = math.ceil((e.usable - Fraction(1, 2)) / self.ratio)
        while self.episodes and not self.hub:   # pictures that none can read are told now
            try:
                for camera in self.chosen:
                    self.frames(0, [0], 0, camera)
                break
            except Bad as error:
                dropped.append(error)
                del self.episodes[0]
        faults = [e.fault for e in self.listed if e.fault]
        for line in one_line_a_cause(faults + dropped):
            if not self.episodes:
                sys.exit(f'{self.root}: has no episodes: {line}')
            warn(line)
        self.dropped = [str(fault) for fault in dropped]
        self.total = sum(e.length for e in self.episodes)

    def _measure(self, e):
        """Compare what an episode's files have of it with the metadata, and set what is usable."""
        try:
            for path, camera in self.files(e).items():
                if camera:
                    self._locate(e, camera)
                n = len(e.span[camera]) if camera else len(self._rows_of(e)['row'])
                if n != e.stated:
                    e.fault = Bad(f'has {n} frames of episode {e.index}, the metadata say '
                                  f'{e.stated}', path)
                e.usable = min(e.usable, n)
            if self.action_keys and e.usable:
                self._action_columns(e)
        except Bad as error:
            e.usable = 0
            e.fault = error

    def _locate(self, e, camera):
        """Set the span of an episode, and of all that share its video."""
        if camera in e.span:
            return
        path = self.place(e, camera)
        times = self.read(video_times, path)
        users = [e]
        if self.v3:
            users = [o for o in self.listed if o.video.get(camera) == e.video[camera]]
        users.sort(key=lambda o: o.start[camera])
        start = np.array([o.start[camera] for o in users])
        length = np.array([o.stated for o in users])
        first = np.searchsorted(times, start - 0.5 / self.native)
        room = np.diff(first, append=len(times))
        # no episode lacks more, or has more to spare, than the whole file
        worst = np.abs(length - room).argmax()
        if abs(length[worst] - room[worst]) > abs(length.sum() - len(times)):
            raise Bad(f'episode {users[worst].index} of length {length[worst]} has {room[worst]} '
                      'frames until the next from_timestamp: meta/episodes is wrong', path)
        for o, begin, n in zip(users, first.tolist(), room.tolist()):
            o.span[camera] = range(begin, begin + n)

    def _read_stats(self):
        """{mean, std, min and max: (action_dim,) float32}; measured if the dataset has none that
        fit, without the rows that are not finite."""
        if self.action_mode == 'absolute':
            with suppress(LookupError, ValueError, TypeError):  # incomplete, or do not fit
                return self._stored_stats()
        parts = []
        why = Bad(f'no finite row in {", ".join(self.action_keys)}', self.root)
        # files of the hub are fetched for this: 16 episodes do
        stride = math.ceil(len(self.episodes) / 16) if self.hub else 1
        for i in range(0, len(self.episodes), stride):
            try:
                rows = self.rows(i)
            except Bad as error:    # is counted where it is drawn
                why = error
                continue
            rows = rows[np.isfinite(rows).all(1)]
            if len(rows):
                parts.append(_describe(rows))
        if not parts:
            raise why
        pooled = _pool(parts)
        return {name: pooled[name].astype(np.float32) for name in STATS}

    def _stored_stats(self):
        stats = self.load('meta/stats.json') or {}
        if not stats:
            lines = [line['stats'] for line in self.load('meta/episodes_stats.jsonl')]
            for key in self.action_keys:
                stats[key] = _pool([line[key] for line in lines])
        out = {}
        for name in STATS:
            parts = [np.reshape(np.float32(stats[key][name]), width)
                     for key, width in zip(self.action_keys, self.widths)]
            out[name] = np.tile(np.concatenate(parts), self.rows_each)
            if not np.isfinite(out[name]).all():
                raise ValueError
        return out

    # rows and frames

    def _rows_of(self, e, keys=None):
        """{name: values} of an episode's rows, see _columns, in the order of their frames."""
        # dataset_from_index is scrambled in some converted datasets; the column in the file is not
        columns = self.read(_columns, self.place(e), tuple(keys or self.columns))
        rows = columns['row']
        if self.v3 and 'episode_index' in columns:
            rows = np.flatnonzero(columns['episode_index'] == e.index)
        elif self.v3:
            before = sum(o.stated for o in self.listed if o.data == e.data and o.index < e.index)
            rows = rows[before:before + e.stated]
        # of two rows for one frame the first
        rows = rows[np.unique(columns['frame_index'][rows], return_index=True)[1]]
        out = {name: values[rows] for name, values in columns.items()}
        # (n, 1) where they are a state or probed as well
        late = out['timestamp'].ravel() - out['frame_index'].ravel() / self.native
        late = np.abs(late).max(initial=0)
        out['odd'] = late > 0.5 / self.native
        if out['odd']:
            warn(f'{self.name}, episode {e.index}: timestamps are up to {late:.3g} s off the grid '
                 f'of {self.native} frames a second (others like it are not named)',
                 cause=f'{self.name} timestamps')
        return out

    def _where(self, episode, camera):
        """Where an episode's rows have their pictures: numbers of frames of a video, or of rows of
        its table.

        As many frames as rows are taken in their order, whatever clocks say. Of more, a row has
        that of its frame_index or, if its timestamp says another, that of the latter, as lerobot.
        """
        e = self.episodes[episode]
        if camera not in e.video:
            return self._rows_of(e)['row']
        self._locate(e, camera)
        frames = np.array(e.span[camera])
        if not self.columns or len(frames) <= e.usable:
            return frames
        rows = self._rows_of(e)
        ways = [rows['frame_index'].ravel().astype(int)]
        if rows['odd']:
            shown = self.read(video_times, self.place(e, camera))[frames]
            begin = shown[0] - 0.5 / self.native
            ways = [np.searchsorted(shown, begin + rows['timestamp'].ravel()), *ways]
        for way in ways:
            if np.diff(way, prepend=-1, append=len(frames)).min() > 0:
                return frames[way]
        return frames

    def _at(self, j):
        """Frame numbers of the files for frames j: round(j ratio)."""
        over, under = self.ratio.numerator, self.ratio.denominator
        return (2 * np.asarray(j) * over + under) // (2 * under)

    @lru_cache(maxsize=16)
    def rows(self, episode):
        """float32 (length, action_dim): raw actions; row j is what is done between frames j and j +
        1, NaN if unknown.

        'absolute': the columns as they are; at a lower rate all rows from one frame to the next,
        one after the other. 'delta' and 'delta_tool': the pose that a column begins with (x y z and
        a rotation, see pose_deltas) becomes its motion since the frame before, in the base's or the
        tool's frame. What follows it, or has no pose, stays. A column of `observation.*` is a
        state, reached at the next frame; any other is a target, given at this one.
        """
        e = self.episodes[episode]
        if not self.action_dim:
            return np.zeros((e.length, 0), np.float32)
        columns = self._action_columns(e)
        at = self._at(np.arange(e.length + 1))
        if self.action_mode == 'absolute':
            a = np.concatenate(list(columns.values()), 1)
            part = np.arange(self.rows_each) * np.diff(at)[:, None] // self.rows_each
            i = at[:-1, None] + part                                    # (length, rows_each)
            return a[np.minimum(i, len(a) - 1)].reshape(e.length, -1)
        pose = 3 + ROTATIONS[self.rotation]
        out = []
        for key, x in columns.items():
            i = at if key.startswith('observation') else at - 1
            known = (i >= 0) & (i < len(x))
            x = np.where(known[:, None], x[i.clip(0, len(x) - 1)], np.nan)  # (length + 1, width)
            if x.shape[1] < pose:
                out.append(x[1:])
                continue
            tool = self.action_mode == 'delta_tool'
            out.append(pose_deltas(x[:-1, :pose], x[1:, :pose], self.rotation, tool))
            out.append(x[1:, pose:])
        return np.concatenate(out, 1).astype(np.float32)

    def states(self, episode):
        """float32 (length, state_dim): the robot's state at each frame, NaN where it is not known.
        """
        return self._numbers(episode, self.state_numbers)

    def probed(self, episode):
        """float32 (length, probe_dim): as states, of what a probe learns to read."""
        try:
            return self._numbers(episode, self.probe_numbers)
        except Bad:     # training does without it
            return np.full((self.episodes[episode].length, self.probe_dim), np.nan, np.float32)

    @lru_cache(maxsize=16)
    def _numbers(self, episode, chosen):
        e = self.episodes[episode]
        rows = self._rows_of(e, dict.fromkeys([*self.columns, *(key for key, _ in chosen)]))
        at = self._at(np.arange(e.length))
        parts = [np.zeros((e.length, 0), np.float32)]
        for key, numbers in chosen:
            has = rows[key].shape
            wants = int(at[-1]) + 1, max(numbers) + 1
            if has[0] < wants[0] or has[1] < wants[1]:
                raise Bad(f'{key} has shape {has} in episode {e.index}, expected {wants} or more',
                          self.place(e))
            parts.append(rows[key][at][:, numbers])
        x = np.concatenate(parts, axis=1)
        return np.where(np.isfinite(x), x, np.nan)

    def _action_columns(self, e):
        """{key: (usable, width)} of an episode; what is odd in them is named."""
        path = self.place(e)
        rows = self._rows_of(e)
        columns = {key: rows[key][:e.usable] for key in self.action_keys}
        for key, width in zip(self.action_keys, self.widths):
            if columns[key].shape != (e.usable, width):
                raise Bad(f'{key} has shape {columns[key].shape} in episode {e.index}, expected '
                          f'{e.usable, width} by info.json', path)
        wrong = ~np.isfinite(np.concatenate(list(columns.values()), 1)).all(1)
        if wrong.any():
            warn(f'{self.name}, episode {e.index}: {wrong.sum()} rows of '
                 f'{", ".join(self.action_keys)} are not as many finite numbers as most: masked '
                 '(others like it are not named)', cause=f'{self.name} rows')
        return columns

    def frames(self, episode, numbers, size=0, camera=''):
        """uint8 (n, 3, H, W) of a camera, the first chosen if none is named, at numbers of frames.
        """
        e = self.episodes[episode]
        camera = camera or self.camera
        if len(numbers) == 0 or min(numbers) < 0 or max(numbers) >= e.length:
            raise ValueError(f'{self.root}: episode {e.index} has {e.length} frames, not '
                             f'{[*map(int, numbers)]}')
        path = self.place(e, camera)
        at = self._at(numbers)
        there = self._where(episode, camera)
        if max(at) >= len(there):
            raise Bad(f'has {len(there)} frames of episode {e.index}, not {max(at) + 1}', path)
        if camera in e.video:
            return self.read(read_frames, path, there[at], size)
        return self.read(self._pictures, path, there[at], size, camera)

    def _pictures(self, path, rows, size, camera):
        """uint8 (n, 3, H, W) of rows of an image column."""
        out = []
        with reading(path):
            meta = pq.read_metadata(path)
            if camera not in pq.read_schema(path).names:
                raise Bad(f'no column {camera}')
            groups = range(meta.num_row_groups)
            ends = np.cumsum([meta.row_group(group).num_rows for group in groups])
            for row in rows:
                group = int(np.searchsorted(ends, row, 'right'))
                column = _row_group(path, group, camera)
                cell = column[int(row - ends[group])].as_py()
                content = cell
                if isinstance(cell, dict):
                    content = cell.get('bytes') or cell.get('path')
                if isinstance(content, str):        # a file beside the table
                    beside = inside(self.root, '{path}', path=content)
                    content = self.read(Path.read_bytes, Path(beside))
                if not isinstance(content, bytes):
                    raise Bad(f'{camera}, {column.type}, has no picture in row {row}')
                out.append(decode_picture(content, size))
        return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)

    def task(self, e, j):
        """In words, what is done at frame j; of several tasks the row tells which."""
        if len(e.tasks) > 1:
            with suppress(Bad, LookupError, ValueError, OverflowError):     # it does not
                numbers = self._rows_of(e, (*self.columns, 'task_index'))['task_index']
                return self.words[int(numbers[self._at(j), 0])]
        return e.tasks[0] if e.tasks else ''

    def clip(self, episode, start, T, frameskip, size=0, pixels=True, camera=''):
        """dict(x, a, a_mask, z_mask, task): T model steps of `frameskip` dataset frames each.

        x (T, 3, H, W) uint8 is frame f(t) = start + t frameskip of the episode. Row i of the
        dataset's actions is what was done after frame i, so a[t] (frameskip * action_dim,) float32,
        raw, holds rows f(t-1) .. f(t)-1: what led from x[t-1] to x[t]. a_mask (T,) is False where
        that is not known: at t = 0, in padding, and where a row is not finite; a is 0 there. Past
        the end the last real frame is repeated and z_mask (T,) is False. pixels=False: no x.
        """
        e = self.episodes[episode]
        if not 0 <= start < e.length:
            raise ValueError(f'{self.root}: episode {e.index} has {e.length} frames, not {start}')
        f = start + np.arange(T) * frameskip
        z_mask = f < e.length
        real = int(z_mask.sum())
        a = np.zeros((T, frameskip * self.action_dim), np.float32)
        a_mask = np.zeros(T, bool)
        rows = self.rows(episode)[start:f[real - 1]]
        a[1:real] = rows.reshape(real - 1, a.shape[1])
        a_mask[1:real] = np.isfinite(a[1:real]).all(1) & (self.action_dim > 0)
        a[~a_mask] = 0
        clip = dict(a=torch.from_numpy(a), a_mask=torch.from_numpy(a_mask),
                    z_mask=torch.from_numpy(z_mask), task=self.task(e, start))
        if pixels:
            clip['x'] = self.frames(episode, np.minimum(f, f[real - 1]), size, camera)
        return clip

    def fingerprint(self, camera=''):
        """What tells a camera's frames, or all frames and actions, from others, wherever they lie:
        the hub's revision, or a hash of some of each file and of which frame is where."""
        if self.hub:
            return self.hub.revision
        found = hashlib.sha256()
        paths = []
        for i, e in enumerate(self.episodes):
            for key in [camera] if camera else [*self.chosen, *self.columns]:
                found.update(self._where(i, key)[:e.usable].tobytes())
                paths.append(self.place(e, key))
        for path in dict.fromkeys(paths):
            size = os.path.getsize(path)
            with open(path, 'rb') as f:
                for at in 0, size // 2:
                    f.seek(at)
                    found.update(f.read(PROBE))
            found.update(b'%d' % size)
        return found.hexdigest()


def flat_names(names):
    """A feature's names as a list: they are one, or a list of lists, {'motors': [..]} or
    {name: place}."""
    if isinstance(names, dict):
        nested = [value for value in names.values() if isinstance(value, list)]
        names = nested or list(names)
    out = []
    for name in names or []:
        out += name if isinstance(name, list) else [name]
    return [str(name) for name in out]


def numbers_of_file(row, prefix):
    return {name: int(row[f'{prefix}/{name}']) for name in ('chunk_index', 'file_index')}


def weighted(text):
    """'a:2,b' -> [('a', 2.0), ('b', None)]: a comma-separated list and the weights that are given.
    """
    out = []
    for part in text.split(','):
        match = re.fullmatch(r'(.+?)(:(\d*\.?\d+(e[+-]\d+)?))?', part.strip())
        if match:
            out.append((match[1], match[3] and float(match[3])))
    return out


def open_sets(text, *options):
    """The datasets of a comma-separated list ('folder:2,owner/name:1': with weights), opened with
    LeRobot's options."""
    sets = []
    for name, weight in weighted(text):
        if weight == 0:
            sys.exit(f'{text}: wants weights above 0')
        sets.append(LeRobot(name, *options))
        sets[-1].weight = weight or 0.0
    if len({ds.weight > 0 for ds in sets}) > 1:
        sys.exit(f'{text}: wants a weight for every dataset, or for none')
    return sets


# --------------------------------------------------------------------------------------------------
# LeRobot in: motions between poses

_norm = partial(np.linalg.norm, axis=1, keepdims=True)


def _matrices(r, rotation):
    """(n, 3, 3): the rotation matrices of r (n, k), one of ROTATIONS; NaN where r is no rotation.
    """
    if rotation == 'euler':     # about the fixed axes x, then y, then z
        x, y, z = (_matrices(r[:, i:i + 1] * np.eye(3)[i], 'rotvec') for i in range(3))
        return z @ y @ x
    if rotation in ('rot6d', 'rot6d_rows'):     # R's first two columns, in UMI and GR00T its rows,
        x = r[:, :3] / _norm(r[:, :3])          # made orthonormal: arXiv:1812.07035
        z = np.cross(r[:, :3], r[:, 3:])
        z = z / _norm(z)
        return np.stack([x, np.cross(z, x), z], axis=2 if rotation == 'rot6d' else 1)
    if rotation == 'rotvec':    # np.sinc(x) is sin(pi x) / (pi x)
        half = _norm(r) / 2
        r = np.hstack([np.cos(half), np.sinc(half / np.pi) / 2 * r])
    if rotation == 'quat_xyzw':
        r = np.roll(r, 1, axis=1)
    w = r[:, None, :1]                          # (n, 1, 1)
    v = r[:, None, 1:]                          # (n, 1, 3)
    cross = np.cross(np.eye(3), v)              # cross @ u is the cross product v x u
    return np.eye(3) + 2 * (w * cross + cross @ cross) / (w * w + (v * v).sum(2, keepdims=True))


def _rotation_vectors(R):
    """(n, 3) of rotation matrices (n, 3, 3), in radians, at most pi long."""
    # 4 q q^T of the quaternion q = w x y z; its row with the greatest diagonal keeps all digits
    trace = np.trace(R, axis1=1, axis2=2)[:, None, None]
    odd = (R - R.swapaxes(1, 2))[:, None, [2, 0, 1], [1, 2, 0]]
    even = R + R.swapaxes(1, 2) + (1 - trace) * np.eye(3)
    qq = np.block([[1 + trace, odd], [odd.swapaxes(1, 2), even]])
    q = qq[np.arange(len(qq)), qq.diagonal(axis1=1, axis2=2).argmax(1)]
    q = q / _norm(q)
    w = q[:, :1]
    v = q[:, 1:]
    half = np.arctan2(_norm(v), np.abs(w))      # of the angle; |v| is its sine
    return 2 * v / np.copysign(np.sinc(half / np.pi), w)


@np.errstate(all='ignore')  # what is no pose becomes NaN
def pose_deltas(before, after, rotation, tool):
    """(n, 6) float64: motions from pose to pose, 3 of translation and 3 of rotation vector.

    before, after (n, 3 + k): x y z, then k of ROTATIONS. euler is R = Rz(yaw) Ry(pitch) Rx(roll),
    as DROID has it. In the base frame p1 - p0 and log(R1 R0^T); in the tool's before the motion
    R0^T times both. A NaN fills its row.
    """
    before = np.float64(before)
    after = np.float64(after)
    R0 = _matrices(before[:, 3:], rotation)
    R1 = _matrices(after[:, 3:], rotation)
    turn = _rotation_vectors(R1 @ R0.swapaxes(1, 2))
    out = np.stack([after[:, :3] - before[:, :3], turn], axis=1)            # (n, 2, 3)
    if tool:
        out = out @ R0      # each row times R0^T from the left
    out[~np.isfinite(out).all((1, 2))] = np.nan
    return out.reshape(-1, 6)


# --------------------------------------------------------------------------------------------------
# LeRobot out

@dataclass
class Writer:
    """Writes a LeRobot v3.0 dataset, under a name of this process until it is whole.

    with Writer('pusht', fps=10) as writer:
        writer.add(frame, action, state)    # for each frame: what it shows, and is done after it
        writer.end_episode('push the T')
    """
    root: str
    fps: float
    names: dict = None      # of dimensions of columns, {'action': [...]}
    robot_type: str = ''
    crf: int = 18
    gop: int = 2            # frames from key frame to key frame: few keep random clips cheap
    file_mb: float = 200    # once a video is so large, the next episode begins new files

    def __post_init__(self):
        if os.path.lexists(self.root):
            sys.exit(f'{self.root}: exists already, will not write over it')
        self.root = os.path.normpath(self.root)
        if weighted(self.root) != [(self.root, None)]:      # no --labelled could name it
            sys.exit(f'{self.root}: wants a name without a comma, and without :number at its end')
        self.tmp = own_tmp(self.root)
        for left in glob.glob(glob.escape(self.root) + '.*@*.tmp'):
            if not os.path.exists(f'{left}/meta/info.json'):        # which comes last
                own(left).close()       # ends the program while it is written
                shutil.rmtree(left)
        self.lock = own(self.tmp)
        if self.fps == int(self.fps):
            self.fps = int(self.fps)
        self.tasks = {}         # {words: number}
        self.rows = []          # of meta/episodes
        self.stats = []         # of every episode
        self.shapes = {}        # {camera: of its frames}
        self.total = 0          # frames of whole episodes
        self.number = -1        # of the present files: ...
        self.videos = {}        # ... {camera: container}
        self.sizes = {}         # ... {camera: bytes}
        self._begin_episode()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        with writing(self.tmp):
            if getattr(error, 'errno', None) in OUR_DISK:
                raise error
            if kind is None:
                self.close()

    def _begin_episode(self):
        self.length = 0
        self.vectors = defaultdict(list)    # {column: rows}
        self.small = defaultdict(list)      # {camera: some frames, for statistics}

    def add(self, frame, action=None, state=None, extra=None):
        """A frame, uint8 (H, W, 3), of the camera 'render', or {camera: frame}. Vectors of its row:
        the action that is done after it, the robot's state, and {column: vector}."""
        frames = frame if isinstance(frame, dict) else {'render': frame}
        frames = {f'observation.images.{name}': x for name, x in frames.items()}
        size = max(self.sizes.values(), default=math.inf)
        if self.length == 0 and size >= self.file_mb * 2 ** 20:
            self._begin_files(frames)
        assert frames.keys() == self.videos.keys(), f'{[*frames]} now, {[*self.videos]} before'
        for key, x in frames.items():
            shape = self.shapes.setdefault(key, x.shape)
            assert x.shape == shape, f'frame {self.length}: {key} is {x.shape} now, was {shape}'
            self.sizes[key] += _encode(self.videos[key], x, self.first + self.length, self.fps,
                                       crf=str(self.crf), g=str(self.gop))
            if (self.length + 1) % ((self.length + 1) // 32 + 1) == 0:      # fewer and fewer
                self.small[key].append(x[::len(x) // 64 or 1, ::x.shape[1] // 64 or 1].copy())
        self.length += 1
        for key, vector in {'observation.state': state, 'action': action, **(extra or {})}.items():
            if vector is not None and np.size(vector):
                self.vectors[key].append(np.array(vector, np.float32))

    def _begin_files(self, cameras):
        self._end_files()
        self.number += 1
        self.first = 0          # frames of whole episodes in them
        self.table = None
        for key in cameras:
            path = f'{self.tmp}/videos/{key}/chunk-000/file-{self.number:03d}.mp4'
            make_folder_of(path)
            self.videos[key] = av.open(path, 'w', **MP4)
            self.sizes[key] = 0

    def _end_files(self):
        for container in self.videos.values():
            finish(container)
        if self.videos and self.table:      # no table: none of their episodes is whole
            self.table.close()

    def end_episode(self, task):
        """Make an episode, of a task in words, of the frames since the last one."""
        L = self.length
        i = len(self.rows)
        frame = np.arange(L)[:, None]
        numbers = dict(timestamp=np.float32(frame / self.fps), frame_index=frame,
                       episode_index=0 * frame + i, index=self.total + frame,
                       task_index=0 * frame + self.tasks.setdefault(task, len(self.tasks)))
        vectors = {k: np.stack(rows) for k, rows in self.vectors.items()}       # (L, width)
        pictures = {k: np.stack(x).reshape(-1, 3, 1, 1) / 255 for k, x in self.small.items()}
        stats = {k: _describe(x) for k, x in (vectors | pictures | numbers).items()}
        self._write_rows(vectors | numbers)
        row = {'episode_index': i, 'tasks': [task], 'length': L, 'data/chunk_index': 0,
               'data/file_index': self.number, 'dataset_from_index': self.total,
               'dataset_to_index': self.total + L}
        for key in pictures:
            stats[key]['count'] = np.array([L])
            row |= {f'videos/{key}/chunk_index': 0, f'videos/{key}/file_index': self.number,
                    f'videos/{key}/from_timestamp': self.first / self.fps,
                    f'videos/{key}/to_timestamp': (self.first + L) / self.fps}
        for key, values in stats.items():
            row |= {f'stats/{key}/{name}': value.tolist() for name, value in values.items()}
        self.rows.append(row | {'meta/episodes/chunk_index': 0, 'meta/episodes/file_index': 0})
        self.stats.append(stats)
        self.total += L
        self.first += L
        self._begin_episode()
        progress(f'writing {self.root}:', f'{i + 1} episodes, {self.total:,} frames')

    def _write_rows(self, columns):
        self.features = {}
        cells = {}
        for key, x in columns.items():
            assert len(x) == self.length, f'{len(x)} of {key}, {self.length} frames'
            width = x.shape[1]
            names = (self.names or {}).get(key)
            self.features[key] = dict(dtype=str(x.dtype), shape=[width], names=names)
            cells[key] = x.ravel()          # lerobot wants plain numbers for width 1
            if width > 1:
                cells[key] = pa.FixedSizeListArray.from_arrays(cells[key], width)
        cells = pa.table(cells)
        if not self.table:
            path = f'{self.tmp}/data/chunk-000/file-{self.number:03d}.parquet'
            make_folder_of(path)
            self.table = pq.ParquetWriter(path, cells.schema)
        self.table.write_table(cells)       # one table, one row group

    def close(self):
        """Write the metadata, and give the folder its name."""
        assert self.rows, f'{self.root}: no episodes to write'
        self._end_files()
        meta = f'{self.tmp}/meta'
        os.makedirs(f'{meta}/episodes/chunk-000')
        stats = {}
        for key in self.stats[0]:
            pooled = _pool([part[key] for part in self.stats])
            stats[key] = {name: value.tolist() for name, value in pooled.items()}
        rows = pa.Table.from_pylist(self.rows)
        pq.write_table(rows, f'{meta}/episodes/chunk-000/file-000.parquet')
        # lerobot looks for the text in the index that pandas makes
        index = dict(name='task', field_name='task', pandas_type='unicode', numpy_type='object',
                     metadata=None)
        pandas = json.dumps(dict(index_columns=['task'], column_indexes=[], columns=[index]))
        words = pa.array(self.tasks, pa.large_string())
        tasks = pa.table({'task_index': [*self.tasks.values()], 'task': words},
                         metadata={'pandas': pandas})
        pq.write_table(tasks, f'{meta}/tasks.parquet')
        for name, value in ('stats', stats), ('info', self._info()):
            Path(f'{meta}/{name}.json').write_text(json.dumps(value, indent=4))
        self.lock.close()
        os.remove(self.lock.name)
        os.rename(self.tmp, self.root)      # fails if that is there by now; the first one stays

    def _info(self):
        for key, (H, W, _) in self.shapes.items():
            H += H % 2
            W += W % 2
            info = {'video.height': H, 'video.width': W, 'video.codec': 'h264', 'video.channels': 3,
                    'video.pix_fmt': 'yuv420p', 'video.fps': self.fps, 'video.g': self.gop,
                    'video.crf': self.crf, 'video.preset': None, 'video.fast_decode': 0,
                    'video.video_backend': 'pyav', 'video.extra_options': {'bf': '0'},
                    'has_audio': False, 'is_depth_map': False}
            self.features[key] = dict(dtype='video', shape=[H, W, 3], info=info,
                                      names=['height', 'width', 'channels'])
        return dict(codebase_version='v3.0', fps=self.fps, features=self.features,
                    total_episodes=len(self.rows), total_frames=self.total,
                    total_tasks=len(self.tasks), chunks_size=1000, data_files_size_in_mb=100,
                    video_files_size_in_mb=max(1, int(self.file_mb)),
                    robot_type=self.robot_type or None, splits={'train': f'0:{len(self.rows)}'},
                    data_path=PATHS['v3']['data'], video_path=PATHS['v3']['video'])


def _shown(path):
    """Yield the frames of any video, the seconds from the first until halfway to the next frame,
    and its frames a second."""
    with reading(path), video_stream(open(path, 'rb')).container as container:
        stream = container.streams.video[0]
        if stream.start_time is None:
            raise Bad('no video with times in it')
        stream.thread_type = 'AUTO'
        rate = float(stream.average_rate or 30)
        frame = None
        for after in container.decode(stream):      # a file's durations are of decoding, if any
            then = after.time or 0.0
            if frame:
                yield frame, (now + then) / 2 - start, rate
            else:
                start = then
            frame, now = after, then
        if frame:
            duration = frame.duration * frame.time_base or 1 / rate
            yield frame, now + duration / 2 - start, rate


def import_videos(root, pattern, fps=0, size=(0, 0)):
    """Write plain videos, 'folder/*.mp4', as a dataset without actions, an episode each. All come
    upright, in one size and at one rate, by nearest time; 0: the first's. What cannot be read is
    named."""
    writer = None
    for path in sorted(glob.glob(pattern, recursive=True)):
        written = 0
        try:
            for frame, until, rate in _shown(path):
                rgb = _upright(frame, size)
                if until > written / (fps or rate) + 600:
                    raise Bad('shows nothing for 10 minutes', path)
                if writer is None:
                    fps = fps or min(round(rate, 3), 1000)
                    size = rgb.shape[:2]
                    writer = Writer(root, fps)
                while written / fps < until + 1e-6:     # halfway between two, the earlier one
                    writer.add({'video': rgb})
                    written += 1
        except Bad as error:
            print(error, flush=True)
        if written:
            writer.end_episode(Path(path).stem)
    if writer is None:
        sys.exit(f'--videos={pattern}: no video there that can be read')
    writer.close()


# --------------------------------------------------------------------------------------------------
# robomimic's HDF5 in (robomimic.github.io/docs/datasets/overview.html): data/demo_0 .. hold obs/*,
# actions and states (the simulator's), a row of each for every frame; an action is done after its
# frame is seen. data's attribute env_args is JSON; mask/* are lists of demos.

HDF5 = dict(actions='action', object=ENVIRONMENT, states=ENVIRONMENT)


def hdf5_rows(demo, state):
    """{key: (column of LeRobot, or 'image', rows)} of a demo. What the robot senses: the keys in
    state, or else robot*. Of a real robot, states are empty."""
    out = {}
    for key, x in {**demo, **demo.get('obs', {})}.items():
        shape = getattr(x, 'shape', ())     # groups have none
        if shape[3:] == (3,) and x.dtype == np.uint8:
            out[key] = 'image', x
        elif key in state or not state and key.startswith('robot') and len(shape) < 3:
            out[key] = 'observation.state', x
        elif key in HDF5 and x.size:
            out[key] = HDF5[key], x
    return out


def hdf5_demos(group, names, state):
    """hdf5_rows of the demos called so, by number; a Bad where they are not one dataset."""
    state = {*state.split(',')} - {''}
    demos = []
    for name in sorted(names, key=lambda name: [int(n) for n in re.findall(r'\d+', name)]):
        demo = group.get(name, {})
        rows = hdf5_rows(demo, state)
        missing = ({'actions'} | state) - rows.keys()
        if missing or 'image' not in dict(rows.values()):
            raise Bad(f'{name} has no {", ".join(missing) or "images"}, only '
                      f'{", ".join(demo.get("obs", demo))}: images, too, are extracted first, by '
                      'robomimic\'s dataset_states_to_obs.py')
        demos.append(rows)
        length = len(rows['actions'][1])
        wants = {key: (length, *x.shape[1:]) for key, (_, x) in demos[0].items()}
        has = {key: x.shape for key, (_, x) in rows.items()}
        if has != wants:
            raise Bad(f'{name} has rows of {has}; its actions and the demo before want {wants}')
    return demos


def import_hdf5(root, path, state='', filter_key=''):
    """Write robomimic's demos, all or those of a filter key, as a dataset, an episode each."""
    try:
        import h5py
    except ImportError:
        sys.exit(f'--hdf5={path} needs: pip install h5py')
    with reading(path), h5py.File(path, rdcc_nbytes=1 << 27) as file:   # a chunk is many frames
        group = file.get('data', {})
        mask = file.get(f'mask/{filter_key}', []) if filter_key else map(str.encode, group)
        demos = hdf5_demos(group, map(bytes.decode, mask), state)
        if not demos:
            raise Bad(f'has no demos; filter keys: {[*file.get("mask", [])]}')
        env = json.loads(group.attrs.get('env_args', '{}'))
        fps = env.get('env_kwargs', {}).get('control_freq') or 20       # robosuite's own
        names = defaultdict(list)
        for key, (column, x) in demos[0].items():
            names[column] += [f'{key}_{i}' for i in range(x[0].size)]
        with Writer(root, fps, names) as writer:
            for rows in demos:
                for i in range(len(rows['actions'][1])):
                    frames = {}
                    vectors = defaultdict(list)
                    for key in demos[0]:        # each demo may list them in an order of its own
                        column, x = rows[key]
                        if column == 'image':
                            camera = key.removesuffix('_image')
                            if camera in frames:
                                raise Bad(f'has two cameras {camera}: {camera} and {camera}_image')
                            frames[camera] = x[i]
                        else:
                            vectors[column] += x[i].ravel().tolist()
                    writer.add(frames, extra=vectors)
                writer.end_episode(env.get('env_name', ''))


# --------------------------------------------------------------------------------------------------
# batches

SEGMENT = 2048      # windows kept together while an epoch is put in order: an hour of video is many
BLOCK = 1 << 16     # windows that are shuffled among each other
AHEAD = 16          # batches whose files are fetched from the hub before their turn


class Order:
    """Windows of T steps in some episodes: [i] is an (episode, start), each once in `count`. At
    most `files` files of a hub dataset are mixed."""

    def __init__(self, ds, episodes, T, frameskip, files, *seed):
        self.seed = seed
        units = []      # of segments: end, windows, episode, file
        numbers = {}    # of files
        for e in episodes:
            windows = max(1, ds.episodes[e].length - (T - 1) * frameskip)   # a short one is padded
            file = str(ds.episodes[e].video.get(ds.camera, ds.episodes[e].data)) if ds.hub else ''
            number = numbers.setdefault(file, len(numbers))
            for begin in range(0, windows, SEGMENT):
                end = min(begin + SEGMENT, windows)
                units.append((end, end - begin, e, number))
        self.units = np.array(units)
        self.count = int(self.units[:, 1].sum())
        self.block = max(1, min(BLOCK, self.count * files // len(numbers)))

    @lru_cache(maxsize=64)
    def _block(self, epoch, block):
        """(n, 2): episodes and starts of a block. Segments are in random order, but one file is
        used up before the next one comes."""
        rng = np.random.default_rng((*self.seed, epoch))
        within = rng.random(len(self.units))
        files = rng.random(len(self.units))[self.units[:, 3]]
        units = self.units[np.lexsort((within, files))]
        ends = np.cumsum(units[:, 1])
        i = np.arange(block * self.block, min((block + 1) * self.block, self.count))
        np.random.default_rng((*self.seed, epoch, block)).shuffle(i)
        u = np.searchsorted(ends, i, 'right')
        return np.stack([units[u, 2], units[u, 0] - (ends[u] - i)], 1)

    def __getitem__(self, i):
        epoch, i = divmod(i, self.count)
        return tuple(self._block(epoch, i // self.block)[i % self.block].tolist())


def text_bytes(words, most=128):
    """Words as WorldModel.read takes them, (most,) uint8: UTF-8, cut there, and zeros after it."""
    text = str(words).encode(errors='replace')
    return torch.tensor([*text[:most].ljust(most, b'\0')], dtype=torch.uint8)


def hold_out(indices, val_share):
    """Positions of the episodes that are trained on, and of the share that is held out, by their
    indices in the dataset: where it grows, or one cannot be read, the others stay what they were.
    """
    share = Fraction(val_share).limit_denominator(1000)
    val = [p for p, i in enumerate(indices) if (i * share + Fraction(1, 2)) % 1 < share]
    if not val:
        val = [len(indices) // 2]
    if len(val) == len(indices):
        val = val[1:]
    return sorted({*range(len(indices))} - {*val}), val


@dataclass(eq=False)
class Clips:
    """Batches of clips from two lists of LeRobot; those of all ranks together depend on (seed,
    step) alone, and every rank has its part of them.

    A batch holds x (B, T, 3, H, W) uint8, or z (B, T, N, D) float16 once `tokens` are set (see
    cached_latents); a (B, T, A) normalised by each dataset's mean and std, padded to the widest;
    a_mask, z_mask (B, T); s (B, T, S), the state, normalised and padded likewise, NaN where it is
    not known, and in all unlabelled clips; text (B, 128) uint8, see text_bytes; with goal_steps
    `goal`, see goal_of; and `faults`, for count_faults. Of any 1/labelled_share consecutive clips
    exactly one is labelled. All datasets of a kind share clips exactly, by duration or the weights
    given; every window of one is seen once before any again. Cameras are drawn by weight. A clip
    that cannot be read is replaced by one of its dataset.
    """
    labelled: list
    unlabelled: list
    T: int
    frameskip: int
    size: tuple             # of frames
    batch_size: int         # of this rank
    labelled_share: float
    val_share: float        # of episodes, which are held out
    seed: int = 0
    rank: int = 0
    world: int = 1
    augment: float = 0.0    # share of the clips of batches that are seen_otherwise
    goal_steps: int = 0     # clips of batches have a goal, up to so many model steps after them
    memories: range = range(0)      # so many model steps before a batch's clips are more frames
    probed: bool = False    # clips of batches have p, see clip_and_probe
    tokens: dict = None

    def __post_init__(self):
        self.bad = set()        # names of episodes that could not be read
        self.sets = self.labelled + self.unlabelled
        first = len(self.labelled)
        self.kinds = dict(labelled=range(first), unlabelled=range(first, len(self.sets)))
        share = self.labelled_share if self.labelled and self.unlabelled else bool(self.labelled)
        self.share = Fraction(share).limit_denominator(10 ** 6)
        self.A = self.frameskip * max([ds.action_dim for ds in self.labelled], default=0)
        self.train = []         # episodes of each dataset
        self.val = []
        self.orders = []
        weights = []
        for s, ds in enumerate(self.sets):
            n = len(ds.episodes)
            if n < 2:
                sys.exit(f'{ds.root}: has {n} episode, splitting off whole episodes for validation '
                         'wants at least 2')
            train, val = hold_out([e.index for e in ds.episodes], self.val_share)
            self.train.append(train)
            self.val.append(val)
            files = 1
            if ds.hub:      # half of the disk cache is in use
                mb = ds.info.get('video_files_size_in_mb') or 10
                files = max(1, int(ds.hub.cache_gb * 500 / mb / len(ds.chosen)))
            order = Order(ds, self.train[s], self.T, self.frameskip, files, self.seed, 1, s)
            self.orders.append(order)
            weight = Fraction(ds.weight).limit_denominator(10 ** 6)
            weights.append(weight or order.count / exact_rate(ds.fps))
        self.S = max([ds.state_dim for ds in self.labelled], default=0)
        self.P = max([ds.probe_dim for ds in self.labelled], default=0)
        self.states = []        # of each labelled dataset: mean, std, change (state_dim,)
        robots = []
        for ds in self.labelled:
            kind = ds.info.get('robot_type')
            robots.append((ds.name if kind in (None, '', 'unknown') else kind, *ds.state_names))
        for robot in robots:    # those of one robot have them in common: a place is one number
            if robot in robots[:len(self.states)]:
                self.states.append(self.states[robots.index(robot)])
                continue
            same = [pair for r, *pair in zip(robots, self.labelled, self.train) if r == robot]
            self.states.append(measure_states(same, self.frameskip))
        # what each dataset takes of the clips which those of its kind before it leave
        self.takes = []
        for kind in self.kinds.values():
            self.takes += [weights[s] / sum(weights[s:kind.stop]) for s in kind]

    def picks(self, step):
        """The (dataset, episode, start, camera) of each clip of a batch, without reading any."""
        begin = self.rank * self.batch_size
        return self.picks_of_all(step)[begin:begin + self.batch_size]

    @lru_cache(maxsize=4 * AHEAD)
    def picks_of_all(self, step):
        """As picks, of the batches of all ranks: a run may go on with another number of them."""
        rng = np.random.default_rng((self.seed, step))
        total = self.batch_size * self.world
        out = []
        for n in range(step * total, (step + 1) * total):
            # of the first n clips, floor(n share) are labelled
            before = math.floor(n * self.share)
            kind = 'labelled'
            if math.floor((n + 1) * self.share) == before:
                before = n - before
                kind = 'unlabelled'
            n = before                      # among those of its kind
            for s in self.kinds[kind]:      # of n clips that reach s, it takes floor(n takes[s])
                number = math.floor(n * self.takes[s])
                if math.floor((n + 1) * self.takes[s]) > number:
                    break
                n -= number
            cameras = self.sets[s].chosen
            weights = np.array(list(cameras.values()))
            camera = str(rng.choice(list(cameras), p=weights / weights.sum()))
            out.append((s, *self.orders[s][number], camera))
        # the loss treats the first rows in a way of its own: they must not be of one kind
        return [out[i] for i in rng.permutation(len(out))]

    def clip(self, s, e, start, camera, T):
        """One clip of dataset s, episode e, as it goes into a batch."""
        ds = self.sets[s]
        if not self.tokens:
            clip = ds.clip(e, start, T, self.frameskip, self.size, True, camera)
        else:
            clip = ds.clip(e, start, T, self.frameskip, pixels=False)
            real = int(clip['z_mask'].sum())
            numbers = start + np.minimum(np.arange(T), real - 1) * self.frameskip
            clip['z'] = torch.from_numpy(self.latents(s, e, camera, numbers))       # (T, N, D)
        a = torch.zeros(T, self.A)
        if s in self.kinds['labelled']:
            mean = torch.from_numpy(ds.stats['mean']).repeat(self.frameskip)
            std = torch.from_numpy(ds.stats['std']).repeat(self.frameskip)
            known = clip['a_mask'][:, None] & (std > 1e-6)      # one that never moves stays 0
            a[:, :len(mean)] = torch.where(known, (clip['a'] - mean) / std, 0.0)
        else:
            clip['a_mask'].zero_()
        clip['a'] = a
        if self.S:
            clip['s'] = torch.full((T, self.S), torch.nan)
            if s in self.kinds['labelled'] and ds.state_dim:
                mean, std, _ = self.states[s]
                f = self.frames_of(s, e, start, T)
                now = torch.from_numpy(ds.states(e)[f]) - mean
                clip['s'][:, :len(mean)] = torch.where(std > 1e-6, now / std, 0 * now)
        clip['text'] = text_bytes(clip.pop('task'))
        return clip

    def frames_of(self, s, e, start, T):
        """Numbers of a clip's frames, the last one again where an episode is over."""
        last = self.sets[s].episodes[e].length - 1
        return np.minimum(start + np.arange(T) * self.frameskip, last)

    def clip_and_probe(self, s, e, start, camera, T):
        """A clip with p (T, P) as well: what a probe is to read, as the dataset has it, or NaN; and
        `at` (3,): dataset, episode, first frame."""
        clip = self.clip(s, e, start, camera, T) | dict(at=torch.tensor([s, e, start]))
        if self.P:
            clip['p'] = torch.full((T, self.P), torch.nan)
            if s in self.kinds['labelled'] and self.sets[s].probe_dim:
                f = self.frames_of(s, e, start, T)
                clip['p'] = torch.from_numpy(self.sets[s].probed(e)[f])
        return clip

    def with_memories(self, clip, s, e, start, camera, rng):
        """Put its memories in front of a clip. z_mask hides those before the episode, and as many
        of the first as chance says, so that models learn to do with any number."""
        most = min(start // self.frameskip, rng.integers(self.memories.stop))
        for steps in self.memories:
            at = max(0, start - steps * self.frameskip)
            old = self.clip(s, e, at, camera, 1)
            old['z_mask'][:] = bool(steps <= most)
            for name in {*old} - {'text'}:
                clip[name] = torch.cat((old[name], clip[name]))

    def goal_of(self, clip, s, e, start, camera, seed):
        """A later frame of a clip's episode, or its last, as a clip of one step; and `left`, model
        steps from the clip's first frame. Of a clip without actions, from which no policy learns,
        its own first frame."""
        if s not in self.kinds['labelled']:
            first = {name: v[:1] for name, v in clip.items() if name not in ('p', 'at')}
            return first | dict(text=clip['text'], left=0)
        steps = np.random.default_rng((*seed, 101)).integers(self.goal_steps) + 1
        end = (self.sets[s].episodes[e].length - 1 - start) // self.frameskip
        left = min(int(clip['z_mask'].sum()) - 1 + int(steps), end)
        return self.clip(s, e, start + left * self.frameskip, camera, 1) | dict(left=left)

    def latents(self, s, e, camera, numbers):
        """Cached latents (n, N, D) of some frames."""
        latents = self.tokens[s, e, camera]
        if isinstance(latents, Bad):
            raise latents
        rows = latents[numbers]
        if 'scale' in rows.dtype.names:
            return rows['z'] * rows['scale'][:, None]
        return rows['z']

    def __getitem__(self, step):
        self.prefetch(step)
        faults = []     # [episode, what is wrong with it]
        begin = self.rank * self.batch_size
        try:
            clips = [self.read_or_replace(step, begin + i, faults) for i in range(self.batch_size)]
            batch = default_collate(clips)
        except (Bad, Away) as error:        # what a worker raises would come with its traceback
            batch = dict(end=str(error))
        faults += [['', line] for line in _unsent]
        _unsent.clear()
        return batch | dict(faults=faults)

    def prefetch(self, step):
        """Let four threads work ahead of this step and worker, if there are files of the hub."""
        running = [thread.name for thread in threading.enumerate()]
        stride = getattr(get_worker_info(), 'num_workers', 1)
        for k in range(1, 5):
            name = f'prefetch {id(self)} {k}'
            if name not in running and any(ds.hub for ds in self.sets):
                steps = range(step + k * stride, step + AHEAD * stride, 4 * stride)
                threading.Thread(target=self.fetch, args=(steps,), name=name, daemon=True).start()

    def fetch(self, steps):
        """Bring the files of some batches from the hub."""
        for step in steps:
            for s, e, _, camera in self.picks(step):
                ds = self.sets[s]
                with suppress(Bad, Away, OSError):       # the reader will meet it, too
                    for path, video in ds.files(ds.episodes[e], camera).items():
                        if ds.hub and not (video and self.tokens):
                            ds.hub.fetch(path)

    def read_or_replace(self, step, i, faults):
        """Clip i of the batches of all ranks, or one that takes its place; which must not depend on
        what was read before."""
        picks = self.picks_of_all(step)
        s, e, start, camera = picks[i]
        ds = self.sets[s]
        for attempt in range(100):
            try:
                read = self.clip_and_probe if self.probed else self.clip
                clip = read(s, e, start, camera, self.T)
                rng = np.random.default_rng((self.seed, step, i, 100))
                otherwise = rng.random() < self.augment
                if self.goal_steps:
                    clip['goal'] = self.goal_of(clip, s, e, start, camera, (self.seed, step, i))
                if self.memories:
                    self.with_memories(clip, s, e, start, camera, rng)
                if otherwise and self.goal_steps:
                    x = seen_otherwise(torch.cat((clip['x'], clip['goal']['x'])), rng)
                    clip['x'], clip['goal']['x'] = x[:-1], x[-1:]
                elif otherwise:
                    clip['x'] = seen_otherwise(clip['x'], rng)
                return clip
            except Bad as error:
                name = f'{ds.name}, episode {ds.episodes[e].index}'
                faults.append([name, str(error)])
            rng = np.random.default_rng((self.seed, step, i, attempt))
            others = [pick[1:] for pick in picks if pick[0] == s and pick[1] != e]
            if ds.hub and others:       # whose files have come, perhaps
                e, start, camera = others[rng.integers(len(others))]
            else:
                e, start = self.orders[s][int(rng.integers(self.orders[s].count))]
        raise Bad(f'100 clips in a row cannot be read, at last {faults[-1][1]}', name)

    def count_faults(self, batch, max_bad):
        """Print, once, what a batch (taken out of it) says is wrong; end the run if too many
        episodes are bad."""
        for episode, line in batch.pop('faults', ()):
            if episode not in self.bad:
                warn(f'{episode}: skipped: {line}' if episode else line, everywhere=True)
            if episode:
                self.bad.add(episode)
        dropped = sum(len(ds.dropped) for ds in self.sets)
        bad = dropped + len(self.bad)
        episodes = dropped + sum(len(ds.episodes) for ds in self.sets)
        if bad > max_bad * episodes:
            sys.exit(f'--max_bad={max_bad}: {bad} of {episodes} episodes cannot be read (they are '
                     'named above)')
        if 'end' in batch:
            sys.exit(batch['end'])

    def sample(self, n, m):
        """uint8 (about n m, 3, H, W): m frames of each of n training episodes; with `tokens` their
        latents (about n m, N, D), float32."""
        def frames(s, e, _, camera):
            numbers = np.linspace(0, self.sets[s].episodes[e].length - 1, m).astype(int)
            if self.tokens:
                return torch.from_numpy(self.latents(s, e, camera, numbers)).float()
            return self.sets[s].frames(e, numbers, self.size, camera)

        out = self.readable(frames, range(len(self.sets)), self.train, n, sys.maxsize)
        if not out:
            sys.exit(f'{", ".join(ds.name for ds in self.sets)}: no episode can be read')
        return torch.cat(out)

    def held_out(self, T, n):
        """{'labelled' and/or 'unlabelled': a batch of about n clips of T steps from validation
        episodes, see clip_and_probe}."""
        batches = {name: self.some(T, n, name, self.val) for name in self.kinds}
        return {name: batch for name, batch in batches.items() if batch}

    def some(self, T, n, kind, split):
        """As held_out, of one kind and of the episodes `split` of each dataset; {} if there are
        none."""
        clips = self.readable(lambda *at: self.clip_and_probe(*at, T), self.kinds[kind], split, n,
                              T)
        return default_collate(clips) if clips else {}

    def readable(self, read, kind, split, n, T):
        """[read(dataset, episode, start, camera)] of up to n windows, of all datasets in turn, that
        can be read."""
        orders = {s: Order(self.sets[s], split[s], T, self.frameskip, 4, 0) for s in kind}
        windows = []
        for i in range(n):
            for s, order in orders.items():
                if i < order.count:
                    cameras = list(self.sets[s].chosen)
                    windows.append((s, *order[i], cameras[i % len(cameras)]))
        out = []
        for s, *where in windows[:n]:
            try:
                out.append(read(s, *where))
            except Bad as error:
                warn(f'{self.sets[s].name}: left out: {error}')
        return out

    def action_stats(self):
        """{mean, std, low and high: (labelled datasets, A) of raw actions of a model step; width
        and rows: (n,)}."""
        out = {}
        for name, key in ('mean', 'mean'), ('std', 'std'), ('low', 'min'), ('high', 'max'):
            out[name] = torch.zeros(len(self.labelled), self.A)
            for row, ds in zip(out[name], self.labelled):
                values = torch.from_numpy(ds.stats[key]).repeat(self.frameskip)
                row[:len(values)] = values
        out['width'] = torch.tensor([ds.action_dim * self.frameskip for ds in self.labelled])
        out['rows'] = torch.tensor([ds.rows_each * self.frameskip for ds in self.labelled])
        return out

    def state_stats(self):
        """{mean, std and change, see measure_states: (labelled datasets, S); width: (n,)}."""
        out = {'width': torch.tensor([ds.state_dim for ds in self.labelled])}
        for i, name in enumerate(('mean', 'std', 'change')):
            out[name] = torch.zeros(len(self.labelled), self.S)
            for row, values in zip(out[name], self.states):
                row[:len(values[i])] = values[i]
        return out


def measure_states(sets, frameskip):
    """mean and std (state_dim,) of the states in some (dataset, episodes) of one robot, and the
    variance of their change in one model step: what a cost weighs them by, as a hand is quick and
    what it carries slow."""
    ds = sets[0][0]
    if not ds.state_dim:
        return [torch.zeros(0)] * 3
    states = [np.zeros((0, ds.state_dim))]
    changes = list(states)
    for ds, episodes in sets:
        stride = math.ceil(len(episodes) / 16) if ds.hub else 1
        for e in episodes[::stride]:
            with suppress(Bad):     # is counted where it is drawn
                states.append(ds.states(e))
                changes.append(states[-1][frameskip:] - states[-1][:-frameskip])
    states = np.concatenate(states)
    changes = np.concatenate(changes)
    if not len(changes):
        sys.exit(f'--state: no episode of {ds.name} can be read and is longer than a model step')
    if np.isnan(states).all(axis=0).any() or np.isnan(changes).all(axis=0).any():
        sys.exit(f'--state: {ds.name} has a number that is never finite')
    values = np.nanmean(states, 0), np.nanstd(states, 0), np.nanvar(changes, 0)
    return [torch.from_numpy(np.float32(v)) for v in values]


@dataclass
class Lengths:
    """Batches of two Clips in turn: of any 1/share consecutive steps exactly one is of the second.
    """
    short: Clips
    long: Clips
    share: float

    def which(self, step):
        """The Clips that a step takes its batch from, and the number of that batch there."""
        share = Fraction(self.share).limit_denominator(10 ** 6)
        number = math.floor(step * share)
        if math.floor((step + 1) * share) > number:
            return self.long, number
        return self.short, step - number

    def __getitem__(self, step):
        clips, number = self.which(step)
        return clips[number]


# --------------------------------------------------------------------------------------------------
# latents on disk

CHUNK = 64          # frames encoded at once
PART = 1 << 26      # bytes of a file


def cached_latents(sets, encoder, device, autocast, folder='', store='float16', workers=0, rank=0,
                   world=1):
    """The latents of all frames: {(dataset, episode, camera): array, or the Bad that says why not}.

    array[j]['z'] (N, D) of frame j is float16; or int8, to be multiplied by array[j]['scale'] (D,),
    which puts the largest |z| of each channel at 127. Without a folder they stay in memory. Else
    every dataset and camera has a folder in there, with memory-mapped files of some episodes each:
    what is there is not made again, the rest is shared out among ranks.
    """
    shape = math.prod(encoder.grid), encoder.dim
    kind = np.dtype([('z', np.float16, shape)])         # of the latents of a frame
    if store == 'int8':
        kind = np.dtype([('z', np.int8, shape), ('scale', np.float16, shape[1:])])
    settings = what_latents_depend_on(encoder, autocast, store)

    @torch.no_grad()
    def encode(x):
        with autocast:
            return for_store(encoder(x.to(device).float() / 255).float(), kind)

    latents = {}
    for s, ds in enumerate(sets):
        for camera in ds.chosen:
            place = cache_folder(folder, ds, camera, settings) if folder else ''
            parts = split(ds, kind, place)                              # {path: episodes}
            mine = {path: episodes for i, (path, episodes) in enumerate(parts.items())
                    if not folder or (i + s) % world == rank and not os.path.exists(f'{path}.npy')}
            frames = read_chunks(ds, camera, mine, settings['size'], workers, rank == 0)
            clock = time.monotonic()
            made = {}
            for path, episodes in mine.items():
                made[path] = encode_part(path, ds, episodes, frames, encode, kind, bool(folder))
            for path in parts:
                z, bad = made.get(path) or load_part(path)
                if z.dtype != kind or len(z) != sum(ds.episodes[e].length for e in parts[path]):
                    sys.exit(f'{path}: not latents of these frames ({z.dtype} {z.shape}). Remove '
                             f'{os.path.dirname(path)} to encode them again')
                for e in parts[path]:
                    length = ds.episodes[e].length
                    latents[s, e, camera] = bad.get(e, z[:length])
                    z = z[length:]
            if rank == 0:
                new = sum(len(z) for z, _ in made.values())
                print(f'{ds.name}, {camera}: latents of {ds.total:,} frames, '
                      f'{ds.total * kind.itemsize / 1e6:,.0f} MB in {place or "memory"}, {new:,} '
                      f'encoded now, {new / (time.monotonic() - clock):.0f} frames/s', flush=True)
    return latents


def what_latents_depend_on(encoder, autocast, store):
    weights = hashlib.sha256()
    for _, v in sorted(encoder.state_dict().items()):
        weights.update(v.cpu().flatten().view(torch.uint8).numpy())
    return dict(encoder=encoder.name, weights=weights.hexdigest(), layer=encoder.layer,
                pool=encoder.pool, size=(encoder.size, encoder.width), store=store, part=PART,
                dtype=str(autocast.fast_dtype) if autocast._enabled else 'float32')


def cache_folder(folder, ds, camera, settings):
    """The folder of a camera's latents, named by hashes of what they depend on, and of where the
    dataset is: files that have changed are refused, those that have moved are found."""
    def short(x):
        return hashlib.sha256(json.dumps(x, sort_keys=True).encode()).hexdigest()[:12]

    settings = settings | dict(camera=camera, fps=float(ds.fps))
    if ds.ratio != 1:       # then which frames are used depends on where episodes begin
        settings['frames'] = [e.usable for e in ds.episodes]
    source = ds.hub.repo if ds.hub else ds.root
    name = f'-{camera.rpartition(".")[2]}-{short(settings)}-'
    frames = f'{ds.fingerprint(camera)[:12]}-'
    known = glob.escape(folder) + '/*' + glob.escape(name)
    place = f'{folder}/{os.path.basename(source)}{name}{frames}{short(source)}'
    changed = glob.glob(f'{known}*{short(source)}')     # first: another rank may make it just now
    moved = glob.glob(f'{known}{frames}*')
    if moved:
        place = moved[0]
    elif changed:
        sys.exit(f'{changed[0]}: holds latents of {ds.name} as it was; its files have changed '
                 'since. Remove that folder to encode them again')
    with writing(place):
        os.makedirs(place, exist_ok=True)
    for left in glob.glob(glob.escape(place) + '/*.tmp'):
        with suppress(OSError):      # other ranks clear up as well
            if time.time() - os.path.getmtime(left) > 3600:     # its run was killed
                os.remove(left)
    return place


def split(ds, kind, place):
    """{path: the episodes whose latents it holds, one after the other}."""
    lengths = [e.length for e in ds.episodes]
    size = max(PART, sum(lengths) * kind.itemsize >> 8)     # 256 files at most, as each stays open
    parts = {}
    begin = 0
    for e, length in enumerate(lengths):
        parts.setdefault(begin * kind.itemsize // size, []).append(e)
        begin += length
    return {f'{place}/{i:03d}': episodes for i, episodes in enumerate(parts.values())}


def chunks(length):
    return [range(i, min(i + CHUNK, length)) for i in range(0, length, CHUNK)]


def read_chunks(ds, camera, parts, size, workers, tell):
    """Yield the frames of the parts' episodes, or the Bad in their place, in chunks."""
    def read(chunk):
        try:
            return ds.frames(*chunk, size, camera)
        except (Bad, Away) as error:
            return error

    todo = []
    for e in chain(*parts.values()):
        todo += [(e, numbers) for numbers in chunks(ds.episodes[e].length)]
    loader = DataLoader(
        todo, batch_size=None, collate_fn=read, num_workers=workers,
        multiprocessing_context='fork' if workers else None)
    total = sum(len(numbers) for _, numbers in todo)
    plain = not sys.stderr.isatty()
    bar = tqdm(total=total, desc=f'encoding {ds.name}, {camera}', disable=plain or not tell)
    done = 0
    for (_, numbers), x in zip(todo, loader):
        done += len(numbers)
        bar.update(len(numbers))
        if tell and plain:
            progress(f'encoding {ds.name}, {camera}:', f'frame {done:,} of {total:,}')
        if isinstance(x, Away):
            raise x
        yield x
    bar.close()


def for_store(v, kind):
    """(n,) of latents (n, N, D), made where these are: four times less is copied."""
    out = np.empty(len(v), kind)
    if 'scale' not in kind.names:
        out['z'] = v.half().cpu().numpy()
        return out
    scale = (v.abs().amax(1, keepdim=True) / 127).clamp(min=1e-6).half()    # (n, 1, D)
    z = (v / scale.float()).round().clamp(-127, 127)
    out['scale'] = scale[:, 0].cpu().numpy()
    out['z'] = z.to(torch.int8).cpu().numpy()
    return out


def encode_part(path, ds, episodes, frames, encode, kind, disk):
    """(array, {episode: Bad}) of some episodes, in memory or in a file."""
    z = np.empty(sum(ds.episodes[e].length for e in episodes), kind)
    bad = {}
    rows = z
    for e in episodes:
        length = ds.episodes[e].length
        for numbers in chunks(length):
            x = next(frames)
            if isinstance(x, Bad):
                bad[e] = x
                warn(f'{ds.name}, episode {ds.episodes[e].index}: {x}')
            else:
                rows[numbers.start:numbers.stop] = encode(x)
        rows = rows[length:]
    if not disk:
        return z, bad
    tmp = own_tmp(path)
    with writing(path):
        Path(tmp).write_text(json.dumps([(e, str(why)) for e, why in bad.items()]))
        os.replace(tmp, f'{path}.json')
        with open(tmp, 'wb') as f:      # not a memory map: on a full disk that kills the process
            np.save(f, z)
        os.replace(tmp, f'{path}.npy')
    return load_part(path)


def load_part(path):
    """As encode_part, once another rank or an earlier run has made it."""
    while not os.path.exists(f'{path}.npy'):
        time.sleep(1)       # a barrier would give up after some minutes
    try:
        for ending in 'json', 'npy':
            a_file(f'{path}.{ending}')
        reasons = json.loads(Path(f'{path}.json').read_text())
        bad = {e: Bad(why) for e, why in reasons}
        return np.load(f'{path}.npy', mmap_mode='r'), bad
    except Exception as why:        # as many ways as there are to be damaged
        sys.exit(f'{path}: a damaged file of latents ({Bad(why)}). Remove {os.path.dirname(path)} '
                 'to encode them again')


# --------------------------------------------------------------------------------------------------
# the demo world: a table seen from above; an arm's tip, moved by (dx, dy), pushes a disc; lengths
# are in table widths

DEMO_STEP = 0.05    # the longest move of the tip in a frame
DEMO_NEAR = 0.08    # what counts as reached
DEMO_NAMES = {'action': ['dx', 'dy'], 'observation.state': ['x', 'y'],
              ENVIRONMENT: ['tip_x', 'tip_y', 'disc_x', 'disc_y']}
TIP = 0.11          # radii
DISC = 0.15
HALO = 0.3


def _overlap(tip, disc):
    """As a vector from the tip to the disc."""
    gap = np.linalg.norm(disc - tip, axis=1, keepdims=True)
    return np.maximum(TIP + DISC - gap, 0) * (disc - tip) / np.maximum(gap, 1e-6)


def demo_step(state, action):
    """state (n, 4): x, y of the tip and of the disc, in [0, 1]; action (n, 2): move of the tip ->
    next state."""
    tip = state[:, :2] + np.clip(action, -DEMO_STEP, DEMO_STEP)
    tip = np.clip(tip, TIP, 1 - TIP)
    disc = np.clip(state[:, 2:] + _overlap(tip, state[:, 2:]), DISC, 1 - DISC)
    # at the border the disc stops, and stops the tip
    tip = np.clip(tip - _overlap(tip, disc), TIP, 1 - TIP)
    return np.concatenate((tip, disc), axis=1)


def demo_draw(state, size=64):
    """uint8 (n, size, size, 3): large shapes with wide halos, so that distances of pictures say how
    far a shape is from its goal also without overlap. None can leave the table: half a tip is
    closer to any goal than a whole one."""
    at = (np.arange(size, dtype=np.float32) + 0.5) / size
    image = np.full((len(state), size, size, 3), (0.86, 0.84, 0.80), np.float32)
    for i, radius, colour in ((2, DISC, (0.15, 0.35, 0.80)), (0, TIP, (0.85, 0.25, 0.15))):
        centre = state[:, i:i + 2].astype(np.float32)
        x = (at - centre[:, :1]) ** 2                                       # (n, size)
        y = (at - centre[:, 1:]) ** 2
        distance = np.sqrt(y[:, :, None] + x[:, None, :])                   # (n, size, size)
        shape = np.clip((radius - distance) / 0.03 + 0.5, 0, 1)
        halo = np.exp(-y / HALO ** 2)[:, :, None] * np.exp(-x / HALO ** 2)[:, None, :]
        cover = np.maximum(shape, 0.45 * halo)
        image += cover[..., None] * (np.float32(colour) - image)
    return np.uint8(image * 255 + 0.5)


def demo_start(n, rng):
    """n states with the tip clear of the disc."""
    state = np.zeros((n, 4))
    while True:
        gap = np.linalg.norm(state[:, :2] - state[:, 2:], axis=1)
        touching = gap < TIP + DISC + 0.02
        if not touching.any():
            return state
        low = 0.12, 0.12, 0.22, 0.22
        high = 0.88, 0.88, 0.78, 0.78
        state[touching] = rng.uniform(low, high, (touching.sum(), 4))


def demo_script(n, rng):
    """A noisy script for n tables: a function state (n, 4) -> action (n, 2), which wanders to
    random places, often through the disc."""
    aim = np.zeros((n, 2))
    frames = np.zeros((n, 1))       # until there is a new aim

    def act(state):
        nonlocal aim, frames
        tip = state[:, :2]
        disc = state[:, 2:]
        through = rng.random((n, 1)) < 0.6
        beyond = disc + (disc - tip) * rng.uniform(0.2, 1.2, (n, 1)) + rng.normal(0, 0.05, (n, 2))
        place = np.where(through, beyond, rng.uniform(0, 1, (n, 2))).clip(0, 1)
        aim = np.where(frames <= 0, place, aim)
        frames = np.where(frames <= 0, rng.integers(6, 16, (n, 1)), frames - 1)
        move = (aim - tip) * 0.5 + rng.normal(0, 0.015, (n, 2))
        return move.clip(-DEMO_STEP, DEMO_STEP)

    return act


def write_demo(root, n, labelled, seed):
    """Write n episodes of 60 frames of the demo world as a LeRobot dataset, with or without
    actions. Of several processes at once, the first to end counts."""
    rng = np.random.default_rng(seed)
    state = demo_start(n, rng)
    act = demo_script(n, rng)
    states = np.empty((n, 60, 4))
    actions = np.empty((n, 60, 2))
    for t in range(60):
        states[:, t] = state
        actions[:, t] = act(state)
        state = demo_step(state, actions[:, t])
    mine = own_tmp(root)
    with Writer(mine, 10, DEMO_NAMES) as writer:
        for e in range(n):
            for t, frame in enumerate(demo_draw(states[e])):
                action = actions[e, t] if labelled else None
                writer.add({'top': frame}, action, states[e, t, :2], {ENVIRONMENT: states[e, t]})
            writer.end_episode('push the disc')
    with suppress(OSError):         # it is there
        os.rename(mine, root)
    shutil.rmtree(mine, ignore_errors=True)


# --------------------------------------------------------------------------------------------------

if __name__ == '__main__':
    # ----------------------------------------------------------------------------------------------
    labelled = ''             # LeRobot datasets: folders or names on the hub, comma-separated ...
    unlabelled = ''           # ... and those whose actions are not used
    camera = ''               # keys or their last parts, 'front:3,wrist:1'; '' = each one's first
    action = ''               # keys; '' = action, else actions, else all action.*
    action_mode = 'absolute'  # absolute, delta or delta_tool: motions of the action keys' poses
    rotation = 'euler'        # of those: euler, quat_xyzw, quat_wxyz, rotvec, rot6d or rot6d_rows
    state = ''                # keys, or numbers of them: observation.state.elbow
    fps = 0.0                 # frames per second that are used, at most the dataset's; 0 = all
    cache_gb = 50.0           # of files from the hub that are kept on disk
    # encode every frame once, for train.py --cache_dir=... with the same options
    cache = False
    cache_dir = 'latents'
    store = 'float16'         # or int8: half the size
    encoder = 'dinov2_vits14'
    encoder_path = ''         # weights, .safetensors or .pth; '' = from the hub
    layer = -1
    frame_height = 0          # pixels; 0 = the encoder's own (videos: the first one's)
    frame_width = 0           # 0 = square
    pool = 1                  # 2 averages 2x2 patches
    workers = 2               # processes that decode video
    device = 'auto'
    dtype = 'auto'            # float32 or bfloat16; auto = bfloat16 where hardware multiplies it
    # write a LeRobot v3.0 dataset
    videos = ''               # of plain videos: 'folder/*.mp4'
    hdf5 = ''                 # of robomimic's demos, all cameras; state: obs keys, '' = robot*
    filter_key = ''           # which demos, such as train; '' = all
    out = ''                  # the new dataset's folder
    config = override({k: v for k, v in globals().items() if k.islower()}, sys.argv[1:])
    globals().update(config)
    # ----------------------------------------------------------------------------------------------
    if [labelled + unlabelled, videos, hdf5].count('') != 2:
        sys.exit('wants --labelled or --unlabelled, or else --videos or --hdf5 (python data.py '
                 '--help)')
    if out and not (videos or hdf5) or filter_key and not hdf5:
        sys.exit('--out comes with --videos or --hdf5, --filter_key with --hdf5')
    unused = given(sys.argv[1:]) & {*'cache_dir store encoder encoder_path layer pool'.split()}
    if unused and not cache:
        sys.exit(f'--{min(unused)}: comes with --cache=True')
    if videos or hdf5:
        if not out:
            sys.exit('--out: wants the folder that is to be written')
        try:
            with writing(out):
                if videos:
                    import_videos(out, videos, fps, (frame_height, frame_width or frame_height))
                    fps = 0.0
                else:
                    import_hdf5(out, hdf5, state, filter_key)
                    state = 'observation.state'
        except Bad as error:
            sys.exit(str(error))
        labelled = out
    sets = open_sets(labelled, camera, action, fps, action_mode, rotation, cache_gb, state)
    sets += open_sets(unlabelled, camera, 'none', fps, action_mode, rotation, cache_gb)
    for ds in sets:
        actions = [f'{key} ({width})' for key, width in zip(ds.action_keys, ds.widths)]
        print(f'{ds.name}: {len(ds.episodes)} episodes ({len(ds.dropped)} left out), {ds.total:,} '
              f'frames at {ds.fps:g}/s, {ds.total / ds.fps / 3600:.2f} h; cameras '
              f'{", ".join(ds.cameras)}; actions {", ".join(actions) or "none"}; state '
              f'{ds.state_dim or "none"}')
    if cache:
        from model import load_encoder
        encode = load_encoder(encoder, encoder_path, layer, frame_height, frame_width, pool)
        if encode.fit:
            sys.exit(f'--encoder={encoder}: is fitted by train.py, which caches it as well')
        device = pick_device(device, int(os.environ.get('LOCAL_RANK', 0)))
        rank = int(os.environ.get('RANK', 0))
        world = int(os.environ.get('WORLD_SIZE', 1))
        cached_latents(sets, encode.to(device), device, autocast(device, dtype), cache_dir, store,
                       workers, rank, world)
