"""Attention-based multiple instance learning: the plain model that the methods for bags of instances build on."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn


class AttentionMIL(nn.Module):
    r"""Classify a bag by an attention-weighted mean of its instances.

    $$ h_n = \mathrm{dropout}(\mathrm{ReLU}(W x_n)), \quad
       f_n = w^\top \tanh(V h_n), \quad
       z = \sum_n \mathrm{softmax}(f)_n h_n, \quad
       \mathrm{logits} = C z + c $$

    With `gated`, $\tanh(V h_n)$ is multiplied elementwise by $\mathrm{sigmoid}(U h_n)$.

    It is called as torchmil's `ABMIL` is (`forward`, `compute_loss`, `predict`) and names its parts alike (`feat_ext`, `pool`,
    `classifier`, `criterion`), so what takes one takes the other.

    Args:
        in_dim: width of an instance, at least 1.
        hidden: width of the embedded instance and of the bag feature z, at least 1.
        att_dim: width of the attention's hidden layer, at least 1.
        n_classes: 1 for a binary problem with one logit a bag, else the number of classes.
        gated: use gated attention.
        dropout: share of the embedding dropped in training, in `[0, 1]`.

    Raises:
        ValueError: a width below 1, or `dropout` outside `[0, 1]`.

    Source:
        Ilse et al., "Attention-based Deep Multiple Instance Learning", 2018, arXiv 1802.04712: attention and gated attention
        pooling. The embedding in front (one layer, ReLU, dropout 0.25) is the one of Tang et al., 2023, arXiv 2307.15254.
    """

    def __init__(
        self,
        in_dim: int,
        hidden: int = 512,
        att_dim: int = 128,
        n_classes: int = 1,
        gated: bool = False,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        for name, width in (("in_dim", in_dim), ("hidden", hidden), ("att_dim", att_dim), ("n_classes", n_classes)):
            if width < 1:
                raise ValueError(f"{name} must be at least 1, got {width}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be in [0, 1], got {dropout}")
        self.feat_ext = nn.Sequential(nn.Linear(in_dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.pool = AttentionPool(hidden, att_dim, gated)
        self.classifier = nn.Linear(hidden, n_classes)
        self.criterion = nn.BCEWithLogitsLoss() if n_classes == 1 else nn.CrossEntropyLoss()

    def forward(
        self,
        X: Float[Tensor, "bags instances features"],
        mask: Shaped[Tensor, "bags instances"] | None = None,
        return_att: bool = False,
    ) -> Float[Tensor, "bags *classes"] | tuple[Float[Tensor, "bags *classes"], Float[Tensor, "bags instances"]]:
        """Logits of the bags.

        Args:
            X: the instances, padded to one length.
            mask: 1 (or True) where an instance is real, 0 where it is padding. None: all are real.
            return_att: return the attention scores too.

        Returns:
            The logits, `(bags,)` for `n_classes=1`, else `(bags, classes)`. With `return_att`, a pair of these and the attention
            scores before the softmax; at padding their values mean nothing.

        Raises:
            ValueError: the mask is not `(bags, instances)`, or a bag has no real instance.
        """
        z, scores = self.pool(self.feat_ext(X), mask, return_att=True)
        logits = self.classifier(z)
        if logits.shape[1] == 1:
            logits = logits.squeeze(1)
        return (logits, scores) if return_att else logits

    def compute_loss(
        self,
        Y: Shaped[Tensor, " bags"],
        X: Float[Tensor, "bags instances features"],
        mask: Shaped[Tensor, "bags instances"] | None = None,
    ) -> tuple[Float[Tensor, "bags *classes"], dict[str, Float[Tensor, ""]]]:
        """Logits of the bags, and their cross-entropy under the name of the criterion.

        Args:
            Y: labels of the bags: 0 or 1 for `n_classes=1`, else class indices.
            X: as in `forward`.
            mask: as in `forward`.
        """
        logits = self(X, mask)
        return logits, {type(self.criterion).__name__: bag_loss(self.criterion, logits, Y)}

    def predict(
        self,
        X: Float[Tensor, "bags instances features"],
        mask: Shaped[Tensor, "bags instances"] | None = None,
        return_inst_pred: bool = True,
    ) -> Float[Tensor, "bags *classes"] | tuple[Float[Tensor, "bags *classes"], Float[Tensor, "bags instances"]]:
        """`forward` under torchmil's name for it; the attention scores stand for predictions of the instances."""
        return self(X, mask, return_att=return_inst_pred)


class AttentionPool(nn.Module):
    """The attention of `AttentionMIL`: instances in, bag feature (and scores) out."""

    def __init__(self, in_dim: int, att_dim: int = 128, gated: bool = False) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_dim, att_dim)
        self.gate = nn.Linear(in_dim, att_dim) if gated else None
        self.score = nn.Linear(att_dim, 1, bias=False)  # a bias would cancel in the softmax

    def forward(
        self,
        X: Float[Tensor, "bags instances features"],
        mask: Shaped[Tensor, "bags instances"] | None = None,
        return_att: bool = False,
    ) -> Float[Tensor, "bags features"] | tuple[Float[Tensor, "bags features"], Float[Tensor, "bags instances"]]:
        hidden = self.hidden(X).tanh()
        if self.gate is not None:
            hidden = hidden * self.gate(X).sigmoid()
        scores = self.score(hidden).squeeze(2)
        attention = mask_padding(scores, mask).softmax(dim=1)
        z = torch.einsum("bn,bnd->bd", attention, X)
        return (z, scores) if return_att else z


def mask_padding(
    scores: Float[Tensor, "bags *heads instances"], mask: Shaped[Tensor, "..."] | None
) -> Float[Tensor, "bags *heads instances"]:
    """Scores so low at padding that a softmax over the instances makes 0 of them, and yet finite, so that s log s is 0 too.

    Args:
        scores: one row of scores a bag, or one a head of a bag.
        mask: `(bags, instances)`, 1 (or True) where an instance is real. None: all are real.

    Raises:
        ValueError: bags without instances, a mask of another shape, or a bag the mask leaves empty. The last is not looked for
            under `torch.compile`, where it would break the graph.
    """
    bags, instances = scores.shape[0], scores.shape[-1]
    if not instances:
        raise ValueError(f"scores must have at least one instance a bag, got shape {tuple(scores.shape)}")
    if mask is None:
        return scores
    if mask.shape != (bags, instances):
        raise ValueError(f"mask must have shape (bags, instances) = {(bags, instances)}, got {tuple(mask.shape)}")
    real = mask.bool()
    if not torch.compiler.is_compiling() and not (filled := real.any(dim=1)).all():
        empty = int((~filled).nonzero()[0])
        raise ValueError(f"mask must keep at least one instance of each bag, got none in bag {empty}")
    lowest = max(-1e30, torch.finfo(scores.dtype).min)
    return scores.masked_fill(~real.view(bags, *[1] * (scores.ndim - 2), instances), lowest)


def bag_loss(criterion: nn.Module, logits: Float[Tensor, "bags *classes"], Y: Shaped[Tensor, " bags"]) -> Float[Tensor, ""]:
    """`criterion` on the logits, in float32 as torchmil does it, with labels of the type the logits ask for."""
    return criterion(logits.float(), Y.float() if logits.ndim == 1 else Y.long())
