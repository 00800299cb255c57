"""Several workers: two processes on 127.0.0.1, against one process, and against each other's end."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from ddpm_tf import builders
from ddpm_tf.storage import checkpoints
from ddpm_tf.storage.bundles import read_bundle
from tests.cluster.test_cluster import free_ports
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
from ddpm_tf.cluster.strategy import distribute, make_strategy
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
    drawn = model.objective.draws(index, tf.constant(6))
    return batch["image"], *drawn[:3], *context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
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
    expected = [np.asarray(a) for a in (batch["image"], *model.objective.draws(index, step)[:3], *gradients)]
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


@pytest.mark.slow
def test_a_chief_that_does_not_come_ends_a_worker_with_2(tmp_path):
    ports = free_ports(2)
    process = start(["run_train.py", *ARGS, f"--workdir={tmp_path / 'w'}", "--join_timeout_s=3"], ports, 1)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and f"error: The chief at 127.0.0.1:{ports[0]} did not come" in error, error
    assert not (tmp_path / "w").exists()
