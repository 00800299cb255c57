"""A SavedModel through the C API of the TensorFlow wheel: the loader and the session that TensorFlow Serving uses.

ctypes and numpy only: a process that uses this needs no Python TensorFlow.
"""

import ctypes
import importlib.util
import os

import numpy as np

INVALID_ARGUMENT = 3
_STRING, _TSTRING_BYTES = 7, 24
_DTYPES = {
    1: np.float32, 2: np.float64, 3: np.int32, 4: np.uint8, 5: np.int16, 6: np.int8, 9: np.int64, 10: np.bool_,
    17: np.uint16, 19: np.float16, 22: np.uint32, 23: np.uint64,
}  # fmt: skip
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


class CError(Exception):
    """A TF_Status that is not OK: its code (3 is INVALID_ARGUMENT) and message."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code, self.message = code, message


class CSession:
    """A SavedModel's session. `run` may be called from several threads.

    Args:
        saved_model_dir: the folder with saved_model.pb.

    Attributes:
        signatures: {signature: ({input key: (tensor name, dtype, shape)}, {output key: ...})}; dtype is a numpy one,
            object for strings; shape has None for open dimensions.

    Raises:
        CError: a folder that cannot be loaded.
    """

    def __init__(self, saved_model_dir):
        self._lib = _library()
        self._graph = self._lib.TF_NewGraph()
        tags = (ctypes.c_char_p * 1)(b"serve")
        meta_graph = self._lib.TF_NewBuffer()
        with _Status(self._lib) as status:
            self._session = self._lib.TF_LoadSessionFromSavedModel(
                self._lib.TF_NewSessionOptions(),
                None,
                os.fsencode(saved_model_dir),
                tags,
                1,
                self._graph,
                meta_graph,
                status,
            )
        content = ctypes.string_at(meta_graph.contents.data, meta_graph.contents.length)
        self.signatures = _read_signatures(content)
        self._lib.TF_DeleteBuffer(meta_graph)

    def run(self, signature, inputs, outputs=None):
        """{output key: array} of a request {input key: array}; refuses other keys, as a model server does.

        Args:
            signature: its name.
            inputs: {input key: array}; strings as object arrays of bytes.
            outputs: which output keys; None: all.

        Raises:
            CError: with TensorFlow's status code and message.
        """
        if signature not in self.signatures:
            raise CError(
                INVALID_ARGUMENT, f"Unknown signature {signature!r}; expected one of {sorted(self.signatures)}."
            )
        known_inputs, known_outputs = self.signatures[signature]
        # The C API knows tensors only; input keys are compared by the model server itself.
        missing, extra = known_inputs.keys() - inputs.keys(), inputs.keys() - known_inputs.keys()
        if missing or extra:
            raise CError(INVALID_ARGUMENT, f"Input keys: missing {sorted(missing)}, not expected {sorted(extra)}.")
        fetched = {key: known_outputs[key][0] for key in (known_outputs if outputs is None else outputs)}
        arrays = self.run_tensors({known_inputs[key][0]: v for key, v in inputs.items()}, list(fetched.values()))
        return dict(zip(fetched, arrays, strict=True))

    def run_tensors(self, feeds, fetches):
        """Arrays of the tensors named in `fetches`, with `feeds` {tensor name: array}; nothing is checked here."""
        lib = self._lib
        values = [self._to_tensor(np.asarray(array)) for array in feeds.values()]
        results = (ctypes.c_void_p * len(fetches))()
        try:
            with _Status(lib) as status:
                lib.TF_SessionRun(
                    self._session,
                    None,
                    self._outputs(feeds),
                    (ctypes.c_void_p * len(values))(*values),
                    len(values),
                    self._outputs(fetches),
                    results,
                    len(fetches),
                    None,
                    0,
                    None,
                    status,
                )
            return [self._to_array(result) for result in results]
        finally:
            for tensor in (*values, *filter(None, results)):
                lib.TF_DeleteTensor(tensor)

    def _outputs(self, names):
        outputs = (_Output * len(names))()
        for output, name in zip(outputs, names, strict=True):
            operation, _, index = name.partition(":")
            output.operation = self._lib.TF_GraphOperationByName(self._graph, operation.encode())
            output.index = int(index)
            assert output.operation, f"the graph has no {name}"
        return outputs

    def _to_tensor(self, array):
        is_string = array.dtype == object
        code = _STRING if is_string else _CODES[array.dtype]
        size = array.size * _TSTRING_BYTES if is_string else array.nbytes
        dims = (ctypes.c_int64 * array.ndim)(*array.shape)
        tensor = self._lib.TF_AllocateTensor(code, dims, array.ndim, size)
        data = self._lib.TF_TensorData(tensor)
        if is_string:
            for k, value in enumerate(array.flat):
                self._lib.TF_StringInit(data + k * _TSTRING_BYTES)
                self._lib.TF_StringCopy(data + k * _TSTRING_BYTES, value, len(value))
        else:
            ctypes.memmove(data, np.ascontiguousarray(array).ctypes.data, size)
        return tensor

    def _to_array(self, tensor):
        lib = self._lib
        code, data = lib.TF_TensorType(tensor), lib.TF_TensorData(tensor)
        shape = [lib.TF_Dim(tensor, k) for k in range(lib.TF_NumDims(tensor))]
        if code != _STRING:
            content = ctypes.string_at(data, lib.TF_TensorByteSize(tensor))
            return np.frombuffer(content, _DTYPES[code]).reshape(shape)
        strings = np.empty(int(np.prod(shape)), object)
        for k in range(strings.size):
            string = data + k * _TSTRING_BYTES
            strings[k] = ctypes.string_at(lib.TF_StringGetDataPointer(string), lib.TF_StringGetSize(string))
        return strings.reshape(shape)


class _Buffer(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("length", ctypes.c_size_t), ("deallocator", ctypes.c_void_p))


class _Output(ctypes.Structure):
    _fields_ = (("operation", ctypes.c_void_p), ("index", ctypes.c_int))


class _Status:
    """A TF_Status, which raises at the end of its block if it is not OK."""

    def __init__(self, lib):
        self._lib = lib

    def __enter__(self):
        self._status = self._lib.TF_NewStatus()
        return self._status

    def __exit__(self, *_):
        code, message = self._lib.TF_GetCode(self._status), self._lib.TF_Message(self._status).decode(errors="replace")
        self._lib.TF_DeleteStatus(self._status)
        if code:
            raise CError(code, message)


def _library():
    folder = importlib.util.find_spec("tensorflow").submodule_search_locations[0]
    # Not RTLD_GLOBAL: extensions loaded later, such as numpy.random, would find its symbols instead of their own, and crash.
    lib = ctypes.CDLL(os.path.join(folder, "libtensorflow_cc.so.2"), mode=ctypes.RTLD_LOCAL)
    pointer, text, size, buffer = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.POINTER(_Buffer)
    outputs, tensors, number = ctypes.POINTER(_Output), ctypes.POINTER(pointer), ctypes.c_int
    for name, result, *arguments in (
        ("TF_NewGraph", pointer),
        ("TF_NewSessionOptions", pointer),
        ("TF_NewStatus", pointer),
        ("TF_DeleteStatus", None, pointer),
        ("TF_GetCode", number, pointer),
        ("TF_Message", text, pointer),
        ("TF_NewBuffer", buffer),
        ("TF_DeleteBuffer", None, buffer),
        ("TF_LoadSessionFromSavedModel", pointer, pointer, buffer, text, pointer, number, pointer, buffer, pointer),
        ("TF_GraphOperationByName", pointer, pointer, text),
        (
            "TF_SessionRun",
            None,
            pointer,
            buffer,
            outputs,
            tensors,
            number,
            outputs,
            tensors,
            number,
            pointer,
            number,
            buffer,
            pointer,
        ),
        ("TF_AllocateTensor", pointer, number, ctypes.POINTER(ctypes.c_int64), number, size),
        ("TF_DeleteTensor", None, pointer),
        ("TF_TensorData", pointer, pointer),
        ("TF_TensorType", number, pointer),
        ("TF_TensorByteSize", size, pointer),
        ("TF_NumDims", number, pointer),
        ("TF_Dim", ctypes.c_int64, pointer, number),
        ("TF_StringInit", None, pointer),
        ("TF_StringCopy", None, pointer, text, size),
        ("TF_StringGetDataPointer", pointer, pointer),
        ("TF_StringGetSize", size, pointer),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def _read_signatures(meta_graph):
    """The signatures of a MetaGraphDef, of which field 5 maps names to SignatureDefs."""
    definitions = (_map_entry(entry) for number, entry in _fields(meta_graph) if number == 5)
    return {
        name: tuple(
            {key: _tensor_info(info) for key, info in (_map_entry(e) for n, e in _fields(definition) if n == direction)}
            for direction in (1, 2)  # inputs, outputs
        )
        for name, definition in definitions
        if not name.startswith("__")  # the loader's own
    }


def _map_entry(entry):
    pair = dict(_fields(entry))
    return bytes(pair[1]).decode(), pair.get(2, b"")


def _tensor_info(info):
    """(tensor name, dtype, shape) of a TensorInfo; shape is None when its rank is unknown."""
    found = dict(_fields(info))
    dtype = np.dtype(object if found[2] == _STRING else _DTYPES[found[2]])
    shape = []
    for number, value in _fields(found.get(3, b"")):
        if number == 3:
            return bytes(found[1]).decode(), dtype, None
        size = dict(_fields(value)).get(1, 0)
        shape.append(None if size == 2**64 - 1 else size)  # -1
    return bytes(found[1]).decode(), dtype, tuple(shape)


def _fields(message):
    """(number, value) of the fields of a message in protobuf's wire format."""
    position, message = 0, memoryview(message)

    def varint():
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
        else:
            length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            yield key >> 3, message[position : position + length]
            position += length
