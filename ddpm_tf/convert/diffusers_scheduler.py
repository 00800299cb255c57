"""scheduler_config.json of a diffusers `DDPMScheduler` or `DDIMScheduler`: to and from the fields of our config.

What such a file says is of two kinds. The chain and the prediction are facts of the trained network: a config has to agree
with them. The sampler, a fixed variance, clipping and spacing are choices: another choice gives other images of the same
network.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ddpm_tf.convert.json_file import is_int, is_number, read_object, shown
from ddpm_tf.diffusion.schedules import BETA_SCHEDULES, make_betas
from ddpm_tf.errors import InputError

_MAX_TIMESTEPS = 1_000_000
_SAMPLERS = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim"}
# {diffusers' name: ours}. scaled_linear is linear in sqrt(beta). squaredcos_cap_v2 is improved DDPM Eq. 17 with s = 0.008,
# capped at 0.999. diffusers' sigmoid is GeoDiff's curve of betas, and not the sigmoid here.
_SCHEDULES = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
# fixed_small_log draws as fixed_small does. fixed_large_log is meant to draw as fixed_large does.
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small_floored",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}
_LEARNED = "diffusers' learned takes the network's output as the variance, this program as its logarithm"
# leading visits the timesteps k (T // S), as uniform does where S divides T.
_SPACINGS = {"leading": "uniform", "linspace": "linspace", "trailing": "trailing"}
_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "predict_epsilon": True,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
}
_HINTS = {
    "_class_name": (
        " Most schedulers of diffusers can be written as one of these: "
        "DDPMScheduler.from_config(scheduler.config).save_pretrained(FOLDER)."
    ),
    "beta_schedule": " The sigmoid of diffusers is another curve than the one here.",
}
# {key: the only value of it that this program can follow}.
_FIXED_FACTS = {"rescale_betas_zero_snr": False, "predict_epsilon": True}
_FIXED_CHOICES = {"thresholding": False, "steps_offset": 0, "set_alpha_to_one": True}


class Scheduler(NamedTuple):
    """What a scheduler_config.json says, in the words of our config.

    path: the file.
    facts: {field: value} that a config has to agree with. diffusion.schedule is None if no schedule here has the betas.
    betas: float64 [T].
    choices: {field: value} of how to draw, free to change.
    foreign: choices that this program cannot follow, as words for a list.
    unread: keys that mean nothing to such a scheduler; diffusers does not read them either.
    """

    path: str
    facts: dict[str, Any]
    betas: np.ndarray
    choices: dict[str, Any]
    foreign: list[str]
    unread: list[str]


def read_scheduler(path: str) -> Scheduler:
    """The content of a scheduler_config.json. A key that is absent has diffusers' default.

    Raises:
        InputError: a file that cannot be read, a scheduler of another kind, a value that such a scheduler does not have, or
            a chain or prediction that this program does not have. The message names the key.
    """
    written = read_object(path, "a diffusers scheduler")
    sampler = _pick(written.get("_class_name", "DDPMScheduler"), _SAMPLERS, "_class_name", path)
    config = {**_DEFAULTS, **written}
    for key, needed in _FIXED_FACTS.items():
        if config[key] != needed:
            raise InputError(
                f"{path}: {key} is {shown(config[key])}, and this program has only {needed}: the network was trained "
                "for a chain or a target that is not available here."
            )
    if config["variance_type"] == "learned" and sampler == "ddpm":
        raise InputError(f"{path}: variance_type is 'learned', which cannot be read: {_LEARNED}.")
    betas, schedule = _chain(config, path)
    facts = {
        **schedule,
        "diffusion.num_timesteps": betas.size,
        "diffusion.prediction": _pick(config["prediction_type"], _PREDICTIONS, "prediction_type", path),
    }
    choices: dict[str, Any] = {"sample.sampler": sampler}
    if sampler == "ddpm":  # a DDIMScheduler has no variance_type
        variance = _pick(config["variance_type"], _VARIANCES, "variance_type", path)
        # A learned variance is a fact: it is half of the network's output.
        (facts if variance == "learned_range" else choices)["diffusion.variance"] = variance
    clip = config["clip_sample"]
    if not isinstance(clip, bool):
        raise InputError(f"{path}: clip_sample is {shown(clip)}, expected true or false.")
    choices["sample.clip"] = clip
    choices["sample.spacing"] = _pick(config["timestep_spacing"], _SPACINGS, "timestep_spacing", path)
    only = {**_FIXED_CHOICES, **({"clip_sample_range": 1.0} if clip else {})}
    foreign = [f"{key}={shown(config[key])}, here {shown(v)}" for key, v in only.items() if config[key] != v]
    unread = sorted(key for key in written.keys() - _DEFAULTS.keys() if not key.startswith("_"))
    return Scheduler(path, facts, betas, choices, foreign, unread)


def same_betas(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tables of betas are one chain. diffusers computes them in float32, which a first beta of 1e-4 feels."""
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-4, atol=0)


def describe_scheduler(
    betas: np.ndarray,
    *,
    schedule: str,
    settings: Mapping[str, float],
    prediction: str,
    variance: str,
    clip: bool,
    spacing: str,
) -> dict[str, Any]:
    """The content of scheduler_config.json, as a `DDPMScheduler`.

    A schedule that has no name there is written as its betas.

    Args:
        betas: float64 [T], of `schedule`.
        schedule, settings: its name and its settings, as `make_betas` takes them.
        prediction, variance: as `GaussianDiffusion` takes them.
        clip, spacing: as `make_sampler` takes them; a spacing that diffusers does not have is left out.

    Raises:
        InputError: naming the field that a DDPMScheduler has no place for.
    """
    names = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    if prediction not in names:
        raise InputError(
            f"A network with diffusion.prediction={prediction} cannot be written for diffusers: a DDPMScheduler has only "
            f"{sorted(names)}."
        )
    if variance == "learned":
        raise InputError(f"A network with diffusion.variance=learned cannot be written for diffusers: {_LEARNED}.")
    is_named = schedule in _SCHEDULES.values() and (schedule != "cosine" or settings["s"] == 0.008)
    name = next((theirs for theirs, ours in _SCHEDULES.items() if ours == schedule), "linear")
    config = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.30.0",
        "num_train_timesteps": betas.size,
        "beta_start": settings.get("beta_start", _DEFAULTS["beta_start"]),
        "beta_end": settings.get("beta_end", _DEFAULTS["beta_end"]),
        "beta_schedule": name if is_named else "linear",
        "trained_betas": None if is_named else betas.tolist(),
        "prediction_type": names[prediction],
        "variance_type": next(theirs for theirs, ours in _VARIANCES.items() if ours == variance),
        "clip_sample": clip,
        "timestep_spacing": next((theirs for theirs, ours in _SPACINGS.items() if ours == spacing), "leading"),
    }
    keys = ("clip_sample_range", "thresholding", "steps_offset", "rescale_betas_zero_snr")
    return {**config, **{key: _DEFAULTS[key] for key in keys}}


def has_spacing(spacing: str, num_timesteps: int, num_steps: int) -> bool:
    """Whether diffusers visits the same timesteps by one of its own spacings."""
    return spacing in _SPACINGS.values() and (spacing != "uniform" or num_timesteps % num_steps == 0)


def _chain(config: Mapping[str, Any], path: str) -> tuple[np.ndarray, dict[str, Any]]:
    """The betas, and the schedule's fields."""
    length = config["num_train_timesteps"]
    if not is_int(length) or not 1 <= length <= _MAX_TIMESTEPS:
        raise InputError(
            f"{path}: num_train_timesteps is {shown(length)}, expected an integer within 1..{_MAX_TIMESTEPS:,}."
        )
    trained = config["trained_betas"]
    own = [] if trained is None else _checked_table(trained, length, path)
    ends = []
    for key in ("beta_start", "beta_end"):
        if not is_number(config[key]) or not 0 < config[key] <= 1:
            raise InputError(f"{path}: {key} is {shown(config[key])}, expected a number above 0 and at most 1.")
        ends.append(float(config[key]))
    if len(own):
        table = np.array(own, np.float64)
        # float32 holds 7 digits of an endpoint that was typed with fewer.
        read_off = [float(f"{beta:.6g}") for beta in (own[0], own[-1])]
        named = _named_schedule(table, (ends, read_off))
        return table, named or {"diffusion.schedule": None}
    fields = _schedule_fields(_pick(config["beta_schedule"], _SCHEDULES, "beta_schedule", path), ends)
    return _betas(fields, length), fields


def _checked_table(betas: object, length: int, path: str) -> list[float]:
    if not isinstance(betas, list) or len(betas) != length or not all(is_number(b) and 0 < b <= 1 for b in betas):
        raise InputError(
            f"{path}: trained_betas is {shown(betas)}, expected null or num_train_timesteps={length} numbers above 0 and at "
            "most 1."
        )
    return betas


def _named_schedule(betas: np.ndarray, ends: tuple[list[float], ...]) -> dict[str, Any] | None:
    """The fields of the schedule that has these betas, among those with given endpoints; None: there is none."""
    candidates = (_schedule_fields(name, pair) for pair in ends for name in BETA_SCHEDULES)
    for fields in candidates:
        try:
            if same_betas(_betas(fields, betas.size), betas):
                return fields
        except InputError:  # endpoints that this schedule cannot have
            continue
    return None


def _schedule_fields(name: str, ends: list[float]) -> dict[str, Any]:
    settings = dict(zip(("beta_start", "beta_end"), ends, strict=True))
    own = {f"diffusion.{key}": value for key, value in settings.items() if key in BETA_SCHEDULES[name].settings}
    return {"diffusion.schedule": name, **own}


def _betas(fields: Mapping[str, Any], length: int) -> np.ndarray:
    settings = {key.partition(".")[2]: value for key, value in fields.items() if key != "diffusion.schedule"}
    return make_betas(fields["diffusion.schedule"], length, **settings)


def _pick(value: object, table: Mapping[str, str], key: str, path: str) -> str:
    if not isinstance(value, str) or value not in table:
        raise InputError(f"{path}: {key} is {shown(value)}, expected one of {sorted(table)}.{_HINTS.get(key, '')}")
    return table[value]
