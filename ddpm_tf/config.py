"""Every configuration field: its default, meaning and unit, whether it may change on resume, and what its absence means."""

import difflib
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_collections
from absl import logging

from ddpm_tf import __version__, checks
from ddpm_tf.errors import InputError, unknown_name

NEVER_ABSENT = object()


class Field(NamedTuple):
    """One field.

    free: it may change when a run is resumed. A fixed field makes another run.
    before: the value that a config meant which was written before the field existed. NEVER_ABSENT: every version of the
        program writes the field.
    """

    path: str
    default: Any
    free: bool
    doc: str
    before: Any = NEVER_ABSENT


_FREE, _FIXED = True, False

FIELDS = (
    Field("seed", 0, _FIXED, "Seed of the initial weights, data order, timesteps, noise and dropout."),
    Field("data.source", "digits", _FIXED, "digits, KIND:PATH (folder, npz, idx, cifar10, cifar100, tfrecord) or tfds:NAME."),
    Field("data.split", "train", _FIXED, "Split of a TFDS, idx or CIFAR data set; for TFDS also a part: train[:50%]."),
    Field("data.data_dir", "", _FREE, "Where TFDS data sets are prepared; empty: TFDS' own default."),
    Field("data.image_size", 32, _FIXED, "Height of the images, pixels."),
    Field("data.image_width", 0, _FIXED, "Width of the images, pixels; 0: as the height."),
    Field("data.channels", 3, _FIXED, "Channels of the images: 1 or 3."),
    Field("data.batch_size", 128, _FIXED, "Global batch size, images; divisible by the number of replicas."),
    Field("data.random_flip", False, _FIXED, "Mirror each image with probability 1/2."),
    Field("data.in_memory_mb", 4096, _FREE, "Data sets up to this size are decoded at the start and kept in memory, MiB."),
    Field("data.convert", "auto", _FIXED, "folder: auto converts any colours; strict refuses what would change.", "strict"),
    Field("data.background", "white", _FIXED, "folder: what transparency is put on: white or black; drop: nothing.", "white"),
    Field("data.small", "refuse", _FIXED, "folder: pictures smaller than the images: refuse, enlarge or skip.", "refuse"),
    Field("data.animated", "refuse", _FIXED, "folder: files of several pictures: refuse, or first.", "refuse"),
    Field("data.bad", "error", _FREE, "folder: files that cannot be used: error, or skip.", "error"),
    Field("data.bad_limit", 0.01, _FREE, "folder: with bad=skip, the largest share of files that is left out.", 0.01),
    Field("data.labels", "auto", _FIXED, "folder: classes by folder (subfolders), csv (labels.csv), auto or none.", "none"),
    Field("data.range", "uint8", _FIXED, "npz: range of the values: uint8, 0..1 or -1..1.", "uint8"),
    Field("data.layout", "channels_last", _FIXED, "npz: channels_last, or channels_first for [N, C, H, W].", "channels_last"),
    Field("diffusion.schedule", "linear", _FIXED, "Beta schedule: linear, cosine, sigmoid or another name of make_betas."),
    Field("diffusion.num_timesteps", 1000, _FIXED, "T, the number of timesteps."),
    Field("diffusion.beta_start", 1e-4, _FIXED, "First beta."),
    Field("diffusion.beta_end", 0.02, _FIXED, "Last beta."),
    Field("diffusion.cosine_s", 0.008, _FIXED, "Offset s of schedule cosine, improved DDPM Eq. 17; at least 0.", 0.008),
    Field("diffusion.sigmoid_start", -3.0, _FIXED, "Where schedule sigmoid begins on the logistic curve.", -3.0),
    Field("diffusion.sigmoid_end", 3.0, _FIXED, "Where schedule sigmoid ends on the logistic curve, above its start.", 3.0),
    Field("diffusion.sigmoid_tau", 1.0, _FIXED, "Temperature of schedule sigmoid: larger is closer to linear.", 1.0),
    Field("diffusion.prediction", "eps", _FIXED, "What the network predicts: eps, x_0, v or x_prev."),
    Field("diffusion.variance", "fixed_large", _FIXED, "A name of VARIANCES: fixed_large, learned_range, ..."),
    Field("network.name", "unet", _FIXED, "unet (Ho et al. 2020), or classifier: p(y | x_t, t), for classifier guidance."),
    Field("network.ch", 128, _FIXED, "Channels of the first level, a multiple of 32."),
    Field("network.ch_mult", (1, 2, 2, 2), _FIXED, "Factor of network.ch per level."),
    Field("network.num_res_blocks", 2, _FIXED, "Residual blocks per level."),
    Field("network.attn_resolutions", (16,), _FIXED, "Heights at which there is self-attention."),
    Field("network.dropout", 0.0, _FIXED, "Dropout rate, 0 <= rate < 1."),
    Field("network.resamp_with_conv", True, _FIXED, "Resample with a convolution."),
    Field("network.block_size", 1, _FIXED, "Side of the pixel blocks that become channels, pixels; above 1 saves memory."),
    Field("network.remat", False, _FREE, "Compute activations again for the gradient: less memory, more time.", False),
    Field("network.theta", 10000.0, _FIXED, "Base of the time embedding's frequencies theta^(-k/(K-1)).", 10000.0),
    Field("network.num_classes", 0, _FIXED, "Classes of a conditional network or a classifier; 0: unconditional.", 0),
    Field("network.num_groups", 32, _FIXED, "Groups of the group normalisations; at least 2 channels in each.", 32),
    Field("train.num_steps", 800_000, _FREE, "Training ends after this many steps."),
    Field("train.log_every", 100, _FREE, "Interval of metrics.jsonl rows, steps; 0: never."),
    Field("train.checkpoint_every", 5000, _FREE, "Interval of checkpoints, steps; 0: only at the end."),
    Field("train.checkpoint_minutes", 30.0, _FREE, "Longest time between two checkpoints, minutes; 0: no limit.", 0.0),
    Field("train.keep_checkpoints", 3, _FREE, "How many of the newest checkpoints are kept."),
    Field("train.keep_every", 0, _FREE, "Checkpoints at multiples of this many steps are never deleted; 0: none.", 0),
    Field("train.sample_every", 5000, _FREE, "Interval of sample grids, steps; 0: only at the end."),
    Field("train.loss", "simple", _FIXED, "Training loss: simple (Eq. 14), vlb or hybrid; cross_entropy for a classifier."),
    Field("train.loss_weight", "none", _FIXED, "Weight of a timestep in loss simple: none, snr, min_snr or p2."),
    Field("train.min_snr_gamma", 5.0, _FIXED, "Limit gamma of loss weight min_snr.", 5.0),
    Field("train.p2_k", 1.0, _FIXED, "Constant k of loss weight p2, 1 / (k + SNR)^gamma.", 1.0),
    Field("train.p2_gamma", 1.0, _FIXED, "Exponent gamma of loss weight p2.", 1.0),
    Field("train.label_dropout", 0.1, _FIXED, "Of a conditional network: how often a label becomes the null class.", 0.1),
    Field("train.ema_decay", 0.9999, _FIXED, "Decay of the moving average of the weights, per step."),
    Field("train.grad_clip", 1.0, _FIXED, "Largest global norm of the gradient; 0: no clipping."),
    Field("train.grad_clip_mode", "global", _FIXED, "global, or per_replica (the original's rule)."),
    Field("train.jit_compile", "auto", _FIXED, "XLA for loss and gradient: on, off, or auto (on with a GPU)."),
    Field("train.precision", "float32", _FREE, "Of the forward and backward pass: float32, bfloat16 or float16.", "float32"),
    Field("train.tf32", False, _FREE, "Let a GPU train with TF32 (10 bits of mantissa), which is faster.", False),
    Field("train.micro_batches", 1, _FREE, "Parts of a batch, computed in turn; more parts need less memory.", 1),
    Field("train.deterministic", False, _FREE, "Deterministic kernels only: exact resume on a GPU too; slower there.", False),
    Field("train.max_skipped_steps", 20, _FREE, "Training stops after this many steps in a row that are not finite.", 20),
    Field("train.steps_per_execution", 1, _FREE, "Steps per call of the compiled function; must divide the intervals above."),
    Field("optimizer.name", "adam", _FIXED, "adam, or rmsprop (decay 0.95, momentum 0.9), the original's two."),
    Field("optimizer.learning_rate", 2e-4, _FREE, "Learning rate after warm-up."),
    Field("optimizer.warmup_steps", 5000, _FREE, "Steps of linear warm-up from 0; 0: none."),
    Field("optimizer.beta_1", 0.9, _FIXED, "Adam's decay of the first moment."),
    Field("optimizer.beta_2", 0.999, _FIXED, "Adam's decay of the second moment."),
    Field("optimizer.epsilon", 1e-8, _FIXED, "Epsilon of the optimizer."),
    Field("sample.sampler", "ddpm", _FREE, "ddpm (ancestral), ddim, dpm_solver, heun or repaint."),
    Field("sample.num_steps", 0, _FREE, "Sampling steps S, 1..T (the trained chain); 0 in a config: T."),
    Field("sample.spacing", "uniform", _FREE, "Visited timesteps: uniform, quad, linspace, trailing, guide, logsnr or karras."),
    Field("sample.eta", 0.0, _FREE, "DDIM's noise, 0..1."),
    Field("sample.sigma_hat", False, _FREE, "DDIM with the larger noise of its paper's row sigma-hat, in place of eta.", False),
    Field("sample.churn", 0.0, _FREE, "Heun's noise, EDM's S_churn; 0: deterministic.", 0.0),
    Field("sample.jump_length", 10, _FREE, "RePaint: levels of a jump back up.", 10),
    Field("sample.num_resamples", 10, _FREE, "RePaint: how often each stretch of levels is walked.", 10),
    Field("sample.clip", True, _FREE, "Clip the predicted x_0 to [-1, 1] (DDIM's published figures: off)."),
    Field("sample.dynamic_threshold", 0.0, _FREE, "With clip: this quantile for dynamic thresholding (0.995); 0: off.", 0.0),
    Field("sample.labels", "all", _FREE, "Classes to draw, in turn: names or numbers with commas, or all.", "all"),
    Field("sample.guidance", 1.0, _FREE, "Classifier-free: 0 unconditional, 1 conditional, above 1 stronger.", 1.0),
    Field("sample.guidance_first", 1, _FREE, "The first sampling step, 1..S, with guidance.", 1),
    Field("sample.guidance_last", 0, _FREE, "The last sampling step with guidance; 0: S.", 0),
    Field("sample.guidance_rescale", 0.0, _FREE, "Give the guided output back its deviation, 0..1; 0: not.", 0.0),
    Field("sample.num_images", 64, _FREE, "Images that run_sample.py and the grids of training draw."),
    Field("sample.batch_size", 64, _FREE, "Images sampled at once."),
    Field("sample.seed", 0, _FREE, "Seed of the first image; image k has seed + k."),
)  # fmt: skip

_VERSION = "ddpm_tf"  # the key of the program's version in config.json
PRECISIONS = ("float32", "bfloat16", "float16")
# (what a value must be, a test of it, the fields). The tables check their names.
_RANGES: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    ("at least 1", lambda v: v >= 1, (
        "data.image_size", "data.batch_size", "diffusion.num_timesteps", "network.ch", "network.num_res_blocks",
        "network.block_size", "network.num_groups", "train.num_steps", "train.keep_checkpoints", "train.max_skipped_steps",
        "train.micro_batches", "train.steps_per_execution", "sample.num_images", "sample.batch_size",
        "sample.jump_length", "sample.num_resamples", "sample.guidance_first",
    )),
    (f"at most {checks.MAX_TIMESTEPS:,}", lambda v: v <= checks.MAX_TIMESTEPS, (
        "diffusion.num_timesteps", "network.num_classes",
    )),
    (f"at most {checks.MAX_IMAGES:,}", lambda v: v <= checks.MAX_IMAGES, ("sample.num_images",)),
    (f"at most {checks.MAX_BATCH:,}", lambda v: v <= checks.MAX_BATCH, ("sample.batch_size",)),
    ("at least 0", lambda v: v >= 0, (
        "data.image_width", "train.log_every", "train.checkpoint_every", "train.sample_every", "sample.num_steps",
        "data.in_memory_mb", "train.checkpoint_minutes", "train.keep_every", "train.grad_clip", "optimizer.warmup_steps",
        "diffusion.cosine_s", "train.p2_gamma", "network.num_classes", "sample.churn", "sample.guidance_last",
    )),
    ("above 0", lambda v: v > 0, (
        "optimizer.learning_rate", "diffusion.sigmoid_tau", "train.min_snr_gamma", "train.p2_k",
    )),
    ("above 1", lambda v: v > 1, ("network.theta",)),
    ("at least 0 and below 1", lambda v: 0 <= v < 1, (
        "network.dropout", "train.ema_decay", "train.label_dropout", "optimizer.beta_1", "optimizer.beta_2",
    )),
    ("above 0 and below 1", lambda v: 0 < v < 1, ("optimizer.epsilon",)),
    ("within 0..1", lambda v: 0 <= v <= 1, (
        "data.bad_limit", "sample.eta", "sample.dynamic_threshold", "sample.guidance_rescale",
    )),
    ("within -1e6..1e6", lambda v: -1e6 <= v <= 1e6, ("sample.guidance",)),
    ("1 or 3", lambda v: v in (1, 3), ("data.channels",)),
    ("auto, on or off", lambda v: v in ("auto", "on", "off"), ("train.jit_compile",)),
    (f"one of {PRECISIONS}", lambda v: v in PRECISIONS, ("train.precision",)),
)  # fmt: skip
_INTERVALS = ("train.log_every", "train.checkpoint_every", "train.sample_every")


def default() -> ml_collections.ConfigDict:
    """A ConfigDict with every field at its default; a config file changes some of them."""
    config = ml_collections.ConfigDict()
    for field in FIELDS:
        section, _, name = field.path.rpartition(".")
        if section and section not in config:
            config[section] = ml_collections.ConfigDict()
        (config[section] if section else config)[name] = field.default
    return config.lock()


def get(config: ml_collections.ConfigDict, path: str) -> Any:
    """The value at a dotted path."""
    for name in path.split("."):
        config = config[name]
    return config


def put(config: ml_collections.ConfigDict, path: str, value: Any) -> None:
    """Set the value at a dotted path."""
    section, _, name = path.rpartition(".")
    (config[section] if section else config)[name] = value


def section(name: str) -> tuple[Field, ...]:
    """The fields of one section, for example of `sample`."""
    return tuple(field for field in FIELDS if field.path.startswith(f"{name}."))


def _type_problem(field: Field, value: Any) -> str | None:
    """What is wrong with a value's type, or None. ConfigDict itself accepts None for anything, and True for a number."""
    expected = type(field.default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_right = is_number if expected is float else type(value) is expected
    if not is_right or (expected is tuple and not all(type(v) is int for v in value)):
        kind = "a tuple of integers" if expected is tuple else f"of type {expected.__name__}"
        return f"{field.path} must be {kind}, found {value!r}"
    if expected is float and value and not 1e-37 < abs(value) < 1e37:  # it is used in float32
        return f"{field.path} must be 0 or a number between 1e-37 and 1e37, found {value!r}"
    bits = 64 if field.free or field.path == "seed" else 32
    if expected is int and not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
        return f"{field.path} must fit in {bits} bits, found {value}"
    return None


def type_problem(section: str, name: str, value: Any) -> str | None:
    """What is wrong with a field's name or with a value's type, as a sentence, or None."""
    fields = {field.path: field for field in FIELDS}
    path = f"{section}.{name}"
    return _type_problem(fields[path], value) if path in fields else str(unknown_name("field", path, fields))


def refuse(problems: list[str], origin: str = "The config") -> None:
    """Raise InputError that lists all `problems`, which are sentences; with no problem, do nothing."""
    if problems:
        raise InputError(f"{origin} has values that cannot be used:\n  " + "\n  ".join(problems))


def check_types(config: ml_collections.ConfigDict) -> None:
    """Refuse what is no config, and values of a type that the field does not have."""
    check_fields(config)
    refuse(list(filter(None, (_type_problem(field, get(config, field.path)) for field in FIELDS))))


def check_fields(config: Any, origin: str = "The config") -> None:
    """Refuse what is no ConfigDict of these fields.

    Raises:
        InputError
    """
    advice = "begin with ddpm_tf.config.default(), change some fields and return it, as configs/digits.py"
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(f"{origin} is a {type(config).__name__}, not a ConfigDict; {advice}.")
    lost = [field.path for field in FIELDS if not _has(config, field.path)]
    if lost:
        some = ", ".join(lost[:3]) + (f" and {len(lost) - 3} others" if len(lost) > 3 else "")
        raise InputError(f"{origin} lacks the fields {some}; {advice}.")


def _has(config: ml_collections.ConfigDict, path: str) -> bool:
    for name in path.split("."):
        if not isinstance(config, ml_collections.ConfigDict) or name not in config:
            return False
        config = config[name]
    return True


def range_problems(config: ml_collections.ConfigDict) -> list[str]:
    """What is out of range in a config of the right types, as sentences that begin with a field's path.

    `builders.check` checks the names, and what depends on several fields.
    """
    problems = []
    for what, is_right, paths in _RANGES:
        problems += [f"{p} must be {what}, found {get(config, p)!r}" for p in paths if not is_right(get(config, p))]
    steps = config.train.steps_per_execution
    problems += [
        f"{p}={get(config, p)} must be a multiple of train.steps_per_execution={steps}"
        for p in (*_INTERVALS, "train.num_steps")
        if steps > 0 and get(config, p) % steps
    ]
    d = config.data
    if d.batch_size * d.image_size * (d.image_width or d.image_size) * d.channels >= 2**31:
        problems.append(
            f"data.batch_size={d.batch_size} images of data.image_size={d.image_size} have 2^31 values or more, which is more "
            "than one tensor can have"
        )
    if config.sample.seed + config.sample.num_images > 2**63:
        problems.append(
            f"sample.seed={config.sample.seed} with sample.num_images={config.sample.num_images} needs seeds above 2^63 - 1, "
            "and there are none; choose a smaller sample.seed"
        )
    return problems


def validate(config: ml_collections.ConfigDict) -> None:
    """Raise InputError that lists every value of a wrong type, or every value out of range."""
    check_types(config)
    refuse(range_problems(config))


def check_section(name: str, values: Mapping[str, Any]) -> None:
    """Refuse values of a section's fields that no config can have, whatever the other fields are.

    Raises:
        InputError
    """
    refuse([problem for problem in (type_problem(name, *item) for item in values.items()) if problem], "The command")
    config = default()
    for field, value in values.items():
        config[name][field] = value
    refuse(range_problems(config), "The command")


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as JSON text, with the version of this program."""
    return json.dumps({_VERSION: __version__, **config.to_dict()}, indent=2) + "\n"


def from_json(
    text: str, origin: str, *, version: str | None = None, log: Callable[..., None] = logging.info
) -> ml_collections.ConfigDict:
    """A locked ConfigDict from JSON text of this version or of an older one.

    Args:
        origin: the file's name, for messages.
        version: the version of the program that wrote the text; None: as the text says.
        log: is called, as `logging.info`, with what the fields mean that an older text lacks.

    Raises:
        InputError: text that is no config, or that has fields which this version does not know.
    """
    config = default()
    try:
        read = json.loads(text)
        version = read.pop(_VERSION, version)
        values = dict(_flatten(read))
    except (json.JSONDecodeError, AttributeError, TypeError) as e:
        raise InputError(f"{origin} is not a config written by this program: {e}") from e
    known = {field.path: field for field in FIELDS}
    if unknown := sorted(values.keys() - known.keys()):
        is_newer = version not in (None, __version__)  # then the fields are new, and not mistyped
        hints = {path: suggest(path) for path in unknown if not is_newer and suggest(path)}
        meant = "".join(f"; did you mean {hint} by {path}?" for path, hint in hints.items())
        raise InputError(
            f"{origin} was written by {f'ddpm_tf {version}' if version else 'an unknown version of ddpm_tf'} and has fields "
            f"that ddpm_tf {__version__} does not know "
            f"({', '.join(unknown)}{meant}): install the version that wrote it, or a newer one."
        )
    absent = [field for field in FIELDS if field.path not in values]
    if lost := [field.path for field in absent if field.before is NEVER_ABSENT]:
        raise InputError(f"{origin} lacks the fields {', '.join(lost)}, which every version writes: it is damaged.")
    if absent:
        meaning = ", ".join(f"{field.path}={field.before}" for field in absent)
        log("%s is of an older version of ddpm_tf; the fields that it lacks mean: %s.", origin, meaning)
    values = {path: tuple(value) if isinstance(value, list) else value for path, value in values.items()}
    refuse(list(filter(None, (_type_problem(known[path], value) for path, value in values.items()))), origin)
    for path, value in ({field.path: field.before for field in absent} | values).items():
        put(config, path, value)
    return config


def _flatten(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def differences(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> list[tuple[Field, Any, Any]]:
    """[(field, old value, new value)] of the fields that differ between two configs."""
    pairs = ((field, get(old, field.path), get(new, field.path)) for field in FIELDS)
    return [(field, a, b) for field, a, b in pairs if a != b]


def digest(config: ml_collections.ConfigDict, *, unused: Collection[str] = ()) -> str:
    """SHA-256 of the fields that change what a step computes: the fixed fields and the optimizer's.

    A field that has the value which its absence meant is left out, so that a new field does not change older digests.

    Args:
        unused: fields that play no part; those that came after the first version are left out.
    """
    fields = [f for f in FIELDS if not f.free or f.path.startswith("optimizer.")]
    fields = [f for f in fields if f.before is NEVER_ABSENT or f.path not in unused]
    values = {f.path: get(config, f.path) for f in fields}
    values = {f.path: values[f.path] for f in fields if values[f.path] != f.before}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def suggest(path: str) -> str | None:
    """The field most like a mistyped path, or None."""
    close = difflib.get_close_matches(path, [field.path for field in FIELDS], n=1)
    return close[0] if close else None


def help_text(fields: Iterable[Field] = FIELDS) -> str:
    """Every field with its default and meaning, for --help."""
    return "\n".join(f"  --config.{f.path}={f.default}\n      {f.doc}" for f in fields)
