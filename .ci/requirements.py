"""Print the requirements of setup.cfg that pip is to install, those of the named extras included.

petsc4py and mpi4py are left out: they must be the build that belongs to the PETSc and the MPI
at hand, which pip cannot know.
"""

import sys
from configparser import ConfigParser

config = ConfigParser()
config.read("setup.cfg")
lists = [config["options"]["install_requires"]]
lists += [config["options.extras_require"][extra] for extra in sys.argv[1:]]
for line in "\n".join(lists).split("\n"):
    if line and not line.startswith(("petsc4py", "mpi4py", "#")):
        print(line)
