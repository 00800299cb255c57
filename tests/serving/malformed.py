"""Malformed requests to a SavedModel, good ones between them, in a process that is expected to survive.

python -m tests.serving.malformed SAVED_MODEL COUNT SEED      prints what happened as JSON
"""

import collections
import json
import resource
import sys

import numpy as np

from tests.serving.c_api import CError, CSession

SHAPE, MAX_BATCH, NUM_STEPS = (8, 8, 1), 16, 4
DTYPES = [np.float32, np.float64, np.int32, np.uint8, np.int16, np.int64, np.bool_, np.float16, np.uint64, object]
EVERY = 20  # malformed requests between two rounds of good ones
LARGEST = 10_000_000  # seeds of a huge request: 80 MB, where the noise alone would be 2.5 GB


class Generator:
    """Good requests of every signature, and everything that can be wrong with one."""

    def __init__(self, session, seed):
        self._signatures = session.signatures
        self._random = np.random.Generator(np.random.PCG64(seed))

    def good(self, signature):
        n = int(self._random.integers(1, 4))
        return {key: self._value(key, n) for key in self._signatures[signature][0]}

    def _value(self, key, n):
        r = self._random
        if key == "seed":
            extremes = [-(2**63), 2**63 - 1, -1, 0]
            return np.array([r.choice(extremes) if r.random() < 0.3 else r.integers(-(2**63), 2**63) for _ in range(n)])
        if key == "step":
            return r.integers(0, NUM_STEPS, n, np.int32)
        if key == "images":
            return r.integers(0, 256, (n, *SHAPE), np.uint8)
        return r.standard_normal((n, *SHAPE), np.float32)

    def malformed(self):
        """(kind, signature, request)."""
        r = self._random
        while True:
            kind = r.choice(list(KINDS))
            signature = r.choice(sorted(self._signatures))
            request = self.good(signature)
            if KINDS[kind](self, request, r.choice(sorted(request))):
                return str(kind), str(signature), request

    # Each breaks `request` at `key`, or returns False where the kind does not apply to it.

    def dtype(self, request, key):
        others = [d for d in DTYPES if d != request[key].dtype]
        dtype = others[self._random.integers(len(others))]
        ones = np.ones(request[key].shape)
        request[key] = np.full(ones.shape, b"1", object) if dtype is object else ones.astype(dtype)
        return True

    def rank(self, request, key):
        value = request[key]
        request[key] = [value[0], value[None], value[..., None], value.reshape(-1, 1, 1)][self._random.integers(4)]
        return True

    def size(self, request, key):
        value = request[key]
        if value.ndim == 1:
            return False
        axis = self._random.integers(1, 4)
        request[key] = np.repeat(value, 2, axis) if self._random.random() < 0.5 else value.take([], axis)
        return True

    def number(self, request, key):
        """Too many, or none at all, in every input alike."""
        n = self._random.choice([0, MAX_BATCH + 1, MAX_BATCH * 2, 1000])
        request |= {k: np.resize(v, (n, *v.shape[1:])) for k, v in request.items()}
        return True

    def huge(self, request, key):
        n = LARGEST if list(request) == ["seed"] else 100_000
        request |= {k: np.zeros((n, *v.shape[1:]), v.dtype) for k, v in request.items()}
        return True

    def unequal(self, request, key):
        request[key] = np.concatenate([request[key], request[key][:1]])
        return len(request) > 1

    def not_finite(self, request, key):
        if request[key].dtype != np.float32:
            return False
        request[key].flat[self._random.integers(request[key].size)] = self._random.choice([np.nan, np.inf, -np.inf])
        return True

    def too_large(self, request, key):
        """Finite values that overflow inside the network."""
        if request[key].dtype != np.float32:
            return False
        request[key][:] = 3e38
        return True

    def step(self, request, key):
        if "step" not in request:
            return False
        request["step"][0] = self._random.choice([-1, NUM_STEPS, 2**31 - 1, -(2**31)])
        return True

    def missing(self, request, key):
        del request[key]
        return True

    def renamed(self, request, key):
        request[key + "s"] = request.pop(key)
        return True

    def extra(self, request, key):
        request["label"] = np.zeros(len(request[key]), np.int32)
        return True


KINDS = {
    name: function
    for name, function in vars(Generator).items()
    if not name.startswith("_") and name not in ("good", "malformed")
}


def ask(session, signature, request):
    """The answer; keys are checked as the server does, except that a missing input is left to TensorFlow."""
    inputs, outputs = session.signatures[signature]
    if request.keys() < inputs.keys():
        feeds = {inputs[key][0]: value for key, value in request.items()}
        return session.run_tensors(feeds, [name for name, *_ in outputs.values()])
    return session.run(signature, request)


def main(path, count, seed):
    session = CSession(path)
    generator = Generator(session, seed)
    good = {signature: generator.good(signature) for signature in sorted(session.signatures)}
    expected = {signature: session.run(signature, request) for signature, request in good.items()}
    for signature in good:  # the most memory that a good request takes
        session.run(signature, {k: np.resize(v, (MAX_BATCH, *v.shape[1:])) for k, v in good[signature].items()})
    memory, codes, changed = peak_memory(), collections.Counter(), 0
    for k in range(count):
        kind, signature, request = generator.malformed()
        try:
            ask(session, signature, request)
            codes[f"{kind}: 0"] += 1
        except CError as e:
            codes[f"{kind}: {e.code}"] += 1
        if k % EVERY == EVERY - 1:
            for name, request in good.items():
                answer = session.run(name, request)
                changed += not all(np.array_equal(answer[key], expected[name][key]) for key in answer)
    print(json.dumps({"codes": codes, "changed": changed, "grown": peak_memory() - memory}))


def peak_memory():
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
