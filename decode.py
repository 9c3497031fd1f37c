"""
Look at what a world model imagines: truth beside imagination, on held-out episodes.

    python decode.py                    # out/rollout.mp4 and out/rollout.png
    python decode.py --train=True       # first trains a decoder, out/decoder.safetensors
    python decode.py --films=True       # also steps, denoising and actions (.mp4, .png)
    python decode.py --report=True      # also out/report.html: all of a run in one page
    python decode.py --play=True        # a page on which you, or the planner, act in a dream
    python decode.py --ckpt=runs/robot/ckpt.safetensors --steps=30 --rows=2
    python decode.py --actions=False --text='push the disc left'    # from words alone

Pictures come from the decoder where one has been trained, else from the encoder's inverse (`pixels`
has one), else they are the leading principal components of the latents as colours.
"""
import html
import json
import math
import os
import secrets
import sys
import threading
from base64 import b64decode, b64encode
from contextlib import suppress
from copy import copy
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from timeit import timeit
from types import SimpleNamespace
from urllib.parse import parse_qsl

import data     # before torch: it sets how threads wait

import av
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from model import (IMAGENET, ViT, clip_inputs, clip_noise, encode_frames, encoder_latents,
                   official, one_line, open_run, pictures, read_tensors, robot_state, robot_stats,
                   rollout, shortcut_loss, standard, write_tensors)

# --------------------------------------------------------------------------------------------------
ckpt = 'out/ckpt.safetensors'        # or owner/name, of the hub
out_dir = ''                # '' = the folder of the checkpoint
encoder_path = ''           # the encoder's weights; '' = where training found them
labelled = ''               # datasets to look at; '' = those of training
unlabelled = ''             # or without their actions
robot = 0                   # whose actions labelled has: number of training's dataset, from 0
rows = 4                    # clips
steps = 20                  # imagined frames of each
K = 4                       # denoising steps per frame
films = False               # also of K, of other actions, and of a frame that is being denoised
actions = True              # False: imagined as if nobody knew them
text = ''                   # what is done, in words, of models with --text; '' = each clip's own
guide = 1.0                 # above 1: imagination does more of what actions and text say
report = False              # a page of the run: options, curves, films and, if there is one, plan
play = False                # serve the page, and no films
host = '127.0.0.1'          # where: this machine alone; its address in a network lets others in
port = 7007                 # 0 = any that is free
seed = 0
# the decoder
decoder = 'conv'            # of --train=True; or rae: RAE's, of DINOv2 with registers
decoder_path = ''           # RAE's file: its own model.pt, or the folder or file of diffusers
train = False
train_frames = 2048         # pictures that it learns from, kept in memory
train_steps = 1000
batch_size = 8
learning_rate = 2e-3        # at its height: up in a twentieth of the steps, then down to 0
channels = 128
lpips = 0.1                 # weight of the perceptual distance beside the squared error; 0 = none
lpips_path = ''             # VGG16 and LPIPS' heads in one file; '' = downloads them, 528 MB
noise = 0.0                 # on the latents in training, up to so many of their deviations, so that
                            # what is imagined, which is a little off, decodes well
device = 'auto'
dtype = 'auto'              # float32 or bfloat16; auto = bfloat16 where it is fast
config = data.override(globals(), sys.argv[1:])
# --------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Raw latents (B, N, D) -> frames (B, 3, height, width) in [0, 1]: every token is unfolded to
    features at an eighth of the frame's size or a little more, residual and transposed convolutions
    double it twice, and the last doubling takes pixels from channels: at full size a convolution
    costs most."""
    def __init__(self, encoder, channels):
        super().__init__()
        self.grid = encoder.grid
        self.side = encoder.size, encoder.width
        cell = -(-encoder.size // (8 * self.grid[0]))
        widths = channels, channels // 2, channels // 4
        self.register_buffer('mean', torch.zeros(encoder.dim))
        self.register_buffer('std', torch.ones(encoder.dim))
        self.stem = nn.ConvTranspose2d(encoder.dim, channels, cell, cell)
        self.mix = nn.ModuleList(nn.Conv2d(n, n, 3, padding=1) for n in widths)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(n, n // 2, 4, 2, 1) for n in widths[:2])
        self.out = nn.Conv2d(channels // 4, 3 * 4, 3, padding=1)
        # its key alone says something: others' latents may have the same shapes
        of = f'{encoder.name} {encoder.hash[:9]} {encoder.layer} {encoder.pool} {self.side}'
        self.register_buffer(of, torch.zeros(0))

    def forward(self, z):
        x = ((z - self.mean) / self.std).mT.unflatten(2, self.grid)
        x = self.stem(x)                                            # (B, channels, rows, columns)
        for mix, up in zip(self.mix, [*self.up, self.out]):
            x = up(F.silu(x + mix(F.silu(x))))
        return torch.sigmoid(resize(F.pixel_shuffle(x, 2), self.side))


def resize(x, side):        # not in bfloat16
    return F.interpolate(x.float(), side, mode='bilinear', antialias=True)


class RAE(nn.Module):
    """Raw latents (B, N, D) of DINOv2 with registers -> frames (B, 3, height, width) in [0, 1]: the
    decoder of RAE (arXiv:2510.11690), a ViT of one token for each of the latents'."""
    def __init__(self, encoder, state):
        super().__init__()
        width = len(state['patch_embed.bias'])
        depth = sum(key.endswith('norm1.bias') for key in state)
        hidden = len(state['blocks.0.mlp.fc1.bias'])
        rows = math.isqrt(state['pos_embed'].shape[1])              # beside the class token
        self.vit = ViT(width, depth, 16, hidden, False, 0, 1, rows, 'mae', encoder.dim)
        self.vit.pred = nn.Linear(width, 16 * 16 * 3)
        self.vit.load_state_dict(state)
        self.encoder = encoder

    def forward(self, z):
        norm = self.encoder.vit.norm
        z = (z - norm.bias) / norm.weight       # RAE's encoder ends in a norm without these
        rows = self.vit.grid
        z = F.interpolate(z.mT.unflatten(2, self.encoder.grid), rows, mode='bilinear')
        x = self.vit.pred(self.vit(z)).unflatten(2, (256, 3))       # (B, tokens, 16 16, 3)
        x = F.fold(x.permute(0, 3, 2, 1).flatten(1, 2), 16 * rows, 16, stride=16)
        mean, std = self.encoder.mean_std
        return resize(x * std + mean, (self.encoder.size, self.encoder.width)).clamp(0, 1)


RAE_NAMES = {   # what is replaced, from the first line to the last, before model.NAMES
    'decoder.': '',
    'decoder_embed': 'patch_embed',
    'trainable_cls': 'cls',
    'decoder_': '',
    'layernorm_before': 'norm1',
    'layernorm_after': 'norm2',
    'attention.output.dense': 'attn.proj',
    'attention.to_out.0': 'attn.proj',          # diffusers
    'attention.to_': 'attn.',
    'intermediate.dense': 'mlp.fc1',
    'output.dense': 'mlp.fc2',
}


def rae_state(tensors):
    """The state dict of RAE's ViT from the tensors of its own model.pt, or of diffusers'
    AutoencoderRAE, which also has the encoder and leaves out the positions."""
    state = {key: v for key, v in tensors.items() if not key.startswith(('encoder', '_'))}
    state = official(state, RAE_NAMES)
    state['patch_embed.weight'] = state['patch_embed.weight'][..., None, None]
    if 'pos_embed' not in state:        # waves of the column, then of the row
        rows = tensors['_latents_mean'].shape[-1]
        n = len(state['norm.bias']) // 4
        place = torch.ones(rows, rows).nonzero().flip(1)[..., None]         # (N, 2, 1)
        angle = place * 1e-4 ** (torch.arange(n) / n)
        waves = torch.cat((angle.sin(), angle.cos()), dim=2).flatten(1)
        state['pos_embed'] = F.pad(waves, (0, 0, 1, 0))[None]
    return state


def load_decoder(folder, encoder, device, path='', kind='conv'):
    """What --train=True has left in a checkpoint's folder, or None; else the file path, also of
    kind 'rae'. For the same latents or not at all."""
    if not path:
        path = f'{folder}/decoder.safetensors'
        if not os.path.isfile(path):
            return None
    if kind == 'rae' and (encoder.name[-6:], encoder.layer, encoder.pool) != ('14_reg', -1, 1):
        sys.exit('--decoder=rae: wants dinov2_vitb14_reg (or s, l) with layer=-1 and pool=1, not '
                 f'{encoder.name} with {encoder.layer} and {encoder.pool}')
    tensors = read_tensors(path, 'decoder_path')
    try:
        if kind == 'rae':
            net = RAE(encoder, rae_state(tensors))
        else:
            net = Decoder(encoder, len(tensors['stem.bias']))
            net.load_state_dict(tensors)
    except (KeyError, RuntimeError) as error:
        sys.exit(f'{path}: is not what the latents want ({one_line(error)}); decode.py '
                 '--train=True trains one')
    return net.to(device)


LPIPS = (       # VGG16, and heads
    'https://download.pytorch.org/models/vgg16-397923af.pth',
    'https://github.com/richzhang/PerceptualSimilarity/raw/'
    '082bb24f84c091ea94de2867d34c4544f68e0963/lpips/weights/v0.1/vgg.pth')


def load_perceptual(device):
    """The weights of perceptual_distance; None where there are none to be had, as a line says."""
    weights = {}
    if lpips_path:
        weights = read_tensors(lpips_path, 'lpips_path')
    else:
        try:
            for url in LPIPS:
                weights |= torch.hub.load_state_dict_from_url(url, map_location='cpu')
        except Exception as error:      # no network, a full disk
            print(f'--lpips={lpips}: goes on without, {url} is out of reach ({one_line(error)}); '
                  '--lpips_path=file names one that lies here')
            return None
    weights = {key: v.float().to(device) for key, v in weights.items()}
    try:
        perceptual_distance(weights, *torch.zeros(2, 1, 3, 16, 16, device=device))
    except (KeyError, RuntimeError) as error:
        sys.exit(f'--lpips_path={lpips_path}: wants features.0.weight .. of VGG16 and '
                 f'lin0.model.1.weight .. of LPIPS ({one_line(error)})')
    return weights


def perceptual_distance(weights, x, y):
    """LPIPS (n,) of frames x and y (n, 3, H, W) in [0, 1], version 0.1 (arXiv:1801.03924): where
    the unit vectors of VGG16's features differ."""
    mean, std = x.new_tensor(IMAGENET)[..., None, None]
    pair = [(v - mean) / std for v in (x, y)]       # apart: no gradient is wanted of one
    distance = 0
    number = 0      # of a layer, ReLU and pooling counted
    for i, depth in enumerate((2, 2, 3, 3, 3)):     # convolutions of VGG16's stages
        if i:
            pair = [F.max_pool2d(v, 2) for v in pair]
            number += 1
        for _ in range(depth):
            layer = weights[f'features.{number}.weight'], weights[f'features.{number}.bias']
            pair = [F.conv2d(v, *layer, padding=1).relu() for v in pair]
            number += 2
        a, b = map(F.normalize, pair)
        d = F.conv2d((a - b).square(), weights[f'lin{i}.model.1.weight'])
        distance += d.mean(dim=(1, 2, 3))
    return distance


def psnr(x, y):
    """In dB, between frames (n, 3, H, W) in [0, 1]."""
    return -10 * (x - y).square().mean().clamp(min=1e-10).log10()


def ssim(x, y):
    """Structural similarity of frames (n, 3, H, W) in [0, 1] under windows of 7 x 7 pixels, as
    scikit-image measures it by default."""
    mx, my, xx, yy, xy = (F.avg_pool2d(v, 7, 1) for v in (x, y, x * x, y * y, x * y))
    means = mx * mx + my * my
    variances = 49 / 48 * (xx + yy - means)
    covariance = 49 / 48 * (xy - mx * my)
    alike = (2 * mx * my + 1e-4) * (2 * covariance + 9e-4)
    return (alike / (means + 1e-4) / (variances + 9e-4)).mean()


def tell_quality(ways):
    """Print how near pictures {what they are: (n, 1, 3, H, W) in [0, 1]} are to the camera's, on
    average over n."""
    by = 'decoder' if decode else f'inverse of {encode.name}'
    truth = ways.pop('camera')
    measures = {'PSNR, dB,': psnr, 'SSIM': ssim}
    if weights:
        measures['LPIPS'] = partial(perceptual_distance, weights)
    for name, measure in measures.items():
        said = [f'{way} {torch.tensor([*map(measure, truth, x)]).mean():.3f}'
                for way, x in ways.items()]
        print(f'{name} through the {by}: {", ".join(said)}')


def open_clips(model, trained, encode):
    """What a checkpoint is looked at with: clips as in training, of one kind."""
    known = model.config['action_dim'] and (labelled or trained['labelled'] and not unlabelled)
    options = trained if known else trained | dict(action='none', state='')
    sets = data.open_sets(
        labelled or unlabelled or trained['labelled' if known else 'unlabelled'],
        *[options[name]
          for name in 'camera action fps action_mode rotation cache_gb state'.split()])
    clips = data.Clips(sets if known else [], [] if known else sets, trained['frames'],
                       trained['frameskip'], (encode.size, encode.width), 1, 1.0,
                       trained['val_share'])
    clips.A = model.stats['a_mean'].shape[1]
    clips.S = model.config['state_dim']
    for i, ds in enumerate(clips.labelled):     # normalised as in training, whatever is in it
        width = ds.action_dim * trained['frameskip']
        number = robot if labelled else i
        for name, rows in zip(('mean', 'std'), robot_stats(model.stats, number, ckpt)):
            if rows.numel() != width:
                sys.exit(f'--labelled: {ds.name} has actions {width} wide per model step, this '
                         f'robot of {ckpt} {rows.numel()}: --robot names another')
            ds.stats[name] = rows.flatten()[:ds.action_dim].numpy()
        if clips.S:
            clips.states[i] = robot_state(model.stats, number)
            if ds.state_dim != len(clips.states[i][0]):
                ds.state_dim = 0        # another robot's: not known
    return clips


def train_decoder(encoder, x, z, autocast, weights):
    """A Decoder of raw latents z (n, N, D) into their frames x (n, 3, height, width) uint8; weights
    of perceptual_distance, or None. The latents are frozen: no gradient reaches the encoder or the
    world model."""
    torch.manual_seed(seed)
    decoder = Decoder(encoder, channels).to(z.device)
    decoder.std[:], decoder.mean[:] = torch.std_mean(z, dim=(0, 1))
    decoder.std.clamp_(min=1e-6)
    optimizer = torch.optim.AdamW(decoder.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, train_steps + 1, pct_start=0.05)
    bar = tqdm(range(1, train_steps + 1), 'decoder', disable=None)
    for step in bar:
        pick = torch.randint(len(x), (batch_size,))
        truth = x[pick].to(z.device) / 255
        latents = z[pick]
        size = noise * torch.rand_like(latents[:, :1, :1])
        latents += size * decoder.std * torch.randn_like(latents)
        with autocast:
            y = decoder(latents).float()
        loss = F.mse_loss(y, truth)
        if weights:
            # of a random window of 64 pixels: of the whole picture it would cost more than all else
            top, left = (torch.randint(max(1, n - 63), ()) for n in x.shape[2:])
            windows = torch.stack((y, truth))[..., top:top + 64, left:left + 64]
            loss += lpips * perceptual_distance(weights, *windows).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == train_steps:
            loss = loss.item()
            if not math.isfinite(loss):
                sys.exit(f'decoder step {step}: the loss is not finite; nothing has been saved')
            bar.write(f'decoder step {step}: loss {loss:.5f}')
            sys.stdout.flush()
    return decoder


def grey(x):
    """(B, T, H, W) in [0, 1] as uint8 (B, T, 3, H, W)."""
    return torch.stack([255 * x] * 3, dim=2).to(torch.uint8).cpu()


def bars(a, a_mask, side):
    """Normalised actions (B, T, A) as (B, T, *side) in [0, 1]: a bar for each number of what was
    done before a frame, up from the middle or down, three deviations long at most."""
    a = F.interpolate(torch.where(a_mask[..., None], a, 0.0), side[1])
    y = torch.linspace(3, -3, side[0])[:, None]
    return (a[:, :, None] / y < 1).float()


made = {}       # films of this run: what is side by side in them


def film(name, ways, fps):
    """Write pictures {what they are: uint8 (B, T, 3, H, W)} side by side, a clip a row, as a video,
    and below each other, a frame a column, as one picture."""
    x = [*map(data.enlarge, ways.values())]
    # (T, 3, B H, ways W) and (T, 3, B ways H, W)
    video, column = (torch.cat([*torch.cat(x, dim)], dim=2) for dim in (4, 3))
    path = f'{out_dir}/{name}'
    data.write_video(f'{path}.mp4', video, fps)
    # eight frames at most
    data.write_image(f'{path}.png', torch.cat([*column[::-(-len(column) // 8)]], dim=2))
    made[path] = ' | '.join(ways)
    print(f'wrote {path}.mp4 and {name}.png: {made[path]}')


# --------------------------------------------------------------------------------------------------
# The report: one file that asks for no other and runs no script. Colours can be told from a white
# ground and from a dark one.

HEAD = '''<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: auto; padding: 1rem }
path { stroke: #8886 }
section { display: grid; gap: 1rem 2rem;
          grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)) }
h2, p, .wide { grid-column: 1 / -1; margin: 0 }
h1, figure { overflow-wrap: anywhere }
figure { margin: 0; min-width: 0 }
h2 { margin-top: 1rem }
svg { width: 100% }
video { max-width: 100%; max-height: 30rem }
svg { fill: currentColor; font-size: 11px }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.wide { overflow-x: auto }
.wide img { min-width: 44rem; width: 100% }
td { padding-right: 1em; vertical-align: top; max-width: 50rem; overflow-wrap: break-word }
</style>
'''


def curve(title, lines, x_label):
    """A figure, as SVG, of lines {name: [(x, y), ..]}, all above 0; a sentence where there are
    none. The title and the label are HTML."""
    points = sum(lines.values(), [])
    if not points:
        return f'<p>{title}: nothing has been measured.</p>'
    x, y = zip(*points)
    left = min(x)
    wide = max(x) - left or 1
    high = max(y) or 1
    svg = f'<figure><b>{title}</b><svg viewBox="0 0 370 225">'
    for i in range(5):
        up = 190 - 45 * i
        svg += (f'<path d="M45 {up}H355"/><text x="40" y="{up + 4}" text-anchor="end">'
                f'{high * i / 4:.3g}</text><text x="{45 + 77 * i}" y="205" text-anchor="middle">'
                f'{left + wide * i / 4:g}</text>')
    names = ''
    for i, (name, line) in enumerate(lines.items()):
        line = [f'{45 + 308 * (x - left) / wide:.1f},{190 - 180 * y / high:.1f}' for x, y in line]
        ink = f'oklch(62% .15 {250 + 100 * i})'         # as light as any other, of another hue
        svg += f'<polyline points="{" ".join(line)}" stroke="{ink}"/>'
        names += f'<span style="color:{ink}">&#9632; {html.escape(name)}</span> '
    return (f'{svg}<text x="200" y="221" text-anchor="middle">{x_label}</text></svg>'
            f'<figcaption>{names}</figcaption></figure>')


def table(rows):
    out = ''
    for row in rows:
        cells = map(html.escape, map(str, row))
        out += f'<tr><td>{"<td>".join(cells)}'
    return f'<div class="wide"><table>{out}</table></div>'


def shown(make, path):
    """make(an open file), which is HTML; a sentence where there is none, or a damaged one."""
    try:
        with data.reading(path), open(path, 'rb') as f:
            return make(f)
    except data.Bad as error:
        return f'<p>{html.escape(str(error))}</p>'


def embedded(f):
    """A film or a picture, in the page itself."""
    content = f.read()
    if len(content) > 8e6:
        raise data.Bad('has more than 8 MB, too much for this page', f.name)
    caption = made.get(f.name[:-4], 'now beside the goal, of plan.py')
    content = b64encode(content).decode()
    show = f'video controls muted loop playsinline src="data:video/mp4;base64,{content}"></video'
    if f.name.endswith('.png'):
        show = f'img alt="" src="data:image/png;base64,{content}"'
    return f'<figure class="wide"><{show}><figcaption>{caption}</figcaption></figure>'


def training_curves(f):
    """Figures of what train.py has logged."""
    terms = {}
    val = {}
    for entry in map(json.loads, f):
        val = entry.get('val', val)
        for name in 'flow', 'bootstrap', 'self_forcing', 'policy':
            if entry.get(name) is not None:
                terms.setdefault(name, []).append((entry['step'], entry[name]))
    out = curve('Loss, by term', terms, 'step')
    for kind, methods in val.items():
        lines = dict.fromkeys(('model', 'repeat'))      # in every figure of the same colours
        for method, errors in methods.items():
            lines[method] = [(int(h), e) for h, e in errors.items() if e is not None]
        out += curve(f'Error on held-out {kind} episodes', lines, 'steps ahead')
    return out


@torch.no_grad()
def level_curve(z, a, a_mask, z_mask, words):
    """A figure of the model's loss of clips z (B, T, N, D), unweighted, all frames at one level."""
    options = dict(objective='diffusion', tau_schedule='uniform', p_past=0.0, p_image=0.0,
                   ramp=False, state_dim=clips.S)
    noise = clip_noise(z, range(len(z)))
    noise.null[:] = 1       # nothing is hidden, of actions and of text
    line = []
    for i in range(8):
        noise.tau[:] = i / 8
        with autocast:
            _, metrics = shortcut_loss(model, z, a, a_mask, z_mask, options, noise=noise,
                                       text=words)
        line.append((metrics['tau'].item(), metrics['flow'].item()))
    return curve('Error by signal level, held out', {'model': line}, 'tau: 0 is noise, 1 is clean')


def action_curves():
    """A figure for each dataset: how often its actions are so far from their mean, in deviations as
    training sees them, which cuts them at 5."""
    out = ''
    for i, ds in enumerate(clips.labelled):
        parts = clips.readable(lambda s, e, *_: torch.from_numpy(ds.rows(e)), [i], clips.train, 32,
                               sys.maxsize)
        lines = {}
        columns = torch.cat(parts).T if parts else []
        for mean, std, rows in zip(ds.stats['mean'], ds.stats['std'], columns):
            off = (rows[rows.isfinite()] - mean) / max(std, 1e-6)
            share = torch.histc(off.clamp(-5, 5), 41, -5, 5) / len(off)
            lines[f'{len(lines)}: {mean:.3g} ± {std:.3g}'] = [
                (k / 4 - 5, n) for k, n in enumerate(share.tolist())]
        out += curve(f'Actions of {html.escape(ds.name)}', lines, 'deviations from the mean')
    return out or '<p>These clips have no actions.</p>'


def plan_table(f):
    """What plan.py has left of its closed loop."""
    plan = json.load(f)
    keys = 'success_end', 'success_ever', 'distance_end', 'seconds_per_plan', 'episodes'
    rows = [('', '95 % from', 'to', *keys)]
    for name, row in plan.pop('methods').items():
        numbers = row['ci95'] + [row[key] for key in keys]
        rows.append([name] + [f'{v or 0:.4g}' for v in numbers])
    return table(rows) + table(plan.items())


# --------------------------------------------------------------------------------------------------
# Play: a page on which a dream goes on by a step for each request. A dream is a visitor's own: the
# last of its frames, each latents (N, D), what led there (A,) and whether that is known. world: the
# server; asked: the fields of a request, all text.

DREAMS = 8              # that are kept; the oldest goes
UNDO = 64               # steps that can be taken back
MOST = 8 << 20          # bytes of a request
REQUESTS = [f'POST/{path}' for path in 'show begin reset step drive undo goal'.split()]


def open_server(clips, decode):
    """Its serve_forever() serves the page at http://host:server_port. It has what all dreams share;
    about: what the page is told, of actions in the dataset's units."""
    import plan         # here, as it imports this file
    try:
        server = ThreadingHTTPServer((host, port), Visit)
    except (OSError, UnicodeError) as error:
        sys.exit(f'--host={host} --port={port}: cannot be served there ({one_line(error)})')
    server.names = [        # browsers leave out the port of the web
        f'{name}:{server.server_port}'.removesuffix(':80') for name in (host, 'localhost')]
    server.planner = planner = plan.Planner(
        ckpt, plan.config | config | dict(K=1, budget_ms=1000.0), tell=False)
    server.clips = clips
    server.which = robot if clips.labelled and not labelled else 0      # not another robot's
    server.decode = decode
    server.dreams = {}
    server.lock = threading.Lock()
    ds = clips.sets[server.which]
    c = planner.model.config
    server.about = dict(
        names=planner.action_names, low=planner.a_low[0].tolist(), high=planner.a_high[0].tolist(),
        episodes=len(ds.episodes), rate=ds.fps / planner.frameskip, size=clips.size, K=K,
        k_max=c['k_max'], objective=c['objective'], text=text if c['text'] else None)
    return server


def look(world, asked):
    """Frames to begin with: an uploaded picture at rest, or as many as training gave, from
    thousandth `at` of an episode."""
    planner = world.planner
    clips = world.clips
    T = planner.trained['eval_context']
    if 'upload' in asked:
        x = data.decode_picture(b64decode(asked['upload']), clips.size)
        z = planner.with_state(planner.latents(x[None].copy()), None)[0]
        return [(z, z.new_zeros(clips.A), z.new_zeros((), dtype=torch.bool))] * T
    ds = clips.sets[world.which]
    e = int(asked.get('episode', 0)) % len(ds.episodes)
    start = int(asked.get('at', 0)) * ds.episodes[e].length // 1001
    clip = clips.clip(world.which, e, start, ds.camera, T)
    z = encode_frames(planner.encoder, clip['x'], planner.autocast)
    return [*zip(*clip_inputs(clip, z, planner.model.stats))]


def past(dream, T):
    """Latents (1, T, N, D), actions (1, T, A) and a_mask (1, T) of the last T frames; latents (1,
    N, D) of those before."""
    z, a, a_mask = (torch.stack(v)[None] for v in zip(*dream.frames[-T:]))
    a_mask[:, 0] = False        # what led there is out of sight
    return z, a, a_mask, [frame[0][None] for frame in dream.frames[:-T]]


def imagine(dream, asked, a, known):
    """One more frame, after the actions a (A,) of a model step. Each time the model's context is
    computed anew, so that the thousandth costs what the first does."""
    planner = dream.planner
    model = planner.model
    context = model.config['context']
    z, before, a_mask, gone = past(dream, context)
    a_mask = F.pad(a_mask, (0, 1), value=known)
    with planner.autocast:
        z = rollout(model, z, torch.cat((before, a[None, None]), dim=1), a_mask,
                    int(asked.get('K', K)), seed=seed + dream.steps, graph=False, gone=gone,
                    text=data.text_bytes(planner.o.text)[None].to(a.device))
    frames = [*dream.frames, (z[0, 0], a, a_mask[0, -1])]
    dream.frames = frames[-context - model.reach - UNDO:]
    dream.steps += 1
    dream.left = min(dream.left + 1, UNDO)


def act(dream, asked):
    """Actions (A,) of a model step that repeats a row of the dataset, `action` with commas, and
    whether there is one."""
    planner = dream.planner
    a = torch.zeros_like(dream.frames[0][1])
    if 'action' not in asked:
        return a, False
    row = torch.tensor([*map(float, asked['action'].split(','))])
    if len(row) != planner.width or not row.isfinite().all():
        raise ValueError(f'action={row}: wants {planner.width} finite numbers')
    a[:planner.used] = planner.normalised(row.clamp(planner.a_low, planner.a_high)).flatten()
    return a, True


def drive(dream):
    """The first actions of a plan towards the goal, as act. It begins from the last plan."""
    planner = dream.planner
    if dream.goal is None:
        raise ValueError('the planner wants a goal')
    planner.z, planner.a, planner.known, planner.gone = past(
        dream, planner.trained['eval_context'])
    planner.z_goal = dream.goal[None]
    planner.search()
    return planner.last_plan[0, 0], True


def picture(world, dream, z):
    """That of latents (N, D): red, green and blue of every pixel, in base64."""
    # the components are of the first frame as well
    z = torch.stack([z] if world.decode else [dream.first[0][0], z])
    x = pictures(encoder_latents(world.planner.model, z), world.planner.encoder, world.decode)[-1]
    return b64encode(x.permute(1, 2, 0).numpy().tobytes()).decode()


def answer(world, path, asked):
    """What the page shows once the visitor's dream has done as asked, or a new one begun."""
    token = asked.get('dream')
    dream = world.dreams.get(token)
    if not dream:
        path = '/begin'
        token = secrets.token_urlsafe()
        planner = copy(world.planner)
        planner.o = copy(planner.o)
        dream = SimpleNamespace(goal=None, goal_picture='', planner=planner)
    if path != '/drive':
        dream.planner.restart()
    dream.planner.o.text = asked.get('text', text)
    if path == '/begin':
        dream.first = look(world, asked)
    if path in ('/begin', '/reset'):
        dream.frames = dream.first
        dream.steps = dream.left = 0        # left: can be taken back
    elif path == '/undo' and dream.left:
        dream.frames.pop()
        dream.steps -= 1
        dream.left -= 1
    elif path == '/goal':
        frames = dream.frames if 'here' in asked else look(world, asked)
        dream.goal = frames[-1][0]
        dream.goal_picture = picture(world, dream, dream.goal)
    elif path == '/step':
        imagine(dream, asked, *act(dream, asked))
    elif path == '/drive':
        imagine(dream, asked, *drive(dream))
    world.dreams[token] = dream
    if len(world.dreams) > DREAMS:
        del world.dreams[next(iter(world.dreams))]
    z, a, known = dream.frames[-1]
    return world.about | dict(
        dream=token, picture=picture(world, dream, z), goal=dream.goal_picture,
        action=world.planner.physical(a)[0].tolist() if known else None, steps=dream.steps,
        left=dream.left)


class Visit(BaseHTTPRequestHandler):
    """One request."""
    timeout = 60            # of a visitor who sends nothing

    def respond(self):
        """(status, what is told)."""
        name = self.headers['Host']
        page = f'http://{name}'
        # a name of another site may lead here, too, and its pages may ask
        if name not in self.server.names or self.headers.get('Origin', page) != page:
            return 403, 'wants the address that was printed'
        request = self.command + self.path
        if request == 'GET/':
            return 200, PAGE
        if request not in REQUESTS:
            return 404, 'is not there'
        length = int(self.headers['Content-Length'] or 0)
        if not 0 <= length <= MOST:
            return 413, 'is too large: 6 MB at most'
        asked = dict(parse_qsl(self.rfile.read(length).decode(), keep_blank_values=True,
                               max_num_fields=9))
        with self.server.lock:
            return 200, answer(self.server, self.path, asked)

    def do_POST(self):
        try:
            status, told = self.respond()
        except (ValueError, OSError, SystemExit, data.Away, av.FFmpegError) as error:
            print(one_line(error), flush=True)      # here alone: it may name files
            status, told = 400, 'cannot be done: see the terminal'
        kind = 'text/html'
        if told is not PAGE:
            kind = 'application/json'
            told = json.dumps(told if status == 200 else dict(error=told))
        with suppress(ConnectionError):      # who has left
            self.send_response(status)
            self.send_header('Content-Type', kind)
            self.end_headers()
            self.wfile.write(told.encode())

    do_GET = do_POST

    def log_message(self, *_):
        pass


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>goaldream</title>
<style>
:root { color-scheme: light dark; --paper: #faf9f6; --ink: #24231f; --soft: #77746b;
  --line: #dedbd2; --on: #2e6f63 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #161715; --ink: #e6e4dd; --soft: #98958b; --line: #33342f; --on: #7fc4b3 } }
* { box-sizing: border-box }
[hidden] { display: none !important }
body { margin: 0 auto; padding: 2rem; max-width: 66rem; display: grid; gap: 2.5rem;
  grid-template-columns: minmax(0, 1fr) 16rem; font: 15px/1.5 system-ui, sans-serif;
  background: var(--paper); color: var(--ink) }
main { justify-self: center; align-self: start; position: sticky; top: 2rem;
  width: min(100%, 100vh - 7rem) }
#picture { display: block; width: 100%; border-radius: 8px; background: var(--line);
  touch-action: none; cursor: crosshair; user-select: none }
p { margin: .6rem 0 0; color: var(--soft); font-size: 13px; min-height: 1.5em;
  font-variant-numeric: tabular-nums }
aside { display: grid; gap: 1.4rem; align-content: start }
section { display: grid; gap: .5rem }
h2 { margin: 0; font-size: 13px; font-weight: 500; color: var(--soft) }
.row { display: flex; gap: .5rem; align-items: center }
.row > button { flex: 1 }
button, select, #text, input[type=number] { font: inherit; color: inherit; background: none;
  height: 2.2rem; border: 1px solid var(--line); border-radius: 6px; padding: 0 .6rem }
select option { background: var(--paper) }
button { cursor: pointer }
button:hover:enabled { border-color: var(--on) }
button:disabled { color: var(--soft); opacity: .55; cursor: default }
button[aria-pressed=true] { background: var(--on); border-color: var(--on); color: var(--paper) }
:focus-visible { outline: 2px solid var(--on); outline-offset: 1px }
input[type=range] { flex: 1; min-width: 0; accent-color: var(--on) }
input[type=checkbox] { accent-color: var(--on); margin: 0 }
input[type=number] { width: 4.5rem }
#text { min-width: 0; flex: 1 }
label { display: flex; gap: .5rem; align-items: center }
#moves { max-height: 17rem; overflow: hidden auto; padding-right: 4px }
#moves label { display: grid; grid-template-columns: 1fr auto; gap: 0 .5rem }
#moves input { grid-column: 1 / 3; width: 100% }
output { color: var(--soft); font-variant-numeric: tabular-nums }
#aim { width: 5rem; border-radius: 6px }
@media (max-width: 45rem) {
  body { grid-template-columns: minmax(0, 1fr); padding: 1rem; gap: 1rem }
  main { position: static; width: min(100%, 60vh) } }
</style>
<main>
<canvas id="picture" role="img" aria-label="what the model imagines"></canvas>
<p id="said" role="status"></p>
</main>
<aside>
<section id="acts">
<h2>Arrow keys, or drag on the picture</h2>
<div id="moves" class="row" style="display: grid"></div>
<label><input type="checkbox" id="spring"> back to rest when let go</label>
<label><input type="checkbox" id="known" checked> with actions</label>
</section>
<div class="row"><button id="step">Step</button><button id="undo">Undo</button>
<button id="reset">Reset</button></div>
<section>
<h2>From an episode</h2>
<div class="row"><input type="number" id="episode" min="0" value="0" aria-label="episode">
<input type="range" id="at" min="0" max="1000" value="0" aria-label="where in the episode"></div>
<div class="row"><button id="begin">Begin</button><button id="there">Set as goal</button></div>
</section>
<section>
<h2>From a picture of yours</h2>
<div class="row"><button id="upload">Begin</button><button id="other">Set as goal</button></div>
</section>
<section>
<h2>Goal</h2>
<div class="row"><canvas id="aim" role="img" aria-label="the goal" hidden></canvas>
<button id="here">This frame</button></div>
<button id="drive" aria-pressed="false">Let the planner drive</button>
</section>
<label id="words">What is done <input id="text"></label>
<label id="finer">Denoising steps <select id="K"></select></label>
<input type="file" id="file" accept="image/*" hidden>
</aside>
<script>
const $ = id => document.getElementById(id)
const KEYS = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, -1], ArrowDown: [1, 1]}
const ARROWS = [' ← →', ' ↑ ↓']
const held = new Set(), tapped = new Set()       // tapped: since the last step
let world, sliders = [], rest = [], last = Promise.resolve()
let dragging = false, driving = false, once = false, running = false, speed = 0

function ask(path, body = {}) {
  last = last.then(() => send(path, body))
  return last
}

async function send(path, body) {
  try {
    const all = {dream: sessionStorage.dream || '', ...body,
      ...world && {K: $('K').value, text: $('text').value}}
    const began = performance.now()
    const reply = await fetch(path, {method: 'POST', body: new URLSearchParams(all)})
    const told = await reply.json()
    if (told.error) throw Error(told.error)
    const lost = sessionStorage.dream && sessionStorage.dream != told.dream
    show(told, performance.now() - began)
    if (lost) throw Error('the dream was gone: this is a new one')
  } catch (error) {
    driving = false
    held.clear()
    tapped.clear()
    $('said').textContent = body.upload ? 'this picture cannot be read' : error.message
  }
}

function show(told, ms) {
  if (!world) meet(told)
  sessionStorage.dream = told.dream
  draw($('picture'), told.picture)
  $('aim').hidden = !told.goal
  if (told.goal) draw($('aim'), told.goal)
  $('undo').disabled = !told.left
  $('reset').disabled = !told.steps
  $('drive').disabled = !told.goal
  const rate = running && speed ? ` · ${speed.toFixed(1)} frames/s` : ''
  $('said').textContent = `step ${told.steps} · ${ms.toFixed(0)} ms${rate}`
  if (told.action && (driving || !running && !$('spring').checked)) set(told.action)
}

function draw(canvas, rgb) {
  const [height, width] = world.size
  const bytes = atob(rgb)
  const image = new ImageData(width, height)
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = bytes.charCodeAt(3 * i + c)
    image.data[4 * i + 3] = 255
  }
  Object.assign(canvas, {width, height})
  canvas.getContext('2d').putImageData(image, 0, 0)
}

function meet(told) {
  world = told
  rest = told.low.map((low, i) => low < 0 && told.high[i] > 0 ? 0 : (low + told.high[i]) / 2)
  sliders = told.low.map((low, i) => {
    const label = document.createElement('label')
    const slider = document.createElement('input')
    const name = told.names.length == told.low.length ? told.names[i] : 'a' + i
    label.append(name + (ARROWS[i] ?? ''), document.createElement('output'), slider)
    Object.assign(slider, {type: 'range', step: 'any', min: low, max: told.high[i]})
    slider.onpointerdown = () => { dragging = true; run() }
    slider.oninput = () => { set(action()); once = true; run() }
    $('moves').append(label)
    return slider
  })
  $('spring').checked = told.low.every((low, i) => low < 0 && told.high[i] > 0)
  $('finer').hidden = told.objective == 'direct'
  $('words').hidden = told.text == null
  $('text').value = told.text ?? ''
  for (let k = 1; k <= told.k_max; k *= 2) $('K').add(new Option(k, k, k == told.K, k == told.K))
  $('episode').max = told.episodes - 1
  set(rest)
}

function set(values) {
  sliders.forEach((slider, i) => {
    slider.value = values[i]
    slider.previousSibling.value = (+slider.value).toPrecision(2)
  })
}

const action = () => sliders.map(slider => +slider.value)

function press() {
  const keys = new Set([...held, ...tapped])
  tapped.clear()
  if (!keys.size) return
  const values = $('spring').checked ? [...rest] : action()
  for (const key of keys) {
    const [i, way] = KEYS[key]
    if (i >= values.length) continue
    const end = way < 0 ? world.low[i] : world.high[i]
    values[i] = $('spring').checked ? end : values[i] + way * (world.high[i] - world.low[i]) / 10
  }
  set(values)
}

async function run() {
  if (running || !world) return
  running = true
  speed = 0
  while (driving || held.size || dragging || once) {
    const began = performance.now()
    once = false
    press()
    const acts = $('known').checked
    await (driving ? ask('/drive') : ask('/step', acts ? {action: action()} : {}))
    const spare = 1000 / world.rate - (performance.now() - began)
    await new Promise(go => setTimeout(go, Math.max(0, spare)))
    speed = 1000 / (performance.now() - began)
  }
  running = false
  $('drive').ariaPressed = false
  if ($('spring').checked) set(rest)
}

function letGo() {
  if (dragging) document.activeElement.blur()
  dragging = false
}

onkeydown = e => {
  if (e.ctrlKey || e.altKey || e.metaKey || e.target.closest?.('input, select')) return
  if (KEYS[e.key]) { held.add(e.key); tapped.add(e.key) }
  else if (e.key == ' ' && e.target == document.body) once = true
  else return
  e.preventDefault()
  once = true
  driving = false
  run()
}
onkeyup = e => {
  held.delete(e.key)
  if (!held.size && !dragging && $('spring').checked) set(rest)
}
onblur = () => held.clear()
onpointerup = onpointercancel = letGo
$('picture').onpointerdown = $('picture').onpointermove = e => {
  if (e.type == 'pointerdown') { dragging = once = true; driving = false }
  if (!dragging || !e.buttons) return
  const box = $('picture').getBoundingClientRect()
  const at = [(e.clientX - box.x) / box.width, (e.clientY - box.y) / box.height]
  const values = action()
  at.slice(0, values.length).forEach((x, i) => {
    values[i] = world.low[i] + Math.min(1, Math.max(0, x)) * (world.high[i] - world.low[i])
  })
  set(values)
  run()
}
$('step').onclick = () => { once = true; run() }
$('undo').onclick = () => { driving = false; ask('/undo') }
$('reset').onclick = () => { driving = false; ask('/reset') }
$('here').onclick = () => ask('/goal', {here: 1})
const place = () => {
  const episode = Math.min(Math.max(0, Math.round(+$('episode').value)), world.episodes - 1)
  $('episode').value = episode
  return {episode, at: $('at').value}
}
$('there').onclick = () => ask('/goal', place())
$('begin').onclick = () => { driving = false; ask('/begin', place()) }
$('drive').onclick = () => { driving = !driving; $('drive').ariaPressed = driving; run() }
let uploads
$('other').onclick = () => { uploads = '/goal'; $('file').click() }
$('upload').onclick = () => { driving = false; uploads = '/begin'; $('file').click() }
$('file').onchange = async () => {
  const [file] = $('file').files
  $('file').value = ''
  if (file.size > 6e6) { $('said').textContent = 'the picture is too large: 6 MB at most'; return }
  const url = await new Promise(go => {
    const reader = new FileReader()
    reader.onload = () => go(reader.result)
    reader.readAsDataURL(file)
  })
  ask(uploads, {upload: url.split(',')[1]})
}
ask('/show')
</script>
"""


if __name__ == '__main__':
    if channels < 16 or not steps:
        sys.exit(f'--channels={channels} --steps={steps}: want 16 and 1, or more')
    if train and decoder_path or decoder == 'rae' and not decoder_path:
        sys.exit('--decoder=rae: wants --decoder_path, which comes without --train')
    device = data.pick_device(device)
    autocast = data.autocast(device, dtype)
    ckpt = data.checkpoint(ckpt)
    model, trained, encode = open_run(ckpt, device, K, guide, text, encoder_path)
    folder = os.path.dirname(ckpt) or '.'
    out_dir = out_dir or folder
    clips = open_clips(model, trained, encode)
    weights = None
    if lpips and (train or lpips_path) and min(encode.size, encode.width) >= 16:    # VGG16's least
        weights = load_perceptual(device)
    if train or not play:
        data.own(out_dir, '.decode.lock')
    if train:
        x = clips.sample(-(-train_frames // 16), 16)
        parts = tqdm(x.split(64), 'encoding', disable=None)
        z = torch.cat([encode_frames(encode, part, autocast) for part in parts])
        write_tensors(f'{out_dir}/decoder.safetensors',
                      train_decoder(encode, x, z, autocast, weights).state_dict())
        print(f'wrote {out_dir}/decoder.safetensors')
    decode = load_decoder(out_dir, encode, device, decoder_path, decoder)
    if play:
        server = open_server(clips, decode)
        print(f'http://{host}:{server.server_port} until Ctrl-C', flush=True)
        with server, suppress(KeyboardInterrupt):
            server.serve_forever()
        sys.exit()

    context = trained['eval_context']
    held_out = clips.held_out(context + steps, rows)
    if not held_out:
        sys.exit(f'{", ".join(ds.name for ds in clips.sets)}: no held-out episode can be read')
    kind, batch = held_out.popitem()
    x = batch['x']                                                      # (B, T, 3, H, W) uint8
    B, T = x.shape[:2]
    z_raw = encode_frames(encode, x, autocast)
    z_true, a, a_mask = clip_inputs(batch, z_raw, model.stats)
    a_mask = a_mask & actions
    words = (data.text_bytes(text)[None] if text else batch['text']).to(device)
    z = z_true[:, :context]

    def raw(*parts):
        """The encoder's latents (B, T, N, D) of parts of a clip, without the state."""
        return encoder_latents(model, torch.cat(parts, dim=1))

    imagine_all = partial(rollout, model, z, seed=seed, text=words)

    def dream(a, a_mask, K):
        with autocast:
            return raw(z, imagine_all(a, a_mask, K))

    def show(ways):
        """The camera's pictures and those of raw latents {what they are: (B, T, N, D)}; in one
        call, as the colours of principal components only compare within it."""
        return {'camera': x} | dict(
            zip(ways, pictures(torch.stack([*ways.values()]), encode, decode)))

    imagined = dream(a, a_mask, K)
    ways = show({'latents of the camera': z_raw, 'imagined': imagined})
    note = ''
    if decode or encode.decode:
        still = x[:, context - 1:context].expand_as(x)
        real = batch['z_mask'][:, context:]
        future = {way: v[:, context:][real][:, None].to(device) / 255
                  for way, v in (ways | {'last frame': still}).items()}
        tell_quality(future)
        # all is compiled by now
        one = timeit(lambda: pictures(z_raw[0], encode, decode), number=1) / T
        two = timeit(lambda: dream(a, a_mask, K).cpu(), number=1) / (B * steps)
        print(f'decoding a frame of {encode.size} x {encode.width} takes {1000 * one:.3g} ms, '
              f'imagining it {1000 * two:.3g} ms')
    else:
        note = 'no decoder (--train=True): pictures are principal components of the latents'
        print(note)

    off = standard(imagined, model.stats) - standard(z_raw, model.stats)
    error = off.square().mean(dim=3).clamp(max=1)           # white: the data's variance, or more
    ways['error'] = grey(F.interpolate(error.unflatten(2, encode.grid), x.shape[3:]))
    if kind == 'labelled':
        ways['actions'] = grey(bars(batch['a'], batch['a_mask'], x.shape[3:]))
    fps = clips.sets[0].fps / trained['frameskip']
    film('rollout', ways, fps)
    if films:
        k_max = model.config['k_max']
        ways = {f'K = {k}': dream(a, a_mask, k) for k in (1, 4, 64) if k <= k_max}
        film('steps', show(ways), fps)
        frames = []
        hook = model.register_forward_hook(lambda net, inputs, out: frames.append(inputs[0]))
        with autocast:
            end = imagine_all(a[:, :context + 1], a_mask[:, :context + 1], k_max, graph=False)
        hook.remove()
        film('denoising',
             {'a frame from noise': pictures(raw(*frames[1:], end), encode, decode)}, 10)
        if actions and kind == 'labelled' and B > 1:
            other = a.roll(B // 2, 0)       # half a turn, as in training's evaluation
            ways = {'imagined': imagined, 'without actions': dream(a, a_mask & False, K),
                    'with those of another clip': dream(other, a_mask, K)}
            film('actions', show(ways), fps)
    if report:
        encode.decode = decode = None       # from here on pictures are principal components
        film('pca', show({'latents': z_raw, 'imagined': imagined}), fps)
        training = shown(training_curves, f'{folder}/log.jsonl')
        if model.config['objective'] != 'direct':       # which knows no levels
            training += level_curve(z_true, a, a_mask, batch['z_mask'].to(device), words)
        films = [shown(embedded, f'{path}.mp4') for path in made]
        with data.writing(out_dir), open(f'{out_dir}/report.html', 'w', encoding='utf8') as f:
            f.write(f'''{HEAD}
<title>{html.escape(ckpt)}</title>
<h1>{html.escape(ckpt)}, step {model.step}</h1>
<section><h2>Training</h2>{training}</section>
<section><h2>Latents as colours</h2>{shown(embedded, f'{out_dir}/pca.png')}</section>
<section><h2>Films</h2><p>{note}</p>{''.join(films)}</section>
<section><h2>Planning</h2>{shown(plan_table, f'{folder}/plan.json')}
{shown(embedded, f'{folder}/plan.mp4')}</section>
<section><h2>Actions</h2>{action_curves()}</section>
<section><h2>Configuration</h2>{table(trained.items())}</section>
''')
        print(f'wrote {out_dir}/report.html')
