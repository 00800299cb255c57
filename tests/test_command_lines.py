"""Odd command lines: each leaves with 0, or with a code and a message that say what was wrong.

All 2,000 lines of each program: DDPM_TF_LINES=2000 python -m pytest -m slow -n0 tests/test_command_lines.py
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = ("run_train.py", "run_sample.py", "run_export.py", "run_convert.py")


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_no_odd_command_line_shows_a_traceback(program):
    lines = os.environ.get("DDPM_TF_LINES", "400")
    command = [sys.executable, "-m", "tests.command_lines", program, f"--lines={lines}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_during_the_imports_is_one_line(program):
    for seconds in (0.2, 1.0):
        process = subprocess.Popen(
            [sys.executable, program, "--workdir=/nonexistent"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
        assert (process.returncode, stderr) == (130, "Stopped by SIGINT.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_images=1000000000000"], "sample.num_images must be at most 100,000,000, found 1000000000000"),
        (["--batch_size=1000000000"], "sample.batch_size must be at most 1,000,000"),
        (["--seed=9223372036854775807", "--num_images=2"], "choose a smaller sample.seed"),
        (["--eta=nan"], "sample.eta must be"),
        (["--seed=0.9"], "0.9"),
        (["--num_imagse=3"], "Unknown command line flag 'num_imagse'"),
    ],
)
def test_bad_values_are_told_before_tensorflow_is_loaded(arguments, message):
    result = without_tensorflow(*arguments)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_the_last_seed_is_not_refused_before_the_workdir_says_how_many_images_there_are():
    assert "import of tensorflow halted" in without_tensorflow("--seed=9223372036854775807").stderr


def without_tensorflow(*arguments):
    """run_sample.py where the import of TensorFlow fails."""
    script = "import sys, runpy; sys.modules['tensorflow'] = None; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", f"import sys; sys.argv = sys.argv[1:]; {script}", "run_sample.py", "--workdir=w"]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_help_that_nobody_reads_to_its_end_is_no_fault():
    process = subprocess.Popen(
        [sys.executable, "run_train.py", "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 128 + signal.SIGPIPE
