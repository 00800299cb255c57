"""Devices: settings that must come before their first use, and the strategy that training runs under."""

import functools
import signal
from collections.abc import Callable

import tensorflow as tf
from absl import logging

from ddpm_tf.cluster.cluster import Cluster
from ddpm_tf.cluster.meeting import JOIN_TIMEOUT_S, alarm, meet
from ddpm_tf.cluster.tf_config import Workers, read_tf_config
from ddpm_tf.errors import InputError, unknown_name

STRATEGIES = ("auto", "default", "mirrored", "multi_worker")


def configure_devices(*, deterministic: bool = False, tf32: bool = False) -> None:
    """Let GPU memory grow as needed, and compute in true float32, as the original did for its figures.

    Args:
        deterministic: use only kernels that give the same bits every time. It holds for the whole process, and is slower
            on a GPU.
        tf32: let GPUs round the factors of matrix products to TF32 (10 bits of mantissa).
    """
    for gpu in tf.config.list_physical_devices("GPU"):
        try:
            tf.config.experimental.set_memory_growth(gpu, True)
        except RuntimeError as e:  # in a notebook that has used the GPU already
            logging.warning("The memory growth of %s cannot be changed any more: %s", gpu, e)
    tf.config.experimental.enable_tensor_float_32_execution(tf32)
    if deterministic:
        tf.config.experimental.enable_op_determinism()


def make_strategy(
    name: str = "auto", *, join_timeout_s: float = JOIN_TIMEOUT_S
) -> tuple[tf.distribute.Strategy, Cluster]:
    """Make the strategy and the Cluster of its workers. Call this before anything else is computed.

    Args:
        name: default (one device), mirrored (all GPUs of this machine), multi_worker (the workers that the environment
            variable TF_CONFIG names: NCCL between GPUs, else gRPC), or auto: multi_worker if TF_CONFIG names more than
            one, else mirrored if there is a GPU, else default.
        join_timeout_s: how many seconds the workers wait for each other.

    Raises:
        InputError: the name is unknown, TF_CONFIG or an address cannot be used, or a worker did not come.
    """
    workers = _workers(name)
    if workers:
        return _join(workers, join_timeout_s), Cluster(workers)
    if name == "mirrored" or (name == "auto" and tf.config.list_physical_devices("GPU")):
        return _mirrored(), Cluster()
    return tf.distribute.get_strategy(), Cluster()


def _workers(name: str) -> Workers | None:
    """The Workers that a strategy runs on, or None if it runs on this process alone."""
    if name not in STRATEGIES:
        raise unknown_name("strategy", name, STRATEGIES)
    workers = read_tf_config() if name in ("auto", "multi_worker") else None
    if workers and len(workers.addresses) > 1:
        return workers
    if name == "multi_worker":
        problem = "names one worker" if workers else "is not set"
        raise InputError(f"The strategy multi_worker needs TF_CONFIG with at least two workers; it {problem}.")
    return None


def count_replicas(name: str = "auto") -> int:
    """How many replicas `make_strategy(name)` would have. It does not wait for other workers.

    Raises:
        InputError: the name is unknown, or TF_CONFIG cannot be used.
    """
    workers = _workers(name)
    if name == "default":
        return 1
    return max(len(tf.config.list_physical_devices("GPU")), 1) * (len(workers.addresses) if workers else 1)


@functools.cache
def _mirrored() -> tf.distribute.MirroredStrategy:
    """The process's only one: TensorFlow numbers the collectives of every strategy from the same start, so those of a
    second one would be mistaken for the first one's."""
    return tf.distribute.MirroredStrategy()


def _join(workers: Workers, timeout_s: float) -> tf.distribute.Strategy:
    """Wait for the other workers, then connect to them."""
    addresses, index = workers
    logging.info("Worker %d at %s: waiting for %s.", index, addresses[index], " ".join(addresses))
    meet(workers, timeout_s)
    kind = tf.distribute.experimental.CommunicationImplementation
    tf.get_logger().setLevel("WARNING")  # below it, TensorFlow logs every new collective twice
    gpus = len(tf.config.list_physical_devices("GPU"))
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(addresses)}),
        task_type="worker",
        task_id=index,
        num_accelerators={"GPU": gpus},
        rpc_layer="grpc",
    )
    options = tf.distribute.experimental.CommunicationOptions(implementation=kind.NCCL if gpus else kind.AUTO)
    previous = signal.getsignal(signal.SIGTERM)
    with alarm(timeout_s):
        strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver, options)
    signal.signal(signal.SIGTERM, previous)  # TensorFlow installs its own handler for preemption
    logging.info("%d workers, %d replicas.", len(addresses), strategy.num_replicas_in_sync)
    return strategy


def distribute(
    strategy: tf.distribute.Strategy,
    cluster: Cluster,
    make_part: Callable[[tuple[int, int, int]], tf.data.Dataset],
) -> tf.data.Dataset | tf.distribute.DistributedDataset:
    """The data for `fit`: a plain dataset, which one process shares among its replicas itself, or this worker's part.

    Args:
        make_part: make_part((first, count, of)) makes the dataset of `count` of the `of` replicas, from replica `first` on,
            as the argument `replicas` of `make_dataset`.
    """
    if cluster.size == 1:
        return make_part((0, 1, 1))
    replicas = strategy.num_replicas_in_sync
    local = replicas // cluster.size
    return strategy.distribute_datasets_from_function(lambda _: make_part((cluster.index * local, local, replicas)))
