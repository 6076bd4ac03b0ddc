"""A test that needs a GPU is skipped by name without one, and cannot pass by being skipped where there must be one."""

from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parent.parent / "conftest.py"
TESTS = """
import pytest

@pytest.mark.cuda("torch")
def test_torch():
    pass

@pytest.mark.cuda("torch", "onnxruntime")
def test_both():
    pass

def test_neither():
    pass
"""


@pytest.fixture
def outcomes(pytester, monkeypatch):
    """Run three tests on a machine where the libraries named cannot use the GPU."""

    def run(*missing, tests=TESTS, required=None):
        monkeypatch.delenv("RENORM_REQUIRE_CUDA", raising=False)
        if required:
            monkeypatch.setenv("RENORM_REQUIRE_CUDA", required)
        reasons = {library: f"{library} is blind" for library in missing}
        pytester.makeconftest(f"{CONFTEST.read_text()}\n\nwithout_cuda = lambda name: {reasons!r}.get(name, '')\n")
        pytester.makepyfile(tests)
        pytester.makeini("[pytest]\nmarkers = cuda\n")
        return pytester.runpytest_inprocess("-rsE", "-p", "no:cacheprovider", "-p", "no:xdist")

    return run


def test_with_a_gpu_every_test_runs(outcomes):
    outcomes().assert_outcomes(passed=3)
    outcomes(required="1").assert_outcomes(passed=3)


def test_without_a_gpu_tests_that_need_it_are_skipped_by_name(outcomes):
    done = outcomes("torch", "onnxruntime")
    done.assert_outcomes(passed=1, skipped=2)
    done.stdout.fnmatch_lines("SKIPPED *: torch is blind")


def test_an_onnxruntime_for_the_cpu_on_a_machine_with_a_gpu_leaves_the_tests_of_torch(outcomes):
    done = outcomes("onnxruntime")
    done.assert_outcomes(passed=2, skipped=1)
    done.stdout.fnmatch_lines("SKIPPED *: onnxruntime is blind")


def test_where_a_gpu_is_required_they_fail_instead(outcomes):
    done = outcomes("onnxruntime", required="1")
    done.assert_outcomes(passed=2, errors=1)
    done.stdout.fnmatch_lines("*RENORM_REQUIRE_CUDA=1, but onnxruntime is blind*")


@pytest.mark.parametrize("arguments", ["", "()", "('cuda')"])
def test_a_marker_that_names_no_library_is_an_error(outcomes, arguments):
    tests = f"import pytest\n\n@pytest.mark.cuda{arguments}\ndef test_one():\n    pass\n"
    done = outcomes(tests=tests)
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines("*expected at least one of ('torch', 'onnxruntime')*")
