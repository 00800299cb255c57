"""Pictures of how sampling works: its states, shared noise, interpolation, and images encoded and decoded."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from ddpm_tf import files, images
from ddpm_tf.cluster.strategy import configure_devices
from ddpm_tf.data.arrays import load_npz
from ddpm_tf.data.contract import LoadOptions
from ddpm_tf.errors import InputError, StorageError, WorkdirError, storage_advice
from ddpm_tf.experiment.conditions import make_conditions
from ddpm_tf.experiment.editing import read_picture
from ddpm_tf.experiment.inference import Inference, check_classifier_scale, load_sampler
from ddpm_tf.paths import check_kind, check_local
from ddpm_tf.samplers import Samples, interpolate, sample
from ddpm_tf.samplers.base import Sampler
from ddpm_tf.samplers.interpolation import interpolate_latents
from ddpm_tf.samplers.inversion import encode
from ddpm_tf.storage.checkpoints import is_full

_MAX_FRAMES = 1000
_MAX_IMAGES = 256  # in one picture


class Show(NamedTuple):
    """What is shown: one of these, or the first two together.

    trace: N > 0 shows x_t and the predicted x_0 after every N-th move (Fig. 6); 0: not.
    shared_noise_steps: N >= 0 lets all images start from the same x_T and share the noise of the first N moves (Fig. 7); -1:
        not.
    interpolate: two seeds with a comma, whose images are mixed; "": not.
    interpolate_at: the share of the steps to which both images are diffused and mixed (Fig. 8), above 0, at most 1; None: the
        latents are mixed, if the sampler draws no noise after x_T, else 0.5.
    encode: a picture, or an .npz of images, that is encoded by DDIM and decoded; "": not.
    """

    trace: int = 0
    shared_noise_steps: int = -1
    interpolate: str = ""
    interpolate_at: float | None = None
    encode: str = ""

    def check(self) -> bool:
        """Whether anything is to be shown.

        Raises:
            InputError: flags that cannot be, or that exclude each other.
        """
        if self.trace < 0:
            raise InputError(f"--trace must be at least 1, the moves between two pictures; found {self.trace}.")
        if self.shared_noise_steps < -1:
            raise InputError(f"--shared_noise_steps must be at least 0, found {self.shared_noise_steps}.")
        given = [
            f"--{name}"
            for name, is_given in {
                "trace": self.trace > 0,
                "shared_noise_steps": self.shared_noise_steps >= 0,
                "interpolate": self.interpolate != "",
                "encode": self.encode != "",
            }.items()
            if is_given
        ]
        if len(given) > 1 and given != ["--trace", "--shared_noise_steps"]:
            raise InputError(f"{' and '.join(given)} exclude each other; give one of them.")
        if self.interpolate_at is not None:
            if not self.interpolate:
                raise InputError("--interpolate_at was given without --interpolate=SEED_A,SEED_B.")
            if not 0 < self.interpolate_at <= 1:
                raise InputError(f"--interpolate_at must be above 0 and at most 1, found {self.interpolate_at}.")
        if self.interpolate:
            self.seeds()
        if self.encode:
            check_local(self.encode, "--encode")
            check_kind(self.encode, f"--encode={self.encode}", is_folder=False)
            if not os.path.exists(self.encode):
                raise InputError(f"--encode={self.encode} does not exist.")
        return bool(given)

    def seeds(self) -> tuple[int, int]:
        """The two seeds of `interpolate`."""
        try:
            a, b = (int(word) for word in self.interpolate.split(","))
        except ValueError:
            raise InputError(
                f"--interpolate must be two seeds with a comma, such as 3,7; found {self.interpolate}."
            ) from None
        if not all(-(2**63) <= seed < 2**63 for seed in (a, b)):
            raise InputError(f"--interpolate={self.interpolate}: a seed is an integer of 64 bits.")
        return a, b


class _Job(NamedTuple):
    """What the functions below are given; conditions are the keywords of `sample`."""

    inference: Inference
    sampler: Sampler
    show: Show
    labels: np.ndarray | None
    conditions: dict[str, Any]
    columns: int | None

    def of(self, count: int) -> dict[str, Any]:
        """The conditions of `count` images, all of the first one's class."""
        labels = None if self.labels is None else np.full(count, self.labels[0])
        return {**self.conditions, "labels": labels}


def show_pictures(
    workdir: str,
    show: Show,
    *,
    out: str,
    ema: bool = True,
    settings: Mapping[str, Any] | None = None,
    classifier: str = "",
    classifier_scale: float | None = None,
) -> str:
    """Write pictures into a new or empty folder, which appears whole or not at all.

    Args:
        out: the folder.
        ema, settings, classifier, classifier_scale: as in `sample_images`.

    Returns:
        what was written, as text.

    Raises:
        InputError, WorkdirError, StorageError
    """
    check_local(out, "--out")
    files.check_new_folder(out, "--out")
    check_classifier_scale(classifier, classifier_scale)
    show.check()
    configure_devices()
    inference, sampler = load_sampler(workdir, ema=ema, settings=settings, classifier=classifier)
    count = inference.config.sample.num_images
    if count > _MAX_IMAGES:
        raise InputError(f"--num_images={count} is more than one picture shows; choose at most {_MAX_IMAGES}.")
    made = make_conditions(
        inference.config, inference.network, inference.class_names, count, classifier_scale=classifier_scale
    )
    if show.interpolate or show.encode:
        _check_one_class(inference.config.sample.labels, made.labels)
    if show.interpolate and count < 2:
        raise InputError(
            f"--num_images={count} is too few for --interpolate, which shows both ends; choose at least 2."
        )
    job = _Job(inference, sampler, show, made.labels, made.keywords(), made.columns)
    logging.info(
        "%s, %d steps, %d network evaluations.",
        inference.config.sample.sampler,
        sampler.num_steps,
        sampler.num_evaluations,
    )
    draw: Callable[[_Job], tuple[dict[str, bytes], dict[str, np.ndarray], str]] = _states
    if show.interpolate:
        draw = _interpolation
    elif show.encode:
        draw = _encoding
    pictures, arrays, report = draw(job)
    _write(out, pictures, arrays)
    return f"{report}\nPictures: {out}"


def _check_one_class(labels: str, drawn: np.ndarray | None) -> None:
    """Refuse several classes where all images are of one; `all` stands for the first class."""
    if drawn is not None and labels.strip() != "all" and len(np.unique(drawn)) > 1:
        raise InputError(
            f"--labels={labels} names several classes, and all images of --interpolate or --encode are of one. Give one."
        )


def _states(job: _Job) -> tuple[dict[str, bytes], dict[str, np.ndarray], str]:
    """The images, and with a trace the states on the way: strips, and films."""
    s, show, moves = job.inference.config.sample, job.show, job.sampler.plan.num_moves
    if show.trace:
        frames = -(-moves // show.trace) + 1
        if frames > _MAX_FRAMES:
            raise InputError(
                f"--trace={show.trace} of {moves} moves makes {frames:,} frames; choose at least "
                f"{-(-moves // (_MAX_FRAMES - 1))}, for at most {_MAX_FRAMES:,} frames."
            )
    if show.shared_noise_steps > moves:
        raise InputError(
            f"--shared_noise_steps must be within 0..{moves}, the sampler's moves; found {show.shared_noise_steps}."
        )
    is_one_class = job.labels is None or len(set(job.labels.tolist())) == 1
    if show.shared_noise_steps >= 0 and not job.sampler.needs_noise and is_one_class:
        raise InputError(
            f"--shared_noise_steps with --sampler={s.sampler} makes all images the same: it draws no noise after x_T. Use a "
            "sampler that does, such as ddpm, or ddim with --eta=1."
        )
    seeds = range(s.seed, s.seed + s.num_images)
    drawn: Samples = sample(
        job.inference.network,
        job.sampler,
        seeds,
        trace=show.trace,
        shared_noise_steps=show.shared_noise_steps,
        **job.conditions,
    )
    final = images.to_uint8(drawn.images)
    pictures = {"grid.png": images.png_bytes(images.picture(final, columns=job.columns))}
    arrays = {"images": final, **({} if job.labels is None else {"labels": job.labels})}
    if drawn.trace is None:
        return pictures, arrays, f"{len(final)} images that share {show.shared_noise_steps} moves."
    for name, states in (("x_t", drawn.trace.x_t), ("x_0", drawn.trace.x_0)):
        shown = [images.to_uint8(state) for state in states[::-1]]  # from noise on
        strip = np.concatenate([np.stack(row) for row in zip(*shown, strict=True)])  # a row for every image
        pictures[f"{name}.png"] = images.png_bytes(images.picture(strip, columns=len(shown)))
        film = [images.picture(frame, columns=job.columns) for frame in shown]
        pictures[f"{name}.gif"] = images.gif_bytes(film)
    return (
        pictures,
        arrays,
        f"{len(final)} images, {len(drawn.trace.x_t)} states each (x_t.png, x_t.gif; predicted x_0 beside).",
    )


def _interpolation(job: _Job) -> tuple[dict[str, bytes], dict[str, np.ndarray], str]:
    """A strip from one seed's image to the other's."""
    network, sampler, seeds = job.inference.network, job.sampler, job.show.seeds()
    lambdas = np.linspace(0, 1, job.inference.config.sample.num_images).tolist()
    if job.show.interpolate_at is None and not sampler.needs_noise:
        mixed = interpolate_latents(network, sampler, seeds, lambdas=lambdas, **job.of(len(lambdas)))
        how = "spherically between their latents x_T"
    else:
        a, b = sample(network, sampler, seeds, **job.of(2)).images
        t = max(1, round((job.show.interpolate_at or 0.5) * sampler.num_steps)) - 1
        mixed = interpolate(
            network, sampler, a, b, t=t, lambdas=lambdas, seed=seeds[0], fixed_noise=True, **job.of(len(lambdas))
        )
        how = f"linearly after {t + 1} of {sampler.num_steps} steps of noise, which is the same for all"
    shown = images.to_uint8(mixed)
    pictures = {"strip.png": images.png_bytes(images.picture(shown, columns=len(shown)))}
    pictures["strip.gif"] = images.gif_bytes([images.picture(image[None]) for image in shown])
    return (
        pictures,
        {"images": shown, "lambdas": np.array(lambdas)},
        f"{len(shown)} images between the seeds {seeds[0]} and {seeds[1]}, mixed {how}.",
    )


def _encoding(job: _Job) -> tuple[dict[str, bytes], dict[str, np.ndarray], str]:
    """Rows of images, their latents, and what these are decoded to."""
    originals = _read_images(job.show.encode, job.inference.network.image_shape)
    encoded = encode(
        job.inference.network,
        job.sampler,
        images.from_uint8(originals.astype(np.float32)),
        batch_size=job.inference.config.sample.batch_size,
        **job.of(len(originals)),
    )
    decoded = images.to_uint8(encoded.images)
    # In [0, 1], as in DDIM's Table 2
    error = float(np.mean(((np.clip(encoded.images, -1, 1) + 1) / 2 - originals / 255.0) ** 2))
    shown = np.concatenate([originals[:32], images.to_uint8(encoded.x_T[:32] / 3), decoded[:32]])
    pictures = {"encoded.png": images.png_bytes(images.picture(shown, columns=min(len(originals), 32)))}
    arrays = {"images": originals, "x_T": encoded.x_T, "decoded": decoded}
    return (
        pictures,
        arrays,
        (
            f"{len(originals)} images, encoded and decoded in {job.sampler.num_steps} steps each way: mean squared error "
            f"{error:.2e} with pixels in [0, 1]. "
            "encoded.png has the images, their latents x_T (divided by 3), and what they decode to."
        ),
    )


def _read_images(path: str, image_shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 [N, H, W, C] of a picture or an .npz."""
    if not path.endswith(".npz"):
        return read_picture(path, image_shape, "--encode")[None]
    options = LoadOptions(image_shape, split="", data_dir="", download=False, in_memory_mb=0, read_only=True)
    try:
        read = load_npz(path, options).tensors["image"].numpy()
    except InputError as e:
        raise InputError(f"--encode={path} cannot be used: {e} Expected images, uint8 [N, H, W, C].") from e
    if read.shape[1:] != image_shape or len(read) > 100_000:
        raise InputError(
            f"--encode={path} has images {read.dtype} {list(read.shape)}; expected uint8 [N, ...] of {list(image_shape)}."
        )
    return read


def _write(out: str, pictures: Mapping[str, bytes], arrays: Mapping[str, np.ndarray]) -> None:
    parent = os.path.dirname(os.path.abspath(out))
    try:
        os.makedirs(parent, exist_ok=True)
        files.sweep(parent)
        with files.atomic_folder(os.path.abspath(out)) as folder:
            for name, content in pictures.items():
                with open(os.path.join(folder, name), "wb") as f:
                    f.write(content)
            np.savez(os.path.join(folder, "samples.npz"), **arrays)  # type: ignore[arg-type]
    except OSError as e:
        if is_full(e):
            raise StorageError(f"--out={out} cannot be written: {e}. {storage_advice(e)}") from e
        raise WorkdirError(f"--out={out} cannot be written to: {e}. Choose another.") from e
