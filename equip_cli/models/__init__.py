"""Where a model's file comes from: the package itself, the hub, the Python package index, or random weights."""
