"""The trainer: replicas, micro-batches, loss scale, clipping, skipped steps and the moving average. It knows no diffusion."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from ddpm_tf import checks
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.errors import InputError
from ddpm_tf.networks.contract import Network
from ddpm_tf.training import diagnostics
from ddpm_tf.training.classifier_objective import objective_of
from ddpm_tf.training.ema import make_ema_network, update_ema
from ddpm_tf.training.held_out import HeldOut
from ddpm_tf.training.loss_scale import LossScale
from ddpm_tf.training.objective import checked_labels
from ddpm_tf.training.optimizers import slots_by_name
from ddpm_tf.training.skipped import SkippedCounts, counter
from ddpm_tf.training.step_flags import StepFlags

GRAD_CLIP_MODES = ("global", "per_replica")
# Of every network; those of its objective follow.
LOGS = (
    "loss", "grad_norm", "grad_norm_clipped", "learning_rate", "weight_norm", "ema_age", "loss_scale", "skipped",
)  # fmt: skip


class DiffusionModel(keras.Model):
    """Trains a network by `compile` and `fit`, and keeps the moving average of its weights.

    Every draw of a step is a function of (seed, step, position in the global batch). So the numbers do not depend on how
    many replicas share the batch, and a run that is resumed from a checkpoint is the same run.

    Args:
        network: a network as `UNet` or `Classifier`.
        diffusion: GaussianDiffusion.
        seed: int64, of the timesteps, the noise and the dropout masks.
        loss: simple, vlb or hybrid, see `losses`; cross_entropy, and no other, for a classifier.
        loss_weight: weight of the timesteps in the simple loss: none, snr, min_snr or p2.
        loss_settings: {setting: value} of the loss weight, for example {"gamma": 5.0} of min_snr.
        label_dropout: the probability, in [0, 1), that a class-conditional network is given the null class instead of an
            image's label. Without it, the null class is never trained, and guidance makes no sense.
        ema_decay: decay of the moving average, per step, in [0, 1).
        grad_clip: largest global norm of the gradient; 0: no clipping.
        grad_clip_mode: global (the norm of the whole batch's gradient; the result does not depend on the number of
            replicas) or per_replica (the original's: each of N replicas clips the gradient of its loss / N at
            grad_clip / N, and the clipped gradients are summed).
        max_skipped_steps: after this many steps in a row with a loss or gradient that is not finite, no step changes
            anything any more. At least 1. Overflows that a smaller loss scale can cure do not count (float16).
        micro_batches: parts of a batch that are computed one after the other; the gradient is the mean of theirs. More
            parts need less memory.

    The log `grad_norm` is the norm before clipping: of the global batch's gradient or, under per_replica, the mean over the
    replicas of the norm of each one's own.

    Attributes:
        objective: Objective, or a classifier's, which computes a batch's loss.
        skipped: SkippedCounts.
        not_finite_at: int64 [replicas], the last step at which a replica's own loss or gradient was not finite; -1: none.
            It is kept where there are several replicas.
        stop_wish: int64, which each process may set to 1 to stop; stop_votes: its sum over the replicas at the last step.

    `fit` takes batches {"image": float32 [B, H, W, C] in [-1, 1], "label": int32 [B] (optional)}, B divisible by the
    number of replicas; make, compile and fit the model inside `strategy.scope()`.

    Raises:
        InputError: unknown names, a decay or clip out of range; from `fit`: batches of another dtype or size.
            A value outside [-1, 1] stops `fit` with tf.errors.InvalidArgumentError.
    """

    def __init__(
        self,
        network: Network,
        diffusion: GaussianDiffusion,
        *,
        seed: int = 0,
        loss: str = "simple",
        loss_weight: str = "none",
        loss_settings: Mapping[str, Any] | None = None,
        label_dropout: float = 0.0,
        ema_decay: float = 0.9999,
        grad_clip: float = 1.0,
        grad_clip_mode: str = "global",
        max_skipped_steps: int = 20,
        micro_batches: int = 1,
    ) -> None:
        super().__init__(name="diffusion_model")
        self.objective = objective_of(network)(
            network,
            diffusion,
            seed=seed,
            loss=loss,
            loss_weight=loss_weight,
            loss_settings=loss_settings,
            label_dropout=label_dropout,
        )
        checks.known("grad_clip_mode", grad_clip_mode, GRAD_CLIP_MODES)
        if not 0 <= checks.real("ema_decay", ema_decay) < 1:
            raise InputError(f"ema_decay must be within [0, 1), found {ema_decay}.")
        grad_clip = checks.real("grad_clip", grad_clip, low=0, high=1e37)
        max_skipped_steps = checks.integer("max_skipped_steps", max_skipped_steps, low=1, high=2**63 - 1)
        micro_batches = checks.integer("micro_batches", micro_batches, low=1, high=2**31 - 1)
        self.network, self.ema_network, self.diffusion = network, make_ema_network(network), diffusion
        self.ema_decay, self.grad_clip, self.grad_clip_mode = ema_decay, grad_clip, grad_clip_mode
        self.max_skipped_steps, self.micro_batches = max_skipped_steps, micro_batches
        self.loss_scale, self.skipped = LossScale(network.compute_dtype == "float16"), SkippedCounts()
        self.stop_wish, self.stop_votes = counter(0), counter(0)
        self.not_finite_at = counter([-1] * tf.distribute.get_strategy().num_replicas_in_sync)
        self.held_out = HeldOut()
        self.built = True

    def compile(
        self,
        optimizer: keras.optimizers.Optimizer | str | dict,
        *,
        jit_compile: bool | str = False,
        steps_per_execution: int = 1,
        run_eagerly: bool = False,
        **others: Any,
    ) -> None:
        """Set the optimizer and make its slots.

        Args:
            optimizer: a Keras optimizer, or what `keras.optimizers.get` makes one of: "adam" is Keras' Adam. `make_optimizer`
                makes the paper's, with warm-up. It belongs to this model from here on: its variables are made for this
                network, and its private method `_all_reduce_sum_gradients` is replaced, since the model sums gradients over
                replicas itself.
            jit_compile: compile the loss and its gradient by XLA; auto: if there is a GPU.
            steps_per_execution: steps per call of the compiled function.
            run_eagerly: run the step op by op, to look into it with a debugger; slow.
            others: Keras' other arguments, loss and metrics, must be None: the model has its own loss.

        Raises:
            InputError
        """
        if given := sorted(name for name, value in others.items() if value is not None and value != "auto"):
            raise InputError(
                f"compile takes no {', '.join(given)}: the loss is chosen by DiffusionModel(loss=..., loss_weight=...), and "
                f"fit logs {', '.join(LOGS[:3])} and others."
            )
        if jit_compile == "auto":
            jit_compile = not run_eagerly and bool(tf.config.list_physical_devices("GPU"))
        jit_compile = checks.boolean("jit_compile", jit_compile)
        run_eagerly = checks.boolean("run_eagerly", run_eagerly)
        steps_per_execution = checks.integer("steps_per_execution", steps_per_execution, low=1, high=2**31 - 1)
        if jit_compile and run_eagerly:
            raise InputError("jit_compile and run_eagerly exclude each other; choose one.")
        optimizer = _checked_optimizer(optimizer)
        super().compile(
            optimizer=optimizer, steps_per_execution=steps_per_execution, run_eagerly=run_eagerly, jit_compile=False
        )
        optimizer.build(self.network.trainable_variables)
        optimizer._all_reduce_sum_gradients = lambda gradients_and_variables: gradients_and_variables
        self._compiled = self.loss_and_gradient
        if not run_eagerly:
            self._compiled = tf.function(self.loss_and_gradient, jit_compile=jit_compile, autograph=False)

    def call(self, inputs: dict[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """The network's output on {"x_t": [B, H, W, C], "t": int32 [B], ("labels": int32 [B])}, as `predict` gives it."""
        return self.network(inputs, training=training)

    def __call__(self, inputs: dict[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        return self.network(inputs, training=training)  # not by way of Keras, which adds lines of its own to errors

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        sample_weight: Any = None,
        steps: int | None = None,
        callbacks: Any = None,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The mean training loss of held-out images, with the weights as they are trained, not with their average.

        The draws are a function of (seed, number of the batch, position in it), so that two evaluations of the same weights
        give the same number, and those of other weights differ by the weights alone. Nothing is changed. There is no dropout.
        `fit(validation_data=...)` logs it as val_loss. To evaluate the average: DiffusionModel(model.ema_network, ...).

        Args:
            x: batches as those of `fit`, or {"image": array, ...}. There are no targets y and no sample weights.
            batch_size, verbose, callbacks, kwargs: as of `keras.Model.evaluate`.
            steps: the number of batches; an endless dataset needs it.

        Returns:
            the loss, or with return_dict=True {"loss": it}.
        """
        _refuse_given("evaluate", y=y, sample_weight=sample_weight)
        _refuse_endless(x, steps, "evaluate", "steps")
        super().evaluate(x, batch_size=batch_size, verbose=verbose, steps=steps, callbacks=callbacks, **kwargs)
        # Not Keras' own logs: it has none if the batches are no multiple of steps_per_execution.
        loss = float(self.held_out.mean())
        return {"loss": loss} if return_dict else loss

    def fit(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.fit`, without targets y and without weights of examples or classes.

        An endless dataset, as of `make_dataset`, needs `steps_per_epoch` or, to validate with, `validation_steps`.
        """
        weights = {name: kwargs.get(name) for name in ("sample_weight", "class_weight")}
        _refuse_given("fit", y=y, **weights)
        _refuse_endless(x, kwargs.get("steps_per_epoch"), "fit", "steps_per_epoch")
        _refuse_endless(kwargs.get("validation_data"), kwargs.get("validation_steps"), "fit", "validation_steps")
        return super().fit(x, y, *args, **kwargs)

    # What would go wrong in Keras' own way

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError(
            "train_on_batch would compile the step anew at every call. Use fit(dataset, steps_per_epoch=1)."
        )

    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError("test_on_batch would compile the step anew at every call. Use evaluate(dataset, steps=1).")

    def save(self, *args: Any, **kwargs: Any) -> None:
        raise InputError(
            "A DiffusionModel cannot be saved as a whole, since it holds a diffusion and an objective. Save its network, "
            "model.network.save(PATH) or model.ema_network.save(PATH); or all weights and moments, model.save_weights(PATH)."
        )

    def export(self, *args: Any, **kwargs: Any) -> None:
        raise InputError(
            "A DiffusionModel cannot be exported; use run_export.py, or ddpm_tf.serving.export.save_model."
        )

    def get_config(self) -> dict[str, Any]:
        raise InputError(
            "A DiffusionModel has no config, since it holds a diffusion and an objective; model.network.get_config() is the "
            "network's. So it can be neither cloned nor serialised; make another DiffusionModel."
        )

    def state(self) -> dict[str, tf.Variable]:
        """{name: variable} of all that a run needs to be resumed.

        Names: network/PATH, ema/PATH, optimizer/SLOT/PATH (momentum and velocity are Adam's m and v), step, skipped/NAME,
        loss_scale/NAME.
        """
        networks = {"network": self.network, "ema": self.ema_network}
        weights = {f"{prefix}/{v.path}": v for prefix, network in networks.items() for v in network.variables}
        slots = slots_by_name(self.optimizer, self.network)
        step = {"step": self.optimizer.iterations}
        return weights | slots | self.skipped.state() | self.loss_scale.state() | step

    def train_step(self, batch: Any) -> dict[str, tf.Tensor]:
        """One step on a global batch; called outside the replicas.

        A step whose loss or gradient is not finite changes no weight, moment or average, and is counted. The step number
        advances all the same, since data, draws and learning rate depend on it. The decision rests on all-reduced values,
        so it is the same on every replica.
        """
        strategy, step = self.distribute_strategy, tf.identity(self.optimizer.iterations.value)
        logs = {
            "learning_rate": tf.identity(self.optimizer.learning_rate),
            "weight_norm": diagnostics.weight_rms(self.network.trainable_variables),
            "ema_age": diagnostics.ema_age(tf.cast(step, tf.int64) - self.skipped.total, self.ema_decay),
            "loss_scale": self.loss_scale.factor(),
        }
        reduced, gradients = strategy.run(self._gradient_step, (batch,))
        loss, norm, clipped, sums, flags = (strategy.experimental_local_results(v)[0] for v in reduced)
        logs |= {"loss": loss, "grad_norm": norm, "grad_norm_clipped": clipped, **self.objective.logs(sums)}
        flags = StepFlags.unpack(flags)
        self.stop_votes.assign(tf.cast(flags.stop, tf.int64))
        self.not_finite_at.assign(tf.where(flags.not_finite > 0, tf.cast(step, tf.int64), self.not_finite_at))
        is_finite = tf.math.is_finite(loss) & tf.math.is_finite(norm)
        # Once the limit is reached nothing changes any more, however many steps one call makes.
        is_over = self.skipped.in_a_row >= self.max_skipped_steps

        def update() -> tf.Tensor:
            strategy.run(self._update, (gradients,))
            return tf.constant(0)

        def skip() -> tf.Tensor:
            self.optimizer.iterations.assign_add(1)
            return tf.constant(0)

        tf.cond(is_finite & ~is_over, update, skip)
        is_curable = ~self.loss_scale.is_lowest() & tf.math.is_finite(loss)  # by a smaller loss scale
        tf.cond(
            is_over,
            lambda: tf.identity(self.skipped.total),
            lambda: self.skipped.update(~is_finite, is_curable, step),
        )
        logs["skipped"] = tf.cast(self.skipped.total, tf.float32)
        self.loss_scale.update(is_finite)
        return {name: logs[name] for name in self._log_names()}

    def _log_names(self) -> tuple[str, ...]:
        return (*LOGS, *self.objective.LOGS)

    def _gradient_step(self, batch: Any) -> tuple[tuple[tf.Tensor, ...], list[tf.Tensor]]:
        """((loss, norm before and after clipping, sums, packed StepFlags), gradients) of the global batch, the same on every
        replica."""
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync
        images, labels = self.objective.check(batch)
        size = tf.shape(images)[0]
        index = context.replica_id_in_sync_group * size + tf.range(size)

        # Gradient of the mean over the global batch
        loss, sums, gradients = self._accumulated(images, labels, index, self.loss_scale.factor() / replicas)
        gradients = self.loss_scale.unscaled(gradients)
        flags, own_norm = self._flags(context, loss, gradients).pack(), tf.constant(0.0)
        if self.grad_clip_mode == "per_replica":
            own_norm = tf.linalg.global_norm(gradients)
            gradients = self._clipped(gradients, self.grad_clip / replicas, own_norm)
        of_this_replica = [loss / replicas, sums, flags, own_norm, *gradients]
        loss, sums, flags, norm, *gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, of_this_replica)
        if self.grad_clip_mode == "per_replica":  # the mean over replicas of the norm of each one's own loss
            return (loss, norm, tf.linalg.global_norm(gradients), sums, flags), gradients
        norm = tf.linalg.global_norm(gradients)
        if replicas > 1:  # its last bits depend on a machine's number of threads
            norm = context.all_reduce(tf.distribute.ReduceOp.MEAN, norm)
        gradients = self._clipped(gradients, self.grad_clip, norm)
        clipped = tf.minimum(norm, self.grad_clip) if self.grad_clip else norm
        return (loss, norm, clipped, sums, flags), gradients

    def _accumulated(
        self, images: tf.Tensor, labels: tf.Tensor | None, index: tf.Tensor, scale: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """`loss_and_gradient` of this replica's examples, in `micro_batches` parts."""
        parts, step = self.micro_batches, self.optimizer.iterations.value
        if parts == 1:
            return self._compiled(images, labels, index, step, scale)
        split = [tf.reshape(v, [parts, -1, *v.shape[1:]]) for v in (images, index)]
        labels = None if labels is None else tf.reshape(labels, [parts, -1])

        def body(k: tf.Tensor, loss: tf.Tensor, sums: tf.Tensor, *gradients: tf.Tensor) -> tuple:
            part = (split[0][k], None if labels is None else labels[k], split[1][k])
            more_loss, more_sums, more = self._compiled(*part, step, scale / parts)
            summed = (g + m for g, m in zip(gradients, more, strict=True))
            return k + 1, loss + more_loss / parts, sums + more_sums, *summed

        zeros = [tf.zeros(v.shape) for v in self.network.trainable_variables]
        begin = (0, tf.constant(0.0), tf.zeros(self.objective.SUMS_SHAPE), *zeros)
        _, loss, sums, *gradients = tf.while_loop(lambda k, *_: k < parts, body, begin, parallel_iterations=1)
        return loss, sums, gradients

    def loss_and_gradient(
        self, images: tf.Tensor, labels: tf.Tensor | None, index: tf.Tensor, step: tf.Tensor, scale: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """(the mean loss of these images, the objective's sums, the gradient of `scale` times the loss).

        index: int32 [B], the images' positions in the global batch.
        """
        draws = self.objective.draws(index, step)
        with tf.GradientTape() as tape:
            computed = self.objective(images, labels, draws)
            loss = tf.reduce_mean(computed.losses)
            scaled = loss * scale
        gradients = tape.gradient(scaled, [v.value for v in self.network.trainable_variables])
        # The gradient of an embedding comes as IndexedSlices.
        return loss, self.objective.sums(images, computed), [tf.convert_to_tensor(g) for g in gradients]

    def _flags(self, context: tf.distribute.ReplicaContext, loss: tf.Tensor, gradients: list[tf.Tensor]) -> StepFlags:
        """This replica's flags. One replica alone needs no flag that its own numbers are not finite."""
        replicas = context.num_replicas_in_sync
        stop = tf.cast(self.stop_wish.value(), tf.float32)
        if replicas == 1:
            return StepFlags(tf.zeros([1]), stop)
        is_bad = ~tf.math.is_finite(loss + tf.linalg.global_norm(gradients))
        return StepFlags(tf.one_hot(context.replica_id_in_sync_group, replicas) * tf.cast(is_bad, tf.float32), stop)

    def _update(self, gradients: list[tf.Tensor]) -> None:
        """Weights, moments and average from the global batch's gradients."""
        self.optimizer.apply(gradients, self.network.trainable_variables)
        update_ema(self.ema_network.variables, self.network.variables, self.ema_decay)

    def _clipped(self, gradients: list[tf.Tensor], limit: float, norm: tf.Tensor) -> list[tf.Tensor]:
        return tf.clip_by_global_norm(gradients, limit, use_norm=norm)[0] if limit else gradients

    @property
    def metrics(self) -> list:
        """None: the logs of a step are its numbers, not running means."""
        return []

    def reset_metrics(self) -> None:
        self.held_out.reset()

    def test_step(self, batch: Any) -> dict[str, tf.Tensor]:
        """Add one batch to the mean of `evaluate`; called outside the replicas."""
        strategy = self.distribute_strategy
        loss, count = strategy.run(self._held_out_sums, (batch, tf.identity(self.held_out.batches)))
        self.held_out.add(*(strategy.experimental_local_results(v)[0] for v in (loss, count)))
        return {"loss": self.held_out.mean()}

    def predict_step(self, data: Any) -> tf.Tensor:
        inputs = data[0] if isinstance(data, tuple) else data
        if self.network.num_classes is not None and isinstance(inputs, dict) and {"x_t", "labels"} <= inputs.keys():
            labels = checked_labels(inputs["labels"], inputs["x_t"], self.network.num_classes)
            inputs = {**inputs, "labels": labels}
        return self(inputs)

    def _held_out_sums(self, batch: Any, number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(sum of the losses, number of images) of the global batch, whose parts may differ in size."""
        context = tf.distribute.get_replica_context()
        images, labels = self.objective.check(batch)
        size = tf.shape(images)[0]
        replica = context.replica_id_in_sync_group
        sizes = context.all_reduce("SUM", tf.one_hot(replica, context.num_replicas_in_sync, dtype=tf.int32) * size)
        index = tf.reduce_sum(sizes[:replica]) + tf.range(size)
        losses = self.objective.held_out_losses(images, labels, index, number)
        return context.all_reduce("SUM", tf.reduce_sum(losses)), tf.reduce_sum(sizes)

    # Keras' own train function fails under several workers and with steps_per_execution under several replicas
    # (keras#20585, keras#19246), and so does its test function; the methods below replace those that are at fault.

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Nothing to do: network and optimizer are built when they are made."""

    def make_train_function(self, force: bool = False) -> None:
        """The compiled loop over `steps_per_execution` steps; logs are those of the last step."""
        if getattr(self, "train_function", None) is None or force:
            self.train_function = self._looped(self.train_step, self._log_names())

    def make_test_function(self, force: bool = False) -> None:
        """As `make_train_function`; the log is the mean over all batches since `reset_metrics`."""
        if getattr(self, "test_function", None) is None or force:
            self.test_function = self._looped(self.test_step, ("loss",))

    def _looped(self, step: Callable[[Any], dict[str, tf.Tensor]], names: Sequence[str]) -> Callable[[Any], Any]:
        """iterator -> logs of `steps_per_execution` steps."""
        steps = self.steps_per_execution

        def one_step(iterator: Any) -> dict[str, tf.Tensor]:
            return step(next(iterator))

        def many_steps(iterator: Any) -> dict[str, tf.Tensor]:
            zeros = {name: tf.zeros(()) for name in names}
            _, logs = tf.while_loop(
                lambda i, _: i < steps,
                lambda i, _: (i + 1, one_step(iterator)),
                (0, zeros),
                parallel_iterations=1,
            )
            return logs

        looped = one_step if steps == 1 else many_steps
        # Without autograph the step is traced once, which is most of the time that a small run takes to start.
        return looped if self.run_eagerly else tf.function(looped, autograph=False)


def _checked_optimizer(optimizer: Any) -> keras.optimizers.Optimizer:
    """A Keras optimizer that leaves averages and accumulation to the model."""
    try:
        optimizer = keras.optimizers.get(optimizer)
        if optimizer is None:
            raise TypeError
    except (ValueError, TypeError) as e:
        raise InputError(
            f"optimizer must be a Keras optimizer or its name, such as 'adam'; found {optimizer!r}."
        ) from e
    if optimizer.use_ema or optimizer.gradient_accumulation_steps:
        raise InputError(
            "The optimizer's use_ema and gradient_accumulation_steps must be off; DiffusionModel has ema_decay and "
            "micro_batches."
        )
    return optimizer


def _refuse_given(verb: str, **values: Any) -> None:
    """Keras would leave weights out without a word where there are no targets."""
    for name, value in values.items():
        if value is not None:
            raise InputError(
                f'{verb} takes no {name}; it takes batches {{"image": float32 [B, H, W, C] in [-1, 1], ("label": int32 [B])}}.'
            )


def _refuse_endless(x: Any, steps: int | None, verb: str, argument: str) -> None:
    """Keras would go on for ever, without a word."""
    if isinstance(x, tf.data.Dataset) and steps is None:
        cardinality = int(x.cardinality())
        if cardinality == tf.data.INFINITE_CARDINALITY or cardinality > 2**40:
            raise InputError(f"{verb} would never end, since the dataset is endless; give {argument}.")
