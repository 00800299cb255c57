"""The variance of p(x_{t-1} | x_t), as a log-variance table of the chain (section 3.2)."""

import numpy as np


def _fixed_large(schedule):
    # sigma^2 = beta, optimal for x_0 ~ N(0, I). Its first entry is the posterior's second, as in the original:
    # log(beta_0) would make the last step's likelihood needlessly poor.
    table = np.log(schedule.betas)
    return np.append(schedule.posterior_log_variance_clipped[0], table[1:])


def _fixed_small(schedule):
    # sigma^2 = the posterior variance, optimal for x_0 set to one point.
    return schedule.posterior_log_variance_clipped


# name -> function(schedule) -> log-variance table, float64 [T]
VARIANCES = {
    "fixed_large": _fixed_large,
    "fixed_small": _fixed_small,
}
