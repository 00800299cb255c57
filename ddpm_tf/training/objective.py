"""Algorithm 1 of Ho et al. 2020: what a training step computes for a batch. It knows no replicas."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from ddpm_tf import checks, rng
from ddpm_tf.diffusion.losses import LOSSES, LossFunction, make_loss
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.errors import InputError
from ddpm_tf.networks.contract import Inputs, Network
from ddpm_tf.training import diagnostics

CROSS_ENTROPY = "cross_entropy"  # the loss of `ClassifierObjective`


class Draws(NamedTuple):
    """The random numbers of a step: t int32 [B], eps float32 [B, H, W, C], dropout_seed int32 [B, 2].

    drops_label: bool [B], whose label becomes the null class; None without label dropout.
    """

    t: tf.Tensor
    eps: tf.Tensor
    dropout_seed: tf.Tensor
    drops_label: tf.Tensor | None = None


class Computed(NamedTuple):
    """What a step computed: losses [B], the network's output, and x_t and t it answers to.

    labels: int32 [B], what a classifier should have answered; None for other networks.
    """

    losses: tf.Tensor
    output: tf.Tensor
    x_t: tf.Tensor
    t: tf.Tensor
    labels: tf.Tensor | None = None


class Objective:
    """The loss of a batch.

    Every draw is a function of (seed, step, position in the global batch), so that the numbers depend neither on how the
    batch is shared, nor on the steps before.

    Args:
        seed: int64.
        loss, loss_weight: see `make_loss`; loss_settings: {setting: value} of the loss weight.
        label_dropout: the probability that an example of a class-conditional network is given the null class instead of its
            label, so that the network also learns the images without condition (Ho & Salimans 2022, Algorithm 1).

    Raises:
        InputError: as `make_loss`; a probability outside [0, 1).
    """

    LOGS = diagnostics.QUARTER_LOGS
    HAS_NULL_CLASS = True
    SUMS_SHAPE = (3, diagnostics.QUARTERS)

    def __init__(
        self,
        network: Network,
        diffusion: GaussianDiffusion,
        *,
        seed: int = 0,
        loss: str = "simple",
        loss_weight: str = "none",
        loss_settings: Mapping[str, Any] | None = None,
        label_dropout: float = 0.0,
    ) -> None:
        if not 0 <= checks.real("label_dropout", label_dropout) < 1:
            raise InputError(f"label_dropout must be within [0, 1), found {label_dropout}.")
        self.network, self.diffusion = network, diffusion
        self.label_dropout = label_dropout if network.num_classes is not None and self.HAS_NULL_CLASS else 0.0
        self.seed = checks.integer("seed", seed, **checks.INT64)
        self.loss = self.make_loss(loss, diffusion, weight=loss_weight, **(loss_settings or {}))

    @staticmethod
    def make_loss(name: str, diffusion: GaussianDiffusion, *, weight: str = "none", **settings: float) -> LossFunction:
        """`losses.make_loss`; cross_entropy, which only a classifier has, is refused with the reason."""
        if name == CROSS_ENTROPY:
            raise InputError(
                f"Loss {name!r} trains a classifier, and this network predicts images. Use one of {sorted(LOSSES)}."
            )
        return make_loss(name, diffusion, weight=weight, **settings)

    def draws(self, index: tf.Tensor, step: tf.Tensor) -> Draws:
        """What step `step` draws for the examples at positions `index`, int32 [B], of the global batch."""
        key = {"index": index, "step": step}
        t, eps = self._t_and_eps(rng.Purpose.TIMESTEP, rng.Purpose.NOISE, **key)
        words = rng.bits(self.seed, 2, purpose=rng.Purpose.DROPOUT_SEED, **key)
        if not self.label_dropout:
            return Draws(t, eps, tf.bitcast(words, tf.int32))
        drops = rng.bernoulli(self.seed, self.label_dropout, (), purpose=rng.Purpose.LABEL_DROPOUT, **key)
        return Draws(t, eps, tf.bitcast(words, tf.int32), drops)

    def _t_and_eps(self, timestep: int, noise: int, **key: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        t = rng.integers(self.seed, self.diffusion.num_timesteps, purpose=timestep, **key)
        return t, rng.normal(self.seed, self.network.image_shape, purpose=noise, **key)

    def held_out_losses(
        self, x_0: tf.Tensor, labels: tf.Tensor | None, index: tf.Tensor, number: tf.Tensor
    ) -> tf.Tensor:
        """The losses of held-out images without dropout, float32 [B].

        Their draws are a function of (seed, number, index), and of other bits than those of training: the same images have
        the same loss at every evaluation, as long as the weights are the same.

        Args:
            index: int32 [B], positions in the batch.
            number: int64 scalar, which batch it is.
        """
        t, eps = self._t_and_eps(rng.Purpose.HELD_OUT_TIMESTEP, rng.Purpose.HELD_OUT_NOISE, index=index, step=number)
        return self._computed(x_0, labels, t, eps, training=False).losses

    def __call__(self, x_0: tf.Tensor, labels: tf.Tensor | None, draws: Draws) -> Computed:
        """Lines 2 to 5 of Algorithm 1, up to the gradient, for x_0 float32 [B, H, W, C] and labels int32 [B] or None."""
        if labels is not None and draws.drops_label is not None:
            labels = tf.where(draws.drops_label, tf.constant(self.network.num_classes, labels.dtype), labels)
        return self._computed(x_0, labels, draws.t, draws.eps, training=True, dropout_seed=draws.dropout_seed)

    def _computed(
        self, x_0: tf.Tensor, labels: tf.Tensor | None, t: tf.Tensor, eps: tf.Tensor, **dropout: Any
    ) -> Computed:
        x_t = self.diffusion.q_sample(x_0, t, eps)  # Eq. 4
        inputs: Inputs = {"x_t": x_t, "t": t}
        if labels is not None:
            inputs["labels"] = labels
        output = self.network(inputs, **dropout)
        return Computed(self.loss(self.diffusion, output, x_0=x_0, x_t=x_t, t=t, eps=eps), output, x_t, t)  # Eq. 14

    def sums(self, x_0: tf.Tensor, computed: Computed) -> tf.Tensor:
        """Sums over the batch from which `logs` are made, float32 SUMS_SHAPE; sums of parts of a batch may be added."""
        losses, output, x_t, t, _ = computed
        return diagnostics.quarter_sums(self.diffusion, output, losses, x_0=x_0, x_t=x_t, t=t)

    def logs(self, sums: tf.Tensor) -> dict[str, tf.Tensor]:
        """{name: scalar} for each of LOGS."""
        return diagnostics.quarter_logs(sums)

    def check(self, batch: Any) -> tuple[tf.Tensor, tf.Tensor | None]:
        """(images, labels or None) of a batch.

        Raises:
            InputError: no dict with "image", another dtype or shape, labels that are missing.
            tf.errors.InvalidArgumentError, when it runs: a value outside [-1, 1], a label outside 0..num_classes.
        """
        if isinstance(batch, tuple) and len(batch) == 1:  # so Keras gives arrays
            (batch,) = batch
        if not isinstance(batch, dict) or "image" not in batch:
            raise InputError(
                'fit takes batches {"image": float32 [B, H, W, C] in [-1, 1], ("label": int32 [B])} and no targets, found '
                f"{_described(batch)}. `make_dataset` makes them."
            )
        images, expected = batch["image"], tuple(self.network.image_shape)
        if images.dtype != tf.float32 or tuple(images.shape[1:]) != expected:
            raise InputError(
                f"Images must be float32 [B, {', '.join(map(str, expected))}], found {images.dtype.name} {images.shape}."
            )
        largest = tf.reduce_max(tf.abs(images))
        message = "Images must lie within [-1, 1]; the largest absolute value is above 1. Scale with x / 127.5 - 1."
        with tf.control_dependencies([tf.debugging.assert_less_equal(largest, 1.0, message=message)]):
            images = tf.identity(images)
        num_classes = getattr(self.network, "num_classes", None)
        if num_classes is None:
            return images, None
        if "label" not in batch:
            raise InputError('A class-conditional network or a classifier needs batches with "label".')
        return images, checked_labels(batch["label"], images, num_classes, has_null_class=self.HAS_NULL_CLASS)


def checked_labels(labels: tf.Tensor, images: tf.Tensor, num_classes: int, *, has_null_class: bool = True) -> tf.Tensor:
    """int32 [B]; without the check, Keras would take -1 for the null class, and a cast would wrap round."""
    if not labels.dtype.is_integer or not labels.shape.is_compatible_with(images.shape[:1]):
        raise InputError(f"Labels must be integers, one per image, found {labels.dtype.name} {labels.shape}.")
    labels = tf.cast(labels, tf.int64)
    last = num_classes if has_null_class else num_classes - 1
    meaning = f", where {num_classes} means no class" if has_null_class else ""
    message = f"Labels must lie within 0..{last}{meaning}."
    is_good = tf.reduce_all((labels >= 0) & (labels <= last))
    with tf.control_dependencies([tf.debugging.Assert(is_good, [message, labels])]):
        return tf.cast(labels, tf.int32)


def _described(batch: Any) -> str:
    if isinstance(batch, dict):
        return f"a dict with {sorted(map(str, batch))}"
    if isinstance(batch, tuple):
        return f"a tuple of {len(batch)}"
    return f"{type(batch).__name__} {getattr(batch, 'shape', '')}".strip()
