"""``python -m lkconv`` prints what was built, what this machine runs, and what the CUDA kernels need."""

import lkconv
from lkconv import kernel_resources

info = lkconv.build_info()
print(info)
if info.kernels:
    print(kernel_resources.table(info.kernels))
