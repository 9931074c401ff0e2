"""``python -m lkconv.compat`` prints the folder to put where the old extension was expected."""

from lkconv.compat import directory

print(directory())
