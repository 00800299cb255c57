"""The trainer: a Keras model whose `train_step` is Algorithm 1 of Ho et al. 2020."""

import keras
import tensorflow as tf

from ddpm_tf import rng
from ddpm_tf.diffusion.losses import make_loss
from ddpm_tf.errors import InputError, unknown_name
from ddpm_tf.training.ema import make_ema_network, update_ema

GRAD_CLIP_MODES = ("global", "per_replica")
LOGS = ("loss", "grad_norm", "learning_rate")


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
    ):
        super().__init__(name="diffusion_model")
        self._per_example_loss = make_loss(loss, diffusion, weight=loss_weight)
        if grad_clip_mode not in GRAD_CLIP_MODES:
            raise unknown_name("grad_clip_mode", grad_clip_mode, GRAD_CLIP_MODES)
        if not 0 <= ema_decay < 1 or grad_clip < 0:
            raise InputError(
                f"ema_decay must be within [0, 1) and grad_clip at least 0, found {ema_decay} and {grad_clip}."
            )
        self.network, self.ema_network = network, make_ema_network(network)
        self.diffusion, self.seed, self.ema_decay = diffusion, seed, ema_decay
        self.grad_clip, self.grad_clip_mode = grad_clip, grad_clip_mode
        self.built = True

    def compile(self, optimizer, *, jit_compile=False, steps_per_execution=1):
        """Set the optimizer and make its slots. jit_compile: XLA for the loss and its gradient."""
        super().compile(optimizer=optimizer, steps_per_execution=steps_per_execution, jit_compile=False)
        optimizer.build(self.network.trainable_variables)
        self._loss_and_gradient = tf.function(self._loss_and_gradient_eager, jit_compile=jit_compile, autograph=False)

    def call(self, inputs, training=False):
        return self.network(inputs, training=training)

    def train_step(self, batch):
        """One step of Algorithm 1 on this replica's share of the global batch."""
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync
        images, labels = self._checked(batch)
        step = self.optimizer.iterations.value
        size = tf.shape(images)[0]
        index = context.replica_id_in_sync_group * size + tf.range(size)

        # Gradient of the mean over the global batch
        loss, gradients = self._loss_and_gradient(images, labels, index, step, tf.constant(1 / replicas, tf.float32))
        if self.grad_clip_mode == "per_replica":
            gradients, _ = self._clip(gradients, self.grad_clip / replicas)
        gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
        norm = tf.linalg.global_norm(gradients)
        if self.grad_clip_mode == "global":
            gradients, norm = self._clip(gradients, self.grad_clip)

        # Update: the optimizer sums over replicas once more
        learning_rate = self.optimizer.learning_rate
        self.optimizer.apply([g / replicas for g in gradients], self.network.trainable_variables)
        update_ema(self.ema_network.variables, self.network.variables, self.ema_decay)
        return dict(zip(LOGS, (loss, norm, tf.identity(learning_rate)), strict=True))

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

    def _loss_and_gradient_eager(self, images, labels, index, step, scale):
        """The mean loss of these images, and the gradient of `scale` times it."""
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
        return loss, tape.gradient(scaled, [v.value for v in self.network.trainable_variables])

    def _clip(self, gradients, limit):
        norm = tf.linalg.global_norm(gradients)
        if not limit:
            return gradients, norm
        return tf.clip_by_global_norm(gradients, limit, use_norm=norm)

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
        strategy, steps = self.distribute_strategy, self.steps_per_execution

        def one_step(iterator):
            logs = strategy.run(self.train_step, args=(next(iterator),))
            return {k: strategy.reduce(tf.distribute.ReduceOp.MEAN, v, axis=None) for k, v in logs.items()}

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
