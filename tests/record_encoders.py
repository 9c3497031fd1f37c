"""Record what the libraries that people use answer, for test_model.py to hold our ViT to: encoders.safetensors.

Needs an environment of its own (the tests only need the file):

    pip install torch==2.13.0 transformers safetensors numpy pillow
    pip install torch==2.13.0 timm --no-deps                    # timm alone: its torchvision is not needed here
    pip install einops
    git clone https://github.com/facebookresearch/dinov2
    git clone https://github.com/facebookresearch/vjepa2
    python tests/record_encoders.py --dinov2=dinov2 --vjepa2=vjepa2

Weights are made up from the names of their keys (`made_up`), so the file holds key names and shapes but no weights.
"""
import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
import zlib

import numpy as np
import torch

STEP = 5  # every fifth token and channel is kept


def made_up(case, key, shape):
    """One tensor, the same on every machine; scales that keep every weight visible in the output."""
    x = np.random.default_rng(zlib.crc32(f'{case}/{key}'.encode())).standard_normal(shape, dtype=np.float32)
    if len(shape) > 1 and key.endswith('weight'):
        x = x * np.float32(np.prod(shape[1:]) ** -0.5)  # unit variance in, unit variance out
    elif len(shape) == 1:
        scale = key.endswith(('weight', 'lambda1', 'gamma', 'gamma_1', 'gamma_2'))
        x = x * np.float32(0.1) + np.float32(1.0 if scale else 0.0)
    return torch.from_numpy(x)


class Anything(type):
    """timm imports torchvision for parts that are not used here: every name in it is an empty class."""

    def __getattr__(cls, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return Anything(name, (), {})


class NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.split('.')[0] == 'torchvision':
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: Anything(name, (), {})
        return module

    def exec_module(self, module):
        pass


def main(dinov2, vjepa2):
    import transformers
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, DINOv3ViTConfig, DINOv3ViTModel
    from transformers import SiglipConfig, SiglipModel, VJEPA2Config, VJEPA2Model
    sys.meta_path.insert(0, NoTorchvision())
    import timm
    sys.path[:0] = dinov2, vjepa2
    from dinov2.models.vision_transformer import DinoVisionTransformer
    from src.models.vision_transformer import VisionTransformer

    def meta2(width, depth, heads, registers, ffn='mlp'):
        model = DinoVisionTransformer(
            img_size=518, patch_size=14, embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=4, init_values=1.0,
            block_chunks=0, ffn_layer=ffn, num_register_tokens=registers, interpolate_antialias=registers > 0,
            interpolate_offset=0.0 if registers else 0.1)
        return model, lambda x: model.forward_features(x)['x_norm_patchtokens'], 'facebookresearch/dinov2'

    def hf(kind, config, **options):
        model = kind(config(**options))
        return model, lambda x: model(x).last_hidden_state[:, 5:], f'transformers {transformers.__version__}'

    def from_timm(name, **options):
        model = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, **options)
        first = 5 if 'dino' in name else 0
        return model, lambda x: model.forward_features(x)[:, first:], f'timm {timm.__version__}'

    def class_token(model, _, made_with):
        if made_with == 'facebookresearch/dinov2':
            return model, lambda x: model.forward_features(x)['x_norm_clstoken'][:, None], made_with
        return model, lambda x: model(x).last_hidden_state[:, :1], made_with

    def vjepa2_hf(width, depth, heads, hidden):
        model = VJEPA2Model(VJEPA2Config(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, mlp_ratio=hidden / width,
            pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=1))
        run = lambda x: model(x[:, None], skip_predictor=True).last_hidden_state    # it doubles the frame itself
        return model, run, f'transformers {transformers.__version__}'

    def vjepa2_meta(width, depth, heads, hidden):
        norm = lambda width: torch.nn.LayerNorm(width, eps=1e-6)
        model = VisionTransformer(
            img_size=256, patch_size=16, num_frames=64, tubelet_size=2, embed_dim=width, depth=depth, num_heads=heads,
            mlp_ratio=hidden / width, norm_layer=norm, use_sdpa=False, use_rope=True)
        return model, lambda x: model(x[:, :, None].repeat(1, 1, 2, 1, 1)), 'facebookresearch/vjepa2'

    def siglip2_hf(width, depth, heads, hidden, patch, side):
        layers = dict(num_hidden_layers=depth, num_attention_heads=heads)
        model = SiglipModel(SiglipConfig(
            text_config=dict(hidden_size=24, intermediate_size=24, vocab_size=24, bos_token_id=1, eos_token_id=2, **layers),
            vision_config=dict(hidden_size=width, intermediate_size=hidden, patch_size=patch, image_size=side, **layers)))
        run = lambda x: model.vision_model(x, interpolate_pos_encoding=True).last_hidden_state
        return model, run, f'transformers {transformers.__version__}'

    hf2 = lambda **options: hf(Dinov2WithRegistersModel, Dinov2WithRegistersConfig, image_size=518, patch_size=14,
                               **options)
    hf3 = lambda **options: hf(DINOv3ViTModel, DINOv3ViTConfig, image_size=224, num_register_tokens=4, **options)
    s = dict(hidden_size=384, num_hidden_layers=3, num_attention_heads=6)
    gated = dict(use_gated_mlp=True, hidden_act='silu')
    cases = {  # name: what made it; width, depth, heads, hidden, gated, registers, patch, grid of our ViT
        'dinov2_s_meta': (meta2(384, 12, 6, 0), (384, 12, 6, 1536, False, 0, 14, 37)),
        'dinov2_s_reg_meta': (meta2(384, 3, 6, 4), (384, 3, 6, 1536, False, 4, 14, 37)),
        'dinov2_g_meta': (meta2(96, 2, 2, 0, 'swiglufused'), (96, 2, 2, 256, True, 0, 14, 37)),
        'dinov2_s_reg_hf': (hf2(**s), (384, 3, 6, 1536, False, 4, 14, 37)),
        'dinov2_g_reg_hf': (hf2(hidden_size=96, num_hidden_layers=2, num_attention_heads=2, use_swiglu_ffn=True),
                            (96, 2, 2, 256, True, 4, 14, 37)),
        'dinov2_s_reg_timm': (from_timm('vit_small_patch14_reg4_dinov2', depth=3), (384, 3, 6, 1536, False, 4, 14, 37)),
        'dinov2_g_reg_timm': (from_timm('vit_giant_patch14_reg4_dinov2', depth=2, embed_dim=96, num_heads=2),
                              (96, 2, 2, 256, True, 4, 14, 37)),
        'dinov3_s_hf': (hf3(intermediate_size=1536, **s), (384, 3, 6, 1536, False, 4, 16, 0)),
        'dinov3_splus_hf': (hf3(intermediate_size=1536, **s, **gated), (384, 3, 6, 1536, True, 4, 16, 0)),
        'dinov3_7b_hf': (hf3(hidden_size=256, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
                             query_bias=False, key_bias=False, value_bias=False, **gated),
                         (256, 2, 2, 512, True, 4, 16, 0)),
        'dinov3_s_timm': (from_timm('vit_small_patch16_dinov3', depth=3), (384, 3, 6, 1536, False, 4, 16, 0)),
        'dinov3_splus_timm': (from_timm('vit_small_plus_patch16_dinov3_qkvb', depth=3),
                              (384, 3, 6, 1536, True, 4, 16, 0)),
        'dinov2_meta_cls': (class_token(*meta2(96, 2, 2, 0)), (96, 2, 2, 384, False, 0, 14, 37)),
        'dinov2_reg_meta_cls': (class_token(*meta2(96, 2, 2, 4)), (96, 2, 2, 384, False, 4, 14, 37)),
        'dinov3_hf_cls': (class_token(*hf3(hidden_size=96, num_hidden_layers=2, num_attention_heads=2,
                                           intermediate_size=384)), (96, 2, 2, 384, False, 4, 16, 0)),
        'vjepa2_l_hf': (vjepa2_hf(128, 2, 2, 512), (128, 2, 2, 512, False, 0, 16, 16, 'vjepa2')),
        'vjepa2_h_hf': (vjepa2_hf(160, 2, 2, 640), (160, 2, 2, 640, False, 0, 16, 16, 'vjepa2')),
        'vjepa2_l_meta': (vjepa2_meta(128, 2, 2, 512), (128, 2, 2, 512, False, 0, 16, 16, 'vjepa2')),
        'vjepa2_h_meta': (vjepa2_meta(160, 2, 2, 640), (160, 2, 2, 640, False, 0, 16, 16, 'vjepa2')),
        'siglip2_hf': (siglip2_hf(144, 2, 2, 210, 16, 224), (144, 2, 2, 210, False, 0, 16, 14, 'siglip2')),
        'siglip2_timm': (from_timm('vit_so400m_patch16_siglip_256', depth=2, embed_dim=144, num_heads=2, mlp_ratio=1.5),
                         (144, 2, 2, 216, False, 0, 16, 16, 'siglip2')),
    }
    # Hugging Face's V-JEPA 2 takes rows and columns from its configuration; timm resizes positions in a way of its own
    square = dict.fromkeys(('vjepa2_l_hf', 'vjepa2_h_hf', 'siglip2_timm'), [[256, 256]])
    tensors, about = {}, {}
    for case, ((model, run, made_with), arguments) in cases.items():
        shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
        model.load_state_dict({k: made_up(case, k, v) for k, v in shapes.items()})
        patch = arguments[6]
        sizes = [[16 * patch, 16 * patch], [11 * patch, 16 * patch]] if patch == 14 else [[224, 224], [160, 224]]
        sizes = square.get(case, sizes)
        for H, W in sizes:
            with torch.no_grad():
                z = run_eval(model, run, made_up(case, f'{H}x{W}', (1, 3, H, W)))
            tensors[f'{case}/{H}x{W}'] = z[0, ::STEP, ::STEP].contiguous()
            print(f'{case:20} {H}x{W} tokens {tuple(z.shape)} rms {z.square().mean().sqrt():.3f}')
        about[case] = dict(made_with=made_with, arguments=arguments, sizes=sizes, shapes=shapes)

    # Files on disk keep older key names than the models in memory: record those of the library's own writer too.
    import tempfile
    from safetensors import safe_open
    from safetensors.torch import save_file
    for case in [c for c in cases if c.endswith('_hf')]:
        with tempfile.TemporaryDirectory() as folder:
            cases[case][0][0].save_pretrained(folder)
            with safe_open(os.path.join(folder, 'model.safetensors'), 'pt') as f:
                in_file = {k: f.get_tensor(k) for k in f.keys()}
        in_memory = {zlib.crc32(v.numpy().tobytes()): k for k, v in cases[case][0][0].state_dict().items()}
        about[case]['file'] = {k: [in_memory.get(zlib.crc32(v.numpy().tobytes())), list(v.shape)]
                               for k, v in in_file.items()}
        assert set(in_memory.values()) >= {k for k, _ in about[case]['file'].values() if k}
    save_file(tensors, os.path.join(os.path.dirname(__file__), 'encoders.safetensors'),
              metadata=dict(cases=json.dumps(about), torch=torch.__version__))


def run_eval(model, run, x):
    model.eval()
    return run(x)


if __name__ == '__main__':
    if len(sys.argv) != 3 or not sys.argv[1].startswith('--dinov2=') or not sys.argv[2].startswith('--vjepa2='):
        sys.exit(__doc__)
    main(sys.argv[1].removeprefix('--dinov2='), sys.argv[2].removeprefix('--vjepa2='))
