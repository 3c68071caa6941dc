"""Tests of loading: what can be loaded is the same model, what cannot is refused in one line."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lethescope.errors import InputError
from lethescope.models import Model, anatomy, fingerprint, load, merged_copy

KINDS = ("llama", "gpt2", "neox")
PROMPT = "Ada Rook was born in"


@pytest.fixture
def saved(make_model: Callable[..., Model], tmp_path: Path) -> Path:
    """A folder that save_pretrained wrote."""
    model = make_model()
    model.module.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@torch.no_grad()
def logits(model: Model) -> torch.Tensor:
    return model.module(**model.tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)).logits[0]


def refused(ref: Any, *words: str, **options: Any) -> None:
    """Check that loading fails with one line that says `words`."""
    with pytest.raises(InputError) as failed:
        load(ref, role="unlearned", **options)
    said = str(failed.value)
    assert "\n" not in said and "Traceback" not in said
    assert all(word in said for word in words), said


def test_a_saved_model_loads_as_it_was(make_model: Callable[..., Model], saved: Path) -> None:
    live, model = make_model(), load(saved, role="unlearned", device="cpu")
    assert (model.role, model.path, model.approximate) == ("unlearned", str(saved), False)
    assert model.fingerprint == live.fingerprint != make_model(seed=1).fingerprint
    assert model.shape == live.shape and model.shape[:2] == (4, 32)
    assert torch.equal(logits(model), logits(live))
    assert not model.module.training and not any(p.requires_grad for p in model.module.parameters())
    assert load(saved, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    assert load(live, role="reference-0") == replace(live, role="reference-0")


@pytest.mark.parametrize("kind", KINDS)
def test_anatomy_finds_what_decodes_the_last_block(make_model: Callable[..., Model], kind: str) -> None:
    model = make_model(kind)
    seen: list[torch.Tensor] = []
    watch = model.blocks[-1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    wanted = logits(model)
    watch.remove()
    state = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]
    with torch.no_grad():
        torch.testing.assert_close(model.decode(state)[0], wanted, rtol=0, atol=1e-4)


def test_a_module_that_is_no_decoder_is_refused(make_model: Callable[..., Model]) -> None:
    with pytest.raises(InputError, match="has no list of"):
        anatomy(torch.nn.Linear(2, 2))
    headless = make_model().module
    headless.get_output_embeddings = lambda: None
    with pytest.raises(InputError, match="no unembedding"):
        anatomy(headless)


def test_the_fingerprint_sees_one_changed_weight(make_model: Callable[..., Model]) -> None:
    module = make_model().module
    before = fingerprint(module)
    with torch.no_grad():
        module.model.layers[2].mlp.up_proj.weight[0, 0] += 1e-6
    assert fingerprint(module) != before
    with torch.no_grad():
        module.model.layers[2].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"weight model.layers.2.mlp.up_proj.weight holds NaN or infinity"):
        fingerprint(module)


def test_missing_things(saved: Path, tmp_path: Path, make_model: Callable[..., Model]) -> None:
    refused(tmp_path / "gone", "unlearned model", "there is no folder", "gone")
    refused(tmp_path / "gone.gguf", "there is no file", "gone.gguf")
    refused(make_model().module, "live module without a tokenizer", "tokenizer=")
    refused(saved, "unknown dtype 'float3'", "float32", dtype="float3")
    refused(saved, "unknown dtype 'nn'", dtype="nn")
    refused(saved, "device 'abacus' cannot be used here", "cpu", device="abacus")
    for name, words in (
        ("tokenizer*", "no tokenizer files"),
        ("config.json", "config.json"),
        ("*.safetensors", "holds no weights"),
    ):
        bad = shutil.copytree(saved, tmp_path / f"without {name[:5]}")
        for path in bad.glob(name):
            path.unlink()
        refused(bad, words, str(bad))


def test_broken_files_are_refused_in_one_line(saved: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        bad = shutil.copytree(saved, tmp_path / f"broken {name}")
        (bad / name).write_bytes((bad / name).read_bytes()[:40])
        refused(bad, "cannot load", str(bad))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but no more")
    refused(tmp_path / "broken.gguf", "cannot read", "broken.gguf")


def test_weights_that_are_not_finite_are_named(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][0, 0] = float("nan")
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    refused(saved, "model.layers.1.self_attn.k_proj.weight", "NaN")


def test_a_pickle_is_never_opened(saved: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "opened",)

    torch.save({"weight": Trap()}, saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    refused(saved, "only the pickle pytorch_model.bin", "can run code", "writes safetensors")
    assert not (tmp_path / "opened").exists()


@pytest.fixture
def adapter(saved: Path, make_model: Callable[..., Model]) -> tuple[Path, torch.Tensor]:
    """An adapter folder whose base path is relative to it, and the logits of base and adapter together."""
    from peft import LoraConfig, get_peft_model

    model = make_model()
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], base_model_name_or_path="../base")
    wrapped = get_peft_model(model.module, config)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.from_numpy(np.random.default_rng(0).normal(0, 0.5, weight.shape)))
    wrapped.peft_config["default"].base_model_name_or_path = "../base"
    folder = saved.parent / "adapter"
    wrapped.save_pretrained(folder)
    return folder, logits(replace(model, module=wrapped))


def test_an_adapter_loads_unmerged_on_its_base(
    saved: Path, adapter: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wanted = adapter
    monkeypatch.chdir(saved.parent.parent)  # the base is found from the adapter, not from here
    model, base = load(folder, role="unlearned", device="cpu"), load(saved, device="cpu")
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)
    assert (logits(base) - wanted).abs().max() > 1e-2
    assert any("lora_A" in name for name, _ in model.module.named_parameters())
    assert model.fingerprint != base.fingerprint and model.shape == base.shape
    merged = merged_copy(model.module)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(replace(model, module=merged)), wanted, rtol=0, atol=1e-4)
    assert any("lora_A" in name for name, _ in model.module.named_parameters())


def test_an_adapter_without_its_base_or_weights(saved: Path, adapter: tuple[Path, torch.Tensor]) -> None:
    folder = adapter[0]
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, "no adapter_model.safetensors", "pickles are refused")
    for broken in ("{", "[1]"):
        other = shutil.copytree(folder, folder.with_name(f"adapter {broken}"))
        (other / "adapter_config.json").write_text(broken, encoding="utf-8")
        refused(other, "adapter_config.json does not name a base model")
    shutil.rmtree(saved)
    refused(folder, "adapter's base", "../base")


def test_a_gguf_file_loads_and_is_marked_approximate(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    weights = write_gguf(path)
    model = load(path, device="cpu")
    assert model.approximate and model.path == str(path) and len(model.blocks) == 1
    module = model.module
    found = module.get_input_embeddings().weight, model.blocks[0].mlp.up_proj.weight
    for weight, name in zip(found, ("token_embd.weight", "blk.0.ffn_up.weight"), strict=True):
        np.testing.assert_array_equal(weight.numpy(), weights[name])
    assert model.tokenizer.decode(model.tokenizer("ab", add_special_tokens=False)["input_ids"]).strip() == "ab"
    assert torch.isfinite(module(input_ids=torch.tensor([[1, 3, 4]])).logits).all()


def write_gguf(path: Path) -> dict[str, Any]:
    """Write a Llama of one block, width 32, and return its weights as they were given."""
    gguf = pytest.importorskip("gguf")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "b", "ab", "\u2581ab"]
    draw, wide = np.random.default_rng(0), 32
    shapes = {"token_embd": (len(tokens), wide), "output": (len(tokens), wide)}
    shapes |= {f"blk.0.attn_{part}": (wide, wide) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (64, wide), "blk.0.ffn_up": (64, wide), "blk.0.ffn_down": (wide, 64)}
    weights = {f"{name}.weight": draw.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    norms = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    weights |= {f"{name}.weight": np.ones(wide, dtype=np.float32) for name in norms}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(wide)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0, 0.0, 0.0, *([0.0] * 256), -1.0, -2.0, -2.0, -0.5, -0.2])
    writer.add_token_types([2, 3, 3, *([6] * 256), *([1] * 5)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
