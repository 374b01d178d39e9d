"""The programs that benchmark.py measures, each in a process of its own."""

import importlib.util
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


class Side:
    """An object in a process of its own, whose methods this process calls one at a time."""

    pools = []  # so that they live until Python ends them in order

    def __init__(self, make, *args):
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.pools.append(self.pool)
        self.pool.submit(create, make, args).result()

    def __call__(self, method, *args, **options):
        return self.pool.submit(call, method, args, options).result()

    def close(self):
        self.pool.shutdown()


def create(make, args):
    global side
    side = make(*args)


def call(method, args, options):
    return getattr(side, method)(*args, **options)


def seconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


class Language:
    """A model with a clock. A subclass has `load`, which sets `model`, and `write`."""

    def __init__(self, directory, dtype):
        self.load_seconds = seconds(self.load, directory, dtype)
        self.model.register_forward_hook(lambda *_: self.times.append(time.perf_counter()))

    def seconds_to_load(self):
        return self.load_seconds

    def run(self, rows, context, new, **variant):
        """Seconds until the first token of each row or, if new > 1, from there to the last."""
        torch.manual_seed(0)
        tokens = torch.randint(3, self.model.config.vocab_size, (rows, context))
        self.times = [time.perf_counter()]
        self.write(tokens, new, **variant)
        return self.times[-1] - self.times[0 if new == 1 else 1]


class Ours(Language):
    """This project or another checkout of it; only interfaces that both have are used."""

    def __init__(self, root, directory, dtype):
        sys.path.insert(0, str(root))
        import generate

        self.generate = generate
        super().__init__(directory, dtype)

    def load(self, directory, dtype):
        self.model = self.generate.load(directory, dtype, "cpu")[1]

    def write(self, tokens, new):
        self.generate.generate(self.model, tokens.tolist(), new)


class Transformers(Language):
    """transformers, with one of its implementations of the experts."""

    def __init__(self, directory, dtype):
        from transformers import AutoModelForCausalLM, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.kind = AutoModelForCausalLM
        super().__init__(directory, dtype)

    def load(self, directory, dtype):
        self.model = self.kind.from_pretrained(directory, dtype=dtype).eval()

    @torch.inference_mode()
    def write(self, tokens, new, experts):
        self.model.set_experts_implementation(experts)
        self.model.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                            attention_mask=torch.ones_like(tokens), pad_token_id=0)


class LlamaBench:
    """llama.cpp's own benchmark of a GGUF file, for one row."""

    def __init__(self, program, file):
        self.command = [program, "-m", str(file), "-t", str(torch.get_num_threads()),
                        "-r", "1", "-o", "json"]

    def run(self, rows, context, new):
        """As `Language.run`."""
        sizes = {"-p": context, "-n": 0} if new == 1 else {"-p": 0, "-n": new - 1, "-d": context}
        options = [str(word) for pair in sizes.items() for word in pair]
        done = subprocess.run(self.command + options, capture_output=True, text=True, check=True)
        rate = json.loads(done.stdout)[0]["avg_ts"]
        return (new - 1 or context) / rate


class Machine:
    """Measures this machine, and makes checkpoints."""

    def __init__(self):
        sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

    def read_rate(self, size):
        """Bytes per second that a sum reads from memory, in the best of five runs."""
        x = torch.ones(size // 4)
        return x.nbytes / min(seconds(x.sum) for _ in range(5))

    def make_checkpoint(self, directory, fields):
        """A random bfloat16 checkpoint with a tokenizer, in the Hugging Face layout."""
        from conftest import save

        save(random_model(fields), directory, architectures=["MixtralForCausalLM"],
             torch_dtype="bfloat16")
        shutil.copy(ROOT / "tiny" / "tokenizer.model", directory)

    def make_raw(self, directory, fields):
        """The same weights in Mistral's layout, in one file of torch.save."""
        import layouts

        layouts.mistral_pickle(random_model(fields), directory)


def random_model(fields):
    """Small random weights in bfloat16."""
    from mixtral import Mixtral, MixtralConfig

    with torch.device("meta"):
        model = Mixtral(MixtralConfig(**fields)).to(torch.bfloat16)
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

        from sentencepiece import SentencePieceProcessor

        from tokenizer import Tokenizer

        self.path = ROOT / "tiny" / "tokenizer.model"
        if spec := importlib.util.find_spec("mistral_common"):
            self.path = Path(spec.origin).parent / "data" / "tokenizer.model.v1"
        self.text = " ".join(" ".join(topics[name] for name in sorted(topics)).split())[:size]
        self.new, self.peer = Tokenizer, SentencePieceProcessor(model_file=str(self.path))

    def run(self):
        """MB/s of this project, cold and warm, and of sentencepiece."""
        ours, size = self.new(self.path), len(self.text.encode()) / 1e6
        return [size / seconds(encode, self.text)
                for encode in (ours.encode, ours.encode, self.peer.encode)]
