"""Latency and throughput of `sample`, and what it costs over calling the network once for each of its steps.

  python run_export.py --workdir=runs/digits --out=exported/digits
  python -m benchmarks.serving runs/digits exported/digits/1

Through the C API (the loader and session of the model server) and through Python. The overhead is that of the C API over
the workdir's network as a compiled function (no XLA): called S times from Python, and S times in one graph that does
nothing else. They take turns, round by round, in one process; a cell is the median, an overhead the median of the rounds'
own ratios. What server-side batching gives is `benchmarks.serving_batching`.
"""

import argparse
import json
import os
import platform
import time

import numpy as np
import tensorflow as tf

from ddpm_tf.experiment import load_for_inference
from tests.serving.c_api import CSession

BATCHES = (1, 4, 16)


def make_ways(workdir, version):
    """{name: function of seeds}, each of which draws as many images as there are seeds."""
    with open(os.path.join(version, "model_card.json")) as f:
        timesteps = json.load(f)["sampler"]["timesteps"]
    network = load_for_inference(workdir).network
    x_spec = tf.TensorSpec([None, *network.image_shape], tf.float32)
    call = tf.function(
        lambda x_t, t: network({"x_t": x_t, "t": t}, training=False),
        input_signature=[x_spec, tf.TensorSpec([None], tf.int32)],
        autograph=False,
    )
    times = tf.constant(timesteps, tf.int32)

    @tf.function(input_signature=[x_spec], autograph=False)
    def loop(x):
        def body(k, x):
            return k - 1, call(x, tf.fill(tf.shape(x)[:1], times[k]))

        last = tf.constant(len(timesteps) - 1)
        return tf.while_loop(lambda k, _: k >= 0, body, (last, x), shape_invariants=(last.shape, x_spec.shape))[1]

    session, signature = CSession(version), tf.saved_model.load(version).signatures["sample"]

    def zeros(seeds):
        return tf.zeros([len(seeds), *network.image_shape])

    def called(seeds):
        x = zeros(seeds)
        for t in timesteps[::-1]:
            x = call(x, tf.fill([len(seeds)], t))
        return x.numpy()

    ways = {
        "C API": lambda seeds: session.run("sample", {"seed": seeds}),
        "Python": lambda seeds: signature(seed=tf.constant(seeds))["images"].numpy(),
        "called": called,
        "loop": lambda seeds: loop(zeros(seeds)).numpy(),
    }
    return ways, len(timesteps)


def measure(ways, batch, rounds):
    """{name: seconds [rounds]}"""
    seeds, seconds = np.arange(batch), {name: [] for name in ways}
    for k in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way(seeds)
            if k:  # the first round prepares the graphs
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", help="the workdir that was exported")
    parser.add_argument("version", help="its version folder, MODELS/NAME/VERSION")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    ways, num_steps = make_ways(args.workdir, args.version)
    device = "GPU" if tf.config.list_physical_devices("GPU") else f"{os.cpu_count()} cores, {platform.machine()}"
    print(f"TensorFlow {tf.__version__}, {device}; S = {num_steps}; median of {args.rounds} rounds\n")
    print(
        "| batch | C API, ms | images/s | Python, ms | images/s | network S times, ms | overhead | in a loop, ms | overhead |"
    )
    print("|---" * 9 + "|")
    for batch in BATCHES:
        seconds = measure(ways, batch, args.rounds)
        cells = [f"{batch}"]
        for name in ("C API", "Python"):
            cells += [f"{1e3 * np.median(seconds[name]):.1f}", f"{batch / np.median(seconds[name]):.1f}"]
        for name in ("called", "loop"):
            overhead = np.median(seconds["C API"] / seconds[name]) - 1
            cells += [f"{1e3 * np.median(seconds[name]):.1f}", f"{overhead:+.1%}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
