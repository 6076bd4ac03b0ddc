"""Batch Renormalization layers for torch; their public names are those of `renorm_onnx`."""
