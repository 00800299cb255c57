"""Training: the Keras model with its train_step, and what surrounds `fit`."""
