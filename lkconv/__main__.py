"""``python -m lkconv`` prints what was built and what this machine runs."""

import lkconv

print(lkconv.build_info())
