"""How the absl mains start and end: flags that cannot be used leave with 2 and one message, no traceback."""

import contextlib
import gc
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from ddpm_tf import config as config_lib
from ddpm_tf.callbacks.signals import Signals
from ddpm_tf.errors import InputError, Interrupted, PeerLostError, RunError, StorageError, storage_advice

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


_SAMPLING = "How to draw (a flag that is not given: as the workdir's config says)"


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hold back what C++ writes to stderr, which no log level silences; an exception brings it out."""
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(saved, held.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _load_tensorflow() -> None:
    """Import what takes seconds; after the flags were read, so that mistakes in them are told at once."""
    with _quiet_stderr():  # the first import of TensorFlow and the first look for GPUs write a screenful
        import tensorflow as tf

        tf.config.list_physical_devices()

        from ddpm_tf import experiment  # noqa: F401
    # What was imported lives to the end. Without this the collector looks at it again and again, a tenth of the time to the
    # first step.
    gc.freeze()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # until here, that of interrupt.py


flags.DEFINE_bool("debug", False, "Show the traceback of an error.", allow_override=True)


_EARLY_CHECKS: list[Callable[[], None]] = []  # of the values of flags, without TensorFlow


def define_sampling_flags(*, without: Sequence[str] = ()) -> Callable[[], dict[str, Any]]:
    """A flag for every field of the config's `sample` section, but for those named.

    Returns:
        A function that returns {field: value} of the flags that were given.
    """
    parsers = {int: flags.IntegerParser, float: flags.FloatParser, str: flags.ArgumentParser}
    names = []
    for field in config_lib.section("sample"):
        name = field.path.partition(".")[2]
        if name in without:
            continue
        names.append(name)
        flag: flags.Flag = flags.BooleanFlag(name, None, field.doc)
        if not isinstance(field.default, bool):
            flag = flags.Flag(parsers[type(field.default)](), flags.ArgumentSerializer(), name, None, field.doc)
        flags.DEFINE_flag(flag, module_name=_SAMPLING)

    def given() -> dict[str, Any]:
        return {name: flags.FLAGS[name].value for name in names if flags.FLAGS[name].value is not None}

    # A field that is not given is the workdir's, whose num_images may be 1.
    _EARLY_CHECKS.append(lambda: config_lib.check_section("sample", {"num_images": 1} | given()))
    return given


def define_classifier_flags(*, scale: bool = True) -> Callable[[], dict[str, Any]]:
    """--classifier and, unless every request says it, --classifier_scale.

    Returns:
        A function that returns them as keywords of the jobs in `experiment`.
    """
    text: Any = flags.ArgumentSerializer()
    help = "Workdir of a classifier that guides (configs/digits_classifier.py)."
    defined: list[flags.Flag] = [flags.Flag(flags.ArgumentParser(), text, "classifier", "", help)]
    if scale:
        help = "Weight of the classifier's gradient; default: 1."
        defined.append(flags.Flag(flags.FloatParser(), text, "classifier_scale", None, help))
    for flag in defined:
        flags.DEFINE_flag(flag, module_name=_SAMPLING)
    return lambda: {flag.name: flag.value for flag in defined}


def run(main: Callable[[list[str]], None]) -> None:
    """Run main(argv) under absl; exit codes as in `errors`."""
    logging.set_verbosity(logging.INFO)
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse_flags)


def _guarded(main: Callable[[list[str]], None], argv: list[str]) -> None:
    try:
        for check in _EARLY_CHECKS:
            check()
        _load_tensorflow()
        main(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        _leave_reader_gone()
    except Interrupted as e:
        print(e, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(e.exit_code)  # a thread may be drawing a grid: Python would wait for it, or crash
    except PeerLostError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(e.exit_code)  # C++ code may still wait for the other worker: Python would wait too
    except KeyboardInterrupt:
        _leave("Stopped by SIGINT.", 130, "")
    except (RunError, OSError) as e:
        if flags.FLAGS.debug:
            raise
        if isinstance(e, OSError):
            e = StorageError(f"{e}. {storage_advice(e)}")
        _leave(str(e), e.exit_code)


@contextlib.contextmanager
def leaving_on_signal(message: str) -> Iterator[None]:
    """SIGTERM and SIGINT end the process at once, with `message`, also in the middle of a C++ call.

    It is for a block whose files are whole at every moment: nothing is tidied up. The exit code is 128 + the signal's number.
    """

    def watch() -> None:
        number = received.next()
        if number:
            os.write(2, f"\n{signal.Signals(number).name}: {message}\n".encode())
            os._exit(128 + number)

    received = Signals(lambda number, frame: None)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        received.release()


def _leave_reader_gone() -> NoReturn:
    """Whatever read our output has ended, as `head` does: no fault, and nobody to tell."""
    os._exit(128 + signal.SIGPIPE)


def _leave(message: str, code: int, prefix: str = "error: ") -> NoReturn:
    print(f"{prefix}{message}", file=sys.stderr)
    sys.exit(code)


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's own parser leaves with 1 on errors and on --help, and an unknown --config.x is a traceback there."""
    if any(a in ("--help", "-help", "-h", "--helpfull", "-helpfull", "--helpshort", "-helpshort") for a in argv[1:]):
        parts = [(sys.modules["__main__"].__doc__ or "") + "\nFlags:\n" + flags.FLAGS.main_module_help()]
        defined = flags.FLAGS.flags_by_module_dict()
        parts += [flags.FLAGS.module_help(group) for group in (_SAMPLING, __name__) if group in defined]
        if "config" in flags.FLAGS:
            parts.append(
                "\nFields of --config, with their defaults (configs/*.py change some):\n" + config_lib.help_text()
            )
        try:
            print("\n".join(parts), flush=True)
        except BrokenPipeError:
            _leave_reader_gone()
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS and flags.FLAGS["config"].present:
            config = flags.FLAGS.config
            getattr(config, "seed", None)  # a config file that could not be loaded raises here, at its first use
            config_lib.check_fields(config, "What get_config() of --config returned")
    except InputError as e:
        _leave(str(e), 2)
    except flags.Error as e:
        _leave(f"{_without_traceback(str(e))}\nTry --help.", 2)
    except SystemExit as e:  # a config file ended the program
        _leave(f"--config cannot be read: the file calls sys.exit({e.code!r}).", 2)
    except Exception as e:  # whatever the config file, which is Python, or a field of it raises
        _leave(_explain_config_error(argv, e), 2)
    if len(rest) > 1:
        _leave(f"Unexpected arguments {rest[1:]}; every setting is a flag, --name=value. Try --help.", 2)
    return rest


def _without_traceback(message: str) -> str:
    """A message of ml_collections, which may hold the traceback of a config file, with the traceback's last line alone."""
    head, found, rest = message.partition("\n\nTraceback (most recent call last):\n")
    return f"{head} {rest.strip().splitlines()[-1]}" if found and rest.strip() else message


def _explain_config_error(argv: list[str], error: Exception) -> str:
    known = {field.path for field in config_lib.FIELDS}
    given = [arg.partition("=")[2] for arg in argv[1:] if arg.lstrip("-").startswith("config=")]
    path = given[-1] if given else ""  # the last one counts
    if given and not os.path.isfile(path.partition(":")[0]):
        what = "is a folder" if os.path.isdir(path) else "is no file" if os.path.exists(path) else "does not exist"
        what = what if path else "is empty"
        return f"--config={path} {what}; expected a Python file with get_config(), as configs/digits.py."
    names = [arg.lstrip("-").partition("=")[0] for arg in argv[1:] if arg.startswith("-")]
    unknown = []
    for path in (n.removeprefix("config.") for n in names if n.startswith("config.")):
        if path not in known:
            close = config_lib.suggest(path)
            unknown.append(
                f"Unknown config field --config.{path}."
                + (f" Did you mean --config.{close}?" if close else " Try --help.")
            )
    if unknown:
        return "\n".join(unknown)
    if "has no attribute 'get_config'" in str(error):
        return f"--config={path} has no function get_config(); expected a Python file as configs/digits.py."
    return f"--config cannot be read: {type(error).__name__}: {_without_traceback(str(error).strip())}"
