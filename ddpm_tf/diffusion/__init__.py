"""The maths of diffusion models: numpy tables and TensorFlow formulas; knows no network and no config."""
