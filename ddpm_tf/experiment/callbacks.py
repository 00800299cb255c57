"""The callbacks of a run's `fit`: what it does after every step."""

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from ddpm_tf import builders
from ddpm_tf.callbacks.base import StepCallback
from ddpm_tf.callbacks.grids import SampleGrids
from ddpm_tf.callbacks.metrics import Metrics, Summaries
from ddpm_tf.callbacks.progress import Progress
from ddpm_tf.callbacks.saving import Checkpoints
from ddpm_tf.callbacks.skipped_steps import SkippedSteps
from ddpm_tf.callbacks.stop_on_signal import StopOnSignal
from ddpm_tf.data.pipeline import batch_indices
from ddpm_tf.experiment.grids import Grids
from ddpm_tf.experiment.run import Run
from ddpm_tf.training.model import DiffusionModel


class RunCallbacks(NamedTuple):
    """all: in the order in which they act after a step; the others are those of them that the run itself needs.

    checkpoints: None on workers that are not the chief. grids: None for a classifier, which draws no pictures.
    """

    all: list[StepCallback]
    checkpoints: Checkpoints | None
    stop: StopOnSignal
    grids: SampleGrids | None


def make_callbacks(run: Run, model: DiffusionModel, start_step: int) -> RunCallbacks:
    """The callbacks of a `fit` that begins after `start_step` steps. The chief alone writes."""
    config, cluster, is_chief = run.config, run.cluster, run.cluster.is_chief
    t, batch_size = config.train, config.data.batch_size
    summaries, checkpoints = None, None
    writing: list[StepCallback] = []
    if is_chief:
        summaries = Summaries(os.path.join(run.workdir, "tensorboard"))
        checkpoints = Checkpoints(
            start_step,
            folder=run.checkpoints_folder,
            every=t.checkpoint_every,
            minutes=t.checkpoint_minutes,
            num_steps=t.num_steps,
            keep=t.keep_checkpoints,
            keep_every=t.keep_every,
            meta={"config": config.to_dict(), "fingerprint": run.fingerprint},
        )
        writing = [
            Progress(start_step, num_steps=t.num_steps, batch_size=batch_size, log_every=t.log_every),
            Metrics(start_step, workdir=run.workdir, batch_size=batch_size, log_every=t.log_every, summaries=summaries),
        ]
    stop = StopOnSignal(start_step, checkpoints=checkpoints, grace_period_s=run.options.grace_period_s, cluster=cluster)
    skipped = SkippedSteps(
        start_step, folder=os.path.join(run.workdir, "nan_dump") if is_chief else None, replay=make_replay(run, model)
    )
    grids = None if builders.is_classifier(config) else _make_grids(run, model, start_step, summaries, stop)
    all_of_them = [*writing, skipped, checkpoints, stop, grids]
    return RunCallbacks([c for c in all_of_them if c is not None], checkpoints, stop, grids)


def _make_grids(
    run: Run, model: DiffusionModel, start_step: int, summaries: Summaries | None, stop: StopOnSignal
) -> SampleGrids:
    pictures, cluster = Grids(run, model, summaries), run.cluster
    return SampleGrids(
        start_step,
        every=run.config.train.sample_every,
        num_steps=run.config.train.num_steps,
        draw=pictures.draw,
        show=pictures.show,
        is_drawn=lambda step: bool(cluster.from_chief(pictures.is_drawn(step))),
        stop=stop,
        cluster=cluster,
    )


def make_replay(run: Run, model: DiffusionModel) -> Callable[[int], dict[str, np.ndarray]]:
    """replay(step) -> {name: array}: what a step is computed from, beside the weights. All of it is a function of the step."""
    config, batch_size = run.config, run.config.data.batch_size

    def replay(step: int) -> dict[str, np.ndarray]:
        at = tf.constant(step, tf.int64)
        indices = batch_indices(at, num_examples=run.source.num_examples, batch_size=batch_size, seed=config.seed)
        batch = next(iter(builders.build_dataset(config, run.source, start_step=step)))
        draws = model.objective.draws(tf.range(batch_size), at)
        arrays = {**batch, "indices": indices, **draws._asdict()}
        return {name: array.numpy() for name, array in arrays.items() if array is not None}

    return replay
