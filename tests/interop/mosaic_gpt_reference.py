"""MosaicGPT in PyTorch, for the tests: what the hub's code of MPT-1B computes, under its parameter and setting names."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

# The config.json of anas-awadalla/mpt-1b-redpajama-200b; `MosaicGpt` changes the sizes.
HUB: dict[str, Any] = dict(
    alibi=True,
    alibi_bias_max=8,
    architectures=["MosaicGPT"],
    attn_clip_qkv=None,
    attn_impl="torch",
    attn_pdrop=0,
    attn_qk_ln=True,
    attn_uses_sequence_id=False,
    auto_map=dict(AutoConfig="configuration_mosaic_gpt.MosaicGPTConfig", AutoModelForCausalLM="mosaic_gpt.MosaicGPT"),
    d_model=2048,
    emb_init_std=None,
    emb_init_uniform_lim=None,
    emb_pdrop=0,
    embedding_fraction=1.0,
    fan_mode="fan_in",
    hidden_size=2048,
    init_device="cpu",
    init_div_is_residual=True,
    init_gain=0,
    init_nonlinearity="relu",
    init_std=0.02,
    logit_scale=None,
    low_precision_layernorm=True,
    max_seq_len=2048,
    mlp_ratio=4,
    model_type="mosaic_gpt",
    n_heads=16,
    n_layers=24,
    no_bias=True,
    param_init_fn="kaiming_normal_",
    prefix_lm=False,
    resid_pdrop=0,
    softmax_scale=None,
    tokenizer_name="EleutherAI/gpt-neox-20b",
    torch_dtype="float32",
    transformers_version="4.27.4",
    use_cache=False,
    verbose=0,
    vocab_size=50368,
)


def norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, bias=False)


class Layer(nn.Module):
    def __init__(self, said: SimpleNamespace) -> None:
        super().__init__()
        width, hidden = said.d_model, said.mlp_ratio * said.d_model
        self.heads, self.max_bias = said.n_heads, said.alibi_bias_max
        self.ln_1, self.ln_2 = norm(width), norm(width)
        parts = dict(Wqkv=nn.Linear(width, 3 * width, bias=False), out_proj=nn.Linear(width, width, bias=False))
        parts |= dict(q_ln=norm(width), k_ln=norm(width)) if said.attn_qk_ln else {}
        self.attn = nn.ModuleDict(parts)
        self.mlp = nn.ModuleDict(
            dict(mlp_up=nn.Linear(width, hidden, bias=False), mlp_down=nn.Linear(hidden, width, bias=False))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn["Wqkv"](self.ln_1(x)).chunk(3, dim=-1)
        if "q_ln" in self.attn:
            q, k = self.attn["q_ln"](q), self.attn["k_ln"](k)
        q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (q, k, v))
        places = torch.arange(x.shape[1])
        back = places[None, :] - places[:, None]  # from a query to a key: 0 and less for what it may see
        slopes = 2.0 ** -(self.max_bias * torch.arange(1, self.heads + 1) / self.heads)
        bias = (slopes[:, None, None] * back).masked_fill(back > 0, -torch.inf)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.attn["out_proj"](y.transpose(1, 2).flatten(-2))
        return x + self.mlp["mlp_down"](nn.functional.gelu(self.mlp["mlp_up"](self.ln_2(x))))


class MosaicGpt(nn.Module):
    """With as much of the interface of transformers' models as the tests use."""

    def __init__(self, vocabulary: int, **changes: Any) -> None:
        super().__init__()
        sizes = dict(d_model=32, n_heads=4, n_layers=4, max_seq_len=128, vocab_size=vocabulary)
        self.settings = HUB | sizes | changes
        said = SimpleNamespace(**self.settings)
        self.config = SimpleNamespace(hidden_size=said.d_model)
        layers = nn.ModuleList(Layer(said) for _ in range(said.n_layers))
        parts = dict(wte=nn.Embedding(vocabulary, said.d_model), blocks=layers, ln_f=norm(said.d_model))
        self.transformer = nn.ModuleDict(parts)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        """[B, T] -> logits [B, T, V]; the head is the embedding."""
        x = self.transformer["wte"](input_ids)
        for layer in self.transformer["blocks"]:
            x = layer(x)
        return SimpleNamespace(logits=self.transformer["ln_f"](x) @ self.transformer["wte"].weight.T)

    def resize_token_embeddings(self, count: int) -> None:
        old = self.transformer["wte"].weight.data[:count]
        self.transformer["wte"] = nn.Embedding.from_pretrained(torch.cat([old, torch.randn(count - len(old), old.shape[1])]))

    def save_pretrained(self, folder: Path) -> None:
        """As on the hub: a configuration, and a pickle."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.settings))
        torch.save(self.state_dict(), folder / "pytorch_model.bin")
