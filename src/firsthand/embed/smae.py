"""Starbucks pre-training (SMAE): masked tokens, and whole texts from one vector, at every size of a model.

The sizes are those of `firsthand.embed.starbucks`. The host is transformers, the model a BERT.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from firsthand.embed.starbucks import Sizes, check_sizes, default_sizes

try:
    from transformers import BertForMaskedLM
    from transformers.masking_utils import create_bidirectional_mask
    from transformers.modeling_outputs import MaskedLMOutput
    from transformers.models.bert.modeling_bert import BertLayer
except ImportError:

    class BertForMaskedLM(nn.Module):  # type: ignore[no-redef]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise ImportError(f"{type(self).__name__} needs transformers: pip install 'firsthand[hf]'")


def smae_loss(
    model: Any,
    decoder_layer: nn.Module,
    batch: Mapping[str, Tensor],
    sizes: Sizes,
    *,
    reduction: str = "mean",
) -> Float[Tensor, "*sizes_and_parts"]:
    r"""Masked language modelling from the states of every size, and of the text from the first token's state.

    With $h^n$ the states after layer n, H the transform of the MLM head (dense, activation, norm), of whose dense weights only
    the first d columns are used, and V its output layer:

    $$ z_k = H(h^{n_k}_{:d_k}), \quad \mathrm{mlm}_k = \mathrm{CE}(V z_k, y), \quad
       \mathrm{mae}_k = \mathrm{CE}(V H(\mathrm{Decoder}(z_{k,1}, x'_2, \dots, x'_T)), y'), \quad
       L = \tfrac1m \sum_k \tfrac12 (\mathrm{mlm}_k + \mathrm{mae}_k) $$

    x' are the embeddings of a copy of the text with more of it masked: the less the decoder, one layer, can read there, the more
    the vector $z_{k,1}$ has to say. Scores over the vocabulary are computed for the masked tokens only.

    Args:
        model: a `BertForMaskedLM`.
        decoder_layer: a `BertLayer`, not one of the model's.
        batch: as `SMAECollator` makes it: `input_ids`, `labels`, `decoder_input_ids`, `decoder_labels`, all (B, T), the labels
            -100 where nothing is to be predicted; `attention_mask` and `token_type_ids` if there are any.
        sizes: (layer, dim), both strictly growing.
        reduction: `"mean"`, or `"none"`: mlm and mae of each size, (m, 2).

    Returns:
        The loss, in float32 or wider. A batch without a masked token costs 0.

    Warns:
        UserWarning: the last size is not the full model.

    Raises:
        ValueError: the model is no BERT, something is missing in the batch, sizes that the model does not have.

    Source:
        Zhuang et al., "Starbucks: Improved Training for 2D Matryoshka Embeddings", 2024, arXiv 2410.13230, as in its code. That
        computes scores for all tokens; the loss is the same.
    """
    if not (hasattr(model, "bert") and hasattr(model, "cls")):
        raise ValueError(f"model must be a BertForMaskedLM, got {type(model).__name__}")
    needed = ("input_ids", "labels", "decoder_input_ids", "decoder_labels")
    if missing := [name for name in needed if batch.get(name) is None]:
        raise ValueError(f"batch must have {', '.join(needed)}; it lacks {', '.join(missing)}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    sizes = check_sizes(sizes, model.config.num_hidden_layers, model.config.hidden_size)

    mask, labels, decoder_labels = batch.get("attention_mask"), batch["labels"], batch["decoder_labels"]
    types = {"token_type_ids": batch.get("token_type_ids")}
    states = model.bert(batch["input_ids"], attention_mask=mask, output_hidden_states=True, **types).hidden_states
    seen = model.bert.embeddings(batch["decoder_input_ids"], **types)
    attention = create_bidirectional_mask(config=model.config, inputs_embeds=seen, attention_mask=mask)
    masked, decoder_masked = labels != -100, decoder_labels != -100
    head = model.cls.predictions

    losses = []
    for layer, dim in sizes:
        part = states[layer][..., :dim]
        mlm = _cross_entropy(head.decoder(_transform(head, part[masked])), labels[masked])
        summary = _transform(head, part[:, :1])
        decoded = decoder_layer(torch.cat([summary, seen[:, 1:]], dim=1), attention)
        mae = _cross_entropy(model.cls(decoded[decoder_masked]), decoder_labels[decoder_masked])
        losses.append(torch.stack([mlm, mae]))
    parts = torch.stack(losses)
    return parts if reduction == "none" else parts.mean()


def _transform(head: Any, states: Float[Tensor, "*places dim"]) -> Float[Tensor, "*places hidden"]:
    """The head's transform, of states of which only the first numbers are there."""
    dense = head.transform.dense
    hidden = F.linear(states, dense.weight[:, : states.shape[-1]], dense.bias)
    transformed: Tensor = head.transform.LayerNorm(head.transform.transform_act_fn(hidden))
    return transformed


def _cross_entropy(logits: Float[Tensor, "tokens vocab"], labels: Int[Tensor, " tokens"]) -> Float[Tensor, ""]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels, reduction="sum") / max(1, len(labels))


class BertForSMAE(BertForMaskedLM):
    """A BERT with its MLM head and SMAE's decoder, which the transformers `Trainer` trains, saves and resumes.

    ```python
    smae = BertForSMAE.begin(BertForMaskedLM.from_pretrained("bert-base-uncased"))
    Trainer(smae, args, train_dataset=texts, data_collator=SMAECollator(tokenizer)).train()
    smae.save_pretrained("pretrained")  # SentenceTransformer("pretrained") takes the encoder and leaves the rest
    ```

    Args:
        config: a `BertConfig`; its `smae_sizes` are the sizes, by default those of `default_sizes`.

    Raises:
        ValueError: sizes that the model does not have.

    Source:
        arXiv 2410.13230. The decoder begins as a copy of the first layer (`begin`), as in its code; made from a configuration
        alone, its weights are random.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        sizes = getattr(config, "smae_sizes", None) or default_sizes(config.num_hidden_layers, config.hidden_size)
        config.smae_sizes = [list(size) for size in check_sizes(sizes, config.num_hidden_layers, config.hidden_size)]
        self.decoder_layer = BertLayer(config)
        self.post_init()

    @classmethod
    def begin(cls, model: Any, sizes: Sizes | None = None) -> "BertForSMAE":
        """Go on from a `BertForMaskedLM`, whose weights it shares, with the decoder a copy of its first layer.

        Args:
            model: trained further as this is trained, so `model.save_pretrained` saves the encoder without the decoder.
            sizes: (layer, dim), both strictly growing; `default_sizes` if None.

        Raises:
            ValueError: the model is no BERT with an MLM head, or does not have these sizes.
        """
        if not (hasattr(model, "bert") and hasattr(model, "cls")):
            raise ValueError(f"model must be a BertForMaskedLM, got {type(model).__name__}")
        config = copy.deepcopy(model.config)
        config.smae_sizes = None if sizes is None else [list(size) for size in sizes]
        smae = cls(config)
        smae.bert, smae.cls = model.bert, model.cls
        smae.decoder_layer = copy.deepcopy(model.bert.encoder.layer[0])
        return smae.train(model.training)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_labels: Tensor | None = None,
    ) -> Any:
        """The loss, as `MaskedLMOutput`; without `decoder_input_ids` what `BertForMaskedLM` returns."""
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids, "labels": labels}
        if decoder_input_ids is None:
            return super().forward(**batch)
        batch |= {"decoder_input_ids": decoder_input_ids, "decoder_labels": decoder_labels}
        return MaskedLMOutput(loss=smae_loss(self, self.decoder_layer, batch, self.config.smae_sizes))


class SMAECollator:
    """Masks whole words of a text twice: some for the encoder, those and more for the decoder.

    Of a text of T tokens, words in random order are masked for the decoder while round(`decoder_mlm_probability`·T) tokens allow,
    for the encoder too while round(`encoder_mlm_probability`·T) allow, and at least one token's worth of each. A word that does
    not fit is passed over. In each of the two copies a masked token becomes the mask token (80 %), any token (10 %) or stays.

    Args:
        tokenizer: of transformers, with a mask token.
        encoder_mlm_probability: share of the tokens to mask for the encoder, in (0, 1).
        decoder_mlm_probability: for the decoder, at least as much.
        seed: of the draws, by default a random one. In the workers of a data loader theirs counts.

    A feature is a dict with `input_ids`, special tokens included, and, unless pieces of words begin with "##", `word_ids`: the
    word that each token is of, None for special tokens, as a fast tokenizer's `encoding.word_ids()` says. In a `Trainer` they
    need `remove_unused_columns=False`.

    Raises:
        ValueError: a share out of range, no mask token; in a call: no features, no words to tell from each other.

    Source:
        arXiv 2410.13230; both shares as in the command that its code documents.
    """

    def __init__(
        self,
        tokenizer: Any,
        encoder_mlm_probability: float = 0.2,
        decoder_mlm_probability: float = 0.4,
        seed: int | None = None,
    ) -> None:
        if not 0 < encoder_mlm_probability <= decoder_mlm_probability < 1:
            raise ValueError(
                "encoder_mlm_probability and decoder_mlm_probability must be in (0, 1), the first not above the second, "
                f"got {encoder_mlm_probability} and {decoder_mlm_probability}"
            )
        if tokenizer.mask_token_id is None:
            raise ValueError(f"tokenizer must have a mask token, {type(tokenizer).__name__} has none")
        self.tokenizer = tokenizer
        self.encoder_mlm_probability = encoder_mlm_probability
        self.decoder_mlm_probability = decoder_mlm_probability
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        self.worker_seed: int | None = None
        kind = type(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)).__name__
        pieces = tokenizer.get_vocab().items() if kind in ("WordPiece", "NoneType") else ()
        self.continues = {index for token, index in pieces if token.startswith("##")}
        self.special = set(tokenizer.all_special_ids)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Int[Tensor, "batch tokens"]]:
        if not features:
            raise ValueError("features must hold at least one text, got none")
        worker = torch.utils.data.get_worker_info()
        if worker and worker.seed != self.worker_seed:  # each has a copy of the generator, which must not draw the same
            self.worker_seed = worker.seed
            self.generator.manual_seed(worker.seed)
        texts = [[int(token) for token in feature["input_ids"]] for feature in features]
        batch = self.tokenizer.pad({"input_ids": texts}, return_tensors="pt")
        ids = batch["input_ids"]
        masked = {side: torch.zeros_like(ids, dtype=torch.bool) for side in ("encoder", "decoder")}
        for row, (feature, text) in enumerate(zip(features, texts, strict=True)):
            begin = ids.shape[1] - len(text) if self.tokenizer.padding_side == "left" else 0
            encoder, decoder = self._choose(self._words(text, feature.get("word_ids")), len(text))
            masked["encoder"][row, [begin + place for place in encoder]] = True
            masked["decoder"][row, [begin + place for place in decoder]] = True
        inputs, labels = self._corrupt(ids, masked["encoder"])
        decoder_inputs, decoder_labels = self._corrupt(ids, masked["decoder"])
        return {
            "input_ids": inputs,
            "labels": labels,
            "decoder_input_ids": decoder_inputs,
            "decoder_labels": decoder_labels,
            "attention_mask": batch["attention_mask"],
        }

    def _words(self, text: list[int], word_ids: Sequence[int | None] | None) -> list[list[int]]:
        """The places of each word's tokens."""
        if word_ids is None and not self.continues:
            raise ValueError(
                "features must have word_ids, since this tokenizer does not begin pieces of words with '##' "
                "(in a Trainer, with remove_unused_columns=False)"
            )
        words: list[list[int]] = []
        last: int | None = None
        for place, token in enumerate(text):
            word = None if word_ids is None else word_ids[place]
            if token in self.special or (word_ids is not None and word is None):
                last = None
                continue
            is_piece = token in self.continues if word_ids is None else word == last
            if is_piece and words:
                words[-1].append(place)
            else:
                words.append([place])
            last = word
        return words

    def _choose(self, words: list[list[int]], length: int) -> tuple[list[int], list[int]]:
        """The places that are masked for the encoder and for the decoder."""
        encoder_budget = max(1, round(length * self.encoder_mlm_probability))
        decoder_budget = max(1, round(length * self.decoder_mlm_probability))
        encoder: list[int] = []
        decoder: list[int] = []
        for index in torch.randperm(len(words), generator=self.generator).tolist():
            word = words[index]
            if len(decoder) + len(word) > decoder_budget:
                continue
            if len(encoder) + len(word) <= encoder_budget:
                encoder += word
            decoder += word
        return encoder, decoder

    def _corrupt(self, ids: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        kind = torch.rand(ids.shape, generator=self.generator)
        noise = torch.randint(len(self.tokenizer), ids.shape, generator=self.generator)
        inputs = torch.where(masked & (kind < 0.8), self.tokenizer.mask_token_id, ids)
        inputs = torch.where(masked & (kind >= 0.9), noise, inputs)
        return inputs, torch.where(masked, ids, -100)

    def state_dict(self) -> dict[str, Any]:
        """Where the draws are."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.generator.set_state(state_dict["generator"])
