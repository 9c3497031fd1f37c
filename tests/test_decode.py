import json
import os
import shutil

import av
import numpy as np
import pytest
import safetensors.torch
import torch

import data
import decode
import model
from conftest import SMALL, ends, script
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
    script('decode.py', *options, f'--unlabelled={demo[1].partition("=")[2]}')
    assert not (tmp_path / 'actions.mp4').exists(), 'there are none'


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


def test_each_mistake_is_one_line(trained, tmp_path):
    ckpt = f'--ckpt={trained}/ckpt.safetensors'
    assert 'not a readable checkpoint' in ends('decode.py', '--ckpt=none.safetensors')
    assert '--rows: wants 1 or more, got 0' in ends('decode.py', ckpt, '--rows=0')
    assert '--K=3' in ends('decode.py', ckpt, '--K=3')
    assert 'no such folder' in ends('decode.py', ckpt, '--labelled=nowhere')
