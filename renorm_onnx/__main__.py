"""``python -m renorm_onnx`` is the command `renorm-onnx`, for an environment whose scripts are not on the path."""

import sys

from renorm_onnx.cli import main

if __name__ == "__main__":
    sys.exit(main())
