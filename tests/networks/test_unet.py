import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf.errors import InputError
from ddpm_tf.networks import UNet
from ddpm_tf.networks.encoder import least_parameters, warn_of_single_channels
from ddpm_tf.networks.layers import stateless_dropout, timestep_embedding
from tests.conftest import tf1_name

SMALLEST = {"ch": 32, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": ()}
TINY = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}


def test_time_embedding_matches_the_original(reference):
    for width in (128, 33):
        np.testing.assert_allclose(
            timestep_embedding(reference["temb_t"], width), reference[f"temb_{width}"], atol=2e-5
        )


def test_output_matches_the_original(reference):
    np.testing.assert_allclose(reference.output(), reference["unet_out"], atol=2e-5)


def test_variables_are_those_of_the_original(reference):
    network = reference.network()
    names = {tf1_name(v.path): str(list(v.shape)) for v in network.variables}
    assert names == dict(zip(reference["var_names"], reference["var_shapes"], strict=True))
    assert network.count_params() == reference["unet_params"]


def test_parameter_counts_are_the_papers():
    assert UNet((32, 32, 3)).count_params() == 35_746_307


@pytest.mark.slow
def test_parameter_count_of_256x256_is_the_papers():
    assert UNet((256, 256, 3), ch_mult=(1, 1, 2, 2, 4, 4)).count_params() == 113_673_219


def test_output_is_zero_at_the_start():
    network = UNet((8, 8, 3), **TINY)
    output = network({"x_t": tf.random.stateless_normal((2, 8, 8, 3), (0, 0)), "t": tf.constant([0, 999])})
    assert float(tf.reduce_max(tf.abs(output))) < 1e-3


def test_non_square_images_and_other_channels():
    network = UNet((8, 12, 2), out_channels=5, **TINY)
    assert network({"x_t": tf.zeros((3, 8, 12, 2)), "t": tf.zeros((3,), tf.int32)}).shape == (3, 8, 12, 5)


def test_config_round_trip_gives_the_same_network():
    network = UNet((8, 8, 1), dropout=0.2, resamp_with_conv=False, num_classes=3, seed=4, **SMALLEST)
    twin = UNet.from_config(network.get_config())
    assert twin.get_config() == network.get_config()
    for a, b in zip(network.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    other = UNet.from_config({**network.get_config(), "seed": 5})
    assert not np.array_equal(other.conv_in.kernel, network.conv_in.kernel)


def test_every_argument_is_an_attribute():
    network = UNet((8, 8, 1), **TINY)
    for name, value in network.get_config().items():
        if name != "dtype":
            assert getattr(network, name) == value


def test_saving_and_loading_gives_the_same_output(small_network, tmp_path):
    inputs = {"x_t": tf.ones((1, 8, 8, 1)), "t": tf.constant([3])}
    small_network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    np.testing.assert_array_equal(loaded(inputs), small_network(inputs))


def test_every_weight_has_a_gradient(small_network):
    with tf.GradientTape() as tape:
        output = small_network({"x_t": tf.random.stateless_normal((2, 8, 8, 1), (0, 1)), "t": tf.constant([5, 700])})
        loss = tf.reduce_sum(output**2)
    gradients = tape.gradient(loss, [v.value for v in small_network.trainable_variables])
    assert all(g is not None and np.isfinite(g).all() for g in gradients)
    # A key's bias shifts all scores of a query alike, and a group of one channel forgets what is added before it.
    silent = {v.path for v, g in zip(small_network.trainable_variables, gradients, strict=True) if not np.any(g)}
    assert not [p for p in silent if not p.endswith("bias")]


def test_labels_change_the_output():
    network = UNet((8, 8, 1), num_classes=2, **TINY)
    network.conv_out.kernel.assign(tf.ones_like(network.conv_out.kernel))
    inputs = {"x_t": tf.ones((2, 8, 8, 1)), "t": tf.constant([3, 3])}
    a, b = network({**inputs, "labels": tf.constant([0, 1])})
    assert not np.allclose(a, b)


def test_dropout_is_a_function_of_each_examples_seed():
    network = UNet((8, 8, 1), dropout=0.5, **TINY)
    for v in network.variables:  # off the zero initialisation
        v.assign(v + 0.05 * tf.random.stateless_normal(v.shape, (0, len(v.path))))
    inputs = {"x_t": tf.ones((2, 8, 8, 1)), "t": tf.constant([3, 3])}
    a, b = network(inputs, training=True, dropout_seed=tf.constant([[1, 2], [1, 3]]))
    assert not np.allclose(a, b)
    again = network(inputs, training=True, dropout_seed=tf.constant([[1, 3], [1, 2]]))
    np.testing.assert_allclose(again, tf.stack([b, a]), atol=1e-6)
    still = network(inputs)
    np.testing.assert_allclose(still[0], still[1], atol=1e-6)
    with pytest.raises(InputError, match="dropout_seed"):
        network(inputs, training=True)


def test_dropout_keeps_the_mean_and_differs_between_layers():
    x, seeds = tf.ones((64, 8, 8, 32)), tf.stack([tf.range(64), tf.zeros(64, tf.int32)], 1)
    first, second = (stateless_dropout(x, 0.25, seeds, layer).numpy() for layer in (1, 2))
    assert set(np.unique(first)) == {0.0, np.float32(1 / 0.75)}
    assert abs(first.mean() - 1) < 5 * (1 / 3 / first.size) ** 0.5
    assert (first != second).any()


@pytest.mark.parametrize(
    ("shape", "kwargs", "message"),
    [
        ((30, 30, 3), {}, "multiples of 8"),
        ((32, 30, 3), {}, "multiples of 8"),
        ((40, 40, 3), {"block_size": 2}, "cut into 2x2 blocks and halved 3 times.*multiples of 16"),
        ((32, 32, 3), {"ch": 48}, "num_groups=32 .* do not divide ch=48"),
        ((32, 32, 3), {"attn_resolutions": (7,)}, r"height 7, but the levels have heights \[32, 16, 8, 4\]"),
        ((32, 32, 3), {"dropout": 1.0}, r"within \[0, 1\), found 1.0"),
    ],
)
def test_shapes_that_cannot_be_are_refused(shape, kwargs, message):
    with pytest.raises(InputError, match=message):
        UNet(shape, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"ch": 100_000 * 32},
            r"[\d,]+ parameters or more, would take at least [\d,.]+ GiB of memory, and this machine has",
        ),
        ({"ch_mult": (1, 10**6)}, "GiB of memory"),
        ({"num_classes": 2**30}, "GiB of memory"),
        ({"num_res_blocks": 10**6}, r"num_res_blocks must be within 1\.\.1000, found 1000000"),
        ({"ch_mult": (1,) * 10**5}, "ch_mult must have 1 to 20 entries, one per level, found 100000"),
        ({"ch": 32.0}, "ch must be an integer, found 32.0"),
        ({"ch": True}, "ch must be an integer"),
        ({"ch_mult": 2}, "ch_mult have the shape"),
        ({"ch_mult": (1, 1.5)}, "ch_mult must be an integer, found 1.5"),
        ({"ch_mult": (1, 0)}, "ch_mult hold 0"),
        ({"num_res_blocks": None}, "num_res_blocks must be an integer"),
        ({"attn_resolutions": ("16",)}, "attn_resolutions must be integers"),
        ({"dropout": None}, "dropout must be a number"),
        ({"dropout": float("nan")}, "dropout must be a finite number"),
        ({"theta": "1e4"}, "theta must be a number"),
        ({"num_classes": 0}, "num_classes must be within"),
        ({"num_classes": 2.0}, "num_classes must be an integer"),
        ({"out_channels": 0}, "out_channels must be within"),
        ({"resamp_with_conv": "no"}, "resamp_with_conv must be True or False"),
        ({"remat": 1}, "remat must be True or False"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"seed": 2**63}, "seed must be within"),
    ],
)
def test_settings_of_another_type_or_beyond_this_machine_are_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        UNet((32, 32, 3), **kwargs)


@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 3, 1), (0, 32, 3), (32.0, 32, 3), 32, None, ("a", 1, 1)])
def test_an_image_shape_is_three_sizes(shape):
    with pytest.raises(InputError, match="The sizes in image_shape"):
        UNet(shape)


def test_an_image_that_this_machine_cannot_hold_is_refused():
    with pytest.raises(InputError, match="one image of 1048576x1048576 would take at least .* GiB"):
        UNet((2**20, 2**20, 3), ch=32, attn_resolutions=())


@pytest.mark.parametrize("kwargs", [SMALLEST, TINY, {**TINY, "num_res_blocks": 3, "num_classes": 10}, {"ch": 32}])
def test_the_least_number_of_parameters_is_below_and_near_the_number(kwargs):
    network = UNet((32, 32, 3), **kwargs | {"attn_resolutions": ()})
    sizes = (network.ch, network.ch_mult, network.num_res_blocks, network.num_classes)
    least = least_parameters(*sizes, is_unet=True)
    assert network.count_params() / 5 < least <= network.count_params()


def test_labels_that_keras_would_wrap_round_are_refused():
    network = UNet((8, 8, 1), num_classes=3, **SMALLEST)
    inputs = {"x_t": tf.zeros((2, 8, 8, 1)), "t": tf.constant([0, 1])}
    network({**inputs, "labels": tf.constant([0, 3])})
    for labels, message in (
        ([0, -1], "labels hold -1"),
        ([0, 4], "labels hold 4"),
        (np.array([0, 2**40 + 1]), "labels hold 1099511627777"),
        ([0.0, 1.0], "labels must be"),
        ([1], "labels have the shape"),
    ):
        with pytest.raises(InputError, match=f"^{message}|^Each of {message}"):
            network({**inputs, "labels": labels})
    with pytest.raises(InputError, match="^A class-conditional network needs labels"):
        network(inputs)
    with pytest.raises(InputError, match="^A network is called with"):
        network(inputs["x_t"])
    with pytest.raises(InputError, match="^Labels were given"):
        UNet((8, 8, 1), **SMALLEST)({**inputs, "labels": [0, 1]})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_statistics_and_softmax_stay_float32(dtype):
    """And the large products do not, in the forward pass as it is compiled."""
    network = UNet((8, 8, 1), dtype=f"mixed_{dtype}", **TINY)
    assert {v.dtype for v in network.variables} == {"float32"}
    inputs = {"x_t": tf.ones((1, 8, 8, 1)), "t": tf.constant([3])}
    graph = tf.function(network, autograph=False).get_concrete_function(inputs).graph
    types = {}
    for op in graph.get_operations():
        types.setdefault(op.type, set()).update(v.dtype.name for v in op.outputs)
    assert types["Conv2D"] == {dtype}
    assert types["Softmax"] == types["Mean"] == types["Rsqrt"] == {"float32"}
    output = network(inputs)
    assert output.dtype == tf.float32 and np.isfinite(output).all()


def test_blocks_of_pixels_become_channels():
    """block_size 2 is the network of half the size on rearranged pixels."""
    kwargs = SMALLEST
    blocks, plain = UNet((8, 8, 3), block_size=2, **kwargs), UNet((4, 4, 12), **kwargs)
    weights = [tf.random.stateless_normal(w.shape, (1, k)) * 0.1 for k, w in enumerate(plain.get_weights())]
    blocks.set_weights(weights)
    plain.set_weights(weights)
    x, t = tf.random.stateless_normal((2, 8, 8, 3), (0, 0)), tf.constant([1, 2])
    expected = tf.nn.depth_to_space(plain({"x_t": tf.nn.space_to_depth(x, 2), "t": t}), 2)
    np.testing.assert_array_equal(blocks({"x_t": x, "t": t}), expected)
    assert UNet.from_config(blocks.get_config()).block_size == 2


def loss_and_gradients(remat, *, jit_compile=None, dropout=0.3, shape=(8, 8, 1), batch=2, **kwargs):
    """(loss, {path: gradient}, bytes of tensors that lived at once) of a training step of a network with drawn weights.

    jit_compile: None: eagerly; else in a tf.function, by XLA or not.
    """
    network = UNet(shape, dropout=dropout, remat=remat, **{**TINY, **kwargs})
    for k, v in enumerate(network.variables):  # off the zero initialisation
        v.assign(v + 0.05 * tf.random.stateless_normal(v.shape, (0, k)))
    inputs = {"x_t": tf.random.stateless_normal((batch, *shape), (1, 2)), "t": tf.range(batch) * 7}
    seeds = tf.stack([tf.range(batch), tf.range(batch) + 5], axis=1)

    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(network(inputs, training=True, dropout_seed=seeds) ** 2)
        return loss, tape.gradient(loss, [v.value for v in network.trainable_variables])

    if jit_compile is not None:
        step = tf.function(step, jit_compile=jit_compile, autograph=False)
        step()
    memory = 0
    try:
        tf.config.experimental.reset_memory_stats("CPU:0")
        before = tf.config.experimental.get_memory_info("CPU:0")["current"]
        loss, gradients = step()
        memory = tf.config.experimental.get_memory_info("CPU:0")["peak"] - before
    except ValueError:  # a TensorFlow without oneDNN counts nothing on a CPU
        loss, gradients = step()
    paths = [v.path for v in network.trainable_variables]
    return float(loss), {p: g.numpy() for p, g in zip(paths, gradients, strict=True)}, memory


@pytest.mark.parametrize(
    "jit_compile", [None, pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.slow)]
)
def test_remat_gives_the_same_loss_and_gradients(jit_compile):
    """With dropout. Not to the bit: the compilers join other operations, and what temb receives is added in another order."""
    (loss, kept, _), (again, recomputed, _) = (loss_and_gradients(r, jit_compile=jit_compile) for r in (False, True))
    assert again == pytest.approx(loss, rel=1e-6)
    assert kept.keys() == recomputed.keys()
    largest = max(np.abs(g).max() for g in kept.values())
    for path, gradient in kept.items():
        # Where the gradient is 0 but for rounding (a key's bias, what a group of one channel forgets), only the second.
        tolerance = 1e-5 * np.abs(gradient).max() + 1e-7 * largest
        np.testing.assert_allclose(recomputed[path], gradient, rtol=0, atol=tolerance, err_msg=path)


@pytest.mark.slow
def test_remat_changes_no_path_and_no_weight():
    network = UNet((8, 8, 1), remat=True, dropout=0.1, **TINY)
    plain = UNet((8, 8, 1), dropout=0.1, **TINY)
    assert [v.path for v in network.variables] == [v.path for v in plain.variables]
    for a, b in zip(network.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    twin = UNet.from_config(network.get_config())
    assert twin.remat and twin.get_config() == network.get_config()
    assert not UNet.from_config({k: v for k, v in plain.get_config().items() if k != "remat"}).remat


MEASURE = """
import sys
from tests.networks.test_unet import loss_and_gradients
size = {"shape": (64, 64, 1), "batch": 4, "num_res_blocks": 2, "ch_mult": (1, 1, 1), "attn_resolutions": ()}
print(*(loss_and_gradients(remat, jit_compile=sys.argv[1] == "True", **size)[2] for remat in (False, True)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", [False, True])
def test_remat_lowers_the_memory_of_a_step(jit_compile):
    """Neither compiler takes the second computation for a repetition of the first. In a process of its own: the allocator
    counts whole chunks, up to twice what is asked for, and which it has depends on what was freed before.
    """
    command = [sys.executable, "-c", MEASURE, str(jit_compile)]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True)
    kept, recomputed = map(int, result.stdout.split())
    if not kept:
        pytest.skip("this TensorFlow does not count the memory of a CPU")
    assert recomputed < 0.7 * kept


def test_groups_of_one_channel_are_made_with_a_warning(caplog):
    warn_of_single_channels.cache_clear()
    small = {"ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": ()}
    UNet((8, 8, 1), ch=8, num_groups=4, **small)
    assert not caplog.records
    UNet((8, 8, 1), ch=8, num_groups=8, **small)
    assert "do not see the timestep or the label" in caplog.text and "num_groups=2 or fewer" in caplog.text
