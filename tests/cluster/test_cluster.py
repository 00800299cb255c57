"""How workers meet, agree and fail together, and what TF_CONFIG may say; runs on several workers are in test_workers."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time

import pytest
import tensorflow as tf

from ddpm_tf import errors
from ddpm_tf.cluster import cluster, meeting, tf_config
from ddpm_tf.cluster.strategy import make_strategy


def free_ports(n):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def meet_in_threads(addresses, timeout):
    """What `meet` raised for each worker, or None."""
    ends = [None] * len(addresses)

    def one(k):
        try:
            meeting.meet(tf_config.Workers(addresses[k], k), timeout)
        except errors.InputError as e:
            ends[k] = str(e)

    threads = [threading.Thread(target=one, args=(k,)) for k in range(len(addresses)) if addresses[k]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def test_workers_meet_and_whoever_does_not_come_is_named():
    addresses = tuple(f"127.0.0.1:{port}" for port in free_ports(3))
    assert meet_in_threads([addresses] * 3, 10) == [None] * 3
    ends = meet_in_threads([addresses, addresses, None], 1)
    assert f"{addresses[2]} did not come within 1 s" in ends[0] and addresses[0] in ends[1]
    ends = meet_in_threads([None, addresses, None], 1)
    assert f"The chief at {addresses[0]} did not come" in ends[1]
    ends = meet_in_threads([addresses[:2], (addresses[0], addresses[2])], 2)
    assert "has other addresses" in ends[1]


def test_what_is_still_there_of_an_earlier_start_is_waited_for():
    """A gRPC server on the chief's port answers in its own language until its process leaves."""
    ports = free_ports(2)
    addresses = tuple(f"127.0.0.1:{port}" for port in ports)
    script = f"""
import tensorflow as tf
server = tf.distribute.Server(tf.train.ClusterSpec({{"worker": ["{addresses[0]}"]}}), job_name="worker")
print("up", flush=True)
input()
"""
    earlier = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert earlier.stdout.readline() == "up\n"
    threading.Timer(1.5, earlier.kill).start()
    began = time.monotonic()
    ends = [None, None]

    def one(k):
        if k == 0:
            earlier.wait()
        meeting.meet(tf_config.Workers(addresses, k), 20)
        ends[k] = time.monotonic() - began

    threads = [threading.Thread(target=one, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(end and end >= 1.4 for end in ends)


def test_a_second_process_with_the_same_index_is_told_so():
    addresses = tuple(f"127.0.0.1:{port}" for port in free_ports(3))
    chief = threading.Thread(target=meet_in_threads, args=([addresses, None, None], 15))
    chief.start()
    deadline, connection = time.monotonic() + 10, None
    while connection is None:
        assert time.monotonic() < deadline
        with contextlib.suppress(OSError):
            connection = socket.create_connection(("127.0.0.1", int(addresses[0].rpartition(":")[2])), 5)
        time.sleep(0.05)
    with connection:
        connection.sendall(f"ddpm_tf worker 1 of {','.join(addresses)}\n".encode())
        time.sleep(0.3)
        with pytest.raises(errors.InputError, match="heard of two processes with index 1 within 2 s"):
            meeting.meet(tf_config.Workers(addresses, 1), 2)
    others = meet_in_threads([None, addresses, addresses], 10)  # once the first has gone, the second is taken
    chief.join()
    assert others == [None] * 3


def test_a_port_is_waited_for():
    addresses = tuple(f"127.0.0.1:{port}" for port in free_ports(2))
    with socket.socket() as earlier:
        earlier.bind(("127.0.0.1", int(addresses[0].rpartition(":")[2])))
        earlier.listen()
        threading.Timer(1, earlier.close).start()
        assert meet_in_threads([addresses] * 2, 20) == [None, None]


class InThreads(cluster.Cluster):
    """Workers that are threads: `gather` without TensorFlow's collectives."""

    def __init__(self, index, barrier, board):
        super().__init__(tf_config.Workers(("a:1", "b:1"), index))
        self.barrier, self.board = barrier, board

    def gather(self, value):
        self.board[self.index] = value
        self.barrier.wait(10)
        return list(self.board)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.InputError("no such data"), 2, "no such data"),
        (PermissionError(13, "Permission denied", "/data/x.npz"), 74, "Permission denied: '/data/x.npz'"),
        (KeyError("x"), 1, "'x'"),
    ],
    ids=str,
)
def test_whatever_one_worker_fails_at_ends_all_with_its_code(error, code, message):
    barrier, board, ends = threading.Barrier(2), [None, None], [None, None]

    def one(k):
        try:
            with InThreads(k, barrier, board).together():
                if k == 1:
                    raise error
        except Exception as e:
            ends[k] = e

    threads = [threading.Thread(target=one, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends[1] is error
    assert ends[0].exit_code == code and "Worker 1 (b:1): " in str(ends[0]) and message in str(ends[0])


def test_workers_that_differ_are_refused_with_a_table_of_what_differs():
    barrier, board, ends = threading.Barrier(2), [None, None], [None, None]

    def one(k):
        worker = InThreads(k, barrier, board)
        worker.agree({"alike": 1})
        barrier.wait(10)
        with pytest.raises(errors.InputError) as e:
            worker.agree({"alike": 1, "seed": 7 * k, **({"flag": "x"} if k else {})})
        ends[k] = str(e.value)

    threads = [threading.Thread(target=one, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends[0] == ends[1]
    assert ends[0].splitlines()[1:] == ["        0 a:1  1 b:1", '  flag  null   "x"', "  seed  0      7"]


def test_an_address_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for index in (0, 1):
            addresses = (address, "127.0.0.1:1")[:: 1 - 2 * index]
            with pytest.raises(errors.InputError, match=f"{address}, this worker's address, cannot be used.*in use"):
                meeting.meet(tf_config.Workers(addresses, index), 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "it is no JSON"),
        ("[]", '"cluster" is missing'),
        ('{"cluster": {"ps": ["a:1"]}}', r"has \['ps'\]"),
        ('{"cluster": {"worker": ["a"]}}', "no list of"),
        ('{"cluster": {"worker": ["a:\\u00b2"]}}', "no list of"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": ["worker"], "index": 0}}', '"task" must have'),
        ('{"cluster": {"worker": ["a:1", "a:1"]}}', "an address twice"),
        ('{"cluster": {"worker": ["a:1"]}}', '"task" must have'),
        ('{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}', r"within 0..1, found 2"),
        ('{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": "0"}}', "found '0'"),
        ('{"cluster": {"chief": ["a:1", "b:1"]}, "task": {"type": "chief", "index": 0}}', "one chief at most"),
    ],
)
def test_a_tf_config_that_cannot_be_used_says_what_is_wrong(monkeypatch, text, message):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(errors.InputError, match=f"TF_CONFIG: .*{message}"):
        make_strategy("auto")


def test_the_chief_comes_first(monkeypatch):
    found = {"cluster": {"worker": ["a:1", "b:1"], "chief": ["c:1"]}, "task": {"type": "worker", "index": 1}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(found))
    assert tf_config.read_tf_config() == (("c:1", "a:1", "b:1"), 2)


def test_strategies_are_chosen_by_name(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    strategy, alone = make_strategy("default")
    assert strategy.num_replicas_in_sync == 1 and alone.size == 1 and alone.is_chief
    assert isinstance(make_strategy("mirrored")[0], tf.distribute.MirroredStrategy)
    with pytest.raises(errors.InputError, match="Unknown strategy 'horovod'"):
        make_strategy("horovod")
    with pytest.raises(errors.InputError, match="needs TF_CONFIG with at least two workers; it is not set"):
        make_strategy("multi_worker")
