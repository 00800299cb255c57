"""A workdir that version 0.1.0 (commit b0ae630) wrote still trains on, samples the same bytes, and exports.

It is of 6 steps of digits in float16, with a long warm-up: so small are the gradients that most moments are zero, and the
archive stays below 1 MB. `expected.npz` holds what 0.1.0 itself drew from it, and some tensors after two more steps by 0.1.0.
"""

import json
import tarfile

import numpy as np
import pytest

from ddpm_tf import config as config_lib
from ddpm_tf import experiment, files
from ddpm_tf.errors import InputError
from ddpm_tf.experiment.run import read_run_config
from tests.conftest import DATA, state

FOLDER = f"{DATA}/workdir_0_1_0"


@pytest.fixture
def older(tmp_path):
    with tarfile.open(f"{FOLDER}/workdir.tar.xz") as archive:
        archive.extractall(tmp_path / "older", filter="data")
    return tmp_path / "older"


@pytest.fixture(scope="module")
def expected():
    with np.load(f"{FOLDER}/expected.npz", allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_it_samples_the_same_images(older, expected, tmp_path, caplog):
    with caplog.at_level("INFO", logger="absl"):
        out = experiment.sample_images(str(older), out=str(tmp_path / "out"), settings={"batch_size": 4})
    assert caplog.text.count("is of an older version of ddpm_tf; the fields that it lacks mean: ") == 1
    with np.load(f"{out}/samples.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["images"], expected["images"])


def test_its_average_answers_as_it_did(older, expected):
    """The network's output is too small to show in images of four steps; here a wrong weight shows."""
    network = experiment.load_for_inference(str(older)).network
    output = network({"x_t": expected["x_t"], "t": expected["t"]}).numpy()
    assert np.abs(expected["output"]).max() > 1e-4
    np.testing.assert_allclose(output, expected["output"], rtol=1e-3, atol=1e-8)


def test_it_trains_on(older, expected):
    config = read_run_config(str(older))
    config.train.num_steps = 8
    experiment.train(config, str(older))
    step, tensors = state(older)
    assert step == 8
    compared = [name for name in expected if name.startswith("step_8/")]
    assert len(compared) == 4
    for name in compared:
        np.testing.assert_allclose(tensors[name.removeprefix("step_8/")], expected[name], rtol=1e-3, atol=1e-9)
    assert [json.loads(row)["step"] for row in (older / "metrics.jsonl").read_text().splitlines()] == list(range(1, 9))
    assert "theta" in json.loads((older / "config.json").read_text())["network"]  # written anew, by this version


@pytest.mark.slow
def test_it_exports(older, tmp_path):
    experiment.export(str(older), str(tmp_path / "digits"), max_batch=1, bpd_steps=1)
    assert (tmp_path / "digits" / "1" / "saved_model.pb").exists()


def test_a_field_of_a_newer_version_is_refused_with_that_version(older):
    config = json.loads((older / "config.json").read_text())
    config["ddpm_tf"], config["network"]["depth"] = "9.9.9", 3
    text = json.dumps(config)
    with pytest.raises(
        InputError, match=r"config.json was written by ddpm_tf 9.9.9 and has fields .* \(network.depth\)"
    ):
        config_lib.from_json(text, "config.json")


def test_a_checkpoint_of_a_newer_version_is_refused_by_every_command(older, tmp_path):
    folder = next((older / "ckpt").glob("step_*"))
    meta = json.loads((folder / "meta.json").read_text()) | {"version": "9.9.9"}
    meta["config"]["network"]["depth"] = 3
    (folder / "meta.json").write_text(json.dumps(meta))
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["meta.json"] = {
        "size": (folder / "meta.json").stat().st_size,
        "sha256": files.sha256(folder / "meta.json"),
    }
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    config = read_run_config(str(older))
    config.train.num_steps = 8
    message = r"The checkpoint of step 6 in .* was written by ddpm_tf 9.9.9 and has fields .*\(network.depth\)"
    for use in (
        lambda: experiment.train(config, str(older)),
        lambda: experiment.sample_images(str(older), out=str(tmp_path / "out")),
        lambda: experiment.export(str(older), str(tmp_path / "digits")),
        lambda: experiment.export_weights(str(older), "tf1", str(tmp_path / "tf1")),
    ):
        with pytest.raises(InputError, match=message):
            use()


def test_a_lost_field_is_damage_and_no_older_version():
    values = config_lib.default().to_dict()
    del values["network"]["ch"]
    with pytest.raises(InputError, match="lacks the fields network.ch, which every version writes: it is damaged"):
        config_lib.from_json(json.dumps(values), "config.json")


def test_a_setting_that_played_no_part_is_read_and_reported(older, caplog):
    config = json.loads((older / "config.json").read_text())
    config["diffusion"] |= {"schedule": "cosine", "beta_end": 0.5}
    (older / "config.json").write_text(json.dumps(config))
    with caplog.at_level("INFO", logger="absl"):
        assert read_run_config(str(older)).diffusion.beta_end == 0.02
    assert "diffusion.beta_end=0.5, which diffusion.schedule=cosine does not use" in caplog.text
