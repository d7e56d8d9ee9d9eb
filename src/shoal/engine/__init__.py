"""The mechanism: units, the schedule, and one engine that runs a strategy's rules."""
