"""What a training step of a classifier of noisy images computes (Dhariwal & Nichol 2021, section 4)."""

from typing import Any

import tensorflow as tf

from ddpm_tf.diffusion.losses import LossFunction
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.errors import InputError
from ddpm_tf.training import diagnostics
from ddpm_tf.training.objective import CROSS_ENTROPY, Computed, Objective


class ClassifierObjective(Objective):
    """-log p(y | x_t, t), nats, where y is the label of x_0, and t and eps are drawn as `Objective` draws them.

    Args:
        loss: cross_entropy; the default is `Objective`'s, and refused.
        label_dropout: without effect, since a classifier takes no labels.
        others: as of `Objective`; a loss weight is refused.
    """

    LOGS = diagnostics.ACCURACY_LOGS
    HAS_NULL_CLASS = False

    @staticmethod
    def make_loss(name: str, diffusion: GaussianDiffusion, *, weight: str = "none", **settings: float) -> LossFunction:
        """`cross_entropy`, the only loss of a classifier.

        Raises:
            InputError: another loss, or a loss weight.
        """
        if name != CROSS_ENTROPY:
            raise InputError(f"A classifier is trained by loss {CROSS_ENTROPY!r} alone, found {name!r}.")
        if weight != "none":
            raise InputError(f"Loss {CROSS_ENTROPY!r} has no loss weight, found {weight!r}. Use loss weight 'none'.")
        return cross_entropy

    def _computed(
        self, x_0: tf.Tensor, labels: tf.Tensor | None, t: tf.Tensor, eps: tf.Tensor, **dropout: Any
    ) -> Computed:
        assert labels is not None  # `check` has seen to it
        x_t = self.diffusion.q_sample(x_0, t, eps)  # Eq. 4
        logits = self.network({"x_t": x_t, "t": t}, **dropout)  # [B, num_classes]
        return Computed(self.loss(logits, labels), logits, x_t, t, labels)

    def sums(self, x_0: tf.Tensor, computed: Computed) -> tf.Tensor:
        losses, logits, _, t, labels = computed
        return diagnostics.accuracy_sums(logits, losses, labels=labels, t=t, num_timesteps=self.diffusion.num_timesteps)

    def logs(self, sums: tf.Tensor) -> dict[str, tf.Tensor]:
        return diagnostics.quarter_logs(sums, self.LOGS)


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """-log softmax(logits)[label], nats: float32 [B], of logits float32 [B, K] and labels int32 [B]."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)


def objective_of(network: Any) -> type[Objective]:
    """The objective by which a network, or a class of networks, is trained."""
    return ClassifierObjective if getattr(network, "classifies", False) else Objective
