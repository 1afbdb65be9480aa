"""Tensors in, tensors out: boxes, anchors, matching, losses, NMS. Imports nothing but torch."""
