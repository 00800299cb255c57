"""How much memory a training step will take, from its graph alone."""

import math
from typing import NamedTuple

import tensorflow as tf

from ddpm_tf.training.trainer import DiffusionModel

_ALIASES = {
    "Identity",
    "Reshape",
    "ReadVariableOp",
    "Squeeze",
    "ExpandDims",
    "StopGradient",
    "PreventGradient",
    "Const",
}
_KEPT_COPIES = 4  # weights, moving average, and the two slots of either optimizer


class StepMemory(NamedTuple):
    """Bytes on one device: `kept` between two steps; `peak`, the most that lives at once during a step, `kept` included."""

    kept: int
    peak: int


def estimate_step_memory(model: DiffusionModel, batch_size: int) -> StepMemory:
    """Trace loss and gradient of `batch_size` examples, and follow which tensors live when; nothing is computed.

    Ops run in the order in which they are made, a tensor lives from the op that makes it to the last that reads it, and
    reshapes and reads of variables take nothing. Buffers inside kernels, and what a compiler saves or adds, are not seen.

    Args:
        batch_size: examples at once on one device: of one micro-batch of one replica.
    """
    variables = model.network.trainable_variables
    weights = sum(math.prod(v.shape) for v in variables) * 4
    shape = (batch_size, *model.network.image_shape)
    labels = None if model.network.num_classes is None else tf.TensorSpec(shape[:1], tf.int32)
    images, index = tf.TensorSpec(shape), tf.TensorSpec(shape[:1], tf.int32)
    traced = tf.function(model.loss_and_gradient, autograph=False).get_concrete_function(
        images, labels, index, tf.TensorSpec((), tf.int64), tf.TensorSpec(())
    )
    kept = _KEPT_COPIES * weights
    if model.network.compute_dtype != "float32":
        kept += weights  # the float32 twin that draws the grids
    so_far = weights if model.micro_batches > 1 else 0  # the sum of the parts' gradients
    clipping = 2 * weights  # the gradient, and the clipped one
    return StepMemory(kept, kept + max(so_far + _most_alive(traced.graph), clipping))


def _most_alive(graph: tf.Graph) -> int:
    """The largest sum of bytes of tensors that live at once."""
    ops = graph.get_operations()
    last_use = {}
    for k, op in enumerate(ops):
        for tensor in op.inputs:
            last_use[_owner(tensor).ref()] = k
    for tensor in graph.outputs:
        last_use[_owner(tensor).ref()] = len(ops)
    ends: dict[int, int] = {}
    alive = most = 0
    for k, op in enumerate(ops):
        if op.type not in _ALIASES:
            for tensor in op.outputs:
                size = _size(tensor)
                alive += size
                end = last_use.get(tensor.ref(), k)
                ends[end] = ends.get(end, 0) + size
        most = max(most, alive)
        alive -= ends.pop(k, 0)
    return most


def _owner(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor whose memory this one shares."""
    while tensor.op.type in _ALIASES and tensor.op.inputs:
        tensor = tensor.op.inputs[0]
    return tensor


def _size(tensor: tf.Tensor) -> int:
    elements = tensor.shape.num_elements() if tensor.shape.is_fully_defined() else 0
    return elements * max(tensor.dtype.size, 0) if tensor.dtype not in (tf.resource, tf.variant) else 0
