"""Keras networks; they know images, timesteps and labels, and nothing of diffusion."""

from ddpm_tf.choices import Choice
from ddpm_tf.networks.unet import UNet

__all__ = ["NETWORKS", "UNet"]

NETWORKS = {
    "unet": Choice(
        UNet,
        (
            "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "dropout", "resamp_with_conv", "block_size", "remat",
            "theta", "num_groups",
        ),
    )
}  # fmt: skip
