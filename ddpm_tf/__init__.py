"""The TensorFlow 2 / Keras 3 reference port of Denoising Diffusion Probabilistic Models (Ho et al. 2020)."""

__version__ = "0.4.0"
