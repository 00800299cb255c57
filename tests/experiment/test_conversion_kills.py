"""run_convert.py, stopped by signals while it writes: nothing half-written, and the same command does the rest.

CRASH_KILLS=20 python -m pytest -m slow tests/experiment/test_conversion_kills.py      (of each kind; 1 by default)
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ddpm_tf import files
from tests.experiment.test_conversion import make_workdir, small_config

ROOT = Path(__file__).parent.parent.parent
KILLS = int(os.environ.get("CRASH_KILLS", "1"))
# Every file needs 0.2 s to reach the disk, so that writing is most of the time.
SLOW_DISK = """
import runpy, sys, time
from ddpm_tf import files
fsync = files.fsync
files.fsync = lambda path: (time.sleep(0.2), fsync(path))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WHOLE = {
    "tf1": ["model.ckpt-0.data-00000-of-00001", "model.ckpt-0.index"],
    "diffusers": ["model.ckpt-0"],
    "from": ["model.ckpt-0"],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A workdir of the release's kind, and the same for diffusers."""
    folder = tmp_path_factory.mktemp("kills")
    make_workdir(folder / "w", small_config(**{"network.ch": 64, "network.num_groups": 32}))
    finish(command("diffusers", folder / "w", folder / "hf"))
    return folder


def command(direction, source, target):
    if direction == "from":
        args = ["--from=diffusers", f"--checkpoint={source}", f"--workdir={target}"]
    else:
        args = [f"--to={direction}", f"--workdir={source}", f"--out={target}"]
    return [sys.executable, "-c", SLOW_DISK, "run_convert.py", *args]


def start(arguments):
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(arguments):
    process = start(arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.parametrize("direction", WHOLE)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_conversion_leaves_nothing_half_written(sources, tmp_path, direction, number):
    r = np.random.Generator(np.random.PCG64([int(number), len(direction)]))
    source = sources / ("hf" if direction == "from" else "w")
    stopped = 0
    for k in range(KILLS + 20):
        if k >= KILLS and stopped:
            break
        folder = tmp_path / str(k)
        folder.mkdir()
        arguments = command(direction, source, folder / "model.ckpt-0")
        process = start(arguments)
        while process.poll() is None and not any(folder.iterdir()):
            time.sleep(0.01)
        time.sleep(r.uniform(0, 0.5 / (1 + max(0, k - KILLS + 1))))  # earlier where all signals came too late
        process.send_signal(number)
        _, errors = process.communicate()
        left = sorted(p.name for p in folder.iterdir())
        temporary = [name for name in left if name.startswith(files.TEMPORARY)]
        visible = [name for name in left if name not in temporary]
        assert visible in ([], WHOLE[direction], WHOLE[direction][:1])
        if process.returncode == 0:  # the signal came too late
            continue
        stopped += 1
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), errors
        if number != signal.SIGKILL:
            assert not temporary and "Traceback" not in errors, errors
            assert re.search("SIGTERM: stopped.*start again with the same command|Stopped by SIGINT", errors)
        if visible != WHOLE[direction]:
            finish(arguments)
        assert sorted(p.name for p in folder.iterdir()) == WHOLE[direction]
    assert stopped
