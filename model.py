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

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

# The first multi-threaded cos of a process can be off by 2e-4 on CPUs (torch 2.13, one process in four); only the first.
torch.zeros(1).cos()

def rotate(x, cos, sin):
    """RoPE: x (..., S, d) with the pairs (x_i, x_{i + d/2}) turned by angles whose cos and sin are (S, d/2); float32.

    Halves, not neighbours, are paired, and cos and sin follow the same pairing: mixing the two conventions is the
    commonest RoPE bug and makes the result depend on absolute positions.
    """
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Encoder: DINOv2 (arXiv:2304.07193, with registers arXiv:2309.16588) and DINOv3 (arXiv:2508.10104), one ViT for both.

# name: hub repository, then ViT's arguments: width, depth, heads, hidden, gated, registers, patch, grid
ENCODERS = {f'dinov2_vit{letter}14{"_reg" if registers else ""}':
            (f'facebook/dinov2-{"with-registers-" if registers else ""}{word}', *arguments, registers, 14, 37)
            for letter, word, *arguments in (('s', 'small', 384, 12, 6, 1536, False), ('b', 'base', 768, 12, 12, 3072, False),
                                             ('l', 'large', 1024, 24, 16, 4096, False),
                                             ('g', 'giant', 1536, 40, 24, 4096, True)) for registers in (0, 4)}
ENCODERS |= {f'dinov3_vit{size}16{plus}': (f'facebook/dinov3-vit{size}16{plus}-pretrain-lvd1689m', *arguments, 4, 16, 0)
             for size, plus, *arguments in (('s', '', 384, 12, 6, 1536, False), ('s', 'plus', 384, 12, 6, 1536, True),
                                            ('b', '', 768, 12, 12, 3072, False), ('l', '', 1024, 24, 16, 4096, False),
                                            ('h', 'plus', 1280, 32, 20, 5120, True), ('7b', '', 4096, 40, 32, 8192, True))}


class ViTBlock(nn.Module):
    """x + ls1 attn(norm1 x), then x + ls2 mlp(norm2 x): pre-norm with LayerScale."""

    def __init__(self, width, heads, hidden, gated, eps):
        super().__init__()
        self.heads, self.gated = heads, gated
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width)))
        up, down = ('w12', 'w3') if gated else ('fc1', 'fc2')
        self.mlp = nn.ModuleDict({up: nn.Linear(width, hidden * (1 + gated)), down: nn.Linear(hidden, width)})
        self.ls1, self.ls2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x, rope):
        B, L, D = x.shape
        qkv = self.attn.qkv(self.norm1(x)).view(B, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, D / heads)
        if rope is not None:
            q, k = rotate(q, *rope).type_as(v), rotate(k, *rope).type_as(v)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, D)
        x = x + self.ls1 * self.attn.proj(y)
        if not self.gated:
            return x + self.ls2 * self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))
        gate, up = self.mlp.w12(self.norm2(x)).chunk(2, dim=-1)
        return x + self.ls2 * self.mlp.w3(F.silu(gate) * up)


class ViT(nn.Module):
    """forward(x, layer): normalised images (B, 3, H, W) to patch tokens (B, N, width), rows first.

    H and W are multiples of `patch`. `grid` is the side of the learned position embedding (DINOv2), or
    0 for rotary positions (DINOv3). `layer` picks the block, counted from 0, whose tokens pass through the
    final norm; the blocks after it are not run. Tokens inside: class token, registers, patches.
    """

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
        if self.registers is None:  # the first models scale by (n + 0.1) / grid, and their features depend on it
            scale = [(n + 0.1) / self.grid for n in (rows, columns)]
            square = F.interpolate(square, scale_factor=scale, mode='bicubic')
        else:
            square = F.interpolate(square, (rows, columns), mode='bicubic', antialias=True)
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
        assert -len(self.blocks) <= layer < len(self.blocks), f'layer {layer} of {len(self.blocks)}'
        rows, columns = H // self.patch, W // self.patch
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(B, -1, -1), x), dim=1)  # (B, 1 + N, width)
        if self.grid:
            x = x + self.positions(rows, columns).to(x.dtype)
        if self.registers is not None:  # after the positions: registers have none
            x = torch.cat((x[:, :1], self.registers.expand(B, -1, -1), x[:, 1:]), dim=1)
        rope = None if self.grid else self.angles(rows, columns)
        for block in self.blocks[:layer % len(self.blocks) + 1]:
            x = block(x, rope)
        return self.norm(x[:, -rows * columns:])


RENAME = [(re.compile(a), b) for a, b in (  # applied in this order to every key
    (r'^((module|teacher|backbone|model|dinov2|dinov2_with_registers|embeddings|encoder)\.)+', ''),
    (r'^(register_tokens|storage_tokens|reg_token)$', 'registers'),
    (r'^position_embeddings$', 'pos_embed'),
    (r'^(patch_embeddings\.projection|patch_embeddings|patch_embed\.proj)\.', 'patch_embed.'),
    (r'^rope_embed\.periods$', 'periods'),
    (r'^layernorm\.', 'norm.'),
    (r'^layer\.', 'blocks.'),
    (r'\.(layer_scale|ls|gamma_)([12])(\.lambda1|\.gamma)?$', r'.ls\2'),
    (r'\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.', r'.attn.\2.'),
    (r'\.attn\.([qv])_bias$', r'.attn.\1.bias'),
    (r'\.attention\.(output\.dense|o_proj)\.', '.attn.proj.'),
    (r'\.mlp\.weights_in\.', '.mlp.w12.'),
    (r'\.mlp\.(gate_proj|fc1_g)\.', '.mlp.w1.'),
    (r'\.mlp\.(up_proj|fc1_x)\.', '.mlp.w2.'),
    (r'\.mlp\.(down_proj|weights_out)\.', '.mlp.w3.'),
)]
UNUSED = re.compile(r'^(mask_token$|rope_embeddings\.|local_cls_norm\.|((dino|ibot)_)?head\.|projectors\.)')


def official(state):
    """{key: tensor} under ViT's names, from a file of Meta, Hugging Face (as stored or in memory) or timm."""
    out = {}
    for key, value in state.items():
        for pattern, name in RENAME:
            key = pattern.sub(name, key)
        if not UNUSED.match(key):
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
        gated = {mlp + 'w1.weight', mlp + 'w12.weight'} & out.keys() or (  # timm calls the packed gate fc1 as well
            fc1 is not None and fc2 is not None and len(fc1) == 2 * fc2.shape[-1])
        for part in ('weight', 'bias'):
            if {f'{mlp}w1.{part}', f'{mlp}w2.{part}'} <= out.keys():
                out[f'{mlp}w12.{part}'] = torch.cat((out.pop(f'{mlp}w1.{part}'), out.pop(f'{mlp}w2.{part}')))
            # Hugging Face's plain MLP is an up and a down without a gate
            for old, new in (('fc1', 'w12'), ('fc2', 'w3')) if gated else (('w2', 'fc1'), ('w3', 'fc2')):
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


def hub_file(name, repo):
    """The weights of a hub repository, downloaded once: model.safetensors, or the folder of a split one."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError
    try:
        try:
            return hf_hub_download(repo, 'model.safetensors')
        except EntryNotFoundError:  # the largest models are split
            return snapshot_download(repo, allow_patterns='*.safetensors')
    except Exception as e:  # no network, a licence to accept first, a full disk
        sys.exit(f'--encoder={name}: no model.safetensors from https://huggingface.co/{repo} ({one_line(e)}); get it by '
                 'hand and give --encoder_path=model.safetensors')


def one_line(error):
    return f'{type(error).__name__}: {" ".join(str(error).split())[:160]}'


class Pixels(nn.Module):
    """The encoder without weights: the leading principal components of raw patches, (B, 3, H, W) -> (B, N, dim).

    Until fit has seen frames, they are those of a generic picture (correlation e^(-distance / patch)). Latents are
    not whitened here: what divides them (train.py's `whiten`) has an exponent of its own.
    """
    name, pool = 'pixels', 1

    def __init__(self, size, width, patch, dim=24):
        super().__init__()
        self.size, self.width, self.patch, self.dim = size, width, patch, dim
        self.grid = (size // patch, width // patch)
        at = torch.cartesian_prod(torch.arange(patch), torch.arange(patch)).float()
        near = torch.kron(torch.eye(3) * 0.1 + 0.9, torch.exp(-torch.cdist(at, at) / patch))  # as unfold orders
        self.register_buffer('mean', torch.full((3 * patch * patch,), 0.5))
        self.register_buffer('basis', self.components(near))

    def components(self, covariance):
        return torch.linalg.eigh(covariance.double())[1].flip(1)[:, :self.dim].float().contiguous()

    def patches(self, x):
        if x.shape[-2:] != (self.size, self.width):
            x = F.interpolate(x, (self.size, self.width), mode='bilinear', antialias=True)
        return F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)                 # (B, N, 3 p p)

    def fit(self, x):
        """Components of the patches of frames x (B, 3, H, W) in [0, 1]."""
        p = self.patches(x).flatten(0, 1).double()
        self.mean.copy_(p.mean(0))
        self.basis.copy_(self.components((p - p.mean(0)).T @ (p - p.mean(0)) / len(p)))

    def forward(self, x):
        return (self.patches(x) - self.mean) @ self.basis

    def decode(self, z):
        """(B, N, dim) -> frames (B, 3, size, width) in [0, 1]: the inverse, but for the components left out."""
        x = F.fold((z @ self.basis.T + self.mean).transpose(1, 2), (self.size, self.width), self.patch,
                   stride=self.patch)
        return x.clamp(0, 1)


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
        x = ((x - self.mean) / self.std).to(self.vit.norm.weight.dtype)
        z = self.vit(x, self.layer).float()
        if self.pool > 1:
            z = z.unflatten(1, (self.grid[0], self.pool, self.grid[1], self.pool)).mean((2, 4)).flatten(1, 2)
        return z


def load_encoder(name, path='', layer=-1, height=0, width=0, pool=1):
    """A frozen module: encoder(x) maps float frames in [0, 1], (B, 3, H, W), to patch tokens (B, N, dim).

    It has .dim .patch .size .grid .name. layer is the block whose tokens it returns, through the final norm
    (-1 is the last). Frames are resized to height x width pixels: 0 is 224 (pixels: 28) for the height and the
    height for the width. pool=2 averages 2x2 patches. Weights come from the file path, else from the hub; what does not
    fit ends the program with one line.
    """
    if name != 'pixels' and name not in ENCODERS:
        near = difflib.get_close_matches(name, [*ENCODERS, 'pixels'], 1)
        sys.exit(f'--encoder={name}: no such encoder, ' +
                 (f'did you mean {near[0]}?' if near else f'there are pixels, {", ".join(ENCODERS)}'))
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
    depth = len(vit.blocks)
    if not -depth <= layer < depth:
        sys.exit(f'--layer={layer}: {name} has blocks 0 to {depth - 1} (-1 is the last)')

    file = path or hub_file(name, repo)
    state = official(read_tensors(file))
    want = vit.state_dict()
    if 'periods' in state and vit.periods is not None:
        want['periods'] = vit.periods
    for key in [*want, *state]:
        if key not in want:
            sys.exit(f'{file}: {key} is unexpected, {name} has no such weight')
        if key not in state or state[key].shape != want[key].shape:
            got = tuple(state[key].shape) if key in state else 'missing'
            sys.exit(f'{file}: {key} is {got}, {name} wants {tuple(want[key].shape)}')
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
    overrides replace any entry (0 means 'as in the preset', but for registers); an unknown one is an assertion.
    """
    if size not in SIZES:
        sys.exit(f'--size={size}: no such size, there are {", ".join(SIZES)}')
    width, layers, heads, kv_heads = SIZES[size]
    config = dict(
        dim=dim, grid=list(grid), action_dim=action_dim, width=width, layers=layers, heads=heads, kv_heads=kv_heads,
        registers=4,            # learned tokens of each frame that belong to no patch
        context=32,             # frames that a time layer sees, the current one included
        time_every=4,           # one layer of so many is a time layer, the second of each group
        k_max=64,               # finest sampling has k_max steps: d_min = 1 / k_max
        soft_cap=50.0,          # attention logits stay within +-soft_cap
        action_on='all',        # 'all': the action is added to every latent token too; 'token': its own token alone
        objective='shortcut')   # what the weights were trained for; sampling depends on it
    assert not set(overrides) - set(config), f'model_config has no {sorted(set(overrides) - set(config))}'
    config |= {k: v for k, v in overrides.items() if v not in (0, '') or k == 'registers'}
    for name, fits, wanted in (
            ('width', lambda v: v % (4 * config['heads']) == 0, f'a multiple of 4 x heads = {4 * config["heads"]}'),
            ('heads', lambda v: v % config['kv_heads'] == 0, f'a multiple of kv_heads = {config["kv_heads"]}'),
            ('k_max', lambda v: v > 0 and v & (v - 1) == 0, 'a power of two'),
            ('layers', lambda v: v >= 2, 'at least 2, the second is the first time layer'),
            ('time_every', lambda v: v >= 1, 'at least 1'),
            ('context', lambda v: v >= 1, 'at least 1'),
            ('registers', lambda v: v >= 0, 'at least 0'),
            ('soft_cap', lambda v: v > 0, 'more than 0'),
            ('action_on', ('all', 'token').__contains__, 'all or token'),
            ('objective', ('shortcut', 'diffusion', 'direct').__contains__, 'shortcut, diffusion or direct')):
        if not fits(config[name]):
            sys.exit(f'--{name}={config[name]}: wants {wanted}')
    return config


def rms_norm(x, weight):
    # in float32 whatever autocast says; the result goes on in the dtype that came in
    return F.rms_norm(x.float(), x.shape[-1:], weight, 1e-6).type_as(x)


def attend(q, k, v, cap, mask=None):
    """Soft-capped grouped-query attention: softmax(cap tanh(q k / (cap sqrt(d)))) v.

    q (B, heads, S, d), k and v (B, kv_heads, L, d); mask bool, broadcastable to (B, 1, S, L), True = may be seen.
    The reference for every other kernel. Queries that share a key head are stacked, so keys are never repeated.
    """
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
        self.qk_norm = nn.Parameter(torch.ones(heads + kv_heads, self.head_dim))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x, rope, mask=None, ring=None, start=0):
        """x (B, S, C); rope: cos and sin (S, 1, d/2). ring: (keys, values), each (B, kv_heads, context, d), of the
        frames before start; the frames of this call are written into it, at their index modulo context."""
        B, S, C = x.shape
        qk, v = self.qkv(x).view(B, S, -1, self.head_dim).split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        qk = rotate(rms_norm(qk.float(), None) * self.qk_norm, *rope).type_as(v)
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


class SwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = -(-width * 8 // 3 // 32) * 32          # 8/3 of the width: the cost of a plain 4x MLP
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    """Attention over space (all tokens of a frame) or over time (one token position), then an MLP."""
    def __init__(self, c, time):
        super().__init__()
        self.time = time
        self.norm1 = nn.Parameter(torch.ones(c['width']))
        self.attn = Attention(c['width'], c['heads'], c['kv_heads'], c['soft_cap'])
        self.norm2 = nn.Parameter(torch.ones(c['width']))
        self.mlp = SwiGLU(c['width'])

    def forward(self, x, rope, mask, ring, start):
        B, T, S, C = x.shape
        y = rms_norm(x, self.norm1)
        if self.time:
            y = y.transpose(1, 2).reshape(B * S, T, C)
            y = self.attn(y, rope, mask, ring, start)
            y = y.view(B, S, T, C).transpose(1, 2)
        else:
            y = self.attn(y.view(B * T, S, C), rope).view(B, T, S, C)
        x = x + y
        return x + self.mlp(rms_norm(x, self.norm2))


class WorldModel(nn.Module):
    """f(z~, tau, d, a) -> the clean latents (eq. 6). config: the dict of model_config.

    Tokens of a frame: [registers | latents | shortcut | action]. tau = 0 is noise, tau = 1 clean, d the step size.
    """
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
        self.norm = nn.Parameter(torch.ones(C))
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
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        for layer in self.layers:
            layer.attn.out.weight.data /= math.sqrt(2 * c['layers'])
            layer.mlp.down.weight.data /= math.sqrt(2 * c['layers'])
        nn.init.zeros_(self.head.weight)

    def forward(self, z, tau, d, a, a_mask, alone=None, rings=None, start=0, commit=False):
        """z (B, T, N, D) noised latents, tau and d (B, T), a (B, T, A), a_mask (B, T) bool -> z_hat (B, T, N, D).

        alone (B,) bool: clips whose frames do not see each other (separate images). rings: the cache that new_rings
        makes, start: the index of the first frame of this call. commit=True only fills the rings and returns None.
        """
        c = self.config
        B, T, N, D = z.shape
        assert (N, D) == (c['grid'][0] * c['grid'][1], c['dim']) and a.shape == (B, T, c['action_dim']), \
            f'latents {tuple(z.shape)} and actions {tuple(a.shape)} do not fit {c}'
        tau_i = (tau * c['k_max']).round().long().clamp(0, c['k_max'] - 1)      # tau = 1 reads as the cleanest level
        d_i = (-torch.log2(d)).round().long()
        shortcut = torch.cat((self.tau_embed(tau_i), self.d_embed(d_i)), dim=-1)          # (B, T, C)
        action = self.a_base.expand(B, T, -1)
        if c['action_dim']:
            action = action + torch.where(a_mask[..., None], self.a_in(torch.where(a_mask[..., None], a, 0.0)), 0.0)
        latents = self.z_in(z)                                                            # (B, T, N, C)
        if c['action_on'] == 'all':     # one action token alone is all but ignored: it takes ~10x longer to be used
            latents = latents + action[:, :, None]
        x = torch.cat((self.registers.expand(B, T, -1, -1), latents, shortcut[:, :, None], action[:, :, None]),
                      dim=2).float()                                                      # (B, T, S, C), float32
        S = x.shape[2]
        t = torch.arange(start, start + T, device=z.device)
        angles = (t[:, None] * self.time_freq)[:, None]                                   # (T, 1, d/2)
        time = angles.cos(), angles.sin()
        space = self.space_cos, self.space_sin
        ago = t[:, None] - t
        mask = ((ago >= 0) & (ago < c['context']))[None, None] if T > 1 else None         # (1, 1, T, T)
        if alone is not None and T > 1:
            mask = mask & (~alone.repeat_interleave(S)[:, None, None, None] | (ago == 0))
        for i, layer in enumerate(self.layers):
            ring = rings[i] if rings is not None and layer.time else None
            x = layer(x, time, mask, ring, start) if layer.time else layer(x, space, None, None, 0)
            if commit and i == self.last_time:      # nothing above can reach a later frame
                return None
        with torch.autocast(z.device.type, enabled=False):
            return self.head(rms_norm(x[:, :, c['registers']:-2], self.norm))

    def new_rings(self, B, dtype=torch.float32):
        """An empty cache for B clips: per time layer the keys and values of the last `context` frames."""
        c = self.config
        shape = (B * (c['registers'] + c['grid'][0] * c['grid'][1] + 2), c['kv_heads'], c['context'],
                 c['width'] // c['heads'])
        return [tuple(torch.empty(shape, dtype=dtype, device=self.norm.device) for _ in 'kv') if layer.time else None
                for layer in self.layers]


# --------------------------------------------------------------------------------------------------------------------
# shortcut forcing


def sample_flow(B, T, k_max, schedule, device):
    """Signal levels tau (B, T) of flow rows, on the grid 0, 1/k_max, .., 1 - 1/k_max.

    'uniform': every frame on its own (eq. 4). 'shift': half of the frames are pure noise, and in 70 % of the rows
    the frames before a random one are nearly clean (tau >= 7/8), which is how sampling sees them. Neighbouring
    patches repeat each other, so the state can be read off a frame at any tau well above 0: only tau near 0 teaches
    dynamics.
    """
    tau = torch.rand(B, T, device=device)
    if schedule == 'shift':
        tau = torch.where(torch.rand(B, T, device=device) < 0.5, 0.0, tau)
        tau = torch.where(clean_past(B, T, device), 1 - torch.rand(B, T, device=device) / 8, tau)
    return ((tau * k_max).floor() / k_max).clamp(max=1 - 1 / k_max)


def clean_past(B, T, device):
    # (B, T) bool: in 70 % of the rows the frames before a random one
    first = 1 + (torch.rand(B, 1, device=device) * (T - 1)).floor()
    return (torch.rand(B, 1, device=device) < 0.7) & (torch.arange(T, device=device) < first)


def shortcut_loss(model, z, a, a_mask, z_mask, objective='shortcut', k_max=0, bootstrap=0.25, p_image=0.3, p_null=0.1,
                  tau_schedule='shift', rms=None):
    """Loss and metrics (0-d tensors on the device, so that nobody waits for them) of one batch of clips.

    z (B, T, N, D) clean normalised latents, a (B, T, A), a_mask and z_mask (B, T) bool (action known, frame real).
    objective 'shortcut': eq. 7 of arXiv:2509.24527 in x-space, a share `bootstrap` of the rows with d > d_min, the
    others with d = d_min = 1 / k_max (0 = the model's). 'diffusion': d_min alone. 'direct': one deterministic step
    from the clean past, z_hat[t] = f(z[t-1], a[t]). p_image: share of clips whose frames are seen as separate images,
    p_null: share of clips with their actions hidden. rms (2,): running mean squares of the two terms, each of
    which is divided by its root; None = no division.
    """
    B, T, N, D = z.shape
    device = z.device
    k_max = k_max or model.config['k_max']
    a_mask = a_mask & ~(torch.rand(B, 1, device=device) < p_null)
    scale = torch.ones(2, device=device) if rms is None else rms.clamp(min=1e-12).sqrt()
    # Divided by its own RMS alone, a bootstrap term that falls gains weight without end, and weights that merely agree
    # with themselves make it fall to 0: training then leaves the data (seen). So it never weighs more than the flow.
    scale = torch.stack((scale[0], scale.max()))
    if objective == 'direct':
        past = torch.cat((torch.zeros_like(z[:, :1]), z[:, :-1]), dim=1)
        tau, d = past_labels(B, T, device)
        error = (model(past, tau, d, a, a_mask) - z).square().mean(dim=(2, 3))            # (B, T)
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
            u = torch.where(torch.rand(n, T, device=device) < 0.5, 0.0, u)
            past = clean_past(n, T, device)     # the cleanest level that a bootstrap row can have
            e, u = torch.where(past, 1, e), torch.where(past, 1 - 1 / k_max, u)
        d[:n] = 2.0 ** e / k_max
        tau[:n] = (u / d[:n]).floor() * d[:n]
    noise = torch.randn_like(z)
    level = tau[..., None, None]
    z_tau = (1 - level) * noise + level * z                                               # eq. 6
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
    metrics = {'flow': flow.detach()} | ({'bootstrap': boot.detach()} if n else {})
    return flow / scale[0] + boot / scale[1], metrics


def past_labels(B, T, device):
    # 'direct' feeds frame t-1 in the place of frame t: clean everywhere but before the first frame, always one step
    tau = torch.ones(B, T, device=device)
    tau[:, 0] = 0
    return tau, torch.ones(B, T, device=device)


@torch.no_grad()
def rollout(model, z_ctx, a, a_mask, K=4, tau_ctx=0.9, seed=0, cache=True):
    """Imagines the frames after z_ctx (B, Tc, N, D), one after the other, each in K steps -> (B M, T - Tc, N, D).

    a (B M, T, A) and a_mask (B M, T) cover context and future. With M > 1 each context has M candidates in a row,
    which share its actions, its computation and their noise. The past is seen at noise level tau_ctx (on the grid of
    k_max) and labelled so. Each frame costs K passes over one frame and a part of one that commits it to the rings;
    cache=False computes the same from scratch each time (the reference). Noise depends on seed, context and frame
    alone. Euler steps z <- z + d (z_hat - z) / (1 - tau): the last one returns z_hat.
    """
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
        past = torch.cat((torch.zeros_like(z_ctx[:, :1]), z_ctx[:, :-1]), dim=1)
        tau, d = past_labels(B, Tc, device)
    else:
        level = round(tau_ctx * c['k_max']) / c['k_max']
        past = level * z_ctx + (1 - level) * torch.cat([noise()[1] for _ in range(Tc)], dim=1)
        tau, d = torch.full((B, Tc), level, device=device), torch.full((B, Tc), 1 / c['k_max'], device=device)
    if cache:
        rings = model.new_rings(B, torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type)
                                else z_ctx.dtype)
        model(past, tau, d, a[::M, :Tc], a_mask[::M, :Tc], rings=rings, commit=True)
        rings = [ring and tuple(share(r, B, M) for r in ring) for ring in rings]
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
            start_noise, eps = (n.repeat_interleave(M, dim=0) for n in noise())
            z = start_noise
            for k in range(K):
                z_hat = frame(z, k / K, 1 / K if c['objective'] == 'shortcut' else 1 / c['k_max'], t)
                z = z + (z_hat - z) / (K - k)                   # d / (1 - tau) = 1 / (K - k)
            if t < T - 1:
                frame(level * z + (1 - level) * eps, level, 1 / c['k_max'], t, commit=True)
        out.append(z)
    return torch.cat(out, dim=1)


def share(ring, B, M):
    # (B S, ..) -> (B M S, ..): every context's ring for each of its M candidates
    return ring.view(B, 1, -1, *ring.shape[1:]).expand(-1, M, *[-1] * ring.dim()).reshape(-1, *ring.shape[1:])


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


# --------------------------------------------------------------------------------------------------------------------
# latents as pictures; nothing here is needed to train or to plan


class Decoder(nn.Module):
    """Raw latents (B, N, D) -> frames (B, 3, height, width) in [0, 1]: transposed convolutions, twice the side each."""
    def __init__(self, dim, grid, height, width, channels=128):
        super().__init__()
        self.grid, self.side = grid, (height, width)
        self.register_buffer('mean', torch.zeros(dim))
        self.register_buffer('std', torch.ones(dim))
        stages = math.ceil(math.log2(height / grid[0]))
        sides = [max(16, channels >> i) for i in range(stages + 1)]
        self.stem = nn.Conv2d(dim, channels, 3, padding=1)
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 4, 2, 1) for i, o in zip(sides, sides[1:]))
        self.out = nn.Conv2d(sides[-1], 3, 3, padding=1)

    def forward(self, z):
        x = ((z - self.mean) / self.std).transpose(1, 2).unflatten(2, self.grid)          # (B, D, rows, columns)
        x = self.stem(x)
        for up in self.up:
            x = up(F.silu(x))
        x = F.interpolate(x, self.side, mode='bilinear', antialias=True)
        return torch.sigmoid(self.out(F.silu(x)))


def load_decoder(folder, encoder):
    """The Decoder that decode.py has trained in a checkpoint's folder, or None; for the same latents or not at all."""
    path = os.path.join(folder, 'decoder.safetensors')
    if not os.path.isfile(path):
        return None
    tensors = read_tensors(path)
    decoder = Decoder(encoder.dim, encoder.grid, encoder.size, encoder.width, len(tensors.get('stem.bias', '0')))
    for k, v in decoder.state_dict().items():
        if k not in tensors or tensors[k].shape != v.shape:
            sys.exit(f'{path}: {k} is {tuple(tensors[k].shape) if k in tensors else "missing"}, the latents want '
                     f'{tuple(v.shape)}: train it again with decode.py --train=True')
    decoder.load_state_dict(tensors)
    return decoder.to(next(encoder.buffers()).device).eval()


@torch.no_grad()
def pictures(z, encoder, decoder=None):
    """Raw latents (n, N, D) as uint8 frames (n, 3, height, width): through a decoder, the inverse of `pixels`, or
    else the three leading principal components of all z given, as red, green and blue."""
    if decoder is not None or encoder.name == 'pixels':
        x = torch.cat([(decoder or encoder.decode)(part) for part in z.float().split(32)])
    else:
        flat = z.float().flatten(0, 1)
        flat = flat - flat.mean(dim=0)
        colour = flat @ torch.linalg.eigh((flat.T @ flat).double())[1][:, -3:].flip(1).float()
        low, high = (torch.quantile(colour[torch.linspace(0, len(colour) - 1, 50000).long()], q, dim=0)
                     for q in (0.02, 0.98))
        x = ((colour - low) / (high - low)).clamp(0, 1).view(*z.shape[:2], 3).transpose(1, 2)
        x = F.interpolate(x.unflatten(2, encoder.grid), (encoder.size, encoder.width))
    return (x * 255).round().to(torch.uint8).cpu()
