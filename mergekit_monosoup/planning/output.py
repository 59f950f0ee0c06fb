"""Where merging/run.py works until it uses merging/folder.py; goes with that."""

STAGING = ".mergekit-monosoup-incomplete"
