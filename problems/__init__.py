"""Problem scripts: each states one problem, solves it with PETSc options and returns a number.

python -m problems.burgers -help
"""

import sys

if sys.argv[0] == "-m":  # `python -m problems.NAME`: PETSc must see the command line when it starts
    import petsc4py

    words = [word for word in sys.argv[1:] if word not in ("-help", "--help", "-h")]  # see script.py
    petsc4py.init(["problems", *words])
