"""Training losses and the terms of the variational bound, one number per example."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from ddpm_tf import checks
from ddpm_tf.choices import Choice, choose
from ddpm_tf.diffusion.gaussian import discretized_gaussian_log_likelihood, extract, mean_flat, normal_kl
from ddpm_tf.diffusion.prediction import PREDICTIONS
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.errors import InputError

_NATS_PER_BIT = math.log(2.0)
LossFunction = Callable[..., tf.Tensor]


def simple(
    diffusion: GaussianDiffusion, output: tf.Tensor, *, x_0: tf.Tensor, x_t: tf.Tensor, t: tf.Tensor, eps: tf.Tensor
) -> tf.Tensor:
    """L_simple: the squared error against the prediction's target, averaged over pixels (Eq. 14 for eps).

    Args:
        output: the network's output at (x_t, t), float32 [B, H, W, C]; of 2C channels the first C count.
        x_0, x_t, eps: float32 [B, H, W, C]; t: int32 [B].

    Returns:
        float32 [B]. Original: a mean over pixels, where the paper writes a sum.
    """
    predicted, _ = diffusion.split_output(output, x_0.shape[-1])
    target = PREDICTIONS[diffusion.prediction].target(diffusion, x_0, x_t, t, eps)
    return mean_flat((predicted - target) ** 2)


def vb_terms_bpd(
    diffusion: GaussianDiffusion, output: tf.Tensor, *, x_0: tf.Tensor, x_t: tf.Tensor, t: tf.Tensor, clip: bool
) -> tf.Tensor:
    """One term of the bound (Eq. 5): KL(q(x_{t-1} | x_t, x_0) || p) for t > 0, -log p(x_0 | x_1) at t = 0.

    Args:
        diffusion, output, x_0, x_t, t: as in `simple`.
        clip: clip the predicted x_0 to [-1, 1] (evaluation: yes; training: no).

    Returns:
        float32 [B], bits/dim: averaged over pixels. The sum over t and `prior_bpd` is the bound.
    """
    p = diffusion.p_mean_variance(output, x_t, t, clip=clip)
    true_mean, true_log_variance = diffusion.q_posterior(x_0, x_t, t)
    kl = mean_flat(normal_kl(true_mean, true_log_variance, p.mean, p.log_variance))
    nll = mean_flat(-discretized_gaussian_log_likelihood(x_0, mean=p.mean, log_scale=0.5 * p.log_variance))
    return tf.where(tf.equal(t, 0), nll, kl) / _NATS_PER_BIT


def prior_bpd(diffusion: GaussianDiffusion, x_0: tf.Tensor) -> tf.Tensor:
    """KL(q(x_T | x_0) || N(0, I)), the first term of the bound (Eq. 5): float32 [B], bits/dim."""
    T = diffusion.num_timesteps
    t = tf.fill([tf.shape(x_0)[0]], T - 1)
    n = len(x_0.shape)
    mean = extract(diffusion.schedule.sqrt_alphas_cumprod, t, n) * x_0
    log_variance = extract(diffusion.schedule.log_one_minus_alphas_cumprod, t, n)
    return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / _NATS_PER_BIT


def vlb(
    diffusion: GaussianDiffusion, output: tf.Tensor, *, x_0: tf.Tensor, x_t: tf.Tensor, t: tf.Tensor, eps: tf.Tensor
) -> tf.Tensor:
    """The release's "kl" loss: the bound's term at t, bits/dim, x_0 not clipped, not multiplied by T; [B]."""
    return vb_terms_bpd(diffusion, output, x_0=x_0, x_t=x_t, t=t, clip=False)


def hybrid(
    diffusion: GaussianDiffusion, output: tf.Tensor, *, x_0: tf.Tensor, x_t: tf.Tensor, t: tf.Tensor, eps: tf.Tensor
) -> tf.Tensor:
    """simple + 0.001 T vlb, the bound's mean detached (improved DDPM Eq. 16): [B].

    The bound trains the variance alone; the squared error trains the mean.
    """
    predicted, raw = diffusion.split_output(output, x_0.shape[-1])
    detached = tf.concat([tf.stop_gradient(predicted), raw], axis=-1)
    bound = vb_terms_bpd(diffusion, detached, x_0=x_0, x_t=x_t, t=t, clip=False)
    return simple(diffusion, output, x_0=x_0, x_t=x_t, t=t, eps=eps) + 0.001 * diffusion.num_timesteps * bound


@dataclasses.dataclass(frozen=True)
class Loss:
    """A training loss.

    per_example: a function like `simple`.
    variances: the kinds of variance with which the loss makes sense, learned (True) or fixed (False).
    weighted: whether a loss weight applies to it.
    reason: why the loss does not go with the other kind of variance.
    """

    per_example: LossFunction
    variances: tuple[bool, ...]
    weighted: bool
    reason: str = ""


LOSSES = {
    "simple": Loss(simple, (False,), True, "it gives a learned variance no gradient; use 'hybrid' or 'vlb'"),
    "vlb": Loss(vlb, (False, True), False, "the bound has its own weights"),
    "hybrid": Loss(
        hybrid, (True,), False, "its bound trains only a learned variance; use 'simple', or variance 'learned_range'"
    ),
}


def _snr(snr: np.ndarray) -> np.ndarray:
    return np.ones_like(snr)


def _min_snr(snr: np.ndarray, *, gamma: float = 5.0) -> np.ndarray:
    if gamma <= 0:
        raise InputError(f"gamma of loss weight min_snr must be above 0, found {gamma}.")
    return np.minimum(snr, gamma) / np.maximum(snr, np.finfo(float).tiny)


def _p2(snr: np.ndarray, *, k: float = 1.0, gamma: float = 1.0) -> np.ndarray:
    if k <= 0 or gamma < 0:
        raise InputError(f"Loss weight p2 needs k above 0 and gamma of at least 0, found {k} and {gamma}.")
    return 1.0 / (k + snr) ** gamma


# An entry gives the factor on the squared error of eps, as a function of SNR = abar / (1 - abar).
LOSS_WEIGHTS = {
    "none": Choice(_snr),  # the factor is not used: the weight is 1 for every prediction
    "snr": Choice(_snr),
    "min_snr": Choice(_min_snr, ("gamma",)),  # Hang et al. 2023
    "p2": Choice(_p2, ("k", "gamma")),  # Choi et al. 2022
}

# What the squared error of a prediction is multiplied by to be the squared error of eps.
_EPS_ERROR: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "eps": np.ones_like,
    "x_0": lambda snr: snr,
    "v": lambda snr: snr / (snr + 1.0),
}


def loss_weights(diffusion: GaussianDiffusion, name: str, **settings: float) -> np.ndarray:
    """The weight of the squared error at every timestep.

    Args:
        name: none (1 for every prediction); snr (1 / SNR / SNR/(SNR+1) for eps / x_0 / v: the squared error of eps, whatever
            is predicted); min_snr (snr times min(SNR, gamma) / SNR); p2 (snr times 1 / (k + SNR)^gamma).
        settings: gamma=5 of min_snr; k=1 and gamma=1 of p2.

    Returns:
        float64 [T].

    Raises:
        InputError: unknown name, a setting of another weight, or a weight for prediction x_prev, for which none is
            published.
    """
    factor = choose("loss weight", name, LOSS_WEIGHTS, settings)
    for setting in settings:
        checks.real(setting, settings[setting])
    if name == "none":
        return np.ones(diffusion.num_timesteps)
    if diffusion.prediction not in _EPS_ERROR:
        raise InputError(
            f"Loss weight {name!r} is defined for the predictions {sorted(_EPS_ERROR)}, not for "
            f"{diffusion.prediction!r}. Use loss weight 'none'."
        )
    abar = diffusion.schedule.alphas_cumprod
    snr = abar / (1.0 - abar)
    return factor(snr) * _EPS_ERROR[diffusion.prediction](snr)


def make_loss(name: str, diffusion: GaussianDiffusion, *, weight: str = "none", **settings: float) -> LossFunction:
    """The training loss: a function like `simple`, weighted by timestep.

    Args:
        name: simple, vlb or hybrid.
        weight, settings: see `loss_weights`.

    Raises:
        InputError: unknown names, or a combination that makes no sense, with the reason.
    """
    checks.known("loss", name, LOSSES)
    loss, weights = LOSSES[name], loss_weights(diffusion, weight, **settings)
    if diffusion.has_learned_variance not in loss.variances:
        raise InputError(f"Loss {name!r} makes no sense with variance {diffusion.variance!r}: {loss.reason}.")
    if weight == "none":
        return loss.per_example
    if not loss.weighted:
        raise InputError(f"Loss weight {weight!r} applies to loss 'simple', not to {name!r}. Use loss weight 'none'.")

    def weighted(
        diffusion: GaussianDiffusion, output: tf.Tensor, *, x_0: tf.Tensor, x_t: tf.Tensor, t: tf.Tensor, eps: tf.Tensor
    ) -> tf.Tensor:
        return extract(weights, t, 1) * loss.per_example(diffusion, output, x_0=x_0, x_t=x_t, t=t, eps=eps)

    return weighted
