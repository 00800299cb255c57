"""What a run begins from: its newest checkpoint, another run's weights, or nothing; and whether it is still the same run."""

import json
import os
import time
from typing import NamedTuple

from absl import logging

from ddpm_tf import config as config_lib
from ddpm_tf.cluster.meeting import JOIN_TIMEOUT_S
from ddpm_tf.data import manifest
from ddpm_tf.data.manifest import difference
from ddpm_tf.errors import InputError
from ddpm_tf.storage import checkpoints
from ddpm_tf.storage.bundles import assign
from ddpm_tf.storage.fingerprint import changes
from ddpm_tf.storage.workdir import check_same, newest

NAN_POLICIES = ("skip", "stop")


class StartOptions(NamedTuple):
    """What holds for one start of a run, and is not part of its config.

    download: let TFDS fetch a data set that is not prepared.
    grace_period_s: after SIGTERM or SIGINT, seconds in which the step is finished and its state saved.
    nan_policy: skip (up to train.max_skipped_steps in a row), or stop at the first step that is not finite.
    init_from: a workdir whose weights and moving average a new run begins with, at step 0; "": none.
    restart_from_scratch: move what the workdir holds to old-TIME/ in it, and begin at step 0.
    ema_from_weights: where a checkpoint has no moving average, begin it with the weights.
    allow_data_change: go on although the data set is not the one the run began with.
    require_exact: refuse to go on where the result would not be bit-exact.
    strategy: auto, default, mirrored or multi_worker, see `make_strategy`.
    join_timeout_s: how long the workers of a run wait for each other at its start.
    """

    download: bool = False
    grace_period_s: float = 30.0
    nan_policy: str = "skip"
    init_from: str = ""
    restart_from_scratch: bool = False
    ema_from_weights: bool = False
    allow_data_change: bool = False
    require_exact: bool = False
    strategy: str = "auto"
    join_timeout_s: float = JOIN_TIMEOUT_S


def restore(model, config, workdir, start, *, fingerprint, initial=None):
    """Give the model what the run goes on from; returns the completed steps, 0 for a new run.

    Args:
        initial: from `load_initial`, what a new run begins with.

    Raises:
        InputError: tensors or a config that do not fit, and what `start` refuses.
        NoValidCheckpointError: checkpoints of which none verifies.
        StorageError: no room for a checkpoint.
    """
    folder = os.path.join(workdir, "ckpt")
    variables = checkpoints.variables_by_name(model)
    checkpoints.sweep(folder)
    checkpoints.check_space(folder, {name: v.numpy() for name, v in variables.items()})
    latest = checkpoints.restore_latest(folder, quarantine=True)
    if latest is None:
        if initial is not None:
            _begin_from(model, initial, start)
        return 0
    step, tensors = latest
    meta = checkpoints.read_meta(folder, step)
    if "config" in meta:
        origin = f"The checkpoint of step {step} in {workdir}"
        check_same(config_lib.from_json(json.dumps(meta["config"]), origin), config, origin)
    _check_exact(meta.get("fingerprint"), fingerprint, step, start)
    tensors = _with_ema(tensors, start, f"The checkpoint of step {step}")
    assign(variables, tensors, f"The checkpoint of step {step}")
    if model.skipped_in_a_row.numpy() >= model.max_skipped_steps:  # the limit was lowered
        model.skipped_in_a_row.assign(0)
    if start.init_from:
        logging.info("--init_from is not used: %s has gone on to step %d since.", workdir, step)
    logging.info("Going on from step %d of %s.", step, workdir)
    return step


def load_initial(workdir, start):
    """What a new run begins with: (step, {name: array}) of --init_from, or None."""
    is_new = start.restart_from_scratch or not checkpoints.list_steps(os.path.join(workdir, "ckpt"))
    return newest(start.init_from) if start.init_from and is_new else None


def check_data(source, workdir, start, *, found=None):
    """Compare the data set with the one the run began with; returns its manifest, to be written to data.json.

    found: the manifest, where the caller has it.

    Raises:
        InputError: another data set, with the counts and the first file that differs.
    """
    path, found = os.path.join(workdir, "data.json"), found or manifest(source)
    if not os.path.exists(path):
        return found
    try:
        with open(path) as f:
            changed = difference(json.load(f), found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise InputError(f"{path} cannot be read ({e}). Restore it, or remove it to take the data as they are.") from e
    if changed is None:
        return found
    if not start.allow_data_change:
        raise InputError(
            f"The data set is not the one that --workdir={workdir} began with: {changed}. Restore the data, use another "
            "workdir, or go on with these by --allow_data_change."
        )
    logging.warning("Going on with another data set: %s. The run is not bit-exact any more.", changed)
    return found


def move_away(workdir):
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
    for name in ("ckpt", "samples"):
        os.mkdir(os.path.join(workdir, name))
    logging.info("What %s held is in %s now.", workdir, old)


def _begin_from(model, initial, start):
    """Weights and moving average of another run, step 0."""
    step, tensors = initial
    tensors = _with_ema(tensors, start, f"The checkpoint of step {step} of --init_from={start.init_from}")
    groups = ("network/", "ema/")
    variables = {n: v for n, v in checkpoints.variables_by_name(model).items() if n.startswith(groups)}
    assign(variables, {n: t for n, t in tensors.items() if n.startswith(groups)}, f"--init_from={start.init_from}")
    logging.info("Beginning at step 0 with the weights of step %d of %s.", step, start.init_from)


def _with_ema(tensors, start, origin):
    if any(name.startswith("ema/") for name in tensors):
        return tensors
    if not start.ema_from_weights:
        raise InputError(
            f"{origin} has no moving average of the weights (ema/*). --ema_from_weights begins it with them."
        )
    logging.warning("%s has no moving average; it begins with the weights.", origin)
    return tensors | {f"ema/{n.removeprefix('network/')}": t for n, t in tensors.items() if n.startswith("network/")}


def _check_exact(old, new, step, start):
    """Say what keeps the run from being bit-exact; an error under --require_exact."""
    changed = changes(old, new) if old else ["it was not made by training, and holds no fingerprint"]
    if not changed:
        return
    if start.require_exact:
        raise InputError(
            f"--require_exact: going on from step {step} would not be bit-exact any more:\n  " + "\n  ".join(changed)
        )
    logging.warning("From step %d on the run is not bit-exact any more: %s.", step, "; ".join(changed))
