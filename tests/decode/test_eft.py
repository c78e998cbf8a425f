import copy
import inspect
import math
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, LogitsProcessor, MistralConfig

from firsthand import data
from firsthand.decode.eft import CachedReader, EmulatedFineTuningLogitsProcessor, emulated_logits, emulated_nll

VOCAB, NEW = 40, 8
SPECIAL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = SPECIAL | {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "window": lambda: MistralConfig(**SIZES, sliding_window=5),
    "gpt2": lambda: GPT2Config(**SPECIAL, n_embd=16, n_layer=2, n_head=2, n_positions=64),
}
# peft asks transformers by a name that is on its way out
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
FAMILIES = pytest.mark.parametrize("family", CONFIGS)


def build(seed, family="llama", **config):
    torch.manual_seed(seed)
    sizes = CONFIGS[family]()
    sizes.update(config)
    model = AutoModelForCausalLM.from_config(sizes).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "norm" not in name and "ln" not in name else 1.0)
    model.generation_config.eos_token_id = None  # so that nothing ends early
    return model


@pytest.fixture
def prompts():
    return torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def padded(prompts):
    """The same prompts, the first two shortened and padded on the left."""
    mask = torch.ones_like(prompts)
    mask[0, :3] = mask[1, :1] = 0
    return {"input_ids": prompts * mask, "attention_mask": mask}


def generate(model, inputs, *processors, **how):
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    how = {"max_new_tokens": NEW, "do_sample": False, "logits_processor": list(processors)} | how
    return model.generate(**inputs, **how)


@torch.no_grad()
def one_pass(models, weights, row):
    """Log-probabilities after each token of one row, by the formula, without caches and masks."""
    base, *rest = [model(row[None], use_cache=False).logits[0].double() for model in models]
    total = base.softmax(-1).log()
    for tuned, reference, weight in zip(rest[::2], rest[1::2], weights, strict=True):
        total = total + weight * (tuned.softmax(-1).log() - reference.softmax(-1).log())
    return total - total.exp().sum(-1, keepdim=True).log()


def by_hand(models, prompts, weights=(1.0,)):
    """Greedy decoding of one sequence after the other."""
    rows = []
    for row in prompts:
        row = row[row != 0]
        length = len(row)
        for _ in range(NEW):
            row = torch.cat([row, one_pass(models, weights, row)[-1].argmax()[None]])
        rows.append(row[length:])
    return torch.stack(rows)


def beams_by_hand(models, prompt, beams):
    kept = [(0.0, prompt)]
    for _ in range(NEW):
        grown = []
        for score, row in kept:
            log_probs = one_pass(models, (1.0,), row)[-1]
            grown += [(score + log_probs[token].item(), torch.cat([row, torch.tensor([token])])) for token in range(VOCAB)]
        kept = sorted(grown, key=lambda pair: -pair[0])[:beams]
    return kept[0][1]


# The logits


def random_logits(count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(2, 5, 9, generator=generator)).to(dtype) for _ in range(count)]


def test_without_weight_the_base_remains():
    base, tuned, reference = random_logits()
    torch.testing.assert_close(emulated_logits(base, tuned, reference, 0.0), base.log_softmax(-1))


def test_a_base_that_is_the_reference_becomes_the_tuned_model():
    base, tuned, _ = random_logits()
    torch.testing.assert_close(emulated_logits(base, tuned, base), tuned.log_softmax(-1))


def test_a_tuning_that_changed_nothing_changes_nothing():
    base, tuned, _ = random_logits()
    for weight in (-1.0, 0.5, 4.0):
        torch.testing.assert_close(emulated_logits(base, tuned, tuned + 3, weight), base.log_softmax(-1))


@pytest.mark.parametrize("top_p", [None, 0.7])
@pytest.mark.parametrize("nucleus_of", ["tuned", "base"])
def test_constants_do_not_matter(top_p, nucleus_of):
    logits = random_logits()
    expected = emulated_logits(*logits, 1.5, top_p, nucleus_of)
    shifted = [each + shift for each, shift in zip(logits, (4.0, -7.0, 2.0), strict=True)]
    torch.testing.assert_close(emulated_logits(*shifted, 1.5, top_p, nucleus_of), expected, atol=1e-4, rtol=1e-4)


def test_a_bias_is_carried_over():
    base, reference, bias = random_logits()
    expected = (base + 0.5 * bias).log_softmax(-1)
    torch.testing.assert_close(emulated_logits(base, reference + bias, reference, 0.5), expected, atol=1e-4, rtol=1e-4)


def test_several_tunings_add_up():
    base, reference, first, second = random_logits(4)
    expected = (base + 0.3 * first - 0.6 * second).log_softmax(-1)
    tuned = [reference + first, reference + second]
    for references in (reference, [reference], [reference, reference - 1]):
        torch.testing.assert_close(emulated_logits(base, tuned, references, [0.3, -0.6]), expected, atol=1e-4, rtol=1e-4)
    both = emulated_logits(base, tuned, reference)
    torch.testing.assert_close(both, (base + first + second).log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_the_difference_of_an_optimal_policy_is_its_reward():
    """A policy that maximises E r - β KL(p || p_ref), found by gradient ascent, carries r / β to another base."""
    torch.manual_seed(0)
    beta, reward, reference, base = 0.7, *torch.randn(3, 6, dtype=torch.float64)
    policy = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [policy], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=1e-14
    )

    def closure():
        optimizer.zero_grad()
        p, log_p = policy.softmax(-1), policy.log_softmax(-1)
        value = -(p * reward).sum() + beta * (p * (log_p - reference.log_softmax(-1))).sum()
        value.backward()
        return value

    optimizer.step(closure)
    emulated = emulated_logits(base, policy.detach(), reference)
    torch.testing.assert_close(emulated, (base + reward / beta).log_softmax(-1), atol=1e-5, rtol=1e-5)


def test_nucleus_worked_out_on_paper():
    base = torch.tensor([0.1, 0.3, 0.6]).log()
    tuned, reference = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.25, 0.6, 0.15]).log()
    of_tuned = emulated_logits(base, tuned, reference, top_p=0.8).exp()  # the first two: 0.1 * 2, 0.3 / 2, 0.6
    torch.testing.assert_close(of_tuned, torch.tensor([0.2, 0.15, 0.6]) / 0.95)
    of_base = emulated_logits(base, tuned, reference, top_p=0.6, nucleus_of="base").exp()  # the last alone: 0.6 * 4 / 3
    torch.testing.assert_close(of_base, torch.tensor([0.1, 0.3, 0.8]) / 1.2)
    assert torch.equal(emulated_logits(base, tuned, reference, top_p=1.0), emulated_logits(base, tuned, reference))


def test_forbidden_tokens_stay_forbidden():
    base, tuned, reference = random_logits()
    base[..., 2] = tuned[..., 4] = reference[..., 4] = -math.inf
    p = emulated_logits(base, tuned, reference).exp()
    assert (p[..., 2] == 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 5))
    tuned[..., 5] = -math.inf
    assert (emulated_logits(base, tuned, reference)[..., 5] == -math.inf).all()
    torch.testing.assert_close(emulated_logits(base, tuned, reference, 0.0), base.log_softmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_computed_in_float32_or_wider(dtype):
    logits = random_logits(dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    emulated = emulated_logits(*logits, top_p=0.9)
    assert emulated.dtype == wide
    assert torch.equal(emulated, emulated_logits(*(each.to(wide) for each in logits), top_p=0.9))


def test_compiles():
    emulate = inspect.unwrap(emulated_logits)  # without the shape checks of the tests
    compiled = torch.compile(emulate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*random_logits(), 0.5, 0.9), emulate(*random_logits(), 0.5, 0.9))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"weights": [1.0, 1.0]}, "weights must be one number or one for each of the 1 tuned models, got 2"),
        ({"weights": math.nan}, "weights must be finite, got nan"),
        ({"top_p": 0.0}, "top_p must be in (0, 1], or None, got 0.0"),
        ({"top_p": 1.1}, "top_p must be in (0, 1], or None, got 1.1"),
        ({"nucleus_of": "reference"}, "nucleus_of must be 'tuned' or 'base', got 'reference'"),
        ({"tuned": []}, "tuned must be a fine-tuned model or several, got none"),
        ({"reference": random_logits(2)}, "reference must be one or as many as tuned, 1, got 2"),
        ({"tuned": torch.zeros(2, 5, 8)}, "tuned must have the shape of base, (2, 5, 9), got (2, 5, 8)"),
    ],
)
def test_bad_settings(how, message):
    base, tuned, reference = random_logits()
    given = {"base": base, "tuned": tuned, "reference": reference} | how
    with pytest.raises(ValueError, match=re.escape(message)):
        inspect.unwrap(emulated_logits)(**given)


# Inside `generate`


@FAMILIES
def test_greedy_is_the_loop_without_caches(family, padded):
    models = [build(seed, family) for seed in range(3)]
    ours = generate(models[0], padded, EmulatedFineTuningLogitsProcessor(*models[1:], attention_mask=padded["attention_mask"]))
    assert torch.equal(ours[:, 6:], by_hand(models, padded["input_ids"]))
    assert not torch.equal(ours, generate(models[0], padded)), "the pair makes a difference"


def test_two_tunings_of_one_reference(prompts):
    base, reference, first, second = (build(seed) for seed in range(4))
    processor = EmulatedFineTuningLogitsProcessor([first, second], reference, [0.5, 0.8])
    asked = []
    reference.register_forward_pre_hook(lambda *_: asked.append(1))
    ours = generate(base, prompts, processor)
    assert len(asked) == NEW, "one pass a token serves both"
    assert torch.equal(ours[:, 6:], by_hand([base, first, reference, second, reference], prompts, (0.5, 0.8)))


@FAMILIES
def test_beam_search_is_the_search_without_caches(family, prompts):
    models = [build(seed, family) for seed in range(3)]
    ours = generate(models[0], prompts, EmulatedFineTuningLogitsProcessor(*models[1:]), num_beams=4)
    assert torch.equal(ours, torch.stack([beams_by_hand(models, prompt, 4) for prompt in prompts]))


def test_beams_are_reordered_and_not_read_again(padded):
    models, lengths = [build(seed) for seed in range(3)], []
    models[1].model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    mask = padded["attention_mask"]
    cached, anew = (
        generate(
            models[0], padded, EmulatedFineTuningLogitsProcessor(*models[1:], attention_mask=mask, use_cache=use), num_beams=4
        )
        for use in (True, False)
    )
    assert torch.equal(cached, anew)
    assert lengths[:NEW] == [6] + [1] * (NEW - 1)


def test_sampling_draws_from_the_emulated_distribution(prompts):
    models = [build(seed) for seed in range(3)]
    how = {"do_sample": True, "top_k": 0, "output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    torch.manual_seed(0)
    drawn = generate(models[0], prompts, EmulatedFineTuningLogitsProcessor(*models[1:]), num_return_sequences=2, **how)
    for row, sequence in enumerate(drawn.sequences):
        expected = one_pass(models, (1.0,), sequence)[5:-1]
        ours = torch.stack([scores[row] for scores in drawn.scores])
        torch.testing.assert_close(ours, expected.float(), atol=1e-4, rtol=1e-4)


def test_processors_before_it_are_respected(prompts):
    models = [build(seed) for seed in range(3)]
    first = generate(models[0], prompts, EmulatedFineTuningLogitsProcessor(*models[1:]))[:, 6]

    class Forbid(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.scatter(1, first[:, None], -torch.inf)

    ours = generate(models[0], prompts, Forbid(), EmulatedFineTuningLogitsProcessor(*models[1:]))
    assert not (ours[:, 6] == first).any()


def test_bfloat16(prompts):
    models = [build(seed).to(torch.bfloat16) for seed in range(3)]
    assert generate(models[0], prompts, EmulatedFineTuningLogitsProcessor(*models[1:])).shape == (3, 6 + NEW)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda(padded):
    models = [build(seed).cuda() for seed in range(3)]
    inputs = {name: value.cuda() for name, value in padded.items()}
    ours = generate(models[0], inputs, EmulatedFineTuningLogitsProcessor(*models[1:], attention_mask=padded["attention_mask"]))
    assert torch.equal(ours[:, 6:], by_hand(models, inputs["input_ids"]).to(ours.device))
    small = EmulatedFineTuningLogitsProcessor(models[1].cpu(), models[2].cpu(), attention_mask=padded["attention_mask"])
    assert torch.equal(generate(models[0], inputs, small), ours), "the small ones may be elsewhere"


def test_an_adapter_that_is_turned_off_is_the_reference(prompts):
    base, reference = build(0), build(1)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    tuned = get_peft_model(copy.deepcopy(reference), config).eval()
    ours = generate(base, prompts, EmulatedFineTuningLogitsProcessor(tuned))
    assert torch.equal(ours[:, 6:], by_hand([base, tuned, reference], prompts))
    assert torch.equal(ours, generate(base, prompts, EmulatedFineTuningLogitsProcessor(tuned, reference)))
    assert not torch.equal(ours, generate(base, prompts))
    with pytest.raises(ValueError, match="reference must be given: LlamaForCausalLM is no PeftModel"):
        EmulatedFineTuningLogitsProcessor(reference)


def test_a_prompt_of_its_own(prompts, padded):
    """The tuned model reads a template of its own; what is generated follows in both."""
    base, tuned, reference = (build(seed) for seed in range(3))
    own = {"input_ids": torch.cat([padded["input_ids"], prompts[:, :2]], 1)}
    own["attention_mask"] = (own["input_ids"] != 0).long()
    processor = EmulatedFineTuningLogitsProcessor(tuned, reference, prompts={tuned: own})
    ours = generate(base, prompts, processor)
    for row, template, mine in zip(prompts, own["input_ids"], ours, strict=True):
        template, answer = template[template != 0], mine[:0]
        for _ in range(NEW):
            read = [torch.cat([start, answer]) for start in (row, template, row)]
            total = [
                model(ids[None]).logits[0, -1].log_softmax(-1) for model, ids in zip((base, tuned, reference), read, strict=True)
            ]
            answer = torch.cat([answer, (total[0] + total[1] - total[2]).argmax()[None]])
        assert torch.equal(mine[6:], answer)
    assert torch.equal(generate(base, prompts, processor), ours), "the same prompts once more"
    with pytest.raises(ValueError, match=re.escape("prompts must be those of this call")):
        generate(base, prompts.flip(1), processor)
    processor.reset()
    generate(base, prompts.flip(1), processor)
    with pytest.raises(ValueError, match="prompts must have a row for each prompt of 2 sequences, got 3"):
        processor.reset() or processor(prompts[:2], torch.zeros(2, VOCAB))
    with pytest.raises(ValueError, match="prompts must be for the tuned and reference models, got one for another Llama"):
        EmulatedFineTuningLogitsProcessor(tuned, reference, prompts={base: own})


def test_models_that_do_not_fit(prompts, padded):
    base, tuned, reference = (build(seed) for seed in range(3))
    message = f"all models must have one vocabulary: the base has {VOCAB} tokens, LlamaForCausalLM has 41"
    with pytest.raises(ValueError, match=message):
        EmulatedFineTuningLogitsProcessor(build(1, vocab_size=41), reference)(prompts, torch.zeros(3, VOCAB))
    with pytest.raises(ValueError, match="models must be in evaluation mode, got a LlamaForCausalLM in training mode"):
        EmulatedFineTuningLogitsProcessor(copy.deepcopy(tuned).train(), reference)
    with pytest.raises(ValueError, match="got none"):
        EmulatedFineTuningLogitsProcessor([], reference)
    with pytest.raises(ValueError, match="reference must be one or as many as tuned, 3, got 2"):
        EmulatedFineTuningLogitsProcessor([tuned, tuned, base], [reference, reference])
    processor = EmulatedFineTuningLogitsProcessor(tuned, reference)
    with pytest.raises(ValueError, match="attention_mask must be given: some prompts begin with the padding token 0"):
        processor(padded["input_ids"], torch.zeros(3, VOCAB))
    for mask in (torch.ones(2, 6, dtype=torch.int64), torch.ones(3, 7, dtype=torch.int64)):
        mask[0, 0] = 0
        processor = EmulatedFineTuningLogitsProcessor(tuned, reference, attention_mask=mask)
        with pytest.raises(ValueError, match="attention_mask must be that of the prompts of 3 sequences of 6 tokens"):
            processor(prompts, torch.zeros(3, VOCAB))
    tuned.train()
    with pytest.raises(ValueError, match="in training mode"):
        generate(
            base, prompts, EmulatedFineTuningLogitsProcessor(reference, reference), EmulatedFineTuningLogitsProcessor(tuned, base)
        )


# The caches


@FAMILIES
def test_a_reader_knows_what_it_read(family, prompts):
    """Whatever is read after whatever, the logits are those of reading it alone."""
    reader, long = CachedReader(build(0, family)), torch.cat([prompts, prompts.flip(1)], 1)
    turns = [
        (prompts, 1), (long, 3), (long[:, :7], 2), (long[[2, 0, 0, 1]], 1), (long[:2, :9], 9), (prompts.flip(0), 1),
        (torch.cat([prompts[:, :3], long], 1), 2), (prompts, 1), (prompts, 1), (prompts.flip(1), 1),
    ]  # fmt: skip
    for ids, places in turns:
        alone = reader.model(ids, use_cache=False).logits[:, -places:]
        torch.testing.assert_close(reader(ids, None, places), alone, atol=1e-4, rtol=1e-4)


def test_only_what_is_new_is_read(prompts):
    reader, lengths = CachedReader(build(0)), []
    reader.model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    other = prompts.clone()
    other[1, 3] += 1
    for ids in (prompts[:, :4], prompts[:, :5], prompts, prompts[[1, 0, 0]], other[[1, 0, 0]], prompts[[1, 0, 1], :3]):
        reader(ids)
    assert lengths == [4, 1, 1, 1, 3, 1]
    reader.reset()
    reader(prompts)
    assert lengths[-1] == 6


def test_padding_is_not_taken_for_tokens(padded):
    model = build(0)
    reader, ids, mask = CachedReader(model), padded["input_ids"], padded["attention_mask"]
    reader(ids)
    expected = model(ids[:1, 3:]).logits[:, -1:]
    torch.testing.assert_close(reader(ids, mask)[:1], expected, atol=1e-4, rtol=1e-4)


def test_a_pass_that_fails_leaves_nothing_half_read(prompts):
    reader = CachedReader(build(0))
    expected = reader(prompts)
    handle = reader.model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reader(torch.cat([prompts, prompts], 1))
    handle.remove()
    torch.testing.assert_close(reader(prompts), expected)


def test_tokens_that_the_host_overwrites(prompts):
    model = build(0)
    reader, ids = CachedReader(model), prompts.clone()
    reader(ids[:, :5])
    ids[:, 2] = 3
    torch.testing.assert_close(reader(ids), model(ids).logits[:, -1:], atol=1e-4, rtol=1e-4)


def test_one_processor_serves_prompt_after_prompt(prompts):
    models = [build(seed) for seed in range(3)]
    processor = EmulatedFineTuningLogitsProcessor(*models[1:])
    others = prompts.flip(1)
    for each in (prompts, others, prompts, prompts[:2], torch.cat([prompts, others], 1)):
        fresh = generate(models[0], each, EmulatedFineTuningLogitsProcessor(*models[1:]))
        assert torch.equal(generate(models[0], each, processor), fresh)


# Given text


def test_nll_is_the_mean_of_the_formula(prompts, padded):
    models = [build(seed) for seed in range(3)]
    expected = torch.stack([one_pass(models, (0.5,), row)[:-1].gather(1, row[1:, None]) for row in prompts])
    nll = emulated_nll(*models, prompts, prompts, 0.5)
    torch.testing.assert_close(nll, -expected.mean().float())
    labels = prompts.clone()
    labels[:, :4] = -100
    torch.testing.assert_close(emulated_nll(*models, prompts, labels, 0.5), -expected[:, 3:].mean().float())
    ids, mask = padded["input_ids"][:1], padded["attention_mask"][:1]
    short = one_pass(models, (1.0,), ids[0, 3:])[:-1].gather(1, ids[0, 4:, None])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 3] = -100  # its first token has nothing before it
    torch.testing.assert_close(emulated_nll(*models, ids, labels, attention_mask=mask), -short.mean().float())
    with pytest.raises(ValueError, match="labels must have a token to predict"):
        emulated_nll(*models, prompts, torch.full_like(prompts, -100))


# A real model


def test_smollm2_as_the_tuned_model():
    """On a base that is the reference, here its own first layers, nothing but the tuned model is left."""
    try:
        folder = data.load("smollm2")
    except data.DataMissing as missing:
        pytest.skip(str(missing))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tuned = AutoModelForCausalLM.from_pretrained(folder).eval()
    base = copy.copy(tuned.config)
    base.num_hidden_layers = 2
    base = AutoModelForCausalLM.from_pretrained(folder, config=base).eval()
    inputs = dict(tokenizer("The capital of France is", return_tensors="pt"))
    ours = generate(base, inputs, EmulatedFineTuningLogitsProcessor(tuned, base), max_new_tokens=4)
    assert "Paris" in tokenizer.decode(ours[0])
    assert torch.equal(ours, generate(tuned, inputs, max_new_tokens=4))
