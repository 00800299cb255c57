"""Make small UNet2DModels with diffusers itself, and their output on a fixed input: the fixtures of tests/convert.

python tools/diffusers_reference.py SMALL tests/data/diffusers_small      (needs torch and diffusers)
python tools/diffusers_reference.py COND tests/data/diffusers_cond
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
# With classes. 4 channels to a normalisation group: where a group is one channel, the output does not depend on the label.
COND = {
    "sample_size": 8,
    "block_out_channels": [16, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "num_class_embeds": 5,
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


def run(model, x_t, t, labels=None):
    """x_t: float32 [B, H, W, C] numpy; t and labels int64 [B] -> the output, as x_t."""
    with torch.no_grad():
        out = model(
            torch.from_numpy(x_t.transpose(0, 3, 1, 2).copy()),
            torch.from_numpy(t),
            class_labels=None if labels is None else torch.from_numpy(labels),
        ).sample
    return out.numpy().transpose(0, 2, 3, 1)


def inputs(model):
    """{"x_t", "t", "labels"} that `run` takes: two images, or one for every label; no labels for a model without classes."""
    r = np.random.Generator(np.random.PCG64(0))
    size, rows = model.config.sample_size, model.config.num_class_embeds
    batch = rows or 2
    x_t = r.standard_normal((batch, size, size, 3)).astype(np.float32)
    return {"x_t": x_t, "t": np.resize([3, 700], batch)} | ({"labels": np.arange(rows)} if rows else {})


if __name__ == "__main__":
    model = make(globals()[sys.argv[1]])
    model.save_pretrained(sys.argv[2])
    arrays = inputs(model)
    np.savez(f"{sys.argv[2]}/output.npz", **arrays, output=run(model, **arrays))
