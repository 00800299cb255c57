"""Runs that are killed or stopped at random moments, and started again by the same command.

CRASH_KILLS=200 python -m pytest -m slow tests/crash      (the full size; 20 of each signal by default)
"""

import concurrent.futures
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ddpm_tf.storage import checkpoints
from tests.conftest import assert_the_same_end, rows

ROOT = Path(__file__).parent.parent.parent
KILLS = int(os.environ.get("CRASH_KILLS", "20"))
NUM_STEPS = max(600, 20 * KILLS)
ARGS = (
    "run_train.py", "--config=configs/digits.py", "--config.data.batch_size=4", "--config.data.random_flip=True",
    "--config.network.ch_mult=(1,)", "--config.network.attn_resolutions=()", "--config.network.dropout=0.1",
    f"--config.train.num_steps={NUM_STEPS}", "--config.train.log_every=1", "--config.train.checkpoint_every=7",
    "--config.train.sample_every=200", "--config.train.jit_compile=off", "--config.sample.num_steps=2",
    "--config.sample.num_images=2",
)  # fmt: skip
SLOW_DISK = """
import runpy, sys, time
from ddpm_tf import files
fsync = files.fsync
files.fsync = lambda path: (time.sleep(0.1), fsync(path))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(workdir, *args, before=()):
    command = [sys.executable, *before, *ARGS, f"--workdir={workdir}", *args]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_a_row(process, workdir):
    """From the first step on: the start of Python and TensorFlow is no moment of training."""
    log, began = workdir / "metrics.jsonl", time.monotonic()
    before = log.stat().st_size if log.exists() else 0
    while process.poll() is None and (not log.exists() or log.stat().st_size <= before):
        if log.exists():  # rows after the last checkpoint are cut off
            before = min(before, log.stat().st_size)
        assert time.monotonic() - began < 180
        time.sleep(0.01)


def assert_the_same_workdir(workdir, uninterrupted):
    assert_the_same_end(workdir, uninterrupted)
    assert sorted(p.name for p in (workdir / "ckpt").iterdir()) == sorted(
        p.name for p in (uninterrupted / "ckpt").iterdir()
    )  # no litter
    assert not [p for p in workdir.rglob("*") if ".tmp" in p.name or ".trash" in p.name or "corrupt" in p.name]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "w"
    process = start(workdir)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert f"] step {NUM_STEPS}/{NUM_STEPS}  loss" in errors  # a line, where there is no terminal
    assert "%|" not in errors and not re.search("oneDNN|cuda|^[WEF]0000", errors, re.MULTILINE), errors
    assert checkpoints.list_steps(workdir / "ckpt")[-1] == NUM_STEPS
    return workdir


def run_to_the_end(workdir, number, *, before=()):
    """Start the run again and again, with a signal at a random moment of each of the first KILLS starts."""
    rng, stopped = np.random.Generator(np.random.PCG64([int(number), len(before)])), 0
    while True:
        process = start(workdir, before=before)
        if stopped < KILLS:
            wait_for_a_row(process, workdir)
            time.sleep(rng.uniform(0, 0.5))
            if process.poll() is None:
                process.send_signal(number)
                stopped += 1
        _, errors = process.communicate()
        if process.returncode == 0:
            return stopped
        assert process.returncode == (-9 if number == signal.SIGKILL else 143), errors
        if number == signal.SIGTERM:
            assert "whose state is saved" in errors and "Traceback" not in errors
            assert f"after step {checkpoints.list_steps(workdir / 'ckpt')[-1]} of" in errors


@pytest.mark.slow
def test_runs_that_are_stopped_again_and_again_are_the_uninterrupted_one(uninterrupted, tmp_path):
    """SIGKILL, and SIGTERM to a run whose disk is so slow that it is nearly always saving; side by side."""
    jobs = {
        signal.SIGKILL: (),
        signal.SIGTERM: ("-c", SLOW_DISK),
    }
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        ends = {n: pool.submit(run_to_the_end, tmp_path / n.name, n, before=before) for n, before in jobs.items()}
    for number, end in ends.items():
        assert end.result() == KILLS, f"the run ended before the last {number.name}"
        assert_the_same_workdir(tmp_path / number.name, uninterrupted)


@pytest.mark.slow
def test_sigint_is_answered_as_sigterm_and_a_second_signal_leaves_at_once(uninterrupted, tmp_path):
    """The second one while the first one's checkpoint is written, which takes seconds on this slow disk."""
    process = start(tmp_path)
    wait_for_a_row(process, tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and "SIGINT: stopped after step" in errors, errors
    last = checkpoints.restore_latest(tmp_path / "ckpt")[0]
    process = start(tmp_path, "--config.train.checkpoint_every=0", before=("-c", SLOW_DISK.replace("0.1", "1")))
    wait_for_a_row(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    while not list((tmp_path / "ckpt").glob(".tmp-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143 and "is saved" not in errors, errors
    assert checkpoints.restore_latest(tmp_path / "ckpt")[0] == last
    process = start(tmp_path)
    assert process.communicate() and process.returncode == 0
    assert_the_same_workdir(tmp_path, uninterrupted)


@pytest.mark.slow
def test_a_signal_while_a_grid_is_drawn_is_answered_and_the_grid_drawn_later(uninterrupted, tmp_path):
    long = ("--config.sample.num_steps=1000", "--config.sample.num_images=256", "--config.sample.batch_size=256")
    whole = uninterrupted / "samples" / "step_000000000200_ema.png"
    process = start(tmp_path, *long)
    while len(rows(tmp_path) if (tmp_path / "metrics.jsonl").exists() else ()) < 200:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(2)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143 and f"after step 200 of {NUM_STEPS}, whose state is saved" in errors, errors
    assert time.monotonic() - began < 20  # the grid would take minutes
    assert checkpoints.list_steps(tmp_path / "ckpt")[-1] == 200 and not list((tmp_path / "samples").glob("*_ema.png"))
    process = start(tmp_path)
    assert process.communicate() and process.returncode == 0
    assert (tmp_path / "samples" / whole.name).read_bytes() == whole.read_bytes()
    assert_the_same_workdir(tmp_path, uninterrupted)


STUCK = """
import runpy, sys
import tensorflow as tf
from ddpm_tf.training.model import DiffusionModel
step = DiffusionModel.train_step
def stuck(self, batch):
    at = self.optimizer.iterations.value
    wait = tf.cond(at < 20, lambda: 0, lambda: tf.while_loop(lambda i: i < 1, lambda i: [i * 1], [0])[0])
    with tf.control_dependencies([wait]):
        return step(self, batch)
DiffusionModel.train_step = stuck
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_step_that_outlasts_the_grace_period_is_left_without_saving(tmp_path):
    process = start(tmp_path, "--grace_period_s=2", before=("-c", STUCK))
    while len(rows(tmp_path) if (tmp_path / "metrics.jsonl").exists() else ()) < 20:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)  # the row is written within step 20; the signal must come in the next one
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and "did not end within --grace_period_s=2; left without saving" in errors, errors
    assert checkpoints.restore_latest(tmp_path / "ckpt")[0] == 14


@pytest.mark.slow
def test_of_two_starts_on_one_workdir_one_trains_and_the_other_leaves_with_73(tmp_path):
    args = ("--config.train.num_steps=40", "--config.train.deterministic=True")  # nor does op determinism refuse any op
    processes = [start(tmp_path / "w", *args) for _ in range(2)]
    errors = {p: p.communicate()[1] for p in processes}
    first, second = sorted(processes, key=lambda p: p.returncode)
    assert (first.returncode, second.returncode) == (0, 73), errors
    assert f"process {first.pid}," in errors[second] and "Traceback" not in errors[second]


@pytest.mark.slow
def test_sampling_works_while_training_goes_on(tmp_path):
    process = start(tmp_path / "w", "--config.train.num_steps=100000")
    while not checkpoints.list_steps(tmp_path / "w" / "ckpt"):
        assert process.poll() is None
        time.sleep(0.05)
    for k in range(2):
        command = [sys.executable, "run_sample.py", f"--workdir={tmp_path / 'w'}", f"--out={tmp_path / str(k)}"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0 and (tmp_path / str(k) / "grid.png").exists(), result.stderr
    assert process.poll() is None
    process.kill()
    process.communicate()
    shutil.rmtree(tmp_path / "w")
