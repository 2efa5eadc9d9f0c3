"""Preconditioners for KKT operators, as PETSc Python PCs."""
