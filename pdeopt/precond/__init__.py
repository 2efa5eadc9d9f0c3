"""Preconditioners as PETSc Python PCs: `-..._pc_type python -..._pc_python_type pdeopt.precond.NAME.CLASS`."""
