"""How often is a classifier of noisy images right on images that it was not trained on?

  python -m tools.classifier_accuracy --split_digits=digits.npz
  python run_train.py --config=configs/digits_classifier.py --config.data.source=npz:digits.npz --workdir=runs/held_out
  python -m tools.classifier_accuracy --workdir=runs/held_out

The first command writes scikit-learn's digits as 1,437 images to train on and 360 to test on. The last prints the share of
right answers and the cross entropy (nats) of both parts by quarter of the timesteps, q1 the cleanest, and at t = 0. It uses
the moving average of the weights, and every image once at every tenth timestep.
"""

import argparse

import numpy as np
import tensorflow as tf

from ddpm_tf import builders, rng
from ddpm_tf.data.sources import load_digits
from ddpm_tf.experiment.run import read_run_config
from ddpm_tf.storage.bundles import assign
from ddpm_tf.storage.workdir import read_newest
from ddpm_tf.training.classifier_objective import cross_entropy


def split_digits(path):
    images, labels = (tensor.numpy() for tensor in load_digits().tensors.values())
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(images))
    test, train = order[:360], order[360:]
    np.savez(path, x_train=images[train], y_train=labels[train], x_test=images[test], y_test=labels[test])


def main(workdir):
    config = read_run_config(workdir)
    diffusion = builders.build_diffusion(config)
    network = builders.build_network(config, diffusion)
    step, tensors = read_newest(workdir)
    assign(
        {f"ema/{v.path}": v for v in network.variables}, {k: v for k, v in tensors.items() if k[:4] == "ema/"}, workdir
    )

    @tf.function
    def judge(x_0, labels, t):
        eps = rng.normal(0, x_0.shape[1:], purpose=rng.Purpose.HELD_OUT_NOISE, index=tf.range(len(x_0)), step=t)
        t = tf.fill([len(x_0)], t)
        logits = network({"x_t": diffusion.q_sample(x_0, t, eps), "t": t})
        is_right = tf.equal(tf.argmax(logits, -1, tf.int32), labels)
        return tf.reduce_mean(tf.cast(is_right, tf.float32)), tf.reduce_mean(cross_entropy(logits, labels))

    print(f"step {step}, the moving average of the weights")
    print(
        f"{'part':5}  {'images':6}  {'measure':13}"
        + "".join(f"{v:>8}" for v in ("t = 0", "q1", "q2", "q3", "q4", "all"))
    )
    for split in ("train", "test"):
        config.data.split = split
        source = builders.build_source(config, read_only=True)
        batch = source.read(np.arange(source.num_examples))
        x_0 = tf.cast(batch["image"], tf.float32) / 127.5 - 1.0
        timesteps = np.arange(0, diffusion.num_timesteps, 10)
        values = np.array([judge(x_0, batch["label"], tf.constant(t, tf.int32)) for t in timesteps])  # [T / 10, 2]
        for name, column in zip(("accuracy", "cross entropy"), values.T, strict=True):
            row = [column[0], *np.mean(np.split(column, 4), axis=1), column.mean()]
            print(f"{split:5}  {len(x_0):6}  {name:13}" + "".join(f"{v:8.3f}" for v in row))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir")
    parser.add_argument("--split_digits")
    arguments = parser.parse_args()
    if arguments.split_digits:
        split_digits(arguments.split_digits)
    if arguments.workdir:
        main(arguments.workdir)
