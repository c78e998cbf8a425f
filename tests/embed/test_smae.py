import pickle
from itertools import pairwise

import jaxtyping
import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

from transformers import BertConfig, BertForMaskedLM  # noqa: E402

from firsthand.embed.smae import BertForSMAE, SMAECollator, smae_loss  # noqa: E402
from firsthand.testbeds import embedding  # noqa: E402

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TEXTS = [
    "sort a list of large numbers",
    "return the largest of all the numbers that are given",
    "close",
    "find the shortest path",
]
SIZES = [(1, 4), (2, 8), (3, 16)]
VOCAB, MASK = 50, 4


@pytest.fixture
def unchecked():
    """What a user runs: no shapes checked for them, so our own messages must do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def model():
    """Three layers of width 16, no dropout."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
    )  # fmt: skip
    return BertForMaskedLM(config)


@pytest.fixture
def decoder(model):
    return BertForSMAE.begin(model, SIZES).decoder_layer


@pytest.fixture
def batch():
    """Three texts of 9, 6 and 4 tokens, padded; a third of their tokens is to be predicted, two thirds by the decoder."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(9) < torch.tensor([9, 6, 4])[:, None]
    ids = torch.randint(5, VOCAB, mask.shape, generator=generator).where(mask, 0)
    where = torch.rand(mask.shape, generator=generator).where(mask, 1.0)
    where[:, 0] = 1.0  # the first token is never masked
    where[:, 1] = 0.0  # the second always, so that each text has one
    encoder, decoder = where < 0.33, where < 0.67
    return {
        "input_ids": ids.masked_fill(encoder, MASK),
        "labels": ids.masked_fill(~encoder, -100),
        "decoder_input_ids": ids.masked_fill(decoder, MASK),
        "decoder_labels": ids.masked_fill(~decoder, -100),
        "attention_mask": mask.long(),
    }


# --- the loss -------------------------------------------------------------------------------------------------------------


def test_mlm_of_the_full_model_is_that_of_transformers(model, decoder, batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    parts = smae_loss(model, decoder, batch, [(3, 16)], reduction="none")
    assert parts.shape == (1, 2)
    torch.testing.assert_close(parts[0, 0], model(**inputs).loss)


def test_both_parts_computed_everywhere_and_text_by_text(model, decoder, batch):
    """A dense layer's first columns see what all of them see of states that are zero from there on. Without padding no mask."""
    scores = {(size, part): [] for size in SIZES for part in ("mlm", "mae")}
    for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        ids, decoder_ids = (batch[name][row : row + 1, :length] for name in ("input_ids", "decoder_input_ids"))
        states = model.bert(ids, output_hidden_states=True).hidden_states
        seen = model.bert.embeddings(decoder_ids)
        for layer, dim in SIZES:
            cut = F.pad(states[layer][..., :dim], [0, 16 - dim])
            summary = model.cls.predictions.transform(cut)[:, :1]
            scores[(layer, dim), "mlm"].append(model.cls(cut)[0])
            scores[(layer, dim), "mae"].append(model.cls(decoder(torch.cat([summary, seen[:, 1:]], dim=1)))[0])
    attended = batch["attention_mask"].bool()
    labels = {"mlm": batch["labels"][attended], "mae": batch["decoder_labels"][attended]}
    expected = torch.stack([F.cross_entropy(torch.cat(rows), labels[part]) for (_, part), rows in scores.items()]).view(-1, 2)
    parts = smae_loss(model, decoder, batch, SIZES, reduction="none")
    torch.testing.assert_close(parts, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(smae_loss(model, decoder, batch, SIZES), expected.mean(), atol=1e-5, rtol=1e-5)


def test_the_decoder_reads_a_vector_in_the_place_of_the_first_token(model, decoder, batch):
    def parts(**change) -> torch.Tensor:
        return smae_loss(model, decoder, batch | change, SIZES, reduction="none")

    other = batch["decoder_input_ids"].clone()
    other[:, 0] = 7
    torch.testing.assert_close(parts(decoder_input_ids=other), parts())
    changed = parts(input_ids=batch["input_ids"].flip(1))
    assert (changed[:, 1] != parts()[:, 1]).all()


def test_a_size_learns_with_its_own_layers_and_columns(model, decoder, batch):
    for k, (layer, dim) in enumerate(SIZES):
        for part in range(2):
            model.zero_grad()
            smae_loss(model, decoder, batch, SIZES, reduction="none")[k, part].backward()
            learns = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in model.bert.encoder.layer]
            assert learns == [n < layer for n in range(3)]
            if part == 0:
                columns = model.cls.predictions.transform.dense.weight.grad.abs().sum(dim=0)
                assert (columns[:dim] > 0).all()
                assert (columns[dim:] == 0).all()


def test_nothing_masked_costs_nothing(model, decoder, batch):
    labels = torch.full_like(batch["labels"], -100)
    loss = smae_loss(model, decoder, batch | {"labels": labels, "decoder_labels": labels}, SIZES)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision(model, decoder, batch, device):
    batch = {name: value.to(device) for name, value in batch.items()}
    exact = smae_loss(model.to(device), decoder.to(device), batch, SIZES)
    loss = smae_loss(model.bfloat16(), decoder.bfloat16(), batch, SIZES)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": torch.nn.Linear(1, 1)}, "model must be a BertForMaskedLM, got Linear"),
        ({"batch": {"input_ids": torch.zeros(1, 2).long()}}, "it lacks labels, decoder_input_ids, decoder_labels"),
        ({"reduction": "sum"}, "reduction must be"),
        ({"sizes": [(1, 4), (4, 16)]}, "sizes must have layers in"),
    ],
)
def test_bad_input(model, decoder, batch, unchecked, change, message):
    given = {"model": model, "decoder_layer": decoder, "batch": batch, "sizes": SIZES}
    with pytest.raises(ValueError, match=message):
        smae_loss(**(given | change))


# --- the model ------------------------------------------------------------------------------------------------------------


def test_it_goes_on_from_a_bert_and_shares_its_weights(model, batch):
    smae = BertForSMAE.begin(model, SIZES)
    assert smae.bert is model.bert
    assert not hasattr(model.config, "smae_sizes")
    for own, first in zip(smae.decoder_layer.parameters(), model.bert.encoder.layer[0].parameters(), strict=True):
        assert own is not first
        assert torch.equal(own, first)
    torch.testing.assert_close(smae(**batch).loss, smae_loss(model, smae.decoder_layer, batch, SIZES))
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    torch.testing.assert_close(smae(**plain).loss, model(**plain).loss)


def test_sizes_of_the_model():
    config = BertConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=6, num_attention_heads=2, intermediate_size=32)
    assert BertForSMAE(config).config.smae_sizes == [[1, 2], [2, 4], [3, 8], [4, 16], [5, 32], [6, 64]]
    config.smae_sizes = [(1, 2), (7, 64)]
    with pytest.raises(ValueError, match="sizes must have layers in"):
        BertForSMAE(config)
    with pytest.raises(ValueError, match="model must be a BertForMaskedLM"):
        BertForSMAE.begin(torch.nn.Linear(1, 1))


@pytest.mark.filterwarnings("ignore")  # of the trainer's own
def test_trains_in_the_trainer_is_saved_resumed_and_read_by_sentence_transformers(model, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    tokenizer = embedding.tokenizer(TEXTS, VOCAB)
    tokens = tokenizer(TEXTS)
    rows = datasets.Dataset.from_dict(
        {"input_ids": tokens["input_ids"], "word_ids": [tokens.word_ids(row) for row in range(len(TEXTS))]}
    )

    def trainer(smae, steps: int, **options):
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            disable_tqdm=True, save_steps=2, learning_rate=1e-2, remove_unused_columns=False, lr_scheduler_type="constant",
        )  # fmt: skip
        collator = SMAECollator(tokenizer, seed=0)
        return transformers.Trainer(smae, args, train_dataset=rows, data_collator=collator, **options)

    def loss(smae) -> float:
        with torch.no_grad():
            return smae(**SMAECollator(tokenizer, seed=1)(rows.to_list())).loss.item()

    smae = BertForSMAE.begin(model, SIZES)
    before = loss(smae)
    trainer(smae, 8).train()
    assert loss(smae.eval()) < before
    again = BertForSMAE.from_pretrained(tmp_path / "checkpoint-8").eval()
    assert again.config.smae_sizes == [list(size) for size in SIZES]
    for name, weight in smae.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight)
    assert trainer(again, 10).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8")).global_step == 10

    smae.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    encoder = st.SentenceTransformer(str(tmp_path / "backbone"), device="cpu")
    for name, weight in smae.bert.state_dict().items():
        torch.testing.assert_close(encoder[0].auto_model.state_dict()[name], weight)


# --- the masks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wordpiece():
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", *(f"##{letter}" for letter in "abcdefghij")]
    return transformers.BertTokenizerFast(vocab={token: index for index, token in enumerate(tokens)})


def words(tokenizer, count: int, seed: int = 0) -> list[dict]:
    """Texts of up to 40 words of one to four letters, a token each."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(count):
        lengths = torch.randint(1, 5, (int(torch.randint(1, 41, (), generator=generator)),), generator=generator).tolist()
        texts.append(" ".join("abcd"[:length] for length in lengths))
    return [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_masks(wordpiece, side):
    wordpiece.padding_side = side
    features = words(wordpiece, 60)
    batch = SMAECollator(wordpiece, 0.2, 0.4, seed=0)(features)
    wordpiece.padding_side = "right"
    original = wordpiece.pad({"input_ids": [f["input_ids"] for f in features]}, return_tensors="pt", padding_side=side)
    ids, mask = original["input_ids"], original["attention_mask"]
    encoder, decoder = batch["labels"] != -100, batch["decoder_labels"] != -100
    torch.testing.assert_close(batch["attention_mask"], mask)
    assert (encoder <= decoder).all()
    assert not decoder[ids < 5].any()  # special tokens and padding
    for name, chosen in (("", encoder), ("decoder_", decoder)):
        assert torch.equal(batch[f"{name}labels"], ids.where(chosen, -100))
        assert torch.equal(batch[f"{name}input_ids"][~chosen], ids[~chosen])
    for row in range(len(ids)):
        length = int(mask[row].sum())
        assert encoder[row].sum() <= max(1, round(0.2 * length))
        assert decoder[row].sum() <= max(1, round(0.4 * length))
        places = [place for place in range(ids.shape[1]) if ids[row, place] >= 5]
        for place, following in pairwise(places):
            if ids[row, following] >= 15:  # "##": of one word with the token before
                assert encoder[row, place] == encoder[row, following]
                assert decoder[row, place] == decoder[row, following]
    long = mask.sum(dim=1) >= 40  # where budgets can nearly be used up
    assert (decoder.sum(dim=1)[long] >= 0.4 * mask.sum(dim=1)[long] - 4).all()


def test_masked_tokens_become_the_mask_or_any_or_stay(wordpiece):
    features = words(wordpiece, 2000, seed=1)
    batch = SMAECollator(wordpiece, seed=0)(features)
    for name in ("", "decoder_"):
        chosen = batch[f"{name}labels"] != -100
        inputs, labels = batch[f"{name}input_ids"][chosen], batch[f"{name}labels"][chosen]
        vocab = len(wordpiece)
        assert (inputs == 4).float().mean().item() == pytest.approx(0.8 + 0.1 / vocab, abs=0.015)
        assert (inputs == labels).float().mean().item() == pytest.approx(0.1 + 0.1 / vocab, abs=0.015)


def test_words_as_a_tokenizer_says(wordpiece):
    tokenizer = embedding.tokenizer(["abcdef ghijkl mnopqr"], 30)  # too few tokens for its words
    tokens = tokenizer(["abcdef ghijkl mnopqr"])
    word = tokens.word_ids(0)
    feature = {"input_ids": tokens["input_ids"][0], "word_ids": word}
    assert len(word) > 5
    collator = SMAECollator(tokenizer, 0.4, 0.5, seed=0)
    seen = set()
    for _ in range(20):
        chosen = (collator([feature])["decoder_labels"][0] != -100).tolist()
        masked = {w for w, c in zip(word, chosen, strict=True) if c}
        assert all(c == (w in masked) for w, c in zip(word, chosen, strict=True))
        seen |= masked
    assert seen == {0, 1, 2}
    with pytest.raises(ValueError, match="features must have word_ids"):
        collator([{"input_ids": tokens["input_ids"][0]}])


def test_stopping_and_going_on_draws_the_same(wordpiece):
    features = words(wordpiece, 8)
    one = SMAECollator(wordpiece, seed=3)
    one(features)
    saved = pickle.loads(pickle.dumps(one.state_dict()))
    expected = [one(features) for _ in range(2)]
    other = SMAECollator(wordpiece)
    other.load_state_dict(saved)
    for batch in expected:
        again = other(features)
        assert all(torch.equal(again[name], batch[name]) for name in batch)
    assert not torch.equal(expected[0]["labels"], expected[1]["labels"])


def test_workers_do_not_draw_the_same(wordpiece):
    features = words(wordpiece, 1) * 8
    loader = torch.utils.data.DataLoader(
        features, batch_size=4, num_workers=2, collate_fn=SMAECollator(wordpiece, seed=3), multiprocessing_context="fork"
    )
    first, second = loader
    assert not torch.equal(first["decoder_labels"], second["decoder_labels"])


def test_bad_masks(wordpiece, unchecked):
    with pytest.raises(ValueError, match="must be in"):
        SMAECollator(wordpiece, 0.5, 0.4)
    with pytest.raises(ValueError, match="must be in"):
        SMAECollator(wordpiece, 0.0, 0.4)
    with pytest.raises(ValueError, match="at least one text"):
        SMAECollator(wordpiece)([])
    no_mask = embedding.tokenizer(TEXTS, VOCAB)
    no_mask.mask_token = None
    with pytest.raises(ValueError, match="must have a mask token"):
        SMAECollator(no_mask)
