"""python -m pytest tests/test_data.py: command line, pictures, video, LeRobot datasets."""
import fractions
import json
import multiprocessing
import os
import shutil

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import data

A = 2  # action width of the made datasets


# ----------------------------------------------------------------------------------------------------------------------
# made data: the grey level of a frame is the running sum of the actions before it

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
    data.write_lerobot(root, (episode(n, i, f'task {i % 2}') for i, n in enumerate(LENGTHS)), 10)
    return root


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
            cells['observation.images.top'] = pa.array([dict(bytes=png(f), path='x.png')
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


def png(rgb):
    codec = av.CodecContext.create('png', 'w')
    codec.height, codec.width, codec.pix_fmt, codec.time_base = *rgb.shape[:2], 'rgb24', fractions.Fraction(1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), 'rgb24')
    return b''.join(map(bytes, codec.encode(frame) + codec.encode(None)))


def edit_info(root, **changes):
    with open(f'{root}/meta/info.json') as f:
        info = json.load(f)
    write_json(f'{root}/meta/info.json', {**info, **changes})
    return root


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / 'copy')


def sequential(path):
    with av.open(path) as container:
        return np.stack([f.to_ndarray(format='rgb24') for f in container.decode(video=0)])


def says(error, *words):
    text = str(error.value)
    assert '\n' not in text and all(w in text for w in words), text


# ----------------------------------------------------------------------------------------------------------------------
# override

def constants():
    return dict(__doc__='doc', __name__='__main__', batch_size=8, learning_rate=0.1, weight_decay=0.1, compile=True,
                out_dir='out', max_iters=10, torch=torch, key=[1], _hidden=1)


@pytest.mark.parametrize('arg, name, value', [
    ('--batch_size=32', 'batch_size', 32), ('--learning_rate=1', 'learning_rate', 1.0),
    ('--compile=False', 'compile', False), ('--weight_decay=0', 'weight_decay', 0.0),
    ('--out_dir=2024', 'out_dir', '2024'), ('--out_dir=a=b', 'out_dir', 'a=b'),
    ('--out_dir=', 'out_dir', '')])
def test_override_sets(arg, name, value):
    g = constants()
    config = data.override(g, [arg])
    assert g[name] == config[name] == value and type(g[name]) is type(value)
    assert set(config) == {'batch_size', 'learning_rate', 'weight_decay', 'compile', 'out_dir', 'max_iters'}


@pytest.mark.parametrize('arg, words', [
    ('--batch_sise=32', 'did you mean --batch_size?'), ('--compile=false', 'wants True or False'),
    ('--max_iters=1e6', "wants int, got '1e6'"), ('--batch_size', 'write options as --name=value'), ('32', '32: write'),
    ('config.py', 'write options'), ('--key=zzz', 'no such option'), ('--__name__=x', 'no such option'),
    ('--_hidden=2', 'no such option'), ('--torch=1', 'no such option'), ('--learning_rate=fast', 'wants float')])
def test_override_refuses(arg, words):
    with pytest.raises(SystemExit) as error:
        data.override(constants(), [arg])
    says(error, words)


def test_override_help(capsys):
    with pytest.raises(SystemExit) as error:
        data.override(constants(), ['-h'])
    assert error.value.code is None and capsys.readouterr().out.startswith('doc\n  --batch_size=8\n')


# ----------------------------------------------------------------------------------------------------------------------
# pictures and video

def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_image(tmp_path):
    x = noise(3, 37, 21)
    data.write_image(tmp_path / 'x.png', x)
    assert torch.equal(data.read_image(tmp_path / 'x.png'), x) and os.listdir(tmp_path) == ['x.png']
    assert data.read_image(tmp_path / 'x.png', 8).shape == (3, 8, 8)
    assert data.read_image(tmp_path / 'x.png', (9, 12)).shape == (3, 9, 12)


def jpeg(path):
    codec = av.CodecContext.create('mjpeg', 'w')
    codec.height, codec.width, codec.pix_fmt, codec.time_base = 64, 64, 'yuvj420p', fractions.Fraction(1)
    frame = av.VideoFrame.from_ndarray(noise(64, 64, 3).numpy(), 'rgb24').reformat(format='yuvj420p')
    path.write_bytes(b''.join(map(bytes, codec.encode(frame) + codec.encode(None))))


@pytest.mark.parametrize('kind', ['missing', 'text', 'empty', 'folder', 'png', 'jpg'])
def test_bad_image(tmp_path, kind):
    path = tmp_path / f'x.{kind}'
    if kind in ('text', 'empty'):
        path.write_text('not a picture\n' * 20 * (kind == 'text'))
    elif kind == 'folder':
        path.mkdir()
    elif kind != 'missing':
        data.write_image(path, noise(3, 64, 64)) if kind == 'png' else jpeg(path)
        assert data.read_image(path).shape == (3, 64, 64)
        path.write_bytes(path.read_bytes()[:-len(path.read_bytes()) // 2])
    with pytest.raises(SystemExit) as error:
        data.read_image(path)
    says(error, f'x.{kind}', 'not a readable picture')


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
    y = data.read_frames(str(tmp_path / 'x.mp4'), range(23), 29.97)
    assert (y[..., :33, :47].int() - x.int()).abs().max() <= 3


def encode(path, n, codec='libx264', **options):
    """A video whose every frame differs, to be read back."""
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        x, y = np.meshgrid(np.arange(64), np.arange(48))
        for i in range(n):
            rgb = np.stack([x * 3 + 5 * i, y * 4 + 3 * i, (x + y + 9 * i)], -1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, 'rgb24')))
        container.mux(stream.encode(None))
    return str(path)


VIDEOS = {'x264 b-frames': dict(bf='3', g='12'),
          'x264 open gop': {'g': '8', 'bf': '3', 'x264-params': 'open-gop=1:b-adapt=0'},
          'x264 one gop': dict(g='300'), 'mpeg4': dict(codec='mpeg4', g='12', bf='2'), 'x264 g2': dict(g='2')}


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp('videos')
    paths = [encode(root / f'{i}.mp4', 50, **VIDEOS[k]) for i, k in enumerate(VIDEOS)]
    return [(path, sequential(path)) for path in paths]


def check(path, truth, indices, fps=10):
    got = data.read_frames(path, indices, fps).permute(0, 2, 3, 1).numpy()
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
    paths = [encode(tmp_path / f'{i}.mp4', 3) for i in range(data.MAX_OPEN + 3)]
    for path in paths + paths:
        data.read_frames(path, [1], 10)
    assert len(data._open) <= data.MAX_OPEN


def in_child(queue, path, truth):
    try:
        for k in list(range(0, 60, 7)) * 3:
            check(path, truth, [k])
        queue.put('')
    except BaseException as error:
        queue.put(f'{error!r}'[:200])


def test_frames_after_fork(tmp_path):
    path = str(tmp_path / 'x.mp4')
    data.write_video(path, noise(60, 3, 160, 160), 10)  # noise: several times larger than the reader's buffer
    truth = sequential(path)
    check(path, truth, [40])  # leaves an open container for the children to inherit
    fork = multiprocessing.get_context('fork')
    queue = fork.Queue()
    children = [fork.Process(target=in_child, args=(queue, path, truth)) for _ in range(2)]
    for child in children:
        child.start()
    for k in list(range(59, 0, -7)) * 3:
        check(path, truth, [k])
    assert [queue.get(timeout=60) for _ in children] == ['', '']
    for child in children:
        child.join()


@pytest.mark.parametrize('index', [-1, 50, 1000])
def test_missing_frame(videos, index):
    with pytest.raises(ValueError) as error:
        data.read_frames(videos[0][0], [0, index], 10)
    says(error, videos[0][0], f'frame {index} ', '50')
    check(*videos[0], [0])


@pytest.mark.parametrize('head, words', [(None, 'no such file'), (b'', 'cannot be read'),
                                         (b'junk' * 99, 'cannot be read'),
                                         (b'version https://git-lfs.github.com/spec/v1\noid', 'git-LFS pointer')])
def test_bad_video(tmp_path, head, words):
    if head is not None:
        (tmp_path / 'x.mp4').write_bytes(head)
    with pytest.raises(ValueError) as error:
        data.read_frames(str(tmp_path / 'x.mp4'), [0], 10)
    says(error, 'x.mp4', words)


def test_truncated_video(made, tmp_path):
    path = f'{made}/videos/observation.images.top/chunk-000/file-000.mp4'
    with open(path, 'rb') as f:
        whole = f.read()
    (tmp_path / 'x.mp4').write_bytes(whole[:len(whole) * 3 // 4])
    with pytest.raises(ValueError) as error:
        data.read_frames(str(tmp_path / 'x.mp4'), [87], 10)
    says(error, 'x.mp4')


# ----------------------------------------------------------------------------------------------------------------------
# LeRobot: the rule of time, on every format

@pytest.fixture(params=['v2.0', 'v2.1', 'v3.0', 'image'])
def any_format(request, made, tmp_path):
    if request.param == 'v3.0':
        return made
    image = request.param == 'image'
    return write_v2(tmp_path / 'd', 'v2.1' if image else request.param, image=image)


def test_running_sum_pins_actions_to_frames(any_format):
    d = data.LeRobot(any_format, camera='top')
    assert (d.fps, d.action_dim, [e['length'] for e in d.episodes]) == (10, A, list(LENGTHS))
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
    for call in (lambda: d.frames(0, [30]), lambda: d.frames(1, [-1]),
                 lambda: d.clip(1, 17, 2, 1), lambda: d.frames(0, [])):
        with pytest.raises(ValueError) as error:
            call()
        says(error, made, 'episode')


def test_size(made):
    d = data.LeRobot(made)
    assert d.clip(0, 0, 2, 1, size=16)['x'].shape == (2, 3, 16, 16)
    assert d.clip(0, 0, 2, 1, size=(16, 24))['x'].shape == (2, 3, 16, 24)
    assert d.clip(0, 0, 2, 1)['x'].dtype == torch.uint8 and d.clip(0, 0, 2, 1)['task'] == 'task 0'


def test_many_shards_and_rows_in_any_order(made, copy):
    path = f'{copy}/meta/episodes/chunk-000/file-000.parquet'
    table = pq.read_table(path)
    pq.write_table(table.take([2, 0]), path)
    os.makedirs(f'{copy}/meta/episodes/chunk-001')
    pq.write_table(table.take([1]).drop_columns(['dataset_from_index', 'dataset_to_index']),
                   f'{copy}/meta/episodes/chunk-001/file-000.parquet')
    one, two = data.LeRobot(made), data.LeRobot(str(copy))
    assert [e['index'] for e in two.episodes] == [0, 1, 2]
    for i in range(3):
        assert np.array_equal(one.rows(i), two.rows(i)) and torch.equal(one.frames(i, [4, 2]), two.frames(i, [4, 2]))


def test_one_row_group_without_episode_index(made, copy):
    path = f'{copy}/data/chunk-000/file-000.parquet'
    pq.write_table(pq.read_table(path).drop_columns(['episode_index']), path)
    for i in range(3):
        assert np.array_equal(data.LeRobot(made).rows(i), data.LeRobot(str(copy)).rows(i))


@pytest.mark.parametrize('camera, key', [('', 'top'), ('top', 'top'), ('side', 'side'), ('nope,side,top', 'side'),
                                         ('observation.images.side', 'side')])
def test_camera(made, camera, key):
    d = data.LeRobot(made, camera)
    assert d.camera == f'observation.images.{key}' and len(d.cameras) == 2
    assert abs(d.frames(0, [0]).float().mean() - (30 if key == 'top' else 225)) < 2


def test_depth_is_no_camera(copy):
    with open(f'{copy}/meta/info.json') as f:
        features = json.load(f)['features']
    features['observation.images.top']['info']['is_depth_map'] = True
    assert data.LeRobot(str(edit_info(copy, features=features))).cameras == ['observation.images.side']


# ----------------------------------------------------------------------------------------------------------------------
# actions

N = 12
TRUTH = {k: np.random.default_rng(i).normal(size=(N, w)).astype(np.float32)
         for i, (k, w) in enumerate({'action.arm': 2, 'action.grip': 1, 'action.pair': 4, 'velocity': 3}.items())}


def odd_columns(_):
    return {'action': pa.array(['go'] * N),
            'action.arm': pa.array(TRUTH['action.arm'].tolist(), pa.list_(pa.float64(), 2)),
            'action.grip': pa.array(TRUTH['action.grip'][:, 0], pa.float32()),
            'action.pair': pa.array(TRUTH['action.pair'].reshape(N, 2, 2).tolist(), pa.list_(pa.list_(pa.float32()))),
            'velocity': pa.array(TRUTH['velocity'].tolist(), pa.list_(pa.float32()))}


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
    with pytest.raises(SystemExit) as error:
        data.LeRobot(root, action=action)
    says(error, root, action.split(',')[-1], 'velocity')


def test_actions_plural(tmp_path):
    root = write_v2(tmp_path / 'd', 'v2.1', lambda i: {'actions': odd_columns(i)['velocity'],
                                                           'action.x': odd_columns(i)['action.grip']},
                    {'actions': ODD['velocity'], 'action.x': ODD['action.grip']}, (N,))
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


# ----------------------------------------------------------------------------------------------------------------------
# what is refused

def no_info(root):
    os.remove(f'{root}/meta/info.json')


def broken(root):
    with open(f'{root}/meta/info.json', 'w') as f:
        f.write('{"codebase_version": ')


def pointer(root):
    with open(f'{root}/meta/info.json', 'w') as f:
        f.write('version https://git-lfs.github.com/spec/v1\n')


@pytest.mark.parametrize('change, words', [
    (shutil.rmtree, ['no such folder']), (no_info, ['not a LeRobot dataset', 'meta/info.json']),
    (broken, ['info.json', 'cannot be read']), (pointer, ['info.json', 'git-LFS']),
    (lambda r: os.mkdir(f'{r}/meta_data'), ['v1', 'convert']),
    (lambda r: edit_info(r, codebase_version='v1.6'), ['v1.6', 'convert']),
    (lambda r: edit_info(r, codebase_version='v4.0'), ['v4.0', 'v3.0']),
    (lambda r: edit_info(r, features={'action': dict(dtype='float32', shape=[2])}), ['no cameras', 'action']),
    (lambda r: edit_info(r, features=None), ['features']),
    (lambda r: edit_info(r, data_path='../{chunk_index}/x.parquet'), ['refused', '../']),
    (lambda r: edit_info(r, video_path='/etc/{video_key}{chunk_index}{file_index}'), ['refused', '/etc/']),
    (lambda r: edit_info(r, video_path='videos/../../copy-2/{file_index}'), ['refused', 'copy-2']),
    (lambda r: shutil.rmtree(f'{r}/meta/episodes'), ['no episodes'])])
def test_refused(copy, change, words):
    change(copy)
    with pytest.raises(SystemExit) as error:
        data.LeRobot(str(copy))
    says(error, str(copy), *words)


def test_unknown_camera(made):
    with pytest.raises(SystemExit) as error:
        data.LeRobot(made, 'wrist,left')
    says(error, made, 'observation.images.top', 'observation.images.side')


def test_symlinks_are_allowed(made, tmp_path):
    for folder, _, files in os.walk(made):
        there = tmp_path / 'links' / os.path.relpath(folder, made)
        there.mkdir(parents=True)
        for name in files:
            (there / name).symlink_to(os.path.join(folder, name))
    assert data.LeRobot(str(tmp_path / 'links')).clip(0, 0, 2, 1)['x'].shape == (2, 3, 32, 48)


@pytest.mark.parametrize('text', [b'version https://git-lfs.github.com/spec/v1\noid sha256:0', b'junk' * 100, None])
@pytest.mark.parametrize('name', ['data/chunk-000/file-000.parquet',
                                  'videos/observation.images.top/chunk-000/file-000.mp4'])
def test_bad_file_is_named(copy, name, text):
    d = data.LeRobot(str(copy), 'top')
    os.remove(copy / name)
    if text:
        (copy / name).write_bytes(text)
    with pytest.raises(ValueError) as error:
        d.clip(0, 0, 2, 1)
    says(error, str(copy / name), 'no such file' if text is None else 'git-LFS' if b'git' in text else 'cannot be read')


def test_rows_that_do_not_fit_are_named(copy):
    path = f'{copy}/data/chunk-000/file-000.parquet'
    pq.write_table(pq.read_table(path).slice(0, 40), path)
    with pytest.raises(ValueError) as error:
        data.LeRobot(str(copy)).rows(1)
    says(error, path, '10 rows', '17')


# ----------------------------------------------------------------------------------------------------------------------
# the writer

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
    assert not os.path.exists(made + '.tmp')
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
    with open(f'{made}/meta/stats.json') as f:
        stats = json.load(f)
    assert list(stats) == ['action', *cameras, *SCALARS] and all(set(s) == set(STATISTICS) for s in stats.values())
    assert np.shape(stats[cameras[0]]['q50']) == (3, 1, 1) and stats['action']['count'] == [sum(LENGTHS)]
    with open(f'{made}/meta/info.json') as f:
        info = json.load(f)
    assert info['splits'] == {'train': '0:3'} and info['total_frames'] == sum(LENGTHS) and info['total_tasks'] == 2


def test_layout_is_lerobots(shared, tmp_path):
    """The same columns, types and keys as a dataset that lerobot itself wrote, and the same numbers."""
    real = str(shared / 'data/w2cam_h264_v30')
    cameras = [data.LeRobot(real, k) for k in ('front', 'wrist')]
    state = data.LeRobot(real, action='observation.state')

    def copies():
        for i, e in enumerate(cameras[0].episodes):
            yield ({'observation.state': state.rows(i), 'action': cameras[0].rows(i), 'task': e['tasks'][0]} |
                   {d.camera: d.frames(i, range(e['length'])).permute(0, 2, 3, 1).numpy() for d in cameras})

    ours = str(tmp_path / 'ours')
    names = {k: [f'j{i}' for i in range(7)] for k in ('action', 'observation.state')}
    data.write_lerobot(ours, copies(), 10, names, robot_type='unitree_g1', crf=30)
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
    """No action, odd sides, frames that are hard to encode, a rate that is not whole."""
    x = torch.nn.functional.interpolate(noise(20, 3, 6, 8).float(), (61, 81), mode='bilinear')
    x = x.byte().permute(0, 2, 3, 1)
    episodes = [{'observation.images.a': x[:8].numpy(), 'task': 'one'},
                {'observation.images.a': x[8:].numpy(), 'task': 'two'}]
    root = str(tmp_path / 'd')
    os.makedirs(root + '.tmp/meta')  # of a run that was interrupted
    data.write_lerobot(root, iter(episodes), 29.97)
    d = data.LeRobot(root)
    assert (d.fps, d.action_dim, d.tasks) == (29.97, 0, {0: 'one', 1: 'two'}) and d.stats is None
    for i, e in enumerate(episodes):
        n = d.episodes[i]['length']
        y = d.frames(i, range(n))[..., :61, :81].permute(0, 2, 3, 1)
        assert (y.float() - torch.from_numpy(e['observation.images.a']).float()).abs().mean() < 6
    c = d.clip(1, 0, 3, 4)
    assert c['a'].shape == (3, 0) and not c['a_mask'].any() and c['z_mask'].all() and c['task'] == 'two'


def test_writer_refuses(made, tmp_path):
    with pytest.raises(SystemExit) as error:
        data.write_lerobot(made, [episode(3, 0)], 10)
    says(error, made, 'exists')
    for bad in ([], [episode(3, 0), {k: v for k, v in episode(3, 1).items() if k != 'action'}],
                [episode(3, 0) | {'action': np.zeros((4, A), np.float32)}]):
        with pytest.raises(ValueError):
            data.write_lerobot(tmp_path / 'bad', bad, 10)
        assert not (tmp_path / 'bad').exists()


# ----------------------------------------------------------------------------------------------------------------------
# real datasets

@pytest.mark.parametrize('name, camera', [('w2cam_av1_v30', 'front'), ('w2cam_av1_v30', 'wrist'),
                                          ('w2cam_h264_v30', 'front'), ('w2cam_h264_v30', 'wrist'),
                                          ('wnoaction_v30', 'ego')])
def test_real_video_every_frame(shared, name, camera):
    d = data.LeRobot(str(shared / f'data/{name}'), camera)
    truth = sequential(f'{d.root}/videos/{d.camera}/chunk-000/file-000.mp4')
    at = 0
    for i, e in enumerate(d.episodes):
        for k in range(e['length']):
            assert np.array_equal(d.frames(i, [k])[0].permute(1, 2, 0).numpy(), truth[at + k])
        for stride in (1, 2, 3, 6):
            got = d.frames(i, range(stride // 2, e['length'], stride)).permute(0, 2, 3, 1).numpy()
            assert np.array_equal(got, truth[at:at + e['length']][stride // 2::stride])
        at += e['length']
    assert at == len(truth)


def test_real_images(shared):
    for camera in ('image', 'image2'):
        d = data.LeRobot(str(shared / 'data/wimg_v30'), camera)
        cells = pq.read_table(f'{d.root}/data/chunk-000/file-000.parquet', columns=[d.camera])[d.camera].to_pylist()
        at = 0
        for i, e in enumerate(d.episodes):
            got = d.frames(i, range(e['length']))
            for k in range(e['length']):
                with av.open(data.io.BytesIO(cells[at + k]['bytes'])) as c:
                    truth = next(c.decode(video=0)).to_ndarray(format='rgb24')
                assert np.array_equal(got[k].permute(1, 2, 0).numpy(), truth)
            at += e['length']
        assert d.clip(1, 20, 8, 1, 32)['z_mask'].tolist() == [True] * 4 + [False] * 4


def test_real_versions_agree(shared):
    v20, v21, v30 = (data.LeRobot(str(shared / f'data/g1_{v}')) for v in ('v20', 'v21', 'v30'))
    assert [e['length'] for e in v30.episodes] == [221, 267, 260, 265]
    assert v20.episodes[3]['tasks'] == v30.episodes[3]['tasks'] == [v21.tasks[0]] and v21.tasks == v30.tasks
    rows = np.concatenate([v30.rows(i) for i in range(4)]).astype(np.float64)
    for s in data.STATS:
        for d in (v20, v21, v30):
            assert np.allclose(d.stats[s], getattr(rows, s)(0), atol=1e-5)
    for i, e in enumerate(v30.episodes):  # episodes 2 and 3 lie in the second file of v3.0
        assert np.array_equal(v20.rows(i), v30.rows(i)) and np.array_equal(v21.rows(i), v30.rows(i))
        for indices in ([0, 1, 2], [e['length'] - 1], [7, 50, 111]):
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
        data.write_lerobot(folder / name, [
            {'observation.images.top': np.full((L, 32, 32, 3), 5 * L, np.uint8), 'task': 't'}
            | ({'action': rng.normal(size=(L, width)) * 3 + 1} if width else {}) for L in lengths], 10)
    return [data.LeRobot(folder / 'a'), data.LeRobot(folder / 'b')], [data.LeRobot(folder / 'c')]


def clips(world, batch_size=20, share=0.05, **options):
    return data.Clips(*world, 3, 2, 0, batch_size, share, 0.25, **options)


def test_the_labelled_share_is_exact_over_20_clips(world):
    for batch_size in (20, 5, 4):
        c = clips(world, batch_size)
        kinds = [s < 2 for step in range(60 // batch_size) for s, _, _ in c.picks(step)]
        assert [sum(kinds[i:i + 20]) for i in (0, 20, 40)] == [1, 1, 1]
    assert all(s < 2 for s, _, _ in clips((world[0], [])).picks(0))
    assert all(s == 0 for s, _, _ in clips(([], world[1])).picks(0))


def test_batches_are_a_function_of_seed_step_and_rank(world):
    one, again = clips(world), clips(world)
    assert one.picks(7) == again.picks(7) and one.picks(7) != one.picks(8)
    assert len({tuple(clips(world, seed=s, rank=r).picks(7)) for s in (0, 1) for r in (0, 1)}) == 4
    loaders = [list(torch.utils.data.DataLoader(one, batch_size=None, sampler=range(3), num_workers=n)) for n in (0, 2)]
    for a, b in zip(*loaders):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_where_a_labelled_clip_stands_in_a_batch_is_random(world):
    first = [s < 2 for step in range(200) for s, _, _ in clips(world, 4, 0.5).picks(step)[:1]]
    assert 0.4 < np.mean(first) < 0.6


def test_actions_are_normalised_padded_and_masked(world):
    c = clips(world, share=0.5)
    assert c.A == 2 * 4
    for s, e, start in (pick for step in range(3) for pick in c.picks(step)):
        clip = c.clip(s, e, start, 3)
        assert e in c.train[s] and e not in c.val[s]
        if s == 2:
            assert not clip['a_mask'].any() and not clip['a'].any()
            continue
        ds = c.sets[s]
        rows = (ds.rows(e) - ds.stats['mean']) / ds.stats['std']
        for t in (1, 2):
            assert clip['a_mask'][t] == clip['z_mask'][t]
            if clip['z_mask'][t]:
                want = rows[start + 2 * (t - 1):start + 2 * t].ravel().clip(-5, 5)
                assert np.allclose(clip['a'][t, :len(want)], want, atol=1e-5) and not clip['a'][t, len(want):].any()
    stats = c.action_stats()
    assert stats['width'].tolist() == [4, 8] and stats['std'][0, 4:].tolist() == [0] * 4


def test_no_episode_is_in_both_splits(world):
    c = clips(world)
    for ds, train, val in zip(c.sets, c.train, c.val):
        assert sorted([*train, *val]) == list(range(len(ds.episodes))) and val
    held = c.held_out(4, 6)
    assert set(held) == {'labelled', 'unlabelled'} and held['labelled']['x'].shape[:2] == (6, 4)
