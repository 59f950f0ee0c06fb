"""How a recipe is run."""
