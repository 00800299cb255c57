"""A client of an exported sampler on TensorFlow Serving, by REST or gRPC; REST needs no TensorFlow.

  python -m ddpm_tf.serving.client --address=localhost:8501 --model=digits --num_images=16 --seed=0 --out=drawn

From Python:

  with Client("localhost:8501", "digits") as client:
      images = client.sample(range(16))  # uint8 [16, H, W, C]
"""

import argparse
import contextlib
import os
import random
import sys
import time
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ddpm_tf import images as images_lib
from ddpm_tf.errors import InputError, RunError, StorageError, WorkdirError, storage_advice, unknown_name
from ddpm_tf.serving.transports import TRANSPORTS, ServerError

_LONGEST_PAUSE_S = 5.0
_LONGEST_DEADLINE_S = 1e6


class Step(NamedTuple):
    """After the step at `index` (S-1 ... 0): x, the state, and x_0, the predicted image; float32 [N, H, W, C]."""

    index: int
    x: np.ndarray
    x_0: np.ndarray


class Client:
    """Images from a model server.

    Args:
        address: host:port; for REST also a URL.
        model: the model's name on the server.
        version: int, or `label`: str, at most one of them; neither: the newest version the server has.
        transport: rest or grpc.
        deadline_s: seconds that one request may take, its repetitions included.
        attempts: how often a request is sent, at most. It is sent again, after a growing pause, only when the server could
            not be reached or said it is not available; the requests change nothing, so that is safe.
        max_batch: images asked for at once, at most; no more than the bound the model was exported with.

    Raises:
        InputError: arguments that cannot be used, a package that is missing.
        ServerError: from every method: what the server said, or that it did not answer.
    """

    def __init__(
        self, address, model, *, version=None, label=None, transport="rest", deadline_s=60.0, attempts=6, max_batch=16
    ):
        if transport not in TRANSPORTS:
            raise unknown_name("transport", transport, TRANSPORTS)
        if version is not None and label is not None:
            raise InputError(f"version={version} and label={label!r} were both given; give one of them.")
        for name, value, least in (("attempts", attempts, 1), ("max_batch", max_batch, 1)):
            if value < least:
                raise InputError(f"{name} must be at least {least}, found {value}.")
        if not 0 < deadline_s <= _LONGEST_DEADLINE_S:
            raise InputError(
                f"deadline_s must be above 0 and at most {_LONGEST_DEADLINE_S:g} seconds, found {deadline_s}."
            )
        self._is_open = version is None and label is None
        self._transport = TRANSPORTS[transport](address, model, version=version, label=label)
        settings = {"transport": transport, "deadline_s": deadline_s, "attempts": attempts, "max_batch": max_batch}
        self._pinned = lambda version: Client(address, model, version=version, **settings)
        self._deadline_s, self._attempts, self._max_batch = deadline_s, attempts, max_batch

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._transport.close()

    def sample(self, seeds):
        """uint8 [N, H, W, C]; image k depends on seeds[k] alone, an int64."""
        batches = self._batches(seeds)
        with self._one_version(len(batches) > 1) as client:
            return np.concatenate([client.predict("sample", {"seed": batch})["images"] for batch in batches])

    def sample_png(self, seeds):
        """A list of PNG files, as bytes."""
        batches = self._batches(seeds)
        with self._one_version(len(batches) > 1) as client:
            return [png for batch in batches for png in client.predict("sample_png", {"seed": batch})["image_bytes"]]

    def denoise(self, seeds, *, num_steps):
        """The same images step by step: yields a `Step` for each of the S = num_steps steps; the last x is the image.

        One request per step, so that a caller can show progress, or stop. At most max_batch seeds; the image is in [-1, 1].
        num_steps must be the model's own S, which a model server cannot be asked for: `sampler.num_steps` in the version's
        model_card.json. The server refuses a larger one; with a smaller one the images are not the sampler's.
        """
        seeds = _as_seeds(seeds)
        if len(seeds) > self._max_batch:
            raise InputError(f"denoise takes at most max_batch={self._max_batch} seeds at once, found {len(seeds)}.")
        if num_steps < 1:
            raise InputError(f"num_steps must be at least 1, found {num_steps}.")
        with self._one_version(True) as client:
            x = client.predict("initial_noise", {"seed": seeds})["x_T"]
            for index in reversed(range(num_steps)):
                step = np.full(len(seeds), index, np.int32)
                out = client.predict("denoise_step", {"x_t": x, "step": step, "seed": seeds})
                x = out["x_prev"]
                yield Step(index, x, out["x_0"])

    def bits_per_dim(self, images, seeds):
        """float32 [N]: the bound for uint8 images [N, H, W, C], with one seed each."""
        seeds, images = _as_seeds(seeds), np.asarray(images)
        if len(images) != len(seeds):
            raise InputError(f"{len(images)} images need as many seeds, found {len(seeds)}.")
        starts = range(0, len(seeds), self._max_batch)
        slices = [slice(k, k + self._max_batch) for k in starts]
        with self._one_version(len(slices) > 1) as client:
            parts = [client.predict("bits_per_dim", {"images": images[s], "seed": seeds[s]}) for s in slices]
        return np.concatenate([part["total_bpd"] for part in parts])

    def predict(self, signature, inputs):
        """Call any signature once: name -> array (bytes are objects). Inputs are cast to the signature's types, if exactly."""
        known = self._signatures
        if signature not in known:
            raise unknown_name("signature", signature, known)
        inputs = {
            name: _cast(name, value, known[signature].inputs[name].dtype) if name in known[signature].inputs else value
            for name, value in ((name, np.asarray(value)) for name, value in inputs.items())
        }
        infos = known[signature].outputs
        answer = self._retried(self._transport.predict, signature, inputs, list(infos))
        return {
            name: np.asarray(value, object if infos[name].dtype == "str" else infos[name].dtype)
            for name, value in answer.items()
        }

    def metadata(self):
        """Signature name -> Signature(inputs, outputs), each name -> (dtype, shape)."""
        return self._retried(self._transport.metadata)

    def status(self):
        """A list of VersionStatus(version, state, error), of the asked version or of all."""
        return self._retried(self._transport.status)

    @cached_property
    def _signatures(self):
        return self.metadata()

    @contextlib.contextmanager
    def _one_version(self, is_needed):
        """A client of the newest available version, so that no request is answered by a model that came in between.

        A label is asked for as it is: the server does not tell which version it stands for.
        """
        available = [v.version for v in self.status() if v.state == "AVAILABLE"] if is_needed and self._is_open else []
        if not available:
            yield self
            return
        with self._pinned(max(available)) as client:
            yield client

    def _batches(self, seeds):
        seeds = _as_seeds(seeds)
        return [seeds[k : k + self._max_batch] for k in range(0, len(seeds), self._max_batch)]

    def _retried(self, call, *args):
        end = time.monotonic() + self._deadline_s
        for attempt in range(1, self._attempts + 1):
            try:
                return call(*args, max(end - time.monotonic(), 1e-3))
            except ServerError as e:
                pause = min(0.1 * 2 ** (attempt - 1), _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
                if e.code != "UNAVAILABLE" or attempt == self._attempts or time.monotonic() + pause > end:
                    raise
                time.sleep(pause)  # drawn at random, so that clients that failed together do not come back together


def _as_seeds(seeds):
    seeds = _cast("seed", np.asarray(list(seeds)), "int64")
    if seeds.ndim != 1 or seeds.size == 0:
        raise InputError(f"seeds must be a list of at least one integer, found shape {seeds.shape}.")
    return seeds


def _cast(name, value, dtype):
    """An input in the signature's type; integers exactly, floats rounded, anything else refused."""
    if dtype == "str" or not value.size:
        return value if dtype == "str" else value.astype(dtype)
    fits = value.dtype.kind in ("iuf" if np.dtype(dtype).kind == "f" else "iu")
    if fits and np.dtype(dtype).kind in "iu":
        limits = np.iinfo(dtype)
        fits = limits.min <= int(value.min()) and int(value.max()) <= limits.max
    if not fits:
        raise InputError(f"Input {name!r} must be {dtype}, found {value.dtype} {value.ravel()[:3].tolist()}.")
    return value.astype(dtype)


def save_pngs(folder, seeds, images):
    """seed_NNNNNN.png for each image of uint8 [N, H, W, C], and grid.png of the first 256, into a new or empty folder."""
    _check_new(folder)
    try:
        for seed, image in zip(seeds, images, strict=True):
            images_lib.save_png(os.path.join(folder, f"seed_{seed:06d}.png"), image)
        grid = images_lib.make_grid(images[:256], scale=images_lib.grid_scale(images.shape[1]))
        images_lib.save_png(os.path.join(folder, "grid.png"), grid)
    except OSError as e:
        raise StorageError(f"--out={folder} cannot be written: {e}. {storage_advice(e)}") from e


def _check_new(folder):
    """Make a folder, before anything is drawn for it."""
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise InputError(f"--out={folder} exists and is not an empty folder; nothing is written over. Choose another.")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise WorkdirError(f"--out={folder} cannot be made: {e}. Choose another.") from e


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m ddpm_tf.serving.client", allow_abbrev=False,
        description="Draw images on a model server and save them as PNGs. Image k has the seed --seed + k.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--address", default="localhost:8501", help="host:port, or a URL for REST")
    add("--model", required=True, help="the model's name on the server")
    add("--version", type=int, help="a version of the model, else the newest")
    add("--label", help="a version label of the server's model config, instead of --version")
    add("--transport", default="rest", choices=sorted(TRANSPORTS), help="grpc is usually port 8500")
    add("--num_images", type=int, default=16, help="how many images")
    add("--seed", type=int, default=0, help="seed of the first image, an int64")
    add("--max_batch", type=int, default=16, help="images per request; at most run_export.py's --max_batch")
    add("--out", help="a new or empty folder for the PNGs")
    add("--deadline_s", type=float, default=60.0, help="seconds that one request may take")
    add("--attempts", type=int, default=6, help="how often to ask a server that is not available")
    add(
        "--progress_steps",
        type=int,
        help="draw step by step, and show it; exactly the model's S (sampler.num_steps in its model_card.json)",
    )
    add("--status", action="store_true", help="only print the model's versions and signatures")
    return parser


def main(argv=None):
    """Exit codes: 0; 2, a request that cannot be served; 69, no server, no answer in time; 73 and 74, --out cannot be made,
    or written; 130, SIGINT."""
    args = _parser().parse_args(argv)
    try:
        if args.out is None and not args.status:
            raise InputError("--out is missing; give a new or empty folder, or --status.")
        client = Client(
            args.address, args.model, version=args.version, label=args.label, transport=args.transport,
            deadline_s=args.deadline_s, attempts=args.attempts, max_batch=args.max_batch,
        )  # fmt: skip
        with client:
            if args.status:
                _print_status(client)
            else:
                _draw(client, args)
    except RunError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _print_status(client):
    for v in client.status():
        print(f"version {v.version}: {v.state} {v.error}".rstrip())
    for name, signature in sorted(client.metadata().items()):
        sides = (", ".join(f"{k} {t.dtype} {t.shape}" for k, t in sorted(side.items())) for side in signature)
        print(f"{name}: " + " -> ".join(sides))


def _draw(client, args):
    if args.num_images < 1:
        raise InputError(f"--num_images must be at least 1, found {args.num_images}.")
    _check_new(args.out)
    seeds = range(args.seed, args.seed + args.num_images)
    if args.progress_steps is None:
        images = client.sample(seeds)
    else:
        from tqdm import tqdm

        steps = client.denoise(seeds, num_steps=args.progress_steps)
        *_, last = tqdm(steps, total=args.progress_steps, unit=" steps", desc="denoising")
        images = images_lib.to_uint8(last.x)
    save_pngs(args.out, seeds, images)
    print(f"Pictures: {args.out}")


if __name__ == "__main__":
    sys.exit(main())
