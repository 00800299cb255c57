"""Odd command lines for one of the programs, in one process: what each of them leaves with.

  python -m tests.command_lines run_train.py --lines=2000 --seed=0

Flags are parsed and checked as in the program. The jobs behind it are replaced by their checks, so that a line takes
milliseconds. Ends with 1 and the lines at fault: those that raise what no user should see, or take more than 5 seconds.
"""

import argparse
import contextlib
import importlib
import io
import os
import pathlib
import random
import sys
import tempfile
import time
import traceback

from absl import flags
from absl.testing import flagsaver

from ddpm_tf import app, builders, experiment, files
from ddpm_tf import config as config_lib
from ddpm_tf.errors import RunError
from ddpm_tf.experiment.inference import check_classifier_scale, with_sampling
from ddpm_tf.paths import check_local

LIMIT_S = 5.0
VALUES = (
    "", "0", "-1", "1", "2", "3.5", "1e400", "nan", "inf", "-inf", "1e-400", "9223372036854775807", "9223372036854775808",
    "-9223372036854775809", "1000000000000", "1" + "0" * 400, "9" * 5000, "0x10", "1_000", "true", "False", "None", "null",
    "[]", "()", "(1,)", "(1,2,2,2)", "(1,'a')", "{}", "{'a': 1}", "lambda: 0", "__import__('os')", "ddim", "ddpm", "linaer",
    "uniform", "ünïcode", "日本語", "\U0001f600", "a\nb", "a\tb", "\udcff", " ", "'", '"', "\\", "%s%n", "$(true)", "--", "-",
    "=", "a=b", "folder:/nonexistent", "tfds:", "npz:", ":", "gs://b/w", "file:///tmp/x", "/dev/null", "/etc/passwd", ".", "..",
    "x" * 5000, "1,2", "3,3", "1,", "-1,9223372036854775808", "0.5", "all", "0,all", "٣,1", "docs", "README.md", "tests/data",
)  # fmt: skip
CONFIGS = {
    "raises.py": "def get_config():\n    raise RuntimeError('from the config')\n",
    "exits.py": "import sys\nsys.exit(3)\n",
    "syntax.py": "def get_config(:\n",
    "empty.py": "",
    "none.py": "def get_config():\n    return None\n",
    "number.py": "def get_config():\n    return 3\n",
    "dict.py": "def get_config():\n    return {'a': 1}\n",
    "other.py": "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({'a': 1})\n",
    "nul.py": "\0",
    "imports.py": "import no_such_module\n",
    "argument.py": "def get_config(name):\n    return None\n",
}


def odd_line(rng, names, folder):
    """One command line's arguments."""
    arguments = []
    if "config" in names and rng.random() < 0.9:
        odd = [
            *(folder / name for name in CONFIGS),
            folder,
            folder / "missing.py",
            "",
            "configs",
            "README.md",
            "/dev/null",
        ]
        arguments.append(
            f"--config={rng.choice(odd) if rng.random() < 0.3 else rng.choice(['configs/digits.py'] * 5 + odd)}"
        )
    if {"workdir", "out"} <= set(
        names
    ) and rng.random() < 0.7:  # else nearly every line ends where one of them is missing
        arguments += ["--workdir=w", f"--out={folder / 'out'}"]
    if "dry_run" in names and rng.random() < 0.7:
        arguments.append("--dry_run")
    for _ in range(rng.randrange(6)):
        if "config" in names and rng.random() < 0.6:
            name = f"config.{rng.choice(config_lib.FIELDS).path}"
            if rng.random() < 0.1:
                name = rng.choice(
                    [name[:-1], name + ".x", "config.", "config..a", "config.data", name.upper(), "config.__class__"]
                )
        else:
            name = rng.choice(names)
            if rng.random() < 0.1:
                name = rng.choice([name[:-1], "no" + name, name * 2, name.upper()])
        dashes = rng.choice(["--"] * 8 + ["-", "---", ""])
        value = rng.choice(VALUES)
        if rng.random() < 0.2:  # a valid value, mutilated
            field = rng.choice(config_lib.FIELDS)
            value = str(field.default)
            at = rng.randrange(len(value) + 1)
            value = value[:at] + chr(rng.choice([0x30, 0x2D, 0x2E, 0x65, 0xE9, 0x2C, 0x28])) + value[at:]
        arguments += rng.choice([[f"{dashes}{name}={value}"]] * 8 + [[f"{dashes}{name}"], [f"{dashes}{name}", value]])
    if rng.random() < 0.1:
        arguments.append(rng.choice(VALUES))
    rng.shuffle(arguments)
    return arguments


def replace_jobs():
    """Only what the jobs check at once, without data, networks or workdirs."""

    def check_config(config, *_, **__):
        builders.check(config)
        return ""

    def check_sampling(*_, settings, classifier="", classifier_scale=None, edit=experiment.Edit(), **__):  # noqa: B008
        check_classifier_scale(classifier, classifier_scale)
        config = config_lib.default()
        config.train.num_steps = 5000
        with_sampling(config, edit.settings(dict(settings)))
        return ""

    def check_pictures(workdir, show, *, out, **given):
        check_local(out, "--out")
        files.check_new_folder(out, "--out")
        show.check()
        return check_sampling(workdir, **given)

    experiment.train = experiment.dry_run = check_config
    experiment.sample_images = experiment.export = check_sampling
    experiment.show_pictures = check_pictures
    experiment.import_tf1 = lambda checkpoint, config, *_, **__: check_config(config)
    experiment.import_diffusers = lambda *_, config=None, **__: check_config(config) if config is not None else ""
    experiment.export_weights = lambda *_, **__: ""


def fault(main, argv):
    """What is wrong with how a command line ends, or None."""
    out, start = io.StringIO(), time.monotonic()
    problem = None
    with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            app._parse_flags(argv)
            for check in app._EARLY_CHECKS:
                check()
            main(argv)
        except SystemExit as e:
            if e.code not in (0, 2):
                problem = f"left with {e.code}"
            elif e.code == 2 and not out.getvalue().strip():
                problem = "left with 2 and without a word"
        except RunError as e:
            if e.exit_code == 1 or not str(e).strip():
                problem = f"{type(e).__name__} without an exit code of its own or without a word"
        except BaseException:
            problem = traceback.format_exc(limit=-4)
    if problem is None and "Traceback" in out.getvalue():
        problem = "showed a traceback"
    if problem is None and time.monotonic() - start > LIMIT_S:
        problem = f"took {time.monotonic() - start:.1f} s"
    return problem


def run(program, lines, seed):
    """(number of lines, [(line, fault)])."""
    module = importlib.import_module(program.removesuffix(".py"))
    names = [f.name for f in flags.FLAGS.get_flags_for_module(module.__name__)]
    names += [f.name for f in flags.FLAGS.flags_by_module_dict().get(app._SAMPLING, [])]
    # absl gives everything to the module that runs as a program.
    names = names or [n for n in flags.FLAGS if n in pathlib.Path(program).read_text()]
    replace_jobs()
    rng, faults = random.Random(f"{program} {seed}"), []
    with tempfile.TemporaryDirectory() as folder:
        for name, text in CONFIGS.items():
            pathlib.Path(folder, name).write_text(text)
        for _ in range(lines):
            line = odd_line(rng, names, pathlib.Path(folder))
            if any(word.lstrip("-").partition("=")[0] in ("workdir", "out") for word in line):
                line = [w for w in line if not w.lstrip("-").startswith("debug")]
            problem = fault(module.main, [program, *line])
            if problem:
                faults.append((line, problem))
    return faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--lines", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.argv = sys.argv[:1]
    os.chdir(pathlib.Path(__file__).parent.parent)
    found = run(arguments.program, arguments.lines, arguments.seed)
    for line, problem in found[:20]:
        print(f"{[w[:100] for w in line]}\n{problem}\n")
    print(f"{arguments.program}: {arguments.lines} lines, {len(found)} at fault.")
    sys.exit(bool(found))
