"""Self-supervised losses without negatives: self-distillation and regularised prediction."""
