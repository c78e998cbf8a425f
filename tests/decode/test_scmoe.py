import inspect
import math
import threading

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    StoppingCriteriaList,
)

from firsthand.decode.scmoe import SelfContrastLogitsProcessor, self_contrast, self_contrast_logits
from firsthand.moe.blocks import moe_blocks, register_experts_backend
from firsthand.moe.routing import routing_override

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 24, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FINE = {"num_experts": 6, "moe_intermediate_size": 8}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=6),
    "olmoe": lambda: OlmoeConfig(**SIZES, num_experts=6),
    "qwen2-moe": lambda: Qwen2MoeConfig(**SIZES, **FINE, shared_expert_intermediate_size=12),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SIZES, **FINE, head_dim=8),
}
FAMILIES = pytest.mark.parametrize("family", CONFIGS)
BACKENDS = pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm", "firsthand"])
WEAK = pytest.mark.parametrize("weak_rank", [2, 6, [2, 3, 5]])
NEW = 8


def build(family="mixtral", backend="eager"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "norm" not in name else 1.0)
    model.generation_config.eos_token_id = None  # so that nothing ends early
    register_experts_backend()
    model.set_experts_implementation(backend)
    return model


@pytest.fixture
def prompts():
    return torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def padded(prompts):
    """The same prompts, the first two shortened and padded on the left."""
    mask = torch.ones_like(prompts)
    mask[0, :3] = mask[1, :1] = 0
    return {"input_ids": prompts * mask, "attention_mask": mask}


def generate(model, inputs, **how):
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    return model.generate(**inputs, **({"max_new_tokens": NEW, "do_sample": False} | how))


@torch.no_grad()
def by_hand(model, prompts, ranks, beta=0.5, alpha=0.1):
    """Greedy decoding without caches, masks or hooks on the model: one sequence after the other."""
    rows = []
    for row in prompts:
        row = row[row != 0]
        length = len(row)
        for _ in range(NEW):
            strong = model(row[None], use_cache=False).logits[0, -1]
            with routing_override(model, ranks):
                weak = model(row[None], use_cache=False).logits[0, -1]
            kept = strong.softmax(-1) >= alpha * strong.softmax(-1).max()
            z = [(1 + beta) * s - beta * w if keep else -math.inf for s, w, keep in zip(strong, weak, kept, strict=True)]
            row = torch.cat([row, torch.tensor([max(range(40), key=lambda token, z=z: z[token])])])
        rows.append(row[length:])
    return torch.stack(rows)


# The logits


def random_logits(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(2, 5, 9, generator=generator)).to(dtype), (3 * torch.randn(2, 5, 9, generator=generator)).to(dtype)


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5])
def test_without_beta_only_implausible_tokens_go(alpha):
    strong, weak = random_logits()
    probabilities = strong.softmax(-1)
    kept = probabilities >= alpha * probabilities.amax(-1, keepdim=True)
    assert torch.equal(self_contrast_logits(strong, weak, beta=0.0, alpha=alpha), strong.masked_fill(~kept, -torch.inf))


@pytest.mark.parametrize("beta", [0.0, 0.5, 3.0])
def test_equal_predictions_leave_the_kept_tokens_as_they_are(beta):
    strong, _ = random_logits()
    z = self_contrast_logits(strong, strong, beta)
    torch.testing.assert_close(z[z.isfinite()], strong[z.isfinite()])
    assert torch.equal(z.argmax(-1), strong.argmax(-1))


def test_alpha_of_one_is_greedy():
    strong, weak = random_logits()
    z = self_contrast_logits(strong, weak, beta=5.0, alpha=1.0)
    assert torch.equal(z.isfinite().sum(-1), torch.ones(2, 5, dtype=torch.int64))
    assert torch.equal(z.argmax(-1), strong.argmax(-1))


def test_numbers_worked_out_on_paper():
    strong, weak = torch.tensor([[2.0, 1.0, -3.0]]), torch.tensor([[3.0, 0.0, 100.0]])
    z = self_contrast_logits(strong, weak, beta=0.5, alpha=0.1)  # log 0.1 = -2.30: -3 is below 2 - 2.30
    assert z.tolist() == [[1.5, 1.5, -math.inf]]
    z = self_contrast_logits(strong, weak, beta=1.0, alpha=0.1, strong_temperature=2.0, weak_temperature=3.0)
    torch.testing.assert_close(z, torch.tensor([[1.0, 1.0, -math.inf]]))  # 2·(1, ½) - (1, 0); -1.5 is below 1 - 2.30


def test_a_constant_added_to_either_changes_no_probability():
    strong, weak = random_logits()
    z = self_contrast_logits(strong, weak).softmax(-1)
    torch.testing.assert_close(self_contrast_logits(strong + 4, weak - 7).softmax(-1), z, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_computed_in_float32_or_wider(dtype):
    strong, weak = random_logits(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z = self_contrast_logits(strong, weak)
    assert z.dtype == wide
    assert torch.equal(z, self_contrast_logits(strong.to(wide), weak.to(wide)))


def test_tokens_that_are_forbidden_already_stay_so():
    strong, weak = random_logits()
    strong[..., 4] = weak[..., 4] = -torch.inf
    z = self_contrast_logits(strong, weak)
    assert (z[..., 4] == -torch.inf).all()
    assert not z.isnan().any()


SETTINGS = pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -0.1}, "beta must be at least 0 and finite"),
        ({"beta": math.inf}, "beta must be at least 0 and finite"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\]"),
        ({"alpha": 1.1}, r"alpha must be in \(0, 1\]"),
        ({"strong_temperature": 0.0}, "strong_temperature must be positive"),
        ({"weak_temperature": math.nan}, "weak_temperature must be positive"),
    ],
)


@SETTINGS
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        self_contrast_logits(*random_logits(), **settings)
    with pytest.raises(ValueError, match=message):
        SelfContrastLogitsProcessor(build(), **settings)
    with pytest.raises(ValueError, match=message), self_contrast(build(), **settings):
        pass


@pytest.mark.parametrize("weak_rank", [0, 7, -1, [], [1, 1], "second", [2, 7]])
def test_bad_ranks(weak_rank):
    with pytest.raises(ValueError, match=r"weak_rank must be a place in \[1, 6\]"):
        SelfContrastLogitsProcessor(build(), weak_rank)
    with pytest.raises(ValueError, match="weak_rank must be"), self_contrast(build(), weak_rank):
        pass


def test_a_dense_model_is_refused():
    dense = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 8}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**dense))
    with pytest.raises(ValueError, match="no sparse block"):
        SelfContrastLogitsProcessor(model)
    with pytest.raises(ValueError, match="no sparse block"), self_contrast(model):
        pass


# Both ways to decode, against a loop by hand and against each other


@FAMILIES
@WEAK
def test_greedy_decoding_is_the_loop_by_hand(family, weak_rank, padded):
    model = build(family)
    places = [weak_rank] if isinstance(weak_rank, int) else weak_rank
    expected = by_hand(model, padded["input_ids"], [place - 1 for place in places])
    with self_contrast(model, weak_rank):
        assert torch.equal(generate(model, padded)[:, 6:], expected)
    processor = SelfContrastLogitsProcessor(model, weak_rank, attention_mask=padded["attention_mask"])
    assert torch.equal(generate(model, padded, logits_processor=[processor])[:, 6:], expected)
    assert not torch.equal(generate(model, padded)[:, 6:], expected), "it changes something"


@FAMILIES
@BACKENDS
def test_the_contexts_scores_are_the_processors(family, backend, padded):
    model = build(family, backend)
    how = {"return_dict_in_generate": True, "output_scores": True}
    with self_contrast(model, beta=0.7):
        fused = generate(model, padded, **how)
    processor = SelfContrastLogitsProcessor(model, beta=0.7, attention_mask=padded["attention_mask"])
    passes = generate(model, padded, logits_processor=[processor], **how)
    assert torch.equal(fused.sequences, passes.sequences)
    for mine, other in zip(fused.scores, passes.scores, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@FAMILIES
def test_sampling(family, padded):
    """The same draws from the same distribution, and never a token that greedy decoding could not reach."""
    model = build(family)
    how = {"do_sample": True, "top_k": 0, "num_return_sequences": 2, "temperature": 0.8}
    torch.manual_seed(5)
    with self_contrast(model):
        fused = generate(model, padded, **how)
    torch.manual_seed(5)
    processor = SelfContrastLogitsProcessor(model, attention_mask=padded["attention_mask"])
    assert torch.equal(generate(model, padded, logits_processor=[processor], **how), fused)
    assert len(fused) == 6
    torch.manual_seed(5)
    with self_contrast(model, alpha=1.0):
        certain = generate(model, padded, **how)
    assert torch.equal(certain[::2], generate(model, padded)), "with alpha = 1 there is nothing left to sample"


def test_contrast_of_equal_experts_is_the_model(prompts):
    model = build()
    for block in moe_blocks(model):
        for weight in (block.experts.gate_up_proj, block.experts.down_proj):
            weight.data[:] = weight.data[:1]
    usual = generate(model, prompts)
    with self_contrast(model, beta=2.0):
        assert torch.equal(generate(model, prompts), usual)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}])
def test_other_caches(prompts, options):
    model = build()
    with self_contrast(model):
        usual = generate(model, prompts)
        assert torch.equal(generate(model, prompts, **options), usual)


def test_processor_without_a_cache(padded):
    model, scores = build(), {}
    for use_cache in (True, False):
        processor = SelfContrastLogitsProcessor(model, attention_mask=padded["attention_mask"], use_cache=use_cache)
        how = {"return_dict_in_generate": True, "output_scores": True}
        scores[use_cache] = torch.stack(generate(model, padded, logits_processor=[processor], **how).scores)
    torch.testing.assert_close(scores[True], scores[False], atol=1e-4, rtol=1e-4)


def test_stopping(prompts):
    """Rows that end are padded while others go on; a criterion of the user's stops all."""
    model = build()
    with self_contrast(model):
        free = generate(model, prompts)
        end = int(free[0, 8])
        ended = generate(model, prompts, eos_token_id=end)
        stopped = generate(model, prompts, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(9)]))
    assert torch.equal(stopped, free[:, :9])
    for row, whole in zip(ended, free, strict=True):
        ends = (whole[6:] == end).nonzero()
        last = 6 + int(ends[0]) + 1 if len(ends) else len(whole)
        assert torch.equal(row[:last], whole[:last])
        assert not row[last:].any(), "padded with 0"


def test_streaming_in_a_thread(prompts):
    model, streamed = build(), []

    class Streamer:
        def put(self, tokens):
            streamed.extend(tokens.flatten().tolist())

        def end(self):
            streamed.append("end")

    def work():
        with self_contrast(model):
            generate(model, prompts[:1], streamer=Streamer())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    with self_contrast(model):
        assert streamed == [*generate(model, prompts[:1])[0].tolist(), "end"]


def test_processors_of_the_user_come_after(prompts):
    model = build()
    with self_contrast(model):
        first = generate(model, prompts)[:, 6]

        class Forbid(LogitsProcessor):
            def __call__(self, input_ids, scores):
                return scores.scatter(1, first[:, None], -torch.inf)

        assert not (generate(model, prompts, logits_processor=[Forbid()])[:, 6] == first).any()


def test_the_strong_prediction_may_have_more_experts(prompts):
    model = build()
    with routing_override(model, top_k=3):
        with self_contrast(model):
            fused = generate(model, prompts)
        passes = generate(model, prompts, logits_processor=[SelfContrastLogitsProcessor(model)])
    for block in moe_blocks(model):
        block.router.top_k = 3
    with self_contrast(model):
        assert torch.equal(generate(model, prompts), fused)
    assert torch.equal(passes, fused)


def test_random_experts_repeat_with_their_seed(prompts):
    model = build()

    def fused(seed):
        with self_contrast(model, "random", generator=torch.Generator().manual_seed(seed)):
            return model(prompts).logits

    assert torch.equal(fused(0), fused(0))
    assert not torch.equal(fused(0), fused(1))
    processor = SelfContrastLogitsProcessor(model, "random", generator=torch.Generator().manual_seed(0))
    assert generate(model, prompts, logits_processor=[processor]).shape == (3, 6 + NEW)


def test_compiles():
    contrast = inspect.unwrap(self_contrast_logits)  # without the shape checks of the tests
    compiled = torch.compile(contrast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*random_logits()), contrast(*random_logits()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["grouped_mm", "firsthand"])
def test_cuda(backend, padded):
    """There transformers decodes with another backend than it reads the prompt with."""
    inputs = {name: value.cuda() for name, value in padded.items()}
    model = build(backend=backend).cuda()
    with self_contrast(model):
        fused = generate(model, inputs)
    processor = SelfContrastLogitsProcessor(model, attention_mask=inputs["attention_mask"])
    assert torch.equal(generate(model, inputs, logits_processor=[processor]), fused)


# What the context does to one forward pass


@FAMILIES
def test_given_text_is_scored_at_every_position(family, padded):
    model = build(family)
    with torch.no_grad():
        strong = model(**padded).logits
        with routing_override(model, [1]):
            weak = model(**padded).logits
        with self_contrast(model):
            both = model(padded["input_ids"], padded["attention_mask"]).logits  # by position this time
    real = padded["attention_mask"].bool()
    torch.testing.assert_close(both[real], self_contrast_logits(strong, weak)[real], atol=1e-4, rtol=1e-4)


def test_embeddings_and_shared_positions_go_in_as_well(prompts):
    model = build()
    with torch.no_grad(), self_contrast(model):
        expected = model(prompts).logits
        embedded = model.get_input_embeddings()(prompts)
        torch.testing.assert_close(model(inputs_embeds=embedded).logits, expected)
        torch.testing.assert_close(model(prompts, position_ids=torch.arange(6)[None]).logits, expected)


def test_other_outputs_are_those_of_the_strong_pass(prompts):
    model = build()
    ask = {"output_hidden_states": True, "output_router_logits": True, "output_attentions": True}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        usual = model(prompts, **ask)
        with self_contrast(model):
            inside = model(prompts, **ask)
    for name in ("hidden_states", "router_logits", "attentions"):
        for mine, other in zip(inside[name], usual[name], strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)
    assert inside.aux_loss is None


def test_nothing_is_left_behind(prompts):
    model = build()
    with torch.no_grad():
        usual = model(prompts).logits
        with pytest.raises(RuntimeError, match="inside"), self_contrast(model):
            raise RuntimeError("inside")
        assert torch.equal(model(prompts).logits, usual)
        below = model.model(prompts).last_hidden_state
        with self_contrast(model):
            model(prompts)
            assert torch.equal(model.model(prompts).last_hidden_state, below), "the model below the head is as ever"
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_another_thread_is_left_alone(prompts):
    model = build()
    usual, seen = generate(model, prompts), []
    with self_contrast(model):
        thread = threading.Thread(target=lambda: seen.append(generate(model, prompts)))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], usual)


def test_bfloat16(prompts):
    model = build("olmoe").to(torch.bfloat16)
    with torch.no_grad(), self_contrast(model):
        assert model(prompts).logits.dtype == torch.float32
        assert generate(model, prompts).shape == (3, 6 + NEW)


def test_labels_are_refused(prompts):
    model = build()
    with self_contrast(model):
        with pytest.raises(ValueError, match="labels must be left out"):
            model(prompts, labels=prompts)
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            model()


def test_beam_search_is_refused(prompts):
    model = build()
    with pytest.raises(ValueError, match="beam search"), self_contrast(model):
        generate(model, prompts, num_beams=2)
    with pytest.raises(ValueError, match="num_beams must be 1"):
        generate(model, prompts, num_beams=2, logits_processor=[SelfContrastLogitsProcessor(model)])


def test_a_cache_from_outside_is_refused(prompts):
    model = build()
    with torch.no_grad():
        cache = model(prompts, use_cache=True).past_key_values
        with self_contrast(model), pytest.raises(ValueError, match="past_key_values must have 2 rows"):
            model(prompts[:, :1], past_key_values=cache)


# The processor's state


def test_one_processor_serves_prompt_after_prompt(prompts):
    model = build()
    processor = SelfContrastLogitsProcessor(model)
    others = prompts.flip(1)
    for each in (prompts, others, prompts, prompts[:2], torch.cat([prompts, others], 1)):
        fresh = generate(model, each, logits_processor=[SelfContrastLogitsProcessor(model)])
        assert torch.equal(generate(model, each, logits_processor=[processor]), fresh)


def test_rows_that_are_exchanged_are_noticed(prompts):
    model = build()
    processor, strong = SelfContrastLogitsProcessor(model), torch.zeros(3, 40)
    processor(prompts[:, :5], strong)
    exchanged = prompts[[1, 0, 2]]
    torch.testing.assert_close(processor(exchanged, strong), SelfContrastLogitsProcessor(model)(exchanged, strong))


def test_going_on_computes_the_new_tokens_only(prompts):
    model = build()
    processor, lengths = SelfContrastLogitsProcessor(model), []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    for length in (4, 5, 6):
        processor(prompts[:, :length], torch.zeros(3, 40))
    processor(prompts[:, :3], torch.zeros(3, 40))
    assert lengths == [4, 1, 1, 3]


def test_masks_that_do_not_fit(padded):
    model = build()
    with pytest.raises(ValueError, match="attention_mask must be given: some prompts begin with the padding token 0"):
        SelfContrastLogitsProcessor(model)(padded["input_ids"], torch.zeros(3, 40))
    for mask in (torch.ones(2, 6, dtype=torch.int64), torch.ones(3, 7, dtype=torch.int64)):
        with pytest.raises(ValueError, match="attention_mask must be that of the prompts of 3 sequences of 6 tokens"):
            SelfContrastLogitsProcessor(model, attention_mask=mask)(padded["input_ids"], torch.zeros(3, 40))
