import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    MistralConfig,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from firsthand.decode.opera import find_image_span, opera_search
from firsthand.decode.over_trust import over_trust_penalty

VOCAB, IMAGE, END = 23, 3, 2
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, **TOKENS),
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, **TOKENS),
    "mistral": lambda: MistralConfig(**SIZES, **TOKENS, num_key_value_heads=2, sliding_window=5),
    "llava": lambda: LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        ),
        text_config=LlamaConfig(**SIZES, **TOKENS),
        image_token_id=IMAGE,
    ),
}
FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2", "llava"])
SPAN = (1, 4)
PLAIN = {"penalty_weight": 0.0, "rollback_threshold": None, "num_candidates": VOCAB}


def build(family="llama", attention="eager", dtype=torch.float32, end=False):
    """A model of random weights that are large enough for it to have opinions."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    if family == "llava":
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
    else:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "norm" not in name and "ln_" not in name else 1.0)
    if not end:
        model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def ask(family="llama", dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(5, VOCAB, (1, 7), generator=generator)
    if family != "llava":
        return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    prompt[:, SPAN[0] : SPAN[1] + 1] = IMAGE
    pixels = torch.randn(1, 3, 8, 8, generator=generator).to(dtype)
    return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "pixel_values": pixels}


def generate(model, inputs, **how):
    return model.generate(**inputs, **({"do_sample": False, "num_beams": 3, "max_new_tokens": 14} | how))


def opera(model, inputs, **how):
    return generate(model, inputs, **({"custom_generate": opera_search} | how))


def plant(model, row_of):
    """Let the last layer's attention of each candidate be `row_of(number of the call, token, length)`."""
    calls = []

    def hook(_, args, kwargs, output):
        if not kwargs.get("output_attentions"):
            return
        last = output.attentions[-1]
        length = last.shape[-1]
        rows = [row_of(len(calls), int(token), length) for token in kwargs["input_ids"][:, -1]]
        calls.append(length)
        output["attentions"] = (*output.attentions[:-1], torch.stack(rows)[:, None, None, :].expand_as(last))

    model.register_forward_hook(hook, with_kwargs=True)
    return calls


# Against the beam search of transformers, and against a search without cache or state


@FAMILIES
@pytest.mark.parametrize("how", [{}, {"num_beams": 1}, {"length_penalty": 0.0, "early_stopping": True}, {"length_penalty": 2.0}])
@pytest.mark.parametrize("end", [True, False])
def test_without_penalty_it_is_beam_search(family, how, end):
    model, inputs = build(family, end=end), ask(family)
    how = {"num_return_sequences": min(2, how.get("num_beams", 3))} | how
    assert torch.equal(opera(model, inputs, **PLAIN, **how), generate(model, inputs, **how))


@pytest.mark.parametrize("end", [5, 11, 14, 20])
@pytest.mark.parametrize("early", [True, False, "never"])
def test_ending(end, early):
    """Whatever token ends a response, and however beam search is told to stop."""
    model, inputs = build(), ask()
    how = {"eos_token_id": [end, end + 1], "early_stopping": early, "return_dict_in_generate": True, "output_scores": True}
    mine, other = opera(model, inputs, **PLAIN, **how), generate(model, inputs, **how)
    assert torch.equal(mine.sequences, other.sequences)
    torch.testing.assert_close(mine.sequences_scores, other.sequences_scores)
    assert mine.rollbacks == []


def test_logits_processors():
    model, inputs = build(end=True), ask()
    how = {"min_new_tokens": 9, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "renormalize_logits": True}
    usual = generate(model, inputs, **how)
    assert torch.equal(opera(model, inputs, **PLAIN, **how), usual)
    assert not torch.equal(opera(model, inputs, **PLAIN), usual)


def test_padded_prompt():
    model, inputs = build(), ask()
    padded = {"input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.int64), inputs["input_ids"]], 1)}
    padded["attention_mask"] = (padded["input_ids"] != 0).long()
    how = {"rollback_threshold": None, "num_candidates": 3}
    assert torch.equal(opera(model, padded, **how)[:, 3:], opera(model, inputs, **how))


def test_sliding_window():
    model, inputs = build("mistral"), ask()
    assert torch.equal(opera(model, inputs, **PLAIN), generate(model, inputs))
    with pytest.raises(ValueError, match="rollback_threshold must be None"):
        opera(model, inputs)


@pytest.mark.parametrize("beams", [1, 4])
def test_one_candidate_is_greedy_decoding(beams):
    """Among one candidate there is nothing to choose, whatever its penalty."""
    model, inputs = build(), ask()
    greedy = generate(model, inputs, num_beams=1)
    assert torch.equal(opera(model, inputs, num_beams=beams, num_candidates=1, rollback_threshold=None), greedy)


@torch.no_grad()
def by_hand(model, inputs, beams, candidates, weight, new, span, anew=None, scale=50.0):
    """Each candidate is run from the first token on, and its penalty computed from the whole matrix.

    The tokens at the position `anew` are chosen, and then once more without these.
    """
    prompt = inputs["input_ids"].shape[1]
    rest = {name: value for name, value in inputs.items() if name == "pixel_values"}

    def proposals(beam, score, sequence, barred):
        logits = model(sequence[None], **rest).logits[0, -1].log_softmax(-1)
        for other, token in barred:
            if other == beam:
                logits[token] = -torch.inf
        top = logits.topk(candidates)
        grown = [torch.cat([sequence, token[None]]) for token in top.indices]
        wholes = [model(each[None], **rest, output_attentions=True).attentions[-1][0].amax(0) for each in grown]
        penalty = torch.stack([over_trust_penalty(whole, span, prompt, scale, warmup=5)[0] for whole in wholes])
        log_probs = (top.values - weight * penalty).log_softmax(-1)
        return [(score + each.item(), beam, sequence) for each, sequence in zip(log_probs, grown, strict=True)]

    hypotheses, position, barred = [(0.0, inputs["input_ids"][0])], 0, []
    while position < new:
        grown = [each for beam, (score, sequence) in enumerate(hypotheses) for each in proposals(beam, score, sequence, barred)]
        best = sorted(grown, key=lambda each: -each[0])[:beams]
        if position == anew and not barred:
            barred = [(beam, int(sequence[-1])) for _, beam, sequence in best]
            continue
        hypotheses, position, barred = [(score, sequence) for score, _, sequence in best], position + 1, []
    return hypotheses


@FAMILIES
def test_search_by_hand(family):
    model, inputs = build(family), ask(family)
    span = SPAN if family == "llava" else None
    expected = by_hand(model, inputs, beams=2, candidates=3, weight=3.0, new=11, span=span, scale=100.0)
    settings = {"num_candidates": 3, "penalty_weight": 3.0, "warmup": 5, "image_span": span, "scale_factor": 100.0}
    settings["rollback_threshold"] = None
    how = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 11, "return_dict_in_generate": True}
    found = opera(model, inputs, **settings, **how)
    assert found.sequences.tolist() == [sequence.tolist() for _, sequence in expected]
    scores = torch.tensor([score / 11 for score, _ in expected])
    torch.testing.assert_close(found.sequences_scores, scores, atol=1e-4, rtol=1e-4)
    usual = opera(model, inputs, **(settings | {"penalty_weight": 0.0}), **how)
    assert not torch.equal(found.sequences, usual.sequences), "the penalty makes a difference here"


def test_one_forward_pass_a_token():
    model, inputs = build(), ask()
    shapes = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    opera(model, inputs, num_candidates=4, rollback_threshold=None, max_new_tokens=6)
    assert shapes == [(3, 7)] + [(12, 1)] * 6


# The image


def test_image_counts_iff_the_response_is_short():
    """Token 12 alone looks at the image, and nothing else is wanted: it is chosen as often as the warm-up lasts."""
    model, inputs = build("llava"), ask("llava")

    def row_of(_, token, length):
        row = torch.zeros(length)
        row[SPAN[0] if token == 12 else 0] = 1.0
        return row

    plant(model, row_of)
    how = {"num_candidates": VOCAB, "penalty_weight": 1e4, "image_span": SPAN, "warmup": 4}
    response = opera(model, inputs, **how)[0, 7:]
    assert (response == 12).nonzero().flatten().tolist()[:4] == [0, 1, 2, 3]
    assert response[4] != 12
    assert not torch.equal(opera(model, inputs, **(how | {"image_span": None}))[0, 7:], response)


def test_find_image_span():
    prompt = torch.tensor([1, 3, 3, 7, 3, 8])
    assert find_image_span(prompt, 3) == (1, 4)
    assert find_image_span(prompt.repeat(2, 1), 3) == (1, 4)
    with pytest.raises(ValueError, match="must hold the image token 5"):
        find_image_span(prompt, 5)
    with pytest.raises(ValueError, match="the same positions"):
        find_image_span(torch.stack([prompt, prompt.flip(0)]), 3)


# Retrospection


def lean_on(summary, until=10**9, prompt=7):
    """All tokens from the summary token on look at it, for so many forward passes; else each looks at itself."""

    def row_of(call, token, length):
        row = torch.zeros(length)
        place = prompt + summary
        row[place if length > place and call < until else -1] = 1.0
        return row

    return row_of


@pytest.mark.parametrize("beams", [1, 3])
def test_rollback_begins_when_the_count_is_reached(beams):
    summary, threshold = 4, 5
    how = {"rollback_threshold": threshold, "warmup": 2, "max_rollbacks": 1, "return_dict_in_generate": True, "num_beams": beams}
    reached = summary + threshold  # tokens: the candidates for the last of them are the ones that make the count
    for new, rollbacks in ((reached - 1, []), (reached, [summary + 1, summary])):
        model = build()
        plant(model, lean_on(summary))
        assert opera(model, ask(), max_new_tokens=new, **how).rollbacks == rollbacks


def test_the_token_after_the_summary_token_is_another():
    summary, threshold = 4, 5
    how = {"rollback_threshold": threshold, "warmup": 2, "num_beams": 1, "return_dict_in_generate": True, "penalty_weight": 0.0}
    found = {}
    for most in (0, 1):
        model = build()
        plant(model, lean_on(summary, until=summary + threshold))
        found[most] = opera(model, ask(), max_rollbacks=most, **how)
    before, after = found[0].sequences[0, 7:], found[1].sequences[0, 7:]
    assert (found[0].rollbacks, found[1].rollbacks) == ([], [summary + 1])
    assert torch.equal(before[: summary + 1], after[: summary + 1])
    logits = build()(torch.cat([ask()["input_ids"][0], before[: summary + 1]])[None]).logits[0, -1]
    assert [before[summary + 1], after[summary + 1]] == logits.topk(2).indices.tolist(), "the best, then the second best"


@pytest.mark.parametrize("beams", [1, 2, 4])
@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("most", [0, 1, 3])
def test_never_more_rollbacks_than_allowed(beams, candidates, most):
    """Also with one candidate, where all that were proposed have been chosen."""
    summary = 3
    model = build()
    plant(model, lean_on(summary))
    how = {"num_beams": beams, "num_candidates": candidates, "max_rollbacks": most, "warmup": 0, "rollback_threshold": 4}
    found = opera(model, ask(), return_dict_in_generate=True, **how)
    assert found.rollbacks == [summary + 1] * most + [summary] * most
    assert found.sequences.shape == (1, 7 + 14)


def test_tokens_of_the_first_positions_are_not_gone_back_to():
    model = build()
    plant(model, lean_on(5))
    assert opera(model, ask(), warmup=6, rollback_threshold=3, return_dict_in_generate=True).rollbacks == []


def test_summary_tokens_do_not_go_backwards():
    """First the response leans on token 6, then, rolled back, on token 3."""
    model = build()
    early, late = lean_on(3), lean_on(6)
    plant(model, lambda call, token, length: (late if call < 10 else early)(call, token, length))
    how = {"warmup": 0, "rollback_threshold": 4, "max_rollbacks": 1, "return_dict_in_generate": True, "max_new_tokens": 20}
    assert opera(model, ask(), **how).rollbacks == [7]


@FAMILIES
@pytest.mark.parametrize("beams", [1, 3])
def test_rollback_by_hand(family, beams):
    """What is put back is what a pass over the whole text computes: cache, positions and scores."""
    summary, threshold = 3, 4
    how = {"warmup": 0, "rollback_threshold": threshold, "penalty_weight": 0.0, "num_candidates": 3, "max_new_tokens": 10}
    how |= {"num_beams": beams, "num_return_sequences": beams, "return_dict_in_generate": True}
    model, inputs = build(family), ask(family)
    expected = by_hand(model, inputs, beams, candidates=3, weight=0.0, new=10, span=None, anew=summary + 1)
    plant(model, lean_on(summary, until=summary + threshold))
    found = opera(model, inputs, **how)
    assert found.rollbacks == [summary + 1]
    assert found.sequences.tolist() == [sequence.tolist() for _, sequence in expected]
    scores = torch.tensor([score / 10 for score, _ in expected])
    torch.testing.assert_close(found.sequences_scores, scores, atol=1e-4, rtol=1e-4)


def test_rollback_with_a_padded_prompt():
    found = []
    for padding in (0, 3):
        model, inputs = build(), ask()
        inputs["input_ids"] = torch.cat([torch.zeros(1, padding, dtype=torch.int64), inputs["input_ids"]], 1)
        inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
        plant(model, lean_on(3, prompt=7 + padding))
        output = opera(model, inputs, warmup=0, rollback_threshold=4, max_rollbacks=2, return_dict_in_generate=True)
        assert output.rollbacks == [4, 4, 3, 3]
        found.append(output.sequences[0, padding:])
    assert torch.equal(*found)


# Hosts and input


def test_bfloat16():
    model, inputs = build("llava", dtype=torch.bfloat16), ask("llava", torch.bfloat16)
    assert opera(model, inputs, image_span=SPAN, rollback_threshold=2, warmup=2).shape == (1, 21)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@FAMILIES
def test_cuda(family):
    model, inputs = build(family).cuda(), {name: value.cuda() for name, value in ask(family).items()}
    assert torch.equal(opera(model, inputs, **PLAIN), generate(model, inputs))
    span = SPAN if family == "llava" else None
    assert opera(model, inputs, image_span=span, rollback_threshold=2, warmup=2).shape == (1, 21)


def test_processors_that_forbid_everything():
    """Nothing can go on, and nothing has ended: what there is comes back."""

    class Forbid(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores if input_ids.shape[1] < 10 else torch.full_like(scores, -torch.inf)

    assert opera(build(), ask(), logits_processor=[Forbid()]).shape == (1, 7 + 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_candidates": 0}, "num_candidates must be at least 1, got 0"),
        ({"penalty_weight": -1.0}, "penalty_weight must be at least 0"),
        ({"penalty_weight": float("nan")}, "penalty_weight must be at least 0"),
        ({"rollback_threshold": 0}, "rollback_threshold must be at least 1 or None, got 0"),
        ({"max_rollbacks": -1}, "max_rollbacks must be at least 0, got -1"),
        ({"scale_factor": 0.0}, "scale_factor must be positive"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"image_span": (3, 7)}, "image_span must be"),
        ({"do_sample": True}, "do_sample must be False"),
        ({"use_cache": False}, "use_cache must be True"),
        ({"cache_implementation": "static"}, "cache must be dynamic"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        opera(build(), ask(), **settings)


def test_hosts_that_do_not_fit():
    model, inputs = build(), ask()
    two = {name: value.repeat(2, 1) for name, value in inputs.items()}
    with pytest.raises(NotImplementedError, match="input_ids must be one prompt, got 2"):
        opera(model, two)
    with pytest.raises(RuntimeError, match='attn_implementation="eager"'):
        opera(build(attention="sdpa"), inputs)
    with pytest.raises(ValueError, match="input_ids must be given"):
        opera(model, {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])})
    with pytest.raises(ValueError, match="cache must be dynamic"):
        opera(model, inputs, past_key_values=StaticCache(config=model.config, max_cache_len=30))
    filled = DynamicCache()
    model(inputs["input_ids"][:, :3], past_key_values=filled)
    with pytest.raises(ValueError, match="past_key_values must be empty, got 3 tokens"):
        opera(model, inputs, past_key_values=filled)
    sizes = {"vocab_size": VOCAB, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    encoder_decoder = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    with pytest.raises(ValueError, match="model must be decoder-only, got T5ForConditionalGeneration"):
        opera(encoder_decoder, {"input_ids": inputs["input_ids"]})
