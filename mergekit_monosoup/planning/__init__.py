"""What a recipe will do, found out from configuration files and headers.

Nothing here imports torch, transformers or mergekit where the recipe can be judged without them:
a plan has to be quicker than their import.
"""
