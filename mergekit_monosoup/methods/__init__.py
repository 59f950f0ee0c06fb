"""Merge methods: thin classes over `spectral` and `alignment`, one file a method."""

# mergekit's package must be complete before any file of this room is imported: its import fires the
# start-up hook, which registers our methods and so imports these very files.
import mergekit.merge_methods  # noqa: F401
