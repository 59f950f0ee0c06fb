"""Greedy Soup: average checkpoints one by one as long as a held-out score improves."""
