"""Tasks: the catalog of their facts, readers, datasets, batches, and the Lightning data modules on top."""
