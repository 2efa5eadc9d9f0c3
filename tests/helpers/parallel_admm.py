"""`problems.admm_mnist` on ranks with unequal shares, and a restart: `python -m tests.helpers.parallel_admm FOLDER`."""

import sys

from problems import admm_mnist

#: A short run in float64 messages.
TEXT = "-data digits -samples 200 -widths 12 -split_batch 50 -epochs 3 -precision double -split_precision float64"
WORDS = TEXT.split()

if __name__ == "__main__":
    folder = sys.argv[1]
    ranks = [*WORDS, "-shares", "2,0,1"]
    admm_mnist.main([*ranks, "-summary", f"{folder}/whole.json"])
    admm_mnist.main([*ranks, "-admm_max_it", "7", "-checkpoint", f"{folder}/c"])
    admm_mnist.main([*ranks, "-restart", f"{folder}/c", "-summary", f"{folder}/restarted.json"])
