"""Every configuration field: its default, meaning and unit, and whether it may change when a run goes on."""

import difflib
import hashlib
import json
from typing import Any, NamedTuple

import ml_collections

from ddpm_tf.errors import InputError


class Field(NamedTuple):
    """One field. `free`: may differ from the workdir's when training goes on; a fixed one makes another run."""

    path: str
    default: Any
    free: bool
    doc: str


_FREE, _FIXED = True, False

FIELDS = (
    Field("seed", 0, _FIXED, "Seed of the initial weights, data order, timesteps, noise and dropout."),
    Field("data.source", "digits", _FIXED, "digits, folder:PATH, npz:PATH, tfds:NAME or tfrecord:PATH."),
    Field("data.split", "train", _FIXED, "Split of a TFDS data set."),
    Field("data.data_dir", "", _FREE, "Where TFDS data sets are prepared; empty: TFDS' own default."),
    Field("data.image_size", 32, _FIXED, "Height of the images, pixels."),
    Field("data.image_width", 0, _FIXED, "Width of the images, pixels; 0: as the height."),
    Field("data.channels", 3, _FIXED, "Channels of the images: 1 or 3."),
    Field("data.batch_size", 128, _FIXED, "Global batch size, images; divisible by the number of replicas."),
    Field("data.random_flip", False, _FIXED, "Mirror each image with probability 1/2."),
    Field("data.in_memory_mb", 4096, _FREE, "Data up to this size are decoded at the start and kept, MiB."),
    Field("diffusion.schedule", "linear", _FIXED, "Beta schedule, a name of make_betas."),
    Field("diffusion.num_timesteps", 1000, _FIXED, "T, the number of timesteps."),
    Field("diffusion.beta_start", 1e-4, _FIXED, "First beta."),
    Field("diffusion.beta_end", 0.02, _FIXED, "Last beta."),
    Field("diffusion.prediction", "eps", _FIXED, "What the network predicts: eps, x_0, v or x_prev."),
    Field("diffusion.variance", "fixed_large", _FIXED, "A name of VARIANCES: fixed_large, learned_range, ..."),
    Field("network.name", "unet", _FIXED, "The network: unet (Ho et al. 2020)."),
    Field("network.ch", 128, _FIXED, "Channels of the first level, a multiple of 32."),
    Field("network.ch_mult", (1, 2, 2, 2), _FIXED, "Factor of network.ch per level."),
    Field("network.num_res_blocks", 2, _FIXED, "Residual blocks per level."),
    Field("network.attn_resolutions", (16,), _FIXED, "Heights at which there is self-attention."),
    Field("network.dropout", 0.0, _FIXED, "Dropout rate, 0 <= rate < 1."),
    Field("network.resamp_with_conv", True, _FIXED, "Resample with a convolution."),
    Field("network.block_size", 1, _FIXED, "Side of the pixel blocks that become channels; saves memory."),
    Field("network.remat", False, _FREE, "Compute activations again for the gradient: less memory, more time, other rounding."),
    Field("train.num_steps", 800_000, _FREE, "Training ends after this many steps."),
    Field("train.log_every", 100, _FREE, "Interval of metrics.jsonl rows, steps; 0: never."),
    Field("train.checkpoint_every", 5000, _FREE, "Interval of checkpoints, steps; 0: only at the end."),
    Field("train.checkpoint_minutes", 30.0, _FREE, "A checkpoint also after this many minutes without one; 0: never."),
    Field("train.keep_checkpoints", 3, _FREE, "How many of the newest checkpoints are kept."),
    Field("train.keep_every", 0, _FREE, "Checkpoints of multiples of this many steps are kept for good; 0: none."),
    Field("train.sample_every", 5000, _FREE, "Interval of sample grids, steps; 0: only at the end."),
    Field("train.loss", "simple", _FIXED, "Training loss: simple (Eq. 14), vlb or hybrid."),
    Field("train.loss_weight", "none", _FIXED, "Weights of loss simple: none, snr, min_snr, p2."),
    Field("train.ema_decay", 0.9999, _FIXED, "Decay of the moving average of the weights, per step."),
    Field("train.grad_clip", 1.0, _FIXED, "Largest global norm of the gradient; 0: no clipping."),
    Field("train.grad_clip_mode", "global", _FIXED, "global, or per_replica (the original's rule)."),
    Field("train.jit_compile", "auto", _FIXED, "XLA for loss and gradient: on, off, or auto (on with a GPU)."),
    Field("train.precision", "float32", _FREE, "Of training's forward and backward pass: float32, bfloat16 or float16."),
    Field("train.tf32", False, _FREE, "Let a GPU train with TF32, 10 bits of mantissa, where it is faster."),
    Field("train.micro_batches", 1, _FREE, "Parts of a batch whose gradients are added one after the other; saves memory."),
    Field("train.deterministic", False, _FREE, "TensorFlow's op determinism: bit-exact resume also on a GPU; slower there."),
    Field("train.max_skipped_steps", 20, _FREE, "Training stops after this many steps in a row that are not finite."),
    Field("train.steps_per_execution", 1, _FREE, "Steps per call of the compiled function; divides the intervals."),
    Field("optimizer.name", "adam", _FIXED, "adam, or rmsprop (decay 0.95, momentum 0.9), the original's two."),
    Field("optimizer.learning_rate", 2e-4, _FREE, "Learning rate after warm-up."),
    Field("optimizer.warmup_steps", 5000, _FREE, "Steps of linear warm-up from 0; 0: none."),
    Field("optimizer.beta_1", 0.9, _FIXED, "Adam's decay of the first moment."),
    Field("optimizer.beta_2", 0.999, _FIXED, "Adam's decay of the second moment."),
    Field("optimizer.epsilon", 1e-8, _FIXED, "Epsilon of the optimizer."),
    Field("sample.sampler", "ddpm", _FREE, "ddpm (ancestral) or ddim."),
    Field("sample.num_steps", 0, _FREE, "Sampling steps S, 1..T; 0: T."),
    Field("sample.spacing", "uniform", _FREE, "Visited timesteps: uniform, quad, linspace or trailing."),
    Field("sample.eta", 0.0, _FREE, "DDIM's noise, 0..1."),
    Field("sample.clip", True, _FREE, "Clip the predicted x_0 to [-1, 1] (DDIM's published figures: off)."),
    Field("sample.num_images", 64, _FREE, "Images in the grids drawn while training."),
    Field("sample.batch_size", 64, _FREE, "Images sampled at once."),
    Field("sample.seed", 0, _FREE, "Seed of the first image; image k has seed + k."),
)  # fmt: skip

PRECISIONS = ("float32", "bfloat16", "float16")
# What a value must be -> (whether it is, the fields). Names are checked by the tables they are names of.
_RANGES = {
    "at least 1": (lambda v: v >= 1, (
        "data.image_size", "data.batch_size", "diffusion.num_timesteps", "network.ch", "network.num_res_blocks",
        "network.block_size", "train.num_steps", "train.keep_checkpoints", "train.max_skipped_steps", "train.micro_batches",
        "train.steps_per_execution", "sample.num_images", "sample.batch_size",
    )),
    "at least 0": (lambda v: v >= 0, (
        "data.image_width", "train.log_every", "train.checkpoint_every", "train.sample_every", "sample.num_steps",
        "data.in_memory_mb", "train.checkpoint_minutes", "train.keep_every", "train.grad_clip", "optimizer.warmup_steps",
    )),
    "above 0": (lambda v: v > 0, ("optimizer.learning_rate",)),
    "at least 0 and below 1": (lambda v: 0 <= v < 1, (
        "network.dropout", "train.ema_decay", "optimizer.beta_1", "optimizer.beta_2",
    )),
    "above 0 and below 1": (lambda v: 0 < v < 1, ("optimizer.epsilon",)),
    "within 0..1": (lambda v: 0 <= v <= 1, ("sample.eta",)),
    "1 or 3": (lambda v: v in (1, 3), ("data.channels",)),
    "auto, on or off": (lambda v: v in ("auto", "on", "off"), ("train.jit_compile",)),
    f"one of {PRECISIONS}": (lambda v: v in PRECISIONS, ("train.precision",)),
}  # fmt: skip
_INTERVALS = ("train.log_every", "train.checkpoint_every", "train.sample_every")


def default():
    """A ConfigDict with every field at its default; a config file changes some of them."""
    config = ml_collections.ConfigDict()
    for field in FIELDS:
        section, _, name = field.path.rpartition(".")
        if section and section not in config:
            config[section] = ml_collections.ConfigDict()
        (config[section] if section else config)[name] = field.default
    return config.lock()


def get(config, path):
    """The value at a dotted path."""
    for name in path.split("."):
        config = config[name]
    return config


def put(config, path, value):
    """Set the value at a dotted path."""
    section, _, name = path.rpartition(".")
    (config[section] if section else config)[name] = value


def _type_problem(field, value):
    """What is wrong with a value's type, or None; ConfigDict itself takes None for anything, and True for a number."""
    expected = type(field.default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_right = is_number if expected is float else type(value) is expected
    if not is_right or (expected is tuple and not all(type(v) is int for v in value)):
        kind = "a tuple of integers" if expected is tuple else f"of type {expected.__name__}"
        return f"{field.path} must be {kind}, found {value!r}"
    if expected is float and value and not 1e-37 < abs(value) < 1e37:  # it is computed with in float32
        return f"{field.path} must be 0 or a number between 1e-37 and 1e37, found {value!r}"
    bits = 64 if field.free or field.path == "seed" else 32
    if expected is int and not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
        return f"{field.path} must fit in {bits} bits, found {value}"


def refuse(problems, origin="The config"):
    """Raise InputError with all `problems`, sentences, unless there are none."""
    if problems:
        raise InputError(f"{origin} has values that cannot be used:\n  " + "\n  ".join(problems))


def check_types(config):
    """Refuse values of a type that the field does not have."""
    refuse(list(filter(None, (_type_problem(field, get(config, field.path)) for field in FIELDS))))


def range_problems(config):
    """What is out of range in a config of the right types: sentences that begin with a field's path; names, and what
    depends on several fields, are checked by `builders.check`."""
    found = []
    for what, (is_right, paths) in _RANGES.items():
        found += [f"{p} must be {what}, found {get(config, p)!r}" for p in paths if not is_right(get(config, p))]
    steps = config.train.steps_per_execution
    found += [
        f"{p}={get(config, p)} must be a multiple of train.steps_per_execution={steps}"
        for p in (*_INTERVALS, "train.num_steps")
        if steps > 0 and get(config, p) % steps
    ]
    d = config.data
    if d.batch_size * d.image_size * (d.image_width or d.image_size) * d.channels >= 2**31:
        found.append(f"data.batch_size={d.batch_size} images have 2^31 values or more")
    return found


def validate(config):
    """Raise InputError for values that no run can have, all at once; names are checked where they are used."""
    check_types(config)
    refuse(range_problems(config))


def to_json(config):
    """The config as JSON text."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text, origin):
    """A locked ConfigDict from JSON text; `origin` names the file in errors.

    Raises:
        InputError: text that is no config of this version.
    """
    config = default()
    try:
        values = dict(_flatten(json.loads(text)))
    except (json.JSONDecodeError, AttributeError) as e:
        raise InputError(f"{origin} is not a config written by this program: {e}") from e
    known = {field.path: field for field in FIELDS}
    unknown, missing = sorted(values.keys() - known.keys()), sorted(known.keys() - values.keys())
    if unknown or missing:
        meant = "".join(f" Did you mean {suggest(path)} by {path}?" for path in unknown if suggest(path))
        raise InputError(
            f"{origin} was written by another version: fields unknown here {unknown}, fields missing there {missing}.{meant}"
        )
    values = {path: tuple(value) if isinstance(value, list) else value for path, value in values.items()}
    refuse(list(filter(None, (_type_problem(known[path], value) for path, value in values.items()))), origin)
    for path, value in values.items():
        put(config, path, value)
    return config


def _flatten(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def differences(old, new):
    """[(field, old value, new value)] of two configs."""
    pairs = ((field, get(old, field.path), get(new, field.path)) for field in FIELDS)
    return [(field, a, b) for field, a, b in pairs if a != b]


def digest(config):
    """SHA-256 of the fields that change what a step computes: the fixed ones and the optimizer's."""
    fields = [f.path for f in FIELDS if not f.free or f.path.startswith("optimizer.")]
    text = json.dumps({path: get(config, path) for path in fields}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def suggest(path):
    """The field most like a mistyped path, or None."""
    close = difflib.get_close_matches(path, [field.path for field in FIELDS], n=1)
    return close[0] if close else None


def describe():
    """Every field with its default, for --help."""
    return "\n".join(f"  --config.{f.path}={f.default}\n      {f.doc}" for f in FIELDS)
