"""Damaged config.json, scheduler_config.json and safetensors: an InputError or a result, nothing else.

FUZZ_CASES=20000 python -m pytest -m slow tests/convert/test_diffusers_fuzz.py      (each kind; 1,500 by default)
"""

import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest

from ddpm_tf.convert import diffusers
from ddpm_tf.convert.diffusers_config import read_architecture
from ddpm_tf.convert.diffusers_scheduler import read_scheduler
from ddpm_tf.errors import InputError
from tests.conftest import DATA

SMALL, COND = Path(DATA) / "diffusers_small", Path(DATA) / "diffusers_cond"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CASES = int(os.environ.get("FUZZ_CASES", "1500"))
SCHEDULER = {
    "_class_name": "DDPMScheduler", "num_train_timesteps": 50, "beta_start": 1e-4, "beta_end": 0.02,
    "beta_schedule": "linear", "trained_betas": None, "prediction_type": "epsilon", "variance_type": "fixed_small",
    "clip_sample": True, "clip_sample_range": 1.0, "thresholding": False, "timestep_spacing": "leading",
    "steps_offset": 0, "rescale_betas_zero_snr": False,
}  # fmt: skip


def odd_value(r):
    deep = r.choice([0, [], {}])
    for _ in range(r.choice([1, 3, 200])):
        deep = r.choice([[deep], {"a": deep}])
    numbers = [0, 1, -1, 2**31, 2**63, 10**400, 0.5, -0.0, float("nan"), float("inf"), 1e308, 1e-320]
    words = ["", "x" * 10**4, "\ud800", "linear", "sigmoid"]
    lists = [[], [1, 2], [[1], [2]], [0.1] * 50, [float("nan")] * 50, ["AttnDownBlock2D"] * 2]
    values = [None, True, False, {}, deep, *numbers, *words, *lists]
    return r.choice(values)


def damaged_json(r, content):
    """Bytes of a file that once held `content`."""
    content = dict(content)
    for _ in range(r.choice([0, 1, 1, 2, 5])):
        key = r.choice([*content, "another"])
        if r.random() < 0.2:
            content.pop(key, None)
        else:
            content[key] = odd_value(r)
    text = json.dumps(r.choice([content, content, content, [content], {"a": content}]) if r.random() < 0.3 else content)
    if r.random() < 0.1:
        key = json.dumps(r.choice(sorted(content) or ["a"]))
        text = text.replace("{", f"{{{key}: 1, ", 1)  # a key that may be there twice
    if r.random() < 0.05:
        text = r.choice(["[" * 10**5, '{"a":' * 10**5, '{"beta_end": 1' + "0" * 5000 + "}", "NaN", "", "\0", "{}"])
    encoding = r.choice(["utf-8"] * 8 + ["utf-8-sig", "utf-16", "utf-32", "latin-1"])
    data = bytearray(text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace"))
    if data and r.random() < 0.3:
        for _ in range(r.choice([1, 2, 20])):
            data[r.randrange(len(data))] = r.randrange(256)
    return bytes(data[: r.randrange(len(data))] if data and r.random() < 0.1 else data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["config", "classes", "scheduler"])
def test_a_damaged_json_file_is_refused_or_read(tmp_path, kind):
    r, path, refused = random.Random(0), tmp_path / "x.json", 0
    original, read = SCHEDULER, read_scheduler
    if kind != "scheduler":
        original = json.loads(((SMALL if kind == "config" else COND) / "config.json").read_text())
        read = read_architecture
    for _ in range(CASES):
        path.write_bytes(damaged_json(r, original))
        try:
            read(str(path))
        except InputError as e:
            refused += 1
            assert len(str(e)) < 2000 and str(path) in str(e), e
    assert CASES / 3 < refused < CASES


def damaged_weights(r, data):
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = r.choice(["header", "header", "bytes", "cut", "length", "text"])
    if kind == "header":
        key = r.choice([*header, "another", "__metadata__"])
        entry = header.get(key, {})
        if r.random() < 0.3 or not isinstance(entry, dict) or not entry:
            header[key] = odd_value(r)
        else:
            part = r.choice(list(entry))
            odd = [
                odd_value(r),
                "F16",
                "BF16",
                "F64",
                "I8",
                "F8_E4M3",
                [2**62, 2**62],
                [0, 2**63],
                [-1, 4],
                [8, 0],
                [0, 0],
            ]
            entry[part] = r.choice(odd)
        text = json.dumps(header).encode(errors="replace")
        return struct.pack("<Q", len(text)) + text + body
    if kind == "text":
        text = r.choice([b"[" * 10**5, b"{}", b"null", b'{"a":' * 10**4, b"\xff" * 50, b""])
        return struct.pack("<Q", len(text)) + text + body
    if kind == "length":
        return struct.pack("<Q", r.choice([0, 1, 2, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])) + data[8:]
    if kind == "cut":
        return data[: r.randrange(len(data))]
    data = bytearray(data)
    for _ in range(r.choice([1, 5, 50])):
        data[r.randrange(8 + length if r.random() < 0.8 else len(data))] = r.randrange(256)
    return bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("origin", [SMALL, COND], ids=["small", "cond"])
def test_damaged_weights_are_refused_or_read(tmp_path, monkeypatch, origin):
    """The network is made once: Keras needs seconds for it."""
    r, refused = random.Random(1), 0
    network = diffusers.load_diffusers(origin)
    monkeypatch.setattr(diffusers, "UNet", lambda **_: network)
    shutil.copy(origin / "config.json", tmp_path / "config.json")
    data = (origin / WEIGHTS).read_bytes()
    for _ in range(CASES // 3):
        (tmp_path / WEIGHTS).write_bytes(damaged_weights(r, data))
        try:
            diffusers.load_diffusers(tmp_path)
        except InputError as e:
            refused += 1
            assert str(tmp_path) in str(e), e
    assert refused > CASES / 6
