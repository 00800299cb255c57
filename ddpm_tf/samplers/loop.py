"""The one loop behind every sampler."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from ddpm_tf import rng
from ddpm_tf.samplers.base import Sampler
from ddpm_tf.samplers.denoiser import Denoiser


class Carry(NamedTuple):
    """What one step hands to the next.

    x: [B, H, W, C]; x_0: the last predicted clean image, [B, H, W, C], 0 before the first step; memory: the sampler's.
    """

    x: tf.Tensor
    x_0: tf.Tensor
    memory: Any


def begin(sampler: Sampler, x_T: tf.Tensor) -> Carry:
    """The carry before the first step."""
    return Carry(x_T, tf.zeros_like(x_T), sampler.init_memory(x_T))


def step_noise(seeds: tf.Tensor, position: tf.Tensor, image_shape: tuple[int, ...]) -> tf.Tensor:
    """The noise of the move at `position`, counted from the end: float32 [N, H, W, C], a function of (seed, position)."""
    return rng.normal(seeds, image_shape, purpose=rng.Purpose.STEP, step=position)


def make_move(sampler: Sampler, denoise: Denoiser, carry: Carry, position: tf.Tensor, noise: tf.Tensor | None) -> Carry:
    """One move of the sampler's plan; `position`, int32 [B], is counted from the plan's end."""
    knows_x_0 = functools.partial(denoise, x_0=carry.x_0)
    return Carry(*sampler.step(knows_x_0, carry.x, sampler.plan.move(position), noise, carry.memory))


def run_loop(
    sampler: Sampler,
    denoise: Denoiser,
    carry: Carry,
    seeds: tf.Tensor,
    *,
    start: tf.Tensor | int | None = None,
    stop: tf.Tensor | int = 0,
    noise_fn: Callable[..., tf.Tensor] = step_noise,
) -> Carry:
    """The moves at the positions start - 1, ..., stop of the sampler's plan, as one `tf.while_loop`.

    Args:
        denoise: from `make_denoiser`.
        carry: before the move at start - 1.
        seeds: int64 [B], one per image.
        start, stop: int scalars, positions counted from the plan's end; 0 <= stop < start. None: the whole plan. Running
            M..k and then k..0 is running M..0.
        noise_fn: (seeds, position, image_shape) -> N(0, I) for the move at `position`, a scalar.

    Returns:
        The carry after the move at `stop`.
    """
    image_shape = tuple(carry.x.shape[1:])
    start = tf.convert_to_tensor(sampler.plan.num_moves if start is None else start, tf.int32)
    batch = tf.shape(carry.x)[0]

    def body(position: tf.Tensor, carry: Carry) -> tuple[tf.Tensor, Carry]:
        position = position - 1
        noise = noise_fn(seeds, position, image_shape) if sampler.needs_noise else None
        carry = make_move(sampler, denoise, carry, tf.fill([batch], position), noise)
        x, x_0 = (tf.ensure_shape(v, [None, *image_shape]) for v in carry[:2])
        return position, Carry(x, x_0, carry.memory)

    return tf.while_loop(lambda position, _: position > stop, body, (start, carry), parallel_iterations=1)[1]
