"""The workers of a run: values they exchange outside of the training step, and errors that end all of them."""

import contextlib
import json
import re
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from ddpm_tf.cluster.tf_config import Workers
from ddpm_tf.errors import InputError, PeerLostError, RunError, StorageError, storage_advice
from ddpm_tf.text import table

_PARTING_S = 2.0  # the last answers to the other workers have been sent by then
_GROUP_KEY = 1_000_000  # of our collectives, which run on the hosts; tf.distribute numbers its own from 1


class Cluster:
    """The workers of a run; one process is a cluster of one.

    All workers must call the same methods in the same order, from one thread; `size` and `is_chief` are exempt. Values
    travel between hosts, even if the devices are GPUs.

    Args:
        workers: Workers, or None for one process.
    """

    def __init__(self, workers: Workers | None = None) -> None:
        self.addresses: tuple[str, ...] = workers.addresses if workers else ("this process",)
        self.index = workers.index if workers else 0
        self._num_collectives = 0

    @property
    def size(self) -> int:
        return len(self.addresses)

    @property
    def is_chief(self) -> bool:
        return self.index == 0

    def all_reduce(self, values: Any) -> np.ndarray:
        """The sum over the workers of an array of numbers, on every worker."""
        values = np.asarray(values)
        if self.size == 1:
            return values
        self._num_collectives += 1
        with tf.device("/CPU:0"):
            total = tf.raw_ops.CollectiveReduceV2(
                input=values.reshape(-1),
                group_size=self.size,
                group_key=_GROUP_KEY,
                instance_key=self._num_collectives,
                ordering_token=[],
                merge_op="Add",
                final_op="Id",
                communication_hint="ring",
            )
        return total.numpy().reshape(values.shape)

    def from_chief(self, value: int) -> int:
        """The chief's `value`, on every worker; the values of the others are ignored."""
        return self.all_reduce(np.int64(value if self.is_chief else 0)).item()

    def broadcast(self, variables: Iterable[tf.Variable | keras.Variable]) -> None:
        """Give the variables of every worker the chief's values."""
        for variable in variables:
            value = variable.numpy()
            total = self.all_reduce(value if self.is_chief else np.zeros_like(value))
            if not self.is_chief:
                variable.assign(total)

    def gather(self, value: Any) -> list[Any]:
        """[value of worker 0, ...] on every worker; the values are of types that JSON can hold."""
        if self.size == 1:
            return [value]
        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        lengths = np.zeros(self.size, np.int64)
        lengths[self.index] = len(data)
        lengths = self.all_reduce(lengths)
        rows = np.zeros((self.size, lengths.max()), np.int32)
        rows[self.index, : len(data)] = data
        rows = self.all_reduce(rows).astype(np.uint8)
        return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]

    def barrier(self) -> None:
        """Wait until all workers have come here."""
        self.all_reduce(np.int64(0))

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Refuse workers that differ.

        Args:
            facts: {name: value}, which must be the same on every worker; values of types that JSON can hold.

        Raises:
            InputError: on every worker, with a table of the facts that differ.
        """
        of_workers = self.gather(facts)
        names = sorted({name for each in of_workers for name in each})
        rows = [(name, *(json.dumps(each.get(name)) for each in of_workers)) for name in names]
        rows = [row for row in rows if len(set(row[1:])) > 1]
        if rows:
            differences = table(rows, header=("", *(f"{k} {address}" for k, address in enumerate(self.addresses))))
            raise InputError(
                "The workers are not the same. All must have the same config, the same version of the program and the same "
                f"data set; they differ in:\n{textwrap.indent(differences, '  ')}"
            )

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Wrap work that may fail on one worker only.

        If it fails anywhere, every worker stops with that worker's exit code. Do not call collectives inside.

        Raises:
            RunError: another worker failed; the message is that worker's.
        """
        if self.size == 1:
            yield
            return
        error = failure = None  # failure: [exit code, message]
        try:
            yield
        except Exception as e:
            error, failure = e, [getattr(e, "exit_code", 1), str(e)]
            if isinstance(e, OSError):
                failure = [StorageError.exit_code, f"{e}. {storage_advice(e)}"]
        failures = self.gather(failure)
        if error:
            raise error
        for k, failure in enumerate(failures):
            if failure:
                exit_code, message = failure
                peer_error = RunError(f"Worker {k} ({self.addresses[k]}): {message}")
                peer_error.exit_code = exit_code
                raise peer_error

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Raise PeerLostError for TensorFlow's errors about a lost worker.

        Any other end waits for two seconds: a process that exits at once would take answers with it that other workers
        still wait for.
        """
        is_lost = False
        try:
            yield
        except tf.errors.OpError as e:
            if self.size == 1 or not _is_peer_lost(e):
                raise
            others = set(range(self.size)) - {self.index}
            named = {int(k) for k in re.findall(r"/job:worker/(?:replica:0/)?task:(\d+)", str(e))} & others
            names = " or ".join(f"worker {k} ({self.addresses[k]})" for k in sorted(named or others))
            logging.info("%s", e)
            is_lost = True
            raise PeerLostError(
                f"Worker {self.index} has lost {names}: it was killed, does not answer, or ended by an error of its own; see "
                "its log. Start all workers again by the same command: training resumes from the last checkpoint."
            ) from e
        finally:
            if self.size > 1 and not is_lost:
                time.sleep(_PARTING_S)


def _is_peer_lost(error: tf.errors.OpError) -> bool:
    kinds = (
        tf.errors.UnavailableError,
        tf.errors.AbortedError,
        tf.errors.DeadlineExceededError,
        tf.errors.CancelledError,
    )
    return isinstance(error, kinds) or "ollective" in str(error)
