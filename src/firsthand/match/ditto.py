"""Ditto: whether two records are the same thing, as a question to a pre-trained language model about the text of both."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from numpy.typing import ArrayLike
from torch import Tensor, nn

from firsthand.match.augment import OPERATORS, ditto_augment, split_pair
from firsthand.match.records import SEPARATOR, DomainKnowledge, TfidfSummarizer, serialize_pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.modeling_outputs import SequenceClassifierOutput

GRID = np.arange(20) / 20
NEEDS = "Ditto needs transformers: pip install 'firsthand[hf]'"


class DittoModel(nn.Module):
    r"""A language model and a linear layer on its first token; in training, on a mixture of a pair and its augmentation (MixDA).

    $$ e = \lambda\,h(x) + (1-\lambda)\,h(\tilde x), \qquad \lambda \sim \mathrm{Beta}(\alpha, \alpha), \qquad z = We + b $$

    h is the last hidden state at position 0, λ is drawn once a batch, and the label is that of x. In evaluation mode, or without
    an augmentation, e = h(x). Trains in a `transformers.Trainer` with `DittoCollator` (`remove_unused_columns=False`).

    Args:
        lm: an encoder without a head, or a folder or name for `AutoModel.from_pretrained`.
        alpha: α, positive and finite. Large values mix half and half.
        fold_lambda: mix with max(λ, 1-λ), so that the pair itself always weighs more.

    Raises:
        ValueError: `alpha` out of range.

    Source:
        Li et al., "Deep Entity Matching with Pre-Trained Language Models", 2020, arXiv 2004.00584, sections 2 and 3.3, and the
        authors' code. That one passes no attention mask, so that padding takes part; here it does not. `fold_lambda` is how MixDA
        was first described (from memory, unverified); the code does not fold.
    """

    def __init__(self, lm: "PreTrainedModel | str", alpha: float = 0.8, fold_lambda: bool = False) -> None:
        super().__init__()
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha must be positive and finite, got {alpha}")
        self.lm: Any = _encoder(lm) if isinstance(lm, str) else lm
        self.config = self.lm.config
        self.alpha = alpha
        self.fold_lambda = fold_lambda
        self.head = nn.Linear(self.config.hidden_size, 2, device=self.lm.device, dtype=self.lm.dtype)

    def forward(
        self,
        input_ids: Int[Tensor, "batch length"],
        attention_mask: Int[Tensor, "batch length"],
        token_type_ids: Int[Tensor, "batch length"] | None = None,
        aug_input_ids: Int[Tensor, "batch length"] | None = None,
        aug_attention_mask: Int[Tensor, "batch length"] | None = None,
        aug_token_type_ids: Int[Tensor, "batch length"] | None = None,
        labels: Int[Tensor, " batch"] | None = None,
        mix_weight: float | None = None,
    ) -> "SequenceClassifierOutput":
        """Logits (batch, 2), and the cross-entropy where there are labels.

        Args:
            input_ids: the pairs.
            attention_mask: 0 where they are padded.
            token_type_ids: where the tokenizer makes them.
            aug_input_ids: the augmented pairs, padded to the same length. Ignored in evaluation mode.
            aug_attention_mask: theirs.
            aug_token_type_ids: theirs.
            labels: 1 for a match, 0 for none.
            mix_weight: λ, instead of a draw.

        Raises:
            ValueError: augmented pairs of another shape, or without their mask.
        """
        from transformers.modeling_outputs import SequenceClassifierOutput

        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        mix = self.training and aug_input_ids is not None
        if mix:
            augmented = {
                "input_ids": aug_input_ids,
                "attention_mask": aug_attention_mask,
                "token_type_ids": None if token_type_ids is None else aug_token_type_ids,
            }
            for name, tensor in inputs.items():
                other = augmented[name]
                if tensor is not None and (other is None or other.shape != tensor.shape):
                    came = None if other is None else tuple(other.shape)
                    raise ValueError(f"aug_{name} must have shape {tuple(tensor.shape)} like {name}, got {came}")
            inputs = {name: torch.cat([tensor, augmented[name]]) for name, tensor in inputs.items() if tensor is not None}
        first = self.lm(**{name: tensor for name, tensor in inputs.items() if tensor is not None}).last_hidden_state[:, 0]
        if mix:
            weight = self._draw() if mix_weight is None else mix_weight
            original, changed = first.chunk(2)
            first = weight * original + (1 - weight) * changed
        logits = self.head(first)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _draw(self) -> float:
        """λ, from torch's global generator, as dropout takes its masks."""
        weight = torch.distributions.Beta(self.alpha, self.alpha).sample().item()
        return max(weight, 1 - weight) if self.fold_lambda else weight

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the language model as transformers does, and beside it the linear layer and what this class was made with."""
        from safetensors.torch import save_file

        folder = Path(folder)
        self.lm.save_pretrained(folder)
        save_file({name: tensor.contiguous() for name, tensor in self.head.state_dict().items()}, folder / "head.safetensors")
        (folder / "ditto.json").write_text(json.dumps({"alpha": self.alpha, "fold_lambda": self.fold_lambda}, indent=2))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "DittoModel":
        """Read what `save_pretrained` wrote.

        Raises:
            ValueError: the folder holds no such model.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        missing = [name for name in ("config.json", "ditto.json", "head.safetensors") if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"folder must hold what save_pretrained wrote, {folder} lacks {', '.join(missing)}")
        model = cls(str(folder), **json.loads((folder / "ditto.json").read_text()))
        model.head.load_state_dict(load_file(folder / "head.safetensors"))
        return model.eval()


def _encoder(name: str) -> Any:
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ImportError(NEEDS) from error
    try:
        return AutoModel.from_pretrained(name, add_pooling_layer=False)
    except TypeError:  # most encoders have no pooler
        return AutoModel.from_pretrained(name)


class DittoCollator:
    """Makes a batch for `DittoModel` of pairs of records: marks, shortens, augments and tokenizes them.

    Examples are dicts with `left` and `right` (records or their texts) and, for training, `label` (1 for a match).

    Args:
        tokenizer: the language model's.
        max_len: tokens of a pair; what is longer is cut, the longer record first.
        op: an operator of `ditto_augment`, for MixDA; None for no augmentation, as in evaluation.
        summarizer: a fitted one; each record of a pair gets half of `max_len`.
        knowledge: applied to each record, before everything else.
        seed: of the augmentation. By default it follows torch's global generator, whose state `Trainer` saves and its
            workers inherit.

    Raises:
        ValueError: `max_len` below 8, an unknown `op`; when called, no `left` or `right`, labels other than 0 and 1.

    Source:
        arXiv 2004.00584, section 3. In the authors' code a summary may be as long as `max_len` for each record, and the
        tokenizer then cuts both.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_len: int = 256,
        op: str | None = None,
        summarizer: TfidfSummarizer | None = None,
        knowledge: DomainKnowledge | None = None,
        seed: int | None = None,
    ) -> None:
        if max_len < 8:
            raise ValueError(f"max_len must be at least 8, got {max_len}")
        if op is not None and op != "all" and op not in OPERATORS:
            raise ValueError(f"op must be None, 'all' or one of {', '.join(OPERATORS)}, got {op!r}")
        self.tokenizer = tokenizer
        self.max_len = max_len
        self.op = op
        self.summarizer = summarizer
        self.knowledge = knowledge
        self.rng = None if seed is None else np.random.default_rng(seed)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and, as the case may be, `token_type_ids`, `labels`, and the same with `aug_` before."""
        pairs = [self.texts(example) for example in examples]
        count = len(pairs)
        if self.op is not None:
            rng = np.random.default_rng(int(torch.randint(2**63 - 1, ()))) if self.rng is None else self.rng
            pairs += [split_pair(ditto_augment(SEPARATOR.join(pair), self.op, rng=rng)) for pair in pairs]
        left, right = map(list, zip(*pairs, strict=True))
        encoded = self.tokenizer(
            left, right, padding=True, truncation="longest_first", max_length=self.max_len, return_tensors="pt"
        )
        batch = {name: tensor[:count] for name, tensor in encoded.items()}
        if self.op is not None:
            batch |= {f"aug_{name}": tensor[count:] for name, tensor in encoded.items()}
        if "label" in examples[0]:
            labels = [example["label"] for example in examples]
            if any(label not in (0, 1) for label in labels):
                raise ValueError(f"label must be 0 or 1, got {sorted({str(label) for label in labels})}")
            batch["labels"] = torch.tensor(labels, dtype=torch.long)
        return batch

    def texts(self, example: Mapping[str, Any]) -> tuple[str, str]:
        """The two texts of a pair as the tokenizer gets them, not augmented. To look at."""
        if "left" not in example or "right" not in example:
            raise ValueError(f"an example must have left and right, got {', '.join(map(str, example)) or 'nothing'}")
        left, right = serialize_pair(example["left"], example["right"])
        if self.knowledge is not None:
            left, right = self.knowledge(left), self.knowledge(right)
        if self.summarizer is not None:
            left, right = self.summarizer.summarize_pair(left, right, (self.max_len - 3) // 2)  # 3: [CLS] and twice [SEP]
        return left, right

    def state_dict(self) -> dict[str, Any]:
        """Where the augmentation's generator is; empty without a seed."""
        return {} if self.rng is None else {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another collator was."""
        if (self.rng is None) != ("rng" not in state):
            raise ValueError("state must come from a collator that has a seed if and only if this one has")
        if self.rng is not None:
            self.rng.bit_generator.state = state["rng"]


def best_f1_threshold(probs: ArrayLike, labels: ArrayLike, grid: ArrayLike = GRID) -> tuple[float, float]:
    """The threshold with the best F1, where a pair matches if its probability is above it.

    Args:
        probs: of a match, in [0, 1], (pairs).
        labels: 1 for a match, 0 for none, (pairs).
        grid: the thresholds to try.

    Returns:
        (threshold, F1). The first of the best; 0.5 if F1 is 0 everywhere.

    Raises:
        ValueError: shapes that do not belong together, nothing in them, probabilities out of range, labels other than 0 and 1.

    Source:
        The authors' code of arXiv 2004.00584: 0, 0.05, ..., 0.95, on validation data.
    """
    p, y, thresholds = np.asarray(probs, dtype=np.float64), np.asarray(labels), np.asarray(grid, dtype=np.float64)
    if p.ndim != 1 or p.shape != y.shape or not len(p):
        raise ValueError(f"probs and labels must be vectors of one length, at least 1, got shapes {p.shape} and {y.shape}")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("probs must be in [0, 1]")
    if not np.isin(y, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {np.unique(y).tolist()[:5]}")
    if thresholds.ndim != 1 or not len(thresholds):
        raise ValueError(f"grid must hold at least one threshold, got shape {thresholds.shape}")
    positive = y == 1
    said = p > thresholds[:, None]
    hits = (said & positive).sum(axis=1)
    f1 = 2 * hits / np.maximum(said.sum(axis=1) + positive.sum(), 1)
    best = int(f1.argmax())
    return (float(thresholds[best]), float(f1[best])) if f1[best] > 0 else (0.5, 0.0)
