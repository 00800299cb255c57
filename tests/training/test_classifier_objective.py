"""What a training step of a classifier computes."""

import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf.data import make_dataset
from ddpm_tf.data.sources import ArraySource
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.errors import InputError
from ddpm_tf.networks import Classifier, UNet
from ddpm_tf.training import memory
from ddpm_tf.training.classifier_objective import ClassifierObjective, objective_of
from ddpm_tf.training.model import DiffusionModel
from ddpm_tf.training.objective import Objective
from ddpm_tf.training.optimizers import make_optimizer
from tests.conftest import mirrored

DIFFUSION = GaussianDiffusion(Schedule(make_betas("linear", 1000)))
TINY = {"ch": 8, "num_groups": 2, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": ()}


class Answers:
    """A classifier of fixed logits, which keeps what it was asked."""

    image_shape, num_classes, classifies = (2, 2, 1), 3, True

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, inputs, training=False, dropout_seed=None):
        self.inputs, self.training = inputs, training
        return tf.constant(self.logits, tf.float32)


def test_the_loss_is_the_cross_entropy_of_the_clean_label_in_nats():
    rng = np.random.Generator(np.random.PCG64(0))
    logits, labels, x_0 = rng.normal(0, 5, (64, 3)), rng.integers(0, 3, 64), rng.uniform(-1, 1, (64, 2, 2, 1))
    network = Answers(logits)
    objective = ClassifierObjective(network, DIFFUSION, seed=5, loss="cross_entropy", label_dropout=0.5)
    index, step = tf.range(64), tf.constant(3, tf.int64)
    draws = objective.draws(index, step)
    computed = objective(tf.constant(x_0, tf.float32), tf.constant(labels, tf.int32), draws)
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(64), labels]
    np.testing.assert_allclose(computed.losses, expected, rtol=1e-5, atol=1e-6)  # float32 logits up to 15

    # The network was asked about x_t and t, drawn as for a network that draws images, and about nothing else.
    others = Objective(UNet((2, 2, 1), **TINY), DIFFUSION, seed=5).draws(index, step)
    assert network.inputs.keys() == {"x_t", "t"} and network.training and draws.drops_label is None
    np.testing.assert_array_equal(network.inputs["t"], others.t)
    x_t = DIFFUSION.q_sample(tf.constant(x_0, tf.float32), others.t, others.eps)
    np.testing.assert_array_equal(network.inputs["x_t"], x_t)

    logs = objective.logs(objective.sums(None, computed))
    assert tuple(logs) == objective.LOGS == tuple(f"{n}_q{k}" for n in ("loss", "accuracy") for k in (1, 2, 3, 4))
    quarter, is_right = draws.t.numpy() // 250, logits.argmax(axis=1) == labels
    for k in range(4):
        assert (quarter == k).any()
        np.testing.assert_allclose(logs[f"accuracy_q{k + 1}"], is_right[quarter == k].mean(), rtol=1e-6)
        np.testing.assert_allclose(logs[f"loss_q{k + 1}"], expected[quarter == k].mean(), rtol=1e-5)


def test_a_network_has_the_objective_of_its_kind_and_no_other_loss():
    classifier, unet = Classifier((8, 8, 1), num_classes=3, **TINY), UNet((8, 8, 1), **TINY)
    assert objective_of(classifier) is objective_of(Classifier) is ClassifierObjective
    assert objective_of(unet) is objective_of(UNet) is Objective
    for network, settings, message in (
        (classifier, {}, "A classifier is trained by loss 'cross_entropy' alone, found 'simple'"),
        (classifier, {"loss": "cross_entropy", "loss_weight": "p2"}, "'cross_entropy' has no loss weight, found 'p2'"),
        (
            unet,
            {"loss": "cross_entropy"},
            "'cross_entropy' trains a classifier, and this network predicts images. Use one",
        ),
    ):
        with pytest.raises(InputError, match=message):
            DiffusionModel(network, DIFFUSION, **settings)


def make_model(replicas=1, micro_batches=1):
    with mirrored(replicas).scope():
        network = Classifier((8, 8, 1), num_classes=3, dropout=0.1, **TINY)
        model = DiffusionModel(
            network, DIFFUSION, loss="cross_entropy", ema_decay=0.9, grad_clip=0.5, micro_batches=micro_batches
        )
        model.compile(make_optimizer(learning_rate=1e-2, warmup_steps=2))
    return model


def train(**kwargs):
    """(logs, weights and averages) of 6 steps."""
    rng = np.random.Generator(np.random.PCG64(0))
    source = ArraySource(rng.integers(0, 256, (24, 8, 8, 1), np.uint8), np.arange(24) % 3)
    model = make_model(**kwargs)
    with model.distribute_strategy.scope():
        dataset = make_dataset(source, batch_size=8, seed=0, random_flip=True)
        history = model.fit(dataset, steps_per_epoch=2, epochs=3, verbose=0, shuffle=False).history
    weights = [v.numpy().ravel() for v in model.network.variables + model.ema_network.variables]
    return history, np.concatenate(weights)


@pytest.fixture(scope="module")
def one():
    return train()


@pytest.mark.parametrize(
    "shared", [pytest.param(s, marks=pytest.mark.slow) for s in ({"micro_batches": 4}, {"replicas": 2})], ids=str
)
def test_replicas_and_micro_batches_are_the_whole_batch(one, shared):
    """To the rounding of sums in another order, which Adam's first steps amplify."""
    history, weights = train(**shared)
    np.testing.assert_allclose(weights, one[1], atol=2e-4, rtol=0)
    assert history.keys() == one[0].keys() and "bound_q1" not in history
    for name in ("loss", "grad_norm", "accuracy_q1", "loss_q4"):
        np.testing.assert_allclose(history[name], one[0][name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_labels_are_classes_and_never_the_null_class():
    objective, images = ClassifierObjective(Answers(None), DIFFUSION, loss="cross_entropy"), tf.zeros((4, 2, 2, 1))
    _, labels = objective.check({"image": images, "label": tf.constant([0, 1, 2, 2], tf.int64)})
    assert labels.dtype == tf.int32 and labels.numpy().tolist() == [0, 1, 2, 2]
    for wrong in (3, -1):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"Labels must lie within 0\.\.2\."):
            objective.check({"image": images, "label": tf.constant([0, 1, 2, wrong])})
    with pytest.raises(InputError, match='a classifier needs batches with "label"'):
        objective.check({"image": images})


def test_evaluate_gives_the_cross_entropy_and_twice_the_same():
    model = make_model()
    batch = {"image": np.zeros((8, 8, 8, 1), np.float32), "label": np.arange(8, dtype=np.int32) % 3}
    first, again = (model.evaluate(batch, batch_size=4, verbose=0) for _ in range(2))
    assert first == again == pytest.approx(np.log(3), rel=1e-3)  # its logits are nearly 0


def test_a_steps_memory_is_estimated():
    model = make_model()
    estimate = memory.estimate_step_memory(model, 8)
    assert estimate.kept == 16 * model.network.count_params() and estimate.peak > estimate.kept
