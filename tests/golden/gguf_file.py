"""GGUF files for generate.py: the block formats, what their codes mean, and the container. Encoders are plain: blocks are
valid, llama-quantize would choose other scales.

Source of the formats: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and src/ggml-common.h
"""
import struct

import numpy as np
import torch

# Element types by name: number, elements of a block.
TYPES = dict(F32=(0, 1), F16=(1, 1), Q4_0=(2, 32), Q4_1=(3, 32), Q5_0=(6, 32), Q5_1=(7, 32), Q8_0=(8, 32), Q2_K=(10, 256),
             Q3_K=(11, 256), Q4_K=(12, 256), Q5_K=(13, 256), Q6_K=(14, 256), IQ4_NL=(20, 32), IQ4_XS=(23, 256), BF16=(30, 1),
             MXFP4=(39, 32))
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
ALIGN = 32


def half(x):
    return x.astype(np.float16)


def encode(w, kind):
    """The bytes of the matrix `w` (f32), and the numbers that they mean."""
    if kind == "F32":
        return w.astype("<f4").tobytes(), w
    if kind == "F16":
        return half(w).tobytes(), half(w).astype(np.float32)
    if kind == "BF16":
        narrow = torch.from_numpy(w).to(torch.bfloat16)
        return narrow.view(torch.int16).numpy().tobytes(), narrow.float().numpy()
    blocks = w.reshape(-1, TYPES[kind][1]).astype(np.float32)
    coder = dict(Q4_0=signed, Q5_0=signed, Q8_0=signed, Q4_1=ranged, Q5_1=ranged, Q2_K=k_two, Q3_K=k_three, Q4_K=k_ranged,
                 Q5_K=k_ranged, Q6_K=k_signed, IQ4_NL=iq4_nl, IQ4_XS=iq4_xs, MXFP4=mxfp4)[kind]
    parts, means = coder(blocks, int(kind[1]) if kind[0] == "Q" else 4)
    rows = [np.ascontiguousarray(part).view(np.uint8).reshape(len(blocks), -1) for part in parts]
    return np.concatenate(rows, 1).tobytes(), means.astype(np.float32).reshape(w.shape)


def divide(x, by):
    return np.divide(x, by, out=np.zeros(np.broadcast(x, by).shape, np.float32), where=by != 0)


def nibbles(codes):
    """Four bits of 32 codes: the first sixteen are the low halves."""
    return ((codes[:, :16] & 15) | (codes[:, 16:] & 15) << 4).astype(np.uint8)


def fifths(codes):
    """The fifth bits of 32 codes."""
    return np.packbits((codes >> 4).astype(np.uint8), axis=1, bitorder="little")


def signed(x, bits):
    """`d (q - half)`: Q4_0, Q5_0; Q8_0 has signed codes."""
    largest = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)
    middle = 127 if bits == 8 else 1 << bits - 1
    d = half(np.abs(largest) / middle if bits == 8 else largest / -middle)
    wide = d.astype(np.float32)
    codes = np.rint(divide(x, wide)).clip(-middle, middle - (bits != 8)).astype(np.int32)
    means = codes * wide
    if bits == 8:
        return [d, codes.astype(np.int8)], means
    codes += middle
    return [d] + ([fifths(codes)] if bits == 5 else []) + [nibbles(codes)], means


def ranged(x, bits):
    """`d q + m`: Q4_1, Q5_1."""
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    d, m = half((high - low) / ((1 << bits) - 1)), half(low)
    codes = np.rint(divide(x - m.astype(np.float32), d.astype(np.float32))).clip(0, (1 << bits) - 1).astype(np.int32)
    means = codes * d.astype(np.float32) + m.astype(np.float32)
    return [d, m] + ([fifths(codes)] if bits == 5 else []) + [nibbles(codes)], means


def k_ranged(x, bits):
    """`d s q - dmin m` with s and m of six bits for each eighth: Q4_K, Q5_K."""
    parts, top = x.reshape(len(x), 8, 32), (1 << bits) - 1
    low = np.minimum(parts.min(2), 0)
    step = (parts.max(2) - low) / top
    d, dmin = half(step.max(1, keepdims=True) / 63), half(-low.min(1, keepdims=True) / 63)
    wide, wide_min = d.astype(np.float32), dmin.astype(np.float32)
    s = np.rint(divide(step, wide)).clip(0, 63).astype(np.int32)
    m = np.rint(divide(-low, wide_min)).clip(0, 63).astype(np.int32)
    scale, least = (wide * s)[..., None], (wide_min * m)[..., None]
    codes = np.rint(divide(parts + least, scale)).clip(0, top).astype(np.int32)
    packed = np.zeros((len(x), 12), np.uint8)
    packed[:, :4] = s[:, :4] | s[:, 4:] >> 4 << 6
    packed[:, 4:8] = m[:, :4] | m[:, 4:] >> 4 << 6
    packed[:, 8:] = s[:, 4:] & 15 | (m[:, 4:] & 15) << 4
    low_bits = (codes & 15).astype(np.uint8)
    low_bits = low_bits[:, 0::2] | low_bits[:, 1::2] << 4
    # Bit j of byte l is the fifth bit of element l of eighth j.
    high = ((codes >> 4) << np.arange(8)[:, None]).sum(1).astype(np.uint8)
    return [d, dmin, packed] + ([high] if bits == 5 else []) + [low_bits], codes * scale - least


def k_signed(x, _):
    """`d s (q - 32)` with s of eight bits for each sixteenth: Q6_K."""
    parts = x.reshape(len(x), 16, 16)
    largest = np.take_along_axis(parts, np.abs(parts).argmax(2)[..., None], 2)[..., 0] / -32
    d = half(np.abs(largest).max(1, keepdims=True) / 127)
    s = np.rint(divide(largest, d.astype(np.float32))).clip(-127, 127).astype(np.int32)
    scale = (d.astype(np.float32) * s)[..., None]
    codes = np.rint(divide(parts, scale)).clip(-32, 31).astype(np.int32)
    means = codes * scale
    # [half of 128][quarter of 32][element]
    codes = (codes + 32).reshape(len(x), 2, 4, 32)
    low = (codes[:, :, :2] & 15 | (codes[:, :, 2:] & 15) << 4).astype(np.uint8)
    high = (codes >> 4 << np.array([0, 2, 4, 6])[:, None]).sum(2).astype(np.uint8)
    return [low.reshape(len(x), -1), high.reshape(len(x), -1), s.astype(np.int8), d], means


def quarters(codes):
    """Two bits of 256 codes: of each 128, a byte has one of each of four thirty-twos."""
    codes = (codes & 3).reshape(len(codes), 2, 4, 32) << np.array([0, 2, 4, 6])[:, None]
    return codes.sum(2).astype(np.uint8).reshape(len(codes), -1)


def k_two(x, _):
    """`d s q - dmin m` with s and m of four bits for each sixteenth: Q2_K."""
    parts = x.reshape(len(x), 16, 16)
    low = np.minimum(parts.min(2), 0)
    step = (parts.max(2) - low) / 3
    d, dmin = half(step.max(1, keepdims=True) / 15), half(-low.min(1, keepdims=True) / 15)
    wide, wide_min = d.astype(np.float32), dmin.astype(np.float32)
    s = np.rint(divide(step, wide)).clip(0, 15).astype(np.int32)
    m = np.rint(divide(-low, wide_min)).clip(0, 15).astype(np.int32)
    scale, least = (wide * s)[..., None], (wide_min * m)[..., None]
    codes = np.rint(divide(parts + least, scale)).clip(0, 3).astype(np.int32)
    return [(s | m << 4).astype(np.uint8), quarters(codes.reshape(len(x), 256)), d, dmin], codes * scale - least


def k_three(x, _):
    """`d (s - 32) (q - 4)` with s of six bits for each sixteenth: Q3_K."""
    parts = x.reshape(len(x), 16, 16)
    largest = np.take_along_axis(parts, np.abs(parts).argmax(2)[..., None], 2)[..., 0] / -4
    d = half(np.abs(largest).max(1, keepdims=True) / 31)
    s = np.rint(divide(largest, d.astype(np.float32))).clip(-32, 31).astype(np.int32)
    scale = (d.astype(np.float32) * s)[..., None]
    codes = np.rint(divide(parts, scale)).clip(-4, 3).astype(np.int32)
    means = codes * scale
    codes, s = (codes + 4).reshape(len(x), 256), s + 32
    # Bit j of byte l is the third bit of element l of eighth j.
    high = ((codes >> 2).reshape(len(x), 8, 32) << np.arange(8)[:, None]).sum(1).astype(np.uint8)
    low = s[:, :8] & 15 | (s[:, 8:] & 15) << 4
    upper = ((s >> 4).reshape(len(x), 4, 4) << np.array([0, 2, 4, 6])[:, None]).sum(1)
    return [high, quarters(codes), low.astype(np.uint8), upper.astype(np.uint8), d], means


def nearest(x, values):
    return np.abs(x[..., None] - values).argmin(-1).astype(np.uint8)


def iq4_nl(x, _):
    """`d v[q]`: IQ4_NL."""
    d = half(np.abs(x).max(1, keepdims=True) / 120)
    codes = nearest(divide(x, d.astype(np.float32)), IQ4)
    return [d, nibbles(codes)], d.astype(np.float32) * IQ4[codes]


def iq4_xs(x, _):
    """`d (s - 32) v[q]` with s of six bits for each eighth: IQ4_XS."""
    parts = x.reshape(len(x), 8, 32)
    largest = np.abs(parts).max(2) / 120
    d = half(largest.max(1, keepdims=True) / 31)
    # Odd eighths have scales below zero.
    s = np.rint(divide(largest, d.astype(np.float32))).clip(0, 31).astype(np.int32) * np.where(np.arange(8) % 2, -1, 1)
    scale = (d.astype(np.float32) * s)[..., None]
    codes = nearest(divide(parts, scale), IQ4)
    s = s + 32
    high = ((s >> 4) << 2 * np.arange(8)).sum(1, keepdims=True).astype("<u2")
    low = (s[:, ::2] & 15 | (s[:, 1::2] & 15) << 4).astype(np.uint8)
    return [d, high, low, nibbles(codes.reshape(-1, 32)).reshape(len(x), -1)], scale * IQ4[codes]


def mxfp4(x, _):
    """`2^e v[q]`: MXFP4."""
    power = np.floor(np.log2(np.maximum(np.abs(x).max(1, keepdims=True), 1e-30))).astype(np.int32) - 2
    codes = nearest(x / np.exp2(power.astype(np.float32)), E2M1)
    return [(power + 127).astype(np.uint8), nibbles(codes)], np.exp2(power.astype(np.float32)) * E2M1[codes]


# ---------------------------------------------------------------- a model in llama.cpp's words
PARTS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.q_a_proj": "attn_q_a",
         "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
         "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
         "mlp.router": "ffn_gate_inp", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
         "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
         "mlp.shared_experts.down_proj": "ffn_down_shexp"}
ENDS = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight"}
ARCHITECTURES = dict(llama="llama", qwen2="qwen2", qwen3="qwen3", qwen3_moe="qwen3moe", deepseek_v3="deepseek2", gpt_oss="gpt-oss")


def stored(c, plain, kind_of):
    """Tensors by their names in the file: bytes, type and shape; and what they mean, by Hugging Face's names. `kind_of`
    names the type of a matrix in the file; vectors and routers are F32."""
    heads, files, means, stacks = c["num_attention_heads"], {}, {}, {}

    def put(name, w):
        kind = "F32" if w.ndim == 1 or "ffn_gate_inp" in name or name.endswith(".bias") else kind_of(name)
        if w.shape[-1] % TYPES[kind][1]:
            kind = "F16"
        data, meaning = encode(np.ascontiguousarray(w, np.float32), kind)
        files[name] = (data, kind, w.shape)
        return meaning

    for name, w in plain.items():
        w = w.float().numpy()
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        part, _, end = rest.rpartition(".")
        if name in ENDS:
            means[name] = put(ENDS[name], w)
        elif ".experts." in part:
            projection = part.rsplit(".", 1)[1].removesuffix("_proj")
            stacks.setdefault(f"blk.{layer}.ffn_{projection}_exps.{end}", []).append((name, w))
        elif part.endswith("e_score_correction_bias") or rest.endswith("e_score_correction_bias"):
            means[name] = put(f"blk.{layer}.exp_probs_b.bias", w)
        elif part == "self_attn.kv_b_proj":
            nope = c["qk_nope_head_dim"]
            each = w.reshape(heads, -1, w.shape[1])
            keys = put(f"blk.{layer}.attn_k_b.weight", each[:, :nope].transpose(0, 2, 1)).transpose(0, 2, 1)
            values = put(f"blk.{layer}.attn_v_b.weight", each[:, nope:])
            means[name] = np.concatenate([keys, values], 1).reshape(w.shape)
        elif c["model_type"] == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            # Rows that rotate together lie beside each other.
            count = heads if ".q_" in part else c["num_key_value_heads"]
            shape = (count, 2, len(w) // count // 2, *w.shape[1:])
            turned = put(f"blk.{layer}.{PARTS[part]}.{end}", w.reshape(shape).swapaxes(1, 2).reshape(w.shape))
            means[name] = turned.reshape(shape[0], shape[2], 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
        elif rest == "self_attn.sinks":
            means[name] = put(f"blk.{layer}.attn_sinks.weight", w)
        else:
            own = "post_attention_norm" if part.startswith("post") and c["model_type"] == "gpt_oss" else PARTS[part]
            means[name] = put(f"blk.{layer}.{own}.{end}", w)
    for name, members in stacks.items():
        for (own, _), meaning in zip(members, put(name, np.stack([w for _, w in members]))):
            means[own] = meaning
    return files, {name: torch.from_numpy(np.array(w)) for name, w in means.items()}


def numbers(c):
    """The metadata of a configuration, without the architecture's name before the keys."""
    dim = c.get("head_dim", 0)
    own = {"block_count": c["num_hidden_layers"], "embedding_length": c["hidden_size"],
           "feed_forward_length": c["intermediate_size"], "context_length": c["max_position_embeddings"],
           "attention.head_count": c["num_attention_heads"], "attention.head_count_kv": c["num_key_value_heads"],
           "attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]), "rope.freq_base": float(c["rope_theta"]),
           "attention.key_length": dim, "attention.value_length": dim, "rope.dimension_count": dim,
           "rope.dimension_sections": [dim // 2, 0, 0, 0]}
    if "num_experts_per_tok" in c:
        count = c.get("num_experts") or c.get("n_routed_experts") or c["num_local_experts"]
        own.update({"expert_count": count, "expert_used_count": c["num_experts_per_tok"],
                    "expert_feed_forward_length": c.get("moe_intermediate_size", c["intermediate_size"])})
    if c["model_type"] == "gpt_oss":
        scaling = c["rope_scaling"]
        own.pop("rope.dimension_sections")
        own.update({"attention.sliding_window": c["sliding_window"], "rope.scaling.type": "yarn",
                    "rope.scaling.factor": float(scaling["factor"]),
                    "rope.scaling.original_context_length": scaling["original_max_position_embeddings"]})
    if not c.get("norm_topk_prob", True):
        own["expert_weights_norm"] = False
    if "kv_lora_rank" in c:
        nope, rope, value, latent = (c[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
        scaling = c["rope_scaling"]
        own.pop("rope.dimension_sections")
        own.update({"attention.head_count_kv": 1, "attention.key_length": latent + rope, "attention.value_length": latent,
                    "attention.key_length_mla": nope + rope, "attention.value_length_mla": value,
                    "attention.q_lora_rank": c["q_lora_rank"], "attention.kv_lora_rank": latent,
                    "rope.dimension_count": rope, "leading_dense_block_count": c["first_k_dense_replace"],
                    "expert_shared_count": c["n_shared_experts"], "expert_group_count": c["n_group"],
                    "expert_group_used_count": c["topk_group"], "expert_gating_func": 2,
                    "expert_weights_norm": c["norm_topk_prob"], "expert_weights_scale": float(c["routed_scaling_factor"]),
                    "vocab_size": c["vocab_size"], "rope.scaling.type": "yarn",
                    "rope.scaling.factor": float(scaling["factor"]),
                    "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
                    "rope.scaling.yarn_log_multiplier": 0.1 * scaling["mscale_all_dim"]})
    return own


def value(v):
    """Type and bytes of a value of the metadata."""
    text = lambda s: struct.pack("<Q", len(s.encode())) + s.encode()
    if isinstance(v, bool):
        return 7, struct.pack("<?", v)
    if isinstance(v, Short):
        return 2, struct.pack("<H", v)
    if isinstance(v, int):
        return 4, struct.pack("<I", v)
    if isinstance(v, float):
        return 6, struct.pack("<f", v)
    if isinstance(v, str):
        return 8, text(v)
    kind = value(v[0])[0] if v else 8
    kind = 5 if kind == 4 else kind
    items = b"".join(struct.pack("<i", x) if kind == 5 else value(x)[1] for x in v)
    return 9, struct.pack("<IQ", kind, len(v)) + items


def write(path, c, files, tokens, template, parts=1):
    """Tensors, numbers and vocabulary as a file, or as several, as gguf-split makes them; what other tools add besides is
    there, too."""
    architecture = ARCHITECTURES[c["model_type"]]
    metadata = {"general.architecture": architecture, "general.type": "model", "general.name": path.parent.name,
                "general.file_type": 1, "general.quantization_version": 2, "general.size_label": "tiny",
                "general.tags": ["test"], "quantize.imatrix.file": "none.dat", "quantize.imatrix.chunks_count": 1}
    metadata.update({f"{architecture}.{key}": v for key, v in numbers(c).items()})
    metadata.update({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": tokens,
                     "tokenizer.ggml.token_type": [3] * 4 + [1] * (len(tokens) - 4), "tokenizer.ggml.merges": [],
                     "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 3,
                     "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": template})
    if parts == 1:
        return container(path, metadata, files)
    names = list(files)
    each = -(-len(names) // parts)
    for part in range(parts):
        split = {"split.no": Short(part), "split.count": Short(parts), "split.tensors.count": len(names)}
        own = {name: files[name] for name in names[part * each : (part + 1) * each]}
        whole = path.with_name(f"{path.stem}-{part + 1:05}-of-{parts:05}.gguf")
        container(whole, split if part else metadata | split, own)


class Short(int):
    """A number of sixteen bits."""


def container(path, metadata, files):
    string = lambda s: value(s)[1]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(files), len(metadata))
    for key, v in metadata.items():
        kind, data = value(v)
        head += string(key) + struct.pack("<I", kind) + data
    body = b""
    for name, (data, kind, shape) in files.items():
        body += b"\0" * (-len(body) % ALIGN)
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), TYPES[kind][0], len(body))
        body += data
    path.write_bytes(head + b"\0" * (-len(head) % ALIGN) + body)
