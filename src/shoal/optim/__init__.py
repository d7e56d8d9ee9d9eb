"""Optimizers that work on shards: alone they are ordinary torch optimizers, with the same bits."""

from shoal.optim.adam8 import AdamW8bit
from shoal.optim.layerwise import LAMB, LARS
from shoal.optim.norms import NeedsNorms

__all__ = ["LAMB", "LARS", "AdamW8bit", "NeedsNorms"]
