"""What a run goes on from, and what keeps it from going on."""

import errno
import json
import logging
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from ddpm_tf import builders, experiment, files
from ddpm_tf import config as config_lib
from ddpm_tf.callbacks import metrics as metrics_lib
from ddpm_tf.callbacks import saving
from ddpm_tf.cluster.cluster import Cluster
from ddpm_tf.data.manifest import difference, digest, manifest
from ddpm_tf.errors import InputError, NoValidCheckpointError, StorageError, WorkdirError
from ddpm_tf.experiment import StartOptions, resume, training
from ddpm_tf.experiment.run import Run
from ddpm_tf.storage import checkpoints
from ddpm_tf.storage.bundles import assign
from ddpm_tf.storage.fingerprint import changes, fingerprint
from ddpm_tf.training import loss_scale
from tests.conftest import mirrored, rows, state, tiny_config


@pytest.fixture
def copy(workdir, tmp_path):
    """A copy of the finished run of 4 steps."""
    shutil.copytree(workdir, tmp_path / "w")
    return tmp_path / "w"


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def steps_of(model, config, source, first, last):
    """Take the steps from `first` to `last`; yields the number of completed ones."""
    strategy = model.distribute_strategy
    dataset = builders.build_dataset(config, source, start_step=first)
    iterator = iter(strategy.experimental_distribute_dataset(dataset))
    for step in range(first + 1, last + 1):
        model.train_function(iterator)
        yield step


def values(model):
    return {name: v.numpy() for name, v in model.state().items()}


def assert_going_on_gives_the_same_end(model, config, source, folder):
    """From each checkpoint but the last, newest first; nothing but the checkpoint and its step is taken over."""
    *steps, end = checkpoints.list_steps(folder)
    _, expected = checkpoints.restore_latest(folder)
    for k, newer in zip(steps[::-1], [*steps[1:], end][::-1], strict=True):
        shutil.rmtree(checkpoints.step_folder(folder, newer))
        step, tensors = checkpoints.restore_latest(folder)
        assert step == k
        for v in model.state().values():
            v.assign(tf.cast(tf.fill(v.shape, 7), v.dtype))
        assign(model.state(), tensors, "")
        assert list(steps_of(model, config, source, k, end))[-1] == end
        assert_equal(values(model), expected)


@pytest.mark.slow
def test_going_on_from_every_step_of_forty_gives_the_same_end(tmp_path):
    """With dropout and random flips, bit for bit."""
    config = tiny_config(40)
    config.train.checkpoint_every, config.train.keep_checkpoints = 1, 40
    experiment.train(config, str(tmp_path))
    assert checkpoints.list_steps(tmp_path / "ckpt") == list(range(1, 41))
    model = builders.build_model(config, tf.distribute.get_strategy())
    model.make_train_function()
    assert_going_on_gives_the_same_end(model, config, builders.build_source(config), tmp_path / "ckpt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("replicas", "fields"),
    [
        (2, {}),
        (1, {"train.precision": "bfloat16"}),
        (1, {"train.precision": "float16", "data.batch_size": 2}),  # which a CPU computes slowly
        (1, {"train.micro_batches": 2}),
        (1, {"optimizer.name": "rmsprop"}),
    ],
    ids=["replicas", "bfloat16", "float16", "micro_batches", "rmsprop"],
)
def test_going_on_from_every_fifth_step_gives_the_same_end(replicas, fields, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "GROW_EVERY", 3)  # so that float16's scale changes between the checkpoints
    config = tiny_config(40)
    for path, value in fields.items():
        config_lib.put(config, path, value)
    source = builders.build_source(config)
    model = builders.build_model(config, mirrored(replicas))
    model.make_train_function()
    scales = []
    for step in steps_of(model, config, source, 0, 40):
        if step % 5 == 0:
            checkpoints.save(str(tmp_path), step, values(model), {}, keep=40)
            scales.append(model.loss_scale.scale.numpy())
    assert (len(set(scales)) > 1) == (fields.get("train.precision") == "float16")
    assert_going_on_gives_the_same_end(model, config, source, tmp_path)


def restore(workdir, start=StartOptions(), *, fingerprint={}):  # noqa: B006, B008
    """What a run of the tiny config would continue from: (step, tensors)."""
    config, strategy = tiny_config(), tf.distribute.get_strategy()
    model = builders.build_model(config, strategy)
    run = Run(
        config=config,
        workdir=str(workdir),
        options=start,
        strategy=strategy,
        cluster=Cluster(),
        source=None,
        data={},
        fingerprint=fingerprint,
    )
    step = resume.restore(run, model)
    return step, {name: v.numpy() for name, v in model.state().items()}


def rewrite(workdir, change):
    """Write the newest checkpoint again with other tensors."""
    step, tensors = state(workdir)
    shutil.rmtree(checkpoints.step_folder(workdir / "ckpt", step))
    checkpoints.save(str(workdir / "ckpt"), step, change(tensors), {}, keep=1)


def test_a_checkpoint_without_average_is_refused_unless_asked_for(copy):
    rewrite(copy, lambda tensors: {n: t for n, t in tensors.items() if not n.startswith("ema/")})
    with pytest.raises(InputError, match="step 4 in .* has no moving average .* --ema_from_weights"):
        restore(copy)
    _, tensors = restore(copy, StartOptions(ema_from_weights=True))
    for name in tensors:
        if name.startswith("ema/"):
            np.testing.assert_array_equal(tensors[name], tensors[name.replace("ema/", "network/", 1)])


def test_names_that_do_not_fit_are_told(copy):
    rewrite(copy, lambda tensors: {n.replace("conv_in", "conv_one"): t for n, t in tensors.items()})
    with pytest.raises(
        InputError, match="(?s)checkpoint of step 4 in .* does not fit.*conv_in.*missing.*conv_one.*no such"
    ):
        restore(copy)


@pytest.mark.slow
def test_a_warm_start_takes_weights_and_average_and_nothing_else(workdir, tmp_path, monkeypatch):
    trained = state(workdir)[1]
    monkeypatch.setattr(saving.Checkpoints, "on_step", lambda *_: None)  # as if killed before the first save
    experiment.train(tiny_config(1), str(tmp_path / "b"), StartOptions(init_from=str(workdir)))
    monkeypatch.undo()
    step, tensors = state(tmp_path / "b")
    assert step == 0 and tensors["step"] == 0
    for name in tensors:
        if name.startswith(("network/", "ema/")):
            np.testing.assert_array_equal(tensors[name], trained[name], err_msg=name)
        elif name.startswith("optimizer/"):
            assert trained[name].any() and not tensors[name].any(), name
    experiment.train(tiny_config(2), str(tmp_path / "b"))  # without the flag: goes on from what was saved at step 0
    experiment.train(tiny_config(2), str(tmp_path / "c"), StartOptions(init_from=str(workdir)))
    assert_equal(state(tmp_path / "b")[1], state(tmp_path / "c")[1])
    assert rows(tmp_path / "b") == rows(tmp_path / "c")
    with pytest.raises(InputError, match="--init_from=.* does not exist"):
        experiment.train(tiny_config(), str(tmp_path / "d"), StartOptions(init_from=str(tmp_path / "none")))
    assert not (tmp_path / "d").exists()


@pytest.mark.slow
def test_damaged_checkpoints_stop_every_start_until_it_is_asked_to_begin_again(copy):
    for path in copy.glob("ckpt/step_*/state.index"):
        path.write_bytes(b"")
    for _ in range(2):  # also after the folders have been renamed to corrupt-*
        with pytest.raises(NoValidCheckpointError, match="--restart_from_scratch"):
            experiment.train(tiny_config(5), str(copy))
    experiment.train(tiny_config(2), str(copy), StartOptions(restart_from_scratch=True))
    assert state(copy)[0] == 2 and [row["step"] for row in rows(copy)] == [1, 2]
    old = next(copy.glob("old-*"))
    assert len(list(old.glob("ckpt/corrupt-*"))) == 2 and len(rows(old)) == 4
    assert {p.name for p in copy.iterdir()} >= {"config.json", "data.json", "ckpt", "samples"}


@pytest.mark.slow
def test_what_is_not_bit_exact_any_more_is_told(copy, caplog):
    stored = checkpoints.read_meta(copy / "ckpt", 4)["fingerprint"]
    assert stored["tensorflow"] == tf.__version__ and stored["replicas"] == 1 and stored["global_batch"] == 8
    with caplog.at_level(logging.WARNING):
        restore(copy, StartOptions(require_exact=True), fingerprint=stored)
    assert "bit-exact" not in caplog.text
    other = {**stored, "tensorflow": "2.20.0", "threads": 96}
    with pytest.raises(InputError, match="(?s)--require_exact.*tensorflow: .* -> 2.20.0.*threads: .* -> 96"):
        restore(copy, StartOptions(require_exact=True), fingerprint=other)
    with caplog.at_level(logging.WARNING):
        assert restore(copy, fingerprint=other)[0] == 4
    assert "not bit-exact any more: tensorflow" in caplog.text


def test_a_fingerprint_is_the_same_on_the_same_machine_and_names_what_differs():
    def make(**kwargs):
        settings = {"jit_compile": False, "deterministic": False, "precision": "float32", "tf32": False}
        settings |= {
            "micro_batches": 1,
            "remat": False,
            "batch_size": 8,
            "seed": 0,
            "config": "y",
            "data": "x",
            "workers": 1,
        }
        return fingerprint(tf.distribute.get_strategy(), **settings | kwargs)

    assert make() == make() == json.loads(json.dumps(make()))
    assert changes(make(), make(jit_compile=True)) == ["xla: False -> True"]


def folder_config(folder):
    config = tiny_config()
    config.data.source = f"folder:{folder}"
    return config


def test_another_data_set_is_refused_with_counts_and_the_first_file(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (tmp_path / "w").mkdir()

    def found():
        data = manifest(builders.build_source(folder_config(folder)))
        resume.check_data(data, str(tmp_path / "w"), StartOptions())
        return data

    for k in range(9):
        Image.fromarray(np.full((8, 8), k, np.uint8)).save(folder / f"{k}.png")
    first = found()
    (tmp_path / "w" / "data.json").write_text(json.dumps(first))
    assert found() == first and first["num_examples"] == 9
    content = (folder / "3.png").read_bytes()
    Image.fromarray(np.full((8, 8), 99, np.uint8)).save(folder / "3.png")  # other pixels, perhaps as many bytes
    with pytest.raises(InputError, match="9 images then, 9 now; "):
        found()
    (folder / "3.png").write_bytes(content)
    shutil.copy(folder / "0.png", folder / "05.png")
    with pytest.raises(InputError, match=r"9 images then, 10 now; file 1 was '1.png' .* is '05.png'"):
        found()
    data = manifest(builders.build_source(folder_config(folder)))
    resume.check_data(data, str(tmp_path / "w"), StartOptions(allow_data_change=True))


def test_a_manifest_does_not_depend_on_where_the_data_are_held():
    held = {"num_examples": 2, "files": [["a", 1], ["b", 2]], "sha256": {"image": "x"}}
    streamed = {**held, "sha256": {}}
    assert difference(held, streamed) is None and digest(held) == digest(streamed)
    assert difference(held, {**held, "sha256": {"image": "y"}}) == "2 images then, 2 now; the contents of image changed"
    renamed = {**held, "files": [["a", 1], ["c", 3]]}
    assert difference(held, renamed) is None  # the pixels are the same
    assert "file 1 was 'b' (2 bytes) and is 'c' (3 bytes)" in difference(held, {**renamed, "sha256": {}})
    less = {**held, "num_examples": 1, "files": [["a", 1]]}
    assert difference(held, less) == "2 images then, 1 now; file 1 was 'b' (2 bytes) and is nothing"


def test_a_disk_without_room_for_a_checkpoint_stops_the_start(copy, monkeypatch):
    usage = shutil.disk_usage(copy)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StorageError, match="has 1,000 bytes free; a checkpoint needs [0-9,]+ with 30 % to spare"):
        restore(copy)
    assert checkpoints.list_steps(copy / "ckpt") == [2, 4]


def test_a_workdir_that_cannot_be_written_to_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "build_model", None)
    monkeypatch.setattr(training.os, "access", lambda path, mode: False)
    with pytest.raises(WorkdirError, match="cannot be written to: no right to write in"):
        experiment.train(tiny_config(), str(tmp_path / "a" / "b"))
    assert not (tmp_path / "a").exists()


def test_an_error_of_reading_renames_nothing(copy, monkeypatch):
    digest = files.sha256

    def flaky(path):
        if "step_000000000004" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return digest(path)

    monkeypatch.setattr(files, "sha256", flaky)
    assert checkpoints.restore_latest(copy / "ckpt", quarantine=True)[0] == 2
    monkeypatch.undo()
    assert state(copy)[0] == 4
    checkpoints.save(str(copy / "ckpt"), 4, {"step": np.array(44)}, {}, keep=2)  # and step 4 can be written again
    assert state(copy)[1]["step"] == 44

    def too_many(path):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(files, "sha256", too_many)
    with pytest.raises(StorageError, match="ulimit -n"):
        checkpoints.restore_latest(copy / "ckpt", quarantine=True)
    monkeypatch.undo()
    assert checkpoints.list_steps(copy / "ckpt") == [2, 4]


def test_a_reader_goes_on_when_folders_are_pruned_under_it(copy, monkeypatch):
    shutil.rmtree(checkpoints.step_folder(copy / "ckpt", 2))
    verify = checkpoints.verify

    def pruned(path):  # while it reads, step 6 is written and step 4 pruned
        if str(path).endswith("4"):
            os.rename(path, checkpoints.step_folder(copy / "ckpt", 6))
        verify(path)

    monkeypatch.setattr(checkpoints, "verify", pruned)
    assert checkpoints.restore_latest(copy / "ckpt")[0] == 6


@pytest.mark.slow
def test_a_finished_run_whose_last_checkpoint_is_damaged_is_finished_again(workdir, copy):
    expected = state(workdir)[1]
    (copy / "ckpt" / "step_000000000004" / "state.index").write_bytes(b"")
    experiment.train(tiny_config(), str(copy))
    assert state(copy)[0] == 4
    assert_equal(state(copy)[1], expected)


def test_the_config_is_compared_with_the_checkpoints_too(copy):
    text = (copy / "config.json").read_text().replace('"ema_decay": 0.995', '"ema_decay": 0.5')
    (copy / "config.json").write_text(text)
    config = tiny_config()
    config.train.ema_decay = 0.5
    with pytest.raises(InputError, match=r"checkpoint of step 4 .*(.|\n)*train.ema_decay +0.995 +0.5"):
        experiment.train(config_with_steps(config, 5), str(copy))


def config_with_steps(config, num_steps):
    config.train.num_steps = num_steps
    return config


def test_a_warm_start_that_does_not_fit_leaves_no_config_behind(workdir, tmp_path):
    config = tiny_config()
    config.network.ch = 64
    with pytest.raises(InputError, match="--init_from=.* does not fit"):
        experiment.train(config, str(tmp_path / "w"), StartOptions(init_from=str(workdir)))
    assert not (tmp_path / "w" / "config.json").exists()


def test_a_damaged_row_of_the_metrics_is_dropped_with_a_warning(copy, caplog):
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text(lines[0] + "\0\0garbage\n" + "".join(lines[2:]))
    metrics = metrics_lib.Metrics(
        4, workdir=str(copy), batch_size=1, log_every=1, summaries=metrics_lib.Summaries(str(copy))
    )
    metrics.on_train_begin()
    metrics.on_train_end()
    assert [row["step"] for row in rows(copy)] == [1, 3, 4] and "line 2 is damaged" in caplog.text


@pytest.mark.slow
def test_the_same_images_at_another_path_are_the_same_data_set(tmp_path, caplog):
    """Also when they are not held in memory: then names and sizes decide."""
    caplog.set_level("INFO", logger="absl")
    config = tiny_config(num_steps=2)
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    for k in range(9):
        Image.fromarray(np.full((8, 8), 20 * k, np.uint8)).save(here / f"{k}.png")
    config.data.source = f"folder:{here}"
    experiment.train(config, str(tmp_path / "w"))
    here.rename(there)
    config.train.num_steps = 4
    with pytest.raises(InputError, match="does not exist"):
        experiment.train(config, str(tmp_path / "w"))
    config.data.source = f"folder:{there}/"
    config.data.in_memory_mb = 0
    experiment.train(config, str(tmp_path / "w"), StartOptions(require_exact=True))
    assert f"data.source is folder:{there}/, and was folder:{here}. The images are the same" in caplog.text
    assert json.loads((tmp_path / "w/config.json").read_text())["data"]["source"] == f"folder:{there}/"
    (there / "8.png").unlink()
    config.train.num_steps = 5
    with pytest.raises(InputError, match="9 images then, 8 now; file 8 was '8.png'"):
        experiment.train(config, str(tmp_path / "w"))
    config.data.source = "digits"
    with pytest.raises(InputError, match="data.source +'folder:.*' +'digits'"):
        experiment.train(config, str(tmp_path / "w"))


@pytest.mark.slow
def test_the_command_of_an_older_version_resumes_its_run(tmp_path, caplog):
    """A field whose default is not what its absence meant keeps the older meaning, at every later start."""
    caplog.set_level("INFO", logger="absl")
    config = tiny_config(num_steps=1)
    (tmp_path / "pictures").mkdir()
    for k in range(8):
        Image.fromarray(np.full((8, 8), 20 * k, np.uint8)).save(tmp_path / "pictures" / f"{k}.png")
    config.data.source, config.data.convert, config.data.labels = f"folder:{tmp_path / 'pictures'}", "strict", "none"
    experiment.train(config, str(tmp_path / "w"))
    path = tmp_path / "w/config.json"
    content = json.loads(path.read_text())
    del content["data"]["convert"], content["data"]["labels"]
    path.write_text(json.dumps(content))
    config.data.convert, config.data.labels = "auto", "auto"  # the defaults of this version
    for steps in (2, 3):
        config.train.num_steps = steps
        caplog.clear()
        experiment.train(config, str(tmp_path / "w"))
        assert "data.convert=strict stays" in caplog.text
        assert json.loads(path.read_text())["data"]["convert"] == "strict"
