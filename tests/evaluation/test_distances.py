import numpy as np
import pytest

from ddpm_tf.data.sources import load_digits
from ddpm_tf.errors import InputError
from ddpm_tf.evaluation.distances import frechet_distance, moments
from ddpm_tf.evaluation.features import DigitJudge


def drawn(n=50, width=4, seed=0):
    r = np.random.Generator(np.random.PCG64(seed))
    return r.standard_normal((n, width)) @ r.standard_normal((width, width)) + r.standard_normal(width)


def test_moments_are_the_definitions():
    x = drawn(7, 3)
    centred = x - x.mean(0)
    np.testing.assert_allclose(moments(x).mean, sum(x) / 7)
    np.testing.assert_allclose(moments(x).covariance, centred.T @ centred / 6)
    assert moments(x[:, :1]).covariance.shape == (1, 1)


def test_diagonal_covariances_have_a_closed_form():
    """The covariances commute, so that the trace is the sum of the squared differences of the standard deviations."""
    r = np.random.Generator(np.random.PCG64(1))
    mean_1, mean_2, std_1, std_2 = r.uniform(0.5, 2.0, (4, 5))
    expected = ((mean_1 - mean_2) ** 2).sum() + ((std_1 - std_2) ** 2).sum()
    distance = frechet_distance(mean_1, np.diag(std_1**2), mean_2, np.diag(std_2**2))
    np.testing.assert_allclose(distance, expected, rtol=1e-12)


def test_the_distance_is_symmetric_and_does_not_see_a_rotation():
    a, b = drawn(seed=2), drawn(seed=3)
    distance = frechet_distance(*moments(a), *moments(b))
    rotation, _ = np.linalg.qr(drawn(4, 4, seed=4))
    assert distance > 0.1
    np.testing.assert_allclose(frechet_distance(*moments(b), *moments(a)), distance, rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(*moments(a @ rotation), *moments(b @ rotation)), distance, rtol=1e-9)


def test_equal_sets_have_distance_0():
    assert abs(frechet_distance(*moments(drawn()), *moments(drawn()[::-1]))) < 1e-10


@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_a_unit_that_is_always_0_does_not_count():
    """A ReLU that never fires, which makes both covariances singular."""
    a, b = (np.pad(drawn(seed=seed), ((0, 0), (0, 1))) for seed in (2, 3))
    expected = frechet_distance(*moments(a[:, :-1]), *moments(b[:, :-1]))
    np.testing.assert_allclose(frechet_distance(*moments(a), *moments(b)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mean_2", np.zeros(2), r"mean_2 has shape \[2\], expected \[3\]"),
        ("mean_1", np.zeros((3, 1)), r"mean_1 has shape \[3, 1\], expected \[3\]"),
        ("covariance_1", np.zeros((3, 2)), r"covariance_1 has shape \[3, 2\], expected \[3, 3\]"),
        ("covariance_2", np.zeros(3), r"covariance_2 has shape \[3\], expected \[3, 3\]"),
        ("mean_1", np.full(3, np.nan), "mean_1 has values that are not finite"),
        ("covariance_2", np.full((3, 3), np.inf), "covariance_2 has values that are not finite"),
    ],
)
def test_moments_that_do_not_fit_are_refused(name, value, message):
    fitting = {"mean_1": np.zeros(3), "covariance_1": np.eye(3), "mean_2": np.zeros(3), "covariance_2": np.eye(3)}
    with pytest.raises(InputError, match=message):
        frechet_distance(**{**fitting, name: value})


@pytest.mark.parametrize("shape", [(1, 4), (4,), (2, 3, 4)])
def test_features_without_a_covariance_are_refused(shape):
    with pytest.raises(InputError, match=r"expected \[N, D\] with N of at least 2"):
        moments(np.zeros(shape))


def test_the_judge_tells_real_digits_from_noise():
    real, labels = (tensor.numpy() for tensor in load_digits().tensors.values())
    judge = DigitJudge(real[:700], labels[:700])
    assert (judge.probabilities(real[700:]).argmax(1) == labels[700:]).mean() > 0.85
    noise = np.random.Generator(np.random.PCG64(0)).integers(0, 256, real[700:].shape, np.uint8)
    expected = moments(judge.features(real[:700]))
    near, far = (frechet_distance(*moments(judge.features(x)), *expected) for x in (real[700:], noise))
    assert judge.features(noise).shape == (len(noise), 48) and near < far / 5
