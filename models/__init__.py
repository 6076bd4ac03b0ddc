"""Networks that use BatchRenorm, one file each."""
