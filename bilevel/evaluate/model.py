"""The model to evaluate, on its device, with its tokeniser."""

import dataclasses
from typing import TYPE_CHECKING, Any

from bilevel.run.libraries import quiet_libraries
from bilevel.settings.fields import Settings

if TYPE_CHECKING:
    from bilevel.data.sources import Source


def load_copy(settings: Settings, files: list["Source"]) -> tuple[Any, Any]:
    """A TorchCopy of the model settings.model_name_or_path, also one under an adapter, and its Tokeniser.

    Raises UserError.
    """
    import torch

    from bilevel.data.tokenise import make_tokeniser
    from bilevel.model.adapters import put_on
    from bilevel.model.check import check_model
    from bilevel.model.copies import chosen_dtype
    from bilevel.model.frozen_base import loading_arguments
    from bilevel.model.loading import load_model, load_tokenizer, model_shape
    from bilevel.model.pretrained import base_of
    from bilevel.model.torch_copy import TorchCopy

    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, dtype = base_of(settings.model_name_or_path), chosen_dtype(settings, device)
    tokenizer = load_tokenizer(settings, files)
    tokeniser = make_tokeniser(tokenizer, settings)
    plain = dataclasses.replace(settings, model_name_or_path=base or settings.model_name_or_path, lora_rank=None)
    shape = model_shape(plain)
    check_model(plain, shape)
    stored = loading_arguments(plain, shape, dtype, device) if base else None
    model = load_model(plain, shape, tokenizer, stored=stored).to(device)
    if base:
        put_on(model, settings.model_name_or_path)
    return TorchCopy(model, bf16=dtype == "bf16"), tokeniser
