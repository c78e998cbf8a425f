import math
import subprocess
import sys

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F

st = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")

from sentence_transformers.sentence_transformer.modules import Normalize, Pooling  # noqa: E402

from firsthand import data  # noqa: E402
from firsthand.embed.bidirectional import make_bidirectional  # noqa: E402
from firsthand.embed.contrastive import HardNegativeInfoNCELoss  # noqa: E402
from firsthand.embed.cross_attention import cross_attend  # noqa: E402
from firsthand.embed.nv_embed import (  # noqa: E402
    LatentAttentionPooling,
    classification_to_triplets,
    format_query,
    sts_to_triplets,
)
from firsthand.studies import nv_embed as study  # noqa: E402
from firsthand.testbeds import embedding as testbed  # noqa: E402

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pooling(dim: int = 12, num_latents: int = 5, num_heads: int = 3, **options) -> LatentAttentionPooling:
    torch.manual_seed(0)
    return LatentAttentionPooling(dim, num_latents, num_heads, **options)


@pytest.fixture(params=["dense", "sparse", "left", "full"])
def features(request) -> dict[str, torch.Tensor]:
    """Three texts of up to six tokens: few of them padding, most of them, padding in front, none."""
    lengths = {"dense": (6, 4, 5), "sparse": (6, 1, 2), "left": (6, 1, 4), "full": (6, 6, 6)}[request.param]
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    return {"token_embeddings": random(3, 6, 12), "attention_mask": mask.flip(1) if request.param == "left" else mask}


@pytest.fixture
def unchecked():
    """What a user runs: no shapes checked for them, so our own messages must do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def embed(module, features) -> torch.Tensor:
    return module(dict(features))["sentence_embedding"]


# --- pooling --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("prompt", [None, 2, torch.tensor([2])], ids=["no prompt", "number", "tensor"])
def test_identity_is_the_hosts_mean(features, normalize, prompt):
    features["attention_mask"][:] = features["attention_mask"].flip(1).cummax(1).values.flip(1) if prompt is None else 1
    include = prompt is None
    if not include:
        features["prompt_length"] = prompt
        features["attention_mask"][1, -2:] = 0
    theirs = Pooling(12, "mean", include_prompt=include)(dict(features))
    expected = (Normalize()(theirs) if normalize else theirs)["sentence_embedding"]
    ours = embed(pooling(init="identity", normalize=normalize, include_prompt=include), features)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_is_the_mean_of_the_block_over_tokens(features):
    module = pooling(normalize=False)
    weights = features["attention_mask"][..., None].float()
    tokens = cross_attend(module, features["token_embeddings"], module.latents)
    torch.testing.assert_close(embed(module, features), (tokens * weights).sum(1) / weights.sum(1))
    unit = pooling()
    torch.testing.assert_close(embed(unit, features), F.normalize(embed(module, features), dim=-1))


def test_prompt_is_left_out_wherever_the_padding_is():
    module, states = pooling(include_prompt=False), random(2, 3, 12)
    alone = embed(module, {"token_embeddings": states, "attention_mask": torch.ones(2, 3)})
    prompt = random(2, 2, 12, seed=1)
    for left, right in ((0, 0), (3, 0), (0, 3), (4, 9)):
        padded = F.pad(torch.cat([prompt, states], dim=1), (0, 0, left, right), value=7.0)
        mask = F.pad(torch.ones(2, 5), (left, right))
        found = embed(module, {"token_embeddings": padded, "attention_mask": mask, "prompt_length": 2})
        torch.testing.assert_close(found, alone)
        included = embed(pooling(), {"token_embeddings": padded, "attention_mask": mask, "prompt_length": 2})
        assert not torch.allclose(included, alone)


def test_order_of_tokens_and_of_latents_is_nothing(features):
    module = pooling()
    expected = embed(module, features)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    torch.testing.assert_close(embed(module, {name: value[:, order] for name, value in features.items()}), expected)
    with torch.no_grad():
        module.latents.copy_(module.latents[torch.tensor([3, 0, 4, 1, 2])])
    torch.testing.assert_close(embed(module, features), expected)


def test_masked_states_have_no_say_and_no_gradient(features):
    module, masked = pooling(), features["attention_mask"] == 0
    expected = embed(module, features)
    states = features["token_embeddings"].masked_fill(masked[..., None], math.nan).requires_grad_()
    found = embed(module, features | {"token_embeddings": states})
    torch.testing.assert_close(found, expected)
    found.square().mul(random(12)).sum().backward()
    assert states.grad[masked].equal(torch.zeros(int(masked.sum()), 12))
    assert states.grad[~masked].abs().sum(-1).gt(0).all()


def test_one_latent_adds_one_vector_to_every_token(features):
    module = pooling(num_latents=1, normalize=False)
    torch.nn.init.zeros_(module.ff_out.weight)
    torch.nn.init.zeros_(module.ff_out.bias)
    vector = module.to_out(module.to_kv(module.norm_kv(module.latents))[:, 12:])
    mean = Pooling(12, "mean")(dict(features))["sentence_embedding"]
    torch.testing.assert_close(embed(module, features) - mean, vector.expand(3, 12))


def test_texts_without_padding_in_between():
    """As the host hands them over with flash attention: one row, and where each text ends."""
    module, plain = pooling(include_prompt=False), pooling()
    states = [random(length, 12, seed=length) for length in (3, 5, 2)]
    flat = {"token_embeddings": torch.cat(states)[None], "cu_seq_lens_q": torch.tensor([0, 3, 8, 10], dtype=torch.int32)}
    one = [{"token_embeddings": each[None], "attention_mask": torch.ones(1, len(each))} for each in states]
    torch.testing.assert_close(embed(plain, flat), torch.cat([embed(plain, each) for each in one]))
    prompted = torch.cat([embed(module, each | {"prompt_length": 1}) for each in one])
    torch.testing.assert_close(embed(module, flat | {"prompt_length": 1}), prompted)


def test_without_a_mask_every_token_counts():
    module, states = pooling(), random(2, 4, 12)
    expected = embed(module, {"token_embeddings": states, "attention_mask": torch.ones(2, 4)})
    torch.testing.assert_close(embed(module, {"token_embeddings": states}), expected)


def test_names_of_the_state_dict():
    names = set(pooling(head_dim=7).state_dict())
    assert names == {
        "latents",
        *(f"{norm}.{part}" for norm in ("norm_q", "norm_kv", "norm_ff") for part in ("weight", "bias")),
        *("to_q.weight", "to_kv.weight", "to_out.weight"),
        *("ff_in.weight", "ff_in.bias", "ff_out.weight", "ff_out.bias"),
    }
    assert pooling(num_latents=4000).latents.std().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision(features, device):
    module = pooling().to(device)
    features = {name: value.to(device) for name, value in features.items()}
    exact = embed(module, features)
    features["token_embeddings"] = features["token_embeddings"].bfloat16()
    mixed = embed(module, features)  # states of a model in bfloat16, weights of the pooling in float32
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), exact, atol=2e-2, rtol=2e-2)
    half = embed(module.bfloat16(), features)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=4e-2, rtol=4e-2)


def test_compiles_into_one_graph(features, unchecked):
    module = pooling()
    compiled = torch.compile(
        lambda x, mask: embed(module, {"token_embeddings": x, "attention_mask": mask}), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(*features.values()), embed(module, features))


def test_gradient_numerically():
    module, mask = pooling().double(), torch.tensor([[1, 1, 1], [1, 0, 0]])
    states = random(2, 3, 12).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: embed(module, {"token_embeddings": x, "attention_mask": mask}), states)


def test_bad_sizes():
    with pytest.raises(ValueError, match="num_latents must be at least 1, got 0"):
        LatentAttentionPooling(12, 0)
    with pytest.raises(ValueError, match="embedding_dimension must be at least 1, got 0"):
        LatentAttentionPooling(0)
    with pytest.raises(ValueError, match=r"num_heads must divide dim=12 .* got 8"):
        LatentAttentionPooling(12)


def test_texts_with_nothing_to_pool():
    states, mask = random(3, 4, 12), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    with pytest.raises(ValueError, match=r"none in rows \[1\]"):
        embed(pooling(), {"token_embeddings": states, "attention_mask": mask})
    features = {"token_embeddings": states, "attention_mask": mask, "prompt_length": 2}
    with pytest.raises(ValueError, match=r"behind the prompt; none in rows \[1, 2\]"):
        embed(pooling(include_prompt=False), features)


def test_states_of_another_width():
    with pytest.raises(ValueError, match=r"token_embeddings must have shape \(batch, tokens, 12\).*got \(3, 4, 8\)"):
        embed(pooling(), {"token_embeddings": random(3, 4, 8)})


# --- instructions and data ------------------------------------------------------------------------------------------------


def test_query_with_instruction():
    assert format_query("Find the function.", "adds two numbers") == "Instruct: Find the function.\nQuery: adds two numbers"
    with pytest.raises(ValueError, match="task must say what to find, got ' '"):
        format_query(" ", "x")


TEXTS = [f"{animal} {number}" for number in range(5) for animal in ("cat", "dog", "owl")]
LABELS = ["cat", "dog", "owl"] * 5


def negatives_of(row: dict[str, str]) -> list[str]:
    return [value for name, value in row.items() if name.startswith("negative")]


def test_labels_as_positives():
    names = {"cat": "a cat", "dog": "a dog", "owl": "an owl"}
    rows = classification_to_triplets(TEXTS, LABELS, names, seed=0)
    assert rows.column_names == ["query", "positive", "negative_1", "negative_2"]  # three classes: no more than two negatives
    assert rows["query"][:] == TEXTS
    for row in rows:
        own = names[row["query"].split()[0]]
        assert row["positive"] == own
        assert sorted([own, *negatives_of(row)]) == sorted(names.values())
    by_index = classification_to_triplets(TEXTS, [0, 1, 2] * 5, list(names.values()), num_negatives=1, seed=0)
    assert by_index["positive"][:] == rows["positive"][:]
    assert by_index.column_names == ["query", "positive", "negative_1"]
    assert classification_to_triplets(TEXTS, LABELS, seed=0)["positive"][:] == LABELS


def test_examples_as_positives():
    rows = classification_to_triplets([*TEXTS, "cat 0", "bat"], [*LABELS, "cat", "bat"], mode="example", num_negatives=4, seed=0)
    assert len(rows) == 16  # the bat is alone
    for row in rows:
        kind = row["query"].split()[0]
        assert row["positive"].split()[0] == kind
        assert row["positive"] != row["query"]
        assert len(set(negatives_of(row))) == 4
        assert all(negative.split()[0] != kind for negative in negatives_of(row))
    assert any("bat" in negatives_of(row) for row in rows)


def test_every_example_is_drawn_now_and_then():
    rows = classification_to_triplets(TEXTS * 40, LABELS * 40, mode="example", num_negatives=3, seed=0)
    cats = [row for row in rows if row["query"] == "cat 0"]
    assert {row["positive"] for row in cats} == {f"cat {number}" for number in range(1, 5)}
    assert {negative for row in cats for negative in negatives_of(row)} == {text for text in TEXTS if "cat" not in text}


def test_a_text_of_two_classes_is_no_negative_of_either():
    texts, labels = ["both", "a1", "a2", "both", "b1", "b2"], [0, 0, 0, 1, 1, 1]
    for row in classification_to_triplets(texts, labels, mode="example", seed=0):
        assert "both" not in negatives_of(row)


@pytest.mark.parametrize("mode", ["label", "example"])
def test_the_seed_decides(mode):
    many = [f"label {index}" for index in range(40)]
    draws = [classification_to_triplets(many * 2, many * 2, mode="label", seed=seed)[:] for seed in (1, 1, 2)]
    if mode == "example":
        draws = [classification_to_triplets(TEXTS, LABELS, mode=mode, seed=seed)[:] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": LABELS[:-1]}, "labels must be as many as texts, 15, got 14"),
        ({"labels": ["cat"] * 15}, "labels must name at least 2 classes, got 1"),
        ({"labels": [1, 2, 3] * 5}, "label_names must be given where labels are no texts, got the label 1"),
        ({"label_names": {"cat": "a cat"}}, "label_names must have a name for each label, got none for 'dog'"),
        ({"mode": "both"}, "mode must be 'label' or 'example', got 'both'"),
        ({"num_negatives": 0}, "num_negatives must be at least 1, got 0"),
        ({"labels": range(15), "mode": "example"}, "at least 2 different texts in mode 'example', got none"),
        ({"label_names": dict.fromkeys(LABELS, "pet")}, "labels must leave each class a text of another one .* got none for one"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_labels(change, message, unchecked):
    with pytest.raises(ValueError, match=message):
        classification_to_triplets(**{"texts": TEXTS, "labels": LABELS, "seed": 0} | change)


FIRST = ["a cat sat", "a dog ran", "rain falls on the town", "the cat sleeps"]
SECOND = ["the cat sat down", "a dog ran fast", "the town has a tower", "a cat is asleep"]
SCORES = [5.0, 4.0, 3.0, 1.0]


def test_similar_pairs_go_both_ways():
    rows = sts_to_triplets(FIRST, SECOND, SCORES, num_negatives=3)
    pairs = [(row["query"], row["positive"]) for row in rows]
    assert pairs == [
        ("a cat sat", "the cat sat down"),
        ("the cat sat down", "a cat sat"),
        ("a dog ran", "a dog ran fast"),
        ("a dog ran fast", "a dog ran"),
    ]
    for row in rows:
        assert not {row["query"], row["positive"]} & set(negatives_of(row))
        assert len(set(negatives_of(row))) == 3


def test_negatives_are_what_bm25_ranks_by_hand():
    pool = list(dict.fromkeys([*FIRST, *SECOND]))
    words = [sentence.split() for sentence in pool]
    mean = np.mean([len(each) for each in words])

    def score(query: str, document: list[str]) -> float:
        total = 0.0
        for word in query.split():
            holders = sum(word in each for each in words)
            times = document.count(word)
            rarity = math.log(1 + (len(words) - holders + 0.5) / (holders + 0.5))
            total += rarity * times * 2.2 / (times + 1.2 * (0.25 + 0.75 * len(document) / mean))
        return total

    rows = sts_to_triplets(FIRST, SECOND, SCORES, num_negatives=4)
    for row in rows:
        ranked = sorted((other for other in pool if other != row["query"]), key=lambda s: -score(row["query"], s.split()))
        expected = [other for other in ranked[1:] if other != row["positive"]][:4]
        assert negatives_of(row) == expected


def test_known_similar_sentences_are_no_negatives():
    first, second, scores = [*FIRST, "a cat sat"], [*SECOND, "the cat sleeps"], [*SCORES, 2.5]
    for row in sts_to_triplets(first, second, scores):
        if row["query"] == "a cat sat":
            assert "the cat sleeps" not in negatives_of(row)
    scores[-1] = 2.4
    rows = sts_to_triplets(first, second, scores)
    assert any("the cat sleeps" in negatives_of(row) for row in rows if row["query"] == "a cat sat")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": SCORES[:-1]}, "sent1, sent2 and scores must be of one length, got 4, 4 and 3"),
        ({"scores": [math.nan] * 4}, "scores must be finite"),
        ({"pos_min": 2.0}, "pos_min must be at least neg_max=2.5, got 2.0"),
        ({"num_negatives": 0}, "num_negatives must be at least 1, got 0"),
        ({"scores": [1.0] * 4}, "at least pos_min=4.0, got none"),
        (
            {"sent1": ["a b"] * 4, "sent2": ["a c"] * 4, "scores": [5.0] * 4},
            "must hold a negative for each query, got none for 'a b'",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_pairs(change, message, unchecked):
    with pytest.raises(ValueError, match=message):
        sts_to_triplets(**{"sent1": FIRST, "sent2": SECOND, "scores": SCORES} | change)


# --- the study's parts ----------------------------------------------------------------------------------------------------


def test_control_has_as_many_parameters():
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    control, latents = count(study.FeedForwardPooling()), count(study.latents())
    assert 0 <= latents - control < 0.005 * latents


def test_batches_are_of_one_kind_and_take_turns():
    order = study.batches(torch.Generator().manual_seed(0), 30, 20, 8, 6, True)
    assert [bool((rows >= 30).all()) for rows in order] == [False, True] * 3
    assert all(len(set(rows.tolist())) == 8 for rows in order)
    assert all(((rows < 30).all() or (rows >= 30).all()) and rows.max() < 50 for rows in order)
    assert all(rows.max() < 30 for rows in study.batches(torch.Generator().manual_seed(0), 30, 20, 8, 6, False))


def test_hard_negatives_are_near_and_not_right():
    sentences = ["sort the list", "sort the list", "open a file", "send mail"]
    codes = ["def sort(list): sort", "def sort_list(list): list", "def open(file): list", "def send(mail): file"]
    functions = testbed.Functions(sentences, codes, list("abcd"), list("wxyz"), ["p"] * 4, np.array([0, 0, 1, 2]))
    (nearest,) = study.hard_negatives(functions)
    assert nearest == [codes[2], codes[2], codes[3], codes[0]]


# --- inside sentence-transformers -----------------------------------------------------------------------------------------

TASK = "Find the animal."

RELOAD = """
import sys
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu", trust_remote_code=True)
assert model.prompts["query"].startswith("Instruct: ") and model[1].include_prompt is False
np.save(sys.argv[2], np.concatenate([model.encode_query(["cat 1", "owl"]), model.encode_document(["dog 2 owl"])]))
"""


def encoder(kind: str):
    """A tiny decoder, bidirectional now, that pools through latents and has an instruction for queries."""
    transformers = pytest.importorskip("transformers")
    words = testbed.tokenizer([*TEXTS, format_query(TASK, "")] * 3, 120)
    sizes = {"vocab_size": len(words), "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 0}
    torch.manual_seed(0)
    config = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig, "qwen2": transformers.Qwen2Config}[kind]
    model = testbed.sentence_transformer(
        make_bidirectional(transformers.AutoModel.from_config(config(**sizes))), words, pooling=pooling(include_prompt=False)
    )
    model.prompts["query"] = format_query(TASK, "")
    return model


def test_an_instruction_is_seen_but_not_pooled():
    model = encoder("llama")
    prompt = format_query(TASK, "")
    length = len(model.tokenizer(prompt)["input_ids"]) - 1  # without </s>, with <s>
    seen = {}
    handle = model[1].register_forward_pre_hook(lambda module, inputs: seen.update(inputs[0]))
    query = model.encode_query(["cat 1"], convert_to_tensor=True)
    handle.remove()
    assert seen["prompt_length"] == length
    rest = {"token_embeddings": seen["token_embeddings"][:, length:]}
    torch.testing.assert_close(query, embed(model[1], rest).clone())
    assert not torch.allclose(query, model.encode_document(["cat 1"], convert_to_tensor=True))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_a_text_is_embedded_the_same_in_any_company(kind):
    model = encoder(kind)
    together = model.encode(["cat 1", "dog 2 owl 3 cat 4 dog 1 owl 2"])
    np.testing.assert_allclose(model.encode(["cat 1"])[0], together[0], atol=1e-5)


def arguments(folder, **options):
    return st.SentenceTransformerTrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


def test_both_stages_in_the_trainer_then_saved_and_loaded_in_a_fresh_process(tmp_path):
    model = encoder("mistral")
    search = datasets.Dataset.from_dict({"query": LABELS, "positive": TEXTS, "negative_1": [*TEXTS[1:], TEXTS[0]]})
    topics = classification_to_triplets(TEXTS, LABELS, mode="example", num_negatives=1, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prompts = {"query": format_query(TASK, "")}
    first = st.SentenceTransformerTrainer(
        model=model, args=arguments(tmp_path, prompts=prompts), train_dataset=search, loss=HardNegativeInfoNCELoss(model, 0.1)
    )
    first.train()
    losses = {
        "search": HardNegativeInfoNCELoss(model, 0.1),
        "topics": HardNegativeInfoNCELoss(model, 0.1, in_batch_negatives=False),
    }
    asked = dict.fromkeys(losses, 0)
    for name, loss in losses.items():
        loss.register_forward_pre_hook(lambda module, inputs, name=name: asked.update({name: asked[name] + 1}))
    second = st.SentenceTransformerTrainer(
        model=model,
        args=arguments(tmp_path, prompts={"search": prompts}, multi_dataset_batch_sampler="round_robin"),
        train_dataset=datasets.DatasetDict({"search": search, "topics": topics}),
        loss=losses,
    )
    second.train()
    assert asked["search"] == asked["topics"] == 3
    values = [entry["loss"] for trainer in (first, second) for entry in trainer.state.log_history if "loss" in entry]
    assert len(values) == 12
    assert all(map(math.isfinite, values))
    assert all(not value.equal(before[name]) for name, value in model.state_dict().items())

    model.save_pretrained(str(tmp_path / "saved"))
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path / "saved"), str(tmp_path / "found.npy")], check=True, timeout=120)
    here = np.concatenate([model.encode_query(["cat 1", "owl"]), model.encode_document(["dog 2 owl"])])
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), here, atol=1e-6)
    assert "HardNegativeInfoNCELoss" in (tmp_path / "saved" / "README.md").read_text()


def test_minilm_with_latents(tmp_path):
    """Real weights, cut to two layers, in the trainer; at first the embeddings are those of the mean."""
    model = st.SentenceTransformer(str(data.load("minilm")), device="cpu")
    del model[0].auto_model.encoder.layer[2:]
    model[0].auto_model.config.num_hidden_layers = 2
    means = model.encode(["the cat", "a dog runs"])
    latent = st.SentenceTransformer(modules=[model[0], LatentAttentionPooling(384, 16, init="identity")], device="cpu")
    np.testing.assert_allclose(latent.encode(["the cat", "a dog runs"]), means, atol=1e-6)
    rows = classification_to_triplets(TEXTS, LABELS, mode="example", num_negatives=1, seed=0).select(range(4))
    trainer = st.SentenceTransformerTrainer(
        model=latent, args=arguments(tmp_path), train_dataset=rows, loss=HardNegativeInfoNCELoss(latent, in_batch_negatives=False)
    )
    trainer.train()
    latent.save_pretrained(str(tmp_path / "saved"))
    again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(again.encode(["the cat"]), latent.encode(["the cat"]), atol=1e-6)
    assert not np.allclose(latent.encode(["the cat"]), means[:1], atol=1e-2)
