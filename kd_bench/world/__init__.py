"""The embedded visual world: procedural images, ten benchmarks about them, training data."""
