"""Saves checkpoints of a few numbers in children of its own, one per line of its input: support of test_sweep.py.

Importing TensorFlow takes seconds and a save milliseconds, so the import is shared by fork, before any op has run.
A line is JSON: {"folder", "saver", "step", "strace"}; the answer is the child's exit code and what strace wrote.
"""

import json
import os
import shutil
import subprocess
import sys
import types

import numpy as np

from ddpm_tf.errors import RunError
from ddpm_tf.storage import checkpoints

TENSORS = {"network/a": np.arange(6, dtype=np.float32).reshape(2, 3)}


def save(folder, step):
    checkpoints.save(folder, step, {**TENSORS, "step": np.array(step)}, {}, keep=1)


def no_rename(folder, step):
    """Writes into the final folder."""
    path = checkpoints.step_folder(folder, step)
    os.mkdir(path)
    checkpoints.fill(path, {**TENSORS, "step": np.array(step)}, {})
    checkpoints.prune(folder, step, 1)


def no_manifest(folder, step):
    """Renames a folder without manifest, and does not look at it."""
    fill = checkpoints.fill

    def without(temporary, *args):
        fill(temporary, *args)
        os.unlink(os.path.join(temporary, "MANIFEST.json"))

    checkpoints.fill, checkpoints.verify = without, lambda path: None
    save(folder, step)


def pointer_first(folder, step):
    """Lets readers go to the new checkpoint before it is filled: the old one is deleted first."""
    for old in checkpoints.list_steps(folder):
        shutil.rmtree(checkpoints.step_folder(folder, old))
    no_rename(folder, step)


SAVERS = {f.__name__: f for f in (save, no_rename, no_manifest, pointer_first)}


def child(job, go):
    checkpoints.time = types.SimpleNamespace(sleep=lambda seconds: None)
    os.read(go, 1)
    try:
        SAVERS[job["saver"]](job["folder"], job["step"])
    except RunError as e:
        os._exit(e.exit_code)
    os._exit(0)


def run(job):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        child(job, read)
    os.close(read)
    tracer = None
    if job["strace"]:
        command = ["strace", "-f", "-p", str(pid), *job["strace"]]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        first = tracer.stderr.readline()
        if "attached" not in first:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            return {"refused": first}
    os.write(write, b"x")
    os.close(write)
    _, status = os.waitpid(pid, 0)
    trace = tracer.communicate()[1] if tracer else ""
    return {"code": os.waitstatus_to_exitcode(status), "trace": trace}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
