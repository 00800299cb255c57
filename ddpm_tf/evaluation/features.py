"""Models that look at images for the metrics, and the features that they see."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier


class DigitJudge:
    """Two small scikit-learn models that are trained on real digits, to judge sampled ones.

    A logistic regression gives the probabilities of the classes. The features are the 48 hidden units of a multilayer
    perceptron (MLP) with one hidden layer. Both models see pixels in [0, 1]. Their training takes seconds and is deterministic.

    Args:
        images: uint8 [N, H, W, C], the real digits.
        labels: int [N].
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        pixels = _pixels(images)
        self._classifier = LogisticRegression(C=10.0, max_iter=2000).fit(pixels, labels)
        self._mlp = MLPClassifier((48,), max_iter=1000, random_state=0).fit(pixels, labels)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, C] -> float64 [N, classes], each row with the sum 1."""
        return self._classifier.predict_proba(_pixels(images))

    def features(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, C] -> float64 [N, 48], after the hidden layer's ReLU."""
        return np.maximum(_pixels(images) @ self._mlp.coefs_[0] + self._mlp.intercepts_[0], 0)


def _pixels(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, C] -> float64 [N, H W C] in [0, 1]."""
    return images.reshape(len(images), -1) / 255.0
