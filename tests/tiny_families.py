"""Tiny random models of the families whose heads or layers differ, each built in well under a second."""

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 101
LAYERS = 4
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def _configs() -> dict[str, PreTrainedConfig]:
    return {
        "llama": LlamaConfig(**_SIZES, tie_word_embeddings=False),
        "llama_tied": LlamaConfig(**_SIZES, tie_word_embeddings=True),
        "mistral": MistralConfig(**_SIZES, sliding_window=3, tie_word_embeddings=False),
        "qwen3": Qwen3Config(
            **_SIZES,
            head_dim=8,
            use_sliding_window=True,
            sliding_window=3,
            layer_types=_MIXED,
            tie_word_embeddings=True,
        ),
        "gemma2": Gemma2Config(**_SIZES, head_dim=8, final_logit_softcapping=2.0, sliding_window=3, layer_types=_MIXED),
        "gemma3": Gemma3TextConfig(
            **_SIZES, head_dim=8, final_logit_softcapping=2.0, sliding_window=3, layer_types=_MIXED
        ),
        # With a vision tower of as many layers, and the text's configuration nested in the model's.
        "gemma3_vision": Gemma3Config(
            text_config={**_SIZES, "head_dim": 8, "sliding_window": 3, "layer_types": _MIXED},
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            },
            mm_tokens_per_image=4,
            image_token_index=VOCABULARY - 1,
        ),
        "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=LAYERS, n_head=4, eos_token_id=2),
        "phi": PhiConfig(**_SIZES, tie_word_embeddings=False),
        "cohere": CohereConfig(**_SIZES, logit_scale=0.25),
        "granite": GraniteConfig(**_SIZES, logits_scaling=3.0),
        "qwen3_moe": Qwen3MoeConfig(
            **_SIZES,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            mlp_only_layers=[1],
            tie_word_embeddings=False,
        ),
        "mixtral": MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
    }


FAMILIES = sorted(_configs())


def tiny_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 5, **changes: object) -> PreTrainedModel:
    """A random model of ``family``; ``changes`` are attributes of its configuration."""
    config = _configs()[family]
    for name, value in changes.items():
        setattr(config, name, value)
    return randomised(config, dtype, seed)


def randomised(config: PreTrainedConfig, dtype: torch.dtype = torch.float64, seed: int = 5) -> PreTrainedModel:
    """Every parameter random, also those that start at zero or one: biases and norms must matter in a comparison."""
    torch.manual_seed(seed)
    # The default kernel for experts takes no float64.
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **experts)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model.eval()


def packed_batch() -> dict[str, torch.Tensor]:
    """Two rows of 16 tokens; the first holds documents of 6 and 10 tokens, the second one of 16."""
    input_ids = torch.randint(3, VOCABULARY - 1, (2, 16), generator=torch.Generator().manual_seed(7))
    position_ids = torch.stack([torch.cat([torch.arange(6), torch.arange(10)]), torch.arange(16)])
    valid_mask = torch.ones(2, 16, dtype=torch.bool)
    valid_mask[:, -1] = False
    valid_mask[0, 5] = False
    return {"input_ids": input_ids, "position_ids": position_ids, "valid_mask": valid_mask}
