"""A second implementation of Mixtral, as slow and plain as possible: one Python float at a time.

`trace(config, weights, tokens)` takes the fields of config.json as a dict and the tensors of a
checkpoint as nested lists. It returns every intermediate of one row of tokens as nested lists. It
shares no code with mixtral.py and imports nothing but `math`. Python's floats are float64, and
`math.fsum` rounds a sum only once.
"""

import math

# The axes of every quantity of a trace by the last word of its name, in the order of computation
# and in the letters of mixtral.py. The output of layer N, `model.layers.N`, is listed as `layer`.
AXES = {
    "embed_tokens": "B S D", "input_layernorm": "B S D", "q_proj": "B S H·d", "k_proj": "B S K·d",
    "v_proj": "B S K·d", "q_rotated": "B S H d", "k_rotated": "B S K d", "scores": "B H S T",
    "probabilities": "B H S T", "mixed": "B S H d", "o_proj": "B S D", "residual": "B S D",
    "post_attention_layernorm": "B S D", "gate": "N E", "margin": "N", "chosen": "N A",
    "weights": "N A", "tokens": "R", "w1": "R M", "w3": "R M", "hidden": "R M", "w2": "R D",
    "block_sparse_moe": "B S D", "layer": "B S D", "norm": "B S D", "lm_head": "B S V"}


def word(name):
    """The last word of a name, as AXES has it."""
    last = name.rpartition(".")[2]
    return "layer" if last.isdecimal() else last


def axes(name):
    """The axes of a quantity as a list of letters. Raises KeyError for an unknown name."""
    return ["B", "S"] if name == "tokens" else AXES[word(name)].split()


def product(matrix, vector):
    """matrix · vector."""
    return [math.fsum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def add(a, b):
    """The sum of two vectors."""
    return [x + y for x, y in zip(a, b, strict=True)]


def rms_norm(vector, weight, eps):
    """x / √(mean(x²) + ε) · weight."""
    root = math.sqrt(math.fsum(x * x for x in vector) / len(vector) + eps)
    return [w * x / root for w, x in zip(weight, vector, strict=True)]


def softmax(scores):
    """Positive numbers with the sum 1, in the ratios of the exponentials of the scores."""
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / math.fsum(powers) for power in powers]


def rotate(head, position, theta):
    """Turn the pair (xᵢ, xᵢ₊d/2) of a head by the angle position · θ^(−2i/d)."""
    half, result = len(head) // 2, list(head)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(head))
        a, b = head[i], head[i + half]
        result[i] = a * math.cos(angle) - b * math.sin(angle)
        result[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return result


def split_heads(vector, count):
    """A vector cut into equal heads."""
    d = len(vector) // count
    return [vector[n * d:(n + 1) * d] for n in range(count)]


def score(q, key, i, j, window):
    """q·k/√d, or −∞ if the query at position i does not see the key at position j."""
    if j > i or (window is not None and j <= i - window):
        return -math.inf
    return math.fsum(a * b for a, b in zip(q, key, strict=True)) / math.sqrt(len(q))


def attention(config, weights, name, xs, first_position, trace):
    """The output for each token; `name` ends in a dot. All intermediates are put into `trace`."""
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    for projection in ("q_proj", "k_proj", "v_proj"):
        trace[name + projection] = [product(weights[f"{name}{projection}.weight"], x) for x in xs]
    for letter, count in (("q", H), ("k", K)):
        trace[f"{name}{letter}_rotated"] = [
            [rotate(head, first_position + i, config["rope_theta"])
             for head in split_heads(x, count)]
            for i, x in enumerate(trace[f"{name}{letter}_proj"])]
    queries, keys = trace[name + "q_rotated"], trace[name + "k_rotated"]
    values = [split_heads(x, K) for x in trace[name + "v_proj"]]
    # Query head h uses key/value head h // (H/K).
    trace[name + "scores"] = [
        [[score(q[h], key[h // (H // K)], i, j, config["sliding_window"])
          for j, key in enumerate(keys)] for i, q in enumerate(queries)] for h in range(H)]
    trace[name + "probabilities"] = [
        [softmax(row) for row in head] for head in trace[name + "scores"]]
    trace[name + "mixed"] = [
        [product(zip(*(value[h // (H // K)] for value in values), strict=True),
                 trace[name + "probabilities"][h][i]) for h in range(H)] for i in range(len(xs))]
    trace[name + "o_proj"] = [
        product(weights[name + "o_proj.weight"], sum(heads, [])) for heads in trace[name + "mixed"]]
    return trace[name + "o_proj"]


def expert(weights, name, xs, trace):
    """w2·(silu(w1·x) ⊙ w3·x) for each token of one expert."""
    trace[name + "w1"] = [product(weights[name + "w1.weight"], x) for x in xs]
    trace[name + "w3"] = [product(weights[name + "w3.weight"], x) for x in xs]
    trace[name + "hidden"] = [
        [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
        for gate, up in zip(trace[name + "w1"], trace[name + "w3"], strict=True)]
    trace[name + "w2"] = [product(weights[name + "w2.weight"], x) for x in trace[name + "hidden"]]
    return trace[name + "w2"]


def route(logits, top_k):
    """The best experts of a token, their weights, and [margin], or [] if all experts are chosen.

    The weights follow the other of two equal definitions: the softmax over all experts, divided by
    its sum over the chosen ones. Of equal logits, the expert with the lower index comes first. The
    margin is the logit of the last chosen expert minus that of the first expert not chosen.
    """
    probabilities = softmax(logits)
    best = sorted(range(len(logits)), key=lambda e: (-logits[e], e))
    total = math.fsum(probabilities[e] for e in best[:top_k])
    margin = [logits[best[top_k - 1]] - logits[best[top_k]]] if top_k < len(best) else []
    return best[:top_k], [probabilities[e] / total for e in best[:top_k]], margin


def mixture(config, weights, name, xs, trace):
    """The output of the sparse mixture for each token; `name` ends in a dot."""
    trace[name + "gate"] = [product(weights[name + "gate.weight"], x) for x in xs]
    routes = [route(logits, config["num_experts_per_tok"]) for logits in trace[name + "gate"]]
    if any(margin for *_, margin in routes):
        trace[name + "margin"] = [margin[0] for *_, margin in routes]
    trace[name + "chosen"] = [chosen for chosen, *_ in routes]
    trace[name + "weights"] = [share for _, share, _ in routes]
    ys = [[0.0] * len(xs[0]) for _ in xs]
    for e in range(config["num_local_experts"]):
        tokens = [n for n, (chosen, *_) in enumerate(routes) if e in chosen]
        if tokens:
            trace[f"{name}experts.{e}.tokens"] = tokens
            outputs = expert(weights, f"{name}experts.{e}.", [xs[n] for n in tokens], trace)
            for n, output in zip(tokens, outputs, strict=True):
                share = routes[n][1][routes[n][0].index(e)]
                ys[n] = add(ys[n], [share * y for y in output])
    trace[name.removesuffix(".")] = ys
    return ys


def trace(config, weights, tokens, first_position=0):
    """Every intermediate of one row of tokens by name, in the order of computation.

    The axes are those of AXES without B. The token with index i stands at position
    `first_position` + i, and there are no tokens before the first.
    """
    found = {"model.embed_tokens": [weights["model.embed_tokens.weight"][t] for t in tokens]}
    xs = found["model.embed_tokens"]

    def norm(name, rows):
        weight = weights[name + ".weight"]
        found[name] = [rms_norm(x, weight, config["rms_norm_eps"]) for x in rows]
        return found[name]

    def add_rows(name, rows, more):
        found[name] = [add(x, y) for x, y in zip(rows, more, strict=True)]
        return found[name]

    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        xs = add_rows(f"{layer}.residual", xs, attention(
            config, weights, f"{layer}.self_attn.", norm(f"{layer}.input_layernorm", xs),
            first_position, found))
        xs = add_rows(layer, xs, mixture(
            config, weights, f"{layer}.block_sparse_moe.",
            norm(f"{layer}.post_attention_layernorm", xs), found))
    found["lm_head"] = [product(weights["lm_head.weight"], x) for x in norm("model.norm", xs)]
    return found


def logits(config, weights, tokens):
    """The logits after each token of one row, as a list of lists."""
    return trace(config, weights, tokens)["lm_head"]
