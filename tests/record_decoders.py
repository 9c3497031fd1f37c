"""Record what public code answers, for test_decode.py to hold LPIPS and RAE's decoder to: decoders.safetensors.

Needs an environment of its own (the tests only need the file):

    pip install torch==2.13.0 transformers diffusers safetensors numpy scipy tqdm
    pip install lpips --no-deps                                 # its torchvision is not needed here
    git clone https://github.com/bytetriper/RAE
    python tests/record_decoders.py --rae=RAE

Weights are made up from the names of their keys, as in record_encoders.py.
"""
import json
import os
import sys
import types

import torch

from record_encoders import NoTorchvision, made_up

SHAPE = dict(hidden_size=24, decoder_hidden_size=64, decoder_num_hidden_layers=2, decoder_num_attention_heads=16,
             decoder_intermediate_size=96, patch_size=16, num_channels=3, qkv_bias=True,
             layer_norm_eps=1e-12, hidden_act='gelu', hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
STEP = 7        # every seventh row and column of pictures is kept


def vgg16(pretrained):
    """torchvision's features."""
    layers = []
    before = 3
    for width in 64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0:
        if width:
            layers += [torch.nn.Conv2d(before, width, 3, padding=1), torch.nn.ReLU()]
            before = width
        else:
            layers.append(torch.nn.MaxPool2d(2, 2))
    return types.SimpleNamespace(features=torch.nn.Sequential(*layers))


def main(folder):
    import transformers
    sys.path.insert(0, os.path.join(folder, 'src'))
    # of its package only this module is wanted; newer versions of transformers keep less in places that it asks
    package = types.ModuleType('stage1')
    package.__path__ = [os.path.join(folder, 'src', 'stage1')]
    sys.modules['stage1'] = package
    from stage1.decoders.decoder import GeneralDecoder
    from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder
    tensors, about = {}, {}
    config = transformers.ViTMAEConfig(image_size=4 * 16, **SHAPE)
    # diffusers stretches its positions to 16 x 16 tokens, however many there are
    decoders = {'rae': (4, GeneralDecoder(config, num_patches=4 ** 2)),
                'rae_diffusers': (16, RAEDecoder(image_size=16 * 16, num_patches=16 ** 2, **SHAPE))}
    for case, (known, decoder) in decoders.items():
        shapes = {k: list(v.shape) for k, v in decoder.state_dict().items() if k != 'decoder_pos_embed'}
        decoder.load_state_dict({k: made_up('rae', k, v) for k, v in shapes.items()}, strict=False)
        for rows in (known, 6):     # 6: resized to what it knows
            with torch.no_grad():
                x = decoder.unpatchify(decoder.eval()(made_up('rae', 'latents', (1, rows * rows, 24))).logits)
            tensors[f'{case}/{rows}'] = x[..., ::STEP, ::STEP].contiguous()
            print(case, rows, x.shape, x.std())
        tensors[f'{case}/positions'] = decoder.decoder_pos_embed.detach()[0, ::3].contiguous()
        about[case] = shapes

    sys.meta_path.insert(0, NoTorchvision())
    import torchvision
    torchvision.models = types.SimpleNamespace(vgg16=vgg16)
    import lpips
    net = lpips.LPIPS(net='vgg', pretrained=False, pnet_rand=True).eval()
    slices = torch.nn.ModuleDict({'features': torch.nn.Sequential()})
    for piece in net.net.slice1, net.net.slice2, net.net.slice3, net.net.slice4, net.net.slice5:
        for number, layer in piece.named_children():
            slices['features'].add_module(number, layer)
    state = {f'features.{k}': v for k, v in slices['features'].state_dict().items()}
    heads = {f'lin{i}.model.1.weight': getattr(net, f'lin{i}').model[1].weight for i in range(5)}
    about['lpips'] = {k: list(v.shape) for k, v in (state | heads).items()}
    for k, v in (state | heads).items():
        value = made_up('lpips', k, v.shape)
        v.data.copy_(value.abs() if k in heads else value * 2 ** 0.5)
    pair = [made_up('lpips', name, (2, 3, 48, 64)).sigmoid() for name in ('x', 'y')]
    with torch.no_grad():
        tensors['lpips'] = net(*(2 * x - 1 for x in pair)).flatten()
    print('lpips', tensors['lpips'])
    from safetensors.torch import save_file
    save_file(tensors, os.path.join(os.path.dirname(__file__), 'decoders.safetensors'),
              metadata=dict(shapes=json.dumps(about), torch=torch.__version__))


if __name__ == '__main__':
    if len(sys.argv) != 2 or not sys.argv[1].startswith('--rae='):
        sys.exit(__doc__)
    main(sys.argv[1].removeprefix('--rae='))
