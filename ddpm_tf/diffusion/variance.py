"""The variance of p(x_{t-1} | x_t), as a log-variance (section 3.2; improved DDPM section 3.1)."""

import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from ddpm_tf.diffusion.gaussian import extract
from ddpm_tf.diffusion.schedules import Schedule

_FLOOR = 1e-20


@dataclasses.dataclass(frozen=True)
class Variance:
    """A kind of variance.

    log_variance: (schedule, raw, t, ndim) -> what broadcasts against x_t. raw is the second half of the network's output
        channels for a learned variance, and None for a fixed one.
    learned: whether the network's output holds it.
    single_steps: the network learned the variance of single steps of the trained chain; a shorter chain cannot use it.
    """

    log_variance: Callable[..., tf.Tensor]
    learned: bool = False
    single_steps: bool = False


def _fixed(table: Callable[[Schedule], np.ndarray]) -> Variance:
    return Variance(lambda schedule, raw, t, ndim: extract(table(schedule), t, ndim))


def _large(schedule: Schedule) -> np.ndarray:
    # sigma^2 = beta, optimal for x_0 ~ N(0, I). Its first entry is the posterior's second, as in the original:
    # log(beta_0) would make the last step's likelihood needlessly poor.
    return np.append(schedule.posterior_log_variance_clipped[0], np.log(schedule.betas[1:]))


def _small(schedule: Schedule) -> np.ndarray:
    # sigma^2 = the posterior variance, optimal for x_0 set to one point.
    return schedule.posterior_log_variance_clipped


def _small_floored(schedule: Schedule) -> np.ndarray:
    # The release's older class, of the CelebA-HQ and LSUN scripts: log(1e-20) at t = 0.
    return np.log(np.maximum(schedule.posterior_variance, _FLOOR))


def _learned(schedule: Schedule, raw: tf.Tensor, t: tf.Tensor, ndim: int) -> tf.Tensor:
    return raw


def _learned_range(schedule: Schedule, raw: tf.Tensor, t: tf.Tensor, ndim: int) -> tf.Tensor:
    """Improved DDPM Eq. 15: raw in [-1, 1] goes from the posterior's log-variance to log(beta)."""
    low, high = (extract(table, t, ndim) for table in (_small(schedule), np.log(schedule.betas)))
    fraction = (raw + 1.0) / 2.0
    return fraction * high + (1.0 - fraction) * low


VARIANCES = {
    "fixed_large": _fixed(_large),
    "fixed_small": _fixed(_small),
    "fixed_small_floored": _fixed(_small_floored),
    "learned": Variance(_learned, learned=True, single_steps=True),
    "learned_range": Variance(_learned_range, learned=True),
}
