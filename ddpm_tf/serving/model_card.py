"""model_card.json: what a version folder holds, where it comes from, and how it may be used."""

import hashlib
import json
import os
import platform
import time

import keras
import numpy as np
import tensorflow as tf

from ddpm_tf import __version__

FILE = "model_card.json"


def make_card(inference, sampler, functions, **fields):
    """The card, as what JSON can hold.

    Args:
        inference: config, network, diffusion and step of a workdir.
        sampler: the one that is exported.
        functions: {signature: ConcreteFunction}.
        fields: what else the card says.
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
            **{name: config.sample[name] for name in ("sampler", "spacing", "eta", "clip")},
            "num_steps": sampler.num_steps,
            "timesteps": sampler.diffusion.schedule.timesteps.tolist(),
        },
        "signatures": {name: describe(function) for name, function in functions.items()},
        "versions": {
            "ddpm_tf": __version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "config": config.to_dict(),
    }


def describe(function):
    """{"inputs": {key: type}, "outputs": {key: type}}; a type is dtype and shape."""

    def types(specs):
        return {key: f"{spec.dtype.name} {[d or 'N' for d in spec.shape]}".replace("'", "") for key, spec in specs}

    outputs = function.structured_outputs.items()
    return {
        "inputs": types((spec.name, spec) for spec in function.structured_input_signature[0]),
        "outputs": types((key, tensor) for key, tensor in sorted(outputs)),
    }


def weights_digest(network):
    """SHA-256 of all weights in the order of their paths: the same for every format and every export."""
    digest = hashlib.sha256()
    for v in sorted(network.variables, key=lambda v: v.path):
        digest.update(np.ascontiguousarray(v.numpy(), "<f4").tobytes())
    return digest.hexdigest()


def write_card(path, card):
    """Write the card into a version folder, with the size and the SHA-256 of every other file in it."""
    files = {}
    for folder, _, names in os.walk(path):
        for name in names:
            file = os.path.join(folder, name)
            with open(file, "rb") as f:
                digest = hashlib.file_digest(f, "sha256").hexdigest()
            files[os.path.relpath(file, path)] = {"size": os.path.getsize(file), "sha256": digest}
    with open(os.path.join(path, FILE), "w") as f:
        json.dump({**card, "files": dict(sorted(files.items()))}, f, indent=2)
        f.write("\n")
