import inspect

import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf.data import make_dataset
from ddpm_tf.data.sources import ArraySource
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.errors import InputError
from ddpm_tf.networks import UNet
from ddpm_tf.training.ema import make_ema_network
from ddpm_tf.training.model import DiffusionModel
from ddpm_tf.training.optimizers import make_optimizer
from tests.conftest import draw_from_tables, mirrored, tf1_name

SCHEDULE = Schedule(make_betas("linear", 1000))


@pytest.mark.slow
def test_twelve_steps_match_the_original(reference):
    model = DiffusionModel(reference.network(), reference.diffusion(), ema_decay=0.9, grad_clip=1.0)
    draw_from_tables(model, reference)
    model.compile(make_optimizer(learning_rate=2e-3, warmup_steps=5))
    iterator = iter(tf.data.Dataset.from_tensor_slices({"image": reference["train_x0"]}))
    model.make_train_function()
    logs = [model.train_function(iterator) for _ in range(12)]
    got = {k: np.array([log[k] for log in logs]) for k in logs[0]}
    np.testing.assert_allclose(got["loss"], reference["train_loss"], rtol=1e-4)
    np.testing.assert_allclose(got["grad_norm"], reference["train_gnorm"], rtol=1e-3)
    np.testing.assert_array_equal(got["learning_rate"], reference["train_lr"].astype(np.float32))
    if reference.args["ch"] == 64:  # with one channel per group some gradients are rounding noise, which Adam amplifies
        for kind, network in (("param", model.network), ("ema", model.ema_network)):
            variables = {tf1_name(v.path): v.numpy().astype(np.float64) for v in network.variables}
            for k, name in enumerate(reference["train_names"]):
                value = variables.pop(str(name))
                np.testing.assert_allclose(
                    value.sum(), reference[f"train_{kind}_sum"][k], atol=1e-5 * value.size**0.5, err_msg=str(name)
                )
                np.testing.assert_allclose((value**2).sum(), reference[f"train_{kind}_sq"][k], rtol=1e-5)
            assert not variables


def images(n=64, shape=(8, 8, 1)):
    return np.random.Generator(np.random.PCG64(0)).integers(0, 256, (n, *shape), np.uint8)


def train(
    replicas,
    steps,
    *,
    dropout=0.0,
    remat=False,
    grad_clip=0.5,
    mode="global",
    micro_batches=1,
    probe=None,
    **compile_args,
):
    """A small model after `steps` steps, on 1 or 2 replicas with the same global batch of 8."""
    strategy = mirrored(replicas)
    dataset = make_dataset(ArraySource(images()), batch_size=8, seed=0, random_flip=True)
    with strategy.scope():
        network = UNet(
            (8, 8, 1), ch=64, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), dropout=dropout, remat=remat
        )
        model = DiffusionModel(
            network,
            GaussianDiffusion(SCHEDULE),
            seed=3,
            ema_decay=0.9,
            grad_clip=grad_clip,
            grad_clip_mode=mode,
            micro_batches=micro_batches,
        )
        model.compile(make_optimizer(learning_rate=1e-3, warmup_steps=2), **compile_args)
        if probe:
            return probe(model, strategy, dataset)
        history = model.fit(dataset, steps_per_epoch=steps, verbose=0, shuffle=False)
    return model, history


def assert_same_weights(a, b, tolerance):
    for x, y in zip(
        a.network.variables + a.ema_network.variables, b.network.variables + b.ema_network.variables, strict=True
    ):
        np.testing.assert_allclose(x.numpy(), y.numpy(), atol=tolerance, rtol=0, err_msg=x.path)


@pytest.mark.slow
def test_two_replicas_are_one():
    """The same weights after 10 steps, with dropout, flips, and clipping active."""
    (one, log), (two, log_two) = (train(replicas, 10, dropout=0.1) for replicas in (1, 2))
    assert min(log.history["grad_norm"]) > 0.5
    np.testing.assert_allclose(log.history["loss"], log_two.history["loss"], rtol=1e-5)
    assert_same_weights(one, two, 1e-5)


@pytest.mark.slow
def test_remat_is_the_same_training_on_one_and_two_replicas():
    """To the rounding of the compiled graph, as between one and two replicas."""
    plain, _ = train(1, 4, dropout=0.1)
    for replicas in (1, 2):
        assert_same_weights(plain, train(replicas, 4, dropout=0.1, remat=True)[0], 1e-5)


def first_step(replicas):
    """[images, t, eps, dropout seeds of the global batch, then the gradients] of the first step."""

    def probe(model, strategy, dataset):
        def step(batch):
            context = tf.distribute.get_replica_context()
            size = tf.shape(batch["image"])[0]
            index = context.replica_id_in_sync_group * size + tf.range(size)
            draws = model.objective.draws(index, tf.constant(0))
            scale = 1 / context.num_replicas_in_sync
            _, _, gradients = model.loss_and_gradient(batch["image"], None, index, tf.constant(0), tf.constant(scale))
            return (batch["image"], *draws[:3]), context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)

        batch = next(iter(strategy.experimental_distribute_dataset(dataset)))
        draws, gradients = tf.function(lambda: strategy.run(step, (batch,)))()
        local = strategy.experimental_local_results
        return [tf.concat(local(d), 0).numpy() for d in draws] + [local(g)[0].numpy() for g in gradients]

    return train(replicas, 0, dropout=0.1, probe=probe)


def assert_same_first_step(one, several):
    """Images (so flips), t and masks are identical, eps to the last bits, gradients to 1e-5 of each one's largest value."""
    for k, (a, b) in enumerate(zip(one, several, strict=True)):
        tolerance = 0 if k in (0, 1, 3) else 5e-7 if k == 2 else 1e-5 * abs(a).max() + 1e-12
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=str(k))


@pytest.mark.slow
def test_xla_is_the_same_training():
    """On two replicas, in two micro-batches, with dropout and the clip active."""
    plain, log = train(1, 4, dropout=0.1)
    assert min(log.history["grad_norm"]) > 0.5
    assert_same_weights(plain, train(2, 4, dropout=0.1, micro_batches=2, jit_compile=True)[0], 1e-5)


@pytest.mark.slow
def test_two_replicas_draw_the_same_and_have_the_same_first_gradients():
    assert_same_first_step(first_step(1), first_step(2))


@pytest.mark.slow
def test_several_steps_per_execution_are_the_same_steps():
    (a, _), (b, _) = train(1, 8), train(1, 8, steps_per_execution=4)
    assert_same_weights(a, b, 0)
    (c, _) = train(2, 8, steps_per_execution=4)
    assert_same_weights(a, c, 1e-5)


@pytest.mark.slow
def test_per_replica_clipping_is_the_originals_rule():
    """Each of N replicas clips the gradient of its loss / N at clip / N; the sum of the parts is applied."""

    def probe(model, strategy, dataset):
        batch, clip = next(iter(dataset)), 0.05
        parts, norms, function = [], [], tf.function(model.loss_and_gradient)
        for replica in range(2):
            index = tf.range(4) + 4 * replica
            part = tf.gather(batch["image"], index)
            _, _, gradient = function(part, None, index, tf.constant(0), tf.constant(0.5))
            gradient = [g.numpy().astype(np.float64) for g in gradient]
            norm = np.sqrt(sum((g**2).sum() for g in gradient))
            assert norm > clip / 2
            norms.append(norm)
            parts.append([g * min(1, clip / 2 / norm) for g in gradient])
        return [a + b for a, b in zip(*parts, strict=True)], sum(norms)

    expected, own_norms = train(1, 0, probe=probe)
    model, log = train(2, 1, grad_clip=0.05, mode="per_replica")
    norm = np.sqrt(sum((g**2).sum() for g in expected))
    np.testing.assert_allclose(log.history["grad_norm_clipped"][0], norm, rtol=1e-5)
    np.testing.assert_allclose(
        log.history["grad_norm"][0], own_norms, rtol=1e-5
    )  # of loss / 2: the mean of the losses'
    for g, m in zip(expected, model.optimizer._momentums, strict=True):  # Adam's first moment is 0.1 times the gradient
        np.testing.assert_allclose(m.numpy(), 0.1 * g, rtol=0, atol=1e-5 * abs(g).max() + 1e-12)


def tiny_network(**kwargs):
    return UNet((8, 8, 1), ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), **kwargs)


def test_warmup_is_linear_from_zero():
    rate = make_optimizer(learning_rate=2e-4, warmup_steps=5000).learning_rate
    assert float(rate) == 0
    schedule = make_optimizer(learning_rate=2e-4, warmup_steps=5000)._learning_rate
    np.testing.assert_allclose([schedule(s) for s in (0, 2500, 5000, 10**6)], [0, 1e-4, 2e-4, 2e-4], rtol=1e-6)
    assert float(make_optimizer(learning_rate=2e-4, warmup_steps=0).learning_rate) == np.float32(2e-4)


def test_the_moving_average_starts_as_a_copy_and_is_not_trained():
    network = tiny_network()
    twin = make_ema_network(network)
    for a, b in zip(network.variables, twin.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
        assert a.path == b.path
    assert not twin.trainable_variables


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"loss": "l1"}, "Unknown loss 'l1'"),
        ({"loss": "hybrid"}, "Loss 'hybrid' makes no sense with variance 'fixed_large'"),
        ({"grad_clip_mode": "local"}, "Unknown grad_clip_mode 'local'"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"grad_clip": -1.0}, "grad_clip"),
        ({"max_skipped_steps": 0}, "max_skipped_steps"),
    ],
)
def test_settings_that_cannot_be_are_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        DiffusionModel(tiny_network(), GaussianDiffusion(SCHEDULE), **kwargs)


def test_batches_of_another_dtype_size_or_range_are_refused():
    model = DiffusionModel(tiny_network(), GaussianDiffusion(SCHEDULE))
    for batch, message in (
        (tf.zeros((2, 8, 8, 1)), "fit takes batches"),
        ({"image": tf.zeros((2, 8, 8, 1), tf.uint8)}, "found uint8"),
        ({"image": tf.zeros((2, 9, 8, 1))}, r"\(2, 9, 8, 1\)"),
    ):
        with pytest.raises(InputError, match=message):
            model.objective.check(batch)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"within \[-1, 1\]"):
        model.objective.check({"image": tf.fill((2, 8, 8, 1), 255.0)})
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"within \[-1, 1\]"):
        model.objective.check({"image": tf.fill((2, 8, 8, 1), float("nan"))})


def test_the_keras_methods_that_are_replaced_still_exist():
    """keras is pinned below the next minor version because these are private; a rename must not pass unseen."""
    from keras.src.backend.tensorflow.optimizer import TFOptimizer
    from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

    def parameters(method):
        return {name: p.default for name, p in inspect.signature(method).parameters.items() if name != "self"}

    for name in ("_maybe_symbolic_build", "make_train_function"):
        assert parameters(getattr(TensorFlowTrainer, name)) == parameters(getattr(DiffusionModel, name)), name
        assert f"self.{name}(" in inspect.getsource(TensorFlowTrainer.fit)
    assert "self._all_reduce_sum_gradients(grads_and_vars)" in inspect.getsource(TFOptimizer._backend_update_step)


def test_fit_runs_our_train_function():
    """One call of `self.train_function` for each `steps_per_execution` steps, with the iterator as its only argument."""
    model, calls = DiffusionModel(tiny_network(), GaussianDiffusion(SCHEDULE)), []
    model.compile(make_optimizer())

    def make_train_function(force=False):
        model.train_function = lambda iterator: (
            calls.append(next(iterator)["image"]) or {"calls": tf.constant(len(calls))}
        )

    model.make_train_function = make_train_function
    dataset = make_dataset(ArraySource(images()), batch_size=4, seed=0)
    history = model.fit(dataset, steps_per_epoch=3, verbose=0, shuffle=False)
    assert len(calls) == 3 and all(c.shape == (4, 8, 8, 1) for c in calls)
    assert history.history["calls"] == [3]
