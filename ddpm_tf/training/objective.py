"""Algorithm 1 of Ho et al. 2020: what a training step computes for a batch. It knows no replicas."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from ddpm_tf import rng
from ddpm_tf.diffusion.losses import make_loss
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.errors import InputError
from ddpm_tf.networks.contract import Inputs, Network
from ddpm_tf.training import diagnostics


class Draws(NamedTuple):
    """The random numbers of a step: t int32 [B], eps float32 [B, H, W, C], dropout_seed int32 [B, 2]."""

    t: tf.Tensor
    eps: tf.Tensor
    dropout_seed: tf.Tensor


class Computed(NamedTuple):
    """What a step computed: losses [B], the network's output [B, H, W, out_channels], and x_t and t it answers to."""

    losses: tf.Tensor
    output: tf.Tensor
    x_t: tf.Tensor
    t: tf.Tensor


class Objective:
    """The loss of a batch.

    Every draw is a function of (seed, step, position in the global batch), so that the numbers depend neither on how the
    batch is shared, nor on the steps before.

    Args:
        seed: int64.
        loss, loss_weight: see `make_loss`; loss_settings: {setting: value} of the loss weight.

    Raises:
        InputError: as `make_loss`.
    """

    LOGS = diagnostics.QUARTER_LOGS
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
    ) -> None:
        self.network, self.diffusion, self.seed = network, diffusion, seed
        self.loss = make_loss(loss, diffusion, weight=loss_weight, **(loss_settings or {}))

    def draws(self, index: tf.Tensor, step: tf.Tensor) -> Draws:
        """What step `step` draws for the examples at positions `index`, int32 [B], of the global batch."""
        key = {"index": index, "step": step}
        t = rng.integers(self.seed, self.diffusion.num_timesteps, purpose=rng.Purpose.TIMESTEP, **key)
        eps = rng.normal(self.seed, self.network.image_shape, purpose=rng.Purpose.NOISE, **key)
        words = rng.bits(self.seed, 2, purpose=rng.Purpose.DROPOUT_SEED, **key)
        return Draws(t, eps, tf.bitcast(words, tf.int32))

    def __call__(self, x_0: tf.Tensor, labels: tf.Tensor | None, draws: Draws) -> Computed:
        """Lines 2 to 5 of Algorithm 1, up to the gradient, for x_0 float32 [B, H, W, C] and labels int32 [B] or None."""
        t, eps, dropout_seed = draws
        x_t = self.diffusion.q_sample(x_0, t, eps)  # Eq. 4
        inputs: Inputs = {"x_t": x_t, "t": t}
        if labels is not None:
            inputs["labels"] = labels
        output = self.network(inputs, training=True, dropout_seed=dropout_seed)
        return Computed(self.loss(self.diffusion, output, x_0=x_0, x_t=x_t, t=t, eps=eps), output, x_t, t)  # Eq. 14

    def sums(self, x_0: tf.Tensor, computed: Computed) -> tf.Tensor:
        """Sums over the batch from which `logs` are made, float32 SUMS_SHAPE; sums of parts of a batch may be added."""
        losses, output, x_t, t = computed
        return diagnostics.quarter_sums(self.diffusion, output, losses, x_0=x_0, x_t=x_t, t=t)

    def logs(self, sums: tf.Tensor) -> dict[str, tf.Tensor]:
        """{name: scalar} for each of LOGS."""
        return diagnostics.quarter_logs(sums)

    def check(self, batch: Any) -> tuple[tf.Tensor, tf.Tensor | None]:
        """(images, labels or None) of a batch.

        Raises:
            InputError: no dict with "image", another dtype or shape, labels that are missing.
            tf.errors.InvalidArgumentError, when it runs: a value outside [-1, 1].
        """
        if not isinstance(batch, dict) or "image" not in batch:
            raise InputError('fit takes batches {"image": float32 [B, H, W, C] in [-1, 1], ("label": int32 [B])}.')
        images, expected = batch["image"], tuple(self.network.image_shape)
        if images.dtype != tf.float32 or tuple(images.shape[1:]) != expected:
            raise InputError(
                f"Images must be float32 [B, {', '.join(map(str, expected))}], found {images.dtype.name} {images.shape}."
            )
        largest = tf.reduce_max(tf.abs(images))
        message = "Images must lie within [-1, 1]; the largest absolute value is above 1. Scale with x / 127.5 - 1."
        with tf.control_dependencies([tf.debugging.assert_less_equal(largest, 1.0, message=message)]):
            images = tf.identity(images)
        if getattr(self.network, "num_classes", None) is None:
            return images, None
        if "label" not in batch:
            raise InputError('A class-conditional network needs batches with "label".')
        return images, batch["label"]
