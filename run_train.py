"""Train a diffusion model, or go on with a run.

  python run_train.py --config=configs/digits.py --workdir=runs/digits

Every field of the config can be overridden: --config.data.batch_size=64. Started again on the same workdir, training
goes on from the newest checkpoint that verifies.
Leaves with 0, with 2 for anything wrong before it starts, 65 for data that break in the middle of the run, 69 when another
worker is lost (start all again), 70 when numbers are no longer finite, 73 when the workdir cannot be written to or is in use,
74 when the disk is full or fails, 76 when no checkpoint verifies, and 143 or 130 after SIGTERM or SIGINT, its state saved.
More: docs/training.md, docs/multi_gpu.md.
"""

import ddpm_tf.interrupt  # noqa: F401, I001 - first: it answers Ctrl-C during the other imports
from absl import flags
from ml_collections import config_flags

from ddpm_tf import app
from ddpm_tf.errors import InputError

_CONFIG = config_flags.DEFINE_config_file("config", None, "A config file: configs/*.py.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: config, checkpoints, metrics, samples.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print config, parameters, shapes and memory, and leave; writes nothing."
)
_DOWNLOAD = flags.DEFINE_bool("download", False, "Let TFDS fetch and prepare a data set that is missing.")
# None stands for the default of `experiment.StartOptions`, which takes seconds to import.
_GRACE = flags.DEFINE_float(
    "grace_period_s", None, "After SIGTERM, seconds to finish the step and save it; default: 30."
)
_NAN_POLICY = flags.DEFINE_string(
    "nan_policy", None, "skip (default) or stop. "
    "A step whose loss or gradient is not finite: skip it (up to train.max_skipped_steps in a row), or stop at the first.",
)  # fmt: skip
_INIT_FROM = flags.DEFINE_string(
    "init_from", "", "A workdir whose weights and moving average a new run begins with, at step 0."
)
_RESTART = flags.DEFINE_bool(
    "restart_from_scratch", False, "Move what the workdir holds to old-TIME/ in it, and begin at step 0."
)
_EMA = flags.DEFINE_bool(
    "ema_from_weights", False, "Where a checkpoint has no moving average, begin it with the weights."
)
_DATA = flags.DEFINE_bool("allow_data_change", False, "Go on although the data set is not the one the run began with.")
_STRATEGY = flags.DEFINE_string(
    "strategy", None,
    "default: one device; mirrored: the GPUs of this machine; multi_worker: the workers in TF_CONFIG; auto (if none is given): "
    "what is there.",
)  # fmt: skip
_JOIN = flags.DEFINE_float(
    "join_timeout_s", None, "With several workers, seconds in which they wait for each other; default: 300."
)
_EXACT = flags.DEFINE_bool("require_exact", False, "Refuse to go on where the result would not be bit-exact.")


def main(_: list[str]) -> None:
    from ddpm_tf import experiment  # it takes seconds, and the flags are read before

    if _CONFIG.value is None:
        raise InputError("--config is missing; give a config file, for example --config=configs/digits.py.")
    chosen = {
        "grace_period_s": _GRACE.value,
        "nan_policy": _NAN_POLICY.value,
        "strategy": _STRATEGY.value,
        "join_timeout_s": _JOIN.value,
    }
    options = experiment.StartOptions(
        download=_DOWNLOAD.value,
        init_from=_INIT_FROM.value,
        restart_from_scratch=_RESTART.value,
        ema_from_weights=_EMA.value,
        allow_data_change=_DATA.value,
        require_exact=_EXACT.value,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    options.check()
    if _DRY_RUN.value:
        print(experiment.dry_run(_CONFIG.value, options.strategy))
        return
    if not _WORKDIR.value:
        raise InputError("--workdir is missing; give the folder of the run, for example --workdir=runs/digits.")
    report = experiment.train(_CONFIG.value, _WORKDIR.value, options)
    if report:  # the chief's
        print(report)


if __name__ == "__main__":
    app.run(main)
