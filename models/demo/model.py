"""The Qwen3 architecture in plain PyTorch, small enough to read. Used by train.py and evaluate.py.

Parameter names and layout are those of Qwen3ForCausalLM in Hugging Face transformers, so a state_dict saved from here
loads there; evaluate.py --check compares the logits.
"""
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 5
    num_attention_heads: int = 8
    num_key_value_heads: int = 4  # divisible by 4: tensor parallel over 4 ranks
    head_dim: int = 64
    intermediate_size: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096

    def hf(self, bos, eos, pad):
        """config.json of the Hugging Face layout."""
        c = asdict(self)
        theta = c.pop("rope_theta")
        return c | {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
            "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
            "initializer_range": 0.02, "use_cache": True, "tie_word_embeddings": True,
            "rope_theta": theta, "rope_scaling": None, "use_sliding_window": False,
            "sliding_window": None, "max_window_layers": self.num_hidden_layers,
            "torch_dtype": "bfloat16", "bos_token_id": bos, "eos_token_id": eos,
            "pad_token_id": pad,
        }

    @classmethod
    def load(cls, directory):
        c = json.loads((Path(directory) / "config.json").read_text())
        return cls(**{k: c[k] for k in cls.__dataclass_fields__})


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def rope(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q, k, v, mask):
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
    # written out: on CPU this trains faster under torch.compile than the fused kernel
    s = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    return s.masked_fill(~mask, -1e9).softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(q, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x, cos, sin, mask, cache):
        B, T, _ = x.shape
        heads = lambda y: y.view(B, T, -1, self.c.head_dim)
        q = rope(self.q_norm(heads(self.q_proj(x))), cos, sin).transpose(1, 2)
        k = rope(self.k_norm(heads(self.k_proj(x))), cos, sin).transpose(1, 2)
        v = heads(self.v_proj(x)).transpose(1, 2)
        if cache is not None:
            if cache:
                k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)
            cache[:] = [k, v]
        n = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(n, 1), v.repeat_interleave(n, 1)
        y = attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, *args):
        x = x + self.self_attn(self.input_layernorm(x), *args)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Qwen3(nn.Module):
    """forward() gives hidden states; logits() the tied output head."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.model = Decoder(c)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        for l in self.model.layers:
            for w in (l.self_attn.o_proj.weight, l.mlp.down_proj.weight):
                nn.init.normal_(w, std=0.02 / math.sqrt(2 * c.num_hidden_layers))
        inv = c.rope_theta ** (-torch.arange(0, c.head_dim, 2).float() / c.head_dim)
        f = torch.outer(torch.arange(c.max_position_embeddings).float(), inv)
        self.register_buffer("cos", f.cos()[:, None], persistent=False)
        self.register_buffer("sin", f.sin()[:, None], persistent=False)

    def forward(self, ids, mask=None, pos=None, caches=None, start=0):
        x = self.model.embed_tokens(ids)
        if torch.is_autocast_enabled("cpu") or x.dtype == torch.bfloat16:
            x = x.to(torch.bfloat16)
        if pos is None:
            pos = torch.arange(start, start + ids.shape[1], device=ids.device)
        cos, sin = self.cos[pos].to(x.dtype), self.sin[pos].to(x.dtype)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, mask, None if caches is None else caches[i])
        return self.model.norm(x)

    def logits(self, x):
        return F.linear(x, self.model.embed_tokens.weight)
