"""The one loop behind every sampler, and `sample`, which compiles and runs it."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from ddpm_tf import rng
from ddpm_tf.errors import InputError
from ddpm_tf.samplers.denoisers import guided_denoiser, network_denoiser


class Trace(NamedTuple):
    """States of a sampling run, in ascending noise: slot j belongs to index j k of the chain.

    index: int [K], the indices 0, k, 2k, ...
    x_t: float32 [K + 1, N, H, W, C]; slot j is the state after the step at index j k, so slot 0 is the final
        image; the last slot is x_T.
    x_0: float32 [K, N, H, W, C], the clean image predicted by the step at index j k.
    """

    index: np.ndarray
    x_t: np.ndarray
    x_0: np.ndarray


class Samples(NamedTuple):
    """images: float32 [N, H, W, C], nominally within [-1, 1]; trace: a Trace, or None when none was asked for."""

    images: np.ndarray
    trace: Trace | None


def initial_noise(seeds, image_shape):
    """x_T ~ N(0, I), float32 [N, H, W, C], a function of each image's int64 seed."""
    return rng.normal(seeds, image_shape, purpose=rng.Purpose.PRIOR)


def step_noise(seeds, i, image_shape):
    """The noise of the step at index i, float32 [N, H, W, C], a function of (seed, i)."""
    return rng.normal(seeds, image_shape, purpose=rng.Purpose.STEP, step=i)


def run_loop(sampler, denoise_fn, x, seeds, state=(), *, start=None, stop=0, noise_fn=step_noise):
    """Steps i = start - 1, ..., stop of a sampler, as one `tf.while_loop`.

    Args:
        sampler: Sampler.
        denoise_fn: (x_t, i) -> network output.
        x: [B, H, W, C], the state at index `start` (x_T for start = S).
        seeds: int64 [B], one per image.
        state: the sampler's state at `start`.
        start, stop: int scalars, 0 <= stop < start <= S; None: S. Running S..k and then k..0 is running S..0.
        noise_fn: (seeds, i, image_shape) -> N(0, I) for the step at i.

    Returns:
        (x, x_0, state) after the step at index `stop`.
    """
    image_shape = tuple(x.shape[1:])
    start = tf.convert_to_tensor(sampler.num_steps if start is None else start, tf.int32)
    batch = tf.shape(x)[0]

    def body(i, x, x_0, state):
        del x_0
        i = i - 1
        noise = noise_fn(seeds, i, image_shape) if sampler.needs_noise else None
        out = sampler.step(denoise_fn, x, tf.fill([batch], i), noise, state)
        x, x_0 = (tf.ensure_shape(v, [None, *image_shape]) for v in (out.x, out.x_0))
        return i, x, x_0, out.state

    _, x, x_0, state = tf.while_loop(
        lambda i, *_: i > stop, body, (start, x, tf.zeros_like(x), state), parallel_iterations=1
    )
    return x, x_0, state


def sample(network, sampler, seeds, *, labels=None, guidance=None, trace=0, shared_noise_steps=-1):
    """Images from seeds: seed s is the same image in any batch, on any device.

    Args:
        network: a network as `UNet`; its `image_shape` is the images'.
        sampler: from `make_sampler`.
        seeds: int64 [N], one per image.
        labels: int32 [N], for a class-conditional network.
        guidance: weight of classifier-free guidance, one number or [N]: 0 ignores the labels, 1 is conditional, above 1
            stronger; None: conditional, at half the cost.
        trace: keep the states of every `trace` steps (1: all of them); 0: none.
        shared_noise_steps: k >= 0: all images start from the first one's x_T and share its noise for the first k steps
            (Fig. 7 of the paper); -1: nothing is shared.

    Returns:
        Samples.

    Raises:
        InputError: no seeds, labels or guidance that do not match the network, a negative trace, k outside -1..S.
    """
    seeds = np.asarray(seeds, np.int64)
    if seeds.ndim != 1 or seeds.size == 0:
        raise InputError(f"seeds must be a list of at least one integer, found shape {seeds.shape}.")
    if (labels is None) != (getattr(network, "num_classes", None) is None):
        raise InputError(
            "A class-conditional network needs labels."
            if labels is None
            else "Labels were given, but the network is unconditional (num_classes=None)."
        )
    if guidance is not None and labels is None:
        raise InputError("Guidance needs labels, and a class-conditional network.")
    if trace < 0:
        raise InputError(f"trace must be 0 (none) or a number of steps, found {trace}.")
    if not -1 <= shared_noise_steps <= sampler.num_steps:
        raise InputError(f"shared_noise_steps must be within -1..{sampler.num_steps}, found {shared_noise_steps}.")
    conditions = {} if labels is None else {"labels": tf.constant(labels, tf.int32)}
    if guidance is not None:
        conditions["guidance"] = tf.constant(np.broadcast_to(np.float32(guidance), seeds.shape))
    start, run = _compiled(network, sampler, tuple(conditions))
    shared = tf.fill(seeds.shape, seeds[0])
    seeds = tf.constant(seeds)
    x, state = start(shared if shared_noise_steps >= 0 else seeds)

    def advance(x, state, start, stop):
        middle = min(start, max(stop, sampler.num_steps - shared_noise_steps))
        x_0 = x
        for of_seeds, top, bottom in ((shared, start, middle), (seeds, middle, stop)):
            if top > bottom:
                x, x_0, state = run(x, of_seeds, conditions, state, tf.constant(top), tf.constant(bottom))
        return x, x_0, state

    if trace:
        return _traced(advance, x, state, sampler.num_steps, trace)
    return Samples(advance(x, state, sampler.num_steps, 0)[0].numpy(), None)


def denoise_from(network, sampler, x, seeds, *, start):
    """Run the steps start - 1 ... 0 on x, the state at index `start` of an unconditional network's chain.

    Args:
        x: float32 [N, H, W, C]; seeds: int64 [N], of the steps' noise; start: 1 <= start <= S.

    Returns:
        float32 [N, H, W, C].
    """
    begin, run = _compiled(network, sampler)
    _, state = begin(seeds)
    return run(x, seeds, {}, state, tf.constant(start), tf.constant(0))[0].numpy()


def _traced(advance, x, state, num_steps, every):
    index = np.arange(0, num_steps, every)
    states, predictions, top = [x.numpy()], [], num_steps
    for stop in index[::-1].tolist():
        x, x_0, state = advance(x, state, top, stop)
        states.append(x.numpy())
        predictions.append(x_0.numpy())
        top = stop
    return Samples(states[-1], Trace(index, np.stack(states[::-1]), np.stack(predictions[::-1])))


_CONDITIONS = {"labels": tf.TensorSpec([None], tf.int32), "guidance": tf.TensorSpec([None], tf.float32)}


def _compiled(network, sampler, conditions=()):
    """The tf.functions of this sampler, network and names of conditions, made once; the batch dimension is open."""
    functions = sampler.compiled.setdefault(network, {})
    if conditions not in functions:
        image_shape = tuple(network.image_shape)

        seed_spec = tf.TensorSpec([None], tf.int64)

        @tf.function(input_signature=[seed_spec], autograph=False)
        def start(seeds):
            x_T = initial_noise(seeds, image_shape)
            return tf.ensure_shape(x_T, [None, *image_shape]), sampler.init_state(x_T)

        outputs = start.get_concrete_function().structured_outputs
        x, state = tf.nest.map_structure(tf.TensorSpec.from_tensor, outputs)
        specs = {name: _CONDITIONS[name] for name in conditions}
        scalar = tf.TensorSpec([], tf.int32)

        @tf.function(input_signature=[x, seed_spec, specs, state, scalar, scalar], autograph=False)
        def run(x, seeds, conditions, state, start, stop):
            labels = conditions.get("labels")
            denoise_fn = network_denoiser(network, sampler, labels)
            if "guidance" in conditions:
                null = network_denoiser(network, sampler, tf.fill(tf.shape(labels), network.num_classes))
                denoise_fn = guided_denoiser(denoise_fn, null, conditions["guidance"])
            return run_loop(sampler, denoise_fn, x, seeds, state, start=start, stop=stop)

        functions[conditions] = start, run
    return functions[conditions]
