"""The functions of an export: what a model server is asked, with every request checked before anything is computed."""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from ddpm_tf import images
from ddpm_tf.errors import InputError
from ddpm_tf.evaluation.likelihood import bits_per_dim
from ddpm_tf.samplers.base import Sampler
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
    """What a model server can be asked: {name: tf.function}, every one behind its checks.

    Without `sample_from_noise` where the sampler draws noise after x_T, and without `denoise_step` where it carries a
    state from step to step. None is compiled by XLA, which model servers switch off.

    Args:
        network: an unconditional network as `UNet`.
        sampler: from `make_sampler`.
        bound: the GaussianDiffusion, as `respace` makes it, whose variational bound is `bits_per_dim`: that of the
            model which draws an image in the bound's steps alone.
        max_batch: the most images of one request.

    Raises:
        InputError: a class-conditional network.
    """
    _refuse_labels(network)
    limits = Limits(tuple(network.image_shape), max_batch, sampler.num_steps)
    table = _table(network, sampler, bound, limits.image_shape)
    return {name: _checked(signature, limits) for name, signature in table.items()}


def make_portable(network, sampler):
    """What runtimes without our random numbers can be asked: {name: tf.function}, unchecked.

    denoise: x_t, t (trained timesteps, int32) -> output, the network's; sample_from_noise: noise -> images, float32
    within [-1, 1], only where the sampler draws nothing after x_T.

    Raises:
        InputError: a class-conditional network.
    """
    _refuse_labels(network)
    x_t, noise = _image(network, "x_t"), _image(network, "noise")
    t, chain = tf.TensorSpec([None], tf.int32, "t"), _make_chain(network, sampler)
    bodies = {"denoise": ((x_t, t), lambda x_t, t: {"output": network({"x_t": x_t, "t": t}, training=False)})}
    if not sampler.needs_noise:
        bodies["sample_from_noise"] = (noise,), lambda noise: {"images": chain(noise, _no_seeds(noise))}
    return {name: tf.function(body, input_signature=specs, autograph=False) for name, (specs, body) in bodies.items()}


def _refuse_labels(network):
    if getattr(network, "num_classes", None) is not None:
        raise InputError("A class-conditional network cannot be exported yet: its signatures need labels.")


def _image(network, name, dtype=tf.float32):
    return tf.TensorSpec([None, *network.image_shape], dtype, name)


def _make_chain(network, sampler):
    """(x_T [N, H, W, C], seeds [N]) -> x, after all steps."""
    denoise_fn = network_denoiser(network, sampler)
    return lambda x_T, seeds: run_loop(sampler, denoise_fn, x_T, seeds, sampler.init_state(x_T))[0]


def _no_seeds(noise):
    return tf.zeros(tf.shape(noise)[:1], tf.int64)


def _table(network, sampler, bound, image_shape):
    """{name: Signature}. A condition of class-conditional models joins as one more spec of every signature."""
    denoise_fn, bound_fn = network_denoiser(network, sampler), network_denoiser(network, Sampler(bound))
    seed, step = tf.TensorSpec([None], tf.int64, "seed"), tf.TensorSpec([None], tf.int32, "step")
    # A function of its own, so that it is traced and written once for all signatures that sample.
    specs = _image(network, "x_T"), seed
    chain = tf.function(_make_chain(network, sampler), input_signature=specs, autograph=False)

    def sample(seed):
        x = chain(initial_noise(seed, image_shape), seed)
        return {"images": _to_uint8(_finite(x, "The images are not finite: the weights are damaged."))}

    def sample_png(seed):
        return {"image_bytes": tf.io.encode_png(sample(seed)["images"])}

    def sample_from_noise(noise):
        x = chain(noise, _no_seeds(noise))
        return {"images": _to_uint8(_finite(x, "The images are not finite: the noise is too large."))}

    def x_T(seed):
        return {"x_T": initial_noise(seed, image_shape)}

    def denoise_step(x_t, step, seed):
        noise = step_noise(seed, step, image_shape) if sampler.needs_noise else None
        out = sampler.step(denoise_fn, x_t, step, noise, ())
        x_prev, x_0 = (_finite(x, "The step's result is not finite: x_t is too large.") for x in (out.x, out.x_0))
        return {"x_prev": x_prev, "x_0": x_0}

    def total_bpd(grey, seed):
        x_0 = images.from_uint8(tf.cast(grey, tf.float32))
        return {"total_bpd": bits_per_dim(bound, bound_fn, x_0, seed).total}

    table = {
        "sample": Signature((seed,), sample),
        "sample_png": Signature((seed,), sample_png),
        "initial_noise": Signature((seed,), x_T),
        "bits_per_dim": Signature((_image(network, "images", tf.uint8), seed), total_bpd),
    }
    if not sampler.needs_noise:
        table["sample_from_noise"] = Signature((_image(network, "noise"),), sample_from_noise)
    if not tf.nest.flatten(sampler.init_state(tf.zeros([1, *image_shape]))):
        table["denoise_step"] = Signature((_image(network, "x_t"), step, seed), denoise_step)
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
