"""Read the weights that others published."""
