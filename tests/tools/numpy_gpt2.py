"""GPT-2's forward pass a second time, in plain numpy, from the formulas and the published layout
(weights as (inputs, outputs) matrices, Hugging Face's names): to check bpe_gpt.py against."""

import numpy as np


def layer_norm(x, gain, bias):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return gain * (x - mean) / np.sqrt(variance + 1e-5) + bias


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gpt2(ids, weights, n_layer, n_head):
    """Token numbers (T,) to logits (T, vocab_size), one sequence and one head at a time."""
    w = weights
    x = w["wte.weight"][ids] + w["wpe.weight"][: len(ids)]
    for i in range(n_layer):
        p = f"h.{i}."
        y = layer_norm(x, w[p + "ln_1.weight"], w[p + "ln_1.bias"])
        qkv = y @ w[p + "attn.c_attn.weight"] + w[p + "attn.c_attn.bias"]
        heads = []
        for q, k, v in zip(*(np.split(part, n_head, -1) for part in np.split(qkv, 3, -1))):
            scores = q @ k.T / np.sqrt(q.shape[-1])
            scores[np.triu_indices(len(ids), 1)] = -np.inf
            heads.append(softmax(scores) @ v)
        x = x + np.concatenate(heads, -1) @ w[p + "attn.c_proj.weight"] + w[p + "attn.c_proj.bias"]
        y = layer_norm(x, w[p + "ln_2.weight"], w[p + "ln_2.bias"])
        y = gelu(y @ w[p + "mlp.c_fc.weight"] + w[p + "mlp.c_fc.bias"])
        x = x + y @ w[p + "mlp.c_proj.weight"] + w[p + "mlp.c_proj.bias"]
    x = layer_norm(x, w["ln_f.weight"], w["ln_f.bias"])
    return x @ w.get("lm_head.weight", w["wte.weight"]).T
