"""Drawing: network, sampler, labels and guidance joined to images. Everything that samples goes through here."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from ddpm_tf import checks
from ddpm_tf.errors import InputError
from ddpm_tf.networks.contract import Network
from ddpm_tf.samplers.base import Sampler
from ddpm_tf.samplers.denoiser import make_denoiser
from ddpm_tf.samplers.guidance import ClassifierGuided, is_conditional
from ddpm_tf.samplers.loop import Carry, begin, run_loop

# {"labels": int32 [N], "guidance": float32 [N], "classifier_scale": float32 [N]}; one that is not given is not in it
Conditions = dict[str, tf.Tensor]


_MAX_GUIDANCE = 1e6  # an output times more than this says nothing, and overflows soon


def check_conditions(
    network: Network, count: int, labels: Any = None, guidance: Any = None, classifier_scale: Any = None
) -> Conditions:
    """The conditions of `count` images.

    Args:
        labels: integers within 0..num_classes (num_classes is the null class), one for each image. A plain integer, not in a
            list, is the label of all of them. None for an unconditional network.
        guidance: weights, one for each image; a plain number is the weight of all. None: no guidance.
        classifier_scale: as guidance, of a network `guided_by` a classifier; None: 1, if it has one.

    Raises:
        InputError: labels or guidance that do not fit the network, or that cannot be used.
    """
    num_classes = getattr(network, "num_classes", None)
    if (labels is None) != (num_classes is None):
        raise InputError(
            "A class-conditional network needs labels."
            if labels is None
            else "Labels were given, but the network is unconditional (num_classes=None)."
        )
    if guidance is not None and not is_conditional(network):
        raise InputError("Guidance needs labels, and a class-conditional network.")
    has_classifier = isinstance(network, ClassifierGuided)
    if classifier_scale is not None and not has_classifier:
        raise InputError("classifier_scale needs a classifier: give the network as guided_by(network, classifier).")
    if labels is None or num_classes is None:
        return {}
    labels = _one_each(checks.integers, "labels", labels, count, low=0, high=num_classes)
    conditions = {"labels": tf.constant(labels, tf.int32)}
    weights = {
        "guidance": guidance,
        "classifier_scale": 1.0 if has_classifier and classifier_scale is None else classifier_scale,
    }
    for name, value in weights.items():
        if value is not None:
            value = _one_each(checks.reals, name, value, count, low=-_MAX_GUIDANCE, high=_MAX_GUIDANCE)
            conditions[name] = tf.constant(value, tf.float32)
    return conditions


def check_seeds(seeds: Any) -> np.ndarray:
    """Seeds as int64 [N], N >= 1.

    Raises:
        InputError
    """
    seeds = checks.integers("seeds", seeds, **checks.INT64)
    if not seeds.size:
        raise InputError("seeds must be at least one integer, found none.")
    return seeds


def _one_each(check: Callable[..., np.ndarray], name: str, values: Any, count: int, **limits: float) -> np.ndarray:
    """[count] values; a plain number is given to every image, a list is not."""
    if isinstance(values, int | float) or getattr(values, "shape", None) == ():
        values = np.full(count, values)
    return check(name, values, shape=[count], **limits)


def first_carry(network: Network, sampler: Sampler, seeds: tf.Tensor) -> Carry:
    """The carry before the first move, at x_T as a rule, drawn from int64 seeds [N]. For use inside a graph."""
    image_shape = tuple(network.image_shape)
    return begin(sampler, tf.ensure_shape(sampler.initial_state(seeds, image_shape), [None, *image_shape]))


def advance(
    network: Network,
    sampler: Sampler,
    carry: Carry,
    seeds: tf.Tensor,
    conditions: Conditions,
    *,
    start: tf.Tensor | int | None = None,
    stop: tf.Tensor | int = 0,
) -> Carry:
    """The moves start - 1, ..., stop of the sampler's plan, see `run_loop`. For use inside a graph."""
    denoise = make_denoiser(network, sampler.diffusion, sampler.denoising, **conditions)
    return run_loop(sampler, denoise, carry, seeds, start=start, stop=stop)


class Drawing(NamedTuple):
    """The tf.functions of a network and a sampler; the batch dimension is open.

    begin: seeds -> Carry at x_T.
    advance: (carry, seeds, conditions, start, stop) -> Carry; start and stop are int32 scalars, as in `run_loop`.
    """

    begin: Callable[..., Carry]
    advance: Callable[..., Carry]


_CONDITIONS = {
    "labels": tf.TensorSpec([None], tf.int32),
    "guidance": tf.TensorSpec([None], tf.float32),
    "classifier_scale": tf.TensorSpec([None], tf.float32),
}


def compiled(network: Network, sampler: Sampler, conditions: Conditions) -> Drawing:
    """The Drawing for conditions of these names; it is made once and kept with the sampler."""
    drawings = sampler.compiled.setdefault(network, {})
    names = tuple(conditions)
    if names not in drawings:
        seed_spec, scalar = tf.TensorSpec([None], tf.int64), tf.TensorSpec([], tf.int32)
        specs = {name: _CONDITIONS[name] for name in names}

        @tf.function(input_signature=[seed_spec], autograph=False)
        def start_drawing(seeds: tf.Tensor) -> Carry:
            return first_carry(network, sampler, seeds)

        carry_spec = tf.nest.map_structure(
            tf.TensorSpec.from_tensor, start_drawing.get_concrete_function().structured_outputs
        )

        @tf.function(input_signature=[carry_spec, seed_spec, specs, scalar, scalar], autograph=False)
        def go_on(carry: Carry, seeds: tf.Tensor, conditions: Conditions, start: tf.Tensor, stop: tf.Tensor) -> Carry:
            return advance(network, sampler, carry, seeds, conditions, start=start, stop=stop)

        drawings[names] = Drawing(start_drawing, go_on)
    return drawings[names]


def make_draw(
    network: Network, sampler: Sampler, strategy: tf.distribute.Strategy | None = None
) -> Callable[..., np.ndarray]:
    """draw(seeds, labels=None, guidance=None, classifier_scale=None) -> float32 [N, H, W, C]: the images of `sample`.

    Args:
        strategy: the strategy under which the network's variables were made. Its replicas in this process share the seeds.
            Their images are those of one replica up to rounding, since each is a function of its seed. None: one device.
    """
    local = _local_replicas(strategy)
    if strategy is None or local == 1:
        return functools.partial(_draw_here, network, sampler)
    on_all = _on_all_replicas(network, sampler, strategy)

    def draw(seeds: Any, **given: Any) -> np.ndarray:
        seeds = check_seeds(seeds)
        conditions = check_conditions(network, len(seeds), **given)
        size = -(-len(seeds) // local)  # every replica gets as many
        arrays = {"seeds": seeds, **{name: tensor.numpy() for name, tensor in conditions.items()}}
        shared = {name: _share(strategy, np.resize(array, size * local)) for name, array in arrays.items()}
        images = strategy.experimental_local_results(on_all(shared.pop("seeds"), shared))
        return np.concatenate([part.numpy() for part in images])[: len(seeds)]

    return draw


def _local_replicas(strategy: tf.distribute.Strategy | None) -> int:
    """How many replicas of the strategy this process has."""
    return 1 if strategy is None or strategy.num_replicas_in_sync == 1 else len(strategy.extended.worker_devices)


def _on_all_replicas(network: Network, sampler: Sampler, strategy: tf.distribute.Strategy) -> Callable[..., Any]:
    """The tf.function (seeds, conditions) -> images, values of every replica; it is made once and kept with the sampler."""
    drawings = sampler.compiled.setdefault(network, {})
    if strategy not in drawings:

        def on_replica(seeds: tf.Tensor, conditions: Conditions) -> tf.Tensor:
            # run_loop needs an unknown batch size; without this the replica's static size would be traced in.
            seeds = tf.compat.v1.placeholder_with_default(seeds, [None])
            return advance(network, sampler, first_carry(network, sampler, seeds), seeds, conditions).x

        @tf.function(autograph=False, reduce_retracing=True)
        def on_all(seeds: tf.Tensor, conditions: Conditions) -> Any:
            return strategy.run(on_replica, (seeds, conditions))

        drawings[strategy] = on_all
    return drawings[strategy]


def _share(strategy: tf.distribute.Strategy, array: np.ndarray) -> Any:
    """Equal parts of an array, one for each of this process's replicas."""
    parts = iter(np.split(array, len(strategy.extended.worker_devices)))
    return strategy.experimental_distribute_values_from_function(lambda _: tf.constant(next(parts)))


def _draw_here(network: Network, sampler: Sampler, seeds: Any, **given: Any) -> np.ndarray:
    seeds = tf.constant(check_seeds(seeds))
    conditions = check_conditions(network, len(seeds), **given)
    drawing, moves = compiled(network, sampler, conditions), tf.constant(sampler.plan.num_moves)
    return drawing.advance(drawing.begin(seeds), seeds, conditions, moves, tf.constant(0)).x.numpy()
