#!/bin/sh
# setup.sh [docs]: make .venv, with PETSc in it, ready; does nothing where it is ready already.
#
# PETSc comes from the active Python if that has petsc4py (conda, an own build), otherwise from
# Debian's packages. The rest comes from PyPI.
set -eu
cd "$(dirname "$0")/.."
. .ci/lib.sh

venv=$PWD/.venv
inputs="setup.cfg .ci/lib.sh .ci/setup.sh .ci/debian12.txt"
export PIP_DISABLE_PIP_VERSION_CHECK=1

pip() { "$venv/bin/python" -m pip "$@"; }
# extras NAME...: pip's packages of setup.cfg, in the versions that suit the NumPy of PETSc.
extras() {
    list=$("$venv/bin/python" .ci/requirements.py "$@")
    printf '%s\n' "$list" | pip install -q -c "$venv/constraints.txt" -r /dev/stdin
}

give_up() {
    cat >&2 <<'EOF'
pdeopt: no PETSc, and no way to install it here. The ways out:
  * Debian 12, as root or with sudo: run make again, it installs PETSc;
  * conda:      conda install -c conda-forge petsc4py mpi4py, with the environment active;
  * own build:  put the petsc4py of your PETSC_DIR on PYTHONPATH, or name the interpreter
                that has it: make PYTHON=/path/to/python3;
  * PyPI:       pip install mpich petsc petsc4py mpi4py (compiles PETSc).
Then run make again; docs/install.md says more.
EOF
    exit 1
}

# Where the active Python finds its packages: with petsc4py, or nothing without it.
active_paths() {
    command -v "$python" >/dev/null && "$python" - 2>/dev/null <<'EOF'
import os, sys, sysconfig
import mpi4py, numpy, petsc4py
from petsc4py import PETSc

stdlib = {sysconfig.get_path("stdlib"), sysconfig.get_config_var("DESTSHARED")}
print(*(p for p in sys.path if os.path.isdir(p) and p not in stdlib), sep="\n")
EOF
}

# use PYTHON MPIEXEC PATHS: make .venv of this Python, with these folders on its path.
#
# The folders are named in a .pth file, as --system-site-packages would show those of the system
# only: not those of an active virtual environment, of PYTHONPATH, or Debian's for petsc4py.
# mpiexec is put beside python, as a machine may have several and only one is petsc4py's.
use() {
    "$1" -m venv --system-site-packages "$venv"
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf '%s\n' "$3" >"$site/petsc.pth"
    printf '#!/bin/sh\nexec "%s" "$@"\n' "$2" >"$venv/bin/mpiexec"
    chmod +x "$venv/bin/mpiexec"
}

install() {
    # An activated .venv is not the active Python: it is what is being made.
    PATH=$(printf %s "$PATH" | tr : '\n' | grep -vxF "$venv/bin" | paste -s -d : -)
    python=${PYTHON:-python3}

    if paths=$(active_paths); then
        say "PETSc of $(command -v "$python")"
        folder=$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))')
        mpiexec=$(PATH=$folder:${PETSC_DIR:-}/${PETSC_ARCH:-}/bin:$PATH command -v mpiexec) ||
            mpiexec=mpiexec-is-missing
        use "$python" "$mpiexec" "$paths"
        # Its NumPy stays, and its PyTorch if there is one.
        "$venv/bin/python" -c 'import numpy; print(f"numpy=={numpy.__version__}")' \
            >"$venv/constraints.txt"
        "$python" -c 'import torch' 2>/dev/null ||
            grep '^torch==' .ci/debian12.txt >>"$venv/constraints.txt"
    elif grep -qsx 'VERSION_ID="12"' /etc/os-release && grep -qsx 'ID=debian' /etc/os-release &&
        debian python3-petsc4py python3-mpi4py python3-venv libopenblas0-serial; then
        # Debian keeps petsc4py off Python's path, in a folder named for the version of PETSc.
        real=$(dpkg-query -W -f '${Package}\n' 'python3-petsc4py-real3*' | head -n 1)
        paths=$(dpkg -L "$real" | sed -n 's,/petsc4py/__init__.py$,,p')
        say "PETSc of Debian, $paths"
        use /usr/bin/python3 /usr/bin/mpiexec.openmpi "$paths"
        cp .ci/debian12.txt "$venv/constraints.txt"
    else
        give_up
    fi

    say "Python packages (PyTorch is large: this may take minutes)"
    if [ -n "${TORCH_INDEX:-}" ]; then
        pip install -q -c "$venv/constraints.txt" --index-url "$TORCH_INDEX" torch
    fi
    extras plot hdf5 checkpoints fem nn video fast dev
    pip install -q --no-deps -e .
    say "ready"
    "$venv/bin/mpiexec" -n 2 "$venv/bin/python" .ci/check.py
}

# shellcheck disable=SC2086  # several files
if ! { [ -x "$venv/bin/python" ] && current "$venv/stamp" $inputs; }; then
    install
    mark "$venv/stamp" $inputs
fi
for extra; do
    # shellcheck disable=SC2086
    current "$venv/stamp-$extra" $inputs && continue
    say "Python packages: $extra"
    extras "$extra"
    # shellcheck disable=SC2086
    mark "$venv/stamp-$extra" $inputs
done
