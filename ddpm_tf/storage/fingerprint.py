"""The fingerprint of a run: software, devices and settings that its bits depend on.

A resumed run is bit-exact as long as its fingerprint stays the same.
"""

import hashlib
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from ddpm_tf import __version__, files


def fingerprint(
    strategy: tf.distribute.Strategy,
    *,
    workers: int,
    jit_compile: bool,
    deterministic: bool,
    precision: str,
    tf32: bool,
    micro_batches: int,
    remat: bool,
    batch_size: int,
    seed: int,
    config: str,
    data: str,
) -> dict[str, Any]:
    """The fingerprint as {field: value}, of types that JSON can hold.

    Args:
        strategy: the run's tf.distribute strategy.
        workers: how many processes share it.
        config: SHA-256 of the fields that change what a step computes.
        data: SHA-256 of the data set's manifest.
    """
    build = tf.sysconfig.get_build_info()
    gpus = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    return {
        "ddpm_tf": __version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "cuda": build.get("cuda_version") if gpus else None,
        "cudnn": build.get("cudnn_version") if gpus else None,
        "devices": [d.get("device_name", "GPU") for d in details] or [f"CPU {platform.machine()} {_cpu_model()}"],
        "replicas": strategy.num_replicas_in_sync,
        "workers": workers,
        "threads": tf.config.threading.get_intra_op_parallelism_threads() or len(os.sched_getaffinity(0)),
        "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "default"),
        "xla": jit_compile,
        "remat": remat,
        "deterministic": deterministic,
        "precision": precision,
        "tf32": tf32,
        "micro_batches": micro_batches,
        "global_batch": batch_size,
        "seed": seed,
        "config": config,
        "data": data,
    }


def code_digest() -> str:
    """One SHA-256 of all sources of this package."""
    root, total = pathlib.Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(f"{path.relative_to(root)} {files.sha256(str(path))}\n".encode())
    return total.hexdigest()


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences of two fingerprints, as ["field: old -> new", ...]."""
    return [
        f"{name}: {old.get(name)} -> {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _cpu_model() -> str:
    """The processor's name, which decides which kernels run; empty if the system does not name it."""
    try:
        with open("/proc/cpuinfo") as f:
            return next((line.partition(":")[2].strip() for line in f if line.startswith("model name")), "")
    except OSError:
        return ""
