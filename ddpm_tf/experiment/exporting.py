"""From a workdir to a version folder that a model server loads."""

import json
import os
import shlex
import time
from collections.abc import Mapping
from typing import Any

from absl import logging

from ddpm_tf import builders
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import space_timesteps
from ddpm_tf.errors import InputError, unknown_name
from ddpm_tf.experiment.inference import Inference, load_sampler
from ddpm_tf.paths import check_local, is_literal
from ddpm_tf.samplers.base import Sampler
from ddpm_tf.samplers.guidance import is_conditional
from ddpm_tf.serving import model_card, portable, warmup
from ddpm_tf.serving.export import save_model
from ddpm_tf.serving.server_files import check_name, check_server_files, write_server_files
from ddpm_tf.serving.versions import choose_version, list_versions, new_version

SAVED_MODEL = "saved_model"
_BOUND_SPACING = "linspace"  # both ends of the trained chain


def export(
    workdir: str,
    out: str,
    *,
    format: str = SAVED_MODEL,
    version: int | None = None,
    max_batch: int = 16,
    bpd_steps: int | None = None,
    license: str = "",
    ema: bool = True,
    settings: Mapping[str, Any] | None = None,
    classifier: str = "",
) -> str:
    """Write a workdir's newest checkpoint and its sampler as out/<version>/, which appears whole or not at all.

    Args:
        workdir: as written by `train`; its evaluation.json, if there is one, goes into the model card.
        out: MODELS/NAME; missing parents are made. The server's files are written into MODELS.
        format: saved_model (for TensorFlow Serving), onnx or openvino (`denoise` and `sample_from_noise` alone).
        version: a positive number; None: the newest one's successor.
        max_batch: the most images of one request.
        bpd_steps: K, the steps of the chain whose bound `bits_per_dim` is; None: as many as the sampler's.
        license: the weights' license, for the model card.
        ema: the moving average of the weights, else the weights themselves.
        settings: {field: value} of the config's `sample` section, instead of the workdir's.
        classifier: the workdir of a classifier that guides, for a SavedModel; "": none. A request says how strongly.

    Returns:
        a report, as text.

    Raises:
        InputError: settings or a workdir that cannot be used, a version that exists, a package that is missing.
        WorkdirError, StorageError: a folder that cannot be written to.
    """
    start = time.monotonic()
    check_local(out, "--out")
    out = os.path.abspath(out)
    if format not in (SAVED_MODEL, *portable.FORMATS):
        raise unknown_name("format", format, (SAVED_MODEL, *portable.FORMATS))
    if not 1 <= max_batch <= 4096:
        raise InputError(f"--max_batch must be within 1..4096, found {max_batch}.")
    check_name(os.path.basename(out))
    version = choose_version(out, version)
    _check_format(out, format)
    models = os.path.dirname(out)
    if format == SAVED_MODEL:
        check_server_files(models, max_batch)
    inference, sampler = load_sampler(workdir, ema=ema, settings=settings, classifier=classifier)
    builders.check_guidance(inference.config, has_classifier=bool(classifier), is_served=True)
    bound_diffusion = _bound_diffusion(inference.diffusion, sampler.num_steps if bpd_steps is None else bpd_steps)
    fields = {
        "name": os.path.basename(out),
        "version": version,
        "format": format,
        "license": license or "not stated",
        "weights": "moving average" if ema else "weights",
        "evaluation": _evaluation(workdir),
        **_classes(inference, classifier),
    }
    with new_version(out, version) as folder:
        if format == SAVED_MODEL:
            functions = save_model(folder, inference.network, sampler, bound_diffusion, max_batch=max_batch)
            fields |= _saved_model_fields(folder, out, functions, sampler, bound_diffusion, max_batch)
        else:
            functions = portable.save_portable(folder, format, inference.network, sampler)
        model_card.write_card(folder, model_card.make_card(inference, sampler, functions, fields))
        if format == SAVED_MODEL:  # last: a failed export leaves nothing behind
            write_server_files(models, os.path.basename(out), max_batch=max_batch)
    report = f"{', '.join(functions)} in {os.path.join(out, str(version))} ({time.monotonic() - start:.0f} s)."
    if format != SAVED_MODEL:
        return report
    if not is_literal(out):
        report += (
            f"\ntf.saved_model.load takes one of [ ] * ? \\ in the path {out} for a pattern: give it a path without, for "
            f"example after cd {shlex.quote(out)} the path {version}."
        )
    return f"{report}\nServe it: cd {shlex.quote(models)} && docker compose --profile cpu up"


def _classes(inference: Inference, classifier: str) -> dict[str, Any]:
    """What the card says of labels and guidance; nothing for an unconditional network."""
    num_classes = getattr(inference.network, "num_classes", None)
    if num_classes is None:
        return {}
    names = list(inference.class_names)
    return {
        "num_classes": num_classes,
        "class_names": names or None,
        "label": f"0..{num_classes - 1} are classes; {num_classes} is the null class: no condition",
        "guidance_scale": "0 unconditional, 1 conditional, above 1 stronger"
        if is_conditional(inference.network)
        else None,
        "classifier": classifier or None,
        "classifier_scale": "weight of the classifier's gradient; 0: none" if classifier else None,
    }


def _saved_model_fields(
    folder: str,
    out: str,
    functions: dict[str, Any],
    sampler: Sampler,
    bound_diffusion: GaussianDiffusion,
    max_batch: int,
) -> dict[str, Any]:
    """Write the warm-up requests; what the card says of a SavedModel."""
    costs = {"initial_noise": 0, "denoise_step": 1, "bits_per_dim": bound_diffusion.num_timesteps}
    evaluations = {name: costs.get(name, sampler.num_evaluations) for name in functions}
    try:
        warm = warmup.write_warmup(folder, os.path.basename(out), functions, evaluations=evaluations)
    except InputError as e:
        warm = []
        logging.warning("No warm-up requests were written: %s The first requests will take seconds longer.", e)
    return {
        "max_batch": max_batch,
        "network_evaluations_per_request": evaluations,
        "warmed_up": warm,
        "bits_per_dim": {
            "timesteps": bound_diffusion.schedule.timesteps.tolist(),
            "meaning": "bits per value: an estimate, from one draw of noise per timestep, of an upper bound on -log2 p(image) "
            "for the model that samples by these timesteps alone; not comparable with the bound of the whole chain",
        },
    }


def _bound_diffusion(diffusion: GaussianDiffusion, num_steps: int) -> GaussianDiffusion:
    """The chain of `num_steps` steps whose bound is served."""
    if not 1 <= num_steps <= diffusion.num_timesteps:
        raise InputError(f"--bpd_steps must be within 1..{diffusion.num_timesteps}, found {num_steps}.")
    return diffusion.respace(space_timesteps(diffusion.num_timesteps, num_steps, _BOUND_SPACING))


def _check_format(out: str, format: str) -> None:
    """A server that polls `out` takes every version for its own format."""
    for version in list_versions(out)[-1:]:
        is_saved_model = os.path.exists(os.path.join(out, str(version), "saved_model.pb"))
        if is_saved_model != (format == SAVED_MODEL):
            raise InputError(
                f"--out={out} holds versions of another format than {format}; a server of them could not load this one. "
                "Give it a folder of its own."
            )


def _evaluation(workdir: str) -> Any:
    path = os.path.join(workdir, "evaluation.json")
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError) as e:
        raise InputError(f"{path} cannot be read as JSON: {e}. Repair or remove it.") from e
