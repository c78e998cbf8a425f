import itertools
import math

import numpy as np
import pytest
import torch

from firsthand import Trial
from firsthand.testbeds import lm, text

VOCAB = 32


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(seed=0, **config):
    return lm.llama(generator(seed), VOCAB, hidden=16, layers=2, heads=2, intermediate=32, context=16, **config)


@pytest.fixture(scope="module")
def blocks():
    return torch.randint(3, 11, (64, 16), generator=generator())


@pytest.mark.parametrize("build", [lm.llama, lm.bert])
def test_initial_weights_follow_the_generator_and_nothing_else(build):
    sizes = {"hidden": 16, "layers": 1, "heads": 2, "intermediate": 32, "context": 16}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, other = build(generator(0), VOCAB, **sizes), build(generator(1), VOCAB, **sizes)
    assert torch.rand(1) == expected, "the global generator was moved"
    again = build(generator(0), VOCAB, **sizes)
    state = first.state_dict()
    assert all(torch.equal(state[name], value) for name, value in again.state_dict().items())
    assert not all(torch.equal(state[name], value) for name, value in other.state_dict().items())


def test_loss_is_that_of_transformers(blocks):
    model = tiny()
    torch.testing.assert_close(lm.next_token_loss(model, blocks), model(input_ids=blocks, labels=blocks).loss)


def test_masked_loss_is_that_of_transformers(blocks):
    model = lm.bert(generator(), VOCAB, hidden=16, layers=1, heads=2, intermediate=32, context=16)
    inputs, labels = lm.mask_tokens(blocks, generator(), VOCAB)
    expected = model(input_ids=inputs, labels=labels).loss
    torch.testing.assert_close(lm.masked_loss(generator(), VOCAB)(model, blocks), expected)


def test_masking_takes_the_share_and_splits_it_80_10_10():
    batch = torch.full((400, 100), 7)
    batch[:, 0] = text.END
    inputs, labels = lm.mask_tokens(batch, generator(), 1000, share=0.15)
    chosen = labels != -100
    assert not chosen[:, 0].any(), "a special token was chosen"
    assert torch.equal(labels[chosen], batch[chosen])
    assert torch.equal(inputs[~chosen], batch[~chosen])
    assert chosen[:, 1:].float().mean() == pytest.approx(0.15, abs=0.006)
    assert (inputs[chosen] == text.MASK).float().mean() == pytest.approx(0.8, abs=0.02)
    assert (inputs[chosen] == 7).float().mean() == pytest.approx(0.1, abs=0.02)
    assert inputs[chosen & (inputs != text.MASK)].min() >= len(text.SPECIAL)


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_masked_share_out_of_range(blocks, share):
    with pytest.raises(ValueError, match="share must be in"):
        lm.mask_tokens(blocks, generator(), VOCAB, share=share)


def test_batches_go_through_all_blocks_before_any_comes_again(blocks):
    stream = lm.batches(torch.arange(10)[:, None], 4, generator())
    seen = torch.cat([next(stream).flatten() for _ in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


@pytest.mark.parametrize("size", [0, -1])
def test_batch_size_out_of_range(blocks, size):
    with pytest.raises(ValueError, match="batch must be at least 1"):
        next(lm.batches(blocks, size, generator()))


def test_learning_rate_rises_then_falls_to_the_floor():
    rates = [lm.learning_rate(step, 100, peak=2.0, warmup=0.05, floor=0.1) for step in range(100)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert max(rates) == 2.0
    assert rates[99] == pytest.approx(0.2)
    assert rates[52] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * 48 / 95)))
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))


def test_training_learns_repeats_itself_and_records(blocks):
    """Uniform noise over 8 of 32 tokens: the best loss is log 8, which is learnt quickly, and none is below."""
    trial = Trial(seed=0)
    runs = []
    for _ in range(2):
        model = tiny()
        stream = lm.batches(blocks, 8, generator())
        runs.append(lm.train(model, stream, steps=60, lr=1e-2, trial=trial, curve="loss"))
    assert runs[0] == runs[1]
    run = runs[0]
    assert not run.diverged
    assert run.losses[0] == pytest.approx(math.log(VOCAB), abs=0.3)
    assert np.mean(run.losses[-5:]) == pytest.approx(math.log(8), abs=0.25)
    assert len(run.losses) == len(run.gradient_norms) == 60
    assert trial.curves["loss"][:60] == [(float(step), loss) for step, loss in enumerate(run.losses)]


def test_training_is_one_step_of_adamw(blocks):
    """By hand: the same step with the optimiser of torch, decay on matrices only, gradients clipped."""
    trained, by_hand = tiny(), tiny()
    run = lm.train(trained, lm.batches(blocks, 8, generator()), steps=1, lr=1e-2, clip=0.01, floor=1.0)
    lm.next_token_loss(by_hand, next(lm.batches(blocks, 8, generator()))).backward()
    norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.01)
    assert run.gradient_norms == [pytest.approx(norm.item())]
    groups = [
        {"params": [p for p in by_hand.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in by_hand.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95)).step()
    for ours, theirs in zip(trained.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_frozen_parameters_stay(blocks):
    model = tiny()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = model.model.embed_tokens.weight.clone()
    lm.train(model, lm.batches(blocks, 8, generator()), steps=2, lr=1e-2)
    assert torch.equal(model.model.embed_tokens.weight, before)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_run_that_diverges_stops_and_says_so(blocks, clip):
    """The third batch has a loss of infinity; the parameters of the last good step stay."""
    calls = 0
    kept = {}

    def explode(model, batch):
        nonlocal calls, kept
        calls += 1
        if calls == 3:
            kept = {name: value.clone() for name, value in model.state_dict().items()}
        return lm.next_token_loss(model, batch) * (float("inf") if calls == 3 else 1.0)

    model = tiny()
    run = lm.train(model, lm.batches(blocks, 8, generator()), steps=10, lr=1e-2, loss=explode, clip=clip)
    assert run.diverged
    assert calls == 3
    assert len(run.losses) == len(run.gradient_norms) == 2, "only finite numbers are kept"
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


def test_a_gradient_that_is_not_finite_is_divergence_too(blocks):
    def explode(model, batch):
        loss = lm.next_token_loss(model, batch)
        return loss + (loss - loss.detach()).clamp(min=0).sqrt()  # 0 with an infinite slope

    run = lm.train(tiny(), lm.batches(blocks, 8, generator()), steps=5, lr=1e-2, loss=explode)
    assert run.diverged
    assert run.losses == []


@pytest.mark.parametrize(
    ("argument", "value"),
    [("steps", 0), ("lr", -1.0), ("lr", float("nan")), ("clip", 0.0), ("warmup", 1.5), ("floor", -0.1), ("weight_decay", -1.0)],
)
def test_bad_settings_name_themselves(blocks, argument, value):
    settings = {"steps": 1, "lr": 1e-3, argument: value}
    with pytest.raises(ValueError, match=f"{argument} must be"):
        lm.train(tiny(), lm.batches(blocks, 8, generator()), **settings)


def test_too_few_batches(blocks):
    with pytest.raises(ValueError, match="batches ended after 2 of 3 steps"):
        lm.train(tiny(), [blocks[:4], blocks[4:8]], steps=3, lr=1e-3)


def test_bits_per_byte_of_a_uniform_model(blocks):
    """All logits equal: each token costs log2(vocab) bits, whatever it is."""
    model = tiny()
    torch.nn.init.zeros_(model.lm_head.weight)
    lengths = torch.zeros(VOCAB, dtype=torch.int64)
    lengths[3:] = torch.arange(1, VOCAB - 2)
    expected = math.log2(VOCAB) * blocks[:, 1:].numel() / lengths[blocks[:, 1:]].sum().item()
    for batch in (5, 64):
        assert lm.bits_per_byte(model, blocks, lengths, batch=batch) == pytest.approx(expected, rel=1e-5)
    assert model.training, "evaluation leaves the mode as it was"


def test_bits_per_byte_of_a_broken_model_is_infinite(blocks):
    model = tiny()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    assert lm.bits_per_byte(model, blocks, torch.ones(VOCAB, dtype=torch.int64)) == math.inf


def test_bits_per_byte_without_bytes(blocks):
    with pytest.raises(ValueError, match="no bytes"):
        lm.bits_per_byte(tiny(), blocks, torch.zeros(VOCAB, dtype=torch.int64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda")
def test_training_follows_the_model_to_cuda(blocks):
    model = tiny().cuda()
    assert not lm.train(model, lm.batches(blocks, 8, generator()), steps=2, lr=1e-3).diverged
    assert math.isfinite(lm.bits_per_byte(model, blocks, torch.ones(VOCAB, dtype=torch.int64)))
