"""Export a trained workdir for TensorFlow Serving, or for ONNX Runtime or OpenVINO.

  python run_export.py --workdir=runs/digits --out=models/digits --sampler=ddim --num_steps=50

writes models/digits/1/, a SavedModel with the moving average of the weights and the sampler, and beside models/digits what
a model server is started with. The next export is version 2; nothing is written over. Sampling settings that are not given
come from the workdir.
"""

import ddpm_tf.interrupt  # noqa: F401, I001 - first: it answers Ctrl-C during the other imports
from absl import flags

from ddpm_tf import app
from ddpm_tf.errors import InputError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder written by run_train.py.")
_OUT = flags.DEFINE_string("out", None, "Folder of the model, MODELS/NAME; missing parents are made.")
_VERSION = flags.DEFINE_integer("version", None, "Version to write; default: the newest one's successor.")
_FORMAT = flags.DEFINE_string("format", "saved_model", "saved_model, onnx or openvino.")
_MAX_BATCH = flags.DEFINE_integer("max_batch", 16, "Most images of one request, and the server's largest batch.")
_BPD_STEPS = flags.DEFINE_integer(
    "bpd_steps", None, "Timesteps that bits_per_dim visits, 1..T; default: as many as the sampler's."
)
_LICENSE = flags.DEFINE_string("license", "", "License of the weights, for the model card.")
_EMA = flags.DEFINE_bool("ema", True, "Export the moving average of the weights (--noema: the weights).")
_SETTINGS = app.define_sampling_flags(without=("num_images", "batch_size", "seed", "labels", "guidance"))
_CLASSIFIER = app.define_classifier_flags(scale=False)


def main(_: list[str]) -> None:
    from ddpm_tf import experiment  # it takes seconds, and the flags are read before

    if not _WORKDIR.value:
        raise InputError("--workdir is missing; give a folder written by run_train.py.")
    if not _OUT.value:
        raise InputError("--out is missing; say where to write, for example --out=models/digits.")
    report = experiment.export(
        _WORKDIR.value,
        _OUT.value,
        format=_FORMAT.value,
        version=_VERSION.value,
        max_batch=_MAX_BATCH.value,
        bpd_steps=_BPD_STEPS.value,
        license=_LICENSE.value,
        ema=_EMA.value,
        settings=_SETTINGS(),
        **_CLASSIFIER(),
    )
    print(report)


if __name__ == "__main__":
    app.run(main)
