"""Problem scripts: each states one problem, solves it with PETSc options and returns a number.

python -m problems.burgers -help
"""

import os
import sys

if sys.argv[0] == "-m":  # `python -m problems.NAME`: PETSc must see the command line when it starts
    import petsc4py

    for option, name in zip(sys.argv, sys.argv[1:]):
        # PETSc would end in a traceback.
        if option == "-options_file" and not (os.path.isfile(name) and os.access(name, os.R_OK)):
            got = f"{name}, which is no file that can be read"
            print(f"error: -options_file: got {got}; legal: a file of options", file=sys.stderr)
            sys.exit(2)
    words = [word for word in sys.argv[1:] if word not in ("-help", "--help", "-h")]  # see script.py
    petsc4py.init(["problems", *words])
