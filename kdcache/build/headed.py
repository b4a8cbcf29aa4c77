"""Teachers that hand out their last hidden states and their head, so that wide logits need not be made."""

from __future__ import annotations

__all__ = ["TeacherWithHead"]

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcache.codecs.head_logits import Head
from kdcache.errors import JobError

_SCALES = ("logits_scaling", "logit_scale")  # options by which transformers' models multiply or divide logits


class TeacherWithHead(nn.Module):
    """A teacher in two parts: a body that gives the last hidden states, and a linear head that makes logits of them.

    As a module it gives logits, like any teacher. Under codec `Spectral` a build asks it for hidden states instead:
    the codes follow from them by a small linear map, and the [row, class] logits are never made but a tile at a time,
    to measure what coding changed. What is stored is the same.

    Parameters
    ----------
    body : nn.Module
        Gives hidden states [example, component] or [example, position, component], or an object or mapping with
        `last_hidden_state`.
    head : nn.Linear
        With or without a bias; a bias of -inf masks a class.
    softcap : float, optional
        Logits are softcap * tanh(head(hidden) / softcap). Such logits are not linear in the hidden states, so that a
        build makes them, block by block, like those of any other teacher.

    Raises
    ------
    JobError
        The head is not linear, or the softcap is not a number above 0.

    Examples
    --------
    >>> teacher = TeacherWithHead(nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 100))
    >>> teacher(torch.zeros(2, 4)).shape, teacher.hidden(torch.zeros(2, 4)).shape
    (torch.Size([2, 100]), torch.Size([2, 8]))
    """

    def __init__(self, body: nn.Module, head: nn.Linear, *, softcap: float | None = None) -> None:
        super().__init__()
        if not isinstance(head, nn.Linear):
            raise JobError(
                f"TeacherWithHead needs a torch.nn.Linear as its head, got a {type(head).__qualname__}. Give the whole "
                "network, which must end in logits, as the teacher instead. Nothing was written"
            )
        if softcap is not None and not softcap > 0:
            raise JobError(f"softcap must be above 0, got {softcap}. Nothing was written")
        self.body = body
        self.head = head
        self.softcap = softcap

    @classmethod
    def from_transformers(cls, model: Any) -> TeacherWithHead:
        """Take a causal language model of transformers apart.

        The two parts are run on a few token ids and compared with the model itself, so that a model that does more to
        its logits than it says is refused.

        Parameters
        ----------
        model : PreTrainedModel
            With an output embedding that is a linear layer; `final_logit_softcapping` is followed.

        Raises
        ------
        JobError
            It is no model of transformers, or one without a head, or the parts do not give the model's logits.
        """
        head = _output_embeddings(model)
        config = model.config
        teacher = cls(model.base_model, head, softcap=_option(config, "final_logit_softcapping"))
        scaled = [name for name in _SCALES if _option(config, name) not in {None, 1}]
        reason = f"it scales its logits ({', '.join(scaled)})" if scaled else teacher._difference(model)
        if reason:
            raise JobError(
                f"{type(model).__qualname__} cannot be taken apart: {reason}. Give the model itself as the teacher, "
                "which needs only more time and memory, or a TeacherWithHead of your own. Nothing was written"
            )
        return teacher

    def hidden(self, *args: Any, **inputs: Any) -> Float[Tensor, "*batch component"]:
        """Give the last hidden states."""
        output = self.body(*args, **inputs)
        if isinstance(output, Tensor):
            return output
        states = getattr(output, "last_hidden_state", None)
        if states is None and isinstance(output, Mapping):
            states = output.get("last_hidden_state")
        if not isinstance(states, Tensor):
            raise JobError(
                f"the body of a TeacherWithHead gave a {type(output).__qualname__} without last_hidden_state; a tensor "
                "of hidden states is needed, or an object or mapping with that. A language model of transformers is "
                "taken apart by TeacherWithHead.from_transformers(model)"
            )
        return states

    def forward(self, *args: Any, **inputs: Any) -> Float[Tensor, "*batch class"]:
        """Give the logits."""
        logits: Tensor = self.head(self.hidden(*args, **inputs))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @property
    def is_linear(self) -> bool:
        """Whether logits are linear in the hidden states."""
        return self.softcap is None

    def linear_head(self, dtype: torch.dtype | None = None) -> Head:
        """Give the head as codecs take it, in the precision that it is run in."""
        weight, bias = self.head.weight.detach(), self.head.bias
        return Head(weight if dtype is None else weight.to(dtype), None if bias is None else bias.detach())

    @torch.inference_mode()
    def _difference(self, model: Any) -> str | None:
        ids = torch.arange(1, 4, device=self.head.weight.device)[None]
        was_training = model.training
        model.eval()
        try:
            ours, theirs = self(input_ids=ids), model(input_ids=ids).logits
        finally:
            model.train(was_training)
        gap = float((ours.float() - theirs.float()).abs().amax())
        return None if gap <= 0.01 * float(theirs.float().abs().amax()) else f"its logits differ by {gap:.3g}"


def _output_embeddings(model: Any) -> Any:
    """Give a model's head; without one there are no logits, only hidden states, and these must not be cached."""
    kind = type(model).__qualname__
    if not all(hasattr(model, name) for name in ("config", "base_model", "get_output_embeddings")):
        raise JobError(
            f"TeacherWithHead.from_transformers takes a causal language model of transformers, got a {kind}. For other "
            "networks give the parts, TeacherWithHead(body, head), or the network itself as the teacher, if it gives "
            "logits. Nothing was written"
        )
    head = model.get_output_embeddings()
    if head is None:
        raise JobError(
            f"{kind} has no head: it gives hidden states, no logits. Give the model with its language head, the "
            "...ForCausalLM (AutoModelForCausalLM.from_pretrained). Nothing was written"
        )
    return head


def _option(config: Any, name: str) -> Any:
    value = getattr(config, name, None)
    return getattr(getattr(config, "text_config", None), name, None) if value is None else value
