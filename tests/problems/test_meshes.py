"""Mesh files: what is damaged is refused, and what is left describes the plane."""

import os

import numpy as np
import pytest
import skfem

from pdeopt.core.errors import InputError
from problems.shared.meshes import read_mesh

meshio = pytest.importorskip("meshio")

SQUARE = np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0.5, 0.4, 0]])
TRIANGLES = np.array([[0, 1, 4], [1, 2, 4], [2, 3, 4], [3, 0, 4]])


def written(path, points=SQUARE, cells=TRIANGLES, kind="triangle"):
    meshio.Mesh(points, {kind: np.asarray(cells)}).write(path)
    return str(path)


def moved(point, *place):
    points = SQUARE.copy()
    points[point] = place
    return points


WRONG = {
    "index": (dict(cells=[[0, 1, 7], [1, 2, 3]]), "a point that is none of the 5"),
    "negative index": (dict(cells=[[0, 1, -1]]), "a point that is none"),
    "nan": (dict(points=moved(1, np.nan, 0, 0)), "not finite"),
    "no plane": (dict(points=moved(1, 1, 0, 0.3)), "not in a plane"),
    "no area": (dict(points=moved(4, 0.5, 0, 0)), "without area"),
    "same point twice": (dict(cells=[[0, 1, 1], [1, 2, 3]]), "without area"),
    "not convex": (dict(points=moved(2, 0.1, 0.1, 0), cells=[[0, 1, 2, 3]], kind="quad"), "not convex"),
    "crossed": (dict(cells=[[0, 2, 1, 3]], kind="quad"), "not convex"),
    "folded": (dict(points=moved(4, 0.5, -0.4, 0)), "overlap"),
    "twice": (dict(cells=[*TRIANGLES, [0, 1, 4]]), "more than two|overlap"),
    "lines": (dict(cells=[[0, 1]], kind="line"), "cells none"),
    "curved": (dict(cells=[[0, 1, 2, 4, 3, 3]], kind="triangle6"), "cells triangle6"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_meshes_are_refused(tmp_path, case):
    words, match = WRONG[case]
    with pytest.raises(InputError, match=match):
        read_mesh(written(tmp_path / "f.vtk", **words))


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1]])
def test_cells_may_turn_either_way(tmp_path, order):
    cells = TRIANGLES.copy()
    cells[::2] = cells[::2, order]
    mesh = read_mesh(written(tmp_path / "f.vtk", cells=cells))
    assert isinstance(mesh, skfem.MeshTri1) and mesh.t.shape == (3, 4)


def test_meshes_of_the_library_are_right(tmp_path):
    for number, mesh in enumerate(
        (skfem.MeshTri.init_circle(3), skfem.MeshQuad().refined(3), skfem.MeshTri.init_lshaped().refined(2))
    ):
        mesh.save(tmp_path / f"{number}.msh")
        assert read_mesh(str(tmp_path / f"{number}.msh")).t.shape == mesh.t.shape


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.vtk")
    (tmp_path / "folder.vtk").mkdir()
    for name in ("pipe.vtk", "folder.vtk", f"{'x' * 5000}.vtk"):
        with pytest.raises(InputError, match="no file"):
            read_mesh(str(tmp_path / name))


def test_a_header_that_lies_allocates_nothing(tmp_path):
    head = "$MeshFormat\n4.1 0 8\n$EndMeshFormat\n$Nodes\n1 {0} 1 {0}\n2 1 0 {0}\n1\n0 0 0\n$EndNodes\n"
    (tmp_path / "f.msh").write_text(head.format(4_000_000_000))
    with pytest.raises(InputError, match="meshio can read"):
        read_mesh(str(tmp_path / "f.msh"))
