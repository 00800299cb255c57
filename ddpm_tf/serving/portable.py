"""ONNX and OpenVINO files, for runtimes other than TensorFlow."""

import importlib
import os
from typing import Any

from ddpm_tf.errors import InputError
from ddpm_tf.networks.contract import Network
from ddpm_tf.samplers.base import Sampler
from ddpm_tf.serving.signatures import make_portable

_OPSET = 17


def save_portable(path: str, format: str, network: Network, sampler: Sampler) -> dict[str, Any]:
    """Write `denoise`, and `sample_from_noise` if the sampler draws no noise after x_T; see `make_portable`.

    Args:
        path: an existing folder. The files are NAME.onnx, or NAME.xml and NAME.bin.
        format: a key of `FORMATS`.
        network, sampler: see `make_portable`.

    Returns:
        {name: ConcreteFunction}.

    Raises:
        InputError: the format's packages are not installed, or the network is class-conditional.
    """
    functions = make_portable(network, sampler)
    for name, function in functions.items():
        FORMATS[format](os.path.join(path, name), function)
    return {name: function.get_concrete_function() for name, function in functions.items()}


def _save_onnx(path: str, function: Any) -> None:
    tf2onnx = _import("tf2onnx", "onnx")
    tf2onnx.convert.from_function(
        function, input_signature=function.input_signature, opset=_OPSET, output_path=f"{path}.onnx"
    )


def _save_openvino(path: str, function: Any) -> None:
    openvino = _import("openvino", "openvino")
    model = openvino.convert_model(function.get_concrete_function())
    openvino.save_model(model, f"{path}.xml", compress_to_fp16=False)


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise InputError(
            f"--format={extra} needs {module}, which cannot be imported ({e}). Install it: pip install -e '.[{extra}]'."
        ) from e


FORMATS = {"onnx": _save_onnx, "openvino": _save_openvino}
