"""Speed of the MoE layer and of whole models, every time beside what it is to be compared with.

A time is a ratio here: dispatchers, the dense layer of the same active FLOPs and, if asked for,
Transformers on PyTorch are measured in turns in one run, so that a busy machine slows all of them.
"""
