"""ONNX operators in float64, one file per family; `reference.py` walks a model and calls them.

Each file ends in a table ``OPERATORS`` from operator name to a function of one `call.Call`.
"""
