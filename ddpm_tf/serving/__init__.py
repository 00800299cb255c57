"""A trained sampler as a service: the SavedModel for TensorFlow Serving, and a client."""
