"""`python -m shoal`, for where the script `shoal` is not on the path."""

from shoal.cli import main

main()
