"""The forward process q and the reverse process p of a Gaussian diffusion (sections 2 and 3)."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from ddpm_tf import checks
from ddpm_tf.diffusion.gaussian import extract
from ddpm_tf.diffusion.prediction import PREDICTIONS, eps_from_x_0
from ddpm_tf.diffusion.schedules import Schedule
from ddpm_tf.diffusion.variance import VARIANCES
from ddpm_tf.errors import InputError

LEAST_ALPHAS_CUMPROD = 1e-76  # the root of its inverse is as large as float32 holds


class PMeanVariance(NamedTuple):
    """p(x_{t-1} | x_t): mean and the x_0 and eps it rests on, [B, H, W, C]; log_variance broadcasts against them."""

    mean: tf.Tensor
    log_variance: tf.Tensor
    x_0: tf.Tensor
    eps: tf.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianDiffusion:
    """The formulas of one chain; they take the network's output, never the network.

    Args:
        schedule: the chain, a `Schedule`.
        prediction: what the network predicts: eps, x_0, v or x_prev (the posterior mean, Eq. 7).
        variance: fixed_large (sigma^2 = beta), fixed_small (sigma^2 = posterior variance), fixed_small_floored (the
            release's older class: log(1e-20) at t = 0), learned (the network's log-variance) or learned_range (between
            posterior variance and beta, improved DDPM Eq. 15). A learned one doubles the network's output channels.

    Raises:
        InputError: unknown names, or prediction eps with a chain that ends without any signal, from which no x_0 can be
            computed. jsd ends so for every T, and other schedules do where their last beta is 1.
    """

    schedule: Schedule
    _: dataclasses.KW_ONLY
    prediction: str = "eps"
    variance: str = "fixed_large"

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise InputError(
                f"schedule must be a Schedule, found {type(self.schedule).__name__}: Schedule(betas) makes one."
            )
        checks.known("prediction", self.prediction, PREDICTIONS)
        checks.known("variance", self.variance, VARIANCES)
        last = self.schedule.alphas_cumprod[-1]
        if self.prediction == "eps" and last < LEAST_ALPHAS_CUMPROD:
            raise InputError(
                f"This chain ends at alphas_cumprod = {last:.3g}: prediction 'eps' cannot recover x_0 there, since 1 / sqrt("
                "alphas_cumprod) is not finite in float32. Use prediction 'x_0' or 'v', or a schedule with smaller betas or "
                "fewer timesteps."
            )

    @property
    def has_learned_variance(self) -> bool:
        """Whether the network's output is [B, H, W, 2C]: the prediction, then what the variance is made of."""
        return VARIANCES[self.variance].learned

    @property
    def num_timesteps(self) -> int:
        """T of this chain."""
        return self.schedule.num_timesteps

    def respace(self, kept: np.ndarray) -> "GaussianDiffusion":
        """The same model over the shorter chain that visits only the timesteps `kept`.

        Raises:
            InputError: variance `learned`, which is that of single steps of the trained chain.
        """
        if VARIANCES[self.variance].single_steps and len(kept) < self.num_timesteps:
            raise InputError(
                f"Variance {self.variance!r} was learned for single steps of the {self.num_timesteps}-step chain and "
                f"says nothing about {len(kept)} longer ones. Sample all steps, or train with 'learned_range'."
            )
        return dataclasses.replace(self, schedule=self.schedule.respace(kept))

    def q_sample(self, x_0: tf.Tensor, t: tf.Tensor, eps: tf.Tensor) -> tf.Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Eq. 4), float32 [B, H, W, C]; t int32 [B], 0-based."""
        n = len(x_0.shape)
        return (
            extract(self.schedule.sqrt_alphas_cumprod, t, n) * x_0
            + extract(self.schedule.sqrt_one_minus_alphas_cumprod, t, n) * eps
        )

    def q_posterior(self, x_0: tf.Tensor, x_t: tf.Tensor, t: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """q(x_{t-1} | x_t, x_0), Eqs. 6 and 7.

        Returns:
            (mean [B, H, W, C], log_variance [B, 1, 1, 1]). The variance is 0 at t = 0; its logarithm is
            replaced by that of t = 1.
        """
        n = len(x_t.shape)
        mean = (
            extract(self.schedule.posterior_mean_coef1, t, n) * x_0
            + extract(self.schedule.posterior_mean_coef2, t, n) * x_t
        )
        return mean, extract(self.schedule.posterior_log_variance_clipped, t, n)

    def split_output(self, output: tf.Tensor, channels: int) -> tuple[tf.Tensor, tf.Tensor | None]:
        """(prediction, raw variance or None) of a network's output.

        Raises:
            InputError: an output whose channels do not fit the variance.
        """
        expected = channels * (2 if self.has_learned_variance else 1)
        if output.shape[-1] != expected:
            raise InputError(
                f"With variance {self.variance!r} the network must have {expected} output channels for images of "
                f"{channels}, found {output.shape[-1]}. Set out_channels of the network."
            )
        if not self.has_learned_variance:
            return output, None
        return output[..., :channels], output[..., channels:]

    def p_mean_variance(
        self,
        output: tf.Tensor,
        x_t: tf.Tensor,
        t: tf.Tensor,
        clip: bool = True,
        *,
        dynamic_threshold: float = 0.0,
        eps_shift: tf.Tensor | None = None,
    ) -> PMeanVariance:
        """p(x_{t-1} | x_t) from the network's output (Eq. 1; for eps the mean is Eq. 11 when nothing is clipped).

        Args:
            output: the network's output at (x_t, t), float32 [B, H, W, C], or [B, H, W, 2C] with a learned variance:
                the prediction first, then the log-variance (learned) or its place in the range (learned_range).
            x_t: float32 [B, H, W, C].
            t: int32 [B], index in this chain, 0-based.
            clip: clip x_0 to [-1, 1]. A mean that is predicted directly (x_prev, over the whole chain) does not depend on it.
            dynamic_threshold: with clip, not to [-1, 1] but by `dynamically_thresholded` at this quantile; 0: to [-1, 1].
            eps_shift: [B, H, W, C], is added to eps before x_0 is clipped: the gradient of a classifier.

        Returns:
            PMeanVariance; its eps is derived from the (clipped) x_0.
        """
        predicted, raw = self.split_output(output, x_t.shape[-1])
        x_0 = PREDICTIONS[self.prediction].to_x_0(self.schedule, x_t, t, predicted)
        n = len(x_t.shape)
        if eps_shift is not None:
            x_0_shift = -extract(self.schedule.sqrt_recipm1_alphas_cumprod, t, n) * eps_shift
            x_0 = x_0 + x_0_shift
        if clip:
            x_0 = (
                dynamically_thresholded(x_0, dynamic_threshold)
                if dynamic_threshold
                else tf.clip_by_value(x_0, -1.0, 1.0)
            )
        if self.prediction == "x_prev" and self.schedule.trained is self.schedule:
            mean = predicted  # as in the original: clipping x_0 does not change a mean that is predicted directly
            if eps_shift is not None:
                mean = mean + extract(self.schedule.posterior_mean_coef1, t, n) * x_0_shift
        else:
            mean = self.q_posterior(x_0, x_t, t)[0]
        log_variance = VARIANCES[self.variance].log_variance(self.schedule, raw, t, len(x_t.shape))
        return PMeanVariance(mean, log_variance, x_0, eps_from_x_0(self.schedule, x_t, t, x_0))


def dynamically_thresholded(x_0: tf.Tensor, quantile: float) -> tf.Tensor:
    """x_0 clipped to [-s, s] and divided by s, where s >= 1 is the quantile of an image's |x_0| (Imagen, section 2.3).

    Args:
        x_0: float32 [B, H, W, C].
        quantile: 0 < quantile <= 1; Imagen's is 0.995. Between two values it is interpolated.
    """
    size = math.prod(x_0.shape[1:])
    place = quantile * (size - 1)
    below = min(int(place), size - 2) if size > 1 else 0
    ordered = tf.sort(tf.reshape(tf.abs(x_0), [-1, size]), axis=1)
    low, high = ordered[:, below], ordered[:, min(below + 1, size - 1)]
    limit = tf.maximum(low + (place - below) * (high - low), 1.0)[:, None, None, None]
    return tf.clip_by_value(x_0, -limit, limit) / limit
