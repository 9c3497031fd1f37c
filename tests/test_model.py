import copy
import http.server
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torch.utils.flop_counter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model
from record_encoders import STEP, made_up

# ---------------------------------------------------------------------------------------------------------------------
# encoder

FIXTURE = Path(__file__).with_name('encoders.safetensors')
with safe_open(FIXTURE, 'pt') as f:
    CASES = json.loads(f.metadata()['cases'])
GOLDEN = load_file(FIXTURE)
TINY = (64, 3, 2, 96, False, 0, 14, 37)
OTHERS = dict(vjepa2_tiny=(64, 3, 2, 96, False, 0, 16, 4, 'vjepa2'), siglip2_tiny=(64, 3, 2, 96, False, 0, 16, 4, 'siglip2'))


def made_up_state(case):
    return {k: made_up(case, k, shape) for k, shape in CASES[case]['shapes'].items()}


@pytest.mark.parametrize('case', CASES)
def test_vit_answers_as_the_library_that_made_the_case(case):
    vit = model.ViT(*CASES[case]['arguments']).eval().requires_grad_(False)
    vit.load_state_dict(dict(vit.named_buffers()) | model.official(made_up_state(case)))    # few files hold periods
    for H, W in CASES[case]['sizes']:
        want = GOLDEN[f'{case}/{H}x{W}']
        got = vit(made_up(case, f'{H}x{W}', (1, 3, H, W)), cls=case.endswith('_cls'))[0, ::STEP, ::STEP]
        assert got.shape == want.shape and (got - want).norm() < 1e-5 * want.norm(), CASES[case]['made_with']


@pytest.mark.parametrize('case', [c for c in CASES if 'file' in CASES[c]])
def test_names_in_hugging_face_files_mean_the_same(case):
    memory, file = made_up_state(case), {}
    for key, (source, shape) in CASES[case]['file'].items():
        if source is None:  # stored joined
            layer = key[:key.index('.mlp')].removeprefix('encoder.')
            gate = next(k for k in memory if f'{layer}.mlp.gate_proj' in k and k.split('.')[-1] == key.split('.')[-1])
            file[key] = torch.cat((memory[gate], memory[gate.replace('gate', 'up')]))
        else:
            file[key] = memory[source]
        assert list(file[key].shape) == shape
    a, b = model.official(memory), model.official(file)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def meta3(state):
    """The same weights under the names of Meta's DINOv3 files, whose q and v biases are masked and k bias too."""
    D = len(state['norm.weight'])
    out = {'teacher.backbone.' + k.replace('registers', 'storage_tokens').replace('patch_embed.', 'patch_embed.proj.')
           .replace('.ls1', '.ls1.gamma').replace('.ls2', '.ls2.gamma'): v for k, v in state.items()}
    for key in [k for k in out if k.endswith('qkv.bias')]:
        mask = torch.ones(3 * D)
        mask[D:2 * D] = float('nan') if 'blocks.0' in key else 0
        out[key] = torch.where(mask == 1, out[key], 7.0)
        out[key + '_mask'] = mask
    return {**out, 'mask_token': torch.zeros(1, D), 'teacher.dino_head.mlp.0.weight': torch.zeros(3)}


def test_meta_names_and_masked_bias():
    state = model.official(made_up_state('dinov3_s_hf'))
    again = model.official(meta3(state))
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Small named models of each family, and a file with weights for the first."""
    for name in ('tiny2', 'tiny2_cls'):
        monkeypatch.setitem(model.ENCODERS, name, ('nobody/tiny2', *TINY))
    for name, arguments in OTHERS.items():
        monkeypatch.setitem(model.ENCODERS, name, (f'nobody/{name}', *arguments))
    monkeypatch.setitem(model.ENCODERS, 'tiny3', ('nobody/tiny3', 64, 3, 2, 96, True, 4, 16, 0))
    torch.manual_seed(0)
    state = model.ViT(*TINY).state_dict()
    state = {k: v + 0.1 * torch.randn_like(v) for k, v in state.items()}
    save_file(state, tmp_path / 'tiny2.safetensors')
    return str(tmp_path / 'tiny2.safetensors'), state


def test_real_weights_give_the_golden_values(shared):
    file = shared / 'weights' / 'dinov2_vits14.safetensors'
    if not file.exists():
        pytest.skip(f'no {file}')
    encoder = model.load_encoder('dinov2_vits14', str(file))
    ramp = torch.arange(224) / 223
    x = torch.stack((ramp[:, None].expand(224, 224), ramp.expand(224, 224), torch.full((224, 224), 0.5)))[None]
    z = encoder(x)
    assert z.shape == (1, 256, 384)
    assert (encoder.dim, encoder.patch, encoder.size, encoder.grid) == (384, 14, 224, (16, 16))
    for patch, want in ((0, [.8833, -.8766, .3604, -4.1071, -1.1133]), (255, [1.7221, .4591, .4388, -4.9345, -.8561])):
        torch.testing.assert_close(z[0, patch, :5], torch.tensor(want), atol=2e-3, rtol=0)


def test_encoder_is_frozen_float32_and_named(tiny):
    file, state = tiny
    save_file({k: v.half() for k, v in state.items()}, file + '.half.safetensors')
    for path in (file, file + '.half.safetensors'):
        encoder = model.load_encoder('tiny2', path, height=56)
        assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
        assert all(p.dtype == torch.float32 for p in encoder.parameters())
        assert (encoder.name, encoder.dim, encoder.patch, encoder.size, encoder.grid) == ('tiny2', 64, 14, 56, (4, 4))
        z = encoder(torch.rand(2, 3, 56, 56))
        assert z.shape == (2, 16, 64) and z.dtype == torch.float32 and not z.requires_grad
    with torch.autocast('cpu', torch.bfloat16):
        assert encoder(torch.rand(1, 3, 56, 56)).dtype == torch.float32
    with pytest.raises(AssertionError, match='uint8'):
        encoder(torch.zeros(1, 3, 56, 56, dtype=torch.uint8))


def test_layer_is_that_blocks_output_through_the_final_norm(tiny):
    file, _ = tiny
    x = torch.rand(1, 3, 56, 56)
    encoder = model.load_encoder('tiny2', file, layer=1, height=56)
    ran = []
    for i, block in enumerate(encoder.vit.blocks):
        block.register_forward_hook(lambda module, args, out, i=i: ran.append((i, out)))
    z = encoder(x)
    assert [i for i, _ in ran] == [0, 1]
    torch.testing.assert_close(z, encoder.vit.norm(ran[1][1][:, 1:]))
    last, third, second = (model.load_encoder('tiny2', file, layer=n, height=56)(x) for n in (-1, 2, -2))
    assert torch.equal(last, third) and torch.equal(second, z) and not torch.equal(last, z)


def test_pool_averages_squares_of_patches(tiny):
    file, _ = tiny
    x = torch.rand(2, 3, 56, 84)
    fine = model.load_encoder('tiny2', file, height=56, width=84)
    coarse = model.load_encoder('tiny2', file, height=56, width=84, pool=2)
    assert fine.grid == (4, 6) and coarse.grid == (2, 3)
    z, want = fine(x).view(2, 4, 6, 64), torch.zeros(2, 6, 64)
    for r in range(2):
        for c in range(3):
            want[:, 3 * r + c] = z[:, 2 * r:2 * r + 2, 2 * c:2 * c + 2].mean((1, 2))
    torch.testing.assert_close(coarse(x), want)


@pytest.mark.parametrize('name, mode', [('tiny2', 'bicubic'), ('tiny3', 'bilinear'), ('vjepa2_tiny', 'bilinear'),
                                        ('siglip2_tiny', 'bilinear')])
def test_frames_are_resized_as_the_family_was_trained_and_normalised(tiny, tmp_path, name, mode):
    state = model.ViT(*model.ENCODERS[name][1:]).state_dict()
    save_file(state, tmp_path / 'x.safetensors')
    H, W = 4 * model.ENCODERS[name][7], 6 * model.ENCODERS[name][7]
    encoder = model.load_encoder(name, str(tmp_path / 'x.safetensors'), height=H, width=W)
    x = torch.rand(1, 3, 100, 120).round()
    small = F.interpolate(x, (H, W), mode=mode, antialias=True).clamp(0, 1)
    assert torch.equal(encoder(x), encoder(small))
    moments = ([.5] * 3, [.5] * 3) if name == 'siglip2_tiny' else ([.485, .456, .406], [.229, .224, .225])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in moments)
    torch.testing.assert_close(encoder(x), encoder.vit((small - mean) / std))


# values of the published models, counted in Meta's (whose patches have two frames) and Hugging Face's classes; pixels
@pytest.mark.parametrize('name, repo, values, side', [
    ('vjepa2_vitl16', 'facebook/vjepa2-vitl-fpc64-256', 303_885_312 - 1024 * 768, 256),
    ('vjepa2_vith16', 'facebook/vjepa2-vith-fpc64-256', 631_648_000 - 1280 * 768, 256),
    ('vjepa2_vitg16', 'facebook/vjepa2-vitg-fpc64-256', 1_012_173_952 - 1408 * 768, 256),
    ('vjepa2_vitg16_384', 'facebook/vjepa2-vitg-fpc64-384', 1_012_173_952 - 1408 * 768, 384),
    ('siglip2_base16_224', 'google/siglip2-base-patch16-224', 85_797_120, 224),
    ('siglip2_base32_256', 'google/siglip2-base-patch32-256', 87_465_216, 256),
    ('siglip2_large16_512', 'google/siglip2-large-patch16-512', 304_147_456, 512),
    ('siglip2_so400m14_384', 'google/siglip2-so400m-patch14-384', 412_987_248, 378),     # whole patches
    ('siglip2_giant-opt16_384', 'google/siglip2-giant-opt-patch16-384', 1_135_329_792, 384),
    ('dinov2_vitg14_reg_cls', 'facebook/dinov2-with-registers-giant', 1_136_480_768 - 1536 + 4 * 1536, 224),
    ('dinov3_vitl16_sat_cls', 'facebook/dinov3-vitl16-pretrain-sat493m', 303_129_600 - 1024 + 24 * 1024, 224)])
def test_sizes_of_what_is_published(name, repo, values, side, monkeypatch):
    monkeypatch.setattr(model, 'load_vit', lambda vit, name, path: None)
    monkeypatch.setattr(model, 'Encoder', lambda name, vit, layer, *size: setattr(vit, 'asked', size) or vit)
    monkeypatch.setattr(model, 'download_weights', lambda name, repo: sources.append(repo))
    sources = []
    vit = model.load_encoder(name)
    assert sources == [repo] and vit.asked == (side, side, 1)
    assert sum(p.numel() for p in vit.parameters()) == values


def test_class_token_alone(tiny):
    file, _ = tiny
    x = torch.rand(2, 3, 56, 84)
    for layer in (-1, 1):
        encoder = model.load_encoder('tiny2_cls', file, layer=layer, height=56, width=84)
        every = model.load_encoder('tiny2', file, layer=layer, height=56, width=84)
        assert (encoder.grid, encoder.dim, encoder.size, encoder.width) == ((1, 1), 64, 56, 84)
        ran = []
        every.vit.blocks[layer].register_forward_hook(lambda module, args, out: ran.append(out))
        every(x)
        torch.testing.assert_close(encoder(x), every.vit.norm(ran[0][:, :1]))
        assert encoder(x).shape == (2, 1, 64) and encoder.hash == every.hash
    assert ends('tiny2_cls', file, height=56, pool=2) == '--pool=2: tiny2_cls has one token, it takes pool=1'
    assert set(model.ENCODERS) >= {f'{name}_cls' for name in model.ENCODERS if re.match('dinov', name)
                                   and not name.endswith('_cls')}
    assert not [name for name in model.ENCODERS if re.match('(vjepa|siglip).*_cls', name)]


def test_files_of_vjepa2(monkeypatch, tmp_path):
    """Meta's of a whole training, and Hugging Face's, in half precision: the frames of a patch are added as float32."""
    monkeypatch.setitem(model.ENCODERS, 'vjepa2_tiny', ('nobody/x', *CASES['vjepa2_l_hf']['arguments']))
    hf = {k: v.half() for k, v in made_up_state('vjepa2_l_hf').items()}
    save_file(hf, tmp_path / 'hf.safetensors')
    meta = model.official(hf)
    meta |= {'patch_embed.weight': hf['encoder.embeddings.patch_embeddings.proj.weight'], 'pos_embed': torch.zeros(1, 9, 128)}
    meta = {'module.backbone.' + k.replace('patch_embed.', 'patch_embed.proj.'): v for k, v in meta.items()}
    torch.save({'encoder': meta, 'predictor': {'module.backbone.predictor_norm.bias': torch.zeros(3)}, 'epoch': 3,
                'target_encoder': {k: v + 1 for k, v in meta.items()}}, tmp_path / 'vitl.pt')
    x = torch.rand(1, 3, 64, 96)
    one, other = (model.load_encoder('vjepa2_tiny', str(tmp_path / name), height=64, width=96)
                  for name in ('hf.safetensors', 'vitl.pt'))
    assert one.hash == other.hash and torch.equal(one(x), other(x)) and one.grid == (4, 6)
    two = hf['encoder.embeddings.patch_embeddings.proj.weight'].float()
    torch.testing.assert_close(one.vit.patch_embed.weight, two[:, :, 0] + two[:, :, 1])
    monkeypatch.setitem(model.ENCODERS, 'vjepa2_tiny_384', model.ENCODERS['vjepa2_tiny'])
    for name, repo, source, of in (('vjepa2_tiny', 'vitg-384', '384', '256'),
                                   ('vjepa2_tiny_384', 'models--facebook--vjepa2-vitg-fpc64-256', '256', '384')):
        file = str(tmp_path / f'{repo}.safetensors')
        save_file(hf, file)
        assert f'{file}: weights of {source}, {name} has those of {of}: ' in ends(name, file)
        assert model.load_encoder(name.replace('_384', '') + '_384' * (source == '384'), file).size == 256


def test_files_of_siglip2(tiny, monkeypatch, tmp_path):
    """Hugging Face's, with a text model or without; the first SigLIP has the same shapes and fewer words."""
    monkeypatch.setitem(model.ENCODERS, 'siglip2_tiny', ('nobody/x', *CASES['siglip2_hf']['arguments']))
    state, words = made_up_state('siglip2_hf'), 'text_model.embeddings.token_embedding.weight'
    save_file(state | {words: torch.zeros(256000, 1)}, tmp_path / 'both.safetensors')
    alone = {k.removeprefix('vision_model.'): v for k, v in state.items() if k.startswith('vision_model.')}
    save_file(alone, tmp_path / 'alone.safetensors')
    both, alone = (model.load_encoder('siglip2_tiny', str(tmp_path / f'{name}.safetensors')) for name in ('both', 'alone'))
    x = torch.rand(1, 3, 224, 224)
    assert both.grid == (14, 14) and both.size == 224 and both.hash == alone.hash and torch.equal(both(x), alone(x))
    file = str(tmp_path / 'first.safetensors')
    save_file(state | {words: torch.zeros(32000, 1)}, file)
    assert f'{file}: weights of the first SigLIP, siglip2_tiny has those of SigLIP 2' in ends('siglip2_tiny', file)
    assert ends('siglip2_tiny', tiny[0]) == f'{tiny[0]}: pos_embed is (1, 1370, 64), siglip2_tiny wants (1, 196, 144)'


def test_stored_periods_are_used(tiny, tmp_path):
    vit = model.ViT(*model.ENCODERS['tiny3'][1:])
    x = torch.rand(1, 3, 32, 48)
    rounded = vit.periods.bfloat16()
    save_file({**meta3(vit.state_dict()), 'rope_embed.periods': rounded}, tmp_path / 'x.safetensors')
    encoder = model.load_encoder('tiny3', str(tmp_path / 'x.safetensors'), height=32, width=48)
    assert torch.equal(encoder.vit.periods, rounded.float()) and not torch.equal(vit.periods, rounded.float())
    assert encoder(x).isfinite().all()


def test_pytorch_files_and_split_files_load(tiny, tmp_path):
    file, state = tiny
    x = torch.rand(1, 3, 28, 28)
    want = model.load_encoder('tiny2', file, height=28)(x)
    named = lambda prefix, state: {prefix + k: v for k, v in state.items()}
    student = {k: v + 1 for k, v in state.items()}
    chunked = {re.sub(r'blocks\.(\d)', lambda m: f'blocks.{int(m[1]) // 2}.{m[1]}', k): v for k, v in state.items()}
    wrapped = {k.replace('attn.', '_checkpoint_wrapped_module.attn.'): v for k, v in state.items()}
    files = [{'model': {'state_dict': named('module.', state)}, 'epoch': 3}, {'model_state_dict': chunked},
             {'model_ema': named('_orig_mod.', state), 'optimizer': {'state': {}}}, named('student.backbone.', state),
             {'student': named('backbone.', student), 'teacher': named('backbone.', state)},
             {'model': named('teacher.backbone.', state) | named('student.backbone.', student)
              | {'student.dino_head.last_layer.weight': torch.zeros(3)}},
             {'teacher': named('module._fsdp_wrapped_module.backbone.', wrapped)}]
    for i, content in enumerate(files):
        torch.save(content, tmp_path / f'{i}.pth')
    (tmp_path / 'split').mkdir()
    for i in range(2):
        save_file(dict([*state.items()][i::2]), tmp_path / 'split' / f'part-{i}.safetensors')
    for name in (*(f'{i}.pth' for i in range(len(files))), 'split'):
        encoder = model.load_encoder('tiny2', str(tmp_path / name), height=28)
        assert torch.equal(encoder(x), want) and encoder.hash == model.load_encoder('tiny2', file, height=28).hash, name


def test_satellite_weights_are_told_apart_and_normalised_as_they_were_trained(tiny, tmp_path, monkeypatch):
    """By the name of their file, or for the one size where it tells by what only their training used."""
    arguments = model.ENCODERS['tiny3']
    for name in ('tiny3_sat', 'dinov3_vitl16', 'dinov3_vitl16_sat', 'dinov3_vit7b16'):
        monkeypatch.setitem(model.ENCODERS, name, arguments)
    state = meta3(model.ViT(*arguments[1:]).state_dict())
    both = state | {'local_cls_norm.weight': torch.ones(64), 'local_cls_norm.bias': torch.zeros(64)}
    names = {}
    for name, content in (('sat493m', both), ('lvd1689m', state), ('any', both), ('plain', state)):
        names[name] = str(tmp_path / f'x_pretrain_{name}-0123.safetensors')
        save_file(content, names[name])
    for name, file in (('tiny3', 'sat493m'), ('tiny3_sat', 'lvd1689m'), ('dinov3_vitl16', 'any')):
        source = 'lvd1689m' if file == 'lvd1689m' else 'sat493m'
        assert f'{names[file]}: weights of {source}, {name} has those of' in ends(name, names[file], height=32)
    x = torch.rand(1, 3, 32, 32)
    for name, file, moments in (('tiny3_sat', 'sat493m', ([.430, .411, .296], [.213, .156, .143])),
                                ('dinov3_vitl16_sat', 'plain', ([.430, .411, .296], [.213, .156, .143])),
                                ('dinov3_vit7b16', 'any', ([.485, .456, .406], [.229, .224, .225]))):
        encoder = model.load_encoder(name, names[file], height=32)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in moments)
        torch.testing.assert_close(encoder(x), encoder.vit((x - mean) / std))


def ends(*args, **options):
    with pytest.raises(SystemExit) as e:
        model.load_encoder(*args, **options)
    assert isinstance(e.value.code, str) and '\n' not in e.value.code
    return e.value.code


def test_each_mistake_is_one_line(tiny, tmp_path):
    file, state = tiny
    put = lambda name, state: save_file(state, tmp_path / name) or str(tmp_path / name)
    assert ends('dinov2_vits15') == '--encoder=dinov2_vits15: no such encoder, did you mean dinov2_vits14?'
    assert 'dinov2_vits14, ' in ends('zzz')
    assert ends('tiny2', file, height=225) == '--frame_height=225: tiny2 with pool=1 wants a multiple of 14 pixels'
    assert ends('tiny2', file, width=42, pool=2) == '--frame_width=42: tiny2 with pool=2 wants a multiple of 28 pixels'
    assert ends('tiny2', file, height=-14).startswith('--frame_height=-14: ')
    assert ends('tiny2', file, layer=3) == '--layer=3: tiny2 has blocks 0 to 2 (-1 is the last)'
    assert ends('tiny2', file, layer=-4).startswith('--layer=-4: ')
    assert ends('tiny2', 'nowhere.safetensors') == (
        '--encoder_path=nowhere.safetensors: no such file, nor a folder with .safetensors in it')

    wrong = put('wrong.safetensors', {**state, 'blocks.0.attn.qkv.weight': torch.zeros(192, 65)})
    assert ends('tiny2', wrong) == f'{wrong}: blocks.0.attn.qkv.weight is (192, 65), tiny2 wants (192, 64)'
    less = put('less.safetensors', {k: v for k, v in state.items() if k != 'blocks.1.norm2.bias'})
    there = ', '.join(sorted(state)[:3])
    assert ends('tiny2', less) == f'{less}: blocks.1.norm2.bias is missing (there are {there}, ..), tiny2 wants (64,)'
    more = put('more.safetensors', {**state, 'blocks.3.norm2.bias': torch.zeros(64)})
    assert ends('tiny2', more) == f'{more}: blocks.3.norm2.bias is (64,), tiny2 wants no such weight'
    registers = put('registers.safetensors', {**state, 'register_tokens': torch.zeros(1, 4, 64)})
    assert ends('tiny2', registers).startswith(f'{registers}: registers is (1, 4, 64), tiny2 wants no such weight')
    other = put('other.safetensors', {'features.0.weight': torch.zeros(64, 3, 3, 3)})
    assert ends('tiny2', other) == (
        f'{other}: cls_token is missing (there are features.0.weight, ..), tiny2 wants (1, 1, 64)')
    odd = put('odd.safetensors', {**state, 'norm.bias': torch.full((64,), float('nan'))})
    assert ends('tiny2', odd) == f'{odd}: norm.bias is not finite'
    torch.save({'network': state, 'epoch': 3}, tmp_path / 'none.pth')
    assert 'none.pth: no weights in it, but network, epoch' in ends('tiny2', str(tmp_path / 'none.pth'))
    torch.save({'a\nb': 1}, tmp_path / 'none.pth')
    assert ends('tiny2', str(tmp_path / 'none.pth')).endswith('none.pth: no weights in it, but a b')
    torch.save({'model': state, 'model_ema': state}, tmp_path / 'two.pth')
    assert 'two.pth: has model and model_ema: save the one' in ends('tiny2', str(tmp_path / 'two.pth'))
    assert ends('tiny3', file).startswith(f'{file}: ')
    square = put('square.safetensors', {**state, 'patch_embed.weight': torch.zeros(64, 3, 16, 16)})
    assert ends('vjepa2_tiny', square) == f'{square}: blocks.0.ls1 is (64,), vjepa2_tiny wants no such weight'
    frames = put('frames.safetensors', {'patch_embed.weight': torch.zeros(64, 3, 2, 16, 16)})
    assert ends('tiny2', frames) == f'{frames}: cls_token is missing (there are patch_embed.weight, ..), tiny2 wants (1, 1, 64)'
    assert ends('dinov2_vits14', file) == f'{file}: cls_token is (1, 1, 64), dinov2_vits14 wants (1, 1, 384)'


@pytest.mark.parametrize('name', ['x.safetensors', 'x.pth', 'x.index.json'])
def test_unreadable_files_are_one_line(tiny, tmp_path, name):
    file, state = tiny
    torch.save(state, tmp_path / 'whole.pth')
    whole = Path(file).read_bytes() if name == 'x.safetensors' else (tmp_path / 'whole.pth').read_bytes()
    for content in (whole[:len(whole) // 2], b'', b'\0' * 99, b'not weights\n' * 9):
        (tmp_path / name).write_bytes(content)
        assert ends('tiny2', str(tmp_path / name)).startswith(f'{tmp_path / name}: cannot be read as weights (')
    torch.save([1, 2], tmp_path / 'list.pth')
    assert ends('tiny2', str(tmp_path / 'list.pth')).startswith(f'{tmp_path / "list.pth"}: cannot be read')


def test_a_mangled_pytorch_file_runs_no_code(tiny, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)
    torch.save({'cls_token': Evil()}, tmp_path / 'x.pth')
    assert 'cannot be read' in ends('tiny2', str(tmp_path / 'x.pth')) and not (tmp_path / 'ran').exists()


def test_weights_come_from_the_hub(tiny, tmp_path):
    """The real client against a server on this machine: a whole file, a split one, and a repository that is gated."""
    file, state = tiny
    weights, files = Path(file).read_bytes(), {}
    for repo, part in (('nobody/tiny2', 'model.safetensors'), ('nobody/split', 'model-part.safetensors')):
        files |= {f'/api/models/{repo}/revision/main': json.dumps(
                      dict(id=repo, sha='1' * 40,
                            siblings=[dict(rfilename=part), dict(rfilename='large.bin')])).encode(),
                  f'/api/models/{repo}/tree/{"1" * 40}': json.dumps(
                      [dict(type='file', path=part, size=len(weights), oid='2' * 40)]).encode(),
                  f'/{repo}/resolve/{"1" * 40}/{part}': weights}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = files.get(self.path.partition('?')[0])
            self.send_response(200 if body else 403 if 'gated' in self.path else 404)
            self.send_header('Content-Length', str(len(body or b'')))
            self.send_header('ETag', f'"{len(body or b"")}"')
            self.send_header('X-Repo-Commit', '1' * 40)
            self.send_header('X-Error-Code', '' if body else 'GatedRepo' if 'gated' in self.path else 'EntryNotFound')
            self.end_headers()
            self.wfile.write((body or b'') if self.command == 'GET' else b'')

        do_HEAD = do_GET
        log_message = lambda *args: None

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = (f'import model, sys\nfor repo in sys.argv[1:]:\n    model.ENCODERS["tiny2"] = (repo, *{TINY})\n'
               '    print(float(model.load_encoder("tiny2").vit.norm.weight.sum()))')
    root = os.path.dirname(model.__file__)
    env = dict({k: v for k, v in os.environ.items() if not k.lower().endswith('_proxy') and k != 'HF_HUB_OFFLINE'},
               HF_HOME=str(tmp_path / 'hf'), HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}', PYTHONPATH=root)
    got = subprocess.run([sys.executable, '-c', program, 'nobody/tiny2', 'nobody/split', 'nobody/gated'], env=env,
                         capture_output=True, text=True)
    server.shutdown()
    assert [*map(float, got.stdout.split())] == pytest.approx([float(state['norm.weight'].sum())] * 2), got.stderr
    last = got.stderr.strip().splitlines()[-1]
    assert got.returncode == 1 and 'Traceback' not in got.stderr
    assert last.startswith('--encoder=tiny2: no model.safetensors from https://huggingface.co/nobody/gated (')
    assert last.endswith('get it by hand and give --encoder_path=model.safetensors')


def test_first_angles_of_a_process_are_right():
    """Rotary angles of fresh processes with two threads; without the small cos in model.py one in four is wrong."""
    program = ('import torch\ntorch.set_num_threads(2)\nimport model\n'
               'x = torch.randn(600, 600) @ torch.randn(600, 600)\n'
               'a = torch.linspace(-6.3, 6.3, 12864)\nc, s = a.cos(), a.sin()\n'
               'assert (c - a.double().cos()).abs().max() < 1e-6 and (s - a.double().sin()).abs().max() < 1e-6')
    env = dict(os.environ, PYTHONPATH=os.path.dirname(model.__file__))
    for _ in range(4):
        subprocess.run([sys.executable, '-c', program], env=env, check=True)


# the world model ------------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models are far slower on two threads that have to share their cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def double(monkeypatch):
    """Float64 throughout, also where the model goes to float32 by contract: what is left is rounding at 1e-16."""
    monkeypatch.setattr(torch.Tensor, 'float', torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def eager_flex(monkeypatch):
    """Flex attention as it is written, not compiled: slow, but it runs on a CPU, and backwards too."""
    flex = 'torch.nn.attention.flex_attention.'
    monkeypatch.setattr(model, 'compiled_flex', lambda: model.attend_flex)
    monkeypatch.setattr(flex + '_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG', True)
    monkeypatch.setattr(flex + '_validate_device', lambda *tensors: None)


def use(net, kernel):
    for m in net.modules():
        if isinstance(m, model.Attention):
            m.kernel = kernel
    return net


def world(context=4, k_max=8, seed=0, **overrides):
    """A tiny model whose output is not zero, as it is when new."""
    torch.manual_seed(seed)
    config = model.model_config('nano', **(dict(dim=3, grid=(2, 3), action_dim=2, width=32, layers=4, heads=4,
                                                kv_heads=2, registers=1, context=context, k_max=k_max) | overrides))
    net = model.WorldModel(config)
    for m in (net.head.out, *net.head.modulate) if config['wide_layers'] else (net.head,):
        torch.nn.init.normal_(m.weight, std=0.3)
    if net.s_out:
        torch.nn.init.normal_(net.s_out.weight, std=0.3)
    return net.eval()


def inputs(B=2, T=6, N=6, D=3, A=2, k_max=8):
    g = torch.Generator().manual_seed(1)
    z, a = torch.randn(B, T, N, D, generator=g), torch.randn(B, T, A, generator=g)
    a_mask = torch.rand(B, T, generator=g) < 0.7
    a_mask[:, 0] = False
    tau = torch.randint(0, k_max, (B, T), generator=g) / k_max
    return z, tau, torch.full((B, T), 1 / k_max), a, a_mask


def loss_of(net, z, a, a_mask, z_mask=None, seed=0, rows=slice(None), **options):
    """shortcut_loss of rows of a batch whose noise is that of a seed; options of it and of the objective."""
    more = {k: options.pop(k) for k in ('rms', 'count') if k in options}
    z_mask = torch.ones_like(a_mask) if z_mask is None else z_mask
    noise = None if seed is None else model.clip_noise(z[rows], [1000 * seed + i for i in range(len(z))][rows])
    return model.shortcut_loss(net, z[rows], a[rows], a_mask[rows], z_mask[rows], options, noise=noise,
                               first=rows.start or 0, **more)


def terms(flow, bootstrap):
    return dict(flow=torch.tensor(flow), bootstrap=torch.tensor(bootstrap))


def gradients(loss, net):
    """Of every parameter, in one vector; a parameter that takes no part has 0."""
    g = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if x is None else x).flatten() for x, p in zip(g, net.parameters())])


@pytest.fixture(params=['plain', 'flex'])
def kernel(request):
    if request.param == 'flex':
        request.getfixturevalue('eager_flex')
    return request.param


def test_attention_in_float32_is_that_of_float64():
    g = torch.Generator().manual_seed(0)
    q, k, v = (3 * torch.randn(2, heads, 5, 8, generator=g).double() for heads in (4, 2, 2))
    want = model.attend(q, k, v, 2.0)
    assert torch.allclose(model.attend(q.float(), k.float(), v.float(), 2.0).double(), want, atol=1e-5)
    half = model.attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), 2.0)
    assert half.dtype == torch.bfloat16 and (half - want).abs().max() < 0.1


@pytest.mark.parametrize('context, kv_heads, cap, group', [
    (0, 2, 2.0, 1), (3, 2, 2.0, 1), (3, 4, 0.5, 1), (0, 1, 50.0, 1), (2, 2, 2.0, 3), (9, 4, 50.0, 2)])
def test_a_layer_of_attention_written_out(double, kernel, context, kv_heads, cap, group):
    """Normalised queries and keys, turned as complex numbers, each head with a gain of its own. A token sees its frame
    and those before it."""
    S = 4 * group if group > 1 else 5
    torch.manual_seed(0)
    attn, x, angle = model.Attention(32, 4, kv_heads, cap, context, group), torch.randn(2, S, 32), torch.randn(S, 1, 4)
    attn.kernel = kernel
    torch.nn.init.uniform_(attn.qk_gain, 0.5, 3.0)
    heads = (x @ attn.qkv.weight.T).unflatten(2, (4 + 2 * kv_heads, 8))
    unit = heads / heads.square().mean(dim=-1, keepdim=True).sqrt()
    turned = torch.complex(unit[..., :4], unit[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    qk = torch.cat((turned.real, turned.imag), dim=-1)[:, :, :4 + kv_heads] * attn.qk_gain
    want = torch.zeros(2, S, 4, 8)
    for i in range(4):
        for s in range(S):
            frame = s // group
            seen = slice(max(0, frame + 1 - context) * group, (frame + 1) * group) if context else slice(0, S)
            key = 4 + i * kv_heads // 4
            logits = torch.einsum('bd,bjd->bj', qk[:, s, i], qk[:, seen, key]) / 8 ** 0.5
            weights = torch.softmax(cap * torch.tanh(logits / cap), dim=-1)
            want[:, s, i] = torch.einsum('bj,bjd->bd', weights, heads[:, seen, key + kv_heads])
    got = attn(x, (angle.cos(), angle.sin()), t=torch.arange(S // group))
    assert torch.allclose(got, want.flatten(2) @ attn.out.weight.T, rtol=0, atol=1e-5)      # rms_norm adds 1e-6


def test_rope_of_space_depends_on_the_steps_between_rows_and_columns(double):
    """All pairs of latents of a 3x4 grid: as many different logits as there are different steps."""
    net = world(grid=(3, 4), width=64, registers=2)
    torch.manual_seed(0)
    q, k = torch.randn(1, 16), torch.randn(1, 16)
    at = lambda x: model.rotate(x.expand(2 + 12 + 2, 1, 16), net.space_cos, net.space_sin)[:, 0]
    logits, steps = at(q) @ at(k).T, {}
    for i in range(12):
        for j in range(12):
            steps.setdefault((i // 4 - j // 4, i % 4 - j % 4), []).append(logits[2 + i, 2 + j].item())
    assert len(steps) == 5 * 7 and all(np.ptp(v) < 1e-12 for v in steps.values())
    means = sorted(v[0] for v in steps.values())
    assert np.diff(means).min() > 1e-6
    for other in (0, 1, -2, -1):
        assert torch.equal(at(q)[other], q[0]), 'other tokens have no place'


@pytest.mark.parametrize('attention', ['factored', 'flat'])
def test_shifting_all_frames_changes_nothing_but_rounding(double, attention):
    net, x = world(attention=attention), inputs()
    assert torch.allclose(net(*x), net(*x, start=57), rtol=0, atol=1e-10)


@pytest.fixture(params=['plain', 'flex', 'remat'])
def path(request):
    """How a model computes: what must hold, holds for every kernel."""
    if request.param == 'flex':
        request.getfixturevalue('eager_flex')

    def made(**overrides):
        net = use(world(**overrides), 'flex' if request.param == 'flex' else 'plain')
        net.remat = request.param == 'remat'
        return net
    return made


def test_flat_rope_tells_rows_columns_and_frames_apart(double):
    """As many different logits as there are different steps in space and time; other tokens turn in time alone."""
    net, angles = world(grid=(3, 4), width=64, registers=2, attention='flat'), []
    net.layers[0].register_forward_pre_hook(lambda m, given: angles.append(given[1]))
    net(*inputs(1, 3, N=12))
    torch.manual_seed(0)
    q, k = (model.rotate(torch.randn(1, 16).expand(3 * 16, 1, 16), *angles[0])[:, 0] for _ in range(2))
    logits, steps = q @ k.T, {}
    for i, j in itertools.product(range(36), repeat=2):
        (t, n), (u, m) = divmod(i, 12), divmod(j, 12)
        step = t - u, n // 4 - m // 4, n % 4 - m % 4
        steps.setdefault(step, []).append(logits[16 * t + 2 + n, 16 * u + 2 + m].item())
    assert len(steps) == 5 * 5 * 7 and all(np.ptp(v) < 1e-12 for v in steps.values())
    assert np.diff(sorted(v[0] for v in steps.values())).min() > 1e-6
    still = [0, 1, 14, 15]
    assert all(torch.allclose(q[16 * t + still[0]], q[16 * t + i]) for t in range(3) for i in still)
    assert not torch.allclose(q[0], q[16]) and not torch.allclose(q[0], q[2 + 5])


def test_flat_tokens_see_their_frame_and_those_before_it(path):
    """In one layer, as in DINO-WM's mask: every token of the frame, whatever its place."""
    net, (z, *rest) = path(layers=2, context=3, attention='flat', registers=0), inputs()
    torch.nn.init.zeros_(net.layers[1].attn.out.weight)
    base = net(z, *rest)
    for t, n in (0, 5), (2, 0), (5, 3):
        other = z.clone()
        other[:, t, n] += 1
        changed = (net(other, *rest) - base).abs().amax(dim=(0, 3)) > 1e-7       # (T, N)
        assert changed.tolist() == [[t <= i < t + 3] * 6 for i in range(6)]


@pytest.mark.parametrize('wide_layers', [0, 1])
def test_the_past_never_sees_the_future_nor_beyond_the_window(path, wide_layers):
    net, (z, *rest) = path(layers=2, context=3, wide_layers=wide_layers), inputs()
    base = net(z, *rest)
    for t in range(6):
        other = z.clone()
        other[:, t] += 1
        changed = (net(other, *rest) - base).abs().amax(dim=(0, 2, 3)) > 1e-6
        # one time layer: exactly the frames t .. t + context - 1
        assert changed.tolist() == [t <= i < t + 3 for i in range(6)]
    other = z.clone()
    other[0] += 1
    assert torch.equal(net(other, *rest)[1], base[1])       # clips never meet


@pytest.mark.parametrize('attention', ['factored', 'flat'])
@pytest.mark.parametrize('objective', ['shortcut', 'direct'])
def test_beyond_the_window_every_so_manyth_frame_is_seen(path, attention, objective):
    net = path(layers=2, context=2, memory=3, memory_frames=2, attention=attention, objective=objective)
    if attention == 'flat':
        torch.nn.init.zeros_(net.layers[1].attn.out.weight)
    z, *rest = inputs(2, 14)
    base, first = net(z, *rest), objective == 'direct'      # which sees frame t - 1 in the place of frame t
    for t in range(14):
        other = z.clone()
        other[:, t] += 1
        changed = (net(other, *rest) - base).abs().amax(dim=(0, 2, 3)) > 1e-7
        assert changed.tolist() == [0 <= i - t < 2 or t % 3 == first and 2 <= i - t < 6 for i in range(14)]


@pytest.mark.parametrize('overrides', [
    {}, dict(objective='direct'), dict(attention='flat'), dict(context=6), dict(objective='direct', attention='flat')])
def test_memories_stand_for_a_clip_whose_other_frames_nobody_sees(path, double, overrides):
    net = path(**dict(dict(memory=4, memory_frames=3, context=3, layers=6, time_every=2), **overrides))
    first, n = int('objective' in overrides), 9
    long = inputs(3, 8 + n)
    between = torch.arange(8 + n).expand(3, -1) < 8 - first
    between = between & (torch.arange(8 + n) % 4 > 0)
    want = net(*long, between, start=first - 8)[:, 8 - first:8 - first + n]
    which = [0, 4, *range(8 - first, 8 - first + n)]
    clip = [x[:, which] for x in long]
    got = net(*clip, memories=2)
    assert torch.allclose(got[:, 2:], want, rtol=0, atol=1e-10)
    # one that nobody sees is as good as none
    unseen = torch.zeros(3, 2 + n, dtype=torch.bool)
    unseen[:, 0] = True
    fewer = net(*(x[:, 1:] for x in clip), memories=1)
    assert torch.allclose(net(*clip, unseen, memories=2)[:, 2:], fewer[:, 1:], rtol=0, atol=1e-10)
    assert not torch.allclose(got[:, 2:], fewer[:, 1:], atol=1e-3)


@pytest.mark.parametrize('objective', ['shortcut', 'direct'])
@pytest.mark.parametrize('context', [3, 6])
def test_no_distance_in_time_is_new_to_a_rollout(monkeypatch, objective, context):
    seen, rule = [], model.in_sight

    def in_sight(t, then, *rest):
        mask = rule(t, then, *rest)
        seen.append({*(t - then)[mask].tolist()})
        return mask

    monkeypatch.setattr(model, 'in_sight', in_sight)
    net = world(memory=4, memory_frames=3, context=context, objective=objective)
    z, _, _, a, a_mask = inputs(2, 2 + (5 if objective == 'direct' else 4))
    loss_of(net, z, a, a_mask, memories=2, objective=objective)
    trained = set().union(*seen)
    seen.clear()
    with torch.no_grad():
        slow_rollout(net, *[x[:, :1] for x in inputs(2, 1)[:1]], *inputs(2, 30)[3:], K=1)
    assert set().union(*seen) == trained == {*range(12)}
    seen.clear()        # nor with a cache, of kept frames and of its own
    model.rollout(net, z[:, 2:4], torch.zeros(2, 40, 2), torch.ones(2, 40, dtype=torch.bool), 1, gone=[*z[:, :1].expand(-1, 20, -1, -1).unbind(1)])
    assert trained >= set().union(*seen) > {*range(context), 4 + 4, 11}


@pytest.mark.parametrize('objective', ['shortcut', 'diffusion', 'direct'])
def test_memories_are_seen_where_there_are_any_and_are_no_targets(double, objective):
    net, (z, _, _, a, a_mask) = world(memory=3, memory_frames=3, context=2, objective=objective), inputs(4, 2 + 5)
    a_mask[:, :3] = False
    z_mask = torch.ones_like(a_mask)
    z_mask[1, :2] = z_mask[2, 0] = z_mask[3, 5:] = False
    given = dict(objective=objective, memories=2, p_image=0.0)
    loss, _ = loss_of(net, z, a, a_mask, z_mask, **given)
    _, _, counted = model.which_rows(z_mask, objective, 0.25, memories=2)
    first = 3 if objective == 'direct' else 2
    assert (counted['flow'] | counted['bootstrap']).tolist() == [[first <= t < (5 if b == 3 else 7) for t in range(7)]
                                                                 for b in range(4)]
    for b, t in itertools.product(range(4), range(3)):
        other = z.clone()
        other[b, t] += 1
        again, _ = loss_of(net, other, a, a_mask, z_mask, **given)
        assert torch.equal(again, loss) == (not z_mask[b, t]), (b, t)


def test_of_clips_with_memories_the_past_is_all_of_them_and_more():
    z, mask, net = torch.zeros(4000, 6, 1, 1), torch.ones(4000, 6, dtype=bool), Recorder()
    net.config = {}
    torch.manual_seed(0)
    take = lambda *given, memories=0, **rest: net(*given, **rest)
    model.shortcut_loss(take, z, torch.zeros(4000, 6, 0), mask, mask, dict(
        k_max=64, bootstrap=0.0, memories=2, tau_schedule='shift', tau_shift=1e9, p_past=1.0))
    length = (net.calls[-1][1] > 0).sum(dim=1)
    assert all(abs((length == n).float().mean() - (n > 2) / 3) < 0.03 for n in range(7) if n < 6) and length.max() == 5


@pytest.mark.parametrize('wide_layers', [0, 1])
def test_what_comes_out_is_what_went_in_at_the_same_place(wide_layers):
    net, (z, *rest) = world(registers=3, wide_layers=wide_layers), inputs()
    for m in net.modules():
        if isinstance(m, model.Layer):      # no layer does anything
            torch.nn.init.zeros_(m.attn.out.weight)
            torch.nn.init.zeros_(m.mlp.down.weight)
    for n in range(6):
        other = z.clone()
        other[:, :, n] += 1
        changed = (net(other, *rest) - net(z, *rest)).abs().amax(dim=(0, 1, 3)) > 1e-6
        assert changed.tolist() == [i == n for i in range(6)]
    if wide_layers:     # the trunk too is heard at its place
        torch.nn.init.normal_(net.head.layers[0].mlp.down.weight)
        base = net(z, *rest)
        net.z_in.register_forward_hook(lambda m, given, out: out + (torch.arange(6) == 2)[:, None])
        assert ((net(z, *rest) - base).abs().amax(dim=(0, 1, 3)) > 1e-6).tolist() == [i == 2 for i in range(6)]


def test_levels_and_step_sizes_are_told_apart():
    net, (z, _, _, a, a_mask) = world(), inputs()
    pairs = [(0, 1 / 2 ** i) for i in range(4)] + [(i / 8, 1 / 8) for i in range(1, 9)]
    answers = [net(z, torch.full(z.shape[:2], tau), torch.full(z.shape[:2], d), a, a_mask) for tau, d in pairs]
    same = [(pairs[i], pairs[j]) for i in range(12) for j in range(i) if torch.allclose(answers[i], answers[j])]
    assert same == [((1.0, 1 / 8), (7 / 8, 1 / 8))], 'the cleanest level stands for clean frames'


@pytest.mark.parametrize('attention', ['factored', 'flat'])
def test_frames_alone_see_only_themselves(path, attention):
    net, (z, *rest) = path(attention=attention), inputs()
    other = z.clone()
    other[:, 2] += 1
    alone = torch.tensor([True, False])
    changed = (net(z, *rest, alone) - net(other, *rest, alone)).abs().amax(dim=(2, 3)) > 1e-6
    assert changed[0].tolist() == [False, False, True, False, False, False] and changed[1, 3:].all()


@pytest.mark.parametrize('action_on', ['all', 'token'])
def test_hidden_actions_do_not_leak(path, action_on):
    net, (z, tau, d, a, a_mask) = path(action_on=action_on), inputs()
    hidden = torch.where(a_mask[..., None], a, torch.nan)
    base, blind = net(z, tau, d, a, a_mask), net(z, tau, d, hidden, a_mask)
    assert torch.equal(base, blind) and gradients(blind.sum(), net).isfinite().all()
    assert not torch.allclose(base, net(z, tau, d, a + 1, a_mask))


@pytest.mark.parametrize('with_alone, attention', [(False, 'factored'), (True, 'factored'), (True, 'flat')])
def test_flex_attention_and_remat_compute_the_same(eager_flex, with_alone, attention):
    net, (z, *rest) = world(context=3, soft_cap=2.0, attention=attention), inputs(3, 7)
    alone = torch.tensor([True, False, True]) if with_alone else None
    results = []
    for kernel, remat in (('plain', False), ('flex', False), ('plain', True)):
        use(net, kernel).remat = remat
        x = z.clone().requires_grad_()
        out = net(x, *rest, alone)
        results.append((out, *torch.autograd.grad(out.square().mean(), [x, *net.parameters()])))
    for other in results[1:]:
        for want, got in zip(results[0], other):
            assert torch.allclose(want, got, rtol=1e-4, atol=1e-5)


def test_remat_keeps_less(monkeypatch):
    """Without it a layer keeps its insides for the way back; with it, its input."""
    net, x, kept = world(), inputs(), {}
    for remat in (False, True):
        net.remat, kept[remat] = remat, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept[remat].append(t.numel()) or t, lambda t: t):
            net(*x)
    assert sum(kept[True]) < 0.3 * sum(kept[False])


@pytest.mark.parametrize('Tc, overrides', [(0, {}), (3, {}), (6, {}), (0, dict(attention='flat')),
                                           (6, dict(attention='flat')), (6, dict(memory=3, memory_frames=2)),
                                           (0, dict(memory=2, memory_frames=3, attention='flat'))])
def test_a_frame_number_in_a_tensor_is_a_frame_number(Tc, overrides):
    """The form of fixed shapes, which a CUDA graph needs, goes round the cache as the other does."""
    net, (z, tau, d, a, a_mask) = world(context=4, **overrides), inputs(2, 13)
    outs = []
    with torch.no_grad():
        for kind in (int, torch.tensor):
            cache, out = net.new_cache(2, 13), []
            if Tc:
                net(*(x[:, :Tc] for x in (z, tau, d, a, a_mask)), cache=cache, commit=True)
            for t in range(Tc, 13):
                out.append(net(*(x[:, t:t + 1] for x in (z, tau, d, a, a_mask)), cache=cache, start=kind(t)))
            outs.append(torch.cat(out, dim=1))
        assert torch.allclose(*outs, atol=1e-5)
        assert torch.allclose(outs[0], net(z, tau, d, a, a_mask)[:, Tc:], atol=1e-5)


def counted(f):
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


@pytest.mark.parametrize('overrides', [{}, dict(kv_heads=1), dict(kv_heads=4, layers=6, time_every=2, registers=3),
                                       dict(wide_layers=2), dict(wide_layers=1, kv_heads=1, context=20),
                                       dict(attention='flat', layers=3, kv_heads=4)])
def test_flops_per_frame_is_what_is_computed(overrides):
    """Frame by frame through the cache, where nothing is masked; a clip also computes the logits that it masks."""
    T, net = 9, world(**dict(dict(context=4, action_dim=5), **overrides))
    c, (z, tau, d, a, a_mask) = net.config, inputs(1, T, A=5)
    cache = net.new_cache(1, T)
    with torch.no_grad():
        each = [counted(lambda: net(*(x[:, t:t + 1] for x in (z, tau, d, a, a_mask)), cache=cache, start=t))
                for t in range(T)]
        clip = counted(lambda: net(z, tau, d, a, a_mask))
    for n in (1, 3, T):
        assert sum(each[:n]) / n == pytest.approx(model.flops_per_frame(c, n), rel=1e-12)
    times, seen = sum(layer.time for layer in net.layers), sum(min(t + 1, c['context']) for t in range(T)) / T
    S = c['registers'] + 6 + 2
    masked = 4 * times * S * 32 * (T - seen) * (S if c['attention'] == 'flat' else 1)
    assert clip / T == pytest.approx(model.flops_per_frame(c, T) + masked, rel=1e-12)


def test_a_wide_head_starts_at_zero_and_all_of_it_learns():
    torch.manual_seed(0)
    net = model.WorldModel(model.model_config('nano', 3, (2, 3), 2, width=32, layers=4, heads=4, wide_layers=2))
    z, tau, d, a, a_mask = inputs(k_max=64)
    assert net(z, tau, d, a, a_mask).shape == z.shape and net(z, tau, d, a, a_mask).abs().max() == 0
    assert [(m.attn.heads, m.attn.out.weight.shape[0], m.time) for m in net.head.layers] == 2 * [(8, 64, False)]
    torch.nn.init.normal_(net.head.out.weight)
    assert torch.equal(net(z, tau, d, a, a_mask), net(z, tau * 0, d, a + 1, ~a_mask)), 'gates closed to the trunk'
    torch.nn.init.zeros_(net.head.out.weight)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    without = []
    for step in range(3):       # the output first, then the gates, then what they let through
        loss, _ = loss_of(net, z, a, a_mask, seed=None, bootstrap=0.5, p_image=0, p_null=0)
        optimizer.zero_grad()
        loss.backward()
        without.append([n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0])
        optimizer.step()
    assert len(without[0]) > len(without[1]) and without[2] == []


def test_a_wide_head_written_out(double):
    net = world(wide_layers=2)
    x, z, rope = torch.randn(1, 2, 6, 32), torch.randn(1, 2, 6, 3), [y[1:-2] for y in (net.space_cos, net.space_sin)]
    norm = lambda y: y / y.square().mean(dim=-1, keepdim=True).sqrt()
    y = net.head.z_in(z)
    for layer, modulate in zip(net.head.layers, net.head.modulate):
        torch.nn.init.normal_(modulate.bias)
        m = (x * torch.sigmoid(x)) @ modulate.weight.T + modulate.bias
        part = lambda i: m[..., 64 * i:64 * (i + 1)]
        for first, inner in ((0, lambda u: torch.stack([layer.attn(f, rope) for f in u.unbind(1)], 1)), (3, layer.mlp)):
            y = y + part(first + 2) * inner(norm(y) * (1 + part(first)) + part(first + 1))
    assert torch.allclose(net.head(x, z, rope), net.head.out(norm(y)), rtol=0, atol=1e-4)       # rms_norm adds 1e-6


def test_sizes_and_a_new_model_predicts_the_mean():
    net = model.WorldModel(model.model_config('nano', 3, (2, 3), 2))
    assert net(*inputs(k_max=64)).abs().max() == 0
    assert [layer.time for layer in net.layers] == [False, True, False, False]
    with torch.device('meta'):      # shapes without memory
        sizes = {name: sum(p.numel() for p in model.WorldModel(model.model_config(name, 384, (16, 16), 7)).parameters())
                 for name in model.SIZES}
    assert 0.6e6 < sizes['nano'] < 1.1e6 and 2.5e6 < sizes['tiny'] < 3.75e6 and 25e6 < sizes['small'] < 36e6
    assert 0.75 * 120e6 < sizes['base'] < 1.25 * 120e6 and 0.75 * 400e6 < sizes['large'] < 1.25 * 400e6


def test_every_dimension_is_an_override():
    free = dict(width=64, layers=5, heads=8, kv_heads=4, registers=3, context=7, time_every=2, wide_layers=1, k_max=16,
                soft_cap=9.0, action_on='token', objective='diffusion')
    data = dict(dim=5, grid=[3, 4], action_dim=6)
    preset, config = model.model_config('nano', **data), model.model_config('nano', **data, **free)
    assert all(config[k] == v for k, v in (data | free).items()) and all(preset[k] != v for k, v in free.items())
    unset = {k: type(v)() for k, v in free.items() if k != 'registers'}
    assert model.model_config('nano', **data, **unset) == preset
    assert model.model_config('nano', **data, registers=0)['registers'] == 0
    net = model.WorldModel(config)
    assert [layer.time for layer in net.layers] == [False, True, False, True, False]
    assert net.registers.shape == (3, 64) and net.tau_embed.weight.shape == (16, 32) and len(net.d_embed.weight) == 5
    assert all((m.heads, m.kv_heads, m.head_dim, m.cap) == (8, 4, 8, 9) for m in (x.attn for x in net.layers))
    assert net.layers[1].attn.context == 7 and net.layers[0].attn.context == 0
    assert net.a_in.weight.shape == (64, 6) and isinstance(net.head, model.WideHead) and len(net.head.layers) == 1
    z, tau, d, a, a_mask = inputs(N=12, D=5, A=6)
    assert net(z, tau, d, a, a_mask).shape == z.shape
    with pytest.raises(AssertionError, match='depth'):
        model.model_config('nano', **data, depth=3)


@pytest.mark.parametrize('bad, said', [(dict(heads=3), 'heads'),
                                       (dict(k_max=12), '--k_max=12: wants a power of two'),
                                       (dict(time_every=1), '--time_every=1: wants at least 2'),
                                       (dict(attention='flat', width=48), '--width=48: wants a multiple of 8 x'),
                                       (dict(layers=1), '--layers=1'), (dict(kv_heads=3), '--heads=4')])
def test_a_wrong_config_is_one_line(bad, said):
    with pytest.raises(SystemExit) as error:
        model.model_config(**dict(dict(size='nano', dim=3, grid=(2, 3), action_dim=2), **bad))
    assert said in str(error.value) and '\n' not in str(error.value)


# shortcut forcing -----------------------------------------------------------------------------------------------------

class Recorder:
    """A deterministic stand-in for the network that keeps what it was asked."""
    def __init__(self, slope=1.0):
        self.calls, self.slope = [], slope

    def __call__(self, z, tau, d, a, a_mask, alone=None, *_):
        self.calls.append((z, tau, d, a_mask, alone))
        return self.f(z, tau, d, a, a_mask, torch.zeros(len(z), dtype=bool) if alone is None else alone)

    def f(self, z, tau, d, a, a_mask, alone):
        frame = tau - torch.log2(d) / 3 + a.sum(dim=-1) * a_mask + alone[:, None]
        return torch.sin(self.slope * z) + frame[..., None, None].type_as(z)


@pytest.mark.parametrize('schedule', ['uniform', 'shift', 'logit-normal'])
@pytest.mark.parametrize('ramp, space', [(True, 'x'), (False, 'x'), (True, 'v'), (False, 'v')])
def test_shortcut_loss_is_equation_7(double, schedule, ramp, space):
    """Against the errors of velocities of the paper, frame by frame; in x-space they are multiplied by (1 - tau)^2."""
    B, T, k_max = 12, 6, 16
    z, _, _, a, a_mask = inputs(B, T)
    eps = model.clip_noise(z, range(B)).eps
    z_mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.8
    net = Recorder()
    losses = []
    for rms in (terms(4.0, 25.0), terms(25.0, 4.0), None):
        loss, metrics = loss_of(net, z, a, a_mask, z_mask, k_max=k_max, bootstrap=0.5, tau_schedule=schedule,
                                rms=rms, ramp=ramp, space=space)
        losses.append(loss.item())
    boot = torch.arange(B) % 2 == 1     # half of the rows, spread over the batch
    # the student comes last, after its teacher's two half steps of the bootstrap rows alone
    assert [len(call[0]) for call in net.calls] == 3 * [6, 6, 12]
    z_tau, tau, d, known, alone = net.calls[-1]
    sums = {'flow': [0.0, 0], 'bootstrap': [0.0, 0], 'tau': [0.0, 0]}
    for b in range(B):
        # a row is one or the other
        assert (d[b] > 1 / k_max).all() if boot[b] else (d[b] == 1 / k_max).all()
        for t in range(T):
            s, e, x, noise = tau[b, t].item(), d[b, t].item(), z_tau[b, t].numpy(), eps[b, t].numpy()
            assert 0 <= s <= 1 - e and (s / e) % 1 == 0, 'tau lies on the grid of d'
            assert np.allclose(x, (1 - s) * noise + s * z[b, t].numpy(), rtol=0, atol=1e-14)
            given = a[b, t][None, None], known[b, t][None, None], alone[b][None]
            f = lambda x, s, e: net.f(torch.tensor(x)[None, None], torch.tensor([[s]]), torch.tensor([[e]]),
                                      *given)[0, 0].numpy()
            velocity = lambda x, s, e: (f(x, s, e) - x) / (1 - s)
            if e == 1 / k_max:
                want = z[b, t].numpy() - noise
            else:
                one = velocity(x, s, e / 2)
                want = (one + velocity(x + one * e / 2, s + e / 2, e / 2)) / 2
            error = np.mean((velocity(x, s, e) - want) ** 2)
            if z_mask[b, t]:
                total = sums['flow' if e == 1 / k_max else 'bootstrap']
                weight = (0.9 * s + 0.1 if ramp else 1) * ((1 - s) ** 2 if space == 'x' else 1)
                total[0], total[1] = total[0] + weight * error, total[1] + 1
                if e == 1 / k_max:
                    sums['tau'] = [sums['tau'][0] + s, sums['tau'][1] + 1]
    assert len(set(map(len, map(set, tau.tolist())))) > 1 and any(len(set(row)) > 1 for row in d.tolist())
    want = {k: total / n for k, (total, n) in sums.items()}
    assert all(metrics[k].item() == pytest.approx(want[k], rel=1e-10) for k in want)
    flow, boot = want['flow'], want['bootstrap']
    assert losses == pytest.approx([flow / 2 + boot / 5, flow / 5 + boot / 5, flow + boot], rel=1e-10)


@pytest.mark.parametrize('space', ['x', 'v'])
def test_direct_is_one_step_from_the_clean_past(double, space):
    z, _, _, a, a_mask = inputs(4, 5)
    net, z_mask = Recorder(), torch.ones_like(a_mask)
    z_mask[1, 3:] = False
    loss, metrics = loss_of(net, z, a, a_mask, z_mask, objective='direct', k_max=8, p_null=0.0, space=space)
    errors = [((net.f(z[b:b + 1, t - 1:t], torch.ones(1, 1), torch.ones(1, 1), a[b:b + 1, t:t + 1],
                      a_mask[b:b + 1, t:t + 1], torch.tensor([False])) - z[b, t]) ** 2).mean().item()
              for b in range(4) for t in range(1, 5) if z_mask[b, t]]
    assert len(net.calls) == 1 and loss.item() == pytest.approx(np.mean(errors), rel=1e-12) == metrics['flow'].item()


def test_every_step_size_is_trained_and_the_shares_are_kept():
    torch.manual_seed(0)
    z, _, _, a, a_mask = inputs(8, 6)
    seen, rows, alone, hidden, known = set(), [], 0.0, 0.0, torch.ones_like(a_mask)
    for step in range(200):
        net = Recorder()
        model.shortcut_loss(net, z, a, known, known, dict(k_max=16, bootstrap=0.3), first=8 * step)
        _, _, d, mask, single = net.calls[-1]
        seen |= set(d.unique().tolist())
        rows += (d > 1 / 16).all(dim=1).tolist()
        alone += single.float().mean().item() / 200
        hidden += (~mask).all(dim=1).float().mean().item() / 200
        assert (mask.all(dim=1) | ~mask.any(dim=1)).all() and not mask[single].any(), 'images have no actions'
    assert seen == {1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0}
    assert sum(rows) == 0.3 * 200 * 8
    assert abs(alone - 0.3) < 0.05 and abs(hidden - (1 - 0.7 * 0.9)) < 0.05


def levels(k_max, B=4000, T=5, **options):
    """tau, d of flow rows and tau, d of bootstrap rows."""
    z, net = torch.zeros(B, T, 1, 1), Recorder()
    mask = torch.ones(B, T, dtype=bool)
    torch.manual_seed(0)
    loss_of(net, z, torch.zeros(B, T, 0), mask, seed=None, k_max=k_max, bootstrap=0.5, **options)
    _, tau, d, _, _ = net.calls[-1]
    return tau[::2], d[::2], tau[1::2], d[1::2]


def test_step_sizes_are_equally_likely_and_so_are_the_levels_of_their_grids():
    flow, _, tau, d = levels(8, p_past=0.0, tau_schedule='uniform')
    assert all(abs((flow == i / 8).float().mean() - 1 / 8) < 0.02 for i in range(8))
    for e in (1 / 4, 1 / 2, 1.0):
        assert abs((d == e).float().mean() - 1 / 3) < 0.02
        assert all(abs((tau[d == e] == i * e).float().mean() - e) < 0.03 for i in range(int(1 / e)))
    assert abs(np.corrcoef(tau[:, 0], tau[:, 1])[0, 1]) < 0.05, 'frames are drawn apart'


def test_the_past_of_a_share_of_the_clips_is_nearly_clean():
    """A shift of 1e9 makes all else pure noise, so that tau shows what is past."""
    for p_past in (0.0, 0.7, 1.0):
        flow, _, boot, d = levels(64, p_past=p_past, tau_schedule='shift', tau_shift=1e9)
        for tau in (flow, boot):
            past = tau > 0
            length = past.sum(dim=1)
            assert abs((length > 0).float().mean() - p_past) < 0.03
            assert (past == (torch.arange(5) < length[:, None])).all(), 'the past comes first'
            for n in range(1, 5):       # and is never everything
                assert abs((length == n).float().mean() - p_past / 4) < 0.03
    assert flow[flow > 0].unique().tolist() == [i / 64 for i in range(56, 64)]
    assert boot[boot > 0].unique().tolist() == [i / 32 for i in range(28, 32)] and (d[boot > 0] == 1 / 32).all()


def test_signal_levels():
    u = (torch.arange(1, 40001).double() - 0.5) / 40000     # evenly spread, so that a mean is an integral
    assert torch.equal(model.signal_levels(u, 'uniform', 7.0), u)
    assert torch.allclose(model.signal_levels(u, 'shift', 1.0), u)
    for schedule in ('shift', 'logit-normal'):
        means = []
        for shift in (0.5, 1.0, 3.0, 9.0):
            tau = model.signal_levels(u, schedule, shift)
            assert tau.median() == pytest.approx(1 / (1 + shift), abs=1e-4) and (tau.diff() > 0).all()
            assert 0 < tau.min() and tau.max() < 1
            means.append(tau.mean().item())
        assert (np.diff(means) < 0).all(), 'more shift, more noise'
    for shift in (0.5, 3.0):
        odds = lambda tau: tau / (1 - tau)
        assert torch.allclose(odds(model.signal_levels(u, 'shift', shift)), odds(u) / shift)
        logit = torch.logit(model.signal_levels(u, 'logit-normal', shift))
        assert logit.std() == pytest.approx(1, abs=1e-3) and logit.mean() == pytest.approx(-np.log(shift), abs=1e-6)
        assert (logit + np.log(shift) < 1).double().mean() == pytest.approx(0.841345, abs=1e-4)     # a normal one
    for schedule in ('shift', 'logit-normal'):      # the least and the greatest number that torch.rand gives
        assert ((0 <= (x := model.signal_levels(torch.tensor([0.0, 1 - 2 ** -24]), schedule, 2.0))) & (x <= 1)).all()


@pytest.mark.parametrize('schedule', ['shift', 'logit-normal'])
def test_the_shift_is_that_of_the_latents_unless_given(schedule):
    def tau_of(N, D, shift):
        z, _, _, a, a_mask = inputs(16, 6, N, D)
        net = Recorder()
        loss_of(net, z, a, a_mask, objective='diffusion', k_max=64, tau_schedule=schedule, tau_shift=shift)
        return net.calls[0][1]
    assert torch.equal(tau_of(16, 64, 0.0), tau_of(16, 64, 0.5))        # sqrt(16 * 64 / 4096)
    assert torch.equal(tau_of(64, 256, 0.0), tau_of(64, 256, 2.0))
    assert not torch.equal(tau_of(64, 256, 0.0), tau_of(64, 256, 1.0))


@pytest.mark.parametrize('share', [0.0, 0.1, 0.25, 0.3, 0.875, 1.0])
def test_the_share_of_bootstrap_rows_is_exact_however_rows_are_batched(share):
    total, rng = 240, np.random.default_rng(0)
    whole, n, valid = model.which_rows(torch.ones(total, 3, dtype=bool), 'shortcut', share)
    assert whole.tolist() == [math.floor((i + 1) * round(1000 * share) / 1000) > math.floor(
        i * round(1000 * share) / 1000) for i in range(total)]
    assert n == whole.sum() == round(total * share) and torch.equal(valid['bootstrap'], whole[:, None].expand(-1, 3))
    for run in (4, 10, 40):     # nowhere a run without its share
        assert all(abs(whole[i:i + run].sum() - share * run) < 1 + 1e-9 for i in range(total - run + 1))
    for batches in (1, 7, 60):
        cuts = [0, *sorted(rng.choice(np.arange(1, total), batches - 1, replace=False).tolist()), total]
        parts = [model.which_rows(torch.ones(j - i, 3, dtype=bool), 'shortcut', share, i)
                 for i, j in zip(cuts, cuts[1:])]
        assert torch.equal(torch.cat([boot for boot, _, _ in parts]), whole)
        assert all(n == boot.sum() for boot, n, _ in parts)
    far, _, _ = model.which_rows(torch.ones(240, 3, dtype=bool), 'shortcut', share, 1000 * 10 ** 9)
    assert torch.equal(far, whole)


def test_what_counts_in_each_term():
    z_mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [False, True, True]])
    for objective, share in (('shortcut', 0.5), ('diffusion', 0.0), ('direct', 0.0)):
        boot, n, valid = model.which_rows(z_mask, objective, 0.5)
        assert boot.float().mean() == share and n == 4 * share
        real = z_mask & (torch.arange(3) > 0) if objective == 'direct' else z_mask
        assert torch.equal(valid['flow'] | valid['bootstrap'], real)
        assert not (valid['flow'] & boot[:, None]).any() and not (valid['bootstrap'] & ~boot[:, None]).any()


def test_the_teacher_has_no_gradient(double):
    """As if the half steps were numbers that came with the data."""
    net, (z, _, _, a, a_mask) = world(), inputs(4)
    answers = []

    def keep(*x):
        answers.append(net(*x))
        return answers[-1]

    def constant(*x):
        return net(*x) if torch.is_grad_enabled() else next(numbers)

    want = gradients(loss_of(keep, z, a, a_mask, k_max=8, bootstrap=0.5)[0], net)
    assert [x.requires_grad for x in answers] == [False, False, True]
    numbers = iter([torch.tensor(x.tolist()) for x in answers[:2]])
    got = gradients(loss_of(constant, z, a, a_mask, k_max=8, bootstrap=0.5)[0], net)
    assert torch.allclose(got, want, rtol=0, atol=1e-12)


def test_the_teacher_does_not_take_the_gradient_of_the_student_under_autocast():
    """Autocast keeps its copies of the weights; those made without gradients must not serve the student."""
    net, (z, _, _, a, a_mask) = world(), inputs(4)
    got = []
    for cache in (True, False):
        with torch.autocast('cpu', torch.bfloat16, cache_enabled=cache):
            loss, _ = loss_of(net, z, a, a_mask, bootstrap=0.5, p_image=0.0, p_null=0.0)
        got.append(torch.autograd.grad(loss, list(net.parameters())))
    for (name, _), kept, anew in zip(net.named_parameters(), *got):
        assert kept.abs().max() > 0 and torch.allclose(kept, anew, rtol=0.05, atol=0.02 * anew.abs().max()), name


@pytest.mark.parametrize('objective', ['shortcut', 'diffusion', 'direct'])
def test_padded_frames_take_no_part(double, objective):
    net, (z, _, _, a, a_mask) = world(), inputs(4)
    z_mask = torch.arange(6) < torch.tensor([6, 3, 4, 1])[:, None]
    results = []
    for filling in (0.0, 1.0, -100.0):
        z = torch.where(z_mask[..., None, None], z, filling)
        a = torch.where(z_mask[..., None], a, filling)
        loss, metrics = loss_of(net, z, a, a_mask, z_mask, objective=objective, bootstrap=0.5)
        assert metrics['bootstrap'].isnan() == (objective != 'shortcut'), 'no frame counts in it'
        results.append(torch.cat((loss.detach()[None], torch.stack(list(metrics.values())), gradients(loss, net))))
    for other in results[1:]:
        assert torch.allclose(results[0], other, rtol=0, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize('objective', ['shortcut', 'diffusion', 'direct'])
def test_the_machines_of_a_batch_add_up_to_the_batch(double, objective):
    """Halves of a batch that know the count of the whole: their gradients sum to its gradient."""
    net, (z, _, _, a, a_mask) = world(), inputs(10)
    z_mask = torch.arange(6) < torch.tensor([6, 6, 6, 5, 6, 6, 2, 1, 3, 2])[:, None]
    _, _, valid = model.which_rows(z_mask, objective, 0.3)
    def run(rows, **more):
        loss, metrics = loss_of(net, z, a, a_mask, z_mask, rows=rows, objective=objective, bootstrap=0.3,
                                rms=terms(0.5, 2.0), **more)
        numbers = torch.stack((loss.detach(), metrics['flow'], metrics['bootstrap'], metrics['tau']))
        return torch.cat((numbers, gradients(loss, net))).nan_to_num(0)
    whole, parts = run(slice(0, 10)), [slice(0, 5), slice(5, 10)]
    count = {name: mask.sum() for name, mask in valid.items()}
    assert torch.allclose(sum(run(rows, count=count) for rows in parts), whole, rtol=0, atol=1e-10)
    assert not torch.allclose(sum(run(rows) for rows in parts) / 2, whole, rtol=0, atol=1e-4), 'why count is there'


def test_the_loss_is_a_function_of_its_noise():
    net, (z, _, _, a, a_mask) = world(), inputs(4)
    run = lambda seed: loss_of(net, z, a, a_mask, seed=seed, bootstrap=0.5)[0]
    before = torch.get_rng_state()
    first, second, other = run(0), run(0), run(1)
    assert torch.equal(before, torch.get_rng_state()), 'nobody else drew'
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert not torch.equal(run(None), run(None))


def test_the_noise_of_a_clip_is_of_its_seed_alone():
    z = torch.zeros(3, 5, 2, 2)
    many, one = model.clip_noise(z, [7, 8, 9]), model.clip_noise(z[:1], [8])
    assert many.tau.shape == many.d.shape == many.past_tau.shape == (3, 5) and many.eps.shape == z.shape
    for name, value in vars(many).items():
        assert torch.equal(value[1:2], vars(one)[name]) and not torch.equal(value[:1], value[1:2]), name
    large = vars(model.clip_noise(torch.zeros(4000, 5, 1, 1)))
    eps = large.pop('eps')
    assert abs(eps.mean()) < 0.03 and abs(eps.std() - 1) < 0.03
    assert all(0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.02 for u in large.values())
    columns = np.corrcoef(torch.cat([*large.values()], dim=1).T.numpy())
    assert np.abs(columns - np.eye(len(columns))).max() < 0.1, 'no number is used twice'


@pytest.mark.parametrize('objective', ['shortcut', 'diffusion', 'direct'])
def test_one_batch_is_learned_and_every_parameter_takes_part(objective):
    net, (z, _, _, a, a_mask) = world(objective=objective).train(), inputs()
    optimizer, losses = torch.optim.AdamW(net.parameters(), 3e-3), []
    for step in range(120):
        loss, metrics = loss_of(net, z, a, a_mask, seed=None, objective=objective, bootstrap=0.5, p_image=0.0,
                                p_null=0.0)
        loss.backward()
        if step == 0:
            assert [n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []
        optimizer.step()
        optimizer.zero_grad()
        losses.append(metrics['flow'].item())
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])


def coin_flips(steps, objective='shortcut'):
    """{K: samples of the second frame}, after training on frames that are +1 or -1 whatever came before."""
    torch.manual_seed(0)
    net = model.WorldModel(model.model_config('nano', 1, (1, 1), 0, width=32, layers=2, heads=2, kv_heads=1,
                                              registers=0, context=2, k_max=8, objective=objective))
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    known, flips = torch.ones(500, 2, dtype=bool), lambda n: torch.randint(0, 2, (n, 2, 1, 1)) * 2.0 - 1
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        loss, _ = loss_of(net, flips(64), torch.zeros(64, 2, 0), known[:64], seed=None, objective=objective,
                          bootstrap=0.5, p_image=0.0, p_null=0.0, tau_schedule='uniform', p_past=0.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {K: model.rollout(net, flips(500)[:, :1], torch.zeros(500, 2, 0), known, K=K).flatten() for K in (1, 2, 4)}


def test_a_coin_is_imagined_as_heads_or_tails_in_one_step_or_more():
    """The whole point of bootstrapping: even one step samples, where a regression answers with the mean."""
    for K, x in coin_flips(400).items():
        assert (x.abs() - 1).abs().mean() < 0.15 and (x.abs() < 0.5).float().mean() < 0.1, K
        assert 0.35 < (x > 0).float().mean() < 0.65, K
    mean = coin_flips(200, 'diffusion')[1]
    assert mean.abs().mean() < 0.35 and (mean.abs() < 0.5).float().mean() > 0.85


# state ----------------------------------------------------------------------------------------------------------------

def with_states(B=4, T=5, S=2, unknown=()):
    """inputs() whose frames have a state, unknown in some clips."""
    z, tau, d, a, a_mask = inputs(B, T)
    s = torch.randn(B, T, S, generator=torch.Generator().manual_seed(5))
    s[list(unknown)] = torch.nan
    return model.add_state(z, s), tau, d, a, a_mask


def test_the_state_is_the_last_token():
    z, s = torch.randn(2, 3, 6, 5), torch.randn(2, 3, 2)
    joined = model.add_state(z, s)
    assert joined.shape == (2, 3, 7, 5) and torch.equal(joined[:, :, :6], z)
    assert torch.equal(joined[:, :, 6, :2], s) and not joined[:, :, 6, 2:].any()
    assert list(model.frame_tokens(world(state_dim=2).config)) == ['registers', 'latents', 'state', 'shortcut', 'action']
    assert sum(model.frame_tokens(world(state_dim=2).config).values()) == 1 + sum(model.frame_tokens(world().config).values())


@pytest.mark.parametrize('wide_layers', [0, 1])
def test_a_state_is_seen_and_its_padding_is_not(wide_layers):
    net = world(state_dim=2, wide_layers=wide_layers)
    z, tau, d, a, a_mask = with_states()
    out = net(z, tau, d, a, a_mask)
    assert out.shape == z.shape and not out[:, :, -1, 2:].any() and out[:, :, -1, :2].std() > 0.01
    padded, moved = z.clone(), z.clone()
    padded[:, :, -1, 2:] = 7.0
    assert torch.equal(net(padded, tau, d, a, a_mask), out)
    moved[:, :, -1, 1] += 1.0
    assert (net(moved, tau, d, a, a_mask) - out).abs()[:, :, :-1].max() > 1e-3, 'the latents see the state'
    moved = z.clone()
    moved[:, :, 0] += 1.0
    assert (net(moved, tau, d, a, a_mask) - out).abs()[:, :, -1].max() > 1e-3, 'and the state the latents'


@pytest.mark.parametrize('objective', ['direct', 'shortcut', 'diffusion'])
def test_the_error_of_a_state_counts_where_it_is_known(double, objective):
    """Frame by frame, in numpy; clip 1 has no state, of clip 2 one number is missing."""
    net = world(state_dim=2, objective=objective)
    z, _, _, a, a_mask = with_states(unknown=[1])
    z[2, :, -1, 0] = torch.nan
    seen = {}
    net.register_forward_hook(lambda m, args, out: seen.update(args=args, out=out))
    given = dict(objective=objective, k_max=8, bootstrap=0.0, ramp=False, p_image=0.0)
    loss, _ = loss_of(net, z, a, a_mask, state_dim=2, p_null=0.0, **given)
    frames = [(b, t) for b in range(4) for t in range(5) if objective != 'direct' or t > 0]
    wants = []
    for b, t in frames:
        off = np.square((seen['out'][b, t] - z[b, t]).detach().numpy())
        wants.append(off[:-1].mean() + {1: 0.0, 2: off[-1, 1]}.get(b, off[-1, :2].mean()))
    assert loss.item() == pytest.approx(np.mean(wants), rel=1e-10)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    assert net.s_out.weight.grad.abs().max() > 0 and net.s_in.weight.grad.abs().max() > 0
    assert net.s_base.grad.abs().max() > 0, 'stands in for the state of clip 1'


def test_a_state_does_not_move_the_levels_of_noise():
    seen = []
    for S in 0, 2:
        net = world(state_dim=S)
        z, _, _, a, a_mask = with_states(8) if S else inputs(8, 5)
        net.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
        loss_of(net, z, a, a_mask, state_dim=S, bootstrap=0.0)
    assert (seen[0] - seen[1]).abs().max() == 0


def test_the_state_of_some_clips_is_hidden():
    """Of as many as actions, but of others."""
    net, B = world(state_dim=2), 400
    z, _, _, a, _ = with_states(B, 2)
    seen = {}
    net.register_forward_pre_hook(lambda m, args: seen.update(z=args[0], a_mask=args[4]))
    loss_of(net, z, a, torch.ones(B, 2, dtype=torch.bool), state_dim=2, p_null=0.2, p_image=0.0, bootstrap=0.0)
    state, actions = seen['z'][:, :, -1, :2].isnan(), ~seen['a_mask']
    assert torch.equal(state.all(dim=(1, 2)), state.any(dim=(1, 2))) and not (state.any(dim=2) & actions).any()
    assert 0.12 < state.float().mean() < 0.28 and 0.12 < actions.float().mean() < 0.28
    assert seen['z'][:, :, :-1].isfinite().all()


@pytest.mark.parametrize('objective', ['direct', 'shortcut'])
def test_a_state_that_is_not_known_stays_so(objective):
    net = world(state_dim=2, objective=objective)
    z, _, _, a, a_mask = with_states(2, 7, unknown=[1])
    out = model.rollout(net, z[:, :3], a, a_mask, K=2)
    assert out[0].isfinite().all() and out[1, :, :-1].isfinite().all() and out[1, :, -1, :2].isnan().all()
    other = z.clone()
    other[0, :, -1, :2] += 1.0
    again = model.rollout(net, other[:, :3], a, a_mask, K=2)
    assert torch.equal(again[1, :, :-1], out[1, :, :-1]) and not torch.equal(again[0], out[0])
    known = z.clone()
    known[1, 3:, -1, :2] = 0.5      # a sensor that was away in the context alone
    forced = model.rollout(net, z[:, :3], a, a_mask, K=2, grad=True)
    model.frame_errors(forced, known[:, 3:], 2).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


# text and guidance ----------------------------------------------------------------------------------------------------

def bytes_of(*words, L=12):
    return torch.tensor([[*w.encode().ljust(L, b'\0')] for w in words], dtype=torch.uint8)


def test_a_text_is_read_byte_by_byte_and_its_padding_is_not(double):
    net = world(text=True)
    left, tfel, none = net.read(bytes_of('left', 'tfel', ''))
    assert not none.any() and (left - tfel).abs().max() > 0.1, 'an order'
    assert torch.allclose(net.read(bytes_of('left', L=40))[0], left, rtol=0, atol=1e-12)
    z, tau, d, a, a_mask = inputs(3)
    told = lambda *words, rows=slice(None): net(z[rows], tau[rows], d[rows], a[rows], a_mask[rows], text=bytes_of(*words))
    one, two, three = told('left', 'right', '')
    assert torch.allclose(told('left')[0], one) and (told('left') - told('')).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert torch.allclose(told('right')[1], two) and torch.allclose(told('')[2], three)
    bare = world()
    bare.load_state_dict({k: v for k, v in net.state_dict().items() if k in bare.state_dict()})
    assert torch.equal(bare(z, tau, d, a, a_mask), told('', '', '')), 'no words are no text'


@pytest.mark.parametrize('objective', ['shortcut', 'direct'])
def test_texts_are_learned_and_hidden_in_a_tenth_of_the_clips(objective):
    """Of the clips without actions in half; and the teacher of large steps is told no more than its student."""
    net, B = world(text=True, objective=objective, layers=2), 1000
    z, _, _, a, _ = inputs(B, 2)
    known, text, seen = torch.ones(B, 2, dtype=torch.bool), bytes_of(*['left', 'right'] * (B // 2)), []
    hook = net.register_forward_pre_hook(lambda m, args: seen.append((args[4].any(dim=1), args[6])))
    given = dict(objective=objective, p_null=0.2, p_image=0.0, bootstrap=0.5)
    noise = model.clip_noise(z, range(B))
    loss = model.shortcut_loss(net, z, a, known, known, given, noise=noise, text=text)[0]
    hook.remove()
    acts, told = seen[-1]
    silent, still = (told == 0).all(dim=1), ~acts
    assert torch.equal(told[~silent], text[~silent])
    assert 0.07 < silent.float().mean() < 0.13 and 0.15 < still.float().mean() < 0.25
    acts_too = (silent & ~still).float().mean()
    assert acts_too < 0.02, 'p_null / 2 is as many as all that are hidden'
    assert 0.07 < (still & ~silent).float().mean() < 0.13 and (silent & still).any()
    if objective == 'shortcut':
        assert len(seen) == 3
        boot = torch.arange(B) % 2 == 1
        for part in seen[:2]:
            assert torch.equal(part[1], told[boot]) and (part[1] == 0).all(dim=1).any()
    loss.backward()
    parts = net.byte.weight, *net.readers.parameters()
    assert all(p.grad.abs().max() > 0 for p in parts)
    assert not net.byte.weight.grad[list(b'xyz')].any() and net.byte.weight.grad[list(b'left')].any(dim=1).all()
    other = model.shortcut_loss(net, z, a, known, known, given, noise=noise, text=text.roll(1, 0))[0]
    assert abs(other.item() - loss.item()) > 1e-6
    assert loss_of(net, z, a, known, p_null=0.0)[0].isfinite(), 'nobody has to say anything'


class Guided:
    """z + w (z_c - z), of two models side by side."""
    def __init__(self, net, w, text):
        self.net, self.config, self.w, self.text = net, net.config, w, text

    def __call__(self, z, tau, d, a, a_mask):
        given, hidden = ({}, {}) if self.text is None else (dict(text=self.text), dict(text=0 * self.text))
        z_c = self.net(z, tau, d, a, a_mask, **given)
        z = self.net(z, tau, d, torch.zeros_like(a), torch.zeros_like(a_mask), **hidden)
        return z + self.w * (z_c - z)


@pytest.mark.parametrize('objective, K, text, w', [
    ('shortcut', 4, True, 2.0), ('shortcut', 1, False, 3.0), ('diffusion', 2, True, 1.5), ('direct', 1, True, 2.0),
    ('direct', 1, False, 0.0), ('shortcut', 2, True, 0.0), ('shortcut', 2, True, 1.0)])
@pytest.mark.parametrize('M, more', [(1, {}), (3, {}), (2, dict(state_dim=2)), (2, dict(wide_layers=1))])
def test_a_guided_rollout_is_two_side_by_side(double, objective, K, text, w, M, more):
    """The branch without conditions has a past of its own: the same frames, seen without actions and text."""
    net = world(objective=objective, text=text, **more)
    B, Tc = 2, 3
    z, _, _, a, a_mask = inputs(B * M, 9, 6 + ('state_dim' in more))
    for x in a, a_mask:
        x[:, :Tc] = x[::M, :Tc].repeat_interleave(M, dim=0)
    words = bytes_of('push left', 'reach') if text else None
    told = None if words is None else words.repeat_interleave(M, dim=0)
    with torch.no_grad():
        want = slow_rollout(Guided(net, w, told), z[:B, :Tc], a, a_mask, K)
    net.guide = w
    got = model.rollout(net, z[:B, :Tc], a, a_mask, K, text=words)
    assert torch.allclose(got, want, rtol=0, atol=1e-9), (got - want).abs().max()
    cache = model.remember(net, z[:B, :Tc], a[::M, :Tc], a_mask[::M, :Tc], 9, text=words)
    assert torch.equal(model.rollout(net, z[:B, :Tc], a, a_mask, K, text=words, cache=cache), got)
    net.guide = 1.0
    plain = model.rollout(net, z[:B, :Tc], a, a_mask, K, text=words)
    hidden = model.rollout(net, z[:B, :Tc], a, torch.zeros_like(a_mask), K)
    assert torch.equal(got, plain) == (w == 1) and torch.allclose(got, hidden, rtol=0, atol=1e-9) == (w == 0)


def test_a_plan_has_the_gradient_of_guided_imagination(double):
    net, (z, _, _, a, _) = world(), inputs(2, 5)
    net.guide = 2.0
    known = torch.ones(2, 5, dtype=torch.bool)
    with torch.enable_grad():
        a.requires_grad_()
        slow = slow_rollout(Guided(net, 2.0, None), z[:, :2], a, known, 2, cut=lambda x: x)
        fast = model.rollout(net, z[:, :2], a, known, 2, grad='all')
        want, got = (torch.autograd.grad(x.square().sum(), a)[0] for x in (slow, fast))
    assert want[:, 2:].abs().max() > 1e-3 and torch.allclose(got[:, 2:], want[:, 2:], rtol=0, atol=1e-8)


def test_a_guide_wants_what_was_hidden():
    for c, p_null, guide, text, said in (
            (dict(), 0.0, 2.0, '', '--guide=2: wants'), (dict(action_dim=0), 0.1, 0.5, '', '--guide=0.5: wants'),
            (dict(text=True), 0.0, 2.0, 'left', '--guide=2: wants'), (dict(), 0.1, 1.0, 'left', '--text=left: wants')):
        with pytest.raises(SystemExit, match=said):
            model.set_guide(world(**c), guide, text, dict(p_null=p_null, unlabelled=''))
    for c, p_null, video, guide, text in (
            (dict(), 0.1, '', 2.0, ''), (dict(text=True, action_dim=0), 0.0, '', 2.0, 'left'), (dict(), 0.0, '', 1.0, ''),
            (dict(), 0.0, 'video', 2.0, '')):
        net = world(**c)
        model.set_guide(net, guide, text, dict(p_null=p_null, unlabelled=video))
        assert net.guide == guide


# imagination ----------------------------------------------------------------------------------------------------------

def slow_rollout(net, z_ctx, a, a_mask, K=4, tau_ctx=0.9, seed=0, cut=torch.Tensor.detach, memories=0):
    """The reference: all frames so far are computed anew at each step. Gradients flow through the last step of each
    frame alone, whose past are numbers; with cut=lambda x: x, through everything."""
    c, T, M, device = net.config, a.shape[1], len(a) // len(z_ctx), z_ctx.device
    direct = c['objective'] == 'direct'
    level = min(round(tau_ctx * c['k_max']), c['k_max'] - 1) / c['k_max']
    d_of_past = 1.0 if direct else 1 / c['k_max']
    step = 1 / K if c['objective'] == 'shortcut' else d_of_past
    generator = torch.Generator(device).manual_seed(hash((seed, 1)) % 2 ** 32)
    noise = torch.randn(z_ctx.shape, generator=generator, device=device)
    past = (z_ctx if direct else level * z_ctx + (1 - level) * noise).repeat_interleave(M, dim=0)
    generator, out = torch.Generator(device).manual_seed(seed), []
    for t in range(z_ctx.shape[1], T):
        x, eps = torch.randn(2, *past[::M, :1].shape, generator=generator, device=device).repeat_interleave(M, dim=1)
        for k in range(1 if direct else K):
            z = torch.cat((past, cut(x)), dim=1)
            tau, d = (torch.full(z.shape[:2], v, device=device) for v in (level, d_of_past))
            tau[:, -1], d[:, -1] = k / K, step
            if direct:      # sees the frame before in the place of each
                z = torch.cat((past[:, :memories], torch.zeros_like(x), past[:, memories:]), dim=1)
                tau[:], tau[:, memories] = 1, 0
            more = dict(memories=memories) if memories else {}
            y = net(z, tau, d, a[:, :t + 1], a_mask[:, :t + 1], **more)[:, -1:]
            x = y if direct else cut(x) + (1 / K) * (y - cut(x)) / (1 - k / K)
        out.append(x)
        past = torch.cat((past, cut(x) if direct else level * cut(x) + (1 - level) * eps), dim=1)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize('objective, K, Tc, overrides', [
    *[(objective, K, Tc, dict(k_max=k_max)) for Tc in (1, 3, 6) for objective, k_max, K in (
        ('shortcut', 64, 1), ('shortcut', 64, 2), ('shortcut', 64, 4), ('shortcut', 64, 64), ('diffusion', 8, 4),
        ('direct', 8, 4))],
    *[(objective, 2, 3, overrides) for objective in ('shortcut', 'direct') for overrides in (
        dict(wide_layers=2), dict(time_every=2, layers=3), dict(kv_heads=1, context=1),
        dict(registers=0, layers=6, context=30), dict(action_on='token'), dict(state_dim=2),
        dict(state_dim=3, wide_layers=1), dict(attention='flat'),
        dict(attention='flat', kv_heads=4, context=30, state_dim=2),
        dict(attention='flat', context=1, registers=0, wide_layers=1))],
    *[('diffusion', 2, Tc, dict(attention='flat', layers=2)) for Tc in (1, 6)],
    *[(objective, 2, Tc, overrides) for objective in ('shortcut', 'direct') for Tc in (1, 8) for overrides in (
        dict(memory=3, memory_frames=3, context=2, layers=6), dict(memory=3, memory_frames=3, context=5),
        dict(memory=5, memory_frames=1, context=3), dict(memory=4, memory_frames=2, context=3, attention='flat'))]])
def test_the_cache_changes_nothing(double, objective, K, Tc, overrides):
    """Rollouts of three windows' length, from contexts shorter and longer than the window."""
    net = world(objective=objective, **overrides)
    N = 6 + ('state_dim' in overrides)
    z, _, _, a, a_mask = inputs(2, 4 + Tc if K == 64 else 12 + Tc, N)
    cached, plain = (f(net, z[:, :Tc], a, a_mask, K=K) for f in (model.rollout, torch.no_grad()(slow_rollout)))
    assert cached.shape == (2, z.shape[1] - Tc, N, 3)
    assert torch.allclose(cached, plain, rtol=0, atol=1e-9), (cached - plain).abs().max()


@pytest.mark.parametrize('objective', ['shortcut', 'diffusion', 'direct'])
@pytest.mark.parametrize('memories, Tc', [(1, 1), (2, 3), (2, 7)])
@pytest.mark.parametrize('overrides', [{}, dict(attention='flat'), dict(state_dim=2)])
def test_a_rollout_remembers_what_it_is_given(double, objective, memories, Tc, overrides):
    """Kept frames in front of the context, then those that it makes itself; of candidates, and with gradients."""
    net = world(objective=objective, memory=3, memory_frames=3, context=3, **overrides)
    M, N = 2, 6 + ('state_dim' in overrides)
    z, _, _, a, a_mask = inputs(2 * M, memories + Tc + 9, N)
    a_mask[:, :memories] = False
    for x in a, a_mask:
        x[:, :memories + Tc] = x[::M, :memories + Tc].repeat_interleave(M, dim=0)
    old, z = z[:2, :memories], z[:2, memories:memories + Tc]
    gone = [torch.full_like(z[:, 0], torch.nan) for _ in range(3 * memories + 1)]       # the others are not looked at
    gone[1::3] = old.unbind(1)
    given = net, z, a[:, memories:], a_mask[:, memories:], 2
    begun = a[::M, memories:memories + Tc], a_mask[::M, memories:memories + Tc]
    # what would be out of sight after the context is not kept
    kept = min(memories, (9 - Tc) // 3)
    late = [x[:, memories - kept:] for x in (torch.cat((old, z), dim=1), a, a_mask)]
    with torch.no_grad():
        want = slow_rollout(net, *late, 2, memories=kept)
    for more in {}, dict(grad=True), dict(grad='all'):
        got = model.rollout(*given, gone=gone, **more)
        assert got.shape[1] == 9 and torch.allclose(got, want, rtol=0, atol=1e-9)
    cache = model.remember(net, z, *begun, Tc + 9, gone=gone)
    assert torch.equal(model.rollout(*given, cache=cache), got)
    gone[-3] = gone[-3] + 1
    forgot = torch.allclose(model.rollout(*given, gone=gone), want, rtol=0, atol=1e-9)
    assert forgot == (kept == 0), 'twelve frames ago'
    assert torch.equal(model.rollout(*given, gone=gone[-2:]), model.rollout(*given)), 'too young'


def acting(**overrides):
    """A tiny model with a policy whose answers are not zero."""
    net = world(policy=True, **overrides)
    torch.nn.init.normal_(net.policy.out.weight, std=0.3)
    return net


@pytest.mark.parametrize('state_dim', [0, 2])
def test_errors_of_a_policy_are_those_of_the_definition(double, state_dim):
    """Frame by frame: what led to the next frame, from this one, the one before, a later one and the steps to it."""
    net, B, T, N = acting(state_dim=state_dim), 9, 5, 6 + bool(state_dim)
    z, _, _, a, _ = inputs(B, T, N)
    z_goal, left = torch.randn(B, N, 3), torch.randint(T, 20, (B,))
    z_mask = torch.arange(T) < torch.tensor([5, 5, 4, 5, 3, 5, 5, 2, 5])[:, None]
    got = model.policy_errors(net, z, a, z_mask, z_goal, left, state_dim, first=3)
    assert got.shape == (B, T - 1)
    for i in range(B):
        row, last = i + 3, int(z_mask[i].sum()) - 1
        for t in range(last):
            goal, steps = [(z_goal[i], left[i] - t), (z[i, last], torch.tensor(last - t)), (z_goal[i], left[i] - t),
                           (z[i, t + 1], torch.tensor(1))][(t + row) % 4]
            frames = [x.clone() for x in (z[i, max(0, t - 1)], z[i, t], goal)]
            if state_dim:
                for x, hide in zip(frames, (row // 2 % 4 == 0, row // 2 % 4 == 0, row // 2 % 4 < 2)):
                    x[-1, :state_dim] = torch.nan if hide else x[-1, :state_dim]
            want = (net.act(*(x[None] for x in frames), steps[None])[0] - a[i, t + 1]).square().mean()
            assert torch.allclose(got[i, t], want)


@pytest.mark.parametrize('objective, state_dim, steps', [('direct', 0, 5), ('shortcut', 2, 3), ('direct', 2, 2)])
def test_errors_of_a_dream_are_those_of_the_definition(double, objective, state_dim, steps):
    """Clip by clip, frame by frame: the policy acts on what was imagined so far; from when it is due at its goal on, the
    mean distance; and the gradient is that of finite differences."""
    net = acting(objective=objective, state_dim=state_dim)
    B, T, N, context = 9, 6, 6 + bool(state_dim), 2
    z, _, _, a, a_mask = inputs(B, T, N)
    if state_dim:
        z[:, :, -1, state_dim:] = 0
    z_mask = torch.arange(T) < torch.tensor([6, 6, 6, 6, 6, 6, 6, 5, 3])[:, None]
    weight = torch.rand(N, 3)

    def errors():
        return model.dream_errors(net, net.act, z, a, a_mask, z_mask, context, steps, weight, first=3, seed=4)

    got = errors()
    if objective == 'direct':       # deterministic: no clip depends on another
        for i in range(B):
            row = i + 3
            when = min(context + row % min(T - context, steps), int(z_mask[i].sum()) - 1)
            past, goal = z[i:i + 1, :context].clone(), z[i:i + 1, when].clone()
            if state_dim and row // 2 % 4 == 0:
                past[:, :, -1, :state_dim] = torch.nan
            if state_dim and row // 2 % 4 < 2:
                goal[:, -1, :state_dim] = torch.nan
            frames, acts, left, off = [*past.unbind(1)], [], when - context + 1, []
            for h in range(steps):
                acts.append(net.act(frames[-2], frames[-1], goal, torch.tensor([max(1, left - h)])))
                actions = torch.cat((a[i:i + 1, :context], torch.stack(acts, 1)), 1)
                known = F.pad(a_mask[i:i + 1, :context], (0, h + 1), value=True)
                frames.append(model.rollout(net, past, actions, known, 1)[:, -1])
                gap = (frames[-1] - goal).square() * weight
                if h + 1 >= left:
                    off.append(torch.where(gap.isnan(), 0.0, gap).mean())
            assert torch.allclose(got[i], torch.stack(off).mean()), i
    p = net.policy.out.weight
    got[:8].sum().backward()
    slope = p.grad[0, 1].item()
    with torch.no_grad():
        for side in 1, -1:
            p[0, 1] += side * 1e-5
            slope -= side * errors()[:8].sum().item() / 2e-5
            p[0, 1] -= side * 1e-5
    assert abs(slope) < 1e-6 and p.grad[0, 1].abs() > 1e-4


@pytest.mark.parametrize('objective', ['shortcut', 'direct'])
def test_clips_count_by_their_weight(double, objective):
    """As often as it says: the loss of clips is the weighted mean of what each has alone."""
    net = world(objective=objective)
    z, _, _, a, a_mask = inputs(4, 5)
    z_mask = torch.arange(5) < torch.tensor([5, 5, 3, 4])[:, None]
    noise = model.clip_noise(z, [1, 2, 3, 4])
    weight = torch.tensor([[1.0], [0.0], [0.3], [2.0]])
    options = dict(objective=objective, bootstrap=0.0)
    whole, metrics = model.shortcut_loss(net, z, a, a_mask, z_mask, options, noise=noise, clip_weight=weight)
    total = count = 0
    for i in range(4):
        row = slice(i, i + 1)
        alone = type(noise)(**{k: v[row] for k, v in vars(noise).items()})
        _, terms = model.shortcut_loss(net, z[row], a[row], a_mask[row], z_mask[row], options, noise=alone)
        frames = weight[i] * (z_mask[i].sum() - int(objective == 'direct'))
        total, count = total + frames * terms['flow'], count + frames
    assert torch.allclose(metrics['flow'], total / count) and torch.allclose(whole.detach(), metrics['flow'])


def test_what_a_policy_looks_at(double):
    """Every token of the three frames at its place, the steps left, and the numbers of a state that are known."""
    net = acting(state_dim=2)
    torch.manual_seed(0)
    frames, left = [torch.randn(1, 7, 3) for _ in range(3)], torch.tensor([4])
    want = net.act(*frames, left)
    assert want.shape == (1, 2) and not torch.allclose(net.act(*frames, left + 1), want)
    for i, token in itertools.product(range(3), range(7)):
        changed = [x.clone() for x in frames]
        changed[i][0, token, 0] += 1
        assert not torch.allclose(net.act(*changed, left), want, atol=1e-4), (i, token)
        changed[i][0, token, 0] -= 1
        changed[i][0, 6, 1] = torch.nan
        unknown = net.act(*changed, left)
        assert unknown.isfinite().all() and not torch.allclose(unknown, want, atol=1e-4)
    turned = [x[:, [3, 4, 5, 0, 1, 2, 6]] for x in frames]
    assert not torch.allclose(net.act(*turned, left), want, atol=1e-4), 'rows of tokens have places'
    frames[0][0, 6, 2] += 9     # padding of the state
    assert torch.equal(net.act(*frames, left), want)


@pytest.mark.parametrize('objective', ['shortcut', 'direct'])
def test_a_rollout_asks_for_actions_as_it_goes(double, objective):
    net = acting(objective=objective)
    z, _, _, a, a_mask = inputs(4, 7)
    a_mask[:, 2:] = True
    seen = []

    def act(before, now, h):
        seen.append((before, now, h))
        return a[:, 2 + h]
    for z_ctx, M in (z[:, :2], 1), (z[::2, :2], 2), (z[:, 1:2], 1):
        first = 3 - z_ctx.shape[1]
        actions, known = a[:, first - 1:], a_mask[:, first - 1:]
        seen.clear()
        hidden = actions.clone()
        hidden[:, z_ctx.shape[1]:] = 99.0
        got = model.rollout(net, z_ctx, hidden, known, K=2, act=act)
        assert torch.allclose(got, model.rollout(net, z_ctx, actions, known, K=2))
        begin = z_ctx.repeat_interleave(M, dim=0)
        frames = torch.cat((begin[:, :1], begin, got), dim=1)
        for i, (before, now, h) in enumerate(seen):
            at = i + z_ctx.shape[1]
            assert h == i and torch.equal(before, frames[:, at - 1]) and torch.equal(now, frames[:, at])


@pytest.mark.parametrize('objective', ['shortcut', 'direct'])
def test_a_cached_frame_costs_the_same_however_long_the_past(objective):
    net, (z, _, _, a, a_mask) = world(context=4, objective=objective), inputs(1, 14)
    cost = lambda T: counted(lambda: model.rollout(net, z[:, :2], a[:, :T], a_mask[:, :T], K=2))
    assert cost(9) - cost(8) == cost(14) - cost(13)
    steps = {K: counted(lambda: model.rollout(net, z[:, :2], a[:, :6], a_mask[:, :6], K=K)) for K in (1, 2, 4)}
    assert steps[4] - steps[2] == 2 * (steps[2] - steps[1]) and (steps[2] > steps[1]) == (objective == 'shortcut')


def test_candidates_share_context_and_noise():
    net, (z, _, _, a, a_mask) = world(), inputs(2, 7)
    a_mask[:] = True
    torch.manual_seed(0)
    many = a[:, None].repeat(1, 3, 1, 1)
    many[:, 1:, 3:] += torch.randn(2, 2, 4, 2)
    alone = [model.rollout(net, z[:, :3], many[:, m], a_mask, K=2) for m in range(3)]
    together = model.rollout(net, z[:, :3], many.flatten(0, 1), a_mask.repeat_interleave(3, 0), K=2)
    assert torch.allclose(together.unflatten(0, (2, 3)), torch.stack(alone, 1), atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-2, 'actions matter'
    plain = slow_rollout(net, z[:, :3], many.flatten(0, 1), a_mask.repeat_interleave(3, 0), K=2)
    assert torch.allclose(together, plain, atol=1e-5)


def test_noise_depends_on_the_seed_and_the_frame_alone():
    net, (z, _, _, a, a_mask) = world(), inputs(2, 9)
    before = torch.get_rng_state()
    long, short = (model.rollout(net, z[:, :2], a[:, :T], a_mask[:, :T], K=2) for T in (9, 5))
    assert torch.allclose(long[:, :3], short, atol=1e-5)
    assert not torch.allclose(long, model.rollout(net, z[:, :2], a, a_mask, K=2, seed=1), atol=1e-3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize('tau_ctx, level', [(0.5, 0.5), (0.9, 7 / 8), (1.0, 7 / 8), (0.0, 0.0)])
def test_the_past_is_noised_and_labelled_by_tau_ctx(double, tau_ctx, level):
    """Frames given and frames imagined, each with noise of its own, and the same with the cache as without."""
    B, Tc, T = 16, 3, 9
    net, (z, _, _, a, a_mask) = world(), inputs(B, T)
    calls = []
    net.register_forward_pre_hook(lambda net, x, more: calls.append((*x[:3], more.get('commit'))), with_kwargs=True)
    out = model.rollout(net, z[:, :Tc], a, a_mask, K=2, tau_ctx=tau_ctx)
    commits = [call[:3] for call in calls if call[3]]
    assert [z.shape[1] for z, _, _ in commits] == [Tc] + [1] * (T - Tc - 1)
    past, tau, d = (torch.cat(x, dim=1) for x in zip(*commits))
    first = calls[1][0][:, 0]
    assert torch.allclose(slow_rollout(net, z[:, :Tc], a, a_mask, K=2, tau_ctx=tau_ctx), out, rtol=0, atol=1e-10)
    assert past.shape[1] == T - 1 and (tau == level).all() and (d == 1 / 8).all()
    clean = torch.cat((z[:, :Tc], out[:, :-1]), dim=1)
    noise = (past - level * clean) / (1 - level)
    for eps in noise.unbind(1):
        assert abs(eps.mean()) < 0.2 and abs(eps.std() - 1) < 0.15
        assert abs((eps * first).mean()) < 0.25, 'a frame is not committed with the noise that it was made from'
    pairs = noise.transpose(0, 1).flatten(1)
    assert (np.corrcoef(pairs) - np.eye(T - 1)).max() < 0.3, 'every frame has noise of its own'


def attend_to_numbers(q, k, v, cap, mask=None, attend=model.attend):
    """Over time (where a mask is) the keys and values of the past are numbers too."""
    if mask is not None:
        k, v = (torch.cat((x[:, :, :-1].detach(), x[:, :, -1:]), dim=2) for x in (k, v))
    return attend(q, k, v, cap, mask)


@pytest.mark.parametrize('objective, K', [('shortcut', 1), ('shortcut', 4), ('diffusion', 2), ('direct', 1)])
@pytest.mark.parametrize('Tc', [2, 6])
@pytest.mark.parametrize('remat, memory', [(False, 0), (True, 0), (False, 3)])
def test_the_gradient_of_a_rollout_is_that_of_the_last_step_of_each_frame(double, monkeypatch, objective, K, Tc, remat, memory):
    net, (z, _, _, a, a_mask) = world(context=4, objective=objective, memory=memory), inputs(2, Tc + 6)
    given = net, z[:, :Tc], a, a_mask, K
    with monkeypatch.context() as patch:
        patch.setattr(model, 'attend', attend_to_numbers)
        slow = slow_rollout(*given)
    weight = torch.randn_like(slow)
    want = gradients((slow * weight).sum(), net)
    net.remat = remat
    values, fast = model.rollout(*given), model.rollout(*given, grad=True)
    assert not values.requires_grad and torch.allclose(values, fast, rtol=0, atol=1e-12)
    assert torch.allclose(fast, slow, rtol=0, atol=1e-10)
    assert want.abs().max() > 1 and torch.allclose(gradients((fast * weight).sum(), net), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize('objective, K', [('shortcut', 1), ('shortcut', 4), ('diffusion', 2), ('direct', 1)])
@pytest.mark.parametrize('Tc, memory', [(2, 0), (6, 0), (2, 3)])
def test_gradients_reach_the_actions_through_every_frame(double, objective, K, Tc, memory):
    net, (z, _, _, a, a_mask) = world(context=4, objective=objective, memory=memory), inputs(2, Tc + 6)
    for p in net.parameters():
        p.data += 0.02 * torch.randn_like(p)
    a_mask[:, Tc:] = True
    slow_a, fast_a = a.clone().requires_grad_(), a.clone().requires_grad_()
    slow = slow_rollout(net, z[:, :Tc], slow_a, a_mask, K, cut=lambda x: x)
    cache = model.remember(net, z[:, :Tc], a[:, :Tc], a_mask[:, :Tc], Tc + 6)
    before = copy.deepcopy(cache)
    fast = model.rollout(net, z[:, :Tc], fast_a, a_mask, K, grad='all', cache=cache)
    assert torch.allclose(fast, slow, rtol=0, atol=1e-10)
    weight = torch.randn_like(slow)
    (want,), (got,) = (torch.autograd.grad((x * weight).sum(), y) for x, y in ((slow, slow_a), (fast, fast_a)))
    assert want[:, Tc].abs().max() > 1e-3 and torch.allclose(got[:, Tc:], want[:, Tc:], rtol=0, atol=1e-9)
    for graph in (False, None):     # the context's cache can be used again, by any number of candidates
        again = model.rollout(net, z[:1, :Tc], a[:1].expand(3, -1, -1), a_mask[:1].expand(3, -1), K, graph=graph,
                              cache=model.remember(net, z[:1, :Tc], a[:1, :Tc], a_mask[:1, :Tc], Tc + 6))
        assert torch.allclose(again[1], model.rollout(net, z[:1, :Tc], a[:1], a_mask[:1], K)[0], rtol=0, atol=1e-10)
    assert all(torch.equal(x, y) for old, new in zip(before, cache) for x, y in zip(old, new))


@pytest.mark.parametrize('objective, guide, memory', [
    ('shortcut', 1, 0), ('direct', 1, 0), ('shortcut', 2, 0), ('direct', 2, 0), ('shortcut', 1, 3), ('direct', 1, 3)])
def test_a_graph_of_a_frame_serves_later_rollouts(monkeypatch, objective, guide, memory):
    """A CUDA graph goes on with the closure, the buffers and the cache of its first call: imitated here."""
    made = []

    def replay(graphs, key, f, *inputs):
        if key not in graphs:
            graphs[key] = f, [x.clone() for x in inputs]
            made.append(key)
        f, given = graphs[key]
        for x, new in zip(given, inputs):
            x.copy_(new)
        return f(*given).clone()

    net, (z, _, _, a, a_mask) = world(objective=objective, text=guide != 1, memory=memory), inputs(4, 12)
    words = [bytes_of(word) for word in ('left', 'right', '') * 3]
    net.guide = guide
    plain = [(seed, T, M, model.rollout(net, z[:4 // M, seed:seed + 2], a[:, :T], a_mask[:, :T], 2, seed=seed, text=words[seed]))
             for seed, T, M in ((0, 12, 1), (1, 12, 1), (2, 9, 1), (3, 12, 2), (4, 12, 1), (5, 3, 1), (6, 3, 1))]
    monkeypatch.setattr(model, 'replay', replay)
    for seed, T, M, want in plain:
        got = model.rollout(net, z[:4 // M, seed:seed + 2], a[:, :T], a_mask[:, :T], 2, seed=seed, graph=True, text=words[seed])
        assert torch.allclose(got, want, atol=1e-5), (seed, T, M)
    assert len(made) == (2 if memory else 3), 'two graphs of a window, with the last frame or without, and one of a shorter rollout'


# checkpoint and pictures ----------------------------------------------------------------------------------------------

def test_save_then_load(tmp_path, capsys):
    net, path, config = world(), tmp_path / 'ckpt.safetensors', model.CONFIG_DEFAULTS | dict(a=1, b=0.5, c='x', d=True)
    averages = {k: v + 1 for k, v in net.named_parameters()}
    model.save(path, net, config, averages, {'z_mean': torch.arange(3.0)}, step=7)
    for ema in (True, False):
        again, back = model.load(path, ema=ema)
        assert back == config and again.config == net.config and again.step == 7
        assert again.stats['z_mean'].tolist() == [0, 1, 2]
        assert all(torch.equal(p, averages[k] if ema else dict(net.named_parameters())[k])
                   for k, p in again.named_parameters())
    assert [p.name for p in tmp_path.iterdir()] == ['ckpt.safetensors'] and not capsys.readouterr().out
    (tmp_path / 'any').touch()
    assert path.stat().st_mode == (tmp_path / 'any').stat().st_mode, 'who may read other files may read this one'
    del net.config['action_on'], net.config['soft_cap'], net.config['attention']    # from before there were these
    model.save(path, net, {k: v for k, v in config.items() if k not in ('pool', 'encoder_hash')})
    old, back = model.load(path)
    said = capsys.readouterr().out
    assert old.config == again.config and back == config
    assert all(f'{path}: is older than the option {text}' in said and said.count('\n') == 5 for text in (
        'action_on: takes action_on=all', 'soft_cap:', 'attention: takes attention=factored', 'pool: takes pool=1',
        'encoder_hash:'))
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 2], b'', b'nonsense'):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match='not a readable checkpoint'):
            model.load(path)
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(SystemExit, match='not a readable checkpoint .OSError: not a regular file'):
        model.load(tmp_path / 'pipe')
    half = {k: v.half() for k, v in net.state_dict().items()}
    texts = dict(config=json.dumps(config), model=json.dumps(net.config), step='3')
    safetensors.torch.save_file(half, path, texts)
    assert all(torch.equal(v, half[k].float()) for k, v in model.load(path)[0].state_dict().items())
    path.write_bytes(whole)
    kept = {k: v.clone() for k, v in old.state_dict().items()}
    again = model.load(path)[0]
    path.write_bytes(whole[:-4096] + bytes(4096))       # in place, as some copy
    assert all(torch.equal(v, kept[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize('broken', ['keys', 'tensors', 'width', 'layers', 'absurd', 'grid', 'json', 'types', 'nan', 'cap',
                                    'context'])
def test_what_is_no_whole_checkpoint_is_one_line(tmp_path, broken):
    net, path = world(), tmp_path / 'ckpt.safetensors'
    tensors = net.state_dict()
    texts = dict(config=json.dumps(model.CONFIG_DEFAULTS), model=json.dumps(net.config), step='3')
    if broken == 'keys':
        del texts['step']
    if broken == 'tensors':
        del tensors['a_base']
    if broken == 'nan':
        tensors['a_base'] = tensors['a_base'] * float('nan')
    texts |= {'width': dict(model=json.dumps(net.config | dict(width=1 << 20))), 'json': dict(config='{'),
              'layers': dict(model=json.dumps(net.config | dict(layers=5))),
              'absurd': dict(model=json.dumps(net.config | dict(layers=1 << 40))),
              'cap': dict(model=json.dumps(net.config | dict(soft_cap=0.0))),
              'context': dict(config=json.dumps(model.CONFIG_DEFAULTS | dict(eval_context=0))),
              'grid': dict(model=json.dumps(net.config | dict(grid=[1 << 40, 1]))),
              'types': dict(model=json.dumps(net.config | dict(heads='x')))}.get(broken, {})
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path, texts)
    words = 'a_base is not finite' if broken == 'nan' else 'not a checkpoint of train.py, or not a whole one'
    with pytest.raises(SystemExit, match=words) as error:
        model.load(path)
    assert '\n' not in error.value.code and error.value.code.startswith(str(path))


def test_another_encoder_than_that_of_training_is_refused(tiny, tmp_path):
    file, state = tiny
    other = str(tmp_path / 'other.safetensors')
    save_file(state | {'norm.bias': state['norm.bias'] + 1e-3}, other)
    config = model.CONFIG_DEFAULTS | dict(encoder='tiny2', encoder_path=file, frame_height=28)
    hash = model.restore_encoder(config, {}).hash
    assert model.restore_encoder(config | dict(encoder='tiny2_cls', encoder_hash=hash), {}, grid=[1, 1]).grid == (1, 1)
    with pytest.raises(SystemExit, match='its model has .2, 2. tokens in a frame, its encoder .1, 1.'):
        model.restore_encoder(config | dict(encoder='tiny2_cls'), {}, grid=[2, 2])
    assert re.fullmatch('[0-9a-f]{16}', hash)
    config['encoder_hash'] = hash
    assert model.restore_encoder(config, {}).hash == hash == model.restore_encoder(config, {}, grid=[2, 2]).hash
    with pytest.raises(SystemExit, match='has been changed: its model has .3, 2. tokens in a frame, its encoder .2, 2.'):
        model.restore_encoder(config, {}, grid=[3, 2])
    for path in (other, ''):
        config['encoder_path'] = file if path else other
        with pytest.raises(SystemExit, match=f'--encoder_path={other}: has other weights than those of training'):
            model.restore_encoder(config, {}, path)
    pixels = model.load_encoder('pixels')
    stats = {f'encoder.{k}': v for k, v in pixels.stored().items()}
    assert model.restore_encoder(model.CONFIG_DEFAULTS | dict(encoder_hash=''), stats).hash == ''
    with pytest.raises(SystemExit, match='the checkpoint has .*mean.* of the encoder, pixels wants'):
        model.restore_encoder(model.CONFIG_DEFAULTS, {'encoder.mean': pixels.mean})


def test_frames_are_encoded_whatever_their_shape_and_number():
    encoder, x = model.load_encoder('pixels'), torch.arange(150 * 3 * 28 * 28).byte().view(-1, 3, 28, 28)
    z = model.encode_frames(encoder, x.view(2, 75, 3, 28, 28), torch.autocast('cpu', enabled=False))
    assert z.shape == (2, 75, 16, 24) and torch.allclose(z.flatten(0, 1), encoder(x / 255), atol=1e-5)
    parameters_alone = torch.nn.Sequential(torch.nn.Conv2d(3, 24, 7, 7), torch.nn.Flatten(2))
    assert model.encode_frames(parameters_alone, x, torch.autocast('cpu', enabled=False)).shape == (150, 24, 16)


@pytest.mark.parametrize('channels', [0, 2])
def test_latents_are_normalised_and_back(channels):
    stats = dict(z_mean=torch.tensor([1.0, 2.0, 3.0]), z_std=torch.tensor([0.5, 2.0, 4.0]))
    if channels:        # of the first and the last
        stats |= dict(z_basis=torch.eye(3)[:, [0, 2]], z_std=stats['z_std'][[0, 2]])
    z = torch.tensor([[2.0, 2.0, -1.0]])
    latents = model.standard(z, stats)
    assert latents.tolist() == [[2.0, -1.0] if channels else [2.0, 0.0, -1.0]]
    assert model.unstandard(latents, stats).tolist() == z.tolist()


def test_a_save_that_is_killed_leaves_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / 'ckpt.safetensors'
    model.save(path, world(), {})
    whole = path.read_bytes()

    def killed(tensors, file, *metadata):
        with open(file, 'w') as f:
            f.write('half')
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, 'save_file', killed)
    with pytest.raises(KeyboardInterrupt):
        model.save(path, world(), {})
    assert path.read_bytes() == whole

    def full(tensors, file, *metadata):
        raise safetensors.SafetensorError('No space left on device')

    monkeypatch.setattr(safetensors.torch, 'save_file', full)
    with pytest.raises(SystemExit, match='ckpt.safetensors: cannot be written .*No space left.* stays'):
        model.save(path, world(), {})
    assert path.read_bytes() == whole


def test_pixels_keep_what_matters():
    rng = torch.Generator().manual_seed(0)
    x = F.interpolate(torch.rand(64, 3, 5, 5, generator=rng), (28, 28), mode='bicubic').clamp(0, 1)
    encoder = model.load_encoder('pixels')
    assert (encoder.dim, encoder.patch, encoder.size, encoder.grid, encoder.name) == (24, 7, 28, (4, 4), 'pixels')
    before = (encoder.decode(encoder(x)) - x).square().mean()
    encoder.fit(x)
    after = (encoder.decode(encoder(x)) - x).square().mean()
    assert before < 0.1 * x.var() and after < 0.5 * before
    z = encoder(x)
    assert z.shape == (64, 16, 24) and (z.flatten(0, 1).var(0).diff() <= 0).all(), 'components in falling order'
    wide = model.load_encoder('pixels', height=28, width=42)
    assert wide.grid == (4, 6) and wide(torch.rand(2, 3, 50, 80)).shape == (2, 24, 24)
    assert (model.pictures(encoder(x), encoder).float() / 255 - x).square().mean() < 1.01 * after + 1e-4


# --------------------------------------------------------------------------------------------------------------------
# on a GPU every fast path computes what the plain one does in float32

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')


def cuda_world(kv_heads=2, T=8, objective='shortcut', wide_layers=0, layers=2, attention='factored'):
    """A small model of 14 x 14 tokens on the GPU, its clips, actions and masks."""
    torch.manual_seed(0)
    with torch.device('cuda'):
        c = model.model_config('tiny', 48, (14, 14), 3, width=128, heads=4, kv_heads=kv_heads, layers=layers, context=4,
                               objective=objective, wide_layers=wide_layers, attention=attention)
        net = model.WorldModel(c)
        torch.nn.init.normal_((net.head.out if wide_layers else net.head).weight, std=0.05)
        return net, torch.randn(3, T, 196, 48), torch.randn(3, T, 3), torch.ones(3, T, dtype=torch.bool)


def cuda_answers(net, z, a, known, kernel, dtype):
    """Prediction of half noised clips, one of which is separate images, and the gradient of a loss on it."""
    for m in net.modules():
        if isinstance(m, model.Attention):
            m.kernel = kernel
    net.zero_grad(set_to_none=True)
    alone = torch.tensor([True, False, False], device='cuda')
    half = torch.full(z.shape[:2], 0.5, device='cuda')
    with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
        z_hat = net(z, half, half, a, known, alone)
        (z_hat - z).square().mean().backward()
    grads = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
    return z_hat.detach().float(), torch.cat(grads)


@needs_cuda
@pytest.mark.parametrize('kv_heads, attention', [(2, 'factored'), (4, 'factored'), (2, 'flat')])
def test_cuda_flex_is_the_plain_kernel(kv_heads, attention):
    world = cuda_world(kv_heads, attention=attention)
    want = cuda_answers(*world, 'plain', torch.float32)
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 4e-2)):
        for got, right in zip(cuda_answers(*world, 'flex', dtype), want):
            assert (got - right).norm() < limit * right.norm()


@needs_cuda
@pytest.mark.parametrize('remat', [False, True])
def test_cuda_compiled_training_is_the_plain_one(remat):
    net, *given = cuda_world(wide_layers=1)
    want = cuda_answers(net, *given, 'plain', torch.float32)
    model.compile_layers(net)
    net.remat = remat
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 4e-2)):
        for got, right in zip(cuda_answers(net, *given, 'auto', dtype), want):
            assert (got - right).norm() < limit * right.norm()
    torch.compiler.reset()


@needs_cuda
@pytest.mark.parametrize('objective, attention', [('shortcut', 'factored'), ('direct', 'factored'), ('direct', 'flat')])
def test_cuda_graph_of_a_rollout_is_the_plain_one(objective, attention):
    net, z, a, known = cuda_world(objective=objective, T=10, layers=3, attention=attention)
    net.eval().requires_grad_(False)
    for start in (z[:, :2], z[:, 2:4]):         # the second replays what the first has captured; more than the window
        want = model.rollout(net, start, a, known, 4, graph=False)
        got = model.rollout(net, start, a, known, 4, graph=True)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    many = a.repeat_interleave(5, dim=0) + torch.randn(15, 10, 3, device='cuda')
    want = model.rollout(net, z[:, :2], many, known.repeat_interleave(5, dim=0), 4, graph=False)
    model.half_weights(net, torch.bfloat16)
    with torch.autocast('cuda', torch.bfloat16):
        got = model.rollout(net, z[:, :2], many, known.repeat_interleave(5, dim=0), 4)
    assert (got - want).norm() < 0.1 * want.norm()


@needs_cuda
def test_cuda_a_training_step_never_waits_for_the_device():
    net, z, a, known = cuda_world()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    for _ in range(2):
        with torch.autocast('cuda', torch.bfloat16):
            loss, metrics = model.shortcut_loss(net, z, a, known, known)
        loss.backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode('error')     # the first step compiles, and may wait
        try:
            with torch.autocast('cuda', torch.bfloat16):
                loss, metrics = model.shortcut_loss(net, z, a, known, known)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode('default')


@needs_cuda
def test_cuda_encoder_gives_the_features_of_the_cpu():
    torch.manual_seed(0)
    vit = model.ViT(*model.ENCODERS['dinov2_vits14'][1:])
    for p in vit.parameters():
        torch.nn.init.normal_(p, std=0.02)
    encoder = model.Encoder('dinov2_vits14', vit, 3, 112, 112, 1).eval().requires_grad_(False)
    x = torch.rand(2, 3, 120, 100)
    want = encoder(x)
    encoder.cuda()
    torch.testing.assert_close(encoder(x.cuda()).cpu(), want, rtol=2e-3, atol=2e-3)
    with torch.autocast('cuda', torch.bfloat16):
        got = encoder(x.cuda()).cpu()
    assert (got - want).norm() < 3e-2 * want.norm()


def test_a_probe_reads_numbers_and_angles():
    """What it is to answer, and what an answer means, are inverse; an angle is wrong by the short way round."""
    torch.manual_seed(0)
    turn = torch.tensor([0, 2 * math.pi, 360])
    probe = model.Probe(6, 4, torch.tensor([5., 0, 0]), torch.tensor([3., 1, 1]), turn, 8, 2)
    numbers = torch.tensor([[4., 3.1, -179], [6, -3.1, 350], [5, 9, 10]])
    probe.forward = lambda z: 2 * probe.code(numbers) * torch.tensor([.5, 1, 1])[:, None]      # a sine of any length
    read = probe.read(None)
    assert torch.allclose(read, torch.tensor([[4, 3.1, -179], [6, -3.1, -10], [5, 9 - 2 * math.pi, 10]]), atol=1e-4)
    off = probe.off(None, torch.tensor([[1, -3.1, 179.], [6, 3.1, 350], [math.nan, 9, 190]]))
    short = 2 * math.pi - 6.2
    assert torch.allclose(off, torch.tensor([[3, short, 2], [0, short, 0], [math.nan, 0, 180]]), atol=1e-3, equal_nan=True)
    assert probe.code(torch.tensor([[math.nan, 0, 0]])).isnan().any(dim=2).tolist() == [[True, False, False]]


def test_contrast():
    """Against sums over the frames one by one, in float64."""
    rng = np.random.default_rng(0)
    n = 7
    found, code = rng.normal(0, 0.2, (2, n, 3, 2))      # so that all others count
    near = np.eye(n, dtype=bool)
    near[1, 2] = near[2, 1] = near[5, 6] = near[6, 5] = True
    loss = 0.0
    for i in range(n):
        others = [j for j in range(n) if j == i or not near[i, j]]
        rows = [math.exp(-np.square(found[i] - code[j]).sum() / 0.1) for j in others]
        columns = [math.exp(-np.square(found[j] - code[i]).sum() / 0.1) for j in others]
        loss -= (math.log(rows[others.index(i)] / sum(rows)) + math.log(columns[others.index(i)] / sum(columns))) / 2 / n
    got = model.contrast(torch.from_numpy(found), torch.from_numpy(code), torch.from_numpy(near))
    assert got.item() == pytest.approx(loss, rel=1e-9)


def test_a_linear_probe():
    torch.manual_seed(2)
    probe = model.Probe(6, 4, torch.zeros(3), torch.ones(3), torch.tensor([0, 0, 360.]), 8, 2, linear=True)
    z = torch.randn(5, 6, 4)
    w = {name: v.double().numpy() for name, v in probe.state_dict().items()}
    x = z[3].double().numpy() @ w['token.weight'].T + w['token.bias'] + w['place']
    logits = w['query'] @ (x @ w['key.weight'].T).T / math.sqrt(8)
    weight = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    y = w['out.weight'] @ (weight @ x).ravel() + w['out.bias']
    np.testing.assert_allclose(probe(z)[3].detach().numpy(), np.stack((y[:3], [0, 0, y[5]]), axis=1), atol=1e-5)
    again = model.restore_probe({f'align.{name}': v for name, v in probe.state_dict().items()}, 'align.')
    assert again.linear and torch.allclose(again(z), probe(z))


def test_a_probe_attends_and_comes_back_from_a_checkpoint():
    torch.manual_seed(1)
    probe = model.Probe(6, 4, torch.zeros(3), torch.ones(3), torch.tensor([0, 0, 360.]), 8, 2)
    z = torch.randn(5, 2, 6, 4)
    w = {name: v.double().numpy() for name, v in probe.state_dict().items()}
    gelu = np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2)
    for b, t in (0, 1), (4, 0):         # one number after the other, in float64
        x = gelu(z[b, t].double().numpy() @ w['token.weight'].T + w['token.bias'] + w['place'])
        found = []
        for q in w['query']:
            logits = np.array([q @ (w['key.weight'] @ row) for row in x]) / math.sqrt(8)
            weight = np.exp(logits) / np.exp(logits).sum()
            found += [*sum(p * row for p, row in zip(weight, x))]
        y = w['out.weight'] @ gelu(w['hidden.weight'] @ np.array(found) + w['hidden.bias']) + w['out.bias']
        y = np.stack((y[:3], [0, 0, y[5]]), axis=1)      # the second of an angle alone
        np.testing.assert_allclose(probe(z)[b, t].detach().numpy(), y, atol=1e-5)
    again = model.restore_probe({f'probe.{name}': v for name, v in probe.state_dict().items()} | {'z_mean': z})
    assert torch.allclose(again.read(z), probe.read(z)) and not any(p.requires_grad for p in again.parameters())
    assert model.restore_probe({'z_mean': z}) is None
