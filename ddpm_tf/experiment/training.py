"""Training a workdir from a config."""

import contextlib
import json
import os
import re
import shlex
import signal

import tensorflow as tf
from absl import logging
from ml_collections import ConfigDict

from ddpm_tf import builders, files
from ddpm_tf import config as config_lib
from ddpm_tf.cluster.cluster import Cluster
from ddpm_tf.cluster.strategy import configure_devices, count_replicas, distribute, make_strategy
from ddpm_tf.data.manifest import digest, manifest
from ddpm_tf.data.sources import without_path
from ddpm_tf.errors import (
    BadDataError,
    DataNotFoundError,
    InputError,
    Interrupted,
    RunError,
    StorageError,
    storage_advice,
)
from ddpm_tf.experiment.callbacks import RunCallbacks, make_callbacks
from ddpm_tf.experiment.conditions import parse_labels
from ddpm_tf.experiment.grids import has_pictures
from ddpm_tf.experiment.resume import check_data, check_workdir, load_initial, move_away, older_values, restore
from ddpm_tf.experiment.run import Run, StartOptions, classifier_command, read_run_config
from ddpm_tf.storage import checkpoint_folder, checkpoints
from ddpm_tf.storage import workdir as workdir_lib
from ddpm_tf.storage.fingerprint import code_digest
from ddpm_tf.storage.fingerprint import fingerprint as make_fingerprint
from ddpm_tf.training.memory import estimate_step_memory
from ddpm_tf.training.model import DiffusionModel


def dry_run(config: ConfigDict, strategy: str = "auto") -> str:
    """What a run with this config would be, as text; it needs no data and writes nothing.

    Where the data should be at a path and are not, the text is that of the error.

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
    missing = None
    try:
        source = builders.build_source(config, read_only=True)
        builders.build_dataset(config, source, start_step=0)
        steps_per_epoch = f"{source.num_examples / config.data.batch_size:.1f} ({source.num_examples:,} images)"
    except DataNotFoundError as e:
        steps_per_epoch = f"unknown, data set not prepared ({' '.join(str(e).split())})"
        if without_path(config.data.source) != config.data.source:  # data at a path are there, or nowhere
            missing = e
    try:
        model = builders.build_model(config, tf.distribute.get_strategy(), is_compiled=False)
    except (tf.errors.ResourceExhaustedError, MemoryError) as e:
        raise InputError(f"There is not the memory here to make the network's weights ({e}).") from e
    network, size = model.network, config.data.batch_size // replicas
    memory = estimate_step_memory(model, size // config.train.micro_batches)
    parts = f", {config.train.micro_batches} parts one after the other" if config.train.micro_batches > 1 else ""
    shape = [config.data.batch_size, *builders.image_shape(config)]
    output = [network.num_classes] if builders.is_classifier(config) else [*shape[1:-1], network.out_channels]
    report = (
        f"{config_lib.to_json(config)}\n{builders.parameter_table(network)}\n\n"
        f"x_t {shape} float32, t [{shape[0]}] int32 -> {[shape[0], *output]} float32\n"
        f"parameters: {network.count_params():,}\nsteps per epoch: {steps_per_epoch}\n"
        f"steps: {config.train.num_steps:,}\n"
        f"memory, estimated, on {'one device' if replicas == 1 else f'each of {replicas} devices'} with {size} images{parts}: "
        f"{memory.peak / 2**20:,.0f} MiB, of which {memory.kept / 2**20:,.0f} MiB stay between steps"
    )
    if missing is not None:
        raise DataNotFoundError(f"{report}\n\nThe run cannot begin: {missing}") from missing
    return report


def train(config: ConfigDict, workdir: str, options: StartOptions = StartOptions()) -> str:  # noqa: B008 - immutable
    """Train the run in `workdir`, or resume it; ends with a sample grid, unless it is a classifier's.

    Args:
        config: a ConfigDict of `config.default()`'s fields.
        workdir: the run's folder. The run is resumed from its newest checkpoint that verifies.
        options: what holds for this start alone.

    Returns:
        What to do next, as text; "" on workers that are not the chief.

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
    options.check()
    configure_devices(deterministic=config.train.deterministic, tf32=config.train.tf32)
    strategy, cluster = make_strategy(options.strategy, join_timeout_s=options.join_timeout_s)
    with cluster.watched():
        cluster.agree(_settings(config, options))
        config = _with_older_values(config, workdir, options, cluster)
        with cluster.together():
            is_finished = cluster.is_chief and _is_finished(config, workdir, options)
        if cluster.from_chief(is_finished):
            steps = checkpoints.list_steps(workdir_lib.checkpoints_folder(workdir)) or [config.train.num_steps]
            logging.info(
                "Step %d of %d: nothing to do. A larger train.num_steps trains on.", steps[-1], config.train.num_steps
            )
        else:
            _train(config, workdir, options, strategy, cluster)
    return _next_commands(config, workdir) if cluster.is_chief else ""


def _with_older_values(config: ConfigDict, workdir: str, options: StartOptions, cluster: Cluster) -> ConfigDict:
    """The config with what the workdir of an older version meant, see `resume.older_values`; the chief looks for all."""
    config = config.copy_and_resolve_references()
    with cluster.together():
        is_reader = cluster.is_chief and not options.restart_from_scratch
        older = older_values(config, workdir) if is_reader else []
    for field in config_lib.FIELDS:
        if not field.free and field.before not in (config_lib.NEVER_ABSENT, field.default):
            if cluster.from_chief(field in older):
                logging.info("%s=%s stays, which this workdir of an older version means.", field.path, field.before)
                config_lib.put(config, field.path, field.before)
    return config


def _is_finished(config: ConfigDict, workdir: str, options: StartOptions) -> bool:
    """Refuse a workdir that cannot be used, before anything is built; whether its run is finished.

    Finished means that the last checkpoint is whole, and that its grid is drawn if the network draws.
    """
    workdir_lib.check_writable(workdir)
    check_workdir(config, workdir, restart=options.restart_from_scratch)
    if options.init_from:
        read_run_config(options.init_from, flag="--init_from")
    folder = workdir_lib.checkpoints_folder(workdir)
    steps = [] if options.restart_from_scratch else checkpoints.list_steps(folder)
    if not steps or steps[-1] < config.train.num_steps or not has_pictures(config, workdir, steps[-1]):
        return False
    try:
        checkpoint_folder.verify(checkpoints.step_folder(folder, steps[-1]))
    except (RunError, OSError):
        # Not an error here: restore() reports it and falls back to an older checkpoint, holding the lock.
        return False
    return True


def _settings(config: ConfigDict, options: StartOptions) -> dict:
    """What must be the same on every worker before anything is built: config, code, and flags that change numbers."""
    fields = {f"--config.{field.path}": config_lib.get(config, field.path) for field in config_lib.FIELDS}
    gpus = len(tf.config.list_physical_devices("GPU"))
    return {**fields, "--nan_policy": options.nan_policy, "code (SHA-256)": code_digest(), "GPUs": gpus}


def _train(
    config: ConfigDict, workdir: str, options: StartOptions, strategy: tf.distribute.Strategy, cluster: Cluster
) -> None:
    limit = 1 if options.nan_policy == "stop" else None
    model = builders.build_model(config, strategy, max_skipped_steps=limit)
    with contextlib.ExitStack() as stack:
        with cluster.together():
            source = builders.build_source(config, download=options.download, read_only=not cluster.is_chief)
            if config.network.num_classes and not builders.is_classifier(config):
                parse_labels(config.sample.labels, config.network.num_classes, source.details.class_names)
            builders.build_dataset(config, source, start_step=0)
            data = manifest(source)
            fingerprint = _fingerprint(config, strategy, cluster, digest(data))
        run = Run(
            config=config,
            workdir=workdir,
            options=options,
            strategy=strategy,
            cluster=cluster,
            source=source,
            data=data,
            fingerprint=fingerprint,
        )
        same_everywhere = {k: v for k, v in fingerprint.items() if k not in ("devices", "threads")}
        cluster.agree({**same_everywhere, "data (SHA-256)": data["sha256"]})
        with cluster.together():
            if cluster.is_chief:
                stack.enter_context(workdir_lib.locked(workdir))
                _begin(run, model)
        cluster.broadcast(model.state().values())
        _fit(run, model)


def _begin(run: Run, model: DiffusionModel) -> None:
    """What the holder of the workdir's lock does first; leaves the model in the state that the run continues from."""
    config, workdir, options = run.config, run.workdir, run.options
    # A second time: another training may have begun here before this one got the lock.
    check_workdir(config, workdir, restart=options.restart_from_scratch)
    initial = load_initial(workdir, options)
    if options.restart_from_scratch:
        move_away(workdir)
    check_data(run.data, workdir, options, source=config.data.source)
    is_new = not os.path.exists(workdir_lib.config_path(workdir))
    start_step = restore(run, model, initial)
    if not is_new and start_step == 0:
        logging.info("%s holds no checkpoint yet: starting at step 0.", workdir)
    if start_step % config.train.steps_per_execution:
        raise InputError(
            f"The run resumes after step {start_step}, which is no multiple of train.steps_per_execution="
            f"{config.train.steps_per_execution}. Use one that divides it, for example 1."
        )
    files.write_text(workdir_lib.config_path(workdir), config_lib.to_json(config))
    files.write_text(workdir_lib.data_path(workdir), json.dumps(run.data))
    if initial is not None:  # at once, so that every later start continues from these weights
        tensors = {name: v.numpy() for name, v in model.state().items()}
        origin = {"workdir": os.path.abspath(options.init_from), "step": initial.step}
        meta = {"init_from": origin, "config": config.to_dict(), "fingerprint": run.fingerprint}
        checkpoints.save(run.checkpoints_folder, 0, tensors, meta, keep=1)


def _fit(run: Run, model: DiffusionModel) -> None:
    config, cluster = run.config, run.cluster
    start_step, num_steps = int(model.optimizer.iterations.numpy()), config.train.num_steps
    callbacks = make_callbacks(run, model, start_step)
    if start_step >= num_steps:
        if callbacks.grids is None:  # another training finished the run before this one got the lock
            return
        logging.info("Step %d of %d: only its pictures are missing.", start_step, num_steps)
        callbacks.grids.set_model(model)
        callbacks.grids.on_train_begin()
        return
    logging.info("Compiling the training step; the first steps take longer.")
    try:
        batches = distribute(
            run.strategy,
            cluster,
            lambda part: builders.build_dataset(config, run.source, start_step=start_step, replicas=part),
        )
        model.fit(batches, steps_per_epoch=num_steps - start_step, verbose=0, shuffle=False, callbacks=callbacks.all)
    except (tf.errors.OpError, MemoryError) as e:
        raise _explained(e, run, model) from e
    finally:
        callbacks.stop.release()
        if callbacks.checkpoints:
            callbacks.checkpoints.wait()
    cluster.barrier()  # the others leave once the chief has saved
    _raise_interrupted(run, model, callbacks)


def _raise_interrupted(run: Run, model: DiffusionModel, callbacks: RunCallbacks) -> None:
    """Raise Interrupted if a signal ended `fit`."""
    number = callbacks.stop.signal
    if number is not None:
        without = " without --restart_from_scratch" if run.options.restart_from_scratch else ""
        raise Interrupted(
            f"{signal.Signals(number).name}: stopped after step {model.optimizer.iterations.numpy()} of "
            f"{run.config.train.num_steps}, whose state is saved. The same command{without} resumes the run.",
            number,
        )


def _explained(error: Exception, run: Run, model: DiffusionModel) -> Exception:
    """What an error that ended `fit` means for the user; the error itself, where it means nothing else."""
    if isinstance(error, (tf.errors.ResourceExhaustedError, MemoryError)):
        if checkpoints.is_full(error):
            return StorageError(f"{str(error).partition(chr(10))[0]} {storage_advice(error)}")
        match = re.search(r"OOM when allocating tensor with \S+ and type \S+|Out of memory[^\n]*", str(error))
        return InputError(
            f"Out of memory with data.batch_size={run.config.data.batch_size} and {model.network.count_params():,} parameters"
            f"{f' ({match[0]})' if match else ''}. Raise train.micro_batches, set network.remat, use more devices, or begin a "
            "new run with a smaller data.batch_size; --dry_run estimates what is needed. The last checkpoint in "
            f"{run.workdir} is kept."
        )
    match = re.search(r"InputError: (.*)", str(error))  # what a source raises arrives as the text of an op's error
    if match:
        return BadDataError(f"{match[1]} Training stopped; the last checkpoint in {run.workdir} is kept.")
    return error


def _fingerprint(config: ConfigDict, strategy: tf.distribute.Strategy, cluster: Cluster, data_digest: str) -> dict:
    return make_fingerprint(
        strategy,
        workers=cluster.size,
        jit_compile=builders.uses_xla(config),
        deterministic=config.train.deterministic,
        precision=config.train.precision,
        tf32=config.train.tf32,
        micro_batches=config.train.micro_batches,
        remat=config.network.remat,
        batch_size=config.data.batch_size,
        seed=config.seed,
        config=builders.run_digest(config),
        data=data_digest,
    )


def _next_commands(config: ConfigDict, workdir: str) -> str:
    if builders.is_classifier(config):
        return (
            "Guide the images of a network of the same chain by this classifier, where --workdir is the network's:\n"
            f"{classifier_command(workdir)}"
        )
    return (
        f"Pictures: {workdir_lib.samples_folder(workdir)}\n"
        f"Sample more: python run_sample.py --workdir={shlex.quote(workdir)} --num_images=64 --seed=1000"
    )
