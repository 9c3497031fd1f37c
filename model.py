"""
The networks and their maths: frozen encoders, the world model, its objective, imagination, the
checkpoint.

Letters: B clips, T frames of a clip, N patch tokens of a frame, S all its tokens, D encoder width,
A action width, C width of the transformer, K denoising steps, M candidate plans, H W pixels. z are
normalised latents (B, T, N, D), a normalised actions (B, T, A); a[t] is what was done between frame
t-1 and frame t. tau = 0 is noise, tau = 1 is clean.

Sources: Dreamer 4 (arXiv:2509.24527) for the transformer and shortcut forcing, shortcut models
(arXiv:2410.12557), diffusion forcing (arXiv:2407.01392), DINOv2 (arXiv:2304.07193, with registers
arXiv:2309.16588), DINOv3 (arXiv:2508.10104), V-JEPA 2 (arXiv:2506.09985) and SigLIP 2
(arXiv:2502.14786) for the encoders.
"""
import difflib
import functools
import glob
import hashlib
import json
import math
import os
import re
import sys
from types import SimpleNamespace

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

# The first multi-threaded cos of a process can be off by 2e-4 on CPUs (torch 2.13, one process in
# four): spend it here.
torch.zeros(1).cos()


def rotate(x, cos, sin):
    """RoPE: x (.., S, d) with the pairs (x_i, x_{i + d/2}) turned by angles, cos and sin (S, d/2);
    float32. Halves, not neighbours, are paired, as in cos and sin: mixing the two makes results
    depend on absolute positions."""
    cos = torch.cat((cos, cos), dim=-1)         # small beside x
    sin = torch.cat((-sin, sin), dim=-1)
    x = x.float()
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def rotate_neighbours(x, cos, sin):
    """V-JEPA 2's RoPE: x (.., S, d), cos and sin (S, d); float32. x_2i and x_2i+1 are a pair, but
    each of them has an angle of its own: no rotation, but what its weights were trained with."""
    x = x.float()
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return torch.addcmul(x * cos, turned, sin)


class SwiGLU(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


# --------------------------------------------------------------------------------------------------
# Encoders. A frozen network makes N tokens of D numbers of each frame; the world model sees nothing
# else. DINOv2, DINOv3, V-JEPA 2 (of one frame) and SigLIP 2 are one ViT, which reads the weights of
# three publishers; of DINO there is the class token alone as well (_cls). Pixels needs no weights.
#
# An encoder is an nn.Module with
#   forward(x)          frames in [0, 1], (B, 3, H, W) of any size -> tokens (B, N, dim), float32
#   name                as load_encoder knows it
#   size, width         height and width in pixels of the frames that it sees; others are resized
#   patch, grid, dim    side of a patch in pixels; rows and columns of the tokens; D
#   layer, pool         what the user chose of a ViT: latents on disk are keyed by both
#   hash                of the weights as loaded, in every checkpoint; '' where stored() has them
#   fit(x)              learns from training frames, floats (n, 3, H, W); None: nothing to learn
#   stored()            what a checkpoint must keep: its state dict, or {} where a file has it
#   decode(z)           tokens -> frames (B, 3, size, width) in [0, 1]; None: it has no inverse
# and a new one is such a class and an `if` in load_encoder.

VITS = {        # width, depth, heads, hidden, gated
    's16': (384, 12, 6, 1536, False),
    's16plus': (384, 12, 6, 1536, True),
    'b16': (768, 12, 12, 3072, False),
    'l16': (1024, 24, 16, 4096, False),
    'h16plus': (1280, 32, 20, 5120, True),
    '7b16': (4096, 40, 32, 8192, True),     # so far DINOv3
    'g16': (1536, 40, 24, 4096, True),      # of DINOv2 alone, which has s, b and l as well
    'vjepa2_h': (1280, 32, 16, 5120, False),        # V-JEPA 2, and l
    'vjepa2_g': (1408, 40, 22, 6144, False),
    'so400m': (1152, 27, 16, 4304, False),          # SigLIP 2, and b and l
    'giant-opt': (1536, 40, 16, 6144, False),
}
ENCODERS = {}   # name: hub repository, ViT's arguments: VITS' and registers, patch, grid, family
for _size, _word in dict(s='small', b='base', l='large', g='giant').items():
    _vit = VITS[f'{_size}16']
    ENCODERS |= {
        f'dinov2_vit{_size}14': (f'facebook/dinov2-{_word}', *_vit, 0, 14, 37),
        f'dinov2_vit{_size}14_reg': (
            f'facebook/dinov2-with-registers-{_word}', *_vit, 4, 14, 37)}
for _size in [*VITS][:6]:
    _repo = f'facebook/dinov3-vit{_size}-pretrain'
    ENCODERS[f'dinov3_vit{_size}'] = (f'{_repo}-lvd1689m', *VITS[_size], 4, 16, 0)
    if _size in ('l16', '7b16'):    # of satellite pictures, which are normalised in another way
        ENCODERS[f'dinov3_vit{_size}_sat'] = (f'{_repo}-sat493m', *VITS[_size], 4, 16, 0)
ENCODERS |= {f'{name}_cls': entry for name, entry in ENCODERS.items()}
for _size, _vit in dict(l16='l16', h16='vjepa2_h', g16='vjepa2_g', g16_384='vjepa2_g').items():
    _side = 384 if _size == 'g16_384' else 256
    ENCODERS[f'vjepa2_vit{_size}'] = (
        f'facebook/vjepa2-vit{_size[0]}-fpc64-{_side}', *VITS[_vit], 0, 16, _side // 16, 'vjepa2')
for _word, _vit, _kinds in (
        ('base', 'b16', '16-224 16-256 16-384 16-512 32-256'),
        ('large', 'l16', '16-256 16-384 16-512'),
        ('so400m', 'so400m', '14-224 14-384 16-256 16-384 16-512'),
        ('giant-opt', 'giant-opt', '16-256 16-384')):
    for _kind in _kinds.split():
        _patch, _side = map(int, _kind.split('-'))
        ENCODERS[f'siglip2_{_word}{_patch}_{_side}'] = (
            f'google/siglip2-{_word}-patch{_kind}', *VITS[_vit], 0, _patch, _side // _patch,
            'siglip2')


class ViTBlock(nn.Module):
    """x + ls1 attn(norm1 x), then x + ls2 mlp(norm2 x): pre-norm, DINO's with LayerScale."""
    def __init__(self, width, heads, hidden, gated, eps, family):
        super().__init__()
        self.heads = heads
        self.rotate = rotate_neighbours if family == 'vjepa2' else rotate
        self.gelu = 'tanh' if family == 'siglip2' else 'none'
        self.norm1 = nn.LayerNorm(width, eps)
        self.norm2 = nn.LayerNorm(width, eps)
        self.gated = gated
        inner = 2 * hidden if gated else hidden
        self.attn = nn.ModuleDict(dict(
            qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width)))
        self.mlp = nn.ModuleDict(dict(
            fc1=nn.Linear(width, inner), fc2=nn.Linear(hidden, width)))
        self.ls1 = nn.Parameter(torch.ones(width)) if family == 'dino' else 1.0
        self.ls2 = nn.Parameter(torch.ones(width)) if family == 'dino' else 1.0

    def forward(self, x, rope):
        B, L, D = x.shape
        qkv = self.attn.qkv(self.norm1(x)).view(B, L, 3, self.heads, -1)
        qkv = qkv.permute(2, 0, 3, 1, 4)        # (3, B, heads, L, d)
        q, k, v = qkv
        if rope:
            q, k = self.rotate(qkv[:2], *rope).type_as(v)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, D)
        x = x + self.ls1 * self.attn.proj(y)
        y = self.mlp.fc1(self.norm2(x))
        if self.gated:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        else:
            y = F.gelu(y, approximate=self.gelu)
        return x + self.ls2 * self.mlp.fc2(y)


class ViT(nn.Module):
    """forward(x, layer, cls): normalised images (B, 3, H, W) to patch tokens (B, N, width), rows
    first, or to the class token alone (B, 1, width). grid is the side of the square of patches that
    it was trained on (DINOv2's and SigLIP 2's position embedding), or 0: any (DINOv3, rotary like
    V-JEPA 2). layer is the block whose tokens pass through the final norm; later ones are not run.
    Inside: class token and registers (DINO's), patches. family 'mae': as 'dino', no LayerScale;
    channels: of what it sees, in the place of 3."""
    def __init__(self, width, depth, heads, hidden, gated, registers, patch, grid, family='dino',
                 channels=3):
        super().__init__()
        self.patch = patch
        self.grid = grid
        self.family = family
        self.head = width // heads
        eps = 1e-6 if grid else 1e-5
        dino = family in ('dino', 'mae')
        learned = grid > 0 and family != 'vjepa2'
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if dino else None
        self.registers = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        places = grid * grid + 1 if dino else grid * grid
        self.pos_embed = nn.Parameter(torch.zeros(1, places, width)) if learned else None
        self.patch_embed = nn.Conv2d(channels, width, patch, patch)
        self.blocks = nn.ModuleList(
            ViTBlock(width, heads, hidden, gated, eps, family) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)
        # on the CPU even where the parameters are on 'meta': few files hold them
        n, longest = (self.head // 4, 100.0) if dino else (self.head // 6, 10000.0)
        periods = longest ** (torch.arange(n, device='cpu', dtype=torch.float32) / n)
        self.register_buffer('periods', None if learned else periods)

    def positions(self, rows, columns):
        """The learned positions (1, [class token +] rows * columns, width), resized from the square
        they were learned on."""
        if rows == columns == self.grid:
            return self.pos_embed
        rest, square = self.pos_embed.tensor_split([-self.grid ** 2], dim=1)
        square = square.float().mT.unflatten(2, (self.grid, self.grid))
        if self.family == 'dino' and self.registers is None:
            # the first models scale so, and their features depend on it
            scale = [(n + 0.1) / self.grid for n in (rows, columns)]
            square = F.interpolate(square, scale_factor=scale, mode='bicubic')
        else:       # SigLIP 2 as Hugging Face does it
            square = F.interpolate(square, (rows, columns), mode='bicubic',
                                   antialias=self.family == 'dino')
        return torch.cat((rest, square.flatten(2).mT), dim=1)

    def angles(self, rows, columns):
        """cos and sin (L, width / heads / 2): patch centres in [-1, 1], half of each head for y,
        half for x; the class token and registers do not turn. V-JEPA 2's (N, width / heads): whole
        patches; time, which is 0 for one frame, y, x and a rest that does not turn."""
        y, x = (torch.arange(n, device=self.periods.device) for n in (rows, columns))
        if self.family == 'vjepa2':
            n = len(self.periods)
            angles = torch.cartesian_prod(y, x)[:, :, None] / self.periods
            angles = angles.repeat(1, 1, 2).flatten(1)
            angles = F.pad(angles, (2 * n, self.head - 6 * n))
        else:
            yx = torch.cartesian_prod((y + 0.5) / rows * 2 - 1, (x + 0.5) / columns * 2 - 1)
            angles = 2 * math.pi * yx[:, :, None] / self.periods.float()
            angles = angles.flatten(1)
            angles = F.pad(angles, (0, 0, 1 + self.registers.shape[1], 0))
        return angles.cos(), angles.sin()

    def forward(self, x, layer=-1, cls=False):
        B, _, H, W = x.shape
        rows, columns = H // self.patch, W // self.patch
        x = self.patch_embed(x).flatten(2).mT                               # (B, N, width)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(B, -1, -1), x), dim=1)     # (B, 1 + N, width)
        if self.pos_embed is not None:
            x = x + self.positions(rows, columns).to(x.dtype)
        if self.registers is not None:      # after the positions: registers have none
            registers = self.registers.expand(B, -1, -1)
            x = torch.cat((x[:, :1], registers, x[:, 1:]), dim=1)
        rope = None if self.periods is None else self.angles(rows, columns)
        for block in self.blocks[:layer % len(self.blocks) + 1]:
            x = block(x, rope)
        return self.norm(x[:, :1] if cls else x[:, -rows * columns:])


# The same weights go by three sets of names; official() takes them all to ViT's.

PREFIX = (      # what is left out of names
    r'^((module|teacher|student|backbone|model|vision_model|dinov2|dinov2_with_registers|'
    r'embeddings|encoder|_orig_mod|_fsdp_wrapped_module)\.)+'
    r'|\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.'
    r'|(?<=blocks\.)\d+\.(?=\d)')     # of blocks in chunks
UNUSED = (
    r'^(mask_token$|rope_embeddings\.|local_cls_norm\.|((dino|ibot)_)?head\.|projectors\.|'
    r'predictor\.|text_model\.|logit_|attn_pool\.)')
NAMES = {       # what is replaced, from the first line to the last
    # Hugging Face: files keep older names (query, output.dense, weights_in) than models in memory
    'position_embeddings': 'pos_embed',
    'patch_embeddings.projection': 'patch_embed',
    'patch_embeddings': 'patch_embed',
    'position_embedding.weight': 'pos_embed',
    'patch_embedding': 'patch_embed',
    'post_layernorm': 'norm',
    'layernorm': 'norm',
    'layer_norm': 'norm',
    'layer.': 'blocks.',
    'layers.': 'blocks.',
    'layer_scale': 'ls',
    '.lambda1': '',
    '.attention.attention.': '.attn.',
    '.attention.': '.attn.',
    '.self_attn.': '.attn.',
    '.out_proj.': '.proj.',
    '.query.': '.q.',
    '.key.': '.k.',
    '.value.': '.v.',
    '.output.dense.': '.proj.',
    '.weights_in.': '.fc1.',
    '.weights_out.': '.fc2.',
    '.down_proj.': '.fc2.',
    '_proj.': '.',
    '.o.': '.proj.',
    # timm
    'reg_token': 'registers',
    '.gamma_1': '.ls1',
    '.gamma_2': '.ls2',
    '.q_bias': '.q.bias',
    '.v_bias': '.v.bias',
    '.fc1_g.': '.gate.',
    '.fc1_x.': '.up.',
    # Meta
    'register_tokens': 'registers',
    'storage_tokens': 'registers',
    'rope_embed.': '',
    'patch_embed.proj.': 'patch_embed.',
    '.gamma': '',
    '.w12.': '.fc1.',
    '.w1.': '.gate.',
    '.w2.': '.up.',
    '.w3.': '.fc2.',
}
JOINED = [      # the last: of an MLP without a gate
    ('attn.qkv', 'attn.q attn.k attn.v'), ('mlp.fc1', 'mlp.gate mlp.up'), ('mlp.fc1', 'mlp.up')]


def official(state, names={}):
    """{key: tensor} under ViT's names, from a file of Meta, Hugging Face (as stored or in memory)
    or timm. names: what else is replaced, before NAMES."""
    # a student first: its teacher, which is what publishers give away, replaces it
    keys = sorted(state, key=lambda key: 'student.' not in key)
    state = {re.sub(PREFIX, '', key): state[key] for key in keys}
    if 'reg_token' in state and 'pos_embed' in state:   # timm adds the class token's to it
        state['pos_embed'] = F.pad(state['pos_embed'], (0, 0, 1, 0))
    state = {key: value for key, value in state.items() if not re.match(UNUSED, key)}
    for old, new in (names | NAMES).items():
        state = {key.replace(old, new): value for key, value in state.items()}
    patch = state.get('patch_embed.weight')
    if patch is not None and patch.dim() == 5:  # V-JEPA 2: of two frames, here the same one twice
        state['patch_embed.weight'] = patch.float().sum(2)
        state.pop('pos_embed', None)            # in Meta's files, not used: positions are rotary
    places = state.get('pos_embed')
    if places is not None and places.dim() == 2:        # Hugging Face's SigLIP 2
        state['pos_embed'] = places[None]
    for key in [key for key in state if key.endswith('.bias_mask')]:        # Meta's DINOv3
        mask = state.pop(key).nan_to_num(0.0)       # 1 for q and v, 0 for k, or not yet a number
        bias = key.removesuffix('_mask')
        state[bias] = state[bias] * mask
    for norm in [key for key in state if key.endswith('norm1.weight')]:
        p = norm.removesuffix('norm1.weight')       # of a block's names
        if f'{p}attn.qkv.bias' not in state:
            for letter in 'qkv':    # where one of the three has no bias, it is 0
                state.setdefault(f'{p}attn.{letter}.bias', torch.zeros_like(state[norm]))
        for new, parts in JOINED:
            for kind in ('weight', 'bias'):
                keys = [f'{p}{part}.{kind}' for part in parts.split()]
                if all(key in state for key in keys):   # what is missing is named when it is loaded
                    state[f'{p}{new}.{kind}'] = torch.cat([state.pop(key) for key in keys])
    return state


def read_tensors(file, option='encoder_path'):
    """{key: tensor} of a .safetensors file, of a folder of them, or of a PyTorch file (read without
    code). option: which one named it."""
    parts = sorted(glob.glob(f'{glob.escape(file)}/*.safetensors'))
    if parts:
        state = {}
        for part in parts:
            state |= read_tensors(part)
        return state
    if not os.path.isfile(file):
        sys.exit(f'--{option}={file}: no such file, nor a folder with .safetensors in it')
    try:
        if file.endswith('.safetensors'):
            return safetensors.torch.load_file(file)
        state = inner_state(torch.load(file, map_location='cpu', weights_only=True), file)
    except Exception as e:      # a damaged file fails in as many ways as it has readers
        sys.exit(f'{file}: cannot be read as weights ({one_line(e)})')
    tensors = {k: v for k, v in state.items() if torch.is_tensor(v)}
    if not tensors:
        there = ', '.join(map(str, state))
        sys.exit(f'{file}: no weights in it, but {" ".join(there.split())[:160]}')
    return tensors


def inner_state(state, file):
    """The weights in what training scripts save: the teacher's, else of the only model."""
    names = ('teacher student model state_dict model_state_dict model_ema state_dict_ema backbone '
             'encoder')
    inner = [name for name in names.split() if isinstance(state.get(name), dict)]
    if len(inner) > 1 and inner[0] != 'teacher':
        sys.exit(f'{file}: has {" and ".join(inner)}: save the one that is wanted alone')
    return inner_state(state[inner[0]], file) if inner else state


def one_line(error):
    return f'{type(error).__name__}: {" ".join(str(error).split())[:160]}'


class Pixels(nn.Module):
    """The encoder without weights: the leading principal components of raw patches. Until fit has
    seen frames, they are those of a generic picture (correlation e^(-distance / patch)). Latents
    are not whitened here: what divides them (train.py's `whiten`) has an exponent of its own."""
    name = 'pixels'
    layer = -1
    pool = 1
    hash = ''

    def __init__(self, size, width, patch, dim=24):
        super().__init__()
        self.size = size
        self.width = width
        self.patch = patch
        self.dim = dim
        self.grid = (size // patch, width // patch)
        place = torch.cartesian_prod(torch.arange(patch), torch.arange(patch)).float()
        correlation = torch.exp(-torch.cdist(place, place) / patch)
        covariance = torch.kron(torch.eye(3) * 0.1 + 0.9, correlation)      # colours first
        self.register_buffer('mean', torch.full((3 * patch * patch,), 0.5))
        self.register_buffer('basis', self.components(covariance.double()))

    def components(self, covariance):
        _, vectors = torch.linalg.eigh(covariance)
        return vectors.flip(1)[:, :self.dim].float().contiguous()

    def patches(self, x):
        if x.shape[-2:] != (self.size, self.width):
            x = F.interpolate(x, (self.size, self.width), mode='bilinear', antialias=True)
        return F.unfold(x, self.patch, stride=self.patch).mT        # (B, N, 3 p p)

    def fit(self, x):
        p = self.patches(x).flatten(0, 1).cpu().double()    # not every device has float64 and eigh
        mean = p.mean(0)
        self.mean.copy_(mean)
        self.basis.copy_(self.components((p - mean).T @ (p - mean) / len(p)))

    def forward(self, x):
        return (self.patches(x) - self.mean) @ self.basis

    def stored(self):
        return self.state_dict()

    def decode(self, z):
        """The inverse, but for the components left out."""
        x = (z @ self.basis.T + self.mean).mT
        frames = F.fold(x, (self.size, self.width), self.patch, stride=self.patch)
        return frames.clamp(0, 1)


IMAGENET = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]        # mean and deviation of its colours


class Encoder(nn.Module):
    """A ViT with the resize and the normalisation that it was trained with."""
    fit = None
    decode = None

    def __init__(self, name, vit, layer, size, width, pool):
        super().__init__()
        self.name = name
        self.vit = vit
        self.layer = layer
        self.size = size
        self.width = width
        self.pool = pool
        self.dim = vit.norm.weight.shape[0]
        self.patch = vit.patch
        self.cls = name.endswith('_cls')
        self.grid = (1, 1) if self.cls else (size // vit.patch // pool, width // vit.patch // pool)
        digest = hashlib.sha256()       # of no buffers: not all files have the periods
        for p in vit.parameters():
            digest.update(p.detach().flatten().view(torch.uint8).numpy())
        self.hash = digest.hexdigest()[:16]
        moments = IMAGENET
        if '_sat' in name:
            moments = [[0.430, 0.411, 0.296], [0.213, 0.156, 0.143]]
        if vit.family == 'siglip2':
            moments = [[0.5] * 3] * 2
        moments = torch.tensor(moments).view(2, 3, 1, 1)
        self.register_buffer('mean_std', moments, persistent=False)

    def forward(self, x):
        assert x.is_floating_point(), f'frames are float in [0, 1], got {x.dtype}'
        if x.shape[-2:] != (self.size, self.width):     # each family as it was trained
            dinov2 = self.vit.family == 'dino' and self.vit.grid
            mode = 'bicubic' if dinov2 else 'bilinear'
            x = F.interpolate(x, (self.size, self.width), mode=mode, antialias=True)
            x = x.clamp(0, 1)       # cubics overshoot
        mean, std = self.mean_std
        z = self.vit((x - mean) / std, self.layer, self.cls).float()
        rows, columns = self.grid
        z = z.unflatten(1, (rows, self.pool, columns, self.pool))
        return z.mean((2, 4)).flatten(1, 2)

    def stored(self):
        return {}


def load_encoder(name, path='', layer=-1, height=0, width=0, pool=1):
    """A frozen encoder. Weights come from the file path, else from the hub. layer is the block
    whose tokens it returns, through the final norm (-1 is the last). Frames are resized to height x
    width pixels: 0 is what it was trained with (DINO: 224, pixels: 28) for the height, and the
    height for the width. pool=2 averages 2x2 patches."""
    if name == 'pixels':
        height, width = frame_size(name, height or 28, width, 7, pool)
        if layer != -1 or pool != 1:
            sys.exit(f'--layer={layer} --pool={pool}: pixels has no layers and does not pool')
        return Pixels(height, width, patch=7)
    if name not in ENCODERS:
        names = ['pixels', *ENCODERS]
        close = difflib.get_close_matches(name, names, 1)
        hint = f'did you mean {close[0]}?' if close else f'there are {", ".join(names)}'
        sys.exit(f'--encoder={name}: no such encoder, {hint}')
    repo, *arguments = ENCODERS[name]
    with torch.device('meta'):      # the file's tensors become the parameters: not allocated twice
        vit = ViT(*arguments)
    if pool != 1 and name.endswith('_cls'):
        sys.exit(f'--pool={pool}: {name} has one token, it takes pool=1')
    side = 224 if vit.family == 'dino' else vit.patch * vit.grid
    height, width = frame_size(name, height or side, width, vit.patch, pool)
    if not -len(vit.blocks) <= layer < len(vit.blocks):
        sys.exit(f'--layer={layer}: {name} has blocks 0 to {len(vit.blocks) - 1} (-1 is the last)')
    load_vit(vit, name, path or download_weights(name, repo))
    return Encoder(name, vit, layer, height, width, pool).eval().requires_grad_(False)


def frame_size(name, height, width, patch, pool):
    """(height, width) in pixels, which must be whole patches of a pooled grid; width 0: a
    square."""
    width = width or height
    cell = pool * patch
    for option, pixels in (('frame_height', height), ('frame_width', width)):
        if pixels < cell or pixels % cell:
            sys.exit(f'--{option}={pixels}: {name} with pool={pool} wants a multiple of {cell} '
                     'pixels')
    return height, width


def download_weights(name, repo):
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(repo, allow_patterns='model*.safetensors')     # may be several
    except Exception as e:      # no network, a licence to accept first, a full disk
        sys.exit(f'--encoder={name}: no model.safetensors from https://huggingface.co/{repo} '
                 f'({one_line(e)}); get it by hand and give --encoder_path=model.safetensors')


def load_vit(vit, name, path):
    tensors = read_tensors(path)
    # DINOv3 of satellite pictures has the same shapes: its files' names tell, or what only its
    # training used
    source = 'sat493m' if '_sat' in name else 'lvd1689m'
    said = re.findall('sat493m|lvd1689m', path)
    if name in ('dinov3_vitl16', 'dinov3_vitl16_cls') and 'local_cls_norm.weight' in tensors:
        said.append('sat493m')
    if vit.family == 'vjepa2':      # so has V-JEPA 2 of larger pictures
        source = '384' if name.endswith('_384') else '256'
        said = re.findall('(?:vitg|fpc64)-(256|384)', path)
    words = tensors.get('text_model.embeddings.token_embedding.weight')
    if vit.family == 'siglip2' and words is not None and len(words) != 256000:  # or the first one
        source, said = 'SigLIP 2', ['the first SigLIP']
    if said and said[-1] != source:
        sys.exit(f'{path}: weights of {said[-1]}, {name} has those of {source}: names of encoders '
                 'with _sat are of sat493m, with _384 of 384')
    missing = f'missing (there are {", ".join([*tensors][:3])}, ..)'
    state = official(tensors)
    tensors.clear()     # large ones are held once
    expected = vit.state_dict()
    if 'periods' in expected:
        # Meta's are rounded to bfloat16, which moves features by 4e-4: use what was trained with
        state.setdefault('periods', vit.periods)
    for key in expected | state:
        got = tuple(state[key].shape) if key in state else missing
        wants = tuple(expected[key].shape) if key in expected else 'no such weight'
        if got != wants:
            sys.exit(f'{path}: {key} is {got}, {name} wants {wants}')
        if not state[key].float().isfinite().all():
            sys.exit(f'{path}: {key} is not finite')
    vit.load_state_dict({key: state.pop(key).float() for key in list(state)}, assign=True)


@torch.no_grad()
def encode_frames(encoder, x, autocast):
    """Raw latents (.., N, D), float32 on the encoder's device, of uint8 frames x (.., 3, H, W), 64
    at a time."""
    device = next(iter(encoder.state_dict().values())).device
    z = []
    for frames in x.flatten(0, -4).split(64):
        with autocast:
            z.append(encoder(frames.to(device, non_blocking=True).float() / 255).float())
    return torch.cat(z).unflatten(0, x.shape[:-3])


# --------------------------------------------------------------------------------------------------
# The world model: a block-causal transformer over frames of latents (Dreamer 4, section 3.2). Most
# layers attend over space, all tokens of one frame; every fourth over time, one token position
# across the frames so far. Or they are flat, as in DINO-WM (arXiv:2411.04983): each attends over
# all tokens of the frames so far. (Its actions, beside the numbers of each token before a linear
# map, are action_on='all': that is the sum of two maps.) The model is asked for the clean latents
# of noised ones, f(z~, tau, d, a) -> z: all objectives train this function, and imagination,
# planning and decoding know no other.

SIZES = {  # width, layers, heads, kv_heads; parameters without the encoder, which stays frozen
    'nano': (128, 4, 4, 2),       # 0.7M, the demo on a laptop
    'tiny': (192, 8, 6, 2),       # 3M
    'small': (512, 12, 8, 2),     # 30M
    'base': (768, 20, 12, 4),     # 120M
    'large': (1280, 24, 20, 4),   # 400M
}

CONFIG_DEFAULTS = dict(     # what planning and decoding read of a run, where it has no such option
    encoder='pixels', encoder_path='', layer=-1, frame_height=0, frame_width=0, pool=1, frames=4,
    labelled='', unlabelled='', camera='', action='', fps=0.0, action_mode='absolute',
    rotation='euler', cache_gb=50.0, val_share=0.1, frameskip=2, eval_context=2, encoder_hash='',
    state='', state_names='', probe_names='', action_names='', action_keys='', cameras='', rates='',
    p_null=0.05)

TEXT_HIDDEN = 0.1       # share of the clips whose text is hidden in training

MODEL_DEFAULTS = dict(      # what a checkpoint gets that was made before there was such an entry
    registers=4,            # learned tokens of each frame that belong to no patch
    context=32,             # frames that a time layer sees, the current one included
    memory=0,               # beyond them it sees every so-manyth frame, 0 = none ...
    memory_frames=4,        # ... and so many of these at most
    attention='factored',   # layers of space and of time, or 'flat': all of both
    time_every=4,           # one layer of so many is a time layer, the second of each group
    wide_layers=0,          # layers of a head twice as wide (WideHead), 0 = one linear map
    k_max=64,               # finest sampling has k_max steps: d_min = 1 / k_max
    soft_cap=50.0,          # attention logits stay within +-soft_cap
    action_on='all',        # 'all': the action is added to the latent tokens too; 'token': no
    objective='shortcut',   # what the weights were trained for; sampling depends on it
    state_dim=0,            # numbers of the robot's state, the last token of a frame; 0 = no state
    policy=False,           # whether there is a Policy
    text=False,             # whether it is told what is done, in words
)


def model_config(size, dim, grid, action_dim, **overrides):
    """The dict of plain values that WorldModel is built from and that the checkpoint keeps. size
    names a row of SIZES; dim D is the encoder's width, grid (rows, columns) of its tokens,
    action_dim A. overrides replace any entry (0 means 'as in the preset', but for registers); an
    unknown one is an assertion."""
    c = dict(zip(('width', 'layers', 'heads', 'kv_heads'), SIZES[size])) | MODEL_DEFAULTS
    c |= dict(dim=dim, grid=list(grid), action_dim=action_dim)
    assert overrides.keys() <= c.keys(), f'no such entry: {overrides.keys() - c.keys()}'
    c |= {k: v for k, v in overrides.items() if v not in (0, '') or k == 'registers'}

    def check(name, fits, wants):
        if not fits:
            sys.exit(f'--{name}={c[name]}: wants {wants}')

    heads, k_max = c['heads'], c['k_max']
    least = 8 if c['attention'] == 'flat' else 4        # pairs for rows, columns and time
    check('width', c['width'] % (least * heads) == 0,
          f'a multiple of {least} x heads = {least * heads}')
    check('heads', heads % c['kv_heads'] == 0, f'a multiple of kv_heads = {c["kv_heads"]}')
    check('time_every', c['time_every'] >= 2, 'at least 2')
    check('layers', c['layers'] >= 2, 'at least 2, the second is the first time layer')
    check('k_max', k_max > 1 and k_max & (k_max - 1) == 0, 'a power of two, 2 at least')
    return c


def check_steps(K, k_max):
    if K < 1 or K & (K - 1) or K > k_max:
        sys.exit(f'--K={K}: wants a power of two up to {k_max}, the k_max of the model')


def set_guide(model, guide, text, trained):
    """Set model.guide, or end the script where the model has no text, or training hid nothing."""
    c = model.config
    model.guide = guide
    if text and not c['text']:
        sys.exit(f'--text={text}: wants a model that was trained with --text=True')
    hid = trained['p_null'] or trained['unlabelled'] if c['action_dim'] else c['text']
    if guide != 1 and not hid:
        sys.exit(f'--guide={guide:g}: wants a model that has been trained without what it follows '
                 'too: --text=True, or actions and --p_null above 0')


def frame_tokens(c):
    """{kind: how many} of the tokens of a frame, in their order. A new kind is a line here and in
    embed."""
    return dict(registers=c['registers'], latents=math.prod(c['grid']),
                state=int(c['state_dim'] > 0), shortcut=1, action=1)


def flops_per_frame(c, T):
    """Forward FLOPs of one frame in a clip of T, for model_config's c; training takes three times
    as many. A weight is 2 per token, S queries over L keys 4 S L C; what is masked, recomputed, or
    no matrix product is not counted, nor are the text and memory."""
    C = c['width']
    N = math.prod(c['grid'])
    S = sum(frame_tokens(c).values())

    def layer(C, S, L):
        weights = C * C * (2 + 2 * c['kv_heads'] / c['heads']) + 3 * C * hidden(C)
        return 2 * S * weights + 4 * S * L * C

    past = sum(min(t + 1, c['context']) for t in range(T)) / T * group_size(c)
    flops = 2 * N * C * c['dim'] + 2 * C * c['action_dim']
    for i in range(c['layers']):
        flops += layer(C, S, past if is_time(c, i) else S)
    if not c['wide_layers']:
        return flops + 2 * N * C * c['dim']
    wide = layer(2 * C, N, N) + 24 * N * C * C
    return flops + 8 * N * C * c['dim'] + c['wide_layers'] * wide


def hidden(width):
    return -(-width * 8 // 3 // 32) * 32    # 8/3 of it: gated, and costs as a plain MLP of 4x


def is_time(c, i):
    return c['attention'] == 'flat' or i % c['time_every'] == 1


def group_size(c):
    """Tokens of a frame that see those of other frames together: all, or each its own."""
    return sum(frame_tokens(c).values()) if c['attention'] == 'flat' else 1


def rms_norm(x):
    # without gains: the matrix that follows can hold them. In float32, whatever autocast says
    x = x.float()
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (x.shape[-1] ** 0.5 / (length + 1e-6))


def attend(q, k, v, cap, mask=None):
    """Soft-capped grouped-query attention: softmax(cap tanh(q k / (cap sqrt(d)))) v. q (B, heads,
    S, d), k and v (B, kv_heads, L, d); mask bool, broadcastable to (B, 1, S, L), True = seen. The
    reference for every other kernel. Queries that share a key head are stacked: keys are not
    repeated."""
    B, h, S, d = q.shape
    n = k.shape[1]
    q = (q * (d ** -0.5 / cap)).reshape(B, n, h // n * S, d)
    logits = cap * torch.tanh((q @ k.mT).float())        # (B, n, h/n S, L)
    if mask is not None:
        logits = logits.view(B, h, S, -1).masked_fill(~mask, -torch.inf).view_as(logits)
    return (logits.softmax(dim=-1).type_as(v) @ v).view(B, h, S, d)


def in_sight(t, then, context, memory):
    """Whether a frame at time t sees that of time `then`: one of the last `context`, or one of
    memory: (of every how many, of the last how many, when the first of all is)."""
    ago = t - then
    seen = (ago >= 0) & (ago < context)
    if not memory:
        return seen
    every, reach, first = memory
    return seen | (ago >= 0) & (ago < reach) & ((then - first) % every == 0)


def causal_window(t, context, alone, group=1, memory=None):
    """mask (1 or B, 1, S, S): what frames of times t (T,), of group tokens, see, as in_sight says;
    of those that are alone (B, T), only themselves."""
    t = t.repeat_interleave(group)
    mask = in_sight(t[:, None], t, context, memory)[None, None]
    if alone is None:
        return mask
    return mask & (~alone.repeat_interleave(group, dim=1)[:, None, None] | (t[:, None] == t))


def attend_flex(q, k, v, cap, context=0, alone=None, group=1, memory=None, t=None):
    """attend(q, k, v, cap, causal_window(t, ..)) in one kernel that never writes the logits;
    context 0: no mask."""
    def score(logit, b, head, i, j):
        logit = cap * torch.tanh(logit / cap)
        if not context:
            return logit
        i, j = i // group, j // group
        seen = in_sight(t[i], t[j], context, memory) if memory else in_sight(i, j, context, None)
        if alone is not None:
            seen = seen & (~alone[b, j] | (i == j))
        return torch.where(seen, logit, -torch.inf)
    # one kernel for all lengths: the one that flex takes for short ones stacks the heads of a group
    # until it spills
    return flex_attention(q, k, v, score_mod=score, enable_gqa=q.shape[1] > k.shape[1],
                          kernel_options=dict(FORCE_USE_FLEX_ATTENTION=True))


@functools.cache
def compiled_flex():
    torch._dynamo.config.recompile_limit = 64       # shapes; beyond it flex is silently very slow
    return torch.compile(attend_flex, dynamic=False)


def write_cache(cache, k, v, t):
    """Put k and v (B, kv_heads, T G, d), of frames at times t (T,), into cache: [keys, values] (B,
    kv_heads, L, G d) of the last L frames of G tokens, each frame at its time modulo L."""
    k, v = (x.reshape(*x.shape[:2], -1, cache[0].shape[3]) for x in (k, v))     # (.., T, G d)
    L = cache[0].shape[2]
    for i, new in enumerate((k, v)):
        if torch.is_grad_enabled() or cache[i].requires_grad:
            cache[i] = cache[i].clone()     # autograd keeps the past that the frames before saw
        cache[i].index_copy_(2, t[-L:] % L, new[:, :, -L:])


class Attention(nn.Module):
    def __init__(self, width, heads, kv_heads, cap, context, group=1, memory=None):
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = width // heads
        self.cap = cap
        self.context = context      # frames that one sees of the past and itself; 0: all see all
        self.group = group          # tokens of a frame
        self.memory = memory        # see in_sight
        self.kernel = 'auto'        # 'flex' on CUDA, 'plain' elsewhere
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.qk_gain = nn.Parameter(torch.ones(heads + kv_heads, 1))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x, rope, alone=None, cache=None, start=0, fill=False, t=None):
        """x (B, S, C); rope: cos and sin (S, 1, d/2); alone (B, T), t (T,): see causal_window.
        cache: see write_cache; one frame then sees the frames before it, several begin it. Keys
        carry their positions: the order of its slots is no matter. start as a tensor: the same in
        fixed shapes, as CUDA graphs and compiled layers want it. fill: only the cache is wanted,
        None comes back."""
        B, S, C = x.shape
        qk, v = self.qkv(x).view(B, S, -1, self.head_dim).split(
            (self.heads + self.kv_heads, self.kv_heads), dim=2)
        cos, sin = (y * self.qk_gain for y in rope)     # in the small tables the gain costs nothing
        qk = rotate(rms_norm(qk), cos, sin).type_as(v)        # (B, S, heads, d)
        q, k = qk.split((self.heads, self.kv_heads), dim=2)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))        # (B, heads, S, d)
        mask = None
        if cache is not None:
            write_cache(cache, k, v, t)
            if fill:
                return None
            if S > self.group:
                assert type(start) is int and start == 0, f'several frames cannot follow {start}'
            else:
                fixed = torch.is_tensor(start) or self.memory
                past = cache if fixed else [y[:, :, :start + 1] for y in cache]
                k, v = (y.unflatten(3, (self.group, -1)).flatten(2, 3) for y in past)
                if fixed:
                    slots = torch.arange(k.shape[2], device=x.device) // self.group
                    mask = slots <= start
                if self.memory:     # holds more than is seen
                    then = t - (t - slots) % cache[0].shape[2]
                    mask = in_sight(t, then, self.context, self.memory)
                    mask &= k[0, 0].any(dim=1)      # no key is 0, but in an empty slot
        fast = x.is_cuda and self.head_dim >= 16
        flex = S > self.group and (self.kernel == 'flex' or self.kernel == 'auto' and fast)
        if flex:
            kernel = attend_flex if torch.compiler.is_compiling() else compiled_flex()
            y = kernel(q, k, v, self.cap, self.context, alone, self.group, self.memory, t)
        else:
            if S > self.group and self.context:
                mask = causal_window(t, self.context, alone, self.group, self.memory)
            y = attend(q, k, v, self.cap, mask)
        return self.out(y.transpose(1, 2).reshape(B, S, C))


class Layer(nn.Module):
    """Attention over space (all tokens of a frame) or over time (a group of token positions), then
    an MLP."""
    def __init__(self, width, heads, kv_heads, cap, context=0, group=1, memory=None):
        super().__init__()
        self.time = context > 0
        self.group = group
        self.attn = Attention(width, heads, kv_heads, cap, context, group, memory)
        self.mlp = SwiGLU(width, hidden(width))

    def forward(self, x, rope, alone=None, cache=None, start=0, fill=False, t=None):
        y = rms_norm(x)         # (B, T, S, C)
        if self.time:
            y = y.unflatten(2, (-1, self.group)).transpose(1, 2)        # (B, S / G, T, G, C)
            shape = y.shape
            if alone is not None:
                alone = alone.view(len(x), 1, -1).expand(shape[:3]).flatten(0, 1)   # (B S / G, T)
            y = self.attn(y.flatten(2, 3).flatten(0, 1), rope, alone, cache, start, fill, t)
            if fill:
                return None
            y = y.view(shape).transpose(1, 2).flatten(2, 3)
        else:
            y = self.attn(y.flatten(0, 1), rope).view_as(x)
        x = x + y
        return x + self.mlp(rms_norm(x))


class WideHead(nn.Module):
    """The head of RAE (arXiv:2510.11690): a few layers twice as wide that see the noised latents of
    a frame again. Each token is conditioned on what the trunk says of it, by scales, shifts and
    gates that begin at 0 (adaLN-Zero)."""
    def __init__(self, c):
        super().__init__()
        C = c['width']
        n = c['wide_layers']
        heads = 2 * c['heads'], 2 * c['kv_heads']
        self.z_in = nn.Linear(c['dim'], 2 * C)
        self.out = nn.Linear(2 * C, c['dim'])
        self.layers = nn.ModuleList(Layer(2 * C, *heads, c['soft_cap']) for _ in range(n))
        self.modulate = nn.ModuleList(nn.Linear(C, 12 * C) for _ in range(n))

    def forward(self, x, z, rope):
        y = self.z_in(z).float()        # (B, T, N, 2 C)
        for layer, modulate in zip(self.layers, self.modulate):
            scale1, shift1, gate1, scale2, shift2, gate2 = modulate(F.silu(x)).chunk(6, dim=-1)
            u = rms_norm(y) * (1 + scale1) + shift1
            y = y + gate1 * layer.attn(u.flatten(0, 1), rope).view_as(y)
            y = y + gate2 * layer.mlp(rms_norm(y) * (1 + scale2) + shift2)
        with torch.autocast(z.device.type, enabled=False):
            return self.out(rms_norm(y))


class Policy(nn.Module):
    """What to do now, to be at a goal so many model steps later: with one step left the inverse
    dynamics, with a few a controller, with many a policy (hindsight goals, arXiv:1707.01495). A
    query attends to the tokens of now, beside those of the frame before and of the goal: a mean
    would lose what is small. c: WorldModel's config."""
    def __init__(self, c):
        super().__init__()
        C = c['width']
        self.z_in = nn.Linear(3 * c['dim'], C)
        self.s_in = nn.Linear(6 * c['state_dim'], C, bias=False) if c['state_dim'] else None
        self.left_in = nn.Linear(32, C)
        sizes = c['heads'], c['kv_heads'], c['soft_cap']
        self.layers = nn.ModuleList(Layer(C, *sizes) for _ in range(2))
        self.out = nn.Linear(C, c['action_dim'])

    def forward(self, before, now, goal, left, rope):
        """Latents (B, N, D), with a state (B, N + 1, D), of three frames, left (B,) steps, the
        positions of N + 1 tokens -> normalised actions (B, A)."""
        N = len(rope[0]) - 1
        z = torch.cat((before, now, goal), dim=-1)          # (B, N, 3 D)
        x = self.z_in(z[:, :N])
        freq = 50.0 ** (-torch.arange(16, device=z.device) / 15)
        angles = left[:, None] * freq
        query = self.left_in(torch.cat((angles.sin(), angles.cos()), dim=-1))       # (B, C)
        if self.s_in:
            S = self.s_in.in_features // 6
            s = torch.cat([frame[:, N, :S] for frame in (before, now, goal)], dim=-1)
            known = ~s.isnan()
            query = query + self.s_in(torch.cat((s.nan_to_num(), known), dim=-1))
        x = torch.cat((x, query[:, None]), dim=1)[:, None].float()      # (B, 1, N + 1, C)
        for layer in self.layers:
            x = layer(x, rope)
        with torch.autocast(z.device.type, enabled=False):
            return self.out(rms_norm(x[:, 0, -1]))


class WorldModel(nn.Module):
    """f(z~, tau, d, a) -> the clean latents (eq. 6). config: the dict of model_config. d is the
    step size that sampling takes from tau."""
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.guide = 1.0        # how much imagination follows actions and text, see forward
        self.remat = False      # training computes layers again instead of keeping their insides
        self.graphs = {}        # CUDA graphs of rollout
        C = c['width']
        self.z_in = nn.Linear(c['dim'], C)
        self.registers = nn.Parameter(torch.empty(c['registers'], C))
        self.tau_embed = nn.Embedding(c['k_max'], C // 2)                       # tau = i / k_max
        self.d_embed = nn.Embedding(int(math.log2(c['k_max'])) + 1, C // 2)     # d = 2^-i
        self.a_base = nn.Parameter(torch.empty(C))          # stands in where no action is known
        self.a_in = nn.Linear(c['action_dim'], C, bias=False) if c['action_dim'] else None
        self.s_in = self.s_out = None
        if c['state_dim']:
            self.s_in = nn.Linear(c['state_dim'], C)
            self.s_out = nn.Linear(C, c['state_dim'])
            self.s_base = nn.Parameter(torch.empty(C))      # stands in where no state is known
        sizes = C, c['heads'], c['kv_heads'], c['soft_cap']
        self.reach = c['memory'] * c['memory_frames']       # how far back memory goes; 0 = none
        self.first = int(c['objective'] == 'direct')        # which sees the first frame at time 1
        memory = (c['memory'], self.reach, self.first) if self.reach else None
        self.layers = nn.ModuleList()
        for i in range(c['layers']):
            context = c['context'] if is_time(c, i) else 0
            self.layers.append(Layer(*sizes, context, group_size(c), memory))
        self.head = WideHead(c) if c['wide_layers'] else nn.Linear(C, c['dim'])
        self.latents = slice(c['registers'], c['registers'] + math.prod(c['grid']))
        with torch.random.fork_rng(devices=[]):     # the others begin alike with and without it
            self.policy = Policy(c) if c['policy'] else None
        if c['text']:
            self.byte = nn.Embedding(256, C)
            self.readers = nn.ModuleList(Layer(*sizes, context=128) for _ in range(2))
            for layer in self.readers:
                layer.attn.kernel = 'plain'     # others are compiled anew for every length
        self.init_rope()
        self.init_weights()

    def init_rope(self):
        """Space: half of the pairs turn with the row, half with the column of a latent; other
        tokens stand still. Time: all pairs turn with the frame's number. Flat: every other pair as
        in space, the rest as in time."""
        c = self.config
        half = c['width'] // c['heads'] // 2
        freq = 100.0 ** (-torch.arange(half // 2) / (half // 2))
        place = torch.cartesian_prod(*map(torch.arange, c['grid'])).float()        # (N, 2)
        angles = torch.zeros(sum(frame_tokens(c).values()), half)
        angles[self.latents] = (place[:, :, None] * freq).flatten(1)
        self.register_buffer('space_cos', angles.cos()[:, None], persistent=False)
        self.register_buffer('space_sin', angles.sin()[:, None], persistent=False)
        self.register_buffer('time_freq', 10000.0 ** (-torch.arange(half) / half), persistent=False)

    def init_weights(self):
        """Unit-variance tokens; residual branches shrunk so that depth does not matter; output
        0."""
        learned = [self.registers, self.a_base, self.tau_embed.weight, self.d_embed.weight]
        if self.s_in:
            learned.append(self.s_base)
        for p in learned:
            nn.init.normal_(p, std=0.5)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=m.in_features ** -0.5)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        for m in self.modules():
            if isinstance(m, Layer):
                for branch in (m.attn.out, m.mlp.down):
                    branch.weight.data /= math.sqrt(2 * self.config['layers'])
        for m in self.last:
            nn.init.zeros_(m.weight)
        if self.config['wide_layers']:
            for m in self.head.modulate:
                nn.init.zeros_(m.weight)

    @property
    def last(self):
        """The linear maps that make latents, the state and the policy's actions."""
        head = self.head.out if self.config['wide_layers'] else self.head
        maps = [head, self.s_out, self.policy and self.policy.out]
        return [m for m in maps if m]

    def read(self, text):
        """One vector (B, C) of each text: UTF-8 and zeros after it, (B, L) uint8. A byte sees those
        before it, their mean counts: zeros change nothing, and no words, or hidden ones, are 0."""
        t = torch.arange(text.shape[1], device=text.device)
        x = self.byte(text.int())[:, :, None]           # (B, L, 1, C)
        for layer in self.readers:
            x = layer(x, self.turns(t), t=t)
        x = x[:, :, 0].masked_fill(text[:, :, None] == 0, 0.0)
        return rms_norm(x.sum(dim=1))

    def times(self, T, start, memories):
        """Of frames (T,): of memories, which end before 0, then one by one from start on."""
        t = torch.arange(T, device=self.time_freq.device) + start - memories
        if not memories:
            return t
        return torch.where(t < 0, t * self.config['memory'] + self.first, t)

    def turns(self, t, space=None):
        """What a layer of time turns tokens by at times t (T,); a flat one, half of the pairs by
        that and half by the place in space."""
        angles = (t[:, None] * self.time_freq)[:, None]     # (T, 1, d/2)
        time = angles.cos(), angles.sin()
        if not space or self.config['attention'] != 'flat':
            return time
        odd = torch.arange(len(self.time_freq), device=t.device) % 2 > 0
        return [torch.where(odd, t[:, None], s).flatten(0, 1) for t, s in zip(time, space)]

    def embed(self, z, tau, d, a, a_mask, text, guided):
        """The tokens of frames (B, T, S, C), float32: [registers | latents | state | shortcut |
        action], as frame_tokens counts them. guided: every other clip is without action and text.
        """
        c = self.config
        B, T = z.shape[:2]
        tau_i = (tau * c['k_max']).round().long().clamp(max=c['k_max'] - 1)     # 1: the cleanest
        d_i = (-torch.log2(d)).round().long()
        shortcut = torch.cat((self.tau_embed(tau_i), self.d_embed(d_i)), dim=-1)      # (B, T, C)
        action = self.a_base.expand(B, T, -1)
        if c['action_dim']:
            action = action + self.a_in(torch.where(a_mask[..., None], a, 0.0))
        if c['text']:
            action = action + self.read(text).repeat_interleave(B // len(text), dim=0)[:, None]
        if guided:
            action[1::2] = self.a_base
        N = math.prod(c['grid'])
        latents = self.z_in(z[:, :, :N])        # (B, T, N, C)
        if c['state_dim']:
            s = z[:, :, N:, :c['state_dim']]
            known = ~s.isnan()
            state = self.s_in(torch.where(known, s, 0.0))         # (B, T, 1, C)
            state = torch.where(known.any(dim=-1, keepdim=True), state, self.s_base)
            latents = torch.cat((latents, state), dim=2)        # (B, T, N + 1, C)
        if c['action_on'] == 'all':     # an action token alone takes ~10x longer to be used
            latents = latents + action[:, :, None]
        registers = self.registers.expand(B, T, -1, -1)
        tokens = registers, latents, shortcut[:, :, None], action[:, :, None]
        return torch.cat(tokens, dim=2).float()

    def forward(self, z, tau, d, a, a_mask, alone=None, text=None, cache=None, start=0,
                commit=False, memories=0):
        """z (B, T, N, D) noised latents, tau and d (B, T), a (B, T, A), a_mask (B, T) bool -> z_hat
        (B, T, N, D), with a state as add_state makes it (B, T, N + 1, D). alone (B,) bool: clips
        whose frames do not see each other (images); (B, T): frames that no other sees. text (B, L):
        see read; candidates may share it. memories: so many of the first frames are of memory.
        cache: what new_cache makes, start: index of the first frame, commit=True only fills it.
        There guide w makes z + w (z_c - z), z of no conditions and own rows (arXiv:2207.12598)."""
        c = self.config
        guided = cache is not None and self.guide != 1
        if guided:
            z, tau, d, a, a_mask = (x.repeat_interleave(2, dim=0) for x in (z, tau, d, a, a_mask))
        B, T = z.shape[:2]
        N = math.prod(c['grid'])
        fits = z.shape[2:] == (N + frame_tokens(c)['state'], c['dim'])
        fits = fits and a.shape == (B, T, c['action_dim'])
        assert fits, f'latents {tuple(z.shape)} and actions {tuple(a.shape)} do not fit {c}'
        x = self.embed(z, tau, d, a, a_mask, text, guided)
        space = self.space_cos, self.space_sin
        t = self.times(T, start, memories)
        time = self.turns(t, space)
        again = self.remat and torch.is_grad_enabled() and cache is None    # it would have moved on

        def run(layer, *inputs):
            if again:           # nothing in a layer is random
                return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            return layer(*inputs)

        pasts = list(cache or [])
        for layer in self.layers:
            if layer.time:
                past = pasts.pop(0) if pasts else None
                fill = commit and not pasts         # nothing above can reach a later frame
                x = run(layer, x, time, alone, past, start, fill, t)
                if fill:
                    return None
            else:
                x = run(layer, x, space)
        state = x[:, :, self.latents.stop:self.latents.stop + 1]
        x = x[:, :, self.latents]
        if c['wide_layers']:
            z_hat = run(self.head, x, z[:, :, :N], [y[self.latents] for y in space])
        with torch.autocast(z.device.type, enabled=False):
            if not c['wide_layers']:
                z_hat = self.head(rms_norm(x))
            if c['state_dim']:
                z_hat = add_state(z_hat, self.s_out(rms_norm(state)).squeeze(2))
        if guided:
            return z_hat[1::2].lerp(z_hat[::2], self.guide)
        return z_hat

    def act(self, before, now, goal, left):
        """The policy's actions (B, A), see Policy. Numbers of the state that are not known now do
        not count in the goal, and unknown ones of the frame before are now's."""
        before = torch.where(before.isnan(), now, before)
        goal = torch.where(now.isnan(), torch.nan, goal)
        # the token after the latents stands still, as the query does
        places = slice(self.latents.start, self.latents.stop + 1)
        rope = self.space_cos[places], self.space_sin[places]
        return self.policy(before, now, goal, left, rope)

    def new_cache(self, B, T, dtype=torch.float32):
        """An empty cache for B clips of T frames: of every time layer [keys, values] of the last
        `context` frames, see write_cache, or of all that memory reaches to."""
        c = self.config
        L = self.reach or min(T, c['context'])
        group = group_size(c)
        rows = B * len(self.space_cos) // group
        if self.guide != 1:
            rows = 2 * rows
        shape = 2, rows, c['kv_heads'], L, group * c['width'] // c['heads']
        return [[*torch.zeros(shape, dtype=dtype, device=self.a_base.device)]
                for layer in self.layers if layer.time]


def add_state(z, s):
    """Latents (.., N, D) and the state of their frames (.., S), normalised, NaN where it is not
    known -> (.., N + 1, D): the state is the last token, padded with zeros."""
    padding = 0, z.shape[-1] - s.shape[-1]
    token = F.pad(s, padding)[..., None, :]         # (.., 1, D)
    return torch.cat((z, token), dim=-2)


def compile_layers(model):
    """torch.compile, layer by layer: quick to compile, and all layers of a kind share the code."""
    torch._dynamo.config.recompile_limit = 64      # students, teachers, long and short clips
    layers = [*model.layers]
    if model.config['wide_layers']:
        layers.append(model.head)
    if model.policy:
        layers += model.policy.layers
    for layer in layers:
        layer.compile(dynamic=False, fullgraph=True)


def half_weights(model, dtype):
    """The model, its linear maps but the last in dtype: what autocast would make of them in every
    pass anew."""
    model.graphs.clear()        # they read the old weights
    for m in model.modules():
        if isinstance(m, nn.Linear) and m not in model.last:
            m.to(dtype)
    return model


# --------------------------------------------------------------------------------------------------
# The objective. shortcut_loss draws noise and levels for a batch of clips, asks the model for the
# clean latents, and weighs its errors. An objective is a function like forcing_task below, that
# says what the model sees, what it should answer and how much each frame counts, behind one `if` in
# shortcut_loss; its name is in data.py's CHOICES. What it trains is sampled by denoise_frame,
# unless rollout has an `if` of its own.

OBJECTIVE = dict(               # options of shortcut_loss: train.py has constants of the same names
    # shortcut: eq. 7 of arXiv:2509.24527 in x-space, some clips with d > d_min, the others with
    # d_min; diffusion: d_min alone; direct: one deterministic step from the clean past
    objective='shortcut',
    k_max=0,                    # d_min = 1 / k_max; 0 = the model's
    bootstrap=0.25,             # share of clips that learn large steps from small ones
    tau_schedule='shift',       # see signal_levels
    tau_shift=0.0,              # 0 = sqrt(N D / 4096)
    p_past=0.7,                 # share of clips whose frames before a random one have tau >= 7/8
    p_image=0.3,                # share of clips whose frames are seen as separate images
    p_null=0.1,                 # share of clips whose actions are hidden, and as many the state of
    ramp=True,                  # weights of eq. 8
    space='x',                  # v: the error of velocities, which is divided by (1 - tau)^2
    state_dim=0,                # numbers of the state, in the last token of a frame
    memories=0,                 # see WorldModel.forward; they count in no term
)


def clip_noise(z, seeds=None):
    """The random numbers of clips z (B, T, N, D), by name: uniform ones, and eps like z, normal.
    seeds: a whole number per clip, of which its numbers are then a function, however clips are
    batched; None: torch's own. What is drawn first stays the same only where a new number is drawn
    last."""
    B, T = z.shape[:2]
    sizes = dict(
        null=1,         # are actions, or is the state hidden
        image=1,        # are frames separate images
        now=1,          # the first frame that is not of the past
        past=1,         # is the past nearly clean
        tau=T,          # levels
        d=T,            # step sizes
        past_tau=T,     # levels of the past
    )
    u = torch.empty(B, sum(sizes.values()), device=z.device)
    eps = torch.empty_like(z)
    if seeds is None:
        u.uniform_()
        eps.normal_()
    else:
        generator = torch.Generator(z.device)
        for i, seed in enumerate(seeds):
            generator.manual_seed(seed)
            u[i].uniform_(generator=generator)
            eps[i].normal_(generator=generator)
    uniform = u.split(list(sizes.values()), dim=1)
    return SimpleNamespace(eps=eps, **dict(zip(sizes, uniform)))


def signal_levels(u, schedule, shift):
    """Levels in [0, 1] of uniform numbers u. 'uniform': u. 'shift': tau / (1 - tau) = u / (1 - u) /
    shift, which for shift > 1 moves them towards noise (arXiv:2403.03206; arXiv:2510.11690 takes
    sqrt(tokens x channels / 4096)). 'logit-normal': logit(tau) is normal with mean -log(shift) and
    deviation 1."""
    if schedule == 'uniform':
        return u
    if schedule == 'shift':
        x = torch.logit(u)
    else:
        x = math.sqrt(2) * torch.erfinv(2 * u - 1)
    return torch.sigmoid(x - math.log(shift))


def which_rows(z_mask, objective, bootstrap, first=0, memories=0):
    """boot (B,) bool: the clips that learn large steps; how many they are, on the host; and the
    frames (B, T) that count in each term of the loss, {'flow': .., 'bootstrap': ..}. Of all clips,
    counted from `first`, the share is exact."""
    B, T = z_mask.shape
    share = round(1000 * bootstrap) if objective == 'shortcut' else 0
    i = first + torch.arange(B, device=z_mask.device)
    boot = (i + 1) * share // 1000 > i * share // 1000
    n = (first + B) * share // 1000 - first * share // 1000
    if objective == 'direct':       # nothing comes before the first frame
        memories += 1
    z_mask = z_mask & (torch.arange(T, device=z_mask.device) >= memories)
    return boot, n, {'flow': z_mask & ~boot[:, None], 'bootstrap': z_mask & boot[:, None]}


def noised_clips(z, boot, noise, o):
    """z_tau (eq. 6), tau and d (B, T) of clips z, on the grid of d."""
    B, T, N, D = z.shape
    first = 1 + o.memories
    now = first + (noise.now * (T - first)).floor()
    past = (noise.past < o.p_past) & (torch.arange(T, device=z.device) < now)       # (B, T)
    e = 1 + (noise.d * int(math.log2(o.k_max))).floor()     # d = 2^e d_min <= 1
    e = torch.where(past, 1, e)
    d = 2.0 ** torch.where(boot[:, None], e, 0) / o.k_max
    if o.state_dim:     # which is no latent
        N -= 1
    tau = signal_levels(noise.tau, o.tau_schedule, o.tau_shift or math.sqrt(N * D / 4096))
    tau = torch.where(past, 1 - noise.past_tau / 8, tau)
    tau = torch.minimum((tau / d).floor() * d, 1 - d)
    level = tau[..., None, None]
    return (1 - level) * noise.eps + level * z, tau, d


def velocity(model, z_tau, tau, d, *conditions):
    return (model(z_tau, tau, d, *conditions) - z_tau) / (1 - tau[..., None, None])


@torch.no_grad()
def bootstrap_target(model, z_tau, tau, d, *conditions):
    """The clean latents that one step d should find: two half steps of the same model lead there.
    (1-tau)^2 |(z_hat - z_tau)/(1-tau) - v|^2 = |z_hat - (z_tau + (1-tau) v)|^2: no division by
    1-tau."""
    half = d / 2
    first = velocity(model, z_tau, tau, half, *conditions)
    middle = z_tau + first * half[..., None, None]
    second = velocity(model, middle, tau + half, half, *conditions)
    return z_tau + (1 - tau[..., None, None]) * (first + second) / 2


def forcing_task(model, z, a, a_mask, z_mask, text, rows, noise, o):
    """Shortcut forcing, and diffusion forcing where no clip is of `rows`, which_rows' first two:
    the inputs of the model, its target (B, T, N, D) and the weight of every frame (B, T)."""
    boot, n = rows
    alone = noise.image[:, 0] < o.p_image
    a_mask = a_mask & ~alone[:, None]
    if o.memories:
        alone = alone[:, None] | ~z_mask
    inputs = *noised_clips(z, boot, noise, o), a, a_mask, alone, text
    target = z
    if n:
        # nonzero() would wait for the device
        which = torch.argsort(boot.byte(), descending=True, stable=True)[:n]
        learned = bootstrap_target(model, *(x[which] for x in inputs))
        target = z.index_copy(0, which, learned.type_as(z))
    tau = inputs[1]
    weight = 0.9 * tau + 0.1 if o.ramp else torch.ones_like(tau)        # eq. 8
    if o.space == 'v':
        weight = weight / (1 - tau) ** 2
    return inputs, target, weight


def direct_task(z, a, a_mask, z_mask, text, o):
    """One deterministic step, z_hat[t] = f(z[t-1], a[t]): as forcing_task."""
    alone = ~z_mask if o.memories else None
    inputs = *previous_frames(z, o.memories), a, a_mask, alone, text
    return inputs, z, torch.ones_like(inputs[1])


def frame_errors(z_hat, z, state_dim=0):
    """Mean squared errors (B, T) of frames (B, T, N, D): of the latents and, added to it, of as
    many numbers of the state as are known."""
    if not state_dim:
        return (z_hat - z).square().mean(dim=(2, 3))
    error = (z_hat - z)[:, :, :-1].square().mean(dim=(2, 3))
    off = (z_hat - z)[:, :, -1, :state_dim]         # (B, T, S)
    known = ~off.isnan()        # a rollout from a state that is not known has none
    off = torch.where(known, off, 0.0)
    return error + off.square().sum(dim=2) / known.sum(dim=2).clamp(min=1)


def previous_frames(z, memories=0):
    """What 'direct' sees, z, tau, d: frame t-1 in the place of frame t, but memories as they are.
    Clean everywhere but before the first frame, always one step."""
    tau = torch.ones(z.shape[:2], device=z.device)
    tau[:, memories] = 0
    old, z = z.tensor_split([memories], dim=1)
    before = F.pad(z, (0, 0, 0, 0, 1, -1))
    z = torch.cat((old, before), dim=1)
    return z, tau, torch.ones_like(tau)


def shortcut_loss(model, z, a, a_mask, z_mask, options={}, rms=None, first=0, noise=None,
                  count=None, clip_weight=1.0, text=None):
    """Loss and metrics of a batch of clips: z (B, T, N, D) clean normalised latents, a (B, T, A),
    a_mask and z_mask (B, T) bool (action known, frame real). Metrics are 0-d tensors on the device,
    so that nobody waits for them; nan where no frame counts. A new one is a line in them: train.py
    sums and logs them as they are.

    options: of OBJECTIVE, what differs. rms {'flow', 'bootstrap'}: running mean squares of the
    terms. first: number of the first clip, see which_rows. noise: of clip_noise. count {'flow',
    'bootstrap'}: what sums over frames are divided by, None = the frames that count. clip_weight
    (B, 1): what a frame of a clip counts. text (B, L): see WorldModel.read."""
    o = SimpleNamespace(**(OBJECTIVE | options))
    assert vars(o).keys() == OBJECTIVE.keys(), f'not all are options: {options}'
    o.k_max = o.k_max or model.config['k_max']
    noise = noise or clip_noise(z)
    if o.memories:
        model = functools.partial(model, memories=o.memories)
    *rows, counted = which_rows(z_mask, o.objective, o.bootstrap, first, o.memories)
    counted = {name: mask * clip_weight for name, mask in counted.items()}
    count = count or {name: mask.sum() for name, mask in counted.items()}
    if text is None:
        text = a_mask & False
    # of the clips without actions half keep theirs, for imagination from text alone
    off = 2 * noise.null - o.p_null - TEXT_HIDDEN
    text = text.masked_fill(off.abs() < TEXT_HIDDEN, 0)
    a_mask = a_mask & (noise.null >= o.p_null)
    if o.state_dim:
        hidden = (noise.null >= o.p_null) & (noise.null < 2 * o.p_null)         # (B, 1)
        s = z[:, :, -1, :o.state_dim].masked_fill(hidden[:, :, None], torch.nan)
        z = add_state(z[:, :, :-1], s)
    if o.objective == 'direct':
        inputs, target, weight = direct_task(z, a, a_mask, z_mask, text, o)
    else:
        inputs, target, weight = forcing_task(model, z, a, a_mask, z_mask, text, rows, noise, o)
    error = frame_errors(model(*inputs), target, o.state_dim) * weight     # (B, T)

    terms = {}
    metrics = {}
    for name, mask in counted.items():
        total = (error * mask).sum()
        terms[name] = total / count[name].clamp(min=1e-6)
        metrics[name] = total.detach() / count[name]
    metrics['tau'] = (inputs[1] * counted['flow']).sum() / count['flow']
    if rms is None:
        return sum(terms.values()), metrics
    # Divided by its own RMS alone, a bootstrap term that falls gains weight without end, and
    # weights that merely agree with themselves make it fall to 0: training then leaves the data
    # (seen). So it never weighs more than the flow.
    bootstrap = terms['bootstrap'] / term_scale(rms, 'flow', 'bootstrap')
    return terms['flow'] / term_scale(rms, 'flow') + bootstrap, metrics


def term_scale(rms, *names):
    """What a term of the loss is divided by: the largest root of the running mean squares of those
    names."""
    return torch.stack([rms[name] for name in names]).amax().clamp(min=1e-12).sqrt()


def policy_errors(model, z, a, z_mask, z_goal, left, state_dim=0, first=0):
    """Squared errors (B, T - 1) of the policy's actions at all frames of clips but the last. Clips
    are shortcut_loss's; z_goal (B, N, D): a later frame of the same episode, left (B,) model steps
    after the clip's first. Every other frame has that goal, one in four the clip's last real frame,
    one in four the next frame. Before the first frame was the same, as far as anyone knows. first:
    number of the first clip."""
    B, T = z_mask.shape
    row = first + torch.arange(B, device=z.device)
    t = torch.arange(T - 1, device=z.device)
    kind = ((t + row[:, None]) % 4)[:, :, None, None]           # (B, T - 1, 1, 1)
    last = z_mask.sum(dim=1) - 1
    z_last = z[torch.arange(B, device=z.device), last]
    goal = torch.where(kind == 1, z_last[:, None], z[:, 1:])
    goal = torch.where(kind % 2 == 0, z_goal[:, None], goal)
    kind = kind[:, :, 0, 0]
    steps = torch.where(kind == 1, last[:, None] - t, 1)
    steps = torch.where(kind % 2 == 0, left[:, None] - t, steps)
    z, goal = hide_states(z, goal, row, state_dim)
    before = torch.cat((z[:, :1], z[:, :-2]), dim=1)
    frames = before, z[:, :-1], goal, steps.clamp(min=1)
    got = model.act(*(x.flatten(0, 1) for x in frames)).view(B, T - 1, -1)
    return (got - a[:, 1:]).square().mean(dim=-1)       # a[t + 1] leads from frame t to the next


def hide_states(z, goal, row, state_dim):
    """Frames and goals (B, T, N + 1, D) of clips of these numbers (B,): in a quarter of the clips
    no state is known, in another that of the goal is not."""
    if not state_dim:
        return z, goal
    known = (row // 2 % 4)[:, None, None]
    s = z[:, :, -1, :state_dim].masked_fill(known == 0, torch.nan)
    s_goal = goal[:, :, -1, :state_dim].masked_fill(known < 2, torch.nan)
    return add_state(z[:, :, :-1], s), add_state(goal[:, :, :-1], s_goal)


def dream_errors(model, act, z, a, a_mask, z_mask, context, steps, weight, first=0, seed=0):
    """How far from its goal a policy is when it should be there and later, as a frozen model
    imagines it (B,). Gradients flow through the imagination to what act(before, now, goal, left)
    depends on (as in Dreamer, arXiv:1912.01603). Clips are shortcut_loss's: a policy goes on from
    their first `context` frames for so many steps, towards one of the frames that followed in the
    data; a clip that is over by then says nothing. weight: of distance(). first: number of the
    first clip."""
    B, T = z_mask.shape
    row = first + torch.arange(B, device=z.device)
    when = torch.minimum(context + row % min(T - context, steps), z_mask.sum(dim=1) - 1)
    left = (when - context + 1).clamp(min=1)            # from the last frame of the context
    goal = z[torch.arange(B, device=z.device), when][:, None]
    z, goal = hide_states(z[:, :context], goal, row, model.config['state_dim'])
    goal = torch.where(z[:, -1:].isnan(), torch.nan, goal)          # nor is what follows known

    def follow(before, now, h):
        return act(before, now, goal[:, 0], (left - h).clamp(min=1))

    a = F.pad(a[:, :context], (0, 0, 0, steps))         # what the policy does comes in their place
    known = F.pad(a_mask[:, :context], (0, steps), value=True)
    imagined = rollout(model, z, a, known, 1, seed=seed, grad='all', act=follow)
    due = torch.arange(1, steps + 1, device=z.device) >= left[:, None]          # (B, steps)
    return (distance(imagined, goal, weight) * due).sum(dim=1) / due.sum(dim=1)


# --------------------------------------------------------------------------------------------------
# Imagination. rollout makes frame after frame: each begins as noise and is denoised in K steps
# against the cached keys and values of the past, then it is committed: noised a little, as training
# has shown the past, and written into the cache. Cost per frame is constant. Candidates of a
# planner share one context, which remember() computes once.

def context_levels(c, tau_ctx):
    """The noise level at which the past is seen, and its step size label: both on the grid of
    k_max."""
    k = min(round(tau_ctx * c['k_max']), c['k_max'] - 1)        # tau = 1 has never been trained
    return k / c['k_max'], 1 / c['k_max']


@torch.no_grad()
def remember(model, z_ctx, a, a_mask, T, tau_ctx=0.9, seed=0, text=None, gone=()):
    """The cache after the context z_ctx (B, Tc, N, D), a and a_mask (B, Tc, ..), for clips of T
    frames in all. rollout(.., cache=) takes it for any number of candidates, and leaves it as it
    is. gone: frames (B, N, D) before the context, the latest last: some are remembered."""
    device = z_ctx.device
    every = model.config['memory'] or 1
    out_of_sight = max(0, model.reach - z_ctx.shape[1]) + 1     # after the context
    old = gone[-every:-out_of_sight:-every][::-1]
    z_ctx = torch.cat((*(z[:, None] for z in old), z_ctx), dim=1)
    a = F.pad(a, (0, 0, len(old), 0))
    a_mask = F.pad(a_mask, (len(old), 0))
    if model.config['objective'] == 'direct':
        seen = previous_frames(z_ctx, len(old))
    else:
        level, d = context_levels(model.config, tau_ctx)
        # not the noise of the future
        generator = torch.Generator(device).manual_seed(hash((seed, 1)) % 2 ** 32)
        eps = torch.randn(z_ctx.shape, generator=generator, device=device)
        tau = torch.full(z_ctx.shape[:2], level, device=device)
        seen = level * z_ctx + (1 - level) * eps, tau, torch.full_like(tau, d)
    dtype = z_ctx.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    cache = model.new_cache(len(z_ctx), T, dtype)
    model(*seen, a, a_mask, text=text, cache=cache, commit=True, memories=len(old))
    return cache


def cache_of_candidates(cache, B, M):
    """A copy, with the rows of each of B contexts once for each of its M candidates."""
    def copy(x):
        return x.unflatten(0, (B, -1)).repeat_interleave(M, dim=0).flatten(0, 1)

    return [[copy(keys), copy(values)] for keys, values in cache]


def denoise_frame(model, s, cache, z, noise, a, a_mask, text, t, last):
    """Frame t (B M, 1, N, D) from noise[0] in K Euler steps z <- z + d (z_hat - z) / (1 - tau): the
    last one returns z_hat. Unless it is the last frame it is committed, noised by noise[1]."""
    def level(x):
        return torch.full(z.shape[:2], x, device=z.device)

    z, eps = noise
    for k in range(s.K):
        with torch.set_grad_enabled(s.grad == 'all' or s.grad and k == s.K - 1):
            z_hat = model(z, level(k / s.K), level(s.d), a, a_mask, text=text, cache=cache, start=t)
            z = z + (z_hat - z) / (s.K - k)             # d / (1 - tau) = 1 / (K - k)
    if not last:
        past = s.tau_ctx * z + (1 - s.tau_ctx) * eps
        model(past, level(s.tau_ctx), level(s.d_ctx), a, a_mask, text=text, cache=cache, start=t,
              commit=True)
    return z


def predict_frame(model, s, cache, z, noise, a, a_mask, text, t, last):
    """Frame t by 'direct': one pass over the frame before it, which that pass commits."""
    z = z if s.grad == 'all' else z.detach()
    one = torch.ones(z.shape[:2], device=z.device)
    with torch.set_grad_enabled(bool(s.grad)):
        z_hat = model(z, one, one, a, a_mask, text=text, cache=cache, start=t).type_as(z)
        z_hat = torch.where(z.isnan(), z, z_hat)
    if s.grad is True and not last:         # once more, as gradients must not flow through the past
        model(z, one, one, a, a_mask, text=text, cache=cache, start=t, commit=True)
    return z_hat


@torch.no_grad()
def rollout(model, z_ctx, a, a_mask, K=4, tau_ctx=0.9, seed=0, grad=False, graph=None, cache=None,
            act=None, text=None, gone=()):
    """Imagines the frames after z_ctx (B, Tc, N, D), one after the other, each in K steps -> (B M,
    T - Tc, N, D). a (B M, T, A) and a_mask (B M, T) cover context and future. With M > 1 each
    context has M candidates in a row, which share its actions, computation and noise, which depends
    on seed, context and frame alone. The past is seen at noise level tau_ctx, and labelled so.

    grad: True: gradients flow through the last step of each frame, and through nothing else
    (self-forcing); 'all': through everything, back to the actions. cache: what remember() made of
    this context. graph: a frame is one CUDA graph; None: where it can be. act(frame before, of now
    (B M, N, D), h) -> (B M, A), h = 0, 1, .., chooses the future's actions. text (B or 1, L), gone:
    see remember."""
    c = model.config
    B, Tc, N, D = z_ctx.shape
    M, T = len(a) // B, a.shape[1]
    device = z_ctx.device
    check_steps(K, c['k_max'])
    assert len(a) == B * M and 1 <= Tc < T, f'context {z_ctx.shape} and actions {a.shape} disagree'
    level, d_ctx = context_levels(c, tau_ctx)
    d = 1 / K if c['objective'] == 'shortcut' else d_ctx
    s = SimpleNamespace(K=K, grad=grad, tau_ctx=level, d_ctx=d_ctx, d=d)
    frame = predict_frame if c['objective'] == 'direct' else denoise_frame
    if text is None:
        text = a_mask[:1, :1] & False
    a_ctx, known = a[::M, :Tc], a_mask[::M, :Tc]
    cache = cache or remember(model, z_ctx, a_ctx, known, T, tau_ctx, seed, text, gone)
    cache = cache_of_candidates(cache, B, M)
    graph = not grad and (device.type == 'cuda' if graph is None else graph)
    if graph:
        key = K, model.guide, s.tau_ctx, text.shape, cache[0][0].shape, cache[0][0].dtype
        cache = cache_of_graphs(model.graphs, key, cache)
    generator = torch.Generator(device).manual_seed(seed)
    before = z_ctx[:, -2:][:, :1].repeat_interleave(M, dim=0)
    z = z_ctx[:, -1:].repeat_interleave(M, dim=0)
    out = []
    for t in range(Tc, T):
        noise = torch.randn(2, B, 1, N, D, generator=generator, device=device)
        noise = torch.where(z.isnan(), z, noise.repeat_interleave(M, dim=1))    # stays unknown
        now = torch.full((), t, device=device) if graph or grad is True else t      # fixed shapes
        imagine = functools.partial(frame, model, s, cache, last=t == T - 1)
        with torch.set_grad_enabled(grad == 'all'):
            a_now = act(before[:, 0], z[:, 0], t - Tc)[:, None] if act else a[:, t:t + 1]
            before = z
            inputs = z, noise, a_now, a_mask[:, t:t + 1], text, now
            if graph:
                imagine = functools.partial(replay, model.graphs, (*key, t == T - 1), imagine)
            z = imagine(*inputs)
        out.append(z)
    with torch.set_grad_enabled(bool(grad)):
        return torch.cat(out, dim=1)


def cache_of_graphs(graphs, key, cache):
    """The cache that the graphs of this key read and write, with the values of this one."""
    static = graphs.setdefault(key, cache)
    for old, new in zip(static, cache):
        for x, y in zip(old, new):
            x.copy_(y)
    return static


def replay(graphs, key, f, *inputs):
    """f(*inputs) as the CUDA graph graphs[key], which is captured at the first call and goes on
    with the tensors of that call, its cache included. Kept in model.graphs for later calls of the
    same shapes."""
    if key not in graphs:
        graphs[key] = capture(graphs, f, [x.clone() for x in inputs])
    graph, buffers, out = graphs[key]
    for x, new in zip(buffers, inputs):
        x.copy_(new)
    graph.replay()
    return out.clone()


def capture(graphs, f, buffers):
    side = torch.cuda.Stream()
    # autocast would keep its copies of the weights only until its context ends, but the graph reads
    # them on
    with torch.autocast('cuda', torch.get_autocast_dtype('cuda'),
                        torch.is_autocast_enabled('cuda'), cache_enabled=False):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            f(*buffers)         # compiles, and lets libraries find their memory
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # the graphs run one after the other, and can share their memory
        pool = graphs.setdefault('pool', torch.cuda.graph_pool_handle())
        # a loader's thread may pin memory meanwhile
        with torch.cuda.graph(graph, pool, capture_error_mode='thread_local'):
            out = f(*buffers)
    return graph, buffers, out


# --------------------------------------------------------------------------------------------------
# The probe: numbers of the dataset (where the hand is, how the block lies), read from the latents
# of a frame, so that errors of imagination have units. The world model never sees it.

class Probe(nn.Module):
    """P numbers, as the dataset has them, of frames of latents (.., N, D): learned queries attend
    to the tokens, which know their places, and a layer tells what they found (attentive probing, as
    in V-JEPA, arXiv:2404.08471). mean, std (P,) of the numbers; turn (P,): 2 pi or 360 where a
    number is an angle that may go round, which is learned as sine and cosine, else 0. linear: what
    they found is told as it is, so that the latents themselves have to hold the numbers."""
    def __init__(self, N, D, mean, std, turn, width=64, queries=8, linear=False):
        super().__init__()
        self.linear = linear
        for name, value in ('mean', mean), ('std', std), ('turn', turn):
            self.register_buffer(name, value)
        self.token = nn.Linear(D, width)
        self.place = nn.Parameter(0.5 * torch.randn(N, width))
        self.query = nn.Parameter(torch.randn(queries, width))
        self.key = nn.Linear(width, width, bias=False)
        if not linear:
            self.hidden = nn.Linear(queries * width, 2 * width)
        self.out = nn.Linear(queries * width if linear else 2 * width, 2 * len(mean))

    def forward(self, z):
        """(.., P, 2): of an angle its sine and cosine, else the normalised number and 0."""
        x = self.token(z) + self.place                              # (.., N, C)
        if not self.linear:
            x = F.gelu(x)
        weight = self.query @ self.key(x).mT / x.shape[-1] ** 0.5   # (.., queries, N)
        y = (weight.softmax(dim=-1) @ x).flatten(-2)                # (.., queries x C)
        if not self.linear:
            y = F.gelu(self.hidden(y))
        first, second = self.out(y).chunk(2, dim=-1)                # (.., P)
        second = torch.where(self.turn > 0, second, 0.0)
        return torch.stack((first, second), dim=-1)

    def code(self, numbers):
        """What forward is to return of numbers (.., P)."""
        angle = 2 * torch.pi * numbers / self.turn
        line = (numbers - self.mean) / self.std
        first = torch.where(self.turn > 0, angle.sin(), line)
        second = torch.where(self.turn > 0, angle.cos(), 0 * line)      # NaN stays
        return torch.stack((first, second), dim=-1)

    def read(self, z):
        """Numbers (.., P), in the dataset's units."""
        first, second = self(z).unbind(dim=-1)
        angle = torch.atan2(first, second) * self.turn / (2 * torch.pi)
        return torch.where(self.turn > 0, angle, first * self.std + self.mean)

    def off(self, z, numbers):
        """Absolute errors (.., P) of read; of angles the short way round."""
        off = self.read(z) - numbers
        half = self.turn / 2
        short = (off + half) % self.turn - half
        return torch.where(self.turn > 0, short, off).abs()


def full_turn(name):
    """Of a number that is an angle, as its name ends in rad or deg; else 0."""
    unit = re.split('[^a-z]', name.lower())[-1]
    return {'rad': 2 * math.pi, 'deg': 360.0}.get(unit, 0.0)


def contrast(found, code, near, temperature=0.1):
    """Symmetric InfoNCE (arXiv:1807.03748) of what a Probe found (n, P, 2) and the codes of the
    true numbers: each is to be told from those of all other frames, but for the near ones (n, n).
    By squared distance, as a cosine would forget how large numbers are."""
    away = torch.cdist(found.flatten(1), code.flatten(1)).square()          # (n, n)
    own = torch.eye(len(near), dtype=torch.bool, device=near.device)
    logits = (-away / temperature).masked_fill(near & ~own, -torch.inf)
    target = torch.arange(len(near), device=near.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def restore_probe(stats, prefix='probe.'):
    """The Probe of a checkpoint's stats; None where there is none."""
    stored = take_prefix(dict(stats), prefix)
    if not stored:
        return None
    N, width = stored['place'].shape
    D = stored['token.weight'].shape[1]
    queries = len(stored['query'])
    mean = stored['mean']
    probe = Probe(N, D, mean, stored['std'], stored['turn'], width, queries,
                  'hidden.weight' not in stored)
    probe.load_state_dict(stored)
    return probe.requires_grad_(False).to(mean.device)


# --------------------------------------------------------------------------------------------------
# The checkpoint: one file that holds all that planning and decoding need: the weights, their
# average, what latents and actions are normalised by, a fitted encoder, and every constant of the
# run.

def save(path, model, config, ema={}, stats={}, step=0, weights=None):
    """Write one safetensors file: the weights, their average (ema: {name: tensor}, under 'ema.'),
    stats ({name: tensor}: latents, actions, a fitted encoder; under 'stats.') and as metadata
    config (JSON of plain values: the constants of the run), the model's own config, versions and
    step. Aside first, then renamed. weights replaces model.state_dict(), whose tensors are shards
    in some processes."""
    tensors = dict(weights or model.state_dict())
    tensors |= {f'ema.{k}': v for k, v in ema.items()}
    tensors |= {f'stats.{k}': v for k, v in stats.items()}
    versions = dict(torch=torch.__version__, python=sys.version.split()[0])
    metadata = dict(config=json.dumps(config), model=json.dumps(model.config), step=str(step),
                    versions=json.dumps(versions))
    write_tensors(path, tensors, metadata)


def write_tensors(path, tensors, metadata=None):
    """Write a safetensors file, aside and then renamed."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    aside = f'{path}.tmp'
    try:
        with open(aside, 'wb'):
            mode = os.stat(aside).st_mode   # for all who may read: safetensors makes private files
        safetensors.torch.save_file(tensors, aside, metadata)
        os.chmod(aside, mode)
        os.replace(aside, path)
    except (OSError, safetensors.SafetensorError) as error:
        sys.exit(f'{path}: cannot be written ({one_line(error)}); what was there before stays')


def load(path, device='cpu', ema=True):
    """model, config of a checkpoint: a WorldModel in eval mode with the averaged weights where
    there are any (ema=False: the trained ones), with .stats ({name: tensor}) and .step; config is
    what save was given, and CONFIG_DEFAULTS."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):       # a pipe would be waited for
            raise OSError('not a regular file')
        with safetensors.safe_open(path, 'pt', device=str(device)) as f:
            metadata = f.metadata()
            # copies: what is mapped would change with the file
            tensors = {k: f.get_tensor(k).clone() for k in f.keys()}
    except Exception as e:      # missing, cut short, something else: one line, whatever it is
        sys.exit(f'{path}: not a readable checkpoint ({one_line(e)})')
    for name, v in tensors.items():
        if not v.isfinite().all():
            sys.exit(f'{path}: {name} is not finite')
    averages = take_prefix(tensors, 'ema.')
    stats = take_prefix(tensors, 'stats.')
    try:
        shape = json.loads(metadata['model'])
        config = json.loads(metadata['config'])
        for given, defaults in ((shape, MODEL_DEFAULTS), (config, CONFIG_DEFAULTS)):
            for name, value in defaults.items():
                if name not in given:
                    given[name] = value
                    print(f'{path}: is older than the option {name}: takes {name}={value}')
                if type(given[name]) is not type(value):
                    raise TypeError(f'{name} is {given[name]}')
        sizes = [config[name] for name in ('frame_height', 'frame_width', 'eval_context')]
        most = max(shape['layers'], shape['wide_layers'], *shape['grid'], *sizes)
        if most > 4096 or not min(shape['soft_cap'], config['eval_context']) > 0:
            raise ValueError('of an absurd size')
        with torch.device('meta'):      # the file's tensors become the parameters
            model = WorldModel(shape)
        model.load_state_dict(tensors | averages if ema else tensors, assign=True)
        model.init_rope()
        model.step = int(metadata['step'])
    except Exception as e:      # another file, of another version, damaged: as many ways
        sys.exit(f'{path}: not a checkpoint of train.py, or not a whole one ({one_line(e)})')
    model.stats = stats
    return model.to(device).float().eval(), config      # some halve files


def take_prefix(tensors, prefix):
    """The tensors of these names, without the prefix, out of a dict."""
    names = [k for k in tensors if k.startswith(prefix)]
    return {k.removeprefix(prefix): tensors.pop(k) for k in names}


def robot_stats(stats, i, path):
    """What the checkpoint at path knows of the actions of its labelled dataset i: mean, std, low,
    high (dataset rows of a model step, numbers of a row)."""
    try:
        known = len(stats['a_width'])
        if i >= known:
            sys.exit(f'--robot={i}: {path} knows {known} labelled datasets, counted from 0')
        used = slice(stats['a_width'][i])       # of the padded width
        rows = int(stats['a_rows'][i])
        return [stats[f'a_{name}'][i, used].view(rows, -1).cpu()
                for name in ('mean', 'std', 'low', 'high')]
    except Exception as error:      # damaged
        sys.exit(f'{path}: not a whole checkpoint ({one_line(error)})')


def robot_state(stats, i):
    """What a checkpoint knows of the states of its labelled dataset i, see data.measure_states."""
    used = int(stats['s_width'][i])
    return [stats[f's_{name}'][i, :used].cpu() for name in ('mean', 'std', 'change')]


def distance(z, z_goal, weight):
    """Mean squared distance (..) of latents (.., N, D) to a goal's, whose NaN do not count."""
    off = torch.where(z_goal.isnan(), 0.0, z - z_goal)
    return (off.square() * weight).mean(dim=(-2, -1))


def channel_weights(model, tokens=None):
    """What each channel counts in a distance, its variance in the data (D,); with weights of the
    tokens (N,) also each token (N, D)."""
    weight = model.stats['z_std'] ** 2
    weight = weight / weight.mean()
    if tokens is not None:
        weight = weight * (tokens / tokens.mean())[:, None]
    return weight


def cost_weights(model, tokens=None, state_weight=1.0, robot=0):
    """What counts how much in the cost: channel_weights, and where the model has a state that as
    one more row, (N + 1, D). A number of the state counts by the variance of its change in one
    model step; all of them, at state_weight 1, as much as the latents do for two random frames."""
    weight = channel_weights(model, tokens)
    if not model.config.get('state_dim'):
        return weight
    c = model.config
    N = math.prod(c['grid'])
    weight = weight.expand(N, c['dim']) * (N + 1) / N       # distance divides by N + 1 now
    _, std, change = robot_state(model.stats, robot)
    # what never moves, or only from one episode to the next, does not count
    moves = (std > 1e-6) & (change > 1e-3 * std ** 2)
    speed = torch.where(moves, std ** 2 / change, 0.0)
    share = speed / (2 * speed.sum()).clamp(min=1e-12)        # of two random frames: 1
    state = state_weight * model.stats['z_pair'] * share.to(weight) * (N + 1) * c['dim']
    return torch.cat((weight, F.pad(state, (0, c['dim'] - len(state)))[None]))


def standard(z, stats):
    """Normalise an encoder's tokens (.., width) to latents (.., D), what world models see: less
    their mean, perhaps only the leading principal components or by --project=learned a linear map
    of them, over a deviation per channel."""
    z = z - stats['z_mean']
    if 'z_basis' in stats:
        z = z @ stats['z_basis']
    return z / stats['z_std']


def unstandard(z, stats):
    """The inverse of standard, up to the components that it left out."""
    z = z * stats['z_std']
    if 'z_basis' in stats:
        z = z @ stats.get('z_back', stats['z_basis'].T)
    return z + stats['z_mean']


def encoder_latents(model, z):
    """An encoder's latents (.., N, D), float32, of a model's, without the state."""
    return unstandard(z[..., :math.prod(model.config['grid']), :].float(), model.stats)


def components(a, stats):
    """Normalised actions (.., A) as a model takes them: if it was trained with --action_pca, their
    leading principal components."""
    return a @ stats['a_basis'] if 'a_basis' in stats else a


def clip_inputs(clip, z, stats):
    """What a model sees of a clip or a batch of data.Clips: latents (.., T, N, D) of z, which are
    its frames' raw ones, with the state where there is one; a (.., T, A); a_mask (.., T)."""
    z = standard(z, stats)
    if 's' in clip:
        z = add_state(z, clip['s'].to(z))
    return z, components(clip['a'].to(z), stats), clip['a_mask'].to(z.device)


def restore_encoder(config, stats, path='', grid=None):
    """The encoder that a checkpoint was trained with: config and model.stats are load's; path
    replaces its file. grid: the model's, whose latents it must make."""
    path = path or config['encoder_path']
    encoder = load_encoder(config['encoder'], path, config['layer'], config['frame_height'],
                           config['frame_width'], config['pool'])
    known = config['encoder_hash']      # '' where the checkpoint is too old to tell
    if known not in ('', encoder.hash):
        sys.exit(f'--encoder_path={path}: has other weights than those of training: their hash is '
                 f'{encoder.hash}, not {known}')
    if grid not in (None, [*encoder.grid]):
        sys.exit(f'the checkpoint has been changed: its model has {grid} tokens in a frame, its '
                 f'encoder {[*encoder.grid]}')
    stored = take_prefix(dict(stats), 'encoder.')
    if stored.keys() != encoder.stored().keys():
        sys.exit(f'the checkpoint has {[*stored]} of the encoder, {encoder.name} wants '
                 f'{[*encoder.stored()]}')
    if stored:
        encoder.load_state_dict(stored)
    return encoder


def open_run(path, device, K, guide, text, encoder_path):
    """model, config of a checkpoint, as load has them, and its encoder, all on the device, or one
    line: it is to imagine in K steps, as set_guide has it."""
    model, config = load(path, device)
    check_steps(K, model.config['k_max'])
    set_guide(model, guide, text, config)
    encoder = restore_encoder(config, model.stats, encoder_path, model.config['grid'])
    return model, config, encoder.to(device)


@torch.no_grad()
def pictures(z, encoder, decoder=None):
    """Raw latents (.., N, D) as uint8 frames (.., 3, height, width): through a decoder or the
    encoder's own, else the three leading principal components of all z given, as red, green and
    blue."""
    decode = decoder or encoder.decode
    frames = z.float().flatten(0, -3)
    if decode:
        x = torch.cat([decode(part) for part in frames.split(32)])
    else:
        x = colours(frames.flatten(0, 1).cpu()).view(*frames.shape[:2], 3).mT
        x = F.interpolate(x.unflatten(2, encoder.grid), (encoder.size, encoder.width))
    return (x * 255).round().to(torch.uint8).cpu().unflatten(0, z.shape[:-2])


def colours(z):
    """(n, 3) in [0, 1] of tokens (n, D): their leading components, without the rarest 2 % at either
    end."""
    z = z - z.mean(dim=0)
    _, vectors = torch.linalg.eigh((z.T @ z).double())
    x = z @ vectors[:, -3:].flip(1).float()
    sample = x[torch.linspace(0, len(x) - 1, 50000).long()]         # quantile takes no more
    low, high = (torch.quantile(sample, q, dim=0) for q in (0.02, 0.98))
    return ((x - low) / (high - low)).clamp(0, 1)
