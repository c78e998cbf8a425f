import numpy as np
import pytest
import torch

from firsthand import Trial
from firsthand.testbeds import captions, digits, lm


@pytest.fixture
def trial():
    return Trial(seed=3)


@pytest.fixture
def source(trial):
    return digits.split(trial.rng).train


def test_collages_show_what_they_say(trial, source):
    world = captions.collages(source, trial.rng, 50, 3)
    assert world.images.shape == (50, 8, 24)
    known = {scan.numpy().tobytes(): label for scan, label in zip(source.images, source.labels.tolist(), strict=True)}
    for image, shown in zip(world.images, world.digits.tolist(), strict=True):
        parts = image.numpy().reshape(8, 3, 8).transpose(1, 0, 2)
        assert [known[np.ascontiguousarray(part).tobytes()] for part in parts] == shown


@pytest.mark.parametrize("follow", [0.1, 0.9])
def test_digits_count_up_as_often_as_asked(trial, source, follow):
    shown = captions.collages(source, trial.rng, 4000, 3, follow).digits
    steps = shown.diff(dim=1) % 10
    share = steps.flatten().bincount(minlength=10) / steps.numel()
    expected = torch.full((10,), (1 - follow) / 9)
    expected[1] = follow
    torch.testing.assert_close(share.double(), expected.double(), atol=0.02, rtol=0)
    assert shown.flatten().bincount(minlength=10).min() > 0.08 * shown.numel()


def test_captions_name_digits_in_order(trial, source):
    shown = captions.collages(source, trial.rng, 20, 6).digits
    assert captions.describe_short(torch.tensor([[7, 3]])) == ["a seven beside a three"]
    texts = captions.describe_long(shown, trial.rng)
    for texts_ in (texts, captions.describe_short(shown)):
        assert captions.hallucination(texts_, shown) == {"chair_i": 0.0, "chair_s": 0.0, "recall": 1.0}
    assert all(40 <= len(text.split()) <= 60 for text in texts)
    tokenizer = captions.tokenizer()
    assert tokenizer.unk_token_id is None, "all words are known"
    assert [tokenizer.decode(ids) for ids in tokenizer(texts)["input_ids"]] == texts


def test_encoding_has_labels_for_caption_and_end_only(source):
    tokenizer = captions.tokenizer()
    images = torch.zeros(2, 8, 16)
    batch = captions.encode(tokenizer, images, ["a seven beside a three", "a two"])
    assert batch["input_ids"][:, :5].tolist() == [[captions.IMAGE] * 4 + [captions.START]] * 2
    assert batch["labels"][:, :5].eq(-100).all()
    assert batch["pixel_values"].shape == (2, 1, 8, 16)
    for ids, labels, kept, length in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], (6, 3), strict=True):
        said = labels != -100
        assert said.sum() == length
        assert ids[said].equal(labels[said])
        assert labels[said][-1] == captions.END
        assert kept.sum() == 5 + length
        assert ids[kept == 0].eq(captions.PAD).all()


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a seven beside a three", (0, 0, 1)),
        ("a seven beside a two", (1 / 2, 1, 1 / 2)),
        ("a seven", (0, 0, 1 / 2)),
        ("a three", (1, 1, 0)),
        ("a seven beside a three beside a four", (1 / 3, 1, 1)),
        ("the second digit is a three", (0, 0, 1 / 2)),
        ("the second digit is a three , the second digit is a three", (1 / 2, 1, 1 / 2)),
        ("in sixth place there is a one", (1, 1, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_hallucination_by_hand(caption, expected):
    measured = captions.hallucination([caption], torch.tensor([[7, 3]]))
    assert tuple(measured.values()) == pytest.approx(expected)


def test_hallucination_of_several_captions():
    measured = captions.hallucination(["a seven beside a two", "a one beside a one"], torch.tensor([[7, 3], [1, 1]]))
    assert measured == {"chair_i": 0.25, "chair_s": 0.5, "recall": 0.75}


def test_a_model_learns_to_read(trial, source):
    """Three digits in four, after seconds, on scans it has not seen; the digits of one picture say nothing of each other."""
    world = captions.collages(source, trial.rng, 1000, 2)
    tokenizer = captions.tokenizer()
    encoded = captions.encode(tokenizer, world.images, captions.describe_short(world.digits))
    model = captions.llava(trial.generator, 2)
    lm.train(model, captions.batches(encoded, 32, trial.generator), steps=150, lr=3e-3, loss=captions.caption_loss)
    test = captions.collages(digits.split(Trial(seed=3).rng).test, trial.rng, 100, 2)
    said = captions.describe(model, tokenizer, test.images)
    assert captions.hallucination(said, test.digits)["recall"] > 0.75


def test_the_same_seed_gives_the_same_model():
    models = [captions.llava(Trial(seed=3).generator, 2) for _ in range(2)]
    for one, other in zip(*(model.state_dict().values() for model in models), strict=True):
        assert one.equal(other)


def test_saved_and_loaded(tmp_path, trial):
    model = captions.llava(trial.generator, 2).eval()
    model.save_pretrained(tmp_path)
    batch = captions.prompt(torch.rand(2, 8, 16, generator=trial.generator))
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


def test_bad_arguments(trial, source):
    with pytest.raises(ValueError, match=r"follow must be in \[0, 1\], got 1.5"):
        captions.collages(source, trial.rng, 2, 2, follow=1.5)
    with pytest.raises(ValueError, match="scans of all ten classes"):
        captions.collages(digits.Labelled(source.images[:3], source.labels[:3]), trial.rng, 2, 2)
    with pytest.raises(ValueError, match="at most 6 in a row, got 7"):
        captions.describe_long(torch.zeros(1, 7, dtype=torch.int64), trial.rng)
    with pytest.raises(ValueError, match="captions must be 2, one for each picture, got 1"):
        captions.encode(captions.tokenizer(), torch.zeros(2, 8, 16), ["a two"])
    with pytest.raises(ValueError, match="got 0 for 0"):
        captions.hallucination([], torch.zeros(0, 2, dtype=torch.int64))
