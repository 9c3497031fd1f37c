"""
Train a world model on LeRobot datasets.

    python train.py                                              # the demo world: minutes on a laptop, no download
    python train.py --labelled=path/to/dataset --encoder=dinov2_vits14 --frame_height=112 --size=tiny
    torchrun --nproc_per_node=8 train.py --batch_size=64 ...     # batch_size is the total over all processes
    python train.py --resume=True ...                            # goes on where out_dir stopped, bit for bit

Leaves out_dir/ckpt.safetensors, out_dir/optim.pt and out_dir/log.jsonl.
"""
import contextlib
import copy
import itertools
import json
import math
import os
import re
import signal
import sys
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from model import (WorldModel, compile_layers, flops_per_frame, half_weights, load, load_encoder, model_config, rollout,
                   save, shortcut_loss, standard, which_rows)

# --------------------------------------------------------------------------------------------------------------------
# data
labelled = 'demo/labelled'      # LeRobot datasets with actions: folders or names on the hub; 'a:2,b:1' weighs them
unlabelled = 'demo/unlabelled'  # datasets used without actions; demo/... is written if it is not there
labelled_share = 0.75           # share of labelled clips in every batch, where there are datasets of both kinds
camera = ''                     # 'front:3,wrist': each clip is of one, drawn by weight; '' = each dataset's first
action = ''                     # action keys, comma-separated; '' = action, else actions, else all action.*
action_mode = 'absolute'        # delta or delta_tool: motions of the poses in the action keys, base's or tool's frame
rotation = 'euler'              # of those poses: euler, quat_xyzw, quat_wxyz, rotvec, rot6d or rot6d_rows
fps = 0.0                       # frames per second that are taken from every dataset; 0 = all of them
frameskip = 2                   # dataset frames per model step
frames = 4                      # model steps of a training clip
long_frames = 0                 # of the clips of some steps, which hold fewer clips: the same number of tokens
long_share = 0.0                # share of the steps that see long clips
grow = 0.0                      # share of the run over which clips grow from 2 frames to all, by doubling
val_share = 0.1                 # share of the episodes that are held out for evaluation
max_bad = 0.01                  # share of episodes that may be unreadable before the run stops
cache = True                    # encode every frame once, at the start
cache_dir = ''                  # keep the latents in this folder (as python data.py --cache=True does); '' = in memory
store = 'float16'               # or int8: half the size
cache_gb = 50.0                 # files of hub datasets that are kept on disk
workers = 2                     # processes that decode video
# encoder
encoder = 'pixels'              # or dinov2_vits14 .. dinov3_vit7b16
encoder_path = ''               # weights, .safetensors or .pth; '' = from the hub
layer = -1                      # the block whose tokens are used, -1 = the last
frame_height = 0                # pixels that the encoder sees, 0 = its own
frame_width = 0                 # 0 = square
pool = 1                        # 2 averages 2x2 patches
channels = 0                    # principal components of the tokens that are kept, over the training frames; 0 = all
whiten = 0.3                    # latents are divided by std^whiten per channel: 1 = unit variance, 0 = one scale
# model (0 = as in the preset)
size = 'nano'                   # nano, tiny, small, base or large
width = 0
layers = 0
heads = 0
kv_heads = 0
registers = 2
context = 4                     # frames that the model sees, the current one included
time_every = 4                  # one layer of so many attends over time
wide_layers = 0                 # layers of an output head twice as wide; 0 = one linear map
k_max = 8                       # steps of the finest sampling
soft_cap = 50.0
action_on = 'all'               # all: add the action to every latent token; token: its own token alone
# objective
objective = 'shortcut'          # shortcut, diffusion or direct
bootstrap = 0.25                # share of rows that learn large steps from small ones
bootstrap_start = 0.4           # after this share of the run
teacher = 'same'                # weights that make the targets of large steps: same, or ema (the averaged ones)
tau_schedule = 'shift'          # signal levels: uniform, shift (towards noise) or logit-normal
tau_shift = 8.0                 # how far; 0 = sqrt(tokens x channels / 4096)
p_past = 0.7                    # share of clips whose frames before a random one are nearly clean
ramp = True                     # weigh errors by 0.1 + 0.9 tau
space = 'x'                     # errors of clean latents (x), or of velocities (v)
p_image = 0.1                   # share of clips seen as separate images
p_null = 0.05                   # share of clips with their actions hidden
self_forcing = 0.0              # share of the run, at its end, that also learns from the model's own K-step rollouts
# optimisation
batch_size = 32                 # clips per step, over all processes
micro_batch = 0                 # clips that a process computes at once, the rest of its share after them; 0 = all
max_steps = 2000
learning_rate = 2e-3            # after warmup steps
decay = 1.0                     # share of the run, at its end, over which it falls linearly to min_lr
min_lr = 5e-5
warmup = 50
weight_decay = 0.01             # on the matrices of linear layers
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0                 # 0 = none
ema = 0.995                     # decay of the averaged weights, which are evaluated and planned with
seed = 0
# evaluation and files
out_dir = 'out'
resume = False
eval_interval = 500             # steps
eval_clips = 64                 # of each kind, from held-out episodes
eval_context = 2                # frames that are given before the imagined ones
K = 4                           # denoising steps per imagined frame
save_interval = 500
log_interval = 50
# machine
device = 'auto'                 # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'                  # float32 or bfloat16 (autocast); auto = bfloat16 where the hardware multiplies it
compile = False                 # torch.compile: half a minute at the start, then up to twice as fast
remat = False                   # less memory, a third more time: the insides of layers are computed again, not kept
fsdp = False                    # shard weights, gradients and optimizer over the processes (FSDP2), not copy them (DDP)
config = data.override(globals(), sys.argv[1:])
if (labelled == 'demo/labelled') != (unlabelled == 'demo/unlabelled'):     # the demo world is all or nothing
    labelled, unlabelled = (v if not v.startswith('demo/') else '' for v in (labelled, unlabelled))
    config |= dict(labelled=labelled, unlabelled=unlabelled)
# --------------------------------------------------------------------------------------------------------------------

for name, choices in (('action_mode', ('absolute', 'delta', 'delta_tool')), ('rotation', data.ROTATIONS),
                      ('store', ('float16', 'int8')), ('tau_schedule', ('uniform', 'shift', 'logit-normal')),
                      ('teacher', ('same', 'ema')), ('space', ('x', 'v')), ('dtype', ('auto', 'float32', 'bfloat16'))):
    data.one_of(name, config[name], choices)
for name, least in (('frameskip', 1), ('frames', 2), ('batch_size', 1), ('max_steps', 1), ('eval_context', 1),
                    ('eval_clips', 2), ('eval_interval', 1), ('save_interval', 1), ('log_interval', 1), ('seed', 0),
                    ('workers', 0), ('warmup', 0), ('fps', 0), ('cache_gb', 0), ('micro_batch', 0), ('tau_shift', 0),
                    ('long_frames', 2 * (long_share > 0))):
    if not config[name] >= least:       # nor nan
        sys.exit(f'--{name}: wants at least {least}, got {config[name]}')
for name in ('labelled_share', 'val_share', 'whiten', 'bootstrap', 'bootstrap_start', 'p_image', 'p_null', 'p_past',
             'ema', 'max_bad', 'long_share', 'grow', 'decay', 'self_forcing'):
    if not 0 <= config[name] <= 1:
        sys.exit(f'--{name}: wants a number from 0 to 1, got {config[name]}')

# processes and devices
ddp = 'RANK' in os.environ
rank, world = (int(os.environ[k]) for k in ('RANK', 'WORLD_SIZE')) if ddp else (0, 1)
if long_frames and not long_share:
    sys.exit(f'--long_frames={long_frames}: wants --long_share, the share of the steps that see them')
for name, count in (('batch_size', batch_size), ('long_frames', batch_size * frames / (long_frames or frames))):
    if count % world:
        sys.exit(f'--{name}={config[name]}: {count:g} clips a step in all do not divide by {world} processes')
if fsdp and (not ddp or teacher == 'ema'):
    sys.exit(f'--fsdp=True: {"wants torchrun" if not ddp else "keeps no averaged model, which --teacher=ema wants"}')
device = data.pick_device(device, int(os.environ.get('LOCAL_RANK', 0)))
if device.type == 'cuda':
    torch.cuda.set_device(device)
if ddp:
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
autocast = data.autocast(device, dtype)
if fsdp:    # all forward passes of a step share the weights that autocast keeps: sharded layers then get no gradient
    autocast = torch.autocast(device.type, autocast.fast_dtype, autocast._enabled, cache_enabled=False)
say = print if rank == 0 else lambda *_, **__: None

ckpt, optim = os.path.join(out_dir, 'ckpt.safetensors'), os.path.join(out_dir, 'optim.pt')
if resume:
    for path in (ckpt, optim):
        if not os.path.isfile(path):
            sys.exit(f'--resume=True: there is no {path} to go on from')
    saved, old = load(ckpt, ema=False)
    for kind in ('labelled', 'unlabelled'):     # the same revisions of hub datasets, whatever is newest now
        now, then = ([(re.sub('@.*', '', name), w) for name, w in data.weighted(c[kind])] for c in (config, old))
        if now == then:
            config[kind] = old[kind]

# the encoder and the model's shape come first: they are checked before anything is written
encode = load_encoder(encoder, encoder_path, layer, frame_height, frame_width, pool).to(device)
if not 0 <= channels <= encode.dim:
    sys.exit(f'--channels={channels}: {encoder} has {encode.dim}, 0 keeps them all')
shape = model_config(size, channels or encode.dim, encode.grid, 0, width=width, layers=layers, heads=heads,
                     kv_heads=kv_heads, registers=registers, context=context, time_every=time_every,
                     wide_layers=wide_layers, k_max=k_max, soft_cap=soft_cap, action_on=action_on, objective=objective)
k_max = shape['k_max']
if K < 1 or K & (K - 1) or K > k_max:
    sys.exit(f'--K: wants a power of two up to k_max {k_max}, got {K}')
if os.path.abspath(out_dir) == os.getcwd():
    sys.exit(f'--out_dir={out_dir}: wants a folder of its own')

# data
sets = {}
for kind, episodes in (('labelled', 300), ('unlabelled', 100)):
    if config[kind] == f'demo/{kind}' and not os.path.isdir(config[kind]):
        if rank == 0:
            say(f'writing the demo world to {config[kind]}', flush=True)
            data.write_demo(config[kind], episodes, kind == 'labelled', seed=1 + (kind == 'unlabelled'))
        if ddp:
            dist.barrier()
    sets[kind] = data.open_sets(config[kind], camera, action if kind == 'labelled' else 'none', fps, action_mode,
                                rotation, cache_gb)
    config[kind] = ','.join(ds.name + f':{ds.weight}' * (ds.weight > 0) for ds in sets[kind])
for ds in sets['labelled']:
    if not ds.action_dim:
        sys.exit(f'--labelled: {ds.name} has no actions (features: {", ".join(ds.features)}); '
                 'name them by --action=..., or give it as --unlabelled')
if not sets['labelled'] + sets['unlabelled']:
    sys.exit('--labelled and --unlabelled are both empty: there is nothing to learn from')
clips, long = (data.Clips(sets['labelled'], sets['unlabelled'], T, frameskip, (encode.size, encode.width),
                          batch_size * frames // T // world, labelled_share, val_share, seed, rank, world)
               for T in (frames, long_frames or frames))
clips.count_faults({}, max_bad)
batches = data.Lengths(clips, long, long_share)
shape['action_dim'] = clips.A


@torch.no_grad()
def latents(x):
    """Raw latents (..., N, D) float32 of uint8 frames x (..., 3, H, W), on the device."""
    with autocast:
        z = [encode(part.to(device, non_blocking=True).float() / 255).float() for part in x.flatten(0, -4).split(64)]
    return torch.cat(z).unflatten(0, x.shape[:-3])


def normalised(batch):
    """z, a, a_mask, z_mask of a batch on the device."""
    z = batch['z'].to(device, non_blocking=True).float() if 'z' in batch else latents(batch['x'])
    return (standard(z, stats),
            *(batch[k].to(device, non_blocking=True) for k in ('a', 'a_mask', 'z_mask')))


if resume:
    fixed = (*sets, 'camera', 'action', 'action_mode', 'rotation', 'fps', 'frameskip', 'frames', 'long_frames',
             'long_share', 'val_share', 'labelled_share', 'batch_size', 'seed', 'encoder', 'layer', 'frame_height',
             'frame_width', 'pool', 'channels', 'whiten', 'size', 'objective', 'cache', 'store', 'cache_gb')
    for name, now, then in [(name, config[name], old.get(name)) for name in (*fixed, *config)]:
        if now != then and name in fixed:
            sys.exit(f'--{name}: {now!r} cannot go on from {ckpt}, which has {then!r}')
        if now != then and name != 'resume':
            say(f'resume: {name} was {then}, now {now}')
    if saved.config != shape:
        wrong = next(k for k in shape if saved.config.get(k) != shape[k])
        sys.exit(f'--{wrong}: {shape[wrong]} cannot go on from {ckpt}, which has {saved.config.get(wrong)}')
    stats = {k: v.to(device) for k, v in saved.stats.items()}
else:
    say('measuring the latents', flush=True)
    x = clips.sample(64, 16)
    if encoder == 'pixels':
        encode.fit(x.to(device).float() / 255)
    z = latents(x).flatten(0, -2)                                                         # (frames x N, width)
    stats = dict(z_mean=z.mean(dim=0))
    if channels:
        z = z - stats['z_mean']
        stats['z_basis'] = torch.linalg.eigh((z.T @ z).double().cpu())[1][:, -channels:].flip(1).float().to(device)
        every, z = z.square().sum(), z @ stats['z_basis']                                 # (frames x N, D)
        say(f'{channels} principal components hold {z.square().sum() / every:.1%} of the variance')
    std = z.std(dim=0).clamp(min=1e-6)
    std = std ** whiten * std.square().mean().sqrt() ** (1 - whiten)
    std *= (z.std(dim=0) / std).square().mean().sqrt()      # 1.0 is the variance of the data, whatever the exponent
    stats |= dict(z_std=std) | {f'a_{k}': v for k, v in clips.action_stats().items()}
    stats |= {f'encoder.{k}': v for k, v in encode.state_dict().items() if encoder == 'pixels'}
    del x, z
if encoder == 'pixels':
    encode.load_state_dict({k[8:]: v for k, v in stats.items() if k.startswith('encoder.')})
if compile and encoder != 'pixels':
    encode.compile()
if cache:
    clips.tokens = long.tokens = data.cached_latents(clips.sets, encode, device, autocast, cache_dir, store, workers,
                                                     rank, world)
held_out = clips.held_out(eval_context + 20, eval_clips)

# model and optimiser
torch.manual_seed(seed)
model = WorldModel(shape).to(device)
average = copy.deepcopy(model).requires_grad_(False).eval()
if resume:
    model.load_state_dict(saved.state_dict())
    average.load_state_dict(load(ckpt)[0].state_dict())
if compile:
    compile_layers(model)
model.remat = remat
run = model
if fsdp:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor
    # gathered once a step however often the teacher is called; and not one process alone, where one has bootstrap rows
    for block in (*model.layers, model):
        fully_shard(block, mesh=dist.init_device_mesh(device.type, (world,)), reshard_after_forward=False,
                    ignored_params={p for p in model.parameters() if not p.numel()})
elif ddp:
    # buffers are constants; their broadcast in every forward would hang where one process alone has bootstrap rows
    run = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False,
                                                    device_ids=[device.index] if device.type == 'cuda' else None)


def whole(x):
    """A dict of tensors, or one; what is sharded comes together on the CPU: all processes call it."""
    if isinstance(x, dict):
        return {k: whole(v) for k, v in x.items()}
    return x.full_tensor().cpu() if hasattr(x, 'full_tensor') else x


def shard(x, p):
    """This process's part of x, which is like parameter p."""
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None) if fsdp and x.dim() else x


params, kept = ([p for p in m.parameters() if p.numel()] for m in (model, average))
averages = [shard(p, q) for p, q in zip(kept, params)]
if fsdp:
    average.cpu()       # only evaluation and the checkpoint want it whole
matrices = {m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)}
optimizer = torch.optim.AdamW([dict(params=[p for p in params if p in matrices], weight_decay=weight_decay),
                               dict(params=[p for p in params if p not in matrices], weight_decay=0.0)],
                              lr=learning_rate, betas=(beta1, beta2), fused=device.type in ('cpu', 'cuda'))
rms = torch.ones(3, device=device)      # running mean squares of the loss terms: flow, bootstrap, self-forcing
step = 0
if resume:
    state = torch.load(optim, map_location=device, weights_only=True)
    if state['step'] != saved.step and os.path.isfile(optim + '.new'):      # killed between the two renames
        state = torch.load(optim + '.new', map_location=device, weights_only=True)
    if state['world'] != world:
        sys.exit(f'{optim} is of {state["world"]} processes, these are {world}: their batches differ')
    if state['step'] != saved.step:
        sys.exit(f'{optim} is of step {state["step"]}, {ckpt} of step {saved.step}: they do not belong together')
    order = [p for group in optimizer.param_groups for p in group['params']]
    state['optimizer']['state'] = {i: {k: shard(v, order[i]) for k, v in of.items()}
                                   for i, of in state['optimizer']['state'].items()}
    optimizer.load_state_dict(state['optimizer'])
    rms, step = state['rms'], state['step']
    del saved, state
elif rank == 0:
    if any(os.path.exists(os.path.join(out_dir, name)) for name in ('ckpt.safetensors', 'log.jsonl')):  # none is lost
        free = next(p for i in itertools.count(1) if not os.path.exists(p := f'{out_dir.rstrip("/")}.{i}'))
        os.rename(out_dir, free)
        print(f'{out_dir} held an earlier run: it is now {free}')
if rank == 0:
    os.makedirs(out_dir, exist_ok=True)
    journal = open(os.path.join(out_dir, 'log.jsonl'), 'a', buffering=1)
generator, peak = torch.Generator(device), data.peak_flops(device)
tokens_per_frame = registers + math.prod(encode.grid) + 2
for name, value in config.items():
    say(f'{name} = {value}')
say(f'{sum(p.numel() for p in params) / 1e6:.2f}M parameters, '
    f'{batch_size * frames * tokens_per_frame:,} tokens a step, {device}, '
    f'{"bfloat16" if autocast.fast_dtype == torch.bfloat16 and autocast._enabled else "float32"}, '
    f'torch {torch.__version__}', flush=True)


@torch.no_grad()
def evaluate():
    """{kind: {method: {horizon: mse}}} on held-out episodes with the averaged weights; padded frames do not count."""
    out, imagine = {}, average.to(device)
    if autocast._enabled:
        imagine = half_weights(copy.deepcopy(average), autocast.fast_dtype)
    for kind, batch in held_out.items():
        z, a, a_mask, z_mask = normalised(batch)
        ways = {'model': (a, a_mask)}
        if kind == 'labelled':
            # half a turn: neighbours are often of one episode, whose actions are alike
            ways |= {'shuffled': (a.roll(len(a) // 2, 0), a_mask), 'hidden': (a, torch.zeros_like(a_mask))}
        with autocast:
            found = {name: rollout(imagine, z[:, :eval_context], *way, K=K) for name, way in ways.items()}
        found['repeat'] = z[:, eval_context - 1:eval_context].expand(-1, 20, -1, -1)
        out[kind] = {name: {} for name in sorted(found)}
        for name, f in found.items():
            error = (f - z[:, eval_context:]).square().mean(dim=(2, 3))                   # (B, 20)
            for h in (1, 5, 10, 20):
                real = z_mask[:, eval_context + h - 1]
                out[kind][name][str(h)] = error[real, h - 1].mean().item() if real.any() else None
    return out


def noise(z, row):
    """Uniform (B, 4 + 3 T) and normal (B, T, N, D) numbers for a step's clips from row on, a function of seed, step and
    row alone: the same for any number of processes and size of micro-batches (self-forcing draws its own)."""
    u, eps = torch.empty(len(z), 4 + 3 * z.shape[1], device=device), torch.empty_like(z)
    for i in range(len(z)):
        generator.manual_seed(hash((seed, step, row + i)) % 2 ** 63)    # of whole numbers: the same in every process
        u[i].uniform_(generator=generator)
        eps[i].normal_(generator=generator)
    return u, eps


def audit(loss):
    """Ends the run where something does not learn or is not kept: what has a gradient, what the optimizer moves and
    what the checkpoint holds must be the same tensors."""
    names, keys = {p: name for name, p in model.named_parameters() if p.numel()}, model.state_dict().keys()
    moved = {p for group in optimizer.param_groups for p in group['params']}
    for p, name in names.items():
        wrong = ['gets no gradient: the loss does not depend on it'] * (p.grad is None) + \
            ['is not in the optimizer'] * (p not in moved) + ['is not in the checkpoint'] * (name not in keys)
        if wrong:
            sys.exit(f'model.{name} {wrong[0]}')
    nodes, seen = [loss.grad_fn], set()
    while nodes and not fsdp:       # shards are not the tensors that the loss was made of
        node = nodes.pop()
        if hasattr(node, 'variable') and node.variable not in names and node.variable.numel():
            sys.exit(f'a tensor of shape {tuple(node.variable.shape)} gets a gradient but is no parameter of the model:'
                     ' it would be neither trained nor saved')
        nodes += [after for after, _ in node.next_functions if after is not None and after not in seen]
        seen |= {*nodes}


def save_all():
    weights, state = whole(model.state_dict()), optimizer.state_dict()
    state['state'] = whole(state['state'])
    if rank == 0:
        save(ckpt + '.new', model, config, dict(average.named_parameters()), stats, step, weights)
        torch.save(dict(optimizer=state, rms=rms, step=step, world=world), optim + '.new')
        for path in (ckpt, optim):
            os.replace(path + '.new', path)


asked, stop = [], False
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: asked.append(True))
decoding = workers if cache_dir or not cache else 0       # latents in memory need no help
loader = iter(torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(step, max_steps),
                                          num_workers=decoding, pin_memory=device.type == 'cuda',
                                          multiprocessing_context='fork' if decoding else None))
bar = tqdm(total=max_steps, initial=step, disable=rank > 0 or not sys.stderr.isatty(), dynamic_ncols=True)
bad = torch.full((), -1, device=device)         # the first step whose loss is not finite, seen at the next sync
start = first = step
tokens, flops, clock = 0, 0.0, time.perf_counter()
while step < max_steps and not stop:
    batch = next(loader)
    clips.count_faults(batch, max_bad)
    kind, i = batches.which(step)
    doublings = math.ceil(math.log2(kind.T / 2)) * step / (grow * max_steps) if step < grow * max_steps else 20
    z, a, a_mask, z_mask = normalised({k: v[:, :2 << int(doublings)] for k, v in batch.items()})
    B, T = z.shape[:2]
    part, row = micro_batch or B, rank * B
    falling = max(1, min(decay * max_steps, max_steps - warmup))
    lr = learning_rate * (step + 1) / warmup if step < warmup else \
        min_lr + (learning_rate - min_lr) * min(1, (max_steps - step) / falling)
    for group in optimizer.param_groups:
        group['lr'] = lr
    boot = bootstrap if step >= bootstrap_start * max_steps else 0.0
    forced = T // 2 if step >= (1 - self_forcing) * max_steps else T        # frames from here on are its own
    # every term is a mean over the frames of all processes that count in it, however they are spread
    _, n, valid = which_rows(z_mask, objective, boot, first=i * B * world + row)
    count = torch.stack((*valid.sum(dim=(1, 2)), z_mask[:, forced:].sum())).float()
    if ddp:
        dist.all_reduce(count)
    terms = torch.zeros(5, device=device)       # flow, bootstrap, self-forcing, loss, tau
    for at in range(0, B, part):
        some, final = slice(at, at + part), at + part >= B
        if fsdp:
            model.set_requires_gradient_sync(final)
        with contextlib.nullcontext() if final or fsdp or not ddp else run.no_sync():
            with autocast:
                loss, metrics = shortcut_loss(
                    run, z[some], a[some], a_mask[some], z_mask[some], objective, k_max, boot, p_image, p_null,
                    tau_schedule, tau_shift, p_past, ramp, space, rms[:2], average if teacher == 'ema' else model,
                    i * B * world + row + at, noise(z[some], row + at), count[:2] / world)
                own = torch.zeros((), device=device)
                if forced < T:
                    own = rollout(model, z[some, :forced], a[some], a_mask[some], K, grad=True,
                                  seed=hash((seed, step, row + at, K)) % 2 ** 63) - z[some, forced:]
                    own = (own.square().mean(dim=(2, 3)) * z_mask[some, forced:]).sum() / count[2].clamp(min=1) * world
                    loss = loss + own / torch.maximum(rms[0], rms[2]).clamp(min=1e-12).sqrt()
            loss.backward()
        terms += torch.stack((metrics['flow'], metrics['bootstrap'], own.detach(), loss.detach(), metrics['tau']))
    if step == start:
        audit(loss)
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
    norm = norm.full_tensor() if fsdp else norm
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        torch._foreach_lerp_(averages, params, 1 - min(ema, (step + 1) / (step + 10)))
        if ddp:
            dist.all_reduce(terms)
            terms /= world
        rms = torch.where(count > 0, rms.lerp(terms[:3].square(), 0.05), rms)
        step += 1
        bad = torch.where((bad < 0) & ~(terms[3].isfinite() & norm.isfinite()), step, bad)
    # three forward passes, and two more for the teacher of bootstrap rows; not encoding, nor self-forcing
    flops += (3 * B + 2 * n) * T * flops_per_frame(shape, T)
    tokens += B * world * T * tokens_per_frame
    bar.update()

    if not ddp:
        stop = bool(asked)
    elif step % 10 == 0:                        # all processes stop at the same step, or the others wait forever
        flag = torch.tensor(float(len(asked)), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        stop = bool(flag)
    last = step == max_steps or stop
    if not last and all(step % n for n in (log_interval, save_interval, eval_interval)):
        continue                                # nobody has waited for the device so far
    if bad >= 0:
        sys.exit(f'step {bad.item()}: the loss or its gradient is not finite; nothing has been saved since')
    seconds = time.perf_counter() - clock
    flow, boots, own, loss, tau = terms.tolist()
    entry = dict(step=step, loss=loss, flow=flow, bootstrap=boots if count[1] > 0 else None,
                 self_forcing=own if forced < T else None, tau=tau if count[0] > 0 else None, lr=lr,
                 tokens_per_s=tokens / seconds, mfu=flops / seconds / peak if peak else None,
                 memory_gb=torch.cuda.max_memory_allocated(device) / 1e9 if device.type == 'cuda' else None)
    seconds /= step - first
    if rank == 0:
        print(json.dumps(entry), file=journal)
        bar.set_postfix_str(f'loss {loss:.3f}') if not bar.disable else print(
            ', '.join(f'{k} {v:,.0f}' if k == 'tokens_per_s' else f'{k} {v:.4g}' for k, v in entry.items()
                      if v is not None)
            + f', {1000 * seconds:.0f} ms/step, {(max_steps - step) * seconds / 60:.1f} min left', flush=True)
    if fsdp and (step % save_interval == 0 or step % eval_interval == 0 or last):
        for p, q in zip(kept, averages):
            p.copy_(whole(q))
    if step % save_interval == 0 or last:
        save_all()
    if rank == 0 and (step % eval_interval == 0 or step == max_steps) and not stop:
        val = evaluate()
        print(json.dumps(dict(step=step, val=val)), file=journal)
        for kind, ways in val.items():
            bar.write(f'step {step}: {kind} error at 1/5/10/20 steps: ' + ', '.join(
                f'{name} ' + '/'.join('-' if e is None else f'{e:.3f}' for e in errors.values())
                for name, errors in ways.items()), file=sys.stdout)
        sys.stdout.flush()
    first, tokens, flops, clock = step, 0, 0.0, time.perf_counter()
bar.close()
say(f'stopped at step {step}: python train.py --resume=True goes on' if step < max_steps else f'trained {step} steps')
say(f'wrote {ckpt}, {optim} and {os.path.join(out_dir, "log.jsonl")}')
if ddp:
    dist.destroy_process_group()
