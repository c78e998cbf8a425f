import json
import math
import subprocess
import sys

import jaxtyping
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import f1_score

from firsthand.match.ditto import DittoCollator, DittoModel, best_f1_threshold
from firsthand.match.matcher import DittoMatcher
from firsthand.match.records import DomainKnowledge, TfidfSummarizer
from firsthand.testbeds import embedding

transformers = pytest.importorskip("transformers")

COLOURS = ["red", "green", "blue", "white", "black", "grey", "pink", "brown"]
THINGS = ["lamp", "chair", "table", "shelf", "desk", "stool", "bench", "couch"]


def record(number):
    return {"name": f"{COLOURS[number % 8]} {THINGS[number // 8 % 8]}", "year": 1990 + number % 5}


@pytest.fixture(scope="module")
def pairs():
    """Records with themselves in other words, or with another record."""
    numbers = np.random.default_rng(0).integers(64, size=48).tolist()
    labels = [number % 2 for number in range(48)]
    return [(record(n), record(n if y else (n + 9) % 64)) for n, y in zip(numbers, labels, strict=True)], labels


@pytest.fixture(scope="module")
def tokenizer():
    return embedding.tokenizer([*COLOURS, *THINGS, "COL name VAL year 1990 1991 1992 1993 1994"] * 3, 300)


def bert(dropout=0.0, **config):
    sizes = {"hidden": 32, "layers": 1, "heads": 2, "hidden_dropout_prob": dropout}
    return embedding.bert(torch.Generator().manual_seed(0), 300, **(sizes | config))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DittoModel(bert()).train()


def examples(pairs):
    return [{"left": left, "right": right, "label": label} for (left, right), label in zip(*pairs, strict=True)]


@pytest.fixture
def batch(tokenizer, pairs):
    return DittoCollator(tokenizer, 64, "all", seed=0)(examples(pairs)[:6])


@pytest.fixture
def unchecked():
    """What a user runs: no types checked for them, so our own messages must do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def plain(batch):
    return {name: tensor for name, tensor in batch.items() if not name.startswith("aug_")}


# The model


def test_weight_one_is_the_pair_and_weight_zero_its_augmentation(model, batch):
    alone = model(**plain(batch)).logits
    torch.testing.assert_close(model(**batch, mix_weight=1.0).logits, alone, atol=1e-5, rtol=1e-4)
    augmented = {name.removeprefix("aug_"): batch[name] for name in batch if name.startswith("aug_")}
    other = model(**augmented).logits
    torch.testing.assert_close(model(**batch, mix_weight=0.0).logits, other, atol=1e-5, rtol=1e-4)
    half = model(**batch, mix_weight=0.5).logits
    torch.testing.assert_close(half, (alone + other) / 2, atol=1e-5, rtol=1e-4)  # the head is linear


def test_an_augmentation_that_changes_nothing_makes_no_difference_at_any_weight(model, batch):
    same = plain(batch) | {f"aug_{name}": tensor for name, tensor in plain(batch).items() if name != "labels"}
    torch.testing.assert_close(model(**same).logits, model(**plain(batch)).logits, atol=1e-5, rtol=1e-4)


def test_gradient_reaches_both_encodings_in_proportion(model, batch):
    embedded = []
    model.lm.embeddings.register_forward_hook(lambda module, args, output: (output.retain_grad(), embedded.append(output))[1])

    def gradients(weight):
        embedded.clear()
        model(**batch, mix_weight=weight).logits.sum().backward()
        return embedded[0].grad.chunk(2)

    full, none = gradients(1.0)
    assert not none.any()
    part, rest = gradients(0.3)
    torch.testing.assert_close(part, 0.3 * full, atol=1e-6, rtol=1e-4)
    assert rest.any()


def test_large_alpha_mixes_in_halves_and_folding_favours_the_pair():
    torch.manual_seed(0)
    lm = bert()
    drawn = [DittoModel(lm, alpha=1e6)._draw() for _ in range(20)]
    np.testing.assert_allclose(drawn, 0.5, atol=5e-3)
    small = DittoModel(lm, alpha=0.8)
    weights = np.array([small._draw() for _ in range(2000)])
    variance = 1 / (4 * (2 * 0.8 + 1))
    assert weights.mean() == pytest.approx(0.5, abs=0.03)
    assert weights.var() == pytest.approx(variance, rel=0.1)
    assert min(DittoModel(lm, fold_lambda=True)._draw() for _ in range(50)) >= 0.5


def test_no_augmentation_in_evaluation_and_padding_makes_no_difference(model, batch):
    model.eval()
    expected = model(**plain(batch)).logits
    torch.testing.assert_close(model(**batch).logits, expected)
    for row in range(6):
        length = int(batch["attention_mask"][row].sum())
        one = {
            name: batch[name][row : row + 1, :length]
            for name in ("input_ids", "attention_mask", "token_type_ids")
            if name in batch
        }
        torch.testing.assert_close(model(**one).logits, expected[row : row + 1], atol=1e-5, rtol=1e-4)


def test_loss_is_cross_entropy_and_bfloat16_is_near(model, batch):
    model.eval()
    output = model(**batch)
    expected = torch.nn.functional.cross_entropy(output.logits, batch["labels"])
    torch.testing.assert_close(output.loss, expected)
    low = DittoModel(bert().bfloat16())
    low.head.load_state_dict({name: tensor.bfloat16() for name, tensor in model.head.state_dict().items()})
    logits = low.eval()(**batch).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), output.logits, atol=0.03, rtol=0.03)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(model, batch):
    model.eval()
    there = model.cuda()(**{name: tensor.cuda() for name, tensor in batch.items()}).logits.cpu()
    torch.testing.assert_close(there, model.cpu()(**batch).logits, atol=1e-3, rtol=1e-3)


def test_bad_model_input(model, batch):
    for alpha in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="alpha must be positive and finite"):
            DittoModel(bert(), alpha=alpha)
    with pytest.raises(ValueError, match="aug_attention_mask must have shape"):
        model(**{name: tensor for name, tensor in batch.items() if name != "aug_attention_mask"})


# The collator


def test_batch_is_what_the_tokenizer_makes_of_the_texts(tokenizer, pairs):
    rows = examples(pairs)[:3]
    batch = DittoCollator(tokenizer, 64)(rows)
    left, right = "COL name VAL {name} COL year VAL {year}".format(**rows[0]["left"]), rows[0]["right"]
    expected = tokenizer(left, "COL name VAL {name} COL year VAL {year}".format(**right))["input_ids"]
    length = int(batch["attention_mask"][0].sum())
    assert batch["input_ids"][0, :length].tolist() == expected
    assert batch["labels"].tolist() == [row["label"] for row in rows]
    assert not any(name.startswith("aug_") for name in batch)


def test_order_is_knowledge_then_summary(tokenizer, pairs):
    summarizer = TfidfSummarizer().fit(["COL title VAL red lamp", "COL title VAL blue chair"])
    collate = DittoCollator(tokenizer, 19, summarizer=summarizer, knowledge=DomainKnowledge())
    left, _ = collate.texts({"left": {"title": "the lamp ab12345"}, "right": {"title": "lamp"}})
    assert left == "COL title VAL lamp ID ab12345"
    assert len(collate([{"left": "red " * 60, "right": "blue " * 60}])["input_ids"][0]) <= 19


def test_seeded_augmentation_repeats_resumes_and_by_default_follows_torch(tokenizer, pairs):
    rows = examples(pairs)

    def augmented(collate):
        return collate(rows)["aug_input_ids"]

    first, again = (DittoCollator(tokenizer, 64, "all", seed=1) for _ in range(2))
    assert augmented(first).equal(augmented(again))
    state = json.loads(json.dumps(first.state_dict()))
    resumed = DittoCollator(tokenizer, 64, "all", seed=7)
    resumed.load_state_dict(state)
    assert augmented(resumed).equal(augmented(first))
    unseeded = DittoCollator(tokenizer, 64, "all")
    torch.manual_seed(3)
    one = augmented(unseeded)
    other = augmented(unseeded)
    torch.manual_seed(3)
    assert augmented(unseeded).equal(one)
    assert one.shape != other.shape or not one.equal(other)
    assert unseeded.state_dict() == {}
    with pytest.raises(ValueError, match="must come from a collator that has a seed"):
        unseeded.load_state_dict(state)


def test_bad_collator_input(tokenizer):
    with pytest.raises(ValueError, match="max_len must be at least 8"):
        DittoCollator(tokenizer, 4)
    with pytest.raises(ValueError, match="op must be None, 'all' or one of span_delete"):
        DittoCollator(tokenizer, op="replace")
    with pytest.raises(ValueError, match="must have left and right, got left"):
        DittoCollator(tokenizer)([{"left": "a"}])
    with pytest.raises(ValueError, match=r"label must be 0 or 1, got \['2'\]"):
        DittoCollator(tokenizer)([{"left": "a", "right": "b", "label": 2}])


# The threshold


@pytest.mark.parametrize("seed", range(5))
def test_threshold_is_brute_force(seed):
    rng = np.random.default_rng(seed)
    probs, labels = rng.random(40).round(2), rng.integers(2, size=40)
    grid = np.arange(20) / 20
    scores = [f1_score(labels, probs > threshold, zero_division=0) for threshold in grid]
    threshold, f1 = best_f1_threshold(probs, labels)
    assert f1 == pytest.approx(max(scores))
    assert threshold == grid[int(np.argmax(scores))]


def test_threshold_without_a_match():
    assert best_f1_threshold([0.2, 0.9], [0, 0]) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        ([0.1], [0, 1], "vectors of one length"),
        ([], [], "at least 1"),
        ([1.5], [1], r"probs must be in \[0, 1\]"),
        ([math.nan], [1], r"probs must be in \[0, 1\]"),
        ([0.5], [2], "labels must be 0 or 1"),
    ],
)
def test_bad_threshold_input(probs, labels, message):
    with pytest.raises(ValueError, match=message):
        best_f1_threshold(probs, labels)


# The estimator


def matcher(tokenizer, **options):
    options = {"epochs": 2, "batch_size": 8, "learning_rate": 2e-3, "max_len": 48, "progress": False} | options
    return DittoMatcher(bert(dropout=0.1), tokenizer, **options)


@pytest.mark.parametrize("op", [None, "all"])
def test_learns_what_a_word_tells_and_keeps_the_best_epoch(tokenizer, pairs, op):
    labels = [int("lamp" in pair[0]["name"] or "chair" in pair[0]["name"]) for pair in pairs[0]]
    pairs = pairs[0], labels
    fitted = matcher(tokenizer, epochs=12, op=op, learning_rate=3e-3).fit(*pairs, valid=pairs)
    assert f1_score(pairs[1], fitted.predict(pairs[0])) == pytest.approx(max(fitted.validation_f1_))
    assert max(fitted.validation_f1_) > 0.9
    probs = fitted.predict_proba(pairs[0])
    np.testing.assert_allclose(probs.sum(axis=1), 1)
    assert ((probs[:, 1] > fitted.threshold_) == fitted.predict(pairs[0])).all()


def test_a_seed_gives_the_same_again_and_leaves_torch_alone(tokenizer, pairs):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    probs = [matcher(tokenizer).fit(*pairs).predict_proba(pairs[0]) for _ in range(2)]
    assert torch.get_rng_state().equal(before)
    np.testing.assert_array_equal(*probs)
    assert not np.array_equal(matcher(tokenizer, seed=1).fit(*pairs).predict_proba(pairs[0]), probs[0])


def test_is_an_estimator_and_leaves_its_parameters_alone(tokenizer, pairs):
    original = matcher(tokenizer, summarizer=TfidfSummarizer())
    weights = {name: tensor.clone() for name, tensor in original.model.state_dict().items()}
    fitted = clone(original).set_params(epochs=1).fit(*pairs)
    assert fitted.get_params()["epochs"] == 1
    assert not hasattr(original, "model_")
    assert not hasattr(fitted.summarizer, "idf_")
    assert hasattr(fitted.summarizer_, "idf_")
    assert all(tensor.equal(fitted.model.state_dict()[name]) for name, tensor in weights.items())


def test_frozen_weights_stay(tokenizer, pairs):
    lm = bert()
    lm.embeddings.requires_grad_(False)
    fitted = DittoMatcher(lm, tokenizer, epochs=1, batch_size=8, progress=False).fit(*pairs)
    changed = {name for name, tensor in fitted.model_.lm.state_dict().items() if not tensor.equal(lm.state_dict()[name])}
    assert changed
    assert not any(name.startswith("embeddings") for name in changed)


def test_saved_and_read_in_another_process(tokenizer, pairs, tmp_path):
    options = {"summarizer": TfidfSummarizer(), "knowledge": DomainKnowledge("general"), "op": "span_delete"}
    fitted = matcher(tokenizer, **options).fit(*pairs)
    fitted.save(tmp_path / "saved")
    (tmp_path / "pairs.json").write_text(json.dumps(pairs[0][:8]))
    script = (
        "import json, sys; from firsthand.match.matcher import DittoMatcher\n"
        "m = DittoMatcher.load(sys.argv[1], progress=False)\n"
        "pairs = json.load(open(sys.argv[2]))\n"
        "print(json.dumps([m.predict_proba(pairs)[:, 1].tolist(), m.threshold_, m.op, m.knowledge.mode]))"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "saved"), str(tmp_path / "pairs.json")]
    ran = subprocess.run(arguments, capture_output=True, text=True, check=True)
    probs, threshold, op, mode = json.loads(ran.stdout)
    np.testing.assert_allclose(probs, fitted.predict_proba(pairs[0][:8])[:, 1], atol=1e-6)
    assert (threshold, op, mode) == (fitted.threshold_, "span_delete", "general")
    assert {"model.safetensors", "head.safetensors", "matcher.json"} <= {file.name for file in (tmp_path / "saved").iterdir()}


def test_what_cannot_be_saved_must_be_given_again(tokenizer, pairs, tmp_path):
    knowledge = DomainKnowledge(ner=lambda text: [])
    matcher(tokenizer, epochs=1, knowledge=knowledge, summarizer=TfidfSummarizer(length_fn=len)).fit(*pairs).save(tmp_path)
    with pytest.raises(ValueError, match="knowledge must be given"):
        DittoMatcher.load(tmp_path)
    with pytest.raises(ValueError, match="length_fn must be given"):
        DittoMatcher.load(tmp_path, knowledge=knowledge)
    assert DittoMatcher.load(tmp_path, knowledge=knowledge, length_fn=len).summarizer_.length_fn is len
    with pytest.raises(ValueError, match=r"has no matcher\.json"):
        DittoMatcher.load(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"lacks config\.json"):
        DittoModel.from_pretrained(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": [0, 1]}, "y must have a label for each of 48 pairs"),
        ({"y": [0] * 48}, "labels 0 and 1, both of them"),
        ({"y": [0, 2] * 24}, "labels 0 and 1, both of them"),
        ({"pairs": [({"a": 1},)] * 48}, r"pairs must be \(left, right\) records"),
        ({"pairs": [({}, {"a": 1})] * 48}, "entry must be a record"),
        ({"few": 2}, "enough to set aside validation_fraction=0.2"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be in \(0, 1\)"),
        ({"op": "everything"}, "op must be None"),
        ({"tokenizer": None}, "tokenizer must be given"),
    ],
)
def test_bad_input(tokenizer, pairs, unchecked, change, message):
    few = change.pop("few", 48)
    these, y = change.pop("pairs", pairs[0])[:few], change.pop("y", pairs[1])
    with pytest.raises(ValueError, match=message):
        DittoMatcher(**({"model": bert(), "tokenizer": tokenizer, "progress": False} | change)).fit(these, y[:few])


def test_not_fitted(tokenizer, tmp_path):
    for call in (lambda m: m.predict([]), lambda m: m.save(tmp_path)):
        with pytest.raises(NotFittedError):
            call(matcher(tokenizer))


# In the Trainer


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_trains_in_the_trainer_saves_and_loads(tokenizer, pairs, tmp_path):
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = DittoModel(bert())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            str(tmp_path / "run"),
            num_train_epochs=2,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_steps=1,
            remove_unused_columns=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        data_collator=DittoCollator(tokenizer, 48, "all"),
        train_dataset=examples(pairs),
        eval_dataset=examples(pairs)[:8],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert all(map(math.isfinite, losses))
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    assert not all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "saved")
    again = DittoModel.from_pretrained(tmp_path / "saved")
    batch = DittoCollator(tokenizer, 48)(examples(pairs)[:4])
    torch.testing.assert_close(again(**batch).logits, model.eval()(**batch).logits)
    assert again.alpha == model.alpha
