"""Several processes that train together: how they find each other, compare themselves, and end."""
