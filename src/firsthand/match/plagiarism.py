"""Plagiarism detection: attention-LSTMs over frozen token vectors compare two texts, started by a population search."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import Tensor, nn

from firsthand.match.clude import CluDEResult, clude_initialize
from firsthand.match.focal import sigmoid_focal_loss

Encoder = Callable[[list[str]], Sequence[Any]]
"""From texts to one array or tensor each: (tokens, width)."""

INITS = ("clude", "de", "random", "best-of-random")
LOSSES = ("focal", "bce")


class AttentionLSTM(nn.Module):
    r"""An LSTM whose states are averaged with weights that they give themselves.

    $$ a_t = v^\top \tanh(W h_t + b), \qquad \alpha = \mathrm{softmax}(a), \qquad u = \sum_t \alpha_t h_t $$

    Args:
        embedding_dim: width of the token vectors.
        hidden: width of the LSTM's state.

    Source:
        Moravvej et al., 2023, arXiv 2305.02374. Our choice: one direction, one layer, W square.
    """

    def __init__(self, embedding_dim: int, hidden: int = 32) -> None:
        super().__init__()
        self.lstm = nn.LSTM(embedding_dim, hidden, batch_first=True)
        self.project = nn.Linear(hidden, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]) -> Float[Tensor, "batch hidden"]:
        """The weighted mean u; `mask` is true at the tokens, which stand first in each row."""
        states, _ = self.lstm(x)
        return (self.attention(states, mask).unsqueeze(1) @ states).squeeze(1)

    def attention(
        self, states: Float[Tensor, "batch tokens hidden"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens"]:
        """The weights α, 0 at padding."""
        scores = self.score(torch.tanh(self.project(states))).squeeze(-1)
        return scores.masked_fill(~mask, -math.inf).softmax(dim=-1)


class AttentionLSTMPair(nn.Module):
    r"""Does one text repeat the other? A logit from the token vectors of two texts.

    $$ z = \mathrm{MLP}([u;\, w;\, |u - w|;\, u \odot w]) $$

    with u and w the two texts' attention-LSTM vectors.

    Args:
        embedding_dim: width of the token vectors.
        hidden: width of the LSTM's state and of the MLP's hidden layer.
        shared: one attention-LSTM for both texts, or one each.
        symmetric: leave u and w out of the MLP's input, so that (with `shared`) both orders of the texts have the same logit.
        generator: draws the initial weights, uniform as PyTorch's own; by default PyTorch's global one does.

    Raises:
        ValueError: a size below 1; on a call, shapes that do not belong together, an empty text, or padding before a token.

    Source:
        Moravvej et al., 2023, arXiv 2305.02374. Token vectors are those of a frozen BERT. Our choice, as the paper's sizes were
        not at hand: hidden 32, what the MLP sees, its one hidden layer of ReLU, and that the LSTM is shared. `symmetric` is our
        addition.
    """

    def __init__(
        self,
        embedding_dim: int,
        hidden: int = 32,
        shared: bool = True,
        symmetric: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if embedding_dim < 1 or hidden < 1:
            raise ValueError(f"embedding_dim and hidden must be at least 1, got {embedding_dim} and {hidden}")
        self.shared = shared
        self.symmetric = symmetric
        self.encoder = AttentionLSTM(embedding_dim, hidden)
        if not shared:
            self.encoder_b = AttentionLSTM(embedding_dim, hidden)
        self.mlp = nn.Sequential(nn.Linear((2 if symmetric else 4) * hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        if generator is not None:
            self._draw(generator)

    @torch.no_grad()
    def _draw(self, generator: torch.Generator) -> None:
        for part in self.modules():
            width = part.hidden_size if isinstance(part, nn.LSTM) else getattr(part, "in_features", 1)
            for parameter in part.parameters(recurse=False):
                parameter.uniform_(-(width**-0.5), width**-0.5, generator=generator)

    def forward(
        self,
        a: Float[Tensor, "batch tokens dim"],
        a_mask: Bool[Tensor, "batch tokens"],
        b: Float[Tensor, "batch others dim"],
        b_mask: Bool[Tensor, "batch others"],
    ) -> Float[Tensor, " batch"]:
        """The logits of pairs; the masks are true at the tokens, which stand first in each row."""
        _check_texts("a", a, a_mask)
        _check_texts("b", b, b_mask)
        if len(a) != len(b):
            raise ValueError(f"a and b must have as many texts, got {len(a)} and {len(b)}")
        u = self.encoder(a, a_mask)
        w = (self.encoder if self.shared else self.encoder_b)(b, b_mask)
        return self.mlp(_compare(u, w, self.symmetric, dim=-1)).squeeze(-1)


@torch.no_grad()
def population_logits(
    parameters: Mapping[str, Float[Tensor, "pop ..."]],
    a: Float[Tensor, "batch tokens dim"],
    a_mask: Bool[Tensor, "batch tokens"],
    b: Float[Tensor, "batch others dim"],
    b_mask: Bool[Tensor, "batch others"],
) -> Float[Tensor, "pop batch"]:
    r"""The logits of a whole population of `AttentionLSTMPair`s in one pass.

    Row i is what the module computes with `{name: stack[i]}` for its parameters. A step of all the recurrences is two matrix
    products: one for the inputs, which all individuals share, and a batched one for the states. The states of all steps are
    kept, pop · batch · tokens · hidden numbers.

    Args:
        parameters: the module's `named_parameters`, a population of each in front. Whether the LSTM is shared and the module
            symmetric follows from their names and shapes.
        a: token vectors of one text of each pair.
        a_mask: true at the tokens, which stand first in each row.
        b: those of the other text.
        b_mask: its mask.

    Raises:
        ValueError: as `AttentionLSTMPair`, or `parameters` are not its own.

    Source:
        arXiv 2305.02374 evaluates individuals one by one; this is our reformulation.
    """
    if not {"encoder.lstm.weight_ih_l0", "mlp.0.weight", "mlp.2.bias"} <= parameters.keys():
        raise ValueError(f"parameters must be those of an AttentionLSTMPair, got {', '.join(parameters)}")
    _check_texts("a", a, a_mask)
    _check_texts("b", b, b_mask)
    if len(a) != len(b):
        raise ValueError(f"a and b must have as many texts, got {len(a)} and {len(b)}")
    if "encoder_b.lstm.weight_ih_l0" in parameters:
        u = _population_states(parameters, "encoder", a, a_mask)
        w = _population_states(parameters, "encoder_b", b, b_mask)
    else:  # all texts together: half as many steps
        more = a.shape[1] - b.shape[1]
        texts = [F.pad(a, (0, 0, 0, max(0, -more))), F.pad(b, (0, 0, 0, max(0, more)))]
        masks = [F.pad(a_mask, (0, max(0, -more))), F.pad(b_mask, (0, max(0, more)))]
        u, w = _population_states(parameters, "encoder", torch.cat(texts), torch.cat(masks)).chunk(2, dim=-1)
    symmetric = parameters["mlp.0.weight"].shape[-1] == 2 * u.shape[1]
    hidden = _affine(parameters, "mlp.0", _compare(u, w, symmetric, dim=1)).relu()
    return _affine(parameters, "mlp.2", hidden).squeeze(1)


def _population_states(parameters: Mapping[str, Tensor], name: str, x: Tensor, mask: Tensor) -> Tensor:
    """The attention-LSTM vectors (pop, hidden, batch): texts come last, so that no product has to be rearranged.

    Texts go in order of length, so that those that go on at a step are the first ones, and padding costs nothing.
    """
    to_input, to_state, *biases = (
        parameters[f"{name}.lstm.{part}_l0"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    pop, gates, hidden = to_state.shape
    stacked, bias = to_input.flatten(0, 1), (biases[0] + biases[1]).view(-1, 1)
    lengths, order = mask.sum(dim=1).sort(descending=True)
    tokens = x[order].permute(1, 2, 0)[: lengths[0]].contiguous()  # (tokens, dim, batch)
    cell = state = x.new_zeros(pop, hidden, len(x))
    scores = x.new_full((len(tokens), pop, 1, len(x)), -math.inf)
    states = []
    for step, going_on in enumerate((torch.arange(len(tokens), device=x.device)[:, None] < lengths).sum(dim=1).tolist()):
        sums = torch.addmm(bias, stacked, tokens[step, :, :going_on]).view(pop, gates, going_on)
        sums.baddbmm_(to_state, state[..., :going_on])
        enter, keep, new, leave = sums.split(hidden, dim=1)
        cell = keep.sigmoid_().mul_(cell[..., :going_on]).addcmul_(enter.sigmoid_(), new.tanh_())
        state = leave.sigmoid_() * cell.tanh()
        states.append(state)
        scores[step, ..., :going_on] = _affine(parameters, f"{name}.score", _affine(parameters, f"{name}.project", state).tanh_())
    total = x.new_zeros(pop, hidden, len(x))
    for weight, each in zip(scores.softmax(dim=0), states, strict=True):
        total[..., : each.shape[-1]].addcmul_(weight[..., : each.shape[-1]], each)
    return total[..., order.argsort()]


def _affine(parameters: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """`nn.Linear` of each individual on columns: (pop, in, batch) to (pop, out, batch)."""
    weight, bias = parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
    return weight @ x if bias is None else torch.baddbmm(bias.unsqueeze(-1), weight, x)


def _compare(u: Tensor, w: Tensor, symmetric: bool, dim: int) -> Tensor:
    return torch.cat([*(() if symmetric else (u, w)), (u - w).abs(), u * w], dim=dim)


def _check_texts(name: str, x: Tensor, mask: Tensor) -> None:
    if x.ndim != 3 or mask.shape != x.shape[:2]:
        raise ValueError(
            f"{name} must be (batch, tokens, dim) with a mask (batch, tokens), got {tuple(x.shape)} and {tuple(mask.shape)}"
        )
    if not mask.any(dim=1).all():
        raise ValueError(f"{name} must have a token in each text, has none in text {int((~mask.any(dim=1)).nonzero()[0])}")
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError(f"{name} must have its padding after the tokens, has a token after padding")


class PlagiarismDetector(ClassifierMixin, BaseEstimator):
    """Classifies pairs of texts, as a scikit-learn estimator: encode, search for starting weights, train, stop early.

    Args:
        encoder: from a list of texts to one (tokens, width) array each. With sentence-transformers:
            `functools.partial(model.encode, output_value="token_embeddings")`. It stays as it is: only what reads it is trained.
        init: how training starts: `"clude"`; `"de"`, plain differential evolution; `"best-of-random"`; or `"random"`, PyTorch's
            own weights, without a search. The three searches evaluate as many individuals, up to rounding.
        loss: `"focal"` or `"bce"`, in search and training.
        alpha: of the focal loss: the weight of positives, or `None` for equal weights.
        gamma: of the focal loss.
        hidden: width of the attention-LSTM.
        symmetric: whether the order of a pair is not to matter.
        pop_size: individuals of the search.
        generations: generations of Clu-DE; what the other searches evaluate follows from these.
        spread: width of the first population, in standard deviations of the initial weights.
        F: scale of the differences, as `CR` only for `"clude"` and `"de"`.
        CR: probability that a component comes from the mutant.
        search_pairs: pairs that an individual is evaluated on at most, drawn so that both classes keep their share.
        learning_rate: of Adam.
        batch_size: pairs a step.
        max_epochs: passes over the training pairs.
        patience: epochs without a lower validation loss before training ends.
        validation_fraction: part of the pairs held out for that, where `fit` is given no `eval_set`.
        random_state: seed of all that is drawn.
        device: where to train.

    Attributes:
        model_: the `AttentionLSTMPair`, with the weights of its best epoch.
        classes_: the two labels; the second is the positive one.
        search_: `CluDEResult` of the search; `None` with `init="random"`.
        history_: of each epoch a dictionary of `loss` and `validation loss`; the first, before training, has only the latter.

    Raises:
        ValueError: in `fit`, for unknown names, labels that are not of two classes, or a text without tokens.

    Source:
        Moravvej et al., 2023, arXiv 2305.02374. Our choice, as the details were not at hand: sizes, Adam at 1e-3, early stopping
        on the validation loss, and that the search minimises the training loss on a fixed sample of the training pairs.
    """

    def __init__(
        self,
        encoder: Encoder,
        init: str = "clude",
        loss: str = "focal",
        *,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        hidden: int = 32,
        symmetric: bool = False,
        pop_size: int = 30,
        generations: int = 20,
        spread: float = 3.0,
        F: float = 0.5,
        CR: float = 0.9,
        search_pairs: int = 512,
        learning_rate: float = 1e-3,
        batch_size: int = 64,
        max_epochs: int = 30,
        patience: int = 5,
        validation_fraction: float = 0.2,
        random_state: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.encoder = encoder
        self.init = init
        self.loss = loss
        self.alpha = alpha
        self.gamma = gamma
        self.hidden = hidden
        self.symmetric = symmetric
        self.pop_size = pop_size
        self.generations = generations
        self.spread = spread
        self.F = F
        self.CR = CR
        self.search_pairs = search_pairs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.device = device

    def fit(
        self,
        X: Sequence[tuple[str, str]],
        y: Sequence[Any] | np.ndarray,
        eval_set: tuple[Sequence[tuple[str, str]], Sequence[Any] | np.ndarray] | None = None,
    ) -> "PlagiarismDetector":
        """Train on pairs of texts.

        Args:
            X: the pairs.
            y: their labels, of two classes.
            eval_set: pairs and labels to stop on. Give them where pairs share texts: a random part of the pairs would not be new.
        """
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {self.init!r}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be 'focal' or 'bce', got {self.loss!r}")
        self.classes_, target = np.unique(np.asarray(y), return_inverse=True)
        if len(self.classes_) != 2 or len(target) != len(X):
            raise ValueError(f"y must give one of two classes for each of {len(X)} pairs, got {len(target)} of {self.classes_}")
        seed = np.random.SeedSequence(self.random_state)
        rng = np.random.default_rng(seed)
        if eval_set is None:
            held_out = _stratified(target, self.validation_fraction * len(target), rng)
            rest = np.setdiff1d(np.arange(len(target)), held_out)
            train, validation = _Pairs([X[i] for i in rest], target[rest]), _Pairs([X[i] for i in held_out], target[held_out])
        else:
            pairs, labels = eval_set
            if not np.isin(labels, self.classes_).all():
                raise ValueError(f"eval_set must have the labels {self.classes_} of y, got {np.unique(np.asarray(labels))}")
            train, validation = _Pairs(X, target), _Pairs(pairs, np.searchsorted(self.classes_, np.asarray(labels)))
        train.read(self.encoder, self.device)
        validation.read(self.encoder, self.device)

        generator = torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0]))
        width = train.states.shape[-1]
        model = AttentionLSTMPair(width, self.hidden, symmetric=self.symmetric, generator=generator).to(self.device)
        sample = _stratified(train.target, self.search_pairs, rng)  # drawn in any case: training then has the same order
        self.search_ = None if self.init == "random" else self._search(model, train.batch(sample), generator)
        self.model_ = self._train(model, train, validation, rng)
        return self

    def predict_proba(self, X: Sequence[tuple[str, str]]) -> Float[np.ndarray, "pairs 2"]:
        """Probabilities of both classes, in the order of `classes_`."""
        pairs = _Pairs(X, np.zeros(len(X), dtype=np.int64))
        pairs.read(self.encoder, self.device)
        positive = _logits(self.model_, pairs).sigmoid().double().cpu().numpy()
        return np.stack([1 - positive, positive], axis=1)

    def predict(self, X: Sequence[tuple[str, str]]) -> np.ndarray:
        """The more probable class of each pair. Focal loss does not calibrate: to choose a threshold, use `predict_proba`."""
        return self.classes_[self.predict_proba(X).argmax(axis=1)]

    def _loss(self, logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        if self.loss == "bce":
            return nn.functional.binary_cross_entropy_with_logits(logits, target, reduction=reduction)
        return sigmoid_focal_loss(logits, target, alpha=self.alpha, gamma=self.gamma, reduction=reduction)

    def _search(self, model: nn.Module, sample: tuple[Tensor, ...], generator: torch.Generator) -> CluDEResult:
        *inputs, target = sample

        def losses(parameters: dict[str, Tensor]) -> Tensor:
            logits = population_logits(parameters, *inputs)
            return self._loss(logits, target.expand_as(logits), "none").mean(dim=1)

        after_first = self.generations * (self.pop_size + math.ceil(self.pop_size / 5))
        effort = {
            "clude": {"pop_size": self.pop_size, "generations": self.generations},
            "de": {"pop_size": self.pop_size, "generations": round(after_first / self.pop_size), "clustering": False},
            "best-of-random": {"pop_size": self.pop_size + after_first, "generations": 0},
        }
        settings: dict[str, Any] = {"stacked": True, "spread": self.spread, "F": self.F, "CR": self.CR, "generator": generator}
        return clude_initialize(model, losses, **effort[self.init], **settings)

    def _train(self, model: nn.Module, train: "_Pairs", validation: "_Pairs", rng: np.random.Generator) -> nn.Module:
        def validation_loss() -> float:
            return self._loss(_logits(model, validation), validation.target_tensor).item()

        optimizer = torch.optim.Adam(model.parameters(), lr=self.learning_rate)
        lowest, best, since = validation_loss(), copy.deepcopy(model.state_dict()), 0
        self.history_ = [{"validation loss": lowest}]
        for _ in range(self.max_epochs):
            losses = []
            model.train()
            order = rng.permutation(len(train.target))
            for start in range(0, len(order), self.batch_size):
                *inputs, target = train.batch(order[start : start + self.batch_size])
                loss = self._loss(model(*inputs), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            value = validation_loss()
            self.history_.append({"loss": float(np.mean(losses)), "validation loss": value})
            since += 1
            if value < lowest:
                lowest, best, since = value, copy.deepcopy(model.state_dict()), 0
            if since == self.patience:
                break
        model.load_state_dict(best)
        return model


class _Pairs:
    """Pairs of texts; after `read` each different text once as padded token vectors."""

    def __init__(self, pairs: Sequence[tuple[str, str]], target: Int[np.ndarray, " pairs"]) -> None:
        self.row_of = {text: row for row, text in enumerate(dict.fromkeys(text for pair in pairs for text in pair))}
        self.rows = torch.tensor([[self.row_of[a], self.row_of[b]] for a, b in pairs]).view(-1, 2)
        self.target = target

    def read(self, encoder: Encoder, device: str | torch.device) -> None:
        vectors = [torch.as_tensor(each).float() for each in encoder(list(self.row_of))]
        empty = [text for text, each in zip(self.row_of, vectors, strict=True) if not len(each)]
        if empty:
            raise ValueError(f"X must have no text without tokens, got {empty[0]!r}")
        lengths = torch.tensor([len(each) for each in vectors])
        self.states = nn.utils.rnn.pad_sequence(vectors, batch_first=True).to(device)
        self.mask = (torch.arange(self.states.shape[1]) < lengths[:, None]).to(device)
        self.target_tensor = torch.from_numpy(self.target).float().to(device)

    def batch(self, rows: Int[np.ndarray, " batch"]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Vectors and mask of both sides, as short as the longest text allows, and targets."""
        inputs = []
        for side in self.rows[rows].T:
            mask = self.mask[side]
            longest = int(mask.sum(dim=1).max())
            inputs += [self.states[side, :longest], mask[:, :longest]]
        a, a_mask, b, b_mask = inputs
        return a, a_mask, b, b_mask, self.target_tensor[rows]


@torch.no_grad()
def _logits(model: nn.Module, pairs: _Pairs) -> Float[Tensor, " pairs"]:
    model.eval()
    blocks = np.array_split(np.arange(len(pairs.target)), max(1, len(pairs.target) // 512))
    return torch.cat([model(*pairs.batch(block)[:-1]) for block in blocks])


def _stratified(target: Int[np.ndarray, " pairs"], size: float, rng: np.random.Generator) -> Int[np.ndarray, " sample"]:
    """Rows drawn so that both classes keep their share, at least one of each; all if there are no more than `size`."""
    share = min(1.0, size / len(target))
    drawn = [
        rng.choice(rows, max(1, round(share * len(rows))), replace=False)
        for rows in (np.flatnonzero(target == label) for label in np.unique(target))
    ]
    return np.sort(np.concatenate(drawn))
