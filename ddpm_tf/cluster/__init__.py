"""Several processes that train together: how they find each other, agree, and end."""
