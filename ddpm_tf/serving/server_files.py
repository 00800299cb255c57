"""The files that start a model server, written beside the models: what it loads, batching, Docker Compose, a proxy.

Their texts are in templates/. The % operator fills them in, because Docker Compose and nginx have their own use for $.
"""

import importlib.resources
import os
import re

from absl import logging

from ddpm_tf import files
from ddpm_tf.errors import InputError, StorageError
from ddpm_tf.paths import check_entries

# The newest version of TensorFlow Serving that we know of. TF_SERVING_VERSION in the environment replaces it.
SERVING_VERSION = "2.20.0"
_FILES = ("models.config", "batching.config", "docker-compose.yml", "nginx.conf")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def check_name(name: str) -> None:
    """Check that a model's name can stand in an address and in the server's files.

    Raises:
        InputError
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"The model's name must be letters, digits, '_', '.' and '-', and must not start with '.' or '-'; "
            f"found {name!r}."
        )


def write_server_files(folder: str, name: str, *, max_batch: int) -> tuple[list[str], list[str]]:
    """Write models.config, batching.config, docker-compose.yml and nginx.conf beside a model. Existing files are kept.

    Args:
        folder: the models folder, which holds NAME/<version>/.
        name: NAME.
        max_batch: the most images of one request, as the model was exported.

    Returns:
        (written, kept): names of files. The kept files existed with other content, and were left as they are.

    Raises:
        InputError: `name` cannot stand in an address and in these files, `max_batch` is below 1, or an existing
            batching.config merges more than `max_batch` images, which the model would refuse.
        StorageError: a file cannot be written.
    """
    check_name(name)
    if max_batch < 1:
        raise InputError(f"max_batch must be at least 1, found {max_batch}.")
    check_server_files(folder, max_batch)
    written: list[str] = []
    kept: list[str] = []
    for file_name, text in _texts(name, max_batch).items():
        path = os.path.join(folder, file_name)
        if os.path.lexists(path):
            kept += [file_name] if _read(path) != text else []
            continue
        try:
            files.write_text(path, text)
        except OSError as e:
            raise StorageError(f"{path} cannot be written: {e}.") from e
        written.append(file_name)
    if kept:
        logging.warning(
            "%s in %s: exists with other content, and was left alone. Check that it serves this model (name %s, "
            "max_batch %d), or move it away and export again.",
            ", ".join(kept),
            folder,
            name,
            max_batch,
        )
    return written, kept


def check_server_files(folder: str, max_batch: int) -> None:
    """Refuse existing files that could not stay beside a model exported with `max_batch`; write nothing.

    Raises:
        InputError: something that is no file has the name of one, or batching.config merges more than `max_batch` images.
    """
    check_entries(folder, dict.fromkeys(_FILES, False))
    path = os.path.join(folder, "batching.config")
    text = _read(path) if os.path.isfile(path) else ""
    match = re.search(r"^\s*max_batch_size\s*{\s*value:\s*(\d+)", text, re.MULTILINE)
    if match and int(match[1]) > max_batch:
        raise InputError(
            f"{path} merges up to {match[1]} images, but a model exported with --max_batch={max_batch} refuses more than "
            f"{max_batch}. Lower max_batch_size and allowed_batch_sizes in this file, move it away, or export with "
            f"--max_batch={match[1]}."
        )


def _texts(name: str, max_batch: int) -> dict[str, str]:
    """{file name: content}."""
    allowed = "\n".join(f"allowed_batch_sizes: {size}" for size in allowed_batch_sizes(max_batch))
    values = {
        "name": name,
        "pattern": re.escape(name),
        "max_batch": max_batch,
        "allowed": allowed,
        "version": SERVING_VERSION,
    }
    templates = importlib.resources.files("ddpm_tf.serving") / "templates"
    return {file_name: (templates / file_name).read_text(encoding="utf-8") % values for file_name in _FILES}


def allowed_batch_sizes(max_batch: int) -> list[int]:
    """The powers of two below max_batch, and max_batch."""
    sizes = [2**k for k in range(max_batch.bit_length()) if 2**k < max_batch]
    return [*sizes, max_batch]


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as f:
        return f.read()
