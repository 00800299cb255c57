"""A trained sampler as a service: its SavedModel and the files for TensorFlow Serving, and a client."""
