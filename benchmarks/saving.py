"""What saving costs: step time with a checkpoint at the default interval and without, in interleaved blocks of steps.

python -m benchmarks.saving digits        (30 steps a block; the cost of a save is spread over the config's 300 steps)
python -m benchmarks.saving cifar10       (one step a block at batch 4; spread over 5,000 steps)
"""

import importlib
import os
import sys
import tempfile
import time

import numpy as np
import tensorflow as tf

from ddpm_tf import builders
from ddpm_tf.callbacks.saving import Checkpoints
from ddpm_tf.data import make_dataset
from ddpm_tf.data.sources import ArraySource
from ddpm_tf.storage import checkpoints

PAIRS = 15
SETTINGS = {"digits": (128, 30), "cifar10": (4, 1)}  # batch size, steps of a block


def main(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.data.batch_size, block = SETTINGS[name]
    interval = config.train.checkpoint_every
    model = builders.build_model(config, tf.distribute.get_strategy())
    images = np.random.default_rng(0).integers(0, 256, (256, *builders.image_shape(config)), np.uint8)
    iterator = iter(make_dataset(ArraySource(images), batch_size=config.data.batch_size, seed=0))
    model.make_train_function()
    model.train_function(iterator)
    with tempfile.TemporaryDirectory() as folder:
        saving = Checkpoints(
            0,
            folder=folder,
            every=0,
            minutes=0,
            num_steps=10**9,
            keep=3,
            keep_every=0,
            meta={"config": config.to_dict()},
        )
        saving.set_model(model)
        seconds, copying, writing = {False: [], True: []}, [], []
        for k in range(2 * PAIRS):
            with_save = bool((k + k // 2) % 2)  # without, with, with, without, ...
            began = time.perf_counter()
            if with_save:
                saving.save(k + 1)
                copying.append(time.perf_counter() - began)
                saving._pending.add_done_callback(lambda _, began=began: writing.append(time.perf_counter() - began))
            for _ in range(block):
                float(model.train_function(iterator)["loss"])
            seconds[with_save].append(time.perf_counter() - began)
            saving.wait()
        newest = checkpoints.step_folder(folder, checkpoints.list_steps(folder)[-1])
        size = sum(os.path.getsize(os.path.join(newest, f)) for f in os.listdir(newest))
    step = np.median(seconds[False]) / block
    extra = np.median(np.array(seconds[True]) - np.array(seconds[False]))
    print(f"{name}, batch {config.data.batch_size}: {PAIRS} pairs of blocks of {block} steps")
    print(f"step without saving {1000 * step:.1f} ms (blocks {np.round(seconds[False], 2).tolist()} s)")
    print(f"one save more in a block: {extra:+.2f} s (blocks {np.round(seconds[True], 2).tolist()} s)")
    print(f"spread over {interval} steps: {100 * extra / (interval * step):+.2f} %")
    print(
        f"one save: {size:,} bytes, {np.median(copying):.2f} s of copying, on the disk after {np.median(writing):.2f} s"
    )


if __name__ == "__main__":
    main(sys.argv[1])
