"""What this host has, and whether hosts can work together: `shoal doctor`. Only carriers are asked through torch."""
