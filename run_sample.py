"""Sample images from a trained workdir: per-image PNGs, a grid, and samples.npz (uint8).

  python run_sample.py --workdir=runs/digits --sampler=ddim --num_steps=50 --num_images=64 --seed=0

Image k has the seed --seed + k, and a seed is the same image in any batch. Settings that are not given come from the
workdir.
"""

from absl import flags

from ddpm_tf import app, experiment
from ddpm_tf.errors import InputError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder written by run_train.py.")
_SAMPLER = flags.DEFINE_string("sampler", None, "ddpm (ancestral) or ddim.")
_NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Sampling steps S, 1..T.")
_ETA = flags.DEFINE_float("eta", None, "DDIM's noise, 0 (deterministic) to 1.")
_SPACING = flags.DEFINE_string("spacing", None, "Visited timesteps: uniform, quad, linspace or trailing.")
_CLIP = flags.DEFINE_bool("clip", None, "Clip the predicted x_0 to [-1, 1].")
_NUM_IMAGES = flags.DEFINE_integer("num_images", None, "How many images.")
_SEED = flags.DEFINE_integer("seed", None, "Seed of the first image.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Images sampled at once.")
_EMA = flags.DEFINE_bool("ema", True, "Sample with the moving average of the weights (--noema: the weights).")
_OUT = flags.DEFINE_string("out", None, "A new or empty folder; default: one under the workdir's samples/.")


def main(_):
    if not _WORKDIR.value:
        raise InputError("--workdir is missing; give a folder written by run_train.py.")
    out = experiment.sample_images(
        _WORKDIR.value,
        out=_OUT.value,
        ema=_EMA.value,
        sampler=_SAMPLER.value,
        num_steps=_NUM_STEPS.value,
        eta=_ETA.value,
        spacing=_SPACING.value,
        clip=_CLIP.value,
        num_images=_NUM_IMAGES.value,
        seed=_SEED.value,
        batch_size=_BATCH_SIZE.value,
    )
    print(f"Pictures: {out}")


if __name__ == "__main__":
    app.run(main)
