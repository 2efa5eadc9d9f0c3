"""Domains of any shape: points inside and on the boundary of meshes, and factors that vanish on polygons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nn_adapters.pinn.points import Intervals
from pdeopt.core.errors import InputError

#: Meshes of scikit-fem whose cells are simplices, or are cut in two.
MESHES = ("MeshLine1", "MeshTri1", "MeshQuad1", "MeshTet1")


class MeshDomain:
    """Uniformly distributed points inside a mesh of scikit-fem, and on its boundary; it serves as a sampler, too.

    Quadrilaterals are cut in two. A cell is drawn by its size, and a point of it uniformly: by the gaps between sorted
    random numbers (L. Devroye, Non-uniform random variate generation, 1986, chapter 5.2).

    Args:
        mesh: a mesh of straight cells.

    Raises:
        InputError: another kind of mesh, or cells without a size.

    Example:
        >>> domain = MeshDomain(skfem.MeshTri.load("part.msh"))
        >>> x, (edge, normal) = domain(2000, seed=0), domain.boundary(300, seed=1)
    """

    def __init__(self, mesh: Any) -> None:
        kind = type(mesh).__name__
        if kind not in MESHES:
            raise InputError("mesh of a domain", kind, f"{' | '.join(MESHES)} of scikit-fem")
        p, cells = np.asarray(mesh.p, float), np.asarray(mesh.t)
        if kind == "MeshQuad1":
            cells = np.concatenate([cells[[0, 1, 2]], cells[[0, 2, 3]]], 1)
        self._cells = p[:, cells].transpose(2, 1, 0)  # (cells, corners, inputs)
        outer = mesh.boundary_facets()
        self._facets = p[:, mesh.facets[:, outer]].transpose(2, 1, 0)
        middles = p[:, mesh.t[:, mesh.f2t[0, outer]]].mean(1).T
        self._normals = _normals(self._facets, middles)
        if not _sizes(self._cells).min() > 0.0:
            raise InputError("mesh of a domain", "cells without a size", "cells with one")

    def __call__(self, n: int, box: Intervals | None = None, seed: int = 0) -> Tensor:
        """n points inside, (n, inputs).

        Args:
            box: not used: that of other samplers.
            seed: of the random numbers.
        """
        return torch.from_numpy(_drawn(self._cells, n, np.random.default_rng(seed))[0])

    def boundary(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """n points of the boundary, (n, inputs), and the outward normals there."""
        points, which = _drawn(self._facets, n, np.random.default_rng(seed))
        return torch.from_numpy(points), torch.from_numpy(self._normals[which])


def _drawn(simplices: Any, n: int, generator: Any) -> tuple[Any, Any]:
    """n uniform points of simplices, (cells, corners, inputs), and in which ones they are."""
    if n < 1:
        raise InputError("points", n, "an integer >= 1")
    size = _sizes(simplices)
    which = generator.choice(len(size), n, p=size / size.sum())
    cuts = np.sort(generator.random((n, simplices.shape[1] - 1)), 1)
    weights = np.diff(cuts, axis=1, prepend=0.0, append=1.0)
    return np.einsum("nc,nci->ni", weights, simplices[which]), which


def _sizes(simplices: Any) -> Any:
    """Lengths, areas or volumes, up to a common factor; 1 of points."""
    edges = simplices[:, 1:] - simplices[:, :1]
    return np.sqrt(np.linalg.det(edges @ edges.transpose(0, 2, 1)))


def _normals(facets: Any, inside: Any) -> Any:
    """Unit normals of facets, (n, inputs), that point away from points inside."""
    away = facets.mean(1) - inside
    edges = facets[:, 1:] - facets[:, :1]
    if edges.shape[1]:  # take off what is along the facet
        along = np.linalg.solve(edges @ edges.transpose(0, 2, 1), edges @ away[:, :, None])
        away = away - (edges.transpose(0, 2, 1) @ along)[:, :, 0]
    return away / np.linalg.norm(away, axis=1, keepdims=True)


class PolygonFactor:
    """A function of the plane that is 0 on the edges of a polygon, positive elsewhere, and |gradient| 1 on the edges.

    phi = 1 / (1/phi_1 + ... + 1/phi_k), with phi_i = (f^2 + ((t^2 + f^4)^1/2 - t)^2 / 4)^1/2 for edge i: f is the
    distance to its line, t is positive inside the circle around it (N. Sukumar, A. Srivastava, Comput. Methods Appl.
    Mech. Engrg. 389, 2022, eqs. (7) and (10)). Its second derivatives grow without bound toward the corners: keep
    points away from them, or weigh them less.

    Args:
        corners: in order, three or more, the last one joined to the first.

    Raises:
        InputError: fewer corners, or edges without a length.

    Example:
        >>> pinn = PINN(network, terms, "xy", factor=PolygonFactor([(0, 0), (2, 0), (1, 1)]))
    """

    def __init__(self, corners: Sequence[tuple[float, float]]) -> None:
        self.corners = torch.tensor(corners, dtype=torch.float64)
        if self.corners.ndim != 2 or self.corners.shape[1] != 2 or len(self.corners) < 3:
            raise InputError("corners of a polygon", f"shape {tuple(self.corners.shape)}", "(three or more, 2)")
        if not bool((self.corners.roll(-1, 0) - self.corners).norm(dim=1).min() > 0.0):
            raise InputError("corners of a polygon", "two neighbors at one place", "edges with a length")

    def __call__(self, x: Tensor) -> Tensor:
        """phi at points off the corners, (n, 2): (n,)."""
        first = self.corners.to(x.device)
        last = first.roll(-1, 0)
        edge = last - first
        length = edge.norm(dim=1)
        off = x[:, None, :] - first
        f = (off[..., 0] * edge[:, 1] - off[..., 1] * edge[:, 0]) / length
        middle = x[:, None, :] - 0.5 * (first + last)
        t = (0.25 * length.square() - middle.square().sum(-1)) / length
        square = f.square() + 0.25 * ((t.square() + f.square().square()).sqrt() - t).square()
        others = [torch.cat([square[:, :i], square[:, i + 1 :]], 1).prod(1) for i in range(len(length))]
        return square.prod(1).sqrt() / torch.stack(others, 1).sqrt().sum(1)

    def inside(self, x: Tensor) -> Tensor:
        """Which points, (n, 2), are in the polygon, (n,), by the number of edges to their right; for `within`."""
        corners = self.corners.to(x.device)
        (x1, y1), (x2, y2) = corners.T, corners.roll(-1, 0).T
        y = x[:, 1:]
        spans = (y1 > y) != (y2 > y)
        crossing = x1 + (y - y1) * (x2 - x1) / torch.where(y1 == y2, 1.0, y2 - y1)
        return (spans & (x[:, :1] < crossing)).sum(1) % 2 == 1
