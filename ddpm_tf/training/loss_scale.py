"""Loss scaling: float16 gradients are kept above underflow by a factor that is taken out again in float32."""

import tensorflow as tf

INITIAL, FLOOR, CEILING = 2.0**15, 1.0, 2.0**24
GROW_EVERY = 2000  # steps without overflow


class LossScale:
    """The factor and its state, which checkpoints keep.

    It is halved after a step that is not finite, never below 1, and doubled after 2,000 finite steps, never above 2^24.

    Args:
        is_active: False: the factor is 1 and nothing changes.

    Attributes:
        scale: float32, the factor. finite_steps: int64, since the last change.
    """

    def __init__(self, is_active: bool) -> None:
        self.is_active = is_active
        once = {"trainable": False, "aggregation": tf.VariableAggregation.ONLY_FIRST_REPLICA}
        self.scale = tf.Variable(INITIAL, dtype=tf.float32, **once)
        self.finite_steps = tf.Variable(0, dtype=tf.int64, **once)

    def state(self) -> dict[str, tf.Variable]:
        return {"loss_scale/scale": self.scale, "loss_scale/finite_steps": self.finite_steps}

    def factor(self) -> tf.Tensor:
        return tf.identity(self.scale) if self.is_active else tf.constant(1.0)

    def unscaled(self, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        return [g / self.scale for g in gradients] if self.is_active else gradients

    def is_lowest(self) -> tf.Tensor:
        """Whether a step that is not finite cannot be helped by a smaller factor."""
        return self.scale <= FLOOR if self.is_active else tf.constant(True)

    def update(self, is_finite: tf.Tensor) -> None:
        """After a step; outside the replicas, so that the decision is the same on all of them."""
        if not self.is_active:
            return
        finite_steps = tf.where(is_finite, self.finite_steps + 1, 0)
        grows = finite_steps >= GROW_EVERY
        larger = tf.where(grows, tf.minimum(self.scale * 2, CEILING), self.scale)
        self.scale.assign(tf.where(is_finite, larger, tf.maximum(self.scale / 2, FLOOR)))
        self.finite_steps.assign(tf.where(grows, tf.zeros_like(finite_steps), finite_steps))
