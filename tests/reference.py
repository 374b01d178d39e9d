"""Mixtral a second time, one number at a time: plain Python floats, no cache, no torch, no sharing.

`logits(config, weights, tokens)` takes the fields of config.json as a dict and the checkpoint's
tensors as nested lists. It is float64 because Python's floats are, and slow on purpose.
"""

import math


def times(matrix, vector):
    return [math.fsum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def plus(a, b):
    return [x + y for x, y in zip(a, b, strict=True)]


def norm(vector, weight, eps):
    root = math.sqrt(math.fsum(x * x for x in vector) / len(vector) + eps)
    return [w * x / root for w, x in zip(weight, vector, strict=True)]


def softmax(scores):
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / math.fsum(powers) for power in powers]


def turned(head, position, theta):
    half, out = len(head) // 2, list(head)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(head))
        a, b = head[i], head[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def heads(vector, count):
    d = len(vector) // count
    return [vector[n * d:(n + 1) * d] for n in range(count)]


def attention(config, w, xs):
    H, K, W = (config[f] for f in ("num_attention_heads", "num_key_value_heads", "sliding_window"))
    theta, out = config["rope_theta"], []
    queries = [[turned(h, p, theta) for h in heads(times(w["q_proj"], x), H)]
               for p, x in enumerate(xs)]
    keys = [[turned(h, p, theta) for h in heads(times(w["k_proj"], x), K)]
            for p, x in enumerate(xs)]
    values = [heads(times(w["v_proj"], x), K) for x in xs]
    for i in range(len(xs)):
        joined = []
        for n in range(H):
            shared, q = n // (H // K), queries[i][n]
            seen = [j for j in range(i + 1) if W is None or j > i - W]
            scores = [math.fsum(a * b for a, b in zip(q, keys[j][shared], strict=True))
                      / math.sqrt(len(q)) for j in seen]
            shares = softmax(scores)
            joined += times(zip(*(values[j][shared] for j in seen), strict=True), shares)
        out.append(times(w["o_proj"], joined))
    return out


def expert(w1, w2, w3, x):
    gate, up = times(w1, x), times(w3, x)
    return times(w2, [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)])


def mixture(config, weights, prefix, x):
    """All experts' softmax, the best k, renormalised: the other of the two equal definitions."""
    shares = softmax(times(weights[prefix + "gate.weight"], x))
    best = sorted(range(len(shares)), key=lambda e: (-shares[e], e))[:config["num_experts_per_tok"]]
    out = [0.0] * len(x)
    for e in best:
        w1, w2, w3 = (weights[f"{prefix}experts.{e}.{w}.weight"] for w in ("w1", "w2", "w3"))
        share = shares[e] / math.fsum(shares[b] for b in best)
        out = plus(out, [share * y for y in expert(w1, w2, w3, x)])
    return out


def logits(config, weights, tokens):
    """The logits after each of one row's tokens, as a list of lists."""
    eps = config["rms_norm_eps"]
    xs = [weights["model.embed_tokens.weight"][token] for token in tokens]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        w = {n: weights[f"{at}self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj",
                                                              "o_proj")}
        normed = [norm(x, weights[at + "input_layernorm.weight"], eps) for x in xs]
        xs = [plus(x, y) for x, y in zip(xs, attention(config, w, normed), strict=True)]
        normed = [norm(x, weights[at + "post_attention_layernorm.weight"], eps) for x in xs]
        xs = [plus(x, mixture(config, weights, at + "block_sparse_moe.", h))
              for x, h in zip(xs, normed, strict=True)]
    return [times(weights["lm_head.weight"], norm(x, weights["model.norm.weight"], eps))
            for x in xs]
