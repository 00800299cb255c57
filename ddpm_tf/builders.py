"""Config sections to objects; beside `experiment`, the only reader of configs."""

import math

import tensorflow as tf

from ddpm_tf import config as config_lib
from ddpm_tf.data import load_source, make_dataset
from ddpm_tf.diffusion.losses import LOSS_WEIGHTS, LOSSES, make_loss
from ddpm_tf.diffusion.prediction import PREDICTIONS
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import BETA_SCHEDULES, TIMESTEP_SPACINGS, Schedule, make_betas
from ddpm_tf.diffusion.variance import VARIANCES
from ddpm_tf.errors import InputError, unknown_name
from ddpm_tf.networks import UNet
from ddpm_tf.samplers import SAMPLERS, make_sampler
from ddpm_tf.training.model import GRAD_CLIP_MODES, DiffusionModel
from ddpm_tf.training.optimizers import OPTIMIZERS, make_optimizer

NETWORKS = {"unet": UNet}
_NAMES = {
    "diffusion.schedule": BETA_SCHEDULES, "diffusion.prediction": PREDICTIONS, "diffusion.variance": VARIANCES,
    "network.name": NETWORKS, "train.loss": LOSSES, "train.loss_weight": LOSS_WEIGHTS,
    "train.grad_clip_mode": GRAD_CLIP_MODES, "optimizer.name": OPTIMIZERS, "sample.sampler": SAMPLERS,
    "sample.spacing": TIMESTEP_SPACINGS,
}  # fmt: skip


def image_shape(config):
    """(H, W, C)."""
    return config.data.image_size, config.data.image_width or config.data.image_size, config.data.channels


def build_source(config, *, download=False, read_only=False):
    data = config.data
    return load_source(
        data.source, image_shape=image_shape(config), split=data.split, data_dir=data.data_dir, download=download,
        in_memory_mb=data.in_memory_mb, read_only=read_only,
    )  # fmt: skip


def build_dataset(config, source, *, start_step, replicas=(0, 1, 1)):
    return make_dataset(
        source, batch_size=config.data.batch_size, seed=config.seed, start_step=start_step,
        random_flip=config.data.random_flip, replicas=replicas,
    )  # fmt: skip


def build_diffusion(config):
    d = config.diffusion
    betas = make_betas(d.schedule, d.num_timesteps, beta_start=d.beta_start, beta_end=d.beta_end)
    return GaussianDiffusion(Schedule(betas), prediction=d.prediction, variance=d.variance, clip=config.sample.clip)


def build_network(config, diffusion, *, precision="float32"):
    """The network, with the output channels that the diffusion's variance needs; its weights are always float32."""
    n = config.network
    if n.name not in NETWORKS:
        raise unknown_name("network.name", n.name, NETWORKS)
    shape = image_shape(config)
    return NETWORKS[n.name](
        shape, out_channels=shape[-1] * (2 if diffusion.has_learned_variance else 1), **_sizes(config),
        resamp_with_conv=n.resamp_with_conv, remat=n.remat, seed=config.seed,
        dtype="float32" if precision == "float32" else f"mixed_{precision}",
    )  # fmt: skip


def _sizes(config):
    """The network's arguments that must fit each other and the images."""
    n = config.network
    return {
        "ch": n.ch, "ch_mult": n.ch_mult, "num_res_blocks": n.num_res_blocks, "attn_resolutions": n.attn_resolutions,
        "dropout": n.dropout, "block_size": n.block_size,
    }  # fmt: skip


def build_optimizer(config):
    o = config.optimizer
    return make_optimizer(
        o.name, learning_rate=o.learning_rate, warmup_steps=o.warmup_steps, beta_1=o.beta_1, beta_2=o.beta_2,
        epsilon=o.epsilon,
    )  # fmt: skip


def uses_xla(config):
    """Whether loss and gradient are compiled by XLA."""
    jit = config.train.jit_compile
    return jit == "on" or (jit == "auto" and bool(tf.config.list_physical_devices("GPU")))


def build_model(config, strategy, *, max_skipped_steps=None, is_compiled=True):
    """The trainer with all variables made under `strategy`.

    max_skipped_steps: None: the config's. is_compiled: with optimizer and moments, else only to look at.
    """
    check_batch_size(config, strategy.num_replicas_in_sync)
    t, diffusion = config.train, build_diffusion(config)
    with strategy.scope():
        model = DiffusionModel(
            build_network(config, diffusion, precision=t.precision), diffusion, seed=config.seed,
            loss=t.loss, loss_weight=t.loss_weight, ema_decay=t.ema_decay,
            grad_clip=t.grad_clip, grad_clip_mode=t.grad_clip_mode,
            max_skipped_steps=max_skipped_steps or t.max_skipped_steps, micro_batches=t.micro_batches,
        )  # fmt: skip
        if is_compiled:
            optimizer = build_optimizer(config)
            model.compile(optimizer, jit_compile=uses_xla(config), steps_per_execution=t.steps_per_execution)
    return model


def check(config):
    """Refuse a config that cannot be trained, with everything that is wrong in it.

    Runs no TensorFlow op: devices and strategy can be set up only before the first.

    Raises:
        InputError
    """
    config_lib.check_types(config)
    found = config_lib.range_problems(config)
    told = {problem.partition(".")[0] for problem in found}  # sections
    for path, table in _NAMES.items():
        if (name := config_lib.get(config, path)) not in table:
            found.append(str(unknown_name(path, name, table)))
            told.add(path.partition(".")[0])

    def attempt(path, build, *args, reads):
        """What depends on several fields, where nothing is wrong with any of them alone."""
        if not told & set(reads):
            try:
                return build(config, *args)
            except InputError as e:
                found.append(f"{path}: {e}")

    diffusion = attempt("diffusion", build_diffusion, reads=["diffusion"])
    if diffusion:
        attempt("sample.num_steps, sample.eta", build_sampler, diffusion, reads=["sample"])
        attempt("train.loss", _build_loss, diffusion, reads=["train"])
    attempt("network", _check_network, reads=["network", "data"])
    attempt("train.micro_batches", check_batch_size, 1, reads=["data", "train"])
    config_lib.refuse(found)


def _build_loss(config, diffusion):
    return make_loss(config.train.loss, diffusion, weight=config.train.loss_weight)


def _check_network(config):
    NETWORKS[config.network.name].check(image_shape(config), **_sizes(config))


def check_batch_size(config, replicas):
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


def build_sampler(config, diffusion):
    s = config.sample
    return make_sampler(s.sampler, diffusion, num_steps=s.num_steps or None, spacing=s.spacing, eta=s.eta)


def parameter_table(network):
    """Every weight's name, shape and size, and the total, as text."""
    rows = [(v.path, str(tuple(v.shape)), f"{math.prod(v.shape):,}") for v in network.variables]
    rows.append(("total", "", f"{network.count_params():,}"))
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)
