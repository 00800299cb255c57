"""The jobs behind the command lines: train, sample from a workdir, export it for serving, and convert weights."""

from ddpm_tf.experiment.conversion import export_weights, import_diffusers, import_tf1
from ddpm_tf.experiment.editing import Edit
from ddpm_tf.experiment.exporting import export
from ddpm_tf.experiment.generating import generate
from ddpm_tf.experiment.inference import Inference, load_classifier, load_for_inference, load_sampler
from ddpm_tf.experiment.pictures import Show, show_pictures
from ddpm_tf.experiment.run import StartOptions
from ddpm_tf.experiment.sampling import sample_images
from ddpm_tf.experiment.training import dry_run, train

__all__ = [
    "Edit",
    "Inference",
    "Show",
    "StartOptions",
    "dry_run",
    "export",
    "export_weights",
    "generate",
    "import_diffusers",
    "import_tf1",
    "load_classifier",
    "load_for_inference",
    "load_sampler",
    "sample_images",
    "show_pictures",
    "train",
]
