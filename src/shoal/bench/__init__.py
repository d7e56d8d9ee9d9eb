"""`shoal bench`: a script's own job with several workers and with one, on one card."""
