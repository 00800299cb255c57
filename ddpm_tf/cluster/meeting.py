"""How the workers of a run wait for each other before TensorFlow connects them."""

import contextlib
import errno
import re
import select
import signal
import socket
import time
from collections.abc import Iterator

from absl import logging

from ddpm_tf.cluster.tf_config import Workers
from ddpm_tf.errors import InputError

JOIN_TIMEOUT_S = 300.0
_HELLO, _GO, _REFUSED, _LATER = b"ddpm_tf worker ", b"ddpm_tf go\n", b"ddpm_tf refuses: ", b"ddpm_tf not yet: "


def meet(workers: Workers, timeout_s: float) -> None:
    """Return once every worker is here, on the very addresses that TensorFlow uses next.

    TensorFlow itself waits for ever, and no Python runs meanwhile, not even a signal handler. So late workers are waited
    for here.

    Raises:
        InputError: an address is in use, or a worker did not come; the message names the address.
    """
    deadline = time.monotonic() + timeout_s
    # Every worker listens, not only the chief: so an address that is in use is noticed.
    with contextlib.closing(_listen(workers.addresses[workers.index], deadline)) as listener:
        if workers.index == 0:
            _receive_all(listener, workers, deadline, timeout_s)
            return
    _report_to_chief(workers, deadline, timeout_s)


def _report_to_chief(workers: Workers, deadline: float, timeout_s: float) -> None:
    """Say hello to the chief until it answers that all workers are here."""
    chief, reason = workers.addresses[0], ""
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # the chief is not here yet
            answer = _ask(workers, deadline)
            if answer == _GO:
                return
            if answer.startswith(_REFUSED):
                raise InputError(f"TF_CONFIG: the chief at {chief} {_text(answer, _REFUSED)}")
            # An answer of another kind is not ours: the chief of an earlier start still has the port.
            reason = _text(answer, _LATER) if answer.startswith(_LATER) else ""
        time.sleep(0.2)
    reason = reason or "did not come, or not all the others did,"
    raise InputError(
        f"The chief at {chief} {reason} within {timeout_s:g} s. Start every worker that TF_CONFIG names, once, and see that "
        "they reach each other at these addresses."
    )


def _ask(workers: Workers, deadline: float) -> bytes:
    """Send this worker's hello to the chief; returns the answer, for which it may wait until the deadline."""
    with socket.create_connection(_split(workers.addresses[0]), timeout=5) as connection:
        connection.sendall(_HELLO + f"{workers.index} of {','.join(workers.addresses)}\n".encode())
        connection.settimeout(max(deadline - time.monotonic(), 0.1))
        return connection.makefile("rb").readline()


def _text(answer: bytes, kind: bytes) -> str:
    return answer.removeprefix(kind).decode(errors="replace").strip()


def _receive_all(listener: socket.socket, workers: Workers, deadline: float, timeout_s: float) -> None:
    """As the chief, wait for a hello of every other worker, then answer all of them."""
    waiting: dict[int, socket.socket] = {}  # by index; a worker waits on its open connection
    try:
        while len(waiting := {k: c for k, c in waiting.items() if _is_open(c)}) < len(workers.addresses) - 1:
            try:
                listener.settimeout(max(deadline - time.monotonic(), 0.001))
                connection, _ = listener.accept()
                connection.settimeout(5)
                _admit(connection, connection.makefile("rb").readline(65536), workers, waiting)
            except TimeoutError:
                if time.monotonic() >= deadline:
                    missing = [a for k, a in enumerate(workers.addresses) if k and k not in waiting]
                    raise InputError(
                        f"{' and '.join(missing)} did not come within {timeout_s:g} s. Start every worker that TF_CONFIG "
                        "names, and see that they reach each other at these addresses."
                    ) from None
            except OSError:  # the other side closed its connection
                continue
        listener.close()  # before the answers: the other workers then let TensorFlow connect to this address
        for connection in waiting.values():
            with contextlib.suppress(OSError):  # it has gone; TensorFlow's own joining has a time limit
                connection.sendall(_GO)
    finally:
        for connection in waiting.values():
            connection.close()


def _admit(connection: socket.socket, line: bytes, workers: Workers, waiting: dict[int, socket.socket]) -> None:
    """Enter the worker that sent this line into `waiting`, or refuse it."""
    hello = re.fullmatch(_HELLO + rb"(\d+) of (.*)\n", line)
    if not hello:  # not a worker
        connection.close()
        return
    index = int(hello[1])
    if hello[2] != ",".join(workers.addresses).encode():
        _refuse(connection, _REFUSED, f"has other addresses: {', '.join(workers.addresses)}")
    elif index in waiting and _is_open(waiting[index]):
        _refuse(connection, _LATER, f"heard of two processes with index {index}")
    else:
        waiting[index] = connection


def _refuse(connection: socket.socket, kind: bytes, reason: str) -> None:
    with contextlib.closing(connection), contextlib.suppress(OSError):
        connection.sendall(kind + f"{reason}\n".encode())


def _is_open(connection: socket.socket) -> bool:
    """Whether the other side still waits. After its hello it sends nothing; a closed connection reads as end of file."""
    return not select.select([connection], [], [], 0)[0]


def _listen(address: str, deadline: float) -> socket.socket:
    """A listening socket at the address; waits for a process that still has the port."""
    host, port = _split(address)
    is_logged = False
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
        if not is_logged:
            logging.info("%s, this worker's address, is in use; waiting for the process that has it to leave.", address)
            is_logged = True
        time.sleep(0.2)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """End the process if the block takes longer. It works during calls into C++, in which no Python runs."""
    previous = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
