"""What docs/serving.md tells people to type is typed, against the stand-in."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("requests", reason="needs ddpm_tf[serving]: requests")
pytest.importorskip("tensorflow_serving.apis", reason="needs ddpm_tf[serving]: tensorflow-serving-api")

from tests.serving.stand_in import StandIn

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(r"(?:<!-- (.*?) -->\n)?```(bash|python)\n(.*?)```", re.DOTALL)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "exported"
    shutil.copytree(exported.parent, folder)
    return folder


def test_what_is_not_run_here_is_docker_and_what_other_tests_run():
    blocks = BLOCK.findall((ROOT / "docs" / "serving.md").read_text())
    assert len(blocks) >= 8
    for note, _, code in blocks:
        assert (note == "not run") == ("docker" in code)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on PATH")
def test_the_pages_commands_run(models, tmp_path):
    text = (ROOT / "docs" / "serving.md").read_text()
    with StandIn(models) as stand_in:
        for old, new in (
            ("localhost:8501", f"127.0.0.1:{stand_in.rest_api_port}"),
            ("localhost:8500", f"127.0.0.1:{stand_in.port}"),
            ("num_steps=50", "num_steps=4"),  # of the tests' model
            ("progress_steps=50", "progress_steps=4"),
        ):
            text = text.replace(old, new)
        for note, language, code in BLOCK.findall(text):
            if note or "run_export.py" in code:  # test_export runs that one
                continue
            run = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
            path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
            result = subprocess.run(
                [*run, code], cwd=tmp_path, env={"PATH": path, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
            )
            assert result.returncode == 0, f"{code}\n{result.stdout}{result.stderr}"
    assert (tmp_path / "seven.png").read_bytes().startswith(b"\x89PNG")
    for folder, images in (("drawn", 40), ("drawn_by_python", 40), ("drawn_stepwise", 4)):
        assert len(list((tmp_path / folder).glob("seed_*.png"))) == images
