"""
Look at what a world model imagines: truth beside imagination, on held-out episodes.

    python decode.py                    # out/rollout.mp4 and out/rollout.png
    python decode.py --train=True       # first trains a decoder, out/decoder.safetensors
    python decode.py --films=True       # also steps, denoising and actions (.mp4, .png)
    python decode.py --ckpt=runs/robot/ckpt.safetensors --steps=30 --rows=2
    python decode.py --actions=False --text='push the disc left'    # from words alone

Pictures come from the decoder where one has been trained, else from the encoder's inverse (`pixels`
has one), else they are the leading principal components of the latents as colours.
"""
import functools
import math
import os
import sys
import time

import data     # before torch: it sets how threads wait

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from model import (ViT, add_state, check_steps, components, encode_frames, load, official, one_line,
                   pictures, read_tensors, restore_encoder, robot_state, robot_stats, rollout,
                   set_guide, standard, unstandard, write_tensors)

# --------------------------------------------------------------------------------------------------
ckpt = 'out/ckpt.safetensors'
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
config = data.override(globals(), sys.argv[1:] if __name__ == '__main__' else [])
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
            nn.ConvTranspose2d(i, o, 4, 2, 1) for i, o in zip(widths, widths[1:]))
        self.out = nn.Conv2d(widths[-1], 3 * 4, 3, padding=1)

    def forward(self, z):
        x = ((z - self.mean) / self.std).mT.unflatten(2, self.grid)
        x = self.stem(x)                                            # (B, channels, rows, columns)
        for mix, up in zip(self.mix, self.up):
            x = up(F.silu(x + mix(F.silu(x))))
        x = x + self.mix[-1](F.silu(x))
        x = F.pixel_shuffle(self.out(F.silu(x)), 2)
        return torch.sigmoid(resize(x, self.side))


def resize(x, side):        # not in bfloat16
    return F.interpolate(x.float(), side, mode='bilinear', antialias=True)


class RAE(nn.Module):
    """Raw latents (B, N, D) of DINOv2 with registers -> frames (B, 3, height, width) in [0, 1]: the
    decoder of RAE (arXiv:2510.11690), a ViT of one token for each of the latents'."""
    def __init__(self, encoder, state):
        super().__init__()
        width = len(state['patch_embed.bias'])
        depth = len([key for key in state if key.endswith('norm1.bias')])
        hidden = len(state['blocks.0.mlp.fc1.bias'])
        rows = math.isqrt(state['pos_embed'].shape[1])              # beside the class token
        self.vit = ViT(width, depth, 16, hidden, False, 0, 1, rows)
        self.vit.patch_embed = nn.Conv2d(encoder.dim, width, 1)
        self.vit.pred = nn.Linear(width, 16 * 16 * 3)
        ones = {key: v for key, v in self.vit.state_dict().items() if '.ls' in key}     # has none
        self.vit.load_state_dict(ones | state)
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


RAE_NAMES = {   # what is replaced, from the first line to the last, before model.official
    'decoder.': '',
    'decoder_layers.': 'blocks.',
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
    state = {key: v.float() for key, v in tensors.items() if not key.startswith(('encoder', '_'))}
    for old, new in RAE_NAMES.items():
        state = {key.replace(old, new): v for key, v in state.items()}
    state = official(state)
    state['patch_embed.weight'] = state['patch_embed.weight'][..., None, None]
    if 'pos_embed' not in state:        # waves of the column, then of the row
        rows = tensors['_latents_mean'].shape[-1]
        n = len(state['norm.bias']) // 4
        angle = torch.outer(torch.arange(rows), 1e-4 ** (torch.arange(n) / n))
        waves = torch.cat((angle.sin(), angle.cos()), dim=1)
        place = torch.cat((waves.repeat(rows, 1), waves.repeat_interleave(rows, dim=0)), dim=1)
        state['pos_embed'] = F.pad(place, (0, 0, 1, 0))[None]
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


# the numbers of VGG16's convolutions, stage by stage
VGG16 = (0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)
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
    mean, std = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    pair = [(v - mean) / std for v in (x, y)]       # apart: no gradient is wanted of one
    distance = 0
    for i, stage in enumerate(VGG16):
        if i:
            pair = [F.max_pool2d(v, 2) for v in pair]
        for number in stage:
            layer = weights[f'features.{number}.weight'], weights[f'features.{number}.bias']
            pair = [F.conv2d(v, *layer, padding=1).relu() for v in pair]
        a, b = (F.normalize(v, eps=1e-10) for v in pair)
        d = F.conv2d((a - b).square(), weights[f'lin{i}.model.1.weight'])
        distance = distance + d.mean(dim=(1, 2, 3))
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


def tell_quality(by, ways, weights):
    """Print how near pictures {what they are: uint8 (n, 3, H, W)} are to the camera's, on average
    over frames."""
    measures = {'PSNR, dB,': psnr, 'SSIM': ssim}
    if weights:
        measures['LPIPS'] = functools.partial(perceptual_distance, weights)
    truth, *others = (v[:, None].to(device).float() / 255 for v in ways.values())
    for name, measure in measures.items():
        said = [f'{way} {sum(map(measure, truth, x)).item() / len(x):.3f}'
                for way, x in zip([*ways][1:], others)]
        print(f'{name} through the {by}: {", ".join(said)}')


def open_clips(model, trained, encode):
    """What a checkpoint is looked at with: clips as in training, and of which kind."""
    kind = 'unlabelled'
    action = 'none'
    if model.config['action_dim'] and (labelled or trained['labelled'] and not unlabelled):
        kind = 'labelled'
        action = trained['action']
    sets = data.open_sets(labelled or unlabelled or trained[kind], trained['camera'], action,
                          trained['fps'], trained['action_mode'], trained['rotation'],
                          trained['cache_gb'], trained['state'] if kind == 'labelled' else '')
    known = sets if kind == 'labelled' else []
    clips = data.Clips(known, [] if known else sets, trained['frames'], trained['frameskip'],
                       (encode.size, encode.width), 1, 1.0, trained['val_share'])
    for i, ds in enumerate(known):      # normalised as in training, whatever is in it
        mean, std, *_ = robot_stats(model.stats, robot if labelled else i, ckpt)
        if mean.numel() != ds.action_dim * trained['frameskip']:
            sys.exit(f'--labelled: {ds.name} has actions {clips.A} wide per model step, this robot '
                     f'of {ckpt} {mean.numel()}: --robot names another')
        ds.stats['mean'], ds.stats['std'] = (
            v.flatten()[:ds.action_dim].numpy() for v in (mean, std))
        if model.config['state_dim']:
            clips.states[i] = robot_state(model.stats, robot if labelled else i)
            if ds.state_dim != len(clips.states[i][0]):
                ds.state_dim = 0        # another robot's: not known
    clips.A = model.stats['a_mean'].shape[1]
    clips.S = model.config['state_dim']
    return clips, kind


def train_decoder(encoder, x, z, autocast, weights):
    """A Decoder of raw latents z (n, N, D) into their frames x (n, 3, height, width) uint8; weights
    of perceptual_distance, or None. The latents are frozen: no gradient reaches the encoder or the
    world model."""
    torch.manual_seed(seed)
    decoder = Decoder(encoder, channels).to(z.device)
    decoder.mean.copy_(z.mean(dim=(0, 1)))
    decoder.std.copy_(z.std(dim=(0, 1)).clamp(min=1e-6))
    optimizer = torch.optim.AdamW(decoder.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, train_steps + 1, pct_start=0.05)
    bar = tqdm(range(train_steps), 'decoder', disable=None)
    for step in bar:
        pick = torch.randint(len(x), (batch_size,))
        truth = x[pick].to(z.device).float() / 255
        latents = z[pick.to(z.device)]
        size = noise * torch.rand(batch_size, 1, 1, device=z.device)
        latents = latents + size * decoder.std * torch.randn_like(latents)
        with autocast:
            y = decoder(latents).float()
        loss = F.mse_loss(y, truth)
        if weights:
            # of a random window of 64 pixels: of the whole picture it would cost more than all else
            top, left = (torch.randint(max(1, n - 63), ()) for n in x.shape[2:])
            windows = [v[..., top:top + 64, left:left + 64] for v in (y, truth)]
            loss = loss + lpips * perceptual_distance(weights, *windows).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99 or step == train_steps - 1:
            loss = loss.item()
            if not math.isfinite(loss):
                sys.exit(f'decoder step {step}: the loss is not finite; nothing has been saved')
            bar.write(f'decoder step {step + 1}: loss {loss:.5f}')
            sys.stdout.flush()
    return decoder


def seconds(call):
    """What a call takes once all is compiled; it returns a tensor."""
    for _ in range(2):
        began = time.perf_counter()
        call().cpu()        # waits for a GPU
    return time.perf_counter() - began


def grey(x):
    """(B, T, H, W) in [0, 1] as uint8 (B, T, 3, H, W)."""
    return (255 * x).to(torch.uint8).cpu()[:, :, None].expand(-1, -1, 3, -1, -1)


def bars(a, a_mask, side):
    """Normalised actions (B, T, A) as (B, T, *side) in [0, 1]: a bar for each number of what was
    done before a frame, up from the middle or down, three deviations long at most."""
    a = F.interpolate(torch.where(a_mask[..., None], a, 0.0), side[1])
    y = torch.linspace(3, -3, side[0])[:, None]
    return (a[:, :, None] / y < 1).float()


def film(name, ways, fps):
    """Write pictures {what they are: uint8 (B, T, 3, H, W)} side by side, a clip a row, as a video,
    and below each other, a frame a column, as one picture."""
    tiles = torch.stack([*ways.values()], dim=1)                    # (B, ways, T, 3, H, W)
    tiles = data.enlarge(tiles.flatten(0, 2)).unflatten(0, tiles.shape[:3])
    video = tiles.permute(2, 3, 0, 4, 1, 5).flatten(4).flatten(2, 3)
    data.write_video(f'{out_dir}/{name}.mp4', video, fps)
    few = tiles[:, :, ::-(-len(video) // 8)]        # eight at most
    sheet = few.permute(3, 0, 1, 4, 2, 5).flatten(4).flatten(1, 3)
    data.write_image(f'{out_dir}/{name}.png', sheet)
    print(f'wrote {out_dir}/{name}.mp4 and {name}.png: {" | ".join(ways)}')


if __name__ == '__main__':
    if channels < 16:
        sys.exit(f'--channels: wants 16 or more, got {channels}')
    if train and decoder_path or decoder == 'rae' and not decoder_path:
        sys.exit('--decoder=rae: wants --decoder_path, which comes without --train')
    device = data.pick_device(device)
    autocast = data.autocast(device, dtype)
    model, trained = load(ckpt, device)
    check_steps(K, model.config['k_max'])
    set_guide(model, guide, text, trained)
    encode = restore_encoder(trained, model.stats, encoder_path, model.config['grid']).to(device)
    out_dir = out_dir or os.path.dirname(ckpt) or '.'
    clips, kind = open_clips(model, trained, encode)
    weights = None
    if lpips and (train or lpips_path) and min(encode.size, encode.width) >= 16:    # VGG16's least
        weights = load_perceptual(device)
    data.own(out_dir, '.decode.lock')
    if train:
        x = clips.sample(-(-train_frames // 16), 16)
        parts = tqdm(x.split(64), 'encoding', disable=None)
        z = torch.cat([encode_frames(encode, part, autocast) for part in parts])
        path = f'{out_dir}/decoder.safetensors'
        write_tensors(path, train_decoder(encode, x, z, autocast, weights).state_dict())
        print('wrote', path)
    decode = load_decoder(out_dir, encode, device, decoder_path, decoder)

    context = trained['eval_context']
    batch = clips.held_out(context + steps, rows)[kind]
    x = batch['x']                                                      # (B, T, 3, H, W) uint8
    a = components(batch['a'].to(device), model.stats)
    a_mask = batch['a_mask'].to(device) & actions
    words = data.text_bytes(text)[None] if text else batch['text']
    words = words.to(device)
    B, T = x.shape[:2]
    z_raw = encode_frames(encode, x, autocast)
    z = standard(z_raw, model.stats)[:, :context]
    if clips.S:
        z = add_state(z, batch['s'][:, :context].to(device))

    def raw(*parts):
        """The encoder's latents (B, T, N, D) of parts of a clip, without the state."""
        z = torch.cat(parts, dim=1)[:, :, :z_raw.shape[2]]
        return unstandard(z.float(), model.stats)

    def dream(a, a_mask, K):
        with autocast:
            return raw(z, rollout(model, z, a, a_mask, K, seed=seed, text=words))

    def show(ways):
        """Pictures of raw latents {what they are: (B, T, N, D)}; in one call, as the colours of
        principal components only compare within it."""
        z = torch.stack([*ways.values()])
        x = pictures(z.flatten(0, 2), encode, decode).unflatten(0, z.shape[:3])
        return dict(zip(ways, x))

    imagined = dream(a, a_mask, K)
    ways = {'camera': x} | show({'latents of the camera': z_raw, 'imagined': imagined})
    if decode or encode.decode:
        still = x[:, context - 1:context].expand_as(x)
        real = batch['z_mask'] & (torch.arange(T) >= context)
        future = {way: v[real] for way, v in (ways | {'last frame': still}).items()}
        tell_quality('decoder' if decode else f'inverse of {encode.name}', future, weights)
        one = seconds(lambda: pictures(z_raw[0], encode, decode)) / T
        two = seconds(lambda: dream(a, a_mask, K)) / (B * steps)
        print(f'decoding a frame of {encode.size} x {encode.width} takes {1000 * one:.3g} ms, '
              f'imagining it {1000 * two:.3g} ms')
    else:
        print('no decoder has been trained (--train=True): pictures are principal components of '
              'the latents')

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
        film('steps', {'camera': x} | show(ways), fps)
        frames = []
        hook = model.register_forward_hook(lambda net, inputs, out: frames.append(inputs[0]))
        with autocast:
            end = rollout(model, z, a[:, :context + 1], a_mask[:, :context + 1], k_max, seed=seed,
                          graph=False, text=words)
        hook.remove()
        film('denoising', show({'a frame from noise': raw(*frames[1:], end)}), 10)
        if kind == 'labelled' and B > 1:
            other = a.roll(B // 2, 0)       # half a turn, as in training's evaluation
            ways = {'imagined': imagined, 'without actions': dream(a, a_mask & False, K),
                    'with those of another clip': dream(other, a_mask, K)}
            film('actions', {'camera': x} | show(ways), fps)
