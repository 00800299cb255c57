"""ONNX and OpenVINO files, for runtimes that are not TensorFlow."""

import importlib
import os

from ddpm_tf.errors import InputError
from ddpm_tf.serving.signatures import make_portable

_OPSET = 17


def save_portable(path, to, network, sampler):
    """Write denoise, and sample_from_noise where the sampler draws nothing after x_T; see `make_portable`.

    Args:
        path: an existing folder; the files are NAME.onnx, or NAME.xml and NAME.bin.
        to: a name of `FORMATS`.
        network, sampler: see `make_portable`.

    Returns:
        {name: ConcreteFunction}.

    Raises:
        InputError: the format's packages are not installed.
    """
    functions = make_portable(network, sampler)
    for name, function in functions.items():
        FORMATS[to](os.path.join(path, name), function)
    return {name: function.get_concrete_function() for name, function in functions.items()}


def _save_onnx(path, function):
    tf2onnx = _import("tf2onnx", "onnx")
    tf2onnx.convert.from_function(
        function, input_signature=function.input_signature, opset=_OPSET, output_path=f"{path}.onnx"
    )


def _save_openvino(path, function):
    openvino = _import("openvino", "openvino")
    model = openvino.convert_model(function.get_concrete_function())
    openvino.save_model(model, f"{path}.xml", compress_to_fp16=False)


def _import(module, extra):
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise InputError(f"--format={extra} needs {module}, which cannot be imported ({e}): '.[{extra}]'.") from e


FORMATS = {"onnx": _save_onnx, "openvino": _save_openvino}
