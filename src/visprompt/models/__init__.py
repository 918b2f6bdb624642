"""Backbones, methods and the classifier that joins them; the tuned state."""
