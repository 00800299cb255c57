"""Every field of the config: its name mistyped, its type wrong, its value out of range."""

import json
import re
import subprocess
import sys
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs import digits
from ddpm_tf import app, builders, experiment
from ddpm_tf import config as config_lib
from ddpm_tf.errors import InputError
from ddpm_tf.experiment.resume import check_same_run
from tests.conftest import tiny_config

ROOT = Path(__file__).parent.parent
PATHS = [field.path for field in config_lib.FIELDS]
WRONG_TYPE = {
    int: ["x", 1.5, None, True, [1], 2**63],
    float: ["x", None, True, [1.0], float("nan"), float("inf"), 1e39, 1e-60],
    bool: ["yes", 2, 1, None],
    str: [3, True, None, ["x"]],
    tuple: ["abc", 5, None, [1.5], ["a"], [None]],
}
# Fields that any value of their type is right for: switches, and paths that are looked up when the data are read.
ANY = {
    "data.random_flip", "data.data_dir", "data.split", "network.resamp_with_conv", "network.remat", "train.tf32",
    "train.deterministic", "sample.clip", "sample.sigma_hat",
}  # fmt: skip
OUT_OF_RANGE = {
    "seed": [2**63],
    "data.source": ["", "digit"],
    "data.image_size": [0, 9, 10**6],
    "data.image_width": [-1, 9],
    "data.channels": [0, 2],
    "data.batch_size": [0, -8],
    "data.in_memory_mb": [-1],
    "data.convert": ["maybe"],
    "data.background": ["grey"],
    "data.small": ["no"],
    "data.animated": ["last"],
    "data.bad": ["ignore"],
    "data.bad_limit": [-0.1, 1.5],
    "data.labels": ["names"],
    "data.range": ["0-1"],
    "data.layout": ["NHWC"],
    "diffusion.schedule": ["linaer"],
    "diffusion.num_timesteps": [0, 10**9],
    "diffusion.beta_start": [0.0, -1e-4, 1.5],
    "diffusion.beta_end": [0.0, 1.5],
    "diffusion.cosine_s": [-0.1],
    "diffusion.sigmoid_start": [4.0],
    "diffusion.sigmoid_end": [-4.0],
    "diffusion.sigmoid_tau": [0.0],
    "diffusion.prediction": ["noise"],
    "diffusion.variance": ["fixed"],
    "network.name": ["u-net"],
    "network.ch": [0, 44, 3_200_000],
    "network.ch_mult": [(), (0,), (1, 1, 1, 1, 1)],
    "network.num_res_blocks": [0, 10**6],
    "network.attn_resolutions": [(3,)],
    "network.dropout": [-0.1, 1.0],
    "network.block_size": [0, 3],
    "network.theta": [1.0],
    "network.num_groups": [0],
    "network.num_classes": [-1, 2**30],
    "train.num_steps": [0],
    "train.log_every": [-1],
    "train.checkpoint_every": [-1],
    "train.checkpoint_minutes": [-1.0],
    "train.keep_checkpoints": [0],
    "train.keep_every": [-1],
    "train.sample_every": [-1],
    "train.loss": ["l2", "hybrid"],  # hybrid needs a learned variance
    "train.loss_weight": ["snrr"],
    "train.min_snr_gamma": [0.0],
    "train.p2_k": [0.0],
    "train.p2_gamma": [-1.0],
    "train.label_dropout": [-0.1, 1.0],
    "train.ema_decay": [-0.1, 1.0],
    "train.grad_clip": [-1.0],
    "train.grad_clip_mode": ["local"],
    "train.jit_compile": ["yes"],
    "train.precision": ["float8"],
    "train.micro_batches": [0, 3],  # 3 does not divide the batch of 8
    "train.max_skipped_steps": [0],
    "train.steps_per_execution": [0, 3],
    "optimizer.name": ["adamw"],
    "optimizer.learning_rate": [0.0, -1.0],
    "optimizer.warmup_steps": [-1],
    "optimizer.beta_1": [1.0, -0.1],
    "optimizer.beta_2": [1.0, -0.1],
    "optimizer.epsilon": [0.0, -1e-8, 1.0],
    "sample.sampler": ["ddmp"],
    "sample.num_steps": [-1, 1001],
    "sample.spacing": ["even"],
    "sample.eta": [-0.1, 1.1],
    "sample.churn": [-1.0],
    "sample.jump_length": [0],
    "sample.num_resamples": [0],
    "sample.dynamic_threshold": [-0.1, 1.1],
    "sample.labels": ["3"],  # the network is unconditional
    "sample.guidance": [1e7, 2.0],
    "sample.guidance_first": [0, 2],
    "sample.guidance_last": [-1, 1],
    "sample.guidance_rescale": [-0.1, 1.1, 0.5],
    "sample.num_images": [0, 10**12],
    "sample.batch_size": [0, 10**9],
    "sample.seed": [2**63, 2**63 - 1],
}


def as_json(path, value, *, name=None):
    """config.json of digits with one value changed, and its field renamed."""
    values = digits.get_config().to_dict()
    section, _, last = path.rpartition(".")
    place = values[section] if section else values
    del place[last]
    place[name or last] = value
    return json.dumps(values)


@pytest.mark.parametrize("path", PATHS)
def test_a_letter_that_is_missing_is_told_with_the_field_that_was_meant(path, monkeypatch):
    last = path.rpartition(".")[2]
    for k in (1, len(last) // 2):
        mistyped = last[:k] + last[k + 1 :]
        with pytest.raises(
            InputError,
            match=f"config.json was written by an unknown version of ddpm_tf and has fields that .*{mistyped}",
        ):
            config_lib.from_json(as_json(path, 1, name=mistyped), "config.json")
        flag = f"--config.{path.removesuffix(last)}{mistyped}=1"
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
        argv = ["run_train.py", "--config=configs/digits.py", flag]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for the fields
        with pytest.raises((AttributeError, KeyError)) as e:
            values(argv)
        assert f"Unknown config field {flag[:-2]}. Did you mean --config." in app._explain_config_error(argv, e.value)
        assert config_lib.suggest(path.removesuffix(last) + mistyped) == path


@pytest.mark.parametrize("field", config_lib.FIELDS, ids=PATHS)
def test_a_value_of_another_type_is_refused(field):
    for value in WRONG_TYPE[type(field.default)]:
        with pytest.raises(InputError, match=f"(?s)config.json has values that cannot be used.*{field.path} must "):
            config_lib.from_json(as_json(field.path, value), "config.json")


def test_none_in_a_config_file_is_refused():
    """A locked ConfigDict takes it for any field."""
    config = tiny_config()
    config.train.num_steps = config.optimizer.learning_rate = None
    with pytest.raises(InputError, match="(?s)train.num_steps must be of type int, found None.*learning_rate must be"):
        config_lib.validate(config)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        (
            {
                "train.ema_decay": 5.0,
                "network.dropout": 5.0,
                "diffusion.schedule": "linaer",
                "train.grad_clip_mode": "x",
            },
            [
                "train.ema_decay must be",
                "network.dropout must be",
                "Unknown diffusion.schedule 'linaer'",
                "grad_clip_mode",
            ],
        ),
        (
            {"train.loss": "l2", "train.log_every": -1, "network.name": "u-net", "data.channels": 2},
            [
                "Unknown train.loss 'l2'",
                "train.log_every must be",
                "Unknown network.name 'u-net'",
                "data.channels must be",
            ],
        ),
        (
            {"sample.sampler": "ddmp", "sample.num_images": 0, "optimizer.name": "adamw", "network.ch": 44},
            ["Unknown sample.sampler", "sample.num_images must be", "Unknown optimizer.name", "ch=44"],
        ),
        (
            {"sample.num_steps": 2000, "network.ch": 44, "train.loss": "hybrid", "diffusion.beta_start": 1e-4},
            ["sample: num_steps", "ch=44", "train.loss: "],
        ),
        ({"diffusion.beta_end": 1.5, "train.micro_batches": 3}, ["diffusion: Every beta", "train.micro_batches=3"]),
    ],
)
def test_everything_that_is_wrong_is_told_at_once(fields, parts, tmp_path):
    config = tiny_config()
    for path, value in fields.items():
        config_lib.put(config, path, value)
    with pytest.raises(InputError) as e:
        experiment.train(config, str(tmp_path / "w"))
    for part in parts:
        assert part in str(e.value)


def test_numbers_of_other_kinds_are_taken():
    config = tiny_config()
    config.optimizer.learning_rate, config.train.grad_clip = 2e-4 * np.sqrt(2), 1
    config.train.checkpoint_every = 10**12
    builders.check(config)
    assert config_lib.from_json(config_lib.to_json(config), "") == config


def test_checking_a_config_runs_no_op():
    """Memory growth, logical devices and the strategy of several workers can be set only before the first."""
    script = """
import tensorflow as tf
from ddpm_tf import builders
from configs import cifar10, digits
for module in (cifar10, digits):
    config = module.get_config()
    builders.check(config)
    config.diffusion.variance, config.train.loss = "learned_range", "hybrid"
    builders.check(config)
    config.train.ema_decay, config.network.ch = 5.0, 44
    try:
        builders.check(config)
    except ValueError:
        pass
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_a_batch_larger_than_the_data_or_than_can_be_addressed_is_refused():
    for size, message in ((1800, "larger than the data set"), (10**9, "2\^31 values or more")):
        config = tiny_config()
        config.data.batch_size = size
        with pytest.raises(InputError, match=message):
            experiment.dry_run(config)


def test_a_dry_run_refuses_the_strategies_that_training_refuses(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(InputError, match="needs TF_CONFIG with at least two workers; it is not set"):
        experiment.dry_run(tiny_config(), "multi_worker")
    workers = {"cluster": {"worker": ["a:1", "b:1", "c:1"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(workers))
    with pytest.raises(InputError, match="not divisible by the 3 replicas; use 6 or 9"):
        experiment.dry_run(tiny_config())


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan"), 1e12])
@pytest.mark.parametrize("flag", ["grace_period_s", "join_timeout_s"])
def test_a_time_limit_that_is_none_is_refused(flag, seconds, tmp_path):
    with pytest.raises(InputError, match=f"--{flag} must be above 0 and at most 1e6 seconds, found"):
        experiment.train(tiny_config(), str(tmp_path / "w"), experiment.StartOptions(**{flag: seconds}))


def test_every_field_has_values_that_are_out_of_range_or_none_such():
    assert OUT_OF_RANGE.keys() | ANY == set(PATHS) and not OUT_OF_RANGE.keys() & ANY


@pytest.mark.parametrize("path", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused(path):
    for value in OUT_OF_RANGE[path]:
        config = tiny_config()
        config_lib.put(config, path, value)
        with pytest.raises(InputError) as e:
            experiment.dry_run(config)
        assert e.value.exit_code == 2 and path.rpartition(".")[2] in str(e.value)


@pytest.mark.parametrize("field", config_lib.FIELDS, ids=PATHS)
def test_a_field_that_differs_from_the_workdirs_is_refused_if_it_is_fixed(field):
    change = {int: lambda v: v + 1, float: lambda v: v + 0.5, bool: lambda v: not v, str: lambda v: f"{v}x"}
    old, new = tiny_config(), tiny_config()
    before = config_lib.get(old, field.path)
    after = change.get(type(before), lambda v: (*v, 1))(before)
    config_lib.put(new, field.path, after)
    if field.free:
        check_same_run(old, new, "--workdir=W")
        return
    with pytest.raises(InputError, match="^--workdir=W was made with another config") as e:
        check_same_run(old, new, "--workdir=W")
    assert re.search(rf"{field.path} +{re.escape(repr(before))} +{re.escape(repr(after))}$", str(e.value), re.M)
    assert config_lib.digest(old) != config_lib.digest(new)


@pytest.mark.parametrize("value", [None, 3, {"seed": 0}, ml_collections.ConfigDict({"seed": 0}), []])
def test_what_is_no_config_is_refused_with_what_to_begin_with(value):
    with pytest.raises(InputError, match=r"begin with ddpm_tf.config.default\(\)"):
        builders.check(value)


def test_a_section_is_checked_without_the_rest_of_a_config():
    config_lib.check_section("sample", {"num_images": 3, "sampler": "ddim"})
    for values, message in (
        ({"num_images": 10**12}, "sample.num_images must be at most 100,000,000"),
        ({"seed": 2**63 - 1, "num_images": 2}, "there are none; choose a smaller sample.seed"),
        ({"eta": "much"}, "sample.eta must be of type float"),
        ({"steps": 3}, "Unknown field 'sample.steps'"),
    ):
        with pytest.raises(InputError, match=message):
            config_lib.check_section("sample", values)


def test_a_run_that_ends_before_its_warm_up_is_warned_of(caplog):
    config = tiny_config()
    config.optimizer.warmup_steps = config.train.num_steps
    builders.build_optimizer(config)
    assert not caplog.text
    config.optimizer.warmup_steps = 2 * config.train.num_steps
    with caplog.at_level("WARNING", "absl"):
        builders.build_optimizer(config)
    assert "the learning rate reaches 0.5 of optimizer.learning_rate" in caplog.text
