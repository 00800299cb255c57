"""What Keras users do with a model: it works as they expect, or one sentence says what to do instead."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf.data import make_dataset
from ddpm_tf.data.sources import ArraySource
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.errors import InputError
from ddpm_tf.networks import UNet
from ddpm_tf.training.model import DiffusionModel
from ddpm_tf.training.optimizers import make_optimizer
from tests.conftest import mirrored

IMAGES = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (20, 8, 8, 1), np.uint8)
X = (IMAGES / 127.5 - 1).astype(np.float32)
INPUTS = {"x_t": X, "t": np.arange(20, dtype=np.int32)}
ENDLESS = "would never end, since the dataset is endless; give"


def make_model(optimizer=None, num_classes=None, **compile_arguments):
    network = UNet(
        (8, 8, 1),
        ch=8,
        num_groups=2,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=(),
        dropout=0.1,
        num_classes=num_classes,
    )
    model = DiffusionModel(network, GaussianDiffusion(Schedule(make_betas("linear", 1000))), ema_decay=0.9)
    model.compile(optimizer or make_optimizer(warmup_steps=2), **compile_arguments)
    return model


def dataset():
    return make_dataset(ArraySource(IMAGES), batch_size=4, seed=0)


def bits(model):
    return {name: variable.numpy().tobytes() for name, variable in model.state().items()}


@pytest.fixture(scope="module")
def trained():
    """After 5 steps; not to be trained further."""
    model = make_model("adam")
    model.history = model.fit(
        {"image": X}, batch_size=8, epochs=2, verbose=0, validation_data={"image": X[:5]}, shuffle=False
    ).history
    return model


def test_a_name_makes_keras_own_optimizer(trained):
    assert type(trained.optimizer) is keras.optimizers.Adam
    assert "optimizer/learning_rate" in trained.state()
    assert type(make_model({"class_name": "SGD", "config": {}}).optimizer) is keras.optimizers.SGD


def test_validation_is_logged_at_every_epoch_and_is_what_evaluate_says(trained):
    assert len(trained.history["val_loss"]) == len(trained.history["loss"]) == 2
    assert trained.evaluate({"image": X[:5]}, verbose=0) == trained.history["val_loss"][-1]
    assert trained.history["val_loss"][0] != trained.history["val_loss"][1]


def test_evaluate_changes_nothing_and_gives_the_same_number_again(trained):
    before = bits(trained)
    first = trained.evaluate({"image": X}, verbose=0, batch_size=8)
    assert trained.evaluate({"image": X}, verbose=0, batch_size=8) == first
    assert trained.evaluate({"image": X}, verbose=0, batch_size=8, return_dict=True) == {"loss": first}
    assert bits(trained) == before


def test_evaluate_is_the_mean_of_all_losses_also_of_a_last_smaller_batch(trained):
    losses = []
    for number, first in enumerate(range(0, 20, 8)):
        part = tf.constant(X[first : first + 8])
        index = tf.range(len(part))
        losses += trained.objective.held_out_losses(part, None, index, tf.constant(number, tf.int64)).numpy().tolist()
    assert len(losses) == 20
    assert trained.evaluate({"image": X}, verbose=0, batch_size=8) == pytest.approx(np.mean(losses), rel=1e-5)


def test_evaluate_draws_nothing_that_training_draws(trained):
    index, step = tf.range(8), tf.constant(0, tf.int64)
    training = trained.objective.draws(index, step).eps
    seen = []
    trained.objective._computed, computed = (
        lambda x_0, labels, t, eps, **_: seen.append(eps),
        trained.objective._computed,
    )
    try:
        with pytest.raises(AttributeError):  # of None, which has no losses
            trained.objective.held_out_losses(tf.constant(X[:8]), None, index, step)
    finally:
        trained.objective._computed = computed
    assert abs(np.corrcoef(seen[0].numpy().ravel(), training.numpy().ravel())[0, 1]) < 0.3


@pytest.mark.slow
def test_two_replicas_evaluate_as_one():
    losses = []
    for replicas in (1, 2):
        with mirrored(replicas).scope():
            model = make_model()
            batches = tf.data.Dataset.from_tensor_slices({"image": X[:19]}).batch(8)  # the last one has 3
            losses.append(model.evaluate(batches, verbose=0))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_evaluate_with_several_steps_per_execution_is_the_same():
    one, three = make_model(), make_model(steps_per_execution=3)  # 3 does not divide the 5 batches
    batches = tf.data.Dataset.from_tensor_slices({"image": X}).batch(4)
    assert one.evaluate(batches, verbose=0) == pytest.approx(three.evaluate(batches, verbose=0), rel=1e-6)


@pytest.mark.slow
def test_running_eagerly_is_the_same_training():
    graph, eager = make_model(), make_model(run_eagerly=True)
    losses = [m.fit(dataset(), steps_per_epoch=2, verbose=0).history["loss"] for m in (graph, eager)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert graph.evaluate({"image": X}, verbose=0) == pytest.approx(eager.evaluate({"image": X}, verbose=0), rel=1e-5)


def test_predicting_and_calling_are_calling_the_network(trained):
    expected = trained.network(INPUTS).numpy()
    np.testing.assert_allclose(trained(INPUTS), expected, atol=1e-6)
    np.testing.assert_allclose(trained.predict(INPUTS, batch_size=7, verbose=0), expected, atol=1e-6)
    np.testing.assert_allclose(trained.predict_on_batch(INPUTS), expected, atol=1e-6)
    for verb in (trained, lambda x: trained.predict(x, verbose=0), trained.network):
        with pytest.raises(InputError, match=r'^A network is called with \{"x_t"'):
            verb(X)


def test_saved_weights_are_all_of_the_state(trained, tmp_path):
    trained.save_weights(tmp_path / "a.weights.h5")
    other = make_model("adam")
    assert bits(other) != bits(trained)
    other.load_weights(tmp_path / "a.weights.h5")
    saved = {name for name in trained.state() if name.split("/")[0] in ("network", "ema", "optimizer", "step")}
    assert {k: v for k, v in bits(other).items() if k in saved} == {
        k: v for k, v in bits(trained).items() if k in saved
    }


def test_a_summary_counts_the_networks_weights(trained):
    lines = []
    trained.summary(print_fn=lambda line, **_: lines.append(line))
    assert f"{trained.network.count_params():,}" in "\n".join(lines)


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        (lambda m: m.save("m.keras"), "Save its network"),
        (lambda m: keras.saving.save_model(m, "/tmp/m.keras"), "model.network.get_config"),
        (lambda m: m.export("m"), "use run_export.py"),
        (lambda m: m.to_json(), "model.network.get_config"),
        (lambda m: keras.models.clone_model(m), "make another DiffusionModel"),
        (lambda m: m.train_on_batch({"image": X}), r"Use fit\(dataset, steps_per_epoch=1\)"),
        (lambda m: m.test_on_batch({"image": X}), r"Use evaluate\(dataset, steps=1\)"),
        (lambda m: m.fit(dataset()), f"fit {ENDLESS} steps_per_epoch"),
        (lambda m: m.fit(dataset(), steps_per_epoch=1, validation_data=dataset()), f"{ENDLESS} validation_steps"),
        (lambda m: m.evaluate(dataset()), f"evaluate {ENDLESS} steps"),
        (lambda m: m.fit(X, verbose=0), "fit takes batches .* found .*8, 8, 1"),
        (lambda m: m.fit(X, X, verbose=0), "fit takes no y"),
        (lambda m: m.fit({"images": X}, verbose=0), r"found a dict with \['images'\]"),
        (lambda m: m.evaluate({"image": X}, sample_weight=np.ones(20), verbose=0), "evaluate takes no sample_weight"),
        (lambda m: m.evaluate({"image": X}, X, verbose=0), "evaluate takes no y"),
        (lambda m: m.fit({"image": X}, sample_weight=np.ones(20), verbose=0), "fit takes no sample_weight"),
        (lambda m: m.fit({"image": X}, class_weight={0: 1.0}, verbose=0), "fit takes no class_weight"),
        (lambda m: m.fit({"image": IMAGES}, verbose=0), "Images must be float32"),
    ],
)
def test_what_cannot_be_done_says_what_to_do_instead(trained, verb, message):
    with pytest.raises(InputError, match=message) as e:
        verb(trained)
    assert "\n" not in str(e.value).strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "mse"}, r"compile takes no loss: the loss is chosen by DiffusionModel\(loss="),
        ({"metrics": ["mae"], "loss_weights": [1]}, "compile takes no loss_weights, metrics"),
        ({"optimizer": "adan"}, "a Keras optimizer or its name, such as 'adam'; found 'adan'"),
        ({"optimizer": None}, "found None"),
        ({"optimizer": 3}, "found 3"),
        ({"optimizer": keras.optimizers.Adam(use_ema=True)}, "DiffusionModel has ema_decay"),
        ({"optimizer": keras.optimizers.Adam(gradient_accumulation_steps=2)}, "and micro_batches"),
        ({"jit_compile": True, "run_eagerly": True}, "exclude each other"),
        ({"jit_compile": "yes"}, "jit_compile must be True or False"),
        ({"steps_per_execution": 0}, "steps_per_execution must be within"),
    ],
)
def test_what_cannot_be_compiled_is_refused(trained, arguments, message):
    model = DiffusionModel(trained.network, trained.diffusion)
    with pytest.raises(InputError, match=message):
        model.compile(**{"optimizer": "adam"} | arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 0.9}, "seed must be an integer, found 0.9"),
        ({"seed": 2**63}, "seed must be within"),
        ({"ema_decay": None}, "ema_decay must be a number"),
        ({"grad_clip": float("nan")}, "grad_clip must be a finite number"),
        ({"micro_batches": 1.0}, "micro_batches must be an integer"),
        ({"max_skipped_steps": 0}, "max_skipped_steps must be within"),
        ({"loss_weight": "min_snr", "loss_settings": {"gamma": None}}, "gamma must be a number"),
        ({"grad_clip_mode": ["global"]}, "Unknown grad_clip_mode"),
        ({"loss": None}, "Unknown loss None"),
    ],
)
def test_settings_of_another_type_are_refused(trained, settings, message):
    with pytest.raises(InputError, match=message):
        DiffusionModel(trained.network, trained.diffusion, **settings)


@pytest.mark.slow
def test_labels_that_are_no_class_stop_fit_and_predict_and_do_not_become_the_null_class():
    model = make_model(num_classes=3)
    model.fit({"image": X[:4], "label": np.array([0, 1, 2, 3])}, verbose=0)
    message = r"Labels must lie within 0\.\.3, where 3 means no class"
    for bad in (-1, 4, 2**40 + 1):
        labels = np.array([0, 1, 2, bad])
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            model.fit({"image": X[:4], "label": labels}, verbose=0)
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            model.predict({"x_t": X[:4], "t": np.zeros(4, np.int32), "labels": labels}, verbose=0)
    with pytest.raises(InputError, match="Labels must be integers, one per image, found float32"):
        model.fit({"image": X[:4], "label": np.zeros(4)}, verbose=0)
