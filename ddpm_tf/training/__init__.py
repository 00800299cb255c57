"""Training: the Keras model with its train_step, its objective, its optimizers."""
