"""What running a model takes, by arithmetic: memory by part, speed, cost, and what would make it fit. Imports no torch."""
