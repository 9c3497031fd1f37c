"""
Train a world model on LeRobot datasets.

    python train.py                     # the demo world: minutes on a laptop, no download
    python train.py --preset=robot --labelled=path/to/dataset
    python train.py --resume=True --push=me/robot       # puts it on the hub
    torchrun --nproc_per_node=8 train.py --batch_size=64 ...    # the total of all processes
    python train.py --resume=True ...   # goes on where out_dir stopped, bit for bit
    python train.py --init=ckpt.safetensors --labelled=...      # fine-tunes on another robot

Leaves out_dir/ckpt.safetensors, out_dir/optim.pt and out_dir/log.jsonl. What clips a step sees does
not depend on the number of processes: a run may go on with another, but for the last digits of
sums and the noise of what --self_forcing and --dream imagine. torchrun --max-restarts goes on by
itself.
"""
import copy
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import uuid

import data     # before torch: it sets how threads wait

import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import HfApi
from torch.utils.data import DataLoader
from tqdm import tqdm

from model import (MODEL_DEFAULTS, OBJECTIVE, Probe, WorldModel, add_state, check_steps, clip_noise,
                   compile_layers, components, contrast, cost_weights, dream_errors, encode_frames,
                   flops_per_frame, frame_errors, frame_tokens, full_turn, half_weights, load,
                   load_encoder, model_config, one_line, policy_errors, restore_encoder,
                   restore_probe, rollout, save, shortcut_loss, standard, term_scale, which_rows)

if 'RANK' in os.environ:    # torchrun's: the others wait until the first has checked all
    meeting = next(dist.rendezvous('env://'))[0]
    # after --max-restarts it still holds what the processes before have said
    attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
    meeting = dist.PrefixStore(attempt, meeting)
    if os.environ['RANK'] != '0':
        meeting.wait(['checked'])

# --------------------------------------------------------------------------------------------------
preset = ''                     # robot or thesis, see PRESETS; other options go before it
# data
labelled = 'demo/labelled'      # LeRobot datasets: folders or names on the hub; 'a:2,b:1' weighs
unlabelled = 'demo/unlabelled'  # used without actions; demo/... is written if it is not there
labelled_share = 0.75           # of the clips of a batch, where there are datasets of both kinds
camera = ''                     # 'front:3,wrist': one per clip, by weight; '' = a dataset's first
action = ''                     # keys, with commas; '' = action, else actions, else all action.*
action_mode = 'absolute'        # delta, delta_tool: motions of poses in the base's, tool's frame
action_pca = 0                  # principal components of a long model step's actions, which then
                                # stand for them: for plan.py --coarse; 0 = all actions
rotation = 'euler'              # of poses: euler, quat_xyzw, quat_wxyz, rotvec, rot6d or rot6d_rows
state = ''                      # keys, numbers of them (observation.state.elbow), one more token:
                                # as they are, so that angles that go round want sine and cosine
probe = ''                      # likewise: read from latents at the end, for errors with units
fps = 0.0                       # frames per second that are taken from every dataset; 0 = all
frameskip = 2                   # dataset frames per model step; 0 = five steps a second
frames = 4                      # model steps of a training clip
long_frames = 0                 # of the clips of some steps, which hold fewer clips: as many tokens
long_share = 0.0                # share of the steps that see long clips
grow = 0.0                      # share of the run over which clips grow from 2 frames, by doubling
val_share = 0.1                 # share of the episodes that are held out for evaluation
max_bad = 0.01                  # share of episodes that may be unreadable before the run stops
augment = 0.0                   # share of the clips that are cropped and in other light, as frames
cache = True                    # encode every frame once, at the start
cache_dir = ''                  # keeps the latents, as data.py --cache=True does; '' = in memory
store = 'float16'               # or int8: half the size
cache_gb = 50.0                 # files of hub datasets that are kept on disk
workers = 2                     # processes that decode video
# encoder
encoder = 'pixels'              # or dinov2_vits14 .. dinov3_vit7b16 (_cls: the class token alone),
                                # vjepa2_vitl16 .. vitg16_384, siglip2_base16_224 .. giant-opt16_384
encoder_path = ''               # weights, .safetensors or .pth; '' = from the hub
layer = -1                      # the block whose tokens are used, -1 = the last
frame_height = 0                # pixels that the encoder sees, 0 = its own
frame_width = 0                 # 0 = square
pool = 1                        # 2 averages 2x2 patches
channels = 0                    # numbers of a token that are kept; 0 = all
project = 'pca'                 # which: principal components, or learned: linear maps there and
                                # back, fitted to the latents before all else
align = ''                      # infonce or regress: so that, pooled, they tell --probe's numbers
align_weight = 1.0              # beside what comes back
align_dynamics = 0.1            # weight of that in training, where imagined frames are to tell it,
                                # too (--self_forcing); 0 = none
whiten = 0.3                    # latents are divided by std^whiten per channel: 0 = one scale
# model (0 = as in the preset)
size = 'nano'                   # nano, tiny, small, base or large
width = 0
layers = 0
heads = 0
kv_heads = 0
registers = 2
context = 4                     # frames that the model sees, the current one included
memory = 0                      # beyond them it sees every so-manyth frame, 0 = none ...
memory_frames = 4               # ... and so many of these at most
attention = 'factored'          # flat: every layer attends over all tokens of the frames it sees
time_every = 4                  # else, one layer of so many attends over time
wide_layers = 0                 # layers of an output head twice as wide; 0 = one linear map
k_max = 8                       # steps of the finest sampling
soft_cap = 50.0
policy = False                  # a head learns to act without a search (plan.py --method=policy)
policy_steps = 50               # goals of its training lie up to so many model steps after a clip
relabel = 0.0                   # share of the clips without actions that get the policy's, from a
                                # frame to the next, in the second half of the run, or of what is
                                # before --dream
relabel_weight = 1.0            # of a frame of theirs in the loss
dream = 0.0                     # share of the run, its last, in which the world model rests and the
                                # policy learns inside it, beside the data
dream_steps = 5                 # that are imagined for it; 0 = it learns from the data alone
support = 1.0                   # weight of the data beside the dream: it keeps actions where the
                                # model knows what they do
text = False                    # the model is told what is done, in words: the datasets' tasks
action_on = 'all'               # all: add the action to the latent tokens too; token: its own alone
# objective
objective = 'shortcut'          # shortcut, diffusion or direct
bootstrap = 0.25                # share of rows that learn large steps from small ones
bootstrap_start = 0.4           # after this share of the run
tau_schedule = 'shift'          # signal levels: uniform, shift (towards noise) or logit-normal
tau_shift = 8.0                 # how far; 0 = sqrt(tokens x channels / 4096)
p_past = 0.7                    # share of clips whose frames before a random one are nearly clean
ramp = True                     # weigh errors by 0.1 + 0.9 tau
space = 'x'                     # errors of clean latents (x), or of velocities (v)
p_image = 0.1                   # share of clips seen as separate images
p_null = 0.05                   # share of clips with their actions hidden
self_forcing = 0.0              # share of the run, its last, that learns from rollouts as well
# optimisation
batch_size = 32                 # clips per step, over all processes
micro_batch = 0                 # clips that a process computes at once; 0 = all of its share
max_steps = 1200
learning_rate = 4e-3            # after warmup steps
policy_rate = 0.0               # the policy's, which warms up and falls likewise; 0 = the same
decay = 1.0                     # share of the run, its last, over which it falls linearly to min_lr
min_lr = 5e-5                   # a lower learning_rate stays as it is
warmup = 50
weight_decay = 0.01             # on the matrices of linear layers
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0                 # 0 = none
ema = 0.995                     # of the averaged weights, which are evaluated and planned with
skip_nonfinite = 0              # steps that may be left out as their loss or gradient is not finite
seed = 0
# evaluation and files
out_dir = 'out'
resume = False
init = ''                       # a checkpoint to begin with: its weights, and its encoder and
                                # shape; a file, or owner/name of the hub
push = ''                       # owner/name on the hub that gets the checkpoint and a card of it
license = ''                    # that its card names, such as mit; '' = unknown
wandb = ''                      # a project of Weights & Biases that gets what log.jsonl does
eval_interval = 600             # steps
eval_clips = 64                 # of each kind, from held-out episodes
eval_context = 2                # frames that are given before the imagined ones
K = 4                           # denoising steps per imagined frame
save_interval = 500
log_interval = 50
# machine
device = 'auto'                 # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'                  # float32 or bfloat16 (autocast); auto = bfloat16 where it is fast
compile = False                 # torch.compile: half a minute at first, then up to twice as fast
remat = False                   # a third more time, less memory: computes insides of layers again
fsdp = False                    # shards weights and optimizer (FSDP2) where DDP copies them
PRESETS = {
    'robot': dict(              # one robot, hours of data, one GPU
        encoder='dinov2_vits14', frame_height=224, pool=2, whiten=1.0, size='small', registers=4,
        objective='direct', frames=16, context=16, frameskip=0, k_max=64, tau_shift=0.0,
        batch_size=16, learning_rate=1e-3, max_steps=20000, warmup=500, decay=0.3,
        eval_interval=1000, save_interval=1000),
    'thesis': dict(             # Dreamer 4 on DINOv3, nearly all video without actions; many GPUs
        encoder='dinov3_vitb16', frame_height=224, whiten=1.0, size='base', registers=4,
        frames=64, context=64, frameskip=0, k_max=64, tau_shift=0.0, labelled_share=0.05,
        bootstrap_start=0.2, p_image=0.3, p_null=0.1, batch_size=64, micro_batch=2,
        learning_rate=3e-4, max_steps=100000, warmup=2000, decay=0.2, ema=0.999, store='int8',
        eval_interval=2000, save_interval=2000, compile=True, remat=True),
}
config = data.override(globals(), sys.argv[1:], PRESETS)
# --------------------------------------------------------------------------------------------------

given = data.given(sys.argv[1:])
for kind, other in ('labelled', 'unlabelled'), ('unlabelled', 'labelled'):
    # the demo world is not mixed into other data, unless by name
    if kind not in given and config[other] not in ('', f'demo/{other}'):
        config[kind] = ''

# processes and devices
ddp = 'RANK' in os.environ
rank = int(os.environ.get('RANK', 0))
world = int(os.environ.get('WORLD_SIZE', 1))
if augment and cache:
    sys.exit(f'--augment={augment:g}: wants --cache=False, as what is cached is of frames as they '
             'are')
if long_frames and not long_share:
    sys.exit(f'--long_frames={long_frames}: wants --long_share, of the steps that see them')
if long_share and long_frames < 2:
    sys.exit(f'--long_frames: wants 2 or more, got {long_frames}')
long_frames = long_frames or frames
for name, count in (('batch_size', batch_size), ('long_frames', batch_size * frames / long_frames)):
    if count % world:
        sys.exit(f'--{name}={config[name]}: {count:g} clips a step in all do not divide by {world} '
                 'processes')
if fsdp and not ddp:
    sys.exit('--fsdp=True: wants torchrun')
if dream and (fsdp or not policy or grow + dream > 1):
    sys.exit(f'--dream={dream:g}: wants --policy=True, not --fsdp, and --grow={grow:g} to be over')
if dream and dream_steps and min(frames, long_frames) <= eval_context:
    sys.exit(f'--dream={dream:g}: wants --frames, of clips, to be more than --eval_context='
             f'{eval_context}: what follows holds the goals')
if relabel and (fsdp or action_pca or not policy or not config['unlabelled']):
    sys.exit(f'--relabel={relabel:g}: wants --policy=True and --unlabelled, and neither --fsdp nor '
             '--action_pca')
device = data.pick_device(device, int(os.environ.get('LOCAL_RANK', 0)))
if device.type == 'cuda':
    torch.cuda.set_device(device)
autocast = data.autocast(device, dtype)
if fsdp:
    # all forward passes of a step share the weights that autocast keeps: sharded layers then get no
    # gradient
    autocast = torch.autocast(device.type, autocast.fast_dtype, autocast._enabled, False)
if wandb:
    try:
        tracker = importlib.import_module('wandb')
        tracker.login()         # it would be asked for after all else
    except Exception as error:      # not installed, nobody's, not reached
        sys.exit(f'--wandb={wandb}: wants: pip install wandb, and wandb login ({one_line(error)})')


def say(text):
    if rank == 0:
        tqdm.write(text)        # above a bar
        sys.stdout.flush()


ckpt = f'{out_dir}/ckpt.safetensors'
optim = f'{out_dir}/optim.pt'
log = f'{out_dir}/log.jsonl'
LATENTS = ('encoder layer frame_height frame_width pool channels whiten project '
           'align align_weight').split()
GRANT = ('--push wants owner/name and a token that may write there (hf auth login); a run that has '
         'ended is pushed with --resume=True as well')
SHAPE = [*'size width layers heads kv_heads'.split(),
         *({*MODEL_DEFAULTS} - {'state_dim', 'policy', 'text'})]
config |= dict(command=' '.join(sys.argv[1:]), processes=world)
again = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))        # torchrun --max-restarts
if again and not resume and os.path.isfile(ckpt):       # what another command has left is set aside
    resume = load(ckpt)[1].get('command') == config['command']
saved = None        # what a run goes on from, or begins with
if resume:
    if not os.path.isfile(ckpt):
        sys.exit(f'--resume=True: there is no {ckpt} to go on from')
    if rank == 0:
        data.own(out_dir)
    saved, old = load(ckpt, device, ema=False)
    if os.path.isfile(optim + '.new') and not os.path.isfile(ckpt + '.new'):
        os.replace(optim + '.new', optim)       # killed between the two renames of a save
    try:        # defaults for what is new in it
        data.a_file(optim)
        if os.path.exists(log):
            data.a_file(log)
        left = dict(skipped=0, log=math.inf) | torch.load(optim, 'cpu', weights_only=True)
        left |= {name: int(left[name]) for name in ('step', 'skipped')}
        left['log'] = max(0.0, float(left['log']))
    except Exception as error:      # missing, cut, or would run code
        sys.exit(f'{optim}: not a readable state of the optimizer ({one_line(error)})')
    if left['step'] != saved.step:
        sys.exit(f'{optim} is of step {left["step"]}, {ckpt} of step {saved.step}: they do not '
                 'belong together')
    for kind in ('labelled', 'unlabelled'):     # the same revisions of hub datasets, not the newest
        now, then = (data.weighted(re.sub('@[^:,]*', '', c[kind])) for c in (config, old))
        if now == then:
            config[kind] = old[kind]
elif init:
    init = data.checkpoint(init)
    saved, old = load(init, device)
    old = config | saved.config | old       # may be older than some options
if wandb:       # a run that goes on goes on there, too
    config['wandb_id'] = resume and old.get('wandb_id') or uuid.uuid4().hex
if init:        # what its weights depend on comes with them
    for name in LATENTS + SHAPE:
        if name in given and config[name] != old[name]:
            sys.exit(f'--{name}={config[name]}: cannot begin with {init}, which has {old[name]}')
        globals()[name] = config[name] = old[name]
    for name in {'policy', 'text'} - given:
        globals()[name] = config[name] = old[name]

if project == 'learned' and not channels:
    sys.exit('--project=learned: wants --channels, how many numbers of a token it keeps')
if align and not saved and not (project == 'learned' and probe):
    sys.exit(f'--align={align}: wants --project=learned, and --probe=.., what it is to tell')
if align and align_dynamics and not self_forcing:
    sys.exit(f'--align_dynamics={align_dynamics}: wants --self_forcing above 0, which imagines the '
             'frames, or is to be 0')

# the encoder and the model's shape come first: they are checked before anything is written
if saved:
    config['encoder_path'] = encoder_path or old['encoder_path']
    encode = restore_encoder(old, saved.stats, encoder_path, saved.config['grid'])
else:
    encode = load_encoder(encoder, encoder_path, layer, frame_height, frame_width, pool)
encode.to(device)
config['encoder_hash'] = encode.hash
if not 0 <= channels <= encode.dim:
    sys.exit(f'--channels={channels}: {encoder} has {encode.dim}, 0 keeps them all')
shape = model_config(size, channels or encode.dim, encode.grid, 0,
                     **{name: config[name] for name in SHAPE[1:]})
check_steps(K, shape['k_max'])
longest = max(frames, long_frames)
if memory and not (1 < memory < longest and memory * memory_frames > shape['context']):
    sys.exit(f'--memory={memory}: wants 2 to {longest - 1}, less than a clip has --frames, and '
             f'with --memory_frames={memory_frames} to go back beyond --context={shape["context"]}')
memories = range(memory, memory * memory_frames, memory or 1)
P = len(memories)               # frames before those of a clip
if os.path.abspath(out_dir) == os.getcwd():
    sys.exit(f'--out_dir={out_dir}: wants a folder of its own')

# data
sets = {}
config['datasets'] = ''
for kind, episodes, demo_seed in (('labelled', 300, 1), ('unlabelled', 100, 2)):
    if config[kind] == f'demo/{kind}' and not os.path.isfile(f'{config[kind]}/meta/info.json'):
        say(f'writing the demo world to {config[kind]}')
        data.write_demo(config[kind], episodes, kind == 'labelled', demo_seed)
    keys = action if kind == 'labelled' else 'none'
    sets[kind] = data.open_sets(config[kind], camera, keys, fps, action_mode, rotation, cache_gb,
                                *((state, probe) if kind == 'labelled' else ()))
    names = [f'{ds.name}:{ds.weight}' if ds.weight else ds.name for ds in sets[kind]]
    config[kind] = ','.join(names)
    for ds in sets[kind]:
        config['datasets'] += f'{kind} {ds.fingerprint()[:12]}:{ds.weight}, '
for ds in sets['labelled']:
    if not ds.action_dim:
        sys.exit(f'--labelled: {ds.name} has no actions (features: {", ".join(ds.features)}); '
                 'name them by --action=..., or give it as --unlabelled')
if not sets['labelled'] + sets['unlabelled']:
    sys.exit('--labelled and --unlabelled are both empty: there is nothing to learn from')
rates = {ds.fps for ds in sets['labelled'] + sets['unlabelled']}
if len(rates) > 1:
    said = f'the datasets have {rates} frames per second'
    if not frameskip:
        sys.exit(f'--frameskip=0: {said}: give --fps as well')
    say(f'{said}: a step of the model lasts longer in some; --fps makes them alike')
if not frameskip:
    frameskip = config['frameskip'] = max(1, round(rates.pop() / 5))
clips, long_clips = (
    data.Clips(sets['labelled'], sets['unlabelled'], T, frameskip, (encode.size, encode.width),
               batch_size * frames // T // world, labelled_share, val_share, seed, rank, world,
               augment, policy_steps if policy else 0, memories)
    for T in (frames, long_frames))
clips.count_faults({}, max_bad)
batches = data.Lengths(clips, long_clips, long_share)
if policy and not clips.A:
    sys.exit('--policy=True: wants --labelled datasets, whose actions it learns')
if relabel:
    clips.A = long_clips.A = clips.A + 1        # the last number marks guesses
shape['action_dim'] = action_pca or clips.A
shape['state_dim'] = clips.S
shape['policy'] = policy
shape['text'] = text
if text:
    listed = sum((ds.episodes for ds in clips.sets), [])
    tasks = set().union(*(e.tasks for e in listed))
    longest = max((len(task.encode(errors='replace')) for task in tasks), default=0)
    if not longest:
        sys.exit('--text=True: no episode of the datasets has a task in words')
    if longest > 128:
        data.warn('--text: tasks of more than 128 bytes are cut there')
if state and not clips.S:
    ds = (sets['labelled'] + sets['unlabelled'])[0]
    sys.exit(f'--state={state}: no labelled dataset has it; {ds.name} has {", ".join(ds.features)}')
probed = {tuple(ds.probe_names) for ds in sets['labelled'] if ds.probe_dim}
if probe and len(probed) != 1:
    have = ', '.join(sets['labelled'][0].features) if sets['labelled'] else 'no actions'
    sys.exit(f'--probe={probe}: wants the same numbers in all labelled datasets that have them, '
             f'and others than velocities; got {[*probed] or "none"}, where there are {have}')
probe_names = next(iter(probed), ())
config['probe_names'] = ''      # of those that it reads, at the end
config['align_names'] = ','.join(probe_names)
if align and saved:
    config['align_names'] = old.get('align_names', config['align_names'])
    if align_dynamics and config['align_names'] != ','.join(probe_names):
        sys.exit(f'--probe={probe}: {init or ckpt} was aligned to {config["align_names"]}, got '
                 f'{",".join(probe_names)}; --align_dynamics=0 lets it read another')
if clips.S and saved and 'z_pair' not in saved.stats:
    sys.exit(f'{init or ckpt}: was made before there was --state, and cannot go on with it')
config['state_names'] = ';'.join(','.join(ds.state_names) for ds in sets['labelled'])
config['action_names'] = ';'.join(','.join(ds.action_names) for ds in sets['labelled'])
config['action_keys'] = ';'.join(','.join(ds.action_keys) for ds in sets['labelled'])
config['cameras'] = ';'.join(ds.camera for ds in sets['labelled'])
config['rates'] = ';'.join(str(ds.fps * ds.rows_each) for ds in sets['labelled'])
if clips.S > shape['dim']:
    sys.exit(f'--state={state}: {clips.S} numbers, a token holds {shape["dim"]}')

widths = {ds.action_dim for ds in sets['labelled']}
if action_pca and (len(widths) != 1 or action_pca > clips.A):
    sys.exit(f'--action_pca={action_pca}: wants labelled datasets whose actions are of one width, '
             f'and at most the {clips.A} numbers of a model step; has widths {widths}')

if push and rank == 0:      # a run of hours does not end in a typo
    api = HfApi(os.environ.get('HF_ENDPOINT'))
    push = data.answer_of_hub(push, lambda: api.create_repo(push, exist_ok=True), GRANT).repo_id
    # create_repo is content with a token that only reads, where the repository is there
    data.answer_of_hub(push, lambda: api.auth_check(push, write=True), GRANT)
if resume:
    # datasets by their content: they may have moved
    fixed = ('relabel augment datasets camera action action_pca state action_mode rotation fps '
             'frameskip frames long_frames long_share val_share labelled_share batch_size seed '
             'size cache store cache_gb')
    fixed = {*fixed.split(), *LATENTS, *shape}
    for name, now in (config | shape).items():
        then = (old | saved.config).get(name, now)
        if now != then and name in fixed:
            sys.exit(f'--{name}: {now!r} cannot go on from {ckpt}, which has {then!r}')
        if now != then and name != 'resume':
            say(f'resume: {name} was {then}, now {now}')
elif rank == 0:
    data.own(out_dir)
if ddp:
    if rank == 0:
        meeting.set('checked', '')
    backend = 'nccl' if device.type == 'cuda' else 'gloo'
    dist.init_process_group(backend, store=meeting, rank=rank, world_size=world)
    dist.barrier()      # all have read --init, which may lie in out_dir
if rank == 0 and not resume and (os.path.exists(ckpt) or os.path.exists(log)):
    # no earlier run is lost; folders are no part of it, such as --cache_dir
    for i in itertools.count(1):
        aside = f'{out_dir.rstrip("/")}.{i}'
        if not os.path.exists(aside):
            break
    with data.writing(aside):
        os.mkdir(aside)
        for name in {*os.listdir(out_dir)} - {'.lock'}:
            if os.path.isfile(f'{out_dir}/{name}'):
                shutil.move(f'{out_dir}/{name}', f'{aside}/{name}')
    say(f'{out_dir} held an earlier run: it is now {aside}')


def raw_latents(batch, T=None):
    if 'z' in batch:
        return batch['z'][:, :T].to(device, non_blocking=True).float()
    return encode_frames(encode, batch['x'][:, :T], autocast)


def normalised(batch, T=None):
    """z, a, a_mask, z_mask of the first T frames of a batch (None: of all), on the device."""
    z = raw_latents(batch, T)
    a, a_mask, z_mask = (batch[name][:, :T].to(device, non_blocking=True)
                         for name in ('a', 'a_mask', 'z_mask'))
    z = standard(z, stats)
    a = components(a, stats)
    if clips.S:
        z = add_state(z, batch['s'][:, :T].to(device, non_blocking=True))
    return z, a, a_mask, z_mask


def text_of(batch):
    """The texts (B, L) of a batch on the device, no longer than the longest."""
    longest = batch['text'].any(dim=0).sum()
    return batch['text'][:, :longest + 1].to(device, non_blocking=True)


def frames_with_numbers():
    """Raw latents (n, N, width) of training frames, what --probe names (n, P), all known, and which
    are near each other (n, n): of one episode and at most 8 model steps apart."""
    most = min(2048, 2 ** 28 // (N * encode.dim))       # a GB
    batch = clips.some(1, most, 'labelled', clips.train)
    numbers = batch['p'][:, 0].to(device)
    known = numbers.isfinite().all(dim=1)
    if not known.any():
        sys.exit(f'--probe={probe}: no frame has all of them, which --align wants')
    at = batch['at'].to(device)[known]
    near = (at[:, None, :2] == at[:, :2]).all(dim=2)
    near &= (at[:, None, 2] - at[:, 2]).abs() <= 8 * frameskip
    return raw_latents(batch)[known, 0], numbers[known], near


def fit_projection(z, z_mean, z_basis):
    """Linear maps of tokens less their mean, down z_basis (width, D) and back z_back (D, width),
    that keep what latents z (frames, N, width) are and, with --align, what --probe names: align.*
    is the Probe of the projected tokens that tells it. Nothing can collapse, as all comes back."""
    torch.manual_seed(seed)
    learned = [z_basis.clone(), z_basis.T.clone()]
    if align:
        z, numbers, near = frames_with_numbers()
        z = z - z_mean
        std = numbers.std(dim=0)
        turn = torch.tensor([full_turn(name) for name in probe_names], device=device)
        reader = Probe(N, channels, numbers.mean(dim=0), torch.where(std > 1e-6, std, 1.0), turn,
                       linear=True).to(device)
        code = reader.code(numbers)
        learned += reader.parameters()
    size = z.square().mean().sqrt()
    down, back = (p.requires_grad_() for p in learned[:2])
    steps = 1000
    descent = torch.optim.Adam(learned)
    schedule = torch.optim.lr_scheduler.OneCycleLR(descent, 3e-3, steps)
    for _ in tqdm(range(steps), 'fitting the projection', disable=None):
        rows = torch.randint(len(z), (128,), device=device)
        x = z[rows] / size
        y = x @ down
        lost = (y @ back - x).square().mean()
        told = 0.0
        if align == 'regress':
            told = (reader(y) - code[rows]).square().mean()
        elif align:
            told = contrast(reader(y), code[rows], near[rows][:, rows])
        (lost + align_weight * told).backward()
        descent.step()
        descent.zero_grad()
        schedule.step()
    # contiguous: see measure
    down = (down.detach() / size).contiguous()
    back = (back.detach() * size).contiguous()
    out = dict(z_basis=down, z_back=back)
    say(f'the learned projection holds {1 - lost:.1%} of the variance')
    if align:
        out |= {f'align.{name}': v for name, v in reader.state_dict().items()}
    if ddp:         # steps by the thousand need not end alike on other devices
        for v in out.values():
            dist.broadcast(v, 0)
    return out


def measure(x):
    """What a checkpoint keeps beside the weights: the statistics of latents, from uint8 frames x,
    or from their raw latents where there is a cache, and the encoder's own tensors."""
    if encode.fit:
        encode.fit(x.to(device).float() / 255)
    z = x.to(device) if clips.tokens else encode_frames(encode, x, autocast)
    z = z.flatten(0, -2)            # (frames x N, width)
    stats = dict(z_mean=z.mean(dim=0))
    if channels:
        z = z - stats['z_mean']
        basis = torch.linalg.eigh((z.T @ z).cpu().double())[1][:, -channels:].flip(1)
        # contiguous, as a checkpoint's: sums in another order would have other last bits
        stats['z_basis'] = basis.float().contiguous().to(device)
        share = (z @ stats['z_basis']).square().sum() / z.square().sum()
        say(f'{channels} principal components hold {share:.1%} of the variance')
        if project == 'learned':
            stats |= fit_projection(z.unflatten(0, (-1, N)), **stats)
        z = z @ stats['z_basis']                                                # (frames x N, D)
    std = z.std(dim=0).clamp(min=1e-6)
    if std.max() <= 1e-6:
        sys.exit(f'all frames look alike to {encoder}: there is nothing to learn (python data.py '
                 '--labelled=.. shows what is in a dataset)')
    # of two random frames, in units of plan.py's distance
    stats['z_pair'] = 2 * z.unflatten(0, (-1, N)).var(dim=0).mean()
    std = std ** whiten * std.square().mean().sqrt() ** (1 - whiten)
    std *= (z.std(dim=0) / std).square().mean().sqrt()      # 1.0: the variance of the data
    stats['z_std'] = std
    if align:
        stats['align.token.weight'] *= std
    stats['z_pair'] /= std.square().mean()
    return stats | {f'encoder.{name}': v for name, v in encode.stored().items()}


def encode_all():
    folder = cache_dir
    part = rank, world
    if world > 1 and not folder:        # memory that the processes of a machine share
        folder = f'{out_dir}/latents@{socket.gethostname()}'
        part = (int(os.environ[name]) for name in ('LOCAL_RANK', 'LOCAL_WORLD_SIZE'))
    clips.tokens = long_clips.tokens = data.cached_latents(
        clips.sets, encode, device, autocast, folder, store, workers, *part)
    if folder != cache_dir:
        dist.barrier()      # all have mapped the files, which stay until nobody has
        shutil.rmtree(folder, ignore_errors=True)


N = math.prod(encode.grid)          # tokens of a frame's picture; that of the state follows them
if compile and not encode.fit:      # what is fitted is too small to gain
    encode.compile()
if cache and not encode.fit:        # no frame is encoded twice
    encode_all()
if saved:       # its weights know latents of its statistics; those of actions are the data's
    stats = saved.stats
else:
    say('measuring the latents')
    stats = measure(clips.sample(64, 16))
stats = {name: v for name, v in stats.items() if not name.startswith('probe.')}
if not resume:
    stats = {name: v for name, v in stats.items() if not name.startswith(('s_', 'a_'))}
    stats |= {f'a_{name}': v for name, v in clips.action_stats().items()}
    if clips.S:
        stats |= {f's_{name}': v for name, v in clips.state_stats().items()}
aligned = restore_probe(stats, 'align.')
clips.probed = long_clips.probed = bool(aligned and align_dynamics)
if cache and encode.fit:
    encode_all()
if action_pca and not resume:       # makes a model for plan.py --coarse
    z, a, known, _ = normalised(clips.some(2, 1024, 'labelled', clips.train))
    chunks = a[known].cpu().double()        # (n, A), of a model step each
    if len(chunks) < action_pca:
        sys.exit(f'--action_pca={action_pca}: {len(chunks)} clips are longer than a model step')
    _, sizes, basis = torch.linalg.svd(chunks, full_matrices=False)
    basis = basis[:action_pca].T * (len(chunks) ** 0.5 / sizes[0])      # the first: variance 1
    stats['a_basis'] = basis.float().contiguous().to(device)
    stats['a_chunks'] = (chunks @ basis).float()        # its plans are made of them
    # how much changes in a step (N, D): by that plan.py tells whether a goal is near
    stats['a_change'] = (z[:, 1] - z[:, 0])[known[:, 1], :N].square().mean(dim=0)
held_out = clips.held_out(eval_context + 20, eval_clips)
if 'labelled' in held_out and len(held_out['labelled']['a']) < 2:
    say("evaluation: one held-out clip has actions: without 'shuffled', those of another clip")

# model and optimizer
torch.manual_seed(seed)
model = WorldModel(shape).to(device)
if saved:
    fresh = model.state_dict()
    weights = saved.state_dict()
    more = clips.A - saved.config['action_dim']
    # the last number marks guesses, of which one of both knows nothing
    if relabel and more == 1 or old.get('relabel') and not relabel and more == -1:
        for name in {*weights} & {'a_in.weight', 'policy.out.weight', 'policy.out.bias'}:
            last = [] if name == 'a_in.weight' else [0, 0] * (weights[name].dim() - 1)
            weights[name] = F.pad(weights[name], [*last, 0, more])
    for name in fresh | weights:        # of actions or states of another width
        if name not in weights or name not in fresh or weights[name].shape != fresh[name].shape:
            how = 'begins anew' if name in fresh else 'is left out'
            say(f'{init}: {name} is not of this shape, it {how}')
            weights.pop(name, None)
    model.load_state_dict(fresh | weights)
    del saved
ema_model = copy.deepcopy(model).requires_grad_(False).eval()
if resume:
    ema_model.load_state_dict(load(ckpt)[0].state_dict())
if compile:
    compile_layers(model)
model.remat = remat
parallel = model
if fsdp:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor
    mesh = dist.init_device_mesh(device.type, (world,))
    empty = {p for p in model.parameters() if not p.numel()}
    for block in (*model.layers, model):
        # gathered once a step, however often the teacher is called; and not by one process alone,
        # where one has bootstrap rows
        fully_shard(block, mesh=mesh, reshard_after_forward=False, ignored_params=empty)
elif ddp:
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    # buffers are constants; their broadcast in every forward would hang where one process alone has
    # bootstrap rows. The option's name changes with the version of torch, this one does not.
    parallel.broadcast_buffers = False


def whole(x):
    """A dict of tensors, or one; what is sharded comes together on the CPU: all processes call
    it."""
    if isinstance(x, dict):
        return {name: whole(v) for name, v in x.items()}
    return x.full_tensor().cpu() if hasattr(x, 'full_tensor') else x


def shard(x, p):
    """This process's part of x, which is like parameter p."""
    if fsdp and x.dim():
        return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)
    return x


params = [p for p in model.parameters() if p.numel()]
acting = {*model.policy.parameters()} if policy else set()
apart = [[p for p in params if p not in acting]]
if policy:
    apart.append([p for p in params if p in acting])
ema_params = [p for p in ema_model.parameters() if p.numel()]
ema_shards = [shard(e, p) for e, p in zip(ema_params, params)]      # without FSDP the same tensors
if fsdp:
    ema_model.cpu()     # only evaluation and the checkpoint want it whole
matrices = {m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)}
groups = []
awake = max_steps - int(dream * max_steps)          # steps of the world model; clips have grown
for part, rate, end in zip(apart, (learning_rate, policy_rate or learning_rate),
                           (awake, max_steps)):
    linear = [p for p in part if p in matrices]
    others = [p for p in part if p not in matrices]
    groups += [dict(params=linear, weight_decay=weight_decay, rate=rate, end=end),
               dict(params=others, weight_decay=0.0, rate=rate, end=end)]
optimizer = torch.optim.AdamW(groups, learning_rate, (beta1, beta2),
                              fused=device.type in ('cpu', 'cuda'))
rms = {name: torch.ones((), device=device) for name in ('flow', 'bootstrap', 'self_forcing')}
step = 0
skipped = 0
if resume:
    order = sum((group['params'] for group in groups), [])
    try:
        for i, moments in left['optimizer']['state'].items():
            for name in 'exp_avg', 'exp_avg_sq':
                moments[name] = shard(moments[name].view(order[i].shape), order[i])
            moments['step'].item()
        # the groups are made of the options
        optimizer.load_state_dict(optimizer.state_dict() | dict(state=left['optimizer']['state']))
        rms = dict(zip(rms, left['rms'].to(device).view(3)))
        step = left['step']
        skipped = left['skipped']
    except Exception as error:
        sys.exit(f'{optim}: not of this model ({one_line(error)})')
if rank == 0:
    journal = open(log, 'a', buffering=1)
    if resume:      # what was written after the last save comes again
        journal.truncate(int(min(left['log'], journal.tell())))
    if wandb:
        tracker = tracker.init(project=wandb, id=config['wandb_id'], resume='allow', dir=out_dir,
                               config=config)
peak = data.peak_flops(device)
tokens_per_frame = sum(frame_tokens(shape).values())
for name, value in config.items():
    say(f'{name} = {value}')
say(f'{sum(p.numel() for p in params) / 1e6:.2f}M parameters, '
    f'{batch_size * frames * tokens_per_frame:,} tokens a step, {device}, '
    f'{autocast.fast_dtype if autocast._enabled else "float32"}, torch {torch.__version__}')


@torch.no_grad()
def evaluate():
    """{kind: {method: {horizon: mse}}} on held-out episodes with the averaged weights; padded
    frames do not count."""
    net = ema_model.to(device)
    if autocast._enabled:
        net = half_weights(copy.deepcopy(ema_model), autocast.fast_dtype)
    val = {}
    for kind, batch in held_out.items():
        z, a, a_mask, z_mask = normalised(batch)
        told = text_of(batch)
        none = a_mask & False
        conditions = {'model': (a, a_mask, told)}
        if kind == 'labelled':
            conditions['hidden'] = a, none, told
            if len(a) > 1:
                # half a turn: neighbours are often of one episode, whose actions are alike
                conditions['shuffled'] = a.roll(len(a) // 2, 0), a_mask, told
        if text:        # beside 'hidden', or 'model' of clips without actions
            conditions['no text'] = a, none, 0 * told
            conditions['other text'] = a, none, told.flip(0)
        imagined = {'repeat': z[:, eval_context - 1:eval_context].expand(-1, 20, -1, -1)}
        with autocast:
            for method, (*a_and_mask, words) in conditions.items():
                imagined[method] = rollout(net, z[:, :eval_context], *a_and_mask, K=K, text=words)
        val[kind] = {method: horizon_errors(imagined[method][:, :, :N], z[:, :, :N], z_mask)
                     for method in sorted(imagined)}
        if policy and kind == 'labelled':
            val[kind] |= action_errors(net, z, a, a_mask)
        if clips.S and kind == 'labelled':
            for method in 'model', 'repeat':
                s = z[:, :, N:, :clips.S].clone()
                then = imagined[method][:, :, N:, :clips.S]
                s[:, eval_context:][then.isnan()] = torch.nan       # not known at the beginning
                val[kind][f'state {method}'] = horizon_errors(then, s, z_mask)
    return val


def action_errors(net, z, a, known):
    """{'policy': {steps left: mse}} of its first action towards later frames, and 'policy zero': of
    the mean action."""
    t = eval_context - 1
    mine = {}
    zero = {}
    for h in (1, 5, 10, 20):
        left = torch.full((len(z),), h, device=device)
        with autocast:
            got = net.act(z[:, max(0, t - 1)], z[:, t], z[:, t + h], left)
        for out, error in (mine, got - a[:, t + 1]), (zero, a[:, t + 1]):
            real = known[:, t + 1] & known[:, t + h]
            out[str(h)] = error[real].square().mean().item() if real.any() else None
    return {'policy': mine, 'policy zero': zero}


def horizon_errors(imagined, z, z_mask):
    known = ~z[:, eval_context:].isnan()
    error = torch.where(known, (imagined - z[:, eval_context:]).square(), 0.0).sum(dim=(2, 3))
    count = known.sum(dim=(2, 3))
    error = error / count           # (B, 20)
    out = {}
    for h in (1, 5, 10, 20):
        real = z_mask[:, eval_context + h - 1] & (count[:, h - 1] > 0)
        out[str(h)] = error[real, h - 1].mean().item() if real.any() else None
    return out


def fit_probe():
    """A Probe of latents of training clips, real and imagined, so that it does not take what only
    imagination gets wrong for places; and which of the numbers it reads: those that change."""
    torch.manual_seed(seed)
    T = eval_context + 20
    most = min(20000, 2 ** 28 // (N * shape['dim']))        # frames: a GB
    fold = min(16, *(len(episodes) for episodes in clips.train))
    z = []
    numbers = []
    for i in range(fold):
        batch = clips.some(T, 512 // fold, 'labelled', [e[i::fold] for e in clips.train])
        if not batch:
            continue
        z_real, a, a_mask, z_mask = normalised(batch)
        with torch.no_grad(), autocast:
            context = z_real[:, :eval_context]
            imagined = rollout(ema_model.to(device), context, a, a_mask, K,
                               text=text_of(batch)).float()
        p = batch['p'].to(device)
        later = slice(eval_context, None)
        for x, p, real in (z_real, p, z_mask), (imagined, p[:, later], z_mask[:, later]):
            some = torch.randperm(int(real.sum()), device=device)[:most // (2 * fold)]
            z.append(x[:, :, :N][real][some])
            numbers.append(p[real][some])
    z = torch.cat(z)                    # (frames, N, D)
    numbers = torch.cat(numbers)        # (frames, P)
    mean = numbers.nanmean(dim=0)
    std = (numbers - mean).square().nanmean(dim=0).sqrt()
    which = (std > 1e-6) & std.isfinite()
    names = [name for name, good in zip(probe_names, which.tolist()) if good]
    say(f'fitting a probe to {len(z):,} frames; left out, as they do not change: '
        f'{", ".join(sorted({*probe_names} - {*names})) or "nothing"}')
    turn = torch.tensor([full_turn(name) for name in names], device=device)
    reader = Probe(N, shape['dim'], mean[which], std[which], turn).to(device)
    code = reader.code(numbers[:, which])
    steps = 1000
    descent = torch.optim.AdamW(reader.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(descent, 3e-3, steps)
    for _ in tqdm(range(steps), 'fitting the probe', disable=None):
        rows = torch.randint(len(z), (128,), device=device)
        off = reader(z[rows]) - code[rows]
        off.nan_to_num().square().mean().backward()     # NaN: not known
        descent.step()
        descent.zero_grad()
        schedule.step()
    config['probe_names'] = ','.join(names)
    return reader.requires_grad_(False), which


@torch.no_grad()
def tell_probe(reader, which):
    """Log and print the errors, in the dataset's units, of what is read from held-out frames: real
    ones, and those imagined so many steps ahead."""
    batch = held_out['labelled']
    z, a, a_mask, z_mask = normalised(batch)
    numbers = batch['p'].to(device)[..., which]
    with autocast:
        imagined = rollout(ema_model.to(device), z[:, :eval_context], a, a_mask, K,
                           text=text_of(batch)).float()
    frames = dict(real=(z, numbers, z_mask))
    for h in (1, 5, 10, 20):
        t = eval_context + h - 1
        frames[str(h)] = imagined[:, h - 1], numbers[:, t], z_mask[:, t]
    entry = {name: {} for name in config['probe_names'].split(',')}
    for when, (z, wanted, real) in frames.items():
        z = z[..., :N, :][real]         # (frames, N, D)
        code = reader.code(wanted[real])
        if when == 'real':
            variance = (code - code.nanmean(dim=0)).square().nanmean(dim=0).sum(dim=-1)
            variance[variance < 1e-6] = torch.nan       # says nothing: it does not change here
        r2 = 1 - (reader(z) - code).square().nanmean(dim=0).sum(dim=-1) / variance      # (P,)
        for name, off, share in zip(entry, reader.off(z, wanted[real]).T, r2.tolist()):
            off = off[~off.isnan()]
            if len(off) and math.isfinite(share):
                entry[name][when] = dict(median=off.median().item(), p90=off.quantile(0.9).item(),
                                         r2=share)
    say('read from held-out frames, real and imagined so many steps ahead: median error '
        '(90 % are below), R2 (1.0: the variance of real frames)')
    for name, errors in entry.items():
        texts = []
        for when, e in errors.items():
            texts.append(f'{when} {e["median"]:.3g} ({e["p90"]:.3g}) {e["r2"]:.3f}')
        say(f'{name}: {", ".join(texts) or "-"}')
    note(dict(step=step, probe=entry))


def audit(loss):
    """Ends the run where something does not learn or is not kept: what has a gradient and what the
    checkpoint holds must be the same tensors."""
    names = {p: name for name, p in model.named_parameters() if p.numel()}
    keys = model.state_dict().keys()
    for p, name in names.items():
        if p.grad is None and p.requires_grad:
            sys.exit(f'model.{name} gets no gradient: the loss does not depend on it')
        if name not in keys:
            sys.exit(f'model.{name} is not in the checkpoint')
    nodes = [loss.grad_fn]
    seen = set()
    while nodes and not fsdp:       # shards are not the tensors that the loss was made of
        node = nodes.pop()
        if hasattr(node, 'variable') and node.variable not in names and node.variable.numel():
            shape = tuple(node.variable.shape)
            sys.exit(f'a tensor of shape {shape} gets a gradient but is no parameter of the model: '
                     'it would be neither trained nor saved')
        after = {function for function, _ in node.next_functions} - seen - {None}
        nodes += after
        seen |= after


def get_lr(step, rate, end):
    """The learning rate schedule: warms up, stays, falls up to step `end`."""
    if step < warmup:
        return rate * (step + 1) / warmup
    falls = max(1, min(decay * end, end - warmup))
    least = min(min_lr, rate)
    return least + (rate - least) * min(1, max(0, end - step) / falls)


def clip_length(T):
    """Frames of this step's clips: 2, 4, .. up to T while they grow."""
    if step >= min(grow * max_steps, awake):    # which .55 x 100 is not
        return T
    return 2 << int(math.ceil(math.log2(T / 2)) * step / (grow * max_steps))


@torch.no_grad()
def relabelled(z, a, a_mask, z_mask):
    """a and a_mask, where some clips without actions have what the policy would do to be at the
    next frame, marked as a guess."""
    B, T = z_mask.shape
    rows = (number * world + rank) * B + torch.arange(B)
    share = torch.tensor([hash((seed, row)) % 1000 / 1000 for row in rows.tolist()])
    some = ~a_mask.any(dim=1) & (share < relabel).to(device, non_blocking=True)
    before = torch.cat((z[:, :1], z[:, :-2]), dim=1)
    one = torch.ones(B * (T - 1), device=device)
    with autocast:
        guess = model.act(*(x.flatten(0, 1) for x in (before, z[:, :-1], z[:, 1:])), one)
    some = F.pad(some[:, None] & z_mask[:, 1:], (1, 0))         # (B, T)
    guess = F.pad(guess.view(B, T - 1, -1), (0, 0, 1, 0)).type_as(a)
    guess[:, :, -1] = 1
    return torch.where(some[:, :, None], guess, a), a_mask | some


def unmarked_act(*frames):
    """The policy's actions in the dream, whose mark of guesses no robot can execute."""
    a = model.act(*frames)
    return F.pad(a[:, :-1], (0, 1)) if relabel else a


def averaged(values):
    """{name: 0-d tensor}, the means over all processes."""
    total = torch.stack([*values.values()]).float()
    if ddp:
        dist.all_reduce(total)
    return dict(zip(values, total / world))


def note(entry):
    with data.writing(log):
        print(json.dumps(entry), file=journal)
    if wandb:
        tracker.log(entry, step=entry['step'])


def card():
    """README.md of the hub: what this is, and how far off it is on held-out episodes."""
    val = {}
    with open(log) as f:
        for line in f:
            val = json.loads(line).get('val', val)
    rows = ''
    for kind, methods in val.items():
        for method, errors in methods.items():
            errors = ['-' if e is None else f'{e:.3f}' for e in errors.values()]
            rows += f'| {kind} | {method} | {" | ".join(errors)} |\n'
    return f'''---
license: {license or 'unknown'}
pipeline_tag: robotics
tags: [world-model, lerobot]
---
# {push}

A world model: what the features of {encode.name} will be in the next frames of a robot's camera.
Size {size}, objective {objective}, {step} steps of {batch_size} clips.

- with actions: {config['labelled']}
- without: {config['unlabelled']}

Mean squared error on held-out episodes, so many steps ahead (1.0: the variance of the features),
of the model, and of a repeated last frame, hidden actions and those of another clip:

| | | 1 | 5 | 10 | 20 |
|---|---|---|---|---|---|
{rows}
With goaldream:

    python plan.py --ckpt={push} --start=now.png --goal=goal.png
    python decode.py --ckpt={push} --labelled=a/dataset

`ckpt.safetensors` has weights, statistics and options: no code. The encoder's weights are its
makers'.
'''


def save_all():
    weights = whole(model.state_dict())
    state = optimizer.state_dict()
    state['state'] = whole(state['state'])
    if rank:
        return
    state = dict(optimizer=state, rms=torch.stack([*rms.values()]), step=step, skipped=skipped,
                 log=journal.tell())
    save(ckpt + '.new', model, config, dict(ema_model.named_parameters()), stats, step, weights)
    try:
        torch.save(state, optim + '.new')
    except (OSError, RuntimeError) as error:
        sys.exit(f'{optim}: cannot be written ({one_line(error)}); what was there before stays')
    for path in (ckpt, optim):
        os.replace(path + '.new', path)


def clips_of(step):
    """'dataset episode:frame, ..' of a step's clips."""
    source, number = batches.which(step)
    names = []
    for s, e, start, _ in source.picks_of_all(number):
        ds = source.sets[s]
        names.append(f'{ds.name} {ds.episodes[e].index}:{start}')
    return ', '.join(names)


def listen():
    """The first signal is kept for the end of a step, the second ends this process at once.
    Handlers in Python would wait for a long call, as of a backward pass, to return."""
    while number := near.recv(1):
        if number[0] not in SIGNALS:
            continue
        if signals:
            os._exit(1)
        signals.append(True)
        say('saving at the end of this step; a second signal ends at once')


# the loop
SIGNALS = signal.SIGTERM, signal.SIGINT
signals = []        # one has come
near, far = socket.socketpair()
far.setblocking(False)
for number in SIGNALS:
    signal.signal(number, lambda *_: None)
signal.set_wakeup_fd(far.fileno())
threading.Thread(target=listen, daemon=True).start()
decoders = workers if cache_dir or not cache else 0       # latents in memory need no help
loader = iter(DataLoader(
    batches, batch_size=None, sampler=range(step, max_steps), num_workers=decoders,
    pin_memory=device.type == 'cuda', multiprocessing_context='fork' if decoders else None,
    worker_init_fn=lambda _: os.setpgrp()))     # a signal to the group would end them first
bar = tqdm(total=max_steps, initial=step, disable=rank > 0 or None, dynamic_ncols=True)
options = {name: config[name] for name in {*OBJECTIVE} - {'state_dim', 'memories'}}
options |= dict(k_max=shape['k_max'], state_dim=clips.S, memories=P)
ema_model.stats = stats
if dream:       # of several robots the mean
    weights = [cost_weights(ema_model, robot=i) for i in range(len(clips.labelled))]
    goal_weight = torch.stack(weights).mean(dim=0).to(device) / stats['z_pair']
learning, averages = params, ema_shards
bad = torch.full((), -1, device=device)     # the first step whose loss is not finite, seen later
stop = False
asked = torch.zeros(())     # by signals, in all processes
start = logged = step
while step < max_steps and not stop:
    if step == logged:
        tokens = 0
        flops = 0.0
        clock = time.perf_counter()
    batch = next(loader)
    clips.count_faults(batch, max_bad)
    source, number = batches.which(step)
    T = clip_length(source.T)
    z, a, a_mask, z_mask = normalised(batch, P + T)
    B = len(z)
    for group in optimizer.param_groups:
        group['lr'] = get_lr(step, group['rate'], group['end'])
    if policy:
        z_goal = normalised(batch['goal'])[0][:, 0]         # (B, N, D)
        steps_left = batch['goal']['left'].to(device, non_blocking=True)
    known = a_mask[:, P:].clone()       # without what follows
    dreaming = step >= awake
    if step == max(start, awake):       # the world model is finished
        for p in apart[0]:
            p.requires_grad_(False)
        learning = apart[1]
        averages = [e for e, p in zip(ema_shards, params) if p in acting]
    if relabel and 2 * step >= awake:
        a[:, P:], a_mask[:, P:] = relabelled(*(x[:, P:] for x in (z, a, a_mask, z_mask)))
    guessed = (a_mask[:, P:] & ~known).any(dim=1, keepdim=True)         # (B, 1)
    clip_weight = torch.where(guessed, relabel_weight, 1.0)
    options['bootstrap'] = bootstrap if step >= bootstrap_start * awake else 0.0
    forced = T      # imagined from here on
    if (1 - self_forcing) * awake <= step < awake:
        forced = T // 2
    first = (number * world + rank) * B         # clips of this length before, in all processes

    # every term is a mean over the frames of all processes that count in it, however they are
    # spread
    _, n, counted = which_rows(z_mask, objective, options['bootstrap'], first, P)
    counted = {name: mask * clip_weight for name, mask in counted.items()}
    counted['self_forcing'] = z_mask[:, P + forced:] * clip_weight
    counted['policy'] = known[:, 1:]
    if clips.probed:
        p = batch['p'][:, :T].to(device, non_blocking=True)
        counted['align'] = z_mask[:, P + forced:] & p[:, forced:].isfinite().all(dim=2)
    if dreaming and dream_steps:
        counted['dream'] = known.any(dim=1) & z_mask[:, P + eval_context]       # (B,)
    count = averaged({name: mask.sum() for name, mask in counted.items()})
    metrics = {}
    few = micro_batch or B
    parts = (x.split(few) for x in (z, a, a_mask, z_mask, text_of(batch)))
    for i, z, a, a_mask, z_mask, told in zip(range(0, B, few), *parts):
        row = rank * B + i
        last_rows = i + few >= B
        if fsdp:
            model.set_requires_gradient_sync(last_rows)
        parallel.require_backward_grad_sync = last_rows     # as no_sync() of DDP
        with autocast:
            # the same noise for any number of processes and size of micro-batches; of whole
            # numbers, hash is the same in every process
            seeds = [hash((seed, step, row + j)) % 2 ** 63 for j in range(len(z))]
            loss = 0.0
            terms = {}
            if not dreaming:
                loss, terms = shortcut_loss(
                    parallel, z, a, a_mask, z_mask, options, rms=rms, first=first + i,
                    noise=clip_noise(z, seeds), count=count, clip_weight=clip_weight[i:i + few],
                    text=told)
            z, a, a_mask, z_mask = (x[:, P:] for x in (z, a, a_mask, z_mask))   # for all else
            if dreaming and dream_steps:
                error = dream_errors(ema_model, unmarked_act, z, a, known[i:i + few], z_mask,
                                     eval_context, dream_steps, goal_weight, first + i,
                                     seed=hash((seed, step, row, 2)) % 2 ** 63)
                error = (error * counted['dream'][i:i + few]).sum()
                terms['dream'] = error.detach() / count['dream']
                loss = error / count['dream'].clamp(min=1e-6)
            if forced < T:
                imagined = rollout(model, z[:, :forced], a, a_mask, K, grad=True,
                                   seed=hash((seed, step, row, K)) % 2 ** 63, text=told)
                error = frame_errors(imagined, z[:, forced:], clips.S)
                error = (error * counted['self_forcing'][i:i + few]).sum()
                terms['self_forcing'] = error.detach() / count['self_forcing']
                error = error / count['self_forcing'].clamp(min=1e-6)
                loss = loss + error / term_scale(rms, 'flow', 'self_forcing')
                if clips.probed:
                    off = aligned(imagined[:, :, :N]) - aligned.code(p[i:i + few, forced:])
                    error = off.nan_to_num().square().mean(dim=(2, 3))
                    error = (error * counted['align'][i:i + few]).sum()
                    terms['align'] = error.detach() / count['align']
                    loss = loss + align_dynamics * error / count['align'].clamp(min=1e-6)
            if policy:
                error = policy_errors(model, z, a, z_mask, z_goal[i:i + few],
                                      steps_left[i:i + few], clips.S, first + i)
                error = (error * known[i:i + few, 1:]).sum()
                terms['policy'] = error.detach() / count['policy']
                weight = support if dreaming else 1.0
                loss = loss + weight * error / count['policy'].clamp(min=1e-6)
        loss.backward()
        for name, value in (('loss', loss.detach()), *terms.items()):
            metrics[name] = metrics.get(name, 0) + value
    if step == start:
        audit(loss)
    if dreaming and ddp:        # DDP waits for the whole model
        for p in learning:
            dist.all_reduce(p.grad)
            p.grad /= world
    # apart: the world model learns the same with a policy beside it as without
    norm = sum(torch.nn.utils.clip_grad_norm_(part, grad_clip or math.inf)
               for part in apart)
    if fsdp:
        norm = norm.full_tensor()
    metrics['stop'] = torch.full((), float(len(signals)), device=device)
    metrics = averaged(metrics)
    before, asked = asked, metrics.pop('stop')
    finite = metrics['loss'].isfinite() & norm.isfinite()
    if skipped < skip_nonfinite and not finite:         # waits for the device
        skipped += 1
        say(f'step {step + 1}: the loss or its gradient is not finite: left out ({skipped} of '
            f'{skip_nonfinite}), in {clips_of(step)}')
    else:
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, learning, 1 - min(ema, (step + 1) / (step + 10)))
            for name in rms.keys() & metrics.keys():
                mean = rms[name].lerp(metrics[name].square(), 0.05)
                rms[name] = torch.where(metrics[name].isnan(), rms[name], mean)
        bad = torch.where((bad < 0) & ~finite, step + 1, bad)
    optimizer.zero_grad(set_to_none=True)
    step += 1
    # three forward passes, and two more for the teacher of bootstrap rows; not encoding,
    # self-forcing nor the policy
    if not dreaming:
        flops += (3 * B + 2 * n) * T * flops_per_frame(shape, T)
    tokens += B * world * T * tokens_per_frame
    bar.update()

    # all processes stop at the same step, or the others wait forever; what was asked in the step
    # before is known without a wait for the device
    stop = bool(before if ddp else signals)
    last = step == max_steps or stop
    if not last and all(step % n for n in (log_interval, save_interval, eval_interval)):
        continue                # nobody has waited for the device so far
    if bad >= 0:
        if rank:
            sys.exit(1)         # the first says it
        sys.exit(f'step {bad.item()}: the loss or its gradient is not finite; nothing has been '
                 f'saved since; it saw {clips_of(bad.item() - 1)}')
    seconds = time.perf_counter() - clock
    entry = dict(step=step)
    for name, value in zip(metrics, torch.stack([*metrics.values()]).tolist()):
        entry[name] = value if math.isfinite(value) else None   # no frame counted in it
    if skipped:
        entry['skipped'] = skipped
    group = optimizer.param_groups[-1 if dreaming else 0]
    entry |= dict(lr=group['lr'], tokens_per_s=tokens / seconds, mfu=None, memory_gb=None)
    if peak:
        entry['mfu'] = flops / seconds / peak
    if device.type == 'cuda':
        entry['memory_gb'] = torch.cuda.max_memory_allocated(device) / 1e9
    if rank == 0:
        note(entry)
        texts = [f'{name} {value:{",.0f" if name == "tokens_per_s" else ".4g"}}'
                 for name, value in entry.items() if value is not None]
        seconds /= step - logged
        say(f'{", ".join(texts)}, {1000 * seconds:.0f} ms/step, '
            f'{(max_steps - step) * seconds / 60:.1f} min left')
    if fsdp and (step % save_interval == 0 or step % eval_interval == 0 or last):
        for p, piece in zip(ema_params, ema_shards):
            p.copy_(whole(piece))
    if rank == 0 and (step % eval_interval == 0 or step == max_steps) and not stop:
        val = evaluate()
        note(dict(step=step, val=val))
        for kind, methods in val.items():
            texts = []
            for method, errors in methods.items():
                errors = ['-' if e is None else f'{e:.3f}' for e in errors.values()]
                texts.append(f'{method} {"/".join(errors)}')
            say(f'step {step}: {kind} error at 1/5/10/20 steps: {", ".join(texts)}')
    if step % save_interval == 0 or last:       # after the log: what is in it is not made again
        save_all()
    logged = step
bar.close()
if probe and step == max_steps:     # all else is saved already
    if 'labelled' not in held_out:
        say(f'--probe={probe}: no held-out clip can be read, to ask it about')
    elif rank == 0:
        reader, which = fit_probe()
        if len(reader.mean):
            tell_probe(reader, which)
            stats |= {f'probe.{name}': v for name, v in reader.state_dict().items()}
    save_all()
if step < max_steps:
    say(f'stopped at step {step}: python train.py --resume=True goes on')
else:
    say(f'trained {step} steps')
say(f'wrote {ckpt}, {optim} and {log}')
signal.set_wakeup_fd(-1)
if ddp:
    dist.barrier()      # one that leaves earlier ends connections that another still uses
    dist.destroy_process_group()
if push and rank == 0 and step == max_steps:      # nobody waits for it
    with data.writing(out_dir), open(f'{out_dir}/README.md', 'w') as f:
        f.write(card())
    data.answer_of_hub(push, lambda: api.upload_folder(     # all at once, what is there of these
        repo_id=push, folder_path=out_dir, commit_message=f'step {step}',
        allow_patterns=['README.md', 'ckpt.safetensors', 'rollout.png']), GRANT, False)
    say(f'pushed to {push}')
