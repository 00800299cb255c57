"""What a workdir's images are conditioned on: labels by name or number, and how strong the guidance is."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ddpm_tf import builders, text
from ddpm_tf.errors import InputError
from ddpm_tf.networks.contract import Network
from ddpm_tf.samplers.guidance import ClassifierGuided, is_conditional

_COLUMNS = 64  # classes that a grid has columns for


class Conditions(NamedTuple):
    """The conditions of a number of images, as `generate` takes them.

    labels: int32 [N], None for an unconditional network without a classifier.
    guidance: weight of classifier-free guidance; None: conditional, at half the cost.
    classifier_scale: weight of the classifier's gradient; None: there is no classifier.
    columns: of a grid with a column for every class that is drawn; None: a square grid.
    """

    labels: np.ndarray | None
    guidance: float | None
    classifier_scale: float | None
    columns: int | None

    def keywords(self) -> dict:
        """The arguments of `generate`."""
        return {"labels": self.labels, "guidance": self.guidance, "classifier_scale": self.classifier_scale}


def make_conditions(
    config: ConfigDict,
    network: Network,
    class_names: Sequence[str],
    num_images: int,
    *,
    classifier_scale: float | None = None,
) -> Conditions:
    """The conditions that the config's `sample` section asks for.

    Args:
        class_names: the name of class k at place k; empty without names.
        classifier_scale: for a network `guided_by` a classifier.

    Raises:
        InputError: labels or guidance that the network does not take, an unknown class.
    """
    s = config.sample
    builders.check_guidance(config, has_classifier=isinstance(network, ClassifierGuided))
    num_classes = getattr(network, "num_classes", None)
    if num_classes is None:
        return Conditions(None, None, None, None)
    cycle = parse_labels(s.labels, num_classes, class_names)
    guidance = s.guidance if s.guidance != 1 and is_conditional(network) else None
    labels = np.resize(cycle, num_images)
    columns = len(cycle) if 1 < len(cycle) <= _COLUMNS else None
    if guidance is not None:
        logging.info(
            "Guidance %g: 0 is unconditional, 1 conditional, above 1 stronger (Ho & Salimans' own w is %g).",
            guidance,
            guidance - 1,
        )
    return Conditions(labels, guidance, classifier_scale, columns)


def parse_labels(labels: str, num_classes: int, class_names: Sequence[str]) -> np.ndarray:
    """The classes that are drawn in turn, int32 [K].

    Args:
        labels: all, or names and numbers with commas. A name comes before a number, and a longer name before a shorter.
            num_classes is the null class: none.

    Raises:
        InputError: a name or number that is no class.
    """
    if labels.strip() == "all":
        return np.arange(num_classes, dtype=np.int32)
    places = {name: k for k, name in enumerate(class_names)}
    most = 1 + max((name.count(",") for name in class_names), default=0)
    words, cycle, first = labels.split(","), [], 0
    while first < len(words):
        # A name may hold commas, as ImageNet's do: the longest one that stands here counts.
        spans = {size: ",".join(words[first : first + size]).strip() for size in range(most, 0, -1)}
        size = next((size for size, name in spans.items() if name in places), 1)
        word = spans[size]
        is_number = word.isascii() and word.isdigit() and len(word) < 10 and int(word) <= num_classes
        if word not in places and not is_number:
            some = ", ".join(map(text.printable, class_names[:20])) + (", ..." if len(class_names) > 20 else "")
            raise InputError(
                f"--labels={text.printable(labels)}: {word!r} is no class. Expected all, or numbers within "
                f"0..{num_classes} with commas ({num_classes} means no class)"
                + (f", or names: {some}." if some else ".")
            )
        cycle.append(places[word] if word in places else int(word))
        first += size
    return np.array(cycle, np.int32)
