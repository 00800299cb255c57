"""What is logged beside loss and gradient norm; each is a function of the step alone, not of a running mean."""

import tensorflow as tf

from ddpm_tf.diffusion import losses
from ddpm_tf.diffusion.process import GaussianDiffusion

QUARTERS = 4
QUARTER_LOGS = tuple(f"{name}_q{k + 1}" for name in ("loss", "bound") for k in range(QUARTERS))


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
    is_in = tf.equal((t * QUARTERS // diffusion.num_timesteps)[:, None], tf.range(QUARTERS))  # [B, 4]
    values = tf.stack([per_example_loss, bound, tf.ones_like(bound)])[:, :, None]  # [3, B, 1]
    return tf.reduce_sum(tf.where(is_in, values, 0.0), axis=1)


def quarter_logs(sums: tf.Tensor) -> dict[str, tf.Tensor]:
    """{loss_q1..4, bound_q1..4: mean}; NaN where no example of the step fell into the quarter."""
    return dict(zip(QUARTER_LOGS, tf.unstack(tf.reshape(sums[:2] / sums[2], [-1])), strict=True))


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
