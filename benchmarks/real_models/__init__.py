"""What an edit is worth on a real pretrained language model; DESIGN.md says how it is decided."""
