"""A disk that is full, a file size limit, a mount that is read-only: one message, the right exit code, nothing lost."""

import resource
import subprocess
import sys

import numpy as np
import pytest

from ddpm_tf.storage import checkpoints
from tests.crash.test_kills import ARGS, ROOT

pytestmark = pytest.mark.slow


@pytest.fixture
def mount(tmp_path):
    """mount(options) of a tmpfs at tmp_path / "disk"; skipped where that is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {result.stderr.strip()}")
        return disk

    yield mount
    subprocess.run(["umount", str(disk)], capture_output=True)


def train(workdir, *args, limits=None, before=()):
    command = [sys.executable, *before, *ARGS, f"--workdir={workdir}", "--config.train.num_steps=60", *args]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limits)
    assert "Traceback" not in result.stderr, result.stderr
    return result


def test_a_full_disk_ends_the_run_with_74_and_it_goes_on_after_room_is_made(mount, tmp_path):
    """Sizes at which the disk is full at the start, during a later save, and while pictures or rows are written."""
    whole = tmp_path / "whole"
    assert train(whole).returncode == 0
    size = sum(f.stat().st_size for f in (whole / "ckpt" / "step_000000000060").iterdir())
    seen = set()
    for checkpoints_that_fit in (0.5, 1.4, 3.02):
        disk = mount(f"size={round(checkpoints_that_fit * size / 4096) * 4096}")
        workdir = disk / "w"
        result = train(workdir)
        assert result.returncode == 74, result.stderr
        message = result.stderr.splitlines()[-1]
        seen.add("at the start" if "30 % to spare" in message else "later")
        assert "error:" in message and ("free" in message or "No space left" in message)
        if "30 % to spare" not in message:
            assert checkpoints.restore_latest(workdir / "ckpt")[0] > 0
        assert not list(workdir.glob("ckpt/.tmp-*"))
        subprocess.run(["mount", "-o", f"remount,size={6 * size}", str(disk)], check=True)
        result = train(workdir)
        assert result.returncode == 0, result.stderr
        step, tensors = checkpoints.restore_latest(workdir / "ckpt")
        _, expected = checkpoints.restore_latest(whole / "ckpt")
        assert step == 60 and all((tensors[name] == expected[name]).all() for name in expected)
        subprocess.run(["umount", str(disk)], check=True)
    assert seen == {"at the start", "later"}


def test_a_file_size_limit_ends_the_run_with_74(tmp_path):
    def limits():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    result = train(tmp_path / "w", limits=limits)
    assert result.returncode == 74 and "File too large" in result.stderr, result.stderr
    assert not list((tmp_path / "w" / "ckpt").iterdir())
    result = train(tmp_path / "w", "--config.train.num_steps=1")
    assert result.returncode == 0 and "holds no checkpoint yet: starting at step 0" in result.stderr, result.stderr


NO_MORE_FILES = """
import resource, runpy, sys
from ddpm_tf.storage import checkpoints
save = checkpoints.save
def limited(*args, **kwargs):
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 4096))
    save(*args, **kwargs)
checkpoints.save = limited
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_limit_of_open_files_is_told_with_the_command_that_raises_it(tmp_path):
    result = train(tmp_path / "w", before=("-c", NO_MORE_FILES))
    assert result.returncode == 74 and "ulimit -n" in result.stderr, result.stderr


def test_too_little_memory_is_told_and_the_run_goes_on_with_micro_batches(tmp_path, monkeypatch):
    """Of one tensor of attention, 64 MiB, in an allocator that ends below it: some kernels crash where a small one fails."""
    np.savez(tmp_path / "data.npz", images=np.zeros((16, 32, 32, 1), np.uint8))
    workdir = tmp_path / "w"
    large = (
        f"--config.data.source=npz:{tmp_path / 'data.npz'}",
        "--config.data.image_size=32",
        "--config.data.batch_size=16",
        "--config.network.attn_resolutions=(32,)",
        "--config.network.dropout=0.0",
        "--config.train.sample_every=0",
    )
    parts = (*large, "--config.train.micro_batches=16")
    assert train(workdir, *parts, "--config.train.num_steps=1").returncode == 0
    monkeypatch.setenv("TF_MKL_ALLOC_MAX_BYTES", str(60 << 20))
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "1")  # else there is another allocator
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    result = train(workdir, *large, "--config.train.num_steps=2")
    assert result.returncode == 2, result.stderr
    message = result.stderr.splitlines()[-1]
    for part in ("memory with data.batch_size=16", "shape[16,1024,1024]", "train.micro_batches", "is kept"):
        assert part in message
    assert checkpoints.restore_latest(workdir / "ckpt")[0] == 1
    assert train(workdir, *parts, "--config.train.num_steps=2").returncode == 0


def test_a_read_only_workdir_is_refused_before_anything_is_compiled(mount):
    disk = mount("size=1m,ro")
    for workdir in (disk, disk / "new"):
        result = train(workdir)
        assert result.returncode == 73 and "cannot be written to" in result.stderr, result.stderr
        assert "Compiling" not in result.stderr
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    (disk / "w").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert train(disk / "w").returncode == 73
