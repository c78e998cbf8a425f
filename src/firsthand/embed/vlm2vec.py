"""VLM2Vec: a vision-language model as an embedder of any mix of image and text that follows an instruction."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Sampler
from torchmetrics import Metric

from firsthand.embed.pooling import last_token_pool


def format_instruction(task_definition: str, query: str = "", *, image_token: str | None = None) -> str:
    r"""The text of a query: where its image goes, what is wanted of it, and its own words.

    $$ \texttt{[IMAGE] Instruct: } \text{task} \texttt{\textbackslash n Query: } \text{words} $$

    Args:
        task_definition: the task in a sentence, the same for all of its queries.
        query: the words of this query; without any, that line is left out.
        image_token: the model's placeholder for an image, such as `"<image>"`, if the query has one.

    Raises:
        ValueError: `task_definition` is empty.

    Source:
        Jiang et al., "VLM2Vec: Training Vision-Language Models for Massive Multimodal Embedding Tasks", ICLR 2025,
        arXiv 2410.05160. The template is from memory of the paper, unverified; leaving out an empty query is our choice.
    """
    if not task_definition.strip():
        raise ValueError(f"task_definition must say what the task is, got {task_definition!r}")
    image = f"{image_token} " if image_token else ""
    words = f"\nQuery: {query}" if query else ""
    return f"{image}Instruct: {task_definition}{words}"


def pack_items(
    processor: Callable[..., Mapping[str, Tensor]],
    texts: Sequence[str],
    images: Sequence[Any] | None = None,
    *,
    image_token: str | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Model inputs for items that are text, image or both, in any mix.

    Args:
        processor: that of the model: `processor(text=..., images=..., padding=True, return_tensors="pt")`.
        texts: one for each item; `""` for an image alone.
        images: the image of each item or `None`, in whatever form the processor takes.
        image_token: the placeholder for an image; by default `processor.image_token`. An item with an image whose text does not
            have it gets it in front.
        **options: for the processor, such as `truncation=True, max_length=256`.

    Raises:
        ValueError: as many images as texts are wanted, an item is empty, or its text has a placeholder and no image.
    """
    images = [None] * len(texts) if images is None else list(images)
    if len(images) != len(texts):
        raise ValueError(f"images must have one entry, maybe None, for each of {len(texts)} texts, got {len(images)}")
    token = image_token or getattr(processor, "image_token", None)
    if token is None and any(image is not None for image in images):
        raise ValueError("image_token must be given, since processor has no attribute image_token")
    placed = []
    for row, (text, image) in enumerate(zip(texts, images, strict=True)):
        if image is None and not text:
            raise ValueError(f"texts and images must not both be empty, got neither in row {row}")
        if image is None and token and token in text:
            raise ValueError(f"texts must have {token!r} only where there is an image, got {text!r} without one in row {row}")
        placed.append(text if image is None or (token and token in text) else f"{token} {text}".strip())
    some = [image for image in images if image is not None]
    return dict(processor(text=placed, images=some or None, padding=True, return_tensors="pt", **options))


def embed_items(model: Callable[..., Any], inputs: Mapping[str, Tensor], *, normalize: bool = True) -> Float[Tensor, "items dim"]:
    r"""Embeddings by a vision-language model: the last layer's state of each item's last token, at unit length.

    $$ e = h / \lVert h \rVert, \qquad h = H^{(L)}_{t_\text{last}} $$

    `grad_cache_step` takes `functools.partial(embed_items, model)`. Where the model is wrapped (LoRA, `DistributedDataParallel`),
    the call goes through the wrapper.

    Args:
        model: of transformers, such as `Qwen2VLForConditionalGeneration` or `LlavaForConditionalGeneration`, or a decoder of
            text. Its head is not used: freeze it, or tell `DistributedDataParallel` to find unused parameters.
        inputs: for the model, as `pack_items` makes them, with `attention_mask`. They are moved to the model's device.
        normalize: scale to length 1; else the bare state.

    Raises:
        ValueError: `inputs` without `attention_mask`, or an item without a token.

    Source:
        arXiv 2410.05160: last token, last layer, unit length. After the final norm, as in transformers' `hidden_states[-1]`.
    """
    if "attention_mask" not in inputs:
        raise ValueError(f"inputs must have attention_mask, got {', '.join(inputs) or 'nothing'}")
    device = getattr(model, "device", None) or inputs["attention_mask"].device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    # One position of logits, for a head cannot be told to make none; a vocabulary at every position would be most of the memory.
    output = model(**inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1)
    embeddings = last_token_pool(output.hidden_states[-1], inputs["attention_mask"])
    return F.normalize(embeddings, dim=-1) if normalize else embeddings


def split_items(inputs: Mapping[str, Tensor], size: int, *, image_token_id: int | None = None) -> list[dict[str, Tensor]]:
    """Cut model inputs into chunks of `size` items, each with its own images and no more padding than it needs.

    Pixels have a row for each image (LLaVA, where each takes as many placeholders) or for each patch (Qwen2-VL), and not for each
    item: what belongs to an item follows from its placeholders. For `grad_cache_step`, write
    `split=functools.partial(split_items, image_token_id=model.config.image_token_id)`.

    Args:
        inputs: of a model, with `input_ids` and `attention_mask`. What is called `pixel_values` or `image_...` goes with the
            images, all else has a row for each item.
        size: items in a chunk, at least 1.
        image_token_id: the placeholder's number; not needed for text alone.

    Returns:
        The chunks, in order. One without images has no image tensors. Columns that are padding throughout are gone on both sides,
        which relative positions (RoPE) do not notice.

    Raises:
        ValueError: `size` below 1, no `input_ids` or `attention_mask`, images without `image_token_id`, a tensor without a row
            for each item, or placeholders that do not add up to whole images in each item.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if missing := {"input_ids", "attention_mask"} - inputs.keys():
        raise ValueError(f"inputs must have {' and '.join(sorted(missing))}, got {', '.join(inputs) or 'nothing'}")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    visual = {name for name in inputs if name == "pixel_values" or name.startswith("image_")}
    if odd := [name for name in inputs.keys() - visual if len(inputs[name]) != len(ids)]:
        raise ValueError(f"inputs must have a row for each of {len(ids)} items, got others in {', '.join(sorted(odd))}")
    image_ends, patch_ends = _images_until(inputs, image_token_id) if visual else ([0] * (len(ids) + 1), None)
    chunks = []
    for start in range(0, len(ids), size):
        end = min(start + size, len(ids))
        used = mask[start:end].any(dim=0).nonzero().flatten()
        columns = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(None)
        chunk = {}
        for name, value in inputs.items():
            if name not in visual:
                rows = value[start:end]
                chunk[name] = rows[:, columns] if value.shape[:2] == ids.shape else rows
            elif image_ends[start] < image_ends[end]:
                first, last = image_ends[start], image_ends[end]
                if name == "pixel_values" and patch_ends is not None:
                    first, last = patch_ends[first], patch_ends[last]
                chunk[name] = value[first:last]
        chunks.append(chunk)
    return chunks


def _images_until(inputs: Mapping[str, Tensor], image_token_id: int | None) -> tuple[list[int], list[int] | None]:
    """How many images come before each item, and how many patches before each image (if images come as patches)."""
    if image_token_id is None:
        raise ValueError("image_token_id must be given where inputs have images")
    counts = (inputs["input_ids"] == image_token_id).sum(dim=1)
    tokens_until = counts.cumsum(dim=0).tolist()
    if (grid := inputs.get("image_grid_thw")) is not None:
        patch_ends = [0, *grid.prod(dim=1).cumsum(dim=0).tolist()]
        merged = patch_ends[-1] / max(tokens_until[-1], 1)  # patches that become one placeholder
        ends = [end / merged for end in patch_ends]
    else:
        patch_ends, images = None, len(inputs["pixel_values"])
        ends = [tokens_until[-1] * image / images for image in range(images + 1)]
    number = {end: image for image, end in enumerate(ends)}
    if not tokens_until[-1] or any(end not in number for end in tokens_until):
        raise ValueError(f"inputs must have whole images in each item, got {len(ends) - 1}, and placeholders {counts.tolist()}")
    return [0, *(number[end] for end in tokens_until)], patch_ends


class InterleavedSubBatchSampler(Sampler[list[int]]):
    """Batches made of runs, each from one data set, so that a row has negatives of its own task and of others.

    A run's data set is drawn with probability proportional to its weight; its items come from the data set's shuffled order, so
    none returns before the order is used up. `sub_batch_size=1` is a plain mix of tasks, `sub_batch_size=batch_size` one task a
    batch.

    Use it as `DataLoader(ConcatDataset(datasets), batch_sampler=sampler)`. Iterating again gives the next epoch. After a `break`,
    or in a new process after `load_state_dict`, iteration goes on where it stopped.

    Args:
        dataset_lengths: of each data set, in the order of `ConcatDataset`.
        batch_size: items in a batch.
        sub_batch_size: items in a run; divides `batch_size`.
        weights: how often each data set is drawn, positive; by default its length, so that all items come up equally often.
        seed: decides, with the epoch, all that is drawn.
        stop: `"first_exhausted"` ends the epoch when a run is drawn that its data set cannot fill any more;
            `"all_exhausted"` when every data set has been used up once, with small ones shuffled anew meanwhile (then a batch may
            hold an item twice).

    Raises:
        ValueError: lengths or weights out of range, a data set shorter than a run, `batch_size` that is no multiple of
            `sub_batch_size`, an unknown `stop`, an epoch without a whole batch (when it is begun), or a state of another sampler.

    Source:
        Meng et al., "VLM2Vec-V2", 2025, arXiv 2507.04590, and its code: runs of 64 in batches of 1024. Version 1
        (arXiv 2410.05160) mixes at random, with at most 50 000 items of each data set (from memory, unverified). Our choices:
        what remains of a data set that is less than a run is left out until the next shuffle, and so is a last batch that is not
        whole.
    """

    def __init__(
        self,
        dataset_lengths: Sequence[int],
        batch_size: int,
        sub_batch_size: int,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        stop: str = "first_exhausted",
    ) -> None:
        if sub_batch_size < 1 or batch_size < 1 or batch_size % sub_batch_size:
            raise ValueError(f"batch_size must be a multiple of sub_batch_size, got {batch_size} and {sub_batch_size}")
        if not len(dataset_lengths) or min(dataset_lengths) < sub_batch_size:
            raise ValueError(f"dataset_lengths must be at least sub_batch_size={sub_batch_size}, got {list(dataset_lengths)}")
        weights = dataset_lengths if weights is None else weights
        if len(weights) != len(dataset_lengths) or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights must be {len(dataset_lengths)} positive numbers, got {list(weights)}")
        if stop not in ("first_exhausted", "all_exhausted"):
            raise ValueError(f"stop must be 'first_exhausted' or 'all_exhausted', got {stop!r}")
        self.dataset_lengths = [int(length) for length in dataset_lengths]
        self.batch_size = batch_size
        self.sub_batch_size = sub_batch_size
        self.weights = [float(weight) for weight in weights]
        self.seed = seed
        self.stop = stop
        self.epoch = 0
        self.batch = 0  # the next one of this epoch

    def __iter__(self) -> Iterator[list[int]]:
        runs = self._runs()
        per_batch = self.batch_size // self.sub_batch_size
        if len(runs) < per_batch:
            raise ValueError(
                f"dataset_lengths must fill a batch of {self.batch_size}, got {self.dataset_lengths}, "
                f"of which epoch {self.epoch} uses {len(runs) * self.sub_batch_size} items"
            )
        epoch, starts, capacity = self.epoch, np.cumsum([0, *self.dataset_lengths]), self._capacity()
        orders: dict[int, tuple[int, np.ndarray]] = {}  # of each data set: which shuffle, and its order
        taken = np.bincount(runs[: self.batch * per_batch], minlength=len(capacity))
        while self.batch < len(runs) // per_batch:
            indices: list[int] = []
            for dataset in runs[self.batch * per_batch : (self.batch + 1) * per_batch].tolist():
                shuffle, run = divmod(int(taken[dataset]), int(capacity[dataset]))
                if dataset not in orders or orders[dataset][0] != shuffle:
                    rng = np.random.default_rng([self.seed, epoch, 1, dataset, shuffle])
                    orders[dataset] = shuffle, starts[dataset] + rng.permutation(self.dataset_lengths[dataset])
                indices += orders[dataset][1][run * self.sub_batch_size :][: self.sub_batch_size].tolist()
                taken[dataset] += 1
            self.batch += 1
            yield indices
        self.epoch, self.batch = epoch + 1, 0

    def __len__(self) -> int:
        """Batches in this epoch, from its beginning. Epochs differ a little."""
        return len(self._runs()) * self.sub_batch_size // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch, or go on with it if it is the current one."""
        if epoch != self.epoch:
            self.epoch, self.batch = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, and of what. Workers of a `DataLoader` that fetch ahead move it ahead of the training step."""
        return {"epoch": self.epoch, "batch": self.batch, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the last batch that was drawn."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(f"state must be of a sampler with {name}={value}, got {state.get(name)}")
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])

    def _identity(self) -> dict[str, Any]:
        names = ("dataset_lengths", "batch_size", "sub_batch_size", "weights", "seed", "stop")
        return {name: getattr(self, name) for name in names}

    def _capacity(self) -> np.ndarray:
        """Whole runs in one pass over each data set."""
        return np.array(self.dataset_lengths) // self.sub_batch_size

    def _runs(self) -> np.ndarray:
        """The data set of each run of this epoch."""
        rng = np.random.default_rng([self.seed, self.epoch, 0])
        weights, capacity = np.array(self.weights) / sum(self.weights), self._capacity()
        per_batch = self.batch_size // self.sub_batch_size
        runs = np.empty(0, dtype=np.int64)
        while True:
            runs = np.append(runs, rng.choice(len(weights), size=int(capacity.sum()) + per_batch, p=weights))
            at = [np.flatnonzero(runs == dataset) for dataset in range(len(weights))]
            if self.stop == "first_exhausted":  # the first run too many; there is one, since more were drawn than there are
                return runs[: min(int(its[full]) for its, full in zip(at, capacity, strict=True) if len(its) > full)]
            if all(len(its) >= full for its, full in zip(at, capacity, strict=True)):
                needed = max(int(its[full - 1]) + 1 for its, full in zip(at, capacity, strict=True))
                if (whole := -(-needed // per_batch) * per_batch) <= len(runs):
                    return runs[:whole]


class EmbeddingMatchAccuracy(Metric):
    r"""Precision@1 of finding each query's target among its candidates, by task: how MMEB scores an embedder.

    $$ P@1 = \frac1n \sum_i \mathbb 1\bigl[\arg\max_c \langle q_i, e_c \rangle = g_i\bigr] $$

    A target that ties with k - 1 others counts 1/k, so that an embedder that maps everything to one point is at chance, not at 1
    because the target happens to come first.

    Args:
        groups: the tasks; or task -> kinds, such as `{"digits": ("classification", "in-distribution")}`, whose means are
            reported as well. Without groups there is only `"overall"`.
        normalize: whether the score is the cosine; else the inner product.
        **options: of `torchmetrics.Metric`.

    Raises:
        ValueError: groups that repeat or are called `"overall"`; in `update`, shapes that do not belong together, embeddings that
            are not finite, a target that is no candidate, an unknown group, or none where there are groups.

    Source:
        arXiv 2410.05160, its benchmark MMEB: one right candidate among 1 000, the mean over data sets. Sharing a tie is ours.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    correct: Tensor
    total: Tensor

    def __init__(
        self, groups: Sequence[str] | Mapping[str, Sequence[str]] | None = None, *, normalize: bool = True, **options: Any
    ) -> None:
        super().__init__(**options)
        names = list(groups or ())
        kinds = {name: tuple(groups[name]) for name in names} if isinstance(groups, Mapping) else {}
        tags = list(dict.fromkeys(kind for its in kinds.values() for kind in its))
        if len(set(names)) != len(names) or {"overall", *names} & set(tags) or "overall" in names:
            raise ValueError(f"groups and kinds must differ from each other and from 'overall', got {names} and {tags}")
        self.groups = names
        self.kinds = {tag: [names.index(name) for name in names if tag in kinds[name]] for tag in tags}
        self.normalize = normalize
        zeros = torch.zeros(max(len(names), 1), dtype=torch.float64)
        self.add_state("correct", zeros, dist_reduce_fx="sum", persistent=True)
        self.add_state("total", zeros.clone(), dist_reduce_fx="sum", persistent=True)

    def update(
        self,
        query: Float[Tensor, "queries dim"],
        candidates: Float[Tensor, "candidates dim"] | Float[Tensor, "queries candidates dim"],
        gold: Int[Tensor, " queries"],
        group: str | Sequence[str] | None = None,
    ) -> None:
        """Score queries.

        Args:
            query: embeddings of queries.
            candidates: those of the candidates, the same for all queries, or each query's own.
            gold: which candidate is right, in `[0, candidates)`.
            group: the task of all queries, or of each.
        """
        shape = candidates.shape
        if query.ndim != 2 or candidates.ndim not in (2, 3) or shape[-1] != query.shape[1] or not shape[-2]:
            raise ValueError(f"candidates must be (C, d) or (n, C, d) for query (n, d), got {tuple(shape)}, {tuple(query.shape)}")
        if gold.shape != query.shape[:1] or (candidates.ndim == 3 and shape[0] != len(query)):
            raise ValueError(f"gold and candidates must go with {len(query)} queries, got {tuple(gold.shape)}, {tuple(shape)}")
        if len(gold) and (int(gold.min()) < 0 or int(gold.max()) >= shape[-2]):
            raise ValueError(f"gold must be in [0, {shape[-2]}), got {int(gold.min())} to {int(gold.max())}")
        rows = self._group_rows(group, len(query)).to(query.device)
        dtype = torch.promote_types(query.dtype, torch.float32)
        query, candidates = query.detach().to(dtype), candidates.detach().to(dtype)
        if not (query.isfinite().all() and candidates.isfinite().all()):
            raise ValueError("query and candidates must be finite, got infinities or NaN")
        if self.normalize:
            query, candidates = F.normalize(query, dim=-1), F.normalize(candidates, dim=-1)
        scores = query @ candidates.T if candidates.ndim == 2 else (candidates @ query[:, :, None])[:, :, 0]
        best = scores == scores.amax(dim=1, keepdim=True)
        hit = best.gather(1, gold[:, None].long())[:, 0].double() / best.sum(dim=1)
        self.correct = self.correct.index_add(0, rows, hit)
        self.total = self.total.index_add(0, rows, torch.ones_like(hit))

    def compute(self) -> dict[str, Tensor]:
        """`"overall"`, the mean over tasks; each task; each kind of task. A task without queries is NaN and in no mean."""
        each = self.correct / self.total
        of_kinds = {tag: each[its].nanmean() for tag, its in self.kinds.items()}
        return {"overall": each.nanmean(), **dict(zip(self.groups, each, strict=False)), **of_kinds}

    def _group_rows(self, group: str | Sequence[str] | None, count: int) -> Tensor:
        if not self.groups:
            if group is not None:
                raise ValueError(f"group must be left out of a metric without groups, got {group!r}")
            return torch.zeros(count, dtype=torch.int64)
        names = [group] * count if isinstance(group, str) else list(group or ())
        if len(names) != count or not set(names) <= set(self.groups):
            raise ValueError(f"group must be one of {self.groups}, or one for each of {count} queries, got {group!r}")
        return torch.tensor([self.groups.index(name) for name in names], dtype=torch.int64)
