"""The environment variable TF_CONFIG: which workers a run has, and which of them this process is."""

import json
import os
from typing import NamedTuple

from ddpm_tf.errors import InputError


class Workers(NamedTuple):
    """addresses: host:port of every worker, the chief first. index: the place of this process among them."""

    addresses: tuple[str, ...]
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


def read_tf_config() -> Workers | None:
    """The Workers that the environment variable TF_CONFIG names, or None if it is not set.

    Raises:
        InputError: TF_CONFIG cannot be used; the message says why.
    """
    text = os.environ.get("TF_CONFIG", "").strip()
    if not text:
        return None
    example = '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}'

    def wrong(reason: str) -> InputError:
        return InputError(f"TF_CONFIG: {reason}. Expected, for example, {example}.")

    try:
        content = json.loads(text)
    except ValueError as e:
        raise wrong(f"it is no JSON ({e})") from None
    if not isinstance(content, dict) or not isinstance(content.get("cluster"), dict):
        raise wrong('"cluster" is missing or no object')
    cluster, task = content["cluster"], content.get("task")
    if unknown := sorted(set(cluster) - {"chief", "worker"}):
        raise wrong(f'"cluster" has {unknown}; expected only chief and worker')
    for job, addresses in cluster.items():
        if not isinstance(addresses, list) or not all(isinstance(a, str) and _is_address(a) for a in addresses):
            raise wrong(f'"cluster" {job!r} is no list of "host:port": {addresses!r}')
    chiefs = cluster.get("chief", [])
    if len(chiefs) > 1:
        raise wrong(f"there is one chief at most, found {len(chiefs)}")
    addresses = (*chiefs, *cluster.get("worker", []))
    if not addresses or len(set(addresses)) < len(addresses):
        raise wrong(f'"cluster" names {"an address twice" if addresses else "no worker"}')
    if not isinstance(task, dict) or task.get("type") not in list(cluster):
        raise wrong(f'"task" must have a "type" among {sorted(cluster)}, found {task!r}')
    index, count = task.get("index"), len(cluster[task["type"]])
    if type(index) is not int or not 0 <= index < count:
        raise wrong(f'"task" "index" must be within 0..{count - 1}, found {index!r}')
    return Workers(addresses, index + (len(chiefs) if task["type"] == "worker" else 0))


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536
