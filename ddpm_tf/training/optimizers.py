"""Optimizers with the original's learning-rate schedule."""

from typing import Any

import keras
import tensorflow as tf

from ddpm_tf import checks
from ddpm_tf.choices import Choice, choose
from ddpm_tf.errors import InputError
from ddpm_tf.networks.contract import Network


@keras.saving.register_keras_serializable(package="ddpm_tf")
class LinearWarmup(keras.optimizers.schedules.LearningRateSchedule):
    """learning_rate * min(step / warmup_steps, 1): 0 at step 0, as in the original."""

    def __init__(self, learning_rate: float, warmup_steps: int) -> None:
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        if not self.warmup_steps:
            return tf.constant(self.learning_rate, tf.float32)
        return self.learning_rate * tf.minimum(tf.cast(step, tf.float32) / self.warmup_steps, 1.0)

    def get_config(self) -> dict[str, Any]:
        return {"learning_rate": self.learning_rate, "warmup_steps": self.warmup_steps}


# Both run the ops of TensorFlow 1's optimizers, as the original did. They change weight and moments in one pass; Keras makes
# about 15 ops, with a temporary each, for every weight, which take long to trace.


@keras.saving.register_keras_serializable(package="ddpm_tf")
class Adam(keras.optimizers.Adam):
    """TensorFlow 1's: m <- m + (1 - beta_1) (g - m); v <- v + (1 - beta_2) (g^2 - v);
    w <- w - lr sqrt(1 - beta_2^t) / (1 - beta_1^t) m / (sqrt(v) + epsilon).
    """

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor) -> None:
        index, t = self._get_variable_index(variable), tf.cast(self.iterations.value + 1, tf.float32)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=tf.pow(self.beta_1, t),
            beta2_power=tf.pow(self.beta_2, t),
            lr=learning_rate,
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )


@keras.saving.register_keras_serializable(package="ddpm_tf")
class RMSProp(keras.optimizers.RMSprop):
    """TensorFlow 1's: mean square <- rho mean square + (1 - rho) g^2, starting at 1 (Keras: at 0, so that the first steps
    are up to 1 / sqrt(1 - rho) = 4.5 times as large); momentum <- momentum momentum + lr g / sqrt(mean square + epsilon).
    """

    def add_optimizer_variables(self, trainable_variables: list, name: Any, initializer: Any = "zeros") -> Any:
        return super().add_optimizer_variables(trainable_variables, name, "ones" if name == "velocity" else initializer)

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor) -> None:
        index = self._get_variable_index(variable)
        tf.raw_ops.ResourceApplyRMSProp(
            var=variable.handle,
            ms=self._velocities[index].value.handle,
            mom=self._momentums[index].value.handle,
            lr=learning_rate,
            rho=self.rho,
            momentum=self.momentum,
            epsilon=self.epsilon,
            grad=gradient,
        )


def _adam(
    schedule: LinearWarmup, *, beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-8
) -> keras.optimizers.Optimizer:
    if not (0 <= checks.real("beta_1", beta_1) < 1 and 0 <= checks.real("beta_2", beta_2) < 1):
        raise InputError(f"beta_1 and beta_2 must be within [0, 1), found {beta_1} and {beta_2}.")
    return Adam(schedule, beta_1=beta_1, beta_2=beta_2, epsilon=_checked_epsilon(epsilon))


def _rmsprop(schedule: LinearWarmup, *, epsilon: float = 1e-8) -> keras.optimizers.Optimizer:
    # The original's settings, which its scripts never change.
    return RMSProp(schedule, rho=0.95, momentum=0.9, epsilon=_checked_epsilon(epsilon))


def _checked_epsilon(epsilon: float) -> float:
    if not 0 < checks.real("epsilon", epsilon) < 1:
        raise InputError(f"epsilon must be within (0, 1), found {epsilon}.")
    return epsilon


OPTIMIZERS = {"adam": Choice(_adam, ("beta_1", "beta_2", "epsilon")), "rmsprop": Choice(_rmsprop, ("epsilon",))}


def make_optimizer(
    name: str = "adam", *, learning_rate: float = 2e-4, warmup_steps: int = 5000, **settings: float
) -> keras.optimizers.Optimizer:
    """A Keras optimizer with linear warm-up (appendix B: Adam, 2e-4, 5000 steps for CIFAR-10).

    Args:
        name: adam, or rmsprop (decay 0.95, momentum 0.9).
        learning_rate: after `warmup_steps` steps.
        settings: of the optimizer that is named. adam has beta_1=0.9, beta_2=0.999 and epsilon=1e-8, which is added to the
            root; rmsprop has epsilon=1e-8, which is added to the mean square under the root.

    Raises:
        InputError: unknown name, a learning rate that is not positive, negative warm-up, settings out of range, or a setting
            of the other optimizer that is not at its default.
    """
    make = choose("optimizer", name, OPTIMIZERS, settings)
    if checks.real("learning_rate", learning_rate, high=1e37) <= 0:  # it is used in float32
        raise InputError(f"learning_rate must be above 0, found {learning_rate}.")
    warmup_steps = checks.integer("warmup_steps", warmup_steps, low=0, high=2**63 - 1)
    return make(LinearWarmup(learning_rate, warmup_steps))


def slots_by_name(optimizer: keras.optimizers.Optimizer, network: Network) -> dict[str, keras.Variable]:
    """{optimizer/SLOT/PATH: variable} of an optimizer's moments, where PATH is that of the network's weight; and
    optimizer/learning_rate, if it is no schedule."""
    # Keras names a slot OPTIMIZER/PATH_WITH_UNDERSCORES_slot, and numbers the optimizers of a process.
    paths = {v.path.replace("/", "_"): v.path for v in network.trainable_variables}
    named = {}
    for v in optimizer.variables:
        if v is getattr(optimizer, "_learning_rate", None):  # Keras makes it a variable if it is no schedule
            named["optimizer/learning_rate"] = v
        elif v is not optimizer.iterations:
            owner, _, slot = v.path.partition("/")[2].rpartition("_")
            named[f"optimizer/{slot}/{paths[owner]}"] = v
    return named
