"""The same Llama, tuned: adapters as data."""
