"""ARTE's one-shot scoring: forty questions after one example, whose key-value cache is computed once and repeated.

The peer is what one would write: `generate` on the forty prompts, padded on the left. The limit is `generate` on the questions
without the example, which is the work that no sharing saves. The model is a Llama with random weights; its answers are short, as
those of a student that is asked for an answer only.
"""

from collections.abc import Callable
from statistics import median

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.benchmark import Timer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from firsthand.distill.generation import HFGenerator

QUESTIONS, ANSWER, ROUNDS = 40, 4, 3
WORDS = 256


def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({"<pad>": 0} | {str(word): word for word in range(1, WORDS)}, unk_token="1"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4}
    # Weights large enough that the model says different things to different questions.
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=WORDS, pad_token_id=0, eos_token_id=None, initializer_range=0.1, **sizes)
    ).eval()


def words(rows: int, length: int, generator: torch.Generator) -> list[str]:
    drawn = torch.randint(1, WORDS, (rows, length), generator=generator).tolist()
    return [" ".join(map(str, row)) for row in drawn]


def race(racers: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, measured in turn."""
    timers = {name: Timer("run()", globals={"run": run}) for name, run in racers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in racers}
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(1).median)
    return {name: median(times) for name, times in seconds.items()}


def scoring(prefix: int) -> None:
    model, reader, generator = llama(), tokenizer(), torch.Generator().manual_seed(0)
    (example,) = words(1, prefix, generator)
    questions = [question for length in (8, 12, 16, 20) for question in words(QUESTIONS // 4, length, generator)]
    prompts = [f"{example} {question}" for question in questions]
    settings = {"max_new_tokens": ANSWER, "batch_size": QUESTIONS}
    ours = HFGenerator(model, reader, **settings)
    plain = HFGenerator(model, reader, share_prefix=False, **settings)
    answers = ours(prompts)
    same = sum(one == other for one, other in zip(answers, plain(prompts), strict=True))
    if same < QUESTIONS or len(set(answers)) < QUESTIONS // 2:
        raise SystemExit(f"only {same} of {QUESTIONS} answers agree, {len(set(answers))} are different")
    seconds = race({"ours": lambda: ours(prompts), "plain": lambda: plain(prompts), "limit": lambda: plain(questions)})
    print(
        f"  example of {prefix:4d} tokens: plain batching / ours = {seconds['plain'] / seconds['ours']:6.2f}, "
        f"ours / limit = {seconds['ours'] / seconds['limit']:.2f}, {1000 * seconds['ours']:.0f} ms a draft"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{QUESTIONS} questions of 8 to 20 tokens, answers of {ANSWER}, equal answers checked")
    for prefix in (32, 128, 512):
        scoring(prefix)
