"""Weights that another program has written: found, compared by name, and filled in tensor by tensor."""
