"""Several workers: two processes on 127.0.0.1, against one process, and against each other's end."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from ddpm_tf import builders, errors
from ddpm_tf.bundles import read_bundle
from ddpm_tf.training import checkpoints, cluster
from ddpm_tf.training.distribution import make_strategy
from tests.conftest import assert_the_same_end, rows, tiny_config
from tests.training import test_model

ROOT = Path(__file__).parent.parent.parent
NUM_STEPS = 160
ARGS = (
    "--config=configs/digits.py", "--config.data.batch_size=8", "--config.data.random_flip=True",
    "--config.network.ch=64", "--config.network.ch_mult=(1,)", "--config.network.num_res_blocks=1",
    "--config.network.attn_resolutions=()", "--config.network.dropout=0.1", "--config.optimizer.learning_rate=1e-3",
    "--config.optimizer.warmup_steps=2", "--config.train.grad_clip=0.1", "--config.train.ema_decay=0.9",
    "--config.train.log_every=1", "--config.train.checkpoint_every=10", "--config.train.keep_checkpoints=99",
    "--config.train.sample_every=10", "--config.train.jit_compile=off", "--config.sample.num_steps=2",
    "--config.sample.num_images=2", "--join_timeout_s=100",
)  # fmt: skip


def free_ports(n):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def tf_config(ports, index):
    addresses = [f"127.0.0.1:{port}" for port in ports]
    return json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})


def start(command, ports, index, cwd=ROOT):
    env = {**os.environ, "TF_CONFIG": tf_config(ports, index), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


class Two:
    """Two workers that train into workdir/0 and workdir/1; the second must never come into being."""

    def __init__(self, workdir, *args, second=()):
        self.workdir, ports = workdir / "0", free_ports(2)
        self.processes = [
            start(["run_train.py", *ARGS, f"--workdir={workdir / str(k)}", *args, *(second if k else ())], ports, k)
            for k in range(2)
        ]
        self.errors = ["", ""]
        self.readers = [threading.Thread(target=self.read, args=(k,), daemon=True) for k in range(2)]
        for reader in self.readers:
            reader.start()

    def read(self, k):
        self.errors[k] = self.processes[k].communicate()[1]

    def wait_for_step(self, step):
        while not (self.workdir / "metrics.jsonl").exists() or len(rows(self.workdir)) < step:
            assert all(p.poll() is None for p in self.processes), self.errors
            time.sleep(0.02)

    def codes(self, timeout=200):
        """Exit codes; every one must come within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        try:
            for p in self.processes:
                p.wait(max(deadline - time.monotonic(), 0.1))
        finally:
            for p in self.processes:
                p.kill()
        for reader in self.readers:
            reader.join()
        assert not (self.workdir.parent / "1").exists(), "a worker that is not the chief has written"
        return [p.returncode for p in self.processes]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    two = Two(tmp_path_factory.mktemp("two"), f"--config.train.num_steps={NUM_STEPS}")
    assert two.codes() == [0, 0], two.errors
    assert checkpoints.list_steps(two.workdir / "ckpt")[-1] == NUM_STEPS
    return two.workdir


def begin(tmp_path, step):
    two = Two(tmp_path, f"--config.train.num_steps={NUM_STEPS}")
    two.wait_for_step(step)
    return two


@pytest.mark.slow
def test_two_workers_are_one_process(uninterrupted, tmp_path):
    """Weights, average and log after 10 steps, the clip active at each, and the picture to a grey level."""
    command = [sys.executable, "run_train.py", *ARGS, "--config.train.num_steps=10", f"--workdir={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    _, tensors = checkpoints.restore_latest(tmp_path / "ckpt")
    two = read_bundle(checkpoints.step_folder(uninterrupted / "ckpt", 10) + "/state")
    for name in tensors:
        if name.startswith(("network/", "ema/")):
            np.testing.assert_allclose(two[name], tensors[name], atol=1e-5, rtol=0, err_msg=name)
    for a, b in zip(rows(tmp_path), rows(uninterrupted), strict=False):
        assert b["grad_norm"] > 0.1 and b["skipped"] == 0
        np.testing.assert_allclose([b["loss"], b["grad_norm"]], [a["loss"], a["grad_norm"]], rtol=1e-4)
    assert len(rows(tmp_path)) == 10
    for name in ("raw", "ema"):
        picture, expected = (
            np.asarray(Image.open(w / "samples" / f"step_000000000010_{name}.png")).astype(int)
            for w in (uninterrupted, tmp_path)
        )
        assert np.abs(picture - expected).max() <= 1 and expected.std() > 5


DRAWS = """
import sys
import numpy as np, tensorflow as tf
from ddpm_tf import builders
from ddpm_tf.training.distribution import distribute, make_strategy
from tests.conftest import tiny_config
strategy, cluster = make_strategy(join_timeout_s=100)
config = tiny_config()
config.network.ch = 64
model = builders.build_model(config, strategy)
source = builders.build_source(config)
data = iter(distribute(strategy, cluster, lambda part: builders.build_dataset(config, source, start_step=5, replicas=part)))
def draws(batch):
    size = tf.shape(batch["image"])[0]
    context = tf.distribute.get_replica_context()
    index = context.replica_id_in_sync_group * size + tf.range(size)
    _, _, gradients = model.loss_and_gradient(batch["image"], None, index, tf.constant(6), tf.constant(0.5))
    return batch["image"], *model.draws(index, tf.constant(6)), *context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
next(data)
found = tf.function(lambda batch: strategy.run(draws, (batch,)))(next(data))
np.savez(f"{sys.argv[1]}/{cluster.index}.npz", *[strategy.experimental_local_results(v)[0].numpy() for v in found])
everyone = cluster.gather({"worker": cluster.index, "long": "x" * cluster.index * 1000})
assert [e["worker"] for e in everyone] == [0, 1] and len(everyone[1]["long"]) == 1000
assert cluster.from_chief(7 + cluster.index) == 7
cluster.barrier()
"""


@pytest.mark.slow
def test_two_workers_see_and_draw_the_parts_of_the_global_batch_and_have_its_gradients(tmp_path):
    ports = free_ports(2)
    processes = [start(["-c", DRAWS, str(tmp_path)], ports, k) for k in range(2)]
    for p in processes:
        _, errors = p.communicate(timeout=200)
        assert p.returncode == 0, errors
    parts = [np.load(tmp_path / f"{k}.npz") for k in range(2)]
    images, t, eps, masks = (np.concatenate([part[f"arr_{i}"] for part in parts]) for i in range(4))
    config = tiny_config()
    config.network.ch = 64
    model = builders.build_model(config, tf.distribute.get_strategy())
    batch = next(iter(builders.build_dataset(config, builders.build_source(config), start_step=6)))
    index, step = tf.range(8), tf.constant(6)
    _, _, gradients = tf.function(model.loss_and_gradient)(batch["image"], None, index, step, tf.constant(1.0))
    expected = [np.asarray(a) for a in (batch["image"], *model.draws(index, step), *gradients)]
    for part in parts:
        found = [images, t, eps, masks, *(part[f"arr_{i}"] for i in range(4, len(expected)))]
        test_model.assert_same_first_step(expected, found)


@pytest.mark.slow
def test_workers_that_are_killed_frozen_and_signalled_end_together_and_restarts_end_equal(uninterrupted, tmp_path):
    """Each of the two in turn; the same command goes on every time."""
    for k, step in ((1, 12), (0, 24)):
        two = begin(tmp_path, step)
        two.processes[k].kill()
        assert two.processes[1 - k].wait(60) == 69, two.errors
        two.codes()
        assert re.search(rf"error: Worker {1 - k} has lost worker {k} \(127.0.0.1:\d+\)", two.errors[1 - k]), two.errors
    for k, step in ((1, 36), (0, 48)):
        two = begin(tmp_path, step)
        two.processes[k].send_signal(signal.SIGSTOP)
        assert two.processes[1 - k].wait(90) == 69, two.errors
        two.processes[k].send_signal(signal.SIGCONT)
        assert two.codes(timeout=60) == [69, 69], two.errors
        assert f"has lost worker {k}" in two.errors[1 - k]
    for k, step in ((1, 60), (0, 72)):
        two = begin(tmp_path, step)
        two.processes[k].terminate()
        assert two.codes(timeout=60) == [143, 143], two.errors
        steps = [re.search(rf"SIGTERM: stopped after step (\d+) of {NUM_STEPS}", e)[1] for e in two.errors]
        assert steps[0] == steps[1] == str(checkpoints.list_steps(two.workdir / "ckpt")[-1])
    two = begin(tmp_path, 73)
    assert two.codes() == [0, 0], two.errors
    assert_the_same_end(two.workdir, uninterrupted)


@pytest.mark.slow
def test_workers_that_differ_are_refused_on_all_with_a_table(tmp_path):
    two = Two(tmp_path, second=("--config.seed=7", "--config.train.ema_decay=0.99"))
    assert two.codes() == [2, 2]
    for error in two.errors:
        assert re.search(r"error: The workers are not the same.*\n +0 127.0.0.1:\d+ +1 127.0.0.1:\d+\n", error), error
        assert re.search(r"--config.seed +0 +7\n +--config.train.ema_decay +0.9 +0.99\n", error), error
    assert not two.workdir.exists()


@pytest.mark.slow
def test_workers_whose_files_have_other_contents_are_refused(tmp_path):
    """As many images, of the same name and size."""
    processes, ports = [], free_ports(2)
    for k in range(2):
        (tmp_path / str(k)).mkdir()
        np.savez(tmp_path / str(k) / "data.npz", images=np.full((16, 8, 8, 1), k, np.uint8))
        args = (*ARGS, "--config.data.source=npz:data.npz", f"--workdir={tmp_path / 'w'}")
        command = [str(ROOT / "run_train.py"), *(a.replace("=configs", f"={ROOT}/configs") for a in args)]
        processes.append(start(command, ports, k, cwd=tmp_path / str(k)))
    for p in processes:
        _, error = p.communicate(timeout=200)
        assert p.returncode == 2, error
        assert re.search(r"error: The workers are not the same.*\n.*\n +data \(SHA-256\) +{\"image\": \"", error), error
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_what_one_worker_cannot_do_ends_both_with_its_code(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "thesis.tex").write_text("x")
    two = Two(tmp_path)
    assert two.codes() == [2, 2]
    assert "holds 'thesis.tex'" in two.errors[0]
    assert re.search(r"error: Worker 0 \(127.0.0.1:\d+\): .*holds 'thesis.tex'", two.errors[1])


@pytest.mark.slow
def test_four_replicas_are_one(tmp_path):
    """The first step's draws and gradients, and the weights after 10 steps; two replicas are tested in test_model."""
    script = """
import sys
import numpy as np, tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4)
from tests.training.test_model import first_step, train
model, log = train(4, 10, dropout=0.1)
assert min(log.history["grad_norm"]) > 0.5
weights = [v.numpy() for v in (*model.network.variables, *model.ema_network.variables)]
np.savez(sys.argv[1], *weights, *first_step(4))
"""
    path = tmp_path / "four.npz"
    subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, check=True, capture_output=True)
    one, _ = test_model.train(1, 10, dropout=0.1)
    four = [array for _, array in sorted(np.load(path).items(), key=lambda item: int(item[0].removeprefix("arr_")))]
    variables = (*one.network.variables, *one.ema_network.variables)
    for v, value in zip(variables, four, strict=False):
        np.testing.assert_allclose(value, v.numpy(), atol=1e-5, rtol=0, err_msg=v.path)
    test_model.assert_same_first_step(test_model.first_step(1), four[len(variables) :])


def meet_in_threads(addresses, timeout):
    """What `meet` raised for each worker, or None."""
    ends = [None] * len(addresses)

    def one(k):
        try:
            cluster.meet(cluster.Workers(addresses[k], k), timeout)
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
        cluster.meet(cluster.Workers(addresses, k), 20)
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
            cluster.meet(cluster.Workers(addresses, 1), 2)
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
        super().__init__(cluster.Workers(("a:1", "b:1"), index))
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


def test_an_address_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for index in (0, 1):
            addresses = (address, "127.0.0.1:1")[:: 1 - 2 * index]
            with pytest.raises(errors.InputError, match=f"{address}, this worker's address, cannot be used.*in use"):
                cluster.meet(cluster.Workers(addresses, index), 1)


@pytest.mark.slow
def test_a_chief_that_does_not_come_ends_a_worker_with_2(tmp_path):
    ports = free_ports(2)
    process = start(["run_train.py", *ARGS, f"--workdir={tmp_path / 'w'}", "--join_timeout_s=3"], ports, 1)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and f"error: The chief at 127.0.0.1:{ports[0]} did not come" in error, error
    assert not (tmp_path / "w").exists()


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
    assert cluster.read_tf_config() == (("c:1", "a:1", "b:1"), 2)


def test_strategies_are_chosen_by_name(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    strategy, alone = make_strategy("default")
    assert strategy.num_replicas_in_sync == 1 and alone.size == 1 and alone.is_chief
    assert isinstance(make_strategy("mirrored")[0], tf.distribute.MirroredStrategy)
    with pytest.raises(errors.InputError, match="Unknown --strategy 'horovod'"):
        make_strategy("horovod")
    with pytest.raises(errors.InputError, match="needs TF_CONFIG with at least two workers; it is not set"):
        make_strategy("multi_worker")
