"""Checkpoint folders of every format: older ones are read, newer ones are refused, damaged ones are detected."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ddpm_tf import files
from ddpm_tf.errors import NoValidCheckpointError
from ddpm_tf.storage import checkpoint_folder, checkpoints
from ddpm_tf.storage.bundles import write_bundle
from ddpm_tf.training.loss_scale import LossScale
from ddpm_tf.training.skipped import SkippedCounts
from tests.storage.test_checkpoints import TENSORS, names, save


@pytest.mark.parametrize(("name", "file"), [("FORMAT", "meta.json"), ("MANIFEST_FORMAT", "MANIFEST.json")])
def test_a_newer_format_is_refused_with_the_version_that_wrote_it_and_left_where_it_is(
    tmp_path, monkeypatch, name, file
):
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint_folder, name, 99)
    monkeypatch.setattr(checkpoint_folder, "__version__", "9.8")
    checkpoints.save(str(tmp_path), 2, TENSORS, {}, keep=3)
    monkeypatch.undo()
    message = (
        f"{file} was written by ddpm_tf 9.8 in format 99, and this is ddpm_tf .*reads formats up to 2: upgrade ddpm_tf"
    )
    with pytest.raises(checkpoints.NewerFormatError, match=message) as e:
        checkpoints.restore_latest(tmp_path, quarantine=True)
    assert e.value.exit_code == 2 and "\n" not in str(e.value)
    assert names(tmp_path) == ["step_000000000001", "step_000000000002"]


def test_a_newer_checkpoint_may_name_its_files_otherwise(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint_folder, "FORMAT", 3)
    monkeypatch.setattr(checkpoint_folder, "_BUNDLE", "weights")
    save(tmp_path, 2)
    monkeypatch.undo()
    with pytest.raises(checkpoints.NewerFormatError, match="format 3"):
        checkpoints.restore_latest(tmp_path, quarantine=True)


def write_old(folder, step, tensors, meta):
    """A checkpoint as early versions wrote it: the manifest has no format."""
    path = folder / f"step_{step:012d}"
    path.mkdir()
    write_bundle(path / "state", tensors)
    (path / "meta.json").write_text(json.dumps(meta))
    manifest = {p.name: {"size": p.stat().st_size, "sha256": files.sha256(p)} for p in path.iterdir()}
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("format", "lacks_counts"), [(1, True), (2, False)])
def test_tensors_that_an_older_format_lacks_begin_as_in_a_new_run(tmp_path, caplog, format, lacks_counts):
    counts = {"skipped/total": np.array(3), "skipped/in_a_row": np.array(1), "skipped/steps": np.arange(32)}
    stored = {"network/a": TENSORS["network/a"], "step": np.array(7), **({} if lacks_counts else counts)}
    write_old(tmp_path, 7, stored, {"format": format})
    with caplog.at_level("INFO", logger="absl"):
        step, tensors = checkpoints.restore_latest(tmp_path, quarantine=True)
    in_a_new_run = {
        name: v.numpy() for state in (LossScale(False), SkippedCounts()) for name, v in state.state().items()
    }
    expected = in_a_new_run | stored
    assert step == 7 and tensors.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(tensors[name], expected[name], err_msg=name)
        assert tensors[name].dtype == expected[name].dtype
    assert caplog.text.count("they begin as in a new run") == 1 and "loss_scale/scale" in caplog.text
    assert ("skipped/total" in caplog.text) == lacks_counts


def test_counts_that_format_2_promises_are_not_made_up(tmp_path):
    write_old(tmp_path, 7, TENSORS, {"format": 2})
    assert checkpoints.restore_latest(tmp_path)[1].keys() == TENSORS.keys()


def test_the_checkpoint_of_version_0_1_0_is_read(tmp_path):
    with tarfile.open(Path(__file__).parent.parent / "data" / "workdir_0_1_0" / "workdir.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    path = tmp_path / "ckpt" / "step_000000000006"
    assert "format" not in json.loads((path / "MANIFEST.json").read_text())
    checkpoints.verify(path)
    step, tensors = checkpoints.restore_latest(tmp_path / "ckpt", quarantine=True)
    assert step == 6 and tensors.keys() == checkpoints.read_meta(tmp_path / "ckpt", 6)["variables"].keys()
    (path / "state.index").write_bytes(b"")
    with pytest.raises(NoValidCheckpointError, match="state.index has 0 bytes, expected 11268"):
        checkpoints.restore_latest(tmp_path / "ckpt")


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": 2}', '{"format": "2", "files": {}}', '{"format": 0}'])
def test_a_damaged_manifest_that_still_parses_is_no_manifest(tmp_path, text):
    save(tmp_path, 1, 2)
    (tmp_path / "step_000000000002" / "MANIFEST.json").write_text(text)
    assert checkpoints.restore_latest(tmp_path)[0] == 1
