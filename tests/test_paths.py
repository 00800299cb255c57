"""Paths of users: addresses, names that are not UTF-8, things that are no files, and TensorFlow's pattern characters."""

import contextlib
import glob
import os
import socket

import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf import experiment, files
from ddpm_tf.errors import InputError
from ddpm_tf.paths import check_entries, check_kind, check_local, is_literal, literal
from ddpm_tf.storage import checkpoints, workdir
from ddpm_tf.storage.bundles import read_bundle, write_bundle
from tests.conftest import tiny_config

PATTERNS = ("lr=[1e-3]", "a]b", "a[b", "star*", "what?", "back\\slash", "[0-9]*?\\[!x]")
TENSORS = {"a": np.arange(3, dtype=np.float32), "b/c": np.eye(2)}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name])


@pytest.mark.parametrize("scheme", ["gs", "s3", "http", "https", "file", "ram", "hdfs", "GS", "az-x.y"])
def test_an_address_is_no_path(scheme):
    with pytest.raises(InputError, match=rf"--out={scheme}://bucket/run is an address .*Give a local path"):
        check_local(f"{scheme}://bucket/run", "--out")


@pytest.mark.parametrize(
    "path", ["a:b", "gs:", "c:/x", "run-12:30", "/a//b", "./gs://x", "ünï/例", "a b", "%s", "-", "a\nb"]
)
def test_a_name_with_a_colon_and_any_utf8_are_paths(path):
    check_local(path, "--out")


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_what_the_system_cannot_open_is_no_path(path):
    with pytest.raises(InputError, match="which is no path"):
        check_local(path, "--out")


def test_names_that_are_not_utf8_are_refused_also_behind_a_link_and_in_the_current_folder(tmp_path, monkeypatch):
    name = os.fsdecode(b"caf\xe9")
    folder = os.path.join(tmp_path, name)
    os.mkdir(folder)
    os.symlink(folder, tmp_path / "link")
    for path in (name, f"{folder}/new", str(tmp_path / "link" / "new")):
        with pytest.raises(InputError, match="is not written in UTF-8") as e:
            check_local(path, "--workdir")
        str(e.value).encode()  # it can be printed
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match="is not written in UTF-8"):
        check_local("run", "--workdir")


@contextlib.contextmanager
def things(folder):
    """{what: path} of all kinds of things, in a folder."""
    paths = {kind: str(folder / kind.replace(" ", "_")) for kind in ("a file", "a folder", "a named pipe", "a socket")}
    open(paths["a file"], "w").close()
    os.mkdir(paths["a folder"])
    os.mkfifo(paths["a named pipe"])
    paths["a link to nowhere, which does not exist"] = str(folder / "dangling")
    os.symlink("nowhere", folder / "dangling")
    paths["a link that cannot be followed"] = str(folder / "loop")
    os.symlink("loop", folder / "loop")
    paths["a device"] = "/dev/zero"
    with socket.socket(socket.AF_UNIX) as s:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket has at most 107 bytes
        s.bind("a_socket")
        os.chdir(here)
        yield paths


@pytest.mark.parametrize(("is_folder", "right"), [(False, "a file"), (True, "a folder")])
def test_each_kind_of_thing_is_named_and_nothing_and_the_right_kind_pass(tmp_path, is_folder, right):
    with things(tmp_path) as paths:
        for found, path in paths.items():
            if found == right:
                check_kind(path, "x", is_folder=is_folder)
                os.symlink(path, tmp_path / "link")
                check_kind(str(tmp_path / "link"), "x", is_folder=is_folder)
            else:
                with pytest.raises(InputError, match=f"^x is {found}.*; expected a "):
                    check_kind(path, "x", is_folder=is_folder)
        check_kind(str(tmp_path / "nothing"), "x", is_folder=is_folder)
        check_entries(str(tmp_path), {"a_file": False, "a_folder": True, "nothing": True})
        with pytest.raises(InputError, match=r"a_named_pipe is a named pipe"):
            check_entries(str(tmp_path), {"a_file": False, "a_named_pipe": False})


@pytest.mark.parametrize("name", PATTERNS)
def test_a_checkpoint_is_read_whatever_its_path(tmp_path, name):
    """The folder, the name itself, and both; also beside a checkpoint that the path is a pattern of."""
    assert not is_literal(name)
    os.makedirs(tmp_path / name)
    write_bundle(tmp_path / "starx", {"a": np.zeros(3, np.float32)})
    for path in (tmp_path / name / "model", tmp_path / f"{name}.ckpt", tmp_path / name / name):
        write_bundle(path, TENSORS)
        assert_equal(read_bundle(path), TENSORS)


def test_a_relative_path_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("[a]")
    write_bundle("[a]/m", TENSORS)
    assert_equal(read_bundle("[a]/m"), TENSORS)


def test_a_damaged_checkpoint_is_told_by_its_own_path(tmp_path):
    write_bundle(tmp_path / "a[1]", TENSORS)
    os.truncate(tmp_path / "a[1].data-00000-of-00001", 3)
    with pytest.raises(InputError, match=r"a\[1\] is damaged: its .data files have 3 bytes"):
        read_bundle(tmp_path / "a[1]")
    (tmp_path / "a[1].index").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match=r"a\[1\] is damaged") as e:
        read_bundle(tmp_path / "a[1]")
    assert "plain" not in str(e.value)


def test_the_link_leads_to_all_that_begins_alike_and_is_gone_afterwards(tmp_path):
    for name in ("x[1]", "x[1].a", "y[1].b"):
        (tmp_path / name).write_text(name)
    with literal(str(tmp_path / "x[1]")) as path:
        assert is_literal(path)
        assert open(path).read() == "x[1]" and open(f"{path}.a").read() == "x[1].a"
        assert len(os.listdir(os.path.dirname(path))) == 2
    assert not os.path.exists(os.path.dirname(path)) and (tmp_path / "x[1]").read_text() == "x[1]"
    with literal(str(tmp_path)) as path:
        assert path == str(tmp_path)


def test_a_temporary_folder_with_such_a_path_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "[t]").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "[t]"))
    with pytest.raises(InputError, match="Set TMPDIR"), literal(str(tmp_path / "[a]")):
        pass


@pytest.mark.parametrize("name", ["lr=[1e-3]", "back\\slash", "a:b"])
def test_checkpoints_of_a_workdir_are_restored_whatever_its_path(tmp_path, name):
    checkpoints.save(tmp_path / name / "ckpt", 7, TENSORS, {}, keep=1)
    step, tensors = checkpoints.restore_latest(tmp_path / name / "ckpt")
    assert step == 7
    assert_equal({name: tensors[name] for name in TENSORS}, TENSORS)


JOBS = {
    "train": lambda path: experiment.train(tiny_config(), path),
    "init_from": lambda path: experiment.train(
        tiny_config(), path + "-new", experiment.StartOptions(init_from=path)
    ),
    "sample": lambda path: experiment.sample_images(path),
    "export": lambda path: experiment.export(path, path + "-out"),
    "convert": lambda path: experiment.export_weights(path, "tf1", path + "-out"),
}  # fmt: skip


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("found", ["address", "bytes", "pipe", "loop"])
def test_every_job_refuses_a_path_that_is_none_and_makes_nothing(tmp_path, monkeypatch, job, found):
    monkeypatch.chdir(tmp_path)
    path = {"address": "gs://bucket/run", "bytes": os.fsdecode(b"caf\xe9"), "pipe": "pipe", "loop": "loop"}[found]
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    with pytest.raises(InputError, match="address|UTF-8|named pipe|cannot be followed"):
        JOBS[job](path)
    assert sorted(os.listdir(tmp_path)) == ["loop", "pipe"]


@pytest.mark.parametrize("entry", ["config.json", "data.json", "metrics.jsonl", ".lock", "evaluation.json"])
def test_a_pipe_in_the_place_of_a_workdirs_file_is_an_error_before_work(tmp_path, entry):
    files.write_text(workdir.config_path(str(tmp_path)), "{}")
    (tmp_path / entry).unlink(missing_ok=True)
    os.mkfifo(tmp_path / entry)
    for job in ("train", "sample"):
        with pytest.raises(InputError, match=f"{entry} is a named pipe; expected a regular file"):
            JOBS[job](str(tmp_path))


@pytest.mark.parametrize("entry", ["ckpt", "samples", "tensorboard"])
def test_a_file_in_the_place_of_a_workdirs_folder_is_an_error_before_work(tmp_path, entry):
    (tmp_path / entry).write_text("x")
    with pytest.raises(InputError, match=f"{entry} is a file; expected a folder"):
        JOBS["train"](str(tmp_path))


def test_a_pipe_in_a_checkpoint_is_damage_and_nobody_waits(tmp_path):
    for step in (1, 2):
        checkpoints.save(tmp_path, step, TENSORS, {}, keep=2)
    (tmp_path / "step_000000000002" / "MANIFEST.json").unlink()
    os.mkfifo(tmp_path / "step_000000000002" / "MANIFEST.json")
    assert checkpoints.restore_latest(tmp_path)[0] == 1


def test_folders_that_a_failed_block_made_are_gone_and_others_stay(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyError), files.made_folder(str(tmp_path / "there" / "a" / "b")):
        assert (tmp_path / "there" / "a" / "b").is_dir()
        raise KeyError
    assert os.listdir(tmp_path / "there") == []
    with pytest.raises(KeyError), files.made_folder(str(tmp_path / "there")):
        raise KeyError
    assert os.listdir(tmp_path) == ["there"]
    with pytest.raises(KeyError), files.made_folder(str(tmp_path / "x" / "y")):
        (tmp_path / "x" / "mine").touch()
        raise KeyError
    assert os.listdir(tmp_path / "x") == ["mine"]
    with files.made_folder(str(tmp_path / "a" / "b")):
        pass
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lr=[1e-3]", "back\\slash", "a:b *? x"])
def test_the_whole_way_works_in_such_a_folder(tmp_path, name):
    """Train, resume, sample, export and load the export, to TensorFlow 1 and back."""
    folder = str(tmp_path / name)
    configs = [tiny_config(2), tiny_config(4)]
    for config in configs:
        config.network.num_groups = 32  # the release's
        experiment.train(config, f"{folder}/run")
    assert checkpoints.restore_latest(f"{folder}/run/ckpt")[0] == 4
    out = experiment.sample_images(f"{folder}/run", settings={"num_images": 2})
    assert os.path.isfile(f"{out}/samples.npz") and glob.glob(f"{glob.escape(folder)}/run/tensorboard/*")
    report = experiment.export(f"{folder}/run", f"{folder}/models/digits", max_batch=2)
    assert "tf.saved_model.load takes one of" in report
    with literal(f"{folder}/models/digits/1") as path:
        model = tf.saved_model.load(path)
    with np.load(f"{out}/samples.npz") as arrays:
        expected = arrays["images"]
    images = model.signatures["sample"](seed=tf.range(2, dtype=tf.int64))["images"].numpy()
    assert np.abs(images.astype(int) - expected).max() <= 1  # another batch size rounds otherwise
    experiment.export_weights(f"{folder}/run", "tf1", f"{folder}/out/model[4]")
    experiment.import_tf1(f"{folder}/out/model[4]", configs[1], f"{folder}/back")
    assert_equal(
        {k: v for k, v in checkpoints.restore_latest(f"{folder}/back/ckpt")[1].items() if k.startswith("ema/")},
        {k: v for k, v in checkpoints.restore_latest(f"{folder}/run/ckpt")[1].items() if k.startswith("ema/")},
    )
