#!/bin/sh
# `make setup-fenicsx`: DOLFINx, for weak forms, beside the PETSc of .venv; does nothing where it is there already.
#
# DOLFINx is compiled against one PETSc and one MPI: Debian's for Debian's PETSc, conda's for conda's. With an own build
# of PETSc it is built by hand, too.
set -eu
cd "$(dirname "$0")/.."
. .ci/lib.sh

python=$PWD/.venv/bin/python
check='import dolfinx, ufl; print("DOLFINx", dolfinx.__version__)'
if "$python" -c "$check" 2>/dev/null; then exit 0; fi

# Debian's DOLFINx is found where its PETSc is, a folder that .venv/petsc.pth names.
if grep -qs '^/usr/lib/petscdir/' .venv/lib/python3*/site-packages/petsc.pth && debian python3-dolfinx-real; then
    "$python" -c "$check"
    exit 0
fi
cat >&2 <<'EOF'
pdeopt: no DOLFINx for the PETSc of .venv, and no way to install it here. The ways out:
  * Debian 12, as root or with sudo, with Debian's PETSc: run make setup-fenicsx again;
  * conda:      conda install -c conda-forge fenics-dolfinx, with the environment active that
                .venv was made from, then make distclean and make setup-fenicsx;
  * own build:  build DOLFINx with the petsc4py of your PETSC_DIR, and put it on the same path.
docs/forms.md says more.
EOF
exit 1
