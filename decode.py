"""
Look at what a world model imagines: truth beside imagination, on held-out episodes.

    python decode.py                    # out/rollout.mp4 and out/rollout.png
    python decode.py --train=True       # first trains a decoder, out/decoder.safetensors
    python decode.py --ckpt=runs/robot/ckpt.safetensors --steps=30 --rows=2

Pictures come from the decoder where one has been trained, else from the encoder's inverse (`pixels`
has one), else they are the leading principal components of the latents as colours.
"""
import math
import os
import sys

import data     # before torch: it sets how threads wait

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from model import (add_state, check_steps, components, encode_frames, load, one_line, pictures,
                   read_tensors, restore_encoder, robot_state, robot_stats, rollout, standard,
                   unstandard, write_tensors)

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
seed = 0
# the decoder
train = False
train_frames = 2048         # pictures that it learns from, kept in memory
train_steps = 1000
batch_size = 32
learning_rate = 2e-3        # then down to 0 along a cosine
channels = 128
device = 'auto'
dtype = 'auto'              # float32 or bfloat16; auto = bfloat16 where it is fast
config = data.override(globals(), sys.argv[1:])
# --------------------------------------------------------------------------------------------------

if channels < 16:
    sys.exit(f'--channels: wants 16 or more, got {channels}')
device = data.pick_device(device)
autocast = data.autocast(device, dtype)
model, trained = load(ckpt, device)
check_steps(K, model.config['k_max'])
encode = restore_encoder(trained, model.stats, encoder_path, model.config['grid']).to(device)
out_dir = out_dir or os.path.dirname(ckpt) or '.'
kind = 'unlabelled'
action = 'none'
if model.config['action_dim'] and (labelled or trained['labelled'] and not unlabelled):
    kind = 'labelled'
    action = trained['action']
sets = data.open_sets(labelled or unlabelled or trained[kind], trained['camera'], action,
                      trained['fps'], trained['action_mode'], trained['rotation'],
                      trained['cache_gb'], trained['state'] if kind == 'labelled' else '')
of_kind = {'labelled': [], 'unlabelled': [], kind: sets}
clips = data.Clips(of_kind['labelled'], of_kind['unlabelled'], trained['frames'],
                   trained['frameskip'], (encode.size, encode.width), 1, 1.0, trained['val_share'])
for i, ds in enumerate(of_kind['labelled']):        # normalised as in training, whatever is in it
    mean, std, *_ = robot_stats(model.stats, robot if labelled else i, ckpt)
    if mean.numel() != ds.action_dim * trained['frameskip']:
        sys.exit(f'--labelled: {ds.name} has actions {clips.A} wide per model step, this robot of '
                 f'{ckpt} {mean.numel()}: --robot names another')
    for name, v in (('mean', mean), ('std', std)):
        ds.stats[name] = v.flatten()[:ds.action_dim].numpy()
    if model.config['state_dim']:
        clips.states[i] = robot_state(model.stats, robot if labelled else i)
        if ds.state_dim != len(clips.states[i][0]):
            ds.state_dim = 0        # another robot's: not known
clips.A = model.stats['a_mean'].shape[1]
clips.S = model.config['state_dim']


class Decoder(nn.Module):
    """Raw latents (B, N, D) -> frames (B, 3, height, width) in [0, 1]: transposed convolutions,
    twice the side each."""
    def __init__(self, encoder, channels):
        super().__init__()
        self.grid = encoder.grid
        self.side = encoder.size, encoder.width
        self.register_buffer('mean', torch.zeros(encoder.dim))
        self.register_buffer('std', torch.ones(encoder.dim))
        stages = math.ceil(math.log2(encoder.size / self.grid[0]))
        widths = [max(16, channels >> i) for i in range(stages + 1)]
        self.stem = nn.Conv2d(encoder.dim, channels, 3, padding=1)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 4, 2, 1) for i, o in zip(widths, widths[1:]))
        self.out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):
        x = ((z - self.mean) / self.std).mT.unflatten(2, self.grid)
        x = self.stem(x)                                            # (B, channels, rows, columns)
        for up in self.up:
            x = up(F.silu(x))
        x = F.interpolate(x.float(), self.side, mode='bilinear', antialias=True)   # not in bfloat16
        return torch.sigmoid(self.out(F.silu(x)))


def load_decoder(folder, encoder):
    """The Decoder that decode.py has trained in a checkpoint's folder, or None; for the same
    latents or not at all."""
    path = f'{folder}/decoder.safetensors'
    if not os.path.isfile(path):
        return None
    tensors = read_tensors(path)
    decoder = Decoder(encoder, len(tensors.get('stem.bias', [0])))
    try:
        decoder.load_state_dict(tensors)
    except RuntimeError as error:
        sys.exit(f'{path}: is not what the latents want ({one_line(error)}): train it again with '
                 'decode.py --train=True')
    return decoder.to(device).eval()


def psnr(x, y):
    mse = (x.float() - y.float()).div(255).square().mean().item()
    return -10 * math.log10(max(1e-10, mse))


def get_lr(step):
    cosine = 1 + math.cos(math.pi * step / train_steps)
    return learning_rate * min(1, (step + 1) / 50) * cosine / 2


data.own(out_dir, '.decode.lock')
if train:       # on frozen latents: no gradient reaches the encoder or the world model
    x = clips.sample(-(-train_frames // 16), 16)
    z = encode_frames(encode, x, autocast)
    torch.manual_seed(seed)
    decoder = Decoder(encode, channels).to(device)
    decoder.mean.copy_(z.mean(dim=(0, 1)))
    decoder.std.copy_(z.std(dim=(0, 1)).clamp(min=1e-6))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=learning_rate, weight_decay=0.01)
    bar = tqdm(range(train_steps), disable=None)
    for step in bar:
        for group in optimizer.param_groups:
            group['lr'] = get_lr(step)
        pick = torch.randint(len(x), (batch_size,))
        with autocast:
            y = decoder(z[pick.to(device)])
        loss = F.mse_loss(y.float(), x[pick].to(device).float() / 255)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99 or step == train_steps - 1:
            loss = loss.item()
            if not math.isfinite(loss):
                sys.exit(f'decoder step {step}: the loss is not finite; nothing has been saved')
            bar.write(f'decoder step {step + 1}: loss {loss:.5f}')
            sys.stdout.flush()
    path = f'{out_dir}/decoder.safetensors'
    write_tensors(path, decoder.state_dict())
    print('wrote', path)

decoder = load_decoder(out_dir, encode)
context = trained['eval_context']
batch = clips.held_out(context + steps, rows)[kind]
x = batch['x']                                                      # (B, T, 3, H, W) uint8
B, T = x.shape[:2]
z_raw = encode_frames(encode, x, autocast)
z = standard(z_raw, model.stats)[:, :context]
if clips.S:
    z = add_state(z, batch['s'][:, :context].to(device))
with autocast:
    a = components(batch['a'].to(device), model.stats)
    imagined = rollout(model, z, a, batch['a_mask'].to(device), K=K, seed=seed)
imagined = torch.cat((z, imagined.float()), dim=1)[:, :, :z_raw.shape[2]]       # without the state
imagined = unstandard(imagined, model.stats)
# truth and imagination go through one call: principal components' colours only compare within it
both = pictures(torch.cat((z_raw, imagined)).flatten(0, 1), encode, decoder)
seen, dreamt = both.unflatten(0, (2, B, T))
if decoder or encode.decode:
    by = 'decoder' if decoder else f'inverse of {encode.name}'
    real = batch['z_mask'][:, context:]
    still = x[:, context - 1:context].expand(-1, steps, -1, -1, -1)
    truth = x[:, context:][real]
    print(f'PSNR through the {by}: of the true latents {psnr(truth, seen[:, context:][real]):.2f} '
          f'dB, of the imagined {psnr(truth, dreamt[:, context:][real]):.2f} dB, '
          f'of repeating the last frame {psnr(truth, still[real]):.2f} dB')
else:
    print('no decoder has been trained (--train=True): pictures are principal components of the '
          'latents')

ways = [data.enlarge(v.flatten(0, 1)).unflatten(0, (B, T)) for v in (x, seen, dreamt)]
video = torch.cat(ways, dim=4)          # camera | latents of the camera's frames | imagined
video = torch.cat([*video], dim=2)      # one clip per row
data.write_video(f'{out_dir}/rollout.mp4', video, sets[0].fps / trained['frameskip'])
shown = torch.linspace(0, T - 1, min(T, 8)).round().long()
strips = []
for b in range(B):
    for v in ways:
        strips.append(torch.cat([*v[b, shown]], dim=2))
data.write_image(f'{out_dir}/rollout.png', torch.cat(strips, dim=1))
print(f'wrote {out_dir}/rollout.mp4 (camera | latents of the camera | imagined) and '
      f'{out_dir}/rollout.png (the same as rows, frames {", ".join(map(str, shown.tolist()))})')
