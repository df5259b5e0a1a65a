"""Projection: the small network between an encoder's features and a loss."""

from __future__ import annotations

from torch import nn


class Projection(nn.Sequential):
    """A multi-layer perceptron: `layers` linear maps with ReLU between them.

    SimCLR (arXiv:2002.05709) uses two layers, Barlow Twins (arXiv:2103.03230) and VICReg
    (arXiv:2105.04906) three wide ones with batch normalisation. Batch normalisation couples the
    samples of a micro-batch: over ranks it needs ``torch.nn.SyncBatchNorm``, and micro-batches
    change its result. ``normalization="layer"`` avoids both.

    Args:
        input_dim: Number of input features.
        output_dim: Number of output features.
        hidden_dim: Number of features between the layers; None: `input_dim`.
        layers: Number of linear maps, >= 1; 1 is a linear projection.
        normalization: The layer before each ReLU: ``"none"``, ``"layer"`` or ``"batch"``.

    Shape:
        [..., input_dim] to [..., output_dim] (``"batch"``: [B, input_dim] only).

    Raises:
        ValueError: If a number is < 1 or `normalization` is unknown.
    """

    def __init__(
        self,
        *,
        input_dim: int,
        output_dim: int,
        hidden_dim: int | None = None,
        layers: int = 2,
        normalization: str = "none",
    ) -> None:
        hidden = input_dim if hidden_dim is None else hidden_dim
        numbers = {"input_dim": input_dim, "output_dim": output_dim, "hidden_dim": hidden}
        for name, number in {**numbers, "layers": layers}.items():
            if number < 1:
                raise ValueError(f"{name} must be >= 1, got {number}")
        kinds = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
        if normalization not in kinds:
            raise ValueError(
                f"normalization must be one of {', '.join(kinds)}, got {normalization!r}"
            )
        modules: list[nn.Module] = []
        for _ in range(layers - 1):
            # A normalisation cancels the bias before it.
            modules.append(nn.Linear(input_dim, hidden, bias=normalization == "none"))
            if normalization != "none":
                modules.append(kinds[normalization](hidden))
            modules.append(nn.ReLU(inplace=True))
            input_dim = hidden
        super().__init__(*modules, nn.Linear(input_dim, output_dim))
