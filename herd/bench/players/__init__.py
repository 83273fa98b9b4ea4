"""Who is measured: each in a process of its own (`herd.bench.worker`), all through the same few verbs."""
