"""The page of a merge: one HTML file that loads nothing from elsewhere."""
