"""Random checkpoints of one shape for `baton bench decode`, as mlx_lm writes them: DIR/bf16, and DIR/4bit in MLX's affine form.

    PYTHON benches/peers/mlx_checkpoint.py DIR [--layers 6] [--hidden 512] [--vocabulary 16000]    # a Python that has mlx-lm

The 4-bit one has f32 scales where MLX runs on its CPU library, which sums in the type of the activations."""
import argparse
import importlib
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("dir", type=Path)
parser.add_argument("--layers", type=int, default=6)
parser.add_argument("--hidden", type=int, default=512)
parser.add_argument("--vocabulary", type=int, default=16000)
args = parser.parse_args()

config = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": args.layers, "hidden_size": args.hidden,
    "intermediate_size": 3 * args.hidden, "num_attention_heads": args.hidden // 64, "num_key_value_heads": args.hidden // 128,
    "head_dim": 64, "vocab_size": args.vocabulary, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None,
    "max_position_embeddings": 4096, "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False,
}
on_cpu = mx.default_device().type == mx.DeviceType.cpu
for name, dtype, bits in [("bf16", "bfloat16", None), ("4bit", "float32" if on_cpu else "bfloat16", 4)]:
    mx.random.seed(1)
    family = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = family.Model(family.ModelArgs.from_dict(config))
    model.set_dtype(getattr(mx, dtype))
    own = {**config, "torch_dtype": dtype}
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
        own["quantization"] = own["quantization_config"] = {"group_size": 64, "bits": bits}
    folder = args.dir / name
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(own, indent=1))
    print(folder)
