"""Training a workdir from a config."""

import contextlib
import json
import os
import re
import shlex
import signal

import tensorflow as tf
from absl import logging

from ddpm_tf import builders
from ddpm_tf import config as config_lib
from ddpm_tf.cluster.strategy import configure_devices, count_replicas, distribute, make_strategy
from ddpm_tf.data.manifest import digest, manifest
from ddpm_tf.errors import (
    BadDataError,
    DataNotFoundError,
    InputError,
    Interrupted,
    StorageError,
    storage_advice,
    unknown_name,
)
from ddpm_tf.experiment.every_step import make_callbacks
from ddpm_tf.experiment.grids import grid_path
from ddpm_tf.experiment.resume import NAN_POLICIES, StartOptions, check_data, load_initial, move_away, restore
from ddpm_tf.files import write_text
from ddpm_tf.storage import checkpoints
from ddpm_tf.storage.fingerprint import code_digest
from ddpm_tf.storage.fingerprint import fingerprint as make_fingerprint
from ddpm_tf.storage.workdir import check_workdir, check_writable, locked, read_config
from ddpm_tf.training.memory import estimate_step_memory


def describe(config, strategy="auto"):
    """What a run with this config would be, as text; needs no data and writes nothing.

    Args:
        config: a ConfigDict of `config.default()`'s fields.
        strategy: as --strategy; the other workers of TF_CONFIG are counted, not waited for.

    Raises:
        InputError: a config that cannot be trained, or data that are there and cannot be used.
    """
    builders.check(config)
    configure_devices()
    replicas = count_replicas(strategy)
    builders.check_batch_size(config, replicas)
    try:
        source = builders.build_source(config, read_only=True)
        builders.build_dataset(config, source, start_step=0)
        steps_per_epoch = f"{source.num_examples / config.data.batch_size:.1f} ({source.num_examples:,} images)"
    except DataNotFoundError as e:
        steps_per_epoch = f"unknown, data set not prepared ({' '.join(str(e).split())})"
    try:
        model = builders.build_model(config, tf.distribute.get_strategy(), is_compiled=False)
    except (tf.errors.ResourceExhaustedError, MemoryError) as e:
        raise InputError(f"There is not the memory here to make the network's weights ({e}).") from e
    network, size = model.network, config.data.batch_size // replicas
    memory = estimate_step_memory(model, size // config.train.micro_batches)
    parts = f", {config.train.micro_batches} parts one after the other" if config.train.micro_batches > 1 else ""
    shape = [config.data.batch_size, *builders.image_shape(config)]
    return (
        f"{config_lib.to_json(config)}\n{builders.parameter_table(network)}\n\n"
        f"x_t {shape} float32, t [{shape[0]}] int32 -> {shape[:-1] + [network.out_channels]} float32\n"
        f"parameters: {network.count_params():,}\nsteps per epoch: {steps_per_epoch}\n"
        f"steps: {config.train.num_steps:,}\n"
        f"memory, estimated, on {'one device' if replicas == 1 else f'each of {replicas} devices'} with {size} images{parts}: "
        f"{memory.peak / 2**20:,.0f} MiB, of which {memory.kept / 2**20:,.0f} MiB stay between steps"
    )


def train(config, workdir, start=StartOptions()):  # noqa: B008 - immutable
    """Train, or go on with, the run in `workdir`; ends with a sample grid.

    Args:
        config: a ConfigDict of `config.default()`'s fields.
        workdir: the run's folder; its newest checkpoint that verifies is gone on from.
        start: StartOptions, what holds for this start alone.

    Raises:
        InputError: a config, data set or workdir that cannot be used. Nothing has been written then.
        WorkdirError: a workdir that cannot be written to, or in which another process trains.
        NoValidCheckpointError: checkpoints of which none verifies; training never starts again at 0 by itself.
        BadDataError: an image that cannot be read, met in the middle of the run.
        StorageError, NumericsError: a checkpoint that could not, or must not, be written; too many steps skipped.
        PeerLostError: another worker was killed, does not answer, or ended by an error.
        Interrupted: SIGTERM or SIGINT; the state was saved.
    """
    builders.check(config)
    if start.nan_policy not in NAN_POLICIES:
        raise unknown_name("--nan_policy", start.nan_policy, NAN_POLICIES)
    for flag in ("grace_period_s", "join_timeout_s"):
        if not 0 < getattr(start, flag) <= 1e6:
            raise InputError(f"--{flag} must be above 0 and at most 1e6 seconds, found {getattr(start, flag)}.")
    configure_devices(deterministic=config.train.deterministic, tf32=config.train.tf32)
    if not os.environ.get("TF_CONFIG"):  # several workers wait for the chief, and hear of its mistakes
        _check_workdir(config, workdir, start)
    strategy, cluster = make_strategy(start.strategy, join_timeout_s=start.join_timeout_s)
    with cluster.watched():
        cluster.agree(_settings(config, start))
        with cluster.together():
            is_finished = cluster.is_chief and _check_workdir(config, workdir, start)
        if cluster.from_chief(is_finished):
            step = checkpoints.list_steps(os.path.join(workdir, "ckpt"))[-1:] or [config.train.num_steps]
            logging.info(
                "Step %d of %d: nothing to do. A larger train.num_steps goes on.", step[0], config.train.num_steps
            )
        else:
            _run(config, workdir, start, strategy, cluster)
    if cluster.is_chief:
        print(_where(workdir))


def _check_workdir(config, workdir, start):
    """Refuse a workdir that cannot be used; whether its run is finished, the last checkpoint whole and its grid drawn."""
    check_writable(workdir)
    check_workdir(config, workdir, fresh=start.restart_from_scratch)
    if start.init_from:
        read_config(start.init_from, flag="--init_from")
    folder = os.path.join(workdir, "ckpt")
    steps = [] if start.restart_from_scratch else checkpoints.list_steps(folder)
    if not steps or steps[-1] < config.train.num_steps or not os.path.exists(grid_path(workdir, steps[-1])):
        return False
    try:
        checkpoints.verify(checkpoints.step_folder(folder, steps[-1]))
    except (InputError, OSError):  # told, and gone round, under the lock
        return False
    return True


def _settings(config, start):
    """What every worker must have alike before anything is built: config, code, and flags that change numbers."""
    fields = {f"--config.{field.path}": config_lib.get(config, field.path) for field in config_lib.FIELDS}
    gpus = len(tf.config.list_physical_devices("GPU"))
    return {**fields, "--nan_policy": start.nan_policy, "code (SHA-256)": code_digest(), "GPUs": gpus}


def _run(config, workdir, start, strategy, cluster):
    limit = 1 if start.nan_policy == "stop" else None
    model = builders.build_model(config, strategy, max_skipped_steps=limit)
    with contextlib.ExitStack() as stack:
        with cluster.together():
            source = builders.build_source(config, download=start.download, read_only=not cluster.is_chief)
            builders.build_dataset(config, source, start_step=0)
            data = manifest(source)
            fingerprint = _fingerprint(config, strategy, cluster, data)
        alike = {k: v for k, v in fingerprint.items() if k not in ("devices", "threads")}
        cluster.agree({**alike, "data (SHA-256)": data["sha256"]})
        with cluster.together():
            if cluster.is_chief:
                stack.enter_context(locked(workdir))
                _begin(config, model, source, data, workdir, start, fingerprint)
        cluster.broadcast(checkpoints.variables_by_name(model).values())
        _fit(config, model, source, workdir, start, fingerprint, strategy, cluster)


def _begin(config, model, source, data, workdir, start, fingerprint):
    """What the holder of the workdir's lock does first; leaves the model as the run goes on from."""
    check_workdir(config, workdir, fresh=start.restart_from_scratch)  # again: another trainer may have been here
    initial = load_initial(workdir, start)
    if start.restart_from_scratch:
        move_away(workdir)
    check_data(source, workdir, start, found=data)
    is_new = not os.path.exists(os.path.join(workdir, "config.json"))
    start_step = restore(model, config, workdir, start, fingerprint=fingerprint, initial=initial)
    if not is_new and start_step == 0:
        logging.info("%s holds no checkpoint yet: starting at step 0.", workdir)
    if start_step % config.train.steps_per_execution:
        raise InputError(
            f"The run goes on from step {start_step}, which is no multiple of train.steps_per_execution="
            f"{config.train.steps_per_execution}. Use one that divides it, for example 1."
        )
    _write_settings(workdir, config, data)
    if initial is not None:  # at once, so that every later start goes on from these weights
        tensors = {name: v.numpy() for name, v in checkpoints.variables_by_name(model).items()}
        origin = {"workdir": os.path.abspath(start.init_from), "step": initial[0]}
        meta = {"init_from": origin, "config": config.to_dict(), "fingerprint": fingerprint}
        checkpoints.save(os.path.join(workdir, "ckpt"), 0, tensors, meta, keep=1)


def _fit(config, model, source, workdir, start, fingerprint, strategy, cluster):
    start_step, num_steps = int(model.optimizer.iterations.numpy()), config.train.num_steps
    every_step = make_callbacks(config, model, source, workdir, start_step, start, fingerprint, strategy, cluster)
    if start_step >= num_steps:
        logging.info("Step %d of %d: only its pictures are missing.", start_step, num_steps)
        every_step["grids"].set_model(model)
        every_step["grids"].on_train_begin()
        return
    logging.info("Compiling the training step; the first steps take longer.")
    try:
        model.fit(
            distribute(
                strategy,
                cluster,
                lambda part: builders.build_dataset(config, source, start_step=start_step, replicas=part),
            ),
            steps_per_epoch=num_steps - start_step,
            verbose=0,
            shuffle=False,
            callbacks=list(every_step.values()),
        )
    except (tf.errors.ResourceExhaustedError, MemoryError) as e:
        if checkpoints.is_full(e):
            raise StorageError(f"{str(e).partition(chr(10))[0]} {storage_advice(e)}") from e
        what = re.search(r"OOM when allocating tensor with \S+ and type \S+|Out of memory[^\n]*|$", str(e))[0]
        raise InputError(
            f"Out of memory with data.batch_size={config.data.batch_size} and {model.network.count_params():,} parameters"
            f"{what and f' ({what})'}. Raise train.micro_batches, set network.remat, use more devices, or begin a new run "
            f"with a smaller data.batch_size; --dry_run estimates what is needed. The last checkpoint in {workdir} is kept."
        ) from e
    except tf.errors.OpError as e:  # what a source raises arrives as the text of an op's error
        found = re.search(r"InputError: (.*)", str(e))
        if not found:
            raise
        raise BadDataError(f"{found[1]} Training stopped; the last checkpoint in {workdir} is kept.") from e
    finally:
        every_step["stop"].release()
        if cluster.is_chief:
            every_step["checkpoints"].wait()
    cluster.barrier()  # the others leave once the chief has saved
    number = every_step["stop"].signal
    if number is not None:
        without = " without --restart_from_scratch" if start.restart_from_scratch else ""
        raise Interrupted(
            f"{signal.Signals(number).name}: stopped after step {model.optimizer.iterations.numpy()} of {num_steps}, whose "
            f"state is saved. The same command{without} goes on.",
            number,
        )


def _fingerprint(config, strategy, cluster, data):
    return make_fingerprint(
        strategy, workers=cluster.size, jit_compile=builders.uses_xla(config), deterministic=config.train.deterministic,
        precision=config.train.precision, tf32=config.train.tf32, micro_batches=config.train.micro_batches,
        remat=config.network.remat,
        batch_size=config.data.batch_size, seed=config.seed, config=config_lib.digest(config), data=digest(data),
    )  # fmt: skip


def _write_settings(workdir, config, data):
    write_text(os.path.join(workdir, "config.json"), config_lib.to_json(config))
    write_text(os.path.join(workdir, "data.json"), json.dumps(data))


def _where(workdir):
    return (
        f"Pictures: {os.path.join(workdir, 'samples')}\n"
        f"Sample more: python run_sample.py --workdir={shlex.quote(workdir)} --num_images=64 --seed=1000"
    )
