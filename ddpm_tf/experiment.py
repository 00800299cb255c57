"""The jobs behind the command lines: train, and sample from a workdir."""

import os
import shlex
import sys
import time
from typing import NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from ddpm_tf import __version__, builders, images
from ddpm_tf import config as config_lib
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.errors import InputError
from ddpm_tf.samplers import sample
from ddpm_tf.training import callbacks, checkpoints
from ddpm_tf.training.distribution import configure_devices, make_strategy


class Inference(NamedTuple):
    """What a workdir holds for sampling: its config, the network with its weights, the diffusion, and the step."""

    config: object
    network: object
    diffusion: GaussianDiffusion
    step: int


def describe(config):
    """What a run with this config would be, as text; needs no data and writes nothing."""
    config_lib.validate(config)
    network = builders.build_network(config)
    diffusion = builders.build_diffusion(config)
    builders.build_sampler(config, diffusion)
    builders.build_optimizer(config)
    try:
        num_examples = builders.build_source(config).num_examples
        steps_per_epoch = f"{num_examples / config.data.batch_size:.1f} ({num_examples:,} images)"
    except InputError as e:
        steps_per_epoch = f"unknown, data set not prepared ({str(e).splitlines()[0]})"
    shape = [config.data.batch_size, *builders.image_shape(config)]
    return (
        f"{config_lib.to_json(config)}\n{builders.parameter_table(network)}\n\n"
        f"x_t {shape} float32, t [{shape[0]}] int32 -> {shape[:-1] + [network.out_channels]} float32\n"
        f"parameters: {network.count_params():,}\nsteps per epoch: {steps_per_epoch}\n"
        f"steps: {config.train.num_steps:,}"
    )


def train(config, workdir, *, download=False):
    """Train, or go on with, the run in `workdir`; ends with a sample grid.

    Raises:
        InputError: a config, data set or workdir that cannot be used. Nothing has been written then.
    """
    config_lib.validate(config)
    configure_devices()
    _check_workdir(config, workdir)
    latest = checkpoints.restore_latest(os.path.join(workdir, "ckpt"))
    if latest and latest[0] >= config.train.num_steps:
        logging.info(
            "Step %d of %d: nothing to do. A larger train.num_steps goes on.",
            latest[0],
            config.train.num_steps,
        )
        print(_where(workdir))
        return
    builders.build_sampler(config, builders.build_diffusion(config))  # mistakes show before the data are read
    model = builders.build_model(config, make_strategy())
    source = builders.build_source(config, download=download)
    start_step = 0
    if latest:
        start_step, tensors = latest
        checkpoints.assign(checkpoints.variables_by_name(model), tensors, f"The checkpoint of step {start_step}")
        logging.info("Going on from step %d of %s.", start_step, workdir)
    dataset = builders.build_dataset(config, source, start_step=start_step)
    sample_grids = _make_sample_fn(config, model, workdir)

    os.makedirs(os.path.join(workdir, "samples"), exist_ok=True)
    with open(os.path.join(workdir, "config.json"), "w") as f:
        f.write(config_lib.to_json(config))
    model.fit(
        dataset,
        steps_per_epoch=config.train.num_steps - start_step,
        verbose=0,
        shuffle=False,
        callbacks=_make_callbacks(config, workdir, start_step, sample_grids),
    )
    print(_where(workdir))


def load_for_inference(workdir, *, ema=True):
    """The network of a workdir's newest checkpoint, in float32 with TF32 off.

    Args:
        workdir: as written by `train`.
        ema: the moving average of the weights, else the weights themselves.

    Raises:
        InputError: no such workdir, no checkpoint in it yet, or one that does not fit its config.
    """
    configure_devices()
    config = read_config(workdir)
    folder = os.path.join(workdir, "ckpt")
    steps = checkpoints.list_steps(folder)
    if not steps:
        raise InputError(f"There is no checkpoint in {folder} yet. Train longer, or lower train.checkpoint_every.")
    step, tensors = checkpoints.restore_latest(folder)
    network = builders.build_network(config)
    group = "ema/" if ema else "network/"
    wanted = {name: tensor for name, tensor in tensors.items() if name.startswith(group)}
    checkpoints.assign({group + v.path: v for v in network.variables}, wanted, f"The checkpoint of step {step}")
    return Inference(config, network, builders.build_diffusion(config), step)


def read_config(workdir):
    """The config a workdir was made with.

    Raises:
        InputError: no such workdir, or no usable config.json.
    """
    path = os.path.join(workdir, "config.json")
    if not os.path.isfile(path):
        what = "holds no config.json" if os.path.isdir(workdir) else "does not exist"
        raise InputError(f"--workdir={workdir} {what}; expected a folder written by run_train.py.")
    with open(path) as f:
        return config_lib.from_json(f.read(), path)


def sample_images(workdir, *, out=None, ema=True, **overrides):
    """Sample from a workdir: per-image PNGs, grid.png and samples.npz.

    Args:
        workdir: as written by `train`.
        out: an empty or new folder; None: one under the workdir's samples/, named after the settings.
        ema: sample with the moving average of the weights, else with the weights themselves.
        overrides: fields of the config's `sample` section; None: as the workdir says.

    Returns:
        the folder.

    Raises:
        InputError: settings that cannot be used, a workdir that cannot be read, a folder that is not empty.
    """
    inference = load_for_inference(workdir, ema=ema)
    config = inference.config
    for name, value in overrides.items():
        if value is not None:
            config.sample[name] = value
    config_lib.validate(config)
    s = config.sample
    sampler = builders.build_sampler(config, builders.build_diffusion(config))
    if sampler.num_steps != (s.num_steps or sampler.num_steps):
        logging.info("Spacing %s drops repeated timesteps: %d steps are left.", s.spacing, sampler.num_steps)
    out = _sample_folder(out, workdir, inference.step, config, sampler, ema)

    result = _sample_in_batches(inference.network, sampler, s, progress=True)
    os.makedirs(out, exist_ok=True)
    for seed, image in zip(range(s.seed, s.seed + s.num_images), result, strict=True):
        images.save_png(os.path.join(out, f"seed_{seed:06d}.png"), image)
    images.save_png(os.path.join(out, "grid.png"), _grid(result[:256]))
    images.save_npz(os.path.join(out, "samples.npz"), result)
    return out


def _sample_in_batches(network, sampler, settings, *, progress=False):
    """uint8 [num_images, H, W, C] from the seeds settings.seed, settings.seed + 1, ..."""
    batches = []
    with tqdm(total=settings.num_images, unit=" images", desc="sampling", disable=not progress) as bar:
        for first in range(0, settings.num_images, settings.batch_size):
            count = min(settings.batch_size, settings.num_images - first)
            seeds = settings.seed + np.arange(first, first + count, dtype=np.int64)
            batch = sample(network, sampler, seeds).images
            if not np.isfinite(batch).all():
                bad = seeds[~np.isfinite(batch).reshape(count, -1).all(axis=1)]
                raise InputError(f"The sample of seed {bad[0]} is not finite: the weights are damaged.")
            batches.append(images.to_uint8(batch))
            bar.update(count)
    return np.concatenate(batches)


def _grid(batch):
    return images.make_grid(batch, scale=images.grid_scale(batch.shape[1]))


def _sample_folder(out, workdir, step, config, sampler, ema):
    if out is not None:
        if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
            raise InputError(f"--out={out} exists and is not an empty folder; nothing is written over. Choose another.")
        return out
    s = config.sample
    name = f"step_{step:012d}_{s.sampler}{sampler.num_steps}_seed{s.seed}" + ("" if ema else "_raw")
    base = os.path.join(workdir, "samples", name)
    candidates = (base if k == 1 else f"{base}_{k}" for k in range(1, sys.maxsize))
    return next(path for path in candidates if not os.path.exists(path))


def _check_workdir(config, workdir):
    if os.path.exists(workdir) and not os.path.isdir(workdir):
        raise InputError(f"--workdir={workdir} is a file; expected a folder.")
    if not os.path.exists(os.path.join(workdir, "config.json")):
        if checkpoints.list_steps(os.path.join(workdir, "ckpt")):
            raise InputError(
                f"--workdir={workdir} has checkpoints but no config.json; restore it or use another workdir."
            )
        return
    changed = [d for d in config_lib.differences(read_config(workdir), config) if not d[0].free]
    if changed:
        rows = "\n".join(f"  {field.path:<28} {old!r:>20} {new!r:>20}" for field, old, new in changed)
        raise InputError(
            f"--workdir={workdir} was made with another config; these fields cannot change when a run goes on:\n"
            f"  {'field':<28} {'workdir':>20} {'now':>20}\n{rows}\nUse another workdir, or the workdir's values."
        )


def _make_sample_fn(config, model, workdir):
    """sample_fn(step): a grid from the moving average and one from the weights, from the same seeds."""
    sampler = builders.build_sampler(config, model.diffusion)
    summaries = callbacks.Summaries(os.path.join(workdir, "tensorboard"))

    def sample_fn(step):
        for name, network in (("ema", model.ema_network), ("raw", model.network)):
            grid = _grid(_sample_in_batches(network, sampler, config.sample))
            images.save_png(os.path.join(workdir, "samples", f"step_{step:012d}_{name}.png"), grid)
            summaries.image(f"samples_{name}", grid, step)

    sample_fn.summaries = summaries
    return sample_fn


def _make_callbacks(config, workdir, start_step, sample_fn):
    t, batch_size = config.train, config.data.batch_size
    meta = {"version": __version__, "config": config.to_dict(), "time": time.time()}
    return [
        callbacks.Progress(start_step, num_steps=t.num_steps, batch_size=batch_size, log_every=t.log_every),
        callbacks.Metrics(
            start_step, workdir=workdir, batch_size=batch_size, log_every=t.log_every, summaries=sample_fn.summaries
        ),
        callbacks.Checkpoints(
            start_step, folder=os.path.join(workdir, "ckpt"), every=t.checkpoint_every, num_steps=t.num_steps,
            keep=t.keep_checkpoints, meta=meta,
        ),
        callbacks.SampleGrids(start_step, every=t.sample_every, num_steps=t.num_steps, sample_fn=sample_fn),
    ]  # fmt: skip


def _where(workdir):
    return (
        f"Pictures: {os.path.join(workdir, 'samples')}\n"
        f"Sample more: python run_sample.py --workdir={shlex.quote(workdir)} --num_images=64 --seed=1000"
    )
