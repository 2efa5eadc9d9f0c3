"""Problem scripts: each states one problem, solves it with PETSc options and returns a number.

python -m problems.burgers -help
"""

import sys

if sys.argv[0] == "-m":  # `python -m problems.NAME`: PETSc must see the command line when it starts
    import petsc4py

    for option, name in zip(sys.argv, [*sys.argv[1:], ""]):
        if option == "-options_file":
            try:
                with open(name, encoding="utf-8") as file:
                    file.read(10**6)
            except (OSError, UnicodeDecodeError) as error:  # PETSc would end in a traceback
                print(f"error: -options_file: got {name} ({error}); legal: a file of options", file=sys.stderr)
                sys.exit(2)
    words = [word for word in sys.argv[1:] if word not in ("-help", "--help", "-h")]  # see script.py
    petsc4py.init(["problems", *words])
