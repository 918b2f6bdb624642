"""One run and many: command line, job, training, result."""
