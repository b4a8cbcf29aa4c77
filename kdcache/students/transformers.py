"""Students of Hugging Face transformers: its Trainer, with soft targets in the loss.

Importing this module imports transformers; nothing else in kdcache does.
"""

from __future__ import annotations

__all__ = ["TrainerWithSoftTargets"]

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdcache.cache import RESIDENT_BYTES, SoftTargetCache
from kdcache.errors import MissingExtraError, OptionError, ShapeError
from kdcache.losses import DistillationLoss, Divergence
from kdcache.soft_targets import Mean, Weights, check_choice
from kdcache.stream.batch_checks import BatchChecks
from kdcache.stream.rows_by_id import RowsById
from kdcache.students.collation import CollatesIds
from kdcache.students.positions import CachedRows, cached_rows

try:
    from transformers import Trainer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ImportError as error:
    raise MissingExtraError(
        "TrainerWithSoftTargets needs transformers and accelerate, which are not installed here; run "
        "pip install 'kdcache[transformers]'"
    ) from error

_SOFT_TARGETS = "soft_targets"
_NO_LABEL = -100


class TrainerWithSoftTargets(Trainer):
    r"""`transformers.Trainer` whose loss is soft_weight * soft term + (1 - soft_weight) * the model's own loss.

    The soft term is that of `kdcache.distillation_loss`, temperature^2 included, of the model's ``logits`` against the
    soft targets of the batch's examples, which are joined by the column `key`. The model's own loss is what Trainer
    computes: label smoothing, shifted labels, ``compute_loss_func`` and ``num_items_in_batch`` are left to it.
    Evaluation and prediction know nothing of the cache: they give the model's own loss, on any examples.

    **The mean.** Where Trainer takes the model's own loss as a sum over the items of all batches of an optimiser's step
    (the model accepts ``num_items_in_batch`` and the batches have labels, or ``compute_loss_func`` is given), the soft
    term is the mean over all cached rows of all batches of that step, of all processes where
    ``average_tokens_across_devices`` says so. Elsewhere Trainer averages the losses of its batches, and the soft term
    is each batch's own mean.

    **Sequences.** Position i of an example meets its cached row i, padding is left out, and so are positions beyond the
    rows that were cached. Padding may stand at either side, as ``attention_mask`` says (of encoder-decoders,
    ``decoder_attention_mask``). An example with fewer tokens than cached rows is refused.

    **Columns.** Trainer drops what the model's ``forward`` does not take; the column `key` is kept, taken out before
    the data collator, whichever that is, and put back behind it. Ids are int or str.

    Parameters
    ----------
    *args, **options
        Those of `transformers.Trainer`.
    cache : SoftTargetCache
    key : str, default "example_id"
        The training dataset's column of ids.
    temperature : float
        Finite, above 0.
    soft_weight : float, default 0.9
        From 0 to 1. With 1, batches need no labels.
    divergence, beta, mean, weights
        As in `kdcache.distillation_loss`.
    teachers : sequence of str, optional
        Read and use only these.
    view_index : int, default 0
        The view whose soft targets are read.
    label_key : {"auto", None}, default "auto"
        Whether labels of one integer an example are held against the cache's; None trains on other labels on purpose.
    extra_classes : {"refuse", "ignore"}, default "refuse"
        What to do with classes of the student beyond the teachers': vocabularies are padded to different lengths
        (152,064 against 151,936). "ignore" leaves them out of the soft term, ``logits[..., :num_classes]``. They must
        be the last ones, with all others in the teachers' order, which nobody can check.
    unlabelled_rows : {"teach", "ignore"}, default "teach"
        Whether rows whose label is -100, such as a prompt's, have a soft term. A causal model's row i has the label
        i + 1.
    max_resident_bytes : int, default 2 GiB
        A cache whose coded rows take no more is held in memory.

    Raises
    ------
    OptionError
        An option has a value out of its range; or a training batch has no ids.
    UnknownExampleError
        At the first batch: an id is not in the cache.
    InputMismatchError
        Labels of one integer an example are not those of the cache.
    ShapeError
        Student and teachers differ in classes, or an example has fewer tokens than cached rows.
    """

    def __init__(
        self,
        *args: Any,
        cache: SoftTargetCache,
        key: str = "example_id",
        temperature: float,
        soft_weight: float = 0.9,
        divergence: Divergence = "forward-kl",
        beta: float = 0.5,
        mean: Mean = "geometric",
        weights: Weights | None = None,
        teachers: Sequence[str] | None = None,
        view_index: int = 0,
        label_key: Literal["auto"] | None = "auto",
        extra_classes: Literal["refuse", "ignore"] = "refuse",
        unlabelled_rows: Literal["teach", "ignore"] = "teach",
        max_resident_bytes: int = RESIDENT_BYTES,
        **options: Any,
    ) -> None:
        check_choice("extra_classes", extra_classes, ("refuse", "ignore"))
        check_choice("unlabelled_rows", unlabelled_rows, ("teach", "ignore"))
        DistillationLoss(temperature=temperature, soft_weight=soft_weight)  # refuses a weight out of its range
        self._soft_term = DistillationLoss(
            temperature=temperature, soft_weight=1.0, divergence=divergence, beta=beta, mean=mean, weights=weights,
            reduction="sum",
        )  # fmt: skip
        self._key, self._soft_weight = key, soft_weight
        self._ignores_extra, self._ignores_unlabelled = extra_classes == "ignore", unlabelled_rows == "ignore"
        self._rows = RowsById(
            cache, view_index=view_index, teachers=teachers, allow_repeats=True, max_resident_bytes=max_resident_bytes
        )
        self._checks = BatchChecks(self._rows, input_key=None, label_key=label_key)
        self._num_batches = 0
        self._num_rows_of_step: Tensor | int = 0
        super().__init__(*args, **options)
        if self.get_cp_size() * self.get_sp_size() > 1:
            raise OptionError(
                "sequences are cut over several devices (context or sequence parallelism), so that positions cannot be "
                "aligned with cached rows; train with data parallelism"
            )

    @property
    def data_collator(self) -> Callable[[list[Any]], Any]:
        """Makes batches, and carries ids around the data collator that was given."""
        return self._data_collator

    @data_collator.setter
    def data_collator(self, collate: Callable[[list[Any]], Any]) -> None:
        self._data_collator = collate if isinstance(collate, CollatesIds) else CollatesIds(collate, self._key)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._key not in self._signature_columns:
            self._signature_columns.append(self._key)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Take the batches of an optimiser's step, and put soft targets onto them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        joined = [self._with_soft_targets(batch) for batch in batches]
        self._num_rows_of_step = self._over_processes(sum(batch[_SOFT_TARGETS].num_counted for batch in joined), device)
        return joined, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - Trainer's own signature
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Give soft_weight * soft term + (1 - soft_weight) * the model's own loss; the latter alone in evaluation."""
        given = {name: value for name, value in inputs.items() if name not in {self._key, _SOFT_TARGETS}}
        rows: CachedRows | None = inputs.get(_SOFT_TARGETS)
        if rows is None:
            self._refuse_training_without(model)
            return super().compute_loss(model, given, return_outputs, num_items_in_batch)  # type: ignore[no-any-return]
        if self._soft_weight == 0:
            return super().compute_loss(model, given, return_outputs, num_items_in_batch)  # type: ignore[no-any-return]
        own_loss, outputs = self._own_loss(model, given, num_items_in_batch)
        loss = self._soft_weight * self._soft_loss(
            _logits_of(outputs, has_loss=own_loss is not None), rows, num_items_in_batch
        )
        if own_loss is not None and self._soft_weight < 1:
            loss = loss + (1 - self._soft_weight) * own_loss
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """Predict as Trainer does; ids serve nothing there."""
        return super().prediction_step(model, _without(inputs, self._key), *args, **options)

    def _with_soft_targets(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        self._num_batches += 1
        where = f"training batch {self._num_batches} of TrainerWithSoftTargets with cache {self._rows.cache.address}"
        if self._key not in batch:
            columns = getattr(self.train_dataset, "column_names", None)
            raise OptionError(
                f"{where}: it has no ids under key={self._key!r}, only {sorted(batch)}. The training dataset"
                f"{'' if columns is None else f', with the columns {columns},'} needs a column of the ids that the "
                "cache was built with; name it with key="
            )
        given = _without(batch, self._key)
        found = self._rows.find(self._rows.ids(batch[self._key], where=where), where=where)
        self._checks.check(given, found, is_first=self._num_batches == 1, where=where)
        return {**given, _SOFT_TARGETS: self._cached_rows(given, found.ids.tolist(), self._rows.read(found), where)}

    def _cached_rows(self, batch: Mapping[str, Any], ids: list[Any], soft_targets: Any, where: str) -> CachedRows:
        config = getattr(self.model, "config", None)
        is_encoder_decoder = getattr(config, "is_encoder_decoder", False)
        attention_mask = batch.get("decoder_attention_mask" if is_encoder_decoder else "attention_mask")
        labels = batch.get("labels") if self._ignores_unlabelled else None
        if soft_targets.num_rows is not None and attention_mask is None:
            self._refuse_hidden_padding(where)
        return cached_rows(
            soft_targets,
            attention_mask=attention_mask if soft_targets.num_rows is not None else None,
            labelled=None if labels is None else labels != _NO_LABEL,
            labels_are_ahead=self._labels_are_ahead and not is_encoder_decoder,
            ids=ids,
            where=where,
        )

    @property
    def _labels_are_ahead(self) -> bool:
        """Whether the model's loss shifts labels by one; Trainer's own word for it misses GPT2LMHeadModel's like."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        is_causal = type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        return bool(self._loss_shifts_labels) or is_causal

    def _refuse_hidden_padding(self, where: str) -> None:
        if getattr(self.processing_class, "padding_side", "right") == "left":
            raise OptionError(
                f"{where}: the tokenizer pads at the left, and the batch has no attention_mask that says where an "
                "example begins. Let the tokenizer return attention_mask, or pad at the right"
            )

    def _own_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None
    ) -> tuple[Tensor | None, Any]:
        """Give the model's own loss as Trainer computes it, if labels are needed or there, and its outputs."""
        has_labels = any(inputs.get(name) is not None for name in self.label_names)
        if self._soft_weight == 1 and not has_labels:
            return None, model(**inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items)
        return loss, outputs

    def _soft_loss(self, logits: Tensor, rows: CachedRows, num_items: Tensor | int | None) -> Tensor:
        total = rows.total(self._of_the_teachers_classes(logits), self._soft_term)
        if not self._is_sum_over_step(num_items):
            return total / max(rows.num_counted, 1)
        count = self._num_rows_of_step
        scale = self._num_averaged_processes if num_items is not None else 1
        return total * scale / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))

    def _of_the_teachers_classes(self, logits: Tensor) -> Tensor:
        expected, found = self._rows.cache.num_classes, logits.shape[-1]
        if found > expected and self._ignores_extra:
            return logits[..., :expected]
        if found != expected:
            remedy = (
                "If the student's last classes pad its vocabulary and all others are the teachers' in their order, "
                "extra_classes='ignore' leaves them out of the soft term"
                if found > expected
                else "A student needs all classes of its teachers"
            )
            raise ShapeError(
                f"the student gives {found} classes, the teachers of cache {self._rows.cache.address} {expected}. "
                f"{remedy}"
            )
        return logits

    def _is_sum_over_step(self, num_items: Tensor | int | None) -> bool:
        """Tell whether Trainer takes the loss as a part of the step's, and does not divide it by the step's batches."""
        if self.loss_is_scaled_for_ga is not None:
            return bool(self.loss_is_scaled_for_ga)
        return bool(self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None

    @property
    def _num_averaged_processes(self) -> int:
        """Processes whose gradients are averaged, where the step's rows are counted over all of them."""
        if not self.args.average_tokens_across_devices:
            return 1
        return int(self.accelerator.num_processes // self.get_tp_size())

    def _over_processes(self, count: int, device: torch.device) -> Tensor | int:
        if self._num_averaged_processes == 1:
            return count
        gathered: Tensor = self.accelerator.gather(torch.tensor(count, device=device))
        counted: Tensor = gathered.sum() / self.get_tp_size()
        return counted

    def _refuse_training_without(self, model: nn.Module) -> None:
        if model.training:
            raise OptionError(
                "compute_loss got a training batch without soft targets: `get_batch_samples` puts them onto batches, "
                "so a training loop of your own has to take its batches from it"
            )


def _without(batch: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != key}


def _logits_of(outputs: Any, *, has_loss: bool) -> Tensor:
    if isinstance(outputs, Mapping):
        if "logits" not in outputs:
            raise OptionError(f"the model's outputs have no `logits`, only {sorted(outputs)}; the soft term needs them")
        logits: Tensor = outputs["logits"]
        return logits
    first: Tensor = outputs[1 if has_loss else 0]
    return first
