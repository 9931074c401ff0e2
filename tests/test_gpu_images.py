"""CUDA's rules for which GPU runs which machine code and PTX."""

import pytest

from lkconv.gpu_images import OLDEST, reason_against, runs

DEFAULT = ["sm_80", "sm_90a", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("image", "can", "cannot"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (8, 7)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0)]),
        ("sm_87", [(8, 7)], [(8, 9)]),
        ("sm_90a", [(9, 0)], [(9, 1), (10, 0), (8, 9)]),
        ("sm_100", [(10, 0), (10, 3)], [(10, 1), (11, 0), (12, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(12, 0)]),
        ("sm_120", [(12, 0), (12, 1)], [(10, 0)]),
        ("compute_80", [(8, 0), (8, 7), (9, 0), (12, 1)], [(7, 5)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
        ("compute_100f", [(10, 3)], [(12, 0)]),
    ],
)
def test_which_gpu_runs_an_image(image, can, cannot):
    assert [c for c in can + cannot if runs(image, c)] == can


@pytest.mark.parametrize(
    "capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)]
)
def test_the_default_images_serve(capability):
    assert reason_against(DEFAULT, capability) is None


def test_reasons_name_both_sides_and_what_to_do():
    compiled = f"compiled for {', '.join(DEFAULT)}, this GPU is "
    assert reason_against(DEFAULT, (7, 5)) == f"{compiled}sm_75: the kernels need sm_80 or newer"
    rebuild = "build lkconv with TORCH_CUDA_ARCH_LIST=11.0"
    assert reason_against(DEFAULT, (11, 0)) == f"{compiled}sm_110: {rebuild}"


def test_an_image_for_an_older_gpu_does_not_help_it():
    assert OLDEST == (8, 0) and "sm_80 or newer" in reason_against(["sm_75", "compute_75"], (7, 5))
