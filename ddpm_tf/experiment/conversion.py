"""Weights of other programs into workdirs, and workdirs' weights out."""

import json
import os
import shlex
from typing import Any

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from ddpm_tf import builders, files, text
from ddpm_tf import config as config_lib
from ddpm_tf.cluster.strategy import configure_devices
from ddpm_tf.convert.diffusers import load_diffusers, save_diffusers
from ddpm_tf.convert.tf1 import TF1State, fields_of_kwargs, read_tf1_checkpoint, save_tf1_checkpoint, tf1_name
from ddpm_tf.errors import InputError
from ddpm_tf.experiment.inference import load_for_inference
from ddpm_tf.experiment.run import read_run_config
from ddpm_tf.networks import UNet
from ddpm_tf.networks.contract import Network
from ddpm_tf.storage.bundles import assign
from ddpm_tf.storage.workdir import read_newest, write_workdir


def import_tf1(checkpoint: str, config: ConfigDict, workdir: str, *, reference: str | None = None) -> str:
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
    configure_devices()
    files.check_new_folder(workdir, "--workdir")
    _check_release(config)
    _check_kwargs(config, os.path.join(os.path.dirname(checkpoint), "kwargs.json"))
    model = builders.build_model(config, tf.distribute.get_strategy())
    variables = model.state()
    shapes = {tf1_name(v.path): tuple(v.shape) for v in model.network.variables}
    state = read_tf1_checkpoint(
        checkpoint, shapes=shapes, beta_1=config.optimizer.beta_1, beta_2=config.optimizer.beta_2
    )
    if state.m is not None and config.optimizer.name != "adam":
        raise InputError(
            f"{checkpoint} holds Adam's moments, but the config has optimizer.name={config.optimizer.name}. Use "
            "--config.optimizer.name=adam."
        )
    groups = {"network": state.weights, "ema": state.ema}
    if state.m is not None and state.v is not None:
        groups |= {"optimizer/momentum": state.m, "optimizer/velocity": state.v}
    tensors = {name: v.numpy() for name, v in variables.items()}  # moments that the file lacks stay new
    for group, arrays in groups.items():
        tensors |= {f"{group}/{v.path}": arrays[tf1_name(v.path)] for v in model.network.variables}
    tensors["step"] = np.asarray(state.step or 0, tensors["step"].dtype)
    assign(variables, tensors, checkpoint)
    parity = _check_reference(model.ema_network, reference)
    write_workdir(workdir, config, tensors)
    absent = "" if state.m is not None else "\nThe file holds no Adam moments: training would go on with new moments."
    return (
        f"{len(shapes)} weights ({model.network.count_params():,} parameters), their moving averages"
        f"{' and two moments' if state.m else ''} of {checkpoint}, step {int(tensors['step'])}.{absent}{parity}\n"
        f"{_next_commands(workdir)}"
    )


def import_diffusers(path: str, workdir: str, *, config: ConfigDict | None = None, reference: str | None = None) -> str:
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
    configure_devices()
    files.check_new_folder(workdir, "--workdir")
    loaded = load_diffusers(path)
    network_fields = _config_of_network(loaded)
    defaults = ""
    if config is None:
        config = _default_config(loaded, network_fields)
        defaults = "\nNo --config was given: training and sampling settings are the defaults of config.py."
    config_lib.validate(config)
    _check_agrees(config, network_fields, path)
    learned = builders.build_diffusion(config).has_learned_variance
    if loaded.out_channels != config.data.channels * (2 if learned else 1):
        raise InputError(
            f"{path} has {loaded.out_channels} output channels for images of {config.data.channels}, which does not fit "
            f"variance {config.diffusion.variance!r}. Give a --config with a variance that does."
        )
    parity = _check_reference(loaded, reference)
    model = builders.build_model(config, tf.distribute.get_strategy())
    for network in (model.network, model.ema_network):
        network.set_weights(loaded.get_weights())
    write_workdir(workdir, config, {name: v.numpy() for name, v in model.state().items()})
    return (
        f"{len(loaded.variables)} weights ({loaded.count_params():,} parameters) of {path}, step 0, variance "
        f"{config.diffusion.variance}.{parity}{defaults}\n{_next_commands(workdir)}"
    )


def export_weights(workdir: str, to: str, out: str, *, ema: bool = True) -> str:
    """Write a workdir's newest checkpoint for another program.

    Args:
        workdir: as written by `train`.
        to: tf1 (weights, moving average, Adam's moments and step under the original's names; RMSProp's moments are left
            out) or diffusers.
        out: tf1: the checkpoint's path without suffix; diffusers: a new or empty folder.
        ema: for diffusers, which knows one set of weights: the moving average, else the weights.

    Returns:
        a report, as text.

    Raises:
        InputError: a workdir that cannot be read, a network that the format has no place for, files that exist.
    """
    if to == "diffusers":
        inference = load_for_inference(workdir, ema=ema)
        if not isinstance(inference.network, UNet):
            raise InputError(
                f"--workdir={workdir} has a network that UNet2DModel cannot be; expected network.name=unet."
            )
        files.check_new_folder(out, "--out")
        save_diffusers(inference.network, out)
        count, step = inference.network.count_params(), inference.step
        kind = "moving average" if ema else "weights"
        return f"{count:,} parameters ({kind}) of step {step} as a UNet2DModel in {out}.\nUNet2DModel.from_pretrained({out!r})"
    config = read_run_config(workdir)
    _check_release(config)
    step, tensors = read_newest(workdir)

    def group(prefix: str) -> dict[str, np.ndarray]:
        return {tf1_name(k.removeprefix(prefix)): v for k, v in tensors.items() if k.startswith(prefix)}

    is_adam = config.optimizer.name == "adam"  # RMSProp's slots have the same names here
    m, v = (group(f"optimizer/{slot}/") if is_adam else None for slot in ("momentum", "velocity"))
    state = TF1State(group("network/"), group("ema/"), m, v, step)
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    save_tf1_checkpoint(out, state, beta_1=config.optimizer.beta_1, beta_2=config.optimizer.beta_2)
    kinds, left_out = (
        ("moving averages and moments", "") if is_adam else ("moving averages", " RMSProp's moments are not.")
    )
    return f"{len(state.weights)} weights, {kinds} of step {step} in {out}.index and .data.{left_out}"


def _check_release(config: ConfigDict) -> None:
    """The release has no setting for the time embedding's base or the groups, and its checkpoints do not hold them."""
    for field, value in (("network.theta", 10000), ("network.num_groups", 32)):
        if (actual := config_lib.get(config, field)) != value:
            raise InputError(f"The original release computes with {field}={value}; the config has {actual}.")


def _check_kwargs(config: ConfigDict, path: str) -> None:
    """The release's training scripts left their arguments in kwargs.json."""
    if not os.path.isfile(path):
        return
    try:
        with open(path) as f:
            fields = fields_of_kwargs(json.load(f))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as e:
        raise InputError(f"{path} cannot be read as the release's arguments: {e}") from e
    _check_agrees(config, fields, path)


def _check_agrees(config: ConfigDict, fields: dict[str, Any], origin: str) -> None:
    rows = [
        (field, repr(value), repr(config_lib.get(config, field)))
        for field, value in fields.items()
        if _normal(config, field, config_lib.get(config, field)) != _normal(config, field, value)
    ]
    if rows:
        table = text.table(rows, header=("field", "file", "config"), right=[1, 2]).replace("\n", "\n  ")
        raise InputError(f"{origin} and --config disagree:\n  {table}")


def _normal(config: ConfigDict, field: str, value: Any) -> Any:
    """One form of values that mean the same."""
    if field == "data.image_width":
        return value or config.data.image_size
    return sorted(value) if field == "network.attn_resolutions" else value


def _default_config(network: UNet, fields: dict[str, Any]) -> ConfigDict:
    """The defaults, with the fields that a network settles."""
    config = config_lib.default()
    for field, value in {**fields, "network.dropout": network.dropout}.items():
        config_lib.put(config, field, value)
    if network.out_channels == 2 * config.data.channels:
        config.diffusion.variance, config.train.loss = "learned_range", "hybrid"
    return config


def _config_of_network(network: UNet) -> dict[str, Any]:
    height, width, channels = network.image_shape
    return {
        "data.image_size": height,
        "data.image_width": 0 if width == height else width,
        "data.channels": channels,
        "network.ch": network.ch,
        "network.ch_mult": network.ch_mult,
        "network.num_res_blocks": network.num_res_blocks,
        "network.attn_resolutions": network.attn_resolutions,
        "network.block_size": network.block_size,
        "network.resamp_with_conv": network.resamp_with_conv,
        "network.theta": network.theta,
        "network.num_groups": network.num_groups,
    }


def _check_reference(network: Network, path: str | None) -> str:
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


def _next_commands(workdir: str) -> str:
    return f"Sample: python run_sample.py --workdir={shlex.quote(workdir)}"
