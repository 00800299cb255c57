"""Runs that are killed or stopped at random moments, and started again by the same command.

CRASH_KILLS=200 python -m pytest -m slow tests/crash      (the full size; 6 of each signal by default)
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ddpm_tf.training import checkpoints

ROOT = Path(__file__).parent.parent.parent
KILLS = int(os.environ.get("CRASH_KILLS", "6"))
NUM_STEPS = 600
ARGS = (
    "run_train.py", "--config=configs/digits.py", "--config.data.batch_size=4", "--config.data.random_flip=True",
    "--config.network.ch_mult=(1,)", "--config.network.attn_resolutions=()", "--config.network.dropout=0.1",
    f"--config.train.num_steps={NUM_STEPS}", "--config.train.log_every=1", "--config.train.checkpoint_every=7",
    "--config.train.sample_every=40", "--config.train.jit_compile=off", "--config.sample.num_steps=2",
    "--config.sample.num_images=2",
)  # fmt: skip


def start(workdir):
    command = [sys.executable, *ARGS, f"--workdir={workdir}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rows(workdir):
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "images_per_s")} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "w"
    process = start(workdir)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_stopped_again_and_again_is_the_uninterrupted_one(uninterrupted, tmp_path, number):
    rng, workdir, stopped = np.random.Generator(np.random.PCG64(int(number))), tmp_path / "w", 0
    while True:
        process = start(workdir)
        if stopped < KILLS:
            # From the first step on: the start of Python and TensorFlow is no moment of training.
            log, began = workdir / "metrics.jsonl", time.monotonic()
            before = log.stat().st_size if log.exists() else 0
            while process.poll() is None and (not log.exists() or log.stat().st_size == before):
                assert time.monotonic() - began < 120
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1.0))
            if process.poll() is None:
                process.send_signal(number)
                stopped += 1
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == (-9 if number == signal.SIGKILL else 143), errors
        if number == signal.SIGTERM:
            assert "whose state is saved" in errors and "Traceback" not in errors
            assert f"after step {checkpoints.list_steps(workdir / 'ckpt')[-1]} of" in errors
    assert stopped == KILLS
    (step, tensors), (_, expected) = (checkpoints.restore_latest(w / "ckpt") for w in (workdir, uninterrupted))
    assert step == NUM_STEPS and tensors.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(tensors[name], expected[name], err_msg=name)
    assert rows(workdir) == rows(uninterrupted)
    litter = [p.name for p in (workdir / "ckpt").iterdir() if not p.name.startswith("step_")]
    assert not litter and len(list((workdir / "ckpt").iterdir())) == 3


@pytest.mark.slow
def test_a_second_start_on_the_workdir_leaves_with_73_and_names_the_first(tmp_path):
    first = start(tmp_path / "w")
    while not (tmp_path / "w" / ".lock").exists() or not (tmp_path / "w" / ".lock").read_text():
        time.sleep(0.05)
    second = start(tmp_path / "w")
    _, errors = second.communicate()
    assert second.returncode == 73 and f"process {first.pid}," in errors and "Traceback" not in errors
    first.kill()
    first.wait()
