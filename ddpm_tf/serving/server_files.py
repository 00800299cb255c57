"""The files that a model server is started with, written beside the models: what to load, batching, compose, a proxy."""

import os
import re

from absl import logging

from ddpm_tf.errors import InputError, StorageError
from ddpm_tf.files import write_text

# The newest version of TensorFlow Serving that is known to exist; the environment's TF_SERVING_VERSION takes another.
SERVING_VERSION = "2.20.0"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

_MODELS_CONFIG = """\
# What TensorFlow Serving loads. It reads this file again every --model_config_file_poll_wait_seconds, and then serves
# exactly what is listed here. The newest version of a model is served unless `model_version_policy` says otherwise.
model_config_list {
  config {
    name: "%(name)s"
    base_path: "/models/%(name)s"
    model_platform: "tensorflow"
    # Two versions side by side, each under a label (.../models/%(name)s/labels/stable:predict). To roll back, give the
    # label `stable` the older version. A label in use can only move to a version that is already loaded, so add the
    # version first, wait until its status is AVAILABLE, and move the label then.
    # model_version_policy { specific { versions: 1 versions: 2 } }
    # version_labels { key: "stable" value: 1 }
    # version_labels { key: "canary" value: 2 }
  }
}
"""

_BATCHING_CONFIG = """\
# Server-side batching (--enable_batching): concurrent requests are run together. A request with a bad value makes all that
# it was merged with fail. `sample` and `sample_png` have no bad values; noise and x_t that are not finite are, and steps
# out of range. Do not enable batching where strangers may send those.
# The bound that the model was exported with; a larger batch would be refused by the model.
max_batch_size { value: %(max_batch)d }
# How long the first request of a batch waits for others. A run takes much longer than this.
batch_timeout_micros { value: 5000 }
# How many full batches may wait before requests are refused with UNAVAILABLE.
max_enqueued_batches { value: 16 }
# Batches that run at the same time. Memory grows with it: one run of max_batch_size images for each.
num_batch_threads { value: 1 }
# A batch is padded to the next of these, in increasing order; the last one is max_batch_size.
%(allowed)s
"""

_COMPOSE = """\
# docker compose --profile cpu up     TensorFlow Serving on CPU behind the proxy (http://localhost:8080)
# docker compose --profile gpu up     the same on a GPU (the NVIDIA container toolkit has to be installed)
# Run it in this folder. The ports of the model server itself are open to this machine only: it asks nobody who they are.
x-serving: &serving
  volumes:
    - .:/models:ro
  ports:
    - "127.0.0.1:8500:8500" # gRPC
    - "127.0.0.1:8501:8501" # REST
  networks:
    default:
      aliases: [model-server]
  command:
    - --model_config_file=/models/models.config
    - --model_config_file_poll_wait_seconds=10
    - --file_system_poll_wait_seconds=10
    - --allow_version_labels_for_unavailable_models=true
    - --enable_batching=true
    - --batching_parameters_file=/models/batching.config
    - --rest_api_timeout_in_ms=120000 # 30 s if it is not given; the proxy's timeouts are above it
  mem_limit: 8g
  restart: unless-stopped

services:
  cpu:
    <<: *serving
    profiles: [cpu]
    image: tensorflow/serving:${TF_SERVING_VERSION:-%(version)s}
  gpu:
    <<: *serving
    profiles: [gpu]
    image: tensorflow/serving:${TF_SERVING_VERSION:-%(version)s}-gpu
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: 1
              capabilities: [gpu]
  proxy:
    profiles: [cpu, gpu]
    image: nginx:1.28
    volumes:
      - ./nginx.conf:/etc/nginx/nginx.conf:ro
    ports:
      - "127.0.0.1:8080:8080" # put TLS and your own way to tell who asks in front, before this is opened to others
    restart: unless-stopped
"""

_NGINX = """\
# A reverse proxy for the REST interface of a model server, as an example: limits on size, rate and time, and nothing
# but this model's predict, metadata and status. It has no TLS and lets everybody in: add both before others can reach it.
worker_processes auto;
events {
  worker_connections 1024;
}
http {
  limit_req_zone $binary_remote_addr zone=requests:10m rate=10r/s;
  limit_conn_zone $binary_remote_addr zone=connections:10m;
  server_tokens off;

  # The name is looked up when a request comes, so that the proxy starts before the model server.
  resolver 127.0.0.11 valid=10s;

  server {
    listen 8080;
    client_max_body_size 1m;
    client_body_buffer_size 1m;
    client_body_timeout 10s;
    client_header_timeout 10s;
    send_timeout 30s;
    keepalive_timeout 65s;

    # A full rate or number of connections answers 503, which a client may ask again after.
    limit_req zone=requests burst=20 nodelay;
    limit_conn connections 16;

    # The model server unpacks compressed bodies, and 1 MiB can unpack to much more.
    if ($http_content_encoding) {
      return 415;
    }
    location ~ ^/v1/models/%(pattern)s(/versions/[0-9]+|/labels/[A-Za-z0-9_]+)?(:predict|/metadata)?$ {
      limit_except GET POST {
        deny all;
      }
      set $model_server model-server:8501;
      proxy_pass http://$model_server;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_connect_timeout 5s;
      proxy_send_timeout 30s;
      proxy_read_timeout 130s; # above --rest_api_timeout_in_ms, so that the server's own answer arrives
    }
    location / {
      return 404;
    }
  }
}
"""


def check_name(name):
    """Raise InputError for a model's name that cannot stand in an address and in the server's files."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"The model's name must be letters, digits, '_', '.' and '-', not first '.' or '-'; found {name!r}."
        )


def write_server_files(folder, name, *, max_batch):
    """Write models.config, batching.config, docker-compose.yml and nginx.conf beside a model; files that exist stay.

    Args:
        folder: the models folder, which holds NAME/<version>/.
        name: NAME.
        max_batch: the bound that the model was exported with.

    Returns:
        (written, kept): names of files; kept ones were there with another content and were left alone.

    Raises:
        InputError: a name that cannot stand in an address and in these files, max_batch below 1, or a batching.config that is
            there and merges more images than max_batch, which the model would refuse.
        StorageError: a file that cannot be written.
    """
    check_name(name)
    if max_batch < 1:
        raise InputError(f"max_batch must be at least 1, found {max_batch}.")
    _check_batching(os.path.join(folder, "batching.config"), max_batch)
    written, kept = [], []
    for file_name, text in _files(name, max_batch).items():
        path = os.path.join(folder, file_name)
        try:
            (written if _write_new(path, text) else kept).append(file_name)
        except OSError as e:
            raise StorageError(f"{path} cannot be written: {e}.") from e
    kept = [k for k in kept if _read(os.path.join(folder, k)) != _files(name, max_batch)[k]]
    if kept:
        logging.warning(
            "%s in %s: there already, with another content, and left alone. Check that they serve this model (name %s, "
            "max_batch %d), or move them away and export again.", ", ".join(kept), folder, name, max_batch,
        )  # fmt: skip
    return written, kept


def _check_batching(path, max_batch):
    found = (
        re.search(r"^\s*max_batch_size\s*{\s*value:\s*(\d+)", _read(path), re.MULTILINE)
        if os.path.isfile(path)
        else None
    )
    if found and int(found[1]) > max_batch:
        raise InputError(
            f"{path} merges up to {found[1]} images, and --max_batch={max_batch} would refuse them. Lower its max_batch_size "
            f"and allowed_batch_sizes, move it away, or export with --max_batch={found[1]}."
        )


def _files(name, max_batch):
    allowed = "\n".join(f"allowed_batch_sizes: {size}" for size in allowed_batch_sizes(max_batch))
    values = {"name": name, "max_batch": max_batch, "allowed": allowed, "version": SERVING_VERSION}
    return {
        "models.config": _MODELS_CONFIG % values,
        "batching.config": _BATCHING_CONFIG % values,
        "docker-compose.yml": _COMPOSE % values,
        "nginx.conf": _NGINX % {"pattern": re.escape(name)},
    }


def allowed_batch_sizes(max_batch):
    """Powers of two below max_batch, and max_batch."""
    sizes = [2**k for k in range(max_batch.bit_length()) if 2**k < max_batch]
    return [*sizes, max_batch]


def _write_new(path, text):
    """Write a file that appears whole or not at all, unless there is one; whether it was written."""
    if os.path.lexists(path):
        return False
    write_text(path, text)
    return True


def _read(path):
    with open(path, encoding="utf-8", errors="replace") as f:
        return f.read()
