"""Train a diffusion model, or go on with a run.

  python run_train.py --config=configs/digits.py --workdir=runs/digits

Every field of the config can be overridden: --config.data.batch_size=64. Started again on the same workdir, training
goes on from the newest checkpoint that verifies.
Leaves with 0, with 2 for anything wrong before it starts, 70 when numbers are no longer finite, 73 when the workdir cannot
be written to or is in use, 74 when a checkpoint cannot be written, 76 when no checkpoint verifies, and 143 or 130 after
SIGTERM or SIGINT, its state saved.
"""

from absl import flags
from ml_collections import config_flags

from ddpm_tf import app, experiment
from ddpm_tf.errors import InputError

_CONFIG = config_flags.DEFINE_config_file("config", None, "A config file: configs/*.py.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: config, checkpoints, metrics, samples.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print config, parameters and shapes, and leave; writes nothing.")
_DOWNLOAD = flags.DEFINE_bool("download", False, "Let TFDS fetch and prepare a data set that is missing.")
_GRACE = flags.DEFINE_float("grace_period_s", 30.0, "After SIGTERM, seconds to finish the step and save it.")


def main(_):
    if _CONFIG.value is None:
        raise InputError("--config is missing; give a config file, for example --config=configs/digits.py.")
    if _DRY_RUN.value:
        print(experiment.describe(_CONFIG.value))
        return
    if not _WORKDIR.value:
        raise InputError("--workdir is missing; give the folder of the run, for example --workdir=runs/digits.")
    experiment.train(_CONFIG.value, _WORKDIR.value, download=_DOWNLOAD.value, grace_period_s=_GRACE.value)


if __name__ == "__main__":
    app.run(main)
