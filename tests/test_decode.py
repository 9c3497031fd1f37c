import base64
import contextlib
import html.parser
import http.client
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.parse

import av
import numpy as np
import pytest
import safetensors.torch
import torch

import data
import decode
import model
import plan
from conftest import SMALL, ends, script, write_lerobot
from record_decoders import STEP
from record_encoders import made_up

RECORDED = safetensors.safe_open(os.path.join(os.path.dirname(__file__), 'decoders.safetensors'), 'pt')
REAL = [0.009442, 0.309914]
SHAPES = json.loads(RECORDED.metadata()['shapes'])


def test_rollout_pictures(trained, tmp_path, capsys):
    g = script('decode.py', f'--ckpt={trained}/ckpt.safetensors', f'--out_dir={tmp_path}', '--rows=2', '--steps=5',
               '--K=1')
    said = capsys.readouterr().out
    assert 'PSNR, dB, through the inverse of pixels: ' in said and 'SSIM through' in said and 'LPIPS' not in said
    x = g['x'].float() / 255
    still = [g['psnr'](frame[None], clip[1:2]).item() for clip in x for frame in clip[2:]]
    assert f'last frame {sum(still) / 10:.3f}' in said
    assert 'decoding a frame of 28 x 28 takes ' in said
    with av.open(str(tmp_path / 'rollout.mp4')) as video:
        stream = video.streams.video[0]
        assert (stream.frames, stream.width, stream.height) == (7, 5 * 140, 2 * 140) and stream.average_rate == 5
        assert (stream.codec_context.name, stream.pix_fmt) == ('h264', 'yuv420p')
    strip = data.read_image(tmp_path / 'rollout.png')
    assert strip.shape == (3, 2 * 5 * 140, 7 * 140)
    first, again, imagined, *_ = strip[:, :700, :140].float().unflatten(1, (5, 140)).unbind(1)
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
    rows, stats = g['clips'].sets[0].rows(g['clips'].val[0][0])[:2].ravel(), g['model'].stats
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
    assert 'slow has actions 4 wide per model step, this robot of' in ends(
        'decode.py', ckpt, f'--labelled={slow},{wide}', '--robot=1', *options)


def test_a_decoder_is_trained_and_used(trained, tmp_path, capsys):
    shutil.copy(trained / 'ckpt.safetensors', tmp_path)
    before = (tmp_path / 'ckpt.safetensors').read_bytes()
    options = f'--ckpt={tmp_path}/ckpt.safetensors', '--rows=1', '--steps=3', '--dtype=bfloat16'
    script('decode.py', *options, '--train=True', '--train_steps=150', '--train_frames=64', '--channels=64',
           '--batch_size=16', '--lpips=0')
    said = capsys.readouterr().out
    loss = [float(line.rsplit(' ', 1)[1]) for line in said.splitlines() if line.startswith('decoder step')]
    assert loss[-1] < 0.02 and 'PSNR, dB, through the decoder' in said and 'LPIPS' not in said
    assert (tmp_path / 'ckpt.safetensors').read_bytes() == before, 'the world model is not touched'
    script('decode.py', *options)
    assert 'PSNR, dB, through the decoder' in capsys.readouterr().out
    net, config = model.load(tmp_path / 'ckpt.safetensors')
    encoder = model.restore_encoder(config | dict(frame_height=35), {k: v for k, v in net.stats.items()})
    with pytest.raises(SystemExit, match='the latents want'):       # a decoder of other latents
        decode.load_decoder(str(tmp_path), model.Pixels(28, 28, 7, dim=12), 'cpu')
    assert encoder.grid == (5, 5)
    encoder = model.restore_encoder(config, {k: v for k, v in net.stats.items()})
    assert decode.load_decoder(str(tmp_path), encoder, 'cpu')
    encoder.layer = 5       # the same shapes, other features
    with pytest.raises(SystemExit, match='the latents want'):
        decode.load_decoder(str(tmp_path), encoder, 'cpu')


def recorded_state(case, prefix=''):
    """Weights made up as record_decoders.py made them."""
    state = {}
    for key, shape in SHAPES[case].items():
        value = made_up(case.partition('_')[0], key, shape)
        if case == 'lpips':     # heads are positive; features do not shrink from layer to layer
            value = value.abs() if key.startswith('lin') else value * 2 ** 0.5
        state[prefix + key] = value
    return state


def test_lpips_is_that_of_its_authors():
    x, y = (made_up('lpips', name, (2, 3, 48, 64)).sigmoid() for name in 'xy')
    d = decode.perceptual_distance(recorded_state('lpips'), x, y)
    assert torch.allclose(d, RECORDED.get_tensor('lpips'), atol=1e-5), d
    assert decode.perceptual_distance(recorded_state('lpips'), x, x).abs().max() == 0


def test_lpips_with_real_weights(shared, monkeypatch):
    """What the package lpips 0.1.4 answers with these weights, on made-up pictures; on those of its authors' repository
    (imgs/ex_ref.png, ex_p0.png, ex_p1.png) ours says 0.5686 and 0.4217 as it does."""
    monkeypatch.setattr(decode, 'lpips_path', f'{shared}/weights/lpips_vgg16.safetensors')
    weights = decode.load_perceptual('cpu')
    x, y = (made_up('lpips', name, (2, 3, 48, 64)).sigmoid() for name in 'xy')
    d = decode.perceptual_distance(weights, x, torch.lerp(x, y, torch.tensor([0.1, 0.9])[:, None, None, None]))
    assert torch.allclose(d, torch.tensor(REAL), atol=1e-4), d


def test_psnr_and_ssim_are_those_of_scikit_image():
    metrics = pytest.importorskip('skimage.metrics')    # defaults, but for data_range=255 and channel_axis=2
    rng = np.random.default_rng(0)
    x = data.demo_draw(np.array([[0.3, 0.5, 0.7, 0.6]]), 40)[0]
    for size in 2, 80:
        y = (x + rng.normal(0, size, x.shape)).clip(0, 255).astype(np.uint8)
        ours = [torch.from_numpy(v).permute(2, 0, 1)[None] / 255 for v in (x, y)]
        assert abs(decode.psnr(*ours).item() - metrics.peak_signal_noise_ratio(x, y, data_range=255)) < 1e-4
        assert abs(decode.ssim(*ours).item()
                   - metrics.structural_similarity(x, y, data_range=255, channel_axis=2)) < 1e-4


def small_encoder(dim=24, grid=(4, 4), name='dinov2_vitb14_reg'):
    """A ViT of random weights, whose last norm has weights of its own."""
    torch.manual_seed(0)
    vit = model.ViT(dim, 1, 2, 32, False, 4, 14, 37)
    vit.norm.load_state_dict(dict(weight=made_up('norm', 'weight', (dim,)), bias=made_up('norm', 'bias', (dim,))))
    return model.Encoder(name, vit, -1, 14 * grid[0], 14 * grid[1], 1)


@pytest.mark.parametrize('case', ['rae', 'rae_diffusers'])
def test_the_decoder_of_rae(case, tmp_path):
    """Latents of RAE, as the encoder's last norm has left them with us, become the pictures of public code."""
    known = 16 if case == 'rae_diffusers' else 4
    state = recorded_state(case, 'decoder.' if case == 'rae_diffusers' else '')
    state |= {'_latents_mean': torch.zeros(24, known, known), '_latents_std': torch.ones(24, known, known),
              'encoder_mean': torch.zeros(1, 3, 1, 1), 'encoder.embeddings.cls_token': torch.zeros(1, 1, 24)}
    positions = decode.rae_state(state)['pos_embed']
    assert torch.allclose(positions[0, ::3], RECORDED.get_tensor(f'{case}/positions'), atol=1e-6)
    if case == 'rae':       # its own file has the positions, and only the decoder
        state = recorded_state(case) | dict(decoder_pos_embed=positions)
    torch.save(state, tmp_path / 'model.pt')
    for rows in known, 6:
        encoder = small_encoder(grid=(rows, rows))
        encoder.size = encoder.width = 16 * known       # as many pixels as it decodes to
        net = decode.load_decoder(str(tmp_path), encoder, 'cpu', str(tmp_path / 'model.pt'), 'rae')
        z = made_up('rae', 'latents', (1, rows * rows, 24))
        x = net(z * encoder.vit.norm.weight + encoder.vit.norm.bias)[..., ::STEP, ::STEP]
        mean, std = encoder.mean_std
        assert torch.allclose(x, (RECORDED.get_tensor(f'{case}/{rows}') * std + mean).clamp(0, 1), atol=2e-5)
    encoder = small_encoder(grid=(4, 6))        # another aspect, and frames of its own size
    net = decode.load_decoder('', encoder, 'cpu', str(tmp_path / 'model.pt'), 'rae')
    assert net(torch.zeros(2, 24, 24)).shape == (2, 3, 56, 84)


def test_mistakes_with_decoders(trained, tmp_path):
    torch.save(recorded_state('rae') | dict(decoder_pos_embed=torch.zeros(1, 17, 64)), tmp_path / 'model.pt')
    torch.save(recorded_state('lpips') | {'lin0.model.1.weight': torch.zeros(1, 3, 1, 1)}, tmp_path / 'lpips.pt')
    path = str(tmp_path / 'model.pt')
    for encoder, words in ((small_encoder(name='dinov2_vitb14'), 'wants dinov2_vitb14_reg'),
                           (model.Pixels(28, 28, 7), 'not pixels with -1 and 1'), (small_encoder(16), 'the latents want')):
        with pytest.raises(SystemExit, match=words):
            decode.load_decoder('', encoder, 'cpu', path, 'rae')
    with pytest.raises(SystemExit, match='the latents want .KeyError'):
        decode.load_decoder('', small_encoder(), 'cpu', str(tmp_path / 'lpips.pt'), 'rae')
    ckpt = f'--ckpt={trained}/ckpt.safetensors', f'--out_dir={tmp_path}/o'
    for options in (['--decoder=rae'], [f'--decoder_path={path}', '--train']):
        assert '--decoder=rae: wants --decoder_path, which' in ends('decode.py', *ckpt, *options)
    assert '--decoder_path=none: no such file' in ends('decode.py', *ckpt, '--decoder_path=none')
    assert '--lpips_path=none: no such file' in ends('decode.py', *ckpt, '--lpips_path=none')
    assert 'wants features.0.weight .. of VGG16' in ends('decode.py', *ckpt, f'--lpips_path={path}')
    assert 'lpips.pt: wants features.0.weight' in ends('decode.py', *ckpt, f'--lpips_path={tmp_path}/lpips.pt')
    assert '--decoder: wants one of conv, rae' in ends('decode.py', *ckpt, '--decoder=vae')


def trained_decoder(monkeypatch, weights=None, **options):
    options = dict(train_steps=3, batch_size=2, channels=16) | options
    for name, value in options.items():
        monkeypatch.setattr(decode, name, value)
    encoder = small_encoder().requires_grad_(True)
    x = (255 * made_up('frames', 'x', (4, 3, 56, 56)).sigmoid()).to(torch.uint8)
    autocast = data.autocast(torch.device('cpu'), 'float32')
    net = decode.train_decoder(encoder, x, model.encode_frames(encoder, x, autocast), autocast, weights)
    return net.out.weight.detach(), encoder


def test_what_a_decoder_learns_from(monkeypatch):
    """Perceptual distance and noise change it; the encoder, even one that could learn, gets no gradient."""
    weights = recorded_state('lpips')
    plain, encoder = trained_decoder(monkeypatch, noise=0.0)
    assert all(p.grad is None for p in encoder.parameters())
    again, _ = trained_decoder(monkeypatch, noise=0.0)
    assert torch.equal(plain, again)
    seen, encoder = trained_decoder(monkeypatch, weights, lpips=1.0)
    assert all(p.grad is None for p in encoder.parameters()) and not torch.equal(seen, plain)
    noisy, _ = trained_decoder(monkeypatch, noise=0.5)
    assert not torch.equal(noisy, plain)
    trained_decoder(monkeypatch, noise=0.0, train_steps=1)


@pytest.mark.parametrize('grid, size', [((4, 4), (28, 28)), ((5, 5), (35, 35)), ((2, 3), (28, 42)), ((8, 8), (224, 224)),
                                        ((14, 14), (224, 224)), ((1, 1), (7, 7))])
def test_a_decoder_of_any_grid(grid, size):
    encoder = model.Pixels(*size, 7, dim=4)
    encoder.grid = grid
    net = decode.Decoder(encoder, 16)
    x = net(torch.randn(2, grid[0] * grid[1], 4))
    assert x.shape == (2, 3, *size) and 0 <= x.min() < x.max() <= 1
    with torch.autocast('cpu', torch.bfloat16):
        assert net(torch.randn(1, grid[0] * grid[1], 4)).dtype == torch.float32


def test_weights_that_are_out_of_reach_are_one_line(monkeypatch, capsys):
    def away(url, **_):
        raise OSError('no\nnetwork')
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', away)
    assert decode.load_perceptual('cpu') is None
    said = capsys.readouterr().out
    assert said.count('\n') == 1 and 'goes on without, https://' in said and 'no network' in said
    state = recorded_state('lpips')
    parts = [{k: v for k, v in state.items() if k.startswith(name)} for name in ('features', 'lin')]
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', lambda url, **_: parts.pop(0))
    assert decode.load_perceptual('cpu').keys() == state.keys()


def test_films(trained, demo, tmp_path, capsys):
    """With a decoder from two steps that LPIPS is measured of, and trained by."""
    shutil.copy(trained / 'ckpt.safetensors', tmp_path)
    safetensors.torch.save_file(recorded_state('lpips'), tmp_path / 'lpips.safetensors')
    options = f'--ckpt={tmp_path}/ckpt.safetensors', '--rows=2', '--steps=3', '--K=2', '--films'
    g = script('decode.py', *options, '--train', '--train_steps=2', '--train_frames=16', '--channels=16', '--batch_size=2',
               f'--lpips_path={tmp_path}/lpips.safetensors', '--noise=0.2')
    said = capsys.readouterr().out
    assert 'LPIPS through the decoder: latents of the camera ' in said and 'steps.png: camera | K = 1 | K = 4\n' in said
    assert all(p.grad is None for p in g['model'].parameters())
    frames = dict(rollout=(5, 5), steps=(5, 3), denoising=(9, 1), actions=(5, 4))
    for name, (T, ways) in frames.items():
        with av.open(f'{tmp_path}/{name}.mp4') as video:
            stream = video.streams.video[0]
            assert (stream.frames, stream.width) == (T, ways * 140) and stream.codec_context.name == 'h264', name
        assert data.read_image(f'{tmp_path}/{name}.png').shape == (3, 2 * ways * 140, 5 * 140), 'eight frames at most'
    assert g['end'].shape[:2] == (2, 1) and not torch.equal(*g['frames'][1:3])
    end = data.enlarge(g['show']({'end': g['raw'](g['end'])})['end'][:, 0])
    assert torch.equal(data.read_image(tmp_path / 'denoising.png')[:, :, -140:], torch.cat([*end], dim=1)), 'no noise is left'
    imagined, without, other = (g['ways'][name] for name in [*g['ways']])
    assert torch.equal(imagined[:, :2], other[:, :2]) and not torch.equal(imagined[:, 2:], other[:, 2:])
    assert not torch.equal(imagined[:, 2:], without[:, 2:])
    os.remove(tmp_path / 'actions.mp4')
    for other in f'--unlabelled={demo[1].partition("=")[2]}', '--actions=False':
        script('decode.py', *options, other)
        assert not (tmp_path / 'actions.mp4').exists(), 'there are none to change'


def test_actions_as_bars():
    a = torch.tensor([[[3.0, -1.5]], [[0.0, 3.0]]])
    x = decode.bars(a, torch.tensor([[True], [False]]), (60, 4))
    assert x.shape == (2, 1, 60, 4)
    left, right = (x[0, 0, :, i] == 0 for i in (0, 3))
    assert left[:30].all() and not left[30:].any() and right[30:45].all() and not right[:30].any() and not right[45:].any()
    assert x[1].min() == 1, 'of unknown ones nothing is drawn'


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


def test_held_out_episodes_that_cannot_be_read(trained, tmp_path, capsys, monkeypatch):
    def damaged(*_, **__):
        raise data.Bad('damaged')
    monkeypatch.setattr(data.LeRobot, 'clip', damaged)
    said = ends('decode.py', f'--ckpt={trained}/ckpt.safetensors', '--rows=1', '--steps=2', f'--out_dir={tmp_path}/o')
    assert said.endswith('labelled: no held-out episode can be read') and 'left out: damaged' in capsys.readouterr().err


def test_episodes_that_are_over_before_anything_is_imagined(trained, tmp_path, capsys):
    """There is no camera to compare with, but films of what comes after."""
    frame = data.demo_draw(np.array([[0.3, 0.5, 0.7, 0.6]]))[0]
    write_lerobot(tmp_path / 'short', 3 * [{'observation.images.top': [frame] * 2, 'task': ''}], 10)
    script('decode.py', f'--ckpt={trained}/ckpt.safetensors', f'--unlabelled={tmp_path}/short', f'--out_dir={tmp_path}/o',
           '--rows=1', '--steps=2', '--K=1')
    assert 'imagined nan, last frame nan' in capsys.readouterr().out and (tmp_path / 'o/rollout.mp4').exists()


def test_each_mistake_is_one_line(trained, tmp_path):
    ckpt = f'--ckpt={trained}/ckpt.safetensors'
    assert 'not a readable checkpoint' in ends('decode.py', '--ckpt=none.safetensors')
    assert '--rows: wants 1 or more, got 0' in ends('decode.py', ckpt, '--rows=0')
    assert '--channels=128 --steps=0: want 16 and 1, or more' in ends('decode.py', ckpt, '--steps=0')
    assert '--K=3' in ends('decode.py', ckpt, '--K=3')
    assert 'no such folder' in ends('decode.py', ckpt, '--labelled=nowhere')


class Page(html.parser.HTMLParser):
    """What a page asks for (src, href), its sections' text by heading, and the points of its lines."""
    def __init__(self, text):
        super().__init__()
        self.asked, self.tags, self.sections, self.lines = [], [], {}, []
        self.heading = ''
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.asked += [attributes[name] for name in ('src', 'href', 'poster') if name in attributes]
        if tag == 'polyline':
            points = [[float(v) for v in point.split(',')] for point in attributes['points'].split()]
            self.lines.append((self.heading, points))

    def handle_data(self, text):
        if self.tags and self.tags[-1] == 'h2' and text.strip() and text not in self.sections:
            self.heading = text
            self.sections[text] = ''
        elif self.heading:
            self.sections[self.heading] += text


def report(folder, *options):
    script('decode.py', f'--ckpt={folder}/ckpt.safetensors', '--rows=2', '--steps=3', '--K=1', '--report=True', *options)
    return Page((folder / 'report.html').read_text())


def test_a_report_of_a_run(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    for name in ('plan.json', 'plan.mp4', 'report.html'):
        (tmp_path / name).unlink(missing_ok=True)
    row = dict(success_end=0.25, success_ever=0.5, distance_end=0.125, seconds_per_plan=None, episodes=4, ci95=[0.04, 0.7])
    plan = dict(env='a<b>', goals='expert', budget_steps=20, methods={'model': row})
    (tmp_path / 'plan.json').write_text(json.dumps(plan, indent=1))
    page = report(tmp_path, '--films')
    assert all(re.match('data:(image/png|video/mp4);base64,', address) for address in page.asked), 'nothing else is asked for'
    assert not {'script', 'link', 'iframe', 'b>'} & {*page.tags} and page.tags.count('video') == 5
    film = (tmp_path / 'actions.mp4').read_bytes()
    assert base64.b64encode(film).decode() in ''.join(page.asked)
    steps = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    val = [e for e in steps if 'val' in e][-1]['val']
    (_, line), = [x for x in page.lines if len(x[1]) == sum('flow' in e for e in steps)][:1]
    assert 'flow' in page.sections['Training'] and line
    curves = [points for heading, points in page.lines if heading == 'Training' and len(points) == 4]
    errors = [[*e.values()] for kind in val.values() for e in kind.values()]
    assert len(curves) == len(errors), 'a line for every method'
    labelled = [[*e.values()] for e in (dict.fromkeys(('model', 'repeat')) | val['labelled']).values()]
    high = max(max(e) for e in labelled)
    for points, values in zip(curves, labelled):
        assert [y for _, y in points] == pytest.approx([190 - 180 * v / high for v in values], abs=0.06)
    assert 'Error by signal level' in page.sections['Training'] and [len(p) for _, p in page.lines].count(8) == 1
    assert len([p for heading, p in page.lines if heading == 'Actions']) == 2
    assert 'a<b>' in page.sections['Planning'] and '0.25' in page.sections['Planning'] and '0.04' in page.sections['Planning']
    assert 'plan.mp4: no such file' in page.sections['Planning']
    assert 'max_steps' in page.sections['Configuration']


def test_a_report_leaves_out_what_is_not_there(demo, tmp_path):
    script('train.py', '--labelled=', demo[1], *SMALL, '--max_steps=1', '--objective=direct', f'--out_dir={tmp_path}/o')
    os.remove(tmp_path / 'o/log.jsonl')
    page = report(tmp_path / 'o')
    assert 'log.jsonl: no such file' in page.sections['Training'] and not page.lines
    assert 'plan.json: no such file' in page.sections['Planning']
    assert page.sections['Actions'].strip() == 'These clips have no actions.'
    (tmp_path / 'o/log.jsonl').write_text('{"step": 1')
    assert 'log.jsonl: cannot be read' in report(tmp_path / 'o').sections['Training']


def test_error_by_signal_level(trained, tmp_path, monkeypatch):
    """Against the average over frames of what the model answers at each level, written out."""
    g = script('decode.py', f'--ckpt={trained}/ckpt.safetensors', f'--out_dir={tmp_path}', '--rows=2', '--steps=3', '--K=1')
    z, a, a_mask, z_mask = g['z_true'], g['a'], g['a_mask'], g['batch']['z_mask'].clone()
    z_mask[1, -1] = False
    seen = []
    g['level_curve'].__wrapped__.__globals__['curve'] = lambda title, lines, label: seen.append(lines['model'])
    g['level_curve'](z, a, a_mask, z_mask, g['words'])
    eps = model.clip_noise(z, range(len(z))).eps
    assert len(seen[0]) == 8 and g['model'].config['k_max'] == 8
    for tau, error in seen[0]:
        with torch.no_grad():
            z_hat = g['model']((1 - tau) * eps + tau * z, torch.full(z.shape[:2], tau), torch.full(z.shape[:2], 1 / 8), a,
                               a_mask)
        wanted = (z_hat - z).square().mean(dim=(2, 3))[z_mask].mean().item()
        assert error == pytest.approx(wanted, rel=0.02), tau


def test_error_by_signal_level_of_a_model_with_words(worded, tmp_path):
    """Nothing is hidden of any clip, as training hides it of some."""
    g = script('decode.py', f'--ckpt={worded}/ckpt.safetensors', f'--out_dir={tmp_path}', '--rows=2', '--steps=3', '--K=1')
    z, a, a_mask, z_mask, words = g['z_true'], g['a'], g['a_mask'], g['batch']['z_mask'], g['words']
    many = [v.repeat_interleave(8, dim=0) for v in (z, a, a_mask, z_mask, words)]
    hidden = model.clip_noise(many[0], range(16)).null < 0.1
    assert hidden.any(), 'which training would hide'
    seen = []
    g['level_curve'].__wrapped__.__globals__['curve'] = lambda title, lines, label: seen.append(lines['model'])
    g['level_curve'](*many)
    eps = model.clip_noise(many[0], range(16)).eps
    for tau, error in seen[0][:2]:
        with torch.no_grad():
            z_hat = g['model']((1 - tau) * eps + tau * many[0], torch.full(eps.shape[:2], tau), torch.full(eps.shape[:2], 1 / 8),
                               *many[1:3], text=many[4])
        assert error == pytest.approx((z_hat - many[0]).square().mean(dim=(2, 3))[many[3]].mean().item(), rel=1e-5)


def test_a_curve():
    svg = decode.curve('t', {'a&b': [(0, 1.0), (10, 0.0)], 'c': [(5, 2.0)]}, 'x')
    assert re.findall('points="(.*?)"', svg) == ['45.0,100.0 353.0,190.0', '199.0,10.0'] and 'a&amp;b' in svg
    assert 'nothing has been measured' in decode.curve('t', {'a': []}, 'x')
    assert 'nan' not in decode.curve('t', {'a': [(3, 0.0)]}, 'x')


def test_a_film_that_is_too_large_is_named(tmp_path):
    (tmp_path / 'a.mp4').write_bytes(bytes(8_000_001))
    assert 'a.mp4: has more than 8 MB' in decode.shown(decode.embedded, str(tmp_path / 'a.mp4'))


@contextlib.contextmanager
def played(ckpt, **options):
    """A server of decode.py's page, in this process, that is stopped at the end."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (dict(ckpt=ckpt, port=0, dtype='float32', device='cpu') | options).items():
            patch.setattr(decode, name, value)
            patch.setitem(decode.config, name, value)
        net, config = model.load(ckpt)
        clips = decode.open_clips(net, config, model.restore_encoder(config, net.stats))
        with decode.open_server(clips, None) as server:
            vars(server.planner.o).update(samples=8, elites=4, iterations=2, horizon=2, budget_ms=0.0)
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield server
            finally:
                server.shutdown()
                thread.join()


@pytest.fixture(scope='module')
def server(trained):
    with played(f'{trained}/ckpt.safetensors') as server:
        yield server


def send(server, method, path, body=None, **headers):
    """Status, headers and text of the answer to a request that is just so; Host is the page's unless it is given."""
    line = http.client.HTTPConnection('127.0.0.1', server.server_port, timeout=60)
    headers = {'Host': server.names[0], 'Content-Length': str(len(body or ''))} | {k.replace('_', '-'): v for k, v in headers.items()}
    line.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        line.putheader(name, value)
    line.endheaders(None if body is None else body.encode())
    reply = line.getresponse()
    text = reply.read().decode()
    line.close()
    return reply.status, dict(reply.headers), text


def ask(server, path, wanted=200, **fields):
    status, _, text = send(server, 'POST', path, urllib.parse.urlencode(fields))
    assert status == wanted, text
    return json.loads(text)


def test_the_page_and_nothing_else(server):
    status, headers, page = send(server, 'GET', '/')
    assert status == 200 and headers['Content-Type'].startswith('text/html') and page == decode.PAGE
    assert server.server_address[0] == '127.0.0.1', 'this machine alone'
    for path in ('/decode.py', '/../decode.py', '/?', '/show', '/step', 'http://127.0.0.1/', '/%2e%2e/etc/passwd'):
        assert send(server, 'GET', path)[0] == 404, path
    for path in ('/', '/nothing', '/answer', '/show/', '/../show'):
        assert send(server, 'POST', path, '')[0] == 404, path
    assert send(server, 'PUT', '/show', '')[0] == 501


def test_requests_of_other_sites_are_refused(server):
    here = f'http://{server.names[0]}'
    known = len(server.dreams)
    for method, path in ('GET', '/'), ('POST', '/show'):
        for name in ('evil.example', f'evil.example:{server.server_port}', '127.0.0.1', '127.0.0.1:1', ''):
            assert send(server, method, path, '', Host=name)[0] == 403, name
        for origin in ('http://evil.example', 'null', 'https://' + server.names[0], here + '.evil.example', ''):
            assert send(server, method, path, '', Origin=origin)[0] == 403, origin
    assert len(server.dreams) == known
    assert send(server, 'POST', '/show', '', Origin=here)[0] == 200
    name = f'localhost:{server.server_port}'
    assert send(server, 'POST', '/show', '', Host=name, Origin=f'http://{name}')[0] == 200


def test_the_port_of_the_web(trained):
    """Which browsers leave out of Host and Origin."""
    try:
        with played(f'{trained}/ckpt.safetensors', port=80) as server:
            for name in '127.0.0.1', 'localhost':
                assert send(server, 'POST', '/show', '', Host=name, Origin=f'http://{name}')[0] == 200
            assert send(server, 'POST', '/show', '', Host='evil.example')[0] == 403
    except SystemExit as error:
        pytest.skip(f'not to be had here: {error}')


def test_what_cannot_be_done_changes_nothing(server, trained, tmp_path, capsys):
    dream = ask(server, '/show')['dream']
    before = ask(server, '/step', dream=dream, action='0.05,0')
    for length in (str(decode.MOST + 1), '9' * 18, '-1'):
        status, _, text = send(server, 'POST', '/begin', Content_Length=length)
        assert status == 413 and 'too large' in json.loads(text)['error']
    assert send(server, 'POST', '/begin', Content_Length='x')[0] == 400
    text = base64.b64encode(b'#EXTM3U\nfile:///etc/passwd').decode()
    data.write_image(tmp_path / 'a.png', torch.zeros(3, 64, 64, dtype=torch.uint8))
    cut = base64.b64encode((tmp_path / 'a.png').read_bytes()[:60]).decode()
    wrong = [('/begin', dict(upload=upload)) for upload in ('AAAA', 'A', 'é', text, cut)]
    wrong += [('/goal', dict(upload='AAAA')), ('/begin', dict(episode='x')), ('/begin', dict(at='-5')), ('/begin', dict(at='2000')),
              ('/drive', {}), *(('/step', dict(K=K)) for K in ('3', '0', '-4', '64', 'x', '4.0'))]
    wrong += [('/step', dict(action=a)) for a in ('1', '0,0,0', 'nan,0', '0,inf', '1e999,0', 'x,0')]
    for path, fields in wrong:
        told = ask(server, path, 400, dream=dream, **fields)
        assert [*told] == ['error'] and '/' not in told['error'], (path, fields, told)
    assert ask(server, '/show', dream=dream) == before
    assert 'wants 2 finite numbers' in capsys.readouterr().out, 'the terminal says why'


def test_a_step_is_the_models(server):
    """Against rollout, by a row of the dataset that is repeated; undone, redone, without actions, of other K; from the first frame."""
    told = ask(server, '/begin')
    dream = told['dream']
    assert (told['names'], told['steps'], told['left'], told['rate'], told['size']) == (['dx', 'dy'], 0, 0, 5, [28, 28])
    clips = server.clips
    clip = clips.clip(0, 0, 0, 'observation.images.top', 2)
    net, stats = server.planner.model, server.planner.model.stats
    z = model.standard(model.encode_frames(server.planner.encoder, clip['x'], server.planner.autocast), stats)[None]
    row = torch.tensor([0.03, -0.02])

    def expected(row, known, K):
        a = torch.zeros(1, 3, 4)
        a[0, 1] = clip['a'][1]
        if known:
            a[0, 2] = (torch.cat((row, row)) - stats['a_mean'][0]) / stats['a_std'][0]
        z_next = model.rollout(net, z, a, torch.tensor([[False, True, known]]), K, seed=0)
        x = model.pictures(model.unstandard(z_next[0], stats), server.planner.encoder)[0]
        return base64.b64encode(x.permute(1, 2, 0).numpy().tobytes()).decode()

    one = ask(server, '/step', dream=dream, action='0.03,-0.02', K=2)
    assert one['picture'] == expected(row, True, 2) and (one['steps'], one['left']) == (1, 1)
    assert np.allclose(one['action'], row, atol=1e-6) and one['dream'] == dream
    two = ask(server, '/step', dream=dream, action='0.05,0.05', K=2)
    assert two['picture'] != one['picture']
    assert ask(server, '/undo', dream=dream) == one
    assert ask(server, '/step', dream=dream, action='0.05,0.05', K=2) == two, 'bit for bit'
    again = ask(server, '/reset', dream=dream)
    assert again == told and ask(server, '/undo', dream=dream) == told, 'nothing is left to undo'
    wide = ask(server, '/step', dream=dream, action='9,-9', K=2)
    assert np.allclose(wide['action'], [told['high'][0], told['low'][1]], atol=1e-6), 'within its range'
    ask(server, '/reset', dream=dream)
    unknown = ask(server, '/step', dream=dream, K=1)
    assert unknown['picture'] == expected(row, False, 1) and unknown['action'] is None
    assert len({wide['picture'], one['picture'], unknown['picture']}) == 3


def test_a_dream_remembers(demo, tmp_path):
    """A step is that of a rollout which is given the frames before its context, undone and done again too."""
    script('train.py', *demo, *SMALL, '--memory=3', '--memory_frames=3', '--max_steps=3', f'--out_dir={tmp_path}/o')
    with played(f'{tmp_path}/o/ckpt.safetensors') as server:
        net, dream = server.planner.model, ask(server, '/begin')['dream']
        pictures = [ask(server, '/step', dream=dream, action='0.05,0.01', K=1)['picture'] for _ in range(90)]
        frames = server.dreams[dream].frames
        assert len(frames) == 4 + 9 + decode.UNDO
        z, a, known = (torch.stack(v)[None] for v in zip(*frames[-5:]))
        known[:, 0] = False
        imagined, blank = (model.rollout(net, z[:, :4], a, known, 1, seed=89, gone=gone)
                           for gone in ([frame[0][None] for frame in frames[:-5]], []))
        assert torch.equal(imagined[0, 0], z[0, 4]) and not torch.equal(blank, imagined)
        for _ in range(decode.UNDO):
            ask(server, '/undo', dream=dream)
        again = ask(server, '/step', dream=dream, action='0.05,0.01', K=1)
        assert again['picture'] == pictures[-decode.UNDO], 'its whole memory is kept'
        before = [frame[0] for frame in server.dreams[dream].frames[:-2]]
        ask(server, '/goal', dream=dream, here=1)
        ask(server, '/drive', dream=dream)
        gone = server.dreams[dream].planner.gone
        assert len(gone) == len(before) > 9 and all(torch.equal(x[0], y) for x, y in zip(gone, before))


def test_dreams_begin_anywhere(server, tmp_path):
    first = ask(server, '/show')
    ds = server.clips.sets[0]
    for e, at in (0, 0), (3, 500), (5, 1000):
        told = ask(server, '/begin', dream=first['dream'], episode=e, at=at)
        start = at * ds.episodes[e].length // 1001
        last = min(start + 2, ds.episodes[e].length - 1)
        x = ds.frames(e, [last], (28, 28))[0]
        data.write_image(tmp_path / 'frame.png', x)
        upload = base64.b64encode((tmp_path / 'frame.png').read_bytes()).decode()
        other = ask(server, '/begin', upload=upload, dream=first['dream'])
        assert other['picture'] == told['picture'] and other['action'] is None, 'the same frame, of which no action is known'
        goal = ask(server, '/goal', upload=upload, dream=first['dream'])
        assert goal['goal'] == told['picture'] and goal['picture'] == told['picture']
    assert told['picture'] != first['picture']


def test_the_planner_drives_to_the_goal(server):
    """As plan.plan has it, from the last plan; a step by hand ends that."""
    dream = ask(server, '/begin', episode=2)['dream']
    told = ask(server, '/goal', dream=dream, episode=2, at=300)
    assert told['goal'] != told['picture'] and told['steps'] == 0
    it = server.dreams[dream]
    z, a, known = (torch.stack(v)[None] for v in zip(*it.frames))
    planner = server.planner
    low, high = planner.normalised(planner.a_low), planner.normalised(planner.a_high)
    best, _ = plan.plan(planner.model, z, a, it.goal[None], planner.o, 0, low, high, known)
    one = ask(server, '/drive', dream=dream, K=1)
    assert np.allclose(one['action'], planner.physical(best[0, 0])[0], atol=1e-6) and one['steps'] == 1
    ask(server, '/reset', dream=ask(server, '/show')['dream'])        # of another visitor
    assert torch.equal(it.planner.last_plan, best)
    z, a, known = (torch.stack(v)[None] for v in zip(*it.frames[-2:]))
    mean = torch.nn.functional.pad(best[:, 1:], (0, 0, 0, 1))
    best, _ = plan.plan(planner.model, z, a, it.goal[None], planner.o, 1000, low, high, known & torch.tensor([False, True]), mean)
    two = ask(server, '/drive', dream=dream, K=1)
    assert two['steps'] == 2 and two['picture'] != one['picture'] and torch.equal(it.planner.last_plan, best)
    assert (np.array(two['action']) <= np.array(two['high']) + 1e-6).all()
    here = ask(server, '/goal', dream=dream, here=1)
    assert here['goal'] == here['picture'] == two['picture'] and it.planner.last_plan is None
    assert ask(server, '/reset', dream=dream)['goal'] == here['goal'], 'the goal stays'


def test_visitors_have_dreams_of_their_own(server):
    a, b = ask(server, '/show'), ask(server, '/show', dream='x')
    assert a['dream'] != b['dream'] and len(a['dream']) > 40
    threads = [threading.Thread(target=ask, args=(server, '/step'), kwargs=dict(dream=a['dream'], action='0.05,0')) for _ in range(6)]
    with server.lock:       # the model has one
        for thread in threads:
            thread.start()
        threads[0].join(0.2)
        assert all(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join()
    assert ask(server, '/show', dream=b['dream']) == b
    assert ask(server, '/show', dream=a['dream'])['steps'] == 6, 'one after the other'
    ask(server, '/goal', dream=b['dream'], here=1)
    assert not ask(server, '/show', dream=a['dream'])['goal']
    for _ in range(decode.DREAMS):
        ask(server, '/show')
    assert len(server.dreams) == decode.DREAMS and b['dream'] not in server.dreams
    new = ask(server, '/step', dream=b['dream'], action='0,0')
    assert new['dream'] != b['dream'] and new['steps'] == 0, 'one that is gone begins anew'


def test_a_decoder_draws_only_what_is_shown(server, monkeypatch):
    drawn = []

    def decoder(z):
        drawn.append(len(z))
        return torch.zeros(len(z), 3, 64, 64)
    monkeypatch.setattr(server, 'decode', decoder)
    dream = ask(server, '/begin')['dream']
    ask(server, '/step', dream=dream)
    assert drawn == [1, 1]


def test_a_long_dream_costs_what_a_short_one_does(server):
    dream = ask(server, '/begin')['dream']
    pictures, size = [], []
    for _ in range(200):
        pictures.append(ask(server, '/step', dream=dream, action='0.05,0.01', K=1)['picture'])
        storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for frame in server.dreams[dream].frames for v in frame}
        size.append((len(server.dreams[dream].frames), sum(storages.values())))
    most = server.planner.model.config['context'] + decode.UNDO
    assert size[-1] == size[100] and size[-1][0] == most
    z, a, known = (torch.stack(v)[None] for v in zip(*server.dreams[dream].frames[-5:]))
    known[:, 0] = False     # what led to the first frame of the window
    imagined = model.rollout(server.planner.model, z[:, :4], a, known, 1, seed=199)
    assert torch.equal(imagined[0, 0], z[0, 4]) and known[0, 1:].all()
    for i in range(decode.UNDO + 2):
        told = ask(server, '/undo', dream=dream)
        assert told['picture'] == pictures[-2 - min(i, decode.UNDO - 1)]
    assert told['left'] == 0 and told['steps'] == 200 - decode.UNDO
    assert ask(server, '/step', dream=dream, action='0.05,0.01', K=1)['picture'] == pictures[-decode.UNDO], 'its whole context is kept'


def test_play_with_a_state_and_without_denoising(demo, tmp_path):
    script('train.py', *demo, *SMALL, '--max_steps=2', '--state=observation.state', '--objective=direct', '--K=1', f'--out_dir={tmp_path}/state')
    with played(f'{tmp_path}/state/ckpt.safetensors', K=1) as server:
        dream = ask(server, '/show')['dream']
        z = server.dreams[dream].frames[-1][0]
        assert z.shape[0] == 17 and z.isfinite().all(), 'the state of the dataset'
        told = ask(server, '/step', dream=dream, action='0.05,0')
        assert told['objective'] == 'direct' and told['steps'] == 1
        ask(server, '/goal', dream=dream, here=1)
        assert ask(server, '/drive', dream=dream)['steps'] == 2
        data.write_image(tmp_path / 'a.png', torch.full((3, 80, 40), 99, dtype=torch.uint8))
        upload = base64.b64encode((tmp_path / 'a.png').read_bytes()).decode()
        ask(server, '/begin', dream=dream, upload=upload)
        ask(server, '/step', dream=dream, action='0.05,0')
        z = server.dreams[dream].frames[-1][0]
        assert z[:16].isfinite().all() and z[16, :2].isnan().all(), 'the state of a picture is not known'
        ask(server, '/goal', dream=dream, upload=upload)
        assert ask(server, '/drive', dream=dream)['steps'] == 2


@pytest.fixture(scope='module')
def worded(demo, tmp_path_factory):
    out = tmp_path_factory.mktemp('worded')
    script('train.py', *demo, *SMALL, '--max_steps=3', '--text=True', f'--out_dir={out}')
    return out


def test_play_with_words(worded):
    with played(f'{worded}/ckpt.safetensors', text='left') as server:
        told = ask(server, '/show')
        dream, pictures = told['dream'], []
        for words in {}, dict(text='left'), dict(text='reach'), dict(text=''):
            ask(server, '/reset', dream=dream)
            ask(server, '/step', dream=dream, action='0.05,0', **words)
            pictures.append(server.dreams[dream].frames[-1][0])
        assert told['text'] == 'left' and torch.equal(pictures[0], pictures[1])
        assert not torch.equal(pictures[1], pictures[2]) and not torch.equal(pictures[2], pictures[3])
        assert not torch.equal(pictures[1], pictures[3]), 'no words are not those of --text'
        ask(server, '/goal', dream=dream, here=1)
        ask(server, '/drive', dream=dream, text='reach')
        assert server.dreams[dream].planner.o.text == 'reach' and server.planner.o.text == 'left'


def test_play_from_the_command_line(trained, tmp_path, monkeypatch, capsys, server):
    shutil.copy(trained / 'ckpt.safetensors', tmp_path)
    seen = []

    def serve(self):
        seen.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(http.server.ThreadingHTTPServer, 'serve_forever', serve)
    options = f'--ckpt={tmp_path}/ckpt.safetensors', '--play=True', '--K=1', '--train', '--train_steps=2', '--train_frames=16', '--channels=16'
    with pytest.raises(SystemExit) as end:
        script('decode.py', *options, '--batch_size=2', '--lpips=0', '--port=0', '--dtype=float32')
    assert end.value.code is None
    assert re.search(r'^http://127\.0\.0\.1:\d+ until Ctrl-C$', capsys.readouterr().out, re.M)
    assert type(seen[0].decode).__name__ == 'Decoder' and seen[0].about['K'] == 1 and seen[0].fileno() == -1
    assert {path.name for path in tmp_path.iterdir()} == {'ckpt.safetensors', 'decoder.safetensors', '.decode.lock'}, 'no films'
    for wrong in (f'--port={server.server_port}', '--host=..'):
        assert 'cannot be served there' in ends('decode.py', *options[:3], wrong)


class Chromium:
    """A headless one, told what to do by its developer tools' protocol through pipes."""
    def __init__(self, path, folder):
        theirs, self.to = os.pipe()
        self.back, ours = os.pipe()

        def pipes():        # it reads from 3 and writes to 4
            kept = os.dup(theirs), os.dup(ours)
            for i, fd in enumerate(kept):
                os.dup2(fd, 3 + i)

        options = '--headless', '--no-sandbox', '--disable-gpu', '--remote-debugging-pipe', f'--user-data-dir={folder}'
        self.process = subprocess.Popen([path, *options], preexec_fn=pipes, close_fds=False, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(ours)
        self.session = {}
        self.number, self.read = 0, b''
        target = self('Target.createTarget', url='about:blank')['targetId']
        self.session = {'sessionId': self('Target.attachToTarget', targetId=target, flatten=True)['sessionId']}

    def __call__(self, method, **params):
        self.number += 1
        os.write(self.to, json.dumps(dict(id=self.number, method=method, params=params) | self.session).encode() + b'\0')
        while True:
            while b'\0' not in self.read:
                part = os.read(self.back, 1 << 20)
                assert part, 'it has ended'
                self.read += part
            message, _, self.read = self.read.partition(b'\0')
            message = json.loads(message)
            if message.get('id') == self.number:
                assert 'error' not in message, message
                return message['result']

    def js(self, text):
        result = self('Runtime.evaluate', expression=text, awaitPromise=True, returnByValue=True)
        assert 'exceptionDetails' not in result, result
        return result['result'].get('value')

    def until(self, text):
        end = time.time() + 30
        while not self.js(text):
            assert time.time() < end, (text, self.js('document.body.innerText'))
            time.sleep(0.02)

    def close(self):
        with contextlib.suppress(AssertionError, OSError):
            self('Browser.close')
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.back)


@pytest.fixture
def chromium(tmp_path):
    path = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not path or os.name == 'nt':
        pytest.skip('no chromium here')
    browser = Chromium(path, tmp_path / 'profile')
    yield browser
    browser.close()


PIXELS = "$('picture').toDataURL()"
STEPS = "+$('said').textContent.split(' ')[1]"


def test_the_page_in_a_browser(server, chromium):
    """Loads, steps on keys, whose picture changes, lets the planner drive, survives a reload, fits a phone, follows dark."""
    def load():
        chromium('Page.navigate', url=f'http://{server.names[0]}/')
        chromium.until("document.readyState == 'complete' && typeof world == 'object' && world && $('said').textContent != ''")

    def press(key):
        for kind in ('keyDown', 'keyUp'):
            chromium('Input.dispatchKeyEvent', type=kind, key=key, code=key)

    load()
    first = chromium.js(PIXELS)
    assert chromium.js(STEPS) == 0 and len(first) > 500 and chromium.js("$('undo').disabled && $('drive').disabled")
    assert chromium.js("$('moves').innerText").split() == ['dx', '←', '→', '0.0', 'dy', '↑', '↓', '0.0']
    dream = server.dreams[chromium.js('sessionStorage.dream')]
    for i, (key, number, side) in enumerate((('ArrowRight', 0, 'high'), ('ArrowUp', 1, 'low'))):
        before = chromium.js(PIXELS)
        press(key)
        chromium.until(f"{STEPS} == {i + 1} && !running")
        assert chromium.js(PIXELS) != before
        a = server.planner.physical(dream.frames[-1][1])[0]
        assert np.isclose(a[number], server.about[side][number]) and abs(a[1 - number]) < 1e-6, 'the other one rests'
    chromium('Input.dispatchKeyEvent', type='keyDown', key='ArrowRight', code='ArrowRight')
    chromium.until(f"{STEPS} >= 4")
    press('ArrowDown')
    chromium.until(f"{STEPS} >= 6")
    chromium('Input.dispatchKeyEvent', type='keyUp', key='ArrowRight', code='ArrowRight')
    chromium.until('!running')
    held = torch.stack([server.planner.physical(a)[0] for _, a, _ in dream.frames[4:]])
    assert (held[:, 0] > 0.049).all() and ((held[:, 1] > 0.049).sum(), (held[:, 1].abs() < 1e-6).sum()) == (1, len(held) - 1), held
    chromium.js("$('spring').click()")
    for _ in range(2):
        press('ArrowLeft')
    chromium.until('!running')
    a = server.planner.physical(dream.frames[-1][1])[0]
    assert np.allclose(a, [-0.02, 0], atol=1e-6), 'a tenth of the range each time'
    chromium.js("$('spring').click(); $('reset').click(); last")
    for key in 'ArrowRight', 'ArrowUp':
        press(key)
    chromium.until(f"{STEPS} == 2 && !running")
    for button, steps in ('undo', 1), ('step', 2), ('reset', 0):
        chromium.js(f"$('{button}').click()")
        chromium.until(f"{STEPS} == {steps} && !running")
    assert chromium.js(PIXELS) == first
    chromium.js("$('known').click(); $('step').click()")
    chromium.until(f"{STEPS} == 1 && !running")
    assert not dream.frames[-1][2], 'without actions'
    chromium.js("$('known').click(); $('at').value = 500; $('there').click(); last")
    chromium.until("!$('drive').disabled && !$('aim').hidden")
    chromium.js("$('drive').click()")
    chromium.until(f"{STEPS} >= 3 && driving")
    chromium.js("$('drive').click()")
    chromium.until("!running && $('drive').ariaPressed == 'false'")
    steps, picture, goal = chromium.js(STEPS), chromium.js(PIXELS), chromium.js("$('aim').toDataURL()")
    load()
    assert [chromium.js(text) for text in (STEPS, PIXELS, "$('aim').toDataURL()")] == [steps, picture, goal]
    box = chromium.js("(({x, y, width, height}) => [x, y, width, height])($('picture').getBoundingClientRect())")
    for kind in ('mousePressed', 'mouseReleased'):
        chromium('Input.dispatchMouseEvent', type=kind, x=box[0] + box[2] - 2, y=box[1] + box[3] / 2, button='left', buttons=1, clickCount=1)
    chromium.until(f"{STEPS} == {steps + 1} && !running")
    assert server.planner.physical(dream.frames[-1][1])[0, 0] > 0.9 * server.about['high'][0], 'by the mouse'
    colours = []
    for width, mode in (1280, 'light'), (390, 'dark'):
        chromium('Emulation.setDeviceMetricsOverride', width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
        chromium('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=mode)])
        assert chromium.js('document.documentElement.scrollWidth') <= width
        colours.append(chromium.js('getComputedStyle(document.body).backgroundColor'))
    assert colours == ['rgb(250, 249, 246)', 'rgb(22, 23, 21)']
