"""Loaders that hand out the leaves of every step, the same whatever the world size; sets larger than memory."""

from shoal.data.files import FileShards, TokenFile
from shoal.data.usage import Usage

__all__ = ["FileShards", "TokenFile", "Usage"]
