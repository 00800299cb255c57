"""The SavedModel that TensorFlow Serving loads, and the list of ops that may be in it."""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from absl import logging
from tensorflow.core.protobuf import saved_model_pb2

from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.errors import RunError
from ddpm_tf.networks.contract import Network
from ddpm_tf.samplers.base import Sampler
from ddpm_tf.serving.signatures import make_signatures

# Arithmetic, shapes, loops, checks, PNG encoding and reading weights. Nothing here touches a file, runs Python, or draws
# random numbers from a state.
OPS = frozenset(
    {
        "Abs", "AddV2", "All", "Assert", "AvgPool", "BiasAdd", "Bitcast", "BitwiseAnd", "BitwiseXor", "Cast", "ConcatV2",
        "Const", "Conv2D", "Cos", "DepthToSpace", "Einsum", "EncodePng", "EnsureShape", "Equal", "Exp", "ExpandDims",
        "Fill", "GatherV2", "Greater", "GreaterEqual", "Identity", "If", "IsFinite", "Less", "LessEqual", "Log",
        "LogicalAnd", "MatMul", "Maximum", "Mean", "Minimum", "Mul", "Neg", "NoOp", "OnesLike", "Pack", "Pad",
        "Placeholder", "Pow", "Prod", "Range", "ReadVariableOp", "RealDiv", "Reshape", "RightShift", "Rsqrt", "SelectV2",
        "Shape", "Sigmoid", "Sin", "Softmax", "SpaceToDepth", "Sqrt", "SquaredDifference", "Squeeze",
        "StatefulPartitionedCall", "StopGradient", "StridedSlice", "Sub", "Sum", "Tanh", "TensorListReserve",
        "TensorListSetItem", "TensorListStack", "Tile", "TopKV2", "Transpose", "VarHandleOp", "While", "ZerosLike",
        # A classifier and the gradient of what it says
        "AddN", "AvgPoolGrad", "BiasAddGrad", "BroadcastGradientArgs", "BroadcastTo", "ConcatOffset",
        "Conv2DBackpropFilter", "Conv2DBackpropInput", "FloorMod", "InvertPermutation", "LogSoftmax", "OneHot", "RsqrtGrad",
        "ShapeN", "SigmoidGrad", "Slice", "StridedSliceGrad",
    }
)  # fmt: skip
# What restores the weights when the model is loaded. The server calls these functions, and no request reaches them.
_SAVER = re.compile(r"__inference__traced_(save|restore)_\d+$")
SAVER_OPS = frozenset(
    {
        "AssignVariableOp", "DisableCopyOnRead", "MergeV2Checkpoints", "RestoreV2", "SaveV2", "Select", "ShardedFilename",
        "StaticRegexFullMatch", "StringJoin",
    }
)  # fmt: skip


def save_model(
    path: str, network: Network, sampler: Sampler, bound_diffusion: GaussianDiffusion, *, max_batch: int
) -> dict[str, Any]:
    """Write a network, its sampler and their signatures as a SavedModel.

    Args:
        path: the folder, new or empty.
        network, sampler, bound_diffusion, max_batch: see `make_signatures`.

    Returns:
        {signature: ConcreteFunction}.

    Raises:
        RunError: an op that is not on the list.
    """
    functions = make_signatures(network, sampler, bound_diffusion, max_batch=max_batch)
    functions = {name: function.get_concrete_function() for name, function in functions.items()}
    signatures = {"serving_default": functions["sample"], **functions}
    module = tf.Module()
    # The variables themselves, not Keras' wrappers of them: a session looks for these.
    module.weights = [v.value for v in network.variables]
    with _warnings_only():  # of every unnamed capture, and of every file
        tf.saved_model.save(module, path, signatures, tf.saved_model.SaveOptions(experimental_custom_gradients=False))
    check_ops(path)
    return signatures


@contextlib.contextmanager
def _warnings_only() -> Iterator[None]:
    levels = [(logger, logger.level) for logger in (logging.get_absl_logger(), tf.get_logger())]
    for logger, _ in levels:
        logger.setLevel("WARNING")
    try:
        yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)


def check_ops(path: str) -> None:
    """Compare a SavedModel's ops, in its graph and in every function, with the lists of those allowed.

    Raises:
        RunError: naming the ops that are not on them, and a function that has each.
    """
    model = saved_model_pb2.SavedModel()
    with open(os.path.join(path, "saved_model.pb"), "rb") as f:
        model.ParseFromString(f.read())
    unknown: dict[str, str] = {}
    for meta_graph in model.meta_graphs:
        graph = meta_graph.graph_def
        bodies = {"the graph": graph.node} | {f.signature.name: f.node_def for f in graph.library.function}
        for name, nodes in bodies.items():
            allowed = OPS | SAVER_OPS if _SAVER.match(name) else OPS
            unknown |= {node.op: name for node in nodes if node.op not in allowed}
    if unknown:
        found = ", ".join(f"{op} (in {name})" for op, name in sorted(unknown.items()))
        raise RunError(
            f"The export has ops that are not on the list of those allowed on a server: {found}. If they neither touch "
            "files, nor run Python, nor draw random numbers from a state, add them to OPS in ddpm_tf/serving/export.py."
        )
