"""`-solver sqp` of the training scripts: curve, limits, and what is refused."""

import json

import pytest

import pdeopt as po
from problems import har_gru, mnist, peaks


def trained(script, tmp_path, *words):
    file = tmp_path / "summary.json"
    accuracy = script.main(["-solver", "sqp", "-summary", str(file), *map(str, words)])
    summary = json.loads(file.read_text())
    assert summary["test_accuracy"] == accuracy
    return summary


def test_peaks_by_gauss_newton(tmp_path):
    words = ("-layers", 4, "-samples", 50, "-opt_max_it", 6)
    found = trained(peaks, tmp_path, *words)
    curve = found["curve"]
    assert len(curve) == 7 and curve[-1]["objective"] < 0.8 * curve[0]["objective"]
    assert set(curve[0]) == {"iteration", "work", "cpu_seconds", "objective", "test_accuracy"}
    # the start, a pass and some products a step, and twice the factors
    assert found["work"] == pytest.approx(1.0 + found["products"] + 4.0 + 6 * 1.0, abs=6 * 0.6)
    unknown = trained(peaks, tmp_path, *words, "-gn_states", "unknown")
    assert unknown["reduced_objective"] == pytest.approx(unknown["objective"], rel=0.2)


def test_a_spent_limit_is_no_failure(tmp_path):
    found = trained(peaks, tmp_path, "-layers", 2, "-samples", 20, "-max_cpu_seconds", 1e-6)
    assert found["steps"] == 0 and "max_cpu_seconds" in found["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("script, words", [(mnist, ("-layers", 2, "-channels", 2)), (har_gru, ("-hidden", 3))])
def test_other_networks_go_through_pytorch(script, words, tmp_path):
    found = trained(script, tmp_path, *words, "-samples", 6, "-opt_max_it", 1)
    assert found["curve"][1]["objective"] < found["curve"][0]["objective"]


def test_what_it_does_not_keep_is_refused(tmp_path):
    with pytest.raises(po.InputError, match="checkpoint"):
        peaks.main(["-solver", "sqp", "-checkpoint", str(tmp_path / "x.pt")])
