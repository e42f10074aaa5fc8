"""Greedy generation of answers in batches."""

import itertools
import math
from collections.abc import Callable

import torch
import transformers

from bilevel.data.tokenise import Prompt


@torch.no_grad()
def generate(
    model: transformers.PreTrainedModel,
    prompts: list[Prompt],
    max_new_tokens: int,
    batch_size: int,
    done: Callable[[int], object] = lambda count: None,
) -> list[list[int]]:
    """The token ids generated greedily after each prompt, without the stop token.

    An answer is shorter than max_new_tokens if the model has no positions left. Answers do not depend on batch_size.
    done is called with the number of prompts finished. Sets the model to evaluation mode and changes its
    generation_config; draws no random numbers.
    """
    device, positions = next(model.parameters()).device, getattr(model.config, "max_position_embeddings", None)
    model.eval()
    model.generation_config = (
        transformers.GenerationConfig()
    )  # otherwise its values would fill in what is not given below
    longest = math.inf if positions is None else positions
    rooms = [max(0, min(max_new_tokens, longest - len(prompt.ids))) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (rooms[i], prompts[i].stop, -len(prompts[i].ids)))
    for (room, stop), group in itertools.groupby(order, key=lambda i: (rooms[i], prompts[i].stop)):
        places = [i for i in group if room and prompts[i].ids]
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            new = _generate(model, [prompts[i].ids for i in part], room, stop, device)
            for i, ids in zip(part, new.tolist(), strict=True):
                answers[i] = ids[: ids.index(stop)] if stop in ids else ids
            done(len(part))
    return answers


def _generate(
    model: transformers.PreTrainedModel, prompts: list[list[int]], room: int, stop: int, device: torch.device
) -> torch.Tensor:
    """New tokens (B, at most room); prompts are padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[stop] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    config = transformers.GenerationConfig(
        max_new_tokens=room, do_sample=False, eos_token_id=stop, pad_token_id=stop, use_cache=True
    )
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:]
