"""
How fast the model trains and imagines: on a CPU beside lucidrains/dreamer4 where that is installed, on a GPU alone.

    python tests/bench_model.py                          # two tables, one thread of a CPU; ten minutes of an idle core
    python tests/bench_model.py --parts=rollout --sizes=plain
    python tests/bench_model.py --device=cuda            # the other tables; under eight minutes on an H100

Each of our sizes has as many trained parameters as the peer's (within 2 %) and its tokens per frame (27): 'default' is
the peer as it comes, 'plain' the peer without what the paper has not. All models take turns in every round. Ratios are
of CPU time, which other processes disturb less.
"""
import gc
import importlib.machinery
import importlib.util
import itertools
import os
import statistics
import sys
import time
import types
import warnings

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
import data  # noqa: E402, from the root
import model  # noqa: E402
from test_model import slow_rollout  # noqa: E402

# --------------------------------------------------------------------------------------------------------------------
device = 'cpu'              # or cuda
threads = 1                 # of the CPU; with more, other processes on the machine decide
rounds = 3
warmup = 3                  # steps of each model before the rounds
parts = 'train,rollout'     # of the CPU tables
sizes = 'default,plain'     # of the peer and of ours
hows = 'float32,bfloat16,float32 compiled,bfloat16 compiled'     # the peer is measured uncompiled
bootstrap = 0.0             # share of bootstrap rows in a training step on the GPU; the peer is measured at 0 and 1
limit = 420                 # seconds after which no further row is begun on the GPU
seed = 0
config = data.override(globals(), sys.argv[1:])
# --------------------------------------------------------------------------------------------------------------------

INSTALL = """pip install torch==2.13.0 numpy accelerate adam-atan2-pytorch assoc-scan einops einx ema-pytorch \
discrete-continuous-embed-readout env-ssl-wrapper fire h-net-dynamic-chunking hl-gauss-pytorch imageio imageio-ffmpeg \
loguru mean-conc-beta memmap-replay-buffer opencv-python-headless pillow pope-pytorch rich torch-einops-utils tqdm \
x-mlps-pytorch x-transformers && pip install --no-deps vit-pytorch dreamer4==0.20.2"""
SHAPES = {'default': dict(width=304, kv_heads=2), 'plain': dict(width=256, kv_heads=4)}
PLAIN = dict(attn_kwargs=dict(gate_values=False, belief_attn=False, rmsnorm_query=True),
             transformer_kwargs=dict(use_attn_pool=False))
torch.manual_seed(seed)
torch.set_num_threads(threads)
begin = time.perf_counter()


def line(*cells):
    print('|', *(f'{c} |' for c in cells), flush=True)


def header(*cells):
    print()
    line(*cells)
    print('|---' * len(cells) + '|')


def turns(cases, warm, n):
    """{name: [(wall, CPU seconds), ..]} of functions {name: f} that take turns."""
    got = {name: [] for name in cases}
    for i in range(warm + n):
        for name, f in cases.items():
            wall, cpu = time.perf_counter(), time.process_time()
            f()
            got[name] += [(time.perf_counter() - wall, time.process_time() - cpu)] if i >= warm else []
    return got


def build(size):
    net = model.WorldModel(model.model_config('tiny', 32, (4, 4), 4, layers=9, heads=4, registers=9, context=64,
                                              **SHAPES[size]))
    torch.nn.init.normal_(net.head.weight, std=0.02)    # it starts at zero
    return net


def build_peer(size):
    names = 'torchvision', 'torchvision.models', 'torchvision.transforms'   # whose wheel fails beside a CPU-only torch
    for name in names if names[0] not in sys.modules else ():               # and which nothing here needs
        stub = sys.modules[name] = types.ModuleType(name)
        stub.__spec__, stub.__file__ = importlib.machinery.ModuleSpec(name, None), name
        stub.VGG16_Weights = stub.models = stub.transforms = types.SimpleNamespace(DEFAULT=None)
    from dreamer4 import DynamicsWorldModel
    return DynamicsWorldModel(
        dim=256, dim_latent=32, num_latent_tokens=16, num_spatial_tokens=16, num_register_tokens=8, max_steps=64,
        depth=8, attn_heads=4, attn_dim_head=64, time_block_every=4, num_discrete_actions=4, predict_terminals=False,
        **(PLAIN if size == 'plain' else {}))


def stepper(net, loss_of, dtype):
    """A function of the share of bootstrap rows that makes a training step."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def step(share):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = loss_of(net, share)
        loss.backward()
        optimizer.step()
    return step


def compiled(net):
    model.compile_layers(net)
    return net


def our_loss(z, a, objective='shortcut'):
    known = torch.ones(z.shape[:2], dtype=torch.bool, device=device)

    def loss(net, share):
        options = dict(objective=objective, bootstrap=share, p_image=0.0, p_null=0.0, tau_schedule='uniform')
        return model.shortcut_loss(net, z, a, known, known, options)[0]
    return loss


def peer_loss(z, a):
    def loss(net, share):
        net.prob_shortcut_train = share
        return net(latents=z, discrete_actions=a, add_autoregressive_action_loss=False)
    return loss


def train_table(peer):
    z, a = torch.rand(4, 16, 16, 32) * 2 - 1, torch.randint(4, (4, 16, 1))
    ours, theirs = our_loss(z, torch.nn.functional.one_hot(a[..., 0], 4).float()), peer_loss(z, a)
    bf16, f32 = torch.bfloat16, torch.float32
    nets, cases = {}, {}
    for size in sizes.split(','):
        if peer:
            nets |= {(size, 'peer', how): build_peer(size) for how in hows.split(',') if 'compiled' not in how}
        nets |= {(size, 'ours', how): build(size) for how in hows.split(',')}
    for name, net in nets.items():
        if 'compiled' in name[2]:
            compiled(net)
        step = stepper(net, theirs if name[1] == 'peer' else ours, bf16 if 'bfloat16' in name[2] else f32)
        cases |= {(*name, share): lambda step=step, share=share: step(share) for share in (0.0, 1.0)}
    got = turns(cases, warmup, rounds)
    print(f'\nA training step, 4 clips x 16 frames x 27 tokens, {threads} thread: seconds, min / median (median of CPU '
          'time).\nRatios are to the float32 peer of the same size; the target is 0.50 at most.')
    header('size', 'model', 'how', 'trained parameters', 'flow only', 'ratio', 'all bootstrap', 'ratio')
    for name, net in nets.items():
        cells = []
        for share in (0.0, 1.0):
            wall, cpu = zip(*got[*name, share])
            base = got.get((name[0], 'peer', 'float32', share))
            cells += [f'{min(wall):.3f} / {statistics.median(wall):.3f} ({statistics.median(cpu):.3f})',
                      f'{statistics.median(cpu) / statistics.median(c for _, c in base):.2f}' if base else '-']
        line(*name, f'{sum(p.numel() for p in net.parameters() if p.grad is not None):,}', *cells)


@torch.no_grad()
def rollout_table(peer):
    K, lengths, cases, frames = 4, (8, 64, 256, 1024), {}, {}
    z, a, known = torch.rand(1, 1024, 16, 32) * 2 - 1, torch.randint(4, (1, 1024, 1)), torch.ones(1, 1024, dtype=bool)
    act = torch.nn.functional.one_hot(a[..., 0], 4).float()
    rows = [(size, who) for size in sizes.split(',') for who in (('peer', 'ours') if peer else ('ours',))]
    for size, who in rows:
        net = (build if who == 'ours' else build_peer)(size).eval()
        for T in lengths if who == 'ours' else lengths[:3]:
            n = 1 if who == 'ours' else max(1, T - 8)       # frames that are given
            frames[size, who, T] = T - n
            if who == 'ours':
                cases[size, who, T] = lambda net=net, T=T: model.rollout(net, z[:, :1], act[:, :T], known[:, :T], K)
                continue
            past = z[:, :n, None]
            cache = net(latents=past, signal_levels=torch.full((1, n), 63), step_sizes=64 // K, latent_is_noised=True,
                        discrete_actions=a[:, :n], latent_has_view_dim=True, return_pred_only=True,
                        return_intermediates=True)[1][1]
            cases[size, who, T] = lambda net=net, T=T, past=past, cache=cache: net.generate(
                T, num_steps=K, prompt_latents=past, prompt_discrete_actions=a[:, :T], time_cache=cache,
                return_decoded_video=False)
    turns({k: f for k, f in cases.items() if k[2] == 8}, 2, 0)
    got = turns({k: f for k, f in cases.items() if k[2] < 1024}, 0, rounds)
    got |= turns({k: f for k, f in cases.items() if k[2] == 1024}, 0, 1)
    ms = {k: [statistics.median(part) * 1000 / frames[k] for part in zip(*v)] for k, v in got.items()}
    print(f'\nA rollout with its cache, K = {K}, one clip, float32, {threads} thread: ms per frame, wall (CPU),'
          '\nmedians. Ours: mean over rollouts of so many frames, context 64. The peer: the last 8 frames of such,'
          '\nas its cache grows without end. Targets: 0.25 of the peer at most at 256 frames, and flat to 1,024.')
    header('size', 'model', *(f'{T} frames' for T in lengths), 'ratio at 256')
    for row in rows:
        line(*row, *('{:.1f} ({:.1f})'.format(*ms[*row, T]) if (*row, T) in ms else '-' for T in lengths),
             f'{ms[*row, 256][1] / ms[row[0], "peer", 256][1]:.2f}' if peer else '-')


# --------------------------------------------------------------------------------------------------------------------
# the GPU: every row is a function that returns its cells

def row(name, f, cells=1):
    if not torch.cuda.is_available() or time.perf_counter() - begin > limit:
        return line(*name, *['not measured'] * cells)
    torch.compiler.reset()      # or a second batch size would be compiled for all sizes
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        got = f()
    except torch.cuda.OutOfMemoryError:
        got = ['out of memory'] * cells
    except Exception as error:      # one row must not take the others with it
        got = [f'{type(error).__name__}: {str(error)[:300]}'] * cells
    line(*name, *got)
    return got


def seconds(f, warm=2, n=5):
    """Median of n calls after warm ones."""
    walls = []
    for _ in range(warm + n):
        torch.cuda.synchronize()
        t = time.perf_counter()
        f()
        torch.cuda.synchronize()
        walls.append(time.perf_counter() - t)
    return statistics.median(walls[warm:])


def big(size, T, B, **overrides):
    """On the GPU: a model of 14 x 14 tokens of 384 channels, z, a and a_mask of B clips of T frames."""
    torch.manual_seed(seed)
    with torch.device(device):
        net = model.WorldModel(model.model_config(size, 384, (14, 14), 7, **overrides))
        torch.nn.init.normal_(net.head.weight, std=0.02)
        return net, torch.randn(B, T, 196, 384), torch.randn(B, T, 7), torch.ones(B, T, dtype=torch.bool)


def agreement(kernel, dtype, compile, remat=False):
    """Largest errors of the prediction and of the gradient, relative to the largest value of the float32 reference."""
    net, z, a, known = big('small', 8, 2, context=4)

    def answers(kernel, dtype, remat):
        net.remat = remat
        for layer in net.layers:
            layer.attn.kernel = kernel
        torch.manual_seed(seed)
        net.zero_grad(set_to_none=True)
        with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
            tau, d = torch.full((2, 8), 0.5, device=device), torch.full((2, 8), 1 / 64, device=device)
            z_hat = net(z, tau, d, a, known).detach().float()
            model.shortcut_loss(net, z, a, known, known)[0].backward()
        return z_hat, torch.cat([p.grad.flatten() for p in net.parameters()])

    want = answers('plain', torch.float32, False)
    if compile:
        compiled(net)
    got = answers(kernel, dtype, remat)
    return [f'{(g - w).abs().max() / w.abs().max():.1e}' for g, w in zip(got, want)]


def agreement_rollout(graph, dtype):
    net, z, a, known = big('small', 12, 2, context=8)
    with torch.no_grad():
        want = slow_rollout(net, z[:, :4], a, known, 4)
    with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
        got = model.rollout(net, z[:, :4], a, known, 4, graph=graph)
    return [f'{(got - want).abs().max() / want.abs().max():.1e}', '-']


def train_row(size, B, remat):
    T = 64
    net, z, a, known = big(size, T, B)
    net.remat = remat
    step = stepper(compiled(net), our_loss(z, a), torch.bfloat16)
    s, peak = seconds(lambda: step(bootstrap)), data.peak_flops(torch.device(device))
    work = (3 + 2 * bootstrap) * model.flops_per_frame(net.config, T) * B * T     # a bootstrap row: two more forwards
    return [f'{sum(p.numel() for p in net.parameters()) / 1e6:.0f}M', f'{s * 1000:.0f}',
            f'{B * T * len(net.space_cos) / s:,.0f}', f'{B * T / s:,.0f}', f'{work / s / peak:.1%}' if peak else 'n/a',
            f'{torch.cuda.max_memory_allocated() / 2 ** 30:.1f}']


def train_rows(size, remat, clips):
    """The first of some numbers of clips that fits into memory."""
    for B in clips:
        got = row([size, 'yes' if remat else 'no', B], lambda: train_row(size, B, remat), 6)
        if not got or got[0] != 'out of memory':
            break


def pusht_row():
    torch.manual_seed(seed)
    with torch.device(device):
        shape = dict(width=384, heads=6, layers=8, registers=2, context=4, objective='direct')
        net = model.WorldModel(model.model_config('small', 64, (14, 14), 10, **shape))
        z, a = torch.randn(64, 6, 196, 64), torch.randn(64, 6, 10)
    model.compile_layers(net)
    step = stepper(net, our_loss(z, a, objective='direct'), torch.bfloat16)
    s = seconds(lambda: step(0.0), 3, 10)
    return [f'{sum(p.numel() for p in net.parameters()) / 1e6:.0f}M', f'{s * 1000:.1f}']


@torch.no_grad()
def rollout_row(K, B, M, T, graph):
    net, z, a, known = big('small', T + 1, B * M, context=32)
    net = model.half_weights(net.eval(), torch.bfloat16)

    def run():
        with torch.autocast('cuda', torch.bfloat16):
            model.rollout(net, z[:B, :1], a, known, K, graph=graph)
    return [f'{seconds(run, 1, 3 if T < 100 else 1) * 1000 / T:.2f}']


@torch.no_grad()
def encoder_row(compile, B=256):
    vit = model.ViT(*model.ENCODERS['dinov2_vits14'][1:])
    for p in vit.parameters():
        torch.nn.init.normal_(p, std=0.02)
    encode = model.Encoder('dinov2_vits14', vit, -1, 224, 224, 1).to(device).eval()
    x = torch.rand(B, 3, 224, 224, device=device)
    if compile:
        encode.compile()

    def run():
        with torch.autocast('cuda', torch.bfloat16):
            encode(x)
    return [f'{B / seconds(run):,.0f}']


def sync_row(share):
    net, z, a, known = big('small', 8, 4)
    step = stepper(net, our_loss(z, a), torch.bfloat16)
    for _ in range(2):
        step(share)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        step(share)
        torch.cuda.set_sync_debug_mode('default')
    return [sum('synchroniz' in str(w.message) for w in seen)]


def gpu_tables():
    """What matters most comes first: `limit` may cut off the rest."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no CUDA device: not measured'
    print(f'{name}, torch {torch.__version__}')
    print('\nA training step of the model that plans Push-T (width 384, 8 layers, direct): 64 clips of 6 frames, compiled')
    header('parameters', 'ms')
    row([], pusht_row, 2)

    print(f'\nA training step, 64 frames x 14x14 tokens of 384 channels, bfloat16, compiled, bootstrap {bootstrap}')
    header('size', 'remat', 'clips', 'parameters', 'ms', 'tokens/s', 'frames/s', 'MFU', 'peak GiB')
    train_rows('base', False, (8, 4, 2))
    train_rows('large', True, (8, 4))

    print('\nA rollout of `small`, 14x14 tokens of 384 channels, context 32, bfloat16: milliseconds per frame')
    header('K', 'contexts', 'candidates of each', 'frames', 'CUDA graphs', 'ms per frame')
    for K, B, M, T, graph in ((4, 1, 1, 8, True), (4, 1, 1, 256, True), (1, 1, 1, 256, True), (4, 1, 1, 1024, True),
                              (4, 1, 1, 64, False), (4, 1, 64, 8, True), (1, 1, 64, 8, True), (4, 64, 1, 8, True)):
        row([K, B, M, T, 'yes' if graph else 'no'], lambda: rollout_row(K, B, M, T, graph))

    print('\nDINOv2-S at 224 px, random weights, bfloat16: frames per second')
    header('how', 'frames per second')
    for how in ('eager', 'compiled'):
        row([how], lambda: encoder_row(how == 'compiled'))

    print('\nHost syncs in loss, backward pass and AdamW, counted by set_sync_debug_mode (0 wanted)')
    header('bootstrap', 'syncs')
    for share in (0.0, 0.25):
        row([share], lambda: sync_row(share))

    print('\nMore training steps, as above')
    header('size', 'remat', 'clips', 'parameters', 'ms', 'tokens/s', 'frames/s', 'MFU', 'peak GiB')
    train_rows('base', True, (8, 4))
    train_rows('large', False, (4, 2, 1))
    train_rows('small', False, (16, 8))

    print('\nAgreement with the plain float32 kernel: largest error / largest value')
    header('path', 'prediction', 'gradient')
    f32, bf16 = torch.float32, torch.bfloat16
    for kernel, dtype, compile, remat in (('plain', bf16, False, False), ('plain', bf16, True, False),
                                          ('flex', f32, True, False), ('flex', bf16, True, False),
                                          ('flex', bf16, True, True)):
        text = f'{kernel}, {str(dtype)[6:]}' + ', compiled' * compile + ', remat' * remat
        row([text], lambda: agreement(kernel, dtype, compile, remat), 2)
    for graph, dtype in ((False, f32), (True, f32), (True, bf16)):
        row([f'rollout, {str(dtype)[6:]}' + ', CUDA graphs' * graph], lambda: agreement_rollout(graph, dtype), 2)


if device == 'cuda':
    gpu_tables()
else:
    peer = importlib.util.find_spec('dreamer4') is not None
    print(f'torch {torch.__version__}, {threads} thread' + ('' if peer else f'; no peer. For its rows: {INSTALL}'))
    if 'train' in parts.split(','):
        train_table(peer)
    if 'rollout' in parts.split(','):
        rollout_table(peer)
