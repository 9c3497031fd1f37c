import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
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


def made_up_state(case):
    return {k: made_up(case, k, shape) for k, shape in CASES[case]['shapes'].items()}


def vit_of(arguments, state):
    vit = model.ViT(*arguments)
    vit.load_state_dict(model.official(state))
    return vit.eval()


@torch.no_grad()
def difference(case, vit):
    worst = 0
    for H, W in CASES[case]['sizes']:
        want = GOLDEN[f'{case}/{H}x{W}']
        got = vit(made_up(case, f'{H}x{W}', (1, 3, H, W)))[0, ::STEP, ::STEP]
        assert got.shape == want.shape
        worst = max(worst, float((got - want).norm() / want.norm()))
    return worst


@pytest.mark.parametrize('case', CASES)
def test_vit_answers_as_the_library_that_made_the_case(case):
    worst = difference(case, vit_of(CASES[case]['arguments'], made_up_state(case)))
    print(f'{case}: relative difference {worst:.1e} to {CASES[case]["made_with"]}')
    assert worst < 1e-5


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
    """Two small named models, and a file with weights for the first."""
    monkeypatch.setitem(model.ENCODERS, 'tiny2', ('nobody/tiny2', *TINY))
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


@pytest.mark.parametrize('name, mode', [('tiny2', 'bicubic'), ('tiny3', 'bilinear')])
def test_frames_are_resized_as_the_family_was_trained_and_normalised(tiny, tmp_path, name, mode):
    state = model.ViT(*model.ENCODERS[name][1:]).state_dict()
    save_file(state, tmp_path / 'x.safetensors')
    H, W = 4 * model.ENCODERS[name][-2], 6 * model.ENCODERS[name][-2]
    encoder = model.load_encoder(name, str(tmp_path / 'x.safetensors'), height=H, width=W)
    x = torch.rand(1, 3, 100, 120).round()
    small = F.interpolate(x, (H, W), mode=mode, antialias=True).clamp(0, 1)
    assert torch.equal(encoder(x), encoder(small))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([.485, .456, .406], [.229, .224, .225]))
    torch.testing.assert_close(encoder(x), encoder.vit((small - mean) / std))


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
    torch.save({'model': {'state_dict': {'module.' + k: v for k, v in state.items()}}, 'epoch': 3}, tmp_path / 'x.pth')
    keys = list(state)
    index = {k: f'part-{i % 2}.safetensors' for i, k in enumerate(keys)}
    (tmp_path / 'split').mkdir()
    for part in set(index.values()):
        save_file({k: state[k] for k in keys if index[k] == part}, tmp_path / 'split' / part)
    for name in ('x.pth', 'split'):
        assert torch.equal(model.load_encoder('tiny2', str(tmp_path / name), height=28)(x), want)


def ends(*args, **options):
    with pytest.raises(SystemExit) as e:
        model.load_encoder(*args, **options)
    assert isinstance(e.value.code, str) and '\n' not in e.value.code
    return e.value.code


def test_each_mistake_is_one_line(tiny, tmp_path):
    file, state = tiny
    put = lambda name, state: save_file(state, tmp_path / name) or str(tmp_path / name)
    assert ends('dinov2_vits15') == '--encoder=dinov2_vits15: no such encoder, did you mean dinov2_vits14?'
    assert 'there are pixels, dinov2_vits14, ' in ends('zzz')
    assert ends('tiny2', file, height=225) == '--frame_height=225: tiny2 with pool=1 wants a multiple of 14 pixels'
    assert ends('tiny2', file, width=42, pool=2) == '--frame_width=42: tiny2 with pool=2 wants a multiple of 28 pixels'
    assert ends('tiny2', file, height=-14).startswith('--frame_height=-14: ')
    assert ends('tiny2', file, layer=3) == '--layer=3: tiny2 has blocks 0 to 2 (-1 is the last)'
    assert ends('tiny2', file, layer=-4).startswith('--layer=-4: ')
    assert ends('tiny2', 'nowhere.safetensors') == 'nowhere.safetensors: no such file'

    wrong = put('wrong.safetensors', {**state, 'blocks.0.attn.qkv.weight': torch.zeros(192, 65)})
    assert ends('tiny2', wrong) == f'{wrong}: blocks.0.attn.qkv.weight is (192, 65), tiny2 wants (192, 64)'
    less = put('less.safetensors', {k: v for k, v in state.items() if k != 'blocks.1.norm2.bias'})
    assert ends('tiny2', less) == f'{less}: blocks.1.norm2.bias is missing, tiny2 wants (64,)'
    more = put('more.safetensors', {**state, 'blocks.3.norm2.bias': torch.zeros(64)})
    assert ends('tiny2', more) == f'{more}: blocks.3.norm2.bias is unexpected, tiny2 has no such weight'
    registers = put('registers.safetensors', {**state, 'register_tokens': torch.zeros(1, 4, 64)})
    assert ends('tiny2', registers).startswith(f'{registers}: registers is unexpected')
    other = put('other.safetensors', {'features.0.weight': torch.zeros(64, 3, 3, 3)})
    assert ends('tiny2', other) == f'{other}: cls_token is missing, tiny2 wants (1, 1, 64)'
    assert ends('tiny3', file).startswith(f'{file}: ')
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
    program = (f'import model, sys\nmodel.ENCODERS["tiny2"] = (sys.argv[1], *{TINY})\n'
               'print(float(model.load_encoder("tiny2").vit.norm.weight.sum()))')
    root = os.path.dirname(model.__file__)
    env = dict({k: v for k, v in os.environ.items() if not k.lower().endswith('_proxy') and k != 'HF_HUB_OFFLINE'},
               HF_HOME=str(tmp_path / 'hf'), HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}', PYTHONPATH=root)
    run = lambda repo: subprocess.run([sys.executable, '-c', program, repo], env=env, capture_output=True, text=True)
    for repo in ('nobody/tiny2', 'nobody/split'):
        got = run(repo)
        assert got.returncode == 0, got.stderr
        assert float(got.stdout) == pytest.approx(float(state['norm.weight'].sum()))
    got = run('nobody/gated')
    server.shutdown()
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

def world(context=4, k_max=8, seed=0, dtype=torch.float32, **overrides):
    """A tiny model whose output is not zero, as it is when new."""
    torch.manual_seed(seed)
    config = model.model_config('nano', 3, (2, 3), 2, **(dict(width=32, heads=4, kv_heads=2, layers=4, registers=1,
                                                              context=context, k_max=k_max) | overrides))
    net = model.WorldModel(config)
    torch.nn.init.normal_(net.head.weight, std=0.3)
    return net.to(dtype).eval()


def inputs(B=2, T=6, N=6, D=3, A=2, k_max=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    z, a = torch.randn(B, T, N, D, generator=g).to(dtype), torch.randn(B, T, A, generator=g).to(dtype)
    a_mask = torch.rand(B, T, generator=g) < 0.7
    a_mask[:, 0] = False
    tau = (torch.randint(0, k_max, (B, T), generator=g) / k_max).to(dtype)
    return z, tau, torch.full((B, T), 1 / k_max, dtype=dtype), a, a_mask


def test_attention_equals_a_loop():
    g = torch.Generator().manual_seed(0)
    B, h, n, S, L, d, cap = 2, 4, 2, 3, 5, 8, 2.0
    q, k, v = (torch.randn(B, heads, length, d, generator=g).double() * 3 for heads, length in ((h, S), (n, L), (n, L)))
    mask = torch.rand(B, 1, S, L, generator=g) < 0.7
    mask[..., 0] = True
    want = np.zeros((B, h, S, d))
    for b in range(B):
        for i in range(h):
            for s in range(S):
                keys = [j for j in range(L) if mask[b, 0, s, j]]
                logits = [(q[b, i, s] @ k[b, i // (h // n), j]).item() / np.sqrt(d) for j in keys]
                e = [np.exp(cap * np.tanh(x / cap)) for x in logits]
                want[b, i, s] = sum(w / sum(e) * v[b, i // (h // n), j].numpy() for w, j in zip(e, keys))
    assert np.allclose(model.attend(q, k, v, cap, mask), want, atol=1e-6)      # logits are float32 by contract
    one = model.attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), cap, mask)     # a key head per head
    assert torch.allclose(model.attend(q, k, v, cap, mask), one, atol=1e-6)


def test_rope_is_relative():
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    freq = 10000.0 ** (-torch.arange(4) / 4)
    at = [[(model.rotate(q, (i * freq).cos(), (i * freq).sin()) * model.rotate(k, (j * freq).cos(), (j * freq).sin())
            ).sum().item() for j in (i - 3, i)] for i in (3, 10, 100)]
    assert np.allclose(at, at[0], atol=1e-4) and abs(at[0][0] - at[0][1]) > 1e-3


def test_shifting_all_frames_changes_nothing():
    net, x = world(), inputs()
    assert torch.allclose(net(*x), net(*x, start=57), atol=1e-5)


def test_the_past_never_sees_the_future_nor_beyond_the_window():
    net, (z, *rest) = world(layers=2, context=3), inputs()
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


def test_frames_alone_see_only_themselves():
    net, (z, *rest) = world(), inputs()
    other = z.clone()
    other[:, 2] += 1
    alone = torch.tensor([True, False])
    changed = (net(z, *rest, alone) - net(other, *rest, alone)).abs().amax(dim=(2, 3)) > 1e-6
    assert changed[0].tolist() == [False, False, True, False, False, False] and changed[1, 3:].all()


@pytest.mark.parametrize('action_on', ['all', 'token'])
def test_hidden_actions_do_not_leak(action_on):
    net, (z, tau, d, a, a_mask) = world(action_on=action_on), inputs()
    hidden = torch.where(a_mask[..., None], a, torch.nan)
    assert torch.equal(net(z, tau, d, a, a_mask), net(z, tau, d, hidden, a_mask))
    assert not torch.allclose(net(z, tau, d, a, a_mask), net(z, tau, d, a + 1, a_mask))


def test_a_new_model_predicts_the_mean():
    net = model.WorldModel(model.model_config('nano', 3, (2, 3), 2))
    assert net(*inputs(k_max=64)).abs().max() == 0
    sizes = {name: sum(p.numel() for p in model.WorldModel(model.model_config(name, 384, (16, 16), 7)).parameters())
             for name in ('nano', 'tiny', 'small')}
    assert 0.6e6 < sizes['nano'] < 1.1e6 and 2.5e6 < sizes['tiny'] < 4e6 and 25e6 < sizes['small'] < 36e6


@pytest.mark.parametrize('bad, said', [(dict(size='huge'), '--size=huge: no such size'), (dict(heads=3), 'heads'),
                                       (dict(k_max=12), '--k_max=12: wants a power of two'),
                                       (dict(objective='flow'), '--objective=flow'), (dict(layers=1), '--layers=1')])
def test_a_wrong_config_is_one_line(bad, said):
    with pytest.raises(SystemExit) as error:
        model.model_config(**dict(dict(size='nano', dim=3, grid=(2, 3), action_dim=2), **bad))
    assert said in str(error.value) and '\n' not in str(error.value)


# shortcut forcing -----------------------------------------------------------------------------------------------------

class Recorder:
    """A deterministic stand-in for the network, in float64, that keeps what it was asked."""
    def __init__(self):
        self.calls = []

    def __call__(self, z, tau, d, a, a_mask, alone=None):
        self.calls.append((z, tau, d, a_mask, alone))
        return self.f(z, tau, d)

    @staticmethod
    def f(z, tau, d):
        return torch.sin(z) + tau[..., None, None].double() - torch.log2(d)[..., None, None].double() / 3


@pytest.mark.parametrize('schedule', ['uniform', 'shift'])
def test_shortcut_loss_is_equation_7(schedule):
    """Against the v-space form of the paper, frame by frame."""
    torch.manual_seed(0)
    B, T, k_max = 8, 6, 16
    z, _, _, a, a_mask = inputs(B, T, dtype=torch.float64)
    z_mask = torch.rand(B, T) < 0.8
    net = Recorder()
    rms = torch.tensor([4.0, 25.0])
    loss, metrics = model.shortcut_loss(net, z, a, a_mask, z_mask, 'shortcut', k_max, 0.5,
                                        tau_schedule=schedule, rms=rms)
    z_tau, tau, d, _, _ = net.calls[-1]     # the student comes last, after the two half steps of its teacher
    assert len(net.calls) == 3
    f = net.f
    sums = {'flow': [0.0, 0], 'bootstrap': [0.0, 0]}
    for b in range(B):
        # a row is one or the other
        assert (d[b] == 1 / k_max).all() == (b >= 4) and ((d[b] > 1 / k_max).all() or b >= 4)
        for t in range(T):
            s, e, x = tau[b, t].item(), d[b, t].item(), z_tau[b, t].numpy()
            assert 0 <= s <= 1 - e and (s / e) % 1 == 0, 'tau lies on the grid of d'
            at = lambda x, s, e: f(torch.tensor(x)[None, None], torch.tensor([[s]]), torch.tensor([[e]]))[0, 0].numpy()
            if e == 1 / k_max:
                error = np.mean((at(x, s, e) - z[b, t].numpy()) ** 2)
            else:
                one = (at(x, s, e / 2) - x) / (1 - s)
                mid = x + one * e / 2
                two = (at(mid, s + e / 2, e / 2) - mid) / (1 - (s + e / 2))
                error = (1 - s) ** 2 * np.mean(((at(x, s, e) - x) / (1 - s) - (one + two) / 2) ** 2)
            if z_mask[b, t]:
                total = sums['flow' if e == 1 / k_max else 'bootstrap']
                total[0], total[1] = total[0] + (0.9 * s + 0.1) * error, total[1] + 1
    flow, boot = (total / n for total, n in sums.values())
    assert abs(metrics['flow'] - flow) < 1e-6 * flow and abs(metrics['bootstrap'] - boot) < 1e-6 * boot
    assert abs(loss - (flow / 2 + boot / 5)) < 1e-6


def test_the_noise_of_a_frame_has_its_level():
    """z_tau = (1 - tau) noise + tau z: what is left after taking tau z away has the variance (1 - tau)^2."""
    torch.manual_seed(0)
    z, _, _, a, a_mask = inputs(64, 6, N=60)
    net = Recorder()
    model.shortcut_loss(net, z, a, a_mask, torch.ones_like(a_mask), 'diffusion', 8, tau_schedule='uniform')
    z_tau, tau, d, _, _ = net.calls[0]
    assert len(net.calls) == 1 and (d == 1 / 8).all() and set(tau.unique().tolist()) == {i / 8 for i in range(8)}
    for level in tau.unique():
        left = (z_tau - level * z)[tau == level]
        assert abs(left.std() - (1 - level)) < 0.02


def test_every_step_size_is_trained_and_the_share_is_exact():
    torch.manual_seed(0)
    z, _, _, a, a_mask = inputs(8, 6, dtype=torch.float64)
    seen, rows, alone, hidden = set(), 0, 0.0, 0.0
    for _ in range(200):
        net = Recorder()
        model.shortcut_loss(net, z, a, torch.ones_like(a_mask), torch.ones_like(a_mask), 'shortcut', 16, 0.3)
        _, _, d, mask, single = net.calls[-1]
        seen |= set(d.unique().tolist())
        rows += (d > 1 / 16).all(dim=1).sum().item()
        alone += single.float().mean().item() / 200
        hidden += (~mask).all(dim=1).float().mean().item() / 200
    assert seen == {1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0}
    assert abs(rows / (200 * 8) - 0.3) < 0.02 and abs(alone - 0.3) < 0.05 and abs(hidden - (1 - 0.7 * 0.9)) < 0.05


def test_schedules_point_to_noise():
    torch.manual_seed(0)
    uniform, shift = (model.sample_flow(4000, 5, 8, s, 'cpu') for s in ('uniform', 'shift'))
    assert abs(uniform.mean() - 7 / 16) < 0.01 and (shift[:, -1] == 0).float().mean() > 0.5
    assert shift[:, -1].mean() < 0.25 < shift[:, 0].mean(), 'the past is cleaner than what follows'


@pytest.mark.parametrize('objective', ['shortcut', 'diffusion', 'direct'])
def test_an_oracle_has_no_loss(objective):
    z, _, _, a, a_mask = inputs(8)
    oracle = lambda x, tau, d, a, a_mask, alone=None: z[:len(x)]
    loss, metrics = model.shortcut_loss(oracle, z, a, a_mask, torch.ones_like(a_mask), objective, 8)
    assert loss < 1e-10 and metrics['flow'] < 1e-10


@pytest.mark.parametrize('objective', ['shortcut', 'diffusion', 'direct'])
def test_one_batch_is_learned_and_every_parameter_takes_part(objective):
    net, (z, _, _, a, a_mask) = world(objective=objective).train(), inputs()
    optimizer, losses = torch.optim.AdamW(net.parameters(), 3e-3), []
    for step in range(120):
        loss, metrics = model.shortcut_loss(net, z, a, a_mask, torch.ones_like(a_mask), objective, bootstrap=0.5,
                                            p_image=0.0, p_null=0.0)
        loss.backward()
        if step == 0:
            assert [n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []
        optimizer.step()
        optimizer.zero_grad()
        losses.append(metrics['flow'].item())
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])


# rollout --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('objective, k_max, K', [('shortcut', 64, 1), ('shortcut', 64, 2), ('shortcut', 64, 4),
                                                 ('shortcut', 64, 64), ('diffusion', 8, 4), ('direct', 8, 4)])
@pytest.mark.parametrize('Tc', [1, 3, 6])
def test_the_cache_changes_nothing(objective, k_max, K, Tc):
    """Rollouts of three windows' length, from contexts shorter and longer than the window."""
    net = world(context=4, k_max=k_max, objective=objective)
    z, _, _, a, a_mask = inputs(2, 6 + Tc if K == 64 else 12 + Tc)
    cached, plain = (model.rollout(net, z[:, :Tc], a, a_mask, K=K, cache=c) for c in (True, False))
    assert cached.shape == (2, z.shape[1] - Tc, 6, 3)
    assert torch.allclose(cached, plain, atol=2e-5), (cached - plain).abs().max()


def test_candidates_share_context_and_noise():
    net, (z, _, _, a, a_mask) = world(), inputs(2, 7)
    a_mask[:] = True
    many = a[:, None].repeat(1, 3, 1, 1)
    many[:, 1:, 3:] += torch.randn(2, 2, 4, 2)
    alone = [model.rollout(net, z[:, :3], many[:, m], a_mask, K=2) for m in range(3)]
    together = model.rollout(net, z[:, :3], many.flatten(0, 1), a_mask.repeat_interleave(3, 0), K=2)
    assert torch.allclose(together.unflatten(0, (2, 3)), torch.stack(alone, 1), atol=1e-5)
    plain = model.rollout(net, z[:, :3], many.flatten(0, 1), a_mask.repeat_interleave(3, 0), K=2, cache=False)
    assert torch.allclose(together, plain, atol=1e-5)


def test_noise_depends_on_the_seed_and_the_frame_alone():
    net, (z, _, _, a, a_mask) = world(), inputs(2, 9)
    long, short = (model.rollout(net, z[:, :2], a[:, :T], a_mask[:, :T], K=2) for T in (9, 5))
    assert torch.allclose(long[:, :3], short, atol=1e-5)
    assert not torch.allclose(long, model.rollout(net, z[:, :2], a, a_mask, K=2, seed=1), atol=1e-3)


@pytest.mark.parametrize('cache', [True, False])
def test_the_past_is_noised_and_labelled_by_tau_ctx(cache):
    net, (z, _, _, a, a_mask) = world(), inputs(2, 6)
    seen, forward = [], net.forward
    net.forward = lambda z, tau, d, *rest, **more: seen.append((z, tau, d)) or forward(z, tau, d, *rest, **more)
    low, high = (model.rollout(net, z[:, :3], a, a_mask, K=1, tau_ctx=t, cache=cache) for t in (0.5, 0.9))
    assert (low - high).abs().max() > 1e-3
    assert (seen[0][1][:, :3] == 0.5).all() and (seen[-1][1][:, :3] != 0.5).all()
    assert 0.3 < (seen[0][0][:, :3] - 0.5 * z[:, :3]).std() < 0.7       # half of it is noise


def test_a_step_of_one_returns_the_prediction():
    """K = 1 from noise is one evaluation at tau = 0 with d = 1; K = 2 follows the Euler step written out by hand."""
    net, (z, _, _, a, a_mask) = world(), inputs(1, 2)
    calls, forward = [], net.forward
    def spy(x, tau, d, *rest, **more):
        y = forward(x, tau, d, *rest, **more)
        calls.append((x, tau[:, -1].item(), d[:, -1].item(), y))
        return y
    net.forward = spy
    assert torch.allclose(model.rollout(net, z[:, :1], a, a_mask, K=1), calls[-1][3]) and calls[-1][1:3] == (0.0, 1.0)
    calls.clear()
    out = model.rollout(net, z[:, :1], a, a_mask, K=2)
    (_, _, _, _), (x0, tau0, d0, y0), (x1, tau1, d1, y1) = calls
    assert (tau0, d0, tau1, d1) == (0.0, 0.5, 0.5, 0.5)
    assert torch.allclose(x1, x0 + 0.5 * (y0 - x0) / (1 - 0.0), atol=1e-6)
    assert torch.allclose(out, x1 + 0.5 * (y1 - x1) / (1 - 0.5), atol=1e-6) and torch.allclose(out, y1, atol=1e-6)


# checkpoint and pictures ----------------------------------------------------------------------------------------------

def test_save_then_load(tmp_path):
    net, path, config = world(), tmp_path / 'ckpt.safetensors', dict(a=1, b=0.5, c='x', d=True)
    averages = {k: v + 1 for k, v in net.named_parameters()}
    model.save(path, net, config, averages, {'z_mean': torch.arange(3.0)}, step=7)
    for ema in (True, False):
        again, back = model.load(path, ema=ema)
        assert back == config and again.config == net.config and again.step == 7
        assert again.stats['z_mean'].tolist() == [0, 1, 2]
        assert all(torch.equal(p, averages[k] if ema else dict(net.named_parameters())[k])
                   for k, p in again.named_parameters())
    assert [p.name for p in tmp_path.iterdir()] == ['ckpt.safetensors']
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 2], b'', b'nonsense'):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match='not a readable checkpoint'):
            model.load(path)
    safetensors.torch.save_file({'x': torch.ones(1)}, path)
    with pytest.raises(SystemExit, match='not a checkpoint of train.py'):
        model.load(path)


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
