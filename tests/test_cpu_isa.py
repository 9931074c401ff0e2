"""Every instruction set and every switch runs the same tests, each in a process of its own."""

import pytest

import cases
import lkconv._C
from processes import run_pytest, run_python

ISAS = ["baseline", "avx2", "avx512", "amx"]
DEPTHWISE = "tests/test_cpu_depthwise_conv2d.py"
LAYOUTS = "tests/test_cpu_layouts.py"
IN_PLACE = "tests/test_cpu_in_place.py"
SEGMENTED = "tests/test_group_mix_segmented.py"
PER_CASE = 12  # passes times dtypes


def usable_isas() -> list[str]:
    """From the plainest to the best of this processor."""
    detected = lkconv._C.detected_isa()
    return [isa for isa in ISAS if ISAS.index(isa) <= ISAS.index(detected)]


def test_detected_isa_is_compiled():
    assert lkconv._C.detected_isa() in lkconv._C.compiled_isas()
    assert "baseline" in lkconv._C.compiled_isas()
    assert lkconv._C.compiler()


@pytest.mark.parametrize("cap", [*ISAS, ""])
def test_cap_limits_the_active_isa(cap):
    printed = run_python(
        "import torch, lkconv._C as C; print(C.active_isa())", env={"LKCONV_MAX_CPU_ISA": cap}
    )
    usable = usable_isas()
    assert printed.strip() == (cap if cap in usable else usable[-1])


def test_unknown_cap_is_an_error_that_names_the_choices():
    printed = run_python(
        """
        import torch, lkconv._C as C
        try:
            C.active_isa()
        except ValueError as error:
            print(error)
        """,
        env={"LKCONV_MAX_CPU_ISA": "sse9"},
    )
    assert "baseline, avx2, avx512 or amx" in printed and "sse9" in printed


# The best one runs in every other test.
@pytest.mark.slow
@pytest.mark.parametrize("isa", [isa for isa in usable_isas() if isa != lkconv._C.active_isa()])
def test_core_cases_under_isa(isa):
    passed = run_pytest(DEPTHWISE, "-k", "test_core", env={"LKCONV_MAX_CPU_ISA": isa})
    assert passed == PER_CASE * len(cases.CORE)


@pytest.mark.slow
@pytest.mark.parametrize("isa", [isa for isa in usable_isas() if isa != lkconv._C.active_isa()])
def test_layouts_under_isa(isa):
    passed = run_pytest(LAYOUTS, "-k", "test_input_layouts", env={"LKCONV_MAX_CPU_ISA": isa})
    assert passed >= PER_CASE * len(cases.LAYOUTS)


@pytest.mark.slow
def test_without_fft():
    passed = run_pytest(DEPTHWISE, "-k", "test_core or test_large", env={"LKCONV_FFT": "0"})
    assert passed == PER_CASE * (len(cases.CORE) + len(cases.LARGE))


@pytest.mark.slow
def test_without_products_of_pairs():
    passed = run_pytest(IN_PLACE, "-k", "bfloat16", env={"LKCONV_BF16_PRODUCTS": "0"})
    assert passed >= 800


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["direct", "planar"])
@pytest.mark.parametrize("isa", [isa for isa in usable_isas() if isa != "amx"])
def test_algorithms_where_the_planner_would_choose_another(algorithm, isa):
    env = {"LKCONV_ALGORITHM": algorithm, "LKCONV_MAX_CPU_ISA": isa}
    passed = run_pytest(DEPTHWISE, "-k", "test_core and not backward_weight", env=env)
    assert passed == PER_CASE * len(cases.CORE) * 2 // 3


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "layout"), [("direct", "channels_last"), ("planar", "contiguous")])
def test_kernels_in_place_where_the_planner_would_choose_another(algorithm, layout):
    passed = run_pytest(IN_PLACE, "-k", f"test_{layout}", env={"LKCONV_ALGORITHM": algorithm})
    assert passed >= 9 * 3 * 11


@pytest.mark.slow
@pytest.mark.parametrize("isa", [isa for isa in usable_isas() if isa != "amx"])
@pytest.mark.parametrize("algorithm", ["", "direct"])
def test_segments_under_isa(algorithm, isa):
    env = {"LKCONV_MAX_CPU_ISA": isa, "LKCONV_ALGORITHM": algorithm}
    # The FFT is there for windows whose sums are too long for the limits of direct ones.
    chosen = "(test_values or test_a_segment or test_input_layouts) and not large"
    assert run_pytest(SEGMENTED, "-k", chosen, env=env) > 200
