"""A fault at every system call of a save that changes the disk: killed there, or told ENOSPC or EIO from there on.

A saver that is broken on purpose has to fail the same examination, which shows that it can see the fault.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddpm_tf import files
from ddpm_tf.errors import RunError
from ddpm_tf.storage import checkpoints

ROOT = Path(__file__).parent.parent.parent
CALLS = "mkdir,openat,write,fsync,rename,unlink,unlinkat,rmdir"
PASSING = "error=EIO:when={}"
KILL = "signal=KILL:when={}"
FAULTS = (
    KILL,
    "error=ENOSPC:when={}",
    "error=ENOSPC:when={}+",
    "error=EIO:when={}",
    "error=EIO:when={}+",
)


class Saver:
    """The child process of `saver.py`."""

    def __init__(self, folder):
        command = [sys.executable, "-m", "tests.crash.saver"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.good, self.folder = folder / "good", folder / "ckpt"
        self.good.mkdir()
        self.save("save", 1, folder=self.good)

    def save(self, saver, step, *strace, folder=None):
        job = {"saver": saver, "step": step, "folder": str(folder or self.folder), "strace": strace}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "refused" in answer:
            pytest.skip(f"strace cannot attach here: {answer['refused'].strip()}")
        return answer["code"], answer["trace"]

    def begin(self, is_first=False):
        """Step 1 is there, whole; or nothing is."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if is_first:
            self.folder.mkdir()
        else:
            shutil.copytree(self.good, self.folder)

    def points(self, saver, is_first=False):
        """[(system call, its number)] of a save of step 2 that change the folder."""
        self.begin(is_first)
        code, trace = self.save(saver, 2, "-y", "-e", f"trace={CALLS}")
        assert code == 0
        seen, points = {}, []
        for name, rest in re.findall(r"^(?:\[pid +\d+\] )?(\w+)\((.*)$", trace, re.MULTILINE):
            seen[name] = seen.get(name, 0) + 1
            if str(self.folder) in rest and (name != "openat" or "O_CREAT" in rest):
                points.append((name, seen[name]))
        return points

    def problems(self, saver, name, number, fault, is_first=False):
        """What is wrong after a save of step 2 with this fault; [] for a sound saver."""
        self.begin(is_first)
        code, _ = self.save(saver, 2, "-e", f"trace={name}", "-e", f"inject={name}:{fault.format(number)}")
        found = []
        if fault == PASSING and code != 0:
            found.append(f"one EIO was not tried again: left with {code}")
        if code not in ((-9,) if fault == KILL and saver == "save" else (-9, 0, 74)):
            found.append(f"left with {code}")
        try:
            step, tensors = checkpoints.restore_latest(self.folder) or (0, {"step": 0})
            before = 0 if is_first else 1  # 0: there is none, and the run begins
            if step not in ((2,) if code == 0 else (before, 2)) or tensors["step"] != step:
                found.append(f"restored step {step} after exit code {code}")
        except RunError as e:
            found.append(f"no valid checkpoint: {e}")
        for path in self.folder.glob("step_*"):
            try:
                checkpoints.verify(path)
            except RunError as e:
                found.append(f"{path.name} is there and not whole: {e}")
        files.sweep(self.folder)
        checkpoints.save(str(self.folder), 3, {"step": np.array(3)}, {}, keep=1)
        left = [p.name for p in self.folder.iterdir()]
        if left != ["step_000000000003"]:
            found.append(f"litter: {left}")
        return found


@pytest.fixture(scope="module")
def saver(tmp_path_factory):
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed (apt-get install strace)")
    saver = Saver(tmp_path_factory.mktemp("sweep"))
    yield saver
    saver.process.stdin.close()
    saver.process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_call_of_a_save_leaves_a_valid_checkpoint(saver, fault):
    points = saver.points("save")
    assert {name for name, _ in points} >= {"mkdir", "openat", "write", "fsync", "rename", "unlinkat", "rmdir"}
    assert len(points) >= 20
    for name, number in points:
        assert not saver.problems("save", name, number, fault), (name, number)


@pytest.mark.slow
def test_a_kill_in_the_first_save_leaves_it_whole_or_nothing(saver):
    points = saver.points("save", is_first=True)
    assert len(points) >= 15
    for name, number in points:
        assert not saver.problems("save", name, number, KILL, is_first=True), (name, number)


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["no_rename", "no_manifest", "pointer_first"])
def test_a_broken_saver_is_found_out(saver, broken):
    points = saver.points(broken)
    assert any(saver.problems(broken, name, number, FAULTS[0]) for name, number in points)
