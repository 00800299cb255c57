"""Bring weights of other programs into a workdir, or a workdir's weights out.

  python run_convert.py --from=tf1 --checkpoint=PATH/model.ckpt-790000 --config=configs/cifar10.py --workdir=runs/cifar
  python run_convert.py --from=diffusers --checkpoint=FOLDER --workdir=runs/church
  python run_convert.py --to=tf1 --workdir=runs/cifar --out=exported/model.ckpt-800000
  python run_convert.py --to=diffusers --workdir=runs/digits --out=exported/digits

tf1 is the original release: weights, moving average, Adam moments and step, so that run_sample.py samples from the
workdir and run_train.py goes on with the run. diffusers is a UNet2DModel folder (config.json and safetensors) or a
pipeline's folder (unet/ and scheduler/). Its scheduler_config.json says which chain and target the network was trained for;
a --config has to agree with it. Files are read as data only; pickles, .h5 and .keras are refused.
"""

import ddpm_tf.interrupt  # noqa: F401, I001 - first: it answers Ctrl-C during the other imports
import shlex
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from absl import flags
from ml_collections import config_flags

from ddpm_tf import app
from ddpm_tf.errors import InputError, Interrupted
from ddpm_tf.paths import check_local

_FORMATS = ("tf1", "diffusers")
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The run's config; tf1 needs it, diffusers says itself what it can.", lock_config=True
)
_FROM = flags.DEFINE_enum("from", None, _FORMATS, "Format to read.")
_TO = flags.DEFINE_enum("to", None, _FORMATS, "Format to write.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "With --from what to read: PATH/model.ckpt-N, a folder, or a .safetensors file."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "With --from a new or empty folder, with --to a trained workdir.")
_OUT = flags.DEFINE_string(
    "out", None, "With --to what to write: tf1 FOLDER/model.ckpt-N without suffix, diffusers a new or empty folder."
)
_EMA = flags.DEFINE_bool("ema", True, "Give diffusers the moving average of the weights (--noema: the weights).")
_REFERENCE = flags.DEFINE_string(
    "reference",
    None,
    "With --from an .npz with x_t, t, output, and labels if there are classes: says how far the network's output is off.",
)
_ONLY_FROM, _ONLY_TO = ("checkpoint", "config", "reference"), ("out", "ema")


def main(_: list[str]) -> None:
    from ddpm_tf import experiment  # it takes seconds, and the flags are read before

    signal.signal(signal.SIGTERM, _stop)  # an exception, so that what is half-written is removed
    if bool(_FROM.value) == bool(_TO.value):
        given = "both were" if _TO.value else "neither was"
        raise InputError(f"Give either --from or --to, one of {', '.join(_FORMATS)}; {given} given.")
    _refuse_unused(_ONLY_TO if _FROM.value else _ONLY_FROM, "--from" if _FROM.value else "--to")
    if not _WORKDIR.value:
        raise InputError("--workdir is missing; give the folder to make (--from) or the trained folder to read (--to).")
    for flag in (_WORKDIR, _CHECKPOINT, _OUT, _REFERENCE):
        if flag.value is not None:
            check_local(flag.value, f"--{flag.name}")
    if _TO.value:
        if not _OUT.value:
            raise InputError(
                "--out is missing; say where to write: tf1 FOLDER/model.ckpt-1200, diffusers a new or empty folder."
            )
        if _TO.value == "tf1":
            _refuse_unused(("ema",), "--to=tf1, which writes both weights and moving average,")
        print(experiment.export_weights(_WORKDIR.value, _TO.value, _OUT.value, ema=_EMA.value))
        return
    if not _CHECKPOINT.value:
        raise InputError(
            "--checkpoint is missing; say what to read: tf1 PATH/model.ckpt-790000, diffusers a folder with config.json."
        )
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
        command = ["python", "run_train.py", *_config_flags(sys.argv[1:]), f"--workdir={_WORKDIR.value}"]
        print(f"Train on: {shlex.join(command)}")


def _refuse_unused(names: tuple[str, ...], by: str) -> None:
    """Refuse flags that were given and would do nothing."""
    for name in names:
        if flags.FLAGS[name].present:
            given = f"no{name}" if flags.FLAGS[name].value is False else name
            raise InputError(f"--{given} was given, and {by} has no use for it. Leave it out.")


def _config_flags(arguments: list[str]) -> Iterator[str]:
    """The arguments that made the config: --config and every --config.FIELD, with their values."""
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if name.lstrip("-") == "config" or name.lstrip("-").startswith("config."):
            yield argument
            if not equals:
                yield next(rest)


def _stop(number: int, _: FrameType | None) -> None:
    name = signal.Signals(number).name
    raise Interrupted(
        f"{name}: stopped. What was written in part is removed: start again with the same command.", number
    )


if __name__ == "__main__":
    app.run(main)
