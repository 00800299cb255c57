"""The classifier of noisy images; tests/networks/test_contract.py holds what it shares with every network."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf.errors import InputError
from ddpm_tf.networks import Classifier
from ddpm_tf.networks.classifier import AttentionPool
from ddpm_tf.networks.encoder import least_parameters
from tests.conftest import drawn_weight, tf1_name

SHAPE = (8, 8, 1)
TINY = {"ch": 8, "num_groups": 2, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}


def make(**kwargs):
    """A classifier with drawn weights, so that everything plays a part."""
    network = Classifier(SHAPE, num_classes=3, **TINY | kwargs)
    for v in network.variables:
        v.assign(drawn_weight(tf1_name(v.path), v.shape, seed=0))
    return network


@pytest.fixture(scope="module")
def network():
    return make()


def inputs(batch=4):
    return {"x_t": tf.random.stateless_normal((batch, *SHAPE), (0, 1)), "t": tf.constant([0, 5, 700, 999][:batch])}


def test_every_weight_has_a_gradient(network):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(network(inputs()) ** 2)
    gradients = tape.gradient(loss, [v.value for v in network.trainable_variables])
    assert all(g is not None and np.isfinite(g).all() for g in gradients)
    silent = {v.path for v, g in zip(network.trainable_variables, gradients, strict=True) if not np.any(g)}
    assert not [p for p in silent if not p.endswith("k/bias")]  # it shifts all scores of a query alike


def test_the_gradient_by_an_image_is_of_its_own_logits_alone(network):
    """Guidance follows it."""
    batch = inputs()
    with tf.GradientTape() as tape:
        tape.watch(batch["x_t"])
        of_second = tf.nn.log_softmax(network(batch))[1, 2]
    gradient = tape.gradient(of_second, batch["x_t"]).numpy()
    assert np.abs(gradient[1]).max() > 1e-4 and np.abs(gradient[[0, 2, 3]]).max() < 1e-7


def test_the_order_of_the_batch_is_the_order_of_the_logits(network):
    batch, order = inputs(), [2, 0, 3, 1]
    mixed = network({name: tf.gather(value, order) for name, value in batch.items()})
    np.testing.assert_allclose(mixed, tf.gather(network(batch), order), atol=1e-5)


def test_attention_pooling_is_the_mean_tokens_answer():
    """In float64 numpy, with two heads."""
    pool = AttentionPool(128, 3, seed=0, name="pool", dtype="float32")
    x = np.random.Generator(np.random.PCG64(0)).standard_normal((2, 2, 3, 128))
    pool(x.astype(np.float32))
    assert pool.num_heads == 2 and pool.positions.shape == (7, 128)
    for v in pool.variables:
        v.assign(drawn_weight(tf1_name(f"pool/{v.path}"), v.shape, seed=0))
    tokens = x.reshape(2, 6, 128)
    tokens = np.concatenate([tokens.mean(axis=1, keepdims=True), tokens], axis=1) + pool.positions.numpy()
    q, k, v = (
        (tokens @ f.kernel.numpy() + f.bias.numpy()).reshape(2, 7, 2, 64).swapaxes(1, 2)
        for f in (pool.q, pool.k, pool.v)
    )  # [B, heads, tokens, 64]
    scores = q[:, :, :1] @ k.swapaxes(2, 3) / 8
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    answer = (weights @ v).reshape(2, 128)
    expected = answer @ pool.proj_out.kernel.numpy() + pool.proj_out.bias.numpy()
    np.testing.assert_allclose(pool(x.astype(np.float32)), expected, atol=1e-4)  # of float32 sums over 128 channels


@pytest.mark.parametrize(("ch", "num_heads"), [(8, 1), (64, 1), (96, 1), (128, 2), (160, 2), (256, 4)])
def test_a_head_has_64_channels_or_a_few_more(ch, num_heads):
    assert AttentionPool(ch, 3, seed=0, name="pool", dtype="float32").num_heads == num_heads


def test_images_that_are_not_square_and_blocks_of_pixels():
    for kwargs in ({}, {"block_size": 2}):
        network = Classifier((8, 16, 2), num_classes=2, **TINY | {"attn_resolutions": ()} | kwargs)
        assert network({"x_t": tf.zeros((3, 8, 16, 2)), "t": tf.zeros((3,), tf.int32)}).shape == (3, 2)
        assert Classifier.from_config(network.get_config()).get_config() == network.get_config()


def test_saving_and_loading_gives_the_same_logits(network, tmp_path):
    network.save(tmp_path / "network.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "network.keras")(inputs()), network(inputs()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_softmax_and_logits_stay_float32(dtype):
    network = make(dtype=f"mixed_{dtype}")
    assert {v.dtype for v in network.variables} == {"float32"}
    graph = tf.function(network, autograph=False).get_concrete_function(inputs()).graph
    types = {op.type: {v.dtype.name for v in op.outputs} for op in graph.get_operations()}
    assert types["Softmax"] == types["Mean"] == {"float32"} and types["Conv2D"] == {dtype}
    logits = network(inputs())
    assert logits.dtype == tf.float32 and np.isfinite(logits).all()


def test_remat_gives_the_same_logits_and_gradients():
    found = []
    for remat in (False, True):
        network = make(remat=remat)
        with tf.GradientTape() as tape:
            logits = network(inputs(), training=True)
            loss = tf.reduce_sum(logits**2)
        gradients = tape.gradient(loss, [v.value for v in network.trainable_variables])
        found.append(np.concatenate([np.ravel(v) for v in (logits, *gradients)]))
    np.testing.assert_allclose(*found, atol=1e-5 * np.abs(found[0]).max())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": None}, "A classifier needs at least two classes, found num_classes=0. Set num_classes to"),
        ({"num_classes": 1}, "A classifier needs at least two classes, found num_classes=1"),
        ({"num_classes": 2.5}, "num_classes must be an integer"),
        ({"num_classes": 2**30}, "GiB of memory"),
        ({"ch": 9}, "num_groups=2 .* do not divide ch=9"),
        ({"attn_resolutions": (16,)}, "height 16, but the levels have heights"),
        ({"ch_mult": (1, 2, 2, 2, 2)}, "multiples of 16"),
        ({"ch": 3_200_000}, "parameters or more, would take"),
    ],
)
def test_what_cannot_be_is_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        Classifier(SHAPE, **{"num_classes": 3, **TINY, **kwargs})


def test_labels_are_refused_since_they_are_what_it_finds(network):
    with pytest.raises(InputError, match="^A classifier is called with .* It takes no labels"):
        network({**inputs(2), "labels": tf.constant([0, 1])})
    with pytest.raises(InputError, match="^A classifier is called with"):
        network(inputs()["x_t"])


def test_the_least_number_of_parameters_is_below_and_near_the_number(network):
    least = least_parameters(network.ch, network.ch_mult, network.num_res_blocks, None, is_unet=False)
    assert network.count_params() / 6 < least <= network.count_params()
