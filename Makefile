# All that a user, or a continuous-integration machine, runs. `make` alone lists the targets.

# The Python whose PETSc is used if it has one, and an index of CPU builds of PyTorch if PyPI's is
# not wanted (its Linux builds bring CUDA along).
PYTHON ?= python3
TORCH_INDEX ?=
# The main problem: optimal control of the Burgers equation.
DEMO ?= -nx 128 -nt 256 -solver sqp -sqp_monitor -plot build/burgers.png -summary build/burgers.json
# Two tests at a time, on cores of their own: make test WORKERS= runs them one after the other.
WORKERS ?= -n 2 --dist loadgroup
# More for pytest: make test PYTEST="-k burgers -x"
PYTEST ?=

# The share of the stress tests, and which of them are drawn.
STRESS ?= 1
STRESS_SEED ?= 0

# One thread a rank: the ranks are the parallelism, and threads of several would fight for cores.
export OMP_NUM_THREADS = 1
export OPENBLAS_NUM_THREADS = 1
# Open MPI refuses root, as which containers run, more ranks than cores, and in a container prints
# errors of a copy mechanism that is forbidden there; it pins two runs at a time to the same core.
export OMPI_ALLOW_RUN_AS_ROOT = 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
export OMPI_MCA_rmaps_base_oversubscribe = 1
export OMPI_MCA_hwloc_base_binding_policy = none
export OMPI_MCA_btl_vader_single_copy_mechanism = none
# Ranks that wait hand their core on: with more ranks than cores, spinning is ten times slower.
export OMPI_MCA_mpi_yield_when_idle = 1
export PYTHON TORCH_INDEX

# The environment's mpiexec must be the first: it is the one of its PETSc.
python = PATH="$(CURDIR)/$(1)/bin:$$PATH" $(1)/bin/python
run = $(call python,.venv) -m

.DEFAULT_GOAL := help
.PHONY: help setup setup-fenicsx demo test test-all test-modern stress bench bench-gpu reference lint docs clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

setup:  ## install what is missing, into .venv
	@.ci/setup.sh

setup-fenicsx: setup  ## install DOLFINx, for weak forms in UFL, beside .venv's PETSc
	@.ci/fenicsx.sh

demo: setup  ## solve the main problem, with a plot and a summary in build/
	@mkdir -p build
	$(run) problems.burgers $(DEMO)

test: setup  ## run the tests but the slow ones
	$(run) pytest $(WORKERS) -m "not slow" $(PYTEST)

test-all: setup  ## run all tests
	$(run) pytest $(WORKERS) $(PYTEST)

# MPICH's ranks never hand a core on, so that workers with one core each would wait for each other.
test-modern:  ## run the tests with the newest PETSc and NumPy, in .venv-modern (compiles PETSc)
	@.ci/modern.sh
	$(call python,.venv-modern) -m pytest -m "not slow" $(PYTEST)

stress: setup  ## try all promises hundreds of times, for long; STRESS=0.25 for a quarter
	STRESS=$(STRESS) STRESS_SEED=$(STRESS_SEED) $(run) pytest $(WORKERS) tests/stress $(PYTEST)

bench: setup  ## time the main problem
	$(run) problems.benchmarks.burgers

bench-gpu: setup  ## time networks on a GPU, within five minutes; without one it says so
	$(run) problems.benchmarks.gpu

reference:  ## recompute the tests' reference values with Octave
	@. .ci/lib.sh && { command -v octave >/dev/null || debian octave; }
	cd tests/reference && for script in *.m; do octave --no-gui --quiet "$$script" || exit; done

lint: setup  ## check style and types
	$(run) ruff check
	$(run) ruff format --check
	$(run) mypy

docs: setup  ## build the documentation in build/docs
	@.ci/setup.sh docs
	$(run) sphinx -q -W -b html docs build/docs

clean:  ## remove what the targets made, but the environments
	rm -rf build .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find pdeopt nn_adapters problems tests docs -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## remove the environments, too
	rm -rf .venv .venv-modern
