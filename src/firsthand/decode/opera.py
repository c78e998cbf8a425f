"""OPERA: beam search that counts against a candidate if the response leans on one token, and goes back if it keeps doing so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from firsthand.decode.over_trust import OverTrustState

try:
    from transformers import DynamicCache
    from transformers.utils import ModelOutput
except ImportError:  # only `generate` of transformers has a use for the search
    DynamicCache = ModelOutput = object  # type: ignore[assignment, misc]


@dataclass
class OperaOutput(ModelOutput):  # type: ignore[misc, valid-type]
    """What `opera_search` returns if `return_dict_in_generate` is set.

    Attributes:
        sequences: prompt and response, the best first, padded on the right.
        sequences_scores: sum of the log-probabilities among the candidates over length to the power of `length_penalty`.
        rollbacks: for each time the search went back, the position it chose anew, counted from the start of the response.
    """

    sequences: Int64[Tensor, "returned length"] | None = None
    sequences_scores: Float[Tensor, " returned"] | None = None
    rollbacks: list[int] | None = None


@dataclass(frozen=True)
class _Beams:
    """Where the search stands before it chooses a token. Nothing changes it, so an old one can be returned to."""

    sequences: Tensor  # [beams, prompt and response]
    scores: Tensor  # [beams]; minus infinity for a beam that is not in use
    trust: OverTrustState
    columns: Tensor  # [beams, response]: at each step, where the penalty of most of the beam's candidates was found
    finished: tuple[tuple[float, Tensor], ...] = ()  # score and sequence, the best first


def opera_search(
    model: Any,
    input_ids: Int64[Tensor, "beams prompt"],
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    image_span: tuple[int, int] | None = None,
    scale_factor: float = 50.0,
    penalty_weight: float = 1.0,
    num_candidates: int = 5,
    rollback_threshold: int | None = 15,
    max_rollbacks: int = 5,
    warmup: int = 10,
    **model_kwargs: Any,
) -> Int64[Tensor, "returned length"] | OperaOutput:
    r"""Beam search with the over-trust penalty and retrospection, for `generate(custom_generate=)`.

    Call it as ::

        model.generate(**inputs, custom_generate=opera_search, num_beams=5, image_span=find_image_span(input_ids, image_token))

    Each beam b proposes its most probable tokens y. All of them are appended and run in one batch, for the attention of each, and

    $$ \log p(y \mid b) = \log \operatorname{softmax}_y \bigl( z_{by} - \alpha\, \phi_{by} \bigr) $$

    over the candidates of the beam, with φ of `firsthand.decode.over_trust.over_trust_penalty`. The rest is beam search, as
    transformers does it. The logits of the candidates that are chosen are those of the next step, so a token takes one forward
    pass, of beams × candidates rows.

    Retrospection: the column s in which φ is found is where the response leans. When most beams point to the same s, and each
    has pointed to it at `rollback_threshold` steps, the search returns to where the token after s was to be chosen, and
    chooses another for each beam than before.

    Args:
        model: a decoder-only model of transformers, with or without images, loaded with `attn_implementation="eager"`.
        input_ids: as `generate` hands it over, one prompt, once for each beam. With it `logits_processor`,
            `stopping_criteria`, `generation_config` and `model_kwargs`.
        image_span: positions of the first and the last image token in the prompt, see `find_image_span`. None for text only:
            there is then no bonus for looking at the image, and no penalty during the warm-up.
        scale_factor: σ, positive.
        penalty_weight: α, at least 0. 0 switches penalty and bonus off.
        num_candidates: how many tokens each beam proposes, at least 1; as many as the vocabulary has at the most.
        rollback_threshold: at how many steps a beam must have pointed to a token, at least 1. None: never go back.
        max_rollbacks: how many times the token at one position is chosen anew, at least 0. After that the search goes back one
            token further, and if that has been done as often, it goes on.
        warmup: length of response up to which attention to the image counts and not the products, and position of the first
            token that can be gone back to; at least 0.

    Returns:
        Prompt and response, the best `num_return_sequences`; or `OperaOutput` if `return_dict_in_generate` is set.

    Raises:
        ValueError: a setting is out of range, the model is an encoder-decoder, sampling is asked for, or the cache cannot
            branch or go back.
        NotImplementedError: more than one prompt.
        RuntimeError: the model returns no attention.

    Source:
        Huang et al., "OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty and
        Retrospection-Allocation", CVPR 2024, arXiv 2311.17911, sections 3.2 and 3.3, and its code, a fork of transformers 4.29.
        The warm-up, that all beams must agree and that the first tokens are not gone back to are the code's; counting from
        `rollback_threshold` on rather than beyond it is the paper's. Ours are: logits processors come before the candidates are
        chosen and not after the penalty, so that what they forbid is no candidate; what is not a candidate cannot be chosen;
        when choosing anew, each beam proposes as many tokens as ever, those chosen before left out (the paper has what is left
        of the old candidates, the code the whole vocabulary without a penalty); `num_beams=1`.
    """
    _check_settings(penalty_weight, num_candidates, rollback_threshold, max_rollbacks)
    cache = model_kwargs.get("past_key_values")
    _check_host(model, input_ids, generation_config, cache, goes_back=rollback_threshold is not None)
    beams, prompt = input_ids.shape
    trust = OverTrustState.empty(beams, prompt, image_span, scale_factor, warmup, device=input_ids.device)

    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    logits = _last_logits(model(**inputs, return_dict=True), input_ids)
    candidates = min(num_candidates, logits.shape[-1])
    # From here on images are in the cache. All rows have the same prompt, so masks and positions need not follow the beams.
    needed = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
    beam_kwargs = {name: value for name, value in model_kwargs.items() if name in needed}
    _, candidate_kwargs = model._expand_inputs_for_generation(candidates, input_ids=input_ids, **beam_kwargs)

    def forward(sequences: Tensor, new: int, **options: Any) -> Any:
        kwargs = dict(candidate_kwargs if len(sequences) > beams else beam_kwargs)
        kwargs = model._update_model_kwargs_for_generation({}, kwargs, num_new_tokens=sequences.shape[1] - prompt)
        inputs = model.prepare_inputs_for_generation(sequences, next_sequence_length=new, **kwargs)
        return model(**inputs, return_dict=True, **options)

    each = torch.arange(beams, device=input_ids.device)
    parents = each.repeat_interleave(candidates)
    scores = torch.where(each == 0, 0.0, -torch.inf)  # the beams are still the same: one is enough
    now = _Beams(input_ids, scores, trust, input_ids[:, :0])
    rows = each  # where in the cache each beam is
    past: list[_Beams] = []  # by position in the response
    chosen: list[tuple[Tensor, Tensor]] = []  # by position: beams and tokens
    barred: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by position: what was chosen there before
    rollbacks: list[int] = []
    furthest = 0  # token that was gone back to
    while True:
        log_probs = logits_processor(now.sequences, logits.log_softmax(-1))
        for pairs in barred.get(len(past), ()):
            log_probs = log_probs.index_put(pairs, log_probs.new_tensor(-torch.inf))
        log_probs, tokens = log_probs.topk(candidates)
        extended = torch.cat([now.sequences[parents], tokens.view(-1, 1)], 1)
        cache.reorder_cache(rows[parents])
        output = forward(extended, 1, output_attentions=True)
        trust = now.trust.fork(parents).push(_attention_of_last_token(output, extended))
        columns = torch.cat([now.columns, _mode(trust.column.view(beams, candidates))[:, None]], 1)

        summary = _summary_token(columns[now.scores > -torch.inf], rollback_threshold)
        target = _rollback_target(summary, max(warmup, furthest), len(past), rollbacks, max_rollbacks)
        if summary is not None and target is not None:
            furthest = summary
            rollbacks.append(target)
            barred = {position: pairs for position, pairs in barred.items() if position <= target}
            barred.setdefault(target, []).append(chosen[target])
            now, past, chosen = past[target], past[:target], chosen[:target]
            known = _return_to(now.sequences, extended, cache)
            logits = _last_logits(forward(now.sequences, now.sequences.shape[1] - known), input_ids)
            rows = each
            continue

        log_probs = _candidate_log_probs(log_probs, trust.penalty.view(beams, candidates), penalty_weight)
        scores = (now.scores[:, None] + log_probs).flatten()
        past.append(now)
        rows, scores, finished = _beam_step(extended, scores, now.finished, beams, prompt, stopping_criteria, generation_config)
        now = _Beams(extended[rows], scores, trust.fork(rows), columns[parents[rows]], finished)
        alive = scores > -torch.inf
        chosen.append((parents[rows][alive], now.sequences[alive, -1]))
        if _is_done(now, prompt, generation_config):
            return _returned(now, prompt, generation_config, rollbacks)
        logits = _last_logits(output, input_ids)[rows]


def find_image_span(input_ids: Int64[Tensor, "*batch prompt"], image_token_id: int) -> tuple[int, int]:
    """Positions of the first and the last image token of a prompt; what stands between them counts as image.

    Args:
        input_ids: the prompt, as the processor made it: with as many image tokens as the model puts patches in.
        image_token_id: `model.config.image_token_id` of most models.

    Raises:
        ValueError: there is no image token, or the prompts of a batch have theirs at different positions.
    """
    is_image = input_ids.reshape(-1, input_ids.shape[-1]) == image_token_id
    if not is_image.any():
        raise ValueError(f"input_ids must hold the image token {image_token_id}, but there is none")
    if not (is_image == is_image[:1]).all():
        raise ValueError("input_ids must have the image at the same positions in all prompts")
    positions = is_image[0].nonzero().flatten()
    return int(positions[0]), int(positions[-1])


def _beam_step(
    extended: Tensor,
    scores: Tensor,
    finished: tuple[tuple[float, Tensor], ...],
    beams: int,
    prompt: int,
    stopping_criteria: Any,
    generation_config: Any,
) -> tuple[Tensor, Tensor, tuple[tuple[float, Tensor], ...]]:
    """One step of beam search, as `generate` does it for one prompt: which rows go on, their scores, and what has ended.

    Of more sequences than there are beams, those that end are set aside, so that as many as before can go on.
    """
    ends = generation_config._eos_token_tensor
    considered = min(max(2, 1 + (0 if ends is None else len(ends))) * beams, len(scores))
    best, index = scores.topk(considered)
    ended = stopping_criteria(extended[index], None)
    length = extended.shape[1] - prompt
    new = [
        (float(best[place]) / length**generation_config.length_penalty, extended[index[place]])
        for place in range(beams)
        if ended[place] and best[place] > -torch.inf
    ]
    finished = tuple(sorted([*finished, *new], key=lambda hypothesis: -hypothesis[0])[:beams])
    running, places = best.masked_fill(ended, -torch.inf).topk(beams)
    return index[places], running, finished


def _is_done(now: _Beams, prompt: int, generation_config: Any) -> bool:
    best = float(now.scores[0])
    if best == -torch.inf:
        return True
    if len(now.finished) < len(now.scores):
        return False
    if generation_config.early_stopping is True:
        return True
    penalty, length = generation_config.length_penalty, now.sequences.shape[1] - prompt
    if generation_config.early_stopping == "never" and penalty > 0:
        length = generation_config.max_length - prompt
    return best / length**penalty <= now.finished[-1][0]


def _returned(now: _Beams, prompt: int, generation_config: Any, rollbacks: list[int]) -> Tensor | OperaOutput:
    length = (now.sequences.shape[1] - prompt) ** generation_config.length_penalty
    # Nothing has ended if processors forbade all that a beam could go on with.
    running = ((float(score) / length, sequence) for score, sequence in zip(now.scores, now.sequences, strict=True))
    best = (now.finished or tuple(running))[: generation_config.num_return_sequences]
    pad, ends = generation_config._pad_token_tensor, generation_config._eos_token_tensor
    fill = int(pad) if pad is not None else int(ends[0]) if ends is not None else -1
    sequences = pad_sequence([sequence for _, sequence in best], batch_first=True, padding_value=fill)
    if not generation_config.return_dict_in_generate:
        return sequences
    scores = torch.tensor([score for score, _ in best], device=sequences.device)
    return OperaOutput(sequences=sequences, sequences_scores=scores, rollbacks=rollbacks)


def _candidate_log_probs(log_probs: Tensor, penalty: Tensor, penalty_weight: float) -> Tensor:
    allowed = log_probs > -torch.inf
    renormalised = (log_probs - penalty_weight * penalty).log_softmax(-1)
    return torch.where(allowed, renormalised, -torch.inf)  # a beam all of whose candidates are forbidden has no softmax


def _summary_token(columns: Tensor, threshold: int | None) -> int | None:
    """The token that most beams point to now, if each of them has done so at enough steps."""
    token = _mode(columns[:, -1])
    if threshold is None or (columns == token).sum(1).min() < threshold:
        return None
    return int(token)


def _rollback_target(summary: int | None, first: int, position: int, rollbacks: list[int], most: int) -> int | None:
    """The position to choose anew: the one after the summary token, or else the token itself."""
    if summary is None or summary < first:
        return None
    targets = (summary + 1, summary)
    return next((each for each in targets if 0 < each < position and rollbacks.count(each) < most), None)


def _return_to(wanted: Tensor, held: Tensor, cache: Any) -> int:
    """Make the cache one of the wanted sequences' longest common beginnings, and say how long these are.

    Not all of the old beams have descendants, so the last tokens of some may have to be run again; the last one always is.
    """
    length = wanted.shape[1]
    common = (wanted[:, None] == held[None, :, :length]).long().cumprod(-1).sum(-1)
    shared, nearest = common.max(1)
    known = min(int(shared.min()), length - 1)
    cache.reorder_cache(nearest)
    cache.crop(known - held.shape[1])
    return known


def _last_logits(output: Any, input_ids: Tensor) -> Tensor:
    return output.logits[:, -1].to(device=input_ids.device, dtype=torch.float32, copy=True)


def _attention_of_last_token(output: Any, sequences: Tensor) -> Tensor:
    """[sequences, length], the largest over the heads of the last layer."""
    attentions = getattr(output, "attentions", None)
    if not attentions or attentions[-1] is None:
        raise RuntimeError('the model returns no attention: load it with attn_implementation="eager"')
    rows = attentions[-1][:, :, -1].amax(1).to(sequences.device)
    return F.pad(rows, (sequences.shape[1] - rows.shape[1], 0))  # a sliding window leaves out the first tokens


def _mode(values: Tensor) -> Tensor:
    """The most frequent value along the last dimension; of equally many, the one that comes first."""
    same = (values[..., :, None] == values[..., None, :]).sum(-1)
    return values.gather(-1, same.argmax(-1, keepdim=True)).squeeze(-1)


def _check_settings(penalty_weight: float, num_candidates: int, rollback_threshold: int | None, max_rollbacks: int) -> None:
    if not 0 <= penalty_weight < math.inf:
        raise ValueError(f"penalty_weight must be at least 0 and finite, got {penalty_weight}")
    if num_candidates < 1:
        raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")
    if rollback_threshold is not None and rollback_threshold < 1:
        raise ValueError(f"rollback_threshold must be at least 1 or None, got {rollback_threshold}")
    if max_rollbacks < 0:
        raise ValueError(f"max_rollbacks must be at least 0, got {max_rollbacks}")


def _check_host(model: Any, input_ids: Tensor, generation_config: Any, cache: Any, goes_back: bool) -> None:
    if model.config.is_encoder_decoder:
        raise ValueError(f"model must be decoder-only, got {type(model).__name__}")
    if generation_config.do_sample:
        raise ValueError("do_sample must be False: the search does not sample")
    if len(input_ids) != generation_config.num_beams:
        raise NotImplementedError(f"input_ids must be one prompt, got {len(input_ids) // generation_config.num_beams}")
    if not input_ids.shape[1]:
        raise ValueError("input_ids must be given: inputs_embeds alone do not say where the response starts")
    if not generation_config.use_cache or cache is None:
        raise ValueError("use_cache must be True, and the model must have a key-value cache")
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"the cache must be dynamic, to branch into candidates, got {type(cache).__name__}")
    if cache.get_seq_length():
        raise ValueError(f"past_key_values must be empty, got {cache.get_seq_length()} tokens")
    windows = [layer.sliding_window for layer in cache.layers if layer.is_sliding]
    forgets = not cache.is_croppable or any(window <= generation_config.max_length for window in windows)
    if goes_back and forgets:
        raise ValueError("rollback_threshold must be None: the model's cache forgets, so the search cannot go back")
