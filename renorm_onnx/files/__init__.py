"""The parts of `renorm_onnx.model_file`: what a file must satisfy before it is read, and how one is written."""
