"""The parts of `renorm_onnx.runtime.parity`: what is measured of two models, and the rule that judges it."""
