"""The trainer: a Keras model whose `train_step` is Algorithm 1 of Ho et al. 2020."""

import keras
import tensorflow as tf

from ddpm_tf import rng
from ddpm_tf.diffusion.losses import make_loss
from ddpm_tf.errors import InputError, unknown_name
from ddpm_tf.training import diagnostics
from ddpm_tf.training.ema import make_ema_network, update_ema
from ddpm_tf.training.loss_scale import LossScale

GRAD_CLIP_MODES = ("global", "per_replica")
LOGS = (
    "loss", "grad_norm", "grad_norm_clipped", "learning_rate", "weight_norm", "ema_age", "loss_scale", "skipped",
    *diagnostics.QUARTER_LOGS,
)  # fmt: skip
_REMEMBERED = 32  # the last skipped steps whose numbers are kept


def _counter(value):
    return tf.Variable(value, dtype=tf.int64, trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)


class DiffusionModel(keras.Model):
    """Trains a network by `compile` and `fit`, and keeps the moving average of its weights.

    Every draw of a step is a function of (seed, step, position in the global batch), so that the numbers do not
    depend on how many replicas share the batch, and a run that goes on from a checkpoint is the same run.

    Args:
        network: a network as `UNet`.
        diffusion: GaussianDiffusion.
        seed: int64, of the timesteps, the noise and the dropout masks.
        loss: simple, vlb or hybrid, see `losses`.
        loss_weight: weight of the timesteps in the simple loss: none, snr, min_snr or p2.
        ema_decay: decay of the moving average, per step, in [0, 1).
        grad_clip: largest global norm of the gradient; 0: no clipping.
        grad_clip_mode: global (the norm of the whole batch's gradient; the result does not depend on the number of
            replicas) or per_replica (the original's: each of N replicas clips the gradient of its loss / N at
            grad_clip / N, and the clipped gradients are summed).
        max_skipped_steps: after this many steps in a row with a loss or gradient that is not finite, no step changes
            anything any more. At least 1. Overflows that a smaller loss scale can cure do not count (float16).
        micro_batches: the gradient of a batch is the mean of that many parts', one after the other; saves memory.

    The log `grad_norm` is the norm before clipping: of the global batch's gradient or, under per_replica, the mean over the
    replicas of the norm of each one's own.

    `skipped_total`, `skipped_in_a_row` and `skipped_steps` (the numbers of the last ones, -1 before) count skipped steps;
    `not_finite_at` [replicas] is the last step at which a replica's own loss or gradient was not finite, where there are
    several. `stop_votes` is the sum over replicas of `stop_wish`, which each process may set, as of the last step.

    `fit` takes batches {"image": float32 [B, H, W, C] in [-1, 1], "label": int32 [B] (optional)}, B divisible by the
    number of replicas; make, compile and fit the model inside `strategy.scope()`.

    Raises:
        InputError: unknown names, a decay or clip out of range; from `fit`: batches of another dtype or size.
            A value outside [-1, 1] stops `fit` with tf.errors.InvalidArgumentError.
    """

    def __init__(
        self,
        network,
        diffusion,
        *,
        seed=0,
        loss="simple",
        loss_weight="none",
        ema_decay=0.9999,
        grad_clip=1.0,
        grad_clip_mode="global",
        max_skipped_steps=20,
        micro_batches=1,
    ):
        super().__init__(name="diffusion_model")
        self._per_example_loss = make_loss(loss, diffusion, weight=loss_weight)
        if grad_clip_mode not in GRAD_CLIP_MODES:
            raise unknown_name("grad_clip_mode", grad_clip_mode, GRAD_CLIP_MODES)
        if not (
            0 <= ema_decay < 1 and 0 <= grad_clip < tf.float32.max and max_skipped_steps >= 1 and micro_batches >= 1
        ):
            raise InputError(
                "ema_decay must be within [0, 1), grad_clip at least 0, max_skipped_steps and micro_batches at least 1, "
                f"found {ema_decay}, {grad_clip}, {max_skipped_steps} and {micro_batches}."
            )
        self.network, self.ema_network = network, make_ema_network(network)
        self.diffusion, self.seed, self.ema_decay = diffusion, seed, ema_decay
        self.grad_clip, self.grad_clip_mode = grad_clip, grad_clip_mode
        self.max_skipped_steps, self.micro_batches = max_skipped_steps, micro_batches
        self.loss_scale = LossScale(network.compute_dtype == "float16")
        self.skipped_total, self.skipped_in_a_row = _counter(0), _counter(0)
        self.skipped_steps = _counter([-1] * _REMEMBERED)
        self.stop_wish, self.stop_votes = _counter(0), _counter(0)
        self.not_finite_at = _counter([-1] * tf.distribute.get_strategy().num_replicas_in_sync)
        self.built = True

    def compile(self, optimizer, *, jit_compile=False, steps_per_execution=1):
        """Set the optimizer and make its slots. jit_compile: XLA for the loss and its gradient."""
        super().compile(optimizer=optimizer, steps_per_execution=steps_per_execution, jit_compile=False)
        optimizer.build(self.network.trainable_variables)  # from here on it belongs to this network
        optimizer._all_reduce_sum_gradients = lambda gradients_and_variables: gradients_and_variables  # they are summed
        self._compiled = tf.function(self.loss_and_gradient, jit_compile=jit_compile, autograph=False)

    def call(self, inputs, training=False):
        return self.network(inputs, training=training)

    def train_step(self, batch):
        """One step of Algorithm 1 on a global batch; called outside the replicas.

        A step whose loss or gradient is not finite changes no weight, moment or average, and is counted; the step
        number goes on, since data, draws and learning rate depend on it. The decision is taken on all-reduced values,
        so it is the same on every replica.
        """
        strategy, step = self.distribute_strategy, tf.identity(self.optimizer.iterations.value)
        logs = {
            "learning_rate": tf.identity(self.optimizer.learning_rate),
            "weight_norm": diagnostics.weight_rms(self.network.trainable_variables),
            "ema_age": diagnostics.ema_age(tf.cast(step, tf.int64) - self.skipped_total, self.ema_decay),
            "loss_scale": self.loss_scale.factor(),
        }
        reduced, gradients = strategy.run(self._gradient_step, (batch,))
        loss, norm, clipped, sums, signs = (strategy.experimental_local_results(v)[0] for v in reduced)
        logs |= {"loss": loss, "grad_norm": norm, "grad_norm_clipped": clipped, **diagnostics.quarter_logs(sums)}
        self.stop_votes.assign(tf.cast(signs[-1], tf.int64))
        self.not_finite_at.assign(tf.where(signs[:-1] > 0, tf.cast(step, tf.int64), self.not_finite_at))
        is_finite = tf.math.is_finite(loss) & tf.math.is_finite(norm)
        # Once the limit is reached nothing changes any more, however many steps one call makes.
        is_over = self.skipped_in_a_row >= self.max_skipped_steps

        def update():
            strategy.run(self._update, (gradients,))
            return tf.constant(0)

        def skip():
            self.optimizer.iterations.assign_add(1)
            return tf.constant(0)

        tf.cond(is_finite & ~is_over, update, skip)
        is_curable = ~self.loss_scale.is_lowest() & tf.math.is_finite(loss)  # by a smaller loss scale
        tf.cond(is_over, lambda: tf.identity(self.skipped_total), lambda: self._count(~is_finite, is_curable, step))
        logs["skipped"] = tf.cast(self.skipped_total, tf.float32)
        self.loss_scale.update(is_finite)
        return {name: logs[name] for name in LOGS}

    def _count(self, is_skipped, is_curable, step):
        """Keep the counts of skipped steps; returns the total."""
        in_a_row = self.skipped_in_a_row + tf.cast(~is_curable, tf.int64)
        self.skipped_in_a_row.assign(tf.where(is_skipped, in_a_row, 0))
        moved = tf.concat([self.skipped_steps[1:], [tf.cast(step, tf.int64)]], axis=0)
        self.skipped_steps.assign(tf.where(is_skipped, moved, self.skipped_steps))
        return self.skipped_total.assign_add(tf.cast(is_skipped, tf.int64))

    def _gradient_step(self, batch):
        """((loss, norm before and after clipping, sums by quarter, signs), gradients) of the global batch; the same on
        every replica."""
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync
        images, labels = self._checked(batch)
        size = tf.shape(images)[0]
        index = context.replica_id_in_sync_group * size + tf.range(size)

        # Gradient of the mean over the global batch
        loss, sums, gradients = self._accumulated(images, labels, index, self.loss_scale.factor() / replicas)
        gradients = self.loss_scale.unscaled(gradients)
        signs, own_norm = self._signs(context, loss, gradients), tf.constant(0.0)
        if self.grad_clip_mode == "per_replica":
            own_norm = tf.linalg.global_norm(gradients)
            gradients = self._clipped(gradients, self.grad_clip / replicas, own_norm)
        own = [loss / replicas, sums, signs, own_norm, *gradients]
        loss, sums, signs, norm, *gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, own)
        if self.grad_clip_mode == "per_replica":  # the mean over replicas of the norm of each one's own loss
            return (loss, norm, tf.linalg.global_norm(gradients), sums, signs), gradients
        norm = tf.linalg.global_norm(gradients)
        if replicas > 1:  # its last bits depend on a machine's number of threads
            norm = context.all_reduce(tf.distribute.ReduceOp.MEAN, norm)
        gradients = self._clipped(gradients, self.grad_clip, norm)
        clipped = tf.minimum(norm, self.grad_clip) if self.grad_clip else norm
        return (loss, norm, clipped, sums, signs), gradients

    def _accumulated(self, images, labels, index, scale):
        """`loss_and_gradient` of this replica's examples, in `micro_batches` parts."""
        parts, step = self.micro_batches, self.optimizer.iterations.value
        if parts == 1:
            return self._compiled(images, labels, index, step, scale)
        split = [tf.reshape(v, [parts, -1, *v.shape[1:]]) for v in (images, index)]
        labels = None if labels is None else tf.reshape(labels, [parts, -1])

        def body(k, loss, sums, *gradients):
            part = (split[0][k], None if labels is None else labels[k], split[1][k])
            more_loss, more_sums, more = self._compiled(*part, step, scale / parts)
            gradients = (g + m for g, m in zip(gradients, more, strict=True))
            return k + 1, loss + more_loss / parts, sums + more_sums, *gradients

        zeros = [tf.zeros(v.shape) for v in self.network.trainable_variables]
        begin = (0, tf.constant(0.0), tf.zeros([3, diagnostics.QUARTERS]), *zeros)
        _, loss, sums, *gradients = tf.while_loop(lambda k, *_: k < parts, body, begin, parallel_iterations=1)
        return loss, sums, gradients

    def _signs(self, context, loss, gradients):
        """float32 [replicas + 1]: 1 in this replica's place where its own numbers are not finite; last, the wish to stop."""
        replicas = context.num_replicas_in_sync
        wish = tf.cast(self.stop_wish.value(), tf.float32)
        if replicas == 1:
            return tf.stack([0.0, wish])
        is_bad = ~tf.math.is_finite(loss + tf.linalg.global_norm(gradients))
        own = tf.one_hot(context.replica_id_in_sync_group, replicas) * tf.cast(is_bad, tf.float32)
        return tf.concat([own, [wish]], axis=0)

    def _update(self, gradients):
        """Weights, moments and average from the global batch's gradients."""
        self.optimizer.apply(gradients, self.network.trainable_variables)
        update_ema(self.ema_network.variables, self.network.variables, self.ema_decay)

    def draws(self, index, step):
        """What step `step` draws for the examples at positions `index` of the global batch.

        Returns:
            (t int32 [B], eps float32 [B, H, W, C], dropout_seed int32 [B, 2]).
        """
        key = {"index": index, "step": step}
        t = rng.integers(self.seed, self.diffusion.num_timesteps, purpose=rng.Purpose.TIMESTEP, **key)
        eps = rng.normal(self.seed, self.network.image_shape, purpose=rng.Purpose.NOISE, **key)
        words = rng.bits(self.seed, 2, purpose=rng.Purpose.DROPOUT_SEED, **key)
        return t, eps, tf.bitcast(words, tf.int32)

    def loss_and_gradient(self, images, labels, index, step, scale):
        """(the mean loss of these images, sums by quarter of the timesteps, the gradient of `scale` times the loss).

        index: int32 [B], the images' positions in the global batch.
        """
        t, eps, dropout_seed = self.draws(index, step)
        x_t = self.diffusion.q_sample(images, t, eps)
        inputs = {"x_t": x_t, "t": t}
        if labels is not None:
            inputs["labels"] = labels
        with tf.GradientTape() as tape:
            output = self.network(inputs, training=True, dropout_seed=dropout_seed)
            losses = self._per_example_loss(self.diffusion, output, x_0=images, x_t=x_t, t=t, eps=eps)  # [B]
            loss = tf.reduce_mean(losses)
            scaled = loss * scale
        gradients = tape.gradient(scaled, [v.value for v in self.network.trainable_variables])
        sums = diagnostics.quarter_sums(self.diffusion, output, losses, x_0=images, x_t=x_t, t=t)
        return loss, sums, [tf.convert_to_tensor(g) for g in gradients]  # of an embedding: IndexedSlices

    def _clipped(self, gradients, limit, norm):
        return tf.clip_by_global_norm(gradients, limit, use_norm=norm)[0] if limit else gradients

    def _checked(self, batch):
        """(images, labels or None) of a batch; refuses what would be trained on silently."""
        if not isinstance(batch, dict) or "image" not in batch:
            raise InputError('fit takes batches {"image": float32 [B, H, W, C] in [-1, 1], ("label": int32 [B])}.')
        images = batch["image"]
        expected = self.network.image_shape
        if images.dtype != tf.float32 or tuple(images.shape[1:]) != expected:
            raise InputError(
                f"Images must be float32 [B, {', '.join(map(str, expected))}], found {images.dtype.name} "
                f"{images.shape}."
            )
        largest = tf.reduce_max(tf.abs(images))
        message = "Images must lie within [-1, 1]; the largest absolute value is above 1. Scale with x / 127.5 - 1."
        with tf.control_dependencies([tf.debugging.assert_less_equal(largest, 1.0, message=message)]):
            images = tf.identity(images)
        if getattr(self.network, "num_classes", None) is None:
            return images, None
        if "label" not in batch:
            raise InputError('A class-conditional network needs batches with "label".')
        return images, batch["label"]

    # Keras' own train function fails under several workers and with steps_per_execution under several replicas
    # (keras#20585, keras#19246); the two methods below replace the two that are at fault.

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Nothing to do: network and optimizer are built when they are made."""

    def make_train_function(self, force=False):
        """The compiled loop over `steps_per_execution` steps; logs are those of the last step."""
        if self.train_function is not None and not force:
            return
        steps = self.steps_per_execution

        def one_step(iterator):
            return self.train_step(next(iterator))

        def many_steps(iterator):
            zeros = {name: tf.zeros(()) for name in LOGS}
            _, logs = tf.while_loop(
                lambda i, _: i < steps,
                lambda i, _: (i + 1, one_step(iterator)),
                (0, zeros),
                parallel_iterations=1,
            )
            return logs

        # Without autograph the step is traced once, which is most of the time that a small run takes to start.
        self.train_function = tf.function(one_step if steps == 1 else many_steps, autograph=False)
