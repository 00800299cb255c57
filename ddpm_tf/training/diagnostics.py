"""What is logged beside loss and gradient norm; each is a function of the step alone, not of a running mean."""

from collections.abc import Sequence

import tensorflow as tf

from ddpm_tf.diffusion import losses
from ddpm_tf.diffusion.process import GaussianDiffusion

QUARTERS = 4
QUARTER_LOGS = tuple(f"{name}_q{k + 1}" for name in ("loss", "bound") for k in range(QUARTERS))
ACCURACY_LOGS = tuple(f"{name}_q{k + 1}" for name in ("loss", "accuracy") for k in range(QUARTERS))


def quarter_sums(
    diffusion: GaussianDiffusion,
    output: tf.Tensor,
    per_example_loss: tf.Tensor,
    *,
    x_0: tf.Tensor,
    x_t: tf.Tensor,
    t: tf.Tensor,
) -> tf.Tensor:
    """Sums over a batch by quarter of the timesteps (q1: the cleanest images).

    Returns:
        float32 [3, 4]: of the loss, of the bound's term (bits/dim, x_0 clipped), and the number of examples.
    """
    bound = losses.vb_terms_bpd(diffusion, tf.stop_gradient(output), x_0=x_0, x_t=x_t, t=t, clip=True)
    return _by_quarter(t, diffusion.num_timesteps, per_example_loss, bound)


def accuracy_sums(
    logits: tf.Tensor, per_example_loss: tf.Tensor, *, labels: tf.Tensor, t: tf.Tensor, num_timesteps: int
) -> tf.Tensor:
    """As `quarter_sums`, of a classifier: of the loss, of right answers, and the number of examples.

    Args:
        logits: float32 [B, K]. labels: int32 [B], the right answers.
    """
    is_right = tf.equal(tf.argmax(logits, axis=-1, output_type=tf.int32), labels)
    return _by_quarter(t, num_timesteps, per_example_loss, tf.cast(is_right, tf.float32))


def _by_quarter(t: tf.Tensor, num_timesteps: int, *values: tf.Tensor) -> tf.Tensor:
    """Sums by quarter of the timesteps, of values float32 [B] and of 1: float32 [len(values) + 1, 4]."""
    is_in = tf.equal((t * QUARTERS // num_timesteps)[:, None], tf.range(QUARTERS))  # [B, 4]
    stacked = tf.stack([*values, tf.ones_like(values[0])])[:, :, None]  # [len(values) + 1, B, 1]
    return tf.reduce_sum(tf.where(is_in, stacked, 0.0), axis=1)


def quarter_logs(sums: tf.Tensor, names: Sequence[str] = QUARTER_LOGS) -> dict[str, tf.Tensor]:
    """{loss_q1..4, bound_q1..4: mean}, or other `names`; NaN where no example of the step fell into the quarter."""
    return dict(zip(names, tf.unstack(tf.reshape(sums[:2] / sums[2], [-1])), strict=True))


def weight_rms(variables: list) -> tf.Tensor:
    """The root mean square of all weights, as in the original."""
    squares = tf.add_n([tf.reduce_sum(tf.square(v.value)) for v in variables])
    return tf.sqrt(squares / sum(v.shape.num_elements() for v in variables))


def ema_age(step: tf.Tensor, decay: float) -> tf.Tensor:
    """The mean age, in steps, of the weights that the moving average holds after `step` steps.

    sum_k (1 - d) d^k k over the steps, the initial weights included with weight d^step.
    """
    step = tf.cast(step, tf.float32)
    return decay * (1.0 - tf.pow(decay, step)) / (1.0 - decay)
