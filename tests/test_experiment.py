"""The jobs and the command lines, on a run of a few steps."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from configs import cifar10
from ddpm_tf import config as config_lib
from ddpm_tf import experiment
from ddpm_tf.cluster.strategy import configure_devices
from ddpm_tf.errors import BadDataError, DataNotFoundError, InputError, NumericsError
from ddpm_tf.experiment import grids
from tests.conftest import mirrored, rows, tiny_config

ROOT = Path(__file__).parent.parent


def test_a_workdir_holds_what_the_design_says(workdir):
    assert {p.name for p in workdir.iterdir()} == {
        ".lock",
        "config.json",
        "data.json",
        "metrics.jsonl",
        "ckpt",
        "samples",
        "tensorboard",
    }
    assert [p.name for p in sorted((workdir / "ckpt").iterdir())] == ["step_000000000002", "step_000000000004"]
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4]
    grid = np.asarray(Image.open(workdir / "samples" / "step_000000000004_ema.png"))
    assert grid.shape == (2 * 65 - 1, 3 * 65 - 1)  # 5 images of 8x8, eight times enlarged
    assert config_lib.from_json((workdir / "config.json").read_text(), "") == tiny_config()


def test_rows_after_the_restored_step_are_cut_off(workdir, tmp_path):
    from ddpm_tf.callbacks.metrics import Metrics, Summaries

    (tmp_path / "metrics.jsonl").write_text((workdir / "metrics.jsonl").read_text() + '{"step": 5, "lo')
    metrics = Metrics(2, workdir=str(tmp_path), batch_size=1, log_every=1, summaries=Summaries(str(tmp_path / "t")))
    metrics.on_train_begin()
    metrics.on_train_end()
    assert rows(tmp_path) == rows(workdir)[:2]


def test_a_finished_run_is_left_alone(workdir, caplog):
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    with caplog.at_level("INFO", logger="absl"):
        report = experiment.train(tiny_config(), str(workdir))
    assert "Step 4 of 4: nothing to do" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before
    assert "run_sample.py --workdir=" in report


def test_another_config_is_refused_with_a_table(workdir):
    config = tiny_config()
    config.network.ch = 64
    config.train.log_every = 2  # free to change
    with pytest.raises(InputError, match=r"made with another config(.|\n)*network.ch +32 +64\n") as e:
        experiment.train(config, str(workdir))
    assert "log_every" not in str(e.value)


def test_sampling_takes_its_settings_from_the_workdir(workdir, tmp_path):
    out = experiment.sample_images(str(workdir), out=str(tmp_path / "a"), settings={"num_images": 3, "seed": 7})
    with np.load(os.path.join(out, "samples.npz"), allow_pickle=False) as arrays:
        assert arrays.files == ["images"]
        images = arrays["images"]
    assert images.shape == (3, 8, 8, 1) and images.dtype == np.uint8
    assert sorted(os.listdir(out)) == ["grid.png", "images", "samples.npz", "sampling.json"]
    assert sorted(os.listdir(os.path.join(out, "images"))) == [f"seed_00000{k}.png" for k in (7, 8, 9)]
    np.testing.assert_array_equal(
        np.asarray(Image.open(os.path.join(out, "images", "seed_000008.png"))), images[1, ..., 0]
    )
    one_by_one = experiment.sample_images(
        str(workdir), out=str(tmp_path / "b"), settings={"num_images": 3, "seed": 7, "batch_size": 2}
    )
    with np.load(os.path.join(one_by_one, "samples.npz")) as arrays:
        assert np.abs(arrays["images"].astype(int) - images).max() <= 1


def test_raw_weights_and_their_average_differ(workdir):
    raw, ema = (experiment.load_for_inference(str(workdir), ema=ema).network for ema in (False, True))
    assert any(not np.array_equal(a, b) for a, b in zip(raw.get_weights(), ema.get_weights(), strict=True))


def test_a_sample_that_is_not_finite_is_told_with_seed_and_timestep(workdir):
    from ddpm_tf.samplers import make_sampler

    inference = experiment.load_for_inference(str(workdir))
    sampler = make_sampler("ddim", inference.diffusion, num_steps=4)  # visits 0, 250, 500, 750

    class Damaged:
        image_shape = inference.network.image_shape

        def __call__(self, inputs, training):
            late = tf.reshape(inputs["t"] <= 500, [-1, 1, 1, 1])
            return tf.where(late, float("nan"), 0.0) * inputs["x_t"]

    with pytest.raises(NumericsError, match="sample of seed 17 is not finite from timestep t = 500 on"):
        next(experiment.generate(Damaged(), sampler, num_images=3, seed=17))


def test_nothing_is_written_over(workdir, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="not an empty folder"):
        experiment.sample_images(str(workdir), out=str(tmp_path))


def test_a_default_folder_is_never_one_that_exists(workdir):
    first, second = (Path(experiment.sample_images(str(workdir), settings={"num_images": 1})) for _ in range(2))
    assert first != second and first.parent == second.parent == workdir / "samples"


def test_workdirs_that_cannot_be_sampled(tmp_path):
    with pytest.raises(InputError, match="does not exist; expected a folder written by run_train.py"):
        experiment.sample_images(str(tmp_path / "none"))
    with pytest.raises(InputError, match="holds no config.json"):
        experiment.sample_images(str(tmp_path))
    (tmp_path / "config.json").write_text(config_lib.to_json(tiny_config()))
    with pytest.raises(InputError, match="no checkpoint in .* yet"):
        experiment.sample_images(str(tmp_path))
    (tmp_path / "config.json").write_text('{"seed": 0, "model": {"ch": 3}}')
    with pytest.raises(InputError, match=r"an unknown version of ddpm_tf .* \(model.ch\)"):
        experiment.sample_images(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not a config"):
        experiment.sample_images(str(tmp_path))


def test_inference_is_in_true_float32_with_memory_growth(monkeypatch, workdir):
    grown = []
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: ["GPU:0"] if kind == "GPU" else [])
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda gpu, on: grown.append((gpu, on)))
    tf.config.experimental.enable_tensor_float_32_execution(True)
    experiment.load_for_inference(str(workdir))
    assert not tf.config.experimental.tensor_float_32_execution_enabled()
    assert grown == [("GPU:0", True)]


def test_a_batch_that_replicas_do_not_divide_is_refused():
    from ddpm_tf import builders

    config = tiny_config()
    config.data.batch_size = 7
    with pytest.raises(InputError, match="data.batch_size=7 is not divisible by the 2 replicas; use 6 or 8"):
        builders.build_model(config, mirrored(2))


def test_every_config_validates_and_describes_itself():
    import importlib

    for path in sorted((ROOT / "configs").glob("*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        config = module.get_config()
        config_lib.validate(config)
        assert f"--config=configs/{path.name}" in module.__doc__
        assert config_lib.from_json(config_lib.to_json(config), "") == config


def test_cifar10_is_the_papers():
    config = cifar10.get_config()
    assert config.network.to_dict() == {
        "name": "unet",
        "ch": 128,
        "ch_mult": (1, 2, 2, 2),
        "num_res_blocks": 2,
        "attn_resolutions": (16,),
        "dropout": 0.1,
        "resamp_with_conv": True,
        "block_size": 1,
        "remat": False,
        "theta": 10000.0,
        "num_classes": 0,
        "num_groups": 32,
    }
    assert (config.diffusion.variance, config.train.ema_decay, config.train.num_steps) == (
        "fixed_large",
        0.9999,
        800_000,
    )
    assert (config.data.batch_size, config.data.random_flip, config.optimizer.learning_rate) == (128, True, 2e-4)


def test_all_problems_of_a_config_are_told_at_once():
    config = tiny_config()
    config.data.batch_size = 0
    config.data.channels = 2
    config.train.steps_per_execution = 3
    with pytest.raises(InputError, match="(?s)batch_size must be at least 1.*channels must be 1 or 3.*multiple of"):
        config_lib.validate(config)


def command(*args):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True)


DIGITS = ("run_train.py", "--config=configs/digits.py", "--workdir=W")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run_train.py", "--workdir=W"], "--config is missing"),
        (["run_train.py", "--workdir=W", "--config=configs/none.py"], "configs/none.py"),
        (
            ["run_train.py", "--workdir=W", "--config=configs/cifar10.py", "--config.data.data_dir=W"],
            "tfds build cifar10",
        ),
        (["run_train.py", "--workdir=W", "--config=README.md"], "SyntaxError"),
        (["run_train.py", "W"], "Unexpected arguments"),
        ([*DIGITS[:2]], "--workdir is missing"),
        ([*DIGITS, "--workdri=W"], "workdri"),
        (
            [*DIGITS, "--config.data.bacth_size=3", "--config.train.nmu_steps=3"],
            "Did you mean --config.data.batch_size?\nUnknown config field --config.train.nmu_steps. Did you mean",
        ),
        ([*DIGITS, "--config.data.batch_size=x"], "data.batch_size"),
        ([*DIGITS, "--config.diffusion.schedule=linaer"], "Unknown diffusion.schedule 'linaer'"),
        ([*DIGITS, "--config.data.source=digit"], "Unknown data.source 'digit'"),
        ([*DIGITS, "--config.sample.sampler=ddum"], "Unknown sample.sampler 'ddum'"),
        ([*DIGITS, "--config.network.ch_mult=(1,2,2,2,2)"], "multiples of 16"),
        (["run_sample.py", "--workdir=W"], "w does not exist"),
        (["run_sample.py", "--workdir=W", "--num_steps=many"], "num_steps"),
    ],
)
def test_mistakes_leave_with_2_and_one_message(tmp_path, args, message):
    args = [a.replace("=W", f"={tmp_path / 'w'}") for a in args]
    result = command(*args)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_sampling_mistakes_leave_with_2(workdir, tmp_path):
    for args, message in (
        (["--num_steps=1001"], "within 1..1000"),
        (["--num_steps=0"], "within 1..T"),
        (["--sampler=hein"], "Unknown sampler 'hein'"),
        (["--num_images=0"], "sample.num_images must be at least 1"),
    ):
        result = command("run_sample.py", f"--workdir={workdir}", f"--out={tmp_path / 'o'}", *args)
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_dry_run_prints_the_papers_parameter_count_and_writes_nothing(tmp_path):
    result = command(
        "run_train.py",
        "--config=configs/cifar10.py",
        "--dry_run",
        f"--workdir={tmp_path / 'w'}",
        f"--config.data.data_dir={tmp_path / 'd'}",
    )
    assert result.returncode == 0, result.stderr
    assert "35,746,307" in result.stdout and "steps per epoch: unknown, data set not prepared" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("program", ["run_train.py", "run_sample.py", "run_convert.py"])
def test_help_is_complete(program):
    result = command(program, "--help")
    assert result.returncode == 0
    source = (ROOT / program).read_text() + 'DEFINE_bool("debug"'
    for name in re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source):
        assert re.search(rf"--(\[no\])?{name}\b", result.stdout), name
    if program == "run_train.py":
        for field in config_lib.FIELDS:
            assert f"--config.{field.path}=" in result.stdout and field.doc in result.stdout


def streamed_folder(tmp_path, bad):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(12):
        Image.fromarray(np.full((8, 8), k, np.uint8)).save(folder / f"{k:02}.png")
    if bad == "header":
        (folder / "05.png").write_bytes(b"not an image")
    elif bad == "pixels":
        noise = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (64, 64), np.uint8)
        Image.fromarray(noise).save(folder / "05.png")
        content = (folder / "05.png").read_bytes()
        (folder / "05.png").write_bytes(content[: len(content) // 2])
    config = tiny_config(6)
    config.data.source = f"folder:{folder}"
    config.data.in_memory_mb = 0
    return config


def test_a_file_that_is_no_image_shows_before_work_begins_also_when_streamed(tmp_path):
    config = streamed_folder(tmp_path, "header")
    with pytest.raises(InputError, match="(?s)not a picture that is read here.*05.png"):
        experiment.train(config, str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_an_image_that_breaks_in_the_middle_of_a_run_ends_it_with_its_name(tmp_path):
    with pytest.raises(BadDataError, match="05.png: damaged .*repair or remove it.*Training stopped") as e:
        experiment.train(streamed_folder(tmp_path, "pixels"), str(tmp_path / "w"))
    assert e.value.exit_code == 65


def test_a_step_that_steps_per_execution_does_not_divide_is_refused(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "w")
    config = tiny_config(12)
    config.train.steps_per_execution = 3
    config.train.log_every = config.train.checkpoint_every = 3
    with pytest.raises(InputError, match="resumes after step 4, which is no multiple of train.steps_per_execution=3"):
        experiment.train(config, str(tmp_path / "w"))


@pytest.mark.slow
def test_a_run_that_ended_before_its_last_pictures_draws_them(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "w")
    grid = tmp_path / "w" / "samples" / "step_000000000004_ema.png"
    expected = grid.read_bytes()
    grid.unlink()
    experiment.train(tiny_config(), str(tmp_path / "w"))
    assert grid.read_bytes() == expected


@pytest.mark.slow
def test_grids_are_drawn_in_true_float32_by_float32_networks_and_tell_lack_of_memory(tmp_path, monkeypatch):
    config, seen, sample = tiny_config(1), [], grids.generate
    config.train.precision, config.train.tf32 = "bfloat16", True

    def out_of_memory(*args, **kwargs):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    def watched(network, *args, **kwargs):
        seen.append((network.compute_dtype, tf.config.experimental.tensor_float_32_execution_enabled()))
        return sample(network, *args, **kwargs)

    monkeypatch.setattr(grids, "generate", out_of_memory)
    with pytest.raises(InputError, match="grid of step 1 was drawn, sample.batch_size=64 .* lower it"):
        experiment.train(config, str(tmp_path))
    monkeypatch.setattr(grids, "generate", watched)
    experiment.train(config, str(tmp_path))
    assert seen == [("float32", False)] * 2 and tf.config.experimental.tensor_float_32_execution_enabled()
    assert len(list((tmp_path / "samples").iterdir())) == 2
    configure_devices()
    assert not tf.config.experimental.tensor_float_32_execution_enabled()


def test_a_folder_of_something_else_is_no_workdir(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 100}\n')
    with pytest.raises(InputError, match="holds 'metrics.jsonl' and no config.json"):
        experiment.train(tiny_config(), str(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 100}\n'


def test_a_dry_run_does_without_the_data_and_writes_nothing(tmp_path):
    config = tiny_config()
    config.data.source = f"tfrecord:{tmp_path / 'none.tfrecords'}"
    with pytest.raises(DataNotFoundError) as e:  # after all that can be said without them
        experiment.dry_run(config)
    text = str(e.value)
    assert "unknown, data set not prepared" in text and "memory, estimated, on one device with 8 images: " in text
    assert "The run cannot begin: " in text and not list(tmp_path.iterdir())
    config.data.source, config.data.data_dir = "tfds:cifar10", str(tmp_path)
    config.data.image_size, config.data.channels = 32, 3
    assert "unknown, data set not prepared" in experiment.dry_run(config)  # it can be downloaded
