"""
Seconds per plan: ours, beside the same search without a cache and with flat attention as in DINO-WM, of the same size.

    python tests/bench_plan.py                          # one thread of a CPU, scaled down; four minutes of an idle core
    python tests/bench_plan.py --tokens=64 --dtype=float32
    python tests/bench_plan.py --device=cuda            # in full, and a small plan within 100 ms; minutes on an H100

A plan is plan.plan with cem: 300 candidates x 10 iterations x 5 steps, 2 frames of context, K = 1. All contestants run
that function and take turns in every round; they differ in how the candidates are imagined:
  ours    the context once for all candidates, then its cache
  naive   the same model without a cache, all frames so far anew for every new one; its costs are ours
  flat    a model of the same size whose layers attend over all tokens of the last 3 frames, --attention=flat and
          --objective=direct, with its cache
  dino    the same as DINO-WM imagines (arXiv:2411.04983): the last 3 frames anew for every new one, no cache
DINO-WM's own predictor has LayerNorm, GELU, no QK-norm nor soft cap, learned positions, as many key heads as heads, the
action as ten more numbers of each token, and no token beside the patches; flat has two, for the action and the step.
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


def build(N, **shape):
    if cuda and not size:
        shape |= dict(width=384, heads=6)
    side = round(N ** 0.5)
    net = model.WorldModel(model.model_config(size or ('small' if cuda else 'nano'), D, (side, side), A, **shape))
    nn.init.normal_(net.head.weight, std=0.02)      # it starts at zero
    return net


def dino_rollout(net, z, a, a_mask, *_, **__):
    z = z.repeat_interleave(len(a) // len(z), dim=0)
    for t in range(Tc, a.shape[1]):
        seen = slice(max(0, t - WINDOW), t)
        one = torch.ones(z[:, seen].shape[:2], device=z.device)
        led = slice(seen.start + 1, t + 1)
        new = net(z[:, seen], one, one, a[:, led], a_mask[:, led])[:, -1:]
        z = torch.cat((z, new.type_as(z)), dim=1)
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
            d[:] = 1
        else:
            seen = torch.cat((past, begin), dim=1)
            tau[:, -1] = 0
            d[:, -1] = 1
        new = net(seen, tau, d, a[:, :t + 1], a_mask[:, :t + 1])[:, -1:].type_as(past)
        out.append(new)
        past = torch.cat((past, new if direct else level * new + (1 - level) * eps), dim=1)
    return torch.cat(out, dim=1)


ROLLOUT = dict(ours=model.rollout, naive=naive_rollout, flat=model.rollout, dino=dino_rollout)


def search(who, net, world, fast, method='cem', samples=samples, iterations=run, elites=0, chunk=candidates,
           mean=None, carried=None):
    """plan.plan in the dtype of this run, or fast=False in float32."""
    plan.remember = model.remember if who in ('ours', 'flat') else lambda *_, **__: None
    plan.rollout = ROLLOUT[who]
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
    ours = build(N, objective=objective).eval().requires_grad_(False)
    flat = build(N, attention='flat', objective='direct', context=WINDOW, registers=0).eval().requires_grad_(False)
    nets = dict(ours=ours, naive=ours, flat=flat, dino=flat)
    print(f'\n{N} tokens, {ours.config["layers"]} layers of width {ours.config["width"]}. Parameters: ours '
          f'{parameters(ours):,}, flat {parameters(flat):,}')
    attn = [x.attn for net in (ours, flat) for x in net.layers]
    world = [torch.randn(1, Tc, N, D), torch.randn(1, Tc, A), torch.randn(1, N, D)]
    ours.stats = flat.stats = {'z_std': torch.ones(N, D)}
    work = {who: flops(who, net, world) for who, net in nets.items()}
    ours.stats = flat.stats = {'z_std': torch.ones(N, D, device=device)}
    ours.to(device)
    flat.to(device)
    world = [x.to(device) for x in world]
    for x in attn:
        x.kernel = 'plain'              # on CUDA the other would be compiled for every shape of this check
    for who, net in ('ours', ours), ('flat', flat):
        want, naive = imagined(who, net, world), imagined('naive', net, world)
        print(f'Largest errors of naive to {who} for the same actions, of costs (in their std) and latents (of the '
              f'largest), float32: {off(naive, want)}')
        torch.testing.assert_close(naive, want, rtol=1e-4, atol=1e-4)
    want = imagined('ours', ours, world)
    if autocast._enabled:
        for net in (ours, flat):
            model.half_weights(net, torch.bfloat16)
        print(f'bfloat16: ours to float32 {off(imagined("ours", ours, world, True), want)}')
    for net in (ours, flat):
        net.graphs.clear()
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
    totals.append([N, f'{best["ours"] * factor:.4g}', *(f'{best[who] / best["ours"]:.2f}' for who in [*nets][1:])])

    # a small plan, warm: the rest of the last one and of its elites
    options = dict(method='icem', samples=64, elites=8, iterations=3, chunk=chunks[-1])
    old, info = search('ours', ours, world, True, **options)
    warm = dict(mean=torch.cat((old[:, 1:], old[:, -1:]), dim=1), carried=info['elites'][:, :, 1:])
    for who in ('ours', 'dino') if cuda else ['ours']:
        times = [measured(lambda: search(who, nets[who], world, True, **options, **warm))[0] * 1000
                 for _ in range(1 + rounds if cuda else 1)]
        small.append([N, who, spread(times[cuda:])])

print(f'\n{text}. Median (min-max) of {rounds} rounds')
header('tokens', 'who', 'chunk', 'wall seconds measured', f'{"wall" if cuda else "CPU"} seconds per plan',
       'ratio to ours', 'TFLOP per plan', 'ratio to ours', 'GFLOP/s', 'peak GiB')
for row in rows:
    line(*row)
print('\nEach at its best chunk; the target is 4 times ours at least for naive')
header('tokens', 'ours, seconds per plan', 'naive / ours', 'flat / ours', 'dino / ours')
for row in totals:
    line(*row)
print('\nicem, 64 samples, 3 iterations, warm: wall milliseconds; the target is 100 on a GPU')
header('tokens', 'who', 'ms')
for row in small:
    line(*row)
