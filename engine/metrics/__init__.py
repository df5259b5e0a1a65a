"""Published scalars, buffered on the device and averaged at log points."""
