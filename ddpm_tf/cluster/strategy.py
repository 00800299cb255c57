"""Devices: what is set before any of them is used, and the strategy that training runs under."""

import functools
import signal

import tensorflow as tf
from absl import logging

from ddpm_tf.cluster.cluster import Cluster
from ddpm_tf.cluster.meeting import JOIN_TIMEOUT_S, alarm, meet
from ddpm_tf.cluster.tf_config import read_tf_config
from ddpm_tf.errors import InputError, unknown_name

STRATEGIES = ("auto", "default", "mirrored", "multi_worker")


def configure_devices(*, deterministic=False, tf32=False):
    """Grow GPU memory as needed, and compute in true float32 unless `tf32`, as the original's figures were.

    deterministic: only kernels that give the same bits every time, which on a GPU are slower; for the whole process.
    """
    for gpu in tf.config.list_physical_devices("GPU"):
        try:
            tf.config.experimental.set_memory_growth(gpu, True)
        except RuntimeError as e:  # in a notebook that has used the GPU already
            logging.warning("The memory growth of %s cannot be changed any more: %s", gpu, e)
    tf.config.experimental.enable_tensor_float_32_execution(tf32)
    if deterministic:
        tf.config.experimental.enable_op_determinism()


def make_strategy(name="auto", *, join_timeout_s=JOIN_TIMEOUT_S):
    """The strategy, and the Cluster of its workers; to be made before anything else is computed.

    Args:
        name: default (one device), mirrored (all GPUs of this machine), multi_worker (the workers that the environment
            variable TF_CONFIG names: NCCL between GPUs, else gRPC), or auto: multi_worker where TF_CONFIG names more than
            one, else mirrored where there is a GPU, else default.
        join_timeout_s: how long the workers wait for each other.

    Raises:
        InputError: an unknown name, a TF_CONFIG or an address that cannot be used, a worker that does not come.
    """
    workers = _workers(name)
    if workers:
        return _join(workers, join_timeout_s), Cluster(workers)
    if name == "mirrored" or (name == "auto" and tf.config.list_physical_devices("GPU")):
        return _mirrored(), Cluster()
    return tf.distribute.get_strategy(), Cluster()


def _workers(name):
    """The Workers that a strategy runs on; None: this process alone."""
    if name not in STRATEGIES:
        raise unknown_name("--strategy", name, STRATEGIES)
    workers = read_tf_config() if name in ("auto", "multi_worker") else None
    if workers and len(workers.addresses) > 1:
        return workers
    if name == "multi_worker":
        found = "names one worker" if workers else "is not set"
        raise InputError(f"--strategy=multi_worker needs TF_CONFIG with at least two workers; it {found}.")


def count_replicas(name="auto"):
    """How many replicas `make_strategy(name)` would have, without waiting for other workers.

    Raises:
        InputError: an unknown name, a TF_CONFIG that cannot be used.
    """
    workers = _workers(name)
    if name == "default":
        return 1
    return max(len(tf.config.list_physical_devices("GPU")), 1) * (len(workers.addresses) if workers else 1)


@functools.cache
def _mirrored():
    """One for the process: the collectives of a second one would have the first one's numbers, and be taken for them."""
    return tf.distribute.MirroredStrategy()


def _join(workers, timeout_s):
    own = workers.addresses[workers.index]
    logging.info("Worker %d at %s: waiting for %s.", workers.index, own, " ".join(workers.addresses))
    meet(workers, timeout_s)
    kind = tf.distribute.experimental.CommunicationImplementation
    tf.get_logger().setLevel("WARNING")  # it tells every collective that it makes, twice
    gpus = len(tf.config.list_physical_devices("GPU"))
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(workers.addresses)}), task_type="worker", task_id=workers.index,
        num_accelerators={"GPU": gpus}, rpc_layer="grpc",
    )  # fmt: skip
    options = tf.distribute.experimental.CommunicationOptions(implementation=kind.NCCL if gpus else kind.AUTO)
    previous = signal.getsignal(signal.SIGTERM)
    with alarm(timeout_s):
        strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver, options)
    signal.signal(signal.SIGTERM, previous)  # TensorFlow takes SIGTERM for its own notice of preemption
    logging.info("%d workers, %d replicas.", len(workers.addresses), strategy.num_replicas_in_sync)
    return strategy


def distribute(strategy, cluster, make_part):
    """What `fit` takes: a dataset, which one process shares among its replicas by itself, or this worker's part.

    Args:
        make_part: make_part((first, count, of)), as `replicas` of `make_dataset`.
    """
    if cluster.size == 1:
        return make_part((0, 1, 1))
    replicas = strategy.num_replicas_in_sync
    local = replicas // cluster.size
    return strategy.distribute_datasets_from_function(lambda _: make_part((cluster.index * local, local, replicas)))
