"""
The networks and their maths: frozen encoders, the world model, its loss, sampling with a cache, the checkpoint.

Letters: B clips, T frames of a clip, N patch tokens of a frame, D encoder width, A action width, C width of the
transformer, K denoising steps, M candidate plans, H W pixels. z are normalised latents (B, T, N, D), a normalised
actions (B, T, A); a[t] is what was done between frame t-1 and frame t. tau = 0 is noise, tau = 1 is clean.

Sources: Dreamer 4 (arXiv:2509.24527) for the transformer and shortcut forcing, shortcut models (arXiv:2410.12557),
diffusion forcing (arXiv:2407.01392), DINOv2 (arXiv:2304.07193) and DINOv3 (arXiv:2508.10104) for the encoders.
"""
import difflib
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

# The first multi-threaded cos of a process can be off by 2e-4 on CPUs (torch 2.13, one process in four): spend it here.
torch.zeros(1).cos()


def rotate(x, cos, sin):
    """RoPE: x (..., S, d) with the pairs (x_i, x_{i + d/2}) turned by angles whose cos and sin are (S, d/2); float32.
    Halves, not neighbours, are paired, as in cos and sin: mixing the two makes results depend on absolute positions."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((torch.addcmul(x1 * cos, x2, -sin), torch.addcmul(x2 * cos, x1, sin)), dim=-1)


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
              (('time_every', 1), ('context', 1), ('registers', 0))),
            ('soft_cap', c['soft_cap'] > 0, 'more than 0'),
            ('action_on', c['action_on'] in ('all', 'token'), 'all or token'),
            ('objective', c['objective'] in ('shortcut', 'diffusion', 'direct'), 'shortcut, diffusion or direct')):
        if not fits:
            sys.exit(f'--{name}={c[name]}: wants {wanted}')
    return c


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
    logits = (q * d ** -0.5).reshape(B, n, h // n * S, d) @ k.transpose(-1, -2)           # (B, n, h/n S, L)
    logits = cap * torch.tanh(logits.float() / cap)
    if mask is not None:
        logits = logits.view(B, h, S, -1).masked_fill(~mask, -torch.inf).view_as(logits)
    return (logits.softmax(dim=-1).type_as(v) @ v).view(B, h, S, d)


class Attention(nn.Module):
    def __init__(self, width, heads, kv_heads, cap):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.cap = heads, kv_heads, width // heads, cap
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.qk_gain = nn.Parameter(torch.ones(heads + kv_heads, 1))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x, rope, mask=None, ring=None, start=0):
        """x (B, S, C); rope: cos and sin (S, 1, d/2). ring: (keys, values), each (B, kv_heads, context, d), of the
        frames before start; the frames of this call are written into it, at their index modulo context."""
        B, S, C = x.shape
        qk, v = self.qkv(x).view(B, S, -1, self.head_dim).split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        cos, sin = (y * self.qk_gain for y in rope)     # a gain of QK-norm costs nothing in the small tables
        qk = rotate(rms_norm(qk), cos, sin).type_as(v)                                    # (B, S, heads + kv_heads, d)
        q, k, v = (y.transpose(1, 2) for y in (*qk.split((self.heads, self.kv_heads), dim=2), v))   # (B, heads, S, d)
        if ring is not None:
            context = ring[0].shape[2]
            slots = torch.arange(start + max(0, S - context), start + S, device=x.device) % context
            ring[0][:, :, slots], ring[1][:, :, slots] = k[:, :, -context:], v[:, :, -context:]
            if S == 1:      # order within the ring is of no matter: keys carry their positions
                k, v = (r[:, :, :start + 1] for r in ring)
            else:
                assert start == 0, f'several frames at once can only begin a ring, not follow frame {start - 1}'
        return self.out(attend(q, k, v, self.cap, mask).transpose(1, 2).reshape(B, S, C))


class Layer(nn.Module):
    """Attention over space (all tokens of a frame) or over time (one token position), then an MLP."""
    def __init__(self, c, time):
        super().__init__()
        self.time = time
        self.attn = Attention(c['width'], c['heads'], c['kv_heads'], c['soft_cap'])
        self.mlp = SwiGLU(c['width'], -(-c['width'] * 8 // 3 // 32) * 32)   # 8/3 of it: the cost of a plain 4x MLP

    def forward(self, x, rope, mask=None, ring=None, start=0):
        B, T, S, C = x.shape
        y = rms_norm(x)
        if self.time:
            y = self.attn(y.transpose(1, 2).reshape(B * S, T, C), rope, mask, ring, start)
            y = y.view(B, S, T, C).transpose(1, 2)
        else:
            y = self.attn(y.view(B * T, S, C), rope).view(B, T, S, C)
        x = x + y
        return x + self.mlp(rms_norm(x))


class WorldModel(nn.Module):
    """f(z~, tau, d, a) -> the clean latents (eq. 6). config: the dict of model_config.
    Tokens of a frame: [registers | latents | shortcut | action]. tau = 0 is noise, tau = 1 clean, d the step size."""
    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        C, (rows, cols) = c['width'], c['grid']
        self.z_in = nn.Linear(c['dim'], C)
        self.registers = nn.Parameter(torch.empty(c['registers'], C))
        self.tau_embed = nn.Embedding(c['k_max'], C // 2)                       # tau = i / k_max
        self.d_embed = nn.Embedding(int(math.log2(c['k_max'])) + 1, C // 2)     # d = 2^-i
        self.a_base = nn.Parameter(torch.empty(C))                              # stands in where no action is known
        self.a_in = nn.Linear(c['action_dim'], C, bias=False) if c['action_dim'] else None
        self.layers = nn.ModuleList(Layer(c, i % c['time_every'] == 1 % c['time_every']) for i in range(c['layers']))
        self.last_time = max(i for i, layer in enumerate(self.layers) if layer.time)
        self.head = nn.Linear(C, c['dim'])
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
        for layer in self.layers:
            layer.attn.out.weight.data /= math.sqrt(2 * c['layers'])
            layer.mlp.down.weight.data /= math.sqrt(2 * c['layers'])
        for p in (self.z_in.bias, self.head.weight, self.head.bias):
            nn.init.zeros_(p)

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
        t = torch.arange(start, start + T, device=z.device)
        angles = (t[:, None] * self.time_freq)[:, None]                                   # (T, 1, d/2)
        time, space = (angles.cos(), angles.sin()), (self.space_cos, self.space_sin)
        ago = t[:, None] - t
        mask = ((ago >= 0) & (ago < c['context']))[None, None] if T > 1 else None         # (1, 1, T, T)
        if alone is not None and T > 1:
            mask = mask & (~alone.repeat_interleave(x.shape[2])[:, None, None, None] | (ago == 0))
        for i, layer in enumerate(self.layers):
            x = layer(x, time, mask, rings and rings[i], start) if layer.time else layer(x, space)
            if commit and i == self.last_time:      # nothing above can reach a later frame
                return None
        with torch.autocast(z.device.type, enabled=False):
            return self.head(rms_norm(x[:, :, c['registers']:-2]))

    def new_rings(self, B, T, dtype=torch.float32):
        """An empty cache for B clips of T frames: per time layer the keys and values of the last `context` of them."""
        c = self.config
        shape = B * len(self.space_cos), c['kv_heads'], min(T, c['context']), c['width'] // c['heads']
        return [tuple(torch.empty(shape, dtype=dtype, device=self.a_base.device) for _ in 'kv') if layer.time else None
                for layer in self.layers]


# --------------------------------------------------------------------------------------------------------------------
# shortcut forcing

def sample_flow(B, T, k_max, schedule, device):
    """Signal levels tau (B, T) of flow rows, on the grid 0, 1/k_max, .., 1 - 1/k_max.
    'uniform': every frame on its own (eq. 4). 'shift': half of the frames are pure noise, and in 70 % of the rows
    the frames before a random one are nearly clean (tau >= 7/8), which is how sampling sees them. Neighbouring
    patches repeat each other, so the state shows at any tau well above 0: only tau near 0 teaches dynamics."""
    tau = torch.rand(B, T, device=device)
    if schedule == 'shift':
        tau, past = shift(tau)
        tau = torch.where(past, 1 - torch.rand_like(tau) / 8, tau)
    return ((tau * k_max).floor() / k_max).clamp(max=1 - 1 / k_max)


def shift(u):
    # u (B, T), half of it set to 0, and (B, T) bool: in 70 % of the rows the frames before a random one
    u = torch.where(torch.rand_like(u) < 0.5, 0.0, u)
    first = 1 + (torch.rand_like(u[:, :1]) * (u.shape[1] - 1)).floor()
    return u, (torch.rand_like(first) < 0.7) & (torch.arange(u.shape[1], device=u.device) < first)


def shortcut_loss(model, z, a, a_mask, z_mask, objective='shortcut', k_max=0, bootstrap=0.25, p_image=0.3, p_null=0.1,
                  tau_schedule='shift', rms=None):
    """Loss and metrics (0-d tensors on the device, so that nobody waits for them) of one batch of clips.
    z (B, T, N, D) clean normalised latents, a (B, T, A), a_mask and z_mask (B, T) bool (action known, frame real).
    objective 'shortcut': eq. 7 of arXiv:2509.24527 in x-space, a share `bootstrap` of the rows with d > d_min, the
    others with d = d_min = 1 / k_max (0 = the model's). 'diffusion': d_min alone. 'direct': one deterministic step
    from the clean past, z_hat[t] = f(z[t-1], a[t]). p_image: share of clips whose frames are seen as separate images,
    p_null: share of clips with their actions hidden. rms (2,): running mean squares, whose roots divide the terms."""
    (B, T, N, D), device = z.shape, z.device
    k_max = k_max or model.config['k_max']
    a_mask = a_mask & ~(torch.rand(B, 1, device=device) < p_null)
    scale = torch.ones(2, device=device) if rms is None else rms.clamp(min=1e-12).sqrt()
    # Divided by its own RMS alone, a bootstrap term that falls gains weight without end, and weights that merely agree
    # with themselves make it fall to 0: training then leaves the data (seen). So it never weighs more than the flow.
    scale = torch.stack((scale[0], scale.max()))
    if objective == 'direct':
        error = (model(*previous(z), a, a_mask) - z).square().mean(dim=(2, 3))            # (B, T)
        flow = (error * z_mask)[:, 1:].sum() / z_mask[:, 1:].sum().clamp(min=1)
        return flow / scale[0], {'flow': flow.detach()}

    alone = torch.rand(B, device=device) < p_image
    a_mask = a_mask & ~alone[:, None]
    # a row is all flow or all bootstrap; the coin makes the share exact on average for any B
    n = int(B * bootstrap + torch.rand(()).item()) if objective == 'shortcut' else 0
    tau = sample_flow(B, T, k_max, tau_schedule, device)
    d = torch.full((B, T), 1 / k_max, device=device)
    if n:
        e = torch.randint(1, int(math.log2(k_max)) + 1, (n, T), device=device)            # d = 2^e d_min <= 1
        u = torch.rand(n, T, device=device)
        if tau_schedule == 'shift':
            u, past = shift(u)      # the past at the cleanest level that a bootstrap row can have
            e, u = torch.where(past, 1, e), torch.where(past, 1 - 1 / k_max, u)
        d[:n] = 2.0 ** e / k_max
        tau[:n] = (u / d[:n]).floor() * d[:n]
    level = tau[..., None, None]
    z_tau = (1 - level) * torch.randn_like(z) + level * z                                         # eq. 6
    target = z
    if n:
        with torch.no_grad():       # the teacher: the same weights, two half steps
            half, step, level = d[:n] / 2, d[:n, :, None, None] / 2, level[:n]
            one = (model(z_tau[:n], tau[:n], half, a[:n], a_mask[:n], alone[:n]) - z_tau[:n]) / (1 - level)
            z_mid = z_tau[:n] + one * step
            two = (model(z_mid, tau[:n] + half, half, a[:n], a_mask[:n], alone[:n]) - z_mid) / (1 - level - step)
            # (1-tau)^2 |(z_hat - z_tau)/(1-tau) - v|^2 = |z_hat - (z_tau + (1-tau) v)|^2: no division by 1-tau
            target = torch.cat((z_tau[:n] + (1 - level) * (one + two) / 2, z[n:]))
    z_hat = model(z_tau, tau, d, a, a_mask, alone)
    error = (z_hat.float() - target).square().mean(dim=(2, 3)) * (0.9 * tau + 0.1)        # (B, T), ramp: eq. 8
    boot, flow = ((error[rows] * z_mask[rows]).sum() / z_mask[rows].sum().clamp(min=1)
                  for rows in (slice(0, n), slice(n, B)))
    metrics = ({'flow': flow.detach()} if n < B else {}) | ({'bootstrap': boot.detach()} if n else {})
    return flow / scale[0] + boot / scale[1], metrics


def previous(z):
    # 'direct' feeds frame t-1 in the place of frame t: clean everywhere but before the first frame, always one step
    tau = torch.ones(z.shape[:2], device=z.device)
    tau[:, 0] = 0
    return torch.cat((torch.zeros_like(z[:, :1]), z[:, :-1]), dim=1), tau, torch.ones_like(tau)


@torch.no_grad()
def rollout(model, z_ctx, a, a_mask, K=4, tau_ctx=0.9, seed=0, cache=True):
    """Imagines the frames after z_ctx (B, Tc, N, D), one after the other, each in K steps -> (B M, T - Tc, N, D).
    a (B M, T, A) and a_mask (B M, T) cover context and future. With M > 1 each context has M candidates in a row,
    which share its actions, its computation and their noise. The past is seen at noise level tau_ctx (on the grid of
    k_max) and labelled so. Each frame costs K passes over one frame and a part of one that commits it to the rings;
    cache=False computes the same from scratch each time (the reference). Noise depends on seed, context and frame
    alone. Euler steps z <- z + d (z_hat - z) / (1 - tau): the last one returns z_hat."""
    c = model.config
    (B, Tc, N, D), T, M = z_ctx.shape, a.shape[1], a.shape[0] // z_ctx.shape[0]
    assert K >= 1 and K & (K - 1) == 0 and K <= c['k_max'], f'K {K} is not a power of two up to k_max {c["k_max"]}'
    assert a.shape[0] == B * M and 1 <= Tc < T, f'context {tuple(z_ctx.shape)} and actions {tuple(a.shape)} disagree'
    device = z_ctx.device
    generator = torch.Generator().manual_seed(seed)             # on the CPU: the same noise on every device

    def noise():
        return torch.randn(2, B, 1, N, D, generator=generator).to(device)

    direct = c['objective'] == 'direct'
    if direct:
        past, tau, d = previous(z_ctx)
    else:
        level = min(round(tau_ctx * c['k_max']), c['k_max'] - 1) / c['k_max']   # tau = 1 has never been trained
        past = level * z_ctx + (1 - level) * torch.cat([noise()[1] for _ in range(Tc)], dim=1)
        tau, d = torch.full((B, Tc), level, device=device), torch.full((B, Tc), 1 / c['k_max'], device=device)
    if cache:
        fast = torch.is_autocast_enabled(device.type)
        rings = model.new_rings(B, T, torch.get_autocast_dtype(device.type) if fast else z_ctx.dtype)
        model(past, tau, d, a[::M, :Tc], a_mask[::M, :Tc], rings=rings, commit=True)
        rings = [ring and tuple(r.unflatten(0, (B, -1)).repeat_interleave(M, dim=0).flatten(0, 1) for r in ring)
                 for ring in rings]     # every context's ring for each of its M candidates
    else:
        past, tau, d = (v.repeat_interleave(M, dim=0) for v in (past, tau, d))

    def frame(z, tau_t, d_t, t, commit=False):
        # z_hat of frame t alone, given the past; commit: make it part of the past
        nonlocal past, tau, d
        tau_t, d_t = (torch.full((B * M, 1), v, device=device) for v in (tau_t, d_t))
        if cache:
            return model(z, tau_t, d_t, a[:, t:t + 1], a_mask[:, t:t + 1], rings=rings, start=t, commit=commit)
        z, tau_t, d_t = torch.cat((past, z), dim=1), torch.cat((tau, tau_t), dim=1), torch.cat((d, d_t), dim=1)
        if commit:
            past, tau, d = z, tau_t, d_t
            return None
        return model(z, tau_t, d_t, a[:, :t + 1], a_mask[:, :t + 1])[:, -1:]

    out, z = [], z_ctx[:, -1:].repeat_interleave(M, dim=0)
    for t in range(Tc, T):
        if direct:
            last, z = z, frame(z, 1.0, 1.0, t).type_as(z)
            if not cache:
                frame(last, 1.0, 1.0, t, commit=True)
        else:
            z, eps = (n.repeat_interleave(M, dim=0) for n in noise())
            for k in range(K):
                z_hat = frame(z, k / K, 1 / K if c['objective'] == 'shortcut' else 1 / c['k_max'], t)
                z = z + (z_hat - z) / (K - k)                   # d / (1 - tau) = 1 / (K - k)
            if t < T - 1:
                frame(level * z + (1 - level) * eps, level, 1 / c['k_max'], t, commit=True)
        out.append(z)
    return torch.cat(out, dim=1)


# --------------------------------------------------------------------------------------------------------------------
# the checkpoint

def save(path, model, config, ema=None, stats=None, step=0):
    """Write one safetensors file: the weights, their average (ema: {name: tensor}, under 'ema.'), stats ({name:
    tensor}: latents, actions, a fitted encoder; under 'stats.') and as metadata config (JSON of plain values: the
    constants of the run), the model's own config, versions and step. Aside first, then renamed."""
    tensors = dict(model.state_dict())
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
