"""Sample images from a trained workdir: images/ (a PNG each), grid.png, and samples.npz (uint8).

  python run_sample.py --workdir=runs/digits --sampler=dpm_solver --num_steps=20 --num_images=64 --seed=0
  python run_sample.py --workdir=runs/digits_cond --labels=0,1,2 --guidance=2.5
  python run_sample.py --workdir=runs/digits --trace=1 --num_images=8 --out=shown

Image k has the seed --seed + k, and a seed is the same image in any batch. A run that was stopped goes on when it is started
again with the same --out and the same settings, and ends with the same files. Editing (--init_image with --strength or --mask)
draws --num_images versions of a picture. --trace, --shared_noise_steps, --interpolate and --encode write pictures of how
sampling works into a new folder --out. More: docs/samplers.md, docs/classes.md.
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
_INIT_IMAGE = flags.DEFINE_string("init_image", "", "A picture to change (--strength) or to fill in (--mask).")
_MASK = flags.DEFINE_string("mask", "", "A picture, white where --init_image is to be filled in (sampler repaint).")
_STRENGTH = flags.DEFINE_float(
    "strength", None, "How much --init_image changes: the share of the steps that are made, above 0 to 1; default: 0.5."
)
_TRACE = flags.DEFINE_integer(
    "trace", 0, "Show x_t and the predicted x_0 after every N-th move, as strips and GIFs; 0: not."
)
_SHARED = flags.DEFINE_integer(
    "shared_noise_steps", -1, "Let all images share x_T and the noise of the first N moves (Fig. 7); -1: not."
)
_INTERPOLATE = flags.DEFINE_string(
    "interpolate", "", "SEED_A,SEED_B: a strip of --num_images images between those of two seeds."
)
_INTERPOLATE_AT = flags.DEFINE_float(
    "interpolate_at", None,
    "Mix after this share of the steps of noise (Fig. 8); default: mix the latents x_T, or 0.5 for a sampler that draws noise.",
)  # fmt: skip
_ENCODE = flags.DEFINE_string("encode", "", "A picture or .npz to turn into latents by ddim and back.")
_SETTINGS = app.define_sampling_flags()
_CLASSIFIER = app.define_classifier_flags()


def main(_: list[str]) -> None:
    from ddpm_tf import experiment  # it takes seconds, and the flags are read before

    if not _WORKDIR.value:
        raise InputError("--workdir is missing; give a folder written by run_train.py.")
    given = {"ema": _EMA.value, "settings": _SETTINGS(), **_CLASSIFIER()}
    edit = experiment.Edit(_INIT_IMAGE.value, _MASK.value, _STRENGTH.value)
    show = experiment.Show(_TRACE.value, _SHARED.value, _INTERPOLATE.value, _INTERPOLATE_AT.value, _ENCODE.value)
    if show.check():
        if not _OUT.value:
            raise InputError("--out is missing; give a new or empty folder for the pictures.")
        if edit != experiment.Edit():
            raise InputError("--init_image, --mask and --strength do not go with pictures of how sampling works.")
        print(experiment.show_pictures(_WORKDIR.value, show, out=_OUT.value, **given))
        return
    with app.leaving_on_signal("stopped. The images that were drawn are kept; the same command draws the others."):
        out = experiment.sample_images(_WORKDIR.value, out=_OUT.value, png=_PNG.value, edit=edit, **given)
    print(f"Pictures: {out}")


if __name__ == "__main__":
    app.run(main)
