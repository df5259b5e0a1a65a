"""Images for TensorBoard: galleries, projections, filters, histograms."""
