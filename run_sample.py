"""Sample images from a trained workdir: images/ (a PNG each), grid.png, and samples.npz (uint8).

  python run_sample.py --workdir=runs/digits --sampler=ddim --num_steps=50 --num_images=64 --seed=0

Image k has the seed --seed + k, and a seed is the same image in any batch. A run that was stopped goes on when it is started
again with the same --out and the same settings, and ends with the same files.
"""

import ddpm_tf.interrupt  # noqa: F401, I001 - first: it answers Ctrl-C during the other imports
from absl import flags

from ddpm_tf import app
from ddpm_tf.errors import InputError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder written by run_train.py.")
_OUT = flags.DEFINE_string(
    "out", None, "A new or empty folder, or one that a stopped run left; default: one under the workdir's samples/."
)
_PNG = flags.DEFINE_bool("png", True, "Write images/, one PNG per image (--nopng: grid.png and samples.npz alone).")
_EMA = flags.DEFINE_bool("ema", True, "Sample with the moving average of the weights (--noema: the weights).")
_SETTINGS = app.define_sampling_flags()


def main(_: list[str]) -> None:
    from ddpm_tf import experiment  # it takes seconds, and the flags are read before

    if not _WORKDIR.value:
        raise InputError("--workdir is missing; give a folder written by run_train.py.")
    with app.leaving_on_signal("stopped. The images that were drawn are kept; the same command draws the others."):
        out = experiment.sample_images(
            _WORKDIR.value, out=_OUT.value, ema=_EMA.value, png=_PNG.value, settings=_SETTINGS()
        )
    print(f"Pictures: {out}")


if __name__ == "__main__":
    app.run(main)
