"""A few held-out samples with what the policy picks in them, for the report's page."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selkd.data.batching import collate
from selkd.data.samples import SampleDataset
from selkd.maths.chunked import chunked_entropy
from selkd.models.head import evaluating, head_of, hidden_states
from selkd.recipe import PositionOptions
from selkd.selection.noise import position_uniforms
from selkd.selection.positions import select


def selected_examples(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: SampleDataset,
    positions: PositionOptions,
    n_classes: int,
    seed: int,
    count: int = 3,
) -> dict[str, Any]:
    """The first ``count`` samples' tokens, the student's entropy at each position, and which positions are selected.

    Index t is about token t+1. Entropies are exact, in the student's own dtype; ``random`` shows step 0's choice.
    """
    group = [samples[index] for index in range(min(count, len(samples)))]
    batch = {name: tensor.to(student.device) for name, tensor in collate(group, int(tokenizer.pad_token_id)).items()}
    valid_mask = batch["valid_mask"]
    with evaluating(student):
        hidden = hidden_states(student, batch["input_ids"], batch["position_ids"])
    entropies = torch.zeros(valid_mask.shape, device=student.device)
    entropies[valid_mask] = chunked_entropy(hidden[valid_mask], head_of(student).narrowed(n_classes)).float()
    scores = entropies
    if positions.policy == "random":
        ids, mask = batch["sample_ids"].cpu().numpy(), valid_mask.cpu().numpy()
        scores = torch.from_numpy(position_uniforms(seed, ids, mask, "positions", 0)).to(student.device)
    selected = select(positions.policy, scores, valid_mask, positions.fraction) > 0
    return {
        "metric": "student_entropy",
        "samples": [
            {
                "sample_id": sample.id.hex(),
                "tokens": [tokenizer.decode([token]) for token in sample.token_ids.tolist()],
                "scores": [
                    round(value, 4) if valid else None
                    for value, valid in zip(entropies[row].tolist(), valid_mask[row].tolist(), strict=True)
                ][: len(sample.token_ids)],
                "selected": selected[row].tolist()[: len(sample.token_ids)],
                "valid": valid_mask[row].tolist()[: len(sample.token_ids)],
            }
            for row, sample in enumerate(group)
        ],
    }
