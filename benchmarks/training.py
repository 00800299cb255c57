"""Time and memory of a training step: XLA, reduced precision, micro-batches, gradient checkpointing, steps per execution,
and Keras' own Adam in place of the one-pass kernel.

python -m benchmarks.training cifar10                          (batch 8)
python -m benchmarks.training celebahq256 float32 remat        (the 256x256 network, batch 1; these variants only)

Every measurement is a process of its own; the variants take turns, forwards and backwards. `kept` are the tensors that live
between two steps (weights, moving average, Adam's moments), `peak` the most that live at once during a step, both by the
count of TensorFlow's allocator; on a CPU that counts with oneDNN only (the default on x86).
"""

import importlib
import json
import os
import subprocess
import sys
import time

import numpy as np

from ddpm_tf import config as config_lib

ROUNDS, STEPS = 1, 4
BATCH = {"celebahq256": 1, "cifar10": 8, "digits": 128}
VARIANTS = {
    "float32": {},
    "xla": {"train.jit_compile": "on"},
    "bfloat16": {"train.precision": "bfloat16"},
    "micro_batches": {"train.micro_batches": 4},
    "remat": {"network.remat": True},
    "steps_per_execution": {"train.steps_per_execution": 4},
    "keras_adam": {},
}


def measure(name, variant):
    """One process: {"kept", "peak": MiB, "seconds": of a step, "first": of the first call, "loss"} after `STEPS` steps."""
    import keras
    import tensorflow as tf

    from ddpm_tf import builders
    from ddpm_tf.choices import Choice
    from ddpm_tf.data import make_dataset
    from ddpm_tf.data.sources import ArraySource
    from ddpm_tf.training import optimizers

    config = importlib.import_module(f"configs.{name}").get_config()
    config.data.batch_size, config.optimizer.warmup_steps, config.train.jit_compile = BATCH[name], 0, "off"
    for field, value in VARIANTS[variant].items():
        config_lib.put(config, field, value)
    if variant == "keras_adam":
        optimizers.OPTIMIZERS["adam"] = Choice(keras.optimizers.Adam, ("beta_1", "beta_2", "epsilon"))
    model = builders.build_model(config, tf.distribute.get_strategy())
    images = np.random.default_rng(0).integers(0, 256, (256, *builders.image_shape(config)), np.uint8)
    iterator = iter(make_dataset(ArraySource(images), batch_size=config.data.batch_size, seed=0))
    model.make_train_function()
    began = time.perf_counter()
    float(model.train_function(iterator)["loss"])  # traced and compiled
    first = time.perf_counter() - began
    device = "GPU:0" if tf.config.list_physical_devices("GPU") else "CPU:0"
    tf.config.experimental.reset_memory_stats(device)
    kept, seconds = tf.config.experimental.get_memory_info(device)["current"], []
    for _ in range(STEPS // config.train.steps_per_execution):
        began = time.perf_counter()
        loss = float(model.train_function(iterator)["loss"])
        seconds.append((time.perf_counter() - began) / config.train.steps_per_execution)
    peak = tf.config.experimental.get_memory_info(device)["peak"]
    return {
        "kept": kept / 2**20,
        "peak": peak / 2**20,
        "seconds": float(np.median(seconds)),
        "first": first,
        "loss": loss,
    }


def main(name, variants):
    rows = {variant: [] for variant in variants}
    for k in range(2 * ROUNDS):
        for variant in variants if k % 2 == 0 else variants[::-1]:
            command = [sys.executable, "-m", "benchmarks.training", "--child", name, variant]
            environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"{variant} ended with code {done.returncode} (-9: the machine's memory was not enough).")
            rows[variant].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{name}, batch {BATCH[name]}: medians of {2 * ROUNDS} processes, {STEPS} steps each")
    print("| | kept, MiB | peak, MiB | s/step (least, most) | first call, s |\n|---|---|---|---|---|")
    for variant, runs in rows.items():
        median = {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
        seconds = [run["seconds"] for run in runs]
        print(
            f"| {variant} | {median['kept']:,.0f} | {median['peak']:,.0f} | {median['seconds']:.3f} "
            f"({min(seconds):.3f}, {max(seconds):.3f}) | {median['first']:.1f} |"
        )


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        main(sys.argv[1], sys.argv[2:] or list(VARIANTS))
