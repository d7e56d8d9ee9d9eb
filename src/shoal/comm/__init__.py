"""How bytes travel between ranks: one seam (`group`), several carriers behind it."""
