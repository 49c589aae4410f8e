"""moejax: cost-efficient Mixture-of-Experts training in JAX and Flax, with the bill beside it.

Axes, as they appear in every shape annotation:

    B  batch (rows)            S  sequence (positions of a row)    T  tokens, B * S
    D  model width             H  attention heads                  N  key/value heads
    E  routed experts          K  experts per token                F  expert width
    C  capacity of an expert   V  vocabulary                       L  layers
"""

__version__ = "0.1.0"
