"""Published scalars: buffered on the device, averaged at log points."""
