"""Methods that remove weights, neurons, heads or layers."""
