"""Checkpoints of the original TensorFlow 1 release (hojonathanho/diffusion): weights, moving average, Adam moments, step."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import keras
import numpy as np

from ddpm_tf.errors import InputError
from ddpm_tf.paths import check_local
from ddpm_tf.storage.bundles import assign, check_names, read_bundle, write_bundle

_Value = TypeVar("_Value")

# {last part of a variable path: the release's name of it}.
_LEAVES = {"kernel": "W", "bias": "b", "gamma": "gamma", "beta": "beta"}
# What the release appends to a weight's name for its moving average and its two Adam moments.
_EMA, _M, _V = "/ExponentialMovingAverage", "/Adam", "/Adam_1"
_SCALARS = ("beta1_power", "beta2_power", "global_step")
# Formats that can run code when they are loaded.
_CODE = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".npy", ".h5", ".hdf5", ".keras")


class TF1State(NamedTuple):
    """The content of a checkpoint of the release.

    weights, ema: the weights and their moving average, {the release's name of a weight: float32 array}.
    m, v: Adam's first and second moments, likewise; None in a checkpoint without moments.
    step: completed training steps; None in a checkpoint without step.
    """

    weights: dict[str, np.ndarray]
    ema: dict[str, np.ndarray]
    m: dict[str, np.ndarray] | None
    v: dict[str, np.ndarray] | None
    step: int | None


class LoadReport(NamedTuple):
    """How many variables and parameters were assigned, and the checkpoint's step (None if it holds none)."""

    num_variables: int
    num_parameters: int
    step: int | None


def tf1_name(path: str) -> str:
    """The release's name of a variable: model/down_0/block_0/conv1/W for the path model/down_0.block_0/conv1/kernel."""
    scope, _, leaf = path.replace(".", "/").rpartition("/")
    if leaf not in _LEAVES:
        raise InputError(f"The weight {path} has no counterpart in the TensorFlow 1 release.")
    return f"{scope}/{_LEAVES[leaf]}"


def read_tf1_checkpoint(
    path: str | os.PathLike[str],
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
) -> TF1State:
    """Read a checkpoint of the release.

    Args:
        path: the path without `.index`, e.g. FOLDER/model.ckpt-790000.
        shapes: {the release's name: shape} of the network's weights, checked before any tensor is read. None: any.
        beta_1, beta_2: Adam's settings. The file holds powers of them, which must agree with its step.

    Raises:
        InputError: there is no checkpoint, it is damaged, its weights are not those of `shapes`, or its parts do not belong
            together: a moving average or moments of some weights only, or a beta power that contradicts the step.
    """
    path = os.fspath(path)
    check_local(path, "path")
    if path.lower().endswith(_CODE):
        raise InputError(
            f"{path} is not read, because its format can run code when it is loaded. Expected a TensorFlow checkpoint, as the "
            "path of its .index and .data files without these suffixes: FOLDER/model.ckpt-790000."
        )
    if path.endswith(".index"):
        path = path.removesuffix(".index")
    arrays = read_bundle(path, check=lambda stored: _check_layout(stored, shapes, path))
    _check_values(arrays, path)
    groups = _by_suffix(arrays)
    step = int(arrays["global_step"]) if "global_step" in arrays else None
    for name, beta in (("beta1_power", beta_1), ("beta2_power", beta_2)):
        # The release multiplies step + 1 float32 numbers, hence the wide tolerance.
        if step is not None and name in arrays and abs(arrays[name] - beta ** (step + 1)) > 1e-2:
            raise InputError(
                f"{path}: {name} is {arrays[name]:.3g}, but step {step} makes it {beta ** (step + 1):.3g}. The file's parts "
                "do not belong together, or Adam's beta is another."
            )
    return TF1State(groups[""], groups[_EMA], groups[_M] or None, groups[_V] or None, step)


def _check_layout(
    stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]] | None, path: str
) -> None:
    """Refuse names or shapes that do not fit each other or the network.

    Args:
        stored: {name: shape} in the file. Adam's moments must be there for all weights or for none.
        expected: {name: shape} of the network's weights. None: those of the file.
    """
    groups = _by_suffix(stored)
    expected = groups[""] if expected is None else expected
    for suffix, group in groups.items():
        if group or suffix in ("", _EMA):
            needed = {name + suffix: shape for name, shape in expected.items()}
            check_names(needed, {name + suffix: shape for name, shape in group.items()}, f"The checkpoint {path}")
    if bool(groups[_M]) != bool(groups[_V]):
        raise InputError(f"{path} has only one of Adam's two moments (/Adam and /Adam_1).")
    for name in _SCALARS:
        if stored.get(name, ()) != ():
            raise InputError(f"{path}: {name} has shape {list(stored[name])}, expected a scalar.")


def _check_values(arrays: Mapping[str, np.ndarray], path: str) -> None:
    """Refuse types that the release does not write, and values that are not finite."""
    floats = {name: array for name, array in arrays.items() if name != "global_step"}
    for name, array in floats.items():
        if array.dtype != np.float32:
            raise InputError(f"{path}: {name} is {array.dtype}, expected float32.")
    for name, array in floats.items():
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {name} has values that are not finite.")
    step = arrays.get("global_step")
    if step is not None and (step.dtype.kind not in "iu" or step < 0):
        raise InputError(f"{path}: global_step is {step} ({step.dtype}), expected an integer of at least 0.")


def _by_suffix(named: Mapping[str, _Value]) -> dict[str, dict[str, _Value]]:
    """{suffix: {the weight's name: value}} of everything but the scalars; the suffix of a weight itself is ""."""
    groups: dict[str, dict[str, _Value]] = {"": {}, _EMA: {}, _M: {}, _V: {}}
    for name, value in named.items():
        if name not in _SCALARS:
            suffix = next((s for s in (_EMA, _V, _M) if name.endswith(s)), "")
            groups[suffix][name.removesuffix(suffix)] = value
    return groups


def load_tf1_checkpoint(path: str | os.PathLike[str], network: keras.Model, *, ema: bool = True) -> LoadReport:
    """Assign every weight of `network` from a checkpoint of the release. Moments and step are not used.

    Args:
        path: the path without `.index`.
        network: a UNet of the checkpoint's architecture.
        ema: use the moving average of the weights, else the weights themselves.

    Raises:
        InputError: as `read_tf1_checkpoint`, or weights that are not those of `network`. Nothing is assigned then.
    """
    variables = {tf1_name(v.path): v for v in network.variables}
    state = read_tf1_checkpoint(path, shapes={name: tuple(v.shape) for name, v in variables.items()})
    assign(variables, state.ema if ema else state.weights, f"The checkpoint {path}")
    return LoadReport(len(variables), sum(a.size for a in state.weights.values()), state.step)


def save_tf1_checkpoint(
    path: str | os.PathLike[str], state: TF1State, *, beta_1: float = 0.9, beta_2: float = 0.999
) -> None:
    """Write a checkpoint under the release's names, which the release's `tf.train.Saver` can read.

    Args:
        path: the path without `.index`.
        state: the content. With m and v, a step is needed too.
        beta_1, beta_2: Adam's settings. With m and v, their powers after `step` steps are written.

    Raises:
        InputError: as `check_new_checkpoint`.
    """
    path = os.fspath(path)
    check_new_checkpoint(path)
    arrays: dict[str, Any] = dict(state.weights)
    arrays |= {name + _EMA: array for name, array in state.ema.items()}
    if state.m is not None and state.v is not None and state.step is not None:
        arrays |= {name + _M: array for name, array in state.m.items()}
        arrays |= {name + _V: array for name, array in state.v.items()}
        for name, beta in (("beta1_power", beta_1), ("beta2_power", beta_2)):
            arrays[name] = np.float32(beta ** (state.step + 1))  # the release starts them at beta
    if state.step is not None:
        arrays["global_step"] = np.int64(state.step)
    write_bundle(path, arrays)


def check_new_checkpoint(path: str, name: str = "path") -> None:
    """Refuse a path that `save_tf1_checkpoint` cannot write to; write nothing.

    Args:
        name: the flag or argument that gave the path.

    Raises:
        InputError: no local path, a folder, a name with a suffix, or the path of a checkpoint that exists.
    """
    check_local(path, name)
    if os.path.isdir(path) or os.path.basename(path) in ("", ".", ".."):
        raise InputError(
            f"{name}={path} is a folder; expected what the names of the files begin with, for example "
            f"{os.path.join(path, 'model.ckpt-1200')}."
        )
    if path.endswith((".index", ".meta")) or ".data-" in os.path.basename(path):
        raise InputError(f"{name}={path} has a suffix; give it without, because every file gets its own.")
    if os.path.lexists(path + ".index"):
        raise InputError(f"{name}={path}: {path}.index exists, and nothing is written over it. Choose another path.")


# {the release's word in kwargs.json: ours}.
_PREDICTION = {"eps": "eps", "xstart": "x_0", "xprev": "x_prev"}
_VARIANCE = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small", "learned": "learned"}
_LOSS = {"mse": "simple", "kl": "vlb", "noisepred": "simple"}
# {model_name of kwargs.json: config fields}.
_NETWORKS = {
    "unet2d16b2": {"network.ch": 128, "network.ch_mult": (1, 2, 2, 2), "network.num_res_blocks": 2,
                   "network.attn_resolutions": (16,)},
    "unet2d16b2c112244": {"network.ch": 128, "network.ch_mult": (1, 1, 2, 2, 4, 4), "network.num_res_blocks": 2,
                          "network.attn_resolutions": (16,)},
}  # fmt: skip
# {key of kwargs.json: config field with the same values}.
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


def fields_of_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The config fields that a kwargs.json of the release determines, {dotted path: value}.

    Args:
        kwargs: the parsed file. The release's training scripts write their arguments to it.

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
                raise InputError(f"kwargs.json has {theirs}={kwargs[theirs]!r}; the release has {sorted(table)}.")
            fields[ours] = table[kwargs[theirs]]
    if kwargs.get("loss_type") == "noisepred":
        fields["diffusion.prediction"] = "eps"
    if "model_name" in kwargs:
        if kwargs["model_name"] not in _NETWORKS:
            raise InputError(
                f"kwargs.json has model_name={kwargs['model_name']!r}; the release has {sorted(_NETWORKS)}."
            )
        fields |= _NETWORKS[kwargs["model_name"]]
    return fields
