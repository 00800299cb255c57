"""What the network predicts: the training target, and the way from the output to x_0."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import tensorflow as tf

from ddpm_tf.diffusion.gaussian import extract
from ddpm_tf.diffusion.schedules import Schedule


class ForwardProcess(Protocol):
    """What a target is made from; `GaussianDiffusion` is one."""

    @property
    def schedule(self) -> Schedule: ...

    def q_posterior(self, x_0: tf.Tensor, x_t: tf.Tensor, t: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]: ...


def x_0_from_eps(schedule: Schedule, x_t: tf.Tensor, t: tf.Tensor, eps: tf.Tensor) -> tf.Tensor:
    """x_0 = x_t / sqrt(abar) - sqrt(1/abar - 1) eps, Eq. 4 solved for x_0."""
    n = len(x_t.shape)
    return (
        extract(schedule.sqrt_recip_alphas_cumprod, t, n) * x_t
        - extract(schedule.sqrt_recipm1_alphas_cumprod, t, n) * eps
    )


def eps_from_x_0(schedule: Schedule, x_t: tf.Tensor, t: tf.Tensor, x_0: tf.Tensor) -> tf.Tensor:
    """eps = (x_t - sqrt(abar) x_0) / sqrt(1 - abar), Eq. 4 solved for eps."""
    n = len(x_t.shape)
    return (x_t - extract(schedule.sqrt_alphas_cumprod, t, n) * x_0) / extract(
        schedule.sqrt_one_minus_alphas_cumprod, t, n
    )


def _target_eps(diffusion: ForwardProcess, x_0: tf.Tensor, x_t: tf.Tensor, t: tf.Tensor, eps: tf.Tensor) -> tf.Tensor:
    return eps


def _target_x_0(diffusion: ForwardProcess, x_0: tf.Tensor, x_t: tf.Tensor, t: tf.Tensor, eps: tf.Tensor) -> tf.Tensor:
    return x_0


def _x_0_from_x_0(schedule: Schedule, x_t: tf.Tensor, t: tf.Tensor, output: tf.Tensor) -> tf.Tensor:
    return output


def _target_v(diffusion: ForwardProcess, x_0: tf.Tensor, x_t: tf.Tensor, t: tf.Tensor, eps: tf.Tensor) -> tf.Tensor:
    n = len(x_0.shape)
    return (
        extract(diffusion.schedule.sqrt_alphas_cumprod, t, n) * eps
        - extract(diffusion.schedule.sqrt_one_minus_alphas_cumprod, t, n) * x_0
    )


def _x_0_from_v(schedule: Schedule, x_t: tf.Tensor, t: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
    n = len(x_t.shape)
    return extract(schedule.sqrt_alphas_cumprod, t, n) * x_t - extract(schedule.sqrt_one_minus_alphas_cumprod, t, n) * v


def _target_x_prev(
    diffusion: ForwardProcess, x_0: tf.Tensor, x_t: tf.Tensor, t: tf.Tensor, eps: tf.Tensor
) -> tf.Tensor:
    return diffusion.q_posterior(x_0, x_t, t)[0]


def _x_0_from_x_prev(schedule: Schedule, x_t: tf.Tensor, t: tf.Tensor, x_prev: tf.Tensor) -> tf.Tensor:
    # The network learned the mean of a step of the *trained* chain, also when the sampler takes longer steps.
    n = len(x_t.shape)
    coef1 = schedule.trained.posterior_mean_coef1[schedule.timesteps]
    coef2 = schedule.trained.posterior_mean_coef2[schedule.timesteps]
    return extract(1.0 / coef1, t, n) * x_prev - extract(coef2 / coef1, t, n) * x_t


@dataclasses.dataclass(frozen=True)
class Prediction:
    """target(diffusion, x_0, x_t, t, eps) is what the output is trained towards; to_x_0(schedule, x_t, t, output)
    is the x_0 that an output stands for. All arrays are [B, H, W, C], t is int32 [B]."""

    target: Callable[..., tf.Tensor]
    to_x_0: Callable[..., tf.Tensor]


PREDICTIONS = {
    "eps": Prediction(_target_eps, x_0_from_eps),
    "x_0": Prediction(_target_x_0, _x_0_from_x_0),
    "v": Prediction(_target_v, _x_0_from_v),  # Salimans & Ho 2022: v = sqrt(abar) eps - sqrt(1-abar) x_0
    "x_prev": Prediction(_target_x_prev, _x_0_from_x_prev),
}
