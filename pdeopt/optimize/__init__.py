"""Optimisers: each says which way; `iterate` is their one loop."""
