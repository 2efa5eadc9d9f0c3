"""PyTorch modules as transient constraints: layers are time steps, weights are controls."""
