"""What is promised, tried many times: `make stress` runs all of it, the suite a small share of each."""
