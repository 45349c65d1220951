"""An lm-eval model that answers multiple-choice requests with a classification head.

Importing this module registers it in lm-eval as `diffxfer-classifier`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

# lm-eval registers its own models when this is imported, or never if there are others already.
import lm_eval.models  # noqa: F401
import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from diffxfer.checkpoints.companions import read_config
from diffxfer.checkpoints.header import short
from diffxfer.errors import EvaluationError
from diffxfer.evaluation.head_labels import (
    match_choices,
    not_multiple_choice,
    refuse_without_head,
)
from diffxfer.models.checkpoint import checkpoint_source
from diffxfer.models.input_length import NO_LIMIT, longest_input
from diffxfer.models.loading import load
from diffxfer.models.memory import free_memory, is_out_of_memory
from diffxfer.models.source import ModelSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "diffxfer-classifier"
"""Its name in lm-eval."""
_AUTO_BATCH_SIZE = 64
_log = logging.getLogger("lm_eval.diffxfer")  # below lm-eval's, so that its command shows it


@register_model(NAME)
class ClassifierLM(LM):  # type: ignore[misc]
    """A sequence classifier of transformers.

    The context of a request is the text to classify. Its continuation, without white space around
    it, is the name of a class in `id2label`. The answer is the log-softmax of that class's logit,
    in float64 from float32 logits, and whether no class has a larger one.

    Args:
        pretrained: a folder, a model on the Hub, or a source of weights, which stays open.
        batch_size: texts per batch; with ``"auto"`` 64, and half as many each time memory runs out.
        device: such as ``"cuda:0"``; None for a GPU if there is one. Without CUDA it is the CPU.
        dtype: the dtype of the loaded model; ``"auto"`` for that of the checkpoint.
        max_length: the maximum number of tokens of a text, if below the model's own.
        pair_separator: what separates two texts in a context, for models of pairs; None for single
            texts.
        attn_implementation: as for `from_pretrained`.
        progress: called with the bytes of weights that are loaded, and the total.
        warn: called with a line if texts were truncated; None to log it as lm-eval does.

    Attributes:
        labels: the names of the classes, in the order of the logits.
        max_length: the maximum number of tokens of a text; None if there is none.

    Raises:
        EvaluationError: if it is not a classifier with a tokenizer, or cannot pad a batch.
        DiffxferError: if it cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str | Path | ModelSource,
        *,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        max_length: int | None = None,
        pair_separator: str | None = None,
        attn_implementation: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__()
        self._device = _device(device)
        self._pair_separator = pair_separator
        options = {
            "dtype": None if dtype == "auto" else dtype,
            "device": self._device,
            "attn_implementation": attn_implementation,
            "progress": progress,
        }
        if isinstance(pretrained, ModelSource):
            self.name, self._model, self.tokenizer = _load(pretrained, options)
        else:
            with checkpoint_source(pretrained) as source:
                self.name, self._model, self.tokenizer = _load(source, options)
        names: Any = self._model.config.id2label or {}
        self.labels = [str(names[number]) for number in sorted(names)]
        self.max_length = longest_input(self._model, self.tokenizer, max_length)
        self._warn = warn or _log.warning
        self._may_shrink = str(batch_size).startswith("auto")
        self.batch_size = _AUTO_BATCH_SIZE if self._may_shrink else int(batch_size)
        self._prepare_padding()

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer, which lm-eval's cache of requests has in its key."""
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        """Refuse: a classifier reads the text alone.

        Raises:
            EvaluationError: always.
        """
        problem = "reads a text, and no conversation"
        raise EvaluationError(self.name, problem, "omit the option for the chat template")

    def loglikelihood(
        self,
        requests: Sequence[Instance],
        disable_tqdm: bool = False,  # noqa: ARG002 lm-eval's signature
    ) -> list[tuple[float, bool]]:
        """Answer the choices of multiple-choice questions.

        Args:
            requests: contexts, each with every class as a continuation.
            disable_tqdm: has no effect.

        Returns:
            The log-probability of each class, and whether it is the answer.

        Raises:
            EvaluationError: if the choices of a question are not the classes.
        """
        classes = self._classes(requests)
        by_text: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            by_text.setdefault(request.args[0], []).append(place)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for text, scores in self._classify(list(by_text)):
            best = int(scores.argmax())
            for place in by_text[text]:
                number = classes[place]
                answers[place] = float(scores[number]), number == best
                hook = self.cache_hook.add_partial
                hook("loglikelihood", requests[place].args, answers[place])
        return answers

    def loglikelihood_rolling(
        self,
        requests: Sequence[Instance],
        disable_tqdm: bool = False,  # noqa: ARG002 lm-eval's signature
    ) -> list[float]:
        """Refuse: a classifier has no probability of a text.

        Raises:
            EvaluationError: always.
        """
        raise not_multiple_choice(requests[0].task_name, "asks for the likelihood of texts")

    def generate_until(
        self,
        requests: Sequence[Instance],
        disable_tqdm: bool = False,  # noqa: ARG002 lm-eval's signature
    ) -> list[str]:
        """Refuse: a classifier generates no text.

        Raises:
            EvaluationError: always.
        """
        raise not_multiple_choice(requests[0].task_name, "asks for generated text")

    def _classes(self, requests: Sequence[Instance]) -> list[int]:
        """The class that each request asks for; those of one question are all classes."""
        questions: dict[tuple[Any, ...], dict[int, list[int]]] = {}
        for place, request in enumerate(requests):
            # A task that asks for mutual information also asks each question without its text.
            question = request.task_name, request.doc_id, request.args[0]
            # A task with `repeats` asks the same several times.
            questions.setdefault(question, {}).setdefault(request.idx, []).append(place)
        found = [0] * len(requests)
        for (task, *_), asked in questions.items():
            choices = [requests[places[0]].args[1] for places in asked.values()]
            classes = match_choices(choices, self.labels, task=str(task), model=self.name)
            for number, places in zip(classes, asked.values(), strict=True):
                for place in places:
                    found[place] = number
        return found

    def _classify(self, texts: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Each text with the log-softmax of its logits, in float64."""
        inputs = {text: self._split(text) for text in texts}
        lengths = {text: self._length(parts) for text, parts in inputs.items()}
        limit = self.max_length or NO_LIMIT
        truncated = sum(length > limit for length in lengths.values())
        if truncated:
            self._warn(
                f"{self.name}: {truncated} of {len(texts)} texts are longer than"
                f" {self.max_length} tokens, and were truncated"
            )
        # The longest come first, so that memory runs out at once if it is too small.
        order = sorted(texts, key=lambda text: (-min(lengths[text], limit), text))
        done = 0
        while done < len(order):
            batch = order[done : done + self.batch_size]
            try:
                scores = self._forward([inputs[text] for text in batch])
            except RuntimeError as exc:
                if not self._may_shrink or len(batch) == 1 or not is_out_of_memory(exc):
                    raise
                self.batch_size = max(1, len(batch) // 2)
                free_memory()
                continue
            yield from zip(batch, scores, strict=True)
            done += len(batch)

    def _split(self, text: str) -> tuple[str, ...]:
        """The text, or the two texts of a pair."""
        if self._pair_separator is None:
            return (text,)
        parts = tuple(text.split(self._pair_separator))
        if len(parts) != 2:
            problem = (
                f"{short(self._pair_separator)} is {len(parts) - 1} times in {short(text)},"
                " expected once"
            )
            remedy = "write it between the texts in doc_to_text, and choose one that no text has"
            raise EvaluationError("pair_separator", problem, remedy)
        return parts

    def _length(self, parts: tuple[str, ...]) -> int:
        encode: Any = self.tokenizer
        return len(encode(*parts, verbose=False)["input_ids"])

    def _forward(self, inputs: Sequence[tuple[str, ...]]) -> torch.Tensor:
        encode: Any = self.tokenizer
        batch = encode(
            *map(list, zip(*inputs, strict=True)),
            padding=len(inputs) > 1,
            truncation=False if self.max_length is None else "longest_first",
            max_length=self.max_length,
            return_tensors="pt",
        ).to(self._device)
        with torch.inference_mode():
            logits = self._model(**batch).logits.float()
        # float64 keeps the order of logits that differ by one bit.
        return torch.log_softmax(logits.double(), -1).cpu()

    def _prepare_padding(self) -> None:
        """Check that batches can be padded, and let the model know the token that pads them."""
        padding = self.tokenizer.pad_token_id
        if padding is not None:
            # A decoder's head reads the last token that is not this one.
            self._model.config.get_text_config().pad_token_id = padding
        elif self._may_shrink:
            self.batch_size = 1
        elif self.batch_size > 1:
            problem = f"its tokenizer has no pad token, which batches of {self.batch_size} need"
            remedy = "give --batch-size 1, or set pad_token in its tokenizer_config.json"
            raise EvaluationError(self.name, problem, remedy)


def _device(name: str | None) -> torch.device:
    """The device; lm-eval's command asks for CUDA by default, also where there is none."""
    has_cuda = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if has_cuda else "cpu")
    return torch.device("cpu" if name.startswith("cuda") and not has_cuda else name)


def _load(
    source: ModelSource, options: Mapping[str, Any]
) -> tuple[str, PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForSequenceClassification

    refuse_without_head(source.label, read_config(source.folder))
    model, tokenizer = load(source, auto=AutoModelForSequenceClassification, **options)
    if tokenizer is None:
        remedy = "add the files of its tokenizer to its folder"
        raise EvaluationError(source.label, "has no tokenizer", remedy)
    return source.label, model, tokenizer
