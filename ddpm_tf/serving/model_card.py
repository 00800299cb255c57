"""model_card.json: what a version folder contains, where it comes from, and how it may be used."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ddpm_tf import __version__, files
from ddpm_tf.networks.contract import Network
from ddpm_tf.samplers.base import Sampler

FILE = "model_card.json"
# Fields of the config's `sample` section that every request says, or that are of run_sample.py.
_NOT_OF_THE_SAMPLER = ("num_images", "batch_size", "seed", "labels", "guidance")


def make_card(inference: Any, sampler: Sampler, functions: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The card, made of values that JSON can hold.

    Args:
        inference: a workdir's `config`, `network`, `diffusion` and `step`.
        sampler: the exported sampler.
        functions: {signature: ConcreteFunction}.
        fields: further entries of the card.
    """
    config = inference.config
    return {
        **fields,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "training_step": inference.step,
        "parameters": inference.network.count_params(),
        "weights_sha256": weights_digest(inference.network),
        "weights_sha256_is_of": "all weights in the order of their paths, as little-endian float32",
        "image_shape": list(inference.network.image_shape),
        "sampler": {
            **{name: value for name, value in config.sample.items() if name not in _NOT_OF_THE_SAMPLER},
            "num_steps": sampler.num_steps,
            "num_moves": sampler.plan.num_moves,
            "network_evaluations": sampler.num_evaluations,
            "timesteps": sampler.diffusion.schedule.timesteps.tolist(),
        },
        "signatures": {name: signature_types(function) for name, function in functions.items()},
        "versions": {
            "ddpm_tf": __version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "config": config.to_dict(),
    }


def signature_types(function: Any) -> dict[str, dict[str, str]]:
    """{"inputs": {name: type}, "outputs": {name: type}} of a ConcreteFunction; a type is a dtype and a shape."""

    def types(specs: Iterable[tuple[str, Any]]) -> dict[str, str]:
        return {key: f"{spec.dtype.name} {[d or 'N' for d in spec.shape]}".replace("'", "") for key, spec in specs}

    outputs = function.structured_outputs.items()
    return {
        "inputs": types((spec.name, spec) for spec in function.structured_input_signature[0]),
        "outputs": types((key, tensor) for key, tensor in sorted(outputs)),
    }


def weights_digest(network: Network) -> str:
    """SHA-256 of all weights in the order of their paths. It is the same for every format and every export."""
    digest = hashlib.sha256()
    for v in sorted(network.variables, key=lambda v: v.path):
        digest.update(np.ascontiguousarray(v.numpy(), "<f4").tobytes())
    return digest.hexdigest()


def write_card(path: str, card: dict[str, Any]) -> None:
    """Write the card into the version folder `path`, with the size and the SHA-256 of every other file in it."""
    entries = {}
    for folder, _, names in os.walk(path):
        for name in names:
            file = os.path.join(folder, name)
            entries[os.path.relpath(file, path)] = {"size": os.path.getsize(file), "sha256": files.sha256(file)}
    files.write_text(
        os.path.join(path, FILE), json.dumps({**card, "files": dict(sorted(entries.items()))}, indent=2) + "\n"
    )
