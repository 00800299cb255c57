"""Steps whose loss or gradient is not finite change nothing, are counted, and end a run when there are too many."""

import math
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf import builders, experiment
from ddpm_tf.callbacks.skipped_steps import SkippedSteps
from ddpm_tf.data import make_dataset
from ddpm_tf.data.sources import ArraySource
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.errors import InputError, NumericsError
from ddpm_tf.networks import UNet
from ddpm_tf.storage import checkpoints
from ddpm_tf.training.model import DiffusionModel
from ddpm_tf.training.optimizers import make_optimizer
from tests.conftest import mirrored, rows, state, tiny_config

BATCH = 8


class Scripted(DiffusionModel):
    """The noise of the examples `bad_index` of the steps `bad_steps` is NaN."""

    bad_steps, bad_index = (), range(BATCH)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        draws = self.objective.draws

        def scripted(index, step):
            drawn = draws(index, step)
            is_bad_step = tf.reduce_any(tf.equal(tf.cast(step, tf.int64), tf.constant(list(self.bad_steps), tf.int64)))
            is_bad_index = tf.reduce_any(tf.equal(index[:, None], tf.constant(list(self.bad_index))), axis=1)
            bad = tf.reshape(is_bad_step & is_bad_index, [-1, 1, 1, 1])
            return drawn._replace(eps=tf.where(bad, math.nan, drawn.eps))

        self.objective.draws = scripted


def make(replicas=1, *, bad_steps=(), bad_index=range(BATCH), steps_per_execution=1, limit=20):
    strategy = mirrored(replicas)
    with strategy.scope():
        network = UNet((8, 8, 1), ch=64, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), dropout=0.1)
        diffusion = GaussianDiffusion(Schedule(make_betas("linear", 100)))
        model = Scripted(network, diffusion, seed=3, ema_decay=0.9, max_skipped_steps=limit)
        model.bad_steps, model.bad_index = bad_steps, bad_index
        model.compile(make_optimizer(learning_rate=1e-3, warmup_steps=2), steps_per_execution=steps_per_execution)
    return model


def fit(model, steps, start=0):
    images = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (64, 8, 8, 1), np.uint8)
    dataset = make_dataset(ArraySource(images), batch_size=BATCH, seed=0, random_flip=True, start_step=start)
    with model.distribute_strategy.scope():
        return model.fit(dataset, steps_per_epoch=steps, verbose=0, shuffle=False).history


def values(model):
    """{name: array}, which is the same on every replica."""
    found = {}
    for name, v in model.state().items():
        v = v.value if isinstance(v, keras.Variable) else v
        found[name], *others = (copy.numpy() for copy in getattr(v, "values", [v]))
        assert len(others) == model.distribute_strategy.num_replicas_in_sync - 1
        for other in others:
            np.testing.assert_array_equal(found[name], other, err_msg=name)
    return found


def assert_equal(a, b, *, tolerance=0.0):
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("replicas", "steps_per_execution"), [(1, 1), (2, 3)])
def test_a_step_that_is_not_finite_changes_nothing_but_the_step(replicas, steps_per_execution):
    """A NaN at step 4 (under 2 replicas on one of them) is the run whose step 4 changed nothing."""
    model = make(replicas, bad_steps=[4], bad_index=[5], steps_per_execution=steps_per_execution)
    fit(model, 6)
    got = values(model)
    assert all(np.isfinite(v).all() for v in got.values())
    assert (got["skipped/total"], got["skipped/in_a_row"], got["skipped/steps"][-1]) == (1, 0, 4)
    assert model.not_finite_at.numpy().tolist() == ([-1, 4] if replicas == 2 else [-1])  # example 5 is the second's

    model = make(replicas)
    fit(model, 4)
    model.optimizer.iterations.assign_add(1)
    fit(model, 1, start=5)
    expected = values(model)
    assert expected["step"] == got["step"] == 6
    assert_equal({n: v for n, v in expected.items() if not n.startswith("skipped/")}, got)


@pytest.mark.slow
def test_after_the_limit_nothing_changes_any_more():
    model = make(bad_steps=range(2, 5), steps_per_execution=6, limit=3)
    fit(model, 6)
    assert model.skipped.total.numpy() == 3 and model.skipped.steps.numpy()[-4:].tolist() == [-1, 2, 3, 4]
    assert model.optimizer.iterations.numpy() == 6
    whole = values(model)
    model = make()
    fit(model, 2)
    skipped = ("skipped/total", "skipped/in_a_row", "skipped/steps", "step")
    assert_equal({n: v for n, v in values(model).items() if n not in skipped}, whole)


class InfiniteLoss(DiffusionModel):
    """The loss of step 1 is infinite, and its gradient is not."""

    def loss_and_gradient(self, images, labels, index, step, scale):
        loss, *others = super().loss_and_gradient(images, labels, index, step, scale)
        return tf.where(tf.equal(tf.cast(step, tf.int32), 1), math.inf, loss), *others


@pytest.mark.slow
def test_an_infinite_loss_alone_is_skipped(monkeypatch):
    monkeypatch.setitem(globals(), "Scripted", InfiniteLoss)
    model = make()
    fit(model, 2)
    whole = values(model)
    assert whole["skipped/total"] == 1
    model = make()
    fit(model, 1)
    skipped = ("skipped/total", "skipped/in_a_row", "skipped/steps", "step")
    assert_equal({n: v for n, v in values(model).items() if n not in skipped}, whole)


class ScriptedRun(Scripted):
    bad_steps = (3, 5, 6)


def test_the_log_names_the_replica_that_was_not_finite(caplog):
    model = types.SimpleNamespace(
        skipped=types.SimpleNamespace(total=tf.constant(0), in_a_row=tf.constant(1), steps=tf.constant([-1, 4])),
        not_finite_at=tf.constant([-1, 4]),
        max_skipped_steps=20,
    )
    nothing = {"t": np.array([7]), "indices": np.array([3])}
    callback = SkippedSteps(0, folder=None, replay=lambda step: nothing)
    callback.set_model(model)
    callback.on_train_begin()
    with caplog.at_level("WARNING"):
        callback.on_step(5, {"skipped": 1.0, "loss": math.nan, "grad_norm": math.nan})
    assert "Step 4 was skipped: its loss or gradient is not finite on replica 1 of 2 (loss nan" in caplog.text


@pytest.mark.slow
def test_a_run_logs_skipped_steps_and_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(builders, "DiffusionModel", ScriptedRun)
    experiment.train(tiny_config(8), str(tmp_path / "w"))
    table = rows(tmp_path / "w")
    assert [row["skipped"] for row in table] == [0, 0, 0, 1, 1, 2, 3, 3]
    assert [row["loss"] is None for row in table] == [False, False, False, True, False, True, True, False]
    for step in (3, 5, 6):
        assert f"Step {step} was skipped" in caplog.text
    t = next(iter(record.args[3] for record in caplog.records if "was skipped" in record.msg))
    assert len(t) == 8 and str(t) in caplog.text
    assert state(tmp_path / "w")[1]["skipped/total"] == 3


@pytest.mark.slow
def test_four_steps_per_execution_log_save_and_skip_as_one_does(tmp_path, monkeypatch):
    """Bit for bit, with steps that are skipped in the middle of a call."""
    monkeypatch.setattr(builders, "DiffusionModel", ScriptedRun)
    for steps in (1, 4):
        config = tiny_config(12)
        config.train.steps_per_execution, config.train.log_every, config.train.checkpoint_every = steps, 4, 4
        experiment.train(config, str(tmp_path / str(steps)))
    assert [row["step"] for row in rows(tmp_path / "1")] == [4, 8, 12]
    assert rows(tmp_path / "1") == rows(tmp_path / "4")
    assert checkpoints.list_steps(tmp_path / "1" / "ckpt") == checkpoints.list_steps(tmp_path / "4" / "ckpt")
    (_, one), (_, four) = state(tmp_path / "1"), state(tmp_path / "4")
    assert one["skipped/total"] == 3
    assert_equal(one, four)


@pytest.mark.slow
def test_too_many_skipped_steps_end_the_run_with_a_dump_that_reproduces_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "DiffusionModel", ScriptedRun)
    config = tiny_config(8)
    config.train.max_skipped_steps = 2
    workdir = tmp_path / "w"
    with pytest.raises(NumericsError, match="2 steps in a row, up to step 6, was not finite") as e:
        experiment.train(config, str(workdir))
    assert e.value.exit_code == 70 and state(workdir)[0] == 6  # saved after step 5, before the second one in a row
    assert all(np.isfinite(v).all() for v in state(workdir)[1].values())

    with np.load(workdir / "nan_dump" / "step_6.npz", allow_pickle=False) as arrays:
        dump = dict(arrays)
    model = builders.build_model(config, tf.distribute.get_strategy())
    for v in model.network.variables:
        v.assign(dump[f"network/{v.path}"])
    images = tf.constant(dump["image"])
    loss, _, gradients = model.loss_and_gradient(images, None, tf.range(len(images)), dump["step"], dump["loss_scale"])
    assert dump["step"] == 6 and dump["loss_scale"] == 1
    assert np.isnan(loss) and not all(np.isfinite(g).all() for g in gradients)
    for name, drawn in model.objective.draws(tf.range(len(images)), dump["step"])._asdict().items():
        if drawn is not None:  # no label is dropped here
            np.testing.assert_array_equal(dump[name], drawn)

    monkeypatch.undo()  # what made the NaN is repaired: the same command goes on
    experiment.train(config, str(workdir))
    assert state(workdir)[0] == 8


@pytest.mark.slow
def test_nan_policy_stop_ends_the_run_at_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "DiffusionModel", ScriptedRun)
    with pytest.raises(NumericsError, match="up to step 3"):
        experiment.train(tiny_config(8), str(tmp_path), experiment.StartOptions(nan_policy="stop"))
    assert state(tmp_path)[0] == 2 and (tmp_path / "nan_dump" / "step_3.npz").exists()
    with pytest.raises(InputError, match=r"Unknown --nan_policy 'retry'; expected one of \['skip', 'stop'\]"):
        experiment.train(tiny_config(8), str(tmp_path), experiment.StartOptions(nan_policy="retry"))


@pytest.mark.slow
def test_a_learning_rate_that_explodes_leaves_the_last_good_checkpoint(tmp_path):
    config = tiny_config(60)
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e20, 0
    with pytest.raises(NumericsError):
        experiment.train(config, str(tmp_path))
    step, tensors = state(tmp_path)
    assert step < 60 and all(np.isfinite(v).all() for v in tensors.values())
