"""Tensors: which may have a gradient, those in containers, half precision."""
