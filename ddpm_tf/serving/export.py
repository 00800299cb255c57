"""The SavedModel that TensorFlow Serving loads."""

import tensorflow as tf

from ddpm_tf.serving.signatures import make_signatures


def save_model(path, network, sampler, bound, *, max_batch):
    """Write a network, its sampler and their signatures as a SavedModel.

    Args:
        path: the folder, new or empty.
        network, sampler, bound, max_batch: see `make_signatures`.

    Returns:
        the names of the signatures.
    """
    functions = {
        name: f.get_concrete_function()
        for name, f in make_signatures(network, sampler, bound, max_batch=max_batch).items()
    }
    module = tf.Module()
    # The variables themselves, not Keras' wrappers of them: a session looks for these.
    module.weights = [v.value for v in network.variables]
    signatures = {**functions, "serving_default": functions["sample"]}
    tf.saved_model.save(module, path, signatures, tf.saved_model.SaveOptions(experimental_custom_gradients=False))
    return sorted(signatures)
