"""One file per operator family: what it does with an affine map that arrives at its output or its input."""
