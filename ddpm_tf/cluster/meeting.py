"""How the workers of a run wait for each other before TensorFlow connects them."""

import contextlib
import errno
import re
import select
import signal
import socket
import time

from absl import logging

from ddpm_tf.errors import InputError

JOIN_TIMEOUT_S = 300.0
_HELLO, _GO, _REFUSED, _LATER = b"ddpm_tf worker ", b"ddpm_tf go\n", b"ddpm_tf refuses: ", b"ddpm_tf not yet: "


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
