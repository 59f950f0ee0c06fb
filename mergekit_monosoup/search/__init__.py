"""How an edit is chosen by its user's own scores."""
