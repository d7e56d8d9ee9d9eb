"""Checkpoints on disk: `<root>/step-<N>`, a directory of safetensors files and one `manifest.json`. No pickle.

A checkpoint is written beside its place, flushed and renamed, so a `step-N` that can be seen is whole. It says for
every tensor which elements of which parameter it holds; any world size and any strategy reads its own pieces from that.
"""

from shoal.checkpoint.export import Exported, export
from shoal.checkpoint.facts import Meta
from shoal.checkpoint.keep import check_keep, keep_newest
from shoal.checkpoint.manifest import FORMAT, Entry, File, Manifest, Param
from shoal.checkpoint.read import Reader, inspect, latest, verify
from shoal.checkpoint.together import Share
from shoal.checkpoint.write import Piece, save

__all__ = [
    "FORMAT",
    "Entry",
    "Exported",
    "File",
    "Manifest",
    "Meta",
    "Param",
    "Piece",
    "Reader",
    "Share",
    "check_keep",
    "export",
    "inspect",
    "keep_newest",
    "latest",
    "save",
    "verify",
]
