"""What a run begins from: its newest checkpoint, another run's weights, or nothing; and whether it is still the same run."""

import json
import os
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ddpm_tf import builders, files, text
from ddpm_tf import config as config_lib
from ddpm_tf.data.manifest import Manifest, difference
from ddpm_tf.data.sources import without_path
from ddpm_tf.errors import InputError
from ddpm_tf.experiment.run import Run, StartOptions, read_run_config
from ddpm_tf.storage import checkpoints
from ddpm_tf.storage import workdir as workdir_lib
from ddpm_tf.storage.bundles import assign
from ddpm_tf.storage.fingerprint import changes
from ddpm_tf.training.model import DiffusionModel

# What a run that was killed in its first moments may have left.
_BEFORE_CONFIG = {".lock", "ckpt", "samples", "data.json", "data.json.tmp"}


class InitialWeights(NamedTuple):
    """The newest checkpoint of the workdir that --init_from names."""

    step: int
    tensors: dict[str, np.ndarray]


def check_workdir(config: ConfigDict, workdir: str, *, restart: bool = False) -> None:
    """Refuse a folder of something else, and a run whose fixed fields differ.

    Args:
        restart: what the folder holds is going to be moved away.

    Raises:
        InputError
    """
    if os.path.exists(workdir) and not os.path.isdir(workdir):
        raise InputError(f"--workdir={workdir} is a file; expected a folder.")
    if os.path.exists(workdir_lib.config_path(workdir)):
        if not restart:
            check_same_run(read_run_config(workdir), config, f"--workdir={workdir}")
        return
    if checkpoints.list_steps(workdir_lib.checkpoints_folder(workdir)) and not restart:
        raise InputError(f"--workdir={workdir} has checkpoints but no config.json; restore it or use another workdir.")
    names = sorted(set(os.listdir(workdir)) - _BEFORE_CONFIG) if os.path.isdir(workdir) else []
    if restart and any(name.startswith("old-") for name in names):  # a restart that was stopped while it moved things
        return
    foreign = [name for name in names if not name.startswith((".tmp-", "config.json", "old-"))]
    if foreign:
        raise InputError(
            f"--workdir={workdir} holds {foreign[0]!r} and no config.json: it is no workdir of this program, and nothing "
            "is written over. Use a new or an empty folder."
        )


def check_same_run(old: ConfigDict, new: ConfigDict, origin: str) -> None:
    """Refuse fixed fields that differ, with a table; `origin` says where the old config stands.

    The path of the data may differ: `check_data` compares their contents.
    """
    differing = [(field, a, b) for field, a, b in config_lib.differences(old, new) if not field.free]
    changed = [(field.path, repr(a), repr(b)) for field, a, b in differing if not _is_moved(field.path, a, b)]
    if changed:
        table = text.table(changed, header=("field", "workdir", "now"), right=[1, 2]).replace("\n", "\n  ")
        raise InputError(
            f"{origin} was made with another config; these fields cannot change when a run is resumed:\n  {table}\n"
            "Use another workdir, or the workdir's values."
        )


def _is_moved(path: str, old: object, new: object) -> bool:
    return path == "data.source" and without_path(str(old)) == without_path(str(new))


def older_values(config: ConfigDict, workdir: str) -> list[config_lib.Field]:
    """The fixed fields in which a workdir of an older version keeps what their absence meant there.

    Without them, the command that began the run would be refused as soon as a new field's default is another.
    """
    if not os.path.exists(workdir_lib.config_path(workdir)):
        return []
    old = read_run_config(workdir)
    return [
        field
        for field, a, b in config_lib.differences(old, config)
        if not field.free and field.before == a and field.default == b
    ]


def restore(run: Run, model: DiffusionModel, initial: InitialWeights | None = None) -> int:
    """Give the model the state that the run continues from; returns the completed steps, 0 for a new run.

    Args:
        initial: from `load_initial`, what a new run begins with.

    Raises:
        InputError: tensors or a config that do not fit, and what the options refuse.
        NoValidCheckpointError: checkpoints of which none verifies.
        StorageError: no room for a checkpoint.
    """
    folder, variables = run.checkpoints_folder, model.state()
    files.sweep(folder)
    checkpoints.check_space(folder, {name: v.numpy() for name, v in variables.items()})
    latest = checkpoints.restore_latest(folder, quarantine=True)
    if latest is None:
        if initial is not None:
            _begin_from(model, initial, run.options)
        return 0
    step, tensors = latest
    meta, origin = checkpoints.read_meta(folder, step), f"The checkpoint of step {step} in {run.workdir}"
    old = workdir_lib.check_meta(meta, origin)
    if old is not None:
        check_same_run(builders.without_foreign_settings(old, origin), run.config, origin)
    _check_exact(_path_free(meta.get("fingerprint"), old), run.fingerprint, step, run.options)
    assign(variables, _with_ema(tensors, run.options, origin), origin)
    if model.skipped.in_a_row.numpy() >= model.max_skipped_steps:  # the limit was lowered
        model.skipped.in_a_row.assign(0)
    if run.options.init_from:
        logging.info("--init_from is not used: %s has reached step %d already.", run.workdir, step)
    logging.info("Resuming %s after step %d.", run.workdir, step)
    return step


def load_initial(workdir: str, options: StartOptions) -> InitialWeights | None:
    """What a new run begins with, where --init_from names a workdir; else None."""
    steps = checkpoints.list_steps(workdir_lib.checkpoints_folder(workdir))
    is_new = options.restart_from_scratch or not steps
    return InitialWeights(*workdir_lib.read_newest(options.init_from)) if options.init_from and is_new else None


def check_data(data: Manifest, workdir: str, options: StartOptions, *, source: str = "") -> None:
    """Compare the data set with the one that the run began with.

    Args:
        source: data.source as it is now; "": as before.

    Raises:
        InputError: another data set, with the counts and the first file that differs.
    """
    path = workdir_lib.data_path(workdir)
    old_source = _old_source(workdir, source)
    moved = f"data.source is {source}, and was {old_source}. " if source != old_source else ""
    if not os.path.exists(path):
        if moved and not options.allow_data_change:
            raise InputError(
                f"{moved}Whether these are the same images cannot be said: {path} is missing. Use the old path, or go on with "
                "these by --allow_data_change."
            )
        return
    try:
        with open(path, encoding="utf-8") as f:
            changed = difference(json.load(f), data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise InputError(f"{path} cannot be read ({e}). Restore it, or remove it to take the data as they are.") from e
    if changed is None:
        if moved:
            logging.info("%sThe images are the same: resuming with them.", moved)
        return
    if not options.allow_data_change:
        raise InputError(
            f"{moved}The data set is not the one that --workdir={workdir} began with: {changed}. Restore the data, use another "
            "workdir, or go on with these by --allow_data_change."
        )
    logging.warning("Resuming with another data set: %s. The run is not bit-exact any more.", changed)


def _old_source(workdir: str, source: str) -> str:
    """data.source of the workdir's config.json; `source` if there is none."""
    if not source or not os.path.exists(workdir_lib.config_path(workdir)):
        return source
    return read_run_config(workdir).data.source


def move_away(workdir: str) -> None:
    """Move everything in a workdir but its lock to old-TIME/ in it."""
    names = [n for n in os.listdir(workdir) if n != ".lock" and not n.startswith("old-")]
    if not names:
        return
    old = os.path.join(workdir, time.strftime("old-%Y%m%d-%H%M%S"))
    while os.path.exists(old):
        old += "x"
    os.mkdir(old)
    for name in sorted(names, key=lambda name: name == "config.json"):  # last: until then it is a workdir
        os.rename(os.path.join(workdir, name), os.path.join(old, name))
    for folder in (workdir_lib.checkpoints_folder(workdir), workdir_lib.samples_folder(workdir)):
        os.mkdir(folder)
    logging.info("What %s held is in %s now.", workdir, old)


def _begin_from(model: DiffusionModel, initial: InitialWeights, options: StartOptions) -> None:
    """Weights and moving average of another run, at step 0."""
    origin = f"The checkpoint of step {initial.step} of --init_from={options.init_from}"
    tensors, groups = _with_ema(initial.tensors, options, origin), ("network/", "ema/")
    variables = {n: v for n, v in model.state().items() if n.startswith(groups)}
    wanted = {n: t for n, t in tensors.items() if n.startswith(groups)}
    assign(variables, wanted, f"--init_from={options.init_from}")
    logging.info("Beginning at step 0 with the weights of step %d of %s.", initial.step, options.init_from)


def _with_ema(tensors: Mapping[str, np.ndarray], options: StartOptions, origin: str) -> dict[str, np.ndarray]:
    if any(name.startswith("ema/") for name in tensors):
        return dict(tensors)
    if not options.ema_from_weights:
        raise InputError(
            f"{origin} has no moving average of the weights (ema/*). --ema_from_weights begins it with the weights."
        )
    logging.warning("%s has no moving average; it begins with the weights.", origin)
    average = {f"ema/{n.removeprefix('network/')}": t for n, t in tensors.items() if n.startswith("network/")}
    return dict(tensors) | average


def _path_free(fingerprint: dict | None, config: ConfigDict | None) -> dict | None:
    """A checkpoint's fingerprint as it is made now. Before, the config's digest held the path of the data."""
    unused = builders.unused_settings(config) if config else {}
    if fingerprint and config and fingerprint.get("config") == config_lib.digest(config, unused=unused):
        return {**fingerprint, "config": builders.run_digest(config)}
    return fingerprint


def _check_exact(old: dict | None, new: dict, step: int, options: StartOptions) -> None:
    """Log what keeps the resumed run from being bit-exact; under --require_exact it is an error."""
    changed = changes(old, new) if old else ["it was not made by training, and holds no fingerprint"]
    if not changed:
        return
    if options.require_exact:
        raise InputError(
            f"--require_exact: the run would not be bit-exact any more after step {step}:\n  " + "\n  ".join(changed)
        )
    logging.warning("After step %d the run is not bit-exact any more: %s.", step, "; ".join(changed))
