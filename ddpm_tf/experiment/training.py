"""Training a workdir from a config."""

import os
import re
import shlex
import signal

import tensorflow as tf
from absl import logging

from ddpm_tf import builders, images
from ddpm_tf import config as config_lib
from ddpm_tf.bundles import assign
from ddpm_tf.diffusion.losses import make_loss
from ddpm_tf.errors import BadDataError, DataNotFoundError, InputError, Interrupted
from ddpm_tf.experiment.sampling import make_picture, sample_in_batches
from ddpm_tf.experiment.workdir import check_workdir, locked, meta, write_config
from ddpm_tf.training import callbacks, checkpoints
from ddpm_tf.training.distribution import configure_devices, make_strategy


def describe(config):
    """What a run with this config would be, as text; needs no data and writes nothing.

    Raises:
        InputError: a config that cannot be trained, or data that are there and cannot be used.
    """
    config_lib.validate(config)
    diffusion = builders.build_diffusion(config)
    network = builders.build_network(config, diffusion)
    builders.build_sampler(config, diffusion)
    builders.build_optimizer(config)
    make_loss(config.train.loss, diffusion, weight=config.train.loss_weight)
    try:
        num_examples = builders.build_source(config, read_only=True).num_examples
        steps_per_epoch = f"{num_examples / config.data.batch_size:.1f} ({num_examples:,} images)"
    except DataNotFoundError as e:
        steps_per_epoch = f"unknown, data set not prepared ({' '.join(str(e).split())})"
    shape = [config.data.batch_size, *builders.image_shape(config)]
    return (
        f"{config_lib.to_json(config)}\n{builders.parameter_table(network)}\n\n"
        f"x_t {shape} float32, t [{shape[0]}] int32 -> {shape[:-1] + [network.out_channels]} float32\n"
        f"parameters: {network.count_params():,}\nsteps per epoch: {steps_per_epoch}\n"
        f"steps: {config.train.num_steps:,}"
    )


def train(config, workdir, *, download=False, grace_period_s=30.0):
    """Train, or go on with, the run in `workdir`; ends with a sample grid.

    Args:
        config: a ConfigDict of `config.default()`'s fields.
        workdir: the run's folder; its newest checkpoint that verifies is gone on from.
        download: let TFDS fetch a data set that is not prepared.
        grace_period_s: after SIGTERM or SIGINT, seconds in which the step is finished and its state saved.

    Raises:
        InputError: a config, data set or workdir that cannot be used. Nothing has been written then.
        WorkdirError: a workdir that cannot be written to, or in which another process trains.
        NoValidCheckpointError: checkpoints of which none verifies; training never starts again at 0 by itself.
        BadDataError: an image that cannot be read, met in the middle of the run.
        StorageError, NumericsError: a checkpoint that could not, or must not, be written.
        Interrupted: SIGTERM or SIGINT; the state was saved.
    """
    config_lib.validate(config)
    configure_devices()
    check_workdir(config, workdir)
    num_steps = config.train.num_steps
    steps = checkpoints.list_steps(os.path.join(workdir, "ckpt"))
    if steps and steps[-1] >= num_steps:
        logging.info("Step %d of %d: nothing to do. A larger train.num_steps goes on.", steps[-1], num_steps)
        if not os.path.exists(_grid_path(workdir, steps[-1], "ema")):  # the run ended before its last pictures
            model = builders.build_model(config, make_strategy())
            with locked(workdir):
                _make_sample_fn(config, model, workdir)(_restore(model, workdir))
        print(_where(workdir))
        return
    builders.build_sampler(config, builders.build_diffusion(config))  # mistakes show before the data are read
    model = builders.build_model(config, make_strategy())
    source = builders.build_source(config, download=download)
    first_batches = builders.build_dataset(config, source, start_step=0)
    with locked(workdir):
        start_step = _restore(model, workdir)
        if start_step % config.train.steps_per_execution:
            raise InputError(
                f"The run goes on from step {start_step}, which is no multiple of train.steps_per_execution="
                f"{config.train.steps_per_execution}. Use one that divides it, for example 1."
            )
        dataset = builders.build_dataset(config, source, start_step=start_step) if start_step else first_batches
        write_config(workdir, config)
        sample_fn = _make_sample_fn(config, model, workdir)
        every_step = _make_callbacks(config, workdir, start_step, sample_fn, grace_period_s)
        logging.info("Compiling the training step; the first steps take longer.")
        try:
            model.fit(
                dataset,
                steps_per_epoch=num_steps - start_step,
                verbose=0,
                shuffle=False,
                callbacks=list(every_step.values()),
            )
        except tf.errors.OpError as e:  # what a source raises arrives as the text of an op's error
            found = re.search(r"InputError: (.*)", str(e))
            if not found:
                raise
            raise BadDataError(f"{found[1]} Training stopped; the last checkpoint in {workdir} is kept.") from e
        number = every_step["stop"].signal
        step = int(model.optimizer.iterations.numpy())
    if number is not None:
        raise Interrupted(
            f"{signal.Signals(number).name}: stopped after step {step} of {num_steps}, whose state is saved. "
            "The same command goes on.",
            number,
        )
    print(_where(workdir))


def _restore(model, workdir):
    """Give the model the newest checkpoint that verifies; the step it was written after, 0 without one."""
    folder = os.path.join(workdir, "ckpt")
    checkpoints.sweep(folder)
    latest = checkpoints.restore_latest(folder, quarantine=True)
    if latest is None:
        if os.path.exists(os.path.join(workdir, "config.json")):
            logging.info("%s holds no checkpoint yet: starting at step 0.", workdir)
        return 0
    step, tensors = latest
    assign(checkpoints.variables_by_name(model), tensors, f"The checkpoint of step {step}")
    logging.info("Going on from step %d of %s.", step, workdir)
    return step


def _grid_path(workdir, step, name):
    return os.path.join(workdir, "samples", f"step_{step:012d}_{name}.png")


def _make_sample_fn(config, model, workdir):
    """sample_fn(step): a grid from the moving average and one from the weights, from the same seeds."""
    sampler = builders.build_sampler(config, model.diffusion)
    summaries = callbacks.Summaries(os.path.join(workdir, "tensorboard"))

    def sample_fn(step):
        for name, network in (("ema", model.ema_network), ("raw", model.network)):
            grid = make_picture(sample_in_batches(network, sampler, config.sample))
            images.save_png(_grid_path(workdir, step, name), grid)
            summaries.image(f"samples_{name}", grid, step)

    sample_fn.summaries = summaries
    return sample_fn


def _make_callbacks(config, workdir, start_step, sample_fn, grace_period_s):
    """{name: callback}, in the order in which they act after a step."""
    t, batch_size = config.train, config.data.batch_size
    saving = callbacks.Checkpoints(
        start_step, folder=os.path.join(workdir, "ckpt"), every=t.checkpoint_every, num_steps=t.num_steps,
        keep=t.keep_checkpoints, meta=meta(config),
    )  # fmt: skip
    return {
        "progress": callbacks.Progress(start_step, num_steps=t.num_steps, batch_size=batch_size, log_every=t.log_every),
        "metrics": callbacks.Metrics(
            start_step, workdir=workdir, batch_size=batch_size, log_every=t.log_every, summaries=sample_fn.summaries
        ),
        "checkpoints": saving,
        "stop": callbacks.StopOnSignal(start_step, checkpoints=saving, grace_period_s=grace_period_s),
        "grids": callbacks.SampleGrids(start_step, every=t.sample_every, num_steps=t.num_steps, sample_fn=sample_fn),
    }


def _where(workdir):
    return (
        f"Pictures: {os.path.join(workdir, 'samples')}\n"
        f"Sample more: python run_sample.py --workdir={shlex.quote(workdir)} --num_images=64 --seed=1000"
    )
