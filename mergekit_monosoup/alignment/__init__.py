"""The geometry of several updates: inner products, Model Stock's ratio, the choice of a filtered soup.

This room knows tensors only; it imports neither mergekit nor anything that reads a file.
"""

from mergekit_monosoup.alignment.inner import InnerProducts, inner_products
from mergekit_monosoup.alignment.selection import Layers, Selection, select_soup, soup_cosines
from mergekit_monosoup.alignment.stock import Angle, model_stock_ratio

__all__ = [
    "Angle",
    "InnerProducts",
    "Layers",
    "Selection",
    "inner_products",
    "model_stock_ratio",
    "select_soup",
    "soup_cosines",
]
