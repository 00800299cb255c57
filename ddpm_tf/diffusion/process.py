"""The forward process q and the reverse process p of a Gaussian diffusion (sections 2 and 3)."""

import dataclasses
from typing import NamedTuple

import tensorflow as tf

from ddpm_tf.diffusion.gaussian import extract
from ddpm_tf.diffusion.prediction import PREDICTIONS, eps_from_x_0
from ddpm_tf.diffusion.schedules import Schedule
from ddpm_tf.diffusion.variance import VARIANCES
from ddpm_tf.errors import InputError, unknown_name


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
        variance: fixed_large (sigma^2 = beta) or fixed_small (sigma^2 = posterior variance).
        clip: whether x_0 is clipped to [-1, 1] in `p_mean_variance`.

    Raises:
        InputError: unknown names, or prediction eps with a chain that ends without any signal (jsd), from
            which no x_0 can be computed.
    """

    schedule: Schedule
    _: dataclasses.KW_ONLY
    prediction: str = "eps"
    variance: str = "fixed_large"
    clip: bool = True

    def __post_init__(self):
        if self.prediction not in PREDICTIONS:
            raise unknown_name("prediction", self.prediction, PREDICTIONS)
        if self.variance not in VARIANCES:
            raise unknown_name("variance", self.variance, VARIANCES)
        if self.prediction == "eps" and self.schedule.alphas_cumprod[-1] <= 0:
            raise InputError(
                "This chain ends at alphas_cumprod = 0 (schedule jsd): prediction 'eps' cannot recover x_0 "
                "there. Use prediction 'x_0' or 'v'."
            )
        object.__setattr__(self, "_log_variance", VARIANCES[self.variance](self.schedule))

    @property
    def num_timesteps(self):
        """T of this chain."""
        return self.schedule.num_timesteps

    def respace(self, kept):
        """The same model over the shorter chain that visits only the timesteps `kept`."""
        return dataclasses.replace(self, schedule=self.schedule.respace(kept))

    def q_sample(self, x_0, t, eps):
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Eq. 4), float32 [B, H, W, C]; t int32 [B], 0-based."""
        n = len(x_0.shape)
        return (
            extract(self.schedule.sqrt_alphas_cumprod, t, n) * x_0
            + extract(self.schedule.sqrt_one_minus_alphas_cumprod, t, n) * eps
        )

    def q_posterior(self, x_0, x_t, t):
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

    def p_mean_variance(self, output, x_t, t, clip=None):
        """p(x_{t-1} | x_t) from the network's output (Eq. 1; for eps the mean is Eq. 11 when nothing is clipped).

        Args:
            output: the network's output at (x_t, t), float32 [B, H, W, C].
            x_t: float32 [B, H, W, C].
            t: int32 [B], index in this chain, 0-based.
            clip: clip x_0 to [-1, 1]; None: as the object was made.

        Returns:
            PMeanVariance; its eps is derived from the (clipped) x_0.
        """
        clip = self.clip if clip is None else clip
        x_0 = PREDICTIONS[self.prediction].to_x_0(self.schedule, x_t, t, output)
        if clip:
            x_0 = tf.clip_by_value(x_0, -1.0, 1.0)
        if self.prediction == "x_prev" and self.schedule.trained is self.schedule:
            mean = output  # as in the original: clipping x_0 does not change a mean that is predicted directly
        else:
            mean = self.q_posterior(x_0, x_t, t)[0]
        log_variance = extract(self._log_variance, t, len(x_t.shape))
        return PMeanVariance(mean, log_variance, x_0, eps_from_x_0(self.schedule, x_t, t, x_0))
