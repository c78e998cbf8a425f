import itertools
import subprocess
import sys
from functools import partial

import jaxtyping
import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402
from transformers.models.llava.processing_llava import LlavaProcessor  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

from firsthand.embed.contrastive import info_nce_loss  # noqa: E402
from firsthand.embed.grad_cache import grad_cache_step  # noqa: E402
from firsthand.embed.vlm2vec import (  # noqa: E402
    EmbeddingMatchAccuracy,
    InterleavedSubBatchSampler,
    embed_items,
    format_instruction,
    pack_items,
    split_items,
)

WORDS = "<pad> <unk> <image> Instruct: Query: which digit is it even or odd seven eight find an image".split()  # noqa: SIM905


@pytest.fixture
def unchecked():
    """What a user runs: no shapes checked for them, so our own messages must do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# --- two vision-language models of a few thousand parameters, as a user would have them ----------------------------------------


def tokenizer(side="right"):
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "additional_special_tokens": ["<image>"]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, padding_side=side, **special)


def llava(side="right", dropout=0.0):
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "attention_dropout": dropout}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(hidden_size=16, image_size=8, patch_size=4, **layers),
        text_config=transformers.LlamaConfig(vocab_size=len(WORDS), hidden_size=24, pad_token_id=0, **layers),
        image_token_id=2,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    strategy = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaForConditionalGeneration(config).eval(), LlavaProcessor(images, tokenizer(side), **strategy)


def qwen2_vl(side="right", dropout=0.0):
    torch.manual_seed(0)
    text = {"vocab_size": len(WORDS), "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_dropout": dropout}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}
    vision = {"embed_dim": 16, "hidden_size": 24, "depth": 1, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config=text | heads | rope, vision_config=vision, image_token_id=2)
    images = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 256})
    words = tokenizer(side)

    def processor(*, text, images=None, **options):  # transformers' own has a part for videos, which wants torchvision
        pixels = pictures(images) if images else {}
        counts = iter((pixels["image_grid_thw"].prod(dim=1) // 4).tolist() if images else [])
        parts = [each.split("<image>") for each in text]
        text = [first + "".join("<image> " * next(counts) + rest for rest in more) for first, *more in parts]
        tokens = words(text, return_token_type_ids=False, **options)
        return {**tokens, **pixels, "mm_token_type_ids": (tokens["input_ids"] == 2).int()}

    pictures = partial(images, return_tensors="pt")
    return transformers.Qwen2VLForConditionalGeneration(config).eval(), processor


HOSTS = {"llava": llava, "qwen2-vl": qwen2_vl}
TEXTS = ["Instruct: which digit is it", "seven", "", "<image> find an image <image>", "Instruct: even or odd", "eight", ""]
TEXTS[3] = "<image> find an image"
HAS_IMAGE = [True, False, True, True, True, False, True]


def picture(seed, width=8):
    return np.random.default_rng(seed).integers(0, 256, (8, width, 3), dtype=np.uint8)


def mix(host, processor, rows=slice(None)):
    """Images with text, text alone, images alone; to Qwen2-VL also images of two sizes."""
    wide = host == "qwen2-vl"
    images = [picture(row, 8 + 8 * (wide and row % 2)) if has else None for row, has in enumerate(HAS_IMAGE)]
    return pack_items(processor, TEXTS[rows], images[rows], image_token="<image>")


@pytest.mark.parametrize("host", HOSTS)
def test_an_embedding_does_not_depend_on_its_batch_or_the_side_of_padding(host):
    right, left = (HOSTS[host](side) for side in ("right", "left"))
    with torch.no_grad():
        together = embed_items(right[0], mix(host, right[1]))
        assert together.shape == (7, 24)
        torch.testing.assert_close(together.norm(dim=1), torch.ones(7))
        torch.testing.assert_close(embed_items(left[0], mix(host, left[1])), together, atol=1e-5, rtol=1e-4)
        alone = [embed_items(right[0], mix(host, right[1], slice(row, row + 1))) for row in range(7)]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-5, rtol=1e-4)
    assert torch.pdist(together).min() > 1e-3


@pytest.mark.parametrize("host", HOSTS)
def test_embedding_is_what_the_head_would_read_at_the_last_token(host):
    model, processor = HOSTS[host]()
    inputs = mix(host, processor, slice(0, 1))
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
        torch.testing.assert_close(model.lm_head(embed_items(model, inputs, normalize=False)), logits)


@pytest.mark.parametrize("host", HOSTS)
def test_image_and_instruction_both_matter(host):
    model, processor = HOSTS[host]()
    texts = [format_instruction("which digit is it"), format_instruction("find an image"), format_instruction("find an image")]
    with torch.no_grad():
        embeddings = embed_items(model, pack_items(processor, texts, [picture(0), picture(0), picture(1)], image_token="<image>"))
    assert torch.pdist(embeddings).min() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("host", HOSTS)
def test_chunks_have_their_own_images_and_no_padding(host, side):
    model, processor = HOSTS[host](side)
    inputs = mix(host, processor)
    for size in (1, 2, 3, 7):
        chunks = split_items(inputs, size, image_token_id=2)
        assert [len(chunk["input_ids"]) for chunk in chunks] == [min(size, 7 - start) for start in range(0, 7, size)]
        assert sum(len(chunk["pixel_values"]) for chunk in chunks if "pixel_values" in chunk) == len(inputs["pixel_values"])
        assert all(chunk["attention_mask"].any(dim=0).all() for chunk in chunks)
        with torch.no_grad():
            embeddings = torch.cat([embed_items(model, chunk) for chunk in chunks])
            torch.testing.assert_close(embeddings, embed_items(model, inputs), atol=1e-5, rtol=1e-4)
    assert "pixel_values" not in split_items(inputs, 1, image_token_id=2)[1]
    assert set(split_items(inputs, 1, image_token_id=2)[1]) >= {"input_ids", "attention_mask"}


@pytest.mark.parametrize(("query_chunk", "target_chunk"), [(2, 3), (1, 4)])
@pytest.mark.parametrize("host", HOSTS)
def test_grad_cache_step_makes_the_gradient_of_the_whole_batch(host, query_chunk, target_chunk):
    model, processor = HOSTS[host]()
    query, target = (mix(host, processor, rows) for rows in (slice(0, 4), slice(3, 7)))  # image and text on both sides
    embed, loss_fn = partial(embed_items, model), partial(info_nce_loss, temperature=0.1)
    loss = loss_fn(embed(query), embed(target))
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(expected) > 20
    model.zero_grad()
    split = partial(split_items, image_token_id=2)
    ours = grad_cache_step(embed, query, target, loss_fn, query_chunk=query_chunk, target_chunk=target_chunk, split=split)
    torch.testing.assert_close(ours, loss.detach(), atol=1e-5, rtol=1e-5)
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of the trainer's making
def test_trains_in_the_trainer_saves_and_loads_in_a_fresh_process(tmp_path):
    """Trainer's own extension point for another backward pass is `training_step`."""
    pytest.importorskip("accelerate")
    model, processor = llava()
    embed, split = partial(embed_items, model), partial(split_items, image_token_id=2)

    class GradCacheTrainer(transformers.Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            sides = (self._prepare_inputs(inputs[side]) for side in ("query", "target"))
            return grad_cache_step(partial(embed_items, model), *sides, info_nce_loss, query_chunk=3, target_chunk=3, split=split)

    def collate(rows):
        query = pack_items(processor, [format_instruction("which digit is it")] * len(rows), [row["image"] for row in rows])
        return {"query": query, "target": pack_items(processor, [row["word"] for row in rows])}

    rows = [{"image": picture(row), "word": WORDS[5 + row]} for row in range(8)]
    batch = collate(rows)
    before = info_nce_loss(embed(batch["query"]), embed(batch["target"])).item()
    options = {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "report_to": [], "use_cpu": True}
    options |= {"remove_unused_columns": False, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    trainer = GradCacheTrainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(tmp_path / "run"), **options),
        train_dataset=rows,
        data_collator=collate,
    )
    trainer.train()
    model.eval()
    with torch.no_grad():
        query, target = embed(batch["query"]), embed(batch["target"])
    assert info_nce_loss(query, target).item() < before / 2

    model.save_pretrained(tmp_path / "model")
    torch.save({"inputs": batch["query"], "expected": query}, tmp_path / "batch.pt")
    code = f"""
import torch
from transformers import AutoModelForImageTextToText
from firsthand.embed.vlm2vec import embed_items
model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "model")!r}).eval()
saved = torch.load({str(tmp_path / "batch.pt")!r})
with torch.no_grad():
    torch.testing.assert_close(embed_items(model, saved["inputs"]), saved["expected"])
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.filterwarnings("ignore")
def test_lora_trains_the_adapters_alone():
    peft = pytest.importorskip("peft")
    model, processor = llava()
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    inputs = mix("llava", processor)
    split = partial(split_items, image_token_id=2)
    grad_cache_step(partial(embed_items, model), inputs, inputs, info_nce_loss, query_chunk=3, target_chunk=3, split=split)
    assert {"lora" in name for name, p in model.named_parameters() if p.grad is not None} == {True}


def test_bfloat16():
    model, processor = llava()
    inputs = mix("llava", processor)
    with torch.no_grad():
        expected = embed_items(model, inputs)
        embeddings = embed_items(model.bfloat16(), inputs)
    assert embeddings.dtype == torch.bfloat16
    torch.testing.assert_close(embeddings.float(), expected, atol=0.05, rtol=0)


def test_a_plain_decoder_embeds_text():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    inputs = {"input_ids": torch.randint(32, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    with torch.no_grad():
        expected = model.model(**inputs).last_hidden_state[:, -1]
        torch.testing.assert_close(embed_items(model, inputs, normalize=False), expected)


# --- text and packing -------------------------------------------------------------------------------------------------------


def test_format_instruction():
    assert format_instruction("Find it.", "a cat", image_token="<image>") == "<image> Instruct: Find it.\nQuery: a cat"
    assert format_instruction("Find it.") == "Instruct: Find it."
    with pytest.raises(ValueError, match="task_definition must say what the task is, got ' '"):
        format_instruction(" ")


def test_pack_items_puts_placeholders_in_front_where_there_are_none():
    seen = {}

    def processor(**arguments):
        seen.update(arguments)
        return {"input_ids": torch.zeros(4, 1, dtype=torch.long)}

    pack_items(processor, ["a", "b [I] c", "", "d"], ["one", "two", "three", None], image_token="[I]", max_length=5)
    assert seen["text"] == ["[I] a", "b [I] c", "[I]", "d"]
    assert seen["images"] == ["one", "two", "three"]
    assert seen["max_length"] == 5
    pack_items(processor, ["a"])
    assert seen["images"] is None


@pytest.mark.parametrize(
    ("texts", "images", "options", "message"),
    [
        (["a", "b"], [None], {}, "images must have one entry, maybe None, for each of 2 texts, got 1"),
        (["a", ""], None, {}, "neither in row 1"),
        (["a", "x <image>"], None, {"image_token": "<image>"}, "only where there is an image"),
        (["a"], ["one"], {}, "image_token must be given"),
    ],
)
def test_pack_items_bad_input(texts, images, options, message):
    with pytest.raises(ValueError, match=message):
        pack_items(lambda **_: {}, texts, images, **options)


def test_embed_items_needs_a_mask():
    with pytest.raises(ValueError, match="inputs must have attention_mask, got input_ids"):
        embed_items(lambda **_: None, {"input_ids": torch.zeros(1, 2, dtype=torch.long)})


IDS = torch.tensor([[2, 2, 5, 0], [5, 6, 7, 0], [2, 2, 6, 7]])
IMAGE_BATCH = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "pixel_values": torch.zeros(2, 3, 8, 8)}


@pytest.mark.parametrize(
    ("change", "size", "token", "message"),
    [
        ({}, 0, 2, "size must be at least 1, got 0"),
        ({"attention_mask": None}, 1, 2, "inputs must have attention_mask, got input_ids, pixel_values"),
        ({}, 1, None, "image_token_id must be given"),
        ({}, 1, 9, r"whole images in each item, got 2, and placeholders \[0, 0, 0\]"),
        ({"pixel_values": torch.zeros(3, 3, 8, 8)}, 1, 2, r"whole images in each item, got 3, and placeholders \[2, 0, 2\]"),
        ({"labels": torch.zeros(5)}, 1, 2, "a row for each of 3 items, got others in labels"),
    ],
)
def test_split_items_bad_input(change, size, token, message):
    inputs = {name: value for name, value in (IMAGE_BATCH | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        split_items(inputs, size, image_token_id=token)


# --- the sampler --------------------------------------------------------------------------------------------------------------


def of_dataset(sampler):
    bounds = np.cumsum(sampler.dataset_lengths)
    return lambda index: int(np.searchsorted(bounds, index, side="right"))


@pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize(("batch", "run"), [(12, 4), (12, 12), (12, 1), (4, 2)])
def test_each_run_is_of_one_data_set(stop, batch, run):
    sampler = InterleavedSubBatchSampler([50, 30, 80], batch, run, stop=stop)
    where = of_dataset(sampler)
    batches = list(sampler)
    assert batches
    for indices in batches:
        assert len(indices) == batch
        assert all(0 <= index < 160 for index in indices)
        assert all(len({where(index) for index in indices[i : i + run]}) == 1 for i in range(0, batch, run))


def test_no_item_returns_before_its_data_set_is_used_up():
    sampler = InterleavedSubBatchSampler([50, 30, 80], 12, 4)
    for _ in range(3):
        indices = list(itertools.chain(*sampler))
        assert len(set(indices)) == len(indices)
    sampler = InterleavedSubBatchSampler([8, 40], 8, 4, weights=[1, 1], stop="all_exhausted")
    where, passes = of_dataset(sampler), []
    indices = list(itertools.chain(*sampler))
    small = [index for index in indices if where(index) == 0]
    for start in range(0, len(small) - 7, 8):
        assert sorted(small[start : start + 8]) == list(range(8))
        passes.append(tuple(small[start : start + 8]))
    assert len(set(passes)) > 1  # shuffled anew
    assert set(indices) == set(range(48))  # every item of every data set


def test_first_exhausted_ends_with_a_data_set_used_up():
    sampler = InterleavedSubBatchSampler([40, 400], 4, 4, weights=[1, 1])
    counts = np.bincount([of_dataset(sampler)(index) for batch in sampler for index in batch])
    assert counts[0] == 40


def test_proportions_are_the_weights():
    counts = np.zeros(3)
    sampler = InterleavedSubBatchSampler([4000, 4000, 4000], 8, 2, weights=[5, 3, 2])
    for batch in sampler:
        counts += np.bincount([of_dataset(sampler)(index) for index in batch], minlength=3)
    np.testing.assert_allclose(counts / counts.sum(), [0.5, 0.3, 0.2], atol=0.03)
    lengths = InterleavedSubBatchSampler([4000, 1000], 8, 2)
    share = np.mean([of_dataset(lengths)(index) for batch in lengths for index in batch])
    assert share == pytest.approx(0.2, abs=0.03)


def test_seed_and_epoch_decide():
    make = partial(InterleavedSubBatchSampler, [50, 30, 80], 12, 4)
    sampler = make(seed=1)
    first, second = list(sampler), list(sampler)
    assert first != second
    assert list(make(seed=1)) == first != list(make(seed=2))
    again = make(seed=1)
    again.set_epoch(1)
    assert len(again) == len(second)
    assert list(again) == second


@pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize("after", [0, 1, 5, 11])
def test_resumes_exactly(stop, after):
    make = partial(InterleavedSubBatchSampler, [50, 30, 80], 12, 4, seed=3, stop=stop)
    whole = make()
    expected = [batch for _ in range(4) for batch in whole]
    stopped = make()
    drawn: list[list[int]] = []
    while len(drawn) < after:
        for batch in stopped:
            drawn.append(batch)
            if len(drawn) == after:
                break
    resumed = make()
    resumed.load_state_dict(stopped.state_dict())
    resumed.set_epoch(resumed.epoch)  # as trainers do before each epoch
    rest = [batch for _ in range(3) for batch in resumed]
    assert drawn == expected[:after]
    assert rest == expected[after : after + len(rest)]


def test_works_as_batch_sampler():
    data = ConcatDataset([[f"a{i}" for i in range(20)], [f"b{i}" for i in range(30)]])
    sampler = InterleavedSubBatchSampler([20, 30], 8, 4)
    loader = DataLoader(data, batch_sampler=sampler)
    assert len(loader) == len(sampler)
    batches = list(loader)
    assert all(len({item[0] for item in batch[:4]}) == 1 for batch in batches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([10, 10], 6, 4), "batch_size must be a multiple of sub_batch_size, got 6 and 4"),
        (([10, 10], 4, 0), "batch_size must be a multiple of sub_batch_size, got 4 and 0"),
        (([], 4, 4), r"dataset_lengths must be at least sub_batch_size=4, got \[\]"),
        (([10, 3], 4, 4), r"dataset_lengths must be at least sub_batch_size=4, got \[10, 3\]"),
        (([10, 10], 4, 4, [1.0]), "weights must be 2 positive numbers"),
        (([10, 10], 4, 4, [1.0, 0.0]), "weights must be 2 positive numbers"),
        (([10, 10], 4, 4, [1.0, float("nan")]), "weights must be 2 positive numbers"),
        (([10, 10], 4, 4, None, 0, "never"), "stop must be 'first_exhausted' or 'all_exhausted', got 'never'"),
    ],
)
def test_sampler_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        InterleavedSubBatchSampler(*arguments)


def test_sampler_says_when_data_fill_no_batch():
    with pytest.raises(ValueError, match="dataset_lengths must fill a batch of 40"):
        list(InterleavedSubBatchSampler([10, 10], 40, 4))


def test_state_of_another_sampler():
    state = InterleavedSubBatchSampler([10, 10], 4, 2).state_dict()
    with pytest.raises(ValueError, match="state must be of a sampler with sub_batch_size=4, got 2"):
        InterleavedSubBatchSampler([10, 10], 4, 4).load_state_dict(state)


# --- precision at 1 -------------------------------------------------------------------------------------------------------------


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_finding_oneself_is_certain_and_strangers_are_chance():
    items = random(400, 16)
    metric = EmbeddingMatchAccuracy()
    assert metric(items, items, torch.arange(400))["overall"] == 1
    metric = EmbeddingMatchAccuracy()
    metric.update(random(4000, 16, seed=1), random(10, 16, seed=2), torch.arange(4000) % 10)
    assert metric.compute()["overall"].item() == pytest.approx(0.1, abs=0.02)


def test_one_point_for_all_is_chance():
    metric = EmbeddingMatchAccuracy()
    metric.update(torch.ones(6, 3), torch.ones(5, 3), torch.zeros(6, dtype=torch.long))
    assert metric.compute()["overall"].item() == pytest.approx(0.2)


def test_candidates_of_each_query():
    query, candidates = random(30, 8), random(30, 12, 8, seed=1)
    gold = torch.randint(12, (30,), generator=torch.Generator().manual_seed(2))
    expected = torch.stack([torch.cosine_similarity(q[None], c).argmax() for q, c in zip(query, candidates, strict=True)]) == gold
    metric = EmbeddingMatchAccuracy()
    metric.update(query, candidates, gold)
    assert metric.compute()["overall"] == expected.double().mean()
    inner = EmbeddingMatchAccuracy(normalize=False)
    inner.update(query, candidates, gold)
    assert inner.compute()["overall"] == ((candidates @ query[:, :, None])[..., 0].argmax(1) == gold).double().mean()


def test_tasks_and_kinds_are_means_of_means_in_any_batches():
    groups = {"a": ("classify", "seen"), "b": ("find", "seen"), "c": ("find", "unseen"), "empty": ("unseen",)}
    metric, parts = EmbeddingMatchAccuracy(groups), EmbeddingMatchAccuracy(groups)
    eye = torch.eye(4)
    gold = torch.tensor([0, 1, 2, 3, 0, 0, 2, 0])
    rows = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])  # right, but for the sixth and the last
    names = ["a", "a", "a", "a", "b", "b", "c", "c"]
    metric.update(eye[rows], eye, gold, names)
    scores = {name: value.item() for name, value in metric.compute().items()}
    assert np.isnan(scores.pop("empty"))
    means = {"overall": (1 + 0.5 + 0.5) / 3, "classify": 1, "find": 0.5, "seen": 0.75, "unseen": 0.5}
    assert scores == {"a": 1, "b": 0.5, "c": 0.5} | means
    for start in range(0, 8, 3):
        resumed = EmbeddingMatchAccuracy(groups)
        resumed.load_state_dict(parts.state_dict())
        resumed.update(eye[rows[start : start + 3]], eye, gold[start : start + 3], names[start : start + 3])
        parts = resumed
    torch.testing.assert_close(parts.compute(), metric.compute(), equal_nan=True)


def test_bfloat16_scores():
    items = random(50, 16).bfloat16()
    metric = EmbeddingMatchAccuracy(["a"])
    metric.update(items, items, torch.arange(50), "a")
    assert metric.compute()["a"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": torch.zeros(4, 2)}, "candidates must be"),
        ({"candidates": torch.zeros(0, 3)}, "candidates must be"),
        ({"candidates": torch.zeros(1, 4, 3)}, "gold and candidates must go with 2 queries"),
        ({"gold": torch.tensor([0])}, "gold and candidates must go with 2 queries"),
        ({"gold": torch.tensor([0, 4])}, r"gold must be in \[0, 4\), got 0 to 4"),
        ({"gold": torch.tensor([-1, 0])}, r"gold must be in \[0, 4\), got -1 to 0"),
        ({"query": torch.tensor([[float("nan")] * 3] * 2)}, "must be finite"),
        ({"group": "z"}, r"group must be one of \['a', 'b'\]"),
        ({"group": ["a"]}, "one for each of 2 queries"),
        ({"group": None}, "one for each of 2 queries"),
    ],
)
def test_metric_bad_input(change, message, unchecked):
    arguments = {"query": torch.ones(2, 3), "candidates": torch.ones(4, 3), "gold": torch.tensor([0, 1]), "group": "a"}
    with pytest.raises(ValueError, match=message):
        EmbeddingMatchAccuracy(["a", "b"]).update(**arguments | change)


def test_group_without_groups_and_names_that_clash():
    with pytest.raises(ValueError, match="group must be left out"):
        EmbeddingMatchAccuracy().update(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([0]), "a")
    for groups in (["a", "a"], ["overall"], {"a": ("a",)}, {"a": ("overall",)}):
        with pytest.raises(ValueError, match="groups and kinds must differ"):
            EmbeddingMatchAccuracy(groups)
