"""The study: what each method of the family keeps in distribution and gains out of it."""
