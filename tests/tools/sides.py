"""The programs that benchmark.py measures, each in a process of its own."""

import dataclasses
import importlib.util
import json
import multiprocessing
import re
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

# The main process imports torch but never computes, so that measured processes can be forked.
import torch

ROOT = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")


class Side:
    """An object in a process of its own, whose methods this process calls one at a time."""

    def __init__(self, make, *args):
        self.pipe, inner = FORK.Pipe()
        self.process = FORK.Process(target=serve, args=(inner, make, args), daemon=True)
        self.process.start()
        self.peak = 0  # bytes of memory that no file backs, in the calls with `watch`
        self._receive(False)

    def __call__(self, method, *args, watch=False):
        self.pipe.send((method, args))
        return self._receive(watch)

    def _receive(self, watch):
        while watch:
            self.peak = max(self.peak, anonymous_memory(self.process.pid))
            watch = not self.pipe.poll(0.01)
        done, value = self.pipe.recv()
        if not done:
            raise RuntimeError(value)
        return value

    def close(self):
        self.pipe.send(None)
        self.process.join()


def serve(pipe, make, args):
    """Make an object and call its methods as the other process asks."""
    try:
        side = make(*args)
        pipe.send((True, None))
        while request := pipe.recv():
            method, args = request
            pipe.send((True, getattr(side, method)(*args)))
    except Exception:
        pipe.send((False, traceback.format_exc()))


def anonymous_memory(process):
    """Bytes of memory of a process that no file backs; 0 if the system does not say."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


class Language:
    """A model with a clock. A subclass sets `model`, and its `write(tokens, new)` generates."""

    def start_clock(self):
        self.times = []
        self.model.register_forward_hook(lambda *_: self.times.append(time.perf_counter()))
        self.vocab_size = self.model.config.vocab_size

    def run(self, *args):
        """Seconds until the first of `new` tokens per row, and for the others.

        The arguments are those of `write` after its first two, then rows, context and new.
        """
        *variant, rows, context, new = args
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, self.vocab_size, (rows, context), generator=generator)
        self.times = []
        start = time.perf_counter()
        self.write(tokens, new, *variant)
        return self.times[0] - start, self.times[-1] - self.times[0]

    def events(self, context, new):
        """Operations that PyTorch dispatches for one more token, those inside others included."""
        counts = []
        for n in (1, 1 + new):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
                self.run(1, context, n)
            counts.append(len(found.events()))
        return (counts[1] - counts[0]) / new


class Ours(Language):
    """This project or another checkout of it; only interfaces that both have are used."""

    def __init__(self, root, directory, dtype):
        self.load = self.prepare(root)
        self.model = self.load(directory, dtype)
        self.start_clock()

    def prepare(self, root):
        sys.path.insert(0, str(root))
        import generate

        self.generate = generate.generate
        return lambda directory, dtype: generate.load(directory, dtype)[1]

    def write(self, tokens, new):
        self.generate(self.model, tokens.tolist(), new)

    def cache_size(self, length):
        cache = self.model.new_cache(1, length)
        return sum(x.nbytes for x in vars(cache).values() if torch.is_tensor(x) and x.ndim > 2)


class Transformers(Language):
    """transformers; `run` takes the implementations of attention and of the experts."""

    def __init__(self, directory, dtype):
        self.load = self.prepare()
        self.model = self.load(directory, dtype)
        self.start_clock()

    def prepare(self):
        from transformers import AutoModelForCausalLM, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return lambda directory, dtype: AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype).eval()

    @torch.inference_mode()
    def write(self, tokens, new, attention, experts):
        self.model.set_attn_implementation(attention)
        self.model.set_experts_implementation(experts)
        self.model.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                            attention_mask=torch.ones_like(tokens), pad_token_id=0)


class Quality:
    """The score of the embedded model in bfloat16 for held-out stories."""

    def __init__(self, path):
        sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]
        import train

        from fast import int4

        self.int4, self.train = int4, train
        self.stories = train.documents(path, "<|endoftext|>")

    def bits_per_byte(self, G=None, best=True):
        """With a group size, the experts are rounded to 4 bits first, as convert.py does it."""
        from mixtral import Mixtral
        from tokenizer import Tokenizer

        model = Mixtral.from_pretrained(ROOT / "tiny", torch.bfloat16)
        for name, weight in model.named_parameters():
            if G and ".experts." in name:
                divisors = self.int4.DIVISORS if best else [7.5]
                q, scale = self.int4.quantise(weight.float(), G, torch.bfloat16, divisors)
                q = q.unflatten(1, (-1, G)).to(torch.bfloat16)
                weight.data = (q * scale[:, :, None]).flatten(1)
        return self.train.evaluate(model, Tokenizer(ROOT / "tiny"), self.stories)[0]


class Loader:
    """Loads a model in a process that has imported everything but holds no model."""

    def __init__(self, kind, *root):
        self.load = kind.prepare(self, *root)

    def run(self, directory):
        start = time.perf_counter()
        model = self.load(directory, torch.bfloat16)
        seconds = time.perf_counter() - start
        for weight in model.parameters():
            weight.sum()  # reads the mapped file, so that all memory is counted
        return seconds


class LlamaBench:
    """llama.cpp's own benchmark of a GGUF file, one row at a time."""

    def __init__(self, program, file, threads):
        self.command = [program, "-m", str(file), "-t", str(threads), "-r", "1", "-o", "json"]

    def run(self, rows, context, new):
        """As `Language.run`; the first call, with one new token, measures the prompt only."""
        if rows > 1:
            return None
        sizes = (context, 0, 0) if new == 1 else (0, new - 1, context)
        options = [x for name, n in zip(("-p", "-n", "-d"), sizes, strict=True)
                   for x in (name, str(n))]
        done = subprocess.run(self.command + options, capture_output=True, text=True, check=True)
        rate = json.loads(done.stdout)[0]["avg_ts"]
        return (context / rate, 0) if new == 1 else (0, (new - 1) / rate)


class Machine:
    """What this machine can do at best; the best of some runs."""

    def read_rate(self, size):
        """Bytes per second."""
        x = torch.ones(size // 4)
        return x.nbytes / self.fastest(x.sum)

    def product_rate(self, dtype, width):
        """Operations per second of a product of (1024, width) and (width, width)."""
        a, b = torch.ones(1024, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
        return 2 * 1024 * width**2 / self.fastest(lambda: a @ b.mT)

    def fastest(self, function, repeats=5):
        def seconds():
            start = time.perf_counter()
            function()
            return time.perf_counter() - start

        return min(seconds() for _ in range(repeats))

    def make_checkpoint(self, directory, fields):
        """A random bfloat16 checkpoint with a tokenizer, in the Hugging Face layout."""
        sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
        from convert import write_safetensors
        from mixtral import MixtralConfig

        model = random_model(MixtralConfig(**fields))
        directory.mkdir(parents=True)
        write_safetensors(directory / "model.safetensors", dict(model.named_parameters()))
        config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
                  "torch_dtype": "bfloat16"} | dataclasses.asdict(model.config)
        (directory / "config.json").write_text(json.dumps(config))
        shutil.copy(ROOT / "tiny" / "tokenizer.model", directory)

    def make_raw(self, layout, directory, fields):
        """The same weights in one of Mistral's layouts."""
        sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
        import layouts

        from mixtral import MixtralConfig

        getattr(layouts, layout)(random_model(MixtralConfig(**fields)), directory)


def random_model(config):
    """Small random weights in bfloat16."""
    from mixtral import Mixtral

    with torch.device("meta"):
        model = Mixtral(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").requires_grad_(False)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        weight.fill_(1) if "norm" in name else weight.normal_(std=0.02)
    return model


class Tokenizers:
    """Encodes the manual of Python with this project and with sentencepiece."""

    def __init__(self, size):
        sys.path.insert(0, str(ROOT))
        from pydoc_data.topics import topics

        import sentencepiece

        from tokenizer import Tokenizer

        self.path = ROOT / "tiny" / "tokenizer.model"
        if spec := importlib.util.find_spec("mistral_common"):
            self.path = Path(spec.origin).parent / "data" / "tokenizer.model.v1"
        self.text = " ".join(" ".join(topics[name] for name in sorted(topics)).split())[:size]
        self.size = len(self.text.encode()) / 1e6
        self.new, self.peer = Tokenizer, sentencepiece.SentencePieceProcessor()
        self.peer.load(str(self.path))

    def pieces(self):
        return self.peer.vocab_size()

    def run(self):
        """MB/s of this project, cold and warm, and of sentencepiece."""
        ours = self.new(self.path)
        return [self.size / self.seconds(encode)
                for encode in (ours.encode, ours.encode, self.peer.encode)]

    def seconds(self, encode):
        start = time.perf_counter()
        encode(self.text)
        return time.perf_counter() - start
