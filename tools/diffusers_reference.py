"""Make a small UNet2DModel with diffusers itself, and its output on a fixed input: the fixture of tests/convert.

python tools/diffusers_reference.py tests/data/diffusers_small      (needs torch and diffusers)
"""

import sys

import numpy as np
import torch
from diffusers import UNet2DModel

# google/ddpm-church-256 has 6 levels of 128 to 512 channels with attention at the fifth; this is its shape, smaller.
SMALL = {
    "sample_size": 8,
    "block_out_channels": [32, 32],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
CHURCH = {
    "sample_size": 64,
    "block_out_channels": [32, 32, 64, 64, 128, 128],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}


def make(shape):
    """A randomly initialised network of the google/ddpm-* kind, with every weight away from its initial value."""
    torch.manual_seed(0)
    model = UNet2DModel(
        **shape,
        in_channels=3,
        out_channels=3,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def run(model, x_t, t):
    """x_t: float32 [B, H, W, C] numpy -> the output, likewise."""
    with torch.no_grad():
        out = model(torch.from_numpy(x_t.transpose(0, 3, 1, 2).copy()), torch.from_numpy(t)).sample
    return out.numpy().transpose(0, 2, 3, 1)


def inputs(size, batch=2):
    r = np.random.Generator(np.random.PCG64(0))
    return r.standard_normal((batch, size, size, 3)).astype(np.float32), np.array([3, 700])[:batch]


if __name__ == "__main__":
    model = make(SMALL)
    model.save_pretrained(sys.argv[1])
    x_t, t = inputs(8)
    np.savez(f"{sys.argv[1]}/output.npz", x_t=x_t, t=t, output=run(model, x_t, t))
