"""Training a workdir from a config."""

import json
import os
import re
import shlex
import signal

import tensorflow as tf
from absl import logging

from ddpm_tf import builders, images
from ddpm_tf import config as config_lib
from ddpm_tf.data.manifest import digest
from ddpm_tf.data.pipeline import batch_indices
from ddpm_tf.diffusion.losses import make_loss
from ddpm_tf.errors import BadDataError, DataNotFoundError, InputError, Interrupted, unknown_name
from ddpm_tf.experiment.resume import NAN_POLICIES, StartOptions, check_data, move_away, restore
from ddpm_tf.experiment.sampling import make_picture, sample_in_batches
from ddpm_tf.experiment.workdir import check_workdir, check_writable, locked, read_config
from ddpm_tf.files import write_text
from ddpm_tf.training import callbacks, checkpoints
from ddpm_tf.training.distribution import configure_devices, make_strategy
from ddpm_tf.training.ema import make_ema_network
from ddpm_tf.training.fingerprint import fingerprint as make_fingerprint
from ddpm_tf.training.signals import StopOnSignal
from ddpm_tf.training.skipped import SkippedSteps

_COMPARED = 1024  # images of the data whose brightness is set beside the samples'


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
        Interrupted: SIGTERM or SIGINT; the state was saved.
    """
    config_lib.validate(config)
    if start.nan_policy not in NAN_POLICIES:
        raise unknown_name("--nan_policy", start.nan_policy, NAN_POLICIES)
    configure_devices(deterministic=config.train.deterministic, tf32=config.train.tf32)
    check_writable(workdir)
    check_workdir(config, workdir, fresh=start.restart_from_scratch)
    if start.init_from:
        read_config(start.init_from, flag="--init_from")
    steps = [] if start.restart_from_scratch else checkpoints.list_steps(os.path.join(workdir, "ckpt"))
    if steps and steps[-1] >= config.train.num_steps:
        _finish(config, workdir, steps[-1], start)
    else:
        _run(config, workdir, start)
    print(_where(workdir))


def _finish(config, workdir, step, start):
    """A run that has all its steps: nothing to do, but for pictures that it was stopped before."""
    logging.info("Step %d of %d: nothing to do. A larger train.num_steps goes on.", step, config.train.num_steps)
    if not os.path.exists(_grid_path(workdir, step, "ema")):
        strategy = make_strategy()
        model = builders.build_model(config, strategy)
        with locked(workdir):
            restore(model, workdir, start, fingerprint=None)
            source = builders.build_source(config, download=start.download)
            summaries = callbacks.Summaries(os.path.join(workdir, "tensorboard"))
            _make_draw(config, model, source, workdir, summaries)(step)


def _run(config, workdir, start):
    builders.build_sampler(config, builders.build_diffusion(config))  # mistakes show before the data are read
    strategy = make_strategy()
    limit = 1 if start.nan_policy == "stop" else None
    model = builders.build_model(config, strategy, max_skipped_steps=limit)
    source = builders.build_source(config, download=start.download)
    builders.build_dataset(config, source, start_step=0)
    num_steps = config.train.num_steps
    with locked(workdir):
        if start.restart_from_scratch:
            move_away(workdir)
        data = check_data(source, workdir, start)
        fingerprint = _fingerprint(config, strategy, data)
        is_new = not os.path.exists(os.path.join(workdir, "config.json"))
        if is_new:
            _write_settings(workdir, config, data)
        start_step = restore(model, workdir, start, fingerprint=fingerprint)
        if not is_new and start_step == 0:
            logging.info("%s holds no checkpoint yet: starting at step 0.", workdir)
        if start_step % config.train.steps_per_execution:
            raise InputError(
                f"The run goes on from step {start_step}, which is no multiple of train.steps_per_execution="
                f"{config.train.steps_per_execution}. Use one that divides it, for example 1."
            )
        _write_settings(workdir, config, data)
        every_step = _make_callbacks(config, model, source, workdir, start_step, start, fingerprint)
        logging.info("Compiling the training step; the first steps take longer.")
        try:
            model.fit(
                builders.build_dataset(config, source, start_step=start_step),
                steps_per_epoch=num_steps - start_step,
                verbose=0,
                shuffle=False,
                callbacks=list(every_step.values()),
            )
        except tf.errors.ResourceExhaustedError as e:
            raise InputError(
                f"Out of memory with data.batch_size={config.data.batch_size} and {model.network.count_params():,} "
                f"parameters: {str(e).partition(chr(10))[0]} Lower data.batch_size, or use more devices. The last "
                f"checkpoint in {workdir} is kept."
            ) from e
        except tf.errors.OpError as e:  # what a source raises arrives as the text of an op's error
            found = re.search(r"InputError: (.*)", str(e))
            if not found:
                raise
            raise BadDataError(f"{found[1]} Training stopped; the last checkpoint in {workdir} is kept.") from e
        finally:
            every_step["stop"].release()
            every_step["checkpoints"].wait()
    number = every_step["stop"].signal
    if number is not None:
        raise Interrupted(
            f"{signal.Signals(number).name}: stopped after step {model.optimizer.iterations.numpy()} of {num_steps}, whose "
            "state is saved. The same command goes on.",
            number,
        )


def _fingerprint(config, strategy, data):
    return make_fingerprint(
        strategy, jit_compile=builders.uses_xla(config), deterministic=config.train.deterministic,
        precision=config.train.precision, tf32=config.train.tf32, micro_batches=config.train.micro_batches,
        batch_size=config.data.batch_size, seed=config.seed, data=digest(data),
    )  # fmt: skip


def _write_settings(workdir, config, data):
    write_text(os.path.join(workdir, "config.json"), config_lib.to_json(config))
    write_text(os.path.join(workdir, "data.json"), json.dumps(data))


def _grid_path(workdir, step, name):
    return os.path.join(workdir, "samples", f"step_{step:012d}_{name}.png")


def _make_draw(config, model, source, workdir, summaries):
    """draw(step): a grid from the moving average and one from the weights, from the same seeds, and how bright they are."""
    sampler = builders.build_sampler(config, model.diffusion)
    in_float32 = model.network.compute_dtype == "float32"
    raw = model.network if in_float32 else make_ema_network(model.network)
    count = min(source.num_examples, _COMPARED)
    data = source.read(tf.range(count, dtype=tf.int64))["image"].numpy()

    def draw(step):
        tf.config.experimental.enable_tensor_float_32_execution(False)
        if raw is not model.network:
            raw.set_weights(model.network.get_weights())
        for name, network in (("raw", raw), ("ema", model.ema_network)):
            samples = sample_in_batches(network, sampler, config.sample)
            grid = make_picture(samples)
            images.save_png(_grid_path(workdir, step, name), grid)
            summaries.image(f"samples_{name}", grid, step)
            summaries.scalar(f"pixel_mean_{name}", samples.mean(), step)
            summaries.scalar(f"pixel_deviation_{name}", samples.std(), step)
            logging.info(
                "step %d  pixels of the samples (%s): mean %.1f, deviation %.1f; of %d images of the data: %.1f, %.1f",
                step, name, samples.mean(), samples.std(), count, data.mean(), data.std(),
            )  # fmt: skip
        tf.config.experimental.enable_tensor_float_32_execution(config.train.tf32)

    return draw


def _make_replay(config, model, source):
    """replay(step): what a step is computed from, beside the weights; everything is a function of the step."""

    def replay(step):
        batch_size, at = config.data.batch_size, tf.constant(step, tf.int64)
        indices = batch_indices(at, num_examples=source.num_examples, batch_size=batch_size, seed=config.seed)
        batch = next(iter(builders.build_dataset(config, source, start_step=step)))
        t, eps, dropout_seed = model.draws(tf.range(batch_size), at)
        arrays = {**batch, "indices": indices, "t": t, "eps": eps, "dropout_seed": dropout_seed}
        return {name: array.numpy() for name, array in arrays.items()}

    return replay


def _make_callbacks(config, model, source, workdir, start_step, start, fingerprint):
    """{name: callback}, in the order in which they act after a step."""
    t, batch_size = config.train, config.data.batch_size
    summaries = callbacks.Summaries(os.path.join(workdir, "tensorboard"))
    saving = callbacks.Checkpoints(
        start_step, folder=os.path.join(workdir, "ckpt"), every=t.checkpoint_every, minutes=t.checkpoint_minutes,
        num_steps=t.num_steps, keep=t.keep_checkpoints, keep_every=t.keep_every,
        meta={"config": config.to_dict(), "fingerprint": fingerprint},
    )  # fmt: skip
    stop = StopOnSignal(start_step, checkpoints=saving, grace_period_s=start.grace_period_s)
    return {
        "progress": callbacks.Progress(start_step, num_steps=t.num_steps, batch_size=batch_size, log_every=t.log_every),
        "metrics": callbacks.Metrics(
            start_step, workdir=workdir, batch_size=batch_size, log_every=t.log_every, summaries=summaries
        ),
        "skipped": SkippedSteps(
            start_step, folder=os.path.join(workdir, "nan_dump"), replay=_make_replay(config, model, source)
        ),
        "checkpoints": saving,
        "stop": stop,
        "grids": callbacks.SampleGrids(
            start_step,
            every=t.sample_every,
            num_steps=t.num_steps,
            draw=_make_draw(config, model, source, workdir, summaries),
            is_drawn=lambda step: os.path.exists(_grid_path(workdir, step, "ema")),
            stop=stop,
        ),
    }


def _where(workdir):
    return (
        f"Pictures: {os.path.join(workdir, 'samples')}\n"
        f"Sample more: python run_sample.py --workdir={shlex.quote(workdir)} --num_images=64 --seed=1000"
    )
