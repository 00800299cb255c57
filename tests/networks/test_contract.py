"""Every network of the table keeps the promises of `networks/contract.py`."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf.errors import InputError
from ddpm_tf.networks import NETWORKS
from tests.conftest import drawn_weight, tf1_name

SHAPE, BATCH = (8, 8, 3), 3
# The smallest that each network may be without a warning, with a dropout that shows.
SMALL = {
    "unet": {"ch": 4, "num_groups": 2, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": (8,), "dropout": 0.5}
}
SMALL["classifier"] = SMALL["unet"]
BAD = {"unet": {"ch": 5}, "classifier": {"ch": 5}}
# The weights by which each block of a network takes the time and the label.
CONDITIONING = {"unet": "temb_proj", "classifier": "temb_proj"}


def classifies(network):
    return getattr(network, "classifies", False)


def build(name, num_classes=None, seed=1):
    """A classifier takes no out_channels, and has classes."""
    kind = {"num_classes": 5} if classifies(NETWORKS[name].build) else {"num_classes": num_classes, "out_channels": 6}
    return NETWORKS[name].build(SHAPE, seed=seed, **kind, **SMALL[name])


@pytest.fixture(scope="module", params=sorted(NETWORKS))
def name(request):
    return request.param


KINDS = [(name, k) for name in sorted(NETWORKS) for k in (None, 5) if k or not classifies(NETWORKS[name].build)]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def network(request):
    network = build(*request.param)
    network.entry = request.param[0]
    network.initial_output = call(network)
    for v in network.variables:
        v.assign(drawn_weight(tf1_name(v.path), v.shape, seed=0))  # so that everything plays a part
    return network


def takes_labels(network):
    return network.num_classes is not None and not classifies(network)


def of_examples(difference):
    """The largest absolute value of each example."""
    return np.abs(difference).reshape(BATCH, -1).max(axis=1)


def inputs(network, **changed):
    rng = np.random.Generator(np.random.PCG64(1))
    values = {"x_t": rng.standard_normal((BATCH, *SHAPE)).astype(np.float32), "t": np.array([0, 1, 999], np.int32)}
    if takes_labels(network):
        values["labels"] = np.array([0, 1, network.num_classes], np.int32)
    if getattr(network, "self_condition", False):
        values["x_0"] = np.zeros((BATCH, *SHAPE), np.float32)
    return {k: tf.constant(v) for k, v in (values | changed).items()}


def call(network, training=False, dropout_seed=None, **changed):
    return network(inputs(network, **changed), training=training, dropout_seed=dropout_seed).numpy()


def test_it_says_what_it_is(network):
    assert network.image_shape == SHAPE and network.num_classes in (None, 5)
    assert classifies(network) or network.out_channels == 6
    assert all(v.dtype == "float32" for v in network.variables)


def test_its_first_output_is_nearly_zero_and_float32(network):
    assert network.initial_output.dtype == np.float32
    shape = (network.num_classes,) if classifies(network) else (8, 8, 6)
    assert network.initial_output.shape == (BATCH, *shape) and np.abs(network.initial_output).max() < 1e-3


def test_its_output_depends_on_image_and_label_of_the_same_example_alone(network):
    output = call(network)
    assert output.std() > 1e-3
    x_t = inputs(network)["x_t"].numpy()
    x_t[0] += 1
    changed = of_examples(call(network, x_t=x_t) - output)
    assert changed[0] > 1e-3 and changed[1:].max() < 1e-5
    if takes_labels(network):
        assert network.num_classes == 5
        assert call(network, labels=np.array([5, 5, 5], np.int32)).shape == output.shape  # the null class


def test_every_block_alone_moves_the_output_with_t_and_label(network):
    """All blocks but one are cut off from time and label; t of two examples is exchanged, and then their labels."""
    weights = [v for v in network.variables if CONDITIONING[network.entry] in v.path and v.path.endswith("kernel")]
    blocks = {v.path: v.numpy() for v in weights}
    assert len(blocks) >= (3 if classifies(network) else 4)  # down, two in the middle, up
    other_t, other_labels = np.array([999, 1, 0], np.int32), np.array([1, 0, 5], np.int32)
    try:
        for kept in weights:
            for v in weights:
                v.assign(blocks[v.path] * (v is kept))
            # A residual block adds to its input, so the effect of one is small; without any it would be 0 or 1e-6.
            output = call(network)
            assert np.abs(call(network, t=other_t) - output)[[0, 2]].max() > 1e-3 * output.std(), kept.path
            if takes_labels(network):
                assert np.abs(call(network, labels=other_labels) - output)[:2].max() > 1e-3 * output.std(), kept.path
    finally:
        for v in weights:
            v.assign(blocks[v.path])


def test_its_config_is_a_round_trip(network):
    twin = type(network).from_config(network.get_config())
    twin.set_weights(network.get_weights())
    assert [v.path for v in twin.variables] == [v.path for v in network.variables]
    np.testing.assert_array_equal(call(twin), call(network))
    assert keras.saving.get_registered_object(keras.saving.get_registered_name(type(network))) is type(network)


def test_dropout_is_a_function_of_the_examples_seed(network):
    seeds = np.array([[1, 2], [3, 4], [5, 6]], np.int32)
    first, again = (call(network, training=True, dropout_seed=tf.constant(seeds)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = call(network, training=True, dropout_seed=tf.constant(seeds + np.array([[1, 0], [0, 0], [0, 0]], np.int32)))
    changed = of_examples(other - first)
    assert changed[0] > 1e-3 and changed[1:].max() < 1e-5
    with pytest.raises(InputError, match="dropout_seed"):
        call(network, training=True)


def test_the_same_seed_makes_the_same_weights(name):
    one, same, other = (build(name, seed=s).get_weights() for s in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_its_check_takes_every_setting_and_names_the_bad_one(name):
    settings = NETWORKS[name].defaults() | SMALL[name] | {"num_classes": 5}
    NETWORKS[name].build.check(SHAPE, **settings)
    with pytest.raises(InputError, match=next(iter(BAD[name]))):
        NETWORKS[name].build.check(SHAPE, **settings | BAD[name])
