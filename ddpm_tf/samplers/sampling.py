"""`sample`: images from seeds, and the states on the way to them."""

import math
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from ddpm_tf import checks
from ddpm_tf.networks.contract import Network
from ddpm_tf.samplers.base import Sampler
from ddpm_tf.samplers.drawing import Conditions, check_conditions, check_seeds, compiled
from ddpm_tf.samplers.loop import Carry


class Trace(NamedTuple):
    """States of a sampling run, in ascending noise: slot j belongs to position j k of the plan, counted from its end.

    index: int [K], the positions 0, k, 2k, ...
    x_t: float32 [K + 1, N, H, W, C]; slot j is the state after the step at position j k, so slot 0 is the final
        image; the last slot is x_T.
    x_0: float32 [K, N, H, W, C], the clean image predicted by the step at position j k.
    """

    index: np.ndarray  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    x_t: np.ndarray
    x_0: np.ndarray


class Samples(NamedTuple):
    """images: float32 [N, H, W, C], nominally within [-1, 1]; trace: a Trace, or None when none was asked for."""

    images: np.ndarray
    trace: Trace | None


def sample(
    network: Network,
    sampler: Sampler,
    seeds: Any,
    *,
    labels: Any = None,
    guidance: Any = None,
    classifier_scale: Any = None,
    trace: int = 0,
    shared_noise_steps: int = -1,
) -> Samples:
    """Images from seeds: seed s is the same image in any batch, on any device.

    Args:
        network: a network as `UNet`; its `image_shape` is the images'.
        sampler: from `make_sampler`.
        seeds: integers of 64 bits, [N], one per image.
        labels: for a class-conditional network, N integers within 0..num_classes, where num_classes means no class. A plain
            integer, not in a list, is the label of all N images.
        guidance: weight of classifier-free guidance, one number or [N]: 0 ignores the labels, 1 is conditional, above 1
            stronger; None: conditional, at half the cost.
        classifier_scale: weight of a classifier's gradient, one number or [N], for a network `guided_by` a classifier.
        trace: keep the states of every `trace` steps (1: all of them); 0: none.
        shared_noise_steps: k >= 0: all images start from the first one's x_T and share its noise for the first k moves
            (Fig. 7 of the paper); -1: nothing is shared.

    Raises:
        InputError: no seeds, labels or guidance that do not fit the network, a negative trace, k outside -1..M, the moves.
    """
    seeds, moves = check_seeds(seeds), sampler.plan.num_moves
    conditions = check_conditions(network, len(seeds), labels, guidance, classifier_scale)
    trace = checks.integer("trace", trace, low=0, high=2**63 - 1)
    shared_noise_steps = checks.integer("shared_noise_steps", shared_noise_steps, low=-1, high=moves)
    kept_states = 1 if not trace else 2 * (2 * -(-moves // trace) + 1)  # a trace is stacked from as many again
    checks.memory(
        f"{len(seeds):,} images of {list(network.image_shape)}{f' with trace={trace}' if trace else ''}",
        4 * len(seeds) * math.prod(network.image_shape) * kept_states,
        "Draw fewer at once.",
    )
    run = _Run(network, sampler, seeds, conditions, shared_noise_steps)
    index = np.arange(0, moves, trace or moves)
    states, predictions, position = [run.carry.x.numpy()], [], moves
    for stop in index[::-1].tolist():
        run.advance(position, stop)
        states.append(run.carry.x.numpy())
        predictions.append(run.carry.x_0.numpy())
        position = stop
    kept = Trace(index, np.stack(states[::-1]), np.stack(predictions[::-1])) if trace else None
    return Samples(states[-1], kept)


class _Run:
    """One run through a plan, in pieces. Before `shared_until` every image uses the first image's noise."""

    def __init__(
        self, network: Network, sampler: Sampler, seeds: np.ndarray, conditions: Conditions, shared_noise_steps: int
    ) -> None:
        self.drawing, self.conditions = compiled(network, sampler, conditions), conditions
        self.seeds, self.first_seed = tf.constant(seeds), tf.fill(seeds.shape, seeds[0])
        self.shared_until = sampler.plan.num_moves - shared_noise_steps
        self.carry: Carry = self.drawing.begin(self.first_seed if shared_noise_steps >= 0 else self.seeds)

    def advance(self, start: int, stop: int) -> None:
        middle = min(start, max(stop, self.shared_until))
        for seeds, top, bottom in ((self.first_seed, start, middle), (self.seeds, middle, stop)):
            if top > bottom:
                self.carry = self.drawing.advance(
                    self.carry, seeds, self.conditions, tf.constant(top), tf.constant(bottom)
                )
