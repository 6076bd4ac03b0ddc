"""The fusion engine: affine maps that operators absorb or pass on."""
