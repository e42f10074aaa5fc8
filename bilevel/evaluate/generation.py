"""Greedy generation of answers in batches."""

import itertools
import math
from collections.abc import Callable

import torch
import transformers

from bilevel.data.tokenise import Prompt
from bilevel.model.response_end import stop_tokens


@torch.no_grad()
def generate(
    model: transformers.PreTrainedModel,
    prompts: list[Prompt],
    max_new_tokens: int,
    batch_size: int,
    done: Callable[[int], object] = lambda count: None,
) -> list[list[int]]:
    """The token ids generated greedily after each prompt, without the stop token.

    Generation stops at the tokens of the model's own generation_config, as it will for the model's users. An answer is
    shorter than max_new_tokens, too, if the model has no positions left. Answers do not depend on batch_size. done is
    called with the number of prompts finished. Sets the model to evaluation mode; draws no random numbers.
    """
    device, positions = next(model.parameters()).device, getattr(model.config, "max_position_embeddings", None)
    stops = set(stop_tokens(model.generation_config))
    model.eval()
    longest = math.inf if positions is None else positions
    rooms = [max(0, min(max_new_tokens, longest - len(prompt.ids))) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (rooms[i], -len(prompts[i].ids)))
    for room, group in itertools.groupby(order, key=lambda i: rooms[i]):
        places = [i for i in group if room and prompts[i].ids]
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            new = _generate(model, [prompts[i].ids for i in part], room, sorted(stops), device)
            for i, ids in zip(part, new.tolist(), strict=True):
                answers[i] = list(itertools.takewhile(lambda token: token not in stops, ids))
            done(len(part))
    return answers


def _generate(
    model: transformers.PreTrainedModel, prompts: list[list[int]], room: int, stops: list[int], device: torch.device
) -> torch.Tensor:
    """New tokens (B, at most room); prompts are padded on the left."""
    width, pad = max(map(len, prompts)), stops[0] if stops else 0
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    config = transformers.GenerationConfig(
        max_new_tokens=room, do_sample=False, eos_token_id=stops or None, pad_token_id=pad, use_cache=True
    )
    own, model.generation_config = model.generation_config, transformers.GenerationConfig()  # or it fills in its values
    try:
        return model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:]
    finally:
        model.generation_config = own
