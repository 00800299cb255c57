"""The functions of an export: what a model server is asked, with every request checked before anything is computed."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from ddpm_tf import images
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.errors import InputError
from ddpm_tf.evaluation.likelihood import bits_per_dim
from ddpm_tf.networks.contract import Network
from ddpm_tf.samplers.base import Sampler
from ddpm_tf.samplers.denoiser import make_denoiser, make_output_fn
from ddpm_tf.samplers.drawing import Conditions, advance, first_carry
from ddpm_tf.samplers.guidance import ClassifierGuided, is_conditional
from ddpm_tf.samplers.loop import Carry, begin, make_move, step_noise

Outputs = dict[str, tf.Tensor]


class Limits(NamedTuple):
    """What a request may ask: at most `max_batch` images, steps below `num_moves`, labels up to `num_classes`."""

    max_batch: int
    num_moves: int
    num_classes: int


class Signature(NamedTuple):
    """specs: one named TensorSpec per input, with an open leading dimension; body: their tensors -> {output: tensor}."""

    specs: tuple[tf.TensorSpec, ...]
    body: Callable[..., Outputs]


def make_signatures(
    network: Network, sampler: Sampler, bound_diffusion: GaussianDiffusion, *, max_batch: int
) -> dict[str, tf.types.experimental.PolymorphicFunction]:
    """What a model server can be asked: {name: tf.function}, every one behind its checks.

    Signatures of a class-conditional network take `label` int32 [N], 0..num_classes (num_classes: no class), and those that
    draw also `guidance_scale` float32 [N] (0 unconditional, 1 conditional, above 1 stronger). Those of a network that is
    `guided_by` a classifier take `classifier_scale` float32 [N] (0: no guidance). `denoise_step` of a network
    with self-conditioning takes `x_0`, the output of the step before, 0 at first. `denoise_step` of a sampler that carries a
    memory from step to step takes and returns it as `memory_0`, `memory_1`, ..., all 0 at first.

    Without `sample_from_noise` where the sampler draws noise after x_T. None is compiled by XLA, which model servers switch
    off.

    Args:
        network: a network as `UNet`.
        sampler: from `make_sampler`.
        bound_diffusion: the GaussianDiffusion, as `respace` makes it, whose variational bound is `bits_per_dim`: that of the
            model which draws an image in the steps of this chain alone.
        max_batch: the most images of one request.

    Raises:
        InputError: a sampler whose images must all make the same move.
    """
    if sampler.moves_together:
        raise InputError(
            "The sampler repaint cannot be exported: it fills in a picture, and a request has no place for one."
        )
    limits = Limits(max_batch, sampler.plan.num_moves, getattr(network, "num_classes", None) or 0)
    table = _table(network, sampler, bound_diffusion)
    return {name: _checked(signature, limits) for name, signature in table.items()}


def make_portable(network: Network, sampler: Sampler) -> dict[str, tf.types.experimental.PolymorphicFunction]:
    """What runtimes without our random numbers can be asked: {name: tf.function}, unchecked.

    denoise: x_t, t (trained timesteps, int32) -> output, the network's; sample_from_noise: noise -> images, float32
    within [-1, 1], only where the sampler draws nothing after x_T.

    Raises:
        InputError: a network that takes labels or, with self-conditioning, x_0.
    """
    if getattr(network, "self_condition", False):
        raise InputError(
            "A network with self-conditioning can be exported as a SavedModel only; ONNX and OpenVINO get no x_0."
        )
    if getattr(network, "num_classes", None) is not None:
        raise InputError(
            "A class-conditional network can be exported as a SavedModel only; ONNX and OpenVINO get no labels."
        )
    x_t, noise = _image(network, "x_t"), _image(network, "noise")
    t = tf.TensorSpec([None], tf.int32, "t")

    def chain(noise: tf.Tensor) -> Outputs:
        return {"images": advance(network, sampler, begin(sampler, noise), _no_seeds(noise), {}).x}

    bodies: dict[str, tuple[tuple[tf.TensorSpec, ...], Callable[..., Outputs]]] = {
        "denoise": ((x_t, t), lambda x_t, t: {"output": network({"x_t": x_t, "t": t}, training=False)})
    }
    if not sampler.needs_noise:
        bodies["sample_from_noise"] = (noise,), chain
    return {name: tf.function(body, input_signature=specs, autograph=False) for name, (specs, body) in bodies.items()}


def _image(network: Network, name: str, dtype: tf.DType = tf.float32) -> tf.TensorSpec:
    return tf.TensorSpec([None, *network.image_shape], dtype, name)


def _no_seeds(noise: tf.Tensor) -> tf.Tensor:
    return tf.zeros(tf.shape(noise)[:1], tf.int64)


# {input of a request: the condition of `drawing`}
_CONDITIONS = {"label": "labels", "guidance_scale": "guidance", "classifier_scale": "classifier_scale"}


def _condition_specs(network: Network) -> tuple[tf.TensorSpec, ...]:
    """The inputs that say what is drawn; the label comes first."""
    if getattr(network, "num_classes", None) is None:
        return ()
    guided = is_conditional(network), isinstance(network, ClassifierGuided)
    scales = [name for name, is_there in zip(("guidance_scale", "classifier_scale"), guided, strict=True) if is_there]
    return tf.TensorSpec([None], tf.int32, "label"), *(tf.TensorSpec([None], tf.float32, name) for name in scales)


def _conditions(specs: Sequence[tf.TensorSpec], inputs: Sequence[tf.Tensor]) -> Conditions:
    """The inputs of a request that these specs name, as `drawing` takes them."""
    return {_CONDITIONS[spec.name]: value for spec, value in zip(specs, inputs, strict=True)}


def _table(network: Network, sampler: Sampler, bound_diffusion: GaussianDiffusion) -> dict[str, Signature]:
    image_shape = tuple(network.image_shape)
    seed, step = tf.TensorSpec([None], tf.int64, "seed"), tf.TensorSpec([None], tf.int32, "step")
    conditions = _condition_specs(network)
    label = conditions[:1] if is_conditional(network) else ()
    memory = sampler.init_memory(tf.zeros([1, *image_shape]))
    memories = tuple(
        tf.TensorSpec([None, *part.shape[1:]], part.dtype, f"memory_{k}")
        for k, part in enumerate(tf.nest.flatten(memory))
    )
    last_x_0 = (_image(network, "x_0"),) if getattr(network, "self_condition", False) else ()

    # A function of its own, so that it is traced and written once for all signatures that sample.
    def run(x_T: tf.Tensor, seed: tf.Tensor, *inputs: tf.Tensor) -> tf.Tensor:
        return advance(network, sampler, begin(sampler, x_T), seed, _conditions(conditions, inputs)).x

    chain = tf.function(run, input_signature=(_image(network, "x_T"), seed, *conditions), autograph=False)

    def sample(seed: tf.Tensor, *inputs: tf.Tensor) -> Outputs:
        x = chain(first_carry(network, sampler, seed).x, seed, *inputs)
        return {"images": _to_uint8(_finite(x, "The images are not finite: the weights are damaged."))}

    def sample_png(seed: tf.Tensor, *inputs: tf.Tensor) -> Outputs:
        return {"image_bytes": tf.io.encode_png(sample(seed, *inputs)["images"])}

    def sample_from_noise(noise: tf.Tensor, *inputs: tf.Tensor) -> Outputs:
        x = chain(noise, _no_seeds(noise), *inputs)
        return {"images": _to_uint8(_finite(x, "The images are not finite: the noise is too large."))}

    def x_T(seed: tf.Tensor) -> Outputs:
        return {"x_T": sampler.initial_state(seed, image_shape)}

    def denoise_step(x_t: tf.Tensor, step: tf.Tensor, seed: tf.Tensor, *inputs: tf.Tensor) -> Outputs:
        noise = step_noise(seed, step, image_shape) if sampler.needs_noise else None
        given, rest = inputs[: len(conditions)], inputs[len(conditions) :]
        x_0 = rest[len(memories)] if last_x_0 else tf.zeros_like(x_t)
        denoise = make_denoiser(network, sampler.diffusion, sampler.denoising, **_conditions(conditions, given))
        before = tf.nest.pack_sequence_as(memory, rest[: len(memories)])
        carry = make_move(sampler, denoise, Carry(x_t, x_0, before), step, noise)
        x_prev, x_0 = (_finite(x, "The step's result is not finite: x_t is too large.") for x in carry[:2])
        after = zip(memories, tf.nest.flatten(carry.memory), strict=True)
        return {"x_prev": x_prev, "x_0": x_0, **{spec.name: part for spec, part in after}}

    def total_bpd(grey: tf.Tensor, seed: tf.Tensor, *inputs: tf.Tensor) -> Outputs:
        x_0 = images.from_uint8(tf.cast(grey, tf.float32))
        return {
            "total_bpd": bits_per_dim(
                bound_diffusion, make_output_fn(network, bound_diffusion, **_conditions(label, inputs)), x_0, seed
            ).total
        }

    table = {
        "sample": Signature((seed, *conditions), sample),
        "sample_png": Signature((seed, *conditions), sample_png),
        "initial_noise": Signature((seed,), x_T),
        "bits_per_dim": Signature((_image(network, "images", tf.uint8), seed, *label), total_bpd),
    }
    if not sampler.needs_noise:
        table["sample_from_noise"] = Signature((_image(network, "noise"), *conditions), sample_from_noise)
    specs = (_image(network, "x_t"), step, seed, *conditions, *memories, *last_x_0)
    table["denoise_step"] = Signature(specs, denoise_step)
    return table


def _checked(signature: Signature, limits: Limits) -> tf.types.experimental.PolymorphicFunction:
    """The signature's tf.function, in which every op that depends on the request depends on its checks."""

    def run(*inputs: tf.Tensor) -> Outputs:
        return signature.body(*_check(signature.specs, inputs, limits))

    return tf.function(run, input_signature=signature.specs, autograph=False)


def _check(specs: Sequence[tf.TensorSpec], inputs: Sequence[tf.Tensor], limits: Limits) -> list[tf.Tensor]:
    """The inputs behind assertions on their shapes and number, and then on their values."""
    tensors = [tf.ensure_shape(value, spec.shape) for spec, value in zip(specs, inputs, strict=True)]
    sizes = tf.stack([tf.shape(value)[0] for value in tensors])
    good = tf.reduce_all(sizes == sizes[0]) & (sizes[0] >= 1) & (sizes[0] <= limits.max_batch)
    message = f"A request is of 1 to {limits.max_batch} images, and all its inputs are of the same number; found"
    tensors = _behind(good, [message, sizes], tensors)
    largest = {"step": limits.num_moves - 1, "label": limits.num_classes}
    for k, value in enumerate(tensors):
        name = specs[k].name
        if value.dtype.is_floating:
            tensors[k] = _finite(value, f"{name} must be finite.")
        elif name in largest:
            good = tf.reduce_all((value >= 0) & (value <= largest[name]))
            (tensors[k],) = _behind(good, [f"{name} must be within 0..{largest[name]}; found", value], [value])
    return tensors


def _finite(value: tf.Tensor, message: str) -> tf.Tensor:
    return _behind(tf.reduce_all(tf.math.is_finite(value)), [message], [value])[0]


def _behind(condition: tf.Tensor, message: list, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The tensors, of which none exists before the condition was asserted (a plain Assert, which is never folded)."""
    with tf.control_dependencies([tf.raw_ops.Assert(condition=condition, data=message, summarize=64)]):
        return [tf.identity(tensor) for tensor in tensors]


def _to_uint8(x: tf.Tensor) -> tf.Tensor:
    """`images.to_uint8` on a tensor."""
    return tf.cast(tf.clip_by_value((x + 1.0) * 127.5, 0.0, 255.0), tf.uint8)
