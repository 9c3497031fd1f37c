"""
Seconds per plan: ours, beside the same search without a cache and with a predictor as in DINO-WM, of the same size.

    python tests/bench_plan.py                          # one thread of a CPU, scaled down; four minutes of an idle core
    python tests/bench_plan.py --tokens=64 --dtype=float32
    python tests/bench_plan.py --device=cuda            # in full, and a small plan within 100 ms; minutes on an H100

A plan is plan.plan with cem: 300 candidates x 10 iterations x 5 steps, 2 frames of context, K = 1. All contestants run
that function and take turns in every round; they differ in how the candidates are imagined:
  ours    the context once for all candidates, then its cache
  naive   the same model without a cache, all frames so far anew for every new one; its costs are ours
  dots    DINO-WM's predictor (arXiv:2411.04983): a ViT over the tokens of the last 3 frames, no cache; logits in memory
  sdpa    the same with torch's scaled_dot_product_attention
On a CPU ratios are of CPU time, which other processes disturb less.
"""
import itertools
import os
import statistics
import sys
import time
import types

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
import data  # noqa: E402, from the root
import model  # noqa: E402
import plan  # noqa: E402

# --------------------------------------------------------------------------------------------------------------------
device = 'auto'
dtype = 'auto'              # float32 or bfloat16; auto as in plan.py: bfloat16 where the hardware multiplies it
threads = 1                 # where the CPU is measured; with more, other processes on the machine decide
size = ''                   # as in train.py; '' = nano on a CPU, on CUDA small at width 384 (19M, as DINO-WM's)
objective = 'shortcut'      # or direct, which has no pass that commits a frame
tokens = '64,196'           # of a frame; squares
candidates = 300
iterations = 10
horizon = 5
samples = 0                 # candidates really measured, for one iteration; 0 = 32 on a CPU, on CUDA the whole plan
chunks = ''                 # candidates imagined at once, the same for all; '' = 4,16 on a CPU, all on CUDA
rounds = 3
seed = 0
config = data.override(globals(), sys.argv[1:])
# --------------------------------------------------------------------------------------------------------------------

D = 384             # DINOv2-S
A = 10              # Push-T with a frameskip of 5
Tc = 2              # frames of context
WINDOW = 3          # DINO-WM's
EMBED = 10          # DINO-WM's, of an action
device = data.pick_device(device)
cuda = device.type == 'cuda'
autocast = data.autocast(device, dtype)
run = iterations if cuda and not samples else 1         # iterations that are really measured
samples = samples or (candidates if cuda else 32)
chunks = [int(c) for c in (chunks or (str(candidates) if cuda else '4,16')).split(',')]
factor = candidates * iterations / (samples * run)
if not cuda:
    torch.set_num_threads(threads)


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def line(*cells):
    print('|', *(f'{c} |' for c in cells), flush=True)


def header(*cells):
    print()
    line(*cells)
    print('|---' * len(cells) + '|')


def build(N):
    shape = dict(width=384, heads=6) if cuda and not size else {}
    side = round(N ** 0.5)
    shape['objective'] = objective
    net = model.WorldModel(model.model_config(size or ('small' if cuda else 'nano'), D, (side, side), A, **shape))
    nn.init.normal_(net.head.weight, std=0.02)      # it starts at zero
    return net


class Block(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * 64 * heads, bias=False), nn.Linear(64 * heads, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x, mask, sdpa):
        B, L, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, L, 3, self.heads, 64).permute(2, 0, 3, 1, 4)
        if sdpa:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = (q @ k.transpose(-1, -2) * 64 ** -0.5).masked_fill(~mask, -torch.inf).softmax(dim=-1).type_as(v) @ v
        x = x + self.out(y.transpose(1, 2).reshape(B, L, -1))
        return x + self.mlp(x)


class Peer(nn.Module):
    """DINO-WM's predictor of some number of parameters: its width is that of the features and the action's embedding,
    its heads are 64 wide, its MLPs about twice as wide as all heads together, its depth 6 or, in small ones, less."""
    def __init__(self, N, parameters):
        super().__init__()
        C = D + EMBED
        left = parameters - WINDOW * N * C - A * EMBED
        units = left / (8 * C * 64)         # blocks of one head and an MLP of 128
        depth = min(6, max(1, round(units)))
        heads = max(1, round(units / depth))
        hidden = round((left / depth - 4 * C * 64 * heads) / (2 * C) / 8) * 8
        self.positions, self.embed = nn.Parameter(torch.randn(1, WINDOW * N, C)), nn.Linear(A, EMBED)
        self.blocks = nn.ModuleList(Block(C, heads, hidden) for _ in range(depth))
        self.norm, self.sdpa = nn.LayerNorm(C), False
        frame = torch.arange(WINDOW * N) // N
        self.register_buffer('mask', frame[:, None] >= frame)
        self.graphs, self.last = {}, []         # half_weights looks at them
        self.config = {'state_dim': 0}          # plan.cost_weights does

    def forward(self, z, a):
        """z (B, T, N, D), a (B, T, A) with a[:, t] what follows z[:, t] -> the next frames (B, T, N, D)."""
        B, T, N, _ = z.shape
        x = torch.cat((z, self.embed(a).type_as(z)[:, :, None].expand(-1, -1, N, -1)), dim=-1).flatten(1, 2)
        x = x + self.positions[:, :T * N]
        for block in self.blocks:
            x = block(x, self.mask[:T * N, :T * N], self.sdpa)
        return self.norm(x).unflatten(1, (T, N))[..., :D].float()


def peer_rollout(net, z, a, *_, **__):
    z = z.repeat_interleave(len(a) // len(z), dim=0)
    for t in range(Tc, a.shape[1]):
        seen = slice(max(0, t - WINDOW), t)
        z = torch.cat((z, net(z[:, seen], a[:, seen.start + 1:t + 1])[:, -1:]), dim=1)
    return z[:, Tc:]


def naive_rollout(net, z, a, a_mask, K, seed, **_):
    """What model.rollout computes at K = 1."""
    direct = net.config['objective'] == 'direct'
    level, d_past = model.context_levels(net.config, 0.9)
    M = len(a) // len(z)
    generator = torch.Generator(z.device).manual_seed(hash((seed, 1)) % 2 ** 32)
    eps = torch.randn(z.shape, generator=generator, device=z.device)
    past = z if direct else level * z + (1 - level) * eps
    past = past.repeat_interleave(M, dim=0)
    generator.manual_seed(seed)
    out = []
    for t in range(Tc, a.shape[1]):
        noise = torch.randn(2, *z[:, :1].shape, generator=generator, device=z.device)
        begin, eps = noise.repeat_interleave(M, dim=1)
        tau = torch.full((len(a), t + 1), level, device=z.device)
        d = torch.full_like(tau, d_past)
        if direct:          # sees the frame before in the place of each
            seen = torch.cat((torch.zeros_like(begin), past), dim=1)
            tau[:, 0] = 0
            tau[:, 1:] = 1
        else:
            seen = torch.cat((past, begin), dim=1)
            tau[:, -1] = 0
            d[:, -1] = 1
        new = net(seen, tau, d, a[:, :t + 1], a_mask[:, :t + 1])[:, -1:].type_as(past)
        out.append(new)
        past = torch.cat((past, new if direct else level * new + (1 - level) * eps), dim=1)
    return torch.cat(out, dim=1)


ROLLOUT = dict(ours=model.rollout, naive=naive_rollout, dots=peer_rollout, sdpa=peer_rollout)


def search(who, net, world, fast, method='cem', samples=samples, iterations=run, elites=0, chunk=candidates,
           mean=None, carried=None):
    """plan.plan in the dtype of this run, or fast=False in float32."""
    plan.remember = model.remember if who == 'ours' else lambda *_, **__: None
    plan.rollout = ROLLOUT[who]
    net.sdpa = who == 'sdpa'
    o = types.SimpleNamespace(**plan.config | dict(
        horizon=horizon, method=method, K=1, cost='last', samples=samples, iterations=iterations, chunk=chunk,
        elites=elites or max(2, samples // 10)))
    with autocast if fast else data.autocast(device, 'float32'):
        return plan.plan(net, *world, o, seed=seed, mean=mean, carried=carried)


@torch.no_grad()
def imagined(who, net, world, fast=False):
    """Costs of a few plans, and the latents that they lead to."""
    actions = torch.randn(1, 6, horizon, A, generator=torch.Generator().manual_seed(seed)).to(device)
    info = search(who, net, world, fast, samples=2, iterations=1)[1]
    with autocast if fast else data.autocast(device, 'float32'):
        z = info['imagine'](actions).float()
    return (z[:, :, -1] - world[2][:, None]).square().mean(dim=(2, 3)), z


def off(got, want):
    """Largest errors of costs, in their standard deviation, and of latents, relative to the largest."""
    return f'{(got[0] - want[0]).abs().max() / want[0].std():.0e}, {(got[1] - want[1]).abs().max() / want[1].max():.0e}'


@torch.no_grad()
def flops(who, net, world):
    """FLOPs of a whole plan, from plans of 2 and of 4 candidates, on the CPU: no kernel of a GPU hides them there."""
    counts = []
    for n in (2, 4):
        with FlopCounterMode(display=False) as counter:
            search(who, net, world, False, samples=n, iterations=1)
        counts.append(counter.get_total_flops())
    each = (counts[1] - counts[0]) / 2
    return counts[0] - 2 * each + each * candidates * iterations


def measured(f):
    """Wall and CPU seconds of f, and the peak of GPU memory in GiB."""
    sync = torch.cuda.synchronize if cuda else lambda: None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    sync()
    wall, cpu = time.perf_counter(), time.process_time()
    f()
    sync()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall, cpu, torch.cuda.max_memory_allocated() / 2 ** 30 if cuda else 0.0


def spread(values):
    return '{:.4g} ({:.4g}-{:.4g})'.format(statistics.median(values), min(values), max(values))


name = torch.cuda.get_device_name() if cuda else f'CPU ({torch.backends.cpu.get_cpu_capability()}), {threads} thread'
text = (f'{name}, torch {torch.__version__}, {"bfloat16" if autocast._enabled else "float32"}\nA plan: {candidates} '
        f'candidates x {iterations} iterations x {horizon} steps; measured: {samples} x {run}, so times {factor:g}')
print(text)
rows = []
small = []
totals = []
basis = 0 if cuda else 1        # ratios are of wall or of CPU time
for N in map(int, tokens.split(',')):
    torch.manual_seed(seed)
    ours = build(N).eval().requires_grad_(False)
    peer = Peer(N, parameters(ours)).eval().requires_grad_(False)
    nets = dict(ours=ours, naive=ours, dots=peer, sdpa=peer)
    counts = parameters(ours), parameters(peer)
    attn = [x.attn for x in ours.layers]
    print(f'\n{N} tokens. Parameters: ours {counts[0]:,}, {ours.config["layers"]} layers of width '
          f'{ours.config["width"]}; the peer {counts[1]:,}, {len(peer.blocks)} of width {D + EMBED} with '
          f'{64 * peer.blocks[0].heads} in attention and {peer.blocks[0].mlp[1].out_features} in the MLP')
    assert abs(counts[1] / counts[0] - 1) < 0.05
    world = [torch.randn(1, Tc, N, D), torch.randn(1, Tc, A), torch.randn(1, N, D)]
    ours.stats = peer.stats = {'z_std': torch.ones(N, D)}
    work = {who: flops(who, nets[who], world) for who in ('ours', 'naive', 'dots')}
    work['sdpa'] = work['dots']         # which the counter does not see on a CPU
    ours.stats = peer.stats = {'z_std': torch.ones(N, D, device=device)}
    ours.to(device)
    peer.to(device)
    world = [x.to(device) for x in world]
    for x in attn:
        x.kernel = 'plain'              # on CUDA the other would be compiled for every shape of this check
    want, naive, dots, sdpa = (imagined(who, nets[who], world) for who in nets)
    print(f'Largest errors for the same actions, of costs (in their std) and latents (of the largest), float32: naive '
          f'to ours {off(naive, want)}; sdpa to dots {off(sdpa, dots)}')
    for got, right in ((naive, want), (sdpa, dots)):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)
    if autocast._enabled:
        for net in (ours, peer):
            model.half_weights(net, torch.bfloat16)
        print(f'bfloat16: ours to float32 {off(imagined("ours", ours, world, True), want)}')
    ours.graphs.clear()
    for x in attn:
        x.kernel = 'auto'

    def case(who, chunk, times=1):
        return lambda: search(who, nets[who], world, True, samples=samples * times, iterations=run * times, chunk=chunk)

    cases = {(who, chunk): case(who, chunk) for chunk, who in itertools.product(chunks, nets)}
    for who, chunk in cases:        # compiles, captures, warms up
        search(who, nets[who], world, True, samples=samples if cuda else 4, iterations=1, chunk=chunk)
    got = {key: [] for key in cases}
    for _ in range(rounds):
        for key, f in cases.items():
            got[key].append(measured(f))
    middle = {key: statistics.median(list(zip(*times))[basis]) for key, times in got.items()}
    if not rows and not cuda:       # at the first number of tokens
        four = {who: measured(case(who, chunks[-1], 2))[1] / middle[who, chunks[-1]] for who in nets}
        print('Twice the candidates and twice the iterations take so many times as long (4 wanted):',
              ', '.join(f'{who} {ratio:.1f}' for who, ratio in four.items()))
    for (who, chunk), times in got.items():
        wall, cpu, peak = zip(*times)
        rows.append([N, who, chunk, spread(wall), spread([t * factor for t in (wall, cpu)[basis]]),
                     f'{middle[who, chunk] / middle["ours", chunk]:.2f}', f'{work[who] / 1e12:.1f}',
                     f'{work[who] / work["ours"]:.2f}', f'{work[who] / factor / middle[who, chunk] / 1e9:,.0f}',
                     f'{max(peak):.1f}' if cuda else '-'])
    best = {}
    for who in nets:
        best[who] = min(middle[who, chunk] for chunk in chunks)
    faster = min(best['dots'], best['sdpa'])
    totals.append([N, f'{best["ours"] * factor:.4g}', f'{best["naive"] / best["ours"]:.2f}',
                   f'{faster / best["ours"]:.2f} ({"dots" if faster == best["dots"] else "sdpa"})'])

    # a small plan, warm: the rest of the last one and of its elites
    options = dict(method='icem', samples=64, elites=8, iterations=3, chunk=chunks[-1])
    old, info = search('ours', ours, world, True, **options)
    warm = dict(mean=torch.cat((old[:, 1:], old[:, -1:]), dim=1), carried=info['elites'][:, :, 1:])
    for who in ('ours', 'sdpa') if cuda else ['ours']:
        times = [measured(lambda: search(who, nets[who], world, True, **options, **warm))[0] * 1000
                 for _ in range(1 + rounds if cuda else 1)]
        small.append([N, who, spread(times[cuda:])])

print(f'\n{text}. Median (min-max) of {rounds} rounds')
header('tokens', 'who', 'chunk', 'wall seconds measured', f'{"wall" if cuda else "CPU"} seconds per plan',
       'ratio to ours', 'TFLOP per plan', 'ratio to ours', 'GFLOP/s', 'peak GiB')
for row in rows:
    line(*row)
print('\nEach at its best chunk; the target is 4 times ours at least for naive')
header('tokens', 'ours, seconds per plan', 'naive / ours', 'the faster peer / ours')
for row in totals:
    line(*row)
print('\nicem, 64 samples, 3 iterations, warm: wall milliseconds; the target is 100 on a GPU')
header('tokens', 'who', 'ms')
for row in small:
    line(*row)
