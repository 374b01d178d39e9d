"""Mixtral 8x7B: a transformer decoder whose feed-forward layers are sparse mixtures of experts.

In a dense transformer every token passes through the same feed-forward networks, so a larger model
costs more for every token. Mixtral breaks this link: each layer holds eight such networks, called
experts, and a router that sends a token to two of them. The model stores 46.7 billion parameters
and computes with 12.9 billion of them for a token. The rest is an ordinary transformer:

    x = embed_tokens[tokens]
    for each layer:
        x = x + self_attn(input_layernorm(x))
        x = x + block_sparse_moe(post_attention_layernorm(x))    # route, Expert and SparseMoE below
    logits = lm_head(norm(x))

In the shapes of this repository, each letter has one meaning:

    letter  meaning                                   field in config.json       8x7B
    B       rows (sequences) of the batch             -                             -
    S       tokens per row in one call                -                             -
    T       keys per row that queries are compared to -                             -
    N       tokens of all rows, N = B·S               -                             -
    V       size of the vocabulary                    vocab_size                32000
    D       width of a hidden state                   hidden_size                4096
    L       layers                                    num_hidden_layers            32
    H       query heads                               num_attention_heads          32
    K       key/value heads                           num_key_value_heads           8
    d       width of a head                           head_dim                    128
    W       sliding window, in tokens                 sliding_window             null
    C       slots per row of the cache                -                             -
    E       experts per layer                         num_local_experts             8
    A       active experts, those used for a token    num_experts_per_tok           2
    R       tokens routed to one expert               -                             -
    M       inner width of an expert                  intermediate_size         14336
    G       weights that share a scale (in fast/)     -                             -

Parameters: an expert has 3·D·M = 176 million and the attention of a layer 2·D·(H + K)·d = 42
million. Eight experts in each of 32 layers make 45.1 billion, to which attention adds 1.3 and the
embedding and output matrices, 2·V·D, add 0.3. The sum is 46.7 billion, and not the 8 · 7 = 56 of
the name, because only the experts exist eight times; with two per layer it is 12.9 billion. Of
these a token reads all but the embedding, where one row is enough, so 25.5 GB in bfloat16.

Precision: all is computed in, and rounded to, the dtype of the weights, such as bfloat16, except:

    operation                                     computed in            rounded to
    RMSNorm, before it multiplies by its weight   at least float32       dtype of the weights
    rotation of queries and keys                  at least float32       dtype of the weights
    cosine and sine of the rotation               float64, on the CPU    at least float32
    scores and softmax of attention, by PyTorch   at least float32       as PyTorch decides
    softmax of the router                         at least float32       not rounded
    weighted sum over experts                     at least float32       dtype of the weights, once
    logits                                        dtype of the weights   then widened to float32

In a float64 model all of it is float64. "Difference:" marks a result that differs from the released
code by more than rounding. Sources: "Mixtral of Experts" (arxiv.org/abs/2401.04088), here called
the paper; "Mistral 7B" (2310.06825); the released code (github.com/mistralai/mistral-inference).
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass(frozen=True)
class MixtralConfig:
    """Hyperparameters, named as in config.json; the defaults are those of Mixtral 8x7B."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None  # None means hidden_size / num_attention_heads
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 32768  # the context length in training; it is not enforced
    sliding_window: int | None = None  # None: a token sees itself and all earlier tokens
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __post_init__(self):
        check_config(self)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @classmethod
    def from_dict(cls, raw):
        """Read a config.json of transformers 4 (`rope_theta`) or 5 (`rope_parameters`)."""
        rope = (raw.get("rope_parameters") or {}) | (raw.get("rope_scaling") or {})
        kind = raw.get("model_type", "mixtral"), rope.get("type", rope.get("rope_type", "default"))
        if kind != ("mixtral", "default"):
            raise ValueError(f"config: wanted mixtral, rope_type default; got {kind[0]}, {kind[1]}")
        raw = {"rope_theta": rope.get("rope_theta", cls.rope_theta)} | raw
        return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})


def at_least_float32(x):
    """The precision rule: bfloat16 and float16 become float32; float32 and float64 are kept."""
    return x if x.dtype.itemsize >= 4 else x.to(torch.float32)


def route(logits, top_k):
    """The weights and the indices of the experts of each token (the paper, section 2.1).

    logits (N, E) -> (N, A), (N, A)

    The weights are Softmax(TopK(logits)), so they sum to one; the largest comes first.
    `transformers` takes the softmax over all E experts, exp(zᵢ)/Z for logit zᵢ, and divides the
    weights of the chosen by their sum. This is the same, because the common divisor Z cancels.

    Difference: of equal logits the lower index comes first. Mistral's torch.topk promises no order.

    >>> weights, chosen = route(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), top_k=3)
    >>> chosen.tolist(), [round(w, 4) for w in weights[0].tolist()]
    ([[1, 3, 2]], [0.4223, 0.4223, 0.1554])
    """
    sorted_logits, experts = logits.sort(dim=-1, descending=True, stable=True)
    weights = at_least_float32(sorted_logits[:, :top_k]).softmax(dim=-1)
    return weights, experts[:, :top_k]


class Expert(nn.Module):
    """SwiGLU(x) = w2·(silu(w1·x) ⊙ (w3·x)), a feed-forward network with a gate.

    (..., D) -> (..., D)

    w1 is the gate projection (SparseMoE.gate is the router), w3 the up and w2 the down projection.
    If a checkpoint swaps w1 and w3, it loads, because their shapes agree, but computes nonsense.
    """

    def __init__(self, D, M):
        super().__init__()
        self.w1 = nn.Linear(D, M, bias=False)
        self.w2 = nn.Linear(M, D, bias=False)
        self.w3 = nn.Linear(D, M, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SparseMoE(nn.Module):
    """y = Σₑ weightₑ · SwiGLUₑ(x), summed over the A chosen experts e of a token.

    (B, S, D) -> (B, S, D)

    This is the last equation in section 2.1 of the paper. An expert runs once, on all tokens that
    chose it. For 3 tokens, 4 experts and the choices [[1, 3], [0, 1], [3, 2]], the loop is:

        expert 0 runs on token 1            expert 2 runs on token 2
        expert 1 runs on tokens 0 and 1     expert 3 runs on tokens 0 and 2

    No token is dropped, because an expert takes every token that chose it; other implementations
    drop those above a fixed capacity. Padding is routed like any other token, so a short row costs
    as much as the longest of its batch. In training, the router would soon prefer a few experts,
    which would then learn most and be preferred even more; an auxiliary loss that grows when tokens
    are spread unevenly keeps all experts in use (see tiny/train.py).
    """

    def __init__(self, config):
        super().__init__()
        D, E, self.top_k = config.hidden_size, config.num_local_experts, config.num_experts_per_tok
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(Expert(D, config.intermediate_size) for _ in range(E))

    def forward(self, x):
        tokens = x.flatten(0, 1)  # (N, D)
        weights, chosen = route(self.gate(tokens), self.top_k)  # (N, A), (N, A)
        y = torch.zeros_like(at_least_float32(tokens))  # (N, D)
        for e in sorted(set(chosen.flatten().tolist())):
            token, rank = torch.where(chosen == e)  # (R), (R); chosen[token, rank] is e
            output = self.experts[e](tokens[token])  # (R, D)
            y.index_add_(0, token, weights[token, rank, None] * output)  # y[token] += …
        return y.to(x.dtype).view(x.shape)


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · weight, where the quotient is rounded before it is multiplied.

    (..., D) -> (..., D)
    """

    def __init__(self, D, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), eps

    def forward(self, x):
        wide = at_least_float32(x)
        scale = torch.rsqrt((wide * wide).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


def rotation(positions, d, theta):
    """The cosine and sine of the angle p·θ^(−2i/d), for every position p and pair i < d/2.

    positions (B, S) -> (B, S, 1, d/2), (B, S, 1, d/2)

    The axis of size 1 broadcasts over the heads, which all turn by the same angles. These are
    float64, because a float32 angle near position 30,000 is wrong by up to 2e-3 radians, and they
    are computed on the CPU, because not every accelerator has float64.
    """
    frequencies = theta ** (-torch.arange(0, d, 2).double() / d)
    angles = positions.cpu()[:, :, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotary position embedding: turn the pair (x[i], x[i + d/2]) of every head by its angle.

    x (B, S, H, d), cos (B, S, 1, d/2), sin (B, S, 1, d/2) -> (B, S, H, d)

    For keys, K takes the place of H. After the rotation, q·k depends on the two positions only
    through their distance. The released code pairs x[2i] with x[2i + 1] instead, so convert.py,
    like Hugging Face, reorders the rows of Mistral's q_proj and k_proj such that the features of a
    pair lie d/2 apart and q·k is as it was. In the old order the model would compute nonsense.
    """
    first, second = at_least_float32(x).tensor_split(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def visible(queries, keys, window):
    """The mask: a query at position i sees the keys at positions j with i − W < j ≤ i.

    queries (B, S), keys (B, T) -> (B, S, T)

    A query sees at most W keys, its own included, or all j ≤ i if W is None, as in 8x7B. Because
    positions are compared, keys can be in any order, as in Cache, which gives empty slots a −1.

    Difference: the released `moe_one_file_ref.py` lets the queries of a prompt see W + 1 keys.

    >>> visible(torch.tensor([[9]]), torch.tensor([[5, 6, 7, 8, 9, 10, -1]]), window=4).tolist()
    [[[False, True, True, True, True, False, False]]]
    """
    i, j = queries[:, :, None], keys[:, None, :]
    mask = (j >= 0) & (j <= i)
    return mask if window is None else mask & (j > i - window)


def attend(q, k, v, mask):
    """softmax(q·kᵀ/√d)·v over the visible keys, with grouped queries (Mistral 7B, section 2).

    q (B, S, H, d), k (B, T, K, d), v (B, T, K, d), mask (B, 1, S, T) -> (B, S, H·d)

    H/K neighbouring query heads share a key/value head: query head h uses head h // (H/K). The
    cache then takes K/H of the memory that H key/value heads would need.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mixed = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)  # (B, H, S, d)
    return mixed.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """o_proj·attend(q, k, v), where q = q_proj·x and k = k_proj·x are rotated and v = v_proj·x.

    (B, S, D) -> (B, S, D)
    """

    attend = staticmethod(attend)  # so that fast/ can put an equal function here

    def __init__(self, config, layer):
        super().__init__()
        H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        D, self.head_dim, self.layer = config.hidden_size, d, layer
        self.q_proj = nn.Linear(D, H * d, bias=False)
        self.k_proj = nn.Linear(D, K * d, bias=False)
        self.v_proj = nn.Linear(D, K * d, bias=False)
        self.o_proj = nn.Linear(H * d, D, bias=False)

    def forward(self, x, cos, sin, mask, cache=None):
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x).view(heads), cos, sin)  # (B, S, H, d)
        k = rotate(self.k_proj(x).view(heads), cos, sin)  # (B, S, K, d)
        v = self.v_proj(x).view(heads)  # (B, S, K, d)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, T, K, d); with those of earlier calls
        return self.o_proj(self.attend(q, k, v, mask))


class Block(nn.Module):
    """One layer: h = x + attention(norm(x)), then h + moe(norm(h)).

    (B, S, D) -> (B, S, D)
    """

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.block_sparse_moe = SparseMoE(config)

    def forward(self, x, cos, sin, mask, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """All but the output projection; the tokens of row b after the first lengths[b] are padding.

    tokens (B, S), lengths (B) -> (B, S, D)
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        table = torch.rand(config.vocab_size, config.hidden_size)  # nn.Embedding's init is slow
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens, lengths, cache=None):
        (B, S), c = tokens.shape, self.config
        positions = key_positions = torch.arange(S).expand(B, S)
        if cache is not None:
            positions = positions + cache.tokens_read[:, None]
            key_positions = cache.reserve(positions, lengths)  # (B, T); of all keys in the cache
        x = self.embed_tokens(tokens)  # (B, S, D)
        turns = rotation(positions, c.head_dim, c.rope_theta)
        cos, sin = (part.to(at_least_float32(x).dtype).to(x.device) for part in turns)
        mask = visible(positions.to(x.device), key_positions.to(x.device), c.sliding_window)
        for layer in self.layers:
            x = layer(x, cos, sin, mask[:, None], cache)
        return self.norm(x)


class Mixtral(nn.Module):
    """The language model, which gives the logits of the token that follows each token.

    tokens (B, S) -> (B, S, V)

    With a cache, every row continues where its earlier calls ended, and the tokens are read in
    chunks of `cache.chunk`. `lengths` (B) is the number of real tokens of each row. The tokens
    after them are padding, which no real token sees and no cache stores, so a short row gives what
    it would give alone, up to rounding; the logits of padding mean nothing. With `last_only` the
    result is (B, 1, V), for the last real token of each row.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens, cache=None, lengths=None, last_only=False):
        B, S = tokens.shape
        lengths = torch.full((B,), S) if lengths is None else lengths.cpu()
        if cache is not None and (cache.tokens_read + lengths).max() > cache.max_length:
            raise ValueError(f"cache: a row gets more than its {cache.max_length} tokens")
        hidden, chunk = [], (S if cache is None else cache.chunk)
        for start in range(0, S, chunk):
            real = (lengths - start).clamp(0, chunk)  # (B); the rest of the chunk is padding
            hidden.append(self.model(tokens[:, start:start + chunk], real, cache))
        hidden = torch.cat(hidden, dim=1)  # (B, S, D)
        if last_only:
            hidden = torch.stack([hidden[b, n - 1:n] for b, n in enumerate(lengths.clamp(min=1))])
        return at_least_float32(self.lm_head(hidden))

    def new_cache(self, batch_size, max_length, chunk=256):
        """An empty cache for rows of up to `max_length` tokens, read `chunk` tokens at a time."""
        c, weight = self.config, self.lm_head.weight
        C = min(max_length, (c.sliding_window or max_length) + chunk - 1)  # see Cache
        shape = (c.num_hidden_layers, batch_size, C, c.num_key_value_heads, c.head_dim)
        return Cache(weight.new_zeros(shape), weight.new_zeros(shape),
                     torch.full((batch_size, C), -1), max_length, chunk)

    @classmethod
    def from_pretrained(cls, directory, dtype=None, device="cpu"):
        """Load config.json and model*.safetensors. Raises ValueError if they are damaged or unfit.

        With dtype None the weights keep their dtype, and on a CPU they stay mapped from the disk.
        """
        config = MixtralConfig.from_dict(read_json(Path(directory) / "config.json"))
        weights = read_weights(directory)
        return assemble(config, {name: w.to(device, dtype) for name, w in weights.items()})


@dataclass
class Cache:
    """The rolling buffer (Mistral 7B, section 2): position p is stored in slot p mod C.

    keys (L, B, C, K, d), values (L, B, C, K, d), positions (B, C)

    `positions`, which stays on the CPU, holds the position in each slot, and −1 if it is empty. If
    300 tokens are read one by one into C = 128 slots, slot 3 holds position 3, then 131, then 259.

    A chunk is stored before its queries attend, so it must not evict a key that they need. If it
    begins at position s, it evicts positions s − C to s − C + chunk − 1, while its first query
    needs s − W + 1 and later positions. With C = W + chunk − 1 the last one evicted is s − W, just
    too old to be needed. Without a window, or if all fits, C = max_length and nothing is evicted.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    max_length: int
    chunk: int

    @property
    def tokens_read(self):
        """The number of tokens that each row has read in all calls, (B)."""
        return self.positions.amax(dim=1) + 1

    def reserve(self, positions, lengths):
        """Choose the slots that `update` will fill with a chunk; returns the positions of all keys.

        positions (B, S), lengths (B) -> (B, T)
        """
        C, S = self.positions.shape[1], positions.shape[1]
        row, column = torch.where(torch.arange(S) < lengths[:, None])  # the real tokens
        slot = positions[row, column] % C
        self.positions[row, slot] = positions[row, column]
        self.target = [index.to(self.keys.device) for index in (row, column, slot)]
        self.used = int(self.tokens_read.max().clamp(1, C))  # T; one key even if all is padding
        return self.positions[:, :self.used]

    def update(self, layer, k, v):
        """Store a chunk's keys and values in the reserved slots; returns those of all used slots.

        k (B, S, K, d), v (B, S, K, d) -> (B, T, K, d), (B, T, K, d)
        """
        row, column, slot = self.target
        self.keys[layer, row, slot] = k[row, column]
        self.values[layer, row, slot] = v[row, column]
        return self.keys[layer, :, :self.used], self.values[layer, :, :self.used]


def check_config(c):
    """Raises ValueError unless this file can compute such a Mixtral."""
    def check(name, wanted, holds):
        if not holds:
            raise ValueError(f"config: {name} must be {wanted}, got {getattr(c, name)!r:.80}")

    for name, kind in [(f.name, f.type) for f in fields(c) if f.type in (int, float)]:
        check(name, f"a positive {kind.__name__}",
              type(getattr(c, name)) in (int, kind) and getattr(c, name) > 0)
    H, E, W = c.num_attention_heads, c.num_local_experts, c.sliding_window
    d = c.hidden_size // H if c.head_dim is None else c.head_dim
    check("num_experts_per_tok", f"<= num_local_experts {E}", c.num_experts_per_tok <= E)
    check("num_key_value_heads", f"a divisor of {H} query heads", H % c.num_key_value_heads == 0)
    check("head_dim", f"even and > 0, not {d!r:.80}", type(d) is int and d > 0 and d % 2 == 0)
    check("sliding_window", "positive or null", W is None or type(W) is int and W > 0)
    check("tie_word_embeddings", "false", not c.tie_word_embeddings)
    check("hidden_act", "'silu'", c.hidden_act == "silu")


def read_json(path):
    """The object in a JSON file. Raises ValueError if there is none."""
    try:
        return {**json.loads(Path(path).read_text(encoding="utf-8"))}  # TypeError if no object
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as a JSON object: {error}") from None


def read_weights(directory):
    """The tensors of model*.safetensors by name. Raises ValueError if a file is damaged."""
    weights = {}
    for file in sorted(Path(directory).glob("model*.safetensors")):
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: not a complete safetensors file: {error}") from None
        if repeated := weights.keys() & tensors.keys():
            raise ValueError(f"{file}: {min(repeated)} is in an earlier file too")
        weights |= tensors
    if not weights:
        raise ValueError(f"{directory}: no model*.safetensors; see convert.py for other layouts")
    return weights


def assemble(config, weights, adapt=lambda model: None):
    """The model with these weights, which are not copied. Raises ValueError unless they fit.

    `adapt(model)` may exchange layers of the model while it is still empty, on the device "meta".
    """
    last = f"model.layers.{config.num_hidden_layers - 1}."
    expert = f".experts.{config.num_local_experts - 1}."
    if not any(n.startswith(last) and expert in n for n in weights):  # fails before the slow build
        raise ValueError(f"the weights do not fit config.json: {last}*{expert}* is missing")
    with torch.device("meta"):
        model = Mixtral(config)
    adapt(model)
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:2000]
        raise ValueError(f"the weights do not fit config.json: {reason}") from None
    return model.eval().requires_grad_(False)


# Not here, and why: scaled rotations and tied embeddings, because no Mixtral has them; training,
# which is in tiny/train.py; Mistral's own files, which convert.py reads; choosing a token from the
# logits, which generate.py does; and all that makes the same model faster, which is in fast/.
