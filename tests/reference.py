"""Mixtral a second time, one number at a time: plain Python floats, no cache, no torch, no sharing.

`trace(config, weights, tokens)` takes the fields of config.json as a dict and the checkpoint's
tensors as nested lists, and gives every intermediate under the names of generate.py's traces, for
one row and without the axis B. It is float64 because Python's floats are, and slow on purpose.
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


def share(config, q, keys, i):
    """Scores of one query head at position i, −∞ where it must not look, and their softmax."""
    W = config["sliding_window"]
    scores = [math.fsum(a * b for a, b in zip(q, key, strict=True)) / math.sqrt(len(q))
              if j <= i and (W is None or j > i - W) else -math.inf for j, key in enumerate(keys)]
    return scores, softmax(scores)


def attention(config, weights, at, xs, seen):
    H, K, theta = (config[f] for f in ("num_attention_heads", "num_key_value_heads", "rope_theta"))
    for name in ("q_proj", "k_proj", "v_proj"):
        seen[at + name] = [times(weights[f"{at}{name}.weight"], x) for x in xs]
    for name, count in (("q", H), ("k", K)):
        seen[f"{at}{name}_rotated"] = [
            [turned(head, p, theta) for head in heads(x, count)]
            for p, x in enumerate(seen[f"{at}{name}_proj"])]
    values, keys = [heads(x, K) for x in seen[at + "v_proj"]], seen[at + "k_rotated"]
    both = [[share(config, q[n], [key[n // (H // K)] for key in keys], i)
             for i, q in enumerate(seen[at + "q_rotated"])] for n in range(H)]
    seen[at + "scores"] = [[scores for scores, _ in row] for row in both]
    seen[at + "probabilities"] = [[shares for _, shares in row] for row in both]
    seen[at + "mixed"] = [
        [times(zip(*(value[n // (H // K)] for value in values), strict=True), both[n][i][1])
         for n in range(H)] for i in range(len(xs))]
    seen[at + "o_proj"] = [times(weights[at + "o_proj.weight"], sum(x, [])) for x in
                           seen[at + "mixed"]]
    return seen[at + "o_proj"]


def expert(weights, at, xs, seen):
    seen[at + "w1"] = [times(weights[at + "w1.weight"], x) for x in xs]
    seen[at + "w3"] = [times(weights[at + "w3.weight"], x) for x in xs]
    seen[at + "hidden"] = [
        [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
        for gate, up in zip(seen[at + "w1"], seen[at + "w3"], strict=True)]
    seen[at + "w2"] = [times(weights[at + "w2.weight"], x) for x in seen[at + "hidden"]]
    return seen[at + "w2"]


def route(logits, k):
    """All experts' softmax, the best k, renormalised: the other of the two equal definitions."""
    shares = softmax(logits)
    best = sorted(range(len(shares)), key=lambda e: (-logits[e], e))
    total = math.fsum(shares[e] for e in best[:k])
    margin = [logits[best[k - 1]] - logits[best[k]]] if k < len(best) else []
    return best[:k], [shares[e] / total for e in best[:k]], margin


def mixture(config, weights, at, xs, seen):
    seen[at + "gate"] = [times(weights[at + "gate.weight"], x) for x in xs]
    routes = [route(logits, config["num_experts_per_tok"]) for logits in seen[at + "gate"]]
    if any(margin for *_, margin in routes):
        seen[at + "margin"] = [margin[0] for *_, margin in routes]
    seen[at + "chosen"] = [chosen for chosen, *_ in routes]
    seen[at + "weights"] = [w for _, w, _ in routes]
    out = [[0.0] * len(xs[0]) for _ in xs]
    for e in range(config["num_local_experts"]):
        hits = [n for n, (chosen, *_) in enumerate(routes) if e in chosen]
        if hits:
            seen[f"{at}experts.{e}.tokens"] = hits
            ys = expert(weights, f"{at}experts.{e}.", [xs[n] for n in hits], seen)
            for n, y in zip(hits, ys, strict=True):
                weight = routes[n][1][routes[n][0].index(e)]
                out[n] = plus(out[n], [weight * v for v in y])
    seen[at.removesuffix(".")] = out
    return out


def trace(config, weights, tokens):
    """Every intermediate of one row of tokens by name, in the order of computation."""
    eps, seen = config["rms_norm_eps"], {}
    seen["model.embed_tokens"] = xs = [weights["model.embed_tokens.weight"][t] for t in tokens]

    def normed(name, rows):
        seen[name] = [norm(x, weights[name + ".weight"], eps) for x in rows]
        return seen[name]

    def added(name, rows, more):
        seen[name] = [plus(x, y) for x, y in zip(rows, more, strict=True)]
        return seen[name]

    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        xs = added(f"{at}.residual", xs, attention(
            config, weights, f"{at}.self_attn.", normed(f"{at}.input_layernorm", xs), seen))
        xs = added(at, xs, mixture(
            config, weights, f"{at}.block_sparse_moe.",
            normed(f"{at}.post_attention_layernorm", xs), seen))
    seen["lm_head"] = [times(weights["lm_head.weight"], x) for x in normed("model.norm", xs)]
    return seen


def logits(config, weights, tokens):
    """The logits after each of one row's tokens, as a list of lists."""
    return trace(config, weights, tokens)["lm_head"]
