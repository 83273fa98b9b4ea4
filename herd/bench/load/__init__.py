"""Load on a server: requests as many clients send them, and what each of them waited for. Imports no torch."""
