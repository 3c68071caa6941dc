"""Loading a model from any reference, and the parts of it that probes need."""

import copy
import hashlib
import json
import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lethescope.errors import InputError

logging.getLogger("transformers").setLevel(logging.ERROR)
transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class Anatomy:
    """The parts that every decoder-only language model has: its blocks, its final norm and its unembedding."""

    blocks: tuple[nn.Module, ...]
    norm: nn.Module
    head: nn.Module


@dataclass(frozen=True)
class Model:
    """A language model with its tokenizer, its role in the audit and where it came from."""

    module: Any
    tokenizer: Any
    role: str = "original"
    path: str = "live module"
    approximate: bool = False
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def anatomy(self) -> Anatomy:
        """Blocks, final norm and unembedding."""
        return anatomy(self.module)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The residual blocks, first to last."""
        return self.anatomy.blocks

    @property
    def device(self) -> torch.device:
        """Where inputs must be put."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first weight."""
        return next(self.module.parameters()).dtype

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a SHA-256 over every weight's name, shape, dtype and bytes."""
        return fingerprint(self.module)

    def described(self) -> dict[str, str]:
        """Return what a manifest says of the model: its fingerprint and where it came from."""
        return {"fingerprint": self.fingerprint, "path": self.path}

    @cached_property
    def vocabulary(self) -> str:
        """16 hex digits that are equal for equal vocabularies."""
        return hashlib.sha256(json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def shape(self) -> tuple[int, int, str]:
        """Number of blocks, width, vocabulary: equal for two models whose states can be exchanged."""
        return len(self.blocks), int(self.module.config.hidden_size), self.vocabulary

    def decode(self, state: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest vocab"]:
        """Turn a residual stream into logits: final norm, unembedding, and the caps some families add."""
        config = self.module.config
        head = self.anatomy.head
        logits = head(self.anatomy.norm(state).to(next(head.parameters()).dtype))
        logits = logits * (getattr(config, "logit_scale", None) or 1.0)
        logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def bridge(self) -> Any:
        """Wrap the live module as a TransformerLens `TransformerBridge`, for canonical hook names.

        Raises:
            InputError: transformer-lens is not installed.
        """
        try:
            from transformer_lens.model_bridge import TransformerBridge
        except ImportError as error:
            raise InputError("canonical hooks need transformer-lens: pip install 'lethescope[hooks]'") from error
        name = getattr(self.module.config, "_name_or_path", "") or self.path
        words = copy.deepcopy(self.tokenizer)  # the bridge changes it, and would load another one that adds a BOS
        words.init_kwargs = {"name_or_path": name, **words.init_kwargs, "add_bos_token": True}
        return TransformerBridge.boot_transformers(name, hf_model=self.module, tokenizer=words)


def anatomy(module: Any) -> Anatomy:
    """Find blocks, final norm and unembedding by structure, so that every Hugging Face decoder works.

    The blocks are the outermost `ModuleList` whose length is the configured number of layers; the final norm is the
    norm that stands beside it; the unembedding is what the model itself calls its output embeddings.

    Raises:
        InputError: one of the three is not there, with the name of what was looked for.
    """
    name = type(module).__name__
    config = getattr(module, "config", None)
    layers = getattr(config, "num_hidden_layers", None)
    lists = [(path, m) for path, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not lists:
        raise InputError(f"{name} has no list of {layers} blocks; a decoder-only Hugging Face language model is needed")
    path, blocks = min(lists, key=lambda item: item[0].count("."))
    beside = module.get_submodule(path.rpartition(".")[0]).children()
    norms = [child for child in beside if "norm" in type(child).__name__.lower()]
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    if not norms or head is None:
        raise InputError(f"{name} has no {'final norm' if not norms else 'unembedding'} beside {path}; cannot be read")
    return Anatomy(tuple(blocks), norms[-1], head)


def merged_copy(module: Any) -> Any:
    """Copy a model; an adapter is merged into the copy, so that it can be trained or rounded as one."""
    own = copy.deepcopy(module)
    return own.merge_and_unload() if hasattr(own, "merge_and_unload") else own


def fingerprint(module: nn.Module) -> str:
    """Return 16 hex digits of a SHA-256 over every weight's name, shape, dtype and bytes.

    Raises:
        InputError: a weight holds NaN or infinity; the first one is named.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise InputError(f"weight {name} holds NaN or infinity; nothing measured on this model would mean anything")
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load(
    ref: Any,
    *,
    role: str = "original",
    tokenizer: Any = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> Model:
    """Load a model from a folder, a hub id, a PEFT adapter folder, a `.gguf` file, or take a live module.

    Weights are read from safetensors (or a GGUF file) only: a pickle can run code when it is opened. Adapters stay
    unmerged on their base. GGUF weights are dequantised, and the model is marked approximate.

    Args:
        ref: path, hub id, `Model`, or a live Hugging Face module (then give its `tokenizer`).
        role: what the model is called in results.
        tokenizer: used instead of the one beside the weights.
        device: `auto` takes CUDA when there is one.
        dtype: `auto` is float32 on CPU and bfloat16 on a GPU.
        device_map: handed to transformers, for models larger than one device.
        trust_remote_code: run code that comes with the model. Off unless you say so.

    Raises:
        InputError: there is nothing there, no tokenizer, only a pickle, or a weight is not finite.
    """
    if isinstance(ref, Model):
        return Model(ref.module, ref.tokenizer, role, ref.path, ref.approximate, ref.notes)
    if isinstance(ref, nn.Module):
        if tokenizer is None:
            raise InputError(f"the {role} model is a live module without a tokenizer; give tokenizer=…")
        return Model(ref.eval(), tokenizer, role)
    place = _place(device)
    kind = _dtype(dtype, place)
    path, ref = Path(str(ref)).expanduser(), str(ref)
    options = {"dtype": kind, "device_map": device_map, "trust_remote_code": trust_remote_code}
    if path.suffix == ".gguf":
        module, found = _load_gguf(path, role, options)
    elif (path / "adapter_config.json").is_file():
        module, found = _load_adapter(path, role, options)
    else:
        _check_folder(path, ref, role)
        module, found = _load_plain(ref, role, options), ref
    module.requires_grad_(False).eval()
    if device_map is None:
        module.to(place)
    model = Model(module, tokenizer or _tokenizer(found, ref, role), role, ref, path.suffix == ".gguf")
    _ = model.fingerprint  # refuses weights that are not finite, here rather than in the middle of an audit
    return model


def _place(device: str) -> torch.device:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        return torch.empty(0, device=name).device
    except Exception as error:
        raise InputError(f"device {name!r} cannot be used here ({_first_line(error)}); use auto or cpu") from error


def _dtype(dtype: str | torch.dtype, place: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if place.type == "cpu" else torch.bfloat16
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype):
        raise InputError(f"unknown dtype {dtype!r}; use auto, float32, bfloat16 or float16")
    return named


def _check_folder(path: Path, ref: str, role: str) -> None:
    looks_local = ref.startswith((".", "/", "~")) or ref.count("/") != 1 or path.exists()
    if not looks_local:
        return  # a hub id
    if not path.is_dir():
        raise InputError(
            f"{role} model: there is no folder {ref}; give a Hugging Face folder, a hub id or a .gguf file"
        )
    if not (path / "config.json").is_file():
        raise InputError(f"{role} model: {ref} has no config.json; give the folder that save_pretrained wrote")
    if not list(path.glob("*.safetensors")):
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        if pickles:
            raise InputError(
                f"{role} model: {ref} holds only the pickle {pickles[0]}, which can run code when opened; convert it "
                "where you trust it: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) writes safetensors"
            )
        raise InputError(f"{role} model: {ref} holds no weights (*.safetensors)")


def _load_plain(ref: str, role: str, options: dict[str, Any]) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(ref, use_safetensors=True, **options)
    except Exception as error:
        raise InputError(f"{role} model: cannot load {ref}: {_first_line(error)}") from error


def _load_adapter(path: Path, role: str, options: dict[str, Any]) -> tuple[Any, str]:
    from peft import PeftModel

    try:
        told = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        base = str(told["base_model_name_or_path"])
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{role} model: {path / 'adapter_config.json'} does not name a base model ({error})"
        ) from error
    base = str(path / base) if (path / base).exists() else base
    if base.endswith(".gguf"):
        module, found = _load_gguf(Path(base), role, options)
    else:
        _check_folder(Path(base), base, f"{role} adapter's base")
        module, found = _load_plain(base, role, options), base
    if not list(path.glob("*.safetensors")):
        raise InputError(f"{role} model: adapter {path} holds no adapter_model.safetensors (pickles are refused)")
    try:
        return PeftModel.from_pretrained(module, str(path)), found
    except Exception as error:
        raise InputError(f"{role} model: cannot put adapter {path} on {base}: {_first_line(error)}") from error


def _load_gguf(path: Path, role: str, options: dict[str, Any]) -> tuple[Any, str]:
    if not path.is_file():
        raise InputError(f"{role} model: there is no file {path}")
    try:
        with _bars_on_terminals_only():
            module = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, **options)
    except Exception as error:
        raise InputError(f"{role} model: cannot read {path}: {_first_line(error)}") from error
    for name in ("quantization_config", "_pre_quantization_dtype"):  # the weights are plain tensors now
        if hasattr(module.config, name):
            delattr(module.config, name)
    vars(module).update(hf_quantizer=None, is_quantized=False)
    return module, str(path)


@contextmanager
def _bars_on_terminals_only() -> Generator[None]:
    """Keep transformers' bar over GGUF tensors out of logs."""
    reader: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    shown = reader.tqdm
    reader.tqdm = partial(shown, disable=None)
    try:
        yield
    finally:
        reader.tqdm = shown


def _tokenizer(found: str, ref: str, role: str) -> Any:
    path = Path(found)
    tried: Sequence[tuple[str, dict[str, str]]] = (
        [(str(path.parent), {"gguf_file": path.name})] if path.suffix == ".gguf" else [(ref, {}), (found, {})]
    )
    problem = ""
    for place, options in dict(tried).items():
        if Path(place).is_dir() and not options and not list(Path(place).glob("tokenizer*")):
            problem = "no tokenizer files"
            continue
        try:
            return AutoTokenizer.from_pretrained(place, **options)
        except Exception as error:
            problem = _first_line(error)
    raise InputError(f"{role} model: {ref} has no tokenizer ({problem}); save one beside the weights")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
