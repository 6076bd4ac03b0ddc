"""The parts of `renorm_onnx.exporter`: its checks before and after torch's exporter, and the way back into a module."""
