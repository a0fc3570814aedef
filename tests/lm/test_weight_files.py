"""Which of a folder's files are its weights: those that transformers loads, whatever else is beside them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlrazor.errors import RazorError
from rlrazor.lm import models, weight_files
from rlrazor.lm.sources import SavedWeights
from rlrazor.lm.weight_files import weights_by_config
from tiny_models import char_tokenizer, saved, tiny_llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in one file, another in shards, and an adapter; they are copied before they are changed."""
    root = tmp_path_factory.mktemp("folders")
    saved(root / "one", tiny_llama(), char_tokenizer())
    tiny_llama(seed=1).save_pretrained(root / "shards", max_shard_size="20KB")
    char_tokenizer().save_pretrained(root / "shards")
    models.add_lora(tiny_llama(), rank=2).save_pretrained(root / "adapter")
    return root


def read_as_loaded(folder: Path) -> bool:
    """Whether the weights that are read one by one are those of the model that transformers loads."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).state_dict()
    read = SavedWeights(folder)
    return set(read) == set(loaded) and all(torch.equal(read[name], weight) for name, weight in loaded.items())


STRAYS = (
    *("a", "zzz", "optimizer", "consolidated", "training_args", "model.fp16", "model-00001-of-00050", "tmp/model"),
    *("model-00099-of-00099", "adapter_model", "original/consolidated"),
)


@pytest.mark.parametrize("kind", ["one", "shards"])
def test_safetensors_beside_the_weights_are_not_weights(folders: Path, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(folders / kind, tmp_path / "model"))
    before = models.load(folder).fingerprint
    other = tiny_llama(seed=5).state_dict()
    for name in STRAYS:
        (path := folder / f"{name}.safetensors").parent.mkdir(exist_ok=True)
        save_file({**other, f"{name}.only": torch.ones(1)}, path, metadata={"format": "pt"})
    assert read_as_loaded(folder)
    assert models.load(folder).fingerprint == before


def test_one_file_goes_before_the_index_of_shards_beside_it(folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders / "shards", tmp_path / "model"))
    shutil.copy(folders / "one" / "model.safetensors", folder)
    assert read_as_loaded(folder)
    assert torch.equal(SavedWeights(folder)["lm_head.weight"], tiny_llama().lm_head.weight)
    # What the config names goes before both.
    save_file(tiny_llama(seed=7).state_dict(), folder / "mine.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "mine.safetensors"}))
    assert read_as_loaded(folder)
    seed = 7 if weights_by_config() else 0  # where this transformers does that
    assert torch.equal(SavedWeights(folder)["lm_head.weight"], tiny_llama(seed=seed).lm_head.weight)


def test_links_count_as_in_the_hubs_cache(folders: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted((folders / "shards").iterdir())):
        shutil.copy(path, tmp_path / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert read_as_loaded(snapshot)


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_map": {}}, "is damaged"),
        ({"weight_map": ["model.safetensors"]}, "is damaged"),
        ({"metadata": None}, "is damaged"),
        ({"weight_map": {"w": "model-00001-of-00077.safetensors"}}, "lacks model-00001-of-00077.safetensors"),
        ({"weight_map": {"w": "../one/model.safetensors"}}, "no safetensors file of it"),
        ({"weight_map": {"w": "/model.safetensors"}}, "no safetensors file of it"),
        ({"weight_map": {"w": "pytorch_model.bin"}}, "no safetensors file of it"),
        ({"weight_map": {"w": 3}}, "no safetensors file of it"),
    ],
)
def test_an_index_that_cannot_be_followed_is_said(
    folders: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(folders / "shards", tmp_path / "model"))
    shutil.copytree(folders / "one", tmp_path / "one")
    torch.save({}, folder / "pytorch_model.bin")
    edited(folder, **changes)
    for read in (models.load, SavedWeights):
        with pytest.raises(RazorError, match=message):
            read(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(RazorError, match="is damaged"):
        SavedWeights(folder)


def test_weights_of_a_model_and_an_adapter_in_one_folder_are_refused(folders: Path, tmp_path: Path) -> None:
    """Merged into the folder of its adapter, a model would be loaded with the adapter twice."""
    both = Path(shutil.copytree(folders / "one", tmp_path / "both"))
    shutil.copytree(folders / "adapter", both, dirs_exist_ok=True)
    for read in (models.load, SavedWeights, weight_files.check_adapter):
        with pytest.raises(RazorError, match=r"could be a model, an adapter, or an adapter merged into it"):
            read(both)
    with pytest.raises(RazorError, match="could be a model, an adapter"):
        models.load(folders / "one", adapter=both)
    with pytest.raises(RazorError, match="It is an adapter, not a model"):
        models.load(folders / "adapter")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"],
            r"has no model\.safetensors file\.$",
        ),
        (["pytorch_model.bin"], "Pickled weights are not read"),
        (["global_step8/mp_rank_00_model_states.pt", "training_args.bin"], "DeepSpeed's shards"),
        (["pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp"], "FSDP's shards"),
        (
            ["model-00001-of-00002.safetensors"],
            "has model-00001-of-00002.safetensors, which transformers does not load",
        ),
    ],
)
def test_what_is_there_instead_of_weights_is_said(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(RazorError, match=message):
        weight_files.check_weights(tmp_path, "it")


def test_a_file_that_is_cut_short_is_told_by_its_header(folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders / "one", tmp_path / "model"))
    path = folder / "model.safetensors"
    weight_files.check_weights(folder, "it")
    weight_files.check_weights(folders / "adapter", "it")
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 1, 8, 100, header - 1, header, header + 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RazorError, match=r"model\.safetensors is damaged"):
            weight_files.check_weights(folder, "it")
    for content in (whole + b"x", b"version https://git-lfs.github.com/spec/v1\n", (2**62).to_bytes(8, "little") * 9):
        path.write_bytes(content)
        with pytest.raises(RazorError, match="not a whole safetensors file"):
            weight_files.check_weights(folder, "it")
    # What a trainer saves that has the weights in other processes.
    save_file({name: torch.empty(0) for name in load_file(folders / "one" / "model.safetensors")}, path)
    with pytest.raises(RazorError, match="holds no weights"):
        weight_files.check_weights(folder, "it")
