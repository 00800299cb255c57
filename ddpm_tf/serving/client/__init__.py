"""A client of an exported sampler on TensorFlow Serving, by REST or gRPC; REST needs no TensorFlow.

  python -m ddpm_tf.serving.client --address=localhost:8501 --model=digits --num_images=16 --seed=0 --out=drawn

From Python:

  with Client("localhost:8501", "digits") as client:
      images = client.sample(range(16))  # uint8 [16, H, W, C]
"""

import contextlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from ddpm_tf.errors import InputError, unknown_name
from ddpm_tf.serving.client.pictures import save_pngs
from ddpm_tf.serving.transports import TRANSPORTS, ServerError, SignatureInfo, VersionStatus

__all__ = ["Client", "Step", "save_pngs"]

_LONGEST_PAUSE_S = 5.0
_LONGEST_DEADLINE_S = 1e6
_T = TypeVar("_T")


class Step(NamedTuple):
    """After the step `index` (S-1 ... 0): the state x and the predicted image x_0, float32 [N, H, W, C]."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    x: np.ndarray
    x_0: np.ndarray


class Client:
    """Images from a model server.

    Args:
        address: host:port; for REST also a URL.
        model: the model's name on the server.
        version: the version of the model.
        label: a version label, instead of `version`. With neither, requests go to the newest version on the server.
        transport: rest or grpc.
        deadline_s: seconds that one request may take, its repetitions included.
        attempts: how often a request is sent, at most. It is sent again, after a growing pause, only if the server could not
            be reached or answered that it is not available. Requests change nothing on the server, so this is safe.
        max_batch: the most images of one request; at most the max_batch of the export.

    Raises:
        InputError: an argument cannot be used, or a package is missing.
        ServerError: (from every method) the server answered with an error, or not at all.
    """

    def __init__(
        self,
        address: str,
        model: str,
        *,
        version: int | None = None,
        label: str | None = None,
        transport: str = "rest",
        deadline_s: float = 60.0,
        attempts: int = 6,
        max_batch: int = 16,
    ) -> None:
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
        self._takes_newest = version is None and label is None
        self._transport = TRANSPORTS[transport](address, model, version=version, label=label)
        self._pinned: Callable[[int], Client] = lambda version: Client(
            address,
            model,
            version=version,
            transport=transport,
            deadline_s=deadline_s,
            attempts=attempts,
            max_batch=max_batch,
        )
        self._deadline_s, self._attempts, self._max_batch = deadline_s, attempts, max_batch

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._transport.close()

    def sample(
        self,
        seeds: Iterable[int],
        *,
        labels: ArrayLike | None = None,
        guidance_scale: ArrayLike | None = None,
        classifier_scale: ArrayLike | None = None,
    ) -> np.ndarray:
        """uint8 [N, H, W, C]; image k depends on seeds[k], labels[k] and guidance_scale[k] alone.

        Args:
            seeds: N values of int64.
            labels: the classes, for a class-conditional model: one integer for all images, or N. The number of classes
                means no class.
            guidance_scale: classifier-free guidance, for a class-conditional model: one number for all images, or N. 0 ignores
                the labels, 1 uses them as they are, and above 1 strengthens them; None means 1.
            classifier_scale: weight of the classifier that the model was exported with, one number or N; 0 switches it off, and
                None means 1.

        Raises:
            InputError: an argument cannot be used, labels are missing, or the model does not take them.
        """
        answers = self._answers("sample", {"seed": _as_seeds(seeds)}, labels, guidance_scale, classifier_scale)
        return np.concatenate([answer["images"] for answer in answers])

    def sample_png(
        self,
        seeds: Iterable[int],
        *,
        labels: ArrayLike | None = None,
        guidance_scale: ArrayLike | None = None,
        classifier_scale: ArrayLike | None = None,
    ) -> list[bytes]:
        """The same images as the contents of N PNG files; the arguments are those of `sample`."""
        answers = self._answers("sample_png", {"seed": _as_seeds(seeds)}, labels, guidance_scale, classifier_scale)
        return [png for answer in answers for png in answer["image_bytes"]]

    def denoise(
        self,
        seeds: Iterable[int],
        *,
        num_steps: int,
        labels: ArrayLike | None = None,
        guidance_scale: ArrayLike | None = None,
        classifier_scale: ArrayLike | None = None,
    ) -> Iterator[Step]:
        """The same images step by step: yields a `Step` for each move. The last x is the image, in [-1, 1].

        Every step is a request, so that a caller can show progress, or stop.

        Args:
            seeds: at most max_batch of them.
            num_steps: the model's own number of moves, `sampler.num_moves` in the version's model_card.json: S, but 2 S - 1 for
                heun. A model server cannot be asked for it. It refuses a larger number; a smaller one gives other images.
            labels, guidance_scale, classifier_scale: see `sample`.
        """
        seeds = _as_seeds(seeds)
        if len(seeds) > self._max_batch:
            raise InputError(f"denoise takes at most max_batch={self._max_batch} seeds at once, found {len(seeds)}.")
        if num_steps < 1:
            raise InputError(f"num_steps must be at least 1, found {num_steps}.")
        with self._one_version(True) as client:
            inputs = {
                "seed": seeds,
                **client._conditions("denoise_step", len(seeds), labels, guidance_scale, classifier_scale),
            }
            x = client.predict("initial_noise", {"seed": seeds})["x_T"]
            known = client._signature("denoise_step").inputs
            if "x_0" in known:  # self-conditioning: the x_0 of the step before
                inputs["x_0"] = np.zeros_like(x)
            for name in (name for name in known if name.startswith("memory_")):  # of a sampler that looks back
                sizes = [int(size or 0) for size in (known[name].shape or ())[1:]]
                inputs[name] = np.zeros((len(seeds), *sizes), known[name].dtype)
            for index in reversed(range(num_steps)):
                state = {"x_t": x, "step": np.full(len(seeds), index, np.int32)}
                out = client.predict("denoise_step", inputs | state)
                x = out["x_prev"]
                inputs |= {name: out[name] for name in out.keys() & inputs.keys()}
                yield Step(index, x, out["x_0"])

    def bits_per_dim(self, images: np.ndarray, seeds: Iterable[int], *, labels: ArrayLike | None = None) -> np.ndarray:
        """float32 [N]: the variational bound, in bits/dim, of uint8 images [N, H, W, C]; one seed for each image.

        It is the bound of the chain that the model was exported with. Labels are as in `sample`.
        """
        seeds, images = _as_seeds(seeds), np.asarray(images)
        if len(images) != len(seeds):
            raise InputError(f"There must be one seed for each image, found {len(seeds)} for {len(images)} images.")
        answers = self._answers("bits_per_dim", {"images": images, "seed": seeds}, labels, None, None)
        return np.concatenate([answer["total_bpd"] for answer in answers])

    def _answers(
        self,
        signature: str,
        inputs: dict[str, np.ndarray],
        labels: ArrayLike | None,
        *scales: ArrayLike | None,
    ) -> list[dict[str, np.ndarray]]:
        """The answers to as many requests as are needed for all rows of the inputs."""
        count = len(inputs["seed"])
        batches = [slice(k, k + self._max_batch) for k in range(0, count, self._max_batch)]
        with self._one_version(len(batches) > 1) as client:
            inputs = inputs | client._conditions(signature, count, labels, *scales)
            return [client.predict(signature, {name: v[rows] for name, v in inputs.items()}) for rows in batches]

    def _conditions(
        self,
        signature: str,
        count: int,
        labels: ArrayLike | None,
        guidance_scale: ArrayLike | None,
        classifier_scale: ArrayLike | None,
    ) -> dict[str, np.ndarray]:
        """The inputs `label`, `guidance_scale` and `classifier_scale` that the signature has, with a value for each image."""
        known = self._signature(signature).inputs
        if labels is None and "label" in known:
            raise InputError(
                "This model is class-conditional: give labels, one integer for all images or one for each."
            )
        if labels is not None and "label" not in known:
            raise InputError("Labels were given, but this model is unconditional: leave them out.")
        given = {"guidance_scale": guidance_scale, "classifier_scale": classifier_scale}
        for name, value in given.items():
            if value is not None and name not in known:
                of = "was exported without a classifier" if name == "classifier_scale" else "is unconditional"
                raise InputError(f"A {name} was given, but this model {of}: leave it out.")
        values = {name: 1.0 if value is None else value for name, value in given.items() if name in known}
        if labels is not None:
            values = {"label": labels, **values}
        return {
            name: _one_each("labels" if name == "label" else name, value, count, known[name].dtype)
            for name, value in values.items()
        }

    def predict(self, signature: str, inputs: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
        """Send one request to any signature: {name: array}, of objects where the output is bytes.

        Inputs are cast to the signature's types: integers only if the type can hold them, floats are rounded.
        """
        info = self._signature(signature)
        arrays = {
            name: _cast(name, value, info.inputs[name].dtype) if name in info.inputs else value
            for name, value in ((name, np.asarray(value)) for name, value in inputs.items())
        }
        answer = self._retried(self._transport.predict, signature, arrays, list(info.outputs))
        return {
            name: np.asarray(value, object if info.outputs[name].dtype == "str" else info.outputs[name].dtype)
            for name, value in answer.items()
        }

    def metadata(self) -> dict[str, SignatureInfo]:
        """{signature: SignatureInfo(inputs, outputs)}."""
        return self._retried(self._transport.metadata)

    def status(self) -> list[VersionStatus]:
        """The status of the client's version or label, or else of every version."""
        return self._retried(self._transport.status)

    @cached_property
    def _signatures(self) -> dict[str, SignatureInfo]:
        return self.metadata()

    def _signature(self, name: str) -> SignatureInfo:
        if name not in self._signatures:
            raise unknown_name("signature", name, self._signatures)
        return self._signatures[name]

    @contextlib.contextmanager
    def _one_version(self, is_needed: bool) -> Iterator["Client"]:
        """A client of the newest available version, so that the same model answers all requests of a call.

        A label is sent as it is, because the server does not say which version it stands for.
        """
        needs_status = is_needed and self._takes_newest
        available = [v.version for v in self.status() if v.state == "AVAILABLE"] if needs_status else []
        if not available:
            yield self
            return
        with self._pinned(max(available)) as client:
            yield client

    def _retried(self, call: Callable[..., _T], *args: Any) -> _T:
        """call(*args, timeout), repeated after a pause while the server is not available."""
        end = time.monotonic() + self._deadline_s
        for attempt in range(1, self._attempts + 1):
            try:
                return call(*args, max(end - time.monotonic(), 1e-3))
            except ServerError as e:
                pause = min(0.1 * 2 ** (attempt - 1), _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
                if e.code != "UNAVAILABLE" or attempt == self._attempts or time.monotonic() + pause > end:
                    raise
                time.sleep(pause)  # random, so that clients that failed together do not all come back together
        raise AssertionError("unreachable")


def _as_seeds(seeds: Iterable[int]) -> np.ndarray:
    array = _cast("seed", np.asarray(list(seeds)), "int64")
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"seeds must be a list of at least one integer, found shape {array.shape}.")
    return array


def _one_each(name: str, value: ArrayLike, count: int, dtype: str) -> np.ndarray:
    """One value, or `count` of them, as `count` values of the signature's type."""
    array = np.asarray(value)
    if array.shape not in ((), (count,)):
        raise InputError(f"{name} must be one number or {count} of them, found shape {array.shape}.")
    return np.broadcast_to(_cast(name, array, dtype), (count,))


def _cast(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    """An input in the signature's type: integers only if the type can hold them, floats rounded. Others are refused."""
    if dtype == "str" or not value.size:
        return value if dtype == "str" else value.astype(dtype)
    fits = value.dtype.kind in ("iuf" if np.dtype(dtype).kind == "f" else "iu")
    if fits and np.dtype(dtype).kind in "iu":
        limits = np.iinfo(dtype)
        fits = limits.min <= int(value.min()) and int(value.max()) <= limits.max
    if not fits:
        raise InputError(f"{name} must be {dtype}, found {value.dtype} {value.ravel()[:3].tolist()}.")
    return value.astype(dtype)
