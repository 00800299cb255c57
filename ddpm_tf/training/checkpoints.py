"""Checkpoints: immutable folders `step_%012d` that appear whole or not at all."""

import json
import os
import re
import shutil
import uuid

from ddpm_tf.bundles import read_bundle, write_bundle

_STEP = re.compile(r"step_(\d{12})$")
_BUNDLE = "state"


def variables_by_name(model):
    """{name: variable} of everything a run needs to go on: network, EMA, the optimizer's slots, and the step.

    Names: network/PATH, ema/PATH, optimizer/SLOT/PATH (momentum and velocity are Adam's m and v), step.
    """
    named = {f"network/{v.path}": v for v in model.network.variables}
    named |= {f"ema/{v.path}": v for v in model.ema_network.variables}
    # Keras names a slot OPTIMIZER/PATH_WITH_UNDERSCORES_slot, and numbers the optimizers of a process.
    paths = {v.path.replace("/", "_"): v.path for v in model.network.trainable_variables}
    for v in model.optimizer.variables:
        if v is not model.optimizer.iterations:
            owner, _, slot = v.path.partition("/")[2].rpartition("_")
            named[f"optimizer/{slot}/{paths[owner]}"] = v
    return {**named, "step": model.optimizer.iterations}


def list_steps(folder):
    """The steps that have a checkpoint folder, ascending."""
    if not os.path.isdir(folder):
        return []
    return sorted(int(m[1]) for m in map(_STEP.match, os.listdir(folder)) if m)


def step_folder(folder, step):
    return os.path.join(folder, f"step_{step:012d}")


def save(folder, step, tensors, meta, *, keep):
    """Write a checkpoint into `folder` and delete all but the newest `keep`.

    Args:
        folder: the workdir's `ckpt`.
        step: completed steps.
        tensors: {name: array}.
        meta: what JSON can hold.
        keep: at least 1.
    """
    temporary = os.path.join(folder, f".tmp-{step}-{uuid.uuid4().hex}")
    os.makedirs(temporary)
    write_bundle(os.path.join(temporary, _BUNDLE), tensors)
    with open(os.path.join(temporary, "meta.json"), "w") as f:
        json.dump(meta, f, indent=2)
    os.replace(temporary, step_folder(folder, step))
    for old in list_steps(folder)[:-keep]:
        trash = os.path.join(folder, f".trash-{old}-{uuid.uuid4().hex}")
        os.replace(step_folder(folder, old), trash)
        shutil.rmtree(trash)


def restore_latest(folder):
    """(step, {name: array}) of the newest checkpoint, or None where there is none."""
    steps = list_steps(folder)
    if not steps:
        return None
    return steps[-1], read_bundle(os.path.join(step_folder(folder, steps[-1]), _BUNDLE))
