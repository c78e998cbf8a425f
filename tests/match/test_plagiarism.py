import pickle

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from sklearn.base import clone

from firsthand.match.clude import clude_initialize
from firsthand.match.plagiarism import AttentionLSTMPair, PlagiarismDetector, population_logits


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def texts(batch=6, tokens=7, dim=5, seed=0, dtype=torch.float32):
    """Random token vectors, with noise where the padding is."""
    generator = seeded(seed)
    lengths = torch.randint(1, tokens + 1, (batch,), generator=generator)
    x = torch.randn(batch, tokens, dim, generator=generator).to(dtype)
    return x, torch.arange(tokens) < lengths[:, None]


def population(size, **sizes):
    modules = [AttentionLSTMPair(5, 4, generator=seeded(i), **sizes) for i in range(size)]
    stacks = {name: torch.stack([m.get_parameter(name).detach() for m in modules]) for name, _ in modules[0].named_parameters()}
    return modules, stacks


# --- the pair model


def test_the_attention_is_the_formula_and_ignores_padding():
    encoder = AttentionLSTMPair(5, 4, generator=seeded()).encoder
    x, mask = texts()
    states, _ = encoder.lstm(x)
    weights = encoder.attention(states, mask)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(6))
    assert (weights[~mask] == 0).all()
    together = encoder(x, mask)
    for row in range(6):
        length = int(mask[row].sum())
        h = encoder.lstm(x[row : row + 1, :length])[0][0]
        a = torch.tanh(h @ encoder.project.weight.T + encoder.project.bias) @ encoder.score.weight[0]
        alpha = a.exp() / a.exp().sum()
        torch.testing.assert_close(together[row], sum(alpha[t] * h[t] for t in range(length)))


def test_padding_changes_nothing():
    model = AttentionLSTMPair(5, 4, generator=seeded())
    (a, a_mask), (b, b_mask) = texts(seed=1), texts(seed=2)
    expected = model(a, a_mask, b, b_mask)
    longer = torch.cat([a, torch.full((6, 3, 5), 1e3)], dim=1)
    torch.testing.assert_close(model(longer, torch.nn.functional.pad(a_mask, (0, 3)), b, b_mask), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_order_of_a_pair_matters_unless_symmetric(symmetric):
    model = AttentionLSTMPair(5, 4, symmetric=symmetric, generator=seeded())
    a, b = texts(seed=1), texts(tokens=9, seed=2)
    one, other = model(*a, *b), model(*b, *a)
    assert torch.allclose(one, other, atol=1e-6) == symmetric


def test_texts_share_an_lstm_or_have_their_own():
    shared, apart = AttentionLSTMPair(5, 4), AttentionLSTMPair(5, 4, shared=False)
    sizes = [sum(p.numel() for p in m.encoder.parameters()) for m in (shared, apart)]
    assert sum(p.numel() for p in apart.parameters()) - sum(p.numel() for p in shared.parameters()) == sizes[0]


def test_a_generator_draws_the_initial_weights_from_pytorchs_distribution():
    drawn = AttentionLSTMPair(40, 25, generator=seeded())
    torch.manual_seed(0)
    default = AttentionLSTMPair(40, 25)
    for (name, ours), theirs in zip(drawn.named_parameters(), default.parameters(), strict=True):
        if ours.numel() > 600:
            assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.01), name
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.08), name
    again = AttentionLSTMPair(40, 25, generator=seeded())
    assert all(torch.equal(p, q) for p, q in zip(drawn.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_bfloat16(device):
    (a, a_mask), (b, b_mask) = texts(seed=1), texts(seed=2)
    model = AttentionLSTMPair(5, 4, generator=seeded())
    expected = model(a, a_mask, b, b_mask)
    half = model.to(device, torch.bfloat16)
    inputs = [each.to(device) for each in (a.bfloat16(), a_mask, b.bfloat16(), b_mask)]
    logits = half(*inputs)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float().cpu(), expected, atol=0.03, rtol=0)
    stacks = {name: p.detach()[None] for name, p in half.named_parameters()}
    torch.testing.assert_close(population_logits(stacks, *inputs)[0].float().cpu(), expected, atol=0.03, rtol=0)


# --- a population in one pass


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_pass_gives_what_each_module_gives(shared, symmetric):
    modules, stacks = population(3, shared=shared, symmetric=symmetric)
    a, b = texts(seed=1), texts(tokens=9, seed=2)
    before = {name: stack.clone() for name, stack in stacks.items()}
    logits = population_logits(stacks, *a, *b)
    torch.testing.assert_close(logits, torch.stack([module(*a, *b) for module in modules]))
    assert all(torch.equal(stacks[name], before[name]) for name in stacks)


def test_one_pass_with_extreme_weights():
    modules, stacks = population(2)
    a, b = texts(seed=1), texts(seed=2)
    with torch.no_grad():
        for index, module in enumerate(modules):
            module.encoder.score.weight.mul_(1e4)  # the softmax over tokens must not overflow
            stacks["encoder.score.weight"][index] = module.encoder.score.weight
    torch.testing.assert_close(population_logits(stacks, *a, *b), torch.stack([module(*a, *b) for module in modules]))


def test_the_search_in_one_pass_is_the_search_one_by_one():
    a, b = texts(batch=20, seed=1), texts(batch=20, seed=2)
    target = (torch.arange(20) % 2).double()

    def pair():
        return AttentionLSTMPair(5, 4, generator=seeded()).double()

    def loss(logits):
        return torch.nn.functional.mse_loss(logits, target.expand_as(logits), reduction="none").mean(dim=-1)

    inputs = (a[0].double(), a[1], b[0].double(), b[1])
    one_by_one = clude_initialize(pair(), lambda m: loss(m(*inputs)), generations=3, generator=seeded())
    in_one = clude_initialize(
        pair(), lambda p: loss(population_logits(p, *inputs)), stacked=True, chunk_size=11, generations=3, generator=seeded()
    )
    torch.testing.assert_close(in_one.x, one_by_one.x)
    np.testing.assert_allclose(in_one.history, one_by_one.history)
    assert in_one.fun < in_one.history[0]


# --- bad input


def test_bad_texts():
    model = AttentionLSTMPair(5, 4)
    _, stacks = population(2)
    x, mask = texts()
    empty, gap = mask.clone(), torch.ones_like(mask)
    empty[2] = False
    gap[1, 0] = False
    for call in (model, lambda *args: population_logits(stacks, *args)):
        with pytest.raises(ValueError, match="b must have a token in each text, has none in text 2"):
            call(x, mask, x, empty)
        with pytest.raises(ValueError, match="a must have its padding after the tokens"):
            call(x, gap, x, mask)
        with pytest.raises((ValueError, TypeCheckError)):
            call(x, mask, x[:3], mask[:3])
        with pytest.raises((ValueError, TypeCheckError)):
            call(x, mask[:, :3], x, mask)
    with pytest.raises(ValueError, match="parameters must be those of an AttentionLSTMPair"):
        population_logits({"weight": torch.ones(2, 3)}, x, mask, x, mask)
    with pytest.raises(ValueError, match="hidden must be at least 1"):
        AttentionLSTMPair(5, 0)


# --- the estimator

WORDS = [f"word{i}" for i in range(30)]
VECTORS = dict(zip(WORDS, torch.randn(30, 6, generator=seeded()), strict=True))


def encode(sentences):
    return [
        torch.stack([VECTORS[word] for word in sentence.split()]) if sentence else torch.empty(0, 6) for sentence in sentences
    ]


def pairs(count, seed=0):
    """A third are the same text with one word left out, the others two texts."""
    rng = np.random.default_rng(seed)
    X, y = [], []
    for i in range(count):
        words = list(rng.choice(WORDS, 5))
        other = words[:2] + words[3:] if i % 3 == 0 else list(rng.choice(WORDS, 4))
        X.append((" ".join(words), " ".join(other)))
        y.append("copied" if i % 3 == 0 else "apart")
    return X, y


def detector(**kw):
    return PlagiarismDetector(encode, **({"hidden": 6, "pop_size": 8, "generations": 3, "max_epochs": 3, "random_state": 0} | kw))


@pytest.mark.parametrize("init", ["clude", "de", "random", "best-of-random"])
@pytest.mark.parametrize("loss", ["focal", "bce"])
def test_every_start_and_loss(init, loss):
    X, y = pairs(90)
    fitted = detector(init=init, loss=loss).fit(X, y)
    probabilities = fitted.predict_proba(X)
    assert probabilities.shape == (90, 2)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0)
    assert list(fitted.classes_) == ["apart", "copied"]
    assert set(fitted.predict(X)) <= {"apart", "copied"}
    if init == "random":
        assert fitted.search_ is None
    else:
        assert fitted.search_.evaluations == pytest.approx(8 + 3 * (8 + 2), abs=4)
    losses = [entry["validation loss"] for entry in fitted.history_]
    np.testing.assert_array_equal(fitted.predict_proba(X), detector(init=init, loss=loss).fit(X, y).predict_proba(X))
    assert len(losses) <= 4


def test_it_learns():
    (X, y), (X_test, y_test) = pairs(900), pairs(300, seed=1)
    fitted = detector(symmetric=True, max_epochs=40, hidden=16, learning_rate=5e-3, alpha=0.5).fit(X, y)
    assert fitted.score(X_test, y_test) > 0.85
    probabilities = fitted.predict_proba(X_test)
    np.testing.assert_allclose(fitted.predict_proba([(b, a) for a, b in X_test]), probabilities, atol=1e-6)


def test_the_best_epoch_is_kept_and_training_stops_early():
    X, y = pairs(60)
    fitted = detector(init="random", learning_rate=3.0, max_epochs=50, patience=2).fit(X, y, eval_set=pairs(60, seed=1))
    losses = [entry["validation loss"] for entry in fitted.history_]
    assert len(losses) < 51
    assert losses.index(min(losses)) == len(losses) - 3
    _, probability = fitted.predict_proba(pairs(60, seed=1)[0]).T
    target = np.array([label == "copied" for label in pairs(60, seed=1)[1]])
    p_t = np.where(target, probability, 1 - probability)
    focal = -np.where(target, 0.25, 0.75) * (1 - p_t) ** 2 * np.log(p_t)
    assert focal.mean() == pytest.approx(min(losses), rel=1e-4)


def test_it_is_a_scikit_learn_estimator_that_pickles():
    model = detector(init="de", alpha=None)
    assert clone(model).get_params() == model.get_params()
    X, y = pairs(60)
    fitted = model.fit(X, y)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).predict_proba(X), fitted.predict_proba(X))


def test_bad_fit():
    X, y = pairs(60)
    for words, kw in [("init must be one of", {"init": "best"}), ("loss must be 'focal' or 'bce'", {"loss": "hinge"})]:
        with pytest.raises(ValueError, match=words):
            detector(**kw).fit(X, y)
    with pytest.raises(ValueError, match="y must give one of two classes"):
        detector().fit(X, ["apart"] * 60)
    with pytest.raises(ValueError, match="y must give one of two classes for each of 60 pairs"):
        detector().fit(X, y[:-1])
    with pytest.raises(ValueError, match="eval_set must have the labels"):
        detector().fit(X, y, eval_set=(X, ["other"] * 60))
    with pytest.raises(ValueError, match="no text without tokens"):
        detector().fit([("", X[0][1]), *X[1:]], y)
