"""Checkpoints of the original TensorFlow 1 release: names, moments, and moving average."""

import os
from typing import NamedTuple

import numpy as np

from ddpm_tf.errors import InputError
from ddpm_tf.storage.bundles import assign, check_names, read_bundle, write_bundle

_LEAVES = {"kernel": "W", "bias": "b", "gamma": "gamma", "beta": "beta"}
_EMA, _M, _V = "/ExponentialMovingAverage", "/Adam", "/Adam_1"
_SCALARS = ("beta1_power", "beta2_power", "global_step")
_CODE = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".npy", ".h5", ".hdf5", ".keras")


class TF1State(NamedTuple):
    """What a release checkpoint holds: {TF1 name: float32 array} each; m, v and step are None where absent."""

    weights: dict
    ema: dict
    m: dict | None
    v: dict | None
    step: int | None


class LoadReport(NamedTuple):
    """What was assigned: variables and parameters in numbers, and the checkpoint's step (None if it holds none)."""

    num_variables: int
    num_parameters: int
    step: int | None


def tf1_name(path):
    """The release's name of a variable path: model/down_0.block_0/conv1/kernel -> model/down_0/block_0/conv1/W."""
    scope, _, leaf = path.replace(".", "/").rpartition("/")
    if leaf not in _LEAVES:
        raise InputError(f"The weight {path} has no counterpart in the TensorFlow 1 release.")
    return f"{scope}/{_LEAVES[leaf]}"


def read_tf1_checkpoint(path, *, shapes=None, beta_1=0.9, beta_2=0.999):
    """Read a checkpoint of the release (`PATH/model.ckpt-790000`).

    Args:
        path: the path without `.index`.
        shapes: {TF1 name: shape} of the network; checked before any tensor is read. None: as the file says.
        beta_1, beta_2: Adam's, which the file's beta powers have to agree with.

    Returns:
        TF1State.

    Raises:
        InputError: no checkpoint, one that is damaged, or one whose parts do not belong together: a moving average or
            moments for some variables only, other shapes, a beta power that contradicts the step.
    """
    path = os.fspath(path)
    if path.lower().endswith(_CODE):
        raise InputError(
            f"{path} is a format that can run code when it is loaded; it is not read. Give the prefix of a TensorFlow "
            "checkpoint (PATH/model.ckpt-790000, beside .index and .data files)."
        )
    if path.endswith(".index"):
        path = path.removesuffix(".index")
    arrays = read_bundle(path, check=lambda found: _check_layout(found, shapes, path))
    bad = [name for name, array in arrays.items() if name != "global_step" and array.dtype != np.float32]
    if bad:
        raise InputError(f"{path}: {bad[0]} is {arrays[bad[0]].dtype}, expected float32.")
    bad = [name for name, array in arrays.items() if name != "global_step" and not np.isfinite(array).all()]
    if bad:
        raise InputError(f"{path}: {bad[0]} has values that are not finite.")
    groups = _by_suffix(arrays)
    step = arrays.get("global_step")
    if step is not None:
        if step.dtype.kind not in "iu" or step < 0:
            raise InputError(f"{path}: global_step is {step} ({step.dtype}), expected an integer of at least 0.")
        step = int(step)
    for name, beta in (("beta1_power", beta_1), ("beta2_power", beta_2)):
        # A product of step + 1 float32 numbers; a contradiction means that file and step do not belong together.
        if step is not None and name in arrays and abs(arrays[name] - beta ** (step + 1)) > 1e-2:
            raise InputError(
                f"{path}: {name} is {arrays[name]:.3g}, but step {step} makes it {beta ** (step + 1):.3g}."
            )
    return TF1State(groups[""], groups[_EMA], groups[_M] or None, groups[_V] or None, step)


def _by_suffix(named):
    """{suffix: {variable name: value}} of everything but the scalars."""
    groups = {"": {}, _EMA: {}, _M: {}, _V: {}}
    for name, value in named.items():
        if name not in _SCALARS:
            suffix = next((s for s in (_EMA, _V, _M) if name.endswith(s)), "")
            groups[suffix][name.removesuffix(suffix)] = value
    return groups


def _check_layout(found, expected, path):
    """found: {name: shape} of the file; expected: of the network, or None. Moments are for all variables or for none."""
    groups = _by_suffix(found)
    expected = groups[""] if expected is None else expected
    for suffix, group in groups.items():
        if group or suffix in ("", _EMA):
            wanted = {name + suffix: shape for name, shape in expected.items()}
            check_names(wanted, {name + suffix: shape for name, shape in group.items()}, f"The checkpoint {path}")
    if bool(groups[_M]) != bool(groups[_V]):
        raise InputError(f"{path} has only one of Adam's two moments (/Adam and /Adam_1).")
    for name in _SCALARS:
        if found.get(name, ()) != ():
            raise InputError(f"{path}: {name} has shape {list(found[name])}, expected a scalar.")


def load_tf1_checkpoint(path, network, *, ema=True):
    """Assign every weight of `network` from a release checkpoint; moments and step are not used.

    Args:
        path: the path without `.index`.
        network: a UNet of the checkpoint's architecture.
        ema: the moving average of the weights, else the weights themselves.

    Returns:
        LoadReport.

    Raises:
        InputError: as `read_tf1_checkpoint`, or names or shapes that are not those of `network`; then nothing has been
            assigned.
    """
    variables = {tf1_name(v.path): v for v in network.variables}
    state = read_tf1_checkpoint(path, shapes={name: tuple(v.shape) for name, v in variables.items()})
    assign(variables, state.ema if ema else state.weights, f"The checkpoint {path}")
    return LoadReport(len(variables), sum(a.size for a in state.weights.values()), state.step)


def save_tf1_checkpoint(path, state, *, beta_1=0.9, beta_2=0.999):
    """Write a checkpoint under the release's names, readable by its `tf.train.Saver`.

    Args:
        path: the path without `.index`; existing files are not written over.
        state: TF1State; with m and v also the beta powers are written, as they stand after `step` steps.

    Raises:
        InputError: a checkpoint is there already.
    """
    path = os.fspath(path)
    if os.path.exists(path + ".index"):
        raise InputError(f"{path}.index exists; nothing is written over. Choose another path.")
    arrays = dict(state.weights)
    arrays |= {name + _EMA: array for name, array in state.ema.items()}
    if state.m is not None:
        arrays |= {name + _M: array for name, array in state.m.items()}
        arrays |= {name + _V: array for name, array in state.v.items()}
        for name, beta in (("beta1_power", beta_1), ("beta2_power", beta_2)):
            arrays[name] = np.float32(beta ** (state.step + 1))  # the release starts them at beta
    if state.step is not None:
        arrays["global_step"] = np.int64(state.step)
    write_bundle(path, arrays)


# The release's words for our fields: mean, variance and loss of its kwargs.json.
_PREDICTION = {"eps": "eps", "xstart": "x_0", "xprev": "x_prev"}
_VARIANCE = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small", "learned": "learned"}
_LOSS = {"mse": "simple", "kl": "vlb", "noisepred": "simple"}
_NETWORKS = {
    "unet2d16b2": {"network.ch": 128, "network.ch_mult": (1, 2, 2, 2), "network.num_res_blocks": 2,
                   "network.attn_resolutions": (16,)},
    "unet2d16b2c112244": {"network.ch": 128, "network.ch_mult": (1, 1, 2, 2, 4, 4), "network.num_res_blocks": 2,
                          "network.attn_resolutions": (16,)},
}  # fmt: skip
_PLAIN = {
    "total_bs": "data.batch_size",
    "grad_clip": "train.grad_clip",
    "lr": "optimizer.learning_rate",
    "warmup": "optimizer.warmup_steps",
    "optimizer": "optimizer.name",
    "num_diffusion_timesteps": "diffusion.num_timesteps",
    "beta_start": "diffusion.beta_start",
    "beta_end": "diffusion.beta_end",
    "beta_schedule": "diffusion.schedule",
    "dropout": "network.dropout",
    "block_size": "network.block_size",
}


def fields_of_kwargs(kwargs):
    """The config fields that the release's kwargs.json settles: {dotted path: value}.

    Args:
        kwargs: the parsed file, as its training scripts wrote it.

    Raises:
        InputError: a model name, mean, variance or loss that the release does not have.
    """
    fields = {ours: kwargs[theirs] for theirs, ours in _PLAIN.items() if theirs in kwargs}
    if "randflip" in kwargs:
        fields["data.random_flip"] = bool(kwargs["randflip"])
    for theirs, ours, table in (
        ("model_mean_type", "diffusion.prediction", _PREDICTION),
        ("model_var_type", "diffusion.variance", _VARIANCE),
        ("loss_type", "train.loss", _LOSS),
    ):
        if theirs in kwargs:
            if kwargs[theirs] not in table:
                raise InputError(f"kwargs.json has {theirs}={kwargs[theirs]!r}; the release knows {sorted(table)}.")
            fields[ours] = table[kwargs[theirs]]
    if kwargs.get("loss_type") == "noisepred":
        fields["diffusion.prediction"] = "eps"
    if "model_name" in kwargs:
        if kwargs["model_name"] not in _NETWORKS:
            raise InputError(
                f"kwargs.json has model_name={kwargs['model_name']!r}; the release knows {sorted(_NETWORKS)}."
            )
        fields |= _NETWORKS[kwargs["model_name"]]
    return fields
