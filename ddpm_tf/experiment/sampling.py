"""Sampling from a workdir."""

import os
import sys
from typing import NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from ddpm_tf import builders, images
from ddpm_tf import config as config_lib
from ddpm_tf.cluster.strategy import configure_devices
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.errors import InputError, NumericsError, WorkdirError
from ddpm_tf.samplers import sample
from ddpm_tf.storage.bundles import assign
from ddpm_tf.storage.workdir import check_new, newest, read_config


class Inference(NamedTuple):
    """What a workdir holds for sampling: its config, the network with its weights, the diffusion, and the step."""

    config: object
    network: object
    diffusion: GaussianDiffusion
    step: int


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
    step, tensors = newest(workdir)
    diffusion = builders.build_diffusion(config)
    network = builders.build_network(config, diffusion)
    group = "ema/" if ema else "network/"
    wanted = {name: tensor for name, tensor in tensors.items() if name.startswith(group)}
    assign({group + v.path: v for v in network.variables}, wanted, f"The checkpoint of step {step}")
    return Inference(config, network, diffusion, step)


def load_sampler(workdir, *, ema=True, **overrides):
    """(Inference, Sampler) of a workdir, its sampling settings changed by `overrides`; see `sample_images`."""
    if overrides.get("num_steps") == 0:
        raise InputError("num_steps must be within 1..T, the trained chain; found 0.")
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
    initial = config.train.ema_decay**inference.step
    if ema and inference.step and initial > 0.05:
        logging.warning(
            "The moving average still holds %.0f %% of the initial weights after %d steps: train longer, or sample with the "
            "weights themselves (--noema).", 100 * initial, inference.step,
        )  # fmt: skip
    return inference, sampler


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
        NumericsError: a sample that is not finite.
        InputError: settings that cannot be used, a workdir that cannot be read, a folder that is not empty.
    """
    inference, sampler = load_sampler(workdir, ema=ema, **overrides)
    config = inference.config
    s = config.sample
    logging.info("Sampling %d images with %s, %d steps.", s.num_images, s.sampler, sampler.num_steps)
    out = _sample_folder(out, workdir, inference.step, config, sampler, ema)

    try:
        os.makedirs(out, exist_ok=True)
    except OSError as e:
        raise WorkdirError(f"--out={out} cannot be made: {e}. Choose another.") from e
    result = sample_in_batches(inference.network, sampler, s, progress=True)
    for seed, image in zip(range(s.seed, s.seed + s.num_images), result, strict=True):
        images.save_png(os.path.join(out, f"seed_{seed:06d}.png"), image)
    images.save_png(os.path.join(out, "grid.png"), make_picture(result[:256]))
    images.save_npz(os.path.join(out, "samples.npz"), result)
    return out


def sample_in_batches(network, sampler, settings, *, part=slice(None), draw=None, progress=False):
    """uint8 [num_images, H, W, C] from the seeds settings.seed, settings.seed + 1, ...

    Args:
        part: of the seeds, the ones that are wanted.
        draw: draw(seeds) -> float32 [N, H, W, C]; None: `sample`.
    """
    wanted = settings.seed + np.arange(settings.num_images, dtype=np.int64)[part]
    batches = [np.zeros((0, *network.image_shape), np.uint8)]
    with tqdm(total=len(wanted), unit=" images", desc="sampling", disable=not progress) as bar:
        for first in range(0, len(wanted), settings.batch_size):
            seeds = wanted[first : first + settings.batch_size]
            count = len(seeds)
            batch = draw(seeds) if draw else sample(network, sampler, seeds).images
            if not np.isfinite(batch).all():
                bad = seeds[~np.isfinite(batch).reshape(count, -1).all(axis=1)]
                raise NumericsError(_explain_not_finite(network, sampler, int(bad[0])))
            batches.append(images.to_uint8(batch))
            bar.update(count)
    return np.concatenate(batches)


def _explain_not_finite(network, sampler, seed):
    """Draws the sample once more, step by step, to find the first one at fault."""
    trace = sample(network, sampler, [seed], trace=1).trace
    is_bad = ~np.isfinite(trace.x_t[:-1]).reshape(len(trace.index), -1).all(axis=1)
    t = sampler.diffusion.schedule.timesteps[trace.index[is_bad].max()]
    return f"The sample of seed {seed} is not finite from timestep t = {t} on: the weights are damaged."


def make_picture(batch):
    return images.make_grid(batch, scale=images.grid_scale(batch.shape[1]))


def _sample_folder(out, workdir, step, config, sampler, ema):
    if out is not None:
        check_new(out, "--out")
        return out
    s = config.sample
    name = f"step_{step:012d}_{s.sampler}{sampler.num_steps}_seed{s.seed}" + ("" if ema else "_raw")
    base = os.path.join(workdir, "samples", name)
    candidates = (base if k == 1 else f"{base}_{k}" for k in range(1, sys.maxsize))
    return next(path for path in candidates if not os.path.exists(path))
