"""Small random models that several test files use, and programs that run beside the tests."""

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor

# The tensors of the tests are small. More threads would mostly wait for each other, on a busy
# machine for very long. The programs that tests start inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from convert import write_safetensors
from mixtral import Mixtral, MixtralConfig

SMALL = {"vocab_size": 37, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
         "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 5,
         "rope_theta": 100.0}


def random_model(seed=0, dtype=torch.float64, **changes):
    """A model whose weights are so large that every term of the forward pass matters."""
    torch.manual_seed(seed)
    model = Mixtral(MixtralConfig(**SMALL | changes)).to(dtype).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name
                     else torch.randn_like(weight) * weight.shape[1] ** -0.5)
    return model


def save(model, directory, **changes):
    """Write a Hugging Face directory: model.safetensors and a config.json with these changes."""
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", model.state_dict())
    config = {"model_type": "mixtral"} | dataclasses.asdict(model.config) | changes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def checkpoint(tmp_path):
    """The directory of a saved `random_model()`."""
    return save(random_model(), tmp_path / "model")


# ------------------------------------------------------------------ beside the tests


WORKER, BESIDE = ThreadPoolExecutor(1), {}


def pytest_configure(config):
    config.addinivalue_line("markers", "beside(run): start the function before all tests")
    config.addinivalue_line("markers", "claim: one of the claims in tests/README.md")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Start the functions of the marks `beside` in a thread, one after another.

    They only wait for programs that they start. So these run while the tests do, on another core.
    """
    for item in () if session.config.option.collectonly else session.items:
        for mark in item.iter_markers("beside"):
            if mark.kwargs["run"] not in BESIDE:
                BESIDE[mark.kwargs["run"]] = WORKER.submit(mark.kwargs["run"])


def pytest_sessionfinish():
    WORKER.shutdown(wait=False, cancel_futures=True)


@pytest.fixture
def beside(request):
    """What the function of the test's mark `beside` has returned."""
    return BESIDE[request.node.get_closest_marker("beside").kwargs["run"]].result()


@pytest.fixture
def verdict(tmp_path, capsys):
    """A function that runs tests/oracle/compare.py and returns its exit code and its text.

    Ours is the name of a golden file or a path, theirs a dict of tensors or a path.
    """
    import compare  # here, because it needs the paths that pytest sets
    import golden

    def run(ours, theirs, *options):
        if isinstance(theirs, dict):
            write_safetensors(tmp_path / "theirs", {n: x.contiguous() for n, x in theirs.items()})
            theirs = tmp_path / "theirs"
        ours = golden.HERE / f"{ours}.safetensors" if isinstance(ours, str) else ours
        code = compare.main([str(ours), str(theirs), *map(str, options)])
        out, error = capsys.readouterr()
        return code, out + error
    return run
