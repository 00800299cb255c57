"""Optimizers with the original's learning-rate schedule."""

import keras
import tensorflow as tf

from ddpm_tf.errors import InputError, unknown_name


@keras.saving.register_keras_serializable(package="ddpm_tf")
class LinearWarmup(keras.optimizers.schedules.LearningRateSchedule):
    """learning_rate * min(step / warmup_steps, 1): 0 at step 0, as in the original."""

    def __init__(self, learning_rate, warmup_steps):
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps

    def __call__(self, step):
        if not self.warmup_steps:
            return tf.constant(self.learning_rate, tf.float32)
        return self.learning_rate * tf.minimum(tf.cast(step, tf.float32) / self.warmup_steps, 1.0)

    def get_config(self):
        return {"learning_rate": self.learning_rate, "warmup_steps": self.warmup_steps}


# Both run the ops of TensorFlow 1's optimizers, as the original did. They change weight and moments in one pass; Keras makes
# about 15 ops, with a temporary each, for every weight, which take long to trace.


@keras.saving.register_keras_serializable(package="ddpm_tf")
class Adam(keras.optimizers.Adam):
    """TensorFlow 1's: m <- m + (1 - beta_1) (g - m); v <- v + (1 - beta_2) (g^2 - v);
    w <- w - lr sqrt(1 - beta_2^t) / (1 - beta_1^t) m / (sqrt(v) + epsilon).
    """

    def update_step(self, gradient, variable, learning_rate):
        index, t = self._get_variable_index(variable), tf.cast(self.iterations.value + 1, tf.float32)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle, m=self._momentums[index].value.handle, v=self._velocities[index].value.handle,
            beta1_power=tf.pow(self.beta_1, t), beta2_power=tf.pow(self.beta_2, t), lr=learning_rate,
            beta1=self.beta_1, beta2=self.beta_2, epsilon=self.epsilon, grad=gradient,
        )  # fmt: skip


@keras.saving.register_keras_serializable(package="ddpm_tf")
class RMSProp(keras.optimizers.RMSprop):
    """TensorFlow 1's: mean square <- rho mean square + (1 - rho) g^2, starting at 1 (Keras: at 0, so that the first steps
    are up to 1 / sqrt(1 - rho) = 4.5 times as large); momentum <- momentum momentum + lr g / sqrt(mean square + epsilon).
    """

    def add_optimizer_variables(self, trainable_variables, name, initializer="zeros"):
        return super().add_optimizer_variables(trainable_variables, name, "ones" if name == "velocity" else initializer)

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        tf.raw_ops.ResourceApplyRMSProp(
            var=variable.handle, ms=self._velocities[index].value.handle, mom=self._momentums[index].value.handle,
            lr=learning_rate, rho=self.rho, momentum=self.momentum, epsilon=self.epsilon, grad=gradient,
        )  # fmt: skip


# The original's two, with its settings of RMSProp, which its scripts never change.
OPTIMIZERS = {
    "adam": Adam,
    "rmsprop": lambda schedule, *, beta_1, beta_2, epsilon: RMSProp(schedule, rho=0.95, momentum=0.9, epsilon=epsilon),
}


def make_optimizer(name="adam", *, learning_rate=2e-4, warmup_steps=5000, beta_1=0.9, beta_2=0.999, epsilon=1e-8):
    """A Keras optimizer with linear warm-up (appendix B: Adam, 2e-4, 5000 steps for CIFAR-10).

    Args:
        name: adam, or rmsprop (decay 0.95, momentum 0.9).
        learning_rate: after `warmup_steps` steps.
        beta_1, beta_2: Adam's.
        epsilon: Adam's is added to the root, RMSProp's to the mean square under it.

    Raises:
        InputError: unknown name, a learning rate that is not positive, negative warm-up, betas or epsilon out of range.
    """
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)
    if not 0 < learning_rate < float("inf") or warmup_steps < 0:
        raise InputError(
            "optimizer.learning_rate must be positive and optimizer.warmup_steps at least 0, found "
            f"{learning_rate} and {warmup_steps}."
        )
    if not (0 <= beta_1 < 1 and 0 <= beta_2 < 1 and 0 < epsilon < 1):
        raise InputError(
            "optimizer.beta_1 and optimizer.beta_2 must be within [0, 1) and optimizer.epsilon within (0, 1), found "
            f"{beta_1}, {beta_2} and {epsilon}."
        )
    schedule = LinearWarmup(learning_rate, warmup_steps)
    return OPTIMIZERS[name](schedule, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon)
