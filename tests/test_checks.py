"""Numbers are taken as they are, or refused: never rounded, wrapped round or repeated."""

import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf import checks
from ddpm_tf.errors import InputError


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), np.array(3), -5])
def test_an_integer_of_any_integer_type_is_taken(value):
    assert checks.integer("n", value, low=-5, high=3) == int(value)
    assert type(checks.integer("n", value, low=-5, high=3)) is int


@pytest.mark.parametrize("value", [True, np.bool_(1), 0.9, 3.0, "3", None, [3], np.array([3]), 1j, b"3"])
def test_what_is_no_integer_is_refused_with_what_was_found(value):
    with pytest.raises(InputError, match="n must be an integer, found"):
        checks.integer("n", value, low=0, high=9)


@pytest.mark.parametrize("value", [-1, 10, 2**40 + 7, 2**64, pytest.param(10**5000, id="huge")])
def test_an_integer_out_of_range_is_refused_and_does_not_wrap(value):
    with pytest.raises(InputError, match=r"n must be within 0\.\.9, found"):
        checks.integer("n", value, low=0, high=9)


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5), np.int64(1)])
def test_a_number_is_taken(value):
    assert checks.real("x", value, low=0, high=1) == float(value)


@pytest.mark.parametrize(
    "value", [None, True, "0.5", float("nan"), float("inf"), -float("inf"), pytest.param(10**400, id="huge"), [0.5], 1j]
)
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(InputError, match="x must be a"):
        checks.real("x", value)


def test_the_ends_of_a_range_are_inside():
    assert checks.real("x", 0.0, low=0, high=1) == 0 and checks.real("x", 1, low=0, high=1) == 1
    for value in (-1e-9, 1 + 1e-9):
        with pytest.raises(InputError, match=r"x must be within 0\.\.1, found"):
            checks.real("x", value, low=0, high=1)


@pytest.mark.parametrize(
    "values", [[1, 2], (1, 2), range(1, 3), np.array([1, 2], np.uint8), tf.constant([1, 2]), [np.int8(1), 2]]
)
def test_integers_of_any_integer_type_are_taken_as_int64(values):
    array = checks.integers("seeds", values, **checks.INT64)
    assert array.dtype == np.int64 and array.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.9], "must be an integer, found 0.9"),
        ([1, 2.0], "must be an integer"),
        (np.array([1.0]), "must be integers, found float64"),
        ([True, 2], "must be an integer, found True"),
        (np.array([True]), "must be integers, found bool"),
        (["1"], "must be integers, found <U1"),
        ([None], "must be an integer, found None"),
        ([[1], [2, 3]], "must be an array of integers"),
        ([[1]], r"shape \[1, 1\]; expected \[N\], a list"),
        (7, r"shape \[\]; expected \[N\], a list"),
        ([2**63], "hold 9223372036854775808; expected"),
        ([2**63, -1], "hold 9223372036854775808; expected"),  # numpy makes floats of the two
        ([-(2**63) - 1], "hold -9223372036854775809; expected"),
        (np.array([2**64 - 1], np.uint64), "hold 18446744073709551615; expected"),
    ],
)
def test_integers_that_int64_does_not_hold_as_they_are_are_refused(values, message):
    with pytest.raises(InputError, match=f"seeds .*{message}"):
        checks.integers("seeds", values, **checks.INT64)


def test_one_value_does_not_serve_several():
    for values in ([3], 3):
        with pytest.raises(InputError, match=r"labels have the shape \[.*\]; expected \[2\]"):
            checks.integers("labels", values, low=0, high=9, shape=[2])


@pytest.mark.parametrize("values", [[np.nan], [1.0, np.inf], [2.0], ["1"], [None], [True], [[1], [2, 3]]])
def test_numbers_that_are_not_finite_or_out_of_range_are_refused(values):
    with pytest.raises(InputError, match="lambdas must"):
        checks.reals("lambdas", values, low=0, high=1)


def test_a_bool_is_one():
    assert checks.boolean("clip", np.bool_(True)) is True and checks.boolean("clip", False) is False
    for value in ("no", 1, None, []):
        with pytest.raises(InputError, match="clip must be True or False, found"):
            checks.boolean("clip", value)


def test_a_name_is_a_string_of_the_table():
    checks.known("sampler", "ddim", {"ddim": 1})
    for name in ("ddum", ["ddim"], None, 3):
        with pytest.raises(InputError, match=r"Unknown sampler .*; expected one of \['ddim'\]"):
            checks.known("sampler", name, {"ddim": 1})


def test_more_memory_than_there_is_is_refused_with_both_sizes():
    checks.memory("This", 10**6, "")
    for size in (2**60, 10**300):
        with pytest.raises(
            InputError, match="This would take at least .* of memory, and this machine has .* GiB. Less."
        ):
            checks.memory("This", size, "Less.")


def test_a_message_of_a_long_value_is_short():
    with pytest.raises(InputError) as e:
        checks.integer("n", "x" * 10**6, low=0, high=1)
    assert len(str(e.value)) < 200
