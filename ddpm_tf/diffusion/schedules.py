"""Noise schedules: the betas by name, the tables derived from them, and shorter chains (float64 numpy)."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from absl import logging

from ddpm_tf import checks
from ddpm_tf.choices import Choice, choose
from ddpm_tf.errors import InputError

# Above this much signal left at the last timestep, x_T ~ N(0, I) is no longer a fair start.
_MAX_FINAL_ALPHAS_CUMPROD = 1e-3
_MAX_BETA = 0.999


def _linear(T: int, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    return np.linspace(beta_start, beta_end, T)


def _linear_scaled(T: int, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    # The endpoints are meant for T = 1000; scaling keeps alphas_cumprod[-1] nearly independent of T.
    return np.linspace(beta_start * 1000 / T, beta_end * 1000 / T, T)


def _quad(T: int, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    return np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2


def _warmup(fraction: float, T: int, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    betas = np.full(T, beta_end, np.float64)
    warmup = int(T * fraction)
    betas[:warmup] = np.linspace(beta_start, beta_end, warmup)
    return betas


def _const(T: int, *, beta_end: float = 0.02) -> np.ndarray:
    return np.full(T, beta_end, np.float64)


def _jsd(T: int) -> np.ndarray:
    # 1/T, 1/(T-1), ..., 1: the last step removes all signal.
    return 1.0 / np.arange(T, 0, -1, dtype=np.float64)


def _from_alphas_cumprod(alphas_cumprod: np.ndarray) -> np.ndarray:
    """[T+1] values of abar at 0, 1/T, ..., 1 -> betas [T], capped."""
    return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], _MAX_BETA)


def _cosine(T: int, *, s: float = 0.008) -> np.ndarray:
    if s < 0:
        raise InputError(f"s of schedule cosine must be at least 0, found {s}.")
    u = np.arange(T + 1) / T
    return _from_alphas_cumprod(np.cos((u + s) / (1 + s) * np.pi / 2) ** 2)


def _sigmoid(T: int, *, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> np.ndarray:
    if not (start < end and tau > 0):
        raise InputError(f"Schedule sigmoid needs start < end and tau > 0, found {start}, {end} and {tau}.")
    u = np.arange(T + 1) / T
    sigmoid = 1 / (1 + np.exp(-(u * (end - start) + start) / tau))
    return _from_alphas_cumprod((sigmoid[-1] - sigmoid) / (sigmoid[-1] - sigmoid[0]))


def _linear_zero_snr(T: int, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    # Lin et al. 2023, Algorithm 1: sqrt(abar) is shifted so that it ends at 0, and scaled so that it begins where it did.
    if T < 2:
        raise InputError(f"Schedule linear_zero_snr needs num_timesteps of at least 2, found {T}.")
    root = np.sqrt(np.cumprod(1 - _linear(T, beta_start=beta_start, beta_end=beta_end)))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return 1 - np.append(root[0], root[1:] / root[:-1]) ** 2


_ENDPOINTS = ("beta_start", "beta_end")
BETA_SCHEDULES = {
    "linear": Choice(_linear, _ENDPOINTS),
    "linear_scaled": Choice(_linear_scaled, _ENDPOINTS),
    "linear_zero_snr": Choice(_linear_zero_snr, _ENDPOINTS),
    "quad": Choice(_quad, _ENDPOINTS),
    "warmup10": Choice(functools.partial(_warmup, 0.1), _ENDPOINTS),
    "warmup50": Choice(functools.partial(_warmup, 0.5), _ENDPOINTS),
    "const": Choice(_const, ("beta_end",)),
    "jsd": Choice(_jsd),
    "cosine": Choice(_cosine, ("s",)),
    "sigmoid": Choice(_sigmoid, ("start", "end", "tau")),
}


def make_betas(name: str, num_timesteps: int, **settings: float) -> np.ndarray:
    """The variances beta_t of the forward process (Eq. 2), by schedule name.

    Args:
        name: linear, quad, warmup10, warmup50, const, jsd (the original's six); linear_scaled (endpoints
            times 1000/T); linear_zero_snr (Lin et al. 2023: linear, rescaled so that no signal is left at the last timestep;
            for predictions v and x_0); cosine (improved DDPM Eq. 17) and sigmoid (Jabri et al. 2022), both capped at 0.999.
        num_timesteps: T, 1 to 1,000,000.
        settings: of the schedule that is named. beta_start=1e-4 and beta_end=0.02 are the endpoints (const has beta_end
            alone; jsd, cosine and sigmoid have none); s=0.008 is the offset of cosine, at least 0; start=-3, end=3 and
            tau=1 say which part of the logistic curve sigmoid follows, at which temperature.

    Returns:
        float64 [T].

    Raises:
        InputError: unknown name, T outside 1..1,000,000, settings that are no finite numbers or give a beta outside
            (0, 1], or a setting of another schedule that is not at its default.
    """
    make = choose("beta schedule", name, BETA_SCHEDULES, settings)
    num_timesteps = checks.integer("num_timesteps", num_timesteps, low=1, high=checks.MAX_TIMESTEPS)
    for setting in settings:
        checks.real(setting, settings[setting])
    with np.errstate(all="ignore"):  # what is not finite is reported below
        betas = make(num_timesteps)
    return _checked_betas(betas, (*BETA_SCHEDULES[name].settings, "num_timesteps"))


def _checked_betas(betas: np.ndarray, settings: tuple[str, ...] = ("betas",)) -> np.ndarray:
    try:
        betas = np.array(betas, np.float64)
    except (TypeError, ValueError) as e:
        raise InputError(f"betas must be numbers, [T], found {type(betas).__name__}: {e}.") from e
    if betas.ndim != 1 or not 1 <= betas.size <= checks.MAX_TIMESTEPS:
        raise InputError(
            f"betas must have the shape [T], T within 1..{checks.MAX_TIMESTEPS}, found {list(betas.shape)}."
        )
    bad = np.flatnonzero(~((betas > 0) & (betas <= 1)))
    if bad.size:
        raise InputError(
            f"Every beta must satisfy 0 < beta <= 1; found betas[{bad[0]}] = {betas[bad[0]]}. "
            f"Check {', '.join(settings)}."
        )
    return betas


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The tables of a diffusion chain, float64 [T] and write-locked. Index t = 0 is the paper's t = 1.

    Args:
        betas: [T], 0 < beta <= 1 (Eq. 2).
        timesteps: int [T], where each entry sits in the trained chain; None: 0 .. T-1.
        trained: the Schedule that the network was trained on; None: this one.

    Raises:
        InputError: betas of another shape or range.
    """

    betas: np.ndarray
    timesteps: np.ndarray = None  # type: ignore[assignment]  # None becomes a table in __post_init__
    trained: "Schedule" = None  # type: ignore[assignment]  # None becomes this schedule in __post_init__
    alphas: np.ndarray = dataclasses.field(init=False)
    alphas_cumprod: np.ndarray = dataclasses.field(init=False)
    alphas_cumprod_prev: np.ndarray = dataclasses.field(init=False)
    # q(x_t | x_0), Eq. 4
    sqrt_alphas_cumprod: np.ndarray = dataclasses.field(init=False)
    sqrt_one_minus_alphas_cumprod: np.ndarray = dataclasses.field(init=False)
    log_one_minus_alphas_cumprod: np.ndarray = dataclasses.field(init=False)
    sqrt_recip_alphas_cumprod: np.ndarray = dataclasses.field(init=False)
    sqrt_recipm1_alphas_cumprod: np.ndarray = dataclasses.field(init=False)
    # q(x_{t-1} | x_t, x_0), Eqs. 6 and 7
    posterior_variance: np.ndarray = dataclasses.field(init=False)
    posterior_mean_coef1: np.ndarray = dataclasses.field(init=False)
    posterior_mean_coef2: np.ndarray = dataclasses.field(init=False)
    posterior_log_variance_clipped: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        betas = _checked_betas(self.betas)
        alphas = 1.0 - betas
        alphas_cumprod = np.cumprod(alphas)
        alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
        with np.errstate(divide="ignore", over="ignore"):  # jsd ends at alphas_cumprod = 0, others near it
            tables = {
                "betas": betas,
                "alphas": alphas,
                "alphas_cumprod": alphas_cumprod,
                "alphas_cumprod_prev": alphas_cumprod_prev,
                "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
                "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - alphas_cumprod),
                "log_one_minus_alphas_cumprod": np.log(1.0 - alphas_cumprod),
                "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / alphas_cumprod),
                "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / alphas_cumprod - 1.0),
                "posterior_variance": betas * (1.0 - alphas_cumprod_prev) / (1.0 - alphas_cumprod),
                "posterior_mean_coef1": betas * np.sqrt(alphas_cumprod_prev) / (1.0 - alphas_cumprod),
                "posterior_mean_coef2": (1.0 - alphas_cumprod_prev) * np.sqrt(alphas) / (1.0 - alphas_cumprod),
            }
        tables["posterior_log_variance_clipped"] = np.log(_first_from_second(tables["posterior_variance"], betas))
        tables["timesteps"] = np.arange(betas.size) if self.timesteps is None else self._checked_timesteps(betas)
        for name, table in tables.items():
            table.setflags(write=False)
            object.__setattr__(self, name, table)
        object.__setattr__(self, "trained", self.trained or self)
        if self.trained is self and alphas_cumprod[-1] > _MAX_FINAL_ALPHAS_CUMPROD:
            logging.warning(
                "The chain ends at alphas_cumprod = %.3g (above %g): x_T is not N(0, I), so samples start from "
                "noise the network never saw. Use more timesteps or larger betas.",
                alphas_cumprod[-1],
                _MAX_FINAL_ALPHAS_CUMPROD,
            )

    def _checked_timesteps(self, betas: np.ndarray) -> np.ndarray:
        high = checks.MAX_TIMESTEPS - 1 if self.trained is None else self.trained.num_timesteps - 1
        timesteps = checks.integers("timesteps", self.timesteps, low=0, high=high, shape=betas.shape)
        if np.any(np.diff(timesteps) <= 0):
            raise InputError(f"timesteps must ascend without repeats, found {timesteps}.")
        return timesteps

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps of this chain."""
        return self.betas.size

    def respace(self, kept: np.ndarray) -> "Schedule":
        """The chain that visits only the timesteps `kept` (improved DDPM section 4).

        Args:
            kept: ascending, distinct indices into this chain.

        Returns:
            a Schedule whose alphas_cumprod are this one's at `kept`, and whose `timesteps` say which
            timesteps of the trained chain the network has to be asked for.

        Raises:
            InputError: indices that are empty, out of range, repeated or not ascending.
        """
        kept = checks.integers("The kept timesteps", kept, low=0, high=self.num_timesteps - 1)
        if not kept.size or np.any(np.diff(kept) <= 0):
            raise InputError(
                f"The kept timesteps must ascend without repeats within 0..{self.num_timesteps - 1}, found {kept}."
            )
        if kept.size == self.num_timesteps:
            return self
        alphas_cumprod = self.alphas_cumprod[kept]
        betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        return Schedule(betas, timesteps=self.timesteps[kept], trained=self.trained)


def _first_from_second(posterior_variance: np.ndarray, betas: np.ndarray) -> np.ndarray:
    """posterior_variance[0] is 0, whose logarithm is not finite: the second entry stands in for it.

    A one-step chain has no second entry; its log-variance is log(beta_0), never used in sampling.
    """
    first = posterior_variance[1] if betas.size > 1 else betas[0]
    return np.append(first, posterior_variance[1:])


def _uniform(T: int, S: int, alphas_cumprod: np.ndarray | None) -> np.ndarray:
    return np.arange(0, T, T // S) if T % S == 0 else np.arange(S) * T // S


def _quad_spacing(T: int, S: int, alphas_cumprod: np.ndarray | None) -> np.ndarray:
    # DDIM appendix D.2; the published form repeats small timesteps, and a repeated step does nothing.
    return np.unique((np.linspace(0, np.sqrt(T * 0.8), S) ** 2).astype(int))


def _linspace(T: int, S: int, alphas_cumprod: np.ndarray | None) -> np.ndarray:
    return np.round(np.linspace(0, T - 1, S)).astype(int)


def _trailing(T: int, S: int, alphas_cumprod: np.ndarray | None) -> np.ndarray:
    return (np.round(T - np.arange(S) * T / S).astype(int) - 1)[::-1]


def _guide(T: int, S: int, alphas_cumprod: np.ndarray | None) -> np.ndarray:
    # int(linspace(-1, T - 1, S + 1)) without the first entry, in exact integers.
    return np.arange(1, S + 1) * T // S - 1


def _logsnr(T: int, S: int, alphas_cumprod: np.ndarray | None) -> np.ndarray:
    return _even(S, alphas_cumprod, np.log)


def _karras(T: int, S: int, alphas_cumprod: np.ndarray | None) -> np.ndarray:
    # EDM Eq. 5 with rho = 7, from the largest sigma of the chain to its smallest.
    return _even(S, alphas_cumprod, lambda sigma: sigma ** (1 / 7))


def _even(S: int, alphas_cumprod: np.ndarray | None, place: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """S timesteps even in place(sigma), sigma = sqrt(1 / abar - 1), each rounded to a trained one; repeats are dropped.

    sigma is infinite where no signal is left, so such a last timestep is visited beside them.
    """
    if alphas_cumprod is None:
        raise InputError("This timestep spacing depends on the schedule: give alphas_cumprod, [T].")
    num_finite = np.count_nonzero(alphas_cumprod > 0)
    num_infinite = len(alphas_cumprod) - num_finite
    if num_infinite > 1:
        raise InputError(
            f"{num_infinite} timesteps have no signal (alphas_cumprod = 0); this spacing needs all but the last to have some. "
            "Use another spacing, smaller betas or fewer timesteps."
        )
    places = place(np.sqrt(1 / alphas_cumprod[:num_finite] - 1))
    wanted = np.linspace(places[-1], places[0], S - num_infinite)
    kept = np.round(np.interp(wanted, places, np.arange(num_finite))).astype(int)
    return np.unique(np.append(kept, np.arange(num_finite, len(alphas_cumprod))))


TIMESTEP_SPACINGS = {
    "uniform": _uniform,
    "quad": _quad_spacing,
    "linspace": _linspace,
    "trailing": _trailing,
    "guide": _guide,
    "logsnr": _logsnr,
    "karras": _karras,
}


def space_timesteps(
    num_timesteps: int, num_steps: int, spacing: str, *, alphas_cumprod: np.ndarray | None = None
) -> np.ndarray:
    """Which timesteps a sampler of `num_steps` steps visits.

    Args:
        num_timesteps: T of the trained chain.
        num_steps: S, 1 <= S <= T. S = 1 keeps T - 1 for every spacing.
        spacing: uniform (DDIM's range(0, T, T // S)), quad (DDIM's choice for CIFAR-10, up to 0.8 T; repeats
            are dropped, so fewer than S may be kept), linspace (both ends), trailing (ends at T - 1), guide (the integer
            parts of linspace(-1, T - 1, S + 1), as denoising-diffusion-pytorch has it; trailing where S divides T), logsnr
            (even in log(abar / (1 - abar)), DPM-Solver's) or karras (even in sigma^(1/7), sigma = sqrt(1/abar - 1); EDM
            Eq. 5). The last two take the nearest trained timesteps and drop repeats, so fewer than S may be kept.
        alphas_cumprod: float64 [T], of the trained chain; needed by logsnr and karras.

    Returns:
        int [S or fewer], ascending and distinct.

    Raises:
        InputError: unknown spacing, S outside 1..T, or alphas_cumprod that are missing.
    """
    checks.known("timestep spacing", spacing, TIMESTEP_SPACINGS)
    num_timesteps = checks.integer("num_timesteps", num_timesteps, low=1, high=checks.MAX_TIMESTEPS)
    num_steps = checks.integer("num_steps", num_steps, low=1, high=num_timesteps)
    if num_steps == 1:
        return np.array([num_timesteps - 1])
    return TIMESTEP_SPACINGS[spacing](num_timesteps, num_steps, alphas_cumprod)
