"""The jobs behind the command lines: train, sample from a workdir, and convert weights into and out of one."""

import json
import os
import shlex
import shutil
import sys
import time
import uuid
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging
from tqdm import tqdm

from ddpm_tf import __version__, builders, images
from ddpm_tf import config as config_lib
from ddpm_tf.bundles import assign
from ddpm_tf.convert.diffusers import load_diffusers, save_diffusers
from ddpm_tf.convert.tf1 import TF1State, fields_of_kwargs, read_tf1_checkpoint, save_tf1_checkpoint, tf1_name
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
    diffusion = builders.build_diffusion(config)
    network = builders.build_network(config, diffusion)
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
        assign(checkpoints.variables_by_name(model), tensors, f"The checkpoint of step {start_step}")
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
    step, tensors = _newest(workdir)
    diffusion = builders.build_diffusion(config)
    network = builders.build_network(config, diffusion)
    group = "ema/" if ema else "network/"
    wanted = {name: tensor for name, tensor in tensors.items() if name.startswith(group)}
    assign({group + v.path: v for v in network.variables}, wanted, f"The checkpoint of step {step}")
    return Inference(config, network, diffusion, step)


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
        _check_new(out, "--out")
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
    return [
        callbacks.Progress(start_step, num_steps=t.num_steps, batch_size=batch_size, log_every=t.log_every),
        callbacks.Metrics(
            start_step, workdir=workdir, batch_size=batch_size, log_every=t.log_every, summaries=sample_fn.summaries
        ),
        callbacks.Checkpoints(
            start_step, folder=os.path.join(workdir, "ckpt"), every=t.checkpoint_every, num_steps=t.num_steps,
            keep=t.keep_checkpoints, meta=_meta(config),
        ),
        callbacks.SampleGrids(start_step, every=t.sample_every, num_steps=t.num_steps, sample_fn=sample_fn),
    ]  # fmt: skip


def _where(workdir):
    return (
        f"Pictures: {os.path.join(workdir, 'samples')}\n"
        f"Sample more: python run_sample.py --workdir={shlex.quote(workdir)} --num_images=64 --seed=1000"
    )


def import_tf1(checkpoint, config, workdir, *, reference=None):
    """Turn a checkpoint of the original release into a workdir: weights, moving average, Adam moments and step.

    Args:
        checkpoint: PATH/model.ckpt-790000; a kwargs.json beside it has to agree with `config`.
        config: the config of the run the checkpoint is of.
        workdir: a new or empty folder.
        reference: an .npz with x_t, t and output, what the moving average should answer; None: not checked.

    Returns:
        a report, as text.

    Raises:
        InputError: files or settings that do not fit; nothing has been written then.
    """
    config_lib.validate(config)
    _check_new(workdir, "--workdir")
    _check_kwargs(config, os.path.join(os.path.dirname(checkpoint), "kwargs.json"))
    model = builders.build_model(config, tf.distribute.get_strategy())
    variables = checkpoints.variables_by_name(model)
    shapes = {tf1_name(v.path): tuple(v.shape) for v in model.network.variables}
    state = read_tf1_checkpoint(checkpoint, shapes=shapes)
    groups = {"network": state.weights, "ema": state.ema}
    groups |= {} if state.m is None else {"optimizer/momentum": state.m, "optimizer/velocity": state.v}
    tensors = {name: v.numpy() for name, v in variables.items()}  # moments that the file lacks stay 0
    for group, arrays in groups.items():
        tensors |= {f"{group}/{v.path}": arrays[tf1_name(v.path)] for v in model.network.variables}
    tensors["step"] = np.asarray(state.step or 0, tensors["step"].dtype)
    assign(variables, tensors, checkpoint)
    parity = _check_reference(model.ema_network, reference)
    _write_workdir(workdir, config, tensors)
    absent = "" if state.m is not None else "\nThe file holds no Adam moments: training would go on with moments of 0."
    return (
        f"{len(shapes)} weights ({model.network.count_params():,} parameters), their moving averages"
        f"{' and two moments' if state.m else ''} of {checkpoint}, step {int(tensors['step'])}.{absent}{parity}\n"
        f"{_next_commands(workdir)}"
    )


def import_diffusers(path, workdir, *, config=None, reference=None):
    """Turn a diffusers `UNet2DModel` into a workdir: its weights as both weights and moving average, step 0.

    Args:
        path: a folder with config.json and safetensors, or the .safetensors file.
        workdir: a new or empty folder.
        config: the diffusion and training settings; its network has to be the file's. None: the defaults.
        reference: as in `import_tf1`.

    Returns:
        a report, as text.

    Raises:
        InputError: files or settings that do not fit; nothing has been written then.
    """
    _check_new(workdir, "--workdir")
    loaded = load_diffusers(path)
    found = _config_of_network(loaded)
    if config is None:
        config = config_lib.default()
        for field, value in found.items():
            config_lib.put(config, field, value)
    config_lib.validate(config)
    _check_agrees(config, found, path)
    parity = _check_reference(loaded, reference)
    model = builders.build_model(config, tf.distribute.get_strategy())
    for network in (model.network, model.ema_network):
        network.set_weights(loaded.get_weights())
    _write_workdir(workdir, config, {name: v.numpy() for name, v in checkpoints.variables_by_name(model).items()})
    return (
        f"{len(loaded.variables)} weights ({loaded.count_params():,} parameters) of {path}, step 0, variance "
        f"{config.diffusion.variance}.{parity}\n{_next_commands(workdir)}"
    )


def export_weights(workdir, to, out, *, ema=True):
    """Write a workdir's newest checkpoint for another program.

    Args:
        workdir: as written by `train`.
        to: tf1 (weights, moving average, moments and step under the original's names) or diffusers.
        out: tf1: the checkpoint's path without suffix; diffusers: a new or empty folder.
        ema: for diffusers, which knows one set of weights: the moving average, else the weights.

    Returns:
        a report, as text.

    Raises:
        InputError: a workdir that cannot be read, a network that the format has no place for, files that exist.
    """
    if to == "diffusers":
        inference = load_for_inference(workdir, ema=ema)
        save_diffusers(inference.network, out)
        count, step = inference.network.count_params(), inference.step
        return f"{count:,} parameters of step {step} as a UNet2DModel in {out}.\nUNet2DModel.from_pretrained({out!r})"
    config = read_config(workdir)
    step, tensors = _newest(workdir)

    def group(prefix):
        return {tf1_name(k.removeprefix(prefix)): v for k, v in tensors.items() if k.startswith(prefix)}

    state = TF1State(
        group("network/"),
        group("ema/"),
        group("optimizer/momentum/") or None,
        group("optimizer/velocity/") or None,
        step,
    )
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    save_tf1_checkpoint(out, state, beta_1=config.optimizer.beta_1, beta_2=config.optimizer.beta_2)
    return f"{len(state.weights)} weights, moving averages and moments of step {step} in {out}.index and .data."


def _newest(workdir):
    folder = os.path.join(workdir, "ckpt")
    latest = checkpoints.restore_latest(folder)
    if latest is None:
        raise InputError(f"There is no checkpoint in {folder} yet. Train longer, or lower train.checkpoint_every.")
    return latest


def _check_new(path, flag):
    if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise InputError(f"{flag}={path} exists and is not an empty folder; nothing is written over. Choose another.")


def _check_kwargs(config, path):
    """The release's training scripts left their arguments in kwargs.json."""
    if not os.path.isfile(path):
        return
    try:
        with open(path) as f:
            fields = fields_of_kwargs(json.load(f))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as e:
        raise InputError(f"{path} cannot be read as the release's arguments: {e}") from e
    _check_agrees(config, fields, path)


def _check_agrees(config, fields, origin):
    rows = [
        f"  {field:<28} {value!r:>20} {config_lib.get(config, field)!r:>20}"
        for field, value in fields.items()
        if config_lib.get(config, field) != value
    ]
    if rows:
        raise InputError(
            f"{origin} and --config disagree:\n  {'field':<28} {'file':>20} {'config':>20}\n" + "\n".join(rows)
        )


def _config_of_network(network):
    height, width, channels = network.image_shape
    return {
        "data.image_size": height,
        "data.image_width": 0 if width == height else width,
        "data.channels": channels,
        "network.ch": network.ch,
        "network.ch_mult": network.ch_mult,
        "network.num_res_blocks": network.num_res_blocks,
        "network.attn_resolutions": network.attn_resolutions,
    }


def _check_reference(network, path):
    """The network's answer against x_t, t and output of an .npz, as a line of a report."""
    if path is None:
        return ""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x_t, t, expected = (arrays[name] for name in ("x_t", "t", "output"))
    except (OSError, KeyError, ValueError) as e:
        raise InputError(f"--reference={path} cannot be read as an .npz with x_t, t and output: {e}") from e
    output = network({"x_t": tf.constant(x_t, tf.float32), "t": tf.constant(t, tf.int32)}).numpy()
    if output.shape != expected.shape:
        raise InputError(
            f"--reference={path}: its output is {list(expected.shape)}, the network's {list(output.shape)}."
        )
    return f"\nLargest difference to the reference output: {np.abs(output - expected).max():.3g}."


def _write_workdir(workdir, config, tensors):
    """A workdir with one checkpoint, which appears whole or not at all."""
    temporary = f"{os.path.normpath(workdir)}.tmp-{uuid.uuid4().hex}"
    try:
        os.makedirs(os.path.join(temporary, "samples"))
        with open(os.path.join(temporary, "config.json"), "w") as f:
            f.write(config_lib.to_json(config))
        step = int(tensors["step"])
        checkpoints.save(os.path.join(temporary, "ckpt"), step, tensors, _meta(config), keep=1)
        os.makedirs(workdir, exist_ok=True)
        os.replace(temporary, workdir)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _next_commands(workdir):
    quoted = shlex.quote(workdir)
    return f"Sample: python run_sample.py --workdir={quoted}\nTrain on: python run_train.py --workdir={quoted} --config=..."


def _meta(config):
    return {"version": __version__, "config": config.to_dict(), "time": time.time()}
