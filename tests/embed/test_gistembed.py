import math
import os
import subprocess
import sys

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from firsthand.embed.gistembed import GISTLoss, _gather, add_guide_embeddings, contrastive_loss, gist_loss, gist_mask
from firsthand.studies import gistembed as study

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane, so that cosines can be read off angles."""
    angle = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Twelve pairs with a guide that removes some candidates and keeps others."""
    topics = random(4, 5, seed=1).repeat(3, 1)
    return {
        "query": random(12, 16, seed=2),
        "positive": random(12, 16, seed=3),
        "guide_query": topics + 0.7 * random(12, 5, seed=4),
        "guide_positive": topics + 0.7 * random(12, 5, seed=5),
    }


@pytest.fixture
def negatives() -> dict[str, torch.Tensor]:
    return {"negatives": random(12, 2, 16, seed=6), "guide_negatives": random(12, 2, 5, seed=7)}


@pytest.fixture
def unchecked():
    """What a user runs: no shapes checked for them, so our own messages must do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# --- the mask -------------------------------------------------------------------------------------------------------------


def test_mask_read_off_angles():
    # Thresholds: 31, 40 and 10 degrees between each query and its own positive; what is nearer than that goes.
    query, positive = at(0, 100, 20), at(31, 140, 10)
    removed = gist_mask(query, positive, at(180, 95, 200)[:, None])
    assert removed["query_positive"].tolist() == [[False, False, True], [False, False, False], [False, False, False]]
    assert removed["query_query"].tolist() == [[True, False, True], [False, True, False], [False, False, True]]
    assert removed["positive_positive"].tolist() == [[True, False, True], [False, True, False], [False, False, True]]
    assert removed["query_negative"].tolist() == [[False, False, False], [False, True, False], [False, False, False]]


def test_margins_move_the_threshold():
    query, positive = at(0, 90), at(60, 95)  # cos 60 = 0.5 is the first row's threshold
    negative = at(70, 299)[:, None]  # 0.342 and 0.485
    first_row = lambda **margin: gist_mask(query, positive, negative, **margin)["query_negative"][0].tolist()  # noqa: E731
    assert first_row() == [False, False]
    assert first_row(margin=0.1) == [False, True]
    assert first_row(margin=0.2) == [True, True]
    assert first_row(margin=0.3, margin_strategy="relative") == [False, True]  # 0.35
    assert first_row(margin=0.4, margin_strategy="relative") == [True, True]  # 0.3


def test_own_positive_is_never_removed_and_self_similarity_always(batch):
    for margin in (0.0, 3.0):
        removed = gist_mask(batch["guide_query"], batch["guide_positive"], margin=margin)
        assert not removed["query_positive"].diagonal().any()
        assert removed["query_query"].diagonal().all()
        assert removed["positive_positive"].diagonal().all()
    off_diagonal = ~torch.eye(12, dtype=torch.bool)
    assert removed["query_positive"][off_diagonal].all()  # a margin of 3 leaves nothing


def test_a_pair_seen_twice_stays_without_margin_and_goes_with_one(batch):
    query, positive = (torch.cat([batch[name], batch[name][:1]]) for name in ("guide_query", "guide_positive"))
    assert not gist_mask(query, positive)["query_positive"][0, 12]
    assert gist_mask(query, positive, margin=1e-6)["query_positive"][0, 12]


def test_mask_leaves_out_the_blocks_not_asked_for(batch):
    removed = gist_mask(batch["guide_query"], batch["guide_positive"], contrast_queries=False, contrast_positives=False)
    assert list(removed) == ["query_positive"]


# --- the loss against closed forms and other libraries --------------------------------------------------------------------


@pytest.mark.parametrize("hard", [0, 1, 3])
def test_orthogonal_texts_have_a_closed_form(hard):
    rows, temperature = 4, 0.5
    basis = torch.eye(rows * (1 + hard))
    query = positive = basis[:rows]
    negatives = basis[rows:].reshape(rows, hard, -1) if hard else None
    others = 3 * (rows - 1) + rows * hard  # other positives, queries, positives; and every hard negative
    expected = math.log(1 + others * math.exp(-1 / temperature))
    assert gist_loss(query, positive, negatives=negatives, temperature=temperature).item() == pytest.approx(expected)


class Columns(nn.Module):
    """Stands for a SentenceTransformer: the features already are the embeddings."""

    def __init__(self, column: str) -> None:
        super().__init__()
        self.column = column

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": features[self.column]}


@pytest.mark.parametrize("with_negative", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"margin": 0.1},
        {"margin": 0.3, "margin_strategy": "relative"},
        {"contrast_queries": False},
        {"contrast_positives": False},
    ],
    ids=str,
)
def test_agrees_with_sentence_transformers(batch, with_negative, options):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    student = [batch["query"].requires_grad_(), batch["positive"].requires_grad_()]
    guide = [batch["guide_query"], batch["guide_positive"]]
    if with_negative:
        student.append(random(12, 16, seed=8).requires_grad_())
        guide.append(random(12, 5, seed=9))

    theirs = losses.GISTEmbedLoss.__new__(losses.GISTEmbedLoss)  # its constructor asks for tokenizers
    nn.Module.__init__(theirs)
    theirs.model, theirs.guide, theirs.must_retokenize = Columns("student"), Columns("guide"), False
    theirs.similarity_fct, theirs.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()
    theirs.temperature, theirs.gather_across_devices = 0.05, False
    theirs.margin, theirs.margin_strategy = options.get("margin", 0.0), options.get("margin_strategy", "absolute")
    theirs.contrast_anchors = options.get("contrast_queries", True)
    theirs.contrast_positives = options.get("contrast_positives", True)
    expected = theirs([{"student": s, "guide": g} for s, g in zip(student, guide, strict=True)], None)

    ours = gist_loss(
        *student[:2],
        guide_query=guide[0],
        guide_positive=guide[1],
        negatives=student[2][:, None] if with_negative else None,
        guide_negatives=guide[2][:, None] if with_negative else None,
        temperature=0.05,
        **options,
    )
    torch.testing.assert_close(ours, expected)
    for mine, other in zip(torch.autograd.grad(ours, student), torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("guided", [False, True])
def test_without_a_guide_or_with_an_indifferent_one_it_is_the_improved_contrastive_loss(batch, guided):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    query, positive = batch["query"], batch["positive"]
    indifferent = torch.eye(12)  # each pair its own basis vector: the threshold is 1 and nothing is above it
    guide = {"guide_query": indifferent, "guide_positive": indifferent} if guided else {}
    theirs = losses.MultipleNegativesRankingLoss(
        Columns(""), scale=20.0, directions=("query_to_doc", "query_to_query", "doc_to_doc"), partition_mode="joint"
    )
    expected = theirs.compute_loss_from_embeddings([query, positive], None)
    torch.testing.assert_close(gist_loss(query, positive, **guide, temperature=0.05), expected)


def test_query_to_positive_alone_is_multiple_negatives_ranking(batch, negatives):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    hard = negatives["negatives"]
    expected = losses.MultipleNegativesRankingLoss(Columns(""), scale=20.0).compute_loss_from_embeddings(
        [batch["query"], batch["positive"], *hard.unbind(1)], None
    )
    ours = gist_loss(
        batch["query"],
        batch["positive"],
        negatives=hard,
        temperature=0.05,
        contrast_queries=False,
        contrast_positives=False,
    )
    torch.testing.assert_close(ours, expected)


def test_nothing_left_to_contrast_costs_nothing(batch):
    same = torch.ones(12, 3)  # to this guide all texts are one
    query, positive = batch["query"].requires_grad_(), batch["positive"].requires_grad_()
    loss = gist_loss(query, positive, guide_query=same, guide_positive=same, margin=1e-3)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, [query, positive]):
        assert not gradient.any()


def test_a_removed_negative_is_as_if_it_had_not_been_there(batch, negatives):
    axis = torch.eye(5)[0]
    batch["guide_query"] = axis + 0.1 * random(12, 5, seed=10)
    batch["guide_positive"] = torch.eye(5)[1].expand(12, 5)  # unrelated to the query, so the threshold is near 0
    guide_negatives = torch.stack([-axis, axis]).expand(12, 2, 5)  # the first is far below it, the second far above
    both = negatives["negatives"].requires_grad_()
    loss = gist_loss(**batch, negatives=both, guide_negatives=guide_negatives)
    without = gist_loss(**batch, negatives=both[:, :1], guide_negatives=guide_negatives[:, :1])
    torch.testing.assert_close(loss, without)
    (gradient,) = torch.autograd.grad(loss, both)
    assert not gradient[:, 1].any()


def test_hard_mode_read_off_angles():
    # Row 0: positive at 40 degrees; candidates nearer to it than that are hard. Row 1 ranks its positive first.
    query, positive, negative = at(0, 180), at(40, 180), at(30, 90)[:, None]
    temperature = 0.5
    logits = [math.cos(math.radians(angle)) / temperature for angle in (40, 30)]
    expected = math.log(sum(map(math.exp, logits))) - logits[0]
    losses = gist_loss(query, positive, negatives=negative, negative_mode="hard", temperature=temperature, reduction="none")
    torch.testing.assert_close(losses, torch.tensor([expected, 0.0]))
    assert losses[1] == 0


def test_contrastive_loss_takes_any_mask(batch):
    query, positive = batch["query"], batch["positive"]
    nothing = torch.zeros(12, 12, dtype=torch.bool)
    expected = F.cross_entropy(F.normalize(query) @ F.normalize(positive).T / 0.1, torch.arange(12))
    only = {"contrast_queries": False, "contrast_positives": False}
    loss = contrastive_loss(query, positive, {"query_positive": nothing}, temperature=0.1, **only)
    torch.testing.assert_close(loss, expected)
    others = {"query_positive": ~nothing}
    assert contrastive_loss(query, positive, others, temperature=0.1, **only) == 0  # but the positive is never removed


# --- invariances and gradients --------------------------------------------------------------------------------------------


def test_only_directions_matter(batch, negatives):
    everything = batch | negatives
    expected = gist_loss(**everything)
    for name, value in everything.items():
        scale = 0.1 + 5 * torch.rand(*value.shape[:-1], 1, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(gist_loss(**everything | {name: value * scale}), expected)


def test_order_of_the_batch_does_not_matter(batch, negatives):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    everything = batch | negatives
    permuted = {name: value[order] for name, value in everything.items()}
    losses = gist_loss(**everything, reduction="none")
    torch.testing.assert_close(gist_loss(**permuted, reduction="none"), losses[order])
    torch.testing.assert_close(gist_loss(**everything, reduction="sum"), losses.sum())
    torch.testing.assert_close(gist_loss(**everything), losses.mean())


def test_no_gradient_through_the_guide(batch, negatives):
    everything = {name: value.requires_grad_() for name, value in (batch | negatives).items()}
    gist_loss(**everything, negative_mode="hard").backward()
    for name, value in everything.items():
        assert (value.grad is None) == name.startswith("guide"), name


def test_an_embedding_of_zeros_gives_finite_numbers(batch):
    batch["query"][0] = batch["guide_query"][0] = 0.0
    query = batch.pop("query").requires_grad_()
    loss = gist_loss(query, **batch)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, query)[0].isfinite().all()


def test_gradient_numerically(batch, negatives):
    everything = {name: value.double() for name, value in (batch | negatives).items()}
    query = everything.pop("query").requires_grad_()
    assert torch.autograd.gradcheck(lambda q: gist_loss(q, **everything, temperature=0.2), query)


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_follows_the_input_and_computes_in_float32(batch, negatives, device):
    half = {name: value.to(device, torch.bfloat16) for name, value in (batch | negatives).items()}
    loss = gist_loss(**half)
    assert loss.dtype == torch.bfloat16
    assert loss.device.type == device
    expected = gist_loss(**{name: value.float() for name, value in half.items()})
    torch.testing.assert_close(loss, expected.bfloat16())
    with torch.autocast(device, dtype=torch.bfloat16):
        torch.testing.assert_close(gist_loss(**{name: value.float() for name, value in half.items()}), expected)


def test_compiles_into_one_graph(batch, negatives, unchecked):
    everything = batch | negatives
    compiled = torch.compile(gist_loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**everything), gist_loss(**everything))


# --- the study's control --------------------------------------------------------------------------------------------------


def test_random_mask_removes_as_many_in_each_row(batch):
    removed = gist_mask(batch["guide_query"], batch["guide_positive"])
    shuffled = study.shuffled(removed, torch.Generator().manual_seed(0))
    for block, gone in removed.items():
        assert shuffled[block].sum(dim=1).equal(gone.clone().fill_diagonal_(False).sum(dim=1))
        assert not shuffled[block].diagonal().any()
        assert not shuffled[block].equal(gone)


def test_false_negatives_are_counted():
    groups = torch.tensor([7, 7, 8])
    first, second = torch.eye(3, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool)
    first[0, 1] = True
    counts = study.count({"query_positive": first, "query_query": second}, groups)
    assert counts.tolist() == [[3, 4], [4, 8]]


# --- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"margin": float("inf")}, "margin must be finite, got inf"),
        ({"margin_strategy": "both"}, "margin_strategy must be 'absolute' or 'relative', got 'both'"),
        ({"negative_mode": "easy"}, "negative_mode must be 'all' or 'hard', got 'easy'"),
        ({"reduction": "max"}, "reduction"),
        ({"guide_positive": None}, "guide_query and guide_positive"),
        ({"guide_query": None}, "guide_query and guide_positive"),
        ({"guide_query": None, "guide_positive": None}, "guide_negatives"),
        ({"guide_negatives": None}, "guide_negatives"),
        ({"negatives": None}, "guide_negatives"),
        ({"negatives": random(12, 3, 16)}, r"guide_negatives .*\(12, 2, 5\)"),
        ({"negatives": random(12, 2, 8)}, r"negatives must have shape \(12, K, 16\)"),
        ({"positive": random(11, 16)}, r"positive must have shape \(12, 16\) like query, got \(11, 16\)"),
        ({"query": random(16)}, r"query must have shape \(B, d\)"),
        ({"guide_query": random(11, 5)}, r"guide_query must have as many rows as query, 12, got \(11, 5\)"),
        ({"guide_positive": random(12, 4)}, r"guide_positive must have shape \(12, 5\)"),
        ({"query": torch.ones(12, 16, dtype=torch.long)}, "query must be floating point"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(batch, negatives, unchecked, change, message):
    with pytest.raises(ValueError, match=message):
        gist_loss(**batch | negatives | change)


def test_one_row_without_negatives_has_nothing_to_contrast(unchecked):
    with pytest.raises(ValueError, match="at least 2 rows"):
        gist_loss(random(1, 4), random(1, 4))
    assert gist_loss(random(1, 4), random(1, 4), negatives=random(1, 2, 4)).isfinite()


def test_mask_of_other_candidates(batch, unchecked):
    pairs = {"query": batch["query"], "positive": batch["positive"], "contrast_queries": False, "contrast_positives": False}
    nothing = torch.zeros(12, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"removed\['query_positive'\] must have shape \(12, 12\), got \(3, 3\)"):
        contrastive_loss(**pairs, removed={"query_positive": nothing[:3, :3]})
    with pytest.raises(ValueError, match="removed must have the blocks query_positive, got none"):
        contrastive_loss(**pairs, removed={})
    with pytest.raises(ValueError, match="got query_positive, anchors"):
        contrastive_loss(**pairs, removed={"query_positive": nothing, "anchors": nothing})


# --- inside sentence-transformers -----------------------------------------------------------------------------------------

WORDS = ["cat", "dog", "bird", "fish", "runs", "sleeps", "eats", "flies", "red", "green", "blue", "old"]


class CountingGuide:
    """Embeds a text as the counts of its words; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        self.asked += texts
        return np.array([[text.split().count(word) for word in WORDS] for text in texts], dtype=np.float64)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a tiny BERT of random weights and a tokenizer that knows a dozen words."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=5 + len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(bert):
    st = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    transformer = st.sentence_transformer.modules.Transformer(bert)
    return st.SentenceTransformer(
        modules=[transformer, st.sentence_transformer.modules.Pooling(16, pooling_mode="mean")], device="cpu"
    )


@pytest.fixture
def triplets():
    datasets = pytest.importorskip("datasets")
    choose = np.random.default_rng(0)
    columns = ("anchor", "positive", "negative_1", "negative_2")
    return datasets.Dataset.from_dict({name: [" ".join(choose.choice(WORDS, 3)) for _ in range(17)] for name in columns})


def test_guide_embeddings_follow_the_columns_and_each_text_is_encoded_once(triplets):
    triplets = triplets.select([0, 1, 2, 0, 1]).add_column("id", list(range(5)))
    guide = CountingGuide()
    labelled = add_guide_embeddings(triplets, guide, dtype="float32")
    assert len(guide.asked) == len(set(guide.asked)) == 12
    assert labelled.column_names == [*triplets.column_names, "label"]
    assert labelled[3]["anchor"] == triplets[0]["anchor"]
    for row in labelled:
        texts = [row[name] for name in ("anchor", "positive", "negative_1", "negative_2")]
        expected = F.normalize(torch.tensor(CountingGuide().encode(texts, 1)).float())
        torch.testing.assert_close(row["label"], expected)


def test_guide_embeddings_of_chosen_columns_at_half_precision(triplets):
    columns = ["positive", "anchor"]
    exact = add_guide_embeddings(triplets, CountingGuide(), columns, dtype="float32")["label"][:]
    half = add_guide_embeddings(triplets, CountingGuide(), columns)["label"][:]
    assert half.shape == (17, 2, len(WORDS))
    torch.testing.assert_close(half, exact, atol=5e-4, rtol=0)
    assert not half.equal(exact)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ["anchor"]}, r"columns must name at least 2 text columns.*\['anchor'\]"),
        ({"columns": ["anchor", "answer"]}, "columns must be columns of the data set, got answer"),
        ({"dtype": "int8"}, "dtype must be 'float16' or 'float32', got 'int8'"),
    ],
)
def test_bad_columns(triplets, options, message):
    with pytest.raises(ValueError, match=message):
        add_guide_embeddings(triplets, CountingGuide(), **options)


def test_bad_guide_and_labels_already_there(triplets):
    guide = CountingGuide()
    guide.encode = lambda texts, batch_size: np.full((len(texts), 3), np.nan)
    with pytest.raises(ValueError, match="guide must return a finite vector"):
        add_guide_embeddings(triplets, guide)
    with pytest.raises(ValueError, match="no label column yet, got label"):
        add_guide_embeddings(triplets.add_column("label", [0] * 17), CountingGuide())


def features_of(model, rows):
    return [model.preprocess(list(rows[name])) for name in ("anchor", "positive", "negative_1", "negative_2")]


def test_loss_is_gist_loss_of_the_embeddings(model, triplets):
    rows = add_guide_embeddings(triplets, CountingGuide())[:]
    model.eval()
    embeddings = [model.encode(list(rows[name]), convert_to_tensor=True) for name in triplets.column_names]
    guide = rows["label"]
    expected = gist_loss(
        *embeddings[:2],
        guide_query=guide[:, 0],
        guide_positive=guide[:, 1],
        negatives=torch.stack(embeddings[2:], dim=1),
        guide_negatives=guide[:, 2:],
        temperature=0.1,
        margin=0.05,
    )
    loss = GISTLoss(model, temperature=0.1, margin=0.05)(features_of(model, rows), guide)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("columns", [["anchor", "positive"], ["anchor", "positive", "negative_1", "negative_2"]], ids=len)
def test_trains_in_the_trainer(model, triplets, tmp_path, columns):
    st = pytest.importorskip("sentence_transformers")
    labelled = add_guide_embeddings(triplets.select_columns(columns), CountingGuide())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = st.SentenceTransformerTrainer(
        model=model,
        args=st.SentenceTransformerTrainingArguments(
            str(tmp_path / "run"),
            num_train_epochs=2,
            per_device_train_batch_size=4,  # 17 rows: the last batch of an epoch is a single pair
            learning_rate=1e-2,
            batch_sampler="no_duplicates",
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=labelled,
        loss=GISTLoss(model, temperature=0.1, margin=0.05),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(map(math.isfinite, losses))
    assert any(losses)
    assert not all(map(torch.equal, before, model.parameters()))
    model.save_pretrained(str(tmp_path / "saved"))
    again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(again.encode(["old cat"]), model.encode(["old cat"]), atol=1e-6)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "GISTLoss" in card
    assert '"margin": 0.05' in card


def test_composes_with_matryoshka(model, triplets):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    rows = add_guide_embeddings(triplets, CountingGuide())[:]
    inner = GISTLoss(model)
    nested = losses.MatryoshkaLoss(model, inner, matryoshka_dims=[16, 4], matryoshka_weights=[1, 0])
    model.eval()
    whole = inner(features_of(model, rows), rows["label"])
    torch.testing.assert_close(nested(features_of(model, rows), rows["label"]), whole)


def test_config_holds_every_option():
    options = {"temperature": 0.02, "negative_mode": "hard", "margin": 0.1, "contrast_queries": False}
    config = GISTLoss(nn.Identity(), **options).get_config_dict()
    assert config | options == config
    assert GISTLoss(nn.Identity(), **config).get_config_dict() == config


def test_labels_that_are_no_guide_embeddings(model, triplets, unchecked):
    rows = triplets[:]
    loss = GISTLoss(model)
    for labels in (None, torch.zeros(17), torch.zeros(17, 2, 8)):
        with pytest.raises(ValueError, match=r"shape \(17, 4, width\).*add_guide_embeddings"):
            loss(features_of(model, rows), labels)
    with pytest.raises(ValueError, match="at least 2 text columns"):
        loss(features_of(model, rows)[:1], torch.zeros(17, 1, 8))


def gather_and_backpropagate(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    data = torch.load(f"{folder}/data.pt")
    mine = slice(6 * rank, 6 * rank + 6)
    texts = data["texts"][mine].requires_grad_()
    (query, positive), (guide_query, guide_positive) = _gather(texts).unbind(1), _gather(data["guide"][mine]).unbind(1)
    loss = gist_loss(query, positive, guide_query=guide_query, guide_positive=guide_positive)
    loss.backward()
    torch.save((loss.detach(), texts.grad), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then abort an orderly end


def test_gathering_is_training_on_the_whole_batch(batch, tmp_path):
    texts = torch.stack([batch["query"], batch["positive"]], dim=1).requires_grad_()
    guide = torch.stack([batch["guide_query"], batch["guide_positive"]], dim=1)
    torch.save({"texts": texts.detach(), "guide": guide}, tmp_path / "data.pt")
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    loss = gist_loss(texts[:, 0], texts[:, 1], guide_query=guide[:, 0], guide_positive=guide[:, 1])
    (expected,) = torch.autograd.grad(loss, texts)
    for rank in range(2):
        its_loss, gradient = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(its_loss, loss.detach())
        # Each of two processes has the whole loss; DistributedDataParallel takes the mean over processes.
        torch.testing.assert_close(gradient / 2, expected[6 * rank : 6 * rank + 6], atol=1e-5, rtol=1e-4)


if __name__ == "__main__":
    gather_and_backpropagate(int(sys.argv[1]), sys.argv[2])
