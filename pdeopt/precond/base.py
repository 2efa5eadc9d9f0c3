"""The base of all preconditioners: the contexts of PETSc PCs of type `python`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from petsc4py import PETSc

from pdeopt.core.errors import together
from pdeopt.core.settings import Settings


class Preconditioner(ABC):
    """An approximate inverse P^-1 of a matrix, which PETSc sets up, applies, shows and frees.

    A preconditioner is four verbs:

    - `initialize(pc)`, once: options are read;
    - `update(pc)`, at first and whenever the matrix has changed: factors, coarser levels, inner solvers are made;
    - `apply(pc, x, y)`, at each iteration: y = P^-1 x;
    - `view(pc, viewer)`, for `-ksp_view`.

    PETSc's own verbs (setUp, apply, applyTranspose, view, destroy) are made of these. All are collective on the
    communicator of the PC. x and y are vectors in the layout of the matrix: for a KKT matrix a rank holds its steps'
    [u | z | p | lam], see `KKTLayout`. A rank may own no steps where levels of a time hierarchy have fewer steps than
    there are ranks; `blocks_of` gives None there, the vectors are empty, and `apply` ends with `leave(y)`.

    The matrix is `pc.getOperators()[1]`. Behind a KKT matrix, shell or assembled, `operator_of(matrix)` finds the
    `KKTOperator` and `blocks_of(matrix)` the matrices of its steps. A context never holds the matrix that holds it.

    An own preconditioner of a KKT matrix, diag(W, S)^-1 with S = (A W^-1 A') step by step:

        class StepByStep(Preconditioner):
            "diag(W, A W^-1 A')^-1."

            def update(self, pc):
                self.blocks = blocks_of(pc.getOperators()[1])
                self.steps = step_solver(self.blocks.A)

            def apply(self, pc, x, y):
                g, c = self.blocks.layout.kkt_fields(x)
                lam = self.steps.solve(self.blocks.state.multiply(self.steps.solve(c)), transpose=True)
                self.blocks.layout.pack(y, *self.blocks.inverse(g), lam)

    It is used by `ksp.getPC().setType("python")` and `ksp.getPC().setPythonContext(StepByStep())`, or from the command
    line by `-sqp_kkt_precond none -sqp_kkt_pc_type python -sqp_kkt_pc_python_type module.StepByStep`.

    Attributes:
        reads: the groups of options that it reads, for -help.
        prefix: of its options; set by `initialize`.

    Raises:
        InputError: `initialize` or `update`, for options that are not legal or a matrix of another kind.
        SolveFailure: `update`, where factors do not exist. What one rank raises, all ranks raise: `update` may fail
            on one rank as long as it calls nothing collective afterwards.
    """

    reads: ClassVar[tuple[type[Settings], ...]] = ()
    prefix: str
    _is_initialized = False
    _owned: tuple[Callable[[], object], ...] = ()

    def initialize(self, pc: PETSc.PC) -> None:
        """Read options, whose prefix is `self.prefix`. Called once, before the first `update`. Collective."""
        self.prefix = pc.getOptionsPrefix() or ""

    @abstractmethod
    def update(self, pc: PETSc.PC) -> None:
        """Prepare `apply` for the present matrix, `pc.getOperators()[1]`. Collective.

        What the update before gave to `own` has been freed.

        Raises:
            SolveFailure: the preconditioner does not exist at this point.
        """

    @abstractmethod
    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Write P^-1 x into y, whatever y was; x stays as it is. Collective."""

    def applyTranspose(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = P^-T x: KKT matrices are symmetric, and so are their preconditioners, unless they say otherwise."""
        self.apply(pc, x, y)

    def view(self, pc: PETSc.PC, viewer: PETSc.Viewer) -> None:
        """Print what a reader of `-ksp_view` should know, by `tell` and `view_inner`. Collective.

        Here it is the first line of the docstring.
        """
        self.tell(pc, viewer, (type(self).__doc__ or "").split("\n")[0])

    # -- what subclasses use -------------------------------------------------------------------------------

    def own(self, *free: Callable[[], object]) -> None:
        """Functions that free what `update` has made: called before the next update, and with the PC; the last first.

        (petsc4py's objects are not freed by garbage collection: `self.own(ksp.destroy)`.)
        """
        self._owned = (*reversed(free), *self._owned)

    def tell(self, pc: PETSc.PC, viewer: PETSc.Viewer, text: str | None) -> None:
        """Print lines by the viewer of `view`: the text of the first rank that has one. Collective."""
        if viewer.getType() != PETSc.Viewer.Type.ASCII:
            return
        texts = pc.getComm().tompi4py().allgather(text)
        for line in next((each for each in texts if each is not None), "").splitlines():
            viewer.printfASCII(f"  {line}\n")

    def view_inner(self, pc: PETSc.PC, viewer: PETSc.Viewer, solver: PETSc.KSP | PETSc.PC | None) -> None:
        """Print a nested solver by the viewer of `view`; None on ranks that do not have it. Collective."""
        if viewer.getType() != PETSc.Viewer.Type.ASCII:
            return
        everywhere = solver is not None and solver.getComm().getSize() == viewer.getComm().getSize()
        comm = PETSc.COMM_SELF if solver is None else solver.getComm()
        part = viewer if everywhere else viewer.getSubViewer(comm)
        if solver is not None:
            part.pushASCIITab()
            solver.view(part)
            part.popASCIITab()
        if not everywhere:
            viewer.restoreSubViewer(part)
            viewer.flush()

    # -- what PETSc calls ----------------------------------------------------------------------------------

    def setUp(self, pc: PETSc.PC) -> None:
        """`initialize` at the first time, then `update`; a failure on one rank is one on all."""
        if not self._is_initialized:
            self.initialize(pc)
            self._is_initialized = True
        self._free()
        together(pc.getComm().tompi4py(), lambda: self.update(pc))

    def destroy(self, pc: PETSc.PC) -> None:
        """Free what the preconditioner owns."""
        self._free()

    def _free(self) -> None:
        for free in self._owned:
            free()
        self._owned = ()
