"""How good are sampled digits? Two small models that were trained on the real digits judge them.

  python run_sample.py --workdir=runs/digits --num_images=1024 --out=runs/digits_1024
  python tools/digits_quality.py runs/digits_1024/samples.npz

Prints the mean top probability of a logistic regression, for the samples and for the real digits; how many samples fall into
each class; and the Frechet distance between the samples and all real digits, on the hidden layer (48 units) of an MLP.
"""

import sys

import numpy as np

from ddpm_tf.data.sources import load_digits
from ddpm_tf.evaluation.distances import frechet_distance, moments
from ddpm_tf.evaluation.features import DigitJudge


def main(path: str) -> None:
    real, labels = (tensor.numpy() for tensor in load_digits().tensors.values())
    with np.load(path, allow_pickle=False) as arrays:
        samples = arrays["images"]
    judge = DigitJudge(real, labels)
    probabilities = judge.probabilities(samples)
    counts = np.bincount(probabilities.argmax(1), minlength=10)
    part = np.random.Generator(np.random.PCG64(0)).permutation(len(real))[:1024]
    of_real, of_samples, of_part = (moments(judge.features(images)) for images in (real, samples, real[part]))
    print(f"samples                              {len(samples)}")
    print(f"mean top probability, samples        {probabilities.max(1).mean():.3f}")
    print(f"mean top probability, real digits    {judge.probabilities(real).max(1).mean():.3f}")
    print(f"samples per class 0..9               {counts.tolist()} (fewest {counts.min()})")
    print(f"Frechet distance to the real digits  {frechet_distance(*of_samples, *of_real):.3f}")
    print(f"  of 1,024 real digits, for scale    {frechet_distance(*of_part, *of_real):.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
