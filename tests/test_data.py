"""python -m pytest tests/test_data.py: command line, video, datasets, batches, caches, the hub, the writer."""
import contextlib
import dataclasses
import fractions
import glob
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
import warnings
import zlib
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import data
from conftest import ROOT, SMALL, ends, owner, script, write_lerobot
from hub import Hub

A = 2  # action width of the made datasets


# made data: the grey level of a frame is the running sum of the actions before it -------------------------------------

def episode(length, seed, task='push'):
    """Actions are whole numbers 0..2 and ten times as much; frame i shows the grey 30 + 4 sum(action[:i, 0])."""
    a = np.random.default_rng(seed).integers(0, 3, length)
    level = 30 + 4 * np.concatenate([[0], np.cumsum(a)[:-1]])
    x = np.broadcast_to(level[:, None, None, None], (length, 32, 48, 3)).astype(np.uint8)
    return {'observation.images.top': x, 'observation.images.side': 255 - x,
            'action': np.stack([a, 10 * a], 1).astype(np.float32), 'task': task}


LENGTHS = 30, 17, 41


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    root = str(tmp_path_factory.mktemp('made') / 'v30')
    write_lerobot(root, (episode(n, i, f'task {i % 2}') for i, n in enumerate(LENGTHS)), 10)
    return root


def read_json(path):
    return json.loads(Path(path).read_text())


def write_json(path, value, lines=False):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w') as f:
        f.write('\n'.join(map(json.dumps, value)) if lines else json.dumps(value))


def write_v2(root, version, columns=None, features=None, lengths=LENGTHS, image=False):
    """A v2.0 or v2.1 dataset by hand. columns(i) adds {name: pyarrow array}; features describes them."""
    root = str(root)
    places = []
    for i, n in enumerate(lengths):
        e = episode(n, i)
        cells = {} if columns else {'action': pa.array(e['action'].tolist(), pa.list_(pa.float32()))}
        cells |= columns(i) if columns else {}
        cells |= {'frame_index': pa.array(range(n)), 'episode_index': pa.array([i] * n), 'index': pa.array(range(n))}
        if image:
            cells['observation.images.top'] = pa.array([dict(bytes=coded(f), path='x.png')
                                                        for f in e['observation.images.top']])
        else:
            video = f'{root}/videos/chunk-000/observation.images.top/episode_{i:06d}.mp4'
            os.makedirs(os.path.dirname(video), exist_ok=True)
            data.write_video(video, torch.from_numpy(e['observation.images.top'].copy()).permute(0, 3, 1, 2), 10)
        os.makedirs(f'{root}/data/chunk-000', exist_ok=True)
        pq.write_table(pa.table(cells), f'{root}/data/chunk-000/episode_{i:06d}.parquet')
        places.append(dict(episode_index=i, tasks=['push'], length=n))
    features = features or {'action': dict(dtype='float32', shape=[A], names=None)}
    features = features | {'observation.images.top': dict(dtype='image' if image else 'video', shape=[32, 48, 3],
                                                          video_info={'video.is_depth_map': 'false'}, odd=1)}
    write_json(f'{root}/meta/info.json', dict(
        codebase_version=version, fps=10, features=features, chunks_size=1000, total_episodes=len(lengths),
        data_path='data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet',
        video_path='videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4', robot_type=None))
    write_json(f'{root}/meta/episodes.jsonl', places[::-1], lines=True)
    write_json(f'{root}/meta/tasks.jsonl', [dict(task_index=0, task='push')], lines=True)
    return root


def coded(rgb, codec='png', kind='rgb24'):
    codec = av.CodecContext.create(codec, 'w')
    codec.height, codec.width, codec.pix_fmt, codec.time_base = *rgb.shape[:2], kind, fractions.Fraction(1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), 'rgb24').reformat(format=kind)
    return b''.join(map(bytes, codec.encode(frame) + codec.encode(None)))


def edit_info(root, **changes):
    write_json(f'{root}/meta/info.json', read_json(f'{root}/meta/info.json') | changes)
    return root


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / 'copy')


def sequential(path):
    with av.open(path) as container:
        return np.stack([f.to_ndarray(format='rgb24') for f in container.decode(video=0)])


def forked(function, *calls, meanwhile=lambda: None):
    """Run function(*arguments) in a process for each of calls."""
    children = [multiprocessing.get_context('fork').Process(target=function, args=arguments) for arguments in calls]
    for child in children:
        child.start()
    meanwhile()
    for child in children:
        child.join(60)
        assert child.exitcode == 0


def forget():
    """What a process has read or has open."""
    data._videos.clear()
    for function in data._columns, data._row_group, data.LeRobot.rows:
        function.cache_clear()


def says(call, *words, error=SystemExit):
    """call() ends with an error of one line, which has these words."""
    with pytest.raises(error) as raised:
        call()
    text = str(raised.value)
    assert '\n' not in text and all(w in text for w in words), text


# override -------------------------------------------------------------------------------------------------------------

def constants():
    return dict(__doc__='doc', __name__='__main__', batch_size=8, learning_rate=0.1, weight_decay=0.1, compile=True,
                out_dir='out', max_iters=10, store='float16', keep=.3, torch=torch, key=[1], _hidden=1)


@pytest.mark.parametrize('arg, name, value', [
    ('--batch_size=32', 'batch_size', 32), ('--learning_rate=1', 'learning_rate', 1.0),
    ('--compile=False', 'compile', False), ('--weight_decay=0', 'weight_decay', 0.0),
    ('--out_dir=2024', 'out_dir', '2024'), ('--out_dir=a=b', 'out_dir', 'a=b'),
    ('--out_dir=', 'out_dir', '')])
def test_override_sets(arg, name, value):
    g = constants()
    config = data.override(g, [arg])
    assert g[name] == config[name] == value and type(g[name]) is type(value)
    assert not {'torch', 'key', '_hidden', '__doc__', '__name__'} & set(config)


@pytest.mark.parametrize('argv, want', [
    (['--batch_size', '32', '--out_dir', 'a b'], dict(batch_size=32, out_dir='a b')),
    (['--compile', '--keep', '0.5'], dict(compile=True, keep=.5)), (['--keep', '.5', '--compile'], dict(compile=True, keep=.5)),
    (['--compile', 'False', '--batch_size=3'], dict(compile=False, batch_size=3)), (['--compile', 'True'], dict(compile=True)),
    (['--out_dir', '', '--store=int8'], dict(out_dir='', store='int8')), (['--out_dir=', '--compile'], dict(out_dir='')),
    (['--level', '-1', '--shift', '-2.5'], dict(level=-1, shift=-2.5)), (['--out_dir', 'a=b'], dict(out_dir='a=b')),
    (['--preset', 'robot', '--batch_size', '4'], dict(preset='robot', batch_size=4, max_iters=77, out_dir='-x')),
    (['--batch_size', '4', '--preset=robot'], dict(preset='robot', batch_size=4, max_iters=77)),
    (['--batch_size', '4', '--batch_size=5'], dict(batch_size=5))])
def test_a_value_may_follow_its_option(argv, want):
    g = constants() | dict(compile=False, level=0, shift=0.0, preset='')
    data.override(g, argv, {'robot': dict(batch_size=9, max_iters=77, out_dir='-x')})
    assert all(g[name] == value and type(g[name]) is type(value) for name, value in want.items())


@pytest.mark.parametrize('argv, words', [
    (['--batch_size', '3', '4'], '4: write options as --name=value or --name value, after --batch_size, which has its value'),
    (['--compile', 'maybe'], 'maybe: write options'), (['--compile', 'True', 'False'], 'False: write options'),
    (['--batch_size', '--compile'], '--batch_size: wants a value'), (['--compile', '--out_dir'], '--out_dir: wants a value'),
    (['--batch_size=3', '4'], '4: write options'), (['--batch_sise', '3'], 'did you mean --batch_size?'),
    (['--batch_size', 'many'], "--batch_size: wants int, got 'many'"), (['--out_dir', 'a\nb'], 'wants one line'),
    (['--batch_size', '-3'], '--batch_size: wants 1 or more, got -3'), (['-batch_size', '3'], '-batch_size: write options')])
def test_a_value_too_few_or_too_many(argv, words):
    says(lambda: data.override(constants(), argv), words)


@pytest.mark.parametrize('arg, words', [
    ('--batch_sise=32', 'did you mean --batch_size?'), ('--compile=false', 'wants True or False'),
    ('--max_iters=1e6', "wants int, got '1e6'"), ('32', '32: write'),
    ('--batch_size', '--batch_size: wants a value, write options as --name=value'),
    ('config.py', 'write options'), ('--key=zzz', 'no such option'), ('--__name__=x', 'no such option'),
    ('--_hidden=2', 'no such option'), ('--torch=1', 'no such option'), ('--learning_rate=fast', 'wants float'),
    ('--batch_size=0', '--batch_size: wants 1 or more, got 0'), ('--keep=2', '--keep: wants 0 to 1, got 2.0'),
    ('--learning_rate=nan', 'wants 0 to 1, got nan'), ('--learning_rate=-inf', 'wants 0 or more, got -inf'),
    ('--store=x', "--store: wants one of float16, int8, got 'x'"), ('--key=a\nb', "'--key=a\\nb': wants one line")])
def test_override_refuses(arg, words):
    says(lambda: data.override(constants(), [arg]), words)


@pytest.mark.parametrize('name', ['train.py', 'plan.py', 'decode.py', 'data.py'])
def test_every_number_has_limits(name, capsys):
    with pytest.raises(SystemExit):
        script(name, '--help')
    numbers = re.findall(r'^  --(\w+)=(-?\d+\.?\d*(?:e[-+]?\d+)?)$', capsys.readouterr().out, re.M)
    assert len(numbers) > 6
    for option, text in numbers:
        least, most = data.LIMITS[option]
        assert least <= float(text) <= most
        for value in (least - 1, most + 1, 10 ** 20, math.inf, math.nan):
            says(lambda: data.check(option, value), f'--{option}: wants {least}')


def test_workers_where_nothing_forks(monkeypatch):
    monkeypatch.delattr(os, 'fork')
    g = dict(workers=2)
    assert data.override(g, []) == g == dict(workers=0)


def test_override_help(capsys):
    with pytest.raises(SystemExit) as error:
        data.override(constants(), ['-h'])
    assert error.value.code is None and capsys.readouterr().out.startswith('doc\n  --batch_size=8\n')


def test_what_was_given():
    assert data.given(['--a=1', '--b=', '--b=a=b', '--c', 'odd', '--d']) == {'a', 'b', 'c', 'd'}


# what is written ------------------------------------------------------------------------------------------------------

def test_a_folder_has_one_owner(tmp_path):
    folder = tmp_path / 'new/out'
    with owner(folder) as child:
        says(lambda: data.own(folder), str(folder), f'process {child.pid} on host', 'since')
        data.own(folder, '.other').close()
    lock = data.own(folder)     # it was killed
    worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
    worker.start()
    lock.close()
    with owner(folder):         # which a worker does not keep
        pass
    worker.kill()


@contextlib.contextmanager
def full_disk():
    """No file can grow."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('mine')
    says(lambda: data.own(tmp_path / 'file'), f'{tmp_path}/file', 'cannot be written', 'File exists')
    says(lambda: data.own(tmp_path / 'file/out'), f'{tmp_path}/file/out', 'cannot be written', 'Not a directory')
    with full_disk():
        says(lambda: data.own(tmp_path / 'out'), f'{tmp_path}/out', 'cannot be written', 'File too large', 'make room')


def test_temporary_names():
    assert re.fullmatch(rf'a/x.npy.{os.getpid()}@.+\.\d+\.tmp', data.own_tmp('a/x.npy'))


# pictures and video ---------------------------------------------------------------------------------------------------

def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_image(tmp_path):
    x = noise(3, 37, 21)
    data.write_image(tmp_path / 'x.png', x)
    assert torch.equal(data.read_image(tmp_path / 'x.png'), x) and os.listdir(tmp_path) == ['x.png']
    assert data.read_image(tmp_path / 'x.png', 8).shape == (3, 8, 8)
    assert data.read_image(tmp_path / 'x.png', (9, 12)).shape == (3, 9, 12)


@pytest.mark.parametrize('kind', ['missing', 'text', 'empty', 'folder', 'png', 'jpg'])
def test_bad_image(tmp_path, kind):
    path = tmp_path / f'x.{kind}'
    if kind in ('text', 'empty'):
        path.write_text('not a picture\n' * 20 * (kind == 'text'))
    elif kind == 'folder':
        path.mkdir()
    elif kind != 'missing':
        codec = ('png', 'rgb24') if kind == 'png' else ('mjpeg', 'yuvj420p')
        path.write_bytes(coded(noise(64, 64, 3).numpy(), *codec))
        assert data.read_image(path).shape == (3, 64, 64)
        path.write_bytes(path.read_bytes()[:-len(path.read_bytes()) // 2])
    says(lambda: data.read_image(path), f'x.{kind}', 'not a readable picture')


def exif(jpg, value, order):
    """A JPEG that says by Exif how it is to be turned."""
    body = b'Exif\0\0' + (b'MM\0*' if order == '>' else b'II*\0')
    body += struct.pack(order + 'IHHHIHHI', 8, 1, 0x112, 3, 1, value, 0, 0)
    return jpg[:2] + b'\xff\xe1' + struct.pack('>H', len(body) + 2) + body + jpg[2:]


UPRIGHT = np.kron([[[0], [90], [180]], [[255], [60], [200]]], np.ones((16, 16, 3))).astype(np.uint8)
STORED = [UPRIGHT, UPRIGHT[:, ::-1], UPRIGHT[::-1, ::-1], UPRIGHT[::-1], UPRIGHT.swapaxes(0, 1), np.rot90(UPRIGHT),
          np.rot90(UPRIGHT, 2).swapaxes(0, 1), np.rot90(UPRIGHT, 3)]


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('value', range(1, 9))
def test_pictures_are_turned_as_viewers_do(tmp_path, value, order):
    path = tmp_path / 'x.jpg'
    path.write_bytes(exif(coded(STORED[value - 1], 'mjpeg', 'yuvj420p'), value, order) + bytes(1100 * (value % 2)))
    got = data.read_image(path).permute(1, 2, 0).numpy()
    assert got.shape == UPRIGHT.shape and np.abs(got.astype(int) - UPRIGHT).max() < 9
    assert data.read_image(path, (8, 12)).shape == (3, 8, 12)


@pytest.mark.parametrize('kind', ['huge', 'list'])
def test_hostile_pictures(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    data.write_image(tmp_path / 'real.png', noise(3, 8, 8))
    text = b'ffconcat version 1.0\nfile real.png\n'
    if kind == 'huge':      # claims 30000 x 30000
        text = (tmp_path / 'real.png').read_bytes()
        header = b'IHDR' + struct.pack('>II', 30000, 30000) + text[24:29]
        text = text[:12] + header + struct.pack('>I', zlib.crc32(header)) + text[33:]
    (tmp_path / 'x.png').write_bytes(text)
    says(lambda: data.read_image(tmp_path / 'x.png'), 'x.png', 'not a readable picture of up to 134 megapixels')


def test_resize_is_low_passed(tmp_path):
    x = noise(3, 240, 320)
    data.write_image(tmp_path / 'x.png', x)
    want = torch.nn.functional.interpolate(x[None].float(), (56, 56), mode='bicubic', antialias=True)[0]
    assert (data.read_image(tmp_path / 'x.png', 56).float() - want).abs().mean() < 4


def test_write_video(tmp_path):
    x = torch.arange(0, 230, 10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 33, 47)
    data.write_video(tmp_path / 'x.mp4', x, 29.97)
    assert os.listdir(tmp_path) == ['x.mp4']
    with av.open(str(tmp_path / 'x.mp4')) as c:
        s = c.streams.video[0].codec_context
        assert (s.name, s.pix_fmt, s.height, s.width) == ('h264', 'yuv420p', 34, 48)
    y = data.read_frames(str(tmp_path / 'x.mp4'), range(23))
    assert (y[..., :33, :47].int() - x.int()).abs().max() <= 3


def video(path, n, rate=10, side=(48, 64), times=None, codec='libx264', turn=0, **options):
    """Six stripes show the bits of a frame's number, above a dark half; shown at i / rate, or at times[i] ms."""
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        (stream.height, stream.width), stream.pix_fmt = side, 'yuvj420p' if codec == 'mjpeg' else 'yuv420p'
        if times:
            stream.time_base = stream.codec_context.time_base = fractions.Fraction(1, 1000)
        if turn:
            stream.set_display_rotation(turn)
        for i in range(n):
            x = np.full((*side, 3), 20, np.uint8)
            for bit in range(6):
                x[:side[0] // 2, side[1] * bit // 6:side[1] * (bit + 1) // 6] += 200 * (i >> bit & 1)
            frame = av.VideoFrame.from_ndarray(x, 'rgb24').reformat(format=stream.pix_fmt)
            if times:
                frame.pts, frame.time_base = times[i], fractions.Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


VIDEOS = {'x264 b-frames': dict(bf='3', g='12'),
          'x264 open gop': {'g': '8', 'bf': '3', 'x264-params': 'open-gop=1:b-adapt=0'},
          'x264 one gop': dict(g='300'), 'mpeg4': dict(codec='mpeg4', g='12', bf='2'), 'x264 g2': dict(g='2')}


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp('videos')
    paths = [video(root / f'{i}.mp4', 50, **VIDEOS[k]) for i, k in enumerate(VIDEOS)]
    return [(path, sequential(path)) for path in paths]


def check(path, truth, indices):
    got = data.read_frames(path, indices).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(got, truth[list(indices)]), (path, indices)


@pytest.mark.parametrize('i', range(len(VIDEOS)), ids=list(VIDEOS))
def test_frames_equal_sequential(videos, i):
    path, truth = videos[i]
    assert len(truth) == 50
    for k in range(50):
        check(path, truth, [k])
    for stride in (1, 2, 3, 5, 7, 20):
        for first in (0, 1, 5):
            check(path, truth, range(first, 50, stride))


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(i=st.integers(0, len(VIDEOS) - 1), indices=st.lists(st.integers(0, 49), min_size=1, max_size=12))
def test_frames_in_any_order(videos, i, indices):
    check(*videos[i], indices)


def test_more_videos_than_open_containers(tmp_path):
    paths = [video(tmp_path / f'{i}.mp4', 3) for i in range(data.MAX_OPEN + 3)]
    for path in paths + paths:
        data.read_frames(path, [1])
    assert len(data._videos) <= data.MAX_OPEN


def test_frames_after_fork(tmp_path):
    path = str(tmp_path / 'x.mp4')
    data.write_video(path, noise(60, 3, 160, 160), 10)  # noise: several times larger than the reader's buffer
    truth = sequential(path)
    check(path, truth, [40])  # leaves an open container for the children to inherit

    def look():
        for k in [*range(0, 60, 7), *range(59, 0, -7)] * 3:
            check(path, truth, [k])

    forked(look, (), (), meanwhile=look)


@pytest.mark.parametrize('index', [-1, 50, 1000])
def test_missing_frame(videos, index):
    says(lambda: data.read_frames(videos[0][0], [0, index]), videos[0][0], f'frame {index} ', '50', error=ValueError)
    check(*videos[0], [0])


# LeRobot: the rule of time, on every format ---------------------------------------------------------------------------

@pytest.fixture(params=['v2.0', 'v2.1', 'v3.0', 'image'])
def any_format(request, made, tmp_path):
    if request.param == 'v3.0':
        return made
    image = request.param == 'image'
    return write_v2(tmp_path / 'd', 'v2.1' if image else request.param, image=image)


def test_running_sum_pins_actions_to_frames(any_format):
    d = data.LeRobot(any_format, camera='top')
    assert (d.fps, d.action_dim, [e.length for e in d.episodes]) == (10, A, list(LENGTHS))
    for i, n in enumerate(LENGTHS):
        for frameskip in (1, 2, 5):
            for start in (0, 3, n - 1, n - 2 * frameskip):
                c = d.clip(i, start, 6, frameskip)
                real = len(range(start, n, frameskip))
                level = (c['x'].float().mean((1, 2, 3)) - 30).numpy() / 4  # the running sum that the picture shows
                a = c['a'].view(6, frameskip, A).numpy()
                for t in range(6):
                    assert c['z_mask'][t] == (t < real) and c['a_mask'][t] == (0 < t < real)
                    if 0 < t < real:
                        assert abs(level[t] - level[t - 1] - a[t, :, 0].sum()) < .4, (i, start, frameskip, t)
                        assert np.array_equal(a[t, :, 1], 10 * a[t, :, 0])
                    else:
                        assert not a[t].any()
                    if t >= real:
                        assert torch.equal(c['x'][t], c['x'][real - 1])
                f = start + frameskip * np.arange(min(real, 6))
                assert abs(level[:len(f)] - np.concatenate([[0], d.rows(i)[:, 0].cumsum()])[f]).max() < .6


def test_frames_outside_the_episode_are_refused(made):
    d = data.LeRobot(made)
    for call in lambda: d.frames(0, [30]), lambda: d.frames(1, [-1]), lambda: d.clip(1, 17, 2, 1), lambda: d.frames(0, []):
        says(call, made, 'episode', error=ValueError)


def test_many_shards_and_rows_in_any_order(made, copy):
    path = f'{copy}/meta/episodes/chunk-000/file-000.parquet'
    table = pq.read_table(path)
    pq.write_table(table.take([2, 0]), path)
    os.makedirs(f'{copy}/meta/episodes/chunk-001')
    pq.write_table(table.take([1]).drop_columns(['dataset_from_index', 'dataset_to_index']),
                   f'{copy}/meta/episodes/chunk-001/file-000.parquet')
    one, two = data.LeRobot(made), data.LeRobot(str(copy))
    assert [e.index for e in two.episodes] == [0, 1, 2]
    for i in range(3):
        assert np.array_equal(one.rows(i), two.rows(i)) and torch.equal(one.frames(i, [4, 2]), two.frames(i, [4, 2]))


def test_one_row_group_without_episode_index(made, copy):
    edit_table(f'{copy}/{ROWS}', lambda t: t.drop_columns(['episode_index']))
    for i in range(3):
        assert np.array_equal(data.LeRobot(made).rows(i), data.LeRobot(str(copy)).rows(i))


@pytest.mark.parametrize('camera, key', [('', 'top'), ('top', 'top'), ('side', 'side'), ('nope,side,top', 'side'),
                                         ('observation.images.side', 'side'), ('top:0,side:2', 'side')])
def test_camera(made, camera, key):
    d = data.LeRobot(made, camera)
    assert d.camera == f'observation.images.{key}' and len(d.cameras) == 2
    assert abs(d.frames(0, [0]).float().mean() - (30 if key == 'top' else 225)) < 2


@pytest.mark.parametrize('options, words', [
    (dict(camera='wrist,left'), ['observation.images.top', 'observation.images.side']),
    (dict(fps=11), ['--fps=11', '10']),
    (dict(action_mode='delta'), ['--action_mode=delta', 'no pose of 6 numbers', 'action'])])
def test_what_a_dataset_does_not_have(made, options, words):
    says(lambda: data.LeRobot(made, **options), made, *words)


def test_depth_is_no_camera(copy):
    features = read_json(f'{copy}/meta/info.json')['features']
    features['observation.images.top']['info']['is_depth_map'] = True
    assert data.LeRobot(str(edit_info(copy, features=features))).cameras == ['observation.images.side']


# actions --------------------------------------------------------------------------------------------------------------

N = 12
TRUTH = {k: np.random.default_rng(i).normal(size=(N, w)).astype(np.float32)
         for i, (k, w) in enumerate({'action.arm': 2, 'action.grip': 1, 'action.pair': 4, 'velocity': 3}.items())}


def odd_columns(_):
    return {'action': pa.array(['go'] * N),
            'action.arm': pa.array(TRUTH['action.arm'].tolist(), pa.list_(pa.float64(), 2)),
            'action.grip': pa.array(TRUTH['action.grip'][:, 0], pa.float32()),
            'action.pair': pa.array(TRUTH['action.pair'].reshape(N, 2, 2).tolist(), pa.list_(pa.list_(pa.float32()))),
            'velocity': pa.array(TRUTH['velocity'].tolist(), pa.large_list(pa.float32()))}


ODD = {'action': dict(dtype='string', shape=[1]), 'action.arm': dict(dtype='float64', shape=[2]),
       'action.grip': dict(dtype='float32', shape=[1], names=['g']), 'action.pair': dict(dtype='float32', shape=[2, 2]),
       'velocity': dict(dtype='float32', shape=[3], info=None)}


@pytest.mark.parametrize('action, keys', [
    ('', ['action.arm', 'action.grip', 'action.pair']), ('none', []), ('velocity', ['velocity']),
    ('velocity, action.grip', ['velocity', 'action.grip'])])
def test_action_keys(tmp_path, action, keys):
    d = data.LeRobot(write_v2(tmp_path / 'd', 'v2.0', odd_columns, ODD, (N,)), action=action)
    want = np.concatenate([TRUTH[k] for k in keys] or [np.zeros((N, 0), np.float32)], 1)
    assert d.action_keys == keys and d.action_dim == want.shape[1] and np.array_equal(d.rows(0), want)
    c = d.clip(0, 1, 4, 2)
    assert c['a'].shape == (4, 2 * d.action_dim) and c['a_mask'].tolist() == [False] + 3 * [bool(keys)]
    if keys:
        for s in data.STATS:
            assert np.allclose(d.stats[s], getattr(want.astype(np.float64), s)(0), atol=1e-6)
    else:
        assert d.stats is None


@pytest.mark.parametrize('action', ['action', 'nope', 'velocity,nope'])
def test_action_key_refused(tmp_path, action):
    root = write_v2(tmp_path / 'd', 'v2.0', odd_columns, ODD, (N,))
    says(lambda: data.LeRobot(root, action=action), root, action.split(',')[-1], 'velocity')
    says(lambda: data.LeRobot(root, action='velocity,action.arm, velocity'), 'velocity: names a key twice')


def test_actions_plural(tmp_path):
    columns = {'actions': odd_columns(0)['velocity'], 'action.x': odd_columns(0)['action.grip']}
    features = {'actions': ODD['velocity'], 'action.x': ODD['action.grip']}
    root = write_v2(tmp_path / 'd', 'v2.1', lambda i: columns, features, (N,))
    assert data.LeRobot(root).action_keys == ['actions']


def test_actions_that_are_not_numbers_are_masked(tmp_path):
    a = np.arange(2 * N, dtype=np.float32).reshape(N, 2).tolist()
    a[3], a[6], a[8] = [float('nan'), 1], None, [float('inf'), 0]
    column = {'action': pa.array(a, pa.list_(pa.float32()))}
    d = data.LeRobot(write_v2(tmp_path / 'd', 'v2.1', lambda i: column, None, (N,)))
    c = d.clip(0, 0, N, 1)
    assert c['a_mask'].tolist() == [t not in (0, 4, 7, 9) for t in range(N)]
    assert not c['a'][~c['a_mask']].any() and c['a'][10].tolist() == a[9] and c['z_mask'].all()
    assert d.clip(0, 0, 4, 3)['a_mask'].tolist() == [False, True, False, False]
    good = np.array([r for i, r in enumerate(a) if i not in (3, 6, 8)])
    assert np.allclose(d.stats['std'], good.std(0)) and np.allclose(d.stats['max'], good.max(0))


@pytest.mark.parametrize('kind', [pa.list_(pa.float32()), pa.large_list(pa.int64())])
def test_rows_of_another_width_are_masked(tmp_path, capfd, kind):
    """Also where their numbers are as many in all."""
    a = np.arange(2 * N, dtype=np.float32).reshape(N, 2)
    rows = a.tolist()
    rows[3], rows[7], rows[9] = rows[3][:1], [*rows[7], 5], []
    d = data.LeRobot(write_v2(tmp_path / 'd', 'v2.1', lambda i: {'action': pa.array(rows, kind)}, None, (N,)))
    odd = np.isin(np.arange(N), (3, 7, 9))
    assert np.isnan(d.rows(0)[odd]).all() and np.array_equal(d.rows(0)[~odd], a[~odd])
    assert capfd.readouterr().err.count('3 rows of action') == 1


@pytest.mark.parametrize('dtype', ['double', 'torch.float32', '<f4', 'Float32', 'half', 'object', None])
def test_what_the_metadata_call_a_number_does_not_matter(tmp_path, dtype):
    features = {'action': dict(dtype=dtype, shape=[2])}
    assert data.LeRobot(write_v2(tmp_path / 'd', 'v2.1', None, features, (N,))).widths == [2]


@pytest.mark.parametrize('column, words', [
    (pa.array([dict(x=1., y=2.)] * N), 'action is struct<x: double, y: double>, not numbers'),
    (pa.array(['go'] * N), 'action is string, not numbers'), (pa.array([[1.]] * N), '(12, 1)'),
    (pa.array([[]] * N, pa.list_(pa.float32())), '(12, 1)'), (pa.array(range(N), pa.timestamp('us')), 'timestamp[us]')])
def test_why_no_action_can_be_read(tmp_path, capfd, column, words):
    """Told in one line on opening, of however many episodes."""
    root = write_v2(tmp_path / 'd', 'v2.1', lambda i: {'action': column}, None, (N,) * 5)
    says(lambda: data.LeRobot(root), f'{root}: has no episodes: {root}/data', 'episode_000000', words, '4 more')
    assert data.LeRobot(root, action='none').action_dim == 0 and not capfd.readouterr().err


def rows_of(root):
    d = data.LeRobot(root)
    return d, np.concatenate([d.rows(i) for i in range(len(d.episodes))]).astype(np.float64)


def test_stats(made, tmp_path):
    d, a = rows_of(made)
    for s in data.STATS:
        assert d.stats[s].dtype == np.float32 and np.allclose(d.stats[s], getattr(a, s)(0), atol=1e-5)
    root = write_v2(tmp_path / 'd', 'v2.1')
    parts = []
    for i, n in enumerate(LENGTHS):
        e = episode(n, i)['action'].astype(float)
        stats = {s: getattr(e, s)(0).tolist() for s in data.STATS} | {'count': [n]}
        parts.append({'episode_index': i, 'stats': {'action': stats}})
    write_json(f'{root}/meta/episodes_stats.jsonl', parts, lines=True)
    for s in data.STATS:
        assert np.allclose(data.LeRobot(root).stats[s], getattr(a, s)(0), atol=1e-5)
    # believed where they fit, measured where they do not
    write_json(f'{root}/meta/stats.json', {'action': dict(mean=[7, 7], std=[1, 1], min=[0, 0], max=[9, 9])})
    assert data.LeRobot(root).stats['mean'].tolist() == [7, 7]
    for wrong in ({}, {'action': dict(mean=[7], std=[1], min=[0], max=[9])}, {'action': dict(mean=[7, 7])}):
        write_json(f'{root}/meta/stats.json', wrong)
        assert np.allclose(data.LeRobot(root).stats['mean'], a.mean(0))


# what is refused ------------------------------------------------------------------------------------------------------

def info_is(text):
    return lambda root: Path(f'{root}/meta/info.json').write_text(text)


@pytest.mark.parametrize('change, words', [
    (shutil.rmtree, ['no such folder']),
    (lambda r: os.remove(f'{r}/meta/info.json'), ['not a LeRobot dataset', 'meta/info.json']),
    (info_is('{"codebase_version": '), ['info.json', 'cannot be read']),
    (info_is('[' * 100000), ['info.json', 'cannot be read']),
    (info_is('version https://git-lfs.github.com/spec/v1\n'), ['info.json', 'git-LFS']),
    (lambda r: os.mkdir(f'{r}/meta_data'), ['v1', 'convert']),
    (lambda r: edit_info(r, codebase_version='v1.6'), ['v1.6', 'convert']),
    (lambda r: edit_info(r, codebase_version='v4.0'), ['v4.0', 'v3.0']),
    (lambda r: edit_info(r, codebase_version='a\nb' * 99), ['got a ba b']),
    (lambda r: edit_info(r, data_path='data/\ud800/x'), ['cannot make a path']),
    (lambda r: edit_info(r, features={'action': dict(dtype='float32', shape=[2])}), ['no cameras', 'action']),
    (lambda r: edit_info(r, features=None), ['features']),
    (lambda r: edit_info(r, data_path='../{chunk_index}/x.parquet'), ['refused', '../']),
    (lambda r: edit_info(r, video_path='/etc/{video_key}{chunk_index}{file_index}'), ['refused', '/etc/']),
    (lambda r: edit_info(r, video_path='videos/../../copy-2/{file_index}'), ['refused', 'copy-2']),
    (lambda r: shutil.rmtree(f'{r}/meta/episodes'), ['no episodes', 'meta/episodes/*/*.parquet', 'v3.0']),
    (lambda r: edit_info(r, codebase_version='v2.1'), ['no episodes', 'meta/episodes.jsonl', 'v2.1', "'episodes'"]),
    (lambda r: edit_info(r, data_path='data/{chunk_index.__class__}/x.parquet'), ['cannot make a path', '__class__']),
    (lambda r: edit_info(r, data_path='data/{chunk_index:99d}/x'), ['cannot make a path', '99d']),
    (lambda r: edit_info(r, data_path='data/{chunk_index'), ['cannot make a path']),
    (lambda r: edit_info(r, data_path='data/{chunk_index:03d}\0x'), ['cannot make a path']),
    (lambda r: edit_info(r, data_path=[1]), ['cannot make a path']),
    (lambda r: edit_info(r, features={'observation.images.top': None}), []), (info_is('[1]'), []),
    (lambda r: edit_info(r, features={'observation.images.top': dict(dtype='video', info='x')}), []),
    (lambda r: edit_info(write_v2(shutil.rmtree(r) or r, 'v2.1'), chunks_size='many'), []),
    (lambda r: edit_info(r, fps='10'), ['wants features and fps', "'10'"]), (lambda r: edit_info(r, fps=0), ['wants features and fps'])])
def test_refused(copy, change, words):
    change(copy)
    says(lambda: data.LeRobot(str(copy)), str(copy), *words)


def test_symlinks_are_allowed_and_said(made, tmp_path, capfd):
    for folder, _, files in os.walk(made):
        there = tmp_path / 'links' / os.path.relpath(folder, made)
        there.mkdir(parents=True)
        for name in files:
            (there / name).symlink_to(os.path.join(folder, name))
    assert data.LeRobot(str(tmp_path / 'links')).clip(0, 0, 2, 1)['x'].shape == (2, 3, 32, 48)
    assert capfd.readouterr().err == f'{tmp_path}/links: has symbolic links, which are followed\n'
    (tmp_path / 'root').symlink_to(made)
    data.LeRobot(str(tmp_path / 'root'))
    assert data.inside('/a{1}', '{path}', path='b{2}/c') == '/a{1}/b{2}/c'
    assert not capfd.readouterr().err


@pytest.mark.parametrize('text', [b'version https://git-lfs.github.com/spec/v1\noid sha256:0', b'junk' * 100, None, 'pipe'])
@pytest.mark.parametrize('name', ['data/chunk-000/file-000.parquet',
                                  'videos/observation.images.top/chunk-000/file-000.mp4'])
def test_bad_file_is_named(copy, name, text):
    d = data.LeRobot(str(copy), 'top')
    forget()
    os.remove(copy / name)
    if text == 'pipe':
        os.mkfifo(copy / name)
    elif text:
        (copy / name).write_bytes(text)
    words = 'no such file' if text in (None, 'pipe') else 'git-LFS' if b'git' in text else 'cannot be read'
    says(lambda: d.clip(0, 0, 2, 1), str(copy / name), words, error=ValueError)


# what metadata, rows and videos disagree about ------------------------------------------------------------------------

def edit_table(path, change):
    pq.write_table(change(pq.read_table(path)), path)


def set_column(path, name, values, kind=None):
    edit_table(path, lambda t: t.set_column(t.column_names.index(name), name, pa.array(values, kind)))


TOP = 'observation.images.top'
ROWS, VIDEO = 'data/chunk-000/file-000.parquet', 'videos/observation.images.top/chunk-000/file-000.mp4'


def test_a_place_that_is_a_date(copy):
    path = f'{copy}/meta/episodes/chunk-000/file-000.parquet'
    set_column(path, f'videos/{TOP}/from_timestamp', [1, 2, 3], 'timestamp[ms]')
    says(lambda: data.LeRobot(copy), str(copy), 'odd metadata')


def test_rows_that_are_missing(copy, capfd):
    edit_table(f'{copy}/{ROWS}', lambda t: t.slice(0, 40))      # 30 of episode 0, 10 of 17 of episode 1, none of 2
    d = data.LeRobot(str(copy))
    assert [e.length for e in d.episodes] == [30, 10] and len(d.rows(1)) == 10 and len(d.dropped) == 1
    error = capfd.readouterr().err
    assert error == (f'{copy}/{ROWS}: has 10 frames of episode 1, the metadata say 17 '
                     f'(1 more: {copy}/{ROWS}, ..)\n')
    assert d.dropped == [f'{copy}/{ROWS}: has 0 frames of episode 2, the metadata say 41']
    assert torch.equal(d.frames(1, [9]), data.LeRobot(str(copy), action='none').frames(1, [9]))


def numbered(root, rows, frames=40, times=None, **columns):
    """An episode of v2.1 whose mp4 shows the numbers of its frames; columns of its table, or None for no such one."""
    root = write_v2(root, 'v2.1', lengths=(rows,))
    video(f'{root}/videos/chunk-000/{TOP}/episode_000000.mp4', frames, times=times, bf='0')
    for name, values in (dict(action=[[i, 0.] for i in range(rows)]) | columns).items():
        edit_table(f'{root}/data/chunk-000/episode_000000.parquet', lambda t: t.select(
            [k for k in t.column_names if k != name]))
        if values is not None:
            edit_table(f'{root}/data/chunk-000/episode_000000.parquet', lambda t: t.append_column(name, [[*values]]))
    return root


LATER, HOLE, LOST = [*range(10, 40)], [*range(10), *range(20, 40)], [i for i in range(45) if i % 10 != 9][:40]


@pytest.mark.parametrize('rows, columns, want', [
    (30, dict(frame_index=LATER, timestamp=np.array(LATER) / 10), LATER),
    (30, dict(frame_index=HOLE, timestamp=np.array(HOLE) / 10), HOLE), (30, dict(frame_index=HOLE), HOLE),
    (30, dict(timestamp=np.array(LATER) / 10), LATER),                              # numbered anew: by time
    (30, dict(frame_index=LATER, timestamp=np.arange(30) / 10), [*range(30)]),      # as lerobot
    (30, dict(frame_index=HOLE, timestamp=1.7e9 + np.array(HOLE) / 10), HOLE),
    (30, dict(frame_index=HOLE, timestamp=['x'] * 30), HOLE), (30, dict(frame_index=HOLE, timestamp=[None] * 30), HOLE),
    (30, dict(frame_index=None), [*range(30)]), (30, dict(frame_index=range(900, 930)), [*range(30)]),
    (40, dict(frame_index=range(7, 47), timestamp=np.arange(40) / 3), [*range(40)]),    # as many as frames
    (40, dict(times=[100 * i for i in LOST], timestamp=np.array(LOST) / 10), [*range(40)]),
    (30, dict(times=[100 * i for i in LOST], timestamp=np.array(LOST[10:]) / 10), LATER)])
def test_the_frame_of_a_row(tmp_path, rows, columns, want):
    d = data.LeRobot(numbered(tmp_path / 'd', rows, **columns))
    assert shown(d, 0) == want and d.rows(0)[:, 0].tolist() == [*range(rows)]


@pytest.mark.parametrize('state', ['timestamp', 'frame_index', 'timestamp,frame_index'])
def test_what_numbers_rows_may_be_a_state(tmp_path, capfd, state):
    columns = dict(frame_index=HOLE, timestamp=np.array(LATER if state == 'timestamp' else HOLE) / 10)
    root = numbered(tmp_path / 'd', 30, **columns)
    features = read_json(f'{root}/meta/info.json')['features']
    numbers = {name: dict(dtype='float32', shape=[1], names=None) for name in columns}
    d = data.LeRobot(edit_info(root, features=features | numbers), state=state, probe=state)
    want = np.stack([columns[name] for name in state.split(',')], axis=1)
    assert np.allclose(d.states(0), want) and np.allclose(d.probed(0), want)
    assert shown(d, 0) == (LATER if state == 'timestamp' else HOLE)
    assert ('off the grid' in capfd.readouterr().err) == (state == 'timestamp')


def test_rows_in_another_order_or_twice(tmp_path):
    order = np.random.default_rng(0).permutation(40)
    d = data.LeRobot(numbered(tmp_path / 'd', 40, frame_index=order, action=[[i, 0.] for i in order]))
    assert shown(d, 0) == [*range(40)] == d.rows(0)[:, 0].tolist()
    d = data.LeRobot(numbered(tmp_path / 'e', 40, frame_index=[*range(30)] + [*range(10)]))
    assert shown(d, 0) == [*range(30)] == d.rows(0)[:, 0].tolist()


@pytest.mark.parametrize('rate, start, stated, want', [
    (10, (0, 3, 4.7), LENGTHS, (0, 30, 47)), (9.9, (0, 30 / 9.9, 47 / 9.9), LENGTHS, (0, 30, 47)),
    (9.9, (30 / 9.9, 0, 47 / 9.9), (17, 30, 41), (30, 0, 47)),              # in any order
    (10, (0, 3, 4.7), (20, 17, 41), (0, 30, 47)),                           # more frames than rows
    (10, (0, 3, 4.7), (30, 20, 41), (0, 30, 47)),                           # three are missing, of one episode
    (8, (0, 3, 4.7), LENGTHS, None), (10, (0, 1.5, 4.7), LENGTHS, None),    # overlap
    (10, (0, 3, 4.7), (30, 20, 38), None), (10, (0, 3.1, 4.7), LENGTHS, None)])
def test_places_in_a_shared_video(copy, rate, start, stated, want):
    """By the clock of the file; refused where they contradict the lengths."""
    x = sequential(f'{copy}/{VIDEO}')
    data.write_video(f'{copy}/{VIDEO}', torch.from_numpy(x).permute(0, 3, 1, 2), rate)
    path = f'{copy}/meta/episodes/chunk-000/file-000.parquet'
    set_column(path, 'videos/observation.images.top/from_timestamp', start)
    set_column(path, 'length', stated)
    if not want:
        says(lambda: data.LeRobot(copy, action='none'), VIDEO, 'meta/episodes is wrong', 'episode')
        return
    d = data.LeRobot(copy, action='none')
    assert [e.span[TOP].start for e in d.episodes] == [*want]
    for i, e in enumerate(d.episodes):
        assert np.array_equal(d.frames(i, [0]).permute(0, 2, 3, 1)[0], sequential(f'{copy}/{VIDEO}')[want[i]])


def shorten_video(root, n):
    x = sequential(f'{root}/{VIDEO}')
    x = np.concatenate([x, x])[:n]
    data.write_video(f'{root}/{VIDEO}', torch.from_numpy(x).permute(0, 3, 1, 2), 10)


@pytest.mark.parametrize('n, lengths, words', [
    (87, [30, 17, 40], '40 frames of episode 2, the metadata say 41'),
    (40, [30, 10], '10 frames of episode 1, the metadata say 17'),
    (90, [30, 17, 41], '43 frames of episode 2, the metadata say 41')])
def test_video_of_another_length(copy, capfd, n, lengths, words):
    shorten_video(copy, n)
    d = data.LeRobot(str(copy))
    assert [e.length for e in d.episodes] == lengths
    assert capfd.readouterr().err.startswith(f'{copy}/{VIDEO}: has {words}')
    level = d.frames(len(lengths) - 1, [lengths[-1] - 1])[0].float().mean()
    want = episode(LENGTHS[len(lengths) - 1], len(lengths) - 1)['observation.images.top'][lengths[-1] - 1].mean()
    assert abs(level - want) < 3


def test_only_the_files_that_are_used_count(copy, capfd):
    os.remove(f'{copy}/videos/observation.images.side/chunk-000/file-000.mp4')
    assert len(data.LeRobot(str(copy), 'top').episodes) == 3 and not capfd.readouterr().err
    os.remove(f'{copy}/{ROWS}')
    assert len(data.LeRobot(str(copy), 'top', 'none').episodes) == 3 and not capfd.readouterr().err


def test_missing_files_drop_their_episodes_in_one_line(tmp_path, capfd):
    root = write_v2(tmp_path / 'd', 'v2.1', lengths=[9] * 7)
    gone = [f'{root}/videos/chunk-000/observation.images.top/episode_{i:06d}.mp4' for i in (1, 3, 4, 6)]
    os.remove(gone[0])
    assert data.LeRobot(root).dropped == [f'{gone[0]}: no such file']
    assert capfd.readouterr().err == f'{gone[0]}: no such file\n'
    for path in gone[1:]:
        os.remove(path)
    d = data.LeRobot(root)
    assert [e.index for e in d.episodes] == [0, 2, 5] and len(d.dropped) == 4
    assert capfd.readouterr().err == f'{gone[0]}: no such file (3 more: {gone[1]}, {gone[2]}, ..)\n'


def test_to_timestamp_is_not_believed(copy):
    path = f'{copy}/meta/episodes/chunk-000/file-000.parquet'
    set_column(path, 'videos/observation.images.top/to_timestamp', [2.9, 4.5, 0.])
    # what drifts by less than half a frame is rounded away
    set_column(path, 'videos/observation.images.top/from_timestamp', [0., 3.04, 4.66])
    d = data.LeRobot(str(copy))
    for i, n in enumerate(LENGTHS):
        want = episode(n, i)['observation.images.top'][[0, n - 1], 0, 0, 0]
        assert np.abs(d.frames(i, [0, n - 1]).float().mean((1, 2, 3)).numpy() - want).max() < 3


def old_dialect(root, data_path, video_path):
    """v2.0 as its first months had it: no features, files without folders."""
    root = write_v2(root, 'v2.0')
    for i in range(3):
        place = dict(episode_index=i, total_episodes=3, video_key='observation.images.top', episode_chunk=0)
        for old, new in ((f'data/chunk-000/episode_{i:06d}.parquet', data_path),
                         (f'videos/chunk-000/observation.images.top/episode_{i:06d}.mp4', video_path)):
            os.makedirs(os.path.dirname(f'{root}/{new.format(**place)}'), exist_ok=True)
            os.rename(f'{root}/{old}', f'{root}/{new.format(**place)}')
    return root


def test_dialect_without_features(made, tmp_path):
    paths = ('data/train-{episode_index:05d}-of-{total_episodes:05d}.parquet',
             'videos/{video_key}_episode_{episode_index:06d}.mp4')
    root = old_dialect(tmp_path / 'd', *paths)
    write_json(f'{root}/meta/info.json', dict(
        codebase_version='v2.0', data_path=paths[0], robot_type='aloha', total_episodes=3, total_frames=88, fps=10,
        splits={'train': '0:3'}, keys=['observation.state', 'action'], image_keys=[],
        video_keys=['observation.images.top'],
        shapes={'observation.state': 3, 'action': 2, 'observation.images.top': dict(width=48, height=32, channels=3)},
        names={'action': ['a', 'b', 'c', 'd']}, videos={'videos_path': paths[1], 'observation.images.top': {
            'video.fps': 10.0, 'video.codec': 'av1', 'video.is_depth_map': False, 'has_audio': False}}))
    one, two = data.LeRobot(root), data.LeRobot(made)
    for i, n in enumerate(LENGTHS):
        assert np.array_equal(one.rows(i), two.rows(i))
        assert (one.frames(i, range(n)).float() - two.frames(i, range(n)).float()).abs().max() < 4


def test_dialect_of_data_path(made, tmp_path):
    paths = ('data/chunk-{episode_chunk:03d}/train-{episode_index:05d}-of-{total_episodes:05d}.parquet',
             'videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4')
    root = edit_info(old_dialect(tmp_path / 'd', *paths), data_path=paths[0], video_path=None)     # None: the usual one
    assert np.array_equal(data.LeRobot(root).rows(1), data.LeRobot(made).rows(1))


def test_a_chunk_has_as_many_episodes_as_the_metadata_say(made, tmp_path):
    root = edit_info(write_v2(tmp_path / 'd', 'v2.1'), chunks_size=2)
    for path in glob.glob(f'{root}/**/episode_000002.*', recursive=True):
        moved = path.replace('chunk-000', 'chunk-001')
        os.makedirs(os.path.dirname(moved), exist_ok=True)
        os.rename(path, moved)
    assert np.array_equal(data.LeRobot(root).rows(2), data.LeRobot(made).rows(2))


def test_templates_and_numbers_of_either_version(made, tmp_path):
    root = edit_info(write_v2(tmp_path / 'd', 'v2.1'),
                     data_path='data/chunk-{chunk_index:03d}/episode_{episode_index:06d}.parquet')
    write_json(f'{root}/meta/episodes.jsonl', [dict(episode_index=float(i), length=n, tasks='push')
                                               for i, n in enumerate(LENGTHS)], True)
    d = data.LeRobot(root)
    assert np.array_equal(d.rows(2), data.LeRobot(made).rows(2)) and d.clip(0, 0, 2, 1)['task'] == 'push'
    root = shutil.copytree(made, tmp_path / 'e')
    for name in 'data/chunk_index', 'data/file_index', f'videos/{TOP}/chunk_index', f'videos/{TOP}/file_index':
        set_column(f'{root}/meta/episodes/chunk-000/file-000.parquet', name, [0.] * 3)
    assert np.array_equal(data.LeRobot(root, 'top').rows(2), data.LeRobot(made).rows(2))


def test_an_episode_that_is_listed_twice_counts_once(tmp_path, capfd):
    root = write_v2(tmp_path / 'd', 'v2.1')
    path = Path(f'{root}/meta/episodes.jsonl')
    path.write_text(path.read_text().replace('"length": 41', '"length": 5') + '\n' + path.read_text())
    assert [(e.index, e.length) for e in data.LeRobot(root).episodes] == [*enumerate(LENGTHS)]
    assert capfd.readouterr().err == f'{root}: its metadata list 3 episodes again: the last entry of each counts\n'


def test_opening_tells_how_far_it_is(made, monkeypatch, capfd):
    monkeypatch.setattr(data.time, 'monotonic', itertools.count(0, 3).__next__)
    monkeypatch.setattr(data, '_told', {})
    data.LeRobot(made)
    assert capfd.readouterr().out == f'{made}: looked at 1 of 3 episodes\n'


def test_a_fingerprint_is_of_the_content(made, copy):
    prints = [data.LeRobot(made).fingerprint()]
    for camera in 'top', 'side,top':
        d = data.LeRobot(copy, camera)
        assert d.fingerprint(TOP) == data.LeRobot(made).fingerprint(TOP)
    for change in (lambda: overwrite(f'{copy}/{VIDEO}', 12, b'abcd'),       # a version, which no reader minds
                   lambda: set_column(f'{copy}/{ROWS}', 'action', [[1., 2.]] * 88), lambda: shorten_video(copy, 87)):
        change()
        forget()
        prints.append(data.LeRobot(copy).fingerprint())
    assert len({*prints}) == 4


def test_pictures_beside_the_table(tmp_path):
    root = write_v2(tmp_path / 'd', 'v2.1', image=True)
    whole = data.LeRobot(root).frames(1, [0, 16])
    path = f'{root}/data/chunk-000/episode_000001.parquet'
    cells = pq.read_table(path)['observation.images.top'].to_pylist()
    for i, cell in enumerate(cells):
        with open(f'{root}/{i}.png', 'wb') as f:
            f.write(cell['bytes'])
    key = 'observation.images.top'
    names = [f'{i}.png' for i in range(17)]
    for column in ([dict(bytes=None, path=name) for name in names], [dict(path=name) for name in names], names,
                   [cell['bytes'] for cell in cells]):
        set_column(path, key, column)
        forget()
        assert torch.equal(data.LeRobot(root).frames(1, [0, 16]), whole)


# other rates ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('fps', [10, 5, 10 / 3, 4, 7.5, 1])
def test_lower_rate(made, fps):
    d, full, step = data.LeRobot(made, fps=fps), data.LeRobot(made), 10 / fps
    for i, n in enumerate(LENGTHS):
        at = [k for k in (math.floor(j * step + 0.5 + 1e-9) for j in range(n)) if k < n]
        assert d.fps == fps and d.episodes[i].length == len(at)
        assert torch.equal(d.frames(i, range(len(at))), full.frames(i, at))
        per = math.ceil(step - 1e-9)
        rows, raw = d.rows(i).reshape(len(at), per, A), full.rows(i)
        for j in range(len(at) - 1):
            own = raw[at[j]:at[j + 1]]          # all rows between the frames; one comes twice where there are fewer
            assert np.array_equal(np.unique(rows[j], axis=0), np.unique(own, axis=0))
            assert len(own) < per or np.array_equal(rows[j], own)
        c = d.clip(i, 1, 3, 2)
        assert c['a'].shape == (3, 2 * per * A)
        if step == int(step) and n > 1 + 4 * step:      # the rule of time holds
            level = (c['x'].float().mean((1, 2, 3)) - 30) / 4
            assert np.allclose(np.diff(level), c['a'].view(3, -1, A)[1:, :, 0].sum(1), atol=.4)
    assert np.allclose(d.stats['mean'], np.tile(full.stats['mean'], per))


# the writer -----------------------------------------------------------------------------------------------------------

STATISTICS = ['min', 'max', 'mean', 'std', 'count', 'q01', 'q10', 'q50', 'q90', 'q99']
SCALARS = dict(timestamp='float', frame_index='int64', episode_index='int64', index='int64', task_index='int64')


def layout(root, name):
    return [(f.name, str(f.type)) for f in pq.read_schema(f'{root}/{name}')]


def test_layout(made):
    files = sorted(os.path.relpath(os.path.join(d, f), made) for d, _, fs in os.walk(made) for f in fs)
    assert files == ['data/chunk-000/file-000.parquet', 'meta/episodes/chunk-000/file-000.parquet', 'meta/info.json',
                     'meta/stats.json', 'meta/tasks.parquet',
                     'videos/observation.images.side/chunk-000/file-000.mp4',
                     'videos/observation.images.top/chunk-000/file-000.mp4']
    assert os.listdir(os.path.dirname(made)) == ['v30']
    assert layout(made, files[0]) == [('action', 'fixed_size_list<element: float>[2]'), *SCALARS.items()]
    assert pq.ParquetFile(f'{made}/{files[0]}').num_row_groups == 3
    cameras = ['observation.images.top', 'observation.images.side']
    want = [('episode_index', 'int64'), ('tasks', 'list<element: string>'), ('length', 'int64')]
    want += [(k, 'int64') for k in ('data/chunk_index', 'data/file_index', 'dataset_from_index', 'dataset_to_index')]
    for k in cameras:
        want += [(f'videos/{k}/chunk_index', 'int64'), (f'videos/{k}/file_index', 'int64'),
                 (f'videos/{k}/from_timestamp', 'double'), (f'videos/{k}/to_timestamp', 'double')]
    for k in ['action', *cameras, *SCALARS]:
        kind = 'list<element: list<element: list<element: double>>>' if k in cameras else 'list<element: double>'
        want += [(f'stats/{k}/{s}', 'list<element: int64>' if s == 'count' else kind) for s in STATISTICS]
    want += [('meta/episodes/chunk_index', 'int64'), ('meta/episodes/file_index', 'int64')]
    assert layout(made, files[1]) == want
    table = pq.read_table(f'{made}/meta/tasks.parquet')
    assert table.to_pydict() == {'task_index': [0, 1], 'task': ['task 0', 'task 1']}
    assert json.loads(table.schema.metadata[b'pandas'])['index_columns'] == ['task']
    stats = read_json(f'{made}/meta/stats.json')
    assert list(stats) == ['action', *cameras, *SCALARS] and all(set(s) == set(STATISTICS) for s in stats.values())
    assert np.shape(stats[cameras[0]]['q50']) == (3, 1, 1) and stats['action']['count'] == [sum(LENGTHS)]
    info = read_json(f'{made}/meta/info.json')
    assert info['splits'] == {'train': '0:3'} and info['total_frames'] == sum(LENGTHS) and info['total_tasks'] == 2


def test_layout_is_lerobots(shared, tmp_path):
    """The same columns, types and keys as a dataset that lerobot itself wrote, and the same numbers."""
    real = str(shared / 'data/w2cam_h264_v30')
    cameras = [data.LeRobot(real, k) for k in ('front', 'wrist')]
    state = data.LeRobot(real, action='observation.state')

    def copies():
        for i, e in enumerate(cameras[0].episodes):
            yield ({'observation.state': state.rows(i), 'action': cameras[0].rows(i), 'task': e.tasks[0]} |
                   {d.camera: d.frames(i, range(e.length)).permute(0, 2, 3, 1).numpy() for d in cameras})

    ours = str(tmp_path / 'ours')
    names = {k: [f'j{i}' for i in range(7)] for k in ('action', 'observation.state')}
    write_lerobot(ours, copies(), 10, names, robot_type='unitree_g1', crf=30)
    for name in ('data/chunk-000/file-000.parquet', 'meta/episodes/chunk-000/file-000.parquet', 'meta/tasks.parquet'):
        assert layout(ours, name) == layout(real, name)
        one, two = pq.read_table(f'{ours}/{name}'), pq.read_table(f'{real}/{name}')
        exact = [c for c in one.column_names if not c.startswith('stats/')]
        assert one.select(exact).equals(two.select(exact))
    one, two = (json.load(open(f'{root}/meta/info.json')) for root in (ours, real))
    for info in (one, two):  # ours says what it passes to the encoder
        for f in info['features'].values():
            f.get('info', {}).pop('video.extra_options', None)
    assert one == two
    one, two = (json.load(open(f'{root}/meta/stats.json')) for root in (ours, real))
    assert set(one) == set(two)
    for k in one:
        for s in ('mean', 'std', 'min', 'max'):
            assert np.allclose(one[k][s], two[k][s], atol=.05 if 'images' in k else 1e-5), (k, s)
    assert set(one['action']) == set(two['action'])


def test_write_and_read_back(tmp_path):
    """Odd sides, frames that are hard to encode, a rate that is not whole, and what an interrupted run left."""
    x = torch.nn.functional.interpolate(noise(20, 3, 6, 8).float(), (61, 81), mode='bilinear').byte()
    frames = x.permute(0, 2, 3, 1).numpy()
    root = str(tmp_path / 'd')
    os.makedirs(root + '.1@host.tmp/meta')
    write_lerobot(root, ({'observation.images.a': f, 'task': t} for f, t in zip((frames[:8], frames[8:]), 'ab')), 29.97)
    assert os.listdir(tmp_path) == ['d']
    d = data.LeRobot(root)
    assert (d.fps, d.action_dim, [e.tasks for e in d.episodes], d.stats) == (29.97, 0, [['a'], ['b']], None)
    y = torch.cat([d.frames(0, range(8)), d.frames(1, range(12))])[..., :61, :81]
    assert (y.float() - x.float()).abs().mean() < 6 and d.clip(1, 0, 3, 4)['task'] == 'b'


def test_writer_refuses(made, tmp_path):
    says(lambda: write_lerobot(made, [episode(3, 0)], 10), made, 'exists')
    with pytest.raises(AssertionError):
        write_lerobot(tmp_path / 'none', [], 10)
    assert not (tmp_path / 'none').exists()


# real datasets --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, camera', [('w2cam_av1_v30', 'front'), ('w2cam_av1_v30', 'wrist'),
                                          ('w2cam_h264_v30', 'front'), ('w2cam_h264_v30', 'wrist'),
                                          ('wnoaction_v30', 'ego')])
def test_real_video_every_frame(shared, name, camera):
    d = data.LeRobot(str(shared / f'data/{name}'), camera)
    truth = sequential(f'{d.root}/videos/{d.camera}/chunk-000/file-000.mp4')
    at = 0
    for i, e in enumerate(d.episodes):
        for k in range(e.length):
            assert np.array_equal(d.frames(i, [k])[0].permute(1, 2, 0).numpy(), truth[at + k])
        for stride in (1, 2, 3, 6):
            got = d.frames(i, range(stride // 2, e.length, stride)).permute(0, 2, 3, 1).numpy()
            assert np.array_equal(got, truth[at:at + e.length][stride // 2::stride])
        at += e.length
    assert at == len(truth)


def test_real_images(shared):
    for camera in ('image', 'image2'):
        d = data.LeRobot(str(shared / 'data/wimg_v30'), camera)
        cells = pq.read_table(f'{d.root}/data/chunk-000/file-000.parquet', columns=[d.camera])[d.camera].to_pylist()
        at = 0
        for i, e in enumerate(d.episodes):
            got = d.frames(i, range(e.length))
            for k in range(e.length):
                with av.open(data.io.BytesIO(cells[at + k]['bytes'])) as c:
                    truth = next(c.decode(video=0)).to_ndarray(format='rgb24')
                assert np.array_equal(got[k].permute(1, 2, 0).numpy(), truth)
            at += e.length
        assert d.clip(1, 20, 8, 1, 32)['z_mask'].tolist() == [True] * 4 + [False] * 4


def test_real_versions_agree(shared):
    v20, v21, v30 = (data.LeRobot(str(shared / f'data/g1_{v}')) for v in ('v20', 'v21', 'v30'))
    assert [e.length for e in v30.episodes] == [221, 267, 260, 265]
    assert v20.episodes[3].tasks == v30.episodes[3].tasks == v21.episodes[3].tasks
    rows = np.concatenate([v30.rows(i) for i in range(4)]).astype(np.float64)
    for s in data.STATS:
        for d in (v20, v21, v30):
            assert np.allclose(d.stats[s], getattr(rows, s)(0), atol=1e-5)
    for i, e in enumerate(v30.episodes):  # episodes 2 and 3 lie in the second file of v3.0
        assert np.array_equal(v20.rows(i), v30.rows(i)) and np.array_equal(v21.rows(i), v30.rows(i))
        for indices in ([0, 1, 2], [e.length - 1], [7, 50, 111]):
            frames = v30.frames(i, indices)
            assert torch.equal(v20.frames(i, indices), frames) and torch.equal(v21.frames(i, indices), frames)
    truth = sequential(f'{v20.root}/videos/chunk-000/{v20.camera}/episode_000002.mp4')
    assert np.array_equal(v30.frames(2, range(0, 260, 9)).permute(0, 2, 3, 1).numpy(), truth[::9])


# batches --------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """Two labelled datasets of different action widths, one without actions, and what a batch of them should hold."""
    folder, rng = tmp_path_factory.mktemp('clips'), np.random.default_rng(0)
    for name, n, width in (('a', 5, 2), ('b', 3, 4), ('c', 4, 0)):
        lengths = [9 + 5 * i for i in range(n)]
        write_lerobot(folder / name, [
            {'observation.images.top': np.full((L, 32, 32, 3), 5 * L, np.uint8), 'task': 't'}
            | ({'action': rng.normal(size=(L, width)) * 3 + 1} if width else {}) for L in lengths], 10)
    return [data.LeRobot(folder / 'a'), data.LeRobot(folder / 'b')], [data.LeRobot(folder / 'c')]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if k != 'faults' else a[k] == b[k] for k in a)


def clips(world, batch_size=20, share=0.05, **options):
    return data.Clips(*world, 3, 2, 0, batch_size, share, 0.25, **options)


def test_batches_are_a_function_of_seed_and_step_which_any_number_of_ranks_divides(world):
    one = clips(world)
    assert one.picks(7) == clips(world).picks(7) and one.picks(7) != one.picks(8)
    assert one.picks(7) != clips(world, seed=1).picks(7)
    for ranks in (2, 5):
        parts = [data.Clips(*world, 3, 2, 0, 20 // ranks, 0.05, 0.25, 0, r, ranks) for r in range(ranks)]
        assert [pick for part in parts for pick in part.picks(7)] == one.picks(7)
        assert torch.equal(torch.cat([part[7]['x'] for part in parts]), one[7]['x'])


@pytest.mark.parametrize('share, every', [(0.25, 4), (0.1, 10), (1.0, 1)])
def test_long_clips_come_at_an_exact_share_and_use_up_their_own_order(world, share, every):
    short, long = clips(world, batch_size=4), data.Clips(*world, 6, 2, 0, 2, 0.5, 0.25)
    both = data.Lengths(short, long, share)
    which = [both.which(step) for step in range(60)]
    assert all(sum(c is long for c, _ in which[i:i + every]) == 1 for i in range(60 - every))
    for of in (short, long):
        assert [i for c, i in which if c is of] == list(range(sum(c is of for c, _ in which)))
    step = every - 1
    assert both.which(step) == (long, 0) and both[step]['a'].shape[:2] == (2, 6)
    assert torch.equal(both[step]['a'], long[0]['a'])
    none = data.Lengths(short, long, 0.0)
    assert all(none.which(step) == (short, step) for step in range(9))


def test_where_a_labelled_clip_stands_in_a_batch_is_random(world):
    first = [s < 2 for step in range(200) for s, *_ in clips(world, 4, 0.5).picks(step)[:1]]
    assert 0.4 < np.mean(first) < 0.6


def test_actions_are_normalised_padded_and_masked(world, monkeypatch):
    c = clips(world, share=0.5)
    assert c.A == 2 * 4
    monkeypatch.setitem(c.sets[0].stats, 'std', c.sets[0].stats['std'] / 20)     # rare and large, many are beyond +-5
    for s, e, start, camera in (pick for step in range(3) for pick in c.picks(step)):
        clip = c.clip(s, e, start, camera, 3)
        assert e in c.train[s] and e not in c.val[s]
        if s == 2:
            assert not clip['a_mask'].any() and not clip['a'].any()
            continue
        ds = c.sets[s]
        rows = (ds.rows(e) - ds.stats['mean']) / ds.stats['std']
        for t in (1, 2):
            assert clip['a_mask'][t] == clip['z_mask'][t]
            if clip['z_mask'][t]:
                want = rows[start + 2 * (t - 1):start + 2 * t].ravel()
                assert np.allclose(clip['a'][t, :len(want)], want, atol=1e-5) and not clip['a'][t, len(want):].any()
                assert s == 1 or (np.abs(want) > 5).any()
    stats = c.action_stats()
    assert stats['width'].tolist() == [4, 8] and stats['std'][0, 4:].tolist() == [0] * 4
    assert (stats['low'] <= stats['mean']).all() and (stats['low'] < stats['high'])[1].all()


# states ---------------------------------------------------------------------------------------------------------------

STATE = 'observation.state'


@pytest.fixture(scope='module')
def sensing(tmp_path_factory):
    """Two datasets of one robot, one of another, one that senses nothing; what they hold."""
    folder, rng, held = tmp_path_factory.mktemp('sensing'), np.random.default_rng(0), {}
    for name, robot, scale in (('a', 'arm', 1.0), ('b', 'arm', 5.0), ('c', 'hand', 2.0), ('d', 'arm', 0.0)):
        held[name] = [(rng.normal(size=(L, 3)) * [scale, 2 * scale, 0] + [7, -1, 4]).astype(np.float32) for L in (13, 17, 21)]
        names = {STATE: {'motors': ['pan.pos', 'lift.pos', 'stuck']}, 'action': ['go']}
        write_lerobot(folder / name, [
            {'observation.images.top': np.full((len(s), 16, 16, 3), 50, np.uint8), 'task': 't', 'action': s[:, :1]}
            | ({STATE: s, data.ENVIRONMENT: s} if scale else {}) for s in held[name]], 10, names, robot_type=robot)
    return folder, held


@pytest.mark.parametrize('state, numbers', [(STATE, [0, 1, 2]), (f'{STATE}.lift.pos', [1]),
                                            (f' {STATE}.stuck , {STATE}.pan.pos', [2, 0]), ('', []), (f'{STATE}.elbow', [])])
def test_states_are_columns_or_numbers_of_them(sensing, state, numbers):
    folder, held = sensing
    d = data.LeRobot(folder / 'a', state=state)
    assert d.state_dim == len(numbers) and d.state_names == [['pan.pos', 'lift.pos', 'stuck'][i] for i in numbers]
    for i, s in enumerate(held['a']):
        assert np.array_equal(d.states(i), s[:, numbers])
    assert np.array_equal(data.LeRobot(folder / 'a', fps=5, state=state).states(1), held['a'][1][::2, numbers])
    assert data.LeRobot(folder / 'd', state=state).state_dim == 0


@pytest.mark.parametrize('names, flat', [
    (['a', 'b'], ['a', 'b']), ([['a', 'b'], ['c']], ['a', 'b', 'c']), ({'arm': ['a', 'b'], 'grip': ['c']}, ['a', 'b', 'c']),
    ({'x': 0, 'y': 1}, ['x', 'y']), ({'axes': ['x', 'y']}, ['x', 'y']), ({'left': ['x'], 'right': ['x']}, ['x', 'x']), (None, []), ([], []), ([0, 1], ['0', '1'])])
def test_names_of_numbers(names, flat):
    assert data.flat_names(names) == flat


def test_numbers_without_names_and_odd_keys(sensing, tmp_path):
    folder = shutil.copytree(sensing[0] / 'a', tmp_path / 'a')
    info = read_json(folder / 'meta/info.json')
    info['features'][STATE]['names'] = None
    info['features']['action']['names'] = {'arm': ['a'], 'rest': []}
    write_json(folder / 'meta/info.json', info)
    info['features'][STATE]['names'] = {'left': ['x', 'grip'], 'right': ['x']}
    write_json(folder / 'meta/info.json', info)
    assert data.LeRobot(folder, state=STATE).state_names == ['0', '1', '2']        # which x is it?
    d = data.LeRobot(folder, state=f'{STATE}.2,{STATE}.0')
    assert np.array_equal(d.states(0), sensing[1]['a'][0][:, [2, 0]]) and d.state_names == ['2', '0']
    info['features'][STATE]['names'] = ['x', 'y', 'z']
    info['features']['effort'] = info['features']['action'] | dict(names=['x'])
    write_json(folder / 'meta/info.json', info)
    rows = pq.read_table(folder / 'data/chunk-000/file-000.parquet')
    pq.write_table(rows.append_column('effort', rows['action']), folder / 'data/chunk-000/file-000.parquet')
    assert data.LeRobot(folder, state=f'{STATE}.z,effort').state_names == ['z', 'x']
    assert data.LeRobot(folder, state=f'{STATE}.x,effort').state_names == [f'{STATE}.x', 'effort.x'], 'which x is it?'
    info['features'][STATE]['names'] = None
    write_json(folder / 'meta/info.json', info)
    for state in f'{STATE}.pan.pos', f'{STATE}.3', f'{STATE}.0,missing', 'observation.images.top', f'{STATE}.':
        d = data.LeRobot(folder, state=state)
        assert (d.state_dim, d.state_names, d.columns) == (0, [], ['action'])


def test_names_of_actions(sensing, tmp_path):
    """Of a row of the files, whatever the rate; under their keys where there are several; motions of poses have none."""
    folder = shutil.copytree(sensing[0] / 'a', tmp_path / 'a')
    assert data.LeRobot(folder).action_names == data.LeRobot(folder, fps=5).action_names == ['go']
    assert data.LeRobot(folder, action=STATE).action_names == ['pan.pos', 'lift.pos', 'stuck']
    both = data.LeRobot(folder, action=f'{STATE},action')
    assert both.action_names == [f'{STATE}.pan.pos', f'{STATE}.lift.pos', f'{STATE}.stuck', 'action.go']
    assert np.array_equal(both.rows(0)[:, 3], both.rows(0)[:, 0]) and data.LeRobot(folder, action='none').action_names == []
    info = read_json(folder / 'meta/info.json')
    info['features'][STATE]['names'] = ['pan.pos', 'lift.pos']
    write_json(folder / 'meta/info.json', info)
    assert data.LeRobot(folder, action=STATE).action_names == ['0', '1', '2']


def test_what_a_simulator_knows_or_a_robot_was_told_is_no_state(sensing):
    for state in data.ENVIRONMENT, f'{STATE},{data.ENVIRONMENT}', f'{data.ENVIRONMENT}.0', 'action':
        with pytest.raises(SystemExit, match='what a simulator knows or a robot was told, not what it senses'):
            data.LeRobot(sensing[0] / 'a', state=state)


def test_what_a_probe_reads(tmp_path):
    """Numbers of the simulator, too; of a whole key only those that a picture shows; as they are, NaN where not known."""
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(L, 5)).astype(np.float32) for L in (9, 12)]
    x[1][3, 2] = np.inf
    names = {data.ENVIRONMENT: ['time', 'x_centimeters', 'cube_turn_deg', 'cube_velocity', 'hand_vel_x'], STATE: ['force', 'Velocity']}
    write_lerobot(tmp_path / 'd', [{'observation.images.top': np.zeros((len(v), 16, 16, 3), np.uint8), 'task': 't', 'action': v[:, :1],
                                    data.ENVIRONMENT: v, STATE: v[:, :2]} for v in x], 10, names)
    for probe, numbers in ((data.ENVIRONMENT, [1, 2]), (f'{data.ENVIRONMENT}.cube_velocity', [3]),
                           (f'{STATE},{data.ENVIRONMENT}.x_centimeters', [1]), (f'{data.ENVIRONMENT},missing', []), ('', [])):
        d = data.LeRobot(tmp_path / 'd', probe=probe)
        want = np.where(np.isfinite(x[1]), x[1], np.nan)[:, numbers]
        assert d.probe_names == [f'{data.ENVIRONMENT}.{names[data.ENVIRONMENT][i]}' for i in numbers] and d.probe_dim == len(numbers)
        assert np.array_equal(d.probed(1), want, equal_nan=True) and not d.state_dim
    d = data.LeRobot(tmp_path / 'd', state=STATE, probe=data.ENVIRONMENT)
    assert d.fingerprint() == data.LeRobot(tmp_path / 'd', state=STATE).fingerprint()       # it is the same data
    assert d.columns == ['action', STATE], 'training does not read it'
    other = data.LeRobot(tmp_path / 'd', action='none', probe=data.ENVIRONMENT)
    clips = data.Clips([d], [other], 4, 3, 16, 8, .5, .1)
    clip = clips.clip_and_probe(0, 1, 2, 'observation.images.top', 5)
    assert np.array_equal(clip['p'], d.probed(1)[[2, 5, 8, 11, 11]], equal_nan=True) and clip['s'].shape == (5, 2)
    assert clips.clip_and_probe(1, 1, 2, 'observation.images.top', 5)['p'].isnan().all()
    assert clips.held_out(4, 3)['labelled']['p'].shape[1:] == (4, 2) and 'p' not in clips[0]
    assert 'p' not in data.Clips([data.LeRobot(tmp_path / 'd')], [], 4, 2, 16, 8, .5, .1).held_out(4, 3)['labelled']


def test_a_clip_seen_otherwise(sensing):
    """One crop and one change of colours for all its frames, of the share of clips that is asked for, by seed, step and
    place in the batches of all ranks; never of what is held out."""
    rng = np.random.default_rng(0)
    H, W = 40, 56
    x = np.zeros((3, 3, H, W), np.uint8)
    x[:, 0], x[:, 1], x[:, 2] = np.linspace(60, 180, W), np.linspace(60, 180, H)[:, None], 110      # colour tells the place
    x = torch.from_numpy(x)
    light, hue, spans = [], [], []
    for _ in range(60):
        y = data.seen_otherwise(x, rng)
        assert y.shape == x.shape and y.dtype == torch.uint8 and torch.equal(y[0], y[2])
        along = y[0].double().mean(dim=1)[:, [0, -1]].diff()[:, 0]          # from left to right, of each colour
        light.append(y.double().mean().item())
        hue.append(abs(along[1] / along[0]).item())
        spans.append(along[0].item())
    assert np.std(light) > 5 and min(light) > 40 and max(light) < 200
    assert max(hue) > .05 and np.median(hue) < .3                           # what grows to the right stays red
    assert min(spans) < 90 < max(spans)                                     # crops and contrast
    same = types.SimpleNamespace(uniform=lambda low, high, n=None: np.ones(n) if n else (1. if high == 1 else 0.), integers=lambda n: 0)
    assert (data.seen_otherwise(x, same).int() - x.int()).abs().max() <= 1      # no crop, no change
    grey = types.SimpleNamespace(uniform=lambda low, high, n=None: np.array([1., 1, 0]) if n else (1. if high == 1 else 0.), integers=lambda n: 0)
    y = data.seen_otherwise(x, grey)[0].int()
    assert (y - y[:1]).abs().max() <= 1 and (y[0] - x[0].float().mean(dim=0)).abs().max() <= 1.5

    folder, held = sensing
    def batches(rank, world, augment, batch_size):
        clips = data.Clips([data.LeRobot(folder / 'a')], [], 4, 2, 16, batch_size, 1., .1, 3, rank, world, augment)
        assert torch.equal(clips.held_out(4, 3)['labelled']['x'].unique(), plain)
        return torch.stack([clips[i]['x'] for i in range(8)])
    plain = data.Clips([data.LeRobot(folder / 'a')], [], 4, 2, 16, 8, 1., .1).held_out(4, 3)['labelled']['x'].unique()
    never, half, always = (batches(0, 1, share, 8) for share in (0., .5, 1.))
    assert torch.equal(batches(1, 2, .5, 4), half[:, 4:]) and torch.equal(batches(0, 2, .5, 4), half[:, :4])
    differs = (half != never).flatten(2).any(dim=2)
    assert .3 < differs.float().mean() < .7 and (always != never).flatten(2).any(dim=2).float().mean() > .9
    assert torch.equal(half[differs], always[differs])


def test_goals_of_a_batch(sensing):
    """A later frame of the clip's episode, by seed, step and place in the batches of all ranks, which other numbers do
    not depend on; seen otherwise as the clip is; of a clip without actions its own first frame."""
    folder, _ = sensing
    sets = [data.LeRobot(folder / 'a', state=STATE)], [data.LeRobot(folder / 'b', action='none')]
    def clips(steps, batch_size=8, rank=0, world=1, augment=0.0):
        return data.Clips(*sets, 4, 2, 16, batch_size, .5, .1, 3, rank, world, augment, goal_steps=steps)
    plain, some = clips(0), clips(3)
    kinds, lefts = set(), []
    for step in range(30):
        batch, goal = some[step], some[step]['goal']
        assert 'goal' not in plain[step] and all(torch.equal(plain[step][k], batch[k]) for k in ('x', 'a', 'a_mask', 'z_mask'))
        for i, (s, e, start, camera) in enumerate(some.picks(step)):
            real, left = int(batch['z_mask'][i].sum()), int(goal['left'][i])
            end = (some.sets[s].episodes[e].length - 1 - start) // 2
            kinds.add((s, left == end))
            if s == 0:
                assert real - 1 <= left <= min(real + 2, end) and left >= min(real, end)
                lefts.append(left - real + 1 if left < end else 0)
            else:
                assert left == 0
            assert torch.equal(goal['x'][i], some.sets[s].frames(e, [start + 2 * left], 16, camera))
            if s == 0:
                mean, std, _ = some.states[0]
                want = torch.from_numpy(some.sets[s].states(e)[start + 2 * left]) - mean
                want = torch.where(std > 1e-6, want / std, 0 * want)
                assert torch.allclose(goal['s'][i, 0, :len(want)], want, equal_nan=True)
    assert (0, True) in kinds and (0, False) in kinds and {*lefts} == {0, 1, 2, 3}
    for rank in range(2):
        part, whole = clips(3, 4, rank, 2)[5]['goal'], some[5]['goal']
        assert torch.equal(part['left'], whole['left'][4 * rank:][:4]) and torch.equal(part['x'], whole['x'][4 * rank:][:4])
    probed = clips(3)
    probed.probed = True
    assert all(torch.equal(probed[step]['goal']['x'], some[step]['goal']['x']) for step in range(8)), 'whichever clip is the first'
    otherwise, alike = clips(3, augment=1.0)[4], 0
    for x, goal, left in zip(otherwise['x'], otherwise['goal']['x'], otherwise['goal']['left']):
        if left == 0:
            alike += 1
            assert torch.equal(x[0], goal[0]), 'the same picture, and the same change of it'
    assert alike and not torch.equal(otherwise['goal']['x'], some[4]['goal']['x'])


def test_memories_of_a_batch(sensing):
    """Frames of the same episode and camera so many steps before the clip, which is as without them; those before the
    episode, and the first ones by chance, are hidden; what led to one is not known."""
    folder, _ = sensing
    sets = [data.LeRobot(folder / 'a', state=STATE)], [data.LeRobot(folder / 'b', action='none')]
    def clips(memories, batch_size=8, rank=0, world=1, augment=0.0, goal_steps=0, T=4):
        return data.Clips(*sets, T, 2, 16, batch_size, .5, .1, 3, rank, world, augment, goal_steps, memories)
    plain, some, counts = clips(range(0)), clips(range(3, 9, 3)), []
    for step in range(40):
        batch, without = some[step], plain[step]
        for name in 'x', 'a', 'a_mask', 'z_mask', 's':
            assert torch.equal(batch[name][:, 2:].nan_to_num(9.0), without[name].nan_to_num(9.0))
        assert torch.equal(batch['text'], without['text']) and batch['z_mask'].shape == (8, 6)
        assert not batch['a_mask'][:, :2].any() and not batch['a'][:, :2].any()
        for i, (s, e, start, camera) in enumerate(some.picks(step)):
            seen = batch['z_mask'][i, :2].tolist()
            for place, steps in enumerate((6, 3)):
                at = start - 2 * steps
                assert at >= 0 or not seen[place]
                if at >= 0:
                    assert torch.equal(batch['x'][i, place], some.sets[s].frames(e, [at], 16, camera)[0])
                    if s == 0:
                        mean, std, _ = some.states[0]
                        want = torch.from_numpy(some.sets[s].states(e)[at]) - mean
                        want = torch.where(std > 1e-6, want / std, 0 * want)
                        assert torch.allclose(batch['s'][i, place, :len(want)], want, equal_nan=True)
            if start >= 12:
                counts.append(sum(seen))
            assert seen != [True, False], 'the oldest are forgotten first'
    assert all(counts.count(n) > len(counts) / 6 for n in range(3)), 'any number of them, equally often'
    for rank in range(2):
        part, whole = clips(range(3, 9, 3), 4, rank, 2)[5], some[5]
        assert all(torch.equal(part[name], whole[name][4 * rank:][:4]) for name in ('x', 'z_mask'))
    otherwise = clips(range(3, 9, 3), augment=1.0, goal_steps=3)[4]
    assert otherwise['x'].shape[1] == 6 and otherwise['goal']['x'].shape[1] == 1
    same = some[4]['x'][:, 1] == some[4]['x'][:, 2]
    assert torch.equal(otherwise['x'][:, 1] == otherwise['x'][:, 2], same) and same.any(), 'all are changed alike'
    assert not torch.equal(otherwise['x'], some[4]['x'])


def test_states_of_a_batch(sensing):
    """At the frames of the clip, normalised by what one robot's datasets have in common, padded with nan."""
    folder, held = sensing
    sets = [data.LeRobot(folder / name, state=f'{STATE}.pan.pos,{STATE}.stuck' if name == 'c' else STATE) for name in 'abcd']
    clips = data.Clips(sets, [data.LeRobot(folder / 'b', action='none', state=STATE)], 4, 2, 16, 8, .5, .1)
    kept = {name: [held[name][e] for e in clips.train['abc'.index(name)]] for name in 'abc'}
    arm = kept['a'] + kept['b']
    pooled = np.concatenate(arm)
    moves = np.concatenate([s[2:] - s[:-2] for s in arm])
    mean, std, change = (x.numpy() for x in clips.states[0])
    assert np.allclose(mean, pooled.mean(0), rtol=1e-4) and np.allclose(std, pooled.std(0), rtol=1e-4, atol=1e-5)
    assert np.allclose(change, moves.var(0), rtol=1e-4, atol=1e-9) and clips.states[1] is clips.states[0]
    assert np.allclose(clips.states[2][0], np.concatenate(kept['c'])[:, [0, 2]].mean(0), rtol=1e-4)
    stats = clips.state_stats()
    assert stats['width'].tolist() == [3, 3, 2, 0] and stats['mean'].shape == (4, 3) and not stats['change'][3].any()
    for s, e, start, T in ((0, 0, 1, 4), (1, 2, 16, 5), (2, 1, 3, 4), (3, 0, 0, 4), (4, 0, 0, 4)):
        got = clips.clip(s, e, start, 'observation.images.top', T)['s'].numpy()
        assert got.shape == (T, 3)
        if s >= 3:      # senses nothing; a video alone
            assert np.isnan(got).all()
            continue
        f = np.minimum(start + 2 * np.arange(T), len(held['abc'[s]][e]) - 1)
        rows, (mean, std, _) = held['abc'[s]][e][f], (x.numpy() for x in clips.states[s])
        rows = rows[:, [0, 2]] if s == 2 else rows
        want = np.where(std > 1e-6, (rows - mean) / np.maximum(std, 1e-6), 0)
        assert np.allclose(got[:, :len(mean)], want, atol=1e-5) and np.isnan(got[:, len(mean):]).all()
    assert clips[0]['s'].shape == (8, 4, 3)
    assert 's' not in data.Clips([data.LeRobot(folder / 'a')], [], 4, 2, 16, 8, .5, .1)[0]


def test_a_state_that_is_not_finite_is_not_known(tmp_path):
    s = np.arange(30, dtype=np.float32).reshape(15, 2)
    s[3, 1], s[5, 0] = np.inf, np.nan
    pictures = {'observation.images.top': np.zeros((15, 16, 16, 3), np.uint8), 'task': 't', 'action': s[:, :1] * 0}
    write_lerobot(tmp_path / 'd', [pictures | {STATE: s}, pictures | {STATE: np.abs(s)}], 10)
    d = data.LeRobot(tmp_path / 'd', state=STATE)
    assert np.argwhere(np.isnan(d.states(0))).tolist() == [[3, 1], [5, 0]]
    assert d.state_names == ['0', '1']
    assert all(x.isfinite().all() for x in data.Clips([d], [], 4, 2, 16, 8, .5, .5).states[0])
    write_lerobot(tmp_path / 'n', [pictures | {STATE: s * np.nan}] * 2, 10)
    with pytest.raises(SystemExit, match='--state: .*n has a number that is never finite'):
        data.Clips([data.LeRobot(tmp_path / 'n', state=STATE)], [], 4, 2, 16, 8, .5, .5)


def test_no_episode_is_in_both_splits(world):
    c = clips(world)
    for ds, train, val in zip(c.sets, c.train, c.val):
        assert sorted([*train, *val]) == list(range(len(ds.episodes))) and val
    held = c.held_out(4, 6)
    assert set(held) == {'labelled', 'unlabelled'} and held['labelled']['x'].shape[:2] == (6, 4)


@pytest.mark.parametrize('share', [0, .05, .1, .3, .5, 1])
def test_a_dataset_that_grows_holds_out_what_it_held_out(share):
    """So what is trained on with --init from then on is not asked about; nor where another episode cannot be read."""
    splits = {}
    for n in (2, 3, 7, 20, 100, 101, 237):
        train, val = data.hold_out(range(n), share)
        assert sorted(train + val) == [*range(n)] and train and val and abs(len(val) - n * share) <= 1
        splits[n] = set(train), set(val)
    for a, b in itertools.combinations(splits, 2):
        assert not splits[a][0] & splits[b][1] or share in (0, 1), 'none that was trained on'
    without = [i for i in range(100) if i != 7]
    train, val = data.hold_out(without, share)
    assert {without[i] for i in val} <= splits[100][1] and {without[i] for i in train} <= splits[100][0] or share in (0, 1)
    assert sorted(splits[100][1]) == [*range(5, 100, 10)] or share != .1


def test_a_small_share_is_not_none(world):
    c = clips(world, share=.0004)
    assert c.share == fractions.Fraction(4, 10000)
    lengths = data.Lengths(c, clips(world), .0004)
    assert sum(lengths.which(step)[0] is not c for step in range(10000)) == 4


# order ----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def mixture(tmp_path_factory):
    """Datasets of several lengths, rates, cameras and action widths; one has an episode of many segments."""
    folder, rng = tmp_path_factory.mktemp('mixture'), np.random.default_rng(0)
    for name, lengths, width, fps, cameras in (
            ('a', [9, 14, 30, 2], 2, 10, ['top']), ('b', [60, 50, 40], 3, 30, ['left', 'top']),
            ('c', [25] * 4, 0, 15, ['ego']), ('d', [130, 70], 0, 5, ['top', 'wrist'])):
        write_lerobot(folder / name, [
            {f'observation.images.{k}': np.full((L, 16, 16, 3), 60 * c + i, np.uint8) for c, k in enumerate(cameras)}
            | {'task': 't'} | ({'action': rng.normal(size=(L, width))} if width else {})
            for i, L in enumerate(lengths)], fps)
    return folder


def mixed(folder, labelled='a,b', unlabelled='c,d', batch_size=8, share=0.25, camera='', **options):
    at = [','.join(f'{folder}/{name}' for name in filter(None, text.split(','))) for text in (labelled, unlabelled)]
    sets = [data.open_sets(text, camera) for text in at]
    return data.Clips(*sets, 3, 2, 0, batch_size, share, 0.25, **options)


def every_window(c, s):
    return sorted((e, i) for e in c.train[s] for i in range(max(1, c.sets[s].episodes[e].length - 4)))


@pytest.mark.parametrize('world', [1, 2, 3])
@pytest.mark.parametrize('segment, block', [(2048, 1 << 16), (7, 1 << 16), (7, 11), (2048, 1)])
def test_ranks_together_see_every_window_once_an_epoch(mixture, monkeypatch, world, segment, block):
    monkeypatch.setattr(data, 'SEGMENT', segment)
    monkeypatch.setattr(data, 'BLOCK', block)
    ranks = [mixed(mixture, rank=r, world=world) for r in range(world)]
    drawn = {s: [] for s in range(4)}
    for step in range(120):
        for row in zip(*(sorted(c.picks(step)) for c in ranks)):
            for s, e, start, _ in row:
                drawn[s].append((e, start))
    for s in range(4):      # in the order of the draw, which is step by step and not rank by rank
        want, seen = every_window(ranks[0], s), [ranks[0].orders[s][i] for i in range(1000)]
        n = len(want)
        assert len(drawn[s]) > n
        epochs = [seen[i:i + n] for i in range(0, 1000 - n, n)]
        assert all(sorted(epoch) == want for epoch in epochs) and (block == 1 or epochs[0] != epochs[1])
        counts = {w: drawn[s].count(w) for w in want}
        assert max(counts.values()) - min(counts.values()) <= 1 and set(drawn[s]) == set(want)


def test_an_epoch_is_well_mixed(mixture):
    c = mixed(mixture, 'b', '')
    first = np.array([c.orders[0][i] for i in range(len(every_window(c, 0)))])
    assert abs(np.corrcoef(np.arange(len(first)), first[:, 1])[0, 1]) < 0.3
    assert 0.3 < np.mean(np.diff(first[:, 0]) != 0) < 0.7         # neighbours are of one episode by chance


def test_clips_are_shared_out_by_duration_or_weight(mixture):
    def counts(c, steps=250):
        kinds = [s for step in range(steps) for s, *_ in c.picks(step)]
        return np.bincount(kinds, minlength=len(c.sets)) / len(kinds)

    c = mixed(mixture)
    seconds = np.array([len(every_window(c, s)) / c.sets[s].fps for s in range(4)])
    want = np.concatenate([seconds[:2] / seconds[:2].sum() * 0.25, seconds[2:] / seconds[2:].sum() * 0.75])
    assert np.abs(counts(c) - want).max() < 2e-3
    assert np.abs(counts(mixed(mixture, 'a:3,b:1', 'c:0.2,d:0.2')) - [.1875, .0625, .375, .375]).max() < 2e-3
    assert np.allclose(counts(mixed(mixture, 'a:1,b:3', '')), [.25, .75])
    says(lambda: mixed(mixture, 'a:3,b'), 'a:3', 'a weight for every dataset')
    for weights in 'a:0', 'a:0,b:0.0', 'a:0,b:1':
        says(lambda: mixed(mixture, weights), 'a:0', 'wants weights above 0')
    for weight in 3.0, 0.0001, 0.00001, 1e16:       # as a checkpoint spells them
        assert data.weighted(f'a:{weight},b') == [('a', weight), ('b', None)]


@pytest.mark.parametrize('batch_size', [20, 5, 4])
def test_the_labelled_share_is_exact(mixture, batch_size):
    c = mixed(mixture, batch_size=batch_size, share=0.05)
    kinds = [s < 2 for step in range(200 // batch_size) for s, *_ in c.picks(step)]
    assert [sum(kinds[i:i + 20]) for i in range(0, 200, 20)] == [1] * 10
    assert all(s < 2 for s, *_ in mixed(mixture, unlabelled='').picks(0))
    assert all(s == 0 for s, *_ in mixed(mixture, labelled='', unlabelled='c').picks(0))


def test_cameras_are_drawn_by_weight_before_decoding(mixture, monkeypatch):
    read, decode = [], data.read_frames
    monkeypatch.setattr(data, 'read_frames', lambda path, *a: read.append(path) or decode(path, *a))
    c = mixed(mixture, 'b', 'd', camera='left:3,top:1,wrist:3')
    read.clear()
    for step in range(5):
        picks = c.picks(step)
        x = c[step]['x']
        for (s, e, start, camera), frames in zip(picks, x):
            keys = [k for k in c.sets[s].cameras]
            assert abs(frames.float().mean() - (60 * keys.index(camera) + e)) < 3
    assert len(read) == 5 * 8
    cameras = [(s, camera) for step in range(300) for s, _, _, camera in c.picks(step)]
    for s, camera, share in ((0, 'left', .75), (0, 'top', .25), (1, 'top', .25), (1, 'wrist', .75)):
        n = [k.endswith(camera) for t, k in cameras if t == s]
        assert abs(np.mean(n) - share) < 0.05
    assert {k for s, k in cameras if s == 0} == {'observation.images.left', 'observation.images.top'}


def loaded(c, steps, workers):
    return list(torch.utils.data.DataLoader(c, batch_size=None, sampler=steps, num_workers=workers))


def test_batches_do_not_depend_on_workers_or_restarts(mixture):
    whole = loaded(mixed(mixture), range(24), 0)
    for workers in (1, 4):
        assert all(map(same, whole, loaded(mixed(mixture), range(24), workers)))
    for step in np.random.default_rng(0).integers(0, 24, 20):      # stopped there, and gone on with
        again = loaded(mixed(mixture), range(step, min(step + 2, 24)), 2 * int(step == 7))
        assert all(map(same, whole[step:], again))


def test_going_on_decodes_nothing_that_was_seen(mixture, monkeypatch):
    c, decode, read = mixed(mixture), data.read_frames, []
    monkeypatch.setattr(data, 'read_frames', lambda *a: read.append(a) or decode(*a))
    begun = time.perf_counter()
    c[10 ** 9]
    assert len(read) == 8 and time.perf_counter() - begun < 5


def test_an_order_of_the_hub_is_video_after_video(mixture):
    """Also where one table holds the rows of all videos."""
    d = data.LeRobot(mixture / 'c')
    d.hub, d.episodes = 'me/c', [dataclasses.replace(e, video={d.camera: dict(file_index=i)}) for i, e in enumerate(d.episodes)]
    for files in (1, 2):
        order = data.Order(d, range(4), 3, 2, files, 0)
        e = np.array([order[i][0] for i in range(8 * 21)]).reshape(-1, files * 21)      # 21 windows each
        assert order.count == 4 * 21 and all(len({*block}) == files for block in e)
        assert len({*e[:4 // files].ravel()}) == 4


def test_a_long_episode_is_many_segments(mixture, monkeypatch):
    monkeypatch.setattr(data, 'SEGMENT', 16)
    monkeypatch.setattr(data, 'BLOCK', 1)       # nothing but the order of the segments
    starts = [start for i in range(126) for e, start in [mixed(mixture, 'a', 'd').orders[1][i]] if e == 0]
    assert sorted(starts) != starts and sum(abs(np.diff(starts)) > 1) in range(5, 9)


# faults ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('workers', [0, 2])
def test_our_own_mistakes_are_not_bad_data(mixture, monkeypatch, workers):
    for error in [ValueError('z'), TypeError('x'), KeyError('y'), RuntimeError('w')][:1 if workers else None]:
        def wrong(*_):
            raise error
        c = mixed(mixture)
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(data, '_rgb', wrong)
            loaded(c, range(2), workers)


def test_a_worker_that_dies_ends_the_run(mixture, monkeypatch):
    c = mixed(mixture)
    monkeypatch.setattr(data, '_rgb', lambda *_: os._exit(3))
    with pytest.raises(RuntimeError, match='worker'):
        loaded(c, range(4), 2)


def cut(path, share):
    os.truncate(path, int(os.path.getsize(path) * share))


def without_moov(path):
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:24] + whole[whole.index(b'mdat') - 4:])


def overwrite(path, at, content):
    with open(path, 'r+b') as f:
        f.seek(at, 0 if at >= 0 else 2)
        f.write(content)


# name: what is done to the video and the table of an episode, when it is noticed, which words name it
FAULTS = {
    'truncated mp4': (lambda v, t: cut(v, 0.6), 'read', '.mp4'),
    'zero-byte mp4': (lambda v, t: cut(v, 0), 'opening', '.mp4: cannot be read'),
    'moov atom not found': (lambda v, t: without_moov(v), 'opening', '.mp4: cannot be read'),
    'mp4 of noise': (lambda v, t: Path(v).write_bytes(np.random.default_rng(0).bytes(20000)), 'opening',
                     '.mp4: cannot be read'),
    'zero-byte parquet': (lambda v, t: cut(t, 0), 'opening', '.parquet: cannot be read'),
    'truncated parquet': (lambda v, t: cut(t, 0.5), 'opening', '.parquet: cannot be read'),
    'missing column': (lambda v, t: edit_table(t, lambda t: t.drop_columns(['action'])), 'opening',
                       '.parquet: cannot be read (no column action)'),
    'column of another width': (lambda v, t: set_column(t, 'action', [[1.]] * 12), 'opening', 'shape (12, 1)'),
    'ragged column': (lambda v, t: set_column(t, 'action', [[1.] * (1 + i % 2) for i in range(12)]), 'opening',
                      'shape (12, 1)'),
    'column of text': (lambda v, t: set_column(t, 'action', ['go'] * 12), 'opening', 'action is string'),
    'no rows': (lambda v, t: edit_table(t, lambda t: t.slice(0, 0)), 'opening', '.parquet: has 0 frames of episode 3'),
    # the size of the mp4's first box, in 64 bits; the length of the footer, and in it whatever comes
    'claims 10 GB': (lambda v, t: overwrite(v, 0, (1).to_bytes(4, 'big') + b'moov' + (10 << 30).to_bytes(8, 'big')),
                     'opening', '.mp4: cannot be read'),
    'claims 10 GB parquet': (lambda v, t: overwrite(t, -8, (0x7fffffff).to_bytes(4, 'little')), 'opening',
                             '.parquet: cannot be read'),
    'vanished': (lambda v, t: None, 'read', '.mp4: no such file')}


def faulty(tmp_path, name):
    """A v2.1 dataset of ten episodes, one of them bad in the way named."""
    root = write_v2(tmp_path / 'd', 'v2.1', lengths=[12] * 10)
    video = f'{root}/videos/chunk-000/observation.images.top/episode_000003.mp4'
    FAULTS[name][0](video, f'{root}/data/chunk-000/episode_000003.parquet')
    return root, video


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('name', FAULTS)
def test_fault(tmp_path, capfd, name, workers):
    root, video = faulty(tmp_path, name)
    _, when, words = FAULTS[name]
    c = data.Clips([data.LeRobot(root)], [], 3, 2, 0, 8, 1.0, 0.1)
    assert (len(c.sets[0].episodes) == 9) == (when == 'opening') == (words in capfd.readouterr().err)
    c.count_faults({}, 0.1)
    if name == 'vanished':
        os.remove(video)
    batches = loaded(c, range(12), workers)
    for batch in batches:
        assert batch['x'].shape[0] == 8
        c.count_faults(batch, 0.1)
        assert 'faults' not in batch
    error = capfd.readouterr().err
    assert error.count('episode 3: skipped') == (when == 'read') and (words in error) == (when == 'read')
    says(lambda: c.count_faults({}, 0.09), '--max_bad=0.09', '1 of 10 episodes')


def test_a_clip_that_cannot_be_read_is_replaced_by_the_same_one(tmp_path):
    """Whatever was read before, and by which worker: a restart gets the same batches."""
    root, _ = faulty(tmp_path, 'truncated mp4')
    c = data.Clips([data.LeRobot(root)], [], 3, 2, 0, 8, 1.0, 0.1)
    batches = loaded(c, range(12), 0)
    assert any(b['faults'] for b in batches)
    for step in reversed(range(12)):
        assert same(data.Clips([data.LeRobot(root)], [], 3, 2, 0, 8, 1.0, 0.1)[step], batches[step])


def test_odd_values_are_named_once_and_masked(tmp_path, capfd):
    root = write_v2(tmp_path / 'd', 'v2.1', lengths=[12] * 4)
    table = f'{root}/data/chunk-000/episode_000000.parquet'
    a = np.ones((12, 2))
    a[[3, 5]] = np.nan
    edit_table(table, lambda t: t.set_column(0, 'action', pa.array(a.tolist(), pa.list_(pa.float32()))).append_column(
        'timestamp', pa.array(np.arange(12) / 10 + 0.2)))
    write_json(f'{root}/meta/stats.json', {'action': dict(mean=[1, 1], std=[1, 1], min=[0, 0], max=[9, 9])})
    c = data.Clips([data.LeRobot(root)], [], 3, 2, 0, 8, 1.0, 0.25)
    for batch in loaded(c, range(6), 2):
        c.count_faults(batch, 0.0)
        assert torch.isfinite(batch['a']).all()
    error = capfd.readouterr().err
    assert error.count('episode 0: 2 rows of action are not as many finite numbers as most: masked') == 1
    assert error.count('episode 0: timestamps are up to 0.2 s off the grid of 10 frames a second') == 1


def test_nothing_readable_is_an_end_not_a_hang(tmp_path):
    root = write_v2(tmp_path / 'd', 'v2.1', lengths=[12] * 4)
    d = data.LeRobot(root)
    forget()
    shutil.rmtree(f'{root}/videos')
    c = data.Clips([d], [], 3, 2, 0, 8, 1.0, 0.25)
    for batch in loaded(c, [0], 1):
        says(lambda: c.count_faults(batch, 1.0), '100 clips in a row cannot be read', 'no such file')
    says(lambda: c.sample(4, 4), root, 'no episode can be read')
    says(lambda: data.LeRobot(root), root, 'has no episodes', 'no such file')


# cached latents -------------------------------------------------------------------------------------------------------

class Mean(torch.nn.Module):
    """An encoder of two tokens of 4 channels from the means of a frame's halves, which tell similar frames apart."""
    name, layer, pool, size, width, grid, dim, fit = 'mean', -1, 1, 16, 16, (1, 2), 4, None

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.tensor(weight)), 0

    def forward(self, x):
        self.seen += len(x)
        z = torch.sin(200 * x.mean(1).unflatten(2, (2, 8)).mean((1, 3))) * torch.tensor([1.0, 0.5])
        return self.weight * torch.stack([z, -z, z ** 2, torch.ones_like(z)], -1)


def cache(c, encoder=None, folder='', **options):
    cpu = torch.device('cpu')
    return data.cached_latents(c.sets, encoder or Mean(), cpu, data.autocast(cpu, 'float32'), str(folder), **options)


def small(folder):
    """Clips with frames of 16 x 16."""
    return data.Clips([data.LeRobot(f'{folder}/b', 'left,top')], [data.LeRobot(f'{folder}/d')], 3, 2, 16, 6, 0.5, 0.25)


@pytest.mark.parametrize('store, workers', [('float16', 0), ('float16', 2), ('int8', 0)])
@pytest.mark.parametrize('disk', [False, True])
def test_cached_latents_are_those_of_the_frames(mixture, tmp_path, capfd, store, workers, disk):
    c = small(mixture)
    c.tokens = cache(c, folder=tmp_path / 'l' if disk else '', store=store, workers=workers)
    out = capfd.readouterr().out
    assert out.count('latents of') == 3
    assert len(c.tokens) == 2 * 3 + 2
    for step in range(4):
        batch, plain = c[step], small(mixture)[step]
        want = torch.stack([Mean()(x.float() / 255) for x in plain['x']])
        assert batch['z'].dtype == torch.float16 and batch.keys() ^ plain.keys() == {'x', 'z'}
        assert (batch['z'].float() - want).abs().max() < (1e-3 if store == 'float16' else 5e-3)
        assert all(torch.equal(batch[k], plain[k]) for k in ('a', 'a_mask', 'z_mask'))
    assert all(map(same, loaded(c, range(4), 2), loaded(c, range(4), 0)))


@pytest.mark.parametrize('store', ['float16', 'int8'])
def test_every_frame_has_latents_of_its_own(tmp_path, store):
    ramp = np.zeros((40, 16, 16, 3), np.uint8) + 6 * np.arange(40, dtype=np.uint8)[:, None, None, None]
    write_lerobot(tmp_path / 'd', [{'observation.images.top': ramp, 'task': 't'}] * 4, 10)
    c = data.Clips([], [data.LeRobot(tmp_path / 'd')], 3, 2, 16, 6, 0.5, 0.25)
    want = [Mean()(x.float() / 255) for x in c[0]['x']]
    c.tokens = cache(c, store=store)
    assert (c[0]['z'].float() - torch.stack(want)).abs().max() < (1e-3 if store == 'float16' else 6e-3)


def test_a_cache_goes_on_where_it_was_killed(mixture, tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'CHUNK', 16)
    monkeypatch.setattr(data, 'PART', 50 * 2 * 4 * 2)       # bytes: about an episode a file
    c, whole = small(mixture), Mean()
    total = len([None for ds in c.sets for k in ds.chosen for e in ds.episodes for _ in range(e.length)])
    cache(c, whole, tmp_path / 'whole')
    assert whole.seen == total

    class Killed(Mean):
        def forward(self, x):
            if self.seen >= 170:
                raise KeyboardInterrupt
            return super().forward(x)

    with pytest.raises(KeyboardInterrupt):
        cache(c, Killed(), tmp_path / 'killed')
    files = [f for f in (tmp_path / 'killed').rglob('*') if f.is_file()]
    done = [f for f in files if f.suffix == '.npy' and 'scale' not in f.name]
    assert 0 < len(done) and len(done) < len(list((tmp_path / 'whole').rglob('*.npy')))
    frames = sum(len(np.load(f)) for f in done)
    rest = Mean()
    c.tokens = cache(c, rest, tmp_path / 'killed')
    assert rest.seen == total - frames
    other = small(mixture)
    other.tokens = cache(other, again := Mean(), tmp_path / 'whole')
    assert again.seen == 0 and all(same(c[i], other[i]) for i in range(6))


def rank_of(folder, root, rank):
    torch.set_num_threads(1)
    encoder = Mean()
    cache(small(folder), encoder, root, rank=rank, world=2)
    with open(f'{root}/seen{rank}', 'w') as f:
        f.write(str(encoder.seen))


def test_ranks_share_the_encoding(mixture, tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'PART', 50 * 2 * 4 * 2)
    forked(rank_of, *((mixture, tmp_path, r) for r in range(2)))
    seen = [int((tmp_path / f'seen{r}').read_text()) for r in range(2)]
    assert min(seen) > 0 and sum(seen) == 2 * 150 + 200
    one, two = small(mixture), small(mixture)
    one.tokens, two.tokens = cache(one, folder=tmp_path), cache(two)
    assert all(same(one[i], two[i]) for i in range(4))


def test_a_cache_of_other_frames_is_refused_by_name(mixture, tmp_path):
    root = shutil.copytree(mixture, tmp_path / 'data')
    cache(small(root), folder=tmp_path / 'l')
    n = len(os.listdir(tmp_path / 'l'))
    cache(small(root), Mean(2.0), tmp_path / 'l')                                     # other weights: beside it
    cache(small(root), folder=tmp_path / 'l', store='int8')
    assert len(os.listdir(tmp_path / 'l')) == 3 * n
    path = next((root / 'b/videos').rglob('*.mp4'))
    moved = shutil.move(root, tmp_path / 'elsewhere')
    moved_too = shutil.move(tmp_path / 'l', tmp_path / 'l2')
    cache(small(moved), encoder := Mean(), moved_too)
    assert encoder.seen == 0
    root = shutil.copytree(moved, root)
    path.write_bytes(path.read_bytes())
    assert small(root).labelled[0].fingerprint() == small(moved).labelled[0].fingerprint()
    cut(path, 0.99)
    says(lambda: cache(small(root), folder=moved_too), str(moved_too), str(root / 'b'), 'changed')


def test_a_cache_of_episodes_that_begin_elsewhere_now(tmp_path):
    """In the same video; at a lower rate other frames of it are used, if as many."""
    frames = np.arange(20, 220, 10, np.uint8)[:, None, None, None] * np.ones((16, 16, 3), np.uint8)
    write_lerobot(tmp_path / 'd', [{TOP: x, 'task': ''} for x in (frames[:10], frames[10:])], 9)
    for begin in 10, 7:
        path = tmp_path / 'd/meta/episodes/chunk-000/file-000.parquet'
        set_column(path, 'length', [begin, 20 - begin])
        set_column(path, f'videos/{TOP}/from_timestamp', [0, begin / 9])
        ds = data.LeRobot(tmp_path / 'd', action='none', fps=3)
        latents = cache(types.SimpleNamespace(sets=[ds]), folder=tmp_path / 'l')
        for e in range(2):
            want = Mean()(ds.frames(e, range(ds.episodes[e].length), 16).float() / 255)
            assert ds.total == 8 and np.allclose(latents[0, e, TOP]['z'], want.detach(), atol=2e-3)


def test_damaged_latents_are_one_line(mixture, tmp_path):
    cache(small(mixture), folder=tmp_path)
    header = b"\x93NUMPY\1\0\x10\0{'descr': (      "
    for ending, text in (('json', b'[[0,'), ('json', b'[' * 99999), ('npy', b''), ('npy', header), ('json', b'[0]')):
        path = sorted(tmp_path.glob(f'b-top*/*.{ending}'))[0]
        whole = path.read_bytes()
        path.write_bytes(text)
        says(lambda: cache(small(mixture), folder=tmp_path), str(path.with_suffix('')), 'damaged', 'Remove')
        path.write_bytes(whole)
    for other in np.zeros(3), np.load(path.with_suffix('.npy'))[:-1]:
        np.save(path.with_suffix('.npy'), other)
        says(lambda: cache(small(mixture), folder=tmp_path), str(path.with_suffix('')), 'not latents of these frames', 'Remove')


def test_a_cache_that_cannot_be_written(mixture, tmp_path, capsys):      # without that, print fails
    cache(small(mixture), folder=tmp_path / 'l')
    (tmp_path / 'file').write_text('')
    with full_disk():
        cache(small(mixture), folder=tmp_path / 'l')        # is read
        says(lambda: cache(small(mixture), folder=tmp_path / 'other'), f'{tmp_path}/other', 'cannot be written')
    says(lambda: cache(small(mixture), folder=tmp_path / 'file'), f'{tmp_path}/file', 'cannot be written')


def test_what_killed_runs_left_is_removed(mixture, tmp_path):
    cache(small(mixture), folder=tmp_path)
    folder = next(tmp_path.glob('d-top*'))
    kept = sorted(os.listdir(folder))
    for name, age in (('000.12@a.tmp', 3700), ('000.345@b.tmp', 3700), ('001.6@a.tmp', 3500)):
        (folder / name).write_text('')
        os.utime(folder / name, (time.time() - age,) * 2)
    cache(small(mixture), folder=tmp_path)
    assert sorted(os.listdir(folder)) == sorted([*kept, '001.6@a.tmp'])


def test_progress(mixture, monkeypatch, capfd):
    c = small(mixture)
    monkeypatch.setattr(data, '_told', {})
    cache(c)
    assert 'encoding' not in capfd.readouterr().out
    monkeypatch.setattr(data, 'TELL', 0)
    cache(c)
    out, err = capfd.readouterr()
    assert 'frame 130 of 200' in out and not err
    cache(c, rank=1)
    assert capfd.readouterr() == ('', '')


def test_what_cannot_be_encoded_is_counted(tmp_path, capfd):
    root, _ = faulty(tmp_path, 'truncated mp4')
    c = data.Clips([data.LeRobot(root)], [], 3, 2, 16, 8, 1.0, 0.1)
    data._warned.clear()
    cache(c, folder=tmp_path / 'l')
    assert capfd.readouterr().err.count('episode 3: ') == 1
    c.tokens = cache(c, none := Mean(), tmp_path / 'l')
    assert none.seen == 0 and isinstance(c.tokens[0, 3, c.sets[0].camera], data.Bad)
    for step in range(12):
        c.count_faults(c[step], 0.1)
    assert capfd.readouterr().err.count('episode 3: skipped') == 1
    c.val[0], c.tokens = [3], None
    assert c.held_out(3, 4) == {} and 'left out' in capfd.readouterr().err


# motions between poses: the reference turns vectors by q u q* and powers of a matrix, never by the code's formulas ----

PI = np.pi
X, Y, Z = np.eye(3)


def hamilton(a, b):
    """Product of quaternions w x y z, (n, 4) each: the turn b, then the turn a."""
    (aw, ax, ay, az), (bw, bx, by, bz) = a.T, b.T
    return np.stack([aw * bw - ax * bx - ay * by - az * bz, aw * bx + ax * bw + ay * bz - az * by,
                     aw * by - ax * bz + ay * bw + az * bx, aw * bz + ax * by - ay * bx + az * bw], 1)


def turns(n, seed, low=0., high=PI):
    """n unit quaternions w x y z that turn about random axes by an angle between low and high."""
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=(n, 3))
    half = rng.uniform(low, high, (n, 1)) / 2
    return np.hstack([np.cos(half), np.sin(half) * axis / np.linalg.norm(axis, axis=1, keepdims=True)])


def matrices(q):
    """(n, 3, 3): column i is q e_i q*."""
    conjugate = q * [1, -1, -1, -1]
    return np.stack([hamilton(hamilton(q, np.tile([0, *e], (len(q), 1))), conjugate)[:, 1:] for e in np.eye(3)], 2)


def expm(r):
    """exp([r]x) of (n, 3) by the power series at r / 16, squared four times."""
    K = np.zeros((len(r), 3, 3))
    K[:, 2, 1], K[:, 0, 2], K[:, 1, 0] = r.T / 16
    K = K - K.swapaxes(1, 2)
    R = term = np.tile(np.eye(3), (len(r), 1, 1))
    for i in range(1, 20):
        term = term @ K / i
        R = R + term
    for _ in range(4):
        R = R @ R
    return R


def written(q, rotation):
    """Unit quaternions w x y z, written as `rotation` says."""
    R, sine = matrices(q), np.linalg.norm(q[:, 1:], axis=1, keepdims=True)
    return {'quat_wxyz': q, 'quat_xyzw': q[:, [1, 2, 3, 0]], 'rot6d': np.hstack([R[:, :, 0], R[:, :, 1]]),
            'rot6d_rows': np.hstack([R[:, 0], R[:, 1]]),
            'rotvec': 2 * np.arctan2(sine, q[:, :1]) * q[:, 1:] / np.where(sine, sine, 1),
            'euler': np.stack([np.arctan2(R[:, 2, 1], R[:, 2, 2]),
                               np.arctan2(-R[:, 2, 0], np.hypot(R[:, 0, 0], R[:, 1, 0])),
                               np.arctan2(R[:, 1, 0], R[:, 0, 0])], 1)}[rotation]


def deltas(p0, r0, p1, r1, rotation='euler', tool=False):
    """pose_deltas with every warning an error; each part is one row or n of them."""
    parts = [np.atleast_2d(np.asarray(x, float)) for x in (p0, r0, p1, r1)]
    n = max(map(len, parts))
    p0, r0, p1, r1 = (np.broadcast_to(x, (n, x.shape[1])) for x in parts)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        out = data.pose_deltas(np.hstack([p0, r0]), np.hstack([p1, r1]), rotation, tool)
    assert out.shape == (n, 6) and out.dtype == np.float64
    return out


@pytest.mark.parametrize('rotation', data.ROTATIONS)
@pytest.mark.parametrize('low, high', [(0, PI), (0, 0), (1e-9, 1e-9), (3.14, PI), (PI - 1e-9, PI - 1e-9), (PI, PI)])
def test_the_delta_leads_from_before_to_after(rotation, low, high):
    p0, p1 = np.random.default_rng(0).normal(size=(2, 300, 3))
    q0, turn = turns(300, 1), turns(300, 2, low, high)
    q1 = hamilton(turn, q0)
    R0, R1 = matrices(q0), matrices(q1)
    base, tool = (deltas(p0, written(q0, rotation), p1, written(q1, rotation), rotation, tool) for tool in (0, 1))
    np.testing.assert_allclose(p0 + base[:, :3], p1, atol=1e-14)
    np.testing.assert_allclose(expm(base[:, 3:]) @ R0, R1, atol=1e-13)
    np.testing.assert_allclose(p0 + np.einsum('nij,nj->ni', R0, tool[:, :3]), p1, atol=1e-13)
    np.testing.assert_allclose(R0 @ expm(tool[:, 3:]), R1, atol=1e-13)
    for x in base, tool:  # the short way round, and as long as the turn
        angle = np.linalg.norm(x[:, 3:], axis=1)
        assert angle.max() <= PI + 1e-14
        np.testing.assert_allclose(angle, 2 * np.arctan2(np.linalg.norm(turn[:, 1:], axis=1), turn[:, 0]), atol=1e-14)
    for i in 0, 3:  # both halves of one motion, seen from two frames: base = R0 tool
        np.testing.assert_allclose(np.einsum('nij,nj->ni', R0, tool[:, i:i + 3]), base[:, i:i + 3], atol=1e-13)


@pytest.mark.parametrize('axis', np.eye(3))
@pytest.mark.parametrize('angle', [PI / 2, -PI / 2, 1e-12, -1e-12, 1e-6, 3.14, PI - 1e-9])
def test_a_turn_about_an_axis_from_rest(axis, angle):
    """The numbers of the turn are given here: relative accuracy down to an angle of 1e-12."""
    q = np.array([[np.cos(angle / 2), *np.sin(angle / 2) * axis]])
    first, second = (c * np.cos(angle) + np.cross(axis, c) * np.sin(angle) + axis * (axis @ c) * (1 - np.cos(angle))
                     for c in (X, Y))  # Rodrigues: where the turn takes x and y
    for rotation, r0, r1 in [('euler', 0 * X, angle * axis), ('rotvec', 0 * X, angle * axis),
                             ('quat_wxyz', [1, 0, 0, 0], q), ('quat_xyzw', [0, 0, 0, 1], q[:, [1, 2, 3, 0]]),
                             ('rot6d', [*X, *Y], [*first, *second])]:
        for tool in False, True:
            (out,) = deltas([1, 2, 3], r0, [2, 4, 6], r1, rotation, tool)
            np.testing.assert_allclose(out, [1, 2, 3, *angle * axis], rtol=1e-9, atol=abs(angle) * 1e-9)


def test_small_turns_of_a_turned_tool():
    """From any pose the error is that of the pose's own last digit, not its square root (as arccos would have it)."""
    for angle in 1e-12, 1e-8, 1e-4:
        q0, turn = turns(300, 5), turns(300, 6, angle, angle)
        for rotation in data.ROTATIONS:
            out = deltas(X, written(q0, rotation), X, written(hamilton(turn, q0), rotation), rotation)
            np.testing.assert_allclose(out[:, 3:], written(turn, 'rotvec'), rtol=0, atol=4e-15)


def test_a_published_rotation():
    """A row of huggingface.co/datasets/typoverflow/fractal holds one rotation as rpy and as the first two ROWS of R."""
    rpy = [-2.887993574142456, .20818060636520386, -1.7991575002670288]
    rows = [[-.22149360179901123, -.9311460852622986, .2896682918071747],
            [-.9530078768730164, .2696484923362732, .13807876408100128]]
    np.testing.assert_allclose(expm(deltas(X, 0 * X, X, rpy)[:, 3:])[0, :2], rows, atol=2e-7)
    (right,) = deltas(X, 0 * X, X, rpy)
    for name, sign in ('rot6d_rows', 1), ('rot6d', -1):     # who takes rows for columns reads the inverse
        (got,) = deltas(X, [*X, *Y], X, [*rows[0], *rows[1]], name)
        np.testing.assert_allclose(got[3:], sign * right[3:], atol=1e-6)


def test_euler_angles_that_jump_are_small_motions():
    e = 1e-3
    for i in range(3):  # across +-pi: pitch beyond pi / 2 is another way to write a rotation, and must be read too
        before, after = (PI - e) * np.eye(3)[i], (-PI + e) * np.eye(3)[i]
        np.testing.assert_allclose(deltas(X, before, X, after)[0, 3:], 2 * e * np.eye(3)[i], atol=1e-14)
    np.testing.assert_allclose(deltas(X, [PI, .1, -PI], X, [-PI, .1, PI])[0], np.zeros(6), atol=1e-14)
    # two ways to write one rotation
    np.testing.assert_allclose(deltas(X, [.2, .3, .4], X, [.2 + PI, PI - .3, .4 + PI])[0], np.zeros(6), atol=1e-14)
    # at pitch = +-pi / 2 only yaw -+ roll counts
    for pitch, sign in (PI / 2, 1), (-PI / 2, -1):
        np.testing.assert_allclose(deltas(X, [.5, pitch, .2], X, [.5 + .7, pitch, .2 + sign * .7])[0], 0, atol=1e-14)
        np.testing.assert_allclose(deltas(X, [.5, pitch, .2], X, [.5, pitch, .3])[0, 3:], .1 * Z, atol=1e-14)
        np.testing.assert_allclose(deltas(X, [.5, pitch, .2], X, [.6, pitch, .2])[0, 3:], -sign * .1 * Z, atol=1e-14)


def test_quaternions_of_either_sign_and_any_length():
    q0, q1 = turns(300, 8), hamilton(turns(300, 9, 0, 3.1), turns(300, 8))
    for tool in False, True:
        want = deltas(X, q0, Y, q1, 'quat_wxyz', tool)
        for scale in -1, 3, -.01, 1e-30, 1e30:
            np.testing.assert_allclose(deltas(X, scale * q0, Y, q1, 'quat_wxyz', tool), want, atol=1e-13)
            np.testing.assert_allclose(deltas(X, q0, Y, scale * q1, 'quat_wxyz', tool), want, atol=1e-13)
    assert (deltas(X, q0, X, -q0, 'quat_wxyz') == 0).all()


@pytest.mark.parametrize('rotation, before, after, turn', [
    ('rotvec', 0 * X, (PI + .1) * Z, -(PI - .1) * Z), ('rotvec', 0 * X, 2 * PI * Y, 0 * X),     # the short way
    # columns of a quarter turn about z: x goes to y, y to -x; read as rows it turns back
    ('rot6d', [*X, *Y], [0, 1, 0, -1, 0, 0], PI / 2 * Z),
    # neither long nor square, as a network writes them: the first keeps its direction, the second the plane
    ('rot6d', [*X, *Y], [0, 5, 0, -2, 7, 0], PI / 2 * Z)])
def test_known_turns(rotation, before, after, turn):
    atol = 1e-15 if rotation == 'rot6d' else 1e-14
    np.testing.assert_allclose(deltas(X, before, X, after, rotation)[0], [0, 0, 0, *turn], atol=atol)


@pytest.mark.parametrize('tool', [False, True])
def test_what_is_no_pose_is_nan_in_its_row_alone(tool):
    for rotation, k in data.ROTATIONS.items():
        good = written(turns(20, 10), rotation)
        want = deltas(X, good, Y, good[::-1], rotation, tool)
        for bad in np.nan, np.inf:
            for column in range(3 + k):
                poses = [np.hstack([np.tile(x, (20, 1)), r]) for x, r in ((X, good), (Y, good[::-1]))]
                poses[column % 2][7, column] = bad
                out = deltas(*np.split(poses[0], [3], 1), *np.split(poses[1], [3], 1), rotation, tool)
                assert np.isnan(out[7]).all()
                np.testing.assert_array_equal(np.delete(out, 7, 0), np.delete(want, 7, 0))
    for rotation, nothing in ('quat_xyzw', [0] * 4), ('quat_wxyz', [0] * 4), ('rot6d', [0] * 6), ('rot6d', [*X, *X]):
        some = written(turns(1, 11), rotation)[0]
        out = deltas(X, [some, nothing, some, some], X, [some, some, nothing, some], rotation, tool)
        assert np.isnan(out).all(1).tolist() == [False, True, True, False]


def test_no_rows_and_float32_rows():
    assert data.pose_deltas(np.zeros((0, 6)), np.zeros((0, 6)), 'euler', True).shape == (0, 6)
    rows = np.float32([[.1, .2, .3, .1, .2, .3]])  # computed in float64: the same numbers, read exactly
    same = data.pose_deltas(rows, 2 * rows, 'euler', True)
    np.testing.assert_array_equal(same, data.pose_deltas(np.float64(rows), np.float64(2 * rows), 'euler', True))


def poses(n, seed):
    """A tool that turns by 0.3 about its own z and goes 0.1 along its own x in every frame: x y z roll pitch yaw."""
    at, yaw, out = np.zeros(2), 0.1 * seed, []
    for _ in range(n):
        out.append([*at, 0.5, 0, 0, yaw])
        at, yaw = at + 0.1 * np.array([np.cos(yaw), np.sin(yaw)]), (yaw + 0.3 + PI) % (2 * PI) - PI
    return np.array(out, np.float32)


@pytest.mark.parametrize('key', ['observation.state', 'action'])
@pytest.mark.parametrize('fps', [0, 5])
def test_deltas_of_a_dataset(tmp_path, key, fps):
    """Row j leads from frame j to frame j + 1: states are reached there, targets given before; at any rate."""
    write_lerobot(tmp_path / 'd', [{'observation.images.top': np.zeros((L, 16, 16, 3), np.uint8), 'task': '',
                                         key: np.hstack([poses(L, L), np.arange(L)[:, None]])} for L in (30, 21)], 10)
    k = 2 if fps else 1
    ds = {mode: data.LeRobot(tmp_path / 'd', action=key, fps=fps, action_mode=mode) for mode in ('delta', 'delta_tool')}
    assert [d.action_names for d in ds.values()] == [[], []]        # they are no targets
    for i, n in enumerate((30, 21)):
        own, base = ds['delta_tool'].rows(i), ds['delta'].rows(i)
        length = -(-n // k)
        assert own.shape == base.shape == (length, 7) and ds['delta'].action_dim == 7
        known = np.arange(length - 1) if key != 'action' else np.arange(1, n // k)
        assert np.isfinite(own[known]).all() and np.isnan(np.delete(own, known, 0)).any(1).all()
        yaw = 0.3 * np.arange(k)        # k small motions, each turned by those before it
        step = np.array([0.1 * np.cos(yaw).sum(), 0.1 * np.sin(yaw).sum(), 0, 0, 0, 0.3 * k])
        np.testing.assert_allclose(own[known, :6], np.tile(step, (len(known), 1)), atol=1e-5)
        truth = poses(n, n)             # in the base's frame: differences, and the same turn about z
        after = (known + (key != 'action')) * k + (k - 1) * (key == 'action')
        np.testing.assert_allclose(base[known, :3], (truth[after] - truth[after - k])[:, :3], atol=1e-5)
        np.testing.assert_allclose(base[known, 5], 0.3 * k, atol=1e-5)
        np.testing.assert_array_equal(own[known, 6], after)     # what is no pose: as it is at the end of the step
        c = ds['delta'].clip(i, 0, 4, 2)
        assert c['a'].shape == (4, 14) and c['a_mask'].tolist() == [False, key != 'action', True, True]
    assert np.allclose(ds['delta_tool'].stats['mean'][:6], step, atol=1e-5)     # measured, not the poses'


# the hub --------------------------------------------------------------------------------------------------------------

@pytest.fixture
def hub(mixture, made, tmp_path, monkeypatch):
    """A hub with me/made and me/a .. me/d; what comes from it is kept in tmp_path."""
    shutil.copytree(mixture, tmp_path / 'hub/me')
    shutil.copytree(made, tmp_path / 'hub/me/made')
    # many files: an episode each
    write_lerobot(tmp_path / 'hub/me/many', (episode(20 + i, i) for i in range(12)), 10, file_mb=0)
    monkeypatch.setattr(data, 'HUB_HOME', str(tmp_path / 'kept'))
    monkeypatch.setattr(data, 'PATIENCE', 20)
    monkeypatch.setattr(data.huggingface_hub.constants, 'DOWNLOAD_CHUNK_SIZE', 500)     # what is kept of a broken one
    monkeypatch.setattr(data.huggingface_hub.constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 60)  # on a busy machine
    with Hub(tmp_path / 'hub') as server:
        monkeypatch.setenv('HF_ENDPOINT', server.url)
        yield server


def fetched(hub):
    return [r.path.split('/', 6)[-1] for r in hub.log if r.method == 'GET' and '/resolve/' in r.path and r.status < 300]


def test_a_dataset_of_the_hub(hub, made, tmp_path):
    d, local = data.LeRobot('me/made', 'top'), data.LeRobot(made, 'top')
    assert d.name == f'me/made@{hub.commit("me/made")}' and all(name.startswith('meta/') for name in fetched(hub))
    for i in range(3):
        assert np.array_equal(d.rows(i), local.rows(i)) and torch.equal(d.frames(i, [0, 5]), local.frames(i, [0, 5]))
    assert sorted(n for n in fetched(hub) if not n.startswith('meta/')) == [ROWS, VIDEO]    # once, no other camera
    hub.log.clear()
    again = data.LeRobot(d.name)        # that very revision: it is all there
    assert torch.equal(again.frames(1, [3]), local.frames(1, [3])) and not hub.log


def test_the_revision_is_pinned(hub, tmp_path):
    hub.fail('/api/datasets/me/made', 429, seconds=1)       # is waited for
    first = data.LeRobot('me/made')
    (tmp_path / 'hub/me/made/README.md').write_text('new')
    second = data.LeRobot('me/made')
    assert first.hub.revision != second.hub.revision == hub.commit('me/made')
    assert data.LeRobot(first.name).hub.revision == first.hub.revision


@pytest.mark.parametrize('name, words', [
    ('me/nothing', '404'), ('nobody/made', '404'), ('me/made@0123abc', '404'), ('a--b/c', 'not to be had from the hub'),
    ('../nothing', 'no such folder'), ('данные/набор', 'no such folder')])
def test_what_the_hub_does_not_have(hub, name, words):
    says(lambda: data.LeRobot(name), name.strip('.'), words)


def test_no_network_is_said_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(data, 'HUB_HOME', str(tmp_path))
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    begun = time.perf_counter()
    says(lambda: data.LeRobot('some/folder'), 'some/folder', 'hub')
    assert time.perf_counter() - begun < 30


def test_a_mirror_that_says_less(hub, made):
    hub.bare = True
    d = data.LeRobot('me/made', 'top')
    hub.fail('.mp4', 'cut')
    assert torch.equal(d.frames(0, [0, 5]), data.LeRobot(made, 'top').frames(0, [0, 5]))


def test_what_has_come_is_used_without_the_hub(hub, tmp_path, monkeypatch, capfd):
    names = 'me/made', 'me/many@main'
    for name in names:
        data.LeRobot(name, 'top').frames(0, [0])
    begun = time.monotonic()
    monkeypatch.setattr(data.huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    for name in names:
        d = data.LeRobot(name, 'top')
        assert len(d.frames(0, [0])) == 1
        assert f'goes on with what came last, {d.hub.revision}' in capfd.readouterr().err
    with pytest.raises(data.Away, match='file-001.mp4: .*offline'):
        d.frames(1, [0])
    says(lambda: data.LeRobot('me/b'), 'me/b', 'offline')
    assert time.monotonic() - begun < 10
    monkeypatch.setattr(data.huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    hub.fail('file-001.mp4', 503)
    d.frames(1, [0])
    assert 'asked again for 20 s' in capfd.readouterr().err


def streamed(name='me/many', cache_gb=50):
    return data.Clips([data.LeRobot(name, 'top', cache_gb=cache_gb)], [], 3, 2, 0, 2, 1.0, 0.25)


def test_why_no_action_of_the_hub_can_be_read(hub, tmp_path):
    root = tmp_path / 'hub/me/made'
    os.remove(root / 'meta/stats.json')
    set_column(root / ROWS, 'action', ['go'] * 88)
    says(lambda: data.LeRobot('me/made'), 'file-000.parquet', 'action is string, not numbers')


def test_states_that_the_hub_lacks(hub, sensing, tmp_path):
    """Its tables are read when they are drawn: of an episode whose rows are too few nothing is known."""
    edit_table(f'{shutil.copytree(sensing[0] / "a", tmp_path / "hub/me/sensing")}/{ROWS}', lambda t: t.slice(0, 40))
    d = data.LeRobot('me/sensing', state=STATE, probe=data.ENVIRONMENT)
    says(lambda: d.states(2), 'file-000.parquet', r'observation.state has shape (10, 3) in episode 2, expected (21, 3)',
         error=data.Bad)
    assert np.isnan(d.probed(2)).all() and np.array_equal(d.states(1), sensing[1]['a'][1])
    c = data.Clips([d], [], 3, 2, 0, 2, 1.0, 0.25)
    assert np.allclose(c.states[0][0], np.concatenate([sensing[1]['a'][e] for e in c.train[0] if e < 2]).mean(0))


@pytest.mark.parametrize('workers', [0, 2])
def test_streamed_batches_equal_local_ones(hub, tmp_path, workers):
    local = streamed(tmp_path / 'hub/me/many')
    c = streamed()
    got = loaded(c, range(6), workers)
    assert not any(batch['faults'] for batch in got)
    assert sorted(set(fetched(hub))) == sorted(fetched(hub)), 'a file came twice'
    for step, batch in enumerate(got):
        for k, (s, e, start, camera) in enumerate(c.picks(step)):
            assert torch.equal(batch['x'][k], local.clip(s, e, start, camera, 3)['x'])


def test_files_come_ahead_of_time_and_no_others(hub, monkeypatch):
    monkeypatch.setattr(data, 'BLOCK', 20)      # an epoch uses up one file after the other
    monkeypatch.setattr(data, 'AHEAD', 8)
    c = streamed()
    c[0]
    soon = {p for step in range(8) for s, e, _, k in c.picks(step) for p in c.sets[0].files(c.sets[0].episodes[e], k)}
    for _ in range(200):
        if all(map(os.path.exists, soon)):
            break
        time.sleep(0.05)
    have = {name for name in fetched(hub) if not name.startswith('meta/')}
    assert have == {os.path.relpath(p, c.sets[0].root) for p in soon} and len(have) < 24
    hub.log.clear()
    c[1]
    assert not fetched(hub)


def test_the_disk_cache_is_bounded(hub, tmp_path):
    limit = 6 * max(p.stat().st_size for p in (tmp_path / 'hub/me/many').rglob('file-*') if 'meta' not in p.parts)
    c = streamed(cache_gb=limit / 1e9)
    local = streamed(tmp_path / 'hub/me/many')
    for step in range(0, 240, 7):
        for s, e, start, camera in c.picks(step):
            assert torch.equal(c.clip(s, e, start, camera, 3)['x'], local.clip(s, e, start, camera, 3)['x'])
            kept = [p for d in ('data', 'videos') for p in (tmp_path / 'kept').rglob(f'{d}/**/*') if p.is_file()]
            assert sum(p.stat().st_size for p in kept) <= limit
    assert len(fetched(hub)) > len(set(fetched(hub))), 'some had to come again'


def test_what_was_used_last_stays(hub, tmp_path):
    d = data.LeRobot('me/many', 'top', 'none')
    size = os.path.getsize(tmp_path / 'hub/me/many/videos/observation.images.top/chunk-000/file-000.mp4')
    d.hub.cache_gb = 2.5 * size / 1e9
    for e in (0, 1, 0, 2):
        d.frames(e, [0])
        time.sleep(0.02)
    names = sorted(p.name for p in (tmp_path / 'kept').rglob('*.mp4'))
    assert names == ['file-000.mp4', 'file-002.mp4']


@pytest.mark.parametrize('kind, options', [(429, dict(headers={'RateLimit': '"api";r=0;t=2'})), (503, {}), ('cut', dict(times=2)),
                                           ('cut', dict(keep=1000)), ('stall', dict(seconds=30))])
def test_a_hub_that_fails_is_asked_again(hub, monkeypatch, kind, options):
    if kind == 'stall':
        monkeypatch.setattr(data.huggingface_hub.constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 1)
    d = data.LeRobot('me/made', 'top', 'none')
    hub.log.clear()
    hub.fail('.mp4', kind, **options)
    begun = time.monotonic()
    assert d.frames(0, [0]).shape == (1, 3, 32, 48)
    gets = [r for r in hub.log if r.method == 'GET' and r.path.endswith('.mp4')]
    if kind == 429:
        assert time.monotonic() - begun >= 2
    if kind == 'stall':
        assert time.monotonic() - begun < 20
    if kind == 'cut':
        assert gets[-1].range, 'goes on where it broke off'


def test_a_hub_that_does_not_come_back(hub, monkeypatch, capfd):
    monkeypatch.setattr(data, 'PATIENCE', 3)
    c = streamed()
    name = c.sets[0].episodes[c.train[0][0]].data['file_index']
    hub.fail(f'file-{name:03d}.mp4', 404, times=1000, method='HEAD')
    seen = [c.count_faults(c[step], 0.1) for step in range(60)]
    assert len(seen) == 60 and capfd.readouterr().err.count('not to be had from the hub (404') == 1
    says(lambda: c.count_faults({}, 0.05), '1 of 12 episodes')


def fetch_all(home, url):
    data.HUB_HOME, os.environ['HF_ENDPOINT'] = home, url
    d = data.LeRobot('me/many', 'top', 'none')
    for e in range(12):
        d.frames(e, [0])


@pytest.mark.parametrize('locks', [True, False])
def test_processes_share_a_disk(hub, tmp_path, monkeypatch, locks):
    """Without locks, as on some network file systems, files may come twice, but whole."""
    data.LeRobot('me/many')
    if not locks:
        monkeypatch.setattr(data.huggingface_hub.utils, 'WeakFileLock', lambda path: contextlib.nullcontext())
    forked(fetch_all, *[(str(tmp_path / 'kept'), hub.url)] * 3)
    assert not locks or len(fetched(hub)) == len(set(fetched(hub)))
    for path in (tmp_path / 'kept').rglob('videos/**/*.mp4'):
        assert path.read_bytes() == next((tmp_path / 'hub/me/many').rglob(f'*.top/*/{path.name}')).read_bytes()


def test_a_killed_download_goes_on(hub, tmp_path):
    data.LeRobot('me/made')
    hub.fail('.mp4', 'stall', seconds=60, keep=2000)
    read = data.LeRobot('me/made', 'top', 'none').frames
    child = multiprocessing.get_context('fork').Process(target=read, args=(0, [0]))
    child.start()
    for _ in range(200):
        parts = [p for p in (tmp_path / 'kept').rglob('.part/**/*.mp4.*') if p.stat().st_size >= 2000]
        if parts:
            break
        time.sleep(0.05)
    child.kill()
    child.join()
    hub.log.clear()
    os.utime(parts[0], (time.time() - 200,) * 2)        # longer than a live one waits for an answer
    data.LeRobot('me/made', 'top', 'none').frames(0, [0])
    assert [r.range for r in hub.log if r.method == 'GET' and r.path.endswith('.mp4')] == ['bytes=2000-']
    assert not [p for p in (tmp_path / 'kept').rglob('.part/**/*') if p.is_file() and p.suffix != '.lock']


def same_files(one, two):
    """How many files two folders have, after a look that they are equal byte for byte."""
    names = [sorted(p.relative_to(root) for p in root.rglob('*') if p.is_file()) for root in (one, two)]
    assert names[0] == names[1] and all((one / n).read_bytes() == (two / n).read_bytes() for n in names[0])
    return len(names[0])


# the writer: frame by frame, and in several files ---------------------------------------------------------------------

def noisy(n, H, W, seed):
    """Frames that do not compress."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 256, (H, W, 3), dtype=np.uint8) for _ in range(n))


SEVEN = 7, 60, 3, 45, 45, 1, 30


def two_cameras():
    for i, n in enumerate(SEVEN):
        yield {'observation.images.top': noisy(n, 64, 96, i), 'observation.images.side': noisy(n, 33, 47, i + 100),
               'action': [[i, f] for f in range(n)], 'task': f'task {i % 2}'}


@pytest.fixture(scope='module')
def rolled(tmp_path_factory):
    root = str(tmp_path_factory.mktemp('rolled') / 'd')
    write_lerobot(root, two_cameras(), 10, file_mb=.25)
    return root


def test_new_files_when_a_video_is_full(rolled):
    rows = pq.read_table(f'{rolled}/meta/episodes/chunk-000/file-000.parquet').to_pylist()
    numbers = [r['data/file_index'] for r in rows]
    assert numbers == sorted(numbers) and set(numbers) == set(range(max(numbers) + 1)) and 2 <= max(numbers) <= 5
    places = 'data', 'videos/observation.images.top', 'videos/observation.images.side'
    for place in places:
        assert [r[f'{place}/file_index'] for r in rows] == numbers and {r[f'{place}/chunk_index'] for r in rows} == {0}
        assert len(os.listdir(f'{rolled}/{place}/chunk-000')) == max(numbers) + 1
    sizes = [os.path.getsize(f'{rolled}/{places[1]}/chunk-000/file-{n:03d}.mp4') for n in range(max(numbers) + 1)]
    assert min(sizes[:-1]) >= .25 * 2 ** 20  # the larger camera decides
    for n in range(max(numbers) + 1):
        here = [r for r in rows if r['data/file_index'] == n]
        ends = np.cumsum([0] + [r['length'] for r in here])
        for place in places[1:]:
            assert [r[f'{place}/from_timestamp'] for r in here] == [e / 10 for e in ends[:-1]]
            assert [r[f'{place}/to_timestamp'] for r in here] == [e / 10 for e in ends[1:]]
            assert len(sequential(f'{rolled}/{place}/chunk-000/file-{n:03d}.mp4')) == ends[-1]
        table = pq.ParquetFile(f'{rolled}/data/chunk-000/file-{n:03d}.parquet')
        assert table.num_row_groups == len(here)
        assert table.read(['index'])['index'].to_pylist() == list(range(here[0]['dataset_from_index'],
                                                                        here[-1]['dataset_to_index']))
    assert [r['dataset_to_index'] for r in rows] == np.cumsum(SEVEN).tolist()
    info = read_json(f'{rolled}/meta/info.json')
    assert (info['total_episodes'], info['total_frames'], info['total_tasks']) == (7, sum(SEVEN), 2)


@pytest.mark.parametrize('camera, side', [('top', (64, 96)), ('side', (34, 48))])
def test_frames_and_rows_of_several_files(rolled, camera, side):
    d = data.LeRobot(rolled, camera)
    truth = np.concatenate([sequential(path) for path in sorted(glob.glob(f'{rolled}/videos/{d.camera}/*/*.mp4'))])
    assert truth.shape == (sum(SEVEN), *side, 3)
    for i, n in enumerate(SEVEN):
        first = sum(SEVEN[:i])
        for k in range(n), [n - 1]:
            assert np.array_equal(d.frames(i, k).permute(0, 2, 3, 1).numpy(), truth[first:first + n][k])
        assert d.rows(i).tolist() == [[i, f] for f in range(n)]
        assert d.clip(i, 0, 2, 1)['task'] == f'task {i % 2}'


def test_more_than_a_thousand_files(tmp_path):
    write_lerobot(tmp_path / 'd', ({'observation.images.a': np.full((1, 16, 16, 3), i % 200, np.uint8), 'task': ''}
                                        for i in range(1002)), 10, file_mb=0)
    d, rows = data.LeRobot(tmp_path / 'd'), pq.read_table(tmp_path / 'd/meta/episodes').to_pydict()
    for place in ('data', 'videos/observation.images.a'):
        assert set(rows[f'{place}/chunk_index']) == {0} and rows[f'{place}/file_index'] == [*range(1002)]
    for i in (0, 999, 1000, 1001):
        assert abs(d.frames(i, [0]).float().mean() - i % 200) < 3


def test_statistics_of_pictures(tmp_path):
    """Of some small ones alone, in a long episode as well."""
    x = {n: np.stack(list(noisy(n, 32, 48, n))) for n in (5, 730)}
    write_lerobot(tmp_path / 'd', [{'observation.images.a': frames, 'task': 't'} for frames in x.values()], 10)
    stats = read_json(tmp_path / 'd/meta/stats.json')['observation.images.a']
    truth = np.concatenate(list(x.values())).reshape(-1, 3) / 255
    assert np.allclose(np.ravel(stats['mean']), truth.mean(0), atol=.01) and stats['count'] == [735]
    assert np.allclose(np.ravel(stats['std']), truth.std(0), atol=.01)


def test_a_vector_of_width_one_is_a_column_of_numbers(tmp_path):
    """lerobot's rule, whose package does not open the file otherwise."""
    write_lerobot(tmp_path / 'd', [{'observation.images.a': noisy(4, 16, 16, 0), 'task': 't',
                                         'action': [[i] for i in range(4)]}], 10)
    d = data.LeRobot(tmp_path / 'd')
    assert str(pq.read_schema(tmp_path / 'd/data/chunk-000/file-000.parquet').field('action').type) == 'float'
    assert d.rows(0).tolist() == [[0], [1], [2], [3]] and d.stats['max'].tolist() == [3]


def raising(n, error):
    yield from noisy(n, 16, 16, 0)
    raise error


@pytest.mark.parametrize('bad, error', [
    ({'observation.images.a': raising(4, RuntimeError('no frame'))}, RuntimeError),
    ({'observation.images.a': raising(4, KeyboardInterrupt())}, KeyboardInterrupt),
    ({'observation.images.a': noisy(4, 16, 18, 0)}, AssertionError),
    ({'observation.images.b': noisy(3, 16, 16, 0)}, ValueError),
    ({'observation.images.a': noisy(3, 16, 16, 0)}, ValueError), ({'action': [[0.]] * 3}, ValueError),
    ({'action': [[0., 1.]] * 4}, ValueError), ({'action': [0.] * 4}, IndexError), ({'action': []}, ValueError),
    ({'observation.images.a': iter(()), 'observation.images.b': iter(()), 'action': []}, ValueError),
    ({'observation.images.a': (x.astype(np.float32) for x in noisy(4, 16, 16, 0))}, ValueError),
    ({'observation.images.a': (x[..., 0] for x in noisy(4, 16, 16, 0))}, AssertionError),
    ({'observation.images.c': noisy(4, 16, 16, 0)}, AssertionError)])
def test_a_bad_episode_leaves_nothing(tmp_path, bad, error):
    def episode(**changes):
        return {'observation.images.a': noisy(4, 16, 16, 0), 'observation.images.b': noisy(4, 16, 16, 1),
                'action': [[0.]] * 4, 'task': 't', **changes}

    root = tmp_path / 'd'
    with pytest.raises(error):
        write_lerobot(root, [episode(), episode(**bad)], 10)
    assert not root.exists()
    write_lerobot(root, [episode(), episode()], 10)
    assert len(data.LeRobot(root).episodes) == 2


def test_two_writers_of_one_name(tmp_path):
    root = tmp_path / 'd'
    with owner(f'{root}.1@other.tmp') as other:
        says(lambda: data.Writer(root, 10), f'{root}.1@other.tmp', f'process {other.pid}', 'wait')
    writer = data.Writer(root, 10)
    for x in noisy(3, 16, 16, 0):
        writer.add(x)
    writer.end_episode('t')
    root.mkdir()        # by whom no lock keeps out
    (root / 'theirs').write_text('')
    says(lambda: writer.__exit__(None, None, None), 'cannot be written', 'not empty', writer.tmp)
    assert os.listdir(root) == ['theirs'] and len(data.LeRobot(writer.tmp).episodes) == 1
    shutil.rmtree(root)
    data.Writer(root, 10)
    assert len(data.LeRobot(writer.tmp).episodes) == 1      # what is whole stays


def test_the_demo_world_is_written_once(tmp_path):
    forked(data.write_demo, *[(tmp_path / 'demo', 3, True, 1)] * 3)
    assert os.listdir(tmp_path) == ['demo'] and len(data.LeRobot(tmp_path / 'demo').episodes) == 3


def test_a_writer_on_a_full_disk(tmp_path):
    (tmp_path / 'file').write_text('')
    says(lambda: data.Writer(tmp_path / 'file/d', 10), f'{tmp_path}/file/d', 'cannot be written')
    for name in f'{tmp_path}/a,b', f'{tmp_path}/run_12:30', ' d':
        says(lambda: data.Writer(name, 10), name, 'wants a name')
    for frames in 1, 600:       # at the end, and in between
        with pytest.raises(SystemExit, match='cannot be written'), data.Writer(tmp_path / 'd', 10) as writer:
            with full_disk():
                for x in noisy(frames, 64, 64, 0):
                    writer.add(x)
                writer.end_episode('t')
                writer.close()
        assert not (tmp_path / 'd').exists()


def test_a_long_video_is_never_in_memory(tmp_path):
    """3000 frames are 0.7 GB; beside what 300 frames took, they take next to nothing."""
    program = """
import resource, sys
import numpy as np, data
x = np.zeros((240, 320, 3), np.uint8)       # one buffer, as simulators have
for n in (300, 3000):
    with data.Writer(sys.argv[1] + str(n), 30) as writer:
        for i in range(n):
            x[:] = i % 250
            writer.add(x)
        writer.end_episode('t')
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    run = subprocess.run([sys.executable, '-c', program, f'{tmp_path}/'], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    few, many = (int(line) for line in run.stdout.splitlines() if line.isdigit())
    assert many - few < 35, run.stdout


# plain videos ---------------------------------------------------------------------------------------------------------

def shown(d, i):
    """Which frame of its video each frame of an episode is."""
    x = d.frames(i, range(d.episodes[i].length)).float().mean(1)  # (length, H, W)
    return sum((x[:, x.shape[1] // 4, int(x.shape[2] * (bit + .5) / 6)] > 120).long() << bit
               for bit in range(6)).tolist()


def test_videos_of_different_rates_and_sizes(tmp_path, capsys):
    video(tmp_path / 'a.mp4', 30)
    video(tmp_path / 'b.mkv', 20, 30, (96, 96), codec='mpeg4', bf='2')
    video(tmp_path / 'c.webm', 12, 5, (50, 30), codec='libvpx-vp9')
    (tmp_path / 'd.txt').write_text('not a video\n' * 99)
    (tmp_path / 'e.mp4').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\n')
    (tmp_path / 'f').mkdir()
    data.import_videos(tmp_path / 'out', f'{tmp_path}/*')
    d = data.LeRobot(tmp_path / 'out')
    assert (d.fps, d.action_dim, d.cameras) == (10, 0, ['observation.images.video'])
    assert [e.tasks for e in d.episodes] == [['a'], ['b'], ['c']] and d.frames(2, [0]).shape == (1, 3, 48, 64)
    assert shown(d, 0) == list(range(30)) and shown(d, 1) == [0, 3, 6, 9, 12, 15, 18]
    assert shown(d, 2) == sorted([*range(12)] * 2)
    out = capsys.readouterr().out
    assert 'd.txt' in out and 'e.mp4' in out and 'git-LFS' in out
    data.import_videos(tmp_path / 'out2', f'{tmp_path}/*', 15, (32, 40))
    d = data.LeRobot(tmp_path / 'out2', '')
    assert d.fps == 15 and d.frames(1, [0]).shape == (1, 3, 32, 40) and shown(d, 1) == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    c = d.clip(0, 0, 4, 2)
    assert c['a'].shape == (4, 0) and not c['a_mask'].any() and c['z_mask'].all()


def test_pixels_of_an_imported_video(tmp_path):
    """As from the array that the shared reader gives."""
    video(tmp_path / 'a.mp4', 20)
    data.import_videos(tmp_path / 'one', f'{tmp_path}/a.mp4', size=(24, 24))
    x = data.read_frames(f'{tmp_path}/a.mp4', range(20), 24).permute(0, 2, 3, 1).numpy()
    write_lerobot(tmp_path / 'two', [{'observation.images.video': x, 'task': 'a'}], 10.0)
    assert same_files(tmp_path / 'one', tmp_path / 'two') == 6


@pytest.mark.parametrize('rate, fps', [(fractions.Fraction(30000, 1001), 29.97), (25, 25),
                                       (fractions.Fraction(24000, 1001), 23.976)])
def test_rate_of_the_first_video(tmp_path, rate, fps):
    video(tmp_path / 'a.mp4', 40, rate)
    data.import_videos(tmp_path / 'out', f'{tmp_path}/*.mp4')
    d = data.LeRobot(tmp_path / 'out')
    assert d.fps == fps and shown(d, 0) == list(range(40))


@pytest.mark.parametrize('name, bf', [('a.mp4', '0'), ('a.mp4', '3'), ('a.mkv', '0')])
def test_variable_frame_rate(tmp_path, name, bf):
    times = [1000 + t for t in (0, 33, 67, 150, 400, 433, 467, 500, 905, 1000)]  # a phone in the dark, and a late start
    video(tmp_path / name, 10, 30, times=times, bf=bf)
    data.import_videos(tmp_path / 'out', f'{tmp_path}/a.*', 10)
    assert shown(data.LeRobot(tmp_path / 'out'), 0) == [0, 2, 3, 4, 4, 7, 7, 7, 8, 8, 9]


def test_a_video_with_a_hole(tmp_path, capsys):
    video(tmp_path / 'a.mp4', 5, 30, times=[0, 33, 67, 10 ** 7, 10 ** 7 + 33], bf='0')
    data.import_videos(tmp_path / 'out', f'{tmp_path}/*.mp4', 10)
    assert data.LeRobot(tmp_path / 'out').total < 9 and 'shows nothing for 10 minutes' in capsys.readouterr().out


@pytest.mark.parametrize('name, options', [('a.ts', dict(bf='2')), ('b.avi', dict(codec='mpeg4', bf='2')),
                                           ('a.webm', dict(codec='libvpx-vp9')), ('a.mov', dict(bf='3'))])
def test_containers(tmp_path, capsys, name, options):
    video(tmp_path / name, 25, 25, **options)
    video(tmp_path / 'raw.h264', 25, 25)
    data.import_videos(tmp_path / 'out', f'{tmp_path}/*.*', 25)
    assert shown(data.LeRobot(tmp_path / 'out'), 0) == [*range(25)]
    assert 'raw.h264: cannot be read (no video with times in it)' in capsys.readouterr().out


@pytest.mark.parametrize('turn, place', [(0, (12, 26.6)), (-90, (26.6, 36)), (90, (37.4, 12)), (180, (36, 37.4))])
def test_phones_videos_are_turned_upright(tmp_path, turn, place):
    """place: where the bright stripe of frame 4 is to be found, (row, column)."""
    video(tmp_path / 'a.mp4', 5, turn=turn)
    for size, want in (((0, 0), (64, 48) if turn % 180 else (48, 64)), ((32, 20), (32, 20))):
        out = tmp_path / f'{want[0]} x {want[1]}'
        data.import_videos(out, f'{tmp_path}/*.mp4', 0, size)
        x = data.LeRobot(out).frames(0, [4])[0].float().mean(0)
        scale = torch.tensor(want) / torch.tensor((64, 48) if turn % 180 else (48, 64))
        assert tuple(x.shape) == want
        assert (((x > 120).nonzero() + .5).mean(0) / scale - torch.tensor(place)).abs().max() < 2


def test_a_video_that_breaks_off(tmp_path, capsys):
    """A file that has no beginning is skipped; what comes before the damage is used."""
    x = torch.from_numpy(np.stack(list(noisy(40, 96, 96, 0)))).permute(0, 3, 1, 2)
    data.write_video(tmp_path / 'a.mp4', x, 10)
    whole = (tmp_path / 'a.mp4').read_bytes()
    (tmp_path / 'b.mp4').write_bytes(bytes(300) + whole[300:])
    (tmp_path / 'c.mp4').write_bytes(whole[:len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    data.import_videos(tmp_path / 'out', f'{tmp_path}/*.mp4')
    d = data.LeRobot(tmp_path / 'out')
    assert [(e.tasks, e.length) for e in d.episodes[:1]] == [(['a'], 40)]
    n = d.episodes[1].length
    assert d.episodes[1].tasks == ['c'] and 15 <= n <= 21 and len(d.episodes) == 2
    assert (d.frames(1, range(n - 1)).float() - d.frames(0, range(n - 1)).float()).abs().mean() < 3
    out = capsys.readouterr().out
    assert f'{tmp_path}/b.mp4: cannot be read' in out and f'{tmp_path}/c.mp4: cannot be read' in out


def test_no_video(tmp_path):
    (tmp_path / 'a.mp4').write_bytes(b'junk' * 99)
    for pattern in ('*.mp4', '*.mov', 'nowhere/*'):
        says(lambda: data.import_videos(tmp_path / 'out', f'{tmp_path}/{pattern}'),
             f'--videos={tmp_path}/{pattern}', 'no video')


# robomimic's demos ----------------------------------------------------------------------------------------------------

def write_demos(path, lengths, env=None, **changes):
    """A file to robomimic's layout (robomimic.github.io/docs/datasets/overview.html, and what its
    dataset_states_to_obs.py writes for robosuite), which shows the running sum of its actions.
    changes: {key of demo_1: rows, or None to leave it out}."""
    h5py = pytest.importorskip('h5py', reason='h5py is not installed (pip install h5py)')
    env = env or dict(env_name='PickPlaceCan', type=1, env_kwargs=dict(robots=['Panda'], control_freq=25))
    with h5py.File(path, 'w') as f:
        f.create_group('data').attrs.update(total=sum(lengths), env_args=json.dumps(env, indent=4))
        for i, n in enumerate(lengths):
            e = episode(n, i)
            x = e['observation.images.top']
            place = np.stack([np.arange(n), np.full(n, i), np.arange(n) / 7], axis=1)
            rows = {'actions': e['action'].astype(np.float64), 'states': np.arange(n * 5.).reshape(n, 5),
                    'rewards': np.zeros(n), 'dones': np.zeros(n, np.int64), 'obs/agentview_image': x,
                    'obs/robot0_eye_in_hand_image': 255 - x, 'obs/robot0_eef_pos': place,
                    'obs/robot0_gripper_qpos': place[:, :2] + 100, 'obs/object': place - 50,
                    'obs/agentview_depth': np.zeros((n, 32, 48, 1), np.float32), 'obs/lang_emb': np.zeros((n, 9))}
            if i == 1:
                rows = {key: x for key, x in (rows | changes).items() if x is not None}
            for key, x in rows.items():
                more = dict(compression='gzip') if 'image' in key and i % 2 else {}
                f.create_dataset(f'data/demo_{i}/{key}', data=x, **more)
            for key in [key for key in rows if key.startswith('obs/')]:
                f[f'data/demo_{i}/next_{key}'] = rows[key]
            f[f'data/demo_{i}'].attrs.update(num_samples=n, model_file='<mujoco/>')
        f['mask/train'] = np.array([b'demo_10', b'demo_2'][:len(lengths) - 9 or None])
    return str(path)


def test_robomimic_demos_become_a_dataset(tmp_path, capfd):
    """In the order of their numbers, every row with its frame."""
    lengths = [3, 4, 5, 3, 4, 5, 3, 4, 5, 3, 70, 6]
    path = write_demos(tmp_path / 'image.hdf5', lengths)
    script('data.py', f'--hdf5={path}', f'--out={tmp_path}/can')
    d = data.LeRobot(tmp_path / 'can', 'agentview,robot0_eye_in_hand', state='observation.state', probe=data.ENVIRONMENT)
    assert [e.length for e in d.episodes] == lengths and d.fps == 25 and d.episodes[0].tasks == ['PickPlaceCan']
    assert d.cameras == ['observation.images.agentview', 'observation.images.robot0_eye_in_hand']
    sensed = [f'robot0_eef_pos_{i}' for i in range(3)] + ['robot0_gripper_qpos_0', 'robot0_gripper_qpos_1']
    assert d.state_names == sensed and d.action_keys == ['action'] and d.widths == [2]
    assert read_json(tmp_path / 'can/meta/info.json')['features'][data.ENVIRONMENT]['names'] == [
        *(f'states_{i}' for i in range(5)), *(f'object_{i}' for i in range(3))]
    for i in (0, 2, 10, 11):
        e, n = episode(lengths[i], i), lengths[i]
        assert np.array_equal(d.rows(i), e['action'])
        place = np.stack([np.arange(n), np.full(n, i), np.arange(n) / 7], axis=1)
        assert np.allclose(d.states(i), np.concatenate([place, place[:, :2] + 100], axis=1))
        assert np.allclose(d.probed(i), np.concatenate([np.arange(n * 5.).reshape(n, 5), place - 50], axis=1))
        for camera, want in ('agentview', e['observation.images.top']), (
                'robot0_eye_in_hand', 255 - e['observation.images.top']):
            got = d.frames(i, range(n), camera=f'observation.images.{camera}').permute(0, 2, 3, 1)
            assert np.abs(got.numpy().astype(int) - want).max() <= 3
    out = capfd.readouterr().out
    assert f'{tmp_path}/can: 12 episodes' in out and 'state 5\n' in out
    assert 'exists already' in ends('data.py', f'--hdf5={path}', f'--out={tmp_path}/can')
    assert '--out comes with' in ends('data.py', f'--labelled={tmp_path}/can', f'--out={tmp_path}/new')
    assert '--filter_key with' in ends('data.py', f'--labelled={tmp_path}/can', '--filter_key=train')


def test_robomimic_keys_and_filter_keys_are_chosen(tmp_path):
    path = write_demos(tmp_path / 'a.hdf5', [3, 4, 5, 3, 3, 3, 3, 3, 3, 3, 6], dict(env_name='Real'))
    script('data.py', f'--hdf5={path}', f'--out={tmp_path}/o', '--filter_key=train', '--state=lang_emb,robot0_eef_pos')
    d = data.LeRobot(tmp_path / 'o', state='observation.state')
    assert [e.length for e in d.episodes] == [5, 6] and d.fps == 20, 'robosuite takes 20 by default'
    assert d.state_names == [f'lang_emb_{i}' for i in range(9)] + [f'robot0_eef_pos_{i}' for i in range(3)]


def test_robomimic_demos_that_list_their_keys_in_other_orders(tmp_path):
    path = write_demos(tmp_path / 'a.hdf5', [3, 4])
    import h5py
    with h5py.File(path) as f, h5py.File(tmp_path / 'b.hdf5', 'w', track_order=True) as other:
        other.create_group('data').attrs.update(f['data'].attrs)
        for i, order in ((0, 1), (1, -1)):
            demo = other.create_group(f'data/demo_{i}', track_order=True)
            f.copy(f['data'][f'demo_{i}/actions'], demo)
            obs = demo.create_group('obs', track_order=True)
            for key in [*f[f'data/demo_{i}/obs']][::order]:
                f.copy(f[f'data/demo_{i}/obs/{key}'], obs)
    data.import_hdf5(tmp_path / 'o', tmp_path / 'b.hdf5')
    d = data.LeRobot(tmp_path / 'o', state='observation.state')
    assert d.state_names[:3] == [f'robot0_eef_pos_{i}' for i in range(3)]
    assert np.allclose(d.states(1)[2], [2, 1, 2 / 7, 102, 101])


def test_robomimic_without_a_simulator(tmp_path):
    """Its states are empty or dummies, and there is no object."""
    path = write_demos(tmp_path / 'a.hdf5', [3, 4])
    import h5py
    with h5py.File(path, 'a') as f:
        for i, n in enumerate((3, 4)):
            del f[f'data/demo_{i}/obs/object'], f[f'data/demo_{i}/states']
            f[f'data/demo_{i}/states'] = np.empty((i * n, 0))
    data.import_hdf5(tmp_path / 'o', path)
    assert data.ENVIRONMENT not in read_json(tmp_path / 'o/meta/info.json')['features']
    with h5py.File(path, 'a') as f:
        for i in range(2):
            f[f'data/demo_{i}/obs/agentview'] = f[f'data/demo_{i}/obs/agentview_image'][:]
    assert 'two cameras agentview: agentview and agentview_image' in ends('data.py', f'--hdf5={path}', f'--out={tmp_path}/x')


@pytest.mark.parametrize('changes, options, words', [
    (dict.fromkeys(('obs/agentview_image', 'obs/robot0_eye_in_hand_image')), (),
     ['demo_1 has no images', 'dataset_states_to_obs.py']),
    ({'obs/agentview_image': None}, (), ['demo_1', 'agentview_image', "'agentview_image': (4, 32, 48, 3)"]),
    ({'obs/robot0_eef_pos': np.zeros((3, 3))}, (), ['demo_1', "'robot0_eef_pos': (3, 3)", "'robot0_eef_pos': (4, 3)"]),
    ({'obs/object': np.zeros((4, 7))}, (), ['demo_1', "'object': (4, 7)", "'object': (4, 3)"]),
    ({'actions': None}, (), ['demo_1 has no actions']), ({'actions': np.empty((0, 2))}, (), ['demo_1 has no actions']),
    ({}, ('--state=robot0_eef_po',), ['demo_0 has no robot0_eef_po, only', 'robot0_eef_pos']),
    ({}, ('--filter_key=valid',), ['no demos', 'train'])])
def test_robomimic_files_that_are_refused(tmp_path, changes, options, words):
    path = write_demos(tmp_path / 'a.hdf5', [3, 4, 5], **changes)
    line = ends('data.py', f'--hdf5={path}', f'--out={tmp_path}/out', *options)
    assert line.startswith(path) and all(w in line for w in words), line
    assert os.listdir(tmp_path) == ['a.hdf5']


def test_robomimic_files_that_are_none(tmp_path, monkeypatch):
    path, out = write_demos(tmp_path / 'a.hdf5', [3, 4]), f'--out={tmp_path}/out'
    assert f'{tmp_path}/b.hdf5: no such file' in ends('data.py', f'--hdf5={tmp_path}/b.hdf5', out)
    for name, content in (('c', b'junk' * 99), ('d', Path(path).read_bytes()[:9000]), ('e', b'')):
        (tmp_path / name).write_bytes(content)
        assert f'{tmp_path}/{name}: cannot be read' in ends('data.py', f'--hdf5={tmp_path}/{name}', out)
    import h5py
    h5py.File(tmp_path / 'f', 'w').close()
    assert 'no demos' in ends('data.py', f'--hdf5={tmp_path}/f', out)
    monkeypatch.setitem(sys.modules, 'h5py', None)
    assert ends('data.py', f'--hdf5={path}', out) == f'--hdf5={path} needs: pip install h5py'
    assert not (tmp_path / 'out').exists()


def test_robomimic_demos_are_trained_on(tmp_path):
    path = write_demos(tmp_path / 'a.hdf5', [20, 25, 30, 20])
    script('data.py', f'--hdf5={path}', f'--out={tmp_path}/can')
    out = script('train.py', f'--labelled={tmp_path}/can', '--state=observation.state', f'--out_dir={tmp_path}/run',
                 '--max_steps=4', *SMALL)
    assert out['step'] == 4 and out['shape']['state_dim'] == 5 and out['shape']['action_dim'] == 4


# python data.py -------------------------------------------------------------------------------------------------------

def test_command_line_describes_a_dataset(made, capfd):
    script('data.py', f'--labelled={made}')
    out = capfd.readouterr().out
    assert all(w in out for w in (made, '3 episodes', '88 frames at 10/s', 'observation.images.side', 'action (2)'))


def test_command_line_imports(tmp_path, capfd):
    video(tmp_path / 'film.mp4', 20)
    options = f'--videos={tmp_path}/*.mp4', '--fps=5', '--frame_height=32', f'--out={tmp_path / "films"}'
    script('data.py', *options)
    assert '1 episodes' in capfd.readouterr().out
    d = data.LeRobot(tmp_path / 'films')
    assert d.fps == 5 and d.episodes[0].length == 10 and d.action_dim == 0
    assert d.frames(0, [0]).shape[2:] == (32, 32)
    line = ends('data.py', *options)
    assert 'films' in line and 'exists' in line


def test_command_line_caches_for_training(made, tmp_path, monkeypatch):
    """What data.py has encoded, train.py's own call finds."""
    import model
    assert 'fitted by train.py' in ends('data.py', '--cache=True', f'--labelled={made}', '--encoder=pixels')
    monkeypatch.setattr(model, 'load_encoder', lambda *a: Mean())
    script('data.py', '--cache=True', f'--labelled={made}', f'--cache_dir={tmp_path / "l"}', '--device=cpu',
           '--workers=0', '--dtype=float32')
    c = data.Clips(data.open_sets(made, ''), [], 3, 2, 16, 4, 1.0, .25)
    cache(c, encoder := Mean(), tmp_path / 'l')
    assert encoder.seen == 0


@pytest.mark.parametrize('options, words', [
    ((), ['--labelled', '--videos']), (('--labelled=a', '--videos=b'), ['--labelled', '--videos']),
    (('--videos=a',), ['--out']), (('--hdf5=a',), ['--out']), (('--hdf5=a', '--videos=b'), ['--hdf5']), (('--workers=-1',), ['--workers: wants 0 or more, got -1']),
    (('--labelled={tmp}/nowhere',), ['nowhere', 'no such folder']),
    (('--labelled=a', '--store=int4'), ['float16, int8']), (('--labelled=a', '--cache_dir=l'), ['--cache_dir: comes with --cache']),
    (('--labelled=a', '--rotation=eular'), ['quat_xyzw', 'eular']),
    (('--labelled=a', '--action_mode=rel'), ['delta_tool']),
    (('--videos={tmp}/*.mp4', '--out={tmp}/o'), ['*.mp4']), (('--vidoes=a',), ['did you mean --videos?'])])
def test_command_line_refuses(tmp_path, options, words):
    line = ends('data.py', *(o.format(tmp=tmp_path) for o in options))
    assert all(w in line for w in words), line
    assert not os.listdir(tmp_path)


# what users met -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('rate, times', [
    (fractions.Fraction(30000, 1001), None), (29, None), (30, [round(i * 1001 / 30) for i in range(700)]),
    (10, [100 * i for i in range(800) if i % 10 != 9][:700])], ids=['29.97', '29', 'clock of ms', 'lost frames'])
@pytest.mark.parametrize('bf', ['0', '3'])
def test_frame_i_is_the_ith_that_is_shown(tmp_path, rate, times, bf):
    """Whatever rate the metadata say, and whatever times the frames have."""
    path = video(tmp_path / 'x.mp4', 700, rate, times=times, g='12', bf=bf)
    truth = sequential(path)
    for indices in ([15], [16, 45, 501], [699], range(0, 700, 37)):
        check(path, truth, indices)


def test_a_hub_that_is_away_is_no_fault_of_the_data(hub, tmp_path, monkeypatch):
    """It ends the run; nothing is skipped, and a cache remembers nothing of it."""
    monkeypatch.setattr(data, 'PATIENCE', 0.5)
    c = streamed()
    hub.fail('.mp4', 503, times=10000)
    hub.fail('.mp4', 503, times=10000, method='HEAD')
    says(lambda: c.count_faults(c[0], 0.0), 'not to be had from the hub (503')
    with pytest.raises(data.Away, match='503'):
        cache(c, folder=tmp_path / 'l')
    hub.faults.clear()
    c.tokens = cache(c, folder=tmp_path / 'l')
    assert not any(isinstance(z, data.Bad) for z in c.tokens.values())


def image_set(tmp_path):
    """Three episodes of ten rows of pictures in one file of v3.0; and the path of its table."""
    root = str(tmp_path / 'd')
    write_lerobot(root, (episode(10, i) for i in range(3)), 10)
    features = read_json(f'{root}/meta/info.json')['features']
    features[TOP]['dtype'] = 'image'
    edit_info(root, features=features)
    cells = [dict(bytes=coded(f), path='x.png') for i in range(3) for f in episode(10, i)[TOP]]
    edit_table(f'{root}/{ROWS}', lambda t: t.append_column(TOP, pa.array(cells)))
    return root, f'{root}/{ROWS}'


def test_pictures_of_another_episode_are_never_taken(tmp_path, capfd):
    root, table = image_set(tmp_path)
    d = data.LeRobot(root, 'top')
    forget()
    set_column(table, 'episode_index', [0] * 8 + [1] * 12 + [2] * 10)
    d.frames(0, range(8))
    with pytest.raises(data.Bad, match='8 frames of episode 0'):
        d.frames(0, [8])
    assert data.LeRobot(root, 'top').episodes[0].length == 8
    assert f'{table}: has 8 frames of episode 0, the metadata say 10' in capfd.readouterr().err


@pytest.mark.parametrize('change', [
    lambda table: edit_table(table, lambda t: t.drop_columns([TOP])), lambda table: set_column(table, TOP, [b'x'] * 30),
    lambda table: set_column(table, TOP, [1.5] * 30), lambda table: set_column(table, TOP, ['none.png'] * 30),
    lambda table: set_column(table, TOP, [dict(path='/etc/passwd')] * 30)])
def test_odd_picture_columns_are_bad_data(tmp_path, change):
    """Named on opening where all are, else where they are read."""
    root, table = image_set(tmp_path)
    d = data.LeRobot(root, 'top')
    forget()
    change(table)
    says(lambda: d.frames(0, [0]), root, error=data.Bad)
    says(lambda: data.LeRobot(root, 'top'), root, 'has no episodes')


def test_peak_flops_of_a_card_are_its_own_or_unknown(monkeypatch):
    names = {'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA H100 PCIe': 756e12, 'NVIDIA H200': 989e12, 'Tesla T4': 0.0,
             'NVIDIA A100-SXM4-80GB': 312e12, 'NVIDIA GH200 480GB': 989e12, 'NVIDIA L40S': 362e12}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
        assert data.peak_flops(torch.device('cuda')) == peak
    assert data.peak_flops(torch.device('cpu')) == 0.0


def test_texts_are_bytes_and_long_ones_are_cut():
    text = data.text_bytes('Schieb nach links: ←')
    assert text.dtype == torch.uint8 and bytes(text).rstrip(b'\0').decode() == 'Schieb nach links: ←'
    assert data.text_bytes('').tolist() == [0] * 128
    assert bytes(data.text_bytes(127 * 'a' + 'ö')) == 127 * b'a' + 'ö'.encode()[:1]


def test_a_clip_has_the_text_of_its_own_task(tmp_path):
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    tasks = 'push left', 'push right', ''
    write_lerobot(tmp_path / 'd', [{'observation.images.top': frames, 'action': np.zeros((4, 1)), 'task': t} for t in tasks], 10)
    for kinds in ([data.LeRobot(tmp_path / 'd')], []), ([], [data.LeRobot(tmp_path / 'd', action='none')]):
        clips = data.Clips(*kinds, 2, 1, (16, 16), 4, 1.0, 0.3)
        batch = clips[0]
        want = [tasks[e] for _, e, _, _ in clips.picks(0)]
        assert [bytes(t).rstrip(b'\0').decode() for t in batch['text']] == want and batch['text'].shape == (4, 128)


@pytest.mark.parametrize('version', ['v2.1', 'v3.0'])
def test_an_episode_of_several_tasks(made, tmp_path, version):
    """Each row has the number of its own; what the metadata list is in no order, as lerobot makes it from a set."""
    numbers, words = [2, 2, 2, 0, 0] + [1] * 12, ['b', 'c', 'a']
    if version == 'v3.0':
        root = shutil.copytree(made, tmp_path / 'd')
        set_column(f'{root}/{ROWS}', 'task_index', [0] * 30 + numbers + [0] * 41)
        set_column(f'{root}/meta/episodes/chunk-000/file-000.parquet', 'tasks', [['b'], ['c', 'b', 'a'], ['b']])
        pq.write_table(pa.table({'task_index': range(3), '__index_level_0__': words}), f'{root}/meta/tasks.parquet')
    else:
        root = write_v2(tmp_path / 'd', version)
        write_json(f'{root}/meta/tasks.jsonl', [dict(task_index=i, task=task) for i, task in enumerate(words)], lines=True)
        write_json(f'{root}/meta/episodes.jsonl', [dict(episode_index=i, length=n, tasks=['c', 'b', 'a'] if i == 1 else ['b'])
                                                   for i, n in enumerate(LENGTHS)], lines=True)
        edit_table(f'{root}/data/chunk-000/episode_000001.parquet', lambda t: t.append_column('task_index', [numbers]))
    for action in '', 'none':
        d, half = (data.LeRobot(root, action=action, fps=fps) for fps in (0, 5))
        assert [d.clip(1, j, 3, 1)['task'] for j in range(17)] == [words[i] for i in numbers]
        assert [half.clip(1, j, 3, 1)['task'] for j in range(9)] == [words[i] for i in numbers[::2]]
        assert d.clip(0, 3, 3, 1)['task'] == 'b'
    (table,) = glob.glob(f'{root}/data/*/*1.parquet') or [f'{root}/{ROWS}']
    edit_table(table, lambda t: t.drop_columns('task_index'))
    assert data.LeRobot(root).clip(1, 9, 3, 1)['task'] == 'c'
