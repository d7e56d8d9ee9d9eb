"""Loaders that hand out the leaves of every step, the same whatever the world size."""
