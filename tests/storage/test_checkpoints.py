import errno
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from ddpm_tf import __version__, files
from ddpm_tf.callbacks import saving
from ddpm_tf.errors import InputError, NoValidCheckpointError, NumericsError, StorageError, WorkdirError
from ddpm_tf.storage import checkpoints
from ddpm_tf.storage.checkpoint_folder import FORMAT, MANIFEST_FORMAT
from ddpm_tf.storage.workdir import locked

CORRUPTIONS = int(os.environ.get("CRASH_CORRUPTIONS", "100"))
LOSS_SCALE = {"loss_scale/scale": np.array(8, np.float32), "loss_scale/finite_steps": np.array(5)}
TENSORS = {"network/a": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.array(7), **LOSS_SCALE}


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def save(folder, *steps, keep=3):
    os.makedirs(folder, exist_ok=True)
    for step in steps:
        checkpoints.save(str(folder), step, {**TENSORS, "step": np.array(step)}, {"version": "x"}, keep=keep)


def test_saving_and_restoring_is_the_identity(tmp_path):
    assert checkpoints.restore_latest(tmp_path / "none") is None
    save(tmp_path, 7)
    step, tensors = checkpoints.restore_latest(tmp_path)
    assert step == 7 and tensors.keys() == TENSORS.keys()
    np.testing.assert_array_equal(tensors["network/a"], TENSORS["network/a"])
    assert names(tmp_path / "step_000000000007") == [
        "MANIFEST.json",
        "meta.json",
        "state.data-00000-of-00001",
        "state.index",
    ]
    assert json.loads((tmp_path / "step_000000000007" / "meta.json").read_text())["format"] == FORMAT
    manifest = json.loads((tmp_path / "step_000000000007" / "MANIFEST.json").read_text())
    assert (manifest["format"], manifest["version"]) == (MANIFEST_FORMAT, __version__)
    assert manifest["files"].keys() == {"meta.json", "state.data-00000-of-00001", "state.index"}


def test_the_newest_are_kept_and_litter_is_swept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert names(tmp_path) == ["step_000000000003", "step_000000000004"]
    for name in (".tmp-5-x", ".trash-1-y"):
        shutil.copytree(tmp_path / "step_000000000003", tmp_path / name)
    assert checkpoints.restore_latest(tmp_path)[0] == 4
    files.sweep(tmp_path)
    assert names(tmp_path) == ["step_000000000003", "step_000000000004"]


def corrupt(path, rng):
    """One random corruption of one random file of a checkpoint folder; returns what was done."""
    file = rng.choice(sorted(path.iterdir()))
    kind = rng.choice(["flip", "cut", "empty", "remove", "grow"])
    data = bytearray(file.read_bytes())
    if kind == "flip":
        # The manifest's head may become the name of another version, which nothing depends on, or a newer format, which is
        # refused.
        first = data.find(b'"files"') if file.name == "MANIFEST.json" else 0
        data[rng.integers(first, len(data))] ^= 1 << rng.integers(8)
    elif kind == "cut":
        del data[rng.integers(len(data)) :]
    elif kind == "empty":
        data.clear()
    elif kind == "grow":
        data += b"x"
    file.unlink() if kind == "remove" else file.write_bytes(data)
    return f"{kind} {file.name}"


def test_random_corruptions_are_detected_and_the_one_before_is_used(tmp_path):
    rng = np.random.Generator(np.random.PCG64(0))
    save(tmp_path / "good", 1, 2)
    for k in range(CORRUPTIONS):
        folder = tmp_path / str(k)
        shutil.copytree(tmp_path / "good", folder)
        done = corrupt(folder / "step_000000000002", rng)
        step, tensors = checkpoints.restore_latest(folder)
        assert step == 1 and tensors["step"] == 1, done
        shutil.rmtree(folder)


def test_checkpoints_of_multiples_are_kept_for_good(tmp_path):
    for step in range(1, 10):
        checkpoints.save(str(tmp_path), step, TENSORS, {}, keep=2, keep_every=4)
    assert checkpoints.list_steps(tmp_path) == [4, 8, 9]


def test_a_newer_one_that_could_not_be_read_does_not_count(tmp_path):
    """The run went on from step 3; that of step 9 may be read another time."""
    save(tmp_path, 9)
    for step in (3, 4, 5):
        checkpoints.save(str(tmp_path), step, TENSORS, {}, keep=2)
    assert checkpoints.list_steps(tmp_path) == [4, 5, 9]


def test_older_ones_stay_until_the_new_one_has_been_verified(tmp_path, monkeypatch):
    def bad(path):
        raise InputError(f"{path} has other contents than when it was written (SHA-256).")

    save(tmp_path, 1)
    monkeypatch.setattr(checkpoints.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(checkpoints, "verify", bad)
    with pytest.raises(StorageError, match="other contents"):
        checkpoints.save(str(tmp_path), 2, TENSORS, {}, keep=1)
    assert "step_000000000001" in names(tmp_path)


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    now, saved = [0.0], []
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    callback = saving.Checkpoints(
        0, folder=str(tmp_path), every=0, minutes=2, num_steps=10**9, keep=3, keep_every=0, meta={}
    )
    callback.set_model(types.SimpleNamespace(state=lambda: {}))
    monkeypatch.setattr(saving.checkpoints, "save", lambda folder, step, *args, **kwargs: saved.append(step))
    for step in range(1, 12):  # half a minute each
        now[0] += 30
        callback.on_step(step, None)
    callback.wait()
    assert saved == [4, 8]


def test_only_the_trainer_renames_what_does_not_verify(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "step_000000000002" / "state.index").unlink()
    checkpoints.restore_latest(tmp_path)
    assert "step_000000000002" in names(tmp_path)
    checkpoints.restore_latest(tmp_path, quarantine=True)
    assert names(tmp_path)[0].startswith("corrupt-2-") and names(tmp_path)[1:] == ["step_000000000001"]


def test_no_valid_checkpoint_is_an_error_and_not_a_start_at_zero(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_000000000001" / "state.index").write_bytes(b"")
    with pytest.raises(NoValidCheckpointError, match="step 1: .*state.index has 0 bytes, expected") as e:
        checkpoints.restore_latest(tmp_path)
    assert e.value.exit_code == 76


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(NumericsError, match="network/a is not finite after step 2") as e:
        checkpoints.save(str(tmp_path), 2, {"network/a": np.array([1.0, np.nan])}, {}, keep=1)
    assert e.value.exit_code == 70 and names(tmp_path) == ["step_000000000001"]


def test_a_full_disk_leaves_the_last_checkpoint_and_no_litter(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left.*It needs \d+ bytes; [\d,]+ are free") as e:
        save(tmp_path, 2)
    assert e.value.exit_code == 74 and names(tmp_path) == ["step_000000000001"]
    monkeypatch.undo()
    save(tmp_path, 2)
    assert checkpoints.restore_latest(tmp_path)[0] == 2


def test_a_passing_fault_is_tried_again(tmp_path, monkeypatch):
    faults, fsync = [OSError(errno.EIO, "Input/output error")] * 2, files.fsync
    monkeypatch.setattr(checkpoints.time, "sleep", lambda seconds: None)

    def flaky(path):
        if faults:
            raise faults.pop()
        fsync(path)

    monkeypatch.setattr(files, "fsync", flaky)
    save(tmp_path, 1)
    assert names(tmp_path) == ["step_000000000001"] and not faults


def test_files_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    events, fsync, rename = [], files.fsync, os.rename
    monkeypatch.setattr(files, "fsync", lambda p: (events.append(("fsync", Path(p).name)), fsync(p)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(("rename", Path(b).name)), rename(a, b)))
    save(tmp_path / "ckpt", 1)
    kinds = [kind for kind, _ in events]
    synced = {name for kind, name in events[: kinds.index("rename")]}
    assert {"state.index", "state.data-00000-of-00001", "meta.json", "MANIFEST.json"} < synced
    assert any(name.startswith(".tmp-step_000000000001-") for name in synced)
    assert events[kinds.index("rename") :] == [("rename", "step_000000000001"), ("fsync", "ckpt")]


def test_the_second_trainer_is_told_who_is_first(tmp_path):
    with locked(str(tmp_path)):
        with pytest.raises(
            WorkdirError, match=f"in use by another training: host .*, process {os.getpid()}, started"
        ) as e:
            with locked(str(tmp_path)):
                pass
        assert e.value.exit_code == 73
    for probe in (".tmp-probe", ".tmp-probe-renamed"):  # of a start that was killed while it tried to write
        (tmp_path / probe).touch()
    with locked(str(tmp_path)):  # freed
        assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.slow
def test_a_killed_trainer_frees_its_lock(tmp_path):
    code = """
import sys, time
from ddpm_tf.storage.workdir import locked
with locked(sys.argv[1]):
    print('held', flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(WorkdirError, match=f"process {child.pid},"), locked(str(tmp_path)):
        pass
    child.kill()
    child.wait()
    with locked(str(tmp_path)):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_a_workdir_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(WorkdirError, match="cannot be written to: .*Permission denied"), locked(str(tmp_path)):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(WorkdirError, match="cannot be written to"), locked(str(tmp_path / "file" / "w")):
        pass
