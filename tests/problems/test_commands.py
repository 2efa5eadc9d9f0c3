"""What users type: exit codes, and bad input of every kind as one line before any work."""

from importlib import import_module

import pytest

import pdeopt as po
from nn_adapters.losses.network import NetworkLoss
from problems.shared.command_line import start
from tests.helpers.support import python

BURGERS = ("burgers", "-nx", "16", "-nt", "8")


@pytest.fixture
def leave(monkeypatch, options):
    """`leave(script, words...)` runs the script as a program in this process; its exit code, 0 where it returns."""

    def run(script, *words):
        words = list(map(str, words))
        monkeypatch.setattr("sys.argv", [script, *words])
        for name, value in zip(words[::2], words[1::2]):
            options(**{name[1:]: value})
        try:
            start(import_module(f"problems.{script}").main)
        except SystemExit as left:
            return left.code
        return 0

    return run


# -- converged, or not -----------------------------------------------------------------------------------------

DIGITS = ("mnist", "-data", "digits", "-layers", "4", "-channels", "2", "-epochs", "3", "-samples", "200")
#: Runs, their exit codes, and what they say.
ENDS = {
    "converged": ((*BURGERS, "-solver", "newton"), 0, ""),
    "not finite": ((*BURGERS, "-nu", "1e300", "-solver", "newton"), 3, "not converged: diverged nan"),
    "iterations": ((*BURGERS, "-sqp_max_it", "1"), 3, "max_it"),
    "tao": ((*BURGERS, "-solver", "tao", "-sqp_max_it", "1"), 3, "max_it"),
    "asked for 0": ((*BURGERS, "-sqp_max_it", "1", "-error_if_not_converged", "false"), 0, "not converged"),
    "epochs": (("peaks", "-layers", "4", "-epochs", "0"), 0, ""),
    "a loss that is not finite": ((*DIGITS, "-tikhonov", "1e300"), 3, "a smaller -lr"),
    "samples": (("logistic", "-samples", "60", "-features", "5", "-opt_max_it", "1"), 3, "max_it"),
    "epochs of ADMM": (("admm_mnist", "-samples", "60", "-widths", "6", "-epochs", "2"), 0, ""),
    "seconds of ADMM": (
        ("admm_mnist", "-samples", "60", "-widths", "6", "-epochs", "1000000", "-max_cpu_seconds", "0.01"),
        0,
        "",
    ),
    "weights of ADMM that blow up": (
        ("admm_mnist", "-samples", "60", "-widths", "6", "-split_step", "1e30"),
        3,
        "iteration 2, block",
    ),
    "regression": (("function_regression", "-steps", "2"), 0, ""),
    "regression that blows up": (
        ("function_regression", "-steps", "30", "-lr", "1e200", "-method", "adam"),
        3,
        "a smaller -lr",
    ),
    "points": (("pinn_burgers", "-points", "30", "-width", "3", "-opt_max_gradients", "5"), 0, ""),
}


@pytest.mark.parametrize("case", ENDS)
def test_exit_codes_say_how_a_run_ended_and_the_files_are_written(case, tmp_path, leave, capfd):
    (script, *words), code, said = ENDS[case]
    assert leave(script, *words, "-summary", tmp_path / "s.json") == code
    out = capfd.readouterr().out
    assert said in out and ("not converged" in out) == bool(said), out
    assert (tmp_path / "s.json").stat().st_size > 0


# -- bad input ---------------------------------------------------------------------------------------------------

HUGE = 10**9
#: Words, and what the message names.
BAD = {
    "steps": ((*BURGERS[:3], "-nt", HUGE), r"-nt 1000000000, which needs about .* TB, .* are free"),
    "beyond 64 bits": (("burgers", "-nx", "9" * 20), "-nx.*18 digits"),
    "an underscore": (("burgers", "-nx", "1_000"), "-nx.*an integer"),
    "other digits": (("burgers", "-nx", "١٢"), "-nx.*an integer"),
    "an underscore in a float": (("burgers", "-alpha", "1_0.0"), "-alpha.*number"),
    "a stray word": ((*BURGERS, "stray"), "'stray', which belongs to no option"),
    "two words": (("burgers", "-nx", 16, 17), "'17', which belongs to no option"),
    "no name of a file": ((*BURGERS, "-summary"), "-summary.*nothing"),
    "no number": (("burgers", "-nx"), "-nx.*nothing"),
    "tao_type": ((*BURGERS, "-solver", "tao", "-tao_type", "foo"), r"-tao_type.*blmvm \| .*lmvm"),
    "ksp_type": ((*BURGERS, "-sqp_kkt_ksp_type", "foo"), r"-sqp_kkt_ksp_type.*fgmres \| "),
    "pc_type": ((*BURGERS, "-sqp_kkt_pc_type", "foo"), r"-sqp_kkt_pc_type.*fieldsplit \| "),
    "a nested type": ((*BURGERS, "-tao_nls_ksp_type", "foo"), r"-tao_nls_ksp_type.*stcg \| "),
    "a line search": ((*BURGERS, "-tao_ls_type", "foo"), r"-tao_ls_type.*armijo \| .*more-thuente"),
    "a package": ((*BURGERS, "-sqp_kkt_pc_factor_mat_solver_type", "foo"), "petsc"),
    "a type for other problems": ((*BURGERS, "-solver", "tao", "-tao_type", "pounders"), "-tao_type.*lmvm"),
    "no type": ((*BURGERS, "-tao_type"), "-tao_type.*nothing"),
    "python type": (
        (*BURGERS, "-solver", "tao", "-tao_type", "python", "-tao_python_type", "nope.Nope"),
        "-tao_python_type.*pdeopt.optimize.SPQN",
    ),
    "python preconditioner": ((*BURGERS, "-sqp_kkt_pc_python_type", "pdeopt.Nope"), "pdeopt.precond.WathenPC"),
    "a word for a number": ((*BURGERS, "-solver", "tao", "-tao_gatol", "abc"), "-tao_gatol.*number"),
    "a negative count": ((*BURGERS, "-solver", "tao", "-tao_max_it", "-4"), "-tao_max_it.*>= 0"),
    "a negative tolerance": ((*BURGERS, "-sqp_kkt_ksp_rtol", "-1"), "-sqp_kkt_ksp_rtol.*>= 0"),
    "mesh": (("heat", "-nx", 10**8), "-nx 100000000.*TB"),
    "Klein-Gordon": (("klein_gordon", "-nt", 10**12), "-nt.* PB"),
    "depth": (("box_init", "-depth", HUGE), "1000000000.* TB"),
    "seeds": (("box_init", "-seeds", HUGE), "-seeds.* TB"),
    "depth of a regression": (("function_regression", "-depth", HUGE), "-depth.* TB"),
    "widths": (("admm_mnist", "-widths", "8,,8"), "-widths.*500,500"),
    "a large width": (("admm_mnist", "-widths", f"{HUGE},{HUGE}"), "-widths.* EB"),
    "shares": (("admm_mnist", "-shares", "1,2"), "-shares.*1 numbers"),
    "a folder for peaks": (("peaks", "-data_dir", "FOLDER"), "FOLDER for peaks, which has no files"),
    "a folder for the control problem": (
        ("peaks", "-solver", "sqp", "-data_dir", "FOLDER"),
        "FOLDER for peaks, which has no files",
    ),
    "a folder for digits": (("mnist", "-data", "digits", "-data_dir", "FOLDER"), "FOLDER for digits.*mnist"),
    "a download of generated signals": (
        ("har_gru", "-data", "synthetic_har", "-fetch"),
        "a download for synthetic_har, which has no files",
    ),
    "data without files": (("admm_mnist", "-data", "mnist"), "mnist.*-data_dir"),
    "widths of K-FAC": (("kfac_mnist", "-widths", "8,x"), "-widths.*100,100"),
    "a large width of K-FAC": (("autoencoder", "-widths", HUGE), "-widths.* EB"),
    "a summary of another script": (("large_batch", "-beside", "README.md"), "-beside.*README.md.*-summary FILE"),
    "a scaling": (("large_batch", "-scaling", "cubic"), r"-scaling.*none \| linear \| sqrt"),
    "sizes of attacks": (("compress", "-sizes", "0.1,x"), "-sizes.*0.02,0.05"),
    "damping": (("kfac_mnist", "-kfac_damping", "0"), "-kfac_damping.*> 0"),
    "beta": (("admm_mnist", "-split_beta", "0"), "-split_beta.*> 0"),
    "width of a regression": (("function_regression", "-width", HUGE), "-width.* EB"),
    "points": (("pinn_burgers", "-points", 10**8), "-points.* GB"),
    "levels of points": (("pinn_burgers", "-point_levels", 1000), "-point_levels.*at most 14"),
    "channels": (("mnist", "-channels", 10**8), "-channels.* EB"),
    "layers": (("peaks", "-layers", HUGE), "-layers.* GB"),
    "hidden units": (("har_gru", "-hidden", HUGE), "-hidden.* EB"),
    "videos": (("video_gru", "-videos", HUGE), "-videos.* TB"),
    "nested": (("peaks", "-nested", 100000), "-nested.*1 to 9"),
    "pool": (("resnet_multilevel", "-data", "digits", "-samples", 40, "-pool", HUGE), "-pool.*1 to 8"),
    "levels": (("resnet_multilevel", "-levels", 100000), "-levels.*at most 6"),
    "width": (("resnet_multilevel", "-width", HUGE), "-width.* EB"),
    "levels of samples": (
        ("logistic", "-samples", 60, "-features", 5, "-optimizer", "mlvr", "-mlvr_levels", HUGE),
        "levels.*fewer",
    ),
    "dense matrix": (("pinn_burgers", "-points", 30, "-width", 300), "dense inverse Hessian.* TB"),
    "points with a kernel": (("kernel_ridge", "-samples", HUGE), "-samples.* memory|-samples.*B"),
    "data for a kernel": (("kernel_ridge", "-data", "nowhere"), "-data.*generated"),
    "bound of support vectors": (("kernel_svm", "-bound", 0), "-bound.*> 0"),
    "classes of support vectors": (("kernel_svm", "-data", "digits"), "10 classes"),
    "ridge": (("kernel_ridge", "-lambda", 0), "-lambda.*> 0"),
    "width of a kernel": (("kernel_ridge", "-width", -1), "-width.*> 0"),
    "smoothness of a kernel": (("kernel_ridge", "-kernel", "matern", "-smoothness", 1), "smoothness.*2.5"),
    "generated samples": (("logistic", "-samples", HUGE), "-samples.* TB"),
    **{
        f"no folder, {script}": ((script, *words, "-summary", "/nonexistent/x.json"), "-summary.*folder")
        for script, words in {
            "resnet_multilevel": ("-data", "digits", "-samples", 40, "-pool", 2),
            "logistic": (),
            "apts_mnist": ("-data", "digits"),
            "admm_mnist": (),
            "autoencoder": (),
            "peaks": (),
            "pinn_burgers": (),
            "box_init": (),
            "function_regression": (),
            "kernel_ridge": (),
            "kernel_svm": (),
        }.items()
    },
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_at_once(case, monkeypatch):
    (script, *words), message = BAD[case]
    monkeypatch.setattr(NetworkLoss, "value_and_gradient", None)  # no training
    with pytest.raises(po.InputError, match=message):
        import_module(f"problems.{script}").main([str(word) for word in words])


@pytest.mark.parametrize(
    "words, code, shown",
    [
        pytest.param((*BURGERS, "stray"), 2, "error: command line: got the word 'stray'", marks=pytest.mark.slow),
        ((*BURGERS, "-sqp_max_it", "1"), 3, ""),
    ],
)
def test_a_program_leaves_with_the_code_and_one_line(words, code, shown):
    done = python("-m", f"problems.{words[0]}", *words[1:])
    assert done.returncode == code and done.stderr.startswith(shown) and len(done.stderr.splitlines()) == bool(shown)
