"""The functions of an export: what a model server is asked, with every request checked before anything is computed."""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from ddpm_tf import images
from ddpm_tf.errors import InputError
from ddpm_tf.evaluation.likelihood import bits_per_dim
from ddpm_tf.samplers.denoisers import network_denoiser
from ddpm_tf.samplers.loop import initial_noise, run_loop, step_noise


class Limits(NamedTuple):
    """What a request may ask: images of `image_shape`, at most `max_batch` of them, steps below `num_steps`."""

    image_shape: tuple
    max_batch: int
    num_steps: int


class Signature(NamedTuple):
    """specs: one named TensorSpec per input, with an open leading dimension; body: their tensors -> {output: tensor}."""

    specs: tuple
    body: Callable


def make_signatures(network, sampler, bound, *, max_batch):
    """{name: tf.function} of everything that the sampler can be asked.

    Args:
        network: an unconditional network as `UNet`.
        sampler: from `make_sampler`.
        bound: the GaussianDiffusion whose bound `bits_per_dim` is; a chain as `GaussianDiffusion.respace` makes it.
        max_batch: the most images of one request.

    Returns:
        {name: tf.function of the checked signature}, none of them compiled by XLA. Without `sample_from_noise` where
        the sampler draws noise after x_T, without `denoise_step` where it carries a state from step to step.

    Raises:
        InputError: a class-conditional network.
    """
    if getattr(network, "num_classes", None) is not None:
        raise InputError("A class-conditional network cannot be exported yet: its signatures need labels.")
    limits = Limits(tuple(network.image_shape), max_batch, sampler.num_steps)
    table = _table(network, sampler, bound, limits.image_shape)
    return {name: _checked(signature, limits) for name, signature in table.items()}


def _table(network, sampler, bound, image_shape):
    denoise_fn = network_denoiser(network, sampler)
    seed, step = tf.TensorSpec([None], tf.int64, "seed"), tf.TensorSpec([None], tf.int32, "step")

    def image(name, dtype=tf.float32):
        return tf.TensorSpec([None, *image_shape], dtype, name)

    @tf.function(input_signature=[image("x_T"), seed], autograph=False)
    def chain(x_T, seed):  # traced once for all that sample
        return run_loop(sampler, denoise_fn, x_T, seed, sampler.init_state(x_T))[0]

    def sample(seed):
        return {"images": _to_uint8(chain(initial_noise(seed, image_shape), seed))}

    def sample_png(seed):
        return {"image_bytes": tf.io.encode_png(sample(seed)["images"])}

    def sample_from_noise(noise):
        x = chain(noise, tf.zeros(tf.shape(noise)[:1], tf.int64))
        return {"images": _to_uint8(_finite(x, "The images are not finite: the noise is too large."))}

    def x_T(seed):
        return {"x_T": initial_noise(seed, image_shape)}

    def denoise_step(x_t, step, seed):
        noise = step_noise(seed, step, image_shape) if sampler.needs_noise else None
        out = sampler.step(denoise_fn, x_t, step, noise, ())
        return {"x_prev": _finite(out.x, "x_prev is not finite: x_t is too large."), "x_0": out.x_0}

    def total_bpd(images_, seed):
        x_0 = images.from_uint8(tf.cast(images_, tf.float32))
        return {"total_bpd": bits_per_dim(bound, bound_fn, x_0, seed).total}

    bound_fn = network_denoiser(network, type(sampler)(bound))
    table = {
        "sample": Signature((seed,), sample),
        "sample_png": Signature((seed,), sample_png),
        "initial_noise": Signature((seed,), x_T),
        "bits_per_dim": Signature((image("images", tf.uint8), seed), total_bpd),
    }
    if not sampler.needs_noise:
        table["sample_from_noise"] = Signature((image("noise"),), sample_from_noise)
    if not tf.nest.flatten(sampler.init_state(tf.zeros([1, *image_shape]))):
        table["denoise_step"] = Signature((image("x_t"), step, seed), denoise_step)
    return table


def _checked(signature, limits):
    """The signature's tf.function, in which every op that depends on the request depends on its checks."""

    def run(*inputs):
        return signature.body(*_check(signature.specs, inputs, limits))

    return tf.function(run, input_signature=signature.specs, autograph=False)


def _check(specs, inputs, limits):
    """The inputs behind assertions on their shapes and number, and then on their values."""
    inputs = [tf.ensure_shape(value, spec.shape) for spec, value in zip(specs, inputs, strict=True)]
    sizes = tf.stack([tf.shape(value)[0] for value in inputs])
    good = tf.reduce_all(sizes == sizes[0]) & (sizes[0] >= 1) & (sizes[0] <= limits.max_batch)
    message = f"A request is of 1 to {limits.max_batch} images, and all its inputs are of the same number; found"
    inputs = _behind(good, [message, sizes], inputs)
    for k, value in enumerate(inputs):
        if value.dtype.is_floating:
            inputs[k] = _finite(value, f"{specs[k].name} must be finite.")
        elif specs[k].name == "step":
            good = tf.reduce_all((value >= 0) & (value < limits.num_steps))
            (inputs[k],) = _behind(good, [f"step must be within 0..{limits.num_steps - 1}; found", value], [value])
    return inputs


def _finite(value, message):
    return _behind(tf.reduce_all(tf.math.is_finite(value)), [message], [value])[0]


def _behind(condition, message, tensors):
    """The tensors, of which none is there before the condition was asserted (a plain Assert, which is never folded)."""
    with tf.control_dependencies([tf.raw_ops.Assert(condition=condition, data=message, summarize=64)]):
        return [tf.identity(tensor) for tensor in tensors]


def _to_uint8(x):
    """`images.to_uint8` on a tensor."""
    return tf.cast(tf.clip_by_value((x + 1.0) * 127.5, 0.0, 255.0), tf.uint8)
