"""
The networks and their maths: frozen encoders, the world model, its loss, sampling with a cache, the checkpoint.

Letters: B clips, T frames of a clip, N patch tokens of a frame, D encoder width, A action width, C width of the
transformer, K denoising steps, M candidate plans, H W pixels. z are normalised latents (B, T, N, D), a normalised
actions (B, T, A); a[t] is what was done between frame t-1 and frame t. tau = 0 is noise, tau = 1 is clean.

Sources: Dreamer 4 (arXiv:2509.24527) for the transformer and shortcut forcing, shortcut models (arXiv:2410.12557),
diffusion forcing (arXiv:2407.01392), DINOv2 (arXiv:2304.07193) and DINOv3 (arXiv:2508.10104) for the encoders.
"""
import difflib
import functools
import glob
import json
import math
import os
import re
import sys
from collections import OrderedDict

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

# The first multi-threaded cos of a process can be off by 2e-4 on CPUs (torch 2.13, one process in four): spend it here.
torch.zeros(1).cos()


def rotate(x, cos, sin):
    """RoPE: x (..., S, d) with the pairs (x_i, x_{i + d/2}) turned by angles whose cos and sin are (S, d/2); float32.
    Halves, not neighbours, are paired, as in cos and sin: mixing the two makes results depend on absolute positions."""
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)        # small beside x
    return torch.addcmul(x.float() * cos, x.float().roll(x.shape[-1] // 2, dims=-1), sin)


class SwiGLU(nn.Module):
    def __init__(self, width, hidden, bias=False):
        super().__init__()
        self.gate_up, self.down = nn.Linear(width, 2 * hidden, bias), nn.Linear(hidden, width, bias)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


# --------------------------------------------------------------------------------------------------------------------
# Encoder: DINOv2 (arXiv:2304.07193, with registers arXiv:2309.16588) and DINOv3 (arXiv:2508.10104), one ViT for both.
VITS = {'s': (384, 12, 6, 1536), 'b': (768, 12, 12, 3072), 'l': (1024, 24, 16, 4096), 'h': (1280, 32, 20, 5120),
        'g': (1536, 40, 24, 4096), '7b': (4096, 40, 32, 8192)}  # width, depth, heads, hidden
# name: hub repository, then ViT's arguments: those, gated, registers, patch, grid
ENCODERS = {f'dinov2_vit{word[0]}14{reg}': (f'facebook/dinov2-{"with-registers-" if reg else ""}{word}',
                                            *VITS[word[0]], word == 'giant', 4 if reg else 0, 14, 37)
            for word in ('small', 'base', 'large', 'giant') for reg in ('', '_reg')}
ENCODERS |= {f'dinov3_vit{size}16{plus}': (f'facebook/dinov3-vit{size}16{plus}-pretrain-lvd1689m',
                                           *VITS[size], plus == 'plus' or size == '7b', 4, 16, 0)
             for size, plus in (('s', ''), ('s', 'plus'), ('b', ''), ('l', ''), ('h', 'plus'), ('7b', ''))}


class ViTBlock(nn.Module):
    """x + ls1 attn(norm1 x), then x + ls2 mlp(norm2 x): pre-norm with LayerScale."""
    def __init__(self, width, heads, hidden, gated, eps):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width)))
        plain = OrderedDict(fc1=nn.Linear(width, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, width))
        self.mlp = SwiGLU(width, hidden, bias=True) if gated else nn.Sequential(plain)
        self.ls1, self.ls2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x, rope):
        B, L, D = x.shape
        q, k, v = self.attn.qkv(self.norm1(x)).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, L, d)
        if rope is not None:
            q, k = rotate(q, *rope).type_as(v), rotate(k, *rope).type_as(v)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, D)
        x = x + self.ls1 * self.attn.proj(y)
        return x + self.ls2 * self.mlp(self.norm2(x))


class ViT(nn.Module):
    """forward(x, layer): normalised images (B, 3, H, W) to patch tokens (B, N, width), rows first.
    `grid` is the side of the learned position embedding (DINOv2), or 0 for rotary positions (DINOv3). `layer` is the
    block whose tokens pass through the final norm; later ones are not run. Inside: class token, registers, patches."""
    def __init__(self, width, depth, heads, hidden, gated, registers, patch, grid):
        super().__init__()
        self.patch, self.grid = patch, grid
        eps = 1e-6 if grid else 1e-5
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.registers = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width)) if grid else None
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.ModuleList(ViTBlock(width, heads, hidden, gated, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)
        # Not in every file, so not in the state dict; on the CPU even where the parameters are built on 'meta'.
        quarter = width // heads // 4
        periods = None if grid else 100.0 ** (torch.arange(quarter, device='cpu', dtype=torch.float32) / quarter)
        self.register_buffer('periods', periods, persistent=False)

    def positions(self, rows, columns):
        """The learned positions (1, 1 + rows * columns, width), resized from the square they were learned on."""
        if rows == columns == self.grid:
            return self.pos_embed
        square = self.pos_embed[:, 1:].float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        how = dict(size=(rows, columns), antialias=True)
        if self.registers is None:  # the first models scale by (n + 0.1) / grid, and their features depend on it
            how = dict(scale_factor=[(n + 0.1) / self.grid for n in (rows, columns)])
        square = F.interpolate(square, mode='bicubic', **how)
        return torch.cat((self.pos_embed[:, :1], square.flatten(2).transpose(1, 2)), dim=1)

    def angles(self, rows, columns):
        """cos and sin (L, width / heads / 2): patch centres in [-1, 1], half of each head for y and half for x."""
        y, x = ((torch.arange(n, device=self.periods.device) + 0.5) / n * 2 - 1 for n in (rows, columns))
        yx = torch.stack(torch.meshgrid(y, x, indexing='ij'), dim=-1).view(-1, 2, 1)
        angles = (2 * math.pi * yx / self.periods.float()).flatten(1)  # (N, width / heads / 2)
        angles = F.pad(angles, (0, 0, 1 + self.registers.shape[1], 0))  # class token and registers: angle 0
        return angles.cos(), angles.sin()

    def forward(self, x, layer=-1):
        B, _, H, W = x.shape
        assert H % self.patch == 0 and W % self.patch == 0, f'{H}x{W} is not a multiple of patch {self.patch}'
        rows, columns = H // self.patch, W // self.patch
        x = torch.cat((self.cls_token.expand(B, -1, -1), self.patch_embed(x).flatten(2).mT), dim=1)  # (B, 1 + N, width)
        if self.grid:
            x = x + self.positions(rows, columns).to(x.dtype)
        if self.registers is not None:  # after the positions: registers have none
            x = torch.cat((x[:, :1], self.registers.expand(B, -1, -1), x[:, 1:]), dim=1)
        rope = None if self.grid else self.angles(rows, columns)
        for block in self.blocks[:layer % len(self.blocks) + 1]:
            x = block(x, rope)
        return self.norm(x[:, -rows * columns:])


RENAME = (  # applied in this order to every key
    (r'^((module|teacher|backbone|model|dinov2|dinov2_with_registers|embeddings|encoder)\.)+', ''),
    (r'^(register_tokens|storage_tokens|reg_token)$', 'registers'),
    (r'^position_embeddings$', 'pos_embed'), (r'^rope_embed\.periods$', 'periods'),
    (r'^(patch_embeddings\.projection|patch_embeddings|patch_embed\.proj)\.', 'patch_embed.'),
    (r'^layernorm\.', 'norm.'), (r'^layer\.', 'blocks.'),
    (r'\.(layer_scale|ls|gamma_)([12])(\.lambda1|\.gamma)?$', r'.ls\2'),
    (r'\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.', r'.attn.\2.'),
    (r'\.attn\.([qv])_bias$', r'.attn.\1.bias'), (r'\.attention\.(output\.dense|o_proj)\.', '.attn.proj.'),
    (r'\.mlp\.(w12|weights_in)\.', '.mlp.gate_up.'), (r'\.mlp\.(w3|down_proj|weights_out)\.', '.mlp.down.'),
    (r'\.mlp\.(w1|gate_proj|fc1_g)\.', '.mlp.gate.'), (r'\.mlp\.(w2|up_proj|fc1_x)\.', '.mlp.up.'))
UNUSED = r'^(mask_token$|rope_embeddings\.|local_cls_norm\.|((dino|ibot)_)?head\.|projectors\.)'


def official(state):
    """{key: tensor} under ViT's names, from a file of Meta, Hugging Face (as stored or in memory) or timm."""
    out = {}
    for key, value in state.items():
        for pattern, name in RENAME:
            key = re.sub(pattern, name, key)
        if not re.match(UNUSED, key):
            out[key] = value
    for p in [k[:-len('norm1.weight')] for k in out if k.endswith('norm1.weight')]:
        qkv, mlp = p + 'attn.qkv.', p + 'mlp.'
        if all(f'{p}attn.{i}.weight' in out for i in 'qkv'):
            out[qkv + 'weight'] = torch.cat([out.pop(f'{p}attn.{i}.weight') for i in 'qkv'])
        if qkv + 'weight' in out and qkv + 'bias' not in out:  # a part without a bias has bias 0
            zero = out[qkv + 'weight'].new_zeros(len(out[qkv + 'weight']) // 3)
            out[qkv + 'bias'] = torch.cat([out.pop(f'{p}attn.{i}.bias', zero) for i in 'qkv'])
        if qkv + 'bias_mask' in out:  # 1 for q and v, 0 for k; not a number until Meta's training sets it
            out[qkv + 'bias'] = out[qkv + 'bias'] * out.pop(qkv + 'bias_mask').nan_to_num(0.0)
        fc1, fc2 = out.get(mlp + 'fc1.weight'), out.get(mlp + 'fc2.weight')
        gated = {mlp + 'gate.weight', mlp + 'gate_up.weight'} & out.keys() or (  # timm calls the packed one fc1 too
            fc1 is not None and fc2 is not None and len(fc1) == 2 * fc2.shape[-1])
        for part in ('weight', 'bias'):
            gate, up = f'{mlp}gate.{part}', f'{mlp}up.{part}'
            if {gate, up} <= out.keys():
                out[f'{mlp}gate_up.{part}'] = torch.cat((out.pop(gate), out.pop(up)))
            # Hugging Face's plain MLP is an up and a down without a gate
            for old, new in (('fc1', 'gate_up'), ('fc2', 'down')) if gated else (('up', 'fc1'), ('down', 'fc2')):
                if f'{mlp}{old}.{part}' in out:
                    out[f'{mlp}{new}.{part}'] = out.pop(f'{mlp}{old}.{part}')
    pos = out.get('pos_embed')
    if pos is not None and math.isqrt(pos.shape[1]) ** 2 == pos.shape[1]:  # timm adds the first row to cls_token
        out['pos_embed'] = F.pad(pos, (0, 0, 1, 0))
    return out


def read_tensors(file):
    """{key: tensor} of a .safetensors file, of a folder of them, or of a PyTorch file (read without code)."""
    if os.path.isdir(file) and (parts := sorted(glob.glob(os.path.join(glob.escape(file), '*.safetensors')))):
        return {k: v for part in parts for k, v in read_tensors(part).items()}
    if not os.path.isfile(file):
        sys.exit(f'{file}: no such file')
    try:
        if file.endswith('.safetensors'):
            return safetensors.torch.load_file(file)
        state = torch.load(file, map_location='cpu', weights_only=True)
        while nested := [state[k] for k in ('model', 'teacher', 'state_dict') if isinstance(state.get(k), dict)]:
            state = nested[0]
    except Exception as e:  # a damaged file fails in as many ways as it has readers
        sys.exit(f'{file}: cannot be read as weights ({one_line(e)})')
    return {k: v for k, v in state.items() if torch.is_tensor(v)}


def one_line(error):
    return f'{type(error).__name__}: {" ".join(str(error).split())[:160]}'


class Pixels(nn.Module):
    """The encoder without weights: the leading principal components of raw patches, (B, 3, H, W) -> (B, N, dim).
    Until fit has seen frames, they are those of a generic picture (correlation e^(-distance / patch)). Latents are
    not whitened here: what divides them (train.py's `whiten`) has an exponent of its own."""
    name, pool, layer = 'pixels', 1, -1
    def __init__(self, size, width, patch, dim=24):
        super().__init__()
        self.size, self.width, self.patch, self.dim = size, width, patch, dim
        self.grid = (size // patch, width // patch)
        at = torch.cartesian_prod(torch.arange(patch), torch.arange(patch)).float()
        near = torch.kron(torch.eye(3) * 0.1 + 0.9, torch.exp(-torch.cdist(at, at) / patch)).double()  # unfold's order
        self.register_buffer('mean', torch.full((3 * patch * patch,), 0.5))
        self.register_buffer('basis', self.components(near))

    def components(self, covariance):
        return torch.linalg.eigh(covariance)[1].flip(1)[:, :self.dim].float().contiguous()

    def patches(self, x):
        if x.shape[-2:] != (self.size, self.width):
            x = F.interpolate(x, (self.size, self.width), mode='bilinear', antialias=True)
        return F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)                 # (B, N, 3 p p)

    def fit(self, x):
        """Components of the patches of frames x (B, 3, H, W) in [0, 1]."""
        p = self.patches(x).flatten(0, 1).cpu().double()    # float64 and eigh are not for every device
        self.mean.copy_(p.mean(0))
        self.basis.copy_(self.components((p - p.mean(0)).T @ (p - p.mean(0)) / len(p)))

    def forward(self, x):
        return (self.patches(x) - self.mean) @ self.basis

    def decode(self, z):
        """(B, N, dim) -> frames (B, 3, size, width) in [0, 1]: the inverse, but for the components left out."""
        x = (z @ self.basis.T + self.mean).transpose(1, 2)
        return F.fold(x, (self.size, self.width), self.patch, stride=self.patch).clamp(0, 1)


class Encoder(nn.Module):
    """encoder(x): float frames in [0, 1], (B, 3, H, W) of any size, to patch tokens (B, N, dim) in float32."""
    def __init__(self, name, vit, layer, size, width, pool):
        super().__init__()
        self.name, self.vit, self.layer, self.size, self.width, self.pool = name, vit, layer, size, width, pool
        self.dim, self.patch = vit.norm.weight.shape[0], vit.patch
        self.grid = (size // vit.patch // pool, width // vit.patch // pool)
        self.register_buffer('mean', torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)  # ImageNet
        self.register_buffer('std', torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, x):
        assert x.is_floating_point(), f'frames are float in [0, 1], got {x.dtype}'
        if x.shape[-2:] != (self.size, self.width):  # each family as it was trained
            mode = 'bicubic' if self.vit.grid else 'bilinear'
            x = F.interpolate(x, (self.size, self.width), mode=mode, antialias=True).clamp(0, 1)  # cubics overshoot
        z = self.vit((x - self.mean) / self.std, self.layer).float()
        if self.pool > 1:
            z = z.unflatten(1, (self.grid[0], self.pool, self.grid[1], self.pool)).mean((2, 4)).flatten(1, 2)
        return z


def load_encoder(name, path='', layer=-1, height=0, width=0, pool=1):
    """A frozen Encoder, or Pixels. Weights come from the file path, else from the hub.
    layer is the block whose tokens it returns, through the final norm (-1 is the last). Frames are resized to height x
    width pixels: 0 is 224 (pixels: 28) for the height and the height for the width. pool=2 averages 2x2 patches."""
    if name != 'pixels' and name not in ENCODERS:
        near = difflib.get_close_matches(name, [*ENCODERS, 'pixels'], 1)
        hint = f'did you mean {near[0]}?' if near else f'there are pixels, {", ".join(ENCODERS)}'
        sys.exit(f'--encoder={name}: no such encoder, {hint}')
    repo, *arguments = ENCODERS.get(name, [''])
    height = height or (224 if repo else 28)
    width = width or height
    cell = pool * (arguments[-2] if repo else 7)
    for option, pixels in (('frame_height', height), ('frame_width', width)):
        if cell < 1 or pixels < cell or pixels % cell:
            sys.exit(f'--{option}={pixels}: {name} with pool={pool} wants a multiple of {cell} pixels')
    if not repo:
        if (layer, pool) != (-1, 1):
            sys.exit(f'--layer={layer} --pool={pool}: pixels has no layers and does not pool')
        return Pixels(height, width, patch=7)
    with torch.device('meta'):  # the file's tensors become the parameters: 7 billion are not allocated twice
        vit = ViT(*arguments)
    if not -len(vit.blocks) <= layer < len(vit.blocks):
        sys.exit(f'--layer={layer}: {name} has blocks 0 to {len(vit.blocks) - 1} (-1 is the last)')
    if not path:
        try:
            from huggingface_hub import snapshot_download
            path = snapshot_download(repo, allow_patterns='model*.safetensors')  # a folder: large ones are split
        except Exception as e:  # no network, a licence to accept first, a full disk
            sys.exit(f'--encoder={name}: no model.safetensors from https://huggingface.co/{repo} ({one_line(e)}); get '
                     'it by hand and give --encoder_path=model.safetensors')
    state, want = official(read_tensors(path)), vit.state_dict()
    if 'periods' in state and vit.periods is not None:
        want['periods'] = vit.periods
    for key in [*want, *state]:
        if key not in want:
            sys.exit(f'{path}: {key} is unexpected, {name} has no such weight')
        if key not in state or state[key].shape != want[key].shape:
            got = tuple(state[key].shape) if key in state else 'missing'
            sys.exit(f'{path}: {key} is {got}, {name} wants {tuple(want[key].shape)}')
    if 'periods' in state:  # Meta's are rounded to bfloat16, which moves features by 4e-4: use what was trained with
        vit.periods = state.pop('periods').float()
    vit.load_state_dict({key: state.pop(key).float() for key in list(state)}, assign=True)
    return Encoder(name, vit, layer, height, width, pool).eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------------------------
# the world model: a block-causal transformer over frames of latents (Dreamer 4, arXiv:2509.24527, section 3.2)

SIZES = {  # width, layers, heads, kv_heads; parameters without the encoder, which stays frozen
    'nano': (128, 4, 4, 2),       # 0.7M, the demo on a laptop
    'tiny': (192, 8, 6, 2),       # 3M
    'small': (512, 12, 8, 2),     # 30M
    'base': (768, 20, 12, 4),     # 120M
    'large': (1280, 24, 20, 4),   # 400M
}


def model_config(size, dim, grid, action_dim, **overrides):
    """The dict of plain values that WorldModel is built from and that the checkpoint keeps.
    size names a row of SIZES; dim D is the encoder's width, grid (rows, columns) of its tokens, action_dim A.
    overrides replace any entry (0 means 'as in the preset', but for registers); an unknown one is an assertion."""
    if size not in SIZES:
        sys.exit(f'--size={size}: no such size, there are {", ".join(SIZES)}')
    c = dict(zip(('width', 'layers', 'heads', 'kv_heads'), SIZES[size])) | dict(
        dim=dim, grid=list(grid), action_dim=action_dim,
        registers=4,            # learned tokens of each frame that belong to no patch
        context=32,             # frames that a time layer sees, the current one included
        time_every=4,           # one layer of so many is a time layer, the second of each group
        wide_layers=0,          # layers of a head twice as wide (WideHead), 0 = one linear map
        k_max=64,               # finest sampling has k_max steps: d_min = 1 / k_max
        soft_cap=50.0,          # attention logits stay within +-soft_cap
        action_on='all',        # 'all': the action is added to every latent token too; 'token': its own token alone
        objective='shortcut')   # what the weights were trained for; sampling depends on it
    assert overrides.keys() <= c.keys(), f'model_config has no {sorted(overrides.keys() - c.keys())}'
    c |= {k: v for k, v in overrides.items() if v not in (0, '') or k == 'registers'}
    for name, fits, wanted in (
            ('width', c['width'] % (4 * c['heads']) == 0, f'a multiple of 4 x heads = {4 * c["heads"]}'),
            ('heads', c['heads'] % c['kv_heads'] == 0, f'a multiple of kv_heads = {c["kv_heads"]}'),
            ('k_max', c['k_max'] > 1 and c['k_max'] & (c['k_max'] - 1) == 0, 'a power of two, 2 at least'),
            ('layers', c['layers'] >= 2, 'at least 2, the second is the first time layer'),
            *((name, c[name] >= least, f'at least {least}') for name, least in
              (('time_every', 2), ('context', 1), ('registers', 0), ('wide_layers', 0))),
            ('soft_cap', c['soft_cap'] > 0, 'more than 0'),
            ('action_on', c['action_on'] in ('all', 'token'), 'all or token'),
            ('objective', c['objective'] in ('shortcut', 'diffusion', 'direct'), 'shortcut, diffusion or direct')):
        if not fits:
            sys.exit(f'--{name}={c[name]}: wants {wanted}')
    return c


def flops_per_frame(c, T):
    """Forward FLOPs of one frame in a clip of T, for model_config's c; training takes three times as many. A weight is
    2 per token, S queries over L keys 4 S L C; what is masked, recomputed, or no matrix product is not counted."""
    C, N = c['width'], c['grid'][0] * c['grid'][1]
    S = c['registers'] + N + 2

    def layer(C, S, L):
        return 2 * S * (C * C * (2 + 2 * c['kv_heads'] / c['heads']) + 3 * C * hidden(C)) + 4 * S * L * C

    seen = sum(min(t + 1, c['context']) for t in range(T)) / T
    trunk = sum(layer(C, S, seen if is_time(c, i) else S) for i in range(c['layers']))
    head = c['wide_layers'] * (layer(2 * C, N, N) + 24 * N * C * C) + (8 if c['wide_layers'] else 2) * N * C * c['dim']
    return trunk + head + 2 * N * C * c['dim'] + 2 * C * c['action_dim']


REMAT = dict(use_reentrant=False, preserve_rng_state=False)     # for checkpoint(): nothing in a layer is random


def hidden(width):
    return -(-width * 8 // 3 // 32) * 32    # 8/3 of it: a gated MLP at the cost of a plain one of 4x


def is_time(c, i):
    return i % c['time_every'] == 1


def rms_norm(x):
    # without gains: the matrix that follows can hold them. In float32, whatever autocast says
    x = x.float()
    return x * (x.shape[-1] ** 0.5 / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-6))


def attend(q, k, v, cap, mask=None):
    """Soft-capped grouped-query attention: softmax(cap tanh(q k / (cap sqrt(d)))) v.
    q (B, heads, S, d), k and v (B, kv_heads, L, d); mask bool, broadcastable to (B, 1, S, L), True = may be seen.
    The reference for every other kernel. Queries that share a key head are stacked, so keys are never repeated."""
    B, h, S, d = q.shape
    n = k.shape[1]
    logits = (q * (d ** -0.5 / cap)).reshape(B, n, h // n * S, d) @ k.transpose(-1, -2)   # (B, n, h/n S, L)
    logits = cap * torch.tanh(logits.float())
    if mask is not None:
        logits = logits.view(B, h, S, -1).masked_fill(~mask, -torch.inf).view_as(logits)
    return (logits.softmax(dim=-1).type_as(v) @ v).view(B, h, S, d)


def window(S, context, alone, device):
    """mask (1 or B, 1, S, S): a frame sees itself and the context - 1 before it; where alone (B,), itself."""
    ago = torch.arange(S, device=device)[:, None] - torch.arange(S, device=device)
    mask = ((ago >= 0) & (ago < context))[None, None]
    return mask if alone is None else mask & (~alone[:, None, None, None] | (ago == 0))


def attend_flex(q, k, v, cap, context=0, alone=None):
    """attend(q, k, v, cap, window(..)) in one kernel that never writes the logits; context 0: everything is seen."""
    def score(logit, b, head, i, j):
        logit = cap * torch.tanh(logit / cap)
        if not context:
            return logit
        seen = (i >= j) & (i - j < context) & (True if alone is None else ~alone[b] | (i == j))
        return torch.where(seen, logit, -torch.inf)
    # one kernel for all lengths: the one that flex takes for short ones stacks the heads of a group until it spills
    return flex_attention(q, k, v, score_mod=score, enable_gqa=q.shape[1] > k.shape[1],
                          kernel_options=dict(FORCE_USE_FLEX_ATTENTION=True))


@functools.cache
def compiled_flex():
    torch._dynamo.config.recompile_limit = 64       # shapes; beyond it flex silently runs as slowly as it can
    return torch.compile(attend_flex, dynamic=False)


class Attention(nn.Module):
    def __init__(self, width, heads, kv_heads, cap, context):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.cap, self.context = heads, kv_heads, width // heads, cap, context
        self.kernel = 'auto'        # 'flex' on CUDA, 'plain' elsewhere
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.qk_gain = nn.Parameter(torch.ones(heads + kv_heads, 1))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x, rope, alone=None, ring=None, start=0, fill=False):
        """x (B, S, C); rope: cos and sin (S, 1, d/2); context 0: all see all, else as in `window`. ring: keys, values
        (B, kv_heads, L, d) of the frames before start; those of this call are written at their index modulo L. fill:
        that is all that is wanted, and None comes back.
        start as a tensor: the same in fixed shapes, as a CUDA graph wants them."""
        B, S, C = x.shape
        qk, v = self.qkv(x).view(B, S, -1, self.head_dim).split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        cos, sin = (y * self.qk_gain for y in rope)     # a gain of QK-norm costs nothing in the small tables
        qk = rotate(rms_norm(qk), cos, sin).type_as(v)                                    # (B, S, heads + kv_heads, d)
        q, k, v = (y.transpose(1, 2) for y in (*qk.split((self.heads, self.kv_heads), dim=2), v))   # (B, heads, S, d)
        mask = None
        if ring is not None:
            L = ring[0].shape[2]
            slots = (start + torch.arange(max(0, S - L), S, device=x.device)) % L
            # gradients flow through this frame alone, and the past that they are taken against stays as it is
            new = [(torch.index_copy if torch.is_grad_enabled() else torch.Tensor.index_copy_)(
                r, 2, slots, y[:, :, -L:]) for r, y in zip(ring, (k, v))]
            if type(ring) is list:          # the past of a gradient through all frames: kept, never written into
                ring[:] = new
            if fill:
                return None
            ring = new
            if S > 1:
                assert type(start) is int and not start, f'several frames can only begin a ring, not follow {start}'
            elif torch.is_tensor(start):    # order within the ring is of no matter: keys carry their positions
                k, v, mask = *ring, torch.arange(L, device=x.device) <= start
            else:
                k, v = (r[:, :, :start + 1] for r in ring)
        if S > 1 and (self.kernel == 'flex' or self.kernel == 'auto' and x.is_cuda and self.head_dim >= 16):
            flex = attend_flex if torch.compiler.is_compiling() else compiled_flex()
            y = flex(q, k, v, self.cap, self.context, alone)
        else:
            if S > 1 and self.context:
                mask = window(S, self.context, alone, x.device)
            y = attend(q, k, v, self.cap, mask)
        return self.out(y.transpose(1, 2).reshape(B, S, C))


class Layer(nn.Module):
    """Attention over space (all tokens of a frame) or over time (one token position), then an MLP."""
    def __init__(self, width, heads, kv_heads, cap, context=0):
        super().__init__()
        self.time = context > 0
        self.attn, self.mlp = Attention(width, heads, kv_heads, cap, context), SwiGLU(width, hidden(width))

    def forward(self, x, rope, alone=None, ring=None, start=0, fill=False):
        B, T, S, C = x.shape
        y = rms_norm(x)
        if self.time:
            y = self.attn(y.transpose(1, 2).reshape(B * S, T, C), rope, alone, ring, start, fill)
            if fill:
                return None
            y = y.view(B, S, T, C).transpose(1, 2)
        else:
            y = self.attn(y.view(B * T, S, C), rope).view(B, T, S, C)
        x = x + y
        return x + self.mlp(rms_norm(x))


class WideHead(nn.Module):
    """The head of RAE (arXiv:2510.11690): a few layers twice as wide that see the noised latents of a frame again. Each
    token is conditioned on what the trunk says of it, by scales, shifts and gates that begin at 0 (adaLN-Zero)."""
    def __init__(self, c):
        super().__init__()
        C, n = c['width'], c['wide_layers']
        self.z_in, self.out = nn.Linear(c['dim'], 2 * C), nn.Linear(2 * C, c['dim'])
        self.layers = nn.ModuleList(Layer(2 * C, 2 * c['heads'], 2 * c['kv_heads'], c['soft_cap']) for _ in range(n))
        self.modulate = nn.ModuleList(nn.Linear(C, 12 * C) for _ in range(n))

    def forward(self, x, z, rope):
        y = self.z_in(z).float()                                                          # (B, T, N, 2 C)
        for layer, modulate in zip(self.layers, self.modulate):
            scale1, shift1, gate1, scale2, shift2, gate2 = modulate(F.silu(x)).chunk(6, dim=-1)
            u = rms_norm(y) * (1 + scale1) + shift1
            y = y + gate1 * layer.attn(u.flatten(0, 1), rope).view_as(y)
            y = y + gate2 * layer.mlp(rms_norm(y) * (1 + scale2) + shift2)
        with torch.autocast(z.device.type, enabled=False):
            return self.out(rms_norm(y))


class WorldModel(nn.Module):
    """f(z~, tau, d, a) -> the clean latents (eq. 6). config: the dict of model_config.
    Tokens of a frame: [registers | latents | shortcut | action]. tau = 0 is noise, tau = 1 clean, d the step size."""
    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        self.remat = False      # training computes the layers again on the way back instead of keeping their insides
        self.graphs = {}        # CUDA graphs of rollout
        C, (rows, cols) = c['width'], c['grid']
        self.z_in = nn.Linear(c['dim'], C)
        self.registers = nn.Parameter(torch.empty(c['registers'], C))
        self.tau_embed = nn.Embedding(c['k_max'], C // 2)                       # tau = i / k_max
        self.d_embed = nn.Embedding(int(math.log2(c['k_max'])) + 1, C // 2)     # d = 2^-i
        self.a_base = nn.Parameter(torch.empty(C))                              # stands in where no action is known
        self.a_in = nn.Linear(c['action_dim'], C, bias=False) if c['action_dim'] else None
        self.layers = nn.ModuleList(Layer(C, c['heads'], c['kv_heads'], c['soft_cap'], c['context'] * is_time(c, i))
                                    for i in range(c['layers']))
        self.last_time = max(i for i, layer in enumerate(self.layers) if layer.time)
        self.head = WideHead(c) if c['wide_layers'] else nn.Linear(C, c['dim'])
        # RoPE. Space: half of the pairs turn with the row, half with the column of a latent; other tokens stand still.
        half = C // c['heads'] // 2
        freq = 100.0 ** (-torch.arange(half // 2) / (half // 2))
        at = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).float()         # (N, 2)
        angles = torch.zeros(c['registers'] + rows * cols + 2, half)
        angles[c['registers']:-2] = torch.cat((at[:, :1] * freq, at[:, 1:] * freq), dim=1)
        self.register_buffer('space_cos', angles.cos()[:, None], persistent=False)
        self.register_buffer('space_sin', angles.sin()[:, None], persistent=False)
        self.register_buffer('time_freq', 10000.0 ** (-torch.arange(half) / half), persistent=False)
        # init: unit-variance tokens; residual branches shrunk so that depth does not matter; output starts at zero
        for p in (self.registers, self.a_base, self.tau_embed.weight, self.d_embed.weight):
            nn.init.normal_(p, std=0.5)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=m.in_features ** -0.5)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        for m in self.modules():
            if isinstance(m, Layer):
                m.attn.out.weight.data /= math.sqrt(2 * c['layers'])
                m.mlp.down.weight.data /= math.sqrt(2 * c['layers'])
        for m in (self.head.out, *self.head.modulate) if c['wide_layers'] else (self.head,):
            nn.init.zeros_(m.weight)

    def forward(self, z, tau, d, a, a_mask, alone=None, rings=None, start=0, commit=False):
        """z (B, T, N, D) noised latents, tau and d (B, T), a (B, T, A), a_mask (B, T) bool -> z_hat (B, T, N, D).
        alone (B,) bool: clips whose frames do not see each other (separate images). rings: the cache that new_rings
        makes, start: the index of the first frame of this call. commit=True only fills the rings and returns None."""
        c = self.config
        B, T, N, D = z.shape
        assert (N, D) == (c['grid'][0] * c['grid'][1], c['dim']) and a.shape == (B, T, c['action_dim']), \
            f'latents {tuple(z.shape)} and actions {tuple(a.shape)} do not fit {c}'
        tau_i = (tau * c['k_max']).round().long().clamp(0, c['k_max'] - 1)      # tau = 1 reads as the cleanest level
        shortcut = torch.cat((self.tau_embed(tau_i), self.d_embed((-torch.log2(d)).round().long())), -1)  # (B, T, C)
        action = self.a_base.expand(B, T, -1)
        if c['action_dim']:
            action = action + torch.where(a_mask[..., None], self.a_in(torch.where(a_mask[..., None], a, 0.0)), 0.0)
        latents = self.z_in(z)                                                            # (B, T, N, C)
        if c['action_on'] == 'all':     # one action token alone is all but ignored: it takes ~10x longer to be used
            latents = latents + action[:, :, None]
        x = torch.cat((self.registers.expand(B, T, -1, -1), latents, shortcut[:, :, None], action[:, :, None]),
                      dim=2).float()                                                      # (B, T, S, C), float32
        t = torch.arange(T, device=z.device) + start
        angles = (t[:, None] * self.time_freq)[:, None]                                   # (T, 1, d/2)
        time, space = (angles.cos(), angles.sin()), (self.space_cos, self.space_sin)
        if alone is not None:
            alone = alone.repeat_interleave(x.shape[2])                                   # (B S,)
        again = self.remat and torch.is_grad_enabled() and rings is None        # rings would have moved on
        for i, layer in enumerate(self.layers):
            fill = commit and i == self.last_time   # nothing above can reach a later frame
            given = (x, time, alone, rings and rings[i], start, fill) if layer.time else (x, space)
            x = checkpoint(layer, *given, **REMAT) if again else layer(*given)
            if fill:
                return None
        x = x[:, :, c['registers']:-2]
        if c['wide_layers']:
            given = x, z, [y[c['registers']:-2] for y in space]
            return checkpoint(self.head, *given, **REMAT) if again else self.head(*given)
        with torch.autocast(z.device.type, enabled=False):
            return self.head(rms_norm(x))

    def new_rings(self, B, T, dtype=torch.float32):
        """An empty cache for B clips of T frames: per time layer the keys and values of the last `context` of them."""
        c = self.config
        shape = B * len(self.space_cos), c['kv_heads'], min(T, c['context']), c['width'] // c['heads']
        return [tuple(torch.zeros(shape, dtype=dtype, device=self.a_base.device) for _ in 'kv') if layer.time else None
                for layer in self.layers]


# --------------------------------------------------------------------------------------------------------------------
# shortcut forcing

def signal_levels(u, schedule, shift):
    """Levels in [0, 1] of uniform numbers u. 'uniform': u. 'shift': tau / (1 - tau) = u / (1 - u) / shift, which for
    shift > 1 moves them towards noise (arXiv:2403.03206; arXiv:2510.11690 takes sqrt(tokens x channels / 4096)).
    'logit-normal': logit(tau) is normal with mean -log(shift) and deviation 1."""
    if schedule == 'uniform':
        return u
    x = torch.logit(u) if schedule == 'shift' else math.sqrt(2) * torch.erfinv(2 * u - 1)
    return torch.sigmoid(x - math.log(shift))


def which_rows(z_mask, objective='shortcut', bootstrap=0.25, first=0):
    """boot (B,) bool, how many are True (on the host), and the frames that count in the flow and the bootstrap term,
    (2, B, T) bool. A row is one or the other; of all rows, counted from `first`, the share is exact."""
    B, share = len(z_mask), round(1000 * bootstrap) * (objective == 'shortcut')
    i = first + torch.arange(B, device=z_mask.device)
    boot = (i + 1) * share // 1000 > i * share // 1000
    if objective == 'direct':       # nothing comes before the first frame
        z_mask = z_mask & (torch.arange(z_mask.shape[1], device=z_mask.device) > 0)
    n = (first + B) * share // 1000 - first * share // 1000
    return boot, n, torch.stack((z_mask & ~boot[:, None], z_mask & boot[:, None]))


def shortcut_loss(model, z, a, a_mask, z_mask, objective='shortcut', k_max=0, bootstrap=0.25, p_image=0.3, p_null=0.1,
                  tau_schedule='shift', tau_shift=0.0, p_past=0.7, ramp=True, space='x', rms=None, teacher=None,
                  first=0, noise=None, count=None):
    """Loss and metrics (0-d tensors on the device, so that nobody waits for them) of one batch of clips.
    z (B, T, N, D) clean normalised latents, a (B, T, A), a_mask and z_mask (B, T) bool (action known, frame real).
    objective 'shortcut': eq. 7 of arXiv:2509.24527 in x-space, a share `bootstrap` of the rows with d > d_min, the
    others with d = d_min = 1 / k_max (0 = the model's). 'diffusion': d_min alone. 'direct': one deterministic step
    from the clean past, z_hat[t] = f(z[t-1], a[t]).
    tau_schedule, tau_shift (0 = sqrt(N D / 4096)): see signal_levels. Shares of clips: p_past, whose frames before a
    random one are nearly clean (tau >= 7/8, on the grid of d), as sampling sees them; p_image, whose frames are seen as
    separate images; p_null, whose actions are hidden. ramp: weights of eq. 8. space 'v': the error of velocities, that
    is divided by (1 - tau)^2. rms (2,): running mean squares, whose roots divide the terms. teacher: the model of
    the half steps, None = model. first: number of the first row, see which_rows. noise: uniform (B, 4 + 3 T) and
    normal (B, T, N, D) numbers. count (2,): what sums over frames are divided by, None = the frames that count."""
    (B, T, N, D), device = z.shape, z.device
    k_max = k_max or model.config['k_max']
    boot, n, valid = which_rows(z_mask, objective, bootstrap, first)
    u, eps = noise or (torch.rand(B, 4 + 3 * T, device=device), torch.randn_like(z))
    row, (u_tau, u_d, u_past) = u[:, :4, None], u[:, 4:].unflatten(1, (3, T)).unbind(1)
    a_mask, alone, target = a_mask & (row[:, 0] >= p_null), None, z
    if objective == 'direct':
        z_tau, tau, d = previous(z)
    else:
        alone = row[:, 1, 0] < p_image
        a_mask = a_mask & ~alone[:, None]
        now = 1 + (row[:, 2] * (T - 1)).floor()
        past = (row[:, 3] < p_past) & (torch.arange(T, device=device) < now)                      # (B, T)
        e = 1 + (u_d * int(math.log2(k_max))).floor()                                             # d = 2^e d_min <= 1
        d = 2.0 ** torch.where(boot[:, None], torch.where(past, 1, e), 0) / k_max
        tau = signal_levels(u_tau, tau_schedule, tau_shift or math.sqrt(N * D / 4096))
        tau = torch.minimum((torch.where(past, 1 - u_past / 8, tau) / d).floor() * d, 1 - d)      # the grid of d
        level = tau[..., None, None]
        z_tau = (1 - level) * eps + level * z                                             # eq. 6
    if n:
        with torch.no_grad():       # the teacher: by default the same weights; two half steps
            at = torch.argsort(boot.byte(), descending=True, stable=True)[:n]   # nonzero() would wait for the device
            x, s, half, *given = (v[at] for v in (z_tau, tau, d / 2, a, a_mask, alone))
            level, step = s[..., None, None], half[..., None, None]
            one = ((teacher or model)(x, s, half, *given) - x) / (1 - level)
            mid = x + one * step
            two = ((teacher or model)(mid, s + half, half, *given) - mid) / (1 - level - step)
            # (1-tau)^2 |(z_hat - z_tau)/(1-tau) - v|^2 = |z_hat - (z_tau + (1-tau) v)|^2: no division by 1-tau
            target = z.index_copy(0, at, (x + (1 - level) * (one + two) / 2).type_as(z))
    error = (model(z_tau, tau, d, a, a_mask, alone) - target).square().mean(dim=(2, 3))           # (B, T)
    if objective != 'direct':
        error = error * (0.9 * tau + 0.1 if ramp else 1) / ((1 - tau) ** 2 if space == 'v' else 1)    # ramp: eq. 8
    count = valid.sum(dim=(1, 2)) if count is None else count
    flow, boot = (error * valid).sum(dim=(1, 2)) / count.clamp(min=1e-6)
    scale = torch.ones(2, device=device) if rms is None else rms.clamp(min=1e-12).sqrt()
    metrics = dict(flow=flow.detach(), bootstrap=boot.detach(), tau=(tau * valid[0]).sum() / count[0].clamp(min=1e-6))
    # Divided by its own RMS alone, a bootstrap term that falls gains weight without end, and weights that merely agree
    # with themselves make it fall to 0: training then leaves the data (seen). So it never weighs more than the flow.
    return flow / scale[0] + boot / scale.max(), metrics


def previous(z):
    # 'direct' feeds frame t-1 in the place of frame t: clean everywhere but before the first frame, always one step
    tau = torch.ones(z.shape[:2], device=z.device)
    tau[:, 0] = 0
    return torch.cat((torch.zeros_like(z[:, :1]), z[:, :-1]), dim=1), tau, torch.ones_like(tau)


def context_levels(c, tau_ctx):
    """The noise level at which the past is seen, and its step size label: both on the grid of k_max."""
    level = min(round(tau_ctx * c['k_max']), c['k_max'] - 1) / c['k_max']       # tau = 1 has never been trained
    return level, 1.0 if c['objective'] == 'direct' else 1 / c['k_max']


def noised_context(c, z_ctx, tau_ctx, seed):
    """z_ctx (B, Tc, N, D) as the model sees it when it imagines what follows: z, tau, d."""
    level, finest = context_levels(c, tau_ctx)
    if c['objective'] == 'direct':
        return previous(z_ctx)
    generator = torch.Generator(z_ctx.device).manual_seed(hash((seed, 1)) % 2 ** 32)    # not the future's noise
    eps = torch.randn(z_ctx.shape, generator=generator, device=z_ctx.device)
    return (level * z_ctx + (1 - level) * eps,
            *(torch.full(z_ctx.shape[:2], v, device=z_ctx.device) for v in (level, finest)))


@torch.no_grad()
def remember(model, z_ctx, a, a_mask, T, tau_ctx=0.9, seed=0):
    """The rings of keys and values after the context z_ctx (B, Tc, N, D), a and a_mask (B, Tc, ..), for clips of T
    frames in all. rollout(.., rings=) takes them for any number of candidates, and leaves them as they are."""
    device = z_ctx.device.type
    fast = torch.is_autocast_enabled(device)
    rings = model.new_rings(len(z_ctx), T, torch.get_autocast_dtype(device) if fast else z_ctx.dtype)
    model(*noised_context(model.config, z_ctx, tau_ctx, seed), a, a_mask, rings=rings, commit=True)
    return rings


@torch.no_grad()
def rollout(model, z_ctx, a, a_mask, K=4, tau_ctx=0.9, seed=0, cache=True, grad=False, graph=None, rings=None):
    """Imagines the frames after z_ctx (B, Tc, N, D), one after the other, each in K steps -> (B M, T - Tc, N, D).
    a (B M, T, A) and a_mask (B M, T) cover context and future. With M > 1 each context has M candidates in a row,
    which share its actions, its computation and their noise. The past is seen at noise level tau_ctx (on the grid of
    k_max) and labelled so. Each frame costs K passes over one frame and a part of one that commits it to the rings;
    cache=False computes the same from scratch each time (the reference). Noise depends on seed, context and frame
    alone. Euler steps z <- z + d (z_hat - z) / (1 - tau): the last one returns z_hat.
    grad: True: gradients flow through the last step of each frame, and through nothing else (self-forcing); 'all':
    through everything, back to the actions. rings: what `remember` made of this context, to be used many times.
    graph: a frame is one CUDA graph, kept in model.graphs for later calls of the same shapes; None: where it can be."""
    c = model.config
    (B, Tc, N, D), T, M = z_ctx.shape, a.shape[1], a.shape[0] // z_ctx.shape[0]
    assert K >= 1 and K & (K - 1) == 0 and K <= c['k_max'], f'K {K} is not a power of two up to k_max {c["k_max"]}'
    assert a.shape[0] == B * M and 1 <= Tc < T, f'context {tuple(z_ctx.shape)} and actions {tuple(a.shape)} disagree'
    assert cache or not grad, 'gradients flow through a rollout with a cache'
    device, direct = z_ctx.device, c['objective'] == 'direct'
    generator, level, finest = torch.Generator(device).manual_seed(seed), *context_levels(c, tau_ctx)

    def noise():
        return torch.randn(2, B, 1, N, D, generator=generator, device=device)

    step = 1 / K if c['objective'] == 'shortcut' else finest
    if cache:
        rings = rings or remember(model, z_ctx, a[::M, :Tc], a_mask[::M, :Tc], T, tau_ctx, seed)
        rings = [ring and (list if grad == 'all' else tuple)(
            r.unflatten(0, (B, -1)).repeat_interleave(M, dim=0).flatten(0, 1) for r in ring)
            for ring in rings]     # every context's ring for each of its M candidates
        dtype = next((ring[0].dtype for ring in rings if ring), None)
    else:
        past, tau, d = (v.repeat_interleave(M, dim=0) for v in noised_context(c, z_ctx, tau_ctx, seed))

    def look(z, tau_t, d_t, a_t, mask_t, t, commit=False):
        # z_hat of frame t alone, given the past; commit: make it part of the past
        nonlocal past, tau, d
        tau_t, d_t = (torch.full((B * M, 1), v, device=device) for v in (tau_t, d_t))
        if cache:
            return model(z, tau_t, d_t, a_t, mask_t, rings=rings, start=t, commit=commit)
        z, tau_t, d_t = torch.cat((past, z), dim=1), torch.cat((tau, tau_t), dim=1), torch.cat((d, d_t), dim=1)
        if commit:
            past, tau, d = z, tau_t, d_t
            return None
        return model(z, tau_t, d_t, a[:, :t + 1], a_mask[:, :t + 1])[:, -1:]

    def frame(z, eps, a_t, mask_t, t, last):
        # from noise z, or for 'direct' the frame before, to the frame t, which is committed with the noise eps
        seen, steps = z, 1 if direct else K
        for k in range(steps):
            with torch.set_grad_enabled(grad == 'all' or grad and k == steps - 1):
                z_hat = look(z, 1.0 if direct else k / K, step, a_t, mask_t, t)
                z = z_hat.type_as(z) if direct else z + (z_hat - z) / (K - k)   # d / (1 - tau) = 1 / (K - k)
        if not direct:
            seen = level * (z if grad == 'all' else z.detach()) + (1 - level) * eps
        if not last and (not direct or grad is True or not cache):
            look(seen, 1.0 if direct else level, finest, a_t, mask_t, t, commit=True)
        return z

    if graph := cache and not grad and (device.type == 'cuda' if graph is None else graph):
        key = B * M, min(T, c['context']), K, level, dtype
        kept = model.graphs.setdefault(key, rings)
        for new, old in zip((r for ring in rings if ring for r in ring), (r for ring in kept if ring for r in ring)):
            old.copy_(new)
        rings = kept
    out, z = [], z_ctx[:, -1:].repeat_interleave(M, dim=0)
    for t in range(Tc, T):
        z, eps = (z if grad == 'all' else z.detach(), z) if direct else (x.repeat_interleave(M, dim=0) for x in noise())
        now = torch.full((), t, device=device) if graph or grad is True else t
        f = functools.partial(frame, last=t == T - 1)
        with torch.set_grad_enabled(grad == 'all'):
            given = z, eps, a[:, t:t + 1], a_mask[:, t:t + 1], now
            z = replay(model.graphs, (*key, t == T - 1), f, *given) if graph else f(*given)
        out.append(z)
    with torch.set_grad_enabled(bool(grad)):
        return torch.cat(out, dim=1)


def replay(graphs, key, f, *inputs):
    """f(*inputs) as the CUDA graph graphs[key], which is captured here when it is not there yet."""
    if key not in graphs:
        given, side = [x.clone() for x in inputs], torch.cuda.Stream()
        # autocast would keep its copies of the weights only until its context ends, but the graph reads them for good
        with torch.autocast('cuda', torch.get_autocast_dtype('cuda'), torch.is_autocast_enabled('cuda'), False):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                f(*given)       # compiles, and lets libraries find their memory
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # a loader's thread may pin memory meanwhile; the graphs run one after the other, and can share their memory
            with torch.cuda.graph(graph, graphs.setdefault('pool', torch.cuda.graph_pool_handle()),
                                  capture_error_mode='thread_local'):
                out = f(*given)
        graphs[key] = graph, given, out
    graph, given, out = graphs[key]
    for x, new in zip(given, inputs):
        x.copy_(new)
    graph.replay()
    return out.clone()


def compile_layers(model):
    """torch.compile, layer by layer: quick to compile, and all layers of a kind share the code."""
    torch._dynamo.config.recompile_limit = 64      # shapes of students and teachers, of short and long clips
    for block in (*model.layers, *[model.head] * (model.config['wide_layers'] > 0)):
        block.compile(dynamic=False, fullgraph=True)


def half_weights(model, dtype):
    """The model, its linear maps but the last in dtype: what autocast would make of them, in every pass anew."""
    model.graphs.clear()        # they read the old weights
    for m in model.modules():
        if isinstance(m, nn.Linear) and m is not model.head and m is not getattr(model.head, 'out', None):
            m.to(dtype)
    return model


# --------------------------------------------------------------------------------------------------------------------
# the checkpoint

def save(path, model, config, ema=None, stats=None, step=0, weights=None):
    """Write one safetensors file: the weights, their average (ema: {name: tensor}, under 'ema.'), stats ({name:
    tensor}: latents, actions, a fitted encoder; under 'stats.') and as metadata config (JSON of plain values: the
    constants of the run), the model's own config, versions and step. Aside first, then renamed.
    weights replaces model.state_dict(), whose tensors are shards in some processes."""
    tensors = dict(weights or model.state_dict())
    tensors |= {f'ema.{k}': v for k, v in (ema or {}).items()} | {f'stats.{k}': v for k, v in (stats or {}).items()}
    metadata = dict(config=json.dumps(config), model=json.dumps(model.config), step=str(step),
                    versions=json.dumps(dict(torch=torch.__version__, python=sys.version.split()[0])))
    safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, f'{path}.tmp', metadata)
    os.replace(f'{path}.tmp', path)


def load(path, device='cpu', ema=True):
    """model, config of a checkpoint: a WorldModel in eval mode with the averaged weights where there are any
    (ema=False: the trained ones), with .stats ({name: tensor}) and .step; config is what save was given."""
    try:
        with safetensors.safe_open(path, 'pt', device=str(device)) as f:
            metadata, tensors = f.metadata() or {}, {k: f.get_tensor(k) for k in f.keys()}
    except Exception as e:      # missing, cut short, something else: one line, whatever the reader makes of it
        sys.exit(f'{path}: not a readable checkpoint ({one_line(e)})')
    if not {'config', 'model', 'step'} <= metadata.keys():
        sys.exit(f'{path}: a safetensors file, but not a checkpoint of train.py')
    model = WorldModel(json.loads(metadata['model'])).to(device)
    weights = {k: v for k, v in tensors.items() if not k.startswith(('ema.', 'stats.'))}
    if ema:
        weights |= {k[4:]: v for k, v in tensors.items() if k.startswith('ema.')}
    model.load_state_dict(weights)
    model.stats = {k[6:]: v for k, v in tensors.items() if k.startswith('stats.')}
    model.step = int(metadata['step'])
    return model.eval(), json.loads(metadata['config'])


def standard(z, stats):
    """Normalised latents (.., D), what world models see, of an encoder's tokens (.., width): less their mean, perhaps
    only the leading principal components, over a deviation per channel."""
    z = z - stats['z_mean']
    return (z @ stats['z_basis'] if 'z_basis' in stats else z) / stats['z_std']


def unstandard(z, stats):
    """The encoder's tokens of normalised latents: the inverse of standard, up to the components that it left out."""
    z = z * stats['z_std']
    return (z @ stats['z_basis'].T if 'z_basis' in stats else z) + stats['z_mean']


def restore_encoder(config, stats, path=''):
    """The encoder that a checkpoint was trained with: config and model.stats are load's; path replaces its file."""
    encoder = load_encoder(config['encoder'], path or config['encoder_path'], config['layer'], config['frame_height'],
                           config['frame_width'], config['pool'])
    if config['encoder'] == 'pixels':
        encoder.load_state_dict({k[8:]: v for k, v in stats.items() if k.startswith('encoder.')})
    return encoder


@torch.no_grad()
def pictures(z, encoder, decoder=None):
    """Raw latents (n, N, D) as uint8 frames (n, 3, height, width): through a decoder, the inverse of `pixels`, or
    else the three leading principal components of all z given, as red, green and blue."""
    if decoder is not None or encoder.name == 'pixels':
        x = torch.cat([(decoder or encoder.decode)(part) for part in z.float().split(32)])
    else:
        flat = z.float().flatten(0, 1).cpu()
        flat = flat - flat.mean(dim=0)
        colour = flat @ torch.linalg.eigh((flat.T @ flat).double())[1][:, -3:].flip(1).float()
        low, high = (torch.quantile(colour[torch.linspace(0, len(colour) - 1, 50000).long()], q, dim=0)
                     for q in (0.02, 0.98))
        x = ((colour - low) / (high - low)).clamp(0, 1).view(*z.shape[:2], 3).transpose(1, 2)
        x = F.interpolate(x.unflatten(2, encoder.grid), (encoder.size, encoder.width))
    return (x * 255).round().to(torch.uint8).cpu()
