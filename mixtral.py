"""Mixtral 8x7B: a transformer decoder whose feed-forward layers are sparse mixtures of experts.

In a dense transformer every token passes through the same feed-forward networks, so a larger model
costs more for every token. Mixtral breaks this link: each layer holds eight such networks, called
experts, and a router that sends a token to two of them. The model stores 46.7 billion parameters
and computes with 12.9 billion of them for a token. The rest is an ordinary transformer:

    x = embed_tokens[tokens]
    for each layer:
        x = x + self_attn(input_layernorm(x))
        x = x + block_sparse_moe(post_attention_layernorm(x))    # the sparse mixture of experts
    logits = lm_head(norm(x))

In the shapes of this repository, each letter has one meaning:

    letter  meaning                                   field in config.json       8x7B
    B       rows (sequences) of the batch             -                             -
    S       tokens per row of a call, or of a chunk   -                             -
    T       keys per row that queries can attend to   -                             -
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
    G       neighbouring weights with one scale       -                             -

Parameters: an expert has 3·D·M = 176 million and the attention of a layer 2·D·(H + K)·d = 42
million. Eight experts in each of 32 layers make 45.1 billion, attention adds 1.3 billion and the
two vocabulary matrices 2·V·D = 0.3 billion, together 46.7. This is less than 8 · 7 because only the
experts are there eight times. With two of the eight experts the same sum is 12.9 billion. A token
looks up one row of the embedding and reads the other 12.75 billion, or 25.5 GB in bfloat16.

Precision: the weights have one dtype, such as bfloat16, and results are rounded to it unless the
table says otherwise. In a float64 model everything is float64.

    operation                                     computed in            rounded to
    linear layer, attention, silu, residual sum   dtype of the weights   dtype of the weights
    RMSNorm, before it multiplies by its weight   at least float32       dtype of the weights
    rotation of queries and keys                  at least float32       dtype of the weights
    cosine and sine of the rotation               float64, on the CPU    at least float32
    softmax of the router                         at least float32       not rounded
    weighted sum over experts                     at least float32       dtype of the weights, once
    logits                                        dtype of the weights   widened to float32

"Difference:" marks a result that differs from the released code by more than rounding.

Sources: "Mixtral of Experts" (arxiv.org/abs/2401.04088), here called the paper; "Mistral 7B"
(arxiv.org/abs/2310.06825); the released code (github.com/mistralai/mistral-inference).
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class MixtralConfig:
    """Hyperparameters, named as in config.json; the defaults are those of Mixtral 8x7B.

    Raises ValueError for values that make no Mixtral.
    """

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
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        check_config(self)

    @classmethod
    def from_dict(cls, raw):
        """Read a config.json of transformers 4 (`rope_theta`) or 5 (`rope_parameters`)."""
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        model, kind = raw.get("model_type", "mixtral"), rope.get("rope_type", rope.get("type"))
        if model != "mixtral" or kind not in (None, "default"):
            raise ValueError("config: wanted model_type 'mixtral' and rope_type 'default', got "
                             f"{model!r} and {kind!r}")
        raw = {"rope_theta": rope.get("rope_theta", cls.rope_theta)} | raw
        return cls(**{f.name: raw[f.name] for f in dataclasses.fields(cls) if f.name in raw})


def at_least_float32(x):
    """The precision rule: bfloat16 and float16 become float32; float32 and float64 are kept."""
    return x if x.dtype.itemsize >= 4 else x.to(torch.float32)


def route(logits, top_k):
    """The weights and the indices of the experts of each token (the paper, section 2.1).

    logits (N, E) -> (N, A), (N, A)

    The weights are Softmax(TopK(logits)), the largest first, so they sum to one. `transformers`
    takes the softmax over all E experts, keeps the largest A and divides them by their sum. The
    result is the same, because the sum Z of exp(z) over all E experts cancels:

        (exp(zᵢ)/Z) / (Σⱼ exp(zⱼ)/Z) = exp(zᵢ) / Σⱼ exp(zⱼ), where j runs over the chosen experts

    Difference: of equal logits, the expert with the lower index comes first, because the sort is
    stable. The released code uses torch.topk, which promises no order.

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

    w1 is the gate projection, w3 the up projection and w2 the down projection. The router, which is
    called `gate` in SparseMoE, is another gate. Because w1 and w3 have the same shape, a checkpoint
    in which they are exchanged loads without an error.
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

    This is the last equation in section 2.1 of the paper. Each expert that was chosen runs once, on
    all tokens that chose it. For 3 tokens, 4 experts and A = 2, the choices
    [[1, 3], [0, 1], [3, 2]] give this loop:

        expert 0 runs on token 1            expert 2 runs on token 2
        expert 1 runs on tokens 0 and 1     expert 3 runs on tokens 0 and 2

    No token is dropped, because an expert takes every token that chose it. Implementations that
    give each expert a buffer for a fixed number of tokens, a capacity factor times the average
    A·N/E, lose its output for a token that finds the buffer full. Padding is routed like any other
    token, so a short row costs as much as the longest row of its batch.

    Left to itself in training, the router would soon prefer a few experts, which would then learn
    the most and be preferred even more. An auxiliary loss that grows when the tokens are spread
    unevenly keeps all experts in use; tiny/train.py has it.
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
            token, rank = torch.where(chosen == e)  # (R), (R); e is choice number `rank` of `token`
            output = weights[token, rank, None] * self.experts[e](tokens[token])  # (R, D)
            y.index_add_(0, token, output)  # y[token] += output
        return y.to(x.dtype).view(x.shape)


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · weight.

    (..., D) -> (..., D)

    As in the released code, the quotient is rounded to the dtype of x before it is multiplied.
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

    Keys have K heads instead of H. The product of a rotated query and a rotated key depends on
    their positions only through the distance between them.

    The released code pairs the neighbours x[2i] and x[2i + 1] instead. The rows of q_proj and
    k_proj in Hugging Face's checkpoints are reordered to match, so q·k is the same. Mistral's own
    weights would load and run without this reordering, which convert.py does, but write nonsense.
    """
    first, second = at_least_float32(x).tensor_split(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def visible(queries, keys, window):
    """The mask: a query at position i sees the keys at positions j with i − W < j ≤ i.

    queries (B, S), keys (B, T) -> (B, S, T)

    `queries` and `keys` hold positions. A query sees at most W keys, its own included; if W is
    None, it sees all j ≤ i. The position −1 marks an empty slot of the cache, which no query sees.
    Because positions are compared, the keys can be in any order, as in a rolling buffer.

    Difference: in `moe_one_file_ref.py` of the released code, a query sees W + 1 keys while a
    prompt is read.

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
    cache then takes K/H of the memory that H key/value heads would need. In bfloat16, PyTorch
    computes scores and softmax in float32 and may round the probabilities.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mixed = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)  # (B, H, S, d)
    return mixed.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """o_proj·attend(q, k, v), where q = q_proj·x and k = k_proj·x are rotated and v = v_proj·x.

    (B, S, D) -> (B, S, D)

    With a cache, queries also attend to the keys and values of earlier calls.
    """

    attend = staticmethod(attend)  # fast/ replaces it by an equal function that is quicker

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
            k, v = cache.update(self.layer, k, v)  # (B, T, K, d)
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
    """Everything except the output projection; returns the final hidden states.

    tokens (B, S), lengths (B) -> (B, S, D)

    `lengths` counts the real tokens of each row, from which the cache knows what is padding.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens, lengths, cache=None):
        (B, S), c = tokens.shape, self.config
        positions = key_positions = torch.arange(S).expand(B, S)
        if cache is not None:
            positions = positions + cache.tokens_read[:, None]
            key_positions = cache.reserve(positions, lengths)  # (B, T)
        x = self.embed_tokens(tokens)  # (B, S, D)
        cos, sin = (part.to(at_least_float32(x).dtype).to(x.device)
                    for part in rotation(positions, c.head_dim, c.rope_theta))
        mask = visible(positions.to(x.device), key_positions.to(x.device), c.sliding_window)
        for layer in self.layers:
            x = layer(x, cos, sin, mask[:, None], cache)
        return self.norm(x)


class Mixtral(nn.Module):
    """The language model: the logits of the token that follows each token.

    tokens (B, S) -> (B, S, V)
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens, cache=None, lengths=None, last_only=False):
        """The logits (B, S, V), or with `last_only` (B, 1, V), widened to at least float32.

        With a cache, every row continues where its earlier calls ended, and the tokens are read in
        chunks of `cache.chunk`. `lengths` (B) is the number of real tokens of each row. The tokens
        after them are padding, which no real token sees and no cache stores, so a short row gives
        what it would give alone, up to rounding. `last_only` selects the last real token of each
        row. The logits of padding or of an empty row mean nothing.
        """
        B, S = tokens.shape
        lengths = torch.full((B,), S) if lengths is None else lengths.cpu()
        if cache is not None:
            cache.check_room(lengths)
        chunk, hidden = S if cache is None else cache.chunk, []
        for start in range(0, S, chunk):
            real = (lengths - start).clamp(0, chunk)  # (B); how many of this chunk are not padding
            hidden.append(self.model(tokens[:, start:start + chunk], real, cache))
        hidden = torch.cat(hidden, dim=1)  # (B, S, D)
        if last_only:
            ends = lengths.clamp(min=1).tolist()
            hidden = torch.stack([row[n - 1:n] for row, n in zip(hidden, ends, strict=True)])
        return at_least_float32(self.lm_head(hidden))

    def new_cache(self, batch_size, max_length, chunk=256):
        """An empty cache for rows of up to `max_length` tokens, read `chunk` tokens at a time."""
        c, weight = self.config, self.lm_head.weight
        C = min(max_length, (c.sliding_window or max_length) + chunk - 1)
        shape = (c.num_hidden_layers, batch_size, C, c.num_key_value_heads, c.head_dim)
        return Cache(weight.new_zeros(shape), weight.new_zeros(shape),
                     torch.full((batch_size, C), -1), max_length, chunk)

    @classmethod
    def from_pretrained(cls, directory, dtype=None, device="cpu"):
        """Load a directory in the Hugging Face layout: config.json and model*.safetensors.

        With dtype None the weights keep their dtype, and on a CPU they stay memory-mapped files.
        Raises ValueError if a file is damaged or if the weights do not fit config.json.
        """
        config = MixtralConfig.from_dict(read_json(Path(directory) / "config.json"))
        weights = read_weights(directory)
        model = empty_model(config, weights)
        return assign(model, {name: w.to(device, dtype) for name, w in weights.items()})


@dataclass
class Cache:
    """The rolling buffer (Mistral 7B, section 2): position p is stored in slot p mod C.

    keys (L, B, C, K, d), values (L, B, C, K, d), positions (B, C)

    `positions` holds the position in each slot, and −1 in an empty slot. It stays on the CPU, where
    tokens can be counted without waiting for another device. If 300 tokens are read one by one into
    C = 128 slots, slot 3 holds position 3, then 131, and finally 259.

    A chunk is stored before its queries attend, so it must not evict a key that they need. If it
    begins at position s, its first query needs position s − W + 1, and its last key evicts position
    s + chunk − 1 − C. With C = W + chunk − 1 this is s − W, which no query needs any more, and the
    other keys evict older ones. For W = 128 and a chunk of 64 tokens from s = 1000 on, C is 191.
    The chunk evicts positions 809 to 872, and its first query needs 873 to 1000. If all max_length
    tokens fit, or if there is no window, C = max_length and nothing is ever evicted.
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

    def check_room(self, lengths):
        """Raises ValueError unless each row can read so many more tokens (B)."""
        room = self.max_length - self.tokens_read
        if len(lengths) != len(room) or (lengths > room).any():
            raise ValueError(f"cache: it has room for {room.tolist()} more tokens in its rows, got "
                             f"{lengths.tolist()}; make one of this size with new_cache")

    def reserve(self, positions, lengths):
        """Give a slot to each real token of a chunk; returns the positions in all used slots.

        positions (B, S), lengths (B) -> (B, T)

        Padding gets no slot, so no later query can see it.
        """
        row, column = torch.where(torch.arange(positions.shape[1]) < lengths[:, None])
        slot = positions[row, column] % self.positions.shape[1]
        self.positions[row, slot] = positions[row, column]
        self.target = [index.to(self.keys.device) for index in (row, column, slot)]
        self.used = int(self.tokens_read.max().clamp(1, self.positions.shape[1]))  # T
        return self.positions[:, :self.used]

    def update(self, layer, k, v):
        """Store the keys and values of a chunk; returns those in all used slots.

        k (B, S, K, d), v (B, S, K, d) -> (B, T, K, d), (B, T, K, d)
        """
        row, column, slot = self.target
        self.keys[layer, row, slot] = k[row, column]
        self.values[layer, row, slot] = v[row, column]
        return self.keys[layer, :, :self.used], self.values[layer, :, :self.used]


# ------------------------------------------------------------------ loading


def check_config(c):
    """Raises ValueError naming the first field that no Mixtral has."""
    def check(name, wanted, holds):
        if not holds:
            raise ValueError(f"config: {name} must be {wanted}, got {getattr(c, name)!r:.80}")

    for name, kind in [(f.name, f.type) for f in dataclasses.fields(c) if f.type in (int, float)]:
        number = isinstance(getattr(c, name), int | kind)
        check(name, f"a positive {kind.__name__}", number and getattr(c, name) > 0)
    H, E, W = c.num_attention_heads, c.num_local_experts, c.sliding_window
    check("num_experts_per_tok", f"<= num_local_experts {E}", c.num_experts_per_tok <= E)
    check("num_key_value_heads", f"a divisor of {H} query heads", H % c.num_key_value_heads == 0)
    check("head_dim", "even and positive", c.head_dim > 0 and c.head_dim % 2 == 0)
    check("sliding_window", "null or a positive int", W is None or isinstance(W, int) and W > 0)
    check("hidden_act", "'silu'", c.hidden_act == "silu")
    check("tie_word_embeddings", "false", c.tie_word_embeddings is False)


def read_json(path):
    """The object in a JSON file. Raises ValueError if there is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def read_weights(directory):
    """The tensors of model*.safetensors by name, mapped from disk. Raises ValueError."""
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
        raise ValueError(f"{directory}: no model*.safetensors there; for Mistral's own files, run "
                         f"python convert.py --input_dir {directory} --output_dir converted")
    return weights


def empty_model(config, names):
    """A model without numbers, for weights of these names. Raises ValueError for other sizes."""
    last = f"model.layers.{config.num_hidden_layers - 1}."
    expert = f".experts.{config.num_local_experts - 1}."
    if not any(name.startswith(last) and expert in name for name in names):
        raise ValueError(f"the weights do not fit config.json: {last}*{expert}* is missing")
    with torch.device("meta"), WithoutInitialisation():
        return Mixtral(config)


class WithoutInitialisation(TorchFunctionMode):
    """Leaves new weights as they are; on "meta", initialising them would import a compiler."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        skipped = function in (nn.init.normal_, nn.init.kaiming_uniform_)
        return None if skipped else function(*args, **kwargs or {})


def assign(model, weights):
    """The model with these weights, which are not copied. Raises ValueError unless they fit."""
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the weights do not fit config.json: {reason:.2000}") from None
    dtypes = {str(weight.dtype) for weight in weights.values() if weight.is_floating_point()}
    if len(dtypes) > 1:
        raise ValueError(f"the weights have the dtypes {', '.join(sorted(dtypes))}; choose one")
    return model.eval().requires_grad_(False)
