"""The workers of a run: how they meet, agree, hand values to each other, and end together."""

import contextlib
import errno
import json
import os
import re
import select
import signal
import socket
import time
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from ddpm_tf.errors import InputError, PeerLostError, RunError, StorageError, storage_advice

JOIN_TIMEOUT_S = 300.0
_PARTING_S = 2.0  # the last answers have been sent by then
_GROUP_KEY = 1_000_000  # of collectives on the hosts; tf.distribute counts its own up from 1
_HELLO, _GO, _REFUSED, _LATER = b"ddpm_tf worker ", b"ddpm_tf go\n", b"ddpm_tf refuses: ", b"ddpm_tf not yet: "


class Workers(NamedTuple):
    """addresses: host:port of every worker, the chief first; index: which one this process is."""

    addresses: tuple
    index: int


def read_tf_config():
    """The Workers that the environment variable TF_CONFIG names, or None where it is not set.

    Raises:
        InputError: naming what is wrong in it.
    """
    text = os.environ.get("TF_CONFIG", "").strip()
    if not text:
        return None
    example = '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}'

    def wrong(what):
        return InputError(f"TF_CONFIG: {what}. Expected, for example, {example}.")

    try:
        found = json.loads(text)
    except ValueError as e:
        raise wrong(f"it is no JSON ({e})") from None
    if not isinstance(found, dict) or not isinstance(found.get("cluster"), dict):
        raise wrong('"cluster" is missing or no object')
    cluster, task = found["cluster"], found.get("task")
    if unknown := sorted(set(cluster) - {"chief", "worker"}):
        raise wrong(f'"cluster" has {unknown}; chief and worker are known')
    for job, addresses in cluster.items():
        if not isinstance(addresses, list) or not all(isinstance(a, str) and _is_address(a) for a in addresses):
            raise wrong(f'"cluster" {job!r} is no list of "host:port": {addresses!r}')
    if len(cluster.get("chief", [])) > 1:
        raise wrong(f"there is one chief at most, found {len(cluster['chief'])}")
    addresses = (*cluster.get("chief", []), *cluster.get("worker", []))
    if not addresses or len(set(addresses)) < len(addresses):
        raise wrong(f'"cluster" names {"an address twice" if addresses else "no worker"}')
    if not isinstance(task, dict) or task.get("type") not in list(cluster):
        raise wrong(f'"task" must have a "type" among {sorted(cluster)}, found {task!r}')
    index = task.get("index")
    if type(index) is not int or not 0 <= index < len(cluster[task["type"]]):
        raise wrong(f'"task" "index" must be within 0..{len(cluster[task["type"]]) - 1}, found {index!r}')
    return Workers(addresses, index + (len(cluster.get("chief", [])) if task["type"] == "worker" else 0))


def meet(workers, timeout_s):
    """Return once every worker has come, on the very addresses that TensorFlow takes next.

    TensorFlow itself waits for ever, and lets no Python run meanwhile; so whoever is late is waited for here.

    Raises:
        InputError: an address that is in use; a worker that did not come, with its address.
    """
    deadline = time.monotonic() + timeout_s
    own = workers.addresses[workers.index]
    with contextlib.closing(_listen(own, deadline)) as listener:  # also by the others: an address in use shows
        if workers.index == 0:
            _receive_all(listener, workers, deadline, timeout_s)
            return
    hello = _HELLO + f"{workers.index} of {','.join(workers.addresses)}\n".encode()
    reason = ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(_split(workers.addresses[0]), timeout=5) as connection:
                connection.sendall(hello)
                connection.settimeout(max(deadline - time.monotonic(), 0.1))
                answer = connection.makefile("rb").readline()
            if answer == _GO:
                return
            if answer.startswith(_REFUSED):
                refusal = answer.removeprefix(_REFUSED).decode(errors="replace").strip()
                raise InputError(f"TF_CONFIG: the chief at {workers.addresses[0]} {refusal}")
            reason = answer.removeprefix(_LATER).decode(errors="replace").strip() if answer.startswith(_LATER) else ""
            # Anything else is no answer of ours: the chief of an earlier start, which has not left yet.
        except OSError:
            pass
        time.sleep(0.2)
    reason = reason or "did not come, or not all the others did,"
    raise InputError(
        f"The chief at {workers.addresses[0]} {reason} within {timeout_s:g} s. Start every worker that TF_CONFIG names, once, "
        "and see that they reach each other at these addresses."
    )


def _receive_all(listener, workers, deadline, timeout_s):
    """The chief's side: wait for a hello of each of the others, then send them off together."""
    arrived = {}
    try:
        while True:
            arrived = {k: connection for k, connection in arrived.items() if _is_open(connection)}
            if len(arrived) == len(workers.addresses) - 1:
                break
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = listener.accept()
                connection.settimeout(5)
                line = connection.makefile("rb").readline(65536)
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue
                missing = [a for k, a in enumerate(workers.addresses) if k and k not in arrived]
                raise InputError(
                    f"{' and '.join(missing)} did not come within {timeout_s:g} s. Start every worker that TF_CONFIG "
                    "names, and see that they reach each other at these addresses."
                ) from None
            except OSError:
                continue
            found = re.fullmatch(_HELLO + rb"(\d+) of (.*)\n", line)
            if not found:  # someone else
                connection.close()
            elif found[2].decode() != ",".join(workers.addresses):
                _refuse(connection, _REFUSED, f"has other addresses: {', '.join(workers.addresses)}")
            elif int(found[1]) in arrived and _is_open(arrived[int(found[1])]):
                _refuse(connection, _LATER, f"heard of two processes with index {int(found[1])}")
            else:
                arrived[int(found[1])] = connection
        listener.close()  # before anyone is told: TensorFlow takes the address now
        for connection in arrived.values():
            with contextlib.suppress(OSError):  # it is gone; TensorFlow's own joining ends with a time limit
                connection.sendall(_GO)
    finally:
        for connection in arrived.values():
            connection.close()


def _refuse(connection, kind, why):
    with contextlib.closing(connection), contextlib.suppress(OSError):
        connection.sendall(kind + f"{why}\n".encode())


def _is_open(connection):
    """Whether the other side still waits: it sends nothing after its hello, so there is something to read once it has gone."""
    return not select.select([connection], [], [], 0)[0]


def _listen(address, deadline):
    """A listening socket at the address, as soon as the process that has the port leaves it."""
    host, port = _split(address)
    is_told = False
    while True:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
            listener.listen(1024)
            return listener
        except OSError as e:
            listener.close()
            if e.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
                raise InputError(
                    f"TF_CONFIG: {address}, this worker's address, cannot be used: {e}. Another process has the port (perhaps "
                    "an earlier start of this run): end it, or choose another port on every worker."
                ) from None
        if not is_told:
            logging.info("%s, this worker's address, is in use; waiting for the process that has it to leave.", address)
            is_told = True
        time.sleep(0.2)


def _split(address):
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _is_address(text):
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536


@contextlib.contextmanager
def alarm(seconds):
    """End the process if the body takes longer: for calls into C++ during which no Python runs."""
    previous = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


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
