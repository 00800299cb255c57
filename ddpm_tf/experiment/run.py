"""A run: what one start of training carries, from its config to its data."""

import dataclasses
import shlex
from typing import NamedTuple

import tensorflow as tf
from ml_collections import ConfigDict

from ddpm_tf import builders
from ddpm_tf.cluster.cluster import Cluster
from ddpm_tf.cluster.meeting import JOIN_TIMEOUT_S
from ddpm_tf.data.contract import Source
from ddpm_tf.data.manifest import Manifest
from ddpm_tf.errors import InputError, unknown_name
from ddpm_tf.storage import workdir as workdir_lib

NAN_POLICIES = ("skip", "stop")


class StartOptions(NamedTuple):
    """What holds for one start of a run, and is not part of its config.

    download: let TFDS fetch a data set that is not prepared.
    grace_period_s: after SIGTERM or SIGINT, seconds in which the step is finished and its state saved.
    nan_policy: skip (up to train.max_skipped_steps in a row), or stop at the first step that is not finite.
    init_from: a workdir whose weights and moving average a new run begins with, at step 0; "": none.
    restart_from_scratch: move what the workdir holds to old-TIME/ in it, and begin at step 0.
    ema_from_weights: where a checkpoint has no moving average, begin it with the weights.
    allow_data_change: resume although the data set is not the one the run began with.
    require_exact: refuse to resume where the result would not be bit-exact.
    strategy: auto, default, mirrored or multi_worker, see `make_strategy`.
    join_timeout_s: how long the workers of a run wait for each other at its start.
    """

    download: bool = False
    grace_period_s: float = 30.0
    nan_policy: str = "skip"
    init_from: str = ""
    restart_from_scratch: bool = False
    ema_from_weights: bool = False
    allow_data_change: bool = False
    require_exact: bool = False
    strategy: str = "auto"
    join_timeout_s: float = JOIN_TIMEOUT_S

    def check(self) -> None:
        """Raise InputError for values that cannot be used."""
        if self.nan_policy not in NAN_POLICIES:
            raise unknown_name("--nan_policy", self.nan_policy, NAN_POLICIES)
        for flag in ("grace_period_s", "join_timeout_s"):
            if not 0 < getattr(self, flag) <= 1e6:
                raise InputError(f"--{flag} must be above 0 and at most 1e6 seconds, found {getattr(self, flag)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One start of a training run.

    data: the manifest of the source's data set. fingerprint: what the bits depend on, see `storage.fingerprint`.
    """

    config: ConfigDict
    workdir: str
    options: StartOptions
    strategy: tf.distribute.Strategy
    cluster: Cluster
    source: Source
    data: Manifest
    fingerprint: dict

    @property
    def checkpoints_folder(self) -> str:
        return workdir_lib.checkpoints_folder(self.workdir)


def read_run_config(workdir: str, *, flag: str = "--workdir") -> ConfigDict:
    """The config of a workdir, in which settings that play no part are at their defaults; `flag` named the workdir.

    Raises:
        InputError: as `storage.workdir.read_config`.
    """
    config = workdir_lib.read_config(workdir, flag=flag)
    return builders.without_foreign_settings(config, workdir_lib.config_path(workdir))


def read_drawing_config(workdir: str) -> ConfigDict:
    """As `read_run_config`, of a workdir whose network draws images.

    Raises:
        InputError: also of a classifier's workdir.
    """
    config = read_run_config(workdir)
    if builders.is_classifier(config):
        raise InputError(
            f"--workdir={workdir} holds a classifier, and a network that draws images is expected. A classifier guides the "
            f"images of another workdir, trained on the same chain: {classifier_command(workdir)}"
        )
    return config


def classifier_command(workdir: str) -> str:
    """The command that draws images which the classifier of this workdir guides."""
    return f"python run_sample.py --workdir=... --classifier={shlex.quote(workdir)} --classifier_scale=1"
