"""The parts of `renorm_onnx.runtime.session`: tensors in and out, where nodes run, CUDA graphs, error messages."""
