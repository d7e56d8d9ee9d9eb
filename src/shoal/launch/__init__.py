"""Finding one's place among the ranks, and `shoal run`. Nothing here imports torch."""
