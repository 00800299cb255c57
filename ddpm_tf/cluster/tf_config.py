"""The environment variable TF_CONFIG: which workers a run has, and which one this process is."""

import json
import os
from typing import NamedTuple

from ddpm_tf.errors import InputError


class Workers(NamedTuple):
    """addresses: host:port of every worker, the chief first; index: which one this process is."""

    addresses: tuple
    index: int


def read_tf_config():
    """The Workers that the environment variable TF_CONFIG names, or None where it is not set.

    Raises:
        InputError: naming what is wrong in it.
    """
    text = os.environ.get("TF_CONFIG", "").strip()
    if not text:
        return None
    example = '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}'

    def wrong(what):
        return InputError(f"TF_CONFIG: {what}. Expected, for example, {example}.")

    try:
        found = json.loads(text)
    except ValueError as e:
        raise wrong(f"it is no JSON ({e})") from None
    if not isinstance(found, dict) or not isinstance(found.get("cluster"), dict):
        raise wrong('"cluster" is missing or no object')
    cluster, task = found["cluster"], found.get("task")
    if unknown := sorted(set(cluster) - {"chief", "worker"}):
        raise wrong(f'"cluster" has {unknown}; chief and worker are known')
    for job, addresses in cluster.items():
        if not isinstance(addresses, list) or not all(isinstance(a, str) and _is_address(a) for a in addresses):
            raise wrong(f'"cluster" {job!r} is no list of "host:port": {addresses!r}')
    if len(cluster.get("chief", [])) > 1:
        raise wrong(f"there is one chief at most, found {len(cluster['chief'])}")
    addresses = (*cluster.get("chief", []), *cluster.get("worker", []))
    if not addresses or len(set(addresses)) < len(addresses):
        raise wrong(f'"cluster" names {"an address twice" if addresses else "no worker"}')
    if not isinstance(task, dict) or task.get("type") not in list(cluster):
        raise wrong(f'"task" must have a "type" among {sorted(cluster)}, found {task!r}')
    index = task.get("index")
    if type(index) is not int or not 0 <= index < len(cluster[task["type"]]):
        raise wrong(f'"task" "index" must be within 0..{len(cluster[task["type"]]) - 1}, found {index!r}')
    return Workers(addresses, index + (len(cluster.get("chief", [])) if task["type"] == "worker" else 0))


def _is_address(text):
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536
