"""Speed and memory of the layers against what a user has without them: `pytest benchmarks/`."""
