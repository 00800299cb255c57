"""Distances between two sets of images, each given as features: a vector for each image."""

from typing import NamedTuple

import numpy as np
import scipy.linalg

from ddpm_tf.errors import InputError


class Moments(NamedTuple):
    """Mean, float64 [D], and covariance, float64 [D, D], of a set of features."""

    mean: np.ndarray
    covariance: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Mean and covariance of features [N, D]; the covariance is divided by N - 1.

    Raises:
        InputError: another shape, or fewer than two vectors.
    """
    if features.ndim != 2 or len(features) < 2:
        raise InputError(f"features have shape {list(features.shape)}, expected [N, D] with N of at least 2.")
    width = features.shape[1]
    return Moments(features.mean(0), np.cov(features, rowvar=False).reshape(width, width))


def frechet_distance(
    mean_1: np.ndarray, covariance_1: np.ndarray, mean_2: np.ndarray, covariance_2: np.ndarray
) -> float:
    """The Frechet distance of two normal distributions (Heusel et al. 2017); with features of Inception it is the FID:

        |mean_1 - mean_2|^2 + trace(covariance_1 + covariance_2 - 2 (covariance_1 covariance_2)^(1/2))

    It is computed in float64. The trace of the matrix root is the sum of the roots of the eigenvalues of the symmetric matrix
    covariance_1^(1/2) covariance_2 covariance_1^(1/2), also where a covariance is singular. Rounding may bring the distance of
    two equal distributions a little below 0.

    Args:
        mean_1, mean_2: [D].
        covariance_1, covariance_2: [D, D].

    Returns:
        the distance, at least 0 but for rounding; its unit is that of the features, squared.

    Raises:
        InputError: shapes that do not fit each other, or values that are not finite.
    """
    arrays = {"mean_1": mean_1, "covariance_1": covariance_1, "mean_2": mean_2, "covariance_2": covariance_2}
    arrays = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    width = arrays["mean_1"].size
    for name, array in arrays.items():
        expected = (width,) if name.startswith("mean") else (width, width)
        if array.shape != expected:
            raise InputError(f"{name} has shape {list(array.shape)}, expected {list(expected)}.")
        if not np.isfinite(array).all():
            raise InputError(f"{name} has values that are not finite.")
    mean_1, covariance_1, mean_2, covariance_2 = arrays.values()
    values, vectors = scipy.linalg.eigh(covariance_1)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    of_root = np.sqrt(np.maximum(scipy.linalg.eigvalsh(root @ covariance_2 @ root), 0.0)).sum()
    return float(((mean_1 - mean_2) ** 2).sum() + np.trace(covariance_1) + np.trace(covariance_2) - 2 * of_root)
