"""What a run does after every step: the callbacks of its `fit`."""

import os

import tensorflow as tf

from ddpm_tf import builders
from ddpm_tf.callbacks.grids import SampleGrids
from ddpm_tf.callbacks.metrics import Metrics, Summaries
from ddpm_tf.callbacks.progress import Progress
from ddpm_tf.callbacks.saving import Checkpoints
from ddpm_tf.callbacks.skipped_steps import SkippedSteps
from ddpm_tf.callbacks.stop_on_signal import StopOnSignal
from ddpm_tf.data.pipeline import batch_indices
from ddpm_tf.experiment.grids import grid_path, make_grids


def make_callbacks(config, model, source, workdir, start_step, start, fingerprint, strategy, cluster):
    """{name: callback}, in the order in which they act after a step; the chief alone writes."""
    t, replay = config.train, _make_replay(config, model, source)
    summaries = _make_summaries(workdir, cluster)
    writing = {}
    if cluster.is_chief:
        writing = _make_writing(config, workdir, start_step, fingerprint, summaries)
    stop = StopOnSignal(
        start_step, checkpoints=writing.get("checkpoints"), grace_period_s=start.grace_period_s, cluster=cluster
    )
    folder = os.path.join(workdir, "nan_dump") if cluster.is_chief else None
    skipped = SkippedSteps(start_step, folder=folder, replay=replay)
    draw, show = make_grids(config, model, source, workdir, summaries, strategy, cluster)
    grids = SampleGrids(
        start_step, every=t.sample_every, num_steps=t.num_steps, draw=draw, show=show,
        is_drawn=lambda step: cluster.from_chief(os.path.exists(grid_path(workdir, step))),
        stop=stop, cluster=cluster,
    )  # fmt: skip
    saving = {"checkpoints": writing.pop("checkpoints")} if writing else {}
    return {**writing, "skipped": skipped, **saving, "stop": stop, "grids": grids}


def _make_summaries(workdir, cluster):
    """TensorBoard's events, which the chief writes; None for the others."""
    return Summaries(os.path.join(workdir, "tensorboard")) if cluster.is_chief else None


def _make_writing(config, workdir, start_step, fingerprint, summaries):
    """The chief's own callbacks."""
    t, batch_size = config.train, config.data.batch_size
    saving = Checkpoints(
        start_step, folder=os.path.join(workdir, "ckpt"), every=t.checkpoint_every, minutes=t.checkpoint_minutes,
        num_steps=t.num_steps, keep=t.keep_checkpoints, keep_every=t.keep_every,
        meta={"config": config.to_dict(), "fingerprint": fingerprint},
    )  # fmt: skip
    return {
        "progress": Progress(start_step, num_steps=t.num_steps, batch_size=batch_size, log_every=t.log_every),
        "metrics": Metrics(
            start_step, workdir=workdir, batch_size=batch_size, log_every=t.log_every, summaries=summaries
        ),
        "checkpoints": saving,
    }


def _make_replay(config, model, source):
    """replay(step): what a step is computed from, beside the weights; everything is a function of the step."""

    def replay(step):
        batch_size, at = config.data.batch_size, tf.constant(step, tf.int64)
        indices = batch_indices(at, num_examples=source.num_examples, batch_size=batch_size, seed=config.seed)
        batch = next(iter(builders.build_dataset(config, source, start_step=step)))
        t, eps, dropout_seed = model.draws(tf.range(batch_size), at)
        arrays = {**batch, "indices": indices, "t": t, "eps": eps, "dropout_seed": dropout_seed}
        return {name: array.numpy() for name, array in arrays.items()}

    return replay
