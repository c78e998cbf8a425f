from types import SimpleNamespace

import pytest
import torch
from scipy import stats as statistics
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from firsthand.decode.eft import EmulatedFineTuningLogitsProcessor, emulated_logits
from firsthand.decode.speculative import accept, emulated_speculative_generate

VOCAB = 5


class Bigrams(nn.Module):
    """A model that looks at the last token only. Its cache is a note that it was here."""

    def __init__(self, seed, spread=1.0):
        super().__init__()
        table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread
        self.table = nn.Parameter(table)
        self.eval()

    def forward(self, input_ids, past_key_values=None, use_cache=True, logits_to_keep=0):
        cache = SimpleNamespace(is_croppable=True, crop=lambda count: None)
        return SimpleNamespace(logits=self.table[input_ids[:, -logits_to_keep:]], past_key_values=cache)


def llamas(vocab=VOCAB, context=2048):
    models = []
    for seed, hidden in enumerate((24, 16, 16)):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            intermediate_size=24, max_position_embeddings=context, initializer_range=0.4, pad_token_id=None, eos_token_id=None,
        )  # fmt: skip
        models.append(LlamaForCausalLM(config).eval())
    return models


def test_tokens_are_distributed_as_the_formula_says():
    """10 000 draws: after each token, how often each other follows."""
    base, tuned, reference = Bigrams(0), Bigrams(1), Bigrams(2)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(10):  # shorter texts are quicker to compare
        tokens, stats = emulated_speculative_generate(
            base, tuned, reference, torch.tensor([[0]]), 1000, block=3, weights=0.8, generator=generator
        )
        assert tokens.shape == (1, 1001)
        assert stats.tokens == 1000
        rows.append(tokens[0])
    expected = emulated_logits(base.table, tuned.table, reference.table, 0.8).exp().detach()
    counts = torch.zeros(VOCAB, VOCAB)
    for row in rows:
        counts.index_put_((row[:-1], row[1:]), torch.ones(len(row) - 1), accumulate=True)
    p_values = [
        statistics.chisquare(seen.double().numpy(), (p.double() / p.double().sum() * seen.sum()).numpy()).pvalue
        for seen, p in zip(counts, expected, strict=True)
    ]
    assert min(p_values) > 0.001 / VOCAB
    plain = tuned.table.softmax(-1).detach()
    wrong = [
        statistics.chisquare(seen.double().numpy(), (p.double() / p.double().sum() * seen.sum()).numpy()).pvalue
        for seen, p in zip(counts, plain, strict=True)
    ]
    assert max(wrong) < 1e-6, "the test could tell the tuned model apart"


def test_each_place_of_a_block_is_exact():
    """Drafts from one distribution come out as another, with any number of them: the first token's frequencies."""
    generator = torch.Generator().manual_seed(0)
    draft, target = torch.rand(2, 1, VOCAB, generator=generator).pow(3)
    draft, target = draft / draft.sum(), target / target.sum()
    counts, kept = torch.zeros(VOCAB), 0
    for token in torch.multinomial(draft[0], 5000, replacement=True, generator=generator):
        count, other = accept(token[None], draft, target, generator=generator)
        counts[token if other is None else other] += 1
        kept += count
    expected = (target[0].double() / target[0].double().sum() * 5000).numpy()
    assert statistics.chisquare(counts.double().numpy(), expected).pvalue > 0.001
    share = torch.minimum(draft, target).sum().item()  # the overlap of the two
    assert kept / 5000 == pytest.approx(share, abs=4 * (share * (1 - share) / 5000) ** 0.5)


def test_equal_distributions_keep_every_draft():
    p = torch.tensor([[0.2, 0.5, 0.3, 0.0]]).repeat(100, 1)
    drafts = torch.multinomial(p[0], 100, replacement=True, generator=torch.Generator().manual_seed(0))
    assert accept(drafts, p, p) == (100, None)


def test_a_draft_that_cannot_be_is_replaced():
    draft, target = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    kept, other = accept(torch.tensor([0]), draft, target)
    assert (kept, other.item()) == (0, 2)


def test_with_caches_sampling_is_exact():
    """Along one long text, what was drawn is as probable as the formula without caches expects: the difference is normal."""
    models = llamas()
    generator = torch.Generator().manual_seed(0)
    tokens, stats = emulated_speculative_generate(*models, torch.tensor([[1, 2]]), 600, block=4, generator=generator)
    with torch.no_grad():
        log_p = emulated_logits(*(model(tokens).logits for model in models))[0, 1:-1].double()
    p, drawn = log_p.exp(), log_p.gather(1, tokens[0, 2:, None])[:, 0]
    mean = (p * log_p).sum(-1)
    variance = (p * log_p**2).sum(-1) - mean**2
    assert abs((drawn - mean).sum() / variance.sum().sqrt()) < 3.3
    assert 0 < stats.accepted < stats.drafted, "there was something to accept and something to refuse"


@pytest.mark.parametrize("block", [1, 4, 50])
def test_greedy_is_what_the_processor_generates(block):
    models = llamas(40)
    prompt = torch.tensor([[3, 4, 5]])
    processor = EmulatedFineTuningLogitsProcessor(*models[1:], weights=0.3)
    how = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 30, "do_sample": False}
    expected = models[0].generate(prompt, logits_processor=[processor], **how)
    tokens, stats = emulated_speculative_generate(*models, prompt, 30, block, False, weights=0.3)
    assert torch.equal(tokens, expected)
    assert stats.blocks + stats.accepted == 30
    assert stats.accepted_per_block == stats.accepted / stats.blocks


def test_a_tuned_model_on_its_own_base_drafts_perfectly():
    tuned, reference = llamas(40)[1:]
    tokens, stats = emulated_speculative_generate(reference, tuned, reference, torch.tensor([[3, 4]]), 24, 5, False)
    expected = tuned.generate(torch.tensor([[3, 4]]), attention_mask=torch.ones(1, 2), max_new_tokens=24, do_sample=False)
    assert torch.equal(tokens, expected)
    assert (stats.blocks, stats.accepted, stats.accepted_per_block) == (4, 20, 5.0)


def test_the_large_model_is_asked_once_a_block():
    models, asked = llamas(40), []
    models[0].model.layers[0].register_forward_pre_hook(lambda _, args: asked.append(args[0].shape[1]))
    _, stats = emulated_speculative_generate(*models, torch.tensor([[3, 4, 5]]), 20, 4, False, weights=0.3)
    assert len(asked) == stats.blocks
    assert asked[0] == 3 + 4
    assert max(asked[1:]) <= 4 + 1, "the block and the token before it"


@pytest.mark.parametrize("do_sample", [False, True])
def test_ends_at_an_end_token(do_sample):
    models = llamas(40)

    def go(block, **how):
        generator = torch.Generator().manual_seed(0)
        start = torch.tensor([[3, 4, 5]])
        return emulated_speculative_generate(*models, start, 30, block, do_sample, generator, weights=0.3, **how)[0][0]

    for block in (1, 5):
        whole = go(block)[3:]
        end = whole[7].item()
        first = whole.tolist().index(end)
        for how in ({"eos_token_id": end}, {"eos_token_id": [39, end]}):
            short = go(block, **how)[3:].tolist()
            assert end in short
            assert short.index(end) == len(short) - 1 if not do_sample else end not in short[:-1]
            if not do_sample:
                assert short == whole[: first + 1].tolist()
        models[0].generation_config.eos_token_id = end
        assert go(block)[-1].item() == end
        models[0].generation_config.eos_token_id = None


def test_bad_input():
    models, prompt = [Bigrams(seed) for seed in range(3)], torch.tensor([[1]])
    for how in ((0, 5), (3, 0)):
        with pytest.raises(ValueError, match="max_new_tokens and block must be at least 1, got"):
            emulated_speculative_generate(*models, prompt, *how)
    with pytest.raises(ValueError, match="input_ids must be one prompt of at least one token"):
        emulated_speculative_generate(*models, prompt[:, :0], 3)
    with pytest.raises(ValueError, match="reference must be given: Bigrams is no PeftModel"):
        emulated_speculative_generate(*models[:2], None, prompt, 3)
    with pytest.raises(ValueError, match="in training mode"):
        emulated_speculative_generate(models[0], Bigrams(1).train(), models[2], prompt, 3)
    other = Bigrams(2)
    other.table = nn.Parameter(torch.zeros(VOCAB, VOCAB + 1))
    with pytest.raises(ValueError, match=r"all models must have one vocabulary: .* have \[5, 5, 6\] tokens"):
        emulated_speculative_generate(*models[:2], other, prompt, 3)
