"""Ditto as an estimator: records in, matches out."""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from rich.console import Console
from rich.progress import Progress
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import train_test_split
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from firsthand.match.ditto import NEEDS, DittoCollator, DittoModel, best_f1_threshold
from firsthand.match.records import DomainKnowledge, Record, TfidfSummarizer, serialize

Pairs = Sequence[tuple[Record, Record]]


class DittoMatcher(ClassifierMixin, BaseEstimator):
    """Whether two records are the same thing, learnt from labelled pairs.

    Fine-tunes a language model on the texts of the pairs. After each epoch it chooses the threshold with the best F1 on
    validation pairs; the weights and the threshold of the best epoch are kept.

    ```python
    matcher = DittoMatcher("sentence-transformers/all-MiniLM-L6-v2").fit(pairs, labels)  # pairs of dicts
    matcher.predict(other_pairs)
    matcher.save("folder")
    ```

    Args:
        model: an encoder (`AutoModel`) by folder or name, or one in memory, which is copied. Its parameters that do not require
            gradients stay as they are.
        tokenizer: the encoder's; by default the one found under the name `model`.
        op: augmentation for MixDA, see `ditto_augment`; None for plain fine-tuning, at half the cost.
        alpha: of MixDA, see `DittoModel`.
        knowledge: marks what is known of the texts, or None.
        summarizer: shortens records to half of `max_len`, or None. If it is not fitted, `fit` does so with the records it gets;
            fit it to the whole tables where you have them. Unless it has a `length_fn`, the tokenizer says how long a word is.
        max_len: tokens of a pair.
        epochs: passes over the training pairs.
        batch_size: pairs of a step.
        learning_rate: at the first step; it falls linearly to 0.
        validation_fraction: share of the pairs that `fit` sets aside where it is given no validation pairs.
        seed: of initial weights, order, dropout and augmentation. torch's global generator is left as it was.
        device: where to compute; a GPU if there is one, by default.
        progress: whether bars on stderr show how far it is.

    Attributes:
        classes_: `[0, 1]`.
        model_: the trained `DittoModel`.
        tokenizer_: its tokenizer.
        summarizer_: the fitted summarizer, or None.
        threshold_: above which probability a pair matches.
        validation_f1_: F1 on the validation pairs after each epoch.

    Source:
        Li et al., "Deep Entity Matching with Pre-Trained Language Models", 2020, arXiv 2004.00584; learning rate, linear decay,
        batch size, length and choice of epoch as in the authors' code. Which of the best epochs: the first.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        op: str | None = "all",
        alpha: float = 0.8,
        knowledge: DomainKnowledge | None = None,
        summarizer: TfidfSummarizer | None = None,
        max_len: int = 256,
        epochs: int = 20,
        batch_size: int = 64,
        learning_rate: float = 3e-5,
        validation_fraction: float = 0.2,
        seed: int = 0,
        device: str | torch.device | None = None,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.op = op
        self.alpha = alpha
        self.knowledge = knowledge
        self.summarizer = summarizer
        self.max_len = max_len
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.validation_fraction = validation_fraction
        self.seed = seed
        self.device = device
        self.progress = progress

    def fit(self, pairs: Pairs, y: ArrayLike, valid: tuple[Pairs, ArrayLike] | None = None) -> "DittoMatcher":
        """Learn from pairs of records and their labels, 1 for a match and 0 for none.

        Args:
            pairs: (left, right) records: dicts, or texts.
            y: a label each.
            valid: pairs and labels to choose threshold and epoch with; by default some of the pairs are set aside.

        Raises:
            ValueError: labels other than 0 and 1, only one of them, not one a pair, or an argument of the estimator out of range.
            ImportError: transformers is not installed.
        """
        self._check()
        examples = _examples(pairs, y, "y")
        if valid is None:
            try:
                examples, held_out = train_test_split(
                    examples,
                    test_size=self.validation_fraction,
                    stratify=[example["label"] for example in examples],
                    random_state=self.seed,
                )
            except ValueError as error:
                raise ValueError(
                    f"pairs must be enough to set aside validation_fraction={self.validation_fraction} of them, "
                    f"got {len(examples)}: {error}; or give validation pairs as valid=(pairs, y)"
                ) from error
        else:
            held_out = _examples(*valid, "valid")
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            self._build(examples + held_out, device)
            self._train(examples, held_out, device)
        self.classes_ = np.array([0, 1])
        return self

    def _check(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("max_len", 8)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in (0, 1), got {self.validation_fraction}")

    def _build(self, examples: list[dict[str, Any]], device: torch.device) -> None:
        if self.tokenizer is None and not isinstance(self.model, str):
            raise ValueError("tokenizer must be given where model is no name or folder")
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ImportError(NEEDS) from error
        self.tokenizer_ = self.tokenizer or AutoTokenizer.from_pretrained(self.model)
        lm = self.model if isinstance(self.model, str) else copy.deepcopy(self.model)
        self.model_ = DittoModel(lm, self.alpha).to(device)
        self.summarizer_ = copy.deepcopy(self.summarizer)
        if self.summarizer_ is not None:
            self.summarizer_.length_fn = self.summarizer_.length_fn or self._length
            try:
                check_is_fitted(self.summarizer_)
            except NotFittedError:
                self.summarizer_.fit([serialize(example[side]) for example in examples for side in ("left", "right")])

    def _length(self, word: str) -> int:
        return len(self.tokenizer_.tokenize(word))

    def _collator(self, op: str | None = None) -> DittoCollator:
        return DittoCollator(self.tokenizer_, self.max_len, op, self.summarizer_, self.knowledge, self.seed)

    def _train(self, examples: list[dict[str, Any]], held_out: list[dict[str, Any]], device: torch.device) -> None:
        rng = np.random.default_rng(self.seed)
        model, collate = self.model_, self._collator(self.op)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.0)
        per_epoch = math.ceil(len(examples) / self.batch_size)
        steps = self.epochs * per_epoch
        labels = np.array([example["label"] for example in held_out])
        self.validation_f1_: list[float] = []
        best: dict[str, Tensor] = {}
        with Progress(console=Console(stderr=True), transient=True, disable=not self.progress) as bar:
            task = bar.add_task("training", total=steps)
            for epoch in range(self.epochs):
                model.train()
                for at, rows in enumerate(np.array_split(rng.permutation(len(examples)), per_epoch)):
                    for group in optimizer.param_groups:
                        group["lr"] = self.learning_rate * (1 - (epoch * per_epoch + at) / steps)
                    batch = collate([examples[row] for row in rows])
                    optimizer.zero_grad()
                    model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss.backward()
                    optimizer.step()
                    bar.advance(task)
                threshold, f1 = best_f1_threshold(self._probabilities(held_out).numpy(), labels)
                if f1 > max(self.validation_f1_, default=-1.0):
                    self.threshold_ = threshold
                    best = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
                self.validation_f1_.append(f1)
                bar.update(task, description=f"training, F1 on validation {max(self.validation_f1_):.3f}")
        model.load_state_dict(best, strict=False)
        model.eval()

    @torch.no_grad()
    def _probabilities(self, examples: list[dict[str, Any]], bar: Progress | None = None) -> Float[Tensor, " pairs"]:
        """Of a match, on the CPU. Pairs of similar length share a batch, so that little is padded."""
        model, collate = self.model_.eval(), self._collator()
        device = next(model.parameters()).device
        order = sorted(range(len(examples)), key=lambda row: sum(len(str(examples[row][side])) for side in ("left", "right")))
        probs = torch.empty(len(examples))
        task = bar.add_task("matching", total=len(examples)) if bar else None
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = collate([examples[row] for row in rows])
            logits = model(**{name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}).logits
            probs[rows] = logits.float().softmax(dim=-1)[:, 1].cpu()
            if bar and task is not None:
                bar.advance(task, len(rows))
        return probs

    def predict_proba(self, pairs: Pairs) -> Float[np.ndarray, "pairs 2"]:
        """Probabilities of no match and of a match.

        Raises:
            NotFittedError: before `fit`.
            ValueError: pairs that are none.
        """
        check_is_fitted(self, "threshold_")
        examples = _examples(pairs)
        with Progress(console=Console(stderr=True), transient=True, disable=not self.progress) as bar:
            match = self._probabilities(examples, bar).double().numpy()
        return np.stack([1 - match, match], axis=1)

    def predict(self, pairs: Pairs) -> Int[np.ndarray, " pairs"]:
        """1 where the probability of a match is above `threshold_`, else 0."""
        return (self.predict_proba(pairs)[:, 1] > self.threshold_).astype(np.int64)

    def save(self, folder: str | Path) -> None:
        """Write model and tokenizer as transformers does, and beside them what else it takes to predict; no pickle.

        Raises:
            NotFittedError: before `fit`.
        """
        check_is_fitted(self, "threshold_")
        folder = Path(folder)
        self.model_.save_pretrained(folder)
        self.tokenizer_.save_pretrained(folder)
        names = ("op", "alpha", "max_len", "epochs", "batch_size", "learning_rate", "validation_fraction", "seed")
        rest: dict[str, Any] = {
            "params": {name: getattr(self, name) for name in names},
            "threshold": self.threshold_,
            "validation_f1": self.validation_f1_,
            "knowledge": None if self.knowledge is None else {"mode": self.knowledge.mode, "ner": self.knowledge.ner is not None},
            "summarizer": None,
        }
        if (summarizer := self.summarizer_) is not None:
            rest["summarizer"] = {
                "stop_words": sorted(summarizer.stop_words), "idf": summarizer.idf_, "unseen": summarizer.unseen_,
                "length_fn": summarizer.length_fn != self._length,
            }  # fmt: skip
        (folder / "matcher.json").write_text(json.dumps(rest, indent=1))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        knowledge: DomainKnowledge | None = None,
        length_fn: Any = None,
        device: str | torch.device | None = None,
        progress: bool = True,
    ) -> "DittoMatcher":
        """Read what `save` wrote.

        Args:
            folder: where.
            knowledge: needed if the saved matcher's had a `ner`, which is code and is not saved.
            length_fn: the summarizer's, if it had one of its own.
            device: where to compute.
            progress: as in the estimator.

        Raises:
            ValueError: the folder holds no matcher, or code is missing that was not saved.
        """
        from transformers import AutoTokenizer

        path = Path(folder) / "matcher.json"
        if not path.is_file():
            raise ValueError(f"folder must hold what save wrote, {folder} has no matcher.json")
        rest = json.loads(path.read_text())
        if (known := rest["knowledge"]) and knowledge is None:
            if known["ner"]:
                raise ValueError("knowledge must be given: the saved matcher's has a ner, which is code and was not saved")
            knowledge = DomainKnowledge(known["mode"])
        summarizer = None
        if told := rest["summarizer"]:
            if told["length_fn"] and length_fn is None:
                raise ValueError("length_fn must be given: the saved summarizer has one, which is code and was not saved")
            summarizer = TfidfSummarizer(frozenset(told["stop_words"]), length_fn)
            summarizer.idf_, summarizer.unseen_ = told["idf"], told["unseen"]
        matcher = cls(str(folder), knowledge=knowledge, summarizer=summarizer, device=device, progress=progress, **rest["params"])
        matcher.tokenizer_ = AutoTokenizer.from_pretrained(str(folder))
        matcher.model_ = DittoModel.from_pretrained(folder)
        matcher.model_.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        matcher.summarizer_ = copy.deepcopy(summarizer)
        if matcher.summarizer_ is not None:
            matcher.summarizer_.length_fn = length_fn or matcher._length
        matcher.threshold_, matcher.validation_f1_ = rest["threshold"], rest["validation_f1"]
        matcher.classes_ = np.array([0, 1])
        return matcher


def _examples(pairs: Pairs, y: ArrayLike | None = None, name: str = "") -> list[dict[str, Any]]:
    """As `DittoCollator` takes them, with labels if there are any."""
    for at, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"pairs must be (left, right) records, got {str(pair)[:80]!r} at {at}")
    examples: list[dict[str, Any]] = [{"left": left, "right": right} for left, right in pairs]
    if y is None:
        return examples
    labels = np.asarray(y)
    if labels.shape != (len(examples),):
        raise ValueError(f"{name} must have a label for each of {len(examples)} pairs, got shape {labels.shape}")
    if set(np.unique(labels).tolist()) != {0, 1}:
        raise ValueError(f"{name} must have labels 0 and 1, both of them, got {np.unique(labels).tolist()[:5]}")
    return [{**example, "label": int(label)} for example, label in zip(examples, labels, strict=True)]
