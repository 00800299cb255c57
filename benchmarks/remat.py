"""What `network.remat` saves and costs: memory and time of a training step with it and without.

python benchmarks/remat.py celebahq256              (the 256x256 network, batch 1)
python benchmarks/remat.py cifar10                  (batch 8)
python benchmarks/remat.py cifar10 --jit_compile    (the loss and its gradient compiled by XLA)

Every measurement is a process of its own; the two variants take turns. `kept` are the tensors that live between two steps
(weights, moving average, Adam's moments), `peak` the most that live at once during a step, both by the count of TensorFlow's
allocator; `process` is the largest resident memory of the process from start to end. On a CPU the allocator counts with
oneDNN only (the default on x86).
"""

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import time

import numpy as np

ROUNDS, STEPS = 3, 3
BATCH = {"celebahq256": 1, "cifar10": 8}


def measure(name, remat, jit_compile):
    """One process: {"kept", "peak", "process": MiB, "seconds": of a step, "loss"} after `STEPS` steps."""
    import tensorflow as tf

    from ddpm_tf import builders
    from ddpm_tf.data import make_dataset
    from ddpm_tf.data.sources import ArraySource

    config = importlib.import_module(f"configs.{name}").get_config()
    config.data.batch_size, config.network.remat = BATCH[name], remat
    config.optimizer.warmup_steps = 0
    config.train.jit_compile = "on" if jit_compile else "off"
    model = builders.build_model(config, tf.distribute.get_strategy())
    images = np.random.default_rng(0).integers(0, 256, (64, *builders.image_shape(config)), np.uint8)
    iterator = iter(make_dataset(ArraySource(images), batch_size=config.data.batch_size, seed=0))
    model.make_train_function()
    float(model.train_function(iterator)["loss"])  # traced and compiled
    device = "GPU:0" if tf.config.list_physical_devices("GPU") else "CPU:0"
    tf.config.experimental.reset_memory_stats(device)
    kept, seconds = tf.config.experimental.get_memory_info(device)["current"], []
    for _ in range(STEPS):
        began = time.perf_counter()
        loss = float(model.train_function(iterator)["loss"])
        seconds.append(time.perf_counter() - began)
    return {
        "kept": kept / 2**20,
        "peak": tf.config.experimental.get_memory_info(device)["peak"] / 2**20,
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seconds": float(np.median(seconds)),
        "loss": loss,
    }


def main(name, jit_compile):
    rows = {False: [], True: []}
    for k in range(2 * ROUNDS):
        remat = bool((k + k // 2) % 2)  # without, with, with, without, ...
        command = [sys.executable, __file__, name, f"--child={int(remat)}", *["--jit_compile"] * jit_compile]
        done = subprocess.run(command, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"remat={remat} ended with code {done.returncode} (-9: the machine's memory was not enough).")
        rows[remat].append(json.loads(done.stdout.splitlines()[-1]))
    xla = ", XLA" if jit_compile else ""
    print(f"{name}, batch {BATCH[name]}{xla}: medians of {ROUNDS} processes, {STEPS} steps each")
    for remat, runs in rows.items():
        median = {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
        print(
            f"remat={remat!s:<5}  kept {median['kept']:6.0f}  peak {median['peak']:6.0f}  process {median['process']:6.0f} MiB  "
            f"{median['seconds']:7.3f} s/step  loss {median['loss']:.7f}  "
            f"(seconds {[round(run['seconds'], 2) for run in runs]})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=BATCH)
    parser.add_argument("--jit_compile", action="store_true")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is None:
        main(args.name, args.jit_compile)
    else:
        print(json.dumps(measure(args.name, bool(args.child), args.jit_compile)))
