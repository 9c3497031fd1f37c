import shutil

import av
import numpy as np
import pytest
import torch

import data
import model
from conftest import SMALL, ends, script


def test_rollout_pictures(trained, tmp_path, capsys):
    g = script('decode.py', f'--ckpt={trained}/ckpt.safetensors', f'--out_dir={tmp_path}', '--rows=2', '--steps=5',
               '--K=1')
    said = capsys.readouterr().out
    assert 'PSNR through the inverse of pixels' in said
    still = g['psnr'](g['x'][:, 2:], g['x'][:, 1:2].expand(-1, 5, -1, -1, -1))
    assert f'of repeating the last frame {still:.2f} dB' in said
    with av.open(str(tmp_path / 'rollout.mp4')) as video:
        stream = video.streams.video[0]
        assert (stream.frames, stream.width, stream.height) == (7, 3 * 140, 2 * 140) and stream.average_rate == 5
    strip = data.read_image(tmp_path / 'rollout.png')
    assert strip.shape == (3, 2 * 3 * 140, 7 * 140)
    first, again, imagined = strip[:, :420, :140].float().unflatten(1, (3, 140)).unbind(1)
    assert (first - again).abs().mean() < 20, 'the latents of a frame look like the frame'
    assert (again - imagined).abs().mean() < 1, 'the context is not imagined'


def test_actions_are_those_of_the_robot_named_wherever_the_data_is(trained, demo, tmp_path):
    """Another recording of a robot is normalised as training was; a model of video looks at any."""
    labelled = demo[0].partition('=')[2]
    for name, scale, width in ('slow', 0.2, 2), ('wide', 1.0, 3):
        with data.Writer(tmp_path / name, 10) as writer:
            for e in range(2):
                for x, a in zip(data.LeRobot(labelled).frames(e, range(7)), data.LeRobot(labelled).rows(e)):
                    writer.add(x.permute(1, 2, 0).numpy(), scale * np.resize(a, width))
                writer.end_episode('')
    slow, wide = tmp_path / 'slow', tmp_path / 'wide'
    options = f'--out_dir={tmp_path}/d', '--rows=1', '--steps=2', '--K=1'
    ckpt = f'--ckpt={trained}/ckpt.safetensors'
    g = script('decode.py', ckpt, f'--labelled={slow}', *options)
    rows, stats = g['sets'][0].rows(g['clips'].val[0][0])[:2].ravel(), g['model'].stats
    assert torch.allclose(g['batch']['a'][0, 1], (torch.tensor(rows) - stats['a_mean'][0]) / stats['a_std'][0], atol=1e-5)
    assert '--robot=1: ' in ends('decode.py', ckpt, f'--labelled={slow}', '--robot=1', *options)
    assert 'wide has actions 6 wide per model step, this robot of' in ends('decode.py', ckpt, f'--labelled={wide}', *options)
    assert not script('decode.py', ckpt, f'--unlabelled={wide}', *options)['batch']['a_mask'].any()
    for kinds, name in ((('', demo[1]), 'video'), ((f'{labelled},{wide}', '--unlabelled='), 'two')):
        script('train.py', f'--labelled={kinds[0]}', kinds[1], *SMALL, '--max_steps=1', f'--out_dir={tmp_path}/{name}')
    script('train.py', *demo, *SMALL, '--fps=5', '--max_steps=1', f'--out_dir={tmp_path}/half')     # two rows each
    g = script('decode.py', f'--ckpt={tmp_path}/half/ckpt.safetensors', *options)
    stats = g['model'].stats
    assert stats['a_width'].tolist() == [8] and g['batch']['a_mask'].any()
    for option in ('labelled', 'unlabelled'):
        g = script('decode.py', f'--ckpt={tmp_path}/video/ckpt.safetensors', f'--{option}={wide}', *options)
        assert g['kind'] == 'unlabelled' and g['batch']['a'].shape[2] == 0
    ckpt = f'--ckpt={tmp_path}/two/ckpt.safetensors'
    assert script('decode.py', ckpt, f'--labelled={slow}', *options)['batch']['a'].shape[2] == 6
    assert script('decode.py', ckpt, f'--labelled={wide}', '--robot=1', *options)['batch']['a_mask'].any()


def test_a_decoder_is_trained_and_used(trained, tmp_path, capsys):
    shutil.copy(trained / 'ckpt.safetensors', tmp_path)
    before = (tmp_path / 'ckpt.safetensors').read_bytes()
    options = f'--ckpt={tmp_path}/ckpt.safetensors', '--rows=1', '--steps=3', '--dtype=bfloat16'
    script('decode.py', *options, '--train=True', '--train_steps=110', '--train_frames=64', '--channels=32',
           '--batch_size=8')
    said = capsys.readouterr().out
    loss = [float(line.rsplit(' ', 1)[1]) for line in said.splitlines() if line.startswith('decoder step')]
    assert loss[-1] < 0.02 and 'PSNR through the decoder' in said
    assert (tmp_path / 'ckpt.safetensors').read_bytes() == before, 'the world model is not touched'
    load_decoder = script('decode.py', *options)['load_decoder']
    assert 'PSNR through the decoder' in capsys.readouterr().out
    net, config = model.load(tmp_path / 'ckpt.safetensors')
    encoder = model.restore_encoder(config | dict(frame_height=35), {k: v for k, v in net.stats.items()})
    with pytest.raises(SystemExit, match='the latents want'):       # a decoder of other latents
        load_decoder(str(tmp_path), model.Pixels(28, 28, 7, dim=12))
    assert encoder.grid == (5, 5)


def test_principal_components_as_colours():
    """Where there is neither a decoder nor an inverse: two halves that differ in the latents differ in the picture."""
    class Plain:
        name, grid, size, width, decode = 'dinov2_vits14', (2, 4), 28, 56, None
    z = torch.randn(5, 8, 16) * 0.1
    z[:, [2, 3, 6, 7]] += torch.randn(16) * 3
    x = model.pictures(z, Plain()).float()
    assert x.shape == (5, 3, 28, 56) and x.max() <= 255
    left, right = x[..., :28].mean((0, 2, 3)), x[..., 28:].mean((0, 2, 3))
    assert (left - right).abs().max() > 100


def test_each_mistake_is_one_line(trained, tmp_path):
    ckpt = f'--ckpt={trained}/ckpt.safetensors'
    assert 'not a readable checkpoint' in ends('decode.py', '--ckpt=none.safetensors')
    assert '--rows: wants 1 or more, got 0' in ends('decode.py', ckpt, '--rows=0')
    assert '--K=3' in ends('decode.py', ckpt, '--K=3')
    assert 'no such folder' in ends('decode.py', ckpt, '--labelled=nowhere')
