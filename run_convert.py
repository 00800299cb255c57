"""Bring weights of other programs into a workdir, or a workdir's weights out.

  python run_convert.py --from=tf1 --checkpoint=PATH/model.ckpt-790000 --config=configs/cifar10.py --workdir=runs/cifar
  python run_convert.py --from=diffusers --checkpoint=FOLDER --workdir=runs/church
  python run_convert.py --to=tf1 --workdir=runs/digits --out=exported/model.ckpt-1200
  python run_convert.py --to=diffusers --workdir=runs/digits --out=exported/digits

tf1 is the original release: weights, moving average, Adam moments and step, so that run_sample.py samples from the
workdir and run_train.py goes on with the run. diffusers is a UNet2DModel folder (config.json and safetensors). Files are
read as data only; pickles, .h5 and .keras are refused.
"""

from absl import flags
from ml_collections import config_flags

from ddpm_tf import app, experiment
from ddpm_tf.errors import InputError

_FORMATS = ("tf1", "diffusers")
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The run's config; tf1 needs it, diffusers takes defaults.", lock_config=True
)
_FROM = flags.DEFINE_enum("from", None, _FORMATS, "Format to read.")
_TO = flags.DEFINE_enum("to", None, _FORMATS, "Format to write.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "What to read: PATH/model.ckpt-N, a folder, or a .safetensors file."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "With --from a new or empty folder, with --to a trained workdir.")
_OUT = flags.DEFINE_string("out", None, "What to write: tf1 a path without suffix, diffusers a new or empty folder.")
_EMA = flags.DEFINE_bool("ema", True, "Give diffusers the moving average of the weights (--noema: the weights).")
_REFERENCE = flags.DEFINE_string("reference", None, "An .npz with x_t, t and output, to check the import with.")


def main(_: list[str]) -> None:
    if bool(_FROM.value) == bool(_TO.value):
        raise InputError("Give either --from or --to: tf1 or diffusers.")
    if not _WORKDIR.value:
        raise InputError("--workdir is missing.")
    if _TO.value:
        if not _OUT.value:
            raise InputError("--out is missing; say where to write.")
        print(experiment.export_weights(_WORKDIR.value, _TO.value, _OUT.value, ema=_EMA.value))
        return
    if not _CHECKPOINT.value:
        raise InputError("--checkpoint is missing; say what to read.")
    if _FROM.value == "diffusers":
        report = experiment.import_diffusers(
            _CHECKPOINT.value, _WORKDIR.value, config=_CONFIG.value, reference=_REFERENCE.value
        )
    elif _CONFIG.value is None:
        raise InputError("--config is missing; give the config of the run, for example --config=configs/cifar10.py.")
    else:
        report = experiment.import_tf1(_CHECKPOINT.value, _CONFIG.value, _WORKDIR.value, reference=_REFERENCE.value)
    print(report)
    if _CONFIG.value is not None:
        path = config_flags.get_config_filename(flags.FLAGS["config"])
        print(f"Train on: python run_train.py --config={path} --workdir={_WORKDIR.value}")


if __name__ == "__main__":
    app.run(main)
