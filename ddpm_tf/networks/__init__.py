"""Keras networks; they know images, timesteps and labels, and nothing of diffusion."""

from ddpm_tf.networks.unet import UNet

__all__ = ["UNet"]
