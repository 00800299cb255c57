"""What the workers of a run do together, beside the training step."""

import contextlib
import json
import re
import time

import numpy as np
import tensorflow as tf
from absl import logging

from ddpm_tf.errors import InputError, PeerLostError, RunError, StorageError, storage_advice

_PARTING_S = 2.0  # the last answers have been sent by then
_GROUP_KEY = 1_000_000  # of collectives on the hosts; tf.distribute counts its own up from 1


class Cluster:
    """What the workers of a run do together, beside the training step; one process is a cluster of one.

    Every method but the properties must be called by all workers, in the same order, from one thread. The values travel
    between hosts, also where the devices are GPUs.

    Args:
        workers: Workers, or None for one process.
    """

    def __init__(self, workers=None):
        self.addresses, self.index = workers or (("this process",), 0)
        self._calls = 0

    @property
    def size(self):
        return len(self.addresses)

    @property
    def is_chief(self):
        return self.index == 0

    def all_reduce(self, values):
        """The sum over the workers of an array of numbers, on every worker."""
        values = np.asarray(values)
        if self.size == 1:
            return values
        self._calls += 1
        with tf.device("/CPU:0"):
            total = tf.raw_ops.CollectiveReduceV2(
                input=values.reshape(-1), group_size=self.size, group_key=_GROUP_KEY, instance_key=self._calls,
                ordering_token=[], merge_op="Add", final_op="Id", communication_hint="ring",
            )  # fmt: skip
        return total.numpy().reshape(values.shape)

    def from_chief(self, value):
        """The chief's number."""
        return self.all_reduce(np.int64(value if self.is_chief else 0)).item()

    def broadcast(self, variables):
        """Give the variables of every worker the chief's values."""
        for variable in variables:
            value = variable.numpy()
            total = self.all_reduce(value if self.is_chief else np.zeros_like(value))
            if not self.is_chief:
                variable.assign(total)

    def gather(self, value):
        """[value of worker 0, ...], of what JSON can hold."""
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

    def barrier(self):
        self.all_reduce(np.int64(0))

    def agree(self, facts):
        """Refuse workers that differ.

        Args:
            facts: {name: what JSON can hold}.

        Raises:
            InputError: on every worker, with a table of what differs.
        """
        everyone = self.gather(facts)
        names = sorted({name for found in everyone for name in found})
        rows = [(n, *(json.dumps(found.get(n)) for found in everyone)) for n in names]
        rows = [row for row in rows if len(set(row[1:])) > 1]
        if rows:
            table = [("", *(f"{k} {a}" for k, a in enumerate(self.addresses))), *rows]
            widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
            lines = ("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in table)
            raise InputError(
                "The workers are not the same; they must have one config, one version of the program and one data set:\n  "
                + "\n  ".join(lines)
            )

    @contextlib.contextmanager
    def together(self):
        """Round what one worker may fail at alone, without collectives in it: then all end, with its exit code.

        Raises:
            RunError: where another worker failed, with its message.
        """
        if self.size == 1:
            yield
            return
        error = found = None
        try:
            yield
        except Exception as e:
            error, found = e, [getattr(e, "exit_code", 1), str(e)]
            if isinstance(e, OSError):
                found = [StorageError.exit_code, f"{e}. {storage_advice(e)}"]
        everyone = self.gather(found)
        if error:
            raise error
        for k, found in enumerate(everyone):
            if found:
                peer = RunError(f"Worker {k} ({self.addresses[k]}): {found[1]}")
                peer.exit_code = found[0]
                raise peer

    @contextlib.contextmanager
    def watched(self):
        """Turn TensorFlow's errors about a worker that is gone into PeerLostError; any other end waits a little, for whoever
        left at once could take with it what another still asks it for."""
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
                "its log. Start all workers again by the same command: training goes on from the last checkpoint."
            ) from e
        finally:
            if self.size > 1 and not is_lost:
                time.sleep(_PARTING_S)


def _is_peer_lost(error):
    kinds = (
        tf.errors.UnavailableError,
        tf.errors.AbortedError,
        tf.errors.DeadlineExceededError,
        tf.errors.CancelledError,
    )
    return isinstance(error, kinds) or "ollective" in str(error)
