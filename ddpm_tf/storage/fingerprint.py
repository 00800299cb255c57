"""What the bits of a run depend on beside its config: a run that goes on is bit-exact while these stay the same."""

import hashlib
import os
import pathlib
import platform

import keras
import tensorflow as tf

from ddpm_tf import __version__


def fingerprint(
    strategy,
    *,
    workers,
    jit_compile,
    deterministic,
    precision,
    tf32,
    micro_batches,
    remat,
    batch_size,
    seed,
    config,
    data,
):
    """{field: value} of software, devices and settings, as JSON can hold it.

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


def code_digest():
    """One SHA-256 for the sources of this package."""
    root, total = pathlib.Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def changes(old, new):
    """["field: old -> new", ...] of two fingerprints."""
    return [
        f"{name}: {old.get(name)} -> {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _cpu_model():
    """The processor's name, which decides which kernels run; empty where the system does not say."""
    try:
        with open("/proc/cpuinfo") as f:
            return next((line.partition(":")[2].strip() for line in f if line.startswith("model name")), "")
    except OSError:
        return ""
