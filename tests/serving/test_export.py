"""What is exported, in processes that know nothing of ddpm_tf."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddpm_tf.images import to_uint8
from ddpm_tf.samplers import sample
from tests.serving.conftest import grey_levels

ROOT = Path(__file__).parent.parent.parent
SEEDS = np.array([7, 0, -1, 2**63 - 1, -(2**63), 12345, 3, 2, 1])


def run_python(code, *args, cwd):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"TF_CPP_MIN_LOG_LEVEL": "2"}
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


C_API = """
import sys
import numpy as np
from tests.serving.c_api import CSession
session, (requests, answers) = CSession(sys.argv[1]), sys.argv[2:]
with np.load(requests) as arrays:
    arrays = dict(arrays)
results = {}
for name, seeds in arrays.items():
    results[name] = session.run("sample", {"seed": seeds})["images"]
assert "tensorflow" not in sys.modules and "ddpm_tf" not in sys.modules
np.savez(answers, **results)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddim", "ddpm", "noisy_ddim"])
def test_the_c_api_draws_what_python_draws_alone_and_in_any_order(name, inference, samplers, saved_models, tmp_path):
    expected = to_uint8(sample(inference.network, samplers[name], SEEDS).images)
    requests = {"all": SEEDS, "reversed": SEEDS[::-1]} | {str(k): SEEDS[k : k + 1] for k in range(9)}
    np.savez(tmp_path / "requests.npz", **requests)
    run_python(C_API, saved_models[name], tmp_path / "requests.npz", tmp_path / "answers.npz", cwd=ROOT)
    with np.load(tmp_path / "answers.npz") as answers:
        assert grey_levels(answers["all"], expected) <= 1
        assert grey_levels(answers["reversed"], expected[::-1]) <= 1
        assert grey_levels(np.concatenate([answers[str(k)] for k in range(9)]), expected) <= 1
    assert len({image.tobytes() for image in expected}) == 9
