"""Tasks: the catalog of records, readers of their files, datasets, samplers and Lightning data modules."""
