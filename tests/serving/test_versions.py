"""Version folders under kills, failures and rivals."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ddpm_tf.errors import InputError, StorageError, WorkdirError
from ddpm_tf.serving.versions import choose_version, list_versions, new_version
from tests.serving.conftest import ROOT, run_python

KILLS = int(os.environ.get("EXPORT_KILLS", "4"))


def write_version(folder, version):
    with new_version(str(folder), version) as temporary:
        os.makedirs(os.path.join(temporary, "variables"))
        for name in ("saved_model.pb", "variables/data"):
            with open(os.path.join(temporary, name), "w") as f:
                f.write(name)


def names(folder):
    return sorted(os.listdir(folder))


def test_versions_count_up_from_the_newest_and_parents_are_made(tmp_path):
    folder = tmp_path / "a" / "b" / "digits"
    for expected in (1, 2):
        version = choose_version(str(folder))
        assert version == expected
        write_version(folder, version)
    write_version(folder, choose_version(str(folder), 10))
    (folder / "9x").mkdir()
    assert list_versions(str(folder)) == [1, 2, 10] and choose_version(str(folder)) == 11
    assert (folder / "10" / "variables" / "data").read_text() == "variables/data"


def test_versions_that_cannot_be_are_refused(tmp_path):
    write_version(tmp_path, 3)
    with pytest.raises(InputError, match="already has a version 3, and nothing is written over.* to write 4"):
        choose_version(str(tmp_path), 3)
    for version in (0, -1, 2**63):
        with pytest.raises(InputError, match="must be within"):
            choose_version(str(tmp_path), version)
    with pytest.raises(InputError, match="is a file"):
        choose_version(str(tmp_path / "3" / "saved_model.pb"))
    with pytest.raises(WorkdirError, match="cannot be written to"):
        write_version(tmp_path / "3" / "saved_model.pb" / "digits", 1)


def test_a_rival_that_was_faster_is_not_written_over(tmp_path):
    with pytest.raises(InputError, match="Another export wrote"):
        with new_version(str(tmp_path), 1):
            (tmp_path / "1").mkdir()
            (tmp_path / "1" / "mine").touch()
    assert names(tmp_path) == ["1"] and names(tmp_path / "1") == ["mine"]


@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename"])
def test_a_failure_of_the_file_system_leaves_nothing(tmp_path, monkeypatch, call):
    def fail(*_):
        raise OSError(28, "No space left on device")

    real = os.mkdir
    monkeypatch.setattr(
        os, call, fail if call != "mkdir" else lambda path, *a: (fail if "variables" in path else real)(path, *a)
    )
    with pytest.raises(StorageError, match="Version 1 cannot be written .*No space left"):
        write_version(tmp_path, 1)
    assert names(tmp_path) == []


def test_a_failed_export_leaves_none_of_the_folders_that_it_made(tmp_path):
    for error, seen in (
        (InputError("x"), InputError),
        (OSError(28, "x"), StorageError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        with pytest.raises(seen), new_version(str(tmp_path / "models" / "digits"), 1):
            raise error
        assert names(tmp_path) == []
    (tmp_path / "models" / "digits").mkdir(parents=True)  # the user's
    with pytest.raises(InputError), new_version(str(tmp_path / "models" / "digits"), 1):
        raise InputError("x")
    assert names(tmp_path / "models") == ["digits"]


def test_what_a_killed_export_left_is_removed_and_what_a_running_one_fills_is_not(tmp_path):
    (tmp_path / ".tmp-1-of-a-killed-one" / "variables").mkdir(parents=True)
    with new_version(str(tmp_path), 1) as running:
        write_version(tmp_path, 2)
        assert names(tmp_path) == [os.path.basename(running), "2"]
    assert names(tmp_path) == ["1", "2"]


KILLED_AT_EVERY_CALL = """
import os, signal, sys
import tensorflow
from tests.serving.test_versions import write_version
for k in range(1, 10_000):
    folder = os.path.join(sys.argv[1], str(k))
    child = os.fork()
    if child == 0:
        calls = 0
        def count(frame, event, argument):
            global calls
            if event in ("c_call", "c_return"):
                calls += 1
                if calls == k:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.setprofile(count)
        write_version(folder, 7)
        sys.setprofile(None)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
print(k)
"""


@pytest.mark.slow
def test_a_kill_at_any_call_leaves_a_whole_version_or_none(tmp_path):
    moments = int(run_python("-c", KILLED_AT_EVERY_CALL, tmp_path, cwd=ROOT))
    whole = 0
    for k in range(1, moments):
        folder = tmp_path / str(k)
        if list_versions(str(folder)):
            whole += 1
            assert [n for n in names(folder) if not n.startswith(".")] == ["7"]
            for name in ("saved_model.pb", "variables/data"):
                assert (folder / "7" / name).read_text() == name
    assert moments > 50 and 1 <= whole < moments / 2  # killed before the rename and after it


@pytest.mark.slow
def test_a_kill_of_an_export_leaves_no_version_that_a_polling_server_would_load(workdir, tmp_path):
    out, random = tmp_path / "models" / "digits", np.random.Generator(np.random.PCG64(0))
    command = [sys.executable, "run_export.py", f"--workdir={workdir}", f"--out={out}"]
    seen, killed, duration = 0, 0, None
    while duration is None or killed < KILLS:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while process.poll() is None and not (out.exists() and any(n.startswith(".tmp-") for n in names(out))):
            time.sleep(0.005)  # the start of Python and TensorFlow is no moment of an export
        start = time.monotonic()
        if duration is not None:  # the first one is whole, and tells how long writing takes
            time.sleep(random.uniform(0, 1.1 * duration))
            process.send_signal(signal.SIGKILL)
        output = process.communicate()[0]
        assert process.returncode in ((0,) if duration is None else (0, -9)), output
        duration = duration or time.monotonic() - start
        killed += process.returncode == -9
        versions = list_versions(str(out))
        for version in versions[seen:]:
            folder = out / str(version)
            files = json.loads((folder / "model_card.json").read_text())["files"]
            found = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
            assert found.pop("model_card.json") and found == {name: f["size"] for name, f in files.items()}
        seen = len(versions)
        assert len([n for n in names(out) if not n.isdigit()]) <= 1  # each export removes what the one before left
    assert killed == KILLS
