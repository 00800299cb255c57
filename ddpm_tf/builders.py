"""Config sections to objects; beside `experiment`, the only reader of configs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging
from ml_collections import ConfigDict

from ddpm_tf import config as config_lib
from ddpm_tf import text
from ddpm_tf.choices import Table
from ddpm_tf.data import load_source, make_dataset
from ddpm_tf.data.arrays import LAYOUTS, RANGES, ArraySource
from ddpm_tf.data.contract import Source
from ddpm_tf.data.folder import BAD
from ddpm_tf.data.labels import LABELS
from ddpm_tf.data.picture import ANIMATED, BACKGROUND, CONVERT, SMALL
from ddpm_tf.data.sources import SOURCES, without_path
from ddpm_tf.diffusion.losses import LOSS_WEIGHTS, LOSSES, LossFunction
from ddpm_tf.diffusion.prediction import PREDICTIONS
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import BETA_SCHEDULES, TIMESTEP_SPACINGS, Schedule, make_betas
from ddpm_tf.diffusion.variance import VARIANCES
from ddpm_tf.errors import InputError, unknown_name
from ddpm_tf.networks import NETWORKS
from ddpm_tf.networks.contract import Network
from ddpm_tf.samplers import SAMPLERS, make_sampler
from ddpm_tf.samplers.base import Sampler
from ddpm_tf.training.classifier_objective import objective_of
from ddpm_tf.training.model import DiffusionModel
from ddpm_tf.training.objective import CROSS_ENTROPY
from ddpm_tf.training.optimizers import OPTIMIZERS, make_optimizer
from ddpm_tf.training.trainer import GRAD_CLIP_MODES

# The field that names an entry -> the table. The settings of the entries are fields of the same section.
TABLES: dict[str, Table] = {
    "diffusion.schedule": BETA_SCHEDULES, "network.name": NETWORKS, "train.loss_weight": LOSS_WEIGHTS,
    "optimizer.name": OPTIMIZERS, "sample.sampler": SAMPLERS, "data.source": SOURCES,
}  # fmt: skip
_NAMES = {
    **TABLES, "diffusion.prediction": PREDICTIONS, "diffusion.variance": VARIANCES, "train.loss": (*LOSSES, CROSS_ENTROPY),
    "train.grad_clip_mode": GRAD_CLIP_MODES, "sample.spacing": TIMESTEP_SPACINGS, "data.convert": CONVERT,
    "data.background": BACKGROUND, "data.small": SMALL, "data.animated": ANIMATED, "data.bad": BAD, "data.labels": LABELS,
    "data.range": RANGES, "data.layout": LAYOUTS,
}  # fmt: skip


def entry_name(config: ConfigDict, path: str) -> str:
    """The name of the entry that a field chooses; of a data source, what stands before the colon."""
    name = config_lib.get(config, path)
    return name.partition(":")[0] if path == "data.source" else name


def setting_field(path: str, entry: str, setting: str) -> str:
    """The field of a setting: sample.eta of eta, or diffusion.cosine_s of s, where the name alone says too little.

    Args:
        path: the field that names the entry, a key of TABLES.
    """
    section = path.partition(".")[0]
    shared = f"{section}.{setting}"
    return shared if any(field.path == shared for field in config_lib.FIELDS) else f"{section}.{entry}_{setting}"


def settings_of(config: ConfigDict, path: str) -> dict[str, Any]:
    """{setting: value} of the entry that the field `path` names; of an unknown entry, nothing."""
    name = entry_name(config, path)
    settings = TABLES[path][name].settings if name in TABLES[path] else ()
    return {setting: config_lib.get(config, setting_field(path, name, setting)) for setting in settings}


def unused_settings(config: ConfigDict) -> dict[str, str]:
    """{field: the field that names the entry} of settings that the chosen entries do not have."""
    unused: dict[str, str] = {}
    for path, table in TABLES.items():
        owners = {setting_field(path, entry, s): entry for entry, choice in table.items() for s in choice.settings}
        chosen = entry_name(config, path)
        own = {setting_field(path, chosen, s) for s in table[chosen].settings} if chosen in table else set(owners)
        unused |= dict.fromkeys(owners.keys() - own, path)
    return unused


def foreign_settings(config: ConfigDict) -> list[tuple[config_lib.Field, str]]:
    """[(field, the field that names the entry)] of unused settings that are off their defaults."""
    unused = unused_settings(config)
    fields = [field for field in config_lib.FIELDS if field.path in unused]
    return [(field, unused[field.path]) for field in fields if config_lib.get(config, field.path) != field.default]


def run_digest(config: ConfigDict) -> str:
    """`config.digest`, without the path of the data and the settings that play no part."""
    config = config.copy_and_resolve_references()
    config.data.source = without_path(config.data.source)
    return config_lib.digest(config, unused=unused_settings(config))


def without_foreign_settings(config: ConfigDict, origin: str) -> ConfigDict:
    """A config of a workdir, with the settings that play no part at their defaults.

    Versions before 0.2.0 let a setting stand that the chosen entry does not have, such as beta_end with schedule cosine.
    """
    foreign = foreign_settings(config)
    for field, path in foreign:
        if config_lib.get(config, field.path) == field.before:  # the file does not have it
            continue
        logging.info(
            "%s has %s=%s, which %s=%s does not use: read as %s.",
            origin,
            field.path,
            config_lib.get(config, field.path),
            path,
            config_lib.get(config, path),
            field.default,
        )
    for field, _ in foreign:
        config_lib.put(config, field.path, field.default)
    return config


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """(H, W, C)."""
    return config.data.image_size, config.data.image_width or config.data.image_size, config.data.channels


def build_source(config: ConfigDict, *, download: bool = False, read_only: bool = False) -> Any:
    data = config.data
    source = load_source(
        data.source,
        image_shape=image_shape(config),
        split=data.split,
        data_dir=data.data_dir,
        download=download,
        in_memory_mb=data.in_memory_mb,
        read_only=read_only,
        **settings_of(config, "data.source"),
    )
    if config.network.num_classes:
        _check_labels(config, source)
    return source


def _check_labels(config: ConfigDict, source: Source) -> None:
    """Refuse data that a network of so many classes cannot be trained on."""
    num_classes = config.network.num_classes
    if "label" not in source.read(np.zeros([1], np.int64)):
        without = "" if is_classifier(config) else "; network.num_classes=0 trains without them"
        raise InputError(
            f"network.num_classes={num_classes} needs labels, and the data have none. docs/data.md says where labels can "
            f"stand{without}."
        )
    names = list(source.details.class_names)
    found = len(names)
    if isinstance(source, ArraySource):
        found = max(found, int(source.tensors["label"].numpy().max()) + 1)
    if found > num_classes:
        listed = f" ({', '.join(map(text.printable, names[:12]))}{', ...' if found > 12 else ''})" if names else ""
        raise InputError(
            f"The data have {found} classes{listed}, and network.num_classes is {num_classes}: set it to {found}."
        )
    if names and found < num_classes:
        logging.warning(
            "The data have %d classes, and network.num_classes is %d: the last ones are never trained.",
            found,
            num_classes,
        )


def build_dataset(
    config: ConfigDict, source: Any, *, start_step: int, replicas: tuple[int, int, int] = (0, 1, 1)
) -> tf.data.Dataset:
    return make_dataset(
        source,
        batch_size=config.data.batch_size,
        seed=config.seed,
        start_step=start_step,
        random_flip=config.data.random_flip,
        replicas=replicas,
    )


def build_diffusion(config: ConfigDict) -> GaussianDiffusion:
    d = config.diffusion
    betas = make_betas(d.schedule, d.num_timesteps, **settings_of(config, "diffusion.schedule"))
    return GaussianDiffusion(Schedule(betas), prediction=d.prediction, variance=d.variance)


def build_network(config: ConfigDict, diffusion: GaussianDiffusion, *, precision: str = "float32") -> Network:
    """The network, with the output channels that the diffusion's variance needs; its weights are always float32."""
    shape, settings = image_shape(config), settings_of(config, "network.name")
    if not is_classifier(config):
        settings["out_channels"] = shape[-1] * (2 if diffusion.has_learned_variance else 1)
    if config.network.name not in NETWORKS:
        raise unknown_name("network.name", config.network.name, NETWORKS)
    return NETWORKS[config.network.name].build(
        shape,
        num_classes=config.network.num_classes or None,
        **settings,
        seed=config.seed,
        dtype="float32" if precision == "float32" else f"mixed_{precision}",
    )


def is_classifier(config: ConfigDict) -> bool:
    """Whether the config is of a classifier of noisy images, which draws none."""
    name = config.network.name
    return name in NETWORKS and getattr(NETWORKS[name].build, "classifies", False)


def build_optimizer(config: ConfigDict) -> Any:
    o, settings = config.optimizer, settings_of(config, "optimizer.name")
    if config.train.num_steps < o.warmup_steps:
        logging.warning(
            "train.num_steps=%d ends before optimizer.warmup_steps=%d: the learning rate reaches %.3g of "
            "optimizer.learning_rate=%g. Lower optimizer.warmup_steps.",
            config.train.num_steps,
            o.warmup_steps,
            config.train.num_steps / o.warmup_steps,
            o.learning_rate,
        )
    return make_optimizer(o.name, learning_rate=o.learning_rate, warmup_steps=o.warmup_steps, **settings)


def uses_xla(config: ConfigDict) -> bool:
    """Whether loss and gradient are compiled by XLA."""
    jit = config.train.jit_compile
    return jit == "on" or (jit == "auto" and bool(tf.config.list_physical_devices("GPU")))


def build_model(
    config: ConfigDict,
    strategy: tf.distribute.Strategy,
    *,
    max_skipped_steps: int | None = None,
    is_compiled: bool = True,
) -> DiffusionModel:
    """The trainer with all variables made under `strategy`.

    Args:
        max_skipped_steps: None: the config's.
        is_compiled: with optimizer and moments, else only to look at.
    """
    check_batch_size(config, strategy.num_replicas_in_sync)
    t, diffusion = config.train, build_diffusion(config)
    with strategy.scope():
        model = DiffusionModel(
            build_network(config, diffusion, precision=t.precision),
            diffusion,
            seed=config.seed,
            loss=t.loss,
            loss_weight=t.loss_weight,
            loss_settings=settings_of(config, "train.loss_weight"),
            label_dropout=t.label_dropout,
            ema_decay=t.ema_decay,
            grad_clip=t.grad_clip,
            grad_clip_mode=t.grad_clip_mode,
            max_skipped_steps=max_skipped_steps or t.max_skipped_steps,
            micro_batches=t.micro_batches,
        )
        if is_compiled:
            optimizer = build_optimizer(config)
            model.compile(optimizer, jit_compile=uses_xla(config), steps_per_execution=t.steps_per_execution)
    return model


def build_sampler(config: ConfigDict, diffusion: GaussianDiffusion) -> Sampler:
    s, settings = config.sample, settings_of(config, "sample.sampler")
    return make_sampler(
        s.sampler,
        diffusion,
        num_steps=s.num_steps or None,
        spacing=s.spacing,
        clip=s.clip,
        dynamic_threshold=s.dynamic_threshold,
        guidance_first=s.guidance_first,
        guidance_last=s.guidance_last,
        guidance_rescale=s.guidance_rescale,
        **settings,
    )


def check(config: ConfigDict) -> None:
    """Refuse a config that cannot be trained, with everything that is wrong in it.

    Runs no TensorFlow op: devices and strategy can be set up only before the first.

    Raises:
        InputError
    """
    config_lib.check_types(config)
    problems = config_lib.range_problems(config)
    wrong_sections = {problem.partition(".")[0] for problem in problems}
    for path, table in _NAMES.items():
        if (name := entry_name(config, path)) not in table:
            problems.append(str(unknown_name(path, name, table)))
            wrong_sections.add(path.partition(".")[0])
    for field, path in foreign_settings(config):
        problems.append(
            f"{field.path}={config_lib.get(config, field.path)}: {path}={config_lib.get(config, path)} has no such setting; "
            f"leave it at {field.default}"
        )

    def attempt(path: str, build: Callable[..., Any], *args: Any, reads: Sequence[str]) -> Any:
        """Try what depends on several fields, if nothing is wrong with any of them alone."""
        if not wrong_sections & set(reads):
            try:
                return build(config, *args)
            except InputError as e:
                problems.append(f"{path}: {e}")
        return None

    diffusion = attempt("diffusion", build_diffusion, reads=["diffusion"])
    if diffusion:
        attempt("sample", build_sampler, diffusion, reads=["sample"])
        attempt("sample", check_guidance, reads=["sample", "network"])
        attempt("train.loss", _build_loss, diffusion, reads=["train", "network"])
    attempt("network", _check_network, reads=["network", "data"])
    attempt("train.micro_batches", check_batch_size, 1, reads=["data", "train"])
    config_lib.refuse(problems)


def check_guidance(config: ConfigDict, *, has_classifier: bool = False, is_served: bool = False) -> None:
    """Refuse labels and guidance that an unconditional network does not take, and settings of no guidance at all.

    Args:
        has_classifier: whether the network is guided by a classifier.
        is_served: whether every request says its labels and its scale of guidance.

    Raises:
        InputError
    """
    s, is_conditional = config.sample, bool(config.network.num_classes)
    unconditional = "but the network is unconditional (network.num_classes=0). Leave it out, or train with classes, as "
    if not is_conditional and not has_classifier and s.labels != "all":
        raise InputError(f"--labels={s.labels} was given, {unconditional}configs/digits_cond.py.")
    if not is_conditional and s.guidance != 1:
        raise InputError(f"--guidance={s.guidance:g} was given, {unconditional}configs/digits_cond.py.")
    has_scale = is_conditional and (is_served or s.guidance != 1)
    why = (
        "there is no guidance: --guidance is 1, which is conditional"
        if is_conditional
        else "the network is unconditional"
    )
    if s.guidance_rescale and not has_scale:
        raise InputError(f"--guidance_rescale={s.guidance_rescale:g} has no effect, since {why}. Leave it out.")
    if (s.guidance_first, s.guidance_last) != (1, 0) and not has_scale and not has_classifier:
        raise InputError(
            f"--guidance_first={s.guidance_first} and --guidance_last={s.guidance_last} have no effect, since {why}. Leave "
            "them out."
        )


def _build_loss(config: ConfigDict, diffusion: GaussianDiffusion) -> LossFunction:
    t, make_loss = config.train, objective_of(NETWORKS[config.network.name].build).make_loss
    return make_loss(t.loss, diffusion, weight=t.loss_weight, **settings_of(config, "train.loss_weight"))


def _check_network(config: ConfigDict) -> None:
    network_class: Any = NETWORKS[config.network.name].build
    network_class.check(
        image_shape(config), num_classes=config.network.num_classes or None, **settings_of(config, "network.name")
    )


def check_batch_size(config: ConfigDict, replicas: int) -> None:
    """Refuse a batch that replicas and micro-batches do not divide."""
    micro_batches = config.train.micro_batches
    parts = replicas * micro_batches
    if config.data.batch_size % parts:
        below = config.data.batch_size // parts * parts
        nearest = [str(b) for b in (below, below + parts) if b]
        micro = f" times train.micro_batches={micro_batches}" if micro_batches > 1 else ""
        raise InputError(
            f"data.batch_size={config.data.batch_size} is not divisible by the {replicas} replicas{micro}; use "
            f"{' or '.join(nearest)}."
        )


def parameter_table(network: Network) -> str:
    """Every weight's name, shape and size, and the total, as text."""
    rows = [(v.path, str(tuple(v.shape)), f"{math.prod(v.shape):,}") for v in network.variables]
    return text.table([*rows, ("total", "", f"{network.count_params():,}")], right=[2])
