"""How good are sampled digits? Judged by two small scikit-learn models trained on the real ones.

  python run_sample.py --workdir=runs/digits --num_images=1024 --out=runs/digits_1024
  python tools/digits_quality.py runs/digits_1024/samples.npz

Prints the mean top probability of a logistic regression (and the same on the real digits), how many samples fall into
each class, and the Frechet distance between samples and all real digits on the hidden layer (48 units) of an MLP.
Pixels are in [0, 1].
"""

import sys

import numpy as np
import scipy.linalg
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from ddpm_tf.data.sources import load_digits


def hidden(mlp, x):
    """Activations of the MLP's one hidden layer (ReLU), [N, 48]."""
    return np.maximum(x @ mlp.coefs_[0] + mlp.intercepts_[0], 0)


def frechet_distance(a, b):
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features [N, D]."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


def main(path):
    real, labels = (tensor.numpy() for tensor in load_digits("", None).tensors.values())
    with np.load(path, allow_pickle=False) as arrays:
        samples = arrays["images"]
    real, samples = (x.reshape(len(x), -1) / 255.0 for x in (real, samples))
    classifier = LogisticRegression(C=10.0, max_iter=2000).fit(real, labels)
    mlp = MLPClassifier((48,), max_iter=1000, random_state=0).fit(real, labels)
    probabilities = classifier.predict_proba(samples)
    counts = np.bincount(probabilities.argmax(1), minlength=10)
    half = np.random.Generator(np.random.PCG64(0)).permutation(len(real))
    floor = frechet_distance(hidden(mlp, real[half[:1024]]), hidden(mlp, real))
    print(f"samples                              {len(samples)}")
    print(f"mean top probability, samples        {probabilities.max(1).mean():.3f}")
    print(f"mean top probability, real digits    {classifier.predict_proba(real).max(1).mean():.3f}")
    print(f"samples per class 0..9               {counts.tolist()} (fewest {counts.min()})")
    print(f"Frechet distance to the real digits  {frechet_distance(hidden(mlp, samples), hidden(mlp, real)):.3f}")
    print(f"  of 1,024 real digits, for scale    {floor:.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
