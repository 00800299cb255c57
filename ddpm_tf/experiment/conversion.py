"""Weights of other programs into workdirs, and workdirs' weights out."""

import contextlib
import os
import re
import shlex
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from ddpm_tf import builders, checks, files, text
from ddpm_tf import config as config_lib
from ddpm_tf.cluster.strategy import configure_devices
from ddpm_tf.convert.diffusers import describe_null_class, load_diffusers, load_diffusers_scheduler, save_diffusers
from ddpm_tf.convert.diffusers_scheduler import Scheduler, describe_scheduler, has_spacing, same_betas
from ddpm_tf.convert.json_file import read_object
from ddpm_tf.convert.tf1 import (
    TF1State,
    check_new_checkpoint,
    fields_of_kwargs,
    read_tf1_checkpoint,
    save_tf1_checkpoint,
    tf1_name,
)
from ddpm_tf.errors import InputError, StorageError, WorkdirError, storage_advice
from ddpm_tf.experiment.inference import load_for_inference
from ddpm_tf.experiment.run import read_drawing_config
from ddpm_tf.networks import UNet
from ddpm_tf.networks.contract import Network
from ddpm_tf.storage.bundles import assign
from ddpm_tf.storage.checkpoints import check_space, is_full
from ddpm_tf.storage.workdir import check_writable, read_newest, write_workdir


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
    _check_draws(config)
    configure_devices()
    _check_new_workdir(workdir)
    expected = _read_reference(reference)
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
    parity = _parity(model.ema_network, expected)
    _make_workdir(workdir, config, tensors)
    absent = "" if state.m is not None else "\nThe file holds no Adam moments: training would go on with new moments."
    return (
        f"{len(shapes)} weights ({model.network.count_params():,} parameters), their moving averages"
        f"{' and two moments' if state.m else ''} of {checkpoint}, step {int(tensors['step'])}.{absent}{parity}\n"
        f"{_next_commands(workdir)}"
    )


def import_diffusers(path: str, workdir: str, *, config: ConfigDict | None = None, reference: str | None = None) -> str:
    """Turn a diffusers `UNet2DModel` into a workdir: its weights as both weights and moving average, step 0.

    A scheduler_config.json beside the weights, or in the scheduler/ of the pipeline, says which chain and target the network
    was trained for. A `config` has to agree with it. How to draw (sampler, fixed variance, clipping, spacing) is a choice:
    the config's if there is one, else the file's.

    Args:
        path: a folder with config.json and safetensors, a pipeline's folder with unet/, or the .safetensors file.
        workdir: a new or empty folder.
        config: the diffusion and training settings; its network has to be the file's. None: what the files say, and else
            the defaults.
        reference: as in `import_tf1`; for a network with classes also with labels.

    Returns:
        a report, as text.

    Raises:
        InputError: files or settings that do not fit; nothing has been written then.
    """
    if config is not None:
        config_lib.validate(config)
        _check_draws(config)
    configure_devices()
    _check_new_workdir(workdir)
    expected = _read_reference(reference)
    scheduler = load_diffusers_scheduler(path)
    if config is None and scheduler is not None:
        _check_complete(scheduler)
    loaded = load_diffusers(path)
    network_fields = _config_of_network(loaded)
    is_given = config is not None
    if config is None:
        config = _default_config(loaded, network_fields, scheduler)
    config_lib.validate(config)
    _check_agrees(config, {**network_fields, **_facts(scheduler, config)}, path)
    learned = builders.build_diffusion(config).has_learned_variance
    if loaded.out_channels != config.data.channels * (2 if learned else 1):
        raise InputError(
            f"{path} has {loaded.out_channels} output channels for images of {config.data.channels}, which does not fit "
            f"variance {config.diffusion.variance!r}. Give a --config with a variance that does."
        )
    parity = _parity(loaded, expected)
    model = builders.build_model(config, tf.distribute.get_strategy())
    for network in (model.network, model.ema_network):
        network.set_weights(loaded.get_weights())
    _make_workdir(workdir, config, {name: v.numpy() for name, v in model.state().items()})
    classes = "" if loaded.num_classes is None else f"\n{describe_null_class(loaded.num_classes)}"
    return (
        f"{len(loaded.variables)} weights ({loaded.count_params():,} parameters) of {path}, step 0.{parity}{classes}\n"
        f"{_scheduler_report(scheduler, config, is_given)}\n{_next_commands(workdir)}"
    )


def export_weights(workdir: str, to: str, out: str, *, ema: bool = True) -> str:
    """Write a workdir's newest checkpoint for another program. It appears whole or not at all.

    Args:
        workdir: as written by `train`.
        to: tf1 (weights, moving average, Adam's moments and step under the original's names; RMSProp's moments are left
            out) or diffusers (a UNet2DModel and its DDPMScheduler).
        out: tf1: the checkpoint's path without suffix; diffusers: a new or empty folder.
        ema: for diffusers, which knows one set of weights: the moving average, else the weights.

    Returns:
        a report, as text.

    Raises:
        InputError: a workdir that cannot be read, a network or setting that the format has no place for, files that exist.
        WorkdirError, StorageError: `out` cannot be written to.
    """
    if to == "diffusers":
        return _export_diffusers(workdir, out, ema)
    return _export_tf1(workdir, out)


def _export_diffusers(workdir: str, out: str, ema: bool) -> str:
    files.check_new_folder(out, "--out")
    config = read_drawing_config(workdir)
    scheduler = _describe_scheduler(config)
    inference = load_for_inference(workdir, ema=ema)
    if not isinstance(inference.network, UNet):
        raise InputError(f"--workdir={workdir} has a network that UNet2DModel cannot be; expected network.name=unet.")
    with _writing(out):
        save_diffusers(inference.network, out, scheduler=scheduler)
    s, num_timesteps = config.sample, config.diffusion.num_timesteps
    num_steps = s.num_steps or num_timesteps
    left_out = [] if s.sampler == "ddpm" else [f"sample.sampler={s.sampler}"]
    left_out += [] if has_spacing(s.spacing, num_timesteps, num_steps) else [f"sample.spacing={s.spacing}"]
    notes = f"\nA DDPMScheduler has no place for {', '.join(left_out)}: not written." if left_out else ""
    if scheduler["trained_betas"] is not None:
        notes += f"\nIts {config.diffusion.schedule} schedule has no name there: its betas are in trained_betas."
    return (
        f"{inference.network.count_params():,} parameters ({'moving average' if ema else 'weights'}) of step "
        f"{inference.step} as a UNet2DModel with its DDPMScheduler in {out}.{notes}\n"
        f"{_in_python(out, inference.network, num_steps)}"
    )


def _in_python(out: str, network: UNet, num_steps: int) -> str:
    """How to draw with diffusers from an exported folder, for a report."""
    unet, scheduler = f"UNet2DModel.from_pretrained({out!r})", f"DDPMScheduler.from_pretrained({out!r})"
    if network.num_classes is None:
        return f"In Python: DDPMPipeline({unet}, {scheduler})(num_inference_steps={num_steps})"
    height, width, channels = network.image_shape
    return f"""class_labels are 0..{network.num_classes - 1}; {network.num_classes} is the null class (no condition).
DDPMPipeline passes no labels to the network. In Python, without it:
  unet, scheduler = {unet}, {scheduler}
  x_t, class_labels = torch.randn(1, {channels}, {height}, {width}), torch.tensor([0])
  scheduler.set_timesteps({num_steps})
  for t in scheduler.timesteps:
      with torch.no_grad():
          x_t = scheduler.step(unet(x_t, t, class_labels).sample, t, x_t).prev_sample"""


def _describe_scheduler(config: ConfigDict) -> dict[str, Any]:
    """The content of scheduler_config.json for a config."""
    d, s = config.diffusion, config.sample
    return describe_scheduler(
        builders.build_diffusion(config).schedule.betas,
        schedule=d.schedule,
        settings=builders.settings_of(config, "diffusion.schedule"),
        prediction=d.prediction,
        variance=d.variance,
        clip=s.clip,
        spacing=s.spacing,
    )


def _export_tf1(workdir: str, out: str) -> str:
    check_new_checkpoint(out, "--out")
    config = read_drawing_config(workdir)
    _check_release(config)
    step, tensors = read_newest(workdir)

    def group(prefix: str) -> dict[str, np.ndarray]:
        return {tf1_name(k.removeprefix(prefix)): v for k, v in tensors.items() if k.startswith(prefix)}

    is_adam = config.optimizer.name == "adam"  # RMSProp's slots have the same names here
    m, v = (group(f"optimizer/{slot}/") if is_adam else None for slot in ("momentum", "velocity"))
    state = TF1State(group("network/"), group("ema/"), m, v, step)
    with _writing(out), _staged(out) as prefix:
        save_tf1_checkpoint(prefix, state, beta_1=config.optimizer.beta_1, beta_2=config.optimizer.beta_2)
    kinds, left_out = (
        ("moving averages and moments", "") if is_adam else ("moving averages", " RMSProp's moments are not.")
    )
    return f"{len(state.weights)} weights, {kinds} of step {step} in {out}.index and .data.{left_out}"


def _check_new_workdir(workdir: str) -> None:
    files.check_new_folder(workdir, "--workdir")
    check_writable(workdir)
    _sweep(workdir)


def _make_workdir(workdir: str, config: ConfigDict, tensors: dict[str, np.ndarray]) -> None:
    """Write the workdir. Where it cannot be, nothing of it and of its parents is left."""
    parent = os.path.dirname(os.path.abspath(workdir))
    with files.made_folder(parent):
        check_space(parent, tensors)
        write_workdir(workdir, config, tensors)


@contextlib.contextmanager
def _writing(out: str) -> Iterator[None]:
    """Say of an error of the file system what to do about it."""
    _sweep(out)
    try:
        yield
    except (OSError, tf.errors.OpError) as e:
        if is_full(e):
            raise StorageError(
                f"--out={out} cannot be written: the disk, a quota or a size limit is full. {storage_advice(e)}"
            ) from e
        raise WorkdirError(f"--out={out} cannot be written: {e}. Choose another, or change its rights.") from e


@contextlib.contextmanager
def _staged(out: str) -> Iterator[str]:
    """Yield a path without suffix in a temporary folder; at the end of the block its files become those of `out`.

    The index comes last: without it there is no checkpoint.
    """
    parent, name = os.path.split(os.path.abspath(out))
    temporary = os.path.join(parent, f"{files.TEMPORARY}{name}-{uuid.uuid4().hex}")
    with files.made_folder(parent):
        try:
            os.mkdir(temporary)
            with files.locked(temporary):
                yield os.path.join(temporary, name)
                for each in sorted(os.listdir(temporary), key=lambda n: n.endswith(".index")):
                    files.fsync(os.path.join(temporary, each))
                    os.replace(os.path.join(temporary, each), os.path.join(parent, each))
            files.fsync(parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _sweep(path: str) -> None:
    """Delete the temporary folders that kills of this command left beside `path`, and no others."""
    parent, name = os.path.split(os.path.realpath(path))
    for each in os.listdir(parent) if os.path.isdir(parent) else ():
        if re.fullmatch(rf"{re.escape(files.TEMPORARY + name)}-[0-9a-f]{{32}}", each):
            left = os.path.join(parent, each)
            with contextlib.suppress(OSError), files.locked(left):
                shutil.rmtree(left, ignore_errors=True)


def _check_draws(config: ConfigDict) -> None:
    """Refuse to read other programs' networks, which draw images, into a classifier."""
    if builders.is_classifier(config):
        raise InputError(
            "--config is of a classifier, and what is read is a network that draws images. Give its config."
        )


def _check_release(config: ConfigDict) -> None:
    """The release has no classes and no setting for the time embedding's base or the groups."""
    if config.network.num_classes:
        raise InputError(
            f"The config has network.num_classes={config.network.num_classes}, expected 0: the original release has no "
            "classes, and its checkpoints have no place for them. Only diffusers' format has."
        )
    for field, value in (("network.theta", 10000), ("network.num_groups", 32)):
        if (actual := config_lib.get(config, field)) != value:
            raise InputError(
                f"The original release computes with {field}={value}; the config has {actual}, which its format cannot say."
            )


def _check_kwargs(config: ConfigDict, path: str) -> None:
    """The release's training scripts left their arguments in kwargs.json."""
    if not os.path.lexists(path):
        return
    try:
        fields = fields_of_kwargs(read_object(path, "the release's arguments"))
    except TypeError as e:  # a list where the release has a name
        raise InputError(f"{path} cannot be read as the release's arguments: {e}") from e
    _check_agrees(config, fields, path)


def _check_complete(scheduler: Scheduler) -> None:
    """Refuse to make a config of a scheduler_config.json that it cannot follow."""
    if scheduler.facts["diffusion.schedule"] is None:
        raise InputError(
            f"{scheduler.path}: trained_betas are those of no schedule of this program with its default settings. Give a "
            "--config whose diffusion section has these betas."
        )
    if scheduler.foreign:
        raise InputError(
            f"{scheduler.path} says how to draw what this program cannot: {'; '.join(scheduler.foreign)}. Give a --config, "
            "which then decides how to draw."
        )


def _facts(scheduler: Scheduler | None, config: ConfigDict) -> dict[str, Any]:
    """The fields that a scheduler settles; without those of its schedule if the config has the same betas by another name."""
    if scheduler is None:
        return {}
    facts = dict(scheduler.facts)
    if same_betas(builders.build_diffusion(config).schedule.betas, scheduler.betas):
        schedule = [
            f for f in facts if f not in ("diffusion.num_timesteps", "diffusion.prediction", "diffusion.variance")
        ]
        return {field: value for field, value in facts.items() if field not in schedule}
    return {**facts, "diffusion.schedule": facts["diffusion.schedule"] or "trained_betas of the file"}


def _scheduler_report(scheduler: Scheduler | None, config: ConfigDict, is_given: bool) -> str:
    """What the files and the config say of chain, target and drawing, for the report of an import."""
    training = "" if is_given else "\nNo --config was given: all other settings are the defaults of config.py."
    if scheduler is None:
        fields = ("schedule", "num_timesteps", "prediction", "variance")
        values = ", ".join(f"diffusion.{field}={config.diffusion[field]}" for field in fields)
        return (
            "There is no scheduler_config.json, which would say what the network was trained for. Make sure of these, which "
            f"are {'those of --config' if is_given else 'defaults'}: {values}.{training}"
        )
    said = {**scheduler.facts, **scheduler.choices}
    lines = [f"{scheduler.path} says {', '.join(f'{field}={value}' for field, value in said.items())}."]
    other = {f: config_lib.get(config, f) for f, v in scheduler.choices.items() if config_lib.get(config, f) != v}
    if other or (is_given and scheduler.foreign):
        decided = [f"{field}={value}" for field, value in other.items()] + [f"not {f}" for f in scheduler.foreign]
        lines.append(f"--config decides how to draw: {', '.join(decided)}.")
    if not is_given and config.diffusion.variance.startswith("fixed_small"):
        lines.append("Ho et al.'s figures need variance fixed_large: give a --config with it to draw so.")
    if scheduler.unread:
        lines.append(
            f"Not read, as in diffusers, because such a scheduler has no use for it: {', '.join(scheduler.unread)}."
        )
    return "\n".join(lines) + training


# {field: what to do if it disagrees with the file, whose value stands in the braces}.
_HINTS = {
    "network.num_classes": "For these weights set --config.network.num_classes={}: the number of rows of the file's table of "
    "classes, less one for the null class (0: no table)."
}


def _check_agrees(config: ConfigDict, fields: dict[str, Any], origin: str) -> None:
    rows = [
        (field, repr(value), repr(config_lib.get(config, field)))
        for field, value in fields.items()
        if _normal(config, field, config_lib.get(config, field)) != _normal(config, field, value)
    ]
    if rows:
        table = text.table(rows, header=("field", "file", "config"), right=[1, 2]).replace("\n", "\n  ")
        hints = "".join(f"\n{_HINTS[field].format(value)}" for field, value, _ in rows if field in _HINTS)
        raise InputError(f"{origin} and --config disagree:\n  {table}{hints}")


def _normal(config: ConfigDict, field: str, value: Any) -> Any:
    """One form of values that mean the same."""
    if field == "data.image_width":
        return value or config.data.image_size
    return sorted(value) if field == "network.attn_resolutions" else value


def _default_config(network: UNet, fields: dict[str, Any], scheduler: Scheduler | None) -> ConfigDict:
    """The defaults, with the fields that a network and its scheduler settle."""
    config = config_lib.default()
    if network.out_channels == 2 * network.image_shape[-1]:
        config.diffusion.variance = "learned_range"
    said = {**scheduler.facts, **scheduler.choices} if scheduler else {}
    for field, value in {**fields, "network.dropout": network.dropout, **said}.items():
        config_lib.put(config, field, value)
    if config.diffusion.variance == "learned_range":
        config.train.loss = "hybrid"
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
        "network.num_classes": network.num_classes or 0,
    }


class _Expected(NamedTuple):
    """What a network should answer: the file of --reference, its x_t [B, H, W, C] and t [B], the output, and labels [B].

    labels: None if the file has none.
    """

    path: str
    x_t: np.ndarray
    t: np.ndarray
    output: np.ndarray
    labels: np.ndarray | None


def _read_reference(path: str | None) -> _Expected | None:
    if path is None:
        return None
    problem = "it does not exist"
    if os.path.isfile(path):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                x_t, t, output = (arrays[name] for name in ("x_t", "t", "output"))
                labels = arrays["labels"] if "labels" in arrays else None
            integers = {"t": t} if labels is None else {"t": t, "labels": labels}
            are_integers = all(a.shape == x_t.shape[:1] and a.dtype.kind in "iu" for a in integers.values())
            if x_t.ndim == 4 and x_t.dtype.kind == "f" and are_integers:
                return _Expected(path, x_t, t, output, labels)
            problem = ", ".join(f"{name} is {a.dtype} {list(a.shape)}" for name, a in {"x_t": x_t, **integers}.items())
        except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as e:
            problem = f"{type(e).__name__}"
    raise InputError(
        f"--reference={path} cannot be read ({problem}); expected an .npz with x_t (floats [B, H, W, C]), t (integers [B]), "
        "output, and for a network with classes labels (integers [B])."
    )


def _parity(network: Network, expected: _Expected | None) -> str:
    """The network's largest difference to an expected output, as a line of a report."""
    if expected is None:
        return ""
    if expected.x_t.shape[1:] != tuple(network.image_shape):
        raise InputError(
            f"--reference={expected.path}: its x_t has images of {list(expected.x_t.shape[1:])}, the network has "
            f"{list(network.image_shape)}."
        )
    inputs = {"x_t": tf.constant(expected.x_t, tf.float32), "t": tf.constant(expected.t, tf.int32)}
    output = network(inputs | _labels(network, expected)).numpy()
    if output.shape != expected.output.shape:
        raise InputError(
            f"--reference={expected.path}: its output is {list(expected.output.shape)}, the network's {list(output.shape)}."
        )
    return f"\nLargest difference to the reference output: {np.abs(output - expected.output).max():.3g}."


def _labels(network: Network, expected: _Expected) -> dict[str, tf.Tensor]:
    """The labels of an expected output, as the network takes them; nothing for a network without classes."""
    labels, num_classes = expected.labels, network.num_classes
    if labels is None and num_classes is None:
        return {}
    if labels is None:
        raise InputError(
            f"--reference={expected.path} has no labels, and the network has {num_classes} classes. Add labels, integers [B] "
            f"within 0..{num_classes}, with which the output was computed."
        )
    if num_classes is None:
        raise InputError(
            f"--reference={expected.path} has labels, but the network has no classes. Use the reference of this network, or "
            "leave its labels out."
        )
    checks.integers(f"--reference={expected.path}: its labels", labels, low=0, high=num_classes)
    return {"labels": tf.constant(labels, tf.int32)}


def _next_commands(workdir: str) -> str:
    return f"Sample: python run_sample.py --workdir={shlex.quote(workdir)}"
