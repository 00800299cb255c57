import logging

import numpy as np
import pytest

from ddpm_tf.diffusion.schedules import (
    BETA_SCHEDULES,
    TIMESTEP_SPACINGS,
    Schedule,
    make_betas,
    space_timesteps,
)
from ddpm_tf.errors import InputError

ORIGINALS = ("linear", "quad", "warmup10", "warmup50", "const", "jsd")


@pytest.mark.parametrize("T", [10, 1000])
@pytest.mark.parametrize("name", ORIGINALS)
def test_betas_match_the_original(reference, name, T):
    np.testing.assert_allclose(make_betas(name, T), reference[f"betas_{name}_{T}"], rtol=1e-12)


def test_tables_match_the_original(reference):
    schedule = reference.diffusion().schedule
    for key in reference.arrays:
        if key.startswith("table_"):
            np.testing.assert_allclose(
                getattr(schedule, key.removeprefix("table_")), reference[key], rtol=1e-12, atol=1e-12
            )


def test_iterating_eq_2_gives_eq_4():
    betas = make_betas("linear", 1000)
    scale, variance = 1.0, 0.0
    for beta in betas:
        scale, variance = scale * np.sqrt(1 - beta), variance * (1 - beta) + beta
    schedule = Schedule(betas)
    np.testing.assert_allclose(schedule.sqrt_alphas_cumprod[-1], scale, rtol=1e-10)
    np.testing.assert_allclose(1 - schedule.alphas_cumprod[-1], variance, rtol=1e-12)


def test_cosine_is_improved_ddpm_eq_17():
    T, s = 1000, 0.008
    f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
    betas = make_betas("cosine", T)
    assert betas.max() == 0.999
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], (f / f[0])[1:-1], rtol=1e-9)


def test_sigmoid_ends_without_signal_and_is_capped():
    betas = make_betas("sigmoid", 1000)
    u = np.arange(1, 1000) / 1000
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    abar = (sigmoid(3) - sigmoid(6 * u - 3)) / (sigmoid(3) - sigmoid(-3))
    assert betas.max() == 0.999
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], abar, rtol=1e-9)


def test_linear_scaled_is_nearly_independent_of_T():
    ends = [np.log(np.prod(1 - make_betas("linear_scaled", T))) for T in (250, 1000, 4000)]
    np.testing.assert_allclose(ends, ends[1], rtol=0.05)
    np.testing.assert_array_equal(make_betas("linear_scaled", 1000), make_betas("linear", 1000))


@pytest.mark.parametrize("name", sorted(BETA_SCHEDULES))
def test_every_schedule_loses_signal_at_every_step(name):
    betas = make_betas(name, 1000)
    assert betas.shape == (1000,) and betas.dtype == np.float64
    assert (betas > 0).all() and (betas <= 1).all()


def test_tables_cannot_be_written():
    schedule = Schedule(make_betas("linear", 10, beta_end=0.9))
    with pytest.raises(ValueError, match="read-only"):
        schedule.betas[0] = 1


@pytest.mark.parametrize("betas", [[], [[0.1]], [0.0, 0.1], [0.1, 1.1], [0.1, np.nan]])
def test_bad_betas_are_refused(betas):
    with pytest.raises(InputError, match="beta"):
        Schedule(betas)


def test_unknown_schedule_lists_names():
    with pytest.raises(InputError, match=r"Unknown beta schedule 'linaer'.*'cosine'.*'linear'"):
        make_betas("linaer", 10)


def test_no_timesteps_are_refused():
    with pytest.raises(InputError, match=r"num_timesteps must be within 1\.\.1000000, found 0"):
        make_betas("cosine", 0)


@pytest.mark.parametrize("T", [10**9, 2**70, 1000.0, "1000", None, True])
def test_a_number_of_timesteps_that_is_none_is_refused_before_memory_is_asked_for(T):
    with pytest.raises(InputError, match="num_timesteps must be"):
        make_betas("linear", T)
    with pytest.raises(InputError, match="num_timesteps must be"):
        space_timesteps(T, 10, "uniform")


@pytest.mark.parametrize("S", [10.0, "10", None, True, np.float32(10)])
def test_a_number_of_steps_is_an_integer(S):
    with pytest.raises(InputError, match="num_steps must be an integer"):
        space_timesteps(1000, S, "uniform")


@pytest.mark.parametrize("value", [None, "0.1", float("nan"), float("inf"), [0.1], True])
def test_a_setting_of_a_schedule_is_a_finite_number(value):
    for name, setting in (("linear", "beta_start"), ("cosine", "s"), ("sigmoid", "tau")):
        with pytest.raises(InputError, match=f"{setting} must be a"):
            make_betas(name, 10, **{setting: value})


@pytest.mark.parametrize("timesteps", [[0, 1.5], [0, 1000], [-1, 3], [5, 5], [0], "ab", None])
def test_the_timesteps_of_a_chain_ascend_in_the_trained_one(timesteps):
    trained = Schedule(make_betas("linear", 1000))
    if timesteps is None:  # those of a chain of its own
        assert Schedule([0.1, 0.2]).timesteps.tolist() == [0, 1]
        return
    with pytest.raises(InputError, match="timesteps"):
        Schedule([0.1, 0.2], timesteps=timesteps, trained=trained)
    with pytest.raises(InputError, match="timesteps"):
        trained.respace([0.0, 1.0])


def test_a_chain_that_keeps_signal_warns(caplog):
    with caplog.at_level(logging.WARNING, "absl"):
        Schedule(make_betas("linear", 100))
        assert "is not N(0, I)" in caplog.text
        caplog.clear()
        Schedule(make_betas("linear", 1000)).respace([0, 10, 20])
        assert not caplog.text


def test_respacing_keeps_alphas_cumprod_and_remembers_the_trained_timesteps():
    schedule = Schedule(make_betas("linear", 1000))
    once = schedule.respace(np.arange(0, 1000, 10))
    twice = once.respace(np.arange(0, 100, 10))
    np.testing.assert_allclose(twice.alphas_cumprod, schedule.alphas_cumprod[::100], rtol=1e-12)
    np.testing.assert_array_equal(twice.timesteps, np.arange(0, 1000, 100))
    assert twice.trained is schedule
    assert schedule.respace(np.arange(1000)) is schedule


def test_a_one_step_chain_has_the_variance_of_its_only_beta():
    schedule = Schedule(make_betas("linear", 1000)).respace([999])
    np.testing.assert_array_equal(schedule.posterior_log_variance_clipped, np.log(schedule.betas))


@pytest.mark.parametrize("kept", [[], [3, 2], [1, 1], [-1, 2], [0, 1000]])
def test_bad_kept_timesteps_are_refused(kept):
    with pytest.raises(InputError, match="kept timesteps"):
        Schedule(make_betas("linear", 1000)).respace(kept)


@pytest.mark.parametrize("T", [1, 2, 7, 40, 1000])
@pytest.mark.parametrize("spacing", sorted(TIMESTEP_SPACINGS))
def test_spacings_ascend_within_the_chain(spacing, T):
    for S in range(1, T + 1) if T <= 40 else (1, 2, 3, 7, 10, 50, 333, 999, 1000):
        kept = space_timesteps(T, S, spacing, alphas_cumprod=Schedule(make_betas("linear", T)).alphas_cumprod)
        assert kept[0] >= 0 and kept[-1] < T and (np.diff(kept) > 0).all()
        assert len(kept) == S or spacing in ("quad", "logsnr", "karras")
        if S == 1:
            assert kept == [T - 1]


def test_spacings_are_the_published_ones():
    np.testing.assert_array_equal(space_timesteps(1000, 50, "uniform"), range(0, 1000, 20))
    np.testing.assert_array_equal(space_timesteps(10, 4, "uniform"), [0, 2, 5, 7])
    quad = (np.linspace(0, np.sqrt(800), 10) ** 2).astype(int)
    np.testing.assert_array_equal(space_timesteps(1000, 10, "quad"), quad)
    np.testing.assert_array_equal(space_timesteps(1000, 3, "linspace"), [0, 500, 999])
    np.testing.assert_array_equal(space_timesteps(1000, 4, "trailing"), [249, 499, 749, 999])


@pytest.mark.parametrize("S", [0, -1, 1001])
def test_steps_outside_the_chain_are_refused(S):
    with pytest.raises(InputError, match=r"within 1\.\.1000"):
        space_timesteps(1000, S, "uniform")


def test_unknown_spacing_lists_names():
    with pytest.raises(InputError, match="Unknown timestep spacing 'log'.*'quad'"):
        space_timesteps(1000, 10, "log")


@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "linear_zero_snr"])
def test_spacings_of_a_schedule_are_even_in_their_own_unit(spacing, schedule):
    """To the nearest trained timestep; a chain that ends without signal visits its end beside them."""
    abar = Schedule(make_betas(schedule, 1000)).alphas_cumprod
    kept = space_timesteps(1000, 10, spacing, alphas_cumprod=abar)
    assert kept[0] == 0 and kept[-1] == 999
    finite = np.flatnonzero(abar > 0)
    sigma = np.sqrt(1 / abar[finite] - 1)
    place = np.log(sigma) if spacing == "logsnr" else sigma ** (1 / 7)
    wanted = np.linspace(place[0], place[-1], 10 - (len(abar) - len(finite)))
    nearest = np.abs(place[:, None] - wanted).argmin(0)
    used = kept[kept < len(finite)]
    assert len(used) >= len(wanted) // 2  # where the chain is coarse, several of the wanted fall together
    for t in used:
        assert np.abs(nearest - t).min() <= 1
    with pytest.raises(InputError, match="depends on the schedule: give alphas_cumprod"):
        space_timesteps(1000, 10, spacing)
    with pytest.raises(InputError, match="3 timesteps have no signal"):
        space_timesteps(1000, 10, spacing, alphas_cumprod=np.append(abar[:-3] + 1e-9, np.zeros(3)))


def test_zero_snr_rescales_linear_and_ends_without_signal():
    linear, zero = (Schedule(make_betas(name, 1000)).alphas_cumprod for name in ("linear", "linear_zero_snr"))
    root = np.sqrt(linear)
    np.testing.assert_allclose(np.sqrt(zero), (root - root[-1]) * root[0] / (root[0] - root[-1]), atol=1e-12)
    assert zero[-1] == 0 and zero[0] == pytest.approx(linear[0])
    with pytest.raises(InputError, match="needs num_timesteps of at least 2, found 1"):
        make_betas("linear_zero_snr", 1)
