"""Captions of rows of handwritten digits by a tiny Llava: a vision-language model small enough to be trained in seconds.

In training the digits mostly count up, so that a model may guess the next one from its own words instead of looking; in the test
they do not, and each guess shows as a digit that is not there. Train with `lm.train` on `batches`, with `caption_loss`.

Needs transformers (`pip install 'firsthand[hf]'`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from firsthand.testbeds.digits import CLASSES, Labelled
from firsthand.testbeds.lm import batches as rows_of

if TYPE_CHECKING:
    from transformers import BatchEncoding, LlavaForConditionalGeneration, PreTrainedTokenizerFast

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = ("first", "second", "third", "fourth", "fifth", "sixth")
PAD, END, IMAGE, START = range(4)
SPECIAL = ("<pad>", "<end>", "<image>", "<start>")
PATCH = (8, 4)  # pixels, height and width: two tokens a digit

_OPENING = "the picture shows a row of digits :"
_PHRASES = (
    "the {place} digit is a {word} ,",
    "in {place} place there is a {word} ,",
    "for the {place} we see a {word} ,",
)


class Collages(NamedTuple):
    """Rows of digits, side by side."""

    images: Float[Tensor, "n 8 width"]  # in [0, 1]; width = 8·digits
    digits: Int[Tensor, "n digits"]  # what they show, from left to right


def collages(source: Labelled, rng: np.random.Generator, n: int, digits: int, follow: float = 0.1) -> Collages:
    """Pictures of several digits in a row.

    Args:
        source: scans to choose from, of all ten classes.
        rng: draws the digits, then the scan of each.
        n: number of pictures.
        digits: in each of them.
        follow: probability that a digit is the one before plus one (0 after 9), in `[0, 1]`; else it is one of the other nine.
            At 0.1 the digits are independent.

    Raises:
        ValueError: `follow` is out of range, or a class has no scan.
    """
    if not 0 <= follow <= 1:
        raise ValueError(f"follow must be in [0, 1], got {follow}")
    scans = [np.flatnonzero(source.labels.numpy() == label) for label in range(CLASSES)]
    if not all(len(each) for each in scans):
        raise ValueError("source must have scans of all ten classes")
    steps = np.where(rng.random((n, digits)) < follow, 1, (rng.integers(2, CLASSES + 1, size=(n, digits))))
    steps[:, 0] = rng.integers(CLASSES, size=n)
    shown = steps.cumsum(axis=1) % CLASSES
    chosen = np.array([scans[digit][rng.integers(len(scans[digit]))] for digit in shown.flat]).reshape(shown.shape)
    images = source.images[torch.from_numpy(chosen)]  # (n, digits, 8, 8)
    return Collages(images.transpose(1, 2).flatten(2), torch.from_numpy(shown))


def describe_short(digits: Int[Tensor, "n digits"]) -> list[str]:
    """`"a seven beside a three"`, as many digits as there are."""
    return [" beside ".join(f"a {WORDS[digit]}" for digit in row) for row in digits.tolist()]


def describe_long(digits: Int[Tensor, "n digits"], rng: np.random.Generator) -> list[str]:
    """A phrase for each digit that names its place: 50 to 56 words for six. `rng` chooses among three ways to say it.

    Raises:
        ValueError: more than six digits.
    """
    if digits.shape[1] > len(PLACES):
        raise ValueError(f"digits must be at most {len(PLACES)} in a row, got {digits.shape[1]}")
    return [
        " ".join(
            [_OPENING]
            + [
                _PHRASES[rng.integers(len(_PHRASES))].format(place=place, word=WORDS[digit])
                for place, digit in zip(PLACES, row, strict=False)
            ]
        )
        for row in digits.tolist()
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of the captions, after `SPECIAL`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = " ".join([_OPENING, *_PHRASES, "beside"]).replace("{place}", "").replace("{word}", "")
    words = dict.fromkeys([*SPECIAL, *WORDS, *PLACES, *text.split()])
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=SPECIAL[PAD],
        eos_token=SPECIAL[END],
        bos_token=SPECIAL[START],
        extra_special_tokens={"image_token": SPECIAL[IMAGE]},
    )


def prompt(images: Float[Tensor, "n 8 width"]) -> BatchEncoding:
    """What a caption follows: a token for each patch of the picture, then `START`. Good for `generate(**prompt(...))`."""
    from transformers import BatchEncoding

    patches = images.shape[2] // PATCH[1] * (8 // PATCH[0])
    ids = torch.tensor([[IMAGE] * patches + [START]]).expand(len(images), -1)
    return BatchEncoding(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images[:, None]}  # one channel
    )


def encode(tokenizer: PreTrainedTokenizerFast, images: Float[Tensor, "n 8 width"], captions: Sequence[str]) -> BatchEncoding:
    """Prompt and caption, ended by `END` and padded on the right; `labels` are -100 but for the caption and its end.

    Raises:
        ValueError: not one caption for each picture.
    """
    if len(captions) != len(images):
        raise ValueError(f"captions must be {len(images)}, one for each picture, got {len(captions)}")
    batch = prompt(images)
    text = tokenizer([f"{each} {SPECIAL[END]}" for each in captions], padding=True, padding_side="right", return_tensors="pt")
    ids, kept = text["input_ids"], text["attention_mask"]
    batch["labels"] = torch.cat([torch.full_like(batch["input_ids"], -100), ids.masked_fill(kept == 0, -100)], dim=1)
    batch["input_ids"] = torch.cat([batch["input_ids"], ids], dim=1)
    batch["attention_mask"] = torch.cat([batch["attention_mask"], kept], dim=1)
    return batch


def batches(encoded: BatchEncoding, batch: int, generator: torch.Generator) -> Iterator[Any]:
    """Batches of what `encode` returned, without end, each epoch in another order."""
    from transformers import BatchEncoding

    for rows in rows_of(torch.arange(len(encoded["input_ids"]))[:, None], batch, generator):
        yield BatchEncoding({name: value[rows[:, 0]] for name, value in encoded.items()})


def caption_loss(model: Any, batch: Any) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, of the words of the captions and their ends."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


def llava(
    generator: torch.Generator,
    digits: int,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    intermediate: int = 128,
    vision_hidden: int = 64,
    vision_layers: int = 1,
    **config: Any,
) -> LlavaForConditionalGeneration:
    """A Llava with its initial weights drawn from `generator`: a ViT sees the picture, a Llama talks.

    Args:
        generator: draws the initial weights.
        digits: in a picture.
        hidden: width of the Llama.
        layers: of the Llama.
        heads: of its attention.
        intermediate: width of its feed-forward blocks.
        vision_hidden: width of the ViT, a multiple of 4.
        vision_layers: of the ViT.
        config: for `LlamaConfig`, as it is.
    """
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, ViTConfig

    vision = ViTConfig(
        image_size=(8, 8 * digits),
        patch_size=PATCH,
        num_channels=1,
        hidden_size=vision_hidden,
        intermediate_size=2 * vision_hidden,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        pooler_output_size=1,  # Llava does not use it
        initializer_range=_deviation(vision_hidden),
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=256,
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
        initializer_range=_deviation(hidden),
        **config,
    )
    sizes = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=digits * 8 // PATCH[1] * (8 // PATCH[0]),
        vision_feature_layer=-1,
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
    )
    seed = torch.randint(2**62, (), generator=generator).item()
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights from the global generator
        torch.manual_seed(int(seed))
        return LlavaForConditionalGeneration(sizes)


def _deviation(width: int) -> float:
    """What 0.02 is to a model 1024 wide: with 0.02 itself a tiny one would begin almost silent."""
    return 0.02 * (1024 / width) ** 0.5


@torch.no_grad()
def describe(model: Any, tokenizer: PreTrainedTokenizerFast, images: Float[Tensor, "n 8 width"], **settings: Any) -> list[str]:
    """The model's captions, by greedy search unless the settings of `generate` say otherwise."""
    model.eval()
    batch = prompt(images).to(model.device)
    ids = model.generate(**batch, **({"do_sample": False, "max_new_tokens": 64} | settings))
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def hallucination(captions: Sequence[str], digits: Int[Tensor, "n digits"]) -> dict[str, float]:
    """How much of what captions say is not there.

    A digit word speaks of the place that was named last before it; where none was since the last digit word, of the next place
    to the right. It is wrong if another digit is there, or none, or if the place was spoken of before.

    Args:
        captions: text, one for each picture.
        digits: what the pictures show.

    Returns:
        `chair_i`, wrong digit words as a share of all digit words (0 if there are none); `chair_s`, captions with at least one
        wrong digit word as a share of all captions; `recall`, right digit words as a share of all digits.

    Raises:
        ValueError: not one caption for each picture, or no picture.

    Source:
        The names are CHAIR's (Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv 1809.02156), which
        asks only whether an object is anywhere in the picture.
    """
    if len(captions) != len(digits) or not len(digits):
        raise ValueError(f"captions must be one for each of at least 1 picture, got {len(captions)} for {len(digits)}")
    said, wrong, liars = 0, 0, 0
    for caption, shown in zip(captions, digits.tolist(), strict=True):
        verdicts = _verdicts(caption, shown)
        said, wrong, liars = said + len(verdicts), wrong + verdicts.count(False), liars + (False in verdicts)
    return {"chair_i": wrong / max(said, 1), "chair_s": liars / len(digits), "recall": (said - wrong) / digits.numel()}


def _verdicts(caption: str, shown: list[int]) -> list[bool]:
    """Whether each digit word of a caption is right."""
    left, place, verdicts = dict(enumerate(shown)), 0, []
    for word in caption.split():
        if word in PLACES:
            place = PLACES.index(word)
        elif word in WORDS:
            verdicts.append(left.pop(place, None) == WORDS.index(word))
            place += 1
    return verdicts
