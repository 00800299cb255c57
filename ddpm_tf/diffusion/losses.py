"""Training losses, one number per example."""

from ddpm_tf.diffusion.gaussian import mean_flat
from ddpm_tf.diffusion.prediction import PREDICTIONS


def simple(diffusion, output, *, x_0, x_t, t, eps):
    """L_simple: the squared error against the prediction's target, averaged over pixels (Eq. 14 for eps).

    Args:
        diffusion: GaussianDiffusion.
        output: the network's output at (x_t, t), float32 [B, H, W, C].
        x_0, x_t, eps: float32 [B, H, W, C]; t: int32 [B].

    Returns:
        float32 [B]. Original: a mean over pixels, where the paper writes a sum.
    """
    target = PREDICTIONS[diffusion.prediction].target(diffusion, x_0, x_t, t, eps)
    return mean_flat((output - target) ** 2)


LOSSES = {"simple": simple}
