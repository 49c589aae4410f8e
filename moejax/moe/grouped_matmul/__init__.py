"""Grouped matrix products: rows sorted by expert, each expert's rows times its own matrix.

Axes besides those of ``moejax``: M sorted rows, A inputs and B outputs of a matrix, R or S rows
before they are gathered.
"""

from moejax.moe.grouped_matmul.backends import (
    BACKENDS,
    available_backends,
    platform_and_device,
)
from moejax.moe.grouped_matmul.products import LayerPlan, choose_products, describe
from moejax.moe.grouped_matmul.shapes import LEGS, Layer, LayerSizes, Product, layer_products
from moejax.moe.grouped_matmul.table import (
    Choice,
    Table,
    load_table,
    only,
    table_path,
)

__all__ = [
    "BACKENDS",
    "LEGS",
    "Choice",
    "Layer",
    "LayerPlan",
    "LayerSizes",
    "Product",
    "Table",
    "available_backends",
    "choose_products",
    "describe",
    "layer_products",
    "load_table",
    "only",
    "platform_and_device",
    "table_path",
]
